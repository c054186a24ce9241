"""Closed-loop load on /v1/completions: so many requests, so many at a time, greedy, streaming."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from dynamo_serve.bench.spread import percentile


@dataclass(frozen=True)
class Workload:
    """`requests` of `shared` + `own` prompt and `output` tokens, `concurrency` at a time."""

    name: str
    requests: int
    concurrency: int
    shared: int
    own: int
    output: int


@dataclass
class Timing:
    """One request; seconds from its start."""

    first: float = 0.0
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)


@dataclass
class Report:
    seconds: float
    output_tokens: int
    timings: list[Timing]

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    def summary(self) -> dict[str, float]:
        gaps = [gap for t in self.timings for gap in t.gaps]
        firsts = [t.first for t in self.timings]
        return {
            "tokens_per_second": round(self.tokens_per_second, 1),
            "ttft_p50_ms": round(percentile(firsts, 0.5) * 1e3),
            "ttft_p99_ms": round(percentile(firsts, 0.99) * 1e3),
            "itl_p50_ms": round(percentile(gaps, 0.5) * 1e3),
            "itl_p99_ms": round(percentile(gaps, 0.99) * 1e3),
        }


def prompts(workload: Workload, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[str]:
    """Texts of exactly the asked number of tokens, made of whole-word tokens."""
    rng = random.Random(seed)
    plain = [i for i in range(len(tokenizer)) if is_word(tokenizer, i)]

    def text(count: int) -> str:
        return str(tokenizer.decode([rng.choice(plain) for _ in range(count)]))

    head = text(workload.shared)
    made = [head + text(workload.own) for _ in range(workload.requests)]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in made]
    wanted = workload.shared + workload.own
    assert abs(statistics.mean(lengths) - wanted) <= 0.02 * wanted, lengths
    return made


def is_word(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    text = str(tokenizer.decode([token_id]))
    return text.startswith(" ") and tokenizer(text)["input_ids"] == [token_id]


async def one(
    client: httpx.AsyncClient, body: dict[str, Any], gate: asyncio.Semaphore
) -> tuple[Timing, int]:
    """One streamed completion; its timing and how many chunks carried a choice."""
    async with gate:
        began = last = time.perf_counter()
        timing, chunks = Timing(), 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError((await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                payload = json.loads(line[6:])
                if "error" in payload:
                    raise RuntimeError(line)
                if not payload.get("choices"):
                    continue
                now = time.perf_counter()
                if chunks:
                    timing.gaps.append(now - last)
                else:
                    timing.first = now - began
                chunks, last = chunks + 1, now
        timing.end = time.perf_counter() - began
        return timing, chunks


async def drive(
    url: str, model: str, workload: Workload, texts: list[str], extra: dict[str, Any]
) -> Report:
    """Run the workload; every request is asked for, and is taken to yield, `output` tokens."""
    gate = asyncio.Semaphore(workload.concurrency)
    limits = httpx.Limits(max_connections=workload.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as client:
        began = time.perf_counter()
        results = await asyncio.gather(
            *(
                one(
                    client,
                    {
                        "model": model,
                        "prompt": text,
                        "max_tokens": workload.output,
                        "temperature": 0,
                        "stream": True,
                        **extra,
                    },
                    gate,
                )
                for text in texts
            )
        )
        seconds = time.perf_counter() - began
    return Report(seconds, workload.output * len(texts), [timing for timing, _ in results])


async def count_tokens(url: str, model: str, text: str, output: int, extra: dict[str, Any]) -> int:
    """What the server itself says it generated, for one unstreamed request."""
    body = {"model": model, "prompt": text, "max_tokens": output, "temperature": 0, **extra}
    async with httpx.AsyncClient(base_url=url, timeout=900) as client:
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])
