"""Before serving, compare a few tokens over pages with the model's own plain forward."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from transformers import PreTrainedModel

from dynamo_serve.core.batch import Work
from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local.discovery import FORWARD_FAILURES, UnsupportedModel
from dynamo_serve.engines.local.kv_cache import PoolSize
from dynamo_serve.engines.local.step import Computed, PackedStep, pack
from dynamo_serve.errors import EngineStartError

logger = logging.getLogger(__name__)

MAX_WINDOW = 128  # a sliding window up to this long is crossed by the check
# Median relative error allowed. Half precision rounds differently in every attention kernel, and
# may send a token to other experts, hence the median; a wrong mask or a lost state is off by ~1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05, torch.int8: 0.1}


class Runner(Protocol):
    """What runs a step, whoever does it."""

    @property
    def model(self) -> PreTrainedModel: ...

    def logits(self, step: PackedStep) -> torch.Tensor:
        """Logits [n, vocab] of the n sampling tokens."""
        ...

    def run(self, step: PackedStep) -> Computed:
        """The logits, and the hidden states that `step` wants."""
        ...


class PageCheck:
    """Two prompts and what `model`'s own forward makes of them, to be held against ours.

    Made while `model` still has its weights; packing them takes them away.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Iterable[int], attention: str, size: PoolSize
    ) -> None:
        """`attention` is the name of the function to give back to `model` afterwards."""
        length = max([9, *(window + 3 for window in windows if window <= MAX_WINDOW)])
        length = min(length, max(1, size.num_pages // 2) * size.page_size)
        self._prompts = [_prompt(model, length, 1)]
        if size.num_pages > 1:
            self._prompts.append(_prompt(model, max(1, length - 2), 2))
        self._page_size = size.page_size
        with torch.inference_mode(), _failures(model):
            self._expected = _plain_logits(model, self._prompts, attention)

    @property
    def num_tokens(self) -> int:
        """The longest prompt, which may be longer than what is served."""
        return len(self._prompts[0])

    def compare(
        self, runner: Runner, page_dtype: torch.dtype, tolerance: float | None = None
    ) -> float:
        """Run both packed, in two chunks, and return the relative error (the chunks' medians, the
        larger one). None takes the tolerance of the model's dtype, or that of pages.

        Raises `UnsupportedModel` when it exceeds the tolerance: the architecture needs something
        that our attention did not get; `EngineStartError` where KV in 8 bits may be why. Writes to
        the first pages of the pool.
        """
        model, prompts, plain = runner.model, self._prompts, self._expected
        with torch.inference_mode(), _failures(model):
            ours = _paged_logits(runner, prompts, self._page_size)
        off = (ours - plain).norm(dim=-1) / plain.norm(dim=-1).clamp_min(1e-9)
        position = torch.cat([torch.arange(len(p), device=off.device) for p in prompts])
        second = position >= _first_chunk(prompts)  # these must have found the first chunk's KV
        worst = max(float(part.median()) for part in (off[~second], off[second]) if len(part))
        if not worst <= (tolerance or max(TOLERANCE[model.dtype], TOLERANCE[page_dtype])):
            reason = f"its logits over pages differ from its plain forward (by {worst:.1e})"
            if page_dtype == torch.int8:
                raise EngineStartError(
                    f"cache.kv_dtype: int8 does not suit this model: {reason}; leave it at auto, "
                    "which says at start if KV in 8 bits was not why"
                )
            raise UnsupportedModel(model.config, reason)
        logger.info("pages agree with the plain forward, relative error %.1e", worst)
        return worst


@contextmanager
def _failures(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FORWARD_FAILURES as error:
        raise UnsupportedModel(model.config, f"a step over pages failed: {error}") from error


def _first_chunk(prompts: Sequence[tuple[int, ...]]) -> int:
    return -(-len(prompts[0]) // 2)


def _prompt(model: PreTrainedModel, length: int, seed: int) -> tuple[int, ...]:
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())


def _paged_logits(
    runner: Runner, prompts: Sequence[tuple[int, ...]], page_size: int
) -> torch.Tensor:
    """Logits [tokens, vocab] of all prompts, run side by side in two chunks."""
    needed = -(-len(prompts[0]) // page_size)
    tables = [tuple(range(i * needed, (i + 1) * needed)) for i in range(len(prompts))]
    middle = _first_chunk(prompts)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start, stop in ((0, middle), (middle, len(prompts[0]))):
        cuts = [prompt[start:stop] for prompt in prompts]
        work = [
            Work(str(i), cut, start, tables[i], True, Sampling(), len(cut))
            for i, cut in enumerate(cuts)
            if cut
        ]
        if not work:
            continue
        step = pack(work, page_size, runner.model.device)
        every = torch.arange(step.input_ids.shape[1], device=runner.model.device)
        logits = runner.logits(step._replace(sample_index=every)).float()
        for w, part in zip(work, logits.split([len(w.token_ids) for w in work]), strict=True):
            found[int(w.seq_id)].append(part)
    return torch.cat([part for parts in found for part in parts])


def _plain_logits(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], attention: str
) -> torch.Tensor:
    """The same without pages, with the model's own attention."""
    model.set_attn_implementation("eager")
    try:
        found = [
            model(input_ids=torch.tensor([p], device=model.device), use_cache=False).logits[0]
            for p in prompts
        ]
    finally:
        model.set_attn_implementation(attention)
    return torch.cat(found).float()
