"""dynamo_serve against other servers, alternating in one run.

    python -m bench.random_model --out MODEL_DIR
    python -m bench.versus_peers MODEL_DIR --vllm ENV/bin/vllm --transformers ENV/bin/transformers

Peers are commands of environments of their own (`docs/benchmarks.md` says how to make them); those
that are not named are left out. Each server is started alone, warmed up, measured and stopped;
then the next; `--repeat` times. A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import NO_END, SERVERS
from bench.server import free_port, running, settle
from dynamo_serve.bench.bodies import BodyExtras
from dynamo_serve.bench.driver import Driving
from dynamo_serve.bench.latency import samples
from dynamo_serve.bench.plan import Call, Planned
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.run import Options, execute
from dynamo_serve.bench.spread import percentile
from dynamo_serve.bench.texts import TokenizerTexts

TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Workload:
    """`requests` of `shared` + `own` prompt and `output` tokens, `concurrency` at a time."""

    name: str
    requests: int
    concurrency: int
    shared: int
    own: int
    output: int

    def plan(self, texts: TokenizerTexts, seed: int, extra: dict[str, Any]) -> Iterator[Planned]:
        rng = random.Random(seed)
        head = texts.make(self.shared, rng) if self.shared else ""
        for _ in range(self.requests):
            prompt = head + texts.make(self.own, rng)
            yield Planned(None, Call(prompt=prompt, max_tokens=self.output, extra=extra))

    def figures(self, run: Run) -> dict[str, float]:
        """Its figures; every request has yielded `output` tokens."""
        firsts, gaps = (samples(name, run.records, False) for name in ("ttft", "itl"))
        return {
            "tokens_per_second": round(self.output * len(run.records) / run.seconds, 1),
            "ttft_p50_ms": round(percentile(firsts, 0.5) * 1e3),
            "ttft_p99_ms": round(percentile(firsts, 0.99) * 1e3),
            "itl_p50_ms": round(percentile(gaps, 0.5) * 1e3),
            "itl_p99_ms": round(percentile(gaps, 0.99) * 1e3),
        }


WARM_UP = Workload("warm-up", requests=4, concurrency=4, shared=0, own=64, output=8)
WORKLOADS = (
    Workload("W1", requests=32, concurrency=8, shared=0, own=256, output=64),
    Workload("W2", requests=64, concurrency=32, shared=0, own=128, output=64),
    Workload("W3", requests=32, concurrency=8, shared=1024, own=64, output=32),
    Workload("W4", requests=4, concurrency=1, shared=0, own=64, output=128),
    Workload("W5", requests=256, concurrency=64, shared=0, own=32, output=128),
    Workload("W6", requests=16, concurrency=8, shared=0, own=2048, output=128),
)


def drive(url: str, model: str, plan: Iterator[Planned], concurrency: int) -> Run:
    """Send everything; raises `RuntimeError` unless all of it is answered."""
    extras = BodyExtras(model=model, usage=False)  # not every peer knows stream_options
    driving = Driving(extras, concurrency=concurrency, timeout=TIMEOUT_S)
    run = execute(plan, Options(url, driving))
    if run.about["interrupted"]:
        raise KeyboardInterrupt
    if failed := [record for record in run.records if record.outcome != "ok"]:
        raise RuntimeError(failed[0].error or failed[0].outcome)
    return run


def measure(
    server: str, url: str, args: argparse.Namespace, seed: int
) -> dict[str, dict[str, float]]:
    texts = TokenizerTexts(args.model)
    model = str(args.model)
    extra: dict[str, Any] = {"temperature": 0, **({"ignore_eos": True} if server in NO_END else {})}
    drive(url, model, WARM_UP.plan(texts, seed + 1000, extra), WARM_UP.concurrency)
    found = {}
    for workload in WORKLOADS:
        if workload.name not in args.only:
            continue
        check_length(url, model, workload.output, extra)
        run = drive(url, model, workload.plan(texts, seed, extra), workload.concurrency)
        found[workload.name] = workload.figures(run)
    return found


def check_length(url: str, model: str, output: int, extra: dict[str, Any]) -> None:
    """Whether answers are as long as asked, as the server itself counts an unstreamed one."""
    call = Call(prompt="hello", max_tokens=output, is_stream=False, extra=extra)
    (record,) = drive(url, model, iter([Planned(None, call)]), 1).records
    counted = record.output_tokens
    assert counted == output, f"asked for {output} tokens, got {counted}"


def run_once(server: str, args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    port = free_port()
    log = Path(tempfile.gettempdir()) / f"versus-{server}.log"
    peer = SERVERS[server](args, port)
    begin = time.monotonic()
    with running(peer.command, port, log, peer.ready, peer.environment) as server_run:
        up = time.monotonic() - begin
        settle()
        found = measure(server, server_run.url, args, seed)
        print(f"{server}: up after {up:.1f} s, {server_run.resident_gib():.1f} GiB resident")
        return found


def show(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(row[c]) for c in columns))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--vllm", type=Path, help="the vllm command")
    parser.add_argument("--tcmalloc", type=Path, help="libtcmalloc_minimal.so for vllm")
    parser.add_argument("--openvino", type=Path, help="the Python of OpenVINO's environment")
    parser.add_argument("--openvino-model", type=Path, help="what optimum-cli has exported")
    parser.add_argument("--llama", type=Path, help="the llama-server command")
    parser.add_argument("--gguf", type=Path, help="its model")
    parser.add_argument("--transformers", type=Path, help="the transformers command")
    parser.add_argument("--int8", action="store_true", help="ours with int8 weights, too")
    parser.add_argument("--variant", nargs="+", help="ours with these settings, too")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    return parser.parse_args()


def main() -> None:
    args = parse()
    servers = [name for name in SERVERS if name == "dynamo_serve" or getattr(args, name)]
    rows: list[dict[str, Any]] = []
    for repetition in range(args.repeat):
        for server in servers:
            for name, figures in run_once(server, args, repetition).items():
                rows.append({"server": server, "workload": name, "run": repetition, **figures})
                print(rows[-1], flush=True)
    show(rows)
    rates = {
        f"{server} {w.name}": statistics.median(
            row["tokens_per_second"] for row in rows
            if row["server"] == server and row["workload"] == w.name
        )
        for server in servers for w in WORKLOADS if w.name in args.only
    }  # fmt: skip
    print(json.dumps({"tokens_per_second": rates}))


if __name__ == "__main__":
    main()
