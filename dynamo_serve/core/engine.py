"""The step seam: what the loop asks of anything that can run a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.tiers import Copied, Copy, Found, TierSpec


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Facts an engine reports after start-up. Config holds wishes; this holds truths.

    An engine that manages its own memory reports one page per sequence, as long as a sequence
    may grow: a slot is just a very large page. `max_model_len` never exceeds what the pool can
    hold. `facts` (device, dtype, attention backend, …) go to the log and `/v1/server` as they are.
    With `verifies_drafts` work may have a draft (`Work.draft_len`); with `holds_steps` the engine
    is a `HoldingEngine`, with `tiers` below the device, the highest first, a `CopyingEngine`.
    With `copy_seconds`, what it takes to copy a page within the device, work may begin with that
    (`Work.copied_from`). Requests have a grammar only where it `follows_grammars`.

    `refused` names the fields of a client's request that this engine cannot honour, each with the
    reason; `infers` says what of an answer ("usage", "finish_reason") is not told to it but found
    out here.

    `pooling` is the kind of `Request.pooling` that it can do, "" if none, and `vector_size` how
    many numbers that gives. What does not `generate` only does that. With `whole_prompts` a prompt
    is never cut into chunks.
    """

    max_model_len: int
    page_size: int
    num_pages: int
    vocab_size: int
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    verifies_drafts: bool = False
    holds_steps: bool = False
    tiers: tuple[TierSpec, ...] = ()
    copy_seconds: float | None = None
    follows_grammars: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    infers: tuple[str, ...] = ()
    pooling: str = ""
    vector_size: int = 0
    generates: bool = True
    whole_prompts: bool = False


class EngineBroken(Exception):
    """Raised by a step after which no other can work: the process has to be started again."""


class Engine(Protocol):
    def start(self) -> EngineSpec:
        """Load, warm up, and report what was got. Raises `EngineStartError` with the remedy."""
        ...

    def step(self, batch: Batch) -> list[SequenceOutput]:
        """Run all of `batch`, writing the KV of every token in it, and before that what of pages
        is to be copied.

        Returns 0..n tokens for any subset of the sequences whose work samples: one that is not
        mentioned has none yet. Work that does not sample may be answered, too, with
        `Finish.ERROR`. After an exception the batch is run again in parts, with every work as it
        was; raises `EngineBroken` where that is of no use.
        """
        ...

    def drop(self, seq_ids: Iterable[str]) -> None:
        """Forget sequences that finished, were cancelled, or were preempted."""
        ...

    def close(self) -> None: ...


class HoldingEngine(Engine, Protocol):
    """An engine that can hold a step between two of its layers, while another one runs."""

    def hold_for(self, between: Callable[[], None], every: float) -> None:
        """From now on call `between` while a step runs, at most once in `every` seconds. It raises
        nothing, and may call `step` once with a batch of other sequences; during that it is not
        called."""
        ...


class CopyingEngine(Engine, Protocol):
    """An engine that can copy pages of KV between the device and tiers below it."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Begin these copies, in any order, and return at once; those onto the device are the more
        urgent ones. Before a copy has ended nobody else writes to its places, and no step reads its
        target. Raises nothing: what fails is told by `copied`."""
        ...

    def copied(self) -> list[Copied | Found]:
        """Copies that have ended since the last call, and pages that a tier has from earlier."""
        ...
