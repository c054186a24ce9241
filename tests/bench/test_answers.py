"""What an answer says, however its bytes were cut into reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import pytest

from dynamo_serve.bench import answers
from dynamo_serve.bench.answers import Said, count_tokens, failure, parse, retry_after, server_times
from dynamo_serve.bench.client import Answer, Client, Reading
from dynamo_serve.bench.latency import tpot
from dynamo_serve.bench.later import Later
from dynamo_serve.bench.outcomes import record_of
from dynamo_serve.bench.plan import Call
from dynamo_serve.bench.precise_loop import new_loop
from dynamo_serve.bench.record import Record
from dynamo_serve.bench.sampling import parse as parse_metrics

STREAM = {"content-type": "text/event-stream; charset=utf-8"}


def event(**plain: Any) -> bytes:
    return b"data: " + json.dumps(plain).encode() + b"\n\n"


def delta(text: str | None, finish: str | None = None) -> bytes:
    return event(choices=[{"delta": {"content": text}, "finish_reason": finish}])


def done(work: Generator[None, None, Any]) -> Any:
    for _ in range(10_000):
        try:
            next(work)
        except StopIteration as end:
            return end.value
    raise AssertionError("it never ends")


def said(*reads: bytes, headers: dict[str, str] | None = None) -> Said:
    answer = Answer(status=200, headers=STREAM if headers is None else headers)
    answer.reads = [(float(at), data) for at, data in enumerate(reads)]
    found: Said = done(parse(answer))
    return found


USAGE = {"prompt_tokens": 9, "completion_tokens": 2}
WHOLE = (
    *(delta(""), b": ping\n\n", b"id: 1:2\n" + delta("one"), delta(" two")),
    *(delta(None, "stop"), event(choices=[], usage=USAGE), b"data: [DONE]\n\n"),
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_how_a_stream_is_cut_changes_nothing_but_the_times(size: int) -> None:
    whole = b"".join(WHOLE)
    found = said(*(whole[at : at + size] for at in range(0, len(whole), size)))
    assert ("".join(found.text), found.num_pieces, found.finish) == ("one two", 2, "stop")
    assert (found.usage, found.is_done, found.error) == (USAGE, True, "")


def test_a_read_counts_once_and_only_if_it_brings_tokens() -> None:
    assert said(*WHOLE).by_choice == {0: [2.0, 3.0]}
    assert said(WHOLE[0], WHOLE[2] + WHOLE[3], *WHOLE[4:]).by_choice == {0: [1.0]}


def test_choices_are_kept_apart() -> None:
    def piece(index: int, text: str) -> bytes:
        return event(choices=[{"index": index, "delta": {"content": text}}])

    both = piece(0, "d") + piece(1, "y")
    found = said(piece(0, "a"), piece(1, "x"), piece(0, "b"), piece(0, "c"), both)
    assert found.by_choice == {0: [0.0, 2.0, 3.0, 4.0], 1: [1.0, 4.0]}
    assert "".join(found.text) == "abcd"  # what a conversation goes on with
    answer = Answer(status=200, end=5.0)
    made = record_of(answer, found, Call(), Record(0, 0.0, 0.0), 0.0)
    assert (made.first, made.choices, made.gaps) == (0.0, 2, (2.0, 1.0, 1.0, 3.0))
    assert tpot(made) == pytest.approx(7.0 / 4)  # six tokens, two of them first ones


def test_lines_may_end_as_in_windows() -> None:
    assert said(*(part.replace(b"\n", b"\r\n") for part in WHOLE)).text == ["one", " two"]


@pytest.mark.parametrize(
    "part", [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}, {"content": "x"}]
)
def test_thoughts_and_tool_calls_are_tokens_too(part: dict[str, Any]) -> None:
    assert said(event(choices=[{"delta": part}])).by_choice == {0: [0.0]}


def test_an_error_in_mid_stream_is_a_failure_even_if_done_follows() -> None:
    found = said(delta("one"), event(error={"message": "lost"}), b"data: [DONE]\n\n")
    assert failure(Answer(status=200), found, is_stream=True) == "lost"


def test_a_stream_that_just_ends_is_a_failure_and_one_with_a_finish_is_not() -> None:
    answer = Answer(status=200)
    assert "ended before" in failure(answer, said(delta("one")), is_stream=True)
    assert failure(answer, said(delta("one"), delta("", "length")), is_stream=True) == ""


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"choices": [{"text": "", "finish_reason": "stop"}]}', ""),
        (b'{"data": [{"embedding": [0.5]}]}', ""),
        (b"{}", "an answer without choices"),
        (b'{"choices": []}', "an answer without choices"),
        (b"", "an answer without choices"),
        (b"[]", "no JSON"),
    ],
)
def test_a_whole_answer_has_choices_or_vectors(body: bytes, why: str) -> None:
    found = failure(Answer(status=200), said(body, headers={}), is_stream=False)
    assert found.startswith(why) and bool(found) == bool(why)


def test_what_is_no_event_is_an_error() -> None:
    assert "no event of a completion" in said(b"data: [1, 2]\n\n").error
    assert "no event of a completion" in said(b"data: {broken\n\n").error


def test_errors_of_all_kinds_say_what_they_say() -> None:
    plain = {"content-type": "application/json"}
    assert said(b'{"error": {"message": "no"}}', headers=plain).error == "no"
    assert said(b'{"error": "no"}', headers=plain).error == "no"
    assert "no JSON" in said(b"<html>", headers=plain).error


def test_tokens_are_counted_without_parsing() -> None:
    assert count_tokens(b"".join(WHOLE).replace(b": ", b":").replace(b"null", b'""')) == 2


@pytest.mark.parametrize(("text", "seconds"), [("7", 7.0), ("0.5", 0.5), ("soon", None)])
def test_retry_after_is_in_seconds(text: str, seconds: float | None) -> None:
    assert retry_after(Answer(headers={"retry-after": text})) == seconds


def test_what_the_server_explains_is_in_seconds() -> None:
    times = server_times({"queue_ms": 20.0, "prefill_ms": 30.0, "cached_tokens": 5})
    assert times == {"queue": 0.02, "prefill": 0.03, "ttft": 0.05}


def test_metrics_are_read_with_their_labels_and_without_buckets() -> None:
    text = '# TYPE a counter\na{b="c d"} 3\nh_bucket{le="1"} 2\nh_sum 1.5\na_created 9\nodd x\n'
    assert done(parse_metrics(text, with_buckets=False)) == {'a{b="c d"}': 3.0, "h_sum": 1.5}
    assert 'h_bucket{le="1"}' in done(parse_metrics(text, with_buckets=True))


def test_work_for_later_returns_or_raises_what_it_does() -> None:
    def steps(count: int, error: Exception | None = None) -> Generator[None, None, int]:
        for _ in range(count):
            yield
        if error is not None:
            raise error
        return count

    async def run() -> list[object]:
        later = Later()
        work = (steps(3), steps(5000), steps(2, ValueError("as wished")), steps(0))
        found: list[object] = list(
            await asyncio.gather(*map(later.run, work), return_exceptions=True)
        )
        assert len(later) == 0
        return found

    first, second, third, fourth = asyncio.run(run())
    assert (first, second, fourth) == (3, 5000, 0)
    assert isinstance(third, ValueError)


def asked(reply: bytes, reading: Reading | None = None) -> Answer:
    """What the client makes of a server that sends `reply` and closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        writer.close()

    async def run() -> Answer:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/")
            found = await client.send(client.request("GET", "/x"), reading or Reading())
            await client.close()
        return found

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(run())


def test_an_answer_without_a_length_lasts_until_the_connection_ends() -> None:
    found = asked(b"HTTP/1.1 200 OK\r\n\r\nall of it")
    assert (found.status, found.error, b"".join(d for _, d in found.reads)) == (
        *(200, "", b"all of it"),
    )


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", "the connection broke"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nshort", "the connection broke"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "no HTTP"),
    ],
)
def test_what_breaks_has_failed(reply: bytes, error: str) -> None:
    assert error in asked(reply).error


def test_an_answer_has_a_size_beyond_which_nobody_reads() -> None:
    head = b"HTTP/1.1 200 OK\r\n"
    reading = Reading(most_bytes=1 << 20)
    for reply in (head + b"\r\n" + bytes(1 << 21), head + b"x: " + b"y" * (1 << 21)):
        assert asked(reply, reading).error == "more than 1 MiB in one answer"


def test_an_interim_answer_is_not_the_answer() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    found = asked(interim + b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    assert (found.status, found.error) == (200, "")


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [{"delta": {"content": 7}}]},
        {"choices": [{"text": "a", "explain": 5}]},
        {"choices": [], "usage": "many"},
        {"choices": [{"text": "a", "index": "first"}]},
    ],
)
def test_what_is_no_event_is_refused_where_it_comes(event: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        answers.Said().take(event)


@pytest.mark.parametrize(("keeps", "opened"), [(True, 2), (False, 3)])
def test_what_meets_a_kept_connection_that_is_closed_is_sent_once_more(
    keeps: bool, opened: int
) -> None:
    """The server answers once on each connection, and closes it when asked again. Where it does not
    keep to that, the second one is closed unanswered."""
    asked: list[asyncio.Task[Any]] = []
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        asked.append(task)
        refuses = len(asked) == 2 and not keeps
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            if not refuses:
                writer.write(ok)
                await reader.readuntil(b"\r\n\r\n")
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def talk() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            first, second = [await client.send(client.request("GET", f"/{i}")) for i in range(2)]
            assert first.status == 200
            if keeps:
                assert (second.status, second.error) == (200, "")
                assert second.sent <= second.reads[0][0]
            else:
                assert second.status == 0 and "the connection broke" in second.error
                third = await client.send(client.request("GET", "/2"))
                assert third.status == 200
            await client.close()
            await asyncio.gather(*asked)
        assert client.num_opened == len(asked) == opened

    asyncio.run(talk())
