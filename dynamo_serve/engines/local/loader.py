"""Weights and settings from a folder, loaded once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dynamo_serve.engines.local.discovery import UnsupportedModel, check_config
from dynamo_serve.errors import EngineStartError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class PositionLimit(NamedTuple):
    """How many positions a model is good for, and which of its settings says so."""

    num_tokens: int
    reason: str


def resolve_device(wish: str) -> torch.device:
    """`wish` is auto, cpu, cuda or cuda:N. Raises `EngineStartError` when it is not there."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError as error:
        raise EngineStartError(f"engine.device: {wish!r} is not a device of torch") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineStartError(f"engine.device: {wish!r} is neither auto, cpu, cuda nor cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise EngineStartError(f"engine.device: {wish} was asked for, torch sees {count} CUDA GPUs")
    return device


def load_config(path: str) -> PreTrainedConfig:
    """The model's settings; checked for what we cannot run. Raises `EngineStartError`."""
    try:
        config = AutoConfig.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,  # None would ask on the terminal, and run it on a yes
        )
    except Exception as error:  # whatever a settings class makes of a bad value
        raise EngineStartError(f"model.path: no usable model at {path!r}: {error}") from error
    check_config(config)
    return config


def load_model(
    path: str,
    config: PreTrainedConfig,
    dtype: str,
    device: torch.device,
    attention: str,
    auto: Any = AutoModelForCausalLM,
    unused: tuple[str, ...] = (),
) -> PreTrainedModel:
    """The model in evaluation mode on `device`, its attention function set to `attention`.

    `dtype` auto takes the checkpoint's; the network is never asked. `auto` is the
    class of transformers that knows what kind of model it is; parameters that begin with one of
    `unused` may be missing. Raises `EngineStartError`, or `UnsupportedModel` when the architecture
    has no such attention.
    """
    # A progress bar that nobody reads would tear the log; the engine reports progress itself.
    transformers_logging.disable_progress_bar()
    try:
        model, loading = auto.from_pretrained(
            path,
            config=config,
            dtype=DTYPES.get(dtype, "auto"),
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a broken file raises; there is one remedy for all
        if "AutoModelForCausalLM" in str(error):
            raise UnsupportedModel(config, "it is not a causal language model") from error
        # Older model code looks its attention class up by name, or knows three names only.
        if "attn_implementation" in str(error) or error.args[:1] == (attention,):
            reason = "its attention does not go through AttentionInterface"
            raise UnsupportedModel(config, reason) from error
        kind = type(error).__name__
        raise EngineStartError(f"model.path: cannot load {path!r}: {kind}: {error}") from error
    check_complete(path, loading, unused)
    if model.dtype not in DTYPES.values():
        raise EngineStartError(
            f"model.dtype: the checkpoint in {path!r} is in {model.dtype}, which is not served; "
            f"choose one of {', '.join(DTYPES)}"
        )
    if model.config._attn_implementation != attention:
        raise UnsupportedModel(config, "its attention does not go through AttentionInterface")
    ready: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return ready


def check_complete(path: str, loading: dict[str, Any], unused: tuple[str, ...] = ()) -> None:
    """Transformers fills what a checkpoint lacks with random numbers: nobody wants these served."""
    for what, names in (
        ("lacks", sorted(k for k in loading.get("missing_keys", ()) if not k.startswith(unused))),
        ("has another shape than config.json says for", loading.get("mismatched_keys", ())),
    ):
        if names:
            shown = ", ".join(map(str, list(names)[:3]))
            raise EngineStartError(
                f"model.path: the checkpoint in {path!r} {what} {len(names)} tensors of the model "
                f"({shown}, …); is config.json the one that belongs to it?"
            )


def position_limit(config: PreTrainedConfig) -> PositionLimit:
    """The longest sequence that `config` allows us to serve exactly.

    Rotary scalings that change with the longest position of a batch would make KV pages depend on
    their neighbours, so such models are served up to where the scaling starts.
    """
    text = config.get_text_config()
    named = ("max_position_embeddings", "n_positions", "seq_length")
    limits = [PositionLimit(int(getattr(text, n)), n) for n in named if getattr(text, n, None)]
    limit = limits[0] if limits else PositionLimit(2048, "no limit of its own")
    rope = getattr(text, "rope_parameters", None) or {}
    for scaling in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if scaling.get("rope_type") in ("dynamic", "longrope"):
            start = scaling.get("original_max_position_embeddings")
            start = start or getattr(text, "original_max_position_embeddings", None)
            if start:
                limit = min(limit, PositionLimit(int(start), "where its rotary scaling starts"))
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk and "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        limit = min(limit, PositionLimit(int(chunk), "attention_chunk_size"))
    return limit
