"""Learn from one dry forward which attention layers a model has and what each asks for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dynamo_serve.engines.local.attention import LayerSpec
from dynamo_serve.errors import EngineStartError

KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}

# What a model's code may raise when its inputs or its attention are not what it expects.
FORWARD_FAILURES = (
    *(TypeError, ValueError, LookupError, AttributeError, AssertionError),
    *(NotImplementedError, RuntimeError),
)


class UnsupportedModel(EngineStartError):
    """The model's architecture cannot run on our pages; the message names it and says why."""

    def __init__(self, config: PreTrainedConfig, reason: str) -> None:
        super().__init__(f"{architecture(config)} is not supported by the local engine: {reason}")


def architecture(config: PreTrainedConfig) -> str:
    """The name a person knows the model's code by."""
    return str((getattr(config, "architectures", None) or [config.model_type])[0])


def is_headless(config: PreTrainedConfig) -> bool:
    """Whether a decoder was saved without what makes logits: those trained for embeddings are."""
    return architecture(config).endswith("Model")


class LayerRecorder:
    """Stands in for attention once: notes what every layer asks for and answers zeros."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerSpec] = {}  # keyed by id() of the attention module
        self.objections: list[str] = []

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        self._object(module, key, attention_mask, settings)
        scale = settings.get("scaling")
        self.layers[id(module)] = LayerSpec(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            scale=float(key.shape[3] ** -0.5 if scale is None else scale),
            window=settings.get("sliding_window"),
            softcap=settings.get("softcap"),
            sinks=settings.get("s_aux"),
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    def _object(
        self,
        module: torch.nn.Module,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        settings: dict[str, Any],
    ) -> None:
        causal = settings.get("is_causal")
        if causal is None:
            causal = getattr(module, "is_causal", True)
        if id(module) in self.layers:
            self.objections.append("it runs one attention layer twice in a forward")
        if key.shape[0] != 1:
            self.objections.append("its attention reshapes the batch")
        if attention_mask is not None:
            self.objections.append("it builds its own attention mask")
        if settings.get("position_bias") is not None:
            self.objections.append("its attention needs a position bias (ALiBi)")
        if not causal:
            self.objections.append("its attention is not causal")


def check_config(config: PreTrainedConfig) -> None:
    """Refuse, before any weight is read, what the settings alone show to be impossible."""
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(config, "it has an encoder")
    unknown = set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYER_TYPES
    if unknown:
        raise UnsupportedModel(config, f"it has layers of type {', '.join(sorted(unknown))}")


def discover_layers(
    model: PreTrainedModel, recorder: LayerRecorder, num_tokens: int, position_limit: int
) -> dict[int, LayerSpec]:
    """Run `num_tokens` once; the spec of every attention layer by module id, in order.

    A step may be longer than any one sequence, so positions start anew at `position_limit`.
    `recorder` must be the attention that `model` uses. Raises `UnsupportedModel`.
    """
    config = model.config
    device = next(model.parameters()).device
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=device)
    try:
        with torch.inference_mode():
            model(
                input_ids=ids,
                position_ids=torch.arange(num_tokens, device=device)[None] % position_limit,
                use_cache=False,
                logits_to_keep=1,
            )
    except torch.OutOfMemoryError:
        raise
    except FORWARD_FAILURES as error:
        raise UnsupportedModel(config, f"a packed forward failed: {error}") from error
    expected = int(config.get_text_config().num_hidden_layers)
    found = len(recorder.layers)
    if found == 0:
        raise UnsupportedModel(config, "its attention does not go through AttentionInterface")
    if found != expected:
        reason = f"{found} of its {expected} layers attend through AttentionInterface"
        raise UnsupportedModel(config, reason)
    if recorder.objections:
        raise UnsupportedModel(config, recorder.objections[0])
    _check_windows(config, list(recorder.layers.values()))
    return recorder.layers


def _check_windows(config: PreTrainedConfig, layers: list[LayerSpec]) -> None:
    """A window that only the mask knew of would be lost: we build no mask."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    if types:
        lost = any(
            kind == "sliding_attention" and layer.window is None
            for kind, layer in zip(types, layers, strict=True)
        )
    else:
        wished = getattr(text, "sliding_window", None)
        wished = wished if getattr(text, "use_sliding_window", True) else None
        lost = wished is not None and all(layer.window is None for layer in layers)
    if lost:
        raise UnsupportedModel(config, "it does not tell its attention the sliding window")
