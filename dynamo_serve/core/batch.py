"""The plan for one step, and what the step produced: plain data that could cross a process."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from dynamo_serve.core.request import (
    Finish,
    Grammar,
    Pooling,
    Request,
    Sampling,
    TokenLogprob,
)


class Phase(Enum):
    """A sequence is in prefill or in decode; a batch may also hold both, where that is allowed."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class PageCopy(NamedTuple):
    """Copy the KV of the first `num_tokens` of a page of the device to another one."""

    source: int
    target: int
    num_tokens: int


class Work(NamedTuple):
    """One sequence's share of a step: run `token_ids` at `position`, `position` + 1, …

    `page_table` covers at least `position + len(token_ids)` tokens. `samples` is False for every
    prefill chunk but the last; when True, the engine picks the token that follows the last of
    `token_ids`, at sequence position `position + len(token_ids)`.

    An engine that looks at earlier tokens (penalties) sees each of them once per admission:
    `cached_ids` holds the tokens before `position` whose KV came from the prefix cache and is
    non-empty only in the first work after an admission; all others arrive in `token_ids`.
    The first `prompt_len` tokens of the sequence are the prompt, the others are output.
    `banned_ids` may not be picked (stop tokens before `min_tokens`).

    The last `draft_len` of `token_ids` are a draft: a guess at what the engine will pick. It picks
    after each of them, and after the token before them, as if all before were settled, and returns
    as many as `kept` says. Work with a draft samples and never looks at a history.

    With `copied_from`, a full page that nobody writes to, the tokens before `position` that are in
    the same page as it are to be copied from there first (`copied`); not for engines whose
    `EngineSpec` has no `copy_seconds`.

    With `grammar`, only for engines that follow them (`EngineSpec.follows_grammars`), the output
    is to be the beginning of a text that it allows. Where bans would leave nothing, it counts.

    With `scores`, the engine tells the log probability of each of `scored_ids` in the place of its
    own (`Sampling.prompt_logprobs`), whether it samples or not.

    An engine that hands requests on as a whole finds this one in `request`, and in `said` the text
    of its output so far, if it came as text.

    With `pooling` no token is wanted, but, of work that samples, a vector. Of what takes more than
    the last token every token of the prompt arrives in `token_ids`, none from the prefix cache.
    """

    seq_id: str
    token_ids: tuple[int, ...]
    position: int
    page_table: tuple[int, ...]
    samples: bool
    sampling: Sampling
    prompt_len: int
    cached_ids: tuple[int, ...] = ()
    banned_ids: frozenset[int] = frozenset()
    draft_len: int = 0
    copied_from: int | None = None
    request: Request | None = None
    said: str = ""
    scores: bool = False

    @property
    def scored_ids(self) -> tuple[int, ...]:
        """The tokens of the prompt that follow each of `token_ids`; none after its last."""
        assert self.scores and self.request is not None
        return self.request.prompt_ids[self.position + 1 :][: len(self.token_ids)]

    def copied(self, page_size: int) -> PageCopy | None:
        """What of a page has to be copied before it runs."""
        if self.copied_from is None:
            return None
        place, num_tokens = divmod(self.position, page_size)
        return PageCopy(self.copied_from, self.page_table[place], num_tokens)

    @property
    def grammar(self) -> Grammar | None:
        return self.request.grammar if self.request is not None else None

    @property
    def pooling(self) -> Pooling | None:
        return self.request.pooling if self.request is not None else None

    @property
    def is_decode(self) -> bool:
        """Whether it feeds one settled token, the newest, behind the prompt."""
        return (
            self.samples
            and len(self.token_ids) - self.draft_len == 1
            and (self.position >= self.prompt_len)
        )

    def kept(self, picked: Sequence[int]) -> int:
        """How many of the tokens picked after each place of the draft stand: all up to the first
        that was not foreseen. What follows it was picked after a token that is not there."""
        draft = self.token_ids[len(self.token_ids) - self.draft_len :]
        for count, (token, guess) in enumerate(zip(picked, draft, strict=False), start=1):
            if token != guess:
                return count
        return len(picked)

    def without_draft(self) -> Work:
        settled = self.token_ids[: len(self.token_ids) - self.draft_len]
        return self._replace(token_ids=settled, draft_len=0)


class Batch(NamedTuple):
    phase: Phase
    work: tuple[Work, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(w.token_ids) for w in self.work)


class SequenceOutput(NamedTuple):
    """What a step produced for one sequence: zero, one or several tokens.

    `finish` is set only when the engine itself ends the sequence, `error` says why it failed,
    `artifact` is a finished product that is not tokens: the vector that a request with `pooling`
    ends with, in float32, of little-endian machines. `fault` tells what kind of error
    it is (`request.FAULTS`).

    An engine that is given text and no ids by somebody else says so with `texts`, one for each
    token; these are then `NO_ID`. A token's text may be empty: its characters come with another.
    `prompt_logprobs` are those of `Work.scored_ids`.
    """

    seq_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: str | None = None
    artifact: bytes | None = None
    texts: tuple[str, ...] = ()
    fault: str = ""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
