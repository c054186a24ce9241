"""Greedy answers equal transformers' own, for every architecture, however the work is cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dynamo_serve.engines.local import LocalEngine
from tests.engines.local.driver import Driver, Seq, make_engine
from tests.engines.local.native import KERNEL_SETS, NATIVE, require_kernels
from tests.engines.local.zoo import MODELS, checkpoint, expected_tokens

COUNT = 8
PROMPTS = (
    tuple(range(10, 33)),
    (40, 41, 42),
    tuple(range(90, 61, -1)),
    (5,),
    (*range(10, 26), 99, 98, 97),
)


# Every architecture as it is served, and those that the native kernels run on each set of them.
CASES = [
    *((name, "auto") for name in sorted(MODELS)),
    *((name, kernels) for name in NATIVE for kernels in ("torch", *KERNEL_SETS)),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def loaded(request: pytest.FixtureRequest) -> Iterator[tuple[str, LocalEngine]]:
    name, kernels = request.param
    require_kernels(kernels)
    engine = make_engine(checkpoint(name), kernels=kernels)
    found = engine.start().facts["kernels"]
    assert kernels in ("auto", found)
    yield name, engine
    engine.close()


def assert_as_generate(name: str, seqs: list[Seq]) -> None:
    for seq in seqs:
        assert tuple(seq.output) == expected_tokens(name, seq.prompt, COUNT), (name, seq.id)


def test_prompts_of_different_lengths_together(loaded: tuple[str, LocalEngine]) -> None:
    name, engine = loaded
    driver = Driver(engine, 4, 96)
    seqs = [Seq(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    driver.step([(seq, len(seq.prompt)) for seq in seqs])
    driver.generate(seqs, COUNT)
    assert_as_generate(name, seqs)
    engine.drop([seq.id for seq in seqs])


def test_chunked_prefill_beside_decoding(loaded: tuple[str, LocalEngine]) -> None:
    name, engine = loaded
    driver = Driver(engine, 4, 96)
    short, long = Seq("short", PROMPTS[1]), Seq("long", PROMPTS[2])
    driver.generate([short], 1)
    for start in range(0, len(long.prompt), 5):
        driver.step([(long, min(5, len(long.prompt) - start)), (short, 1)])
    driver.generate([short, long], COUNT)
    assert_as_generate(name, [short, long])
    engine.drop(["short", "long"])


def test_prefix_hit_on_shared_pages(loaded: tuple[str, LocalEngine]) -> None:
    name, engine = loaded
    driver = Driver(engine, 4, 96)
    first, second, third = Seq("1", PROMPTS[0]), Seq("2", PROMPTS[4]), Seq("3", PROMPTS[0])
    driver.generate([first], COUNT)
    driver.share_prefix(first, second, 16)
    driver.share_prefix(first, third, 20)
    driver.step([(second, 3), (third, 3)])
    driver.generate([second, third], COUNT)
    assert_as_generate(name, [first, second, third])
    engine.drop(["1", "2", "3"])


def test_preempted_sequence_is_recomputed_elsewhere(loaded: tuple[str, LocalEngine]) -> None:
    name, engine = loaded
    driver = Driver(engine, 4, 96)
    victim, other = Seq("victim", PROMPTS[0]), Seq("other", PROMPTS[4])
    driver.generate([victim, other], COUNT // 2)
    driver.preempt(victim)
    driver.generate([other], COUNT)
    driver.generate([victim], COUNT, chunk=7)
    assert_as_generate(name, [victim, other])
    engine.drop(["victim", "other"])
