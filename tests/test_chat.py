"""The terminal chat against a scripted OpenAI endpoint on a real socket."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dynamo_serve import chat
from dynamo_serve.chat import ChatError, Options


class Endpoint(ThreadingHTTPServer):
    """Answers every chat with `pieces`, or with `status` and `error`; remembers what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pieces = ["Hel", "lo"]
        self.status = 200
        self.tail = "data: [DONE]\n\n"
        self.models: list[dict[str, str]] = [{"id": "first"}, {"id": "second"}]
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"data": self.server.models}))

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(body))
        if self.server.status != 200:
            self._answer(self.server.status, json.dumps({"error": {"message": "no such thing"}}))
            return
        chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in self.server.pieces]
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self._answer(200, ": ping\n\n" + "".join(events) + self.server.tail)

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Terminal(io.StringIO):
    """Standard input of a person."""

    def isatty(self) -> bool:
        return True


def piped(endpoint: Endpoint, text: str, **options: Any) -> tuple[int, str]:
    out = io.StringIO()
    code = chat.run(Options(url=endpoint.url, **options), io.StringIO(text), out)
    return code, out.getvalue()


def test_each_piped_line_is_a_question_in_one_conversation(endpoint: Endpoint) -> None:
    assert piped(endpoint, "hi\n\nand now?\n", system="Be kind.") == (0, "Hello\nHello\n")
    assert [message["content"] for message in endpoint.asked[1]["messages"]] == [
        "Be kind.",
        "hi",
        "Hello",
        "and now?",
    ]


def test_model_and_sampling_are_asked_for_only_when_given(endpoint: Endpoint) -> None:
    piped(endpoint, "hi\n")
    piped(endpoint, "hi\n", model="m", temperature=0.0, max_tokens=5)
    assert endpoint.asked[0].keys() == {"model", "messages", "stream"}
    assert endpoint.asked[0]["model"] == "first"
    assert endpoint.asked[1]["model"] == "m"
    assert (endpoint.asked[1]["temperature"], endpoint.asked[1]["max_tokens"]) == (0.0, 5)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_url_works_with_and_without_v1(endpoint: Endpoint, suffix: str) -> None:
    out = io.StringIO()
    assert chat.run(Options(url=endpoint.url + suffix), io.StringIO("hi\n"), out) == 0
    assert out.getvalue() == "Hello\n"


def test_the_key_is_sent_as_bearer(endpoint: Endpoint) -> None:
    piped(endpoint, "hi\n", api_key="k")
    piped(endpoint, "hi\n")
    assert endpoint.keys == ["Bearer k", None]


def test_reset_forgets_all_but_the_system_message(endpoint: Endpoint) -> None:
    piped(endpoint, "hi\n/reset\nagain\n", system="s")
    assert [message["content"] for message in endpoint.asked[1]["messages"]] == ["s", "again"]


def test_quit_ends_and_an_unknown_command_is_not_sent(endpoint: Endpoint) -> None:
    code, shown = piped(endpoint, "/bye\n/quit\nhi\n")
    assert code == 0
    assert "/bye: unknown command" in shown
    assert endpoint.asked == []


def test_a_refused_question_fails_the_pipe_and_is_forgotten(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.status = 400
    code, shown = piped(endpoint, "hi\nagain\n")
    assert (code, shown) == (1, "")
    assert "HTTP 400: no such thing" in capsys.readouterr().err
    assert [message["content"] for message in endpoint.asked[1]["messages"]] == ["again"]


def test_a_missing_key_is_told_with_its_remedy(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.status = 401
    piped(endpoint, "hi\n")
    assert "--api-key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ('data: {"error": {"message": "engine lost"}}\n\n', "engine lost"),
        ("", "closed the stream before the answer was complete"),
    ],
)
def test_a_stream_that_breaks_off_is_an_error(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str], tail: str, message: str
) -> None:
    endpoint.tail = tail
    code, _ = piped(endpoint, "hi\n")
    assert code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        "{",
        "5",
        "null",
        "[]",
        "[" * 100_000,
        "1" * 5000,
        '{"choices": ["a"]}',
        '{"choices": [{}]}',
        '{"choices": [{"delta": null}]}',
        '{"choices": [{"delta": {"content": 5}}]}',
    ],
)
def test_an_event_that_is_no_chat_is_an_error_and_no_crash(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    endpoint.tail = f"data: {data}\n\n"
    assert piped(endpoint, "hi\n")[0] == 1
    assert "not how a chat endpoint answers" in capsys.readouterr().err


def test_empty_choices_and_half_a_character_do_no_harm(endpoint: Endpoint) -> None:
    endpoint.pieces = ["a", "\ud800"]
    endpoint.tail = 'data: {"error": null, "choices": null}\n\ndata: [DONE]\n\n'
    assert piped(endpoint, "hi\nho\n") == (0, "a?\na?\n")
    assert endpoint.asked[1]["messages"][1]["content"] == "a?"


def test_a_key_is_sent_as_the_bytes_it_was_given_as(endpoint: Endpoint) -> None:
    assert piped(endpoint, "hi\n", api_key="s\u00e9same")[0] == 0
    assert endpoint.keys == ["Bearer s\u00e9same".encode().decode("latin-1")]


def test_a_name_that_is_no_host_is_one_clear_line() -> None:
    with pytest.raises(ChatError, match="no answer from"):
        chat.run(Options(url="http://" + "a" * 70), io.StringIO("hi\n"), io.StringIO())


def test_no_server_is_one_clear_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ChatError, match=r"no answer from .*; start a server with"):
            chat.run(Options(url=f"http://127.0.0.1:{port}"), io.StringIO("hi\n"), io.StringIO())


def test_no_model_is_one_clear_line(endpoint: Endpoint) -> None:
    endpoint.models = []
    with pytest.raises(ChatError, match="name one with --model"):
        piped(endpoint, "hi\n")


class Impatient(io.StringIO):
    """A person who presses Ctrl-C when the second piece of the first answer appears."""

    pressed = False

    def write(self, text: str) -> int:
        if text == "lo" and not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        return super().write(text)


def test_interrupting_an_answer_keeps_what_came_and_the_program(endpoint: Endpoint) -> None:
    out = Impatient()
    assert chat.run(Options(url=endpoint.url), io.StringIO("one\ntwo\n"), out) == 0
    assert out.getvalue() == "Hel [stopped]\nHello\n"
    roles = [message["role"] for message in endpoint.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_a_terminal_is_prompted_and_goes_on_after_interrupts_and_errors(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str | type[BaseException]] = [KeyboardInterrupt, "hi", EOFError]

    def read(prompt: str) -> str:
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    out = io.StringIO()
    endpoint.status = 503
    assert chat.run(Options(url=endpoint.url), Terminal(), out) == 0
    assert "first at your service" in out.getvalue()
    assert out.getvalue().count(chat.HELP) == 2
    assert "HTTP 503" in out.getvalue()
    assert lines == []
