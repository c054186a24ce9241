"""Tenants over HTTP: each gets in with its own key, on its own terms, and sees nobody else."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from dynamo_serve.core.request import Finish, Request, Summary, TokenEvent
from dynamo_serve.delivery import refused
from dynamo_serve.directory import digest
from dynamo_serve.metrics import Metrics
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.live import config, serving
from tests.api.stub import Script, StubService, hangs, says
from tests.patience import PATIENCE_S
from tests.test_metrics import REFUSAL

KEYS = {name: f"key-of-{name}-with-enough-characters" for name in ("acme", "beta", "admin")}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
SUMMARY = Summary(0.0125, 0.1, 0.2, 5, 1, 0.05, 0.04, 2.5, transit_seconds=0.002)


def tenants(**acme: object) -> dict[str, Any]:
    """A file of two tenants; `acme` is laid over the entry of the first."""
    hashed = {name: [f"sha256:{digest(key.encode())}"] for name, key in KEYS.items()}
    entries = {"acme": {"keys": hashed["acme"], **acme}, "beta": {"keys": hashed["beta"]}}
    return {"tenants": entries, "admin_keys": hashed["admin"]}


class House(NamedTuple):
    """A server with a tenants file, and a client for each key."""

    service: StubService
    file: Path
    base: str
    acme: httpx.Client
    beta: httpx.Client
    admin: httpx.Client

    def write(self, tree: object) -> None:
        self.file.write_text(yaml.safe_dump(tree))


@pytest.fixture
def script(tokenizer: Tokenizer) -> Script:
    return says(tokenizer, "hi", finish=Finish.LENGTH)


@pytest.fixture
def house(script: Script, tokenizer: Tokenizer, tmp_path: Path) -> Generator[House]:
    file = tmp_path / "tenants.yaml"
    file.write_text(yaml.safe_dump(tenants()))
    service = StubService(script)
    settings, metrics = config(tenants_file=str(file)), Metrics(model="tiny", version="1")
    with serving(service, tokenizer, settings, metrics) as base:
        clients = {
            name: httpx.Client(
                base_url=base, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S
            )
            for name, key in KEYS.items()
        }
        yield House(service, file, base, **clients)
        for client in clients.values():
            client.close()


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


def chat(client: httpx.Client, headers: Any = None, **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={**CHAT, **body}, headers=headers or {})


# --- who gets in


def test_the_tenant_comes_from_the_key_and_from_no_header(house: House) -> None:
    headers = {"X-Tenant": "beta", "X-Dynamo-Tenant": "beta"}
    assert chat(house.acme, headers=headers).status_code == 200
    assert chat(house.beta).status_code == 200
    first, second = (
        house.service.seen.get(timeout=PATIENCE_S),
        house.service.seen.get(timeout=PATIENCE_S),
    )
    assert (first.tenant, second.tenant) == ("acme", "beta")
    assert first.salt != second.salt


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer nobody", "Basic x", "Bearer hash"])
def test_without_a_known_key_nothing_opens(house: House, given: str | None) -> None:
    if given == "Bearer hash":  # what is stored is no key
        given = f"Bearer sha256:{digest(KEYS['acme'].encode())}"
    headers = {"Authorization": given} if given else {}
    for path in ("/v1/models", "/v1/requests/x", "/v1/server", "/admin/state"):
        answer = httpx.get(house.base + path, headers=headers)
        assert error(answer, 401)["code"] == "invalid_api_key"


def test_admin_keys_and_tenant_keys_open_different_doors(house: House) -> None:
    for path in ("/admin/state", "/admin/costs", "/admin/journal"):
        assert "key of a tenant" in error(house.acme.get(path), 403)["message"]
    error(house.acme.post("/admin/reload"), 403)
    for path in ("/v1/models", "/v1/requests/x", "/v1/server"):
        error(house.admin.get(path), 401)
    error(chat(house.admin), 401)


def test_without_an_admin_key_the_remedy_is_named(url: str) -> None:
    assert "server.admin_keys" in error(httpx.get(f"{url}/admin/state"), 403)["message"]


def test_no_log_line_shows_a_key_or_its_hash(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="dynamo_serve"):
        house.acme.get("/v1/models")
        httpx.get(house.base + "/v1/models", headers={"Authorization": "Bearer sesame-sesame"})
        house.admin.post("/admin/reload")
    for key in (*KEYS.values(), "sesame-sesame"):
        assert key not in caplog.text
        assert digest(key.encode()) not in caplog.text


# --- on what terms


def accepted(house: House, **body: Any) -> Request:
    answer = chat(house.acme, **body)
    assert answer.status_code == 200, answer.text
    return house.service.seen.get(timeout=PATIENCE_S)


def test_the_smaller_deadline_wins(house: House) -> None:
    header = {"X-Request-Deadline-Ms": "2000"}
    for body, headers, seconds in (
        ({"deadline_ms": 3000}, header, 2.0),
        ({"deadline_ms": 1000}, header, 1.0),
        ({"deadline_ms": 3000}, {}, 3.0),
        ({}, header, 2.0),
    ):
        request = accepted(house, headers=headers, **body)
        assert request.deadline - request.arrival == pytest.approx(seconds)


@pytest.mark.parametrize("header", ["0", "-1", "1.5", "", "soon", "86400001", "9" * 30, "٣"])
def test_a_bad_deadline_header_is_named(house: House, header: str) -> None:
    headers = [(b"X-Request-Deadline-Ms", header.encode())]
    answer = house.acme.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert error(answer, 400)["param"] == "X-Request-Deadline-Ms"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("deadline_ms", 0),
        ("deadline_ms", 86_400_001),
        ("deadline_ms", 1.5),
        ("priority", -1),
        ("priority", 101),
        ("class", 7),
        ("class", "gold"),
        ("class_name", "batch"),
        ("explain", "yes"),
    ],
)
def test_a_bad_term_is_named(house: House, field: str, value: object) -> None:
    assert error(chat(house.acme, **{field: value}), 400)["param"] == field


def test_a_request_may_lower_itself_and_not_rise(house: House) -> None:
    request = accepted(house, priority=9, **{"class": "batch"})
    assert (request.priority, request.class_name) == (9, "batch")
    assert accepted(house).class_name is None
    message = error(chat(house.acme, **{"class": "interactive"}), 403)["message"]
    assert "'interactive' promises more than this tenant's class 'standard'" in message
    assert "(rank, ttft_ms, itl_ms, strict); allowed here: 'standard', 'batch'." in message


@pytest.mark.parametrize(
    ("promise", "name"),
    [
        ({"rank": 1}, "rank"),
        ({"ttft_ms": 1999}, "ttft_ms"),
        ({"itl_ms": 199}, "itl_ms"),
        ({"max_queue_delay_ms": 49}, "max_queue_delay_ms"),
        ({"max_queue_delay_ms": 0}, "max_queue_delay_ms"),
        ({"strict": True}, "strict"),
    ],
)
def test_no_single_promise_of_a_chosen_class_may_be_better(
    house: House, promise: dict[str, object], name: str
) -> None:
    own = {"rank": 2, "ttft_ms": 2000, "itl_ms": 200, "max_queue_delay_ms": 50}
    classes = {"own": own, "same": own, "other": {**own, **promise}}
    house.write({**tenants(**{"class": "own"}), "classes": classes})
    assert house.admin.post("/admin/reload").status_code == 200
    assert accepted(house, **{"class": "same"}).class_name == "same"
    message = error(chat(house.acme, **{"class": "other"}), 403)["message"]
    assert f"promises more than this tenant's class 'own' ({name}); allowed" in message


def test_a_class_without_a_merge_window_has_the_servers(house: House) -> None:
    """With the server's 3 ms a class that names none starts sooner than batch with its 20."""
    quick = {"rank": 3}
    house.write({**tenants(**{"class": "batch"}), "classes": {"quick": quick}})
    assert house.admin.post("/admin/reload").status_code == 200
    message = error(chat(house.acme, **{"class": "quick"}), 403)["message"]
    assert "(max_queue_delay_ms); allowed here: 'batch'." in message


def test_what_a_class_does_not_promise_may_be_given_up(house: House) -> None:
    """Also strictness: what is not refused when it would be late has been promised less."""
    house.write(tenants(**{"class": "interactive"}))
    assert house.admin.post("/admin/reload").status_code == 200
    for name in ("interactive", "standard", "batch"):
        assert accepted(house, **{"class": name}).class_name == name


def test_a_class_may_bring_a_deadline_of_its_own(house: House) -> None:
    house.write({**tenants(), "classes": {"batch": {"deadline_ms": 500}}})
    assert house.admin.post("/admin/reload").status_code == 200
    request = accepted(house, **{"class": "batch"})
    assert request.deadline - request.arrival == pytest.approx(0.5)
    request = accepted(house, deadline_ms=9000, **{"class": "batch"})
    assert request.deadline - request.arrival == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/chat/completions", CHAT, {"0": 1}),
        ("/v1/chat/completions", {**CHAT, "n": 3}, {"0": 3, "1": 0, "2": 0}),
        ("/v1/completions", {"prompt": ["a", "b"]}, {"0": 2, "1": 0}),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, {"0": 4, "1": 0, "2": 0, "3": 0}),
    ],
)
def test_the_first_choice_answers_to_the_quotas_for_all(
    house: House, path: str, body: dict[str, object], expected: dict[str, int]
) -> None:
    assert house.acme.post(path, json=body).status_code == 200
    seen = [house.service.seen.get(timeout=PATIENCE_S) for _ in expected]
    assert [request.id.rpartition("-")[2] for request in seen] == list(expected)  # in this order
    assert {r.id.rpartition("-")[2]: r.num_choices for r in seen} == expected


# --- how it ends


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_is_a_finish_like_any_other(
    stubbed: Stubbed, tokenizer: Tokenizer, stream: bool
) -> None:
    _, base = stubbed(says(tokenizer, "hi", finish=Finish.DEADLINE))
    answer = httpx.post(f"{base}/v1/chat/completions", json={**CHAT, "stream": stream})
    assert answer.status_code == 200
    assert '"finish_reason":"deadline"' in answer.text
    assert '"error"' not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_says_when_to_come_back_and_why(house: House, stream: bool) -> None:
    async def refuse(request: Request) -> AsyncGenerator[TokenEvent, None]:
        raise refused(REFUSAL._replace(retry_after=2.1, limit=50.0, queue_position=51))
        yield

    house.service.script = refuse
    answer = chat(house.acme, stream=stream)
    assert answer.headers["retry-after"] == "3"
    assert error(answer, 429) == {
        "message": "too many",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
        "reason": "queue_length",
        "limit": 50.0,
        "predicted_wait_s": None,
        "queue_position": 51,
        "retry_after_s": 2.1,
    }


def test_one_refused_choice_fails_the_request_and_ends_the_others(house: House) -> None:
    async def refuse_the_second(request: Request) -> AsyncGenerator[TokenEvent, None]:
        if request.id.endswith("-1"):
            raise refused(REFUSAL._replace(is_own=False))
        async for event in hangs(request):
            yield event

    house.service.script = refuse_the_second
    assert error(chat(house.acme, n=3), 503)["code"] == "overloaded"
    ended = {house.service.cancelled.get(timeout=PATIENCE_S)[-2:] for _ in range(3)}
    assert ended == {"-0", "-1", "-2"}


# --- explain


def told(text: str) -> list[Any]:
    """What the choices' ends of a stream explain."""
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    ends = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sum("explain" in c for chunk in chunks for c in chunk["choices"]) == len(ends)
    return [choice["explain"] for choice in ends]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_end_of_each_choice_explains_it(house: House, path: str) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(request.id, (100,))
        yield TokenEvent(request.id, (101,), finish=Finish.LENGTH, summary=SUMMARY)

    house.service.script = script
    body = {"prompt": "hi"} if path == "/v1/completions" else CHAT
    expected = {
        "queue_ms": 12.5,
        "transit_ms": 2.0,
        "prefill_ms": 100.0,
        "decode_ms": 200.0,
        "stall_ms": 50.0,
        "device_ms": 40.0,
        "page_seconds": 2.5,
        "cached_tokens": 5,
        "num_preemptions": 1,
        "draft_tokens": 0,
        "draft_accepted_tokens": 0,
    }
    whole = house.acme.post(path, json={**body, "explain": True, "n": 2}).json()
    assert [choice["explain"] for choice in whole["choices"]] == [expected] * 2
    stream = house.acme.post(path, json={**body, "explain": True, "n": 2, "stream": True})
    assert told(stream.text) == [expected] * 2
    assert "explain" not in house.acme.post(path, json=body).text


def test_a_choice_that_a_stop_string_ended_is_explained_too(
    house: House, tokenizer: Tokenizer
) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(request.id, tuple(tokenizer.encode("hi stop more")))
        # What the engine says once it has been told to cancel.
        yield TokenEvent(request.id, finish=Finish.CANCELLED, summary=SUMMARY)

    house.service.script = script
    choice = chat(house.acme, stop="stop", explain=True).json()["choices"][0]
    assert choice["message"]["content"] == "hi "
    assert choice["finish_reason"] == "stop"
    assert choice["explain"]["queue_ms"] == 12.5
    assert (
        house.service.ended.get(timeout=PATIENCE_S) == house.service.seen.get(timeout=PATIENCE_S).id
    )


# --- what is seen


def test_a_request_is_found_by_its_own_tenant_only(house: House) -> None:
    id = chat(house.acme).json()["id"]
    house.service.answers["request"] = [{"id": f"{id}-0", "tenant": "acme", "queue_position": 3}]
    assert house.acme.get(f"/v1/requests/{id}").json() == {
        "id": id,
        "choices": [{"id": f"{id}-0", "tenant": "acme", "queue_position": 3}],
    }
    others = error(house.beta.get(f"/v1/requests/{id}"), 404)
    house.service.answers["request"] = []
    assert error(house.beta.get(f"/v1/requests/{id}"), 404) == others
    error(house.acme.get("/v1/requests/" + "x" * 5000), 404)


def test_a_queued_request_is_found_by_the_id_its_client_chose(house: House) -> None:
    house.service.answers["request"] = [
        {"id": "?", "tenant": "acme"},
        {"id": "!", "tenant": "beta"},
    ]
    for client, name in ((house.acme, "acme"), (house.beta, "beta")):
        chat(client, headers={"X-Request-Id": "mine/1"})
        request = house.service.seen.get(timeout=PATIENCE_S)
        answer = client.get("/v1/requests/mine/1").json()
        assert [choice["tenant"] for choice in answer["choices"]] == [name]
        assert house.service.asked[-1] == ("request", request.id.removesuffix("-0"))


def test_anothers_x_request_id_leads_nowhere(house: House) -> None:
    chat(house.acme, headers={"X-Request-Id": "secret-1"})
    house.service.answers["request"] = []
    error(house.beta.get("/v1/requests/secret-1"), 404)
    assert house.service.asked[-1] == ("request", "secret-1")  # not the other's response id


def test_errors_of_one_tenant_name_no_other(house: House) -> None:
    house.service.answers["request"] = [{"id": "x-0", "tenant": "beta"}]
    for answer in (
        house.acme.get("/v1/requests/x"),
        chat(house.acme, **{"class": "interactive"}),
        chat(house.acme, **{"class": "gold"}),
        house.acme.get("/admin/state"),
        house.acme.get("/v1/server"),
        house.acme.get("/v1/models"),
    ):
        assert "beta" not in answer.text


@pytest.fixture
def told_apart(script: Script, tokenizer: Tokenizer, tmp_path: Path) -> Generator[str]:
    """A server whose metrics tell of acme and beta."""
    file = tmp_path / "tenants.yaml"
    file.write_text(yaml.safe_dump(tenants()))
    service = StubService(script)
    used = {"acme": {"device_seconds": 17.25, "live": 3}, "beta": {}}
    service.answers["costs"] = {"whole": {}, "tenants": used}
    metrics = Metrics(model="tiny", version="1")
    request = Request(id="r", prompt_ids=(1,), max_tokens=1, tenant="acme")
    metrics.on_event(request, TokenEvent("r", refusal=REFUSAL), 1.0, None)
    with serving(service, tokenizer, config(tenants_file=str(file)), metrics) as base:
        httpx.get(f"{base}/metrics", headers=bearer(KEYS["admin"]))  # it knows them from now on
        yield base


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_metrics_tell_of_tenants_to_an_admin_key_only(told_apart: str) -> None:
    whole = httpx.get(f"{told_apart}/metrics", headers=bearer(KEYS["admin"])).text
    assert 'dserve_tenant_device_seconds_total{tenant="acme"} 17.25' in whole
    assert 'dserve_tenant_refusals_total{reason="queue_length",tenant="acme"} 1.0' in whole
    basic = {"Authorization": f"Basic {KEYS['admin']}"}
    in_query = f"?key={KEYS['admin']}&tenants=1"
    for headers, query in (
        ({}, ""),
        ({}, in_query),
        (bearer(KEYS["acme"]), ""),
        (bearer(f"sha256:{digest(KEYS['admin'].encode())}"), ""),
        (bearer("nobody-knows-this-key-at-all"), ""),
        (basic, ""),
        ({"Authorization": ""}, ""),
        ({"X-Api-Key": KEYS["admin"]}, ""),
    ):
        answer = httpx.get(f"{told_apart}/metrics{query}", headers=headers)
        assert answer.status_code == 200
        assert "acme" not in answer.text and "beta" not in answer.text
        assert "tenant=" not in answer.text and "17.25" not in answer.text
        assert 'dserve_refusals_total{reason="queue_length"} 1.0' in answer.text
        assert "dserve_ttft_seconds_count" in answer.text


def test_an_admin_key_that_a_reload_removes_shows_no_tenants_any_more(house: House) -> None:
    assert "# dserve_tenant_" not in house.admin.get("/metrics").text
    house.write({**tenants(), "admin_keys": []})
    assert house.admin.post("/admin/reload").status_code == 200
    assert "# dserve_tenant_" in house.admin.get("/metrics").text


def test_without_a_tenants_file_the_metrics_show_all_to_everybody(tokenizer: Tokenizer) -> None:
    service = StubService(hangs)
    service.answers["costs"] = {"tenants": {"default": {"device_seconds": 2.5}}}
    settings = config(admin_keys=(KEYS["admin"],), api_keys=(KEYS["acme"],))
    with serving(service, tokenizer, settings, Metrics(model="tiny", version="1")) as base:
        page = httpx.get(f"{base}/metrics").text
    assert 'dserve_tenant_device_seconds_total{tenant="default"} 2.5' in page


# --- administration


def test_an_administrator_sees_everything(house: House) -> None:
    entries = [{"at": float(i), "reason": "turn"} for i in range(150)]
    house.service.answers["state"] = {"now": 1.0, "wait": float("inf")}
    house.service.answers["journal"] = entries
    house.service.answers["costs"] = {"whole": {"device_seconds": 1.5}, "tenants": {}}
    assert house.admin.get("/admin/state").json()["wait"] is None
    assert house.admin.get("/admin/costs").json()["whole"] == {"device_seconds": 1.5}
    for query, limit in (("", "100"), ("?limit=2", "2"), ("?limit=010000", "10000")):
        assert house.admin.get(f"/admin/journal{query}").json() == {"journal": entries}
        assert house.service.asked[-1] == ("journal", limit)
    for limit in ("0", "x", "-1", "10001", "٣", "9" * 5000):
        answer = house.admin.get("/admin/journal", params={"limit": limit})
        assert error(answer, 400)["param"] == "limit"


def test_a_scheduler_that_does_not_answer_is_a_503(house: House) -> None:
    assert error(house.admin.get("/admin/state"), 503)["code"] == "unavailable"
    assert error(house.acme.get("/v1/requests/x"), 503)["code"] == "unavailable"
    assert httpx.get(f"{house.base}/metrics").status_code == 200


def test_a_reload_takes_hold_at_once(house: House) -> None:
    key = "another-key-with-enough-characters"
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{house.base}/v1/models", headers=headers).status_code == 401
    house.write(tenants(weight=3, keys=[f"sha256:{digest(key.encode())}"]))
    done = house.admin.post("/admin/reload").json()
    assert done["tenants"] == {"added": [], "removed": [], "changed": ["acme"]}
    assert httpx.get(f"{house.base}/v1/models", headers=headers).status_code == 200
    assert house.acme.get("/v1/models").status_code == 401
    assert house.service.tenancies[-1].tenants["acme"].weight == 3.0


def test_a_bad_file_changes_nothing(house: House) -> None:
    house.write(tenants(wieght=3))
    message = error(house.admin.post("/admin/reload"), 400)["message"]
    assert "tenants.acme.wieght: unknown key" in message
    assert house.acme.get("/v1/models").status_code == 200
    assert len(house.service.tenancies) == 1


def test_without_a_tenants_file_there_is_nothing_to_reload(tokenizer: Tokenizer) -> None:
    settings = config(admin_keys=(KEYS["admin"],))
    headers = {"Authorization": f"Bearer {KEYS['admin']}"}
    with serving(StubService(hangs), tokenizer, settings) as base:
        answer = httpx.post(f"{base}/admin/reload", headers=headers)
        assert "server.tenants_file is not set" in error(answer, 400)["message"]
        assert httpx.get(f"{base}/v1/models").status_code == 200  # still open


def test_a_removed_tenant_gets_its_stream_to_the_end(house: House, tokenizer: Tokenizer) -> None:
    goes_on = says(tokenizer, "hi", finish=Finish.LENGTH)

    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        house.write({"tenants": {"other": {}}, "admin_keys": tenants()["admin_keys"]})
        yield TokenEvent(request.id, (100,))
        while len(house.service.tenancies) < 2:
            await asyncio.sleep(0.001)
        async for event in goes_on(request):
            yield event

    house.service.script = script
    body = {**CHAT, "stream": True}
    with house.acme.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert house.admin.post("/admin/reload").json()["tenants"]["removed"] == ["acme", "beta"]
        rest = "\n".join(lines)
    assert '"finish_reason":"length"' in rest and "[DONE]" in rest
    assert house.acme.get("/v1/models").status_code == 401
