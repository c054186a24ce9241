"""The ladder over HTTP: what an operator sees and can do; another engine is told, too."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from typing import get_args

import httpx
import pytest

from dynamo_serve.api.schema_admin import SteerRequest
from dynamo_serve.config import PINNED, RUNG, EngineSection, ModelSection, SchedulerSection
from dynamo_serve.core.ladder import NAMES, RUNGS
from dynamo_serve.metrics import Metrics
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import MAX_MODEL_LEN, config, serving
from tests.api.test_prefixes import until

ADMIN = {"Authorization": "Bearer admin-key-with-enough-characters"}


@pytest.fixture
def base(model_folder: str, tokenizer: Tokenizer) -> Generator[str]:
    settings = replace(
        config(admin_keys=("admin-key-with-enough-characters",)),
        scheduler=SchedulerSection(ladder_max_tokens=5),
        model=ModelSection(max_model_len=MAX_MODEL_LEN, lighter="int8"),
        engine=EngineSection(kind="fake", process=False, fake_step_ms=2.0),
    )
    metrics = Metrics(model="tiny", version="1")
    service = Service(settings, model_path=model_folder, observer=metrics)
    with serving(service, tokenizer, settings, metrics) as url:
        yield url


def level(base: str, rung: str) -> tuple[str, int]:
    told = httpx.get(f"{base}/admin/controller", headers=ADMIN).json()
    [found] = [entry for entry in told["rungs"] if entry["rung"] == rung]
    return found["mode"], found["level"]


def steer(base: str, **body: object) -> httpx.Response:
    return httpx.post(f"{base}/admin/controller", headers=ADMIN, json=body)


def test_operators_pin_and_release_a_rung(base: str) -> None:
    assert level(base, "cap_batch") == ("auto", 0)
    answer = steer(base, rung="cap_batch", mode="pin")
    assert answer.json() == {"rung": "cap_batch", "mode": "pin"}
    assert level(base, "cap_batch") == ("pin", 2)
    page = httpx.get(f"{base}/metrics").text
    assert 'dserve_ladder_rung{rung="cap_batch"} 2.0' in page
    assert 'dserve_ladder_changes_total{direction="up",rung="cap_batch"} 2.0' in page
    steer(base, rung="cap_batch", mode="forbid")
    assert level(base, "cap_batch") == ("forbid", 0)


def test_an_answer_without_a_stated_length_is_cut_while_the_rung_is_taken(base: str) -> None:
    free = {"class": "batch", "ignore_eos": True}

    def chat(**asked: int) -> tuple[int, str]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{base}/v1/chat/completions", json={**body, **free, **asked})
        told = answer.json()
        return told["usage"]["completion_tokens"], told["choices"][0]["finish_reason"]

    steer(base, rung="cap_batch", mode="pin")
    assert chat() == (5, "length")
    assert chat(max_tokens=9) == (9, "length")
    assert chat(max_completion_tokens=8) == (8, "length")
    steer(base, rung="cap_batch", mode="forbid")
    assert chat()[0] > 100


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"rung": "degrade", "mode": "pin"}, "shrink_chunks"),
        ({"rung": "spill", "mode": "pin"}, "no tier"),
        ({"rung": "cap_batch", "mode": "on"}, "forbid"),
        ({"rung": "restart_engine", "mode": "pin"}, "has no undo"),
        ({"rung": "cap_batch"}, "mode"),
        ({"rung": "cap_batch", "mode": "pin", "for_s": 5}, "for_s"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    base: str, body: dict[str, object], named: str
) -> None:
    answer = steer(base, **body)
    assert answer.status_code == 400 and named in answer.json()["error"]["message"]


def test_only_an_admin_key_opens_it(base: str) -> None:
    for answer in (
        httpx.get(f"{base}/admin/controller"),
        httpx.post(f"{base}/admin/controller", json={"rung": "cap_batch", "mode": "pin"}),
    ):
        assert answer.status_code == 401
    assert level(base, "cap_batch") == ("auto", 0)


def comes_up_with(base: str, weights: str) -> bool:
    """Whether there is an engine with these weights."""
    return bool(
        httpx.get(f"{base}/v1/server").json()["engine"]["quantization"] == weights
        and httpx.get(f"{base}/ready").status_code == 200
    )


def test_a_stream_goes_on_through_lighter_weights_and_back(base: str) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "return_token_ids": True}
    alone = httpx.post(f"{base}/v1/completions", json=body).json()["choices"][0]["token_ids"]
    ids: list[int] = []
    ends = []
    turns = {20: ("pin", "int8"), 100: ("forbid", "none")}
    with httpx.stream("POST", f"{base}/v1/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            ids += choice.get("token_ids", ())
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
            for at in [at for at in turns if len(ids) >= at]:
                mode, wanted = turns.pop(at)
                assert steer(base, rung="lighter_weights", mode=mode).status_code == 200
                until(lambda: comes_up_with(base, wanted))  # noqa: B023 - at once
    assert (ids, ends, turns) == (alone, ["length"], {})
    assert level(base, "lighter_weights") == ("forbid", 0)
    page = httpx.get(f"{base}/metrics").text
    assert 'dserve_ladder_changes_total{direction="up",rung="lighter_weights"} 1.0' in page
    assert httpx.get(f"{base}/admin/incidents", headers=ADMIN).json() == {"incidents": []}


def test_settings_and_api_name_the_rungs_that_there_are() -> None:
    assert tuple(RUNG.split("|")) == NAMES
    assert {*NAMES} - {*PINNED.split("|")} == {rung.name for rung in RUNGS if not rung.has_undo}
    assert get_args(SteerRequest.model_fields["rung"].annotation) == NAMES
