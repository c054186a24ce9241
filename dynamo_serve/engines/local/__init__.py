"""The engine that runs a model itself: transformers' definitions over our own KV pages."""

from dynamo_serve.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
