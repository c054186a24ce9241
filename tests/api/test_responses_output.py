"""Items and events are made of an answer's tokens, and not of how these came in pieces."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from dynamo_serve.api.job import Job
from dynamo_serve.api.responses_object import ResponseWriter
from dynamo_serve.core.request import Finish, Request, Sampling, TokenEvent, TokenLogprob
from dynamo_serve.text.dialect import Parsing
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.responding import Json, events_of, put_together, same
from tests.api.talking import THINKING, tokenizer_of
from tests.api.test_tools import PARIS, TIME

TEXTS = {
    "nothing": "",
    "plain": "Hello, 你好 😀!",
    "thoughts": "<think>\nHm, 你好.\n</think>\n\nHello.",
    "calls": f"I ask.\n{PARIS}\n{TIME}",
    "everything": f"<think>Which?</think>\nOne.{PARIS}Two <b>.{TIME}Three <tool",
    "broken": 'One. <tool_call>{"name": "clock", "arguments": {"a',
}
HEAD = {
    **{"id": "resp_0a", "object": "response", "created_at": 1, "model": "m", "store": False},
    **{"parallel_tool_calls": True, "tool_choice": "auto", "tools": []},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(THINKING)


def job_of(parsing: Parsing | None, logprobs: int | None) -> Job:
    sampling = Sampling(logprobs=logprobs)
    request = Request(id="resp_0a-0", prompt_ids=(1, 2), max_tokens=999, sampling=sampling)
    return Job(
        id="resp_0a", created=1, model="m", fingerprint="f", n=1, requests=(request,), stops=(),
        continues_text=False, stream=True, include_usage=False, return_token_ids=False,
        logprobs=logprobs, explain=False, parsing=parsing,
    )  # fmt: skip


def events(ids: list[int], sizes: Iterator[int], end: int, finish: Finish) -> Iterator[TokenEvent]:
    """The tokens of an answer in groups, scored, and its end with the last."""
    left = [*ids, end] if finish is Finish.STOP else ids
    while True:
        size = next(sizes)
        group, left = tuple(left[:size]), left[size:]
        scores = tuple(TokenLogprob(id, -0.5, ()) for id in group)
        if not left:
            stop_id = end if finish is Finish.STOP else None
            yield TokenEvent("resp_0a-0", group, scores, finish=finish, stop_id=stop_id)
            return
        yield TokenEvent("resp_0a-0", group, scores)


def told(job: Job, tokenizer: Tokenizer, steps: Iterator[TokenEvent]) -> Json:
    """The response at the end of a stream, every event of which is held to its shape."""
    writer = ResponseWriter(job, tokenizer, HEAD, lambda response: False)
    transcript = job.transcript(0, tokenizer)
    written = [writer.events(0, delta) for step in steps for delta in transcript.deltas(step)]
    return put_together(events_of((b"".join(written) + writer.ending()).decode()))


@pytest.mark.parametrize("finish", [Finish.STOP, Finish.LENGTH])
@pytest.mark.parametrize("name", TEXTS)
def test_any_grouping_of_tokens_gives_the_same_items(
    tokenizer: Tokenizer, name: str, finish: Finish
) -> None:
    ids, end = tokenizer.encode(TEXTS[name]), min(tokenizer.eos_ids)
    parsing = Parsing("hermes", ("get_weather", "clock"), False, "think")
    job = job_of(None if name == "plain" else parsing, 0)

    def answer(sizes: Iterator[int]) -> Json:
        return same(told(job, tokenizer, events(ids, sizes, end, finish)))

    one_by_one = answer(iter([1] * (len(ids) + 2)))
    for seed in range(20):
        rng = random.Random(seed)
        sizes = rng.choices(range(1, rng.choice([2, 5, 40])), k=len(ids) + 2)
        assert answer(iter(sizes)) == one_by_one


def test_every_token_of_a_plain_text_is_scored_once(tokenizer: Tokenizer) -> None:
    ids, end = tokenizer.encode(TEXTS["plain"]), min(tokenizer.eos_ids)
    steps = events(ids, iter([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]), end, Finish.STOP)
    [part] = told(job_of(None, 0), tokenizer, steps)["output"][0]["content"]
    scored = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"])
    assert scored.decode() == part["text"] == TEXTS["plain"]
