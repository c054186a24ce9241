"""The same cases on a CUDA device, through the backends and graphs that only it has."""

from __future__ import annotations

import pytest
import torch

from dynamo_serve.errors import EngineStartError
from tests.engines.local.driver import Driver, Seq, make_engine
from tests.engines.local.test_page_parts import SOME, answers
from tests.engines.local.zoo import MODELS, checkpoint, expected_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = (tuple(range(10, 33)), (40, 41, 42), tuple(range(90, 61, -1)), (5,))
COUNT = 8


@pytest.mark.parametrize("attention", ["triton", "torch"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_greedy_tokens_equal_the_plain_model_on_the_cpu(name: str, attention: str) -> None:
    engine = make_engine(checkpoint(name), device="cuda", attention=attention)
    engine.start()
    driver = Driver(engine, 4, 96)
    seqs = [Seq(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    driver.generate(seqs, COUNT, chunk=9)
    engine.close()
    for seq in seqs:
        assert tuple(seq.output) == expected_tokens(name, seq.prompt, COUNT)


def outputs_in_bfloat16(attention: str, cuda_graphs: bool) -> tuple[list[list[int]], bool]:
    engine = make_engine(
        checkpoint("qwen3", "bfloat16"),
        device="cuda",
        attention=attention,
        cuda_graphs=cuda_graphs,
        page_size=16,
    )
    spec = engine.start()
    driver = Driver(engine, 16, 96)
    seqs = [Seq(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    driver.generate(seqs, 3 * COUNT)
    engine.close()
    return [seq.output for seq in seqs], bool(spec.facts["cuda_graphs"])


def test_graphs_replay_what_eager_steps_compute() -> None:
    eager, recorded = outputs_in_bfloat16("triton", cuda_graphs=False)
    assert not recorded
    replayed, recorded = outputs_in_bfloat16("triton", cuda_graphs=True)
    assert recorded
    assert replayed == eager


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_parts_of_pages_that_are_copied_change_no_token(cuda_graphs: bool) -> None:
    wishes = {"device": "cuda", "attention": "triton", "cuda_graphs": cuda_graphs}
    expected, cached = answers(None, SOME, **wishes)
    assert cached == [0, 4, 4, 8, 4]
    assert answers(0.0, SOME, **wishes) == (expected, [0, 6, 6, 11, 7])


def test_varlen_runs_or_says_why_not() -> None:
    try:
        found, _ = outputs_in_bfloat16("varlen", cuda_graphs=True)
    except EngineStartError as error:
        pytest.skip(str(error))
    expected, _ = outputs_in_bfloat16("torch", cuda_graphs=False)
    same = sum(
        a == b for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert same > 0.5 * sum(map(len, expected))  # half precision: near ties may fall otherwise
