"""Vectors of decoders: those of transformers, whatever the chunks and the neighbours."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from dynamo_serve.core.batch import Batch, Phase, SequenceOutput, Work
from dynamo_serve.core.request import Finish, Pooling, Request
from dynamo_serve.engines.local import LocalEngine
from dynamo_serve.engines.local.pooling_kind import pooling_kind
from dynamo_serve.errors import EngineStartError
from tests.engines.local.driver import GREEDY, make_engine
from tests.engines.local.native import require_kernels
from tests.engines.local.zoo import checkpoint, expected_tokens

TOLERANCE = 1e-5
LENGTHS = (5, 9, 1, 13, 9)


@contextmanager
def started(name: str, **wishes: Any) -> Iterator[LocalEngine]:
    engine = make_engine(checkpoint(name), **wishes)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()


@cache
def plain(name: str, ids: tuple[int, ...], kind: str) -> torch.Tensor:
    """What transformers' model without a head makes of a text alone."""
    model = AutoModel.from_pretrained(checkpoint(name), attn_implementation="eager")
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return states.mean(dim=0) if kind == "mean" else states[-1]


def prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 128, (length,), generator=generator).tolist())


def pooled(name: str, ids: tuple[int, ...], kind: str, pages: tuple[int, ...]) -> Work:
    request = Request(name, ids, 0, pooling=Pooling(kind))
    return Work(name, ids, 0, pages, True, GREEDY, len(ids), request=request)


def cut(work: Work, start: int, stop: int) -> Work:
    is_last = stop == len(work.token_ids)
    return work._replace(token_ids=work.token_ids[start:stop], position=start, samples=is_last)


def run(engine: LocalEngine, works: Sequence[Work]) -> dict[str, SequenceOutput]:
    return {out.seq_id: out for out in engine.step(Batch(Phase.MIXED, tuple(works)))}


def numbers(out: SequenceOutput) -> torch.Tensor:
    assert out.finish is Finish.STOP and out.artifact is not None and not out.token_ids, out
    return torch.tensor(array("f", out.artifact))


def close(out: SequenceOutput, wanted: torch.Tensor) -> None:
    # Relative to the largest number: what is summed up differs in its order.
    atol = TOLERANCE * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(numbers(out), wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("kernels", ["torch", "avx2", "auto"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_vectors_are_those_of_transformers_alone_and_in_a_batch(name: str, kernels: str) -> None:
    require_kernels(kernels)
    with started(name, kernels=kernels) as engine:
        for kind in ("mean", "last"):
            works = [
                pooled(f"{kind}{i}", prompt(n, i), kind, tuple(range(4 * i, 4 * i + 4)))
                for i, n in enumerate(LENGTHS)
            ]
            batched = run(engine, works)
            for work in works:
                wanted = plain(name, work.token_ids, kind)
                close(batched[work.seq_id], wanted)
                engine.drop([work.seq_id])
                close(run(engine, [work])[work.seq_id], wanted)


def test_chunks_beside_decoding_sequences_give_the_same() -> None:
    chat = prompt(6, 1)
    tokens = expected_tokens("llama", chat, 4)
    with started("llama") as engine:
        for kind in ("mean", "last"):
            work = pooled(kind, prompt(15, 2), kind, (1, 3, 5, 7))
            said = [
                Work("chat", chat, 0, (20, 21, 22), True, GREEDY, 6),
                *(
                    Work("chat", (tokens[i],), 6 + i, (20, 21, 22), True, GREEDY, 6)
                    for i in range(3)
                ),
            ]
            for i, (start, stop) in enumerate(((0, 4), (4, 5), (5, 12), (12, 15))):
                found = run(engine, [said[i], cut(work, start, stop)])
                assert found["chat"].token_ids == (tokens[i],)
                assert (kind in found) == (stop == 15)
            close(found[kind], plain("llama", work.token_ids, kind))


def test_a_decoder_without_a_head_embeds_and_says_that_it_writes_nothing(tmp_path: Path) -> None:
    AutoModel.from_pretrained(checkpoint("qwen3")).save_pretrained(tmp_path)
    engine = make_engine(str(tmp_path))
    spec = engine.start()
    assert (spec.generates, spec.pooling, spec.vector_size) == (False, "last", 32)
    work = pooled("a", prompt(9, 3), "last", (0, 1, 2))
    close(run(engine, [work])["a"], plain("qwen3", work.token_ids, "last"))
    engine.close()


def test_a_step_that_is_run_again_counts_once() -> None:
    with started("llama") as engine:
        work = pooled("a", prompt(12, 4), "mean", (0, 1, 2))
        for start, stop in ((0, 5), (0, 5), (5, 8), (5, 8), (8, 12)):
            found = run(engine, [cut(work, start, stop)])
        close(found["a"], plain("llama", work.token_ids, "mean"))


def test_after_a_drop_it_begins_anew() -> None:
    with started("llama") as engine:
        work = pooled("a", prompt(12, 5), "mean", (0, 1, 2))
        run(engine, [cut(work, 0, 5)])
        engine.drop(["a"])
        assert len(engine._pools) == 0
        run(engine, [cut(work, 0, 7)])
        found = run(engine, [cut(work, 7, 12)])
        close(found["a"], plain("llama", work.token_ids, "mean"))


def test_a_last_token_may_build_on_cached_pages() -> None:
    with started("llama") as engine:
        work = pooled("a", prompt(12, 6), "last", (0, 1, 2))
        run(engine, [work])
        rest = work._replace(
            seq_id="b", token_ids=work.token_ids[8:], position=8, cached_ids=work.token_ids[:8]
        )
        found = run(engine, [rest._replace(page_table=(0, 1, 9))])
        close(found["b"], plain("llama", work.token_ids, "last"))


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_numbers_that_are_none_fail_their_prompt_alone(kernels: str) -> None:
    with started("llama", kernels=kernels) as engine:
        assert engine._ready is not None
        if kernels == "torch":
            with torch.inference_mode():
                engine._ready.runner.model.get_input_embeddings().weight[99] = float("nan")
        else:
            pytest.importorskip("dynamo_serve.native.library")
            if engine._ready.spec.facts["attention_backend"] != "native":
                pytest.skip("no native kernels here")
            native = engine._ready.runner.native  # type: ignore[attr-defined]
            tables = [t for t in native.keep if isinstance(t, torch.Tensor) and t.dim() == 2]
            (embedding,) = [t for t in tables if t.shape == (128, 32)]
            embedding[99] = float("nan")
        good = pooled("good", tuple(range(20, 29)), "mean", (0, 1, 2))
        bad = pooled("bad", (5, 99, 7, 8, 9, 10, 11, 12, 13), "mean", (3, 4, 5))
        found = run(engine, [good, bad])
        assert found["bad"].finish is Finish.ERROR and "not finite" in str(found["bad"].error)
        close(found["good"], plain("llama", good.token_ids, "mean"))
        pages = [t[[3, 4, 5]] for pages in engine._ready.cache.layers for t in pages]
        assert all(bool(torch.isfinite(t).all()) for t in pages), "others will read them"


# ── what a model's files say ─────────────────────────────────────────────────


def sentence_files(folder: Path, *kinds: str, **pooling: object) -> str:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": f"sentence_transformers.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for module in modules:
        place = folder / str(module["path"])
        place.mkdir()
        (place / "config.json").write_text(json.dumps(pooling))
    return str(folder)


def test_without_such_files_decoders_take_the_last_token_and_encoders_the_mean(
    tmp_path: Path,
) -> None:
    assert pooling_kind(str(tmp_path), "auto", is_encoder=False) == "last"
    assert pooling_kind(str(tmp_path), "auto", is_encoder=True) == "mean"
    assert pooling_kind(str(tmp_path), "mean", is_encoder=False) == "mean"
    with pytest.raises(EngineStartError, match="has seen no other"):
        pooling_kind(str(tmp_path), "cls", is_encoder=False)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_a_model_says_what_its_embedding_is(
    tmp_path: Path, settings: dict[str, object], kind: str
) -> None:
    path = sentence_files(tmp_path, "Transformer", "Pooling", "Normalize", **settings)
    assert pooling_kind(path, "auto", is_encoder=True) == kind


def test_what_would_not_be_its_embedding_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    path = sentence_files(one, "Transformer", "Dense")
    with pytest.raises(EngineStartError, match="Dense module"):
        pooling_kind(path, "auto", is_encoder=True)
    path = sentence_files(other, "Transformer", "Pooling", pooling_mode_max_tokens=True)
    with pytest.raises(EngineStartError, match="mean, last or cls"):
        pooling_kind(path, "auto", is_encoder=True)
