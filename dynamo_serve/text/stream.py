"""From token events to text: what a client gets to see of one choice."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol

from dynamo_serve.core.request import Finish, Summary, TokenEvent, TokenLogprob
from dynamo_serve.text.detokenizer import Detokenizer
from dynamo_serve.text.parts import Parts
from dynamo_serve.text.stop import StopMatcher


class ScoredToken(NamedTuple):
    """One token with its log probability; `offset` is where its text begins in the answer."""

    logprob: TokenLogprob
    offset: int


class Delta(NamedTuple):
    """What one token event adds to the answer; the last one of a choice carries `finish`.

    `text` may be empty while a character or a possible stop string is incomplete. `token_ids`
    includes the token that ended the choice. `tokens` has an entry for every token that is part
    of the message (not for a stop token) if log probabilities were asked for. `cached_tokens` comes
    with the first token, `summary` with the engine's finish. `parts` are the text told apart, if
    it is a message whose thoughts or calls are looked for. `matched` is the stop string that ended
    it, if one has. `prompt_logprobs` come with the first token, if they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[ScoredToken, ...] = ()
    finish: Finish | None = None
    cached_tokens: int | None = None
    summary: Summary | None = None
    parts: Parts | None = None
    matched: str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Teller(Protocol):
    """What makes deltas of the events of one choice."""

    def deltas(self, event: TokenEvent) -> Sequence[Delta]:
        """What an event adds; the last one has `finish` if the answer has ended."""
        ...


class Transcript:
    """The text of one choice as it grows. `stops` only count after `min_tokens` tokens."""

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = StopMatcher(stops)
        self._has_stops = bool(stops)
        self._unwatched = min_tokens
        self._offset = 0
        self._is_given = False  # comes as text, so that nothing is left in the detokenizer

    def deltas(self, event: TokenEvent) -> Sequence[Delta]:
        return (self.push(event),)

    def push(self, event: TokenEvent) -> Delta:
        """Add an event. Tokens after the one that completes a stop string are dropped."""
        self._is_given = self._is_given or bool(event.texts)
        if event.finish is None and not (self._has_stops or event.logprobs):  # nearly all
            text = "".join(event.texts or map(self._detokenizer.push, event.token_ids))
            self._offset += len(text)
            return Delta(text, event.token_ids, (), None, event.cached_tokens)
        text, num_tokens, tokens = self._read(event)
        finish = event.finish
        if self._stop.matched is None and finish is not None:
            text += "" if self._is_given else self._watch(self._detokenizer.flush())
            if self._stop.matched is None:
                text += self._stop.flush()
        if self._stop.matched is not None:
            finish = Finish.STOP
        ids, matched = event.token_ids[:num_tokens], self._stop.matched
        about = (event.cached_tokens, event.summary)
        return Delta(text, ids, tuple(tokens), finish, *about, matched=matched)

    def _read(self, event: TokenEvent) -> tuple[str, int, list[ScoredToken]]:
        """Text, number of tokens and scores of `event`, as far as a stop string lets them count."""
        pieces: list[str] = []
        tokens: list[ScoredToken] = []
        num_text = len(event.token_ids) - (event.stop_id is not None)
        for i, token_id in enumerate(event.token_ids[:num_text]):
            if event.logprobs:
                tokens.append(ScoredToken(event.logprobs[i], self._offset))
            piece = event.texts[i] if event.texts else self._detokenizer.push(token_id)
            pieces.append(self._watch(piece))
            if self._stop.matched is not None:
                return "".join(pieces), i + 1, tokens
        return "".join(pieces), len(event.token_ids), tokens

    def _watch(self, piece: str) -> str:
        self._offset += len(piece)
        if self._unwatched > 0:
            self._unwatched -= 1
            return piece
        return self._stop.push(piece)


class Silent:
    """Tells of a choice that was asked for no token that it has ended, and nothing else."""

    def deltas(self, event: TokenEvent) -> Sequence[Delta]:
        finish = Finish.LENGTH if event.finish is Finish.STOP else event.finish
        return (Delta("", (), (), finish, event.cached_tokens, event.summary),)


async def detokenize(
    events: AsyncGenerator[TokenEvent, None],
    transcript: Teller,
    cancel: Callable[[], None] = lambda: None,
    *,
    waits: bool = False,
) -> AsyncGenerator[Delta, None]:
    """The deltas of one choice, up to the one with `finish`.

    A stop string ends the choice here and not in the engine: `cancel` must end it there. With
    `waits` the last event is waited for: the last delta then has a summary in any case.
    """
    async with aclosing(events):
        async for event in events:
            deltas = transcript.deltas(event)
            if event.prompt_logprobs:
                first = deltas[0]._replace(prompt_logprobs=event.prompt_logprobs)
                deltas = (first, *deltas[1:])
            for delta in deltas:
                is_cut = delta.finish is not None and event.finish is None
                if is_cut:
                    cancel()
                if is_cut and waits:
                    yield delta._replace(summary=await _summary(events))
                else:
                    yield delta
                if delta.finish is not None:
                    return
    raise AssertionError("the events of a request ended without a finish")


async def _summary(events: AsyncGenerator[TokenEvent, None]) -> Summary | None:
    async for event in events:
        if event.finish is not None:
            return event.summary
    return None
