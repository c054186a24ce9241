"""The transcript of an answer that is told apart: thoughts, content, calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dynamo_serve.core.request import Finish, TokenEvent
from dynamo_serve.text.dialect import Reader
from dynamo_serve.text.parts import CallPart, Parts, joined
from dynamo_serve.text.stream import Delta, Transcript


class PartedTranscript:
    """A transcript whose deltas have `parts`.

    It goes token by token, so that what has been told after so many tokens never depends on how
    they came: a stream that is gone on with begins where the other ended. A delta ends with the
    token with which a call begins, and the first of its arguments come with the next: clients
    are used to a name that comes alone. With `is_apart` it ends with every token: so that each log
    probability is known to be of text, or of a tag.
    """

    def __init__(self, transcript: Transcript, reader: Reader, *, is_apart: bool = False) -> None:
        self._is_apart = is_apart
        self._transcript = transcript
        self._reader = reader
        self._pending: tuple[CallPart, ...] = ()

    def deltas(self, event: TokenEvent) -> Sequence[Delta]:
        """What an event adds; the last one has `finish` if the answer has ended."""
        deltas: list[Delta] = []
        group: list[Delta] = []
        for token in _tokens(event):
            group.append(self._push(token))
            if group[-1].finish is not None:
                group[-1] = group[-1]._replace(summary=event.summary)
                break
            if self._is_apart or _begins(group[-1].parts):
                deltas.append(_together(group))
                group.clear()
        return [*deltas, _together(group)] if group else deltas

    def _push(self, event: TokenEvent) -> Delta:
        """The delta of one token at most."""
        delta = self._transcript.push(event)
        parts = self._reader.push(delta.text, len(delta.token_ids))
        if delta.finish is None and self._reader.is_done:
            delta = delta._replace(finish=Finish.STOP)
        if delta.finish is None and not (self._pending or parts.calls):  # nearly all
            return delta._replace(parts=parts)
        told, self._pending = (Parts(calls=self._pending), parts), ()
        if delta.finish is not None:
            parts = joined((*told, self._reader.flush()))
            return delta._replace(parts=parts._replace(is_calling=self._reader.is_calling))
        parts = joined(told)
        if _begins(parts):
            self._pending = tuple(
                CallPart(call.number, None, call.arguments)
                for call in parts.calls
                if call.name and call.arguments
            )
            calls = [call._replace(arguments="") if call.name else call for call in parts.calls]
            parts = parts._replace(calls=tuple(calls))
        return delta._replace(parts=parts)


def _begins(parts: Parts | None) -> bool:
    return parts is not None and any(call.name for call in parts.calls)


def _tokens(event: TokenEvent) -> Iterator[TokenEvent]:
    """The same token by token; its end comes with the last."""
    last = len(event.token_ids) - 1
    if last <= 0:
        yield event
        return
    for at, token_id in enumerate(event.token_ids):
        ids, scores, texts = (token_id,), event.logprobs[at : at + 1], event.texts[at : at + 1]
        if at == last:
            yield event._replace(token_ids=ids, logprobs=scores, texts=texts, cached_tokens=None)
        else:
            cached = event.cached_tokens if at == 0 else None
            yield TokenEvent(event.request_id, ids, scores, cached, texts=texts)


def _together(deltas: Sequence[Delta]) -> Delta:
    """Several as one; the last may be the end."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return Delta(
        "".join(delta.text for delta in deltas),
        tuple(i for delta in deltas for i in delta.token_ids),
        tuple(token for delta in deltas for token in delta.tokens),
        last.finish,
        deltas[0].cached_tokens,
        last.summary,
        joined(delta.parts for delta in deltas if delta.parts is not None),
        last.matched,
    )
