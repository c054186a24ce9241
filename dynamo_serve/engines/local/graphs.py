"""CUDA graphs for decode steps: the forward of a few batch sizes, recorded once and replayed."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from dynamo_serve.core.batch import Work
from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local.attention import AttentionBackend
from dynamo_serve.engines.local.ragged import RaggedArgs, ragged_args
from dynamo_serve.engines.local.runner import ModelRunner
from dynamo_serve.engines.local.step import PackedStep, pack

logger = logging.getLogger(__name__)


@runtime_checkable
class RaggedBackend(Protocol):
    """A backend whose whole view of a step is `args`, so that a graph can hold it."""

    args: RaggedArgs | None


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """What a padded batch must know of the pool: `width` pages hold the longest sequence."""

    page_size: int
    width: int
    scratch_page: int

    @classmethod
    def of(cls, page_size: int, longest: int, scratch_page: int) -> PageGeometry:
        return cls(page_size, -(-longest // page_size), scratch_page)


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded batch size: the tensors it reads, its graph, the logits it writes."""

    step: PackedStep
    args: RaggedArgs
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes worth recording: padding at most doubles a small batch and adds 7 to others."""
    small = [1, 2, 4]
    return sorted({size for size in (*small, *range(8, largest, 8), largest) if size <= largest})


def padded(work: Sequence[Work], size: int, scratch_page: int) -> list[Work]:
    """`work` made `size` long with rows that run one token on the scratch page."""
    filler = Work("", (0,), 0, (scratch_page,), True, Sampling(), 1)
    return [*work, *(filler,) * (size - len(work))]


def static_inputs(
    work: Sequence[Work], size: int, geometry: PageGeometry, device: torch.device
) -> tuple[PackedStep, RaggedArgs]:
    """The tensors of a decode step padded to `size`: their shapes depend on nothing else."""
    full = padded(work, size, geometry.scratch_page)
    step = pack(full, geometry.page_size, device)
    return step, ragged_args(step.rows, geometry.page_size, device, geometry.width)


class DecodeGraphs:
    """Replays decode steps of up to the largest recorded size."""

    def __init__(self, runner: ModelRunner, backend: RaggedBackend, geometry: PageGeometry) -> None:
        self._runner = runner
        self._backend = backend
        self._geometry = geometry
        self._recordings: dict[int, Recording] = {}
        self._sizes: list[int] = []

    def record(self, largest: int, progress: Callable[[float], None]) -> None:
        """Record every size up to `largest`, the largest first so that the others share memory."""
        sizes = graph_sizes(largest)
        pool = torch.cuda.graph_pool_handle()
        for done, size in enumerate(reversed(sizes), 1):
            with torch.inference_mode():
                self._recordings[size] = self._record_one(size, pool)
            progress(done / len(sizes))
        self._sizes = sizes

    def takes(self, work: Sequence[Work]) -> bool:
        """Whether a step is one token for each of few enough sequences, all sampling."""
        return len(work) <= self._sizes[-1] and all(
            w.samples and len(w.token_ids) == 1 and w.pooling is None for w in work
        )

    def run(self, work: Sequence[Work]) -> torch.Tensor:
        """Logits [n, vocab] of the n works; overwritten by the next run."""
        size = self._sizes[bisect.bisect_left(self._sizes, len(work))]
        recording = self._recordings[size]
        step, args = static_inputs(work, size, self._geometry, torch.device("cpu"))
        for kept, new in (
            (recording.step.input_ids, step.input_ids),
            (recording.step.position_ids, step.position_ids),
            (recording.step.slots, step.slots),
            (recording.args.kv_lengths, args.kv_lengths),
            (recording.args.page_table, args.page_table),
        ):
            kept.copy_(new)
        recording.graph.replay()
        return recording.logits[: len(work)]

    def _record_one(self, size: int, pool: tuple[int, int]) -> Recording:
        device = self._runner.model.device
        step, args = static_inputs((), size, self._geometry, device)
        self._runner.attention.begin(step)
        self._backend.args = args  # the static ones, instead of those that begin() made
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # once outside the recording: kernels compile, caches fill
            self._runner.forward(step)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._runner.forward(step)
        return Recording(step, args, graph, logits)


def record(
    runner: ModelRunner,
    backend: AttentionBackend,
    geometry: PageGeometry,
    max_sequences: int,
    progress: Callable[[str, float], None],
) -> DecodeGraphs | None:
    """Graphs for decode steps; None, with the reason in the log, where they cannot be had."""
    if not isinstance(backend, RaggedBackend):
        logger.warning("no CUDA graphs: the %s attention cannot be recorded", backend.name)
        return None
    graphs = DecodeGraphs(runner, backend, geometry)
    try:
        graphs.record(max_sequences, lambda done: progress("graphs", done))
    except RuntimeError as error:
        logger.warning("no CUDA graphs: recording failed: %s", error)
        return None
    return graphs
