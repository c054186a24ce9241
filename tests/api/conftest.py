from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

import pytest

from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, save_model, serving
from tests.api.stub import Script, StubService

Stubbed = Callable[[Script], tuple[StubService, str]]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_folder: str) -> Tokenizer:
    return Tokenizer.load(model_folder)


@pytest.fixture(scope="session")
def url(model_folder: str, tokenizer: Tokenizer) -> Generator[str]:
    """The real service on the fake engine, behind real HTTP."""
    settings = config(max_body_bytes=200_000)
    with serving(Service(settings, model_path=model_folder), tokenizer, settings) as base:
        yield base


@pytest.fixture
def stubbed(tokenizer: Tokenizer) -> Generator[Stubbed]:
    """Serves a stub that follows a script: (service, base URL)."""
    with contextlib.ExitStack() as stack:

        def start(script: Script) -> tuple[StubService, str]:
            service = StubService(script)
            return service, stack.enter_context(serving(service, tokenizer, config()))

        yield start
