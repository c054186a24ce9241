"""`dynamo-serve replay` as its user sees it, above all where things go wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.stub_server import Delays, Stub
from bench.stub_server import serving as stub_serving
from dynamo_serve import cli, trace
from dynamo_serve.bench import record
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from dynamo_serve.trace import Arrival, Header
from tests.api.conftest import model_folder as model_folder  # noqa: PLC0414 - fixtures
from tests.api.conftest import tokenizer as tokenizer  # noqa: PLC0414
from tests.api.live import config, serving
from tests.patience import PATIENCE_S

HEADER = Header(spec={"vocab_size": 400})


def traced(folder: Path, *arrivals: Arrival) -> str:
    path = folder / "trace.jsonl"
    lines = [trace.dump(HEADER), *map(trace.dump, arrivals)]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def few(count: int = 3, **more: Any) -> list[Arrival]:
    return [Arrival(0.01 * n, 20, 3, 8, **more) for n in range(count)]


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does with each connection what `answer` does, one thread for each."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        threads: list[threading.Thread] = []

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threads.append(threading.Thread(target=one, args=(connection,)))
                threads[-1].start()

        def one(connection: socket.socket) -> None:
            with connection:
                try:
                    answer(connection)
                except OSError:
                    return  # it hung up

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *threads):
                thread.join(PATIENCE_S)
                assert not thread.is_alive()


def endless(connection: socket.socket) -> None:
    """A list of models as it should be; to a completion, a line that does not end."""
    connection.settimeout(PATIENCE_S)
    asked = connection.recv(1 << 16)
    while asked.startswith(b"GET"):
        if asked.startswith(b"GET /v1/models"):
            body = b'{"data": [{"id": "m"}]}'
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
        else:
            connection.sendall(b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n")
        asked = connection.recv(1 << 16)
    if asked:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: ")
        while True:
            connection.sendall(b"x" * (1 << 14))


def silent(connection: socket.socket) -> None:
    connection.settimeout(PATIENCE_S)
    while connection.recv(1 << 16):
        pass


def test_a_replay_of_which_nothing_was_answered_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = traced(tmp_path, *few())
    with stub_serving(Stub(delays=Delays(0.001, 0.001), wish={"status": 500})) as stub:
        assert cli.main(["replay", path, stub.url]) == 1
        assert "none of 3 requests was answered; most often: as wished" in capsys.readouterr().err
        stub.wish.clear()
        assert cli.main(["replay", path, stub.url]) == 0
        stub.wish["refuse"] = 99
        assert cli.main(["replay", path, stub.url]) == 1


def test_an_endless_line_ends_with_the_timeout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.jsonl"
    with answering(endless) as url:
        words = ["replay", traced(tmp_path, *few(1)), url, "--timeout", "0.1", "--out", str(out)]
        assert cli.main(words) == 1
    assert "no whole answer within 0.1 s" in capsys.readouterr().err
    (found,) = record.read(out).records
    assert found.end is not None


def test_who_waits_before_the_load_is_told_for_what_and_not_for_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(silent) as url:
        assert cli.main(["replay", traced(tmp_path, *few()), url, "--wait", "1.2"]) == 2
    told, fault = capsys.readouterr().err.splitlines()
    assert told == "waiting for the answer to GET /v1/models, up to 1.2 s (--wait)"
    assert "is it busy? wait longer with --wait" in fault


def test_recorded_texts_are_what_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stub_serving(Stub(delays=Delays(0.001, 0.001))) as stub:
        path = traced(tmp_path, *few(2, text="once upon a time"))
        assert cli.main(["replay", path, stub.url, "--text", "recorded"]) == 0
        assert [body["prompt"] for _, body in stub.seen] == ["once upon a time"] * 2
        capsys.readouterr()
        path = traced(tmp_path, *few(2))
        assert cli.main(["replay", path, stub.url, "--text", "recorded"]) == 2
    assert "there is no text in it" in capsys.readouterr().err


def test_embeddings_are_sent_as_such_and_pairs_are_left_out(
    tokenizer: Tokenizer, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call of two inputs, one of one, one of a text, and two that scored pairs."""
    vectors = [replace(few(1)[0], prompt_tokens=n, pooling="last", call=n // 30) for n in (30, 31)]
    traffic = [*vectors, *few(1, pooling="mean", group="g"), *few(1), *few(2, pooling="score")]
    out = tmp_path / "run.jsonl"
    with serving(Service(config(), model_path=model_folder), tokenizer, config()) as url:
        assert cli.main(["replay", traced(tmp_path, *traffic), url, "--out", str(out)]) == 0
    assert "2: left out, for they scored pairs" in capsys.readouterr().err
    found = sorted(record.read(out).records, key=lambda r: (r.prompt_tokens, r.output_tokens))
    told = [(r.outcome, r.prompt_tokens, r.output_tokens) for r in found]
    assert told == [("ok", 20, 0), ("ok", 20, 3), ("ok", 30, 0), ("ok", 31, 0)]


@pytest.mark.parametrize("flag", ["--wait", "--timeout", "--speed"])
def test_times_are_above_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert cli.main(["replay", traced(tmp_path, *few()), "http://x", flag, "0"]) == 2
    assert f"{flag} 0: allowed: more than 0" in capsys.readouterr().err
