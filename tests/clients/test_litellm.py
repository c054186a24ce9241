"""LiteLLM's proxy in front of the server, and the official client in front of that."""

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
from scripts.clients import PYTHON_OPENAI_2 as KIT
from tests.clients.conftest import PATIENCE_S, Programs, environment, python, skip_without
from tests.clients.test_openai import PYTHON as JUDGES

LOOK_EVERY_S = 0.2


@pytest.fixture(scope="module")
def proxy(url: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Where the proxy listens, without /v1."""
    skip_without(KIT)
    folder, port = tmp_path_factory.mktemp("litellm"), free_port()
    (folder / "config.yaml").write_text(json.dumps(settings(url)))  # YAML, too
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(python(KIT), "-m", "litellm.proxy.proxy_cli"),
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
    params = {"model": "openai/dserve-tiny", "api_base": f"{url}/v1", "api_key": "none"}
    return {"model_list": [{"model_name": "dserve-tiny", "litellm_params": params}]}


def wait_until_alive(process: subprocess.Popen[bytes], base: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{base}/health/liveliness", timeout=PATIENCE_S):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(LOOK_EVERY_S)
    pytest.fail("LiteLLM does not answer:\n" + log.read_text(errors="replace")[-3000:])


@pytest.mark.parametrize("feature", JUDGES)
def test_proxy(programs: Programs, proxy: str, feature: str) -> None:
    JUDGES[feature](programs.ask(KIT, "openai_client.py", feature, proxy))
