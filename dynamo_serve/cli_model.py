"""Which model to serve: its names, where it lies, and its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from dynamo_serve import bundled, hub
from dynamo_serve.config import ModelSection
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.errors import ConfigError
from dynamo_serve.text.dialect import Dialect, dialect_of
from dynamo_serve.text.tokenizer import Tokenizer

QUESTION, ANSWER = "What is a page?", "A fixed run of KV slots."
NO_FILE = (
    "this is a file; allowed: a folder as transformers saves it, with config.json, tokenizer and "
    "weights in .safetensors (GGUF is not read)"
)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def served_names(model: ModelSection, there: str = "") -> tuple[str, ...]:
    """What clients may call the model; the first is the one reported. `there` is its name on the
    servers that requests are forwarded to."""
    if model.served_names:
        return model.served_names
    if there:
        return (there,)
    if model.path == "bundled":
        return (bundled.NAME,)
    folder = Path(model.path).expanduser()
    return (folder.resolve().name if folder.is_dir() else model.path,)


def model_path(path: str) -> str:
    """A folder that exists, or what may be a hub id. Raises `ConfigError` for anything else."""
    if path == "bundled":
        return str(bundled.path())
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path = {path!r}: this folder holds no config.json")
        return str(folder)
    if folder.is_file():
        raise ConfigError(f"model.path = {path!r}: {NO_FILE}")
    if not HUB_ID.fullmatch(path):
        raise ConfigError(
            f"model.path = {path!r}: no such folder; allowed: a folder that holds a model, "
            "a hub id such as 'organisation/name', or 'bundled'"
        )
    return path


class Files(NamedTuple):
    """A model's files: the `folder` that they are in, or will be."""

    model: str  # as `model_path` says
    folder: str
    has_use: bool  # for weights

    @classmethod
    def of(cls, model: str, kind: str) -> Files:
        """Settings and tokenizer are there from now on; only an engine of the `kind` local has use
        for more. Raises `ConfigError`."""
        folder = model if Path(model).is_dir() else hub.settings_of(model)
        return cls(model, folder, kind == "local")

    async def bring_weights(self) -> None:
        """Raises `ConfigError` if they cannot be had."""
        if self.has_use and self.folder != self.model:
            await hub.bring_weights(self.model, self.folder)


def whole_folder(model: str) -> str:
    """Where all files of `model_path`'s answer are. Raises `ConfigError`."""
    return model if Path(model).is_dir() else hub.weights_of(model)


def load_tokenizer(path: str) -> Tokenizer:
    """The model's tokenizer. Raises `ConfigError` if there is none to be had."""
    try:
        return Tokenizer.load(path)
    except Exception as error:  # the library stumbles over a broken file in any way there is
        why = str(error).strip().partition("\n")[0]
        if not isinstance(error, (OSError, ValueError)):
            why = f"{type(error).__name__}: {why}"  # as in KeyError: 'added_tokens'
        raise ConfigError(f"model.path = {path!r}: no tokenizer: {why}") from error


def dialect(tokenizer: Tokenizer, model: ModelSection) -> Dialect:
    """How the model marks calls and thoughts: as the settings say, else as its template does."""
    return dialect_of(tokenizer.template, model.tool_parser, model.reasoning_parser)


def first_request(spec: EngineSpec, model: str) -> tuple[str, dict[str, object]]:
    """An endpoint that this model answers, and a body for it."""
    if spec.generates:
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": model, "stream": True, "temperature": 0, "messages": messages}
        return "/v1/chat/completions", body
    if spec.pooling == "score":
        return "/v1/rerank", {"model": model, "query": QUESTION, "documents": [ANSWER, QUESTION]}
    return "/v1/embeddings", {"model": model, "input": QUESTION}
