"""Traces as they were recorded: read in order, described, and told in another format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from dynamo_serve import trace
from dynamo_serve.bench.spread import percentile
from dynamo_serve.errors import ConfigError
from dynamo_serve.trace import Arrival, Header, Step

MOONCAKE_BLOCK = 512  # tokens
PERCENTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Recording:
    """Everything in the files of one recording; the arrivals in the order of their times."""

    header: Header
    arrivals: Sequence[Arrival]
    num_steps: int = 0
    steps: Sequence[Step] = field(default=())

    @property
    def span(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.arrivals[-1].at - self.arrivals[0].at if self.arrivals else 0.0


def load(paths: Sequence[Path], *, with_steps: bool = False) -> Recording:
    """Read files of one recording, in any order. Raises `ConfigError` that names what is wrong."""
    headers: dict[int, tuple[Path, Header]] = {}
    arrivals: list[Arrival] = []
    steps: list[Step] = []
    num_steps = 0
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        header, found = trace.read(path)
        lines = list(found)
        if header.part in headers:
            other = headers[header.part][0]
            raise ConfigError(f"{path} and {other} are both part {header.part}: one recording only")
        headers[header.part] = path, header
        for line in lines:
            if isinstance(line, Arrival):
                arrivals.append(line)
            else:
                num_steps += 1
                if with_steps:
                    steps.append(line)
    if len({header.began_at for _, header in headers.values()}) > 1:
        raise ConfigError("these files are of several recordings; their page numbers do not agree")
    if not arrivals:
        raise ConfigError(f"{paths[0]}: no request is recorded there")
    arrivals.sort(key=lambda arrival: arrival.at)
    return Recording(headers[min(headers)][1], arrivals, num_steps, steps)


def numbers_of(pages: Iterable[tuple[int, int]]) -> Iterator[int]:
    return chain.from_iterable(range(first, first + count) for first, count in pages)


def is_served(arrival: Arrival) -> bool:
    return arrival.ended != "refused"


def hit_tokens(arrivals: Iterable[Arrival], page_size: int) -> tuple[int, int]:
    """Prompt tokens, and how many of them a cache without limit would have had: pages that an
    earlier prompt or answer has filled. The last token of a prompt is always computed."""
    seen: set[int] = set()
    asked = found = 0
    for arrival in arrivals:
        pages = list(numbers_of(arrival.pages))
        most = max(0, (arrival.prompt_tokens - 1) // page_size)
        count = next((i for i, page in enumerate(pages) if page not in seen), len(pages))
        asked += arrival.prompt_tokens
        found += min(count, most) * page_size
        seen.update(pages)
        seen.update(numbers_of(arrival.output_pages))
    return asked, found


def cached_share(arrivals: Iterable[Arrival]) -> float:
    """The share of all prompt tokens that was found in the cache."""
    asked = found = 0
    for arrival in arrivals:
        asked += arrival.prompt_tokens
        found += arrival.cached_tokens
    return found / asked if asked else 0.0


def described(recording: Recording) -> dict[str, Any]:
    """What is in a recording, as plain data."""
    arrivals, header = recording.arrivals, recording.header
    served = [arrival for arrival in arrivals if is_served(arrival)]
    asked, found = hit_tokens(served, header.page_size)
    lengths = {
        name: {f"p{100 * share:g}": round(percentile([getattr(a, name) for a in served], share), 1)
               for share in PERCENTILES}
        for name in ("prompt_tokens", "output_tokens")
    }  # fmt: skip
    return {
        "model": header.model,
        "began_at": header.began_at,
        "requests": len(arrivals),
        "seconds": round(recording.span, 3),
        "steps": recording.num_steps,
        "ended": dict(Counter(arrival.ended for arrival in arrivals).most_common()),
        "tenants": dict(Counter(arrival.tenant for arrival in arrivals).most_common()),
        "prompt_tokens": sum(arrival.prompt_tokens for arrival in served),
        "output_tokens": sum(arrival.output_tokens for arrival in served),
        "lengths": lengths,
        "cached_share": round(cached_share(served), 4),
        "cached_share_without_limit": round(found / asked, 4) if asked else 0.0,
        "hang_ups": sum(arrival.gone_at is not None for arrival in arrivals),
        "slow_readers": sum(arrival.reading is not None for arrival in arrivals),
        "with_text": sum(arrival.text is not None for arrival in arrivals),
    }


def text(told: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for name, value in told.items():
        shown = _shown(value)
        if isinstance(value, dict):
            parts = (f"{key} {_shown(part)}" for key, part in value.items())
            shown = ", ".join(parts) or "none"
        lines.append(f"{name.replace('_', ' '):28} {shown}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "/".join(map(str, value.values()))
    return f"{value:,}" if isinstance(value, int) else str(value)


def mooncake(recording: Recording) -> Iterator[str]:
    """Lines in Mooncake's format: milliseconds, lengths, and ids of blocks of 512 tokens, of which
    equal ones mean equal text up to there. The last block may be begun only, as there."""
    size = recording.header.page_size
    ids: dict[tuple[object, int], int] = {}
    for number, arrival in enumerate(recording.arrivals):
        if not is_served(arrival) or not arrival.prompt_tokens:
            continue
        pages = list(numbers_of(arrival.pages))
        blocks = []
        for block in range(-(-arrival.prompt_tokens // MOONCAKE_BLOCK)):
            # A page stands for all the text before it, too; this one reaches to the block's end.
            last = -(-(block + 1) * MOONCAKE_BLOCK // size) - 1
            page = pages[last] if last < len(pages) else f"alone {number}"
            blocks.append(ids.setdefault((page, block), len(ids)))
        line = {
            "timestamp": round(1000 * (arrival.at - recording.arrivals[0].at)),
            "input_length": arrival.prompt_tokens,
            "output_length": max(1, arrival.output_tokens),
            "hash_ids": blocks,
        }
        yield json.dumps(line)


def seed_of(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")
