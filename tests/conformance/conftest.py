"""One real Triton server for all of them, where one can run; our own engine is tried anywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

import pytest

from dynamo_serve import bundled
from scripts.tritonserver import Running
from tests.api.live import save_model
from tests.conformance.subjects import Subject, forwarded, ours
from tests.engines.triton_server.conftest import kept, nobody_dies, skip_without_server

__all__ = ["nobody_dies"]  # watches over this folder's tests as well

MODELS = ("dserve", "echo", "echo_tensors", "echo_llmapi")


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    """triton_models/ as it is."""
    skip_without_server()
    log = tmp_path_factory.mktemp("triton") / "log"
    with kept(MODELS, log) as server:
        yield server


@pytest.fixture(scope="session")
def outside() -> Generator[Subject]:
    with ours() as subject:
        yield subject


@pytest.fixture(scope="session")
def inside(loaded: Running) -> Generator[Subject]:
    with forwarded(loaded, "dserve", str(bundled.path())) as subject:
        yield subject


@pytest.fixture(params=MODELS[1:])
def echo(request: pytest.FixtureRequest, tmp_path: Path, loaded: Running) -> Generator[Subject]:
    """Whose speed can be told to it."""
    with forwarded(loaded, request.param, save_model(tmp_path)) as subject:
        yield subject


@pytest.fixture(scope="session", params=["outside", "inside", *MODELS[1:]])
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Subject]:
    with contextlib.ExitStack() as stack:
        if request.param in ("outside", "inside"):
            yield request.getfixturevalue(request.param)
        else:
            path = save_model(tmp_path_factory.mktemp("model"))
            server = request.getfixturevalue("loaded")
            yield stack.enter_context(forwarded(server, request.param, path))
