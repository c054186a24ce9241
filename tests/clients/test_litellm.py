"""LiteLLM's proxy in front of the server, and the official client and LangChain before that."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from dynamo_serve.bench.own_server import free_port
from scripts.clients import PYTHON, PYTHON_OPENAI_2
from tests.clients import test_embeddings, test_openai, test_responses
from tests.clients.conftest import Programs, environment, python, skip_without
from tests.patience import PATIENCE_S

LOOK_EVERY_S = 0.2


@pytest.fixture(scope="module")
def proxy(url: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Where the proxy listens, without /v1."""
    skip_without(PYTHON_OPENAI_2)
    folder, port = tmp_path_factory.mktemp("litellm"), free_port()
    (folder / "config.yaml").write_text(json.dumps(settings(url)))  # YAML, too
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(python(PYTHON_OPENAI_2), "-m", "litellm.proxy.proxy_cli"),
                *("--config", str(folder / "config.yaml")),
                *("--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"),
            ],
            cwd=folder,
            env=environment(folder),
            stdout=log,
            stderr=log,
        )
    try:
        wait_until_alive(process, f"http://127.0.0.1:{port}", folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)


def settings(url: str) -> dict[str, Any]:
    """One model, as LiteLLM's documents say for a server of OpenAI's kind."""
    params = {
        "model": "openai/dserve-tiny",
        "api_base": f"{url}/v1",
        "api_key": "none",
        # Else it refuses the field by itself unless the model is called text-embedding-3-something.
        "allowed_openai_params": ["dimensions"],
    }
    return {
        "model_list": [{"model_name": "dserve-tiny", "litellm_params": params}],
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
    }


def wait_until_alive(process: subprocess.Popen[bytes], base: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{base}/health/liveliness", timeout=PATIENCE_S):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(LOOK_EVERY_S)
    pytest.fail("LiteLLM does not answer:\n" + log.read_text(errors="replace")[-3000:])


def told_by_status(told: Any) -> None:
    """It puts the status where the server had said what kind of fault it was."""
    assert told == {"param": "modalities", "code": "400"}


JUDGES = {**test_openai.PYTHON, "refusal": told_by_status}


@pytest.mark.parametrize("feature", JUDGES)
def test_chat(programs: Programs, proxy: str, feature: str) -> None:
    programs.judge(JUDGES[feature], PYTHON_OPENAI_2, "openai_client.py", feature, proxy)


@pytest.mark.parametrize("feature", test_responses.JUDGES)
def test_responses_through_it(programs: Programs, proxy: str, feature: str) -> None:
    judge = test_responses.JUDGES[feature]
    programs.judge(judge, PYTHON, "responses_client.py", feature, proxy)


@pytest.mark.parametrize("feature", test_embeddings.EMBEDDING)
def test_embeddings_through_it(programs: Programs, proxy: str, feature: str) -> None:
    judge = test_embeddings.EMBEDDING[feature]
    programs.judge(judge, PYTHON, "embedding_clients.py", feature, proxy)
