"""A real Triton server for the tests beside this file, where one can run."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc", reason="the extra 'triton' is not installed")

from scripts import tritonserver
from scripts.tritonserver import Running

LOADED = ("echo", "echo_tensors", "echo_llmapi")


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    skip_without_server()
    log: Path = tmp_path_factory.mktemp("triton") / "log"
    with tritonserver.running(LOADED, log) as server:
        yield server


def skip_without_server() -> None:
    if reason := tritonserver.why_not():
        pytest.skip(f"no Triton server can run here: {reason}")
    if not tritonserver.is_installed():
        pytest.skip("no Triton server is installed: make triton ARGS=--install-only")
