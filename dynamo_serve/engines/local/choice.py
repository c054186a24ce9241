"""Which of the local engines runs a model: that for decoders, or that for encoders."""

from __future__ import annotations

from collections.abc import Callable

from dynamo_serve.core.engine import Engine
from dynamo_serve.engines.local.encoder_engine import EncoderEngine
from dynamo_serve.engines.local.encoder_start import is_encoder
from dynamo_serve.engines.local.engine import LocalEngine
from dynamo_serve.engines.local.loader import load_config
from dynamo_serve.engines.local.startup import Wishes


def build(wishes: Wishes, progress: Callable[[str, float], None]) -> Engine:
    """As the model's settings say. Raises `EngineStartError` where these cannot be read."""
    if is_encoder(load_config(wishes.path)):
        return EncoderEngine(wishes, progress)
    return LocalEngine(
        *(wishes.model, wishes.engine, wishes.cache),
        max_decode_sequences=wishes.limits.max_decode_sequences,
        max_prefill_tokens=wishes.limits.max_prefill_tokens,
        path=wishes.path,
        progress=progress,
    )
