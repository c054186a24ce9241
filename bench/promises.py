"""The promises to tenants and classes, measured over HTTP on a server of our own.

    python -m bench.random_model --out MODEL_DIR
    python -m bench.promises MODEL_DIR [--only streams shares flood overload overhead]

Every scenario starts its own server with its own tenants file. Prompts are random token ids,
answers have exactly the asked length. One JSON line per result.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.server import free_port, our_command, running, settle
from dynamo_serve.bench.spread import percentile

FIRST_ID, LAST_ID = 300, 30_000  # of the random prompts
ADMIN = "bench-admin"
IDS = itertools.count()


@dataclass
class Answer:
    """One request: seconds on the client's clock, `sent` absolute, tokens by when they came."""

    sent: float
    status: int = 0
    tokens: list[float] = field(default_factory=list)
    retry_after: float = 0.0
    finish: str | None = None

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.tokens)]


class Client:
    def __init__(self, http: httpx.AsyncClient, model: str, seed: int = 0) -> None:
        self.http = http
        self.model = model
        self.rng = random.Random(seed)

    def prompt(self, length: int) -> list[int]:
        return [self.rng.randint(FIRST_ID, LAST_ID) for _ in range(length)]

    async def ask(
        self,
        key: str,
        prompt: list[int],
        output: int,
        *,
        id: str | None = None,
        class_name: str | None = None,
    ) -> Answer:
        """One streamed completion of exactly `output` tokens, or its refusal."""
        answer = Answer(time.monotonic())
        body = {"model": self.model, "prompt": prompt, "max_tokens": output, "stream": True,
                "temperature": 0, "ignore_eos": True, "return_token_ids": True,
                **({"class": class_name} if class_name else {})}  # fmt: skip
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": id or f"b{next(IDS)}"}
        async with self.http.stream(
            "POST", "/v1/completions", json=body, headers=headers
        ) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                await response.aread()
                answer.retry_after = float(response.headers.get("Retry-After", 0))
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                payload = json.loads(line[6:])
                for choice in payload.get("choices", ()):
                    now = time.monotonic()
                    answer.tokens += [now] * len(choice.get("token_ids") or ())
                    answer.finish = choice.get("finish_reason") or answer.finish
        return answer

    async def admin(self, what: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {ADMIN}"}
        response = await self.http.get(f"/admin/{what}", headers=headers, timeout=30)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    async def foreseen(self, key: str, id: str) -> float | None:
        """When the first token will come, as the server sees it, on the client's clock; None once
        the request runs."""
        headers = {"Authorization": f"Bearer {key}"}
        response = await self.http.get(f"/v1/requests/{id}", headers=headers)
        told = time.monotonic()
        if response.status_code != 200:
            return None
        seconds = response.json()["choices"][0].get("predicted_first_token_in_s")
        return None if seconds is None else told + float(seconds)


async def every(
    seconds: float, count: int, make: Callable[[int], Awaitable[Answer]]
) -> list[Answer]:
    """Start `make(i)` every so many seconds, whatever became of the ones before."""
    began, tasks = time.monotonic(), []
    for i in range(count):
        await asyncio.sleep(max(0.0, began + i * seconds - time.monotonic()))
        tasks.append(asyncio.ensure_future(make(i)))
    return list(await asyncio.gather(*tasks))


@contextmanager
def tenants_file(classes: dict[str, Any], tenants: dict[str, Any]) -> Iterator[Path]:
    """A tenants file in which every tenant's key is its name."""

    def digest(key: str) -> str:
        return "sha256:" + hashlib.sha256(key.encode()).hexdigest()

    named = {name: {"keys": [digest(name)], **facts} for name, facts in tenants.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tenants.yaml"
        tree = {"classes": classes, "tenants": named, "admin_keys": [digest(ADMIN)]}
        path.write_text(yaml.safe_dump(tree))
        yield path


Scene = Callable[[Client], Coroutine[Any, Any, dict[str, Any]]]


def play(
    args: argparse.Namespace,
    scene: Scene,
    classes: dict[str, Any],
    tenants: dict[str, Any],
    *settings: str,
) -> dict[str, Any]:
    """Run one scene on a fresh server, after a warm-up that teaches it its step times."""

    async def act(url: str) -> dict[str, Any]:
        limits = httpx.Limits(max_connections=2000)
        async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as http:
            client = Client(http, str(args.model))
            key = next(reversed(tenants), "none")  # the one that was promised least
            await asyncio.gather(*(client.ask(key, client.prompt(200), 24) for _ in range(8)))
            await client.ask(key, client.prompt(1500), 4)
            return await scene(client)

    port = free_port()
    log = Path(tempfile.gettempdir()) / "promises-server.log"
    with tenants_file(classes, tenants) as path:
        base = ["model.dtype=bfloat16", "cache.num_pages=2400", *settings, *args.set]
        if tenants:
            base.append(f"server.tenants_file={path}")
        with running(our_command(args.model, port, base), port, log) as server:
            settle()
            return asyncio.run(act(server.url))


def tell(scenario: str, **facts: Any) -> None:
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in facts.items()}
    print(json.dumps({"scenario": scenario, **rounded}), flush=True)


# ── scenarios ────────────────────────────────────────────────────────────────


def streams(args: argparse.Namespace) -> None:
    """Four streams decode while a 2,000-token prompt arrives every 4 s, with and without chunks
    that are fitted to the ITL target."""
    target = args.itl_ms / 1e3
    classes = {"chat": {"rank": 0, "ttft_ms": 5000, "itl_ms": args.itl_ms}}

    async def scene(client: Client) -> dict[str, Any]:
        async def long_prompt(_: int) -> Answer:
            return await client.ask("a", client.prompt(2000), 4)

        running = [
            asyncio.ensure_future(client.ask("a", client.prompt(64), args.stream_tokens))
            for _ in range(4)
        ]
        prompts = await every(4.0, 10, long_prompt)
        answers = list(await asyncio.gather(*running))
        last = max(p.tokens[0] for p in prompts)
        gaps = [g for a in answers for g in a.gaps]
        beside = [
            b - a
            for answer in answers
            for a, b in itertools.pairwise(answer.tokens)
            if a < last and b > prompts[0].sent
        ]
        state = await client.admin("state")
        return {
            "itl_p50_ms": 1e3 * percentile(gaps, 0.5),
            "itl_p99_ms": 1e3 * percentile(gaps, 0.99),
            "itl_p999_ms": 1e3 * percentile(gaps, 0.999),
            "longest_gap_ms": 1e3 * max(gaps),
            "gaps": len(gaps),
            "gaps_beside_prompts": len(beside),
            "limit_ms": 1.5e3 * target,
            "prompt_ttft_p50_ms": 1e3 * statistics.median(p.ttft for p in prompts),
            "prompt_ttft_max_ms": 1e3 * max(p.ttft for p in prompts),
            "step_error_median": state["step_cost"]["median_error"],
        }

    for fit in ("true", "false") * args.repeat:
        found = play(args, scene, classes, {"a": {"class": "chat"}}, f"scheduler.fit_chunks={fit}")
        tell("streams", fit_chunks=fit, **found)


def shares(args: argparse.Namespace) -> None:
    """Two tenants with weights 3:1, both with more to do than fits."""

    async def scene(client: Client) -> dict[str, Any]:
        stop = time.monotonic() + args.seconds

        async def worker(key: str) -> int:
            count = 0
            while time.monotonic() < stop:
                await client.ask(key, client.prompt(128), 64)
                count += 1
            return count

        async def costs() -> dict[str, Any]:
            await asyncio.sleep(args.seconds * 0.2)  # the first answers are under way
            before = await client.admin("costs")
            await asyncio.sleep(max(0.0, stop - 0.5 - time.monotonic()))
            return {"before": before, "after": await client.admin("costs")}

        seen, *_ = await asyncio.gather(costs(), *(worker(key) for key in "ab" for _ in range(24)))
        gained = {
            name: seen["after"]["tenants"][name]["cost_seconds"]
            - seen["before"]["tenants"][name]["cost_seconds"]
            for name in "ab"
        }
        whole = seen["after"]["whole"]["device_seconds"]
        parts = sum(t["device_seconds"] for t in seen["after"]["tenants"].values())
        fair = [gained["a"] / 3, gained["b"]]
        return {
            "cost_ratio": gained["a"] / gained["b"],
            "jain": sum(fair) ** 2 / (2 * sum(x * x for x in fair)),
            "device_seconds_whole": whole,
            "device_seconds_parts": parts,
        }

    tenants = {"a": {"class": "batch", "weight": 3}, "b": {"class": "batch", "weight": 1}}
    tell("shares", **play(args, scene, {}, tenants, "scheduler.max_decode_sequences=16"))


def flood(args: argparse.Namespace) -> None:
    """A short question every second, calm and beside another tenant's 100 requests at once."""
    # Ten places are kept from the flood. Beside its 30, two questions fit into matrix tiles of 32.
    classes = {"quick": {"rank": 0, "ttft_ms": args.ttft_ms, "itl_ms": 300}}
    tenants = {"a": {"class": "quick"}, "b": {"class": "batch", "quota": {"live_sequences": 30}}}

    async def pour(client: Client) -> tuple[float, list[float]]:
        began = time.monotonic()
        ids = [f"flood{next(IDS)}" for _ in range(100)]
        tasks = [asyncio.ensure_future(client.ask("b", client.prompt(200), 64, id=i)) for i in ids]
        await asyncio.sleep(2.0)
        # One after the other: a hundred forecasts at once are a load of their own.
        asked = [
            (i, time.monotonic(), await client.foreseen("b", ids[i])) for i in range(0, 100, 4)
        ]
        answers = await asyncio.gather(*tasks)
        waits = [(answers[i].tokens[0] - then, seen, then) for i, then, seen in asked]
        errors = [
            abs(seen - then - wait) / wait
            for wait, seen, then in waits
            if seen is not None and wait > 0.5
        ]
        return max(a.tokens[-1] for a in answers) - began, errors

    async def alone(client: Client) -> dict[str, Any]:
        seconds, errors = await pour(client)
        return {"flood_s": seconds, "wait_error_median": statistics.median(errors),
                "waits_foreseen": len(errors)}  # fmt: skip

    async def together(client: Client) -> dict[str, Any]:
        async def question(_: int) -> Answer:
            return await client.ask("a", client.prompt(48), 16)

        calm = await every(1.0, 30, question)
        pouring = asyncio.ensure_future(pour(client))
        tasks: list[asyncio.Future[Answer]] = []
        while not pouring.done():
            tasks.append(asyncio.ensure_future(question(0)))
            await asyncio.wait([pouring], timeout=1.0)
        stormy = list(await asyncio.gather(*tasks))[:-1]
        seconds, errors = await pouring
        facts: dict[str, Any] = {"flood_s": seconds, "wait_error_median": statistics.median(errors)}
        for name, answers in (("calm", calm), ("stormy", stormy)):
            ttfts = [a.ttft for a in answers]
            facts[f"{name}_ttft_p50_ms"] = 1e3 * percentile(ttfts, 0.5)
            facts[f"{name}_ttft_p99_ms"] = 1e3 * percentile(ttfts, 0.99)
            facts[f"{name}_questions"] = len(ttfts)
        facts["step_error_median"] = (await client.admin("state"))["step_cost"]["median_error"]
        return facts

    for _ in range(args.repeat):
        for name, scene in (("alone", alone), ("together", together)):
            tell("flood", scene=name, **play(args, scene, classes, tenants, *FLOOD))


FLOOD = ("scheduler.max_decode_sequences=40",)


def overload(args: argparse.Namespace) -> None:
    """Twice what the server can do; refused clients come back once, when they were told."""
    classes = {"now": {"rank": 0, "ttft_ms": 2000, "itl_ms": 300, "strict": True}}

    async def scene(client: Client) -> dict[str, Any]:
        stop, done = time.monotonic() + 30.0, 0

        async def worker() -> None:
            nonlocal done
            while time.monotonic() < stop:
                answer = await client.ask("b", client.prompt(128), 32)
                done += answer.status == 200 and time.monotonic() < stop

        await asyncio.gather(*(worker() for _ in range(24)))
        capacity = done / 30.0

        async def visitor(_: int) -> Answer:
            prompt = client.prompt(128)
            first = await client.ask("a", prompt, 32)
            if first.status == 200:
                return first
            refused.append(first)
            await asyncio.sleep(first.retry_after)
            second = await client.ask("a", prompt, 32)
            came_back.append(second)
            return second

        refused: list[Answer] = []
        came_back: list[Answer] = []
        count = int(2 * capacity * args.seconds)
        answers = await every(1 / (2 * capacity), count, visitor)
        admitted = [a for a in answers if a.status == 200]
        in_time = [a for a in admitted if a.ttft <= 2.0]
        got_in = [a for a in came_back if a.status == 200]
        return {
            "capacity_per_s": capacity,
            "arrivals": count,
            "refused_first": len(refused),
            "without_retry_after": sum(a.retry_after <= 0 for a in refused),
            "longest_retry_after_s": max((a.retry_after for a in refused), default=0.0),
            "admitted": len(admitted),
            "in_time": len(in_time) / max(1, len(admitted)),
            "came_back": len(came_back),
            "got_in": len(got_in) / max(1, len(came_back)),
        }

    tenants = {"a": {"class": "now"}, "b": {"class": "batch"}}
    tell("overload", **play(args, scene, classes, tenants, "scheduler.max_decode_sequences=16"))


def overhead(args: argparse.Namespace) -> None:
    """What it costs to serve tenants: tokens per second without a tenants file; with two tenants
    that were promised nothing, which is the bookkeeping alone; and with two that were promised an
    ITL of 300 ms, which is the price of the promise."""

    async def scene(client: Client) -> dict[str, Any]:
        began = time.monotonic()
        keys = itertools.cycle("ab")
        answers = await asyncio.gather(
            *(client.ask(next(keys), client.prompt(128), 64) for _ in range(96))
        )
        seconds = time.monotonic() - began
        return {"tokens_per_second": sum(len(a.tokens) for a in answers) / seconds}

    def both(name: str) -> dict[str, Any]:
        return {"a": {"class": name}, "b": {"class": name}}

    cases = {"none": ({}, "false"), "batch": (both("batch"), "true")}
    if args.price:
        cases["standard"] = (both("standard"), "true")
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for name in (*cases, *reversed(cases)) * args.repeat:
        tenants, fit = cases[name]
        settings = ("scheduler.max_decode_sequences=32", f"scheduler.fit_chunks={fit}")
        found = play(args, scene, {}, tenants, *settings)
        rates[name].append(found["tokens_per_second"])
        tell("overhead", tenants=name, **found)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    lost = {f"lost_{name}": 1 - rate / medians["none"] for name, rate in medians.items()}
    tell("overhead", **lost)


SCENARIOS = {f.__name__: f for f in (streams, shares, flood, overload, overhead)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="a setting of the server")
    parser.add_argument("--itl-ms", type=float, default=250.0, help="target of the streams")
    parser.add_argument("--stream-tokens", type=int, default=400)
    parser.add_argument("--ttft-ms", type=float, default=200.0, help="target of the questions")
    parser.add_argument("--seconds", type=float, default=120.0, help="of shares and overload")
    parser.add_argument("--price", action="store_true", help="also what an ITL target costs")
    args = parser.parse_args()
    for name in args.only:
        SCENARIOS[name](args)


if __name__ == "__main__":
    main()
