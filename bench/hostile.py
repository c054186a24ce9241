"""What the dearest bodies and floods of connections cost others: `python -m bench.hostile URL`.

While each goes on, /health is asked all the time on a connection that was there before, as a stream
would be; the slowest answer is how long everybody else was held up. A process of its own sends, so
that it is not what is measured. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

SIZE = 3_990_000  # just below server.max_body_bytes
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGE = b'{"role":"user","content":""}'
CONNECTIONS = 6000  # beyond server.max_connections
CHURN_S = 3.0
Address = tuple[str, int]


def filled(head: bytes, item: bytes, tail: bytes, count: int = SIZE) -> bytes:
    """`item`, as often as fits into a body but no more than `count` times."""
    count = min(count, (SIZE - len(head) - len(tail)) // (len(item) + 1))
    return head + b",".join([item] * count) + tail


def keys(head: bytes, tail: bytes, count: int) -> bytes:
    return head + b",".join(b'"%d":1' % i for i in range(count)) + tail


def bodies() -> Iterator[tuple[str, str, bytes]]:
    """(name, path, body): what costs most per byte, accepted or refused."""
    yield "one word", TEXT, b'{"prompt":"' + b"a" * (SIZE - 20) + b'"}'
    yield "surrogate pairs", TEXT, b'{"prompt":"' + rb"\ud83d\ude00" * (SIZE // 12 - 2) + b'"}'
    yield "a million ids", TEXT, filled(b'{"prompt":[', b"5", b"]}", 1_048_000)
    yield "ids of 4,300 digits", TEXT, filled(b'{"prompt":[', b"9" * 4300, b"]}")
    yield "a million floats", TEXT, filled(b'{"prompt":"a","metadata":[', b"1e5", b"]}", 990_000)
    yield "60,000 keys", TEXT, keys(b'{"prompt":"a","logit_bias":{', b"}}", 60_000)
    yield "400,000 keys", TEXT, keys(b'{"prompt":"a","logit_bias":{', b"}}", 400_000)
    yield "empty lists", TEXT, filled(b'{"prompt":"a","metadata":[', b"[]", b"]}")
    yield "20,000 messages", CHAT, filled(b'{"messages":[', MESSAGE, b"]}", 20_000)
    yield "130,000 messages", CHAT, filled(b'{"messages":[', MESSAGE, b"]}")
    head = b'{"messages":[' + MESSAGE + b'],"chat_template_kwargs":{"a":['
    yield "template variables", CHAT, filled(head, b"1", b"]}}", 1_000_000)
    text = b'{"return_token_strs":true,"prompt":"' + b"a b " * (SIZE // 4 - 20) + b'"}'
    yield "tokens as texts", "/tokenize", text
    yield "detokenize a million", "/detokenize", filled(b'{"tokens":[', b"55", b"]}", 1_048_000)
    yield "an unknown field", TEXT, b'{"' + b"k" * (SIZE - 20) + b'":1}'


def rest(at: Address) -> None:
    """Nothing, for comparison."""
    time.sleep(1)


def post(at: Address, path: str, body: bytes) -> None:
    connection = http.client.HTTPConnection(*at, timeout=120)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    connection.getresponse().read()


def silent_connections(at: Address) -> None:
    """More than the server takes; none of them says a word."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(socket.create_connection(at, timeout=30))


def many_connections(at: Address) -> None:
    """Each with a request and without waiting for its answer."""
    end = time.monotonic() + CHURN_S
    while time.monotonic() < end:
        with socket.create_connection(at, timeout=30) as connection:
            connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")


def pipelines(at: Address) -> None:
    """Thousands of requests ahead of their answers."""
    end = time.monotonic() + CHURN_S
    while time.monotonic() < end:
        with socket.create_connection(at, timeout=30) as connection:
            try:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000)
            except ConnectionError:
                continue


def slowest_health(at: Address, work: Callable[..., None], *args: object) -> tuple[float, float]:
    """The slowest answer of /health while `work` goes on, and how long it did, in seconds."""
    process = multiprocessing.Process(target=work, args=(at, *args))
    connection = http.client.HTTPConnection(*at, timeout=60)
    began = time.monotonic()
    slowest, working = 0.0, False
    while process.is_alive() or not working:
        asked = time.monotonic()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit("/health does not answer")
        slowest = max(slowest, time.monotonic() - asked)
        if not working:  # only now, for it to have its place before a flood
            process.start()
            began, working = time.monotonic(), True
    process.join()
    connection.close()
    return slowest, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description="What hostile clients cost the others.")
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    address = urlsplit(parser.parse_args().url)
    at = (address.hostname or "", address.port or 80)
    scenes: list[tuple[str, Callable[..., None], tuple[object, ...]]] = [
        ("nobody", rest, ()),
        *((name, post, (path, body)) for name, path, body in bodies()),
        ("silent connections", silent_connections, ()),
        ("many connections", many_connections, ()),
        ("pipelines", pipelines, ()),
    ]
    found = {}
    for number, (name, work, args) in enumerate(scenes):
        slowest, seconds = slowest_health(at, work, *args)
        found[name] = {"slowest_ms": round(slowest * 1e3), "seconds": round(seconds, 2)}
        bar = "#" * (number + 1) + "-" * (len(scenes) - number - 1)
        print(f"[{bar}] {name:22} {slowest * 1e3:5.0f} ms of {seconds:5.2f} s", file=sys.stderr)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
