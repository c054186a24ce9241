"""A real Triton server for the tests beside this file, where one can run."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc", reason="the extra 'triton' is not installed")

from scripts import tritonserver
from scripts.tritonserver import Running

LOADED = ("echo", "echo_tensors", "echo_llmapi")
# Servers of more than one test, with the models that they have.
KEPT: list[tuple[Running, tuple[str, ...]]] = []


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    skip_without_server()
    log: Path = tmp_path_factory.mktemp("triton") / "log"
    with kept(LOADED, log) as server:
        yield server


@contextlib.contextmanager
def kept(load: Iterable[str], log: Path, models: Path = tritonserver.MODELS) -> Generator[Running]:
    load = tuple(load)
    with tritonserver.running(load, log, models=models) as server:
        KEPT.append((server, load))
        try:
            yield server
        finally:
            KEPT.remove((server, load))


@pytest.fixture(autouse=True)
def nobody_dies() -> Generator[None]:
    """A server that ends fails the test in which it does, with what it said last, and not those
    after it."""
    yield
    ended = [told for server, load in KEPT if (told := server.revive(load))]
    assert not ended, f"a Triton server was lost: {ended[0]}"


def skip_without_server() -> None:
    if reason := tritonserver.why_not():
        pytest.skip(f"no Triton server can run here: {reason}")
    if not tritonserver.is_installed():
        pytest.skip("no Triton server is installed: make triton ARGS=--install-only")
