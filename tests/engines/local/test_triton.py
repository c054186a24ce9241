"""The Triton-language kernel, run by the language's own interpreter where it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from dynamo_serve.engines.local.attention import BackendNeeds, LayerSpec
from dynamo_serve.engines.local.triton_attention import TritonAttention
from dynamo_serve.engines.local.trial import try_backend

cpu, sinks = torch.device("cpu"), torch.randn(4)
for page_size, dtype in ((4, torch.float32), (16, torch.float16)):
    for layer in (
        LayerSpec(4, 2, 16, 16, 0.25),
        LayerSpec(4, 4, 8, 8, 0.3, window=3),
        LayerSpec(4, 1, 24, 12, 0.2, softcap=2.0),
        LayerSpec(4, 2, 16, 16, 0.25, window=9, sinks=sinks.to(dtype)),
        LayerSpec(16, 8, 128, 128, 0.08),
    ):
        needs = BackendNeeds([layer], page_size, dtype, cpu)
        try_backend(TritonAttention(page_size, cpu), needs)
        print("agrees")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the Triton compiler is not installed"
)
def test_kernel_agrees_with_the_reference_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["agrees"] * 10
