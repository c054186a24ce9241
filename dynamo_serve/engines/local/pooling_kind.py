"""What a model's embeddings are made of: as the settings say, else as its own files do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynamo_serve.errors import EngineStartError

# Flags in the settings of sentence-transformers' pooling module, and what they mean here.
FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_cls_token": "cls",
}
NAMES = {"mean": "mean", "lasttoken": "last", "cls": "cls"}  # in its newer settings
HARMLESS = ("Transformer", "Pooling", "Normalize")


def pooling_kind(path: str, wish: str, *, is_encoder: bool) -> str:
    """Mean, last or cls. Raises `EngineStartError` for what would not be the model's own
    embedding."""
    kind = wish if wish != "auto" else _said(path) or ("mean" if is_encoder else "last")
    if kind == "cls" and not is_encoder:
        raise EngineStartError(
            "model.pooling: cls takes the first token, which in a decoder has seen no other; "
            "choose mean or last"
        )
    return kind


def _said(path: str) -> str:
    """What the files that sentence-transformers keeps beside a model say; "" without any."""
    modules = _read(path, "modules.json")
    if not isinstance(modules, list):
        return ""
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in HARMLESS:
            raise EngineStartError(
                f"model.path: modules.json of {path!r} has a {kind} module, which is not "
                "supported; set model.pooling to serve embeddings without it"
            )
        if kind == "Pooling":
            return _pooling(path, f"{module['path']}/config.json")
    return ""


def _pooling(path: str, name: str) -> str:
    settings = _read(path, name) or {}
    found = [kind for flag, kind in FLAGS.items() if settings.get(flag)]
    if not found:
        said = settings.get("pooling_mode") or ()
        modes = [said] if isinstance(said, str) else said
        found = [NAMES[mode] for mode in modes if mode in NAMES]
    others = [flag for flag, on in settings.items() if flag.startswith("pooling_mode_") and on]
    if len(found) != 1 or len(others) > 1:
        raise EngineStartError(
            f"model.path: {name} of {path!r} asks for a pooling that is not supported; "
            "model.pooling can be mean, last or cls"
        )
    return found[0]


def _read(path: str, name: str) -> Any:
    """A JSON file beside the model; None if there is none."""
    file = Path(path, name)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
