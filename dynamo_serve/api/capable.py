"""What the engine and its model can do, and what is refused because of it."""

from __future__ import annotations

from dynamo_serve.api.schema import Generation
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.errors import UnsupportedField


def check_honoured(body: Generation, spec: EngineSpec) -> None:
    """Raise `UnsupportedField` for what this engine cannot do, unless it asks for nothing."""
    known = type(body).model_fields
    for name, why in spec.refused.items():
        if name in known and getattr(body, name) != known[name].default:
            path = body.names.of(name)
            raise UnsupportedField(f"'{path}' is not supported by this engine: {why}.", param=path)


def check_generates(spec: EngineSpec) -> None:
    """Raise `UnsupportedField` for a model that makes vectors only."""
    if not spec.generates:
        use = "/v1/rerank" if spec.pooling == "score" else "/v1/embeddings or /v1/rerank"
        raise UnsupportedField(
            f"The model served here ({spec.facts.get('architecture')}) makes no text: use {use}.",
            param="model",
        )
