"""Log probabilities of prompts: those of a plain forward, however the prompt is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynamo_serve.core.batch import Batch, Phase, Work
from dynamo_serve.core.request import Finish, Request, Sampling, TokenLogprob
from dynamo_serve.engines.local import LocalEngine, scores
from tests.engines.local.driver import make_engine
from tests.engines.local.zoo import checkpoint

PROMPT = tuple((7 * i * i + 3 * i + 5) % 128 for i in range(41))
PAGES = tuple(range(3, 15))


def work(start: int, stop: int, num_top: int = 3) -> Work:
    sampling = Sampling(temperature=0.0, prompt_logprobs=num_top)
    request = Request("a", PROMPT, 4, sampling)
    ids, is_last = PROMPT[start:stop], stop == len(PROMPT)
    return Work(
        *("a", ids, start, PAGES, is_last, sampling, len(PROMPT)), request=request, scores=True
    )


def plain(path: str) -> torch.Tensor:
    """Log probabilities [tokens, vocab] by a forward of the whole prompt."""
    model = AutoModelForCausalLM.from_pretrained(path).float()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def told(engine: LocalEngine, cuts: list[int], *others: Work) -> tuple[TokenLogprob, ...]:
    found: tuple[TokenLogprob, ...] = ()
    for start, stop in zip([0, *cuts], [*cuts, len(PROMPT)], strict=True):
        outputs = engine.step(Batch(Phase.MIXED, (work(start, stop), *others)))
        (out,) = [out for out in outputs if out.seq_id == "a"]
        assert len(out.token_ids) == (stop == len(PROMPT))
        found += out.prompt_logprobs
    return found


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_they_are_those_of_a_plain_forward(
    name: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "SLICE", 8)
    path = checkpoint(name)
    expected = plain(path)
    engine = make_engine(path, kernels=kernels)
    engine.start()
    other = Work("b", (9, 8, 7), 0, (20,), True, Sampling(temperature=0.0), 3)
    for cuts in ([], [1, 2, 30], [40]):
        for others in ((), (other,)):
            found = told(engine, cuts, *others)
            assert [score.token_id for score in found] == list(PROMPT[1:])
            for at, score in enumerate(found):
                row, token = expected[at], PROMPT[at + 1]
                assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
                assert [value for _, value in score.top] == pytest.approx(
                    row.topk(3).values.tolist(), abs=1e-4
                )
                near = row - float(row[token])
                assert int((near > 1e-4).sum()) < score.rank <= int((near > -1e-4).sum())
    engine.close()


def test_what_is_picked_does_not_depend_on_them() -> None:
    engine = make_engine(checkpoint("llama"))
    engine.start()
    with_scores = engine.step(Batch(Phase.PREFILL, (work(0, len(PROMPT)),)))[0]
    bare = work(0, len(PROMPT))._replace(scores=False)
    without = engine.step(Batch(Phase.PREFILL, (bare,)))[0]
    engine.close()
    assert with_scores.token_ids == without.token_ids
    assert without.prompt_logprobs == ()


def test_penalties_see_every_token_once() -> None:
    engine = make_engine(checkpoint("llama"))
    engine.start()
    tokens = []
    for is_scored in (True, False):
        sampling = Sampling(temperature=0.0, repetition_penalty=1.8, prompt_logprobs=0)
        for start, stop in ((0, 20), (20, len(PROMPT))):
            part = work(start, stop)._replace(sampling=sampling, scores=is_scored)
            outputs = engine.step(Batch(Phase.PREFILL, (part,)))
        tokens.append(outputs[0].token_ids)
        engine.drop(["a"])
    engine.close()
    assert tokens[0] == tokens[1]


def test_logits_that_are_no_numbers_end_the_sequence() -> None:
    engine = make_engine(checkpoint("llama"), kernels="torch")
    engine.start()
    assert engine._ready is not None
    embedding = engine._ready.runner.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[PROMPT[3]] = float("inf")
    other = Work("b", (9, 8), 0, (20,), True, Sampling(temperature=0.0), 2)
    outputs = {out.seq_id: out for out in engine.step(Batch(Phase.PREFILL, (work(0, 30), other)))}
    engine.close()
    assert outputs["a"].finish is Finish.ERROR and outputs["a"].prompt_logprobs == ()
    assert len(outputs["b"].token_ids) == 1


def test_without_alternatives_only_the_token_itself_is_told() -> None:
    engine = make_engine(checkpoint("llama"))
    engine.start()
    part = work(0, len(PROMPT), num_top=0)
    part = part._replace(sampling=replace(part.sampling, prompt_logprobs=0))
    (out,) = engine.step(Batch(Phase.PREFILL, (part,)))
    engine.close()
    assert {score.top for score in out.prompt_logprobs} == {()}
