"""How far one request has got."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dynamo_serve.core.batch import Phase, SequenceOutput, Work
from dynamo_serve.core.journal import Entry, Reason
from dynamo_serve.core.lookup import Drafter
from dynamo_serve.core.prefix_index import plain_salt
from dynamo_serve.core.prefix_tree import Chain
from dynamo_serve.core.request import Finish, Request, Resumed, Summary, TokenEvent, TokenLogprob
from dynamo_serve.core.tenant import Class

if TYPE_CHECKING:
    from dynamo_serve.core.shares import Account

AGING_SECONDS = 30.0  # a request without a target is treated as if this were one
PRIORITY_SECONDS = 10.0  # how far one step of lower priority moves a request back
NONE_BANNED: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class Restoring:
    """Pages that are being copied up for a sequence, which has to wait for them.

    `left`: what has not come yet, by key, with its place in the page table. Predicted: `seconds`
    that it takes, and how many computing would take (`saves`); at `until` it is given up.
    `counted`: what its admission has counted as found, to be taken back if it was not.
    """

    seq: Sequence
    left: dict[bytes, int]
    seconds: float
    until: float
    saves: float
    num_pages: int
    error: str = ""
    counted: int | None = None

    @property
    def is_over(self) -> bool:
        return bool(self.error) or not self.left


@dataclass(slots=True, eq=False)
class Sequence:
    """The progress of one request. Only the scheduler writes to it.

    tokens      |  prompt ........................ | output ........ |
    computed    |  KV is in the pages .................. |           |
    pending                                              | to be run |   1 while decoding
    page_keys   |  full | full | full | full | full |                    keys known so far
    num_sealed  |  published ..........|                                 pages in the index
    """

    request: Request
    tokens: list[int]
    promise: Class
    ordinal: int  # how many requests came before
    due: float  # when its first token should be there
    max_tokens: int  # the request's, or less if a rung has cut what was left open
    turn: float  # orders the queue of its tenant: `due`, or earlier, to follow one of its group
    account: Account = field(init=False, repr=False)  # its tenant's, once it is queued
    phase: Phase = Phase.PREFILL
    num_computed: int = 0
    page_table: list[int] = field(default_factory=list)
    shown: tuple[int, ...] = ()  # the same as engines see it: made anew when it has grown
    page_keys: list[bytes] = field(default_factory=list)
    num_sealed: int = 0
    num_unseen: int = 0  # head from the prefix cache that the engine has not been shown
    copied_from: int | None = (
        None  # page of others whose head its first step copies; held till then
    )
    may_restore: bool = True  # from tiers below: until that has failed once
    restoring: Restoring | None = None  # part of that head is still being copied: it cannot run
    num_preemptions: int = 0
    cached_tokens: int = 0  # head found in the prefix cache when first admitted
    transit_seconds: float = 0.0  # from its arrival until the scheduler had it
    admitted_at: float | None = None  # first time
    first_token_at: float | None = None
    last_token_at: float | None = None
    waits_for: str = Reason.STEP.value  # while it has no place in the batch
    waits_since: float = 0.0
    waits: dict[str, float] = field(default_factory=dict)  # seconds by reason
    preempted_at: float | None = None
    stall_seconds: float = 0.0
    device_seconds: float = 0.0
    page_seconds: float = 0.0
    page_part: float = 0.0  # pages held; one with several holders counts in parts
    drafter: Drafter | None = None  # once it has been worth looking for drafts
    draft_tokens: int = 0
    draft_accepted: int = 0
    history: list[Entry] = field(default_factory=list)  # the latest decisions about it
    said: str = ""  # the text of its output, if it came as text
    is_suspect: bool = False  # an engine died of it, perhaps: it runs alone until it has a token
    is_watched: bool = False  # its tokens are judged by targets of its class
    was_left: bool = False  # by its reader, who is back
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of what is computed, if they are asked for

    @classmethod
    def of(cls, request: Request, promise: Class, ordinal: int = 0) -> Sequence:
        seconds = min(promise.ttft, AGING_SECONDS) + request.priority * PRIORITY_SECONDS
        due = request.arrival + seconds
        tokens = list(request.prompt_ids)
        seq = cls(request, tokens, promise, ordinal, due, request.max_tokens, turn=due)
        seq.is_watched = promise.is_promised and request.pinned_until is None
        return seq

    def resume(self, done: Resumed, now: float) -> None:
        """Take over how far it had got; what it has lost by it counts as a stall."""
        self.tokens += done.token_ids
        self.said = done.text
        self.is_suspect = done.is_suspect
        self.preempted_at = done.since
        if done.first_token_at is not None:
            self.first_token_at = self.admitted_at = done.first_token_at
            self.last_token_at = now  # its next gap is not the fault of whoever runs it now
            self.cached_tokens = done.cached_tokens

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def owner(self) -> tuple[str, str]:
        """Of its pages, as `eviction` wants to know it."""
        return plain_salt(self.request.salt), self.request.tenant

    @property
    def is_read_whole(self) -> bool:
        """Whether all of its prompt has to be computed for it, whoever has it."""
        pooling = self.request.pooling
        return self.scores if pooling is None else pooling.reads_all

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def scores(self) -> bool:
        """Whether the log probabilities of its prompt are still wanted, so that nothing of it may
        come from a cache: they are told with its first token."""
        wanted = self.request.sampling.prompt_logprobs
        return wanted is not None and len(self.tokens) == len(self.request.prompt_ids)

    @property
    def cut_to(self) -> int | None:
        """Tokens of output that a rung has left it; None if it may have all it asked for."""
        return self.max_tokens if self.max_tokens < self.request.max_tokens else None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens the model has still to read; exactly 1 in the decode phase."""
        return len(self.tokens) - self.num_computed

    def wait_for(self, reason: str, now: float) -> bool:
        """Put down what it has waited for until now; whether the reason is a new one."""
        self.waits[self.waits_for] = self.waits.get(self.waits_for, 0.0) + now - self.waits_since
        is_new = reason != self.waits_for
        self.waits_for, self.waits_since = reason, now
        return is_new

    def chain(self, keys: list[bytes]) -> Chain:
        return Chain(self.request.tenant, self.request.salt, keys, self.tokens)

    def work(self, count: int, draft: tuple[int, ...] = ()) -> Work:
        """The next `count` pending tokens, and a guess at what follows, as a share of a step."""
        # In the order of the fields, and without properties: this is done for every token.
        request, tokens, start = self.request, self.tokens, self.num_computed
        prompt_len, num_tokens = len(request.prompt_ids), len(tokens)
        shown = self.shown
        if len(shown) != len(self.page_table):
            shown = self.shown = tuple(self.page_table)
        return Work(
            request.id,
            (*tokens[start : start + count], *draft) if count > 1 or draft else (tokens[start],),
            start,
            shown,
            count == num_tokens - start,
            request.sampling,
            prompt_len,
            tuple(tokens[: self.num_unseen]) if self.num_unseen else (),
            request.stop_ids if num_tokens - prompt_len < request.min_tokens else NONE_BANNED,
            len(draft),
            self.copied_from,
            request,
            self.said,
            request.sampling.prompt_logprobs is not None and self.scores,
        )

    def take(
        self, picked: tuple[int, ...], finish: Finish | None
    ) -> tuple[tuple[int, ...], Finish | None, int | None]:
        """Add the picked tokens up to the first that ends the sequence: these, why it ends (as the
        engine says, or not at all, if none of them does), and the stop token."""
        request, tokens = self.request, self.tokens
        num_outputs = len(tokens) - len(request.prompt_ids)
        for i, token in enumerate(picked, start=1):
            tokens.append(token)
            num_outputs += 1
            if token in request.stop_ids and num_outputs > request.min_tokens:
                return picked[:i], Finish.STOP, token
            if num_outputs >= self.max_tokens:
                is_told = finish is not None and i == len(picked)
                return picked[:i], finish if is_told else Finish.LENGTH, None
        return picked, finish, None

    def first(self, event: TokenEvent) -> TokenEvent:
        """Its first tokens, with what is told once."""
        scores, self.prompt_logprobs = self.prompt_logprobs, ()
        return event._replace(cached_tokens=self.cached_tokens, prompt_logprobs=scores)

    def forwarded(self, event: TokenEvent, out: SequenceOutput) -> TokenEvent:
        """An event with what only engines that forward requests add to it."""
        texts = out.texts[: len(event.token_ids)]
        self.said += "".join(texts)
        return event._replace(texts=texts, fault=out.fault)

    def tells_length(self, finish: Finish) -> bool:
        """Whether its end says how long answers are: not if somebody else has set that length."""
        if self.request.pinned_until is not None or self.request.pooling is not None:
            return False
        return finish is Finish.STOP or (finish is Finish.LENGTH and self.cut_to is None)

    def summary(self, now: float) -> Summary:
        admitted = now if self.admitted_at is None else self.admitted_at
        first = now if self.first_token_at is None else self.first_token_at
        return Summary(
            queue_seconds=max(0.0, admitted - self.request.arrival),
            prefill_seconds=max(0.0, first - admitted),
            decode_seconds=max(0.0, now - first),
            cached_tokens=self.cached_tokens,
            num_preemptions=self.num_preemptions,
            stall_seconds=self.stall_seconds,
            device_seconds=self.device_seconds,
            page_seconds=self.page_seconds,
            draft_tokens=self.draft_tokens,
            draft_accepted=self.draft_accepted,
            transit_seconds=self.transit_seconds,
        )
