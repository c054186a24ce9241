"""The caps of a step and of the queue: plain data, from settings."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class Limits:
    """The caps of a step: `max_queue_delay` in seconds, the others in tokens and sequences.

    With `mix_phases` a step decodes every live sequence and fills up with prompt chunks, of at most
    `max_mixed_tokens`; without, prefill and decode steps alternate. With `fit_chunks` the size of a
    chunk follows from the ITL targets of whoever is decoding; without, only from the caps. By
    learned times, prompts make no step take more than `max_step_seconds`, or a multiple of what
    decoding takes alone.
    What of a page is to be reused is copied where that takes `copy_seconds` and is at least
    `min_copied_tokens`; without the former, never.
    `max_draft_tokens` of one sequence are verified in a step; 0 is for engines that cannot. With
    `hold_steps` a step is held between two layers for prompts that cannot wait for its end. With
    `ladder` the server takes rungs by itself when promises are missed; `ladder_max_tokens` are left
    to answers whose length nobody stated while batch-class work is capped, and `lighter` says that
    there are lighter weights. With `whole_prompts` no prompt is cut into chunks, however long.
    """

    max_prefill_tokens: int = 512
    max_decode_sequences: int = 64
    max_queue_delay: float = 0.003
    max_waiting: int = 10_000
    max_mixed_tokens: int = 512
    max_step_seconds: float = inf
    max_draft_tokens: int = 0
    mix_phases: bool = False
    fit_chunks: bool = True
    hold_steps: bool = False
    ladder: bool = False
    ladder_max_tokens: int = 512
    lighter: bool = False
    copy_seconds: float | None = None
    min_copied_tokens: int = 4
    whole_prompts: bool = False
