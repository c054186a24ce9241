"""llguidance and xgrammar on the same random schemas, and on nasty ones: why we took which.

    pip install xgrammar        # not one of our dependencies
    python -m bench.structured_libraries TOKENIZER_DIR --count 300

Each library has a process of its own. Of every schema: what compiling takes, what a mask takes on
the way through a text (masks and going on by a token), whether the text is valid by `jsonschema`.
The text is random at first and brought to an end after 40 tokens. Nasty schemas: the longest time
that is spent in one call, up to 30 s, and what becomes of the memory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bench.structured_schemas import allowed_by, closing_token, fault_of, random_schema
from dynamo_serve.text.tokenizer import Tokenizer

FREE_TOKENS, MOST_TOKENS = 40, 400
NASTY_SECONDS = 30
NASTY: dict[str, Any] = {
    "3,000 properties": {"properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
    "2,000 constants": {"enum": [f"value number {i}" for i in range(2000)]},
    "a text of 100,000 characters": {"type": "string", "minLength": 99_999, "maxLength": 100_000},
    "an array of 10,000 parts": {"type": "array", "minItems": 10_000, "items": {"type": "integer"}},
    "(a{1000}){1000}": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "allOf of twelve anyOf": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]}
            for i in range(12)
        ]
    },
}


class Follows(Protocol):
    """One library at one place in one text."""

    def mask(self) -> bytes: ...
    def accept(self, token: int) -> bool: ...
    def is_over(self) -> bool: ...


class Library(Protocol):
    def begin(self, schema: Any) -> Follows: ...


class Llguidance:
    def __init__(self, tokenizer: Tokenizer) -> None:
        from dynamo_serve.grammars import vocabulary  # noqa: PLC0415

        assert tokenizer.as_json
        self.words = vocabulary(tokenizer.as_json, tokenizer.vocab_size, tokenizer.eos_ids)

    def begin(self, schema: Any) -> Follows:
        from dynamo_serve.grammars import compiled, schema_grammar  # noqa: PLC0415

        matcher = compiled(schema_grammar(schema), self.words)

        class Place:
            def mask(self) -> bytes:
                return bytes(matcher.compute_bitmask())

            def accept(self, token: int) -> bool:
                return bool(matcher.consume_token(token))

            def is_over(self) -> bool:
                return bool(matcher.is_stopped())

        return Place()


class Xgrammar:
    def __init__(self, tokenizer: Tokenizer) -> None:
        import xgrammar  # noqa: PLC0415

        self.xgrammar = xgrammar
        words = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.info = xgrammar.TokenizerInfo(
            words,
            vocab_type=xgrammar.VocabType.RAW,
            stop_token_ids=sorted(tokenizer.eos_ids),
        )
        self.compiler = xgrammar.GrammarCompiler(self.info, max_threads=1, cache_enabled=False)
        self.bits = xgrammar.allocate_token_bitmask(1, tokenizer.vocab_size)

    def begin(self, schema: Any) -> Follows:
        compiled = self.compiler.compile_json_schema(
            json.dumps(schema), strict_mode=False, max_whitespace_cnt=64
        )
        matcher = self.xgrammar.GrammarMatcher(compiled)
        bits = self.bits

        class Place:
            def mask(self) -> bytes:
                matcher.fill_next_token_bitmask(bits)
                return bytes(bits.numpy().tobytes())

            def accept(self, token: int) -> bool:
                return bool(matcher.accept_token(token))

            def is_over(self) -> bool:
                return bool(matcher.is_terminated())

        return Place()


LIBRARIES: dict[str, Callable[[Tokenizer], Library]] = {
    "llguidance": Llguidance,
    "xgrammar": Xgrammar,
}


class Writer:
    """Writes texts by masks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(0)
        self.seconds: list[float] = []

    def write(self, place: Follows) -> str | None:
        """None if it does not come to an end."""
        ids: list[int] = []
        while len(ids) < MOST_TOKENS and not place.is_over():
            began = time.perf_counter()
            mask = place.mask()
            middle = time.perf_counter()
            token = self._token(mask, ids)
            chosen = time.perf_counter()
            if token is None or not place.accept(token):
                return None
            self.seconds.append(middle - began + time.perf_counter() - chosen)
            if token in self.tokenizer.eos_ids:
                break
            ids.append(token)
        else:
            if not place.is_over():
                return None
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _token(self, mask: bytes, ids: list[int]) -> int | None:
        if len(ids) >= FREE_TOKENS:
            return closing_token(self.tokenizer, mask, ids, self.rng)
        allowed = allowed_by(mask)
        return self.rng.choice(allowed) if allowed else None


def measure(library: str, folder: str, count: int) -> dict[str, Any]:
    tokenizer = Tokenizer.load(folder)
    before, began = _mib(), time.perf_counter()
    known = LIBRARIES[library](tokenizer)
    loading = time.perf_counter() - began
    rng, writer = random.Random(1), Writer(tokenizer)
    verdicts: Counter[str] = Counter()
    compiling: list[float] = []
    for _ in range(count):
        schema = random_schema(rng)
        began = time.perf_counter()
        try:
            place = known.begin(schema)
        except Exception:
            verdicts["refused"] += 1
            continue
        compiling.append(time.perf_counter() - began)
        text = writer.write(place)
        verdicts["no end" if text is None else "wrong" if fault_of(text, schema) else "valid"] += 1
    return {
        "library": library,
        "vocabulary": tokenizer.vocab_size,
        "loading_s": round(loading, 3),
        **verdicts,
        "compile_ms": _spread(compiling),
        "mask_us": _spread(writer.seconds, 1e6),
        "mib": round(_mib() - before),
    }


def nasty(library: str, folder: str, name: str) -> dict[str, Any]:
    signal.alarm(NASTY_SECONDS)  # ends the process
    tokenizer = Tokenizer.load(folder)
    known = LIBRARIES[library](tokenizer)
    before, began = _mib(), time.perf_counter()
    found: dict[str, Any] = {"library": library, "schema": name}
    try:
        place = known.begin(NASTY[name])
        found["compile_ms"] = round(1e3 * (time.perf_counter() - began), 1)
        writer = Writer(tokenizer)
        writer.write(place)
        found["worst_mask_ms"] = round(1e3 * max(writer.seconds, default=0.0), 1)
    except Exception as error:
        found["refused"] = str(error).splitlines()[0][:60]
        found["refused_ms"] = round(1e3 * (time.perf_counter() - began), 1)
    return found | {"mib": round(_mib() - before)}


def _mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _spread(seconds: list[float], unit: float = 1e3) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    at = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    return {k: round(unit * ordered[min(len(ordered) - 1, int(p * len(ordered)))], 2)
            for k, p in at.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--only", nargs="*", default=list(LIBRARIES))
    parser.add_argument("--child", nargs=2, help="for itself: a library and a nasty schema or ''")
    args = parser.parse_args()
    folder = str(args.tokenizer)
    if args.child:
        library, name = args.child
        found = nasty(library, folder, name) if name else measure(library, folder, args.count)
        print(json.dumps(found))
        return
    for name in ("", *NASTY):
        for library in args.only:
            command = [sys.executable, "-m", "bench.structured_libraries", folder, "--count",
                       str(args.count), "--child", library, name]  # fmt: skip
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = ended.stdout.splitlines()
            print(lines[-1] if lines else f"{library}, {name}: ended by {ended.returncode} "
                  f"{ended.stderr[-200:]}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
