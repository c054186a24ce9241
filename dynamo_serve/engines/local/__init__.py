"""The engines that run a model themselves: transformers' definitions, decoders over our own KV
pages."""

from dynamo_serve.engines.local.choice import build
from dynamo_serve.engines.local.engine import LocalEngine
from dynamo_serve.engines.local.startup import Limits, Wishes

__all__ = ["Limits", "LocalEngine", "Wishes", "build"]
