"""Runs against a stub server: what becomes of each kind of call. Nothing here is timed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.stub_server import Delays, Stub, serving
from dynamo_serve.bench import about, record
from dynamo_serve.bench.bodies import BodyExtras
from dynamo_serve.bench.driver import Driving, sessions
from dynamo_serve.bench.plan import Behaviour, Call, Planned
from dynamo_serve.bench.record import Record, Run
from dynamo_serve.bench.run import Options, execute
from dynamo_serve.errors import ConfigError
from tests.architecture.source import ROOT
from tests.patience import PATIENCE_S
from tests.tries import sooner_or_later

FAST = Delays(first=0.002, gap=0.001)
CALL = Call(kind="test", prompt="word word", max_tokens=4, prompt_tokens=2)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(Stub(delays=FAST)) as found:
        yield found


def run(stub: Stub, *calls: Call, **driving: Any) -> Run:
    """All at once."""
    plan = [Planned(0.0, call) for call in calls]
    return execute(plan, Options(stub.url, Driving(**driving)))


def only(found: Run) -> Record:
    (one,) = found.records
    return one


def wish(**stub: Any) -> Call:
    return replace(CALL, extra={"stub": stub})


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_stream_is_recorded_with_its_times_and_counts(stub: Stub, is_chat: bool) -> None:
    said = ({"role": "user", "content": "word word"},) if is_chat else ()
    found = only(run(stub, replace(CALL, messages=said)))
    assert (found.outcome, found.status, found.finish) == ("ok", 200, "length")
    prompt = 5 if is_chat else 2
    assert (found.prompt_tokens, found.output_tokens) == (prompt, 4)
    assert found.cached_tokens == prompt // 2
    assert found.first is not None
    assert found.end is not None
    assert 0 <= found.due <= found.sent < found.first <= found.end
    assert found.first + sum(found.gaps) <= found.end + 1e-5


def test_what_is_sent_is_what_the_call_says(stub: Stub) -> None:
    call = replace(CALL, prompt=(3, 4, 5), class_name="batch", priority=2, deadline=1.5,
                   extra={"top_k": 5})  # fmt: skip
    run(stub, call, extras=BodyExtras("the-model", extra=(("temperature", 0),)))
    (_, body), *rest = stub.seen
    assert not rest
    assert body == {
        **{"model": "the-model", "prompt": [3, 4, 5], "max_tokens": 4, "stream": True},
        **{"stream_options": {"include_usage": True}, "class": "batch", "priority": 2},
        **{"deadline_ms": 1500, "temperature": 0, "top_k": 5},
    }


def test_an_answer_without_a_stream_has_an_end_only(stub: Stub) -> None:
    found = only(run(stub, replace(CALL, is_stream=False)))
    assert (found.outcome, found.first, found.gaps, found.output_tokens) == ("ok", None, (), 4)


@pytest.mark.parametrize(
    ("wished", "outcome", "status", "error"),
    [
        ({"status": 400}, "failed", 400, "as wished"),
        ({"status": 429}, "refused", 429, "as wished"),
        ({"refuse": 1, "retry_after": 7}, "refused", 503, "full"),
        ({"fail_after": 2}, "failed", 200, "broke"),
        ({"cut_after": 2}, "failed", 200, "the connection broke"),
    ],
)
def test_what_is_no_answer_says_why(
    stub: Stub, wished: dict[str, Any], outcome: str, status: int, error: str
) -> None:
    found = only(run(stub, wish(**wished)))
    assert (found.outcome, found.status) == (outcome, status)
    assert error in found.error
    assert found.retry_after == wished.get("retry_after")


def test_nobody_there_is_a_failure_of_each_call() -> None:
    found = execute([Planned(0.0, CALL)] * 2, Options("http://127.0.0.1:1"))
    assert [r.outcome for r in found.records] == ["failed", "failed"]
    assert "no connection" in found.records[0].error


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:high"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        execute([], Options(url))


@pytest.mark.parametrize(
    ("behaviour", "outcome", "attempts"),
    [
        (Behaviour(), "refused", 1),
        (Behaviour(retry="obey"), "ok", 3),
        (Behaviour(retry="storm"), "ok", 3),
        (Behaviour(retry="storm", max_attempts=2), "refused", 2),
    ],
)
def test_who_is_refused_does_as_it_behaves(
    stub: Stub, behaviour: Behaviour, outcome: str, attempts: int
) -> None:
    call = replace(wish(refuse=2, retry_after=0.01), behaviour=behaviour)
    found = only(run(stub, call))
    assert (found.outcome, found.attempts, len(stub.seen)) == (outcome, attempts, attempts)
    assert found.retry_after == (0.01 if outcome == "refused" else None)


def test_who_obeys_does_not_come_before_its_time(stub: Stub) -> None:
    call = replace(wish(refuse=1, retry_after=0.2), behaviour=Behaviour(retry="obey"))
    only(run(stub, call))
    (first, _), (second, _) = stub.seen
    assert second - first >= 0.2


@pytest.mark.parametrize(
    "behaviour", [Behaviour(leaves_after_tokens=3), Behaviour(leaves_after_s=0.02)]
)
def test_who_hangs_up_is_cancelled_and_its_connection_closed(behaviour: Behaviour) -> None:
    with serving(Stub(delays=Delays(0.001, 0.005, 0.0))) as stub:
        found = only(run(stub, replace(CALL, max_tokens=10_000, behaviour=behaviour)))
    assert found.outcome == "cancelled"
    assert found.error == ""
    assert stub.hung_up == 1
    if behaviour.leaves_after_tokens:
        assert found.output_tokens == 3


def test_a_slow_reader_takes_as_long_as_its_rate_says(stub: Stub) -> None:
    calls = [CALL, replace(CALL, behaviour=Behaviour(bytes_per_s=8000.0))]
    swift, slow = sorted(
        run(stub, *(replace(call, max_tokens=200) for call in calls)).records,
        key=lambda r: r.number,
    )
    assert slow.outcome == "ok"
    assert swift.end is not None
    assert slow.end is not None
    assert slow.end - slow.sent > 0.8  # 200 events of 80 bytes; the last read is not waited for
    assert slow.gaps == ()
    assert slow.output_tokens == swift.output_tokens == 200
    sooner_or_later(
        lambda: only(run(stub, replace(CALL, max_tokens=200))).gaps or None, "read as it came"
    )


def test_connections_are_used_again(stub: Stub) -> None:
    plan = [Planned(None, CALL)] * 20
    found = execute(plan, Options(stub.url, Driving(concurrency=2)))
    assert found.about["client"]["connections"] == 2
    assert [r.outcome for r in found.records] == ["ok"] * 20
    assert found.about["loop"] == "closed"


def test_a_closed_loop_has_no_more_calls_under_way_than_places(stub: Stub) -> None:
    found = execute([Planned(None, CALL)] * 30, Options(stub.url, Driving(concurrency=3)))
    moments = [(r.sent, 1) for r in found.records]
    moments += [(r.end, -1) for r in found.records if r.end is not None]
    running = list(itertools.accumulate(step for _, step in sorted(moments)))
    assert max(running) == 3


def test_a_session_carries_the_servers_real_answers(stub: Stub) -> None:
    def said(text: str) -> Call:
        return replace(CALL, messages=({"role": "user", "content": text},), max_tokens=2)

    plan = [
        Planned(0.0, said("a")),
        Planned(None, said("b"), after=0, think=0.01),
        Planned(None, said("c"), after=1),
        Planned(0.0, said("alone")),
    ]
    found = execute(plan, Options(stub.url))
    bodies = [body["messages"] for _, body in stub.seen]
    last = max(bodies, key=len)
    answer = {"role": "assistant", "content": " word0 word1"}
    a, b, c = ({"role": "user", "content": text} for text in "abc")
    assert last == [a, answer, b, answer, c]
    records = {r.number: r for r in found.records}
    assert records[1].due == pytest.approx((records[0].end or 0) + 0.01)


def test_a_session_ends_with_an_answer_that_failed(stub: Stub) -> None:
    plan = [Planned(0.0, wish(fail_after=1)), Planned(None, CALL, after=0)]
    assert [r.number for r in execute(plan, Options(stub.url)).records] == [0]


def test_a_later_call_stands_behind_the_one_it_goes_on_after() -> None:
    plan = [Planned(0.0, CALL), Planned(0.0, CALL), Planned(None, CALL, after=0)]
    with pytest.raises(ValueError, match="not the one before it"):
        list(sessions(plan))


def test_latencies_count_from_when_a_call_was_due() -> None:
    """Ten are due before the server wakes up; each of them has waited since then."""
    with serving(Stub(delays=Delays(0.001, 0.001, 0.0), stall=(0.0, 0.5))) as stub:
        plan = [Planned(number * 0.02, CALL) for number in range(10)]
        found = execute(plan, Options(stub.url, Driving(concurrency=1)))
    waited = [(r.first or 0.0) - r.due for r in found.records]
    assert [r.due for r in found.records] == [number * 0.02 for number in range(10)]
    assert all(wait > 0.45 - r.due for wait, r in zip(waited, found.records, strict=True))
    sent_late = [r.sent - r.due for r in found.records]
    assert sent_late[1] > 0.4  # there was one place, and it was taken


def test_warm_up_is_marked_and_not_measured(stub: Stub) -> None:
    plan = [Planned(number * 0.01, CALL) for number in range(10)]
    found = execute(plan, Options(stub.url, Driving(warm_up_s=0.045)))
    assert [r.is_warm_up for r in found.records] == [True] * 5 + [False] * 5
    assert found.seconds < max(r.end or 0.0 for r in found.records) - 0.045
    again = execute(plan, Options(stub.url, Driving(warm_up_calls=3)))
    assert sum(r.is_warm_up for r in again.records) == 3


def test_nothing_begins_after_the_duration(stub: Stub) -> None:
    plan = (Planned(number * 0.01, CALL) for number in itertools.count())
    found = execute(plan, Options(stub.url, Driving(duration=0.2)))
    assert [r.number for r in found.records] == list(range(20))


def test_what_is_under_way_when_the_grace_is_over_is_cut_off() -> None:
    with serving(Stub(delays=Delays(0.001, 5.0, 0.0))) as stub:
        found = only(run(stub, CALL, duration=0.05, grace=0.1))
    assert (found.outcome, found.error) == ("cancelled", "the run was over")


def test_an_answer_that_does_not_come_in_time_has_failed() -> None:
    with serving(Stub(delays=Delays(5.0, 5.0, 0.0))) as stub:
        found = only(run(stub, CALL, timeout=0.1))
    assert (found.outcome, found.error) == ("failed", "no whole answer within 0.1 s")


def test_probes_run_beside_the_load_and_end_with_it(stub: Stub) -> None:
    asked = (Planned(n * 0.01, replace(CALL, kind="probe")) for n in itertools.count())
    plan = [Planned(n * 0.05, CALL) for n in range(5)]
    found = execute(plan, Options(stub.url, probes=asked))
    kinds = [r.kind for r in found.records]
    assert kinds.count("test") == 5
    assert kinds.count("probe") > 1
    assert len({r.number for r in found.records}) == len(found.records)


def test_metrics_are_sampled_at_both_ends(stub: Stub) -> None:
    found = execute([Planned(0.0, CALL)], Options(stub.url, metrics_every=60.0))
    assert [s.values for s in found.samples] == [
        {"stub_requests_total": 0.0},
        {"stub_requests_total": 1.0},
    ]


def test_a_run_says_what_it_was_and_can_be_read_again(stub: Stub, tmp_path: Path) -> None:
    found = run(stub, CALL, wish(status=503))
    record.write(found, tmp_path / "run.jsonl")
    assert record.read(tmp_path / "run.jsonl") == found
    assert found.about["url"] == stub.url
    assert {"machine", "versions", "commit", "client", "began_at"} <= found.about.keys()


def test_a_fault_of_the_generators_own_is_not_hidden(stub: Stub) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        run(stub, replace(CALL, extra={"wrong": object()}))


def test_a_client_that_cannot_keep_up_says_so() -> None:
    assert about.keeping_up([0.001] * 99, [0.001] * 99, 0.5)["warning"] == ""
    assert about.keeping_up([0.001] * 30 + [0.1] * 2, [], 0.5)["warning"] == ""  # by chance
    assert "5 of 100 calls" in about.keeping_up([0.001] * 95 + [0.1] * 5, [], 0.5)["warning"]
    assert "timers" in about.keeping_up([], [0.02] * 5, 0.5)["warning"]
    assert "busy 95%" in about.keeping_up([], [], 0.95)["warning"]


def test_no_key_is_written_down() -> None:
    words = ["/bin/x", "run", "--api-key", "secret", "--api-key=secret", "--set", "key=secret",
             "--set", "metrics_key=secret", "--set", "mix=[{share: 1, key: secret}]"]  # fmt: skip
    shown = about.command(words)
    assert "secret" not in shown
    assert shown.startswith("x run --api-key … --api-key=… --set key=…")


def command(url: str, out: Path, *flags: str) -> list[str]:
    words = [sys.executable, "-m", "dynamo_serve.cli", "bench", "run", url, "--out", str(out)]
    return [*words, "--workload", "plain", *flags]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_interrupted_run_writes_what_there_is(tmp_path: Path, processes: str) -> None:
    out, seen = tmp_path / "run.jsonl", threading.Event()
    with serving(Stub(delays=Delays(0.001, 0.05, 0.0))) as stub:
        flags = ["--rate", "50", "--requests", "5000", "--processes", processes]
        flags += ["--set", "shape.output=5"]
        child = subprocess.Popen(command(stub.url, out, *flags), cwd=ROOT, env=os.environ)
        try:
            for _ in range(int(PATIENCE_S / 0.02)):
                if len(stub.seen) > 40:
                    seen.set()
                    break
                seen.wait(0.02)
            assert seen.is_set(), "it sent nothing"
            child.send_signal(signal.SIGINT)
            assert child.wait(PATIENCE_S) == 130
        finally:
            child.kill()
            child.wait()
    found = record.read(out)
    assert found.about["interrupted"]
    assert len(found.records) > 30
    assert {r.outcome for r in found.records} == {"ok", "cancelled"}


def test_several_processes_send_the_same_plan_as_one(tmp_path: Path) -> None:
    sent = []
    for processes in ("1", "3"):
        out = tmp_path / f"{processes}.jsonl"
        with serving(Stub(delays=FAST)) as stub:
            flags = ("--rate", "400", "--requests", "120", "--processes", processes)
            done = subprocess.run(
                command(stub.url, out, *flags, "--set", "metrics_every=0"),
                cwd=ROOT,
                check=True,
                timeout=PATIENCE_S,
                capture_output=True,
                text=True,
            )
        assert json.loads(done.stdout.splitlines()[-1])["out"] == str(out)
        found = record.read(out)
        assert [r.outcome for r in found.records] == ["ok"] * 120
        sent.append([(r.number, r.due, r.prompt_tokens) for r in found.records])
    assert sent[0] == sent[1]
