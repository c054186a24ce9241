"""Real Triton servers that are killed: one of two under load, and one that tests share."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from scripts import tritonserver
from tests.engines.triton_server.conftest import skip_without_server
from tests.engines.triton_server.test_forward import counted, events, forwarding, settings, settles
from tests.patience import PATIENCE_S

PAUSES = (40, 54, 68, 82, 96)  # so that they do not all begin and end together


def prompt(number: int) -> str:
    return f"{number} b c d e f @pause={PAUSES[number % len(PAUSES)]} g h i j"


def outcome(client: httpx.Client, number: int) -> tuple[bool, str, str | None]:
    """Whether anything was said, all that was said, and the code of the error."""
    body = {"prompt": prompt(number), "max_tokens": 40, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            return False, "", answer.json()["error"]["code"]
        *chunks, last = events(answer)
    error = last["error"]["code"] if "error" in last else None
    chunks += [] if error else [last]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    return bool(text), text, error


def test_a_killed_server_costs_only_what_it_had_begun_and_gets_its_share_again(
    tmp_path: Path,
) -> None:
    skip_without_server()
    ports = tritonserver.free_ports()
    with (
        tritonserver.running(["echo"], tmp_path / "one") as stays,
        tritonserver.running(["echo"], tmp_path / "two", ports=ports) as dies,
    ):
        config = settings(stays, endpoints=(stays.endpoint, dies.endpoint))
        with forwarding(tmp_path, config) as client, ThreadPoolExecutor(24) as pool:
            going = [pool.submit(outcome, client, i) for i in range(96)]
            settles(lambda: sum(each.done() for each in going) >= 30)
            dies.kill()
            results = [each.result(PATIENCE_S) for each in going]
            for number, (_, text, error) in enumerate(results):
                assert text == prompt(number) or error
            failed = [result for result in results if result[2]]
            assert 0 < len(failed) <= 24
            assert all(said and error == "unavailable" for said, _, error in failed), failed
            with tritonserver.running(["echo"], tmp_path / "two", ports=ports) as again:
                settles(lambda: served(client, again))


def served(client: httpx.Client, server: tritonserver.Running) -> bool:
    """Whether it has answered more than a canary."""
    outcomes = [outcome(client, i) for i in range(2)]
    assert not any(error for _, _, error in outcomes)
    return counted(server, "done") > 2


def test_a_server_that_tests_share_comes_back_and_says_how_it_ended(tmp_path: Path) -> None:
    skip_without_server()
    with tritonserver.running(["echo"], tmp_path / "log") as server:
        assert not server.revive(["echo"])
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(PATIENCE_S)
        told = server.revive(["echo"])
        assert "code -9" in told and "Started GRPCInferenceService" in told
        assert "echo_live" in server.metrics() and not server.revive(["echo"])
