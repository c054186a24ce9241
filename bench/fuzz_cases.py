"""Requests that a server should survive: what its own description allows, bent and broken."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

Json = Any

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW")
NUMBERS: tuple[Json, ...] = (
    *(0, 1, -1, 2, 17, 2**31, -(2**31), 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**400),
    *(0.1, -0.0, 1e308, -1e308, 5e-324, 1.5, float("nan"), float("inf"), True, False),
)
TEXTS = (
    *("", " ", "a", "\0", "\x7f", "\u2028", "\ufeff", "é", "𝕏", "\ud800", "a\r\nX-Forged: 1"),
    *("null", "../../etc/passwd", "%s%n", "{{7*7}}", "${x}", "<|im_end|>", "auto", "text", "user"),
    *("a" * 300, "word " * 400, "[" * 500, "\\" * 50, "9" * 5000),
)
ODD_PATHS = (
    *("/", "//", "/..", "/%00", "/%ff%fe", "/%2e%2e/%2e%2e", "/v1", "/v1/", "/v1//models", "*"),
    *("/health/", "/HEALTH", "/metrics?a=b&a=c", "/health#x", "/?", "/" + "a" * 9000, "/\x7f"),
    *("http://elsewhere/health", "/openapi.json", "/docs", "/v1/models/%F0%9F%A6%8A", "/é"),
)
LENGTHS = ("max_tokens", "max_output_tokens")
BODY_WEIGHT = 6  # an endpoint that takes a body is asked so many times as often
JUNK = (
    *(b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nbad line\r\n\r\n"),
    *(b"GET / HTTP/3.7\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n", b"\0" * 64),
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
)


@dataclass(frozen=True)
class Endpoint:
    method: str
    path: str
    schema: Json | None

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Case:
    """One connection's worth. `hang_up` after so many bytes, if not None; `silent`: the server
    may close without an answer."""

    endpoint: str
    method: str
    raw: bytes
    hang_up: int | None = None
    silent: bool = False


def endpoints(document: Mapping[str, Any]) -> list[Endpoint]:
    """Every operation of an OpenAPI document, with the schema of its body."""
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema")
            found.append(Endpoint(method.upper(), path, schema))
    return found


class Maker:
    """Makes cases; the same generator state makes the same case."""

    def __init__(
        self,
        rng: random.Random,
        known: list[Endpoint],
        schemas: Mapping[str, Json],
        key: str,
        ids: list[str],
    ) -> None:
        self._rng = rng
        self._ids = ids
        self._key = key.encode()
        self._known = known
        self._schemas = schemas

    def case(self) -> Case:
        if self._chance(0.03):
            return Case("(junk)", "GET", self._broken(self._rng.choice(JUNK)), silent=True)
        weights = [BODY_WEIGHT if known.schema else 1 for known in self._known]
        endpoint = self._rng.choices(self._known, weights)[0]
        method, path, name = endpoint.method, self._path(endpoint.path), endpoint.name
        if self._chance(0.05):
            method = self._rng.choice(METHODS)
        if self._chance(0.05):
            path, name = self._odd_path(), "(odd path)"
        body = self._body(endpoint)
        raw = self._request(method, path, body)
        hang_up = self._rng.randrange(len(raw) + 2) if self._chance(0.1) else None
        bent = self._chance(0.02)
        return Case(name, method, self._broken(raw) if bent else raw, hang_up, silent=bent)

    def _chance(self, share: float) -> bool:
        return self._rng.random() < share

    # Addresses and headers

    def _path(self, template: str) -> str:
        while "{" in template:
            name = template[template.index("{") : template.index("}") + 1]
            text = self._rng.choice([*TEXTS, *self._ids * 9, self._word()])
            template = template.replace(name, quote(text.encode("utf-8", "surrogatepass"))[:9000])
        if self._chance(0.1):
            template += "?limit=" + quote(str(self._rng.choice([*NUMBERS, self._word()])))[:500]
        return template

    def _odd_path(self) -> str:
        if self._chance(0.5):
            return self._rng.choice(ODD_PATHS)
        return "/" + "".join(self._rng.choice(string.printable[:94]) for _ in range(20))

    def _word(self) -> str:
        return "".join(self._rng.choice(string.ascii_lowercase) for _ in range(6))

    def _headers(self) -> list[bytes]:
        odd = (
            b"X-Request-Id: " + self._rng.choice((b"", b"a b", b"x" * 200, b"ok-1", b"\xff\xfe")),
            b"Authorization: "
            + self._rng.choice((b"", b"Bearer", b"Bearer x", b"\xff", b"B " * 9)),
            b"X-Request-Deadline-Ms: " + self._rng.choice((b"0", b"1", b"-5", b"9" * 99, b"1e3")),
            b"Accept: " + self._rng.choice((b"*/*", b"text/event-stream", b"\x80")),
            b"Expect: 100-continue",
            b"Upgrade: websocket\r\nConnection: Upgrade",
            b"Accept-Encoding: gzip, br;q=nope",
            b"Cookie: " + b"a=b; " * 200,
            b"X-Long: " + b"a" * self._rng.choice((100, 8000, 40_000)),
            b"\r\n".join([b"X-Many: 1"] * self._rng.choice((5, 120))),
            b"Origin: https://a.example",
            b"Content-Encoding: gzip",
            b"Range: bytes=0-1",
        )
        own = [b"Authorization: Bearer " + self._key] if self._key else []
        return [*own, *self._rng.sample(odd, self._rng.choice((0, 0, 1, 2)))]

    def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        lines = [f"{method} {path} HTTP/1.1".encode("latin-1", "replace"), b"Host: fuzz"]
        lines += [b"Connection: close", *self._headers()]
        if body is None:
            return b"\r\n".join([*lines, b"", b""])
        kinds = (b"text/plain", b"application/json; charset=utf-16", b"", b"multipart/form-data")
        kind = self._rng.choice(kinds) if self._chance(0.05) else b"application/json"
        lines.append(b"Content-Type: " + kind)
        if self._chance(0.1):
            return b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", self._chunked(body)])
        return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])

    def _chunked(self, body: bytes) -> bytes:
        parts = []
        while body:
            size = self._rng.choice((1, 7, 100, 5000))
            parts.append(b"%x\r\n%s\r\n" % (len(body[:size]), body[:size]))
            body = body[size:]
        trailer = b"X-Trailer: 1\r\n" if self._chance(0.3) else b""
        return b"".join([*parts, b"0\r\n", trailer, b"\r\n"])

    # Bodies

    def _body(self, endpoint: Endpoint) -> bytes | None:
        if endpoint.schema is None and not self._chance(0.05):
            return None
        value = self.value(endpoint.schema or {})
        if isinstance(value, dict):
            fields = self._fields(endpoint.schema or {})
            if bounds := [name for name in LENGTHS if name in fields]:
                value[bounds[0]] = 4  # else some answers take longer than anybody waits
            value.update(self._tamed(value))
            for _ in range(self._rng.choice((0, 0, 1, 1, 2, 3))):
                self._mutate(value)
        elif self._chance(0.9):
            value = {"value": value}
        raw = json.dumps(value, ensure_ascii=self._chance(0.7)).encode("utf-8", "surrogatepass")
        return self._broken(raw) if self._chance(0.08) else raw

    def _fields(self, schema: Json) -> Json:
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema.get("properties", {})

    def _tamed(self, value: Mapping[str, Json]) -> dict[str, Json]:
        """What lets a request be accepted, and keeps it short."""
        wanted: dict[str, Json] = {
            "max_tokens": 4,
            "max_completion_tokens": 4,
            "max_output_tokens": 4,
            "min_tokens": 0,
            "n": 2,
        }
        wanted |= dict.fromkeys(("model", "class", "top_logprobs", "stream_options"))
        wanted |= dict.fromkeys(("tools", "tool_choice", "response_format", "structured_outputs"))
        wanted |= {"logit_bias": {"5": 1}, "prompt": self._rng.choice(["hello", [5, 6], [[7]]])}
        wanted |= {"messages": [{"role": "user", "content": self._rng.choice(TEXTS)}]}
        wanted |= {"input": self._rng.choice(TEXTS), "previous_response_id": None}
        return {key: tame for key, tame in wanted.items() if key in value and self._chance(0.9)}

    def value(self, schema: Json, depth: int = 0) -> Json:
        """Something that `schema` allows, more or less."""
        if "$ref" in schema:
            return self.value(self._schemas[schema["$ref"].rpartition("/")[2]], depth)
        for key in ("anyOf", "oneOf", "enum"):
            if key in schema:
                chosen = self._rng.choice(schema[key])
                return chosen if key == "enum" else self.value(chosen, depth)
        if "const" in schema:
            return schema["const"]
        makers: dict[str, Callable[[Json, int], Json]] = {
            "object": self._object,
            "array": self._array,
            "string": lambda s, _: self._rng.choice(["hello", "a b c", self._word()]),
            "integer": lambda s, _: self._rng.randint(s.get("minimum", 0), 5),
            "number": lambda s, _: self._rng.choice([0, 0.5, 1]),
            "boolean": lambda s, _: self._chance(0.5),
            "null": lambda s, _: None,
        }
        make = makers.get(schema.get("type", ""))
        return make(schema, depth) if make else self.nasty()

    def _object(self, schema: Json, depth: int) -> Json:
        needed = schema.get("required", ())
        fields = schema.get("properties", {})
        return {
            name: self.value(inner, depth + 1)
            for name, inner in fields.items()
            if name in needed or (inner.keys() - {"description"} and self._chance(0.2))
        }

    def _array(self, schema: Json, depth: int) -> Json:
        low = schema.get("minItems", 0)
        return [self.value(schema.get("items", {}), depth + 1) for _ in range(low + depth % 2 + 1)]

    def _mutate(self, value: dict[str, Json]) -> None:
        """Bend one field, at the top or further down."""
        target = value
        while inner := [v for v in _children(target) if isinstance(v, dict)]:
            if self._chance(0.6):
                break
            target = self._rng.choice(inner)
        known = [*target, *self._schemas.get("ChatRequest", {}).get("properties", {})]
        match self._rng.randrange(4):
            case 0 if target:
                del target[self._rng.choice(list(target))]
            case 1:
                target[self._rng.choice([*TEXTS, self._word()])] = self.nasty()
            case _:
                target[self._rng.choice(known or ["a"])] = self.nasty()

    def nasty(self) -> Json:
        """A value that nobody expects."""
        match self._rng.randrange(9):
            case 0 | 1 | 2:
                return self._rng.choice(NUMBERS)
            case 3 | 4 | 5:
                return self._rng.choice(TEXTS)
            case 6:
                return [self._rng.choice([None, 1, "a", [], {}, -5])] * self._rng.choice((0, 1, 99))
            case 7:
                return {self._rng.choice(TEXTS): self._rng.choice(NUMBERS)}
        deep: Json = None
        for _ in range(self._rng.choice((3, 30, 40, 300))):
            deep = [deep] if self._chance(0.5) else {"a": deep}
        return deep

    def _broken(self, raw: bytes) -> bytes:
        if not raw:
            return raw
        at = self._rng.randrange(len(raw))
        match self._rng.randrange(5):
            case 0:
                return raw[:at]
            case 1:
                return raw[:at] + self._rng.randbytes(4) + raw[at:]
            case 2:
                return raw[:at] + raw[at + 1 :]
            case 3:
                return raw[:at] + bytes([raw[at] ^ 1 << self._rng.randrange(8)]) + raw[at + 1 :]
        return raw[:at] + raw[at:] * 2


def _children(value: Json) -> list[Json]:
    """What is right below an object, lists opened."""
    inner = list(value.values())
    return inner + [item for items in inner if isinstance(items, list) for item in items]
