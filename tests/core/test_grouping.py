"""`prompt_cache_key`: those that wait with the same one are run one after the other."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.request import Request
from dynamo_serve.core.sequence import AGING_SECONDS, Sequence
from dynamo_serve.core.tenant import CLASSES, UNNAMED, Class
from dynamo_serve.core.waiting import GROUP_PART, WaitingQueue
from tests.core.traffic import Harness, QuickEngine

WINDOW = GROUP_PART * AGING_SECONDS
FIVE, ONE = Class("five", 1, ttft=5.0), Class("one", 1, ttft=1.0)


def sequence(
    name: str, arrival: float, promise: Class = UNNAMED, ordinal: int = 0, priority: int = 0
) -> Sequence:
    """Its group is its name without the number."""
    group = name.rstrip("0123456789")
    group = "" if group == "x" else group
    request = Request(name, (1,), 1, arrival=arrival, group=group, priority=priority)
    return Sequence.of(request, promise, ordinal)


def order(*seqs: Sequence) -> str:
    queue = WaitingQueue()
    for ordinal, seq in enumerate(seqs):
        seq.ordinal = ordinal
        queue.add(seq)
        queue.check()
    return " ".join(seq.id for seq in queue.first("default", len(seqs)))


def test_a_group_waits_together() -> None:
    names = ["a1", "b1", "x1", "a2", "b2", "x2", "a3"]
    seqs = [sequence(name, float(at)) for at, name in enumerate(names)]
    assert order(*seqs) == "a1 a2 a3 b1 b2 x1 x2"
    assert [seq.due for seq in seqs] == [at + AGING_SECONDS for at in range(7)], "as promised"


def test_what_is_set_apart_is_no_group() -> None:
    seqs = [sequence(name, float(at)) for at, name in enumerate(["a1", "x1", "a2", "a3"])]
    seqs[2].request = replace(seqs[2].request, salt="own")
    assert order(*seqs) == "a1 a3 x1 a2", "they share no page with it"


def test_nobody_goes_before_who_is_due_much_earlier() -> None:
    near, far = sequence("a2", WINDOW), sequence("a2", WINDOW + 0.01)
    assert order(sequence("a1", 0.0), sequence("x1", 0.1), near) == "a1 a2 x1"
    assert order(sequence("a1", 0.0), sequence("x1", 0.1), far) == "a1 x1 a2"


def test_the_window_is_part_of_the_target() -> None:
    def ask(late: float) -> str:
        return order(*(sequence(n, at, FIVE) for n, at in (("a1", 0), ("x1", 0.1), ("a2", late))))

    assert ask(2.5) == "a1 a2 x1"
    assert ask(2.6) == "a1 x1 a2"


@pytest.mark.parametrize("promise", [CLASSES["interactive"], ONE])
def test_who_was_promised_more_is_not_passed(promise: Class) -> None:
    late = sequence("x1", FIVE.ttft - promise.ttft, promise)  # due as a1 is
    seqs = sequence("a1", 0.0, FIVE), late, sequence("a2", 1.0, FIVE)
    assert order(*seqs) == "a1 x1 a2"


def test_batch_work_does_not_pass_others() -> None:
    batch = CLASSES["batch"]
    seqs = sequence("a1", 4.0, batch), sequence("x1", 30.0, FIVE), sequence("a2", 11.0, batch)
    assert order(*seqs) == "a1 x1 a2"
    assert order(seqs[0], sequence("x1", 5.0, batch), seqs[2]) == "a1 a2 x1"


def test_who_was_promised_less_is_passed() -> None:
    seqs = sequence("a1", 0.0, ONE), sequence("x1", -3.95, FIVE), sequence("a2", 0.1, ONE)
    assert order(*seqs) == "a1 a2 x1"


def test_a_group_does_not_pass_who_was_put_before_it() -> None:
    seqs = sequence("a1", 0.0), sequence("x1", 4.0), sequence("a2", 0.0, priority=1)
    assert seqs[2].due - seqs[0].due < WINDOW
    assert order(*seqs) == "a1 x1 a2"
    alike = [sequence(n, at, priority=1) for n, at in (("a1", 0.0), ("x1", 1.0), ("a2", 2.0))]
    assert order(*alike) == "a1 a2 x1"


def test_who_comes_back_finds_its_place_anew() -> None:
    queue = WaitingQueue()
    seqs = [sequence(name, float(at), ordinal=at) for at, name in enumerate(("a1", "x1", "a2"))]
    for seq in seqs:
        queue.add(seq)
    for seq in seqs:
        queue.remove(seq)
    queue.add(seqs[1])
    queue.add(seqs[2])
    queue.check()
    assert [seq.id for seq in queue.first("default", 3)] == ["x1", "a2"], "a1 does not wait now"
    queue.remove(seqs[2])
    seqs[2].turn = 0.0
    queue.add(sequence("a3", 1.5, ordinal=3))
    queue.add(seqs[2])
    assert [seq.id for seq in queue.first("default", 3)] == ["x1", "a2", "a3"], "a3 does"


@pytest.mark.parametrize("seed", range(10))
def test_how_far_anybody_is_passed_is_bounded(seed: int) -> None:
    rng = random.Random(seed)
    queue, added, now = WaitingQueue(), [], 0.0
    for ordinal in range(300):
        now += rng.expovariate(2.0)
        promise = rng.choice([UNNAMED, FIVE, ONE, CLASSES["interactive"], CLASSES["batch"]])
        seq = sequence(f"{rng.choice('abx')}{ordinal}", now, promise, ordinal)
        queue.add(seq)
        added.append(seq)
        if rng.random() < 0.3:
            queue.remove(added.pop(rng.randrange(len(added))))
        queue.check()
    for first, second in combinations(queue.first("default", len(added)), 2):
        if first.due <= second.due:
            continue
        assert first.due - second.due <= GROUP_PART * min(first.promise.ttft, AGING_SECONDS)
        came_first = first.ordinal < second.ordinal  # then it is the other that came in between
        assert came_first or not second.promise.strict
        assert came_first or second.promise.ttft >= first.promise.ttft
    assert any(seq.turn < seq.due for seq in added), "nobody ever followed a group"


def hit_share(*, keys: bool) -> float:
    """Eight documents are asked about in turn, far more questions than run at a time, on a pool
    that has room for three."""
    engine = QuickEngine(vocab_size=50_000, max_model_len=1024, page_size=16, num_pages=72)
    engine.harness = harness = Harness(engine, Limits(max_decode_sequences=2))
    rng = random.Random(3)
    documents = [[rng.randrange(50_000) for _ in range(320)] for _ in range(8)]
    requests = []
    for i in range(64):
        prompt = (*documents[i % 8], *(rng.randrange(50_000) for _ in range(16)))
        group = f"document {i % 8}" if keys else ""
        requests.append(Request(f"r{i}", prompt, 4, arrival=i * 0.001, group=group))
    harness.generate(*requests)
    account = harness.scheduler.shares.accounts["default"]
    return account.saved_tokens / (64 * 336)


def test_a_document_is_computed_once_where_the_cache_holds_few_of_them() -> None:
    without, together = hit_share(keys=False), hit_share(keys=True)
    assert without < 0.5, "by the time that it is asked about again it is gone"
    assert together > 0.8
