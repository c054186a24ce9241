"""Which attention backend runs: the wish, or the best that this device and torch offer."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dynamo_serve.engines.local.attention import (
    AttentionBackend,
    BackendNeeds,
    BackendUnavailable,
)
from dynamo_serve.engines.local.native_attention import build as build_native
from dynamo_serve.engines.local.torch_attention import TorchAttention
from dynamo_serve.errors import EngineStartError

logger = logging.getLogger(__name__)


CANDIDATES = {"cuda": ("varlen", "triton", "torch"), "cpu": ("native", "torch")}


def choose_backend(wish: str, needs: BackendNeeds) -> AttentionBackend:
    """The backend named `wish`, or for auto the first of the device's list that can run.

    Raises `EngineStartError` when a named backend cannot run. For auto, every backend passed over
    is logged with the reason.
    """
    if wish != "auto":
        try:
            return BUILDERS[wish](needs)
        except BackendUnavailable as reason:
            raise EngineStartError(
                f"engine.attention: {wish} cannot run here: {reason}; 'auto' takes what can"
            ) from reason
    for name in CANDIDATES[needs.device.type]:
        if name == "native" and needs.kernels == "torch":
            continue
        try:
            return BUILDERS[name](needs)
        except BackendUnavailable as reason:
            logger.warning("attention backend %s cannot run here: %s", name, reason)
    raise AssertionError("the torch backend runs anywhere")


def _torch(needs: BackendNeeds) -> AttentionBackend:
    return TorchAttention(needs.page_size, needs.dtype, needs.device)


def _native(needs: BackendNeeds) -> AttentionBackend:
    if needs.device.type != "cpu":
        raise BackendUnavailable(f"it runs on the CPU, this is {needs.device}")
    return build_native(needs)


def _varlen(needs: BackendNeeds) -> AttentionBackend:
    _require_cuda(needs)
    # Imported here: older torch does not have the module it needs.
    from dynamo_serve.engines.local import varlen_attention  # noqa: PLC0415

    return varlen_attention.build(needs)


def _triton(needs: BackendNeeds) -> AttentionBackend:
    _require_cuda(needs)
    # Imported here: only CUDA builds of torch come with the compiler.
    from dynamo_serve.engines.local import triton_attention  # noqa: PLC0415

    return triton_attention.build(needs)


def _require_cuda(needs: BackendNeeds) -> None:
    if needs.device.type != "cuda":
        raise BackendUnavailable(f"it needs a CUDA device, this is {needs.device}")


BUILDERS: dict[str, Callable[[BackendNeeds], AttentionBackend]] = {
    "torch": _torch,
    "native": _native,
    "varlen": _varlen,
    "triton": _triton,
}
