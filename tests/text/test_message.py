"""From tokens to parts: cuts inside of characters and tags, and streams that are gone on with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_serve.core.request import NO_ID, Finish, Summary, TokenEvent, TokenLogprob
from dynamo_serve.text.detokenizer import Detokenizer
from dynamo_serve.text.dialect import Parsing, Reader
from dynamo_serve.text.message import PartedTranscript
from dynamo_serve.text.parts import CallPart, Parts, joined
from dynamo_serve.text.pieces import byte_alphabet
from dynamo_serve.text.stream import Delta, Transcript
from dynamo_serve.text.tokenizer import Tokenizer
from dynamo_serve.text.tools.forms import FORMS
from tests.text.parsing import NAMES, read, texts
from tests.text.tiny import byte_level

TOKENIZER = Tokenizer(byte_level())
END = min(TOKENIZER.eos_ids)
VOCABULARY = byte_level().get_vocab()
BYTE_IDS = {byte: VOCABULARY[char] for char, byte in byte_alphabet().items()}
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
HERMES = Parsing("hermes", NAMES)


def message(parsing: Parsing, stops: tuple[str, ...] = ()) -> PartedTranscript:
    detokenizer = Detokenizer(TOKENIZER.decode, TOKENIZER.special_ids, alone=TOKENIZER.alone)
    return PartedTranscript(Transcript(detokenizer, stops), Reader(parsing))


def byte_ids(text: str) -> list[int]:
    """A token for each byte: characters come in up to four of them."""
    return [BYTE_IDS[byte] for byte in text.encode()]


def told(deltas: list[Delta]) -> Parts:
    return joined(delta.parts or Parts() for delta in deltas)


def grouped(ids: list[int], sizes: list[int], finish: Finish) -> list[TokenEvent]:
    """Events of so many tokens each, in turn; the stop token ends them if it was one."""
    events: list[TokenEvent] = []
    at = 0
    while at < len(ids):
        size = sizes[len(events) % len(sizes)]
        events.append(TokenEvent("r", tuple(ids[at : at + size])))
        at += size
    if finish is Finish.STOP:
        return [*events, TokenEvent("r", (END,), finish=finish, stop_id=END)]
    return [*events, TokenEvent("r", finish=finish)]


SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_tell_what_the_text_tells_wherever_a_stream_was_cut(
    form: str, data: st.DataObject
) -> None:
    text = data.draw(texts(form))
    ids = data.draw(st.sampled_from([byte_ids(text), TOKENIZER.encode(text)]))
    parsing = Parsing(form, NAMES, thoughts=data.draw(st.sampled_from(["", "think"])))
    finish = data.draw(st.sampled_from([Finish.STOP, Finish.LENGTH]))
    whole = message(parsing)
    deltas = [d for e in grouped(ids, data.draw(SIZES), finish) for d in whole.deltas(e)]
    parts = told(deltas)
    assert parts._replace(num_thought=0) == read(parsing, [text])
    assert sum(len(d.token_ids) for d in deltas) == len(ids) + (finish is Finish.STOP)
    assert [d.finish for d in deltas if d.finish] == [finish]

    cut = data.draw(st.integers(0, len(deltas) - 1))  # the client has these, and goes on
    head = [i for delta in deltas[:cut] for i in delta.token_ids]
    again = message(parsing)
    again.deltas(TokenEvent("r", tuple(head)))
    rest = grouped(ids[len(head) :], data.draw(SIZES), finish)
    both = told(deltas[:cut] + [d for event in rest for d in again.deltas(event)])
    assert both == parts


def test_a_call_begins_with_a_name_alone() -> None:
    """Also where all of it comes at once."""
    event = TokenEvent("r", tuple(TOKENIZER.encode(CALL)), cached_tokens=3)
    first, second = message(HERMES).deltas(event)
    assert first.parts == Parts(calls=(CallPart(0, "f", ""),))
    assert second.parts == Parts(calls=(CallPart(0, None, '{"a": 1}'),))
    assert first.token_ids + second.token_ids == event.token_ids
    assert (first.cached_tokens, second.cached_tokens) == (3, None)


def test_an_answer_that_ends_as_a_call_begins_tells_all_it_has() -> None:
    ids = TOKENIZER.encode('<tool_call>{"name": "f", "arguments": {')
    deltas = message(HERMES).deltas(TokenEvent("r", tuple(ids), finish=Finish.LENGTH))
    assert told(list(deltas)) == Parts(calls=(CallPart(0, "f", "{"),))


def test_a_stop_string_counts_in_calls_too_and_leaves_no_whole_one() -> None:
    deltas = message(HERMES, ('"a"',)).deltas(TokenEvent("r", tuple(TOKENIZER.encode(CALL))))
    assert deltas[-1].finish is Finish.STOP
    assert told(list(deltas)) == Parts(calls=(CallPart(0, "f", "{"),))


def test_one_call_ends_an_answer_where_one_was_asked_for() -> None:
    ids = TOKENIZER.encode(CALL + CALL)
    deltas = message(HERMES._replace(is_single=True)).deltas(TokenEvent("r", tuple(ids)))
    assert deltas[-1].finish is Finish.STOP
    assert told(list(deltas)) == Parts(calls=(CallPart(0, "f", '{"a": 1}'),), is_calling=True)
    assert sum(len(delta.token_ids) for delta in deltas) < len(ids) / 2


@pytest.mark.parametrize(("is_single", "stops"), [(True, ()), (False, ("</tool",))])
def test_an_end_before_the_engines_has_its_summary(is_single: bool, stops: tuple[str, ...]) -> None:
    ids, summary = TOKENIZER.encode(CALL + CALL), Summary(*[0] * len(Summary._fields))
    event = TokenEvent("r", tuple(ids), finish=Finish.LENGTH, summary=summary)
    last = message(HERMES._replace(is_single=is_single), stops).deltas(event)[-1]
    assert (last.finish, last.summary) == (Finish.STOP, summary)


def test_tokens_of_thoughts_are_counted() -> None:
    ids = byte_ids("<think>Hm.</think>Yes")
    deltas = message(Parsing(thoughts="think")).deltas(TokenEvent("r", tuple(ids)))
    # From the end of the opening tag to the end of the closing one.
    assert told(list(deltas)) == Parts("Yes", "Hm.", num_thought=len("><Hm.</think>") - 1)


def test_an_end_without_a_token_is_no_thought() -> None:
    whole = message(Parsing(thoughts="think", is_thinking=True))
    deltas = [*whole.deltas(TokenEvent("r", tuple(byte_ids("Hm"))))]
    deltas += whole.deltas(TokenEvent("r", finish=Finish.DEADLINE))
    assert told(deltas) == Parts(thought="Hm", num_thought=2)


@pytest.mark.parametrize("stops", [(), ("never",)])
def test_what_comes_as_text_is_told_apart_token_by_token(stops: tuple[str, ...]) -> None:
    texts, ids = ("<think>Hm", ".</think>", "", "Yes "), (NO_ID,) * 4
    whole = message(Parsing("hermes", NAMES, thoughts="think"), stops)
    deltas = [*whole.deltas(TokenEvent("r", ids, texts=texts))]
    last = TokenEvent("r", ids[:2], finish=Finish.STOP, texts=(CALL[:20], CALL[20:]))
    deltas += whole.deltas(last)
    calls = (CallPart(0, "f", '{"a": 1}'),)
    assert told(deltas) == Parts("Yes", "Hm.", calls, num_thought=2, is_calling=True)


def test_scores_stay_with_their_tokens() -> None:
    ids = TOKENIZER.encode(CALL)
    scores = tuple(TokenLogprob(i, -1.0) for i in ids)
    event = TokenEvent("r", (*ids, END), (*scores, TokenLogprob(END, -1.0)), 0, Finish.STOP, END)
    deltas = message(HERMES).deltas(event)
    assert [t.logprob.token_id for d in deltas for t in d.tokens] == ids
    assert all(len(d.tokens) == len(d.token_ids) for d in deltas[:-1])
    assert told(list(deltas)).is_calling
