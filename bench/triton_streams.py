"""Many streams through our API to one real Triton server: are they batched there?

Asked are a model that Triton batches dynamically (triton_models/echo_tensors) and our own engine
inside Triton (triton_models/dserve), which batches step by step; for comparison our engine outside.
Beside tokens per second stands what the servers' own metrics say of batches.

    python -m bench.triton_streams --streams 64 --tokens 64
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from bench.server import free_port, our_command, running
from bench.sse_client import Stream, drive, post
from dynamo_serve import bundled
from scripts import tritonserver
from scripts.tritonserver import Running

FOLDER = bundled.path()
WORD = "one two three four five six seven eight nine ten "


class Found(NamedTuple):
    name: str
    tokens_per_second: float
    ttft: list[float]  # seconds, sorted
    batches: str


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64, help="requests at the same time")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tritonserver.running(("dserve", "echo_tensors"), folder / "triton") as triton:
            for model in ("echo_tensors", "dserve"):
                show(through(triton, model, folder, given))
        show(measured("our engine outside", [], folder, given))


def through(triton: Running, model: str, folder: Path, given: argparse.Namespace) -> Found:
    settings = [
        "engine.kind=triton",
        f"triton.endpoints={triton.endpoint}",
        f"triton.metrics_endpoints=127.0.0.1:{triton.ports.metrics}",
        f"triton.model={model}",
    ]
    return measured(f"Triton, {model}", settings, folder, given)


def measured(name: str, settings: Sequence[str], folder: Path, given: argparse.Namespace) -> Found:
    port, more = free_port(), {} if "echo" in name else {"ignore_eos": True}
    ours = our_command(FOLDER, port, [*settings, f"scheduler.max_decode_sequences={given.streams}"])
    with running(ours, port, folder / "serve") as server:
        drive(port, requests(given, 0, given.streams, **more), given.streams)  # warms up
        before = page(server.url)
        bodies = requests(given, given.streams, given.streams * given.rounds, **more)
        streams = drive(port, bodies, given.streams)
        after = page(server.url)
    return found(name, streams, before, after)


def requests(given: argparse.Namespace, first: int, count: int, **more: bool) -> list[bytes]:
    prompt = WORD * (1 + given.tokens // 10)  # who echoes has enough to say
    body = {"max_tokens": given.tokens, "stream": True, "temperature": 0, **more}
    body["stream_options"] = {"include_usage": True}
    numbers = range(first, first + count)
    return [post("/v1/completions", {**body, "prompt": f"{i} {prompt}"}) for i in numbers]


def page(url: str) -> dict[str, float]:
    """All metrics by name and labels."""
    found = re.findall(r"^([^#\s]\S*) (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def found(
    name: str, streams: Sequence[Stream], before: dict[str, float], after: dict[str, float]
) -> Found:
    usage = [event["usage"] for each in streams for event in each.events() if event.get("usage")]
    num_tokens = sum(each["completion_tokens"] for each in usage)
    took = max(each.end for each in streams) - min(each.sent for each in streams)
    ttft = sorted(each.ttft - each.sent for each in streams)
    return Found(name, num_tokens / took, ttft, batches(before, after))


def batches(before: dict[str, float], after: dict[str, float]) -> str:
    """What grew meanwhile: requests by execution of Triton's, sequences by step of ours."""

    def grown(name: str) -> float:
        return sum(
            value - before.get(key, 0) for key, value in after.items() if key.startswith(name)
        )

    said = []
    if executions := grown("nv_inference_exec_count"):
        count = grown("nv_inference_count")
        said.append(
            f"count {count:.0f}, exec_count {executions:.0f}: {count / executions:.1f} each"
        )
    if steps := grown("dserve_engine_steps_total"):
        sequences = grown("dserve_engine_step_sequences_total") / steps
        said.append(f"{steps:.0f} steps of {sequences:.1f} sequences")
    return "; ".join(said)


def show(found: Found) -> None:
    middle, late = (found.ttft[int(q * (len(found.ttft) - 1))] for q in (0.5, 0.99))
    print(
        f"{found.name}: {found.tokens_per_second:,.0f} tokens/s, TTFT p50 {1000 * middle:.0f} ms, "
        f"p99 {1000 * late:.0f} ms; {found.batches or 'no batches told'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
