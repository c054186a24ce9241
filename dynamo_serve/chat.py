"""A terminal chat against any OpenAI endpoint; with piped input, one question per line."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import httpx

from dynamo_serve.errors import DynamoServeError

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  gives input() line editing and history where there is any

HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer."


class ChatError(DynamoServeError):
    """The server could not be reached, or refused; the message says what to do about it."""


@dataclass(frozen=True, slots=True)
class Options:
    """Where to chat, and how; None leaves the choice to the server."""

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    model: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None

    @property
    def base(self) -> str:
        """The URL up to and with /v1."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else url + "/v1"


def run(options: Options, source: TextIO | None = None, out: TextIO | None = None) -> int:
    """Chat until the input ends or says /quit.

    Returns 0, or 1 if the input was piped and a question failed. Raises `ChatError` when there
    is nobody to talk to.
    """
    source, out = source or sys.stdin, out or sys.stdout
    # Reading has no limit: the first token of a long prompt may take minutes, and Ctrl-C works.
    timeout = httpx.Timeout(10.0, read=None)
    key = (options.api_key or "").encode(errors="surrogateescape")  # as the bytes that were given
    headers = {b"Authorization": b"Bearer " + key} if key else {}
    try:
        client = httpx.Client(base_url=options.base, headers=headers, timeout=timeout)
    except httpx.InvalidURL as error:
        raise ChatError(f"--url {options.url}: {error}") from error
    with client:
        model = options.model or _first_model(client)
        talk = Conversation(client, options, model, out)
        if source.isatty():
            return _interactive(talk, input, out)
        return _piped(talk, source, out)


class Conversation:
    """The messages so far, and the way to get the next one."""

    def __init__(self, client: httpx.Client, options: Options, model: str, out: TextIO) -> None:
        self.model = model
        self._client = client
        self._out = out
        self._system = [{"role": "system", "content": options.system}] if options.system else []
        asked = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        self._fixed = {name: value for name, value in asked.items() if value is not None}
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = list(self._system)

    def ask(self, question: str) -> None:
        """Print the answer as it arrives; Ctrl-C keeps what came. Raises `ChatError`."""
        self.messages.append({"role": "user", "content": question})
        answer: list[str] = []
        try:
            for piece in self._stream():
                answer.append(piece)
                self._out.write(piece)
                self._out.flush()
        except KeyboardInterrupt:
            self._out.write(" [stopped]\n")
        except ChatError:
            self.messages.pop()
            raise
        else:
            self._out.write("\n")
        if answer:
            self.messages.append({"role": "assistant", "content": "".join(answer)})
        else:
            self.messages.pop()

    def _stream(self) -> Iterator[str]:
        body = {"model": self.model, "messages": self.messages, "stream": True, **self._fixed}
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                _check(response)
                yield from _pieces(response)
        except (httpx.HTTPError, UnicodeError) as error:
            raise _unreachable(self._client, error) from error


def _pieces(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if piece := _piece(data):
            yield piece
    raise ChatError("the server closed the stream before the answer was complete")


def _piece(data: str) -> str:
    """The text in one event. Raises `ChatError` for an error in it, or for anything else."""
    try:
        chunk = json.loads(data)
        if chunk.get("error"):
            raise ChatError(_message(chunk) or data)
        deltas = [choice["delta"] for choice in chunk.get("choices") or ()]
        text = "".join([delta.get("content") or "" for delta in deltas])
        return text.encode(errors="replace").decode()  # half a character can't be sent back
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        raise ChatError(f"this is not how a chat endpoint answers: {data[:80]}") from None


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("models")
    except (httpx.HTTPError, UnicodeError) as error:  # UnicodeError: what is no host name
        raise _unreachable(client, error) from error
    _check(response)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ChatError(f"{response.url} lists no model; name one with --model") from None


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    text = response.read().decode(errors="replace")
    try:
        said = _message(json.loads(text))
    except ValueError:
        said = None
    hint = " (give a key with --api-key)" if response.status_code == 401 else ""
    raise ChatError(f"HTTP {response.status_code}: {said or text[:200]}{hint}")


def _message(body: Any) -> str | None:
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("message"))
    return str(error) if error else None


def _unreachable(client: httpx.Client, error: Exception) -> ChatError:
    why = str(error) or type(error).__name__
    return ChatError(
        f"no answer from {client.base_url} ({why}); start a server with 'dynamo-serve serve', "
        "or name another with --url"
    )


def _interactive(talk: Conversation, read: Callable[[str], str], out: TextIO) -> int:
    out.write(f"{talk.model} at your service. {HELP}\n")
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            out.write(f"\n{HELP}\n")
            continue
        if line == "/quit":
            return 0
        try:
            _turn(talk, line, out)
        except ChatError as error:
            out.write(f"{error}\n")


def _piped(talk: Conversation, source: TextIO, out: TextIO) -> int:
    failed = False
    for line in source:
        if line.strip() == "/quit":
            break
        try:
            _turn(talk, line.strip(), out)
        except ChatError as error:
            sys.stderr.write(f"chat: {error}\n")
            failed = True
    return int(failed)


def _turn(talk: Conversation, line: str, out: TextIO) -> None:
    if line == "/reset":
        talk.reset()
    elif line.startswith("/"):
        out.write(f"{line}: unknown command. {HELP}\n")
    elif line:
        talk.ask(line)
