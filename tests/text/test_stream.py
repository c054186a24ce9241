import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_serve.core.request import Finish, Summary, TokenEvent, TokenLogprob
from dynamo_serve.text.detokenizer import Detokenizer
from dynamo_serve.text.stream import Delta, Transcript, detokenize
from dynamo_serve.text.tokenizer import Tokenizer
from tests.text.tiny import byte_level

TOKENIZER = Tokenizer(byte_level())
END = min(TOKENIZER.eos_ids)


def transcript(stops: Sequence[str] = (), min_tokens: int = 0) -> Transcript:
    detokenizer = Detokenizer(TOKENIZER.decode, TOKENIZER.special_ids, alone=TOKENIZER.alone)
    return Transcript(detokenizer, stops, min_tokens)


def events(groups: Sequence[Sequence[int]], stop_id: int | None = None) -> list[TokenEvent]:
    last = len(groups) - 1
    finish = Finish.LENGTH if stop_id is None else Finish.STOP
    return [
        TokenEvent("r", tuple(ids), finish=finish, stop_id=stop_id)
        if i == last
        else TokenEvent("r", tuple(ids))
        for i, ids in enumerate(groups)
    ]


def run(script: Sequence[TokenEvent], text: Transcript) -> tuple[list[Delta], bool]:
    """The deltas, and whether the source was closed before its end."""
    closed_early = False

    async def source() -> AsyncGenerator[TokenEvent, None]:
        nonlocal closed_early
        try:
            for event in script:
                yield event
        except GeneratorExit:
            closed_early = True
            raise

    async def collect() -> list[Delta]:
        return [delta async for delta in detokenize(source(), text)]

    return asyncio.run(collect()), closed_early


def test_a_stop_token_counts_but_yields_no_text() -> None:
    deltas, _ = run(events([TOKENIZER.encode("hello"), [END]], stop_id=END), transcript())
    assert "".join(d.text for d in deltas) == "hello"
    assert deltas[-1].token_ids == (END,)
    assert deltas[-1].finish is Finish.STOP


def test_the_number_of_cached_tokens_is_handed_on() -> None:
    script = [TokenEvent("r", (5,), cached_tokens=16), TokenEvent("r", (6,), finish=Finish.LENGTH)]
    assert [d.cached_tokens for d in run(script, transcript())[0]] == [16, None]


def test_a_stop_token_that_is_a_plain_word_yields_no_text_either() -> None:
    ids = TOKENIZER.encode("hello!")
    deltas, _ = run(events([ids], stop_id=ids[-1]), transcript())
    assert "".join(d.text for d in deltas) == "hello"


def test_a_stop_string_closes_the_source_and_drops_later_tokens() -> None:
    ids = TOKENIZER.encode("one STOP two")
    upto = TOKENIZER.encode("one STOP")
    assert ids[: len(upto)] == upto
    deltas, closed_early = run(events([ids, [5], [6]]), transcript(["STOP"]))
    assert [d.text for d in deltas] == ["one "]
    assert deltas[0].token_ids == tuple(upto)
    assert deltas[0].finish is Finish.STOP
    assert closed_early


def test_a_stop_string_that_is_to_be_explained_waits_for_the_summary() -> None:
    summary = Summary(0.1, 0.2, 0.3, 0, 0)
    asked: list[str] = []

    async def source() -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent("r", tuple(TOKENIZER.encode("hi stop")))
        assert asked == ["cancel"], "the end is waited for without being asked for"
        yield TokenEvent("r", tuple(TOKENIZER.encode(" more")))
        yield TokenEvent("r", finish=Finish.CANCELLED, summary=summary)

    async def collect() -> list[Delta]:
        deltas = detokenize(
            source(), transcript(["stop"]), lambda: asked.append("cancel"), waits=True
        )
        return [delta async for delta in deltas]

    (delta,) = asyncio.run(collect())
    assert (delta.text, delta.finish, delta.summary) == ("hi ", Finish.STOP, summary)


def test_the_summary_comes_with_the_engines_finish() -> None:
    summary = Summary(0.1, 0.2, 0.3, 0, 0)
    event = TokenEvent("r", finish=Finish.LENGTH, summary=summary)
    assert transcript().push(event).summary == summary


def test_text_held_for_a_stop_string_comes_out_at_the_end() -> None:
    deltas, _ = run(events([[i] for i in TOKENIZER.encode("one STO")]), transcript(["STOP"]))
    assert "".join(d.text for d in deltas) == "one STO"
    assert deltas[-1].finish is Finish.LENGTH


def test_stop_strings_only_count_after_min_tokens() -> None:
    ids = TOKENIZER.encode("a!a!a!")
    assert len(ids) == 6
    texts = [
        "".join(d.text for d in run(events([[i] for i in ids]), transcript(["!"], minimum))[0])
        for minimum in range(7)
    ]
    assert texts == ["a", "a", "a!a", "a!a", "a!a!a", "a!a!a", "a!a!a!"]


def test_scored_tokens_know_where_their_text_begins() -> None:
    ids = TOKENIZER.encode("a😀!")
    scores = tuple(TokenLogprob(i, -1.0) for i in ids)
    event = TokenEvent("r", tuple(ids), scores, finish=Finish.LENGTH)
    (delta,) = run([event], transcript())[0]
    text = TOKENIZER.decode(ids)
    assert [t.logprob.token_id for t in delta.tokens] == ids
    assert [text[t.offset] for t in delta.tokens if t.logprob.token_id in (ids[0], ids[-1])] == [
        "a",
        "!",
    ]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("ab!é😀"), max_size=30),
    cuts=st.lists(st.integers(0, 80), max_size=6),
    minimum=st.integers(0, 6),
)
def test_merged_events_give_the_same_answer(text: str, cuts: list[int], minimum: int) -> None:
    ids = TOKENIZER.encode(text)
    marks = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    groups = [ids[a:b] for a, b in pairwise(marks)]
    stops = ["b!", "é"]
    one_by_one, _ = run(events([[i] for i in ids] + [[]]), transcript(stops, minimum))
    merged, _ = run(events(groups), transcript(stops, minimum))

    def whole(deltas: list[Delta]) -> tuple[str, tuple[int, ...], Finish | None]:
        joined = tuple(i for d in deltas for i in d.token_ids)
        return "".join(d.text for d in deltas), joined, deltas[-1].finish

    assert whole(one_by_one) == whole(merged)


def test_text_that_comes_as_text_is_taken_as_it_is() -> None:
    script = [
        TokenEvent("r", (-1, -1), texts=("hel", "")),
        TokenEvent("r", (-1,), texts=("lo st",)),
        TokenEvent("r", (-1, -1), texts=("op", " more"), finish=Finish.LENGTH),
    ]
    deltas, _ = run(script, transcript())
    assert ("".join(d.text for d in deltas), deltas[-1].finish) == (
        "hello stop more",
        Finish.LENGTH,
    )
    deltas, _ = run(script, transcript(["stop"]))
    assert ("".join(d.text for d in deltas), deltas[-1].finish) == ("hello ", Finish.STOP)
    assert sum(len(d.token_ids) for d in deltas) == 4
