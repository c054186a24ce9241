"""A prompt in its answer: as text, and the log probabilities of its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dynamo_serve.api.job import Job
from dynamo_serve.core.request import TokenLogprob
from dynamo_serve.text.detokenizer import Detokenizer
from dynamo_serve.text.stream import Delta
from dynamo_serve.text.tokenizer import Tokenizer

Json = dict[str, Any]
INLINE_SCORES = 128  # tokens
LEAST_LOGPROB = -9999.0  # JSON has no -Infinity; OpenAI's stand-in


class Echo:
    """The prompt of one choice. `num_top`: with log probabilities, if not None."""

    def __init__(self, ids: Sequence[int], tokenizer: Tokenizer, num_top: int | None) -> None:
        self._ids = ids
        self._tokenizer = tokenizer
        self._num_top = num_top
        hidden = tokenizer.hidden_ids(())
        detokenizer = Detokenizer(tokenizer.decode, hidden, (), tokenizer.alone)
        pieces = [detokenizer.push(token_id) for token_id in ids]
        self.text = "".join(pieces) + detokenizer.flush()
        self._lengths = [len(piece) for piece in pieces]

    def before(self, choice: Json, scores: Sequence[TokenLogprob]) -> Json:
        """The text and the log probabilities of `choice`, with the prompt before them. The first
        token has no log probability: nothing comes before it."""
        text = self.text + choice["text"]
        if self._num_top is None:
            return {"text": text}
        name = self._tokenizer.token_text
        own: Json = choice["logprobs"] or {}
        tops = [likeliest(_cut(score, self._num_top), self._tokenizer) for score in scores]
        prompt: Json = {
            "tokens": [name(token_id) for token_id in self._ids],
            "token_logprobs": self._for_each([finite(score.logprob) for score in scores]),
            "top_logprobs": self._for_each(tops),
            "text_offset": self._offsets(),
        }
        return {
            "text": text,
            "logprobs": {key: [*values, *own.get(key, ())] for key, values in prompt.items()},
        }

    def _for_each(self, values: Sequence[Any]) -> list[Any]:
        """None for the first token, and for all of a prompt that was never computed."""
        return [None, *values, *[None] * (len(self._ids) - 1 - len(values))]

    def _offsets(self) -> list[int]:
        offsets, end = [], 0
        for length in self._lengths:
            offsets.append(end)
            end += length
        return offsets


def scores_many(deltas: Sequence[Delta]) -> bool:
    """Whether to render them would hold up the event loop: it takes 5 us for each of up to 21 log
    probabilities of a token."""
    return sum(len(delta.prompt_logprobs) + len(delta.tokens) for delta in deltas) > INLINE_SCORES


def likeliest(token: TokenLogprob, tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest tokens and the chosen one, as OpenAI has it."""
    pairs = [*token.top, (token.token_id, token.logprob)]
    return {tokenizer.token_text(i): finite(logprob) for i, logprob in pairs}


def told(
    job: Job, index: int, scores: Sequence[TokenLogprob], tokenizer: Tokenizer
) -> list[Json | None]:
    """The log probabilities of the prompt of a choice, as vLLM has them; None for the first token,
    and for all of a prompt that was never computed."""
    num_top = job.prompt_logprobs or 0
    known = [_by_id(_cut(score, num_top), tokenizer) for score in scores]
    return [None, *known, *[None] * (len(job.requests[index].prompt_ids) - 1 - len(known))]


def _by_id(score: TokenLogprob, tokenizer: Tokenizer) -> Json:
    ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(score.top, start=1)]
    return {
        str(token): {
            "logprob": finite(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token),
        }
        for token, logprob, rank in [*ranked, (score.token_id, score.logprob, score.rank)]
    }


def _cut(score: TokenLogprob, num_top: int) -> TokenLogprob:
    return score._replace(top=score.top[:num_top])


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
