"""Which sets of native kernels this machine can test."""

from __future__ import annotations

import pytest

from dynamo_serve.native.library import NativeUnavailable, available

KERNEL_SETS = ("amx", "avx512_bf16", "avx512", "avx2")
NATIVE = ("gemma", "gemma2", "gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3")  # of the zoo


def require_kernels(name: str) -> None:
    """Skip, with the reason, where the set `name` cannot run."""
    if name in ("auto", "torch"):
        return
    try:
        found = available()
    except NativeUnavailable as reason:
        pytest.skip(f"no native kernels: {reason}")
    if name not in found:
        pytest.skip(f"this processor does not run {name}")
