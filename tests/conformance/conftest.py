"""One real Triton server for all of them, where one can run; our own engine is tried anywhere."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from dynamo_serve import bundled
from scripts import tritonserver
from scripts.tritonserver import Running
from tests.api.live import save_model
from tests.conformance.subjects import Subject, forwarded, ours
from tests.engines.triton_server.conftest import kept, nobody_dies, skip_without_server

__all__ = ["nobody_dies"]  # watches over this folder's tests as well

MODELS = ("dserve", "echo", "echo_tensors", "echo_llmapi")


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    """triton_models/ as it is, but for float32: who else is in a step may round bfloat16 otherwise,
    and so change what is drawn."""
    skip_without_server()
    folder = tmp_path_factory.mktemp("triton")
    models = Path(shutil.copytree(tritonserver.MODELS, folder / "models"))
    with (models / "dserve" / "config.pbtxt").open("a") as file:
        file.write('parameters { key: "model.dtype" value { string_value: "float32" } }\n')
    with kept(MODELS, folder / "log", models) as server:
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
