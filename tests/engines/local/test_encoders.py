"""Encoders over texts end to end give what transformers gives for each alone."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamo_serve.config import CacheSection, EngineSection, ModelSection
from dynamo_serve.core.batch import Batch, Phase, SequenceOutput, Work
from dynamo_serve.core.engine import Engine, EngineSpec
from dynamo_serve.core.request import Finish, Pooling, Request, Sampling
from dynamo_serve.engines.local import Limits, LocalEngine, Wishes, build
from dynamo_serve.errors import EngineStartError
from tests.engines.local import zoo
from tests.engines.local.encoders import (
    MODELS,
    PACKED,
    checkpoint,
    plain_logit,
    plain_states,
)

TOLERANCE = 1e-5
LENGTHS = (5, 9, 1, 9, 30, 3, 14, 9)


def wishes_of(path: str, **model: Any) -> Wishes:
    engine = EngineSection(device="cpu", threads=2)
    return Wishes(ModelSection(**model), engine, CacheSection(page_size=4), Limits(8, 512), path)


def engine_of(wishes: Wishes) -> Engine:
    return build(wishes, lambda stage, fraction: None)


@contextmanager
def started(path: str, **model: Any) -> Iterator[tuple[Engine, EngineSpec]]:
    engine = engine_of(wishes_of(path, **model))
    try:
        yield engine, engine.start()
    finally:
        engine.close()


def text(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 36, (length,), generator=generator).tolist())


def work(name: str, ids: tuple[int, ...], pooling: Pooling | None, page: int = 0) -> Work:
    request = Request(name, ids, 0 if pooling else 4, pooling=pooling)
    return Work(name, ids, 0, (page,), True, Sampling(), len(ids), request=request)


def run(engine: Engine, works: Sequence[Work]) -> dict[str, SequenceOutput]:
    return {out.seq_id: out for out in engine.step(Batch(Phase.PREFILL, tuple(works)))}


def numbers(out: SequenceOutput) -> torch.Tensor:
    assert out.finish is Finish.STOP and out.artifact is not None and not out.token_ids, out
    return torch.tensor(array("f", out.artifact))


def expected(states: torch.Tensor, kind: str) -> torch.Tensor:
    return {"mean": states.mean(dim=0), "last": states[-1], "cls": states[0]}[kind]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_embeddings_are_those_of_transformers_alone_and_in_a_batch(name: str) -> None:
    with started(checkpoint(name)) as (engine, spec):
        assert spec.facts["attention_backend"] == ("packed" if name in PACKED else "by_length")
        assert (spec.pooling, spec.vector_size, spec.generates) == ("mean", 32, False)
        texts = {f"t{i}": text(n, i) for i, n in enumerate(LENGTHS)}
        for kind in ("mean", "cls", "last"):
            works = [work(name, ids, Pooling(kind)) for name, ids in texts.items()]
            batched = run(engine, works)
            assert list(batched) != [] and set(batched) == set(texts)
            for each in works:
                wanted = expected(plain_states(name, each.token_ids), kind)
                for out in (batched[each.seq_id], *run(engine, [each]).values()):
                    torch.testing.assert_close(numbers(out), wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "electra", "modernbert", "mpnet"]
)
def test_scores_are_those_of_transformers_alone_and_in_a_batch(name: str) -> None:
    has_types = name in ("bert", "electra")
    with started(checkpoint(name, 1)) as (engine, spec):
        assert (spec.pooling, spec.vector_size, spec.generates) == ("score", 1, False)
        assert spec.facts["attention_backend"] == ("packed" if name in PACKED else "by_length")
        works = [
            work(f"t{i}", text(n, i), Pooling("score", n // 2 if has_types else 0))
            for i, n in enumerate(LENGTHS)
        ]
        batched = run(engine, works)
        for each in works:
            assert each.pooling is not None
            wanted = plain_logit(name, each.token_ids, each.pooling.second_at)
            for out in (batched[each.seq_id], *run(engine, [each]).values()):
                assert float(numbers(out)) == pytest.approx(wanted, abs=TOLERANCE)


def test_the_type_of_a_pair_matters() -> None:
    ids = text(12, 3)
    with started(checkpoint("bert", 1)) as (engine, _):
        pair, single = (work(str(n), ids, Pooling("score", n)) for n in (6, 0))
        found = run(engine, [pair, single])
        assert float(numbers(found["6"])) != pytest.approx(float(numbers(found["0"])), abs=1e-3)


def test_a_slot_is_as_long_as_a_text_may_be() -> None:
    with started(checkpoint("roberta")) as (engine, spec):
        assert spec.max_model_len == 78  # positions begin behind the padding token
        assert (spec.page_size, spec.num_pages, spec.whole_prompts) == (78, 8, True)
        longest = text(78, 1)
        (out,) = run(engine, [work("a", longest, Pooling("mean"))]).values()
        wanted = plain_states("roberta", longest).mean(dim=0)
        torch.testing.assert_close(numbers(out), wanted, atol=TOLERANCE, rtol=0)


def test_what_it_cannot_do_fails_alone() -> None:
    with started(checkpoint("bert")) as (engine, _):
        ids = text(5, 1)
        found = run(
            engine,
            [
                work("text", ids, None),
                work("score", ids, Pooling("score")),
                work("mean", ids, Pooling("mean")),
            ],
        )
        assert found["text"].finish is found["score"].finish is Finish.ERROR
        assert found["text"].fault == "refused"
        assert numbers(found["mean"]).shape == (32,)


def test_numbers_that_are_none_fail_their_text_alone() -> None:
    with started(checkpoint("bert")) as (engine, _):
        model = engine._ready.loaded.encoder.model  # type: ignore[attr-defined]
        with torch.no_grad():
            model.embeddings.word_embeddings.weight[63] = float("nan")
        works = [work("bad", (4, 63, 5), Pooling("mean")), work("good", (4, 5, 6), Pooling("mean"))]
        found = run(engine, works)
        assert found["bad"].finish is Finish.ERROR and "not finite" in str(found["bad"].error)
        wanted = plain_states("bert", (4, 5, 6)).mean(dim=0)
        torch.testing.assert_close(numbers(found["good"]), wanted, atol=TOLERANCE, rtol=0)


def test_nothing_stays_registered() -> None:
    before = set(ALL_ATTENTION_FUNCTIONS.keys())
    with started(checkpoint("bert")):
        assert set(ALL_ATTENTION_FUNCTIONS.keys()) != before
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == before
    with pytest.raises(EngineStartError, match=r"model.max_model_len: 99 .* 80"):
        engine_of(wishes_of(checkpoint("bert"), max_model_len=99)).start()
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == before


def test_what_is_for_decoders_is_refused_by_name() -> None:
    wishes = wishes_of(checkpoint("bert"))
    for changed in (
        replace(wishes, model=ModelSection(quantization="int8")),
        replace(wishes, engine=EngineSection(device="cpu", attention="native")),
        replace(wishes, cache=CacheSection(host_gib=1.0)),
        replace(wishes, cache=CacheSection(kv_dtype="int8")),
    ):
        with pytest.raises(
            EngineStartError, match=r"(quantization|attention|host_gib|kv_dtype): .* encoder"
        ):
            engine_of(changed).start()
    with pytest.raises(EngineStartError, match="3 labels"):
        engine_of(wishes_of(checkpoint("bert", 3))).start()
    with pytest.raises(EngineStartError, match=r"model.pooling: mean .* cross-encoder"):
        engine_of(wishes_of(checkpoint("bert", 1), pooling="mean")).start()


def test_a_decoder_gets_the_engine_for_decoders() -> None:
    engine = engine_of(wishes_of(zoo.checkpoint("llama")))
    assert isinstance(engine, LocalEngine)
