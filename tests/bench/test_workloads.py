"""Workloads: what their requests look like, before anything is sent."""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynamo_serve.bench import scenario
from dynamo_serve.bench.assembly import make_plan
from dynamo_serve.bench.lengths import lengths, whole
from dynamo_serve.bench.plan import Planned
from dynamo_serve.bench.shapes import SHAPES
from dynamo_serve.bench.texts import IdTexts, Library, TokenizerTexts, WordTexts
from dynamo_serve.errors import ConfigError

BUNDLED = Path(__file__).parents[2] / "dynamo_serve" / "bundled"


def planned(keys: dict[str, Any], context: int | None = None) -> list[Planned]:
    wanted = scenario.scenario_of({"rate": 5.0, "requests": 300, "seed": 7, **keys})
    return list(make_plan(wanted, WordTexts(), context, wanted.seed))


@pytest.mark.parametrize("name", SHAPES)
def test_every_workload_makes_as_many_calls_as_asked_for_in_the_order_of_time(name: str) -> None:
    plan = planned({"workload": name})
    assert len(plan) == 300
    times = [call.at for call in plan if call.at is not None]
    assert times == sorted(times)
    assert all(p.call.kind == name and p.call.max_tokens > 0 for p in plan)
    assert all((p.at is None) == (p.after is not None) for p in plan)
    assert all(p.after in (None, number - 1) for number, p in enumerate(plan))


def test_the_same_seed_makes_the_same_plan() -> None:
    assert planned({"workload": "rag"}) == planned({"workload": "rag"})
    assert planned({"workload": "rag"}) != planned({"workload": "rag", "seed": 8})


def test_a_chat_opens_with_the_shared_prompt_and_goes_on_with_the_users_words_alone() -> None:
    plan = planned({"workload": "chat"})
    first = [p.call.messages for p in plan if p.after is None]
    later = [p for p in plan if p.after is not None]
    assert len({messages[0]["content"] for messages in first}) == 1
    assert all([m["role"] for m in messages] == ["system", "user"] for messages in first)
    assert later
    assert all([m["role"] for m in p.call.messages] == ["user"] for p in later)
    assert all(p.think > 0 for p in later)


def test_documents_are_asked_for_by_zipfs_law() -> None:
    plan = planned(
        {
            "workload": "rag",
            "requests": 3000,
            "shape": {"documents": 20, "picks": 1, "input": 5, "system": 0, "document": 30},
        }
    )
    counts = Counter(" ".join(p.call.messages[0]["content"].split()[:30]) for p in plan)
    ranked = [count for _, count in counts.most_common()]
    assert len(ranked) == 20
    assert ranked[0] / ranked[1] == pytest.approx(2.0, rel=0.2)
    assert ranked[0] / ranked[9] == pytest.approx(10.0, rel=0.35)


def test_a_share_of_prompts_is_long() -> None:
    plan = planned({"workload": "long", "requests": 2000})
    assert sum(p.call.prompt_tokens > 1000 for p in plan) / 2000 == pytest.approx(0.1, abs=0.02)


def test_no_session_outgrows_the_context() -> None:
    plan = planned({"workload": "agentic", "shape": {"turns": 50}}, context=2000)
    assert max(p.call.prompt_tokens + p.call.max_tokens for p in plan) <= 2000
    assert any(p.after is not None for p in plan)


def test_a_prompt_that_leaves_no_room_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no room in a context of 500"):
        planned({"workload": "agentic"}, context=500)


def test_a_mix_has_the_shares_keys_and_promises_of_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NIGHT_KEY", "secret")
    plan = planned(
        {
            "workload": "plain",
            "requests": 2000,
            "mix": [
                {"name": "day", "share": 3, "tenant": "web", "class": "interactive",
                 "promises": {"ttft_ms": 500}},
                {"name": "night", "share": 1, "key": "$NIGHT_KEY", "deadline": 9.0},
            ],
        }
    )  # fmt: skip
    day = [p.call for p in plan if p.call.kind == "day"]
    night = [p.call for p in plan if p.call.kind == "night"]
    assert len(day) / len(night) == pytest.approx(3, rel=0.15)
    assert {(c.tenant, c.class_name, c.targets["ttft"]) for c in day} == {
        ("web", "interactive", 0.5)
    }
    assert {(c.api_key, c.deadline) for c in night} == {("secret", 9.0)}


def test_a_share_of_the_clients_misbehaves() -> None:
    odd = {"slow": 0.2, "hang_up": {"share": 0.1, "after_tokens": 3}, "deadline": 0.1, "storm": 0.1}
    plan = planned({"workload": "plain", "requests": 4000, "misbehaviour": odd})
    found = Counter(
        "slow" if c.behaviour.bytes_per_s
        else "hang_up" if c.behaviour.leaves_after_tokens == 3
        else "deadline" if c.deadline is not None
        else c.behaviour.retry
        for c in (p.call for p in plan)
    )  # fmt: skip
    assert {name: round(n / 4000, 1) for name, n in found.items()} == {
        **{"slow": 0.2, "hang_up": 0.1, "deadline": 0.1, "storm": 0.1},
        "none": 0.5,
    }
    kinds = {p.call.kind for p in plan}
    assert kinds == {"plain", "plain slow", "plain hang_up", "plain deadline", "plain storm"}


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [
        ("64", 64, 64, 64),
        ("uniform:10,20", 10, 20, 15),
        ("exponential:50,200", 1, 200, 49),
        ("lognormal:40,0.5,400", 1, 400, 45.3),
        ("normal:100,10", 50, 150, 100),
    ],
)
def test_lengths_have_the_mean_and_the_limits_of_their_distribution(
    text: str, low: int, high: int, mean: float
) -> None:
    rng = random.Random(1)
    found = [whole(lengths(text), rng) for _ in range(20_000)]
    assert low <= min(found) <= max(found) <= high
    assert sum(found) / len(found) == pytest.approx(mean, rel=0.03)


def test_lengths_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths"
    path.write_text("3\n5\n")
    rng = random.Random(1)
    assert {whole(lengths(f"file:{path}"), rng) for _ in range(50)} == {3, 5}


@pytest.mark.parametrize("text", ["many", "uniform:1", "normal:1,2,3,4", "-3", "zipf:1"])
def test_what_is_no_length_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ConfigError, match="uniform:LOW,HIGH"):
        lengths(text)


def test_texts_of_a_tokenizer_are_of_exact_length_also_when_joined() -> None:
    from tokenizers import Tokenizer

    texts, rng = TokenizerTexts(BUNDLED), random.Random(1)
    count = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    parts = [texts.make(size, rng) for size in (1, 17, 300)]
    assert [len(count.encode(text).ids) for text in parts] == [1, 17, 300]
    assert len(count.encode("".join(parts)).ids) == 318


def test_ids_stay_away_from_the_ends_of_the_vocabulary() -> None:
    ids = IdTexts(1000).make(5000, random.Random(1))
    assert (len(ids), min(ids), max(ids)) == (5000, 100, 899)


def test_a_library_gives_everybody_the_same_text_for_a_name() -> None:
    a, b = Library(WordTexts(), 1), Library(WordTexts(), 1)
    assert a.get("x", 50) == b.get("x", 50) != a.get("y", 50)
    assert a.get("x", 50) != Library(WordTexts(), 2).get("x", 50)


def test_sharegpt_conversations_are_sessions_of_the_persons_words(tmp_path: Path) -> None:
    talk = [("human", "one two"), ("gpt", "a" * 100), ("human", "three"), ("gpt", "b" * 50)]
    said = [{"from": who, "value": text} for who, text in talk]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"conversations": said}, {"conversations": said[1:2]}]))
    plan = planned({"workload": "sharegpt", "file": str(path)})
    assert [p.call.messages[0]["content"] for p in plan] == ["one two", "three"]
    assert [p.call.max_tokens for p in plan] == [20, 10]
    assert [p.after for p in plan] == [None, 0]


def test_mooncake_prompts_begin_alike_where_their_hashes_do(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 1000, "input_length": 1300, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 3500, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 9]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    timed = {"arrivals": "trace", "rate": None, "speed": 2.0}
    plan = planned({"workload": "mooncake", "file": str(path), **timed})
    closed = planned({"workload": "mooncake", "file": str(path), "rate": None, "concurrency": 2})
    assert [p.at for p in closed] == [None, None]
    first, second = (p.call.messages[0]["content"].split() for p in plan)
    assert [p.at for p in plan] == [0.0, 1.25]
    assert (len(first), len(second)) == (1300, 1100)
    assert first[:1024] == second[:1024]
    assert first[1024:1100] != second[1024:]
    assert [p.call.max_tokens for p in plan] == [5, 7]


def test_burstgpt_lines_are_requests_at_their_times(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens"])
        rows.writerows(
            [[5, "ChatGPT", 30, 8, 38], [6, "GPT-4", 20, 0, 20], [9, "GPT-4", 10, 4, 14]]
        )
    plan = planned({"workload": "burstgpt", "file": str(path), "arrivals": "trace", "rate": None})
    assert [(p.at, p.call.prompt_tokens, p.call.max_tokens) for p in plan] == [
        (0.0, 30, 8),
        (4.0, 10, 4),
    ]


@pytest.mark.parametrize("name", ["sharegpt", "mooncake", "burstgpt"])
def test_a_file_in_another_format_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "other"
    path.write_text('{"some": "thing"}\n{"else": 1}\n')
    with pytest.raises(ConfigError, match=str(path)):
        planned({"workload": name, "file": str(path)})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"wrokload": "chat"}, "unknown key 'wrokload'"),
        ({"workload": "chats"}, "no workload 'chats'"),
        ({"shape": {"inputs": 3}}, "unknown key 'inputs'"),
        ({"rate": "fast"}, "allowed: numbers"),
        ({"requests": True}, "allowed: whole numbers"),
        ({"requests": None}, "when does it end"),
        ({"rate": None}, "how much load"),
        ({"arrivals": "sometimes"}, "allowed: constant"),
        ({"arrivals": "ramp", "rate": None}, "first rate, last rate"),
        ({"arrivals": "ramp", "ramp": [1, 2, 3]}, "rate: ramp has its own"),
        ({"sweep": {"first": 1}}, "rate: a sweep has its own"),
        ({"steps": [[1, 2]]}, "only with arrivals: steps"),
        ({"arrivals": "trace", "rate": None}, "needs one file"),
        ({"arrivals": "constant", "burstiness": 0.5}, "burstiness: only with"),
        ({"speed": 2.0}, "only with arrivals: trace"),
        ({"workload": "mooncake", "file": "x", "shape": {"input": 3}}, "lengths of its own"),
        ({"prompts": "ids", "tokenizer": "x"}, "leave one of them out"),
        ({"file": "x"}, "only for sharegpt"),
        ({"targets": {"ttft_p99": 3}}, "unknown 'ttft_p99'"),
        ({"promises": {"ttft": 3}}, "allowed: ttft_ms"),
        ({"misbehaviour": {"rude": 0.5}}, "allowed: slow"),
        ({"misbehaviour": {"slow": 0.7, "storm": 0.7}}, "more than 1"),
        ({"retry": "often"}, "allowed: none"),
        ({"mix": [{"share": 0}]}, "numbers above 0"),
        ({"mix": [{"weight": -1}]}, "mix.0.weight is -1"),
        ({"mix": [{"rate": 3}]}, "unknown key 'rate'"),
        ({"key": "$NOT_IN_THE_ENVIRONMENT"}, "NOT_IN_THE_ENVIRONMENT"),
    ],
)
def test_a_fault_in_a_scenario_is_named_with_what_is_allowed(
    keys: dict[str, Any], told: str
) -> None:
    plain = {"rate": 5.0, "requests": 10, **keys}
    with pytest.raises(ConfigError, match=told.replace("$", r"\$")):
        scenario.scenario_of({key: value for key, value in plain.items() if value is not None})


def test_plans_are_made_as_they_are_read() -> None:
    wanted = replace(
        scenario.scenario_of({"rate": 5.0, "requests": 10**12}), workload="plain", requests=10**12
    )
    assert len(list(itertools.islice(make_plan(wanted, WordTexts(), None, 0), 5))) == 5
