"""Models of the Hugging Face hub: their files are brought here at start, once, and from then on a
model is a folder. No engine asks the hub, so none waits for it when one has to be started again.

Settings and tokenizer come first. Weights may take minutes; they come while the server says already
that it starts, in a process of their own: `python -m dynamo_serve.hub MODEL COMMIT`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from dynamo_serve.errors import ConfigError

log = logging.getLogger(__name__)

SETTINGS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")  # and tokenizers
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the latter where there are none of the former
OTHERS = ["*/*.safetensors", "consolidated*", "onnx/*", "openvino/*", "original/*"]
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
    if not sys.stderr.isatty():
        disable_progress_bars()
    log.info("asking the hub for %s", model)
    folder = _snapshot(model, SETTINGS)
    log.info("%s is in %s", model, folder)
    return str(folder)


async def bring_weights(model: str, folder: str) -> None:
    """The weights that belong to `folder`, which `settings_of` said, into it.

    By a process of its own: it ends with the task that waits here, which a download in a thread
    would not. Raises `ConfigError`.
    """
    commit = Path(folder).name
    if _are_here(model, commit):
        return
    began = time.monotonic()
    log.info("bringing the weights of %s from the hub", model)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "dynamo_serve.hub", model, commit),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us
    )
    try:
        told, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        why = told.decode().strip() or f"the download ended with exit code {process.returncode}"
        raise ConfigError(why)
    log.info("the weights of %s came in %.0f s", model, time.monotonic() - began)


def weights_of(model: str, commit: str | None = None) -> str:
    """The folder with settings and weights. Raises `ConfigError`."""
    for weights in WEIGHTS:
        folder = _snapshot(model, (*SETTINGS, weights), commit)
        if any(folder.glob(weights)):
            break
    return str(folder)


def _are_here(model: str, commit: str) -> bool:
    for weights in WEIGHTS:
        try:
            folder = snapshot_download(
                *(model,),
                revision=commit,
                allow_patterns=weights,
                ignore_patterns=OTHERS,
                local_files_only=True,
            )
        except OSError:  # not all of them
            return False
        if any(Path(folder).glob(weights)):
            return True
    return False


def _snapshot(model: str, patterns: Iterable[str], commit: str | None = None) -> Path:
    wanted = list(patterns)
    try:
        return Path(
            snapshot_download(model, revision=commit, allow_patterns=wanted, ignore_patterns=OTHERS)
        )
    except GatedRepoError as error:
        raise ConfigError(f"model.path = {model!r}: {GATED}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"model.path = {model!r}: {UNKNOWN}") from error
    except Exception as error:  # the network, the disk, or what the hub answers
        why = str(error).partition("\n")[0] or type(error).__name__
        partial = getattr(error, "snapshot_path", None)
        if partial is None:
            raise ConfigError(
                f"model.path = {model!r}: there is no such folder here, no whole copy of it from "
                f"the hub, and the hub cannot be asked: {why}"
            ) from error
        log.warning("%s: files are missing, and the hub cannot be asked: %s", model, why)
        return Path(partial)


def main() -> int:
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        weights_of(sys.argv[1], sys.argv[2])
    except ConfigError as error:
        sys.stdout.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
