"""The writer of a message's events, gone on with after any token."""

from __future__ import annotations

import pytest

from dynamo_serve.api.choices import Head, Tally
from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import Mark
from dynamo_serve.api.messages_frames import MessageWriter
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.text.dialect import Parsing
from dynamo_serve.text.stream import Delta
from tests.api.talking import HERMES, tokenizer_of
from tests.api.test_messages import Event, events_of
from tests.api.test_tools import PARIS, TIME

PARSING = Parsing("hermes", ("get_weather", "clock"), False, "think", False)
TEXT = f"<think>\nHm, 你好.</think>\n\nI ask.\n{PARIS}\nAnd\n{TIME}\nDone. 😀"
TOKENIZER = tokenizer_of(HERMES)
IDS = TOKENIZER.encode(TEXT)
REQUEST = Request("msg_a-0", (5, 6), len(IDS))
JOB = Job(
    *("msg_a", 0, "tiny", "fp", 1, (REQUEST,), (), "messages", True, False, False, None, False),
    keep_seconds=15.0,
    parsing=PARSING,
)


def deltas(ids: list[int], finish: Finish | None = None) -> list[Delta]:
    """What a transcript makes of tokens that come one by one."""
    transcript = JOB.transcript(0, TOKENIZER)
    made: list[Delta] = []
    for at, token_id in enumerate(ids):
        end = finish if at == len(ids) - 1 else None
        made += transcript.deltas(TokenEvent("", (token_id,), finish=end))
    return made


def written(writer: MessageWriter, made: list[Delta]) -> str:
    text = b"".join(writer.events(0, delta) for delta in made)
    if made and made[-1].finish:
        text += writer.end(Tally(JOB))
    return text.decode()


def without_ids(text: str) -> list[Event]:
    lines = [line for line in text.split("\n") if not line.startswith("id: ")]
    return events_of("\n".join(lines))


def kept(text: str) -> str:
    """The events up to the last one with an id."""
    *events, _ = text.split("\n\n")
    while events and not events[-1].startswith("id: "):
        events.pop()
    return "".join(f"{event}\n\n" for event in events)


WHOLE = written(MessageWriter(JOB), deltas(IDS, Finish.LENGTH))


def test_the_blocks_are_those_of_the_text() -> None:
    starts = [data for name, data in without_ids(WHOLE) if name == "content_block_start"]
    kinds = [data["content_block"]["type"] for data in starts]
    assert kinds == ["thinking", "text", "tool_use", "text", "tool_use", "text"]


@pytest.mark.parametrize("cut", range(len(IDS)))
def test_what_follows_a_cut_is_what_is_missing(cut: int) -> None:
    first = written(MessageWriter(JOB), deltas(IDS[:cut]))
    transcript = JOB.transcript(0, TOKENIZER)
    head = transcript.deltas(TokenEvent("", tuple(IDS[:cut])))
    writer = MessageWriter(JOB)
    writer.skip(0, Head(Mark(cut), Delta("", tuple(IDS[:cut])), head))
    rest: list[Delta] = []
    for at, token_id in enumerate(IDS[cut:], start=cut):
        end = Finish.LENGTH if at == len(IDS) - 1 else None
        rest += transcript.deltas(TokenEvent("", (token_id,), finish=end))
    begun = first if cut else ""
    assert kept(begun) == begun, "every step but the last ends with an id"
    assert without_ids(begun + written(writer, rest)) == without_ids(WHOLE)


def test_an_id_tells_how_far_a_client_is() -> None:
    ids = [line[4:] for line in WHOLE.split("\n") if line.startswith("id: ")]
    assert ids[0] == "msg_a:0" and ids[-1] == f"msg_a:{len(IDS)}e"
    counts = [int(id.rpartition(":")[2].rstrip("e")) for id in ids]
    assert counts == sorted(counts)


def test_whoever_asks_for_no_ids_gets_none() -> None:
    text = written(MessageWriter(JOB, shows_ids=False), deltas(IDS, Finish.LENGTH))
    assert "id: " not in text and without_ids(text) == without_ids(WHOLE)
