"""Models of the Hugging Face hub: their files are brought here at start, once, and from then on a
model is a folder. No engine asks the hub, so none waits for it when one has to be started again.

Settings and tokenizer come first. Weights may take minutes; they come while the server says already
that it starts, in a process of their own: `python -m dynamo_serve.hub MODEL COMMIT`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_session, set_client_factory, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from dynamo_serve.errors import ConfigError
from dynamo_serve.start import PR_SET_PDEATHSIG, prctl

log = logging.getLogger(__name__)

SETTINGS = (  # and tokenizers
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"),
    *("*.bpe", "*.codes", "*.spm", "*.tokenizer", "*.vocab"),
)
OTHERS = ["onnx/*", "openvino/*", "original/*"]
WEIGHTS = (  # as transformers looks for them, with what names the parts of them
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
TIMEOUT_S = 10.0  # for the next byte; the library itself would wait for ever
TELL_EVERY_S = 30.0  # in a log
GATED = "its terms have to be accepted on the hub, and a token of who did so be in HF_TOKEN"
UNKNOWN = (
    "there is no such folder here, and no such model on the hub that can be seen; a private one "
    "needs a token in HF_TOKEN"
)


def settings_of(model: str) -> str:
    """The folder with the newest files of `model`, a hub id, but for its weights. Those that are
    here are not brought again, and are what is served where the hub is out of reach.

    Raises `ConfigError` where there is no such model, or neither the hub nor a copy.
    """
    _prepare()
    log.info("asking the hub for %s", model)
    folder = _snapshot(model, SETTINGS)
    log.info("%s is in %s", model, folder)
    return str(folder)


async def bring_weights(model: str, folder: str) -> None:
    """The weights that belong to `folder`, which `settings_of` said, into it.

    By a process of its own: it ends with the task that waits here, which a download in a thread
    would not. Raises `ConfigError`.
    """
    if _are_here(folder):
        return
    began = time.monotonic()
    log.info("bringing the weights of %s from the hub", model)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "dynamo_serve.hub", model, Path(folder).name),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us
    )
    coming = asyncio.create_task(process.communicate())
    try:
        while not (await asyncio.wait({coming}, timeout=TELL_EVERY_S))[0]:
            if not sys.stderr.isatty():
                log.info("%s: %.2f GiB are here", model, _bytes_here(folder) / 2**30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    told = (await coming)[0].decode().strip()
    if process.returncode:
        raise ConfigError(told or f"the download ended with exit code {process.returncode}")
    log.info("the weights of %s came in %.0f s", model, time.monotonic() - began)


def weights_of(model: str, commit: str | None = None) -> str:
    """The folder with settings and weights. Raises `ConfigError`."""
    _prepare()
    folder = _snapshot(model, SETTINGS, commit)
    for names in _weights_in(folder):
        folder = _snapshot(model, (*SETTINGS, *names), folder.name)
        if _has(folder, names):
            return str(folder)
    raise ConfigError(
        f"model.path = {model!r}: neither here nor on the hub are weights of it as transformers "
        "saves them, in model.safetensors or pytorch_model.bin"
    )


def _are_here(folder: str) -> bool:
    return any(_has(Path(folder), names) for names in _weights_in(Path(folder)))


def _weights_in(folder: Path) -> Iterator[list[str]]:
    """Names of files that hold all weights, in the order in which they are looked for."""
    for whole, index in WEIGHTS:
        yield [whole]
        if (folder / index).is_file():
            try:
                parts = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                yield sorted(set(parts.values()))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{folder / index}: no list of the parts: {error!r}") from error


def _has(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _bytes_here(folder: str) -> int:
    """Of all that was brought of a model, or is on its way."""
    blobs = Path(folder).parent.parent / "blobs"
    size = 0
    for file in blobs.glob("*"):
        with contextlib.suppress(OSError):  # it has another name by now
            size += file.stat().st_size
    return size


def _snapshot(model: str, patterns: Iterable[str], commit: str | None = None) -> Path:
    why = "" if commit else _why_not(model)
    try:
        return Path(
            snapshot_download(
                model,
                revision=commit,
                allow_patterns=list(patterns),
                ignore_patterns=OTHERS,
                local_files_only=bool(why),
            )
        )
    except Exception as error:  # the network, the disk, or what the hub answers
        why = why or _told(model, error)
        partial = getattr(error, "snapshot_path", None)
        if partial is None:
            raise ConfigError(
                f"model.path = {model!r}: there is no such folder here, no whole copy of it from "
                f"the hub, and the hub cannot be asked: {why}"
            ) from error
        log.warning("%s: files are missing", model)
        return Path(partial)


def _why_not(model: str) -> str:
    """Why the hub cannot be asked for `model`; empty if it can. Raises `ConfigError` if it has no
    such model for us."""
    try:
        HfApi().model_info(model, timeout=TIMEOUT_S)
    except Exception as error:
        why = _told(model, error)
        log.warning("what is here of %s is served, the hub cannot be asked: %s", model, why)
        return why
    return ""


def _told(model: str, error: Exception) -> str:
    """What went wrong, in a line. Raises `ConfigError` where it has a remedy."""
    for kind, remedy in ((GatedRepoError, GATED), (RepositoryNotFoundError, UNKNOWN)):
        if isinstance(error, kind):
            raise ConfigError(f"model.path = {model!r}: {remedy}") from error
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".partition("\n")[0]


def _prepare() -> None:
    if not sys.stderr.isatty():
        disable_progress_bars()

    usual = get_session()

    def client() -> Any:
        hooks = usual.event_hooks
        return type(usual)(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT_S)

    set_client_factory(client)


def main() -> int:
    with contextlib.suppress(OSError):  # where there is none, a server that is killed leaves us
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        weights_of(sys.argv[1], sys.argv[2])
    except ConfigError as error:
        sys.stdout.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
