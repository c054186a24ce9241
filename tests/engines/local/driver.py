"""The least driver an engine can have: page tables in a few lines, no policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from dynamo_serve.config import CacheSection, EngineSection, ModelSection
from dynamo_serve.core.batch import Batch, Phase, SequenceOutput, Work
from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local import LocalEngine
from dynamo_serve.engines.local.self_check import PageCheck

GREEDY = Sampling(temperature=0.0)
CACHE = ("page_size", "num_pages", "kv_dtype", "host_gib", "disk_gib", "disk_path")


def make_engine(path: str, **wishes: Any) -> LocalEngine:
    """A CPU engine with small pages; `wishes` override single settings."""
    known: dict[str, Any] = {
        "page_size": 4,
        "num_pages": 96,
        "kv_dtype": "auto",
        "dtype": "auto",
        "quantization": "none",
        "lighter": "",
        "max_model_len": 0,
        "device": "cpu",
        "attention": "auto",
        "kernels": "auto",
        "cuda_graphs": True,
        "max_decode_sequences": 16,
        "max_prefill_tokens": 64,
        "progress": lambda stage, fraction: None,
        "host_gib": 0.0,
        "disk_gib": 0.0,
        "disk_path": "",
    }
    assert set(wishes) <= set(known), wishes
    w = known | wishes
    return LocalEngine(
        ModelSection(
            dtype=w["dtype"],
            quantization=w["quantization"],
            lighter=w["lighter"],
            max_model_len=w["max_model_len"],
        ),
        EngineSection(
            device=w["device"],
            attention=w["attention"],
            kernels=w["kernels"],
            cuda_graphs=w["cuda_graphs"],
            threads=2,
        ),
        CacheSection(**{name: w[name] for name in CACHE}),
        max_decode_sequences=w["max_decode_sequences"],
        max_prefill_tokens=w["max_prefill_tokens"],
        path=path,
        progress=w["progress"],
    )


@dataclass
class Seq:
    """One sequence as the driver sees it."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = GREEDY
    banned_ids: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_done: int = 0
    num_cached: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.output)


class Driver:
    """Hands out pages from a list and plans whatever the test says."""

    def __init__(self, engine: LocalEngine, page_size: int, num_pages: int) -> None:
        self.engine = engine
        self.page_size = page_size
        # Not in order, so that a kernel that ignores page tables fails.
        self.free = [(i * 7) % num_pages for i in range(num_pages)]
        assert sorted(self.free) == list(range(num_pages)), "choose num_pages not divisible by 7"

    def work(self, seq: Seq, count: int) -> Work:
        """The next `count` tokens of `seq`."""
        stop = seq.num_done + count
        while len(seq.pages) * self.page_size < stop:
            seq.pages.append(self.free.pop())
        first = seq.num_cached == seq.num_done
        return Work(
            seq_id=seq.id,
            token_ids=seq.tokens[seq.num_done : stop],
            position=seq.num_done,
            page_table=tuple(seq.pages),
            samples=stop == len(seq.tokens),
            sampling=seq.sampling,
            prompt_len=len(seq.prompt),
            cached_ids=seq.tokens[: seq.num_cached] if first else (),
            banned_ids=seq.banned_ids,
        )

    def step(self, shares: Sequence[tuple[Seq, int]], phase: Phase = Phase.PREFILL) -> None:
        """Run so many tokens of each sequence and take in the answers."""
        work = tuple(self.work(seq, count) for seq, count in shares)
        outputs = {o.seq_id: o for o in self.engine.step(Batch(phase, work))}
        assert set(outputs) == {w.seq_id for w in work if w.samples}
        for seq, count in shares:
            seq.num_done += count
            if seq.id in outputs:
                seq.outputs.append(outputs[seq.id])
                seq.output.extend(outputs[seq.id].token_ids)

    def generate(self, seqs: Sequence[Seq], count: int, chunk: int = 10_000) -> None:
        """Give every sequence `count` output tokens: prefill by chunks, then decode together."""
        for seq in seqs:
            while seq.num_done < len(seq.prompt):
                self.step([(seq, min(chunk, len(seq.tokens) - seq.num_done))])
        for _ in range(count):
            live = [(seq, 1) for seq in seqs if len(seq.output) < count]
            if live:
                self.step(live, Phase.DECODE)

    def share_prefix(self, giver: Seq, taker: Seq, num_tokens: int) -> None:
        """Give `taker` the full pages of `giver`'s first tokens."""
        assert num_tokens % self.page_size == 0
        assert giver.tokens[:num_tokens] == taker.tokens[:num_tokens]
        taker.pages = giver.pages[: num_tokens // self.page_size]
        taker.num_done = taker.num_cached = num_tokens

    def preempt(self, seq: Seq) -> None:
        """Take all pages; the tokens survive."""
        self.engine.drop([seq.id])
        self.free.extend(seq.pages)
        seq.pages, seq.num_done, seq.num_cached = [], 0, 0


def errors_found(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the checks of engines that start from now on find."""
    found: list[float] = []
    original = PageCheck.compare

    def compare(self: PageCheck, *args: Any) -> float:
        found.append(original(self, *args))
        return found[-1]

    monkeypatch.setattr(PageCheck, "compare", compare)
    return found
