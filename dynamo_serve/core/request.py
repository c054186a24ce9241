"""What a client asked for, and what leaves the core in answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import NamedTuple

NO_ID = -1  # of a token of which only the text is known
# Kinds of errors that are not the engine's own: whom it forwards to cannot be reached, or took too
# long, or refuses the request.
FAULTS = ("unavailable", "timeout", "refused")


class Finish(Enum):
    """Why a request ended. Every accepted request ends in exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the engine picks a token from the logits. The defaults switch every filter off.

    `temperature` 0 means greedy. `top_k` 0 means off. `seed` is always set (the edge draws one if
    the client gave none): the random number for a token is a pure function of (seed, position).
    `logprobs` None means none; a number asks for that many alternatives beside the chosen token.
    `prompt_logprobs` asks the same of the tokens of the prompt: all of it is then computed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """Whether picking a token looks at the tokens before it."""
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )


class Grammar(NamedTuple):
    """What an answer has to be. `kind` is "json_schema" (`text`: a schema in JSON), "regex",
    "choice" (a list of texts in JSON) or "grammar" (Lark, as llguidance reads it).
    Other grammars are not to wait for one that `is_slow` to compile."""

    kind: str
    text: str
    is_slow: bool = False


class Pooling(NamedTuple):
    """What of a prompt's hidden states is wanted instead of tokens: their "mean", those of the
    "last" token or of the first ("cls"), or what a classifier on top makes of them ("score").
    The second text of a pair begins at `second_at`; 0 for a single text."""

    kind: str
    second_at: int = 0

    @property
    def reads_all(self) -> bool:
        """Whether it takes more than the last token: what a cache has of a prompt is no use."""
        return self.kind != "last"


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for. Validated once, at the edge; never changed.

    `stop_ids` end the sequence and count as its last token; they are forbidden before
    `min_tokens`. `salt` is the first link of the prefix hash chain: requests with different salts
    never share a page; it is the tenant's and, behind `prefix_index.APART`, the request's own if it
    has one. `arrival` and `deadline` are readings of the monotonic clock, in seconds.

    `class_name` None means the class of the tenant. `priority` 0 is the tenant's own; a higher
    one puts the request behind those of the same tenant. Of several choices of one call the first
    has their number in `num_choices` and answers to the quotas for all; the others have 0. Where
    their prompts differ, it has the sum of their tokens in `call_tokens`.

    `is_open_ended`: the client did not say how long the answer may get, `max_tokens` is all the
    room that there is; a rung of the ladder may then give less.

    `group` is its `prompt_cache_key`: those that wait with the same one are run one after the other
    (`core.waiting`). `is_stream` and `has_class_deadline` (its client named none, so it has that of
    its class) are for recordings only, and stay in the API process.

    With `pinned_until` the full pages of its prompt stay until then (`core.pins`): it asks for one
    token, which nobody needs.

    Only tokens that `grammar` allows are picked; of the end-of-text tokens one where it may end.
    The engine ends the answer (`Finish.STOP`) when nothing can follow.

    With `pooling` it has no `max_tokens`: it ends (`Finish.STOP`) when its prompt is computed, with
    a vector instead of tokens.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    tenant: str = "default"
    salt: str = ""
    arrival: float = 0.0
    deadline: float = inf
    class_name: str | None = None
    priority: int = 0
    num_choices: int = 1
    call_tokens: int = 0
    is_open_ended: bool = False
    pinned_until: float | None = None
    is_stream: bool = True
    group: str = ""
    grammar: Grammar | None = None
    pooling: Pooling | None = None
    has_class_deadline: bool = False


READER_BACK = "reader_back"


class Resumed(NamedTuple):
    """How far an accepted request had got when it was taken from its engine.

    That was at `since`, for `reason` ("engine_lost", "engine_changed", `READER_BACK`). Its
    `token_ids` so far (their `text`, if they came as text) came with `cached_tokens` of the prompt
    found in the cache, the first at `first_token_at`. Of a suspect the engine may have died: it is
    run alone until it has yielded a token.
    """

    token_ids: tuple[int, ...]
    since: float
    reason: str
    first_token_at: float | None = None
    cached_tokens: int = 0
    is_suspect: bool = False
    text: str = ""


class TokenLogprob(NamedTuple):
    """Natural-log probability of one chosen token, and of the likeliest `top` tokens. Of a token of
    the prompt also its `rank` among all: 1 is the likeliest."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


class Summary(NamedTuple):
    """What a finished request cost; seconds of the monotonic clock."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    cached_tokens: int
    num_preemptions: int
    stall_seconds: float = 0.0  # without pages after a preemption; part of the other times
    device_seconds: float = 0.0  # its share of the steps it was in
    page_seconds: float = 0.0
    draft_tokens: int = 0  # guessed ones that were verified beside others
    draft_accepted: int = 0  # those that were right
    transit_seconds: float = 0.0  # from its arrival until a scheduler had it; part of the queue's


class Refusal(NamedTuple):
    """Why a request was shed instead of queued: it never had a finish, because it never began.

    `reason` is a code (`journal.Reason`). `is_own` tells whether the tenant's own limit or share
    is at fault (HTTP 429) or the server's (503). Times are in seconds from now.
    """

    reason: str
    message: str
    is_own: bool
    retry_after: float
    limit: float | None = None
    predicted_wait: float | None = None
    queue_position: int | None = None


class TokenEvent(NamedTuple):
    """What leaves the core, towards the client; the last one of a request carries `finish`.

    `token_ids` includes the stop token when one ended the request; `stop_id` then names it.
    `logprobs` is empty or as long as `token_ids`. `cached_tokens` comes with the first token: how
    much of the prompt was found in the prefix cache. `summary` and `error` come with `finish`.
    `refusal` comes alone, instead of everything else. `max_tokens` comes with the first token, if
    a rung of the ladder has made it less than the request's. `artifact`, `texts` and `fault` are
    the engine's (`SequenceOutput`). `prompt_logprobs`, of each token of the prompt but the first,
    come with the first token, too.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int | None = None
    finish: Finish | None = None
    stop_id: int | None = None
    summary: Summary | None = None
    error: str | None = None
    artifact: bytes | None = None
    refusal: Refusal | None = None
    max_tokens: int | None = None
    texts: tuple[str, ...] = ()
    fault: str = ""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
