"""Recorded traffic, sent again: the same lengths, times, prefixes and people."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from dynamo_serve import cli, recording_files, trace
from dynamo_serve.bench import record, recorded
from dynamo_serve.bench.plan import Planned
from dynamo_serve.bench.recorded import Recording, hit_tokens, load, mooncake
from dynamo_serve.bench.replay import Notes, Tokens, Wishes, plan_of
from dynamo_serve.cli_replay import first_calls
from dynamo_serve.config import RecordSection
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.directory import digest
from dynamo_serve.errors import ConfigError
from dynamo_serve.observer import NoObserver
from dynamo_serve.recording import Recorder
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from dynamo_serve.trace import Arrival, Header
from tests.api.conftest import model_folder as model_folder  # noqa: PLC0414 - fixtures
from tests.api.conftest import tokenizer as tokenizer  # noqa: PLC0414
from tests.api.live import config, serving
from tests.patience import PATIENCE_S
from tests.test_service import run

SIZE = 16
KEYS = {name: f"key-of-{name}-with-enough-characters" for name in ("shop", "bank")}


def arrival(at: float, pages: Any = (), prompt: int = 40, output: int = 4, **more: Any) -> Arrival:
    return Arrival(at, prompt, output, 64, pages=pages, **more)


def of(*arrivals: Arrival) -> Recording:
    return Recording(Header(page_size=SIZE, spec={"vocab_size": 400}), arrivals)


def planned(*arrivals: Arrival, **wishes: Any) -> tuple[list[Planned], list[str]]:
    notes = Notes()
    plan = list(plan_of(of(*arrivals), Wishes(400, **wishes), notes))
    return plan, notes.lines()


def prompt_of(planned: Planned) -> tuple[int, ...]:
    assert callable(planned.call.prompt)
    return planned.call.prompt()


def test_equal_pages_become_equal_tokens_and_nothing_else_does() -> None:
    plan, _ = planned(arrival(5.0, ((0, 2),)), arrival(6.0, ((0, 1), (2, 1))))
    first, second = map(prompt_of, plan)
    assert [p.at for p in plan] == [0.0, 1.0]
    assert len(first) == len(second) == 40
    assert first[:SIZE] == second[:SIZE]
    assert first[SIZE : 2 * SIZE] != second[SIZE : 2 * SIZE]
    assert first[2 * SIZE :] != second[2 * SIZE :]
    again = prompt_of(planned(arrival(5.0, ((0, 2),)))[0][0])
    assert again == first


def test_a_prompt_goes_on_with_the_answer_that_came() -> None:
    turn = arrival(0.0, ((0, 2),), prompt=40, output=10, output_pages=((2, 1),))
    plan, _ = planned(turn, arrival(1.0, ((0, 4),), prompt=70))
    first = prompt_of(plan[0])
    assert plan[0].call.extra["return_token_ids"] and plan[0].call.on_answer
    plan[0].call.on_answer([range(100, 110)])
    assert prompt_of(plan[1])[: 3 * SIZE] == (*first, *range(100, 108))
    assert plan[1].call.on_answer is None and "return_token_ids" not in plan[1].call.extra


def test_a_prompt_waits_for_the_first_of_equal_answers() -> None:
    turn = arrival(0.0, ((0, 2),), prompt=40, output=10, output_pages=((2, 1),))
    last = arrival(2.0, ((0, 4),), prompt=70)
    first, between, again, late = planned(turn, replace(last, at=0.5), replace(turn, at=1.0), last)[
        0
    ]

    async def main() -> None:
        waits = [asyncio.ensure_future(p.call.ready()) for p in (between, late) if p.call.ready]
        assert len(waits) == 2
        prompt_of(first)
        assert first.call.on_answer and again.call.on_answer
        await asyncio.sleep(0)
        assert not any(wait.done() for wait in waits)
        first.call.on_answer([])  # it failed, and nobody waits for ever
        await asyncio.gather(*waits)
        prompt_of(again)
        again.call.on_answer([range(100, 110)])
        assert 107 in prompt_of(late)

    run(main)


def test_a_vector_needs_no_room_for_an_answer() -> None:
    full = arrival(0.0, prompt=64, output=0, pooling="last", ended="stop")
    refused = arrival(1.0, prompt=64, output=0, pooling="last", ended="refused")
    plan, told = planned(full, refused, arrival(2.0, prompt=64, ended="stop"), context=64)
    assert [p.call.is_embedding for p in plan] == [True, True, False]
    assert told == ["1: are longer than the 64 tokens of this server, and will be refused"]


def test_lengths_speed_hang_ups_and_readers_are_as_recorded() -> None:
    plan, told = planned(
        arrival(0.0),
        arrival(2.0, ended="cancelled", gone_at=1.5, output=2),
        arrival(4.0, reading=100.0, group="ab", priority=2),
        arrival(6.0, ended="refused", status=429, output=0),
        arrival(8.0, prompt=0, output=0, ended="refused", status=503),
        speed=2.0,
        api_key="k",
    )
    normal, gone, slow, refused = plan
    assert [p.at for p in plan] == [0.0, 1.0, 2.0, 3.0]
    assert (normal.call.max_tokens, normal.call.extra["ignore_eos"]) == (4, True)
    assert (gone.call.max_tokens, gone.call.behaviour.leaves_after_s) == (64, 1.5)
    assert slow.call.behaviour.bytes_per_s == 100
    assert (slow.call.extra["prompt_cache_key"], slow.call.priority) == ("ab", 2)
    assert refused.call.max_tokens == 4
    assert {p.call.api_key for p in plan} == {"k"}
    assert sorted(line[:10] for line in told) == ["1: left ou", "1: were re"]


def test_choices_of_a_call_are_one_call() -> None:
    two = arrival(0.0, ((0, 2),), num_choices=2, call=0, output=4)
    plan, told = planned(two, replace(two, num_choices=0, output_tokens=6), arrival(1.0))
    assert [p.call.extra.get("n") for p in plan] == [2, None]
    assert plan[0].call.max_tokens == 5
    assert told == ["1: calls have choices as long as theirs were on average"]


def test_a_deadline_is_sent_if_its_client_had_named_it() -> None:
    of_class = arrival(1.0, deadline=9.0, has_class_deadline=True)
    plan, _ = planned(arrival(0.0, deadline=2.0), of_class)
    assert [p.call.deadline for p in plan] == [2.0, None]


def test_recorded_texts_are_sent_only_if_that_is_asked_for() -> None:
    arrivals = arrival(0.0, text="once upon a time"), arrival(1.0)
    plan, told = planned(*arrivals, with_texts=True)
    assert plan[0].call.prompt == "once upon a time" and callable(plan[1].call.prompt)
    assert told == ["1: have no recorded text, and are sent with a made one"]
    assert callable(planned(*arrivals)[0][0].call.prompt)


def test_what_was_apart_is_sent_apart_where_only_a_salt_does_it() -> None:
    apart = arrival(0.0, salt="ab", text="once upon a time")
    assert planned(apart, with_texts=True)[0][0].call.extra["cache_salt"] == "ab"
    assert "cache_salt" not in planned(apart)[0][0].call.extra, "its made text has no equal"
    others = planned(apart, with_texts=True, is_ours=False)[0][0]
    assert "cache_salt" not in others.call.extra


def test_every_tenant_needs_a_key_if_any_has_one() -> None:
    arrivals = arrival(0.0, tenant="shop", class_name="batch"), arrival(1.0, tenant="bank")
    plan, _ = planned(*arrivals, keys=KEYS)
    assert [p.call.api_key for p in plan] == [KEYS["shop"], KEYS["bank"]]
    assert plan[0].call.class_name == "batch"
    assert planned(*arrivals)[0][0].call.class_name == ""  # it may not be the one key's
    with pytest.raises(ConfigError, match="no key for bank"):
        planned(*arrivals, keys={"shop": "k"})


def test_of_other_servers_nothing_is_asked_that_they_do_not_know() -> None:
    plan, _ = planned(arrival(0.0, priority=3, deadline=5.0, group="g"), is_ours=False)
    call = plan[0].call
    assert (dict(call.extra), call.priority, call.deadline) == ({}, 0, None)


def test_only_the_first_so_many() -> None:
    assert len(planned(*(arrival(float(i)) for i in range(9)), requests=4)[0]) == 4


def test_tokens_are_of_the_vocabulary() -> None:
    for vocab_size in (10, 400, 150_000):
        prompt = Tokens(SIZE, vocab_size, set()).prompt(arrival(0.0, ((0, 2),)))
        assert len(prompt) == 40 and all(0 <= token < vocab_size for token in prompt)


def test_what_a_cache_without_limit_would_find() -> None:
    assert hit_tokens([arrival(0.0, ((0, 2),)), arrival(1.0, ((0, 2),))], SIZE) == (80, 32)
    answered = arrival(0.0, ((0, 2),), output_pages=((2, 2),))
    assert hit_tokens([answered, arrival(1.0, ((0, 4),), prompt=64)], SIZE) == (104, 48)


def test_mooncake_has_the_same_blocks_for_the_same_text() -> None:
    lines = [json.loads(line) for line in mooncake(of(
        arrival(1.0, ((0, 64),), prompt=1030),
        arrival(2.5, ((0, 32), (64, 40)), prompt=1152, output=9),
        arrival(3.0, ended="refused"),
    ))]  # fmt: skip
    assert lines == [
        {"timestamp": 0, "input_length": 1030, "output_length": 4, "hash_ids": [0, 1, 2]},
        {"timestamp": 1500, "input_length": 1152, "output_length": 9, "hash_ids": [0, 3, 4]},
    ]


def test_files_of_two_recordings_are_not_mixed(tmp_path: Path) -> None:
    for number, header in enumerate([Header(), Header(part=1), Header(began_at=5.0, part=2)]):
        lines = [trace.dump(header), trace.dump(arrival(9.0 - number))]
        (tmp_path / f"{number}").write_text("\n".join(lines) + "\n")
    paths = [tmp_path / "1", tmp_path / "0"]
    assert [a.at for a in load(paths).arrivals] == [8.0, 9.0]
    with pytest.raises(ConfigError, match="several recordings"):
        load([*paths, tmp_path / "2"])
    with pytest.raises(ConfigError, match="both part 1"):
        load([*paths, tmp_path / "1"])


# --- a server that records, and another one


@contextmanager
def recording(
    folder: str, tokenizer: Tokenizer, tenants: Path, path: Path
) -> Iterator[tuple[str, Service]]:
    settings = config(tenants_file=str(tenants), resume_grace_s=0.0)
    engine = replace(settings.engine, fake_step_ms=2.0)  # an answer takes a while
    settings = replace(settings, engine=engine, record=RecordSection(path=str(path)))
    recorder = Recorder(settings, NoObserver(), tokenizer.decode, "tiny")
    service = Service(settings, model_path=folder, observer=recorder)
    with serving(service, tokenizer, settings) as url:
        while httpx.get(url + "/ready").status_code != 200:
            pass
        recorder.begin(service.spec, Tenancy())
        yield url, service
    recorder.close()
    assert not recorder.trouble


def mixed_traffic(url: str) -> None:
    """Shared heads, conversations, several choices, hang-ups, and refusals by a quota."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: _talk(url, number), range(16)))


def _talk(url: str, number: int) -> None:
    rng = random.Random(number)
    head = [random.Random(number % 3).randrange(30, 60) for _ in range(50)]
    key = KEYS["bank" if number % 4 == 3 else "shop"]
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S
    ) as client:
        ids = head + [rng.randrange(30, 60) for _ in range(rng.randrange(5, 20))]
        for turn in range(3):
            body = {
                **{"prompt": ids, "max_tokens": rng.randrange(5, 25), "ignore_eos": True},
                **{"return_token_ids": True, "n": 2 if number % 5 == 4 else 1},
            }
            if turn == 2 and number % 8 == 1:
                stream = {**body, "stream": True, "max_tokens": 100}
                with client.stream("POST", "/v1/completions", json=stream) as answer:
                    next(answer.iter_lines())
                return
            answer = client.post("/v1/completions", json=body)
            if answer.status_code == 429:
                return
            assert answer.status_code == 200, answer.text
            said = answer.json()["choices"][0]["token_ids"]
            ids = [*ids, *said, *(rng.randrange(30, 60) for _ in range(7))]


def test_a_replay_finds_as_much_in_the_cache_as_what_was_recorded(
    model_folder: str, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tenants, keys = tmp_path / "tenants.yaml", tmp_path / "keys.yaml"
    quota = {"bank": {"requests_per_minute": 2}}  # the next is allowed half a minute later
    entries = {
        name: {"keys": [f"sha256:{digest(key.encode())}"], "quota": quota.get(name, {})}
        for name, key in KEYS.items()
    }
    tenants.write_text(yaml.safe_dump({"tenants": entries}))
    keys.write_text(yaml.safe_dump(KEYS))
    with recording(model_folder, tokenizer, tenants, tmp_path / "first") as (url, _):
        mixed_traffic(url)
    files = [str(path) for path in (tmp_path / "first").glob(recording_files.PATTERN)]
    with recording(model_folder, tokenizer, tenants, tmp_path / "second") as (url, _):
        out = tmp_path / "run.jsonl"
        argv = ["replay", *files, url, "--tenants", str(keys), "--out", str(out)]
        assert cli.main(argv) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, second = (
        load(list((tmp_path / name).glob(recording_files.PATTERN))) for name in ("first", "second")
    )
    asked, found = hit_tokens(first.arrivals, SIZE)
    assert found / asked > 0.4  # or there is nothing to reproduce
    before, after = (recorded.cached_share(r.arrivals) for r in (first, second))
    # On a busy machine other requests are refused, and others come while a head is computed.
    assert before == pytest.approx(after, abs=0.1)
    assert told["cached_share"] == pytest.approx(told["recorded_cached_share"], abs=0.1)
    assert len(first.arrivals) == len(second.arrivals)
    for name in ("prompt_tokens", "tenant", "num_choices", "is_stream", "ended"):
        assert sorted(map(str, (getattr(a, name) for a in first.arrivals))) == sorted(
            map(str, (getattr(a, name) for a in second.arrivals))
        ), name
    whole = [
        sorted(a.output_tokens for a in r.arrivals if a.ended in ("stop", "length"))
        for r in (first, second)
    ]
    assert whole[0] == whole[1]
    assert {a.status for a in first.arrivals} == {a.status for a in second.arrivals} == {200, 429}
    assert len(record.read(out).records) == told["requests"]
    assert cli.main(["trace", *files, "--to-mooncake", str(tmp_path / "m.jsonl")]) == 0
    assert "cached share" in capsys.readouterr().out
    assert (tmp_path / "m.jsonl").read_text().count("\n") == sum(
        a.ended != "refused" for a in first.arrivals
    )


def test_only_what_is_sent_is_compared_with() -> None:
    nobody_looked = Arrival(0.0, 0, 0, 1, ended="refused")
    both = [Arrival(1.0, 9, 1, 1, call=1, num_choices=n) for n in (2, 0)]
    found = [nobody_looked, *both, Arrival(2.0, 9, 1, 1), Arrival(3.0, 9, 1, 1)]
    made = Recording(Header(), found)
    assert first_calls(made, 2).arrivals == found[1:4]
    assert first_calls(made, None).arrivals == found
