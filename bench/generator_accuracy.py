"""Is the load generator itself to be trusted? Against a stub server whose delays are known.

Three claims: percentiles of TTFT and ITL within 2 ms of the delays that the stub was given; at 500
requests/s arrivals within 1 % of their schedule; and, where a server stalls for a second, whoever
was due meanwhile is counted from when he was due (no coordinated omission).

    python -m bench.generator_accuracy [--seconds 10]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

from bench.stub_server import Delays
from dynamo_serve.bench import arrivals
from dynamo_serve.bench.plan import Call, Planned
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.run import Options, execute
from dynamo_serve.bench.spread import percentile

SHARES = (0.1, 0.5, 0.9, 0.99)
WITHIN_MS, WITHIN_SHARE = 2.0, 0.01
TOKENS, SLOW_RATE, FAST_RATE = 32, 40, 500
STALL_AT, STALL_S = 1.0, 1.0


@contextlib.contextmanager
def stub(*flags: str) -> Iterator[str]:
    """A stub in a process of its own; its address."""
    command = [sys.executable, "-m", "bench.stub_server", *flags]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield child.stdout.readline().strip()
    finally:
        child.terminate()
        child.wait(10)


def sent(url: str, rate: float, seconds: float, tokens: int) -> Run:
    times = itertools.takewhile(lambda at: at < seconds, arrivals.constant(rate))
    call = Call(kind="stub", prompt="word", max_tokens=tokens)
    return execute((Planned(at, call) for at in times), Options(url))


def errors_ms(found: Sequence[float], known: Sequence[float]) -> dict[str, float]:
    pairs = {s: (percentile(found, s), percentile(known, s)) for s in SHARES}
    return {f"p{s * 100:g}": round((a - b) * 1e3, 3) for s, (a, b) in pairs.items()}


def latencies(rate: float, seconds: float, tokens: int) -> dict[str, object]:
    with stub() as url:
        run = sent(url, rate, seconds, tokens)
    assert all(r.outcome == "ok" for r in run.records), "the stub refuses nobody"
    known = [Delays().offsets(0, number, tokens) for number in range(len(run.records))]
    found = [r.first - r.due for r in run.records if r.first is not None]
    firsts = errors_ms(found, [offsets[0] for offsets in known])
    known_gaps = [b - a for offsets in known for a, b in itertools.pairwise(offsets)]
    gaps = errors_ms([gap for r in run.records for gap in r.gaps], known_gaps)
    worst = max(map(abs, (*firsts.values(), *gaps.values())))
    return {
        "rate": rate,
        "requests": len(run.records),
        "ttft_error_ms": firsts,
        "itl_error_ms": gaps,
        "worst_ms": worst,
        "client": run.about["client"],
        "kept": worst <= WITHIN_MS,
    }


def punctuality(rate: float, seconds: float) -> dict[str, object]:
    """Two measures of the schedule: the rate that came about, and each gap between two sends."""
    with stub() as url:
        run = sent(url, rate, seconds, 1)
    times = sorted(r.sent for r in run.records)
    achieved = (len(times) - 1) / (times[-1] - times[0])
    late = [r.sent - r.due for r in run.records]
    off = [abs(at - r.due) / seconds for at, r in zip(times, run.records, strict=True)]
    return {
        "rate": rate,
        "requests": len(times),
        "achieved_rate": round(achieved, 3),
        "rate_error": round(achieved / rate - 1, 5),
        "late_p50_ms": round(percentile(late, 0.5) * 1e3, 3),
        "late_p99_ms": round(percentile(late, 0.99) * 1e3, 3),
        "late_max_ms": round(max(late) * 1e3, 3),
        "worst_share_of_schedule": round(max(off), 5),
        "client": run.about["client"],
        "kept": abs(achieved / rate - 1) <= WITHIN_SHARE and max(off) <= WITHIN_SHARE,
    }


def omission(rate: float = 50.0, seconds: float = 4.0) -> dict[str, object]:
    """Everybody who was due in the stall waited for its end, and his latency has to say so."""
    with stub("--stall", f"{STALL_AT},{STALL_S}") as url:
        run = sent(url, rate, seconds, 1)
    assert all(r.outcome == "ok" for r in run.records), "the stub refuses nobody"
    known = [Delays().offsets(0, number, 1)[0] for number in range(len(run.records))]
    calls = zip(sorted(run.records, key=lambda r: r.number), known, strict=True)
    waits = [((r.first or 0.0) - r.due, _with_stall(r.due, delay) - r.due) for r, delay in calls]
    waited = [found - truth for found, truth in waits if truth > STALL_S / 2]
    typical, most = percentile(waited, 0.5), percentile([abs(error) for error in waited], 0.9)
    return {
        "requests": len(run.records),
        "over_half_a_second": sum(found > STALL_S / 2 for found, _ in waits),
        "expected": len(waited),
        "their_error_p50_ms": round(typical * 1e3, 3),
        "their_error_p90_ms": round(most * 1e3, 3),
        # All who waited are answered in the same moment, so this is a share of the stall.
        "kept": len(waited) > 0 and most <= WITHIN_SHARE * STALL_S,
    }


def _with_stall(due: float, delay: float) -> float:
    """When the first token of a call is sent that was due then; the first call is due at 0."""
    at = due + delay
    return STALL_AT + STALL_S if STALL_AT <= at < STALL_AT + STALL_S else at


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    seconds = parser.parse_args().seconds
    results = {
        "latencies": latencies(SLOW_RATE, seconds, TOKENS),
        "punctuality": punctuality(FAST_RATE, seconds),
        "omission": omission(),
    }
    for name, result in results.items():
        print(f"{name}: {'kept' if result['kept'] else 'MISSED'}")
        for key, value in result.items():
            print(f"  {key:<24} {value}")
    print(json.dumps(results))
    return 0 if all(result["kept"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
