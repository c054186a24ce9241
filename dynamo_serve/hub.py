"""Models of the Hugging Face hub: their files are brought here at start, once, and from then on a
model is a folder. No engine asks the hub, so none waits for it when one has to be started again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from dynamo_serve.errors import ConfigError

log = logging.getLogger(__name__)

SETTINGS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")  # and tokenizers
WEIGHTS = "*.safetensors"
OLD_WEIGHTS = "pytorch_model*.bin"  # of models that have no others
OTHERS = ["*/*.safetensors", "consolidated*", "onnx/*", "openvino/*", "original/*"]
GATED = "its terms have to be accepted on the hub, and a token of who did so be in HF_TOKEN"
UNKNOWN = (
    "there is no such folder here, and no such model on the hub that can be seen; a private one "
    "needs a token in HF_TOKEN"
)


def fetched(model: str, weights: bool) -> str:
    """The folder with the newest files of `model`, a hub id, and its `weights` if they are wanted.

    Files that are here already are not brought again, and are served as they are where the hub is
    out of reach. Raises `ConfigError` where there is no such model, or neither hub nor copy.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    log.info("asking the hub for %s", model)
    folder = _snapshot(model, [*SETTINGS, WEIGHTS] if weights else SETTINGS)
    if weights and not any(folder.glob(WEIGHTS)):
        folder = _snapshot(model, [*SETTINGS, OLD_WEIGHTS])
    log.info("%s is in %s", model, folder)
    return str(folder)


def _snapshot(model: str, patterns: Iterable[str]) -> Path:
    wanted = list(patterns)
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=OTHERS))
    except GatedRepoError as error:
        raise ConfigError(f"model.path = {model!r}: {GATED}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"model.path = {model!r}: {UNKNOWN}") from error
    except Exception as error:  # the network, the disk, or what the hub answers
        why = " ".join(str(error).split("\n")[:1]) or type(error).__name__
        partial = getattr(error, "snapshot_path", None)
        if partial is None:
            raise ConfigError(
                f"model.path = {model!r}: there is no such folder here, no copy of it from the "
                f"hub, and the hub cannot be asked: {why}"
            ) from error
        log.warning("%s: files are missing, and the hub cannot be asked: %s", model, why)
        return Path(partial)
