"""What /metrics tells of real Triton servers: what became of our requests, and what they say."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import httpx
import pytest

from dynamo_serve.cli_metrics import metrics_of
from dynamo_serve.observer import Vitals
from scripts.tritonserver import Running
from tests.engines.triton_server.test_forward import Json, complete, forwarding, settings, settles

NOBODY = "127.0.0.1:9"
PATH = "/v1/completions"


class Shown(NamedTuple):
    """A server in front of a real one, and of an address where none is."""

    client: httpx.Client
    endpoint: str

    def page(self) -> str:
        return self.client.get("/metrics").text

    def value(self, name: str, *, page: str | None = None, **labels: str) -> float:
        """Of `page`, where values are compared that go on changing; else of a new one."""
        wanted = {"endpoint": self.endpoint, **labels}
        for line in (page or self.page()).splitlines():
            if line.startswith(f"{name}{{") and all(
                f'{k}="{v}"' in line for k, v in wanted.items()
            ):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"there is no {name} of {wanted}")

    def ended(self, outcome: str) -> float:
        return self.value("dserve_triton_requests_total", outcome=outcome)


@pytest.fixture(scope="module")
def shown(triton: Running, tmp_path_factory: pytest.TempPathFactory) -> Generator[Shown]:
    config = settings(
        triton,
        endpoints=(triton.endpoint, NOBODY),
        metrics_endpoints=(f"127.0.0.1:{triton.ports.metrics}", NOBODY),
        first_token_timeout_s=3.0,
        connect_timeout_s=2.0,
    )
    metrics = metrics_of(config, "tiny", Vitals)
    with forwarding(tmp_path_factory.mktemp("model"), config, metrics) as client:
        yield Shown(client, triton.endpoint)


def test_requests_are_counted_by_server_and_by_how_they_ended(shown: Shown) -> None:
    assert complete(shown.client).status_code == 200
    assert complete(shown.client, "a b @fail=1").status_code == 500
    assert complete(shown.client, "hush @mute=1").status_code == 504
    body: Json = {"prompt": "a b @pause=100", "max_tokens": 200, "ignore_eos": True}
    with shown.client.stream("POST", PATH, json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
        settles(lambda: shown.value("dserve_triton_in_flight") == 1)
    settles(lambda: shown.ended("cancelled") == 1)
    assert [shown.ended(how) for how in ("done", "failed", "late")] == [1, 1, 1]
    assert shown.value("dserve_triton_in_flight") == 0
    assert shown.value("dserve_triton_ttft_seconds_count") == 3
    assert shown.value("dserve_triton_open") == 1
    assert shown.value("dserve_triton_ejections_total") == 0


def test_a_server_that_is_not_there_is_shut_and_harms_nobody(shown: Shown) -> None:
    away = Shown(shown.client, NOBODY)
    assert away.value("dserve_triton_open") == 0
    assert away.value("dserve_triton_ejections_total") == 1
    assert away.value("dserve_triton_scrape_ok") == 0
    assert shown.value("dserve_triton_scrape_ok") == 1


def test_what_a_server_tells_of_itself_is_there_with_its_mean_batch(shown: Shown) -> None:
    page = shown.page()
    count = shown.value("nv_inference_count", page=page, model="echo", version="1")
    executions = shown.value("nv_inference_exec_count", page=page, model="echo", version="1")
    assert count > 0 and executions > 0
    assert shown.value("dserve_triton_mean_batch", page=page, model="echo") == count / executions
    assert shown.value("echo_requests_total", model="echo", outcome="done") > 0, (
        "its models' own metrics, too"
    )
