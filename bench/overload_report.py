"""What came of an overload: the targets that were kept, in figures and as a picture."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from bench.plot import Bars, Lines, svg


@dataclass
class Sent:
    """One request; seconds from the beginning of the run."""

    kind: str
    at: float
    status: int = 0  # 0: no answer in time, -1: not sent, too many were open
    ttft: float | None = None
    tokens: list[float] = field(default_factory=list)
    retry_after: float = 0.0


@dataclass
class Run:
    """What happened with one setting of `scheduler.ladder`."""

    ladder: str
    capacity: float
    phases: tuple[float, float, float]  # when the overload begins and ends, and the end of all
    sent: list[Sent] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    behind: float = 0.0  # seconds by which the client was late: it should be next to none


def kept(run: Run, begin: float, end: float, args: argparse.Namespace) -> dict[str, float | None]:
    """The shares of targets kept, for questions that were sent between two times."""
    mine = [s for s in run.sent if s.kind == "questions" and begin <= s.at < end]
    # The last may have had no time to be answered.
    mine = [s for s in mine if s.status or s.at < run.phases[2] - args.ttft_ms / 1e3]
    in_time = [s.ttft is not None and s.ttft <= args.ttft_ms / 1e3 for s in mine]
    gaps = [b - a for s in mine for a, b in zip(s.tokens, s.tokens[1:], strict=False)]
    short = [gap <= args.itl_ms / 1e3 for gap in gaps]
    return {
        "ttft": sum(in_time) / len(in_time) if in_time else None,
        "itl": sum(short) / len(short) if short else None,
    }


def phases(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    begin, end, last = run.phases
    batch = [s for s in run.sent if s.kind == "batch"]
    return {
        "ladder": run.ladder,
        "capacity_per_s": run.capacity,
        "client_behind_s": round(run.behind, 2),
        "before": kept(run, 0.0, begin, args),
        "overload": kept(run, begin, end, args),
        "after": kept(run, end, last, args),
        "batch": {
            "answered": sum(s.status == 200 for s in batch),
            "shed": sum(s.status == 503 for s in batch),
            "not_sent": sum(s.status == -1 for s in batch),
            "open_at_the_end": sum(s.status == 0 for s in batch),
        },
        "changes": [[round(c["at"], 1), c["rung"], c["direction"], c["level"], c["trigger"]]
                    for c in run.history],
    }  # fmt: skip


def bars(run: Run) -> dict[str, list[tuple[float, float, int]]]:
    """Stretches of equal level, by rung."""
    rows: dict[str, list[tuple[float, float, int]]] = {}
    for sample in run.samples:
        for rung, level in sample["rungs"].items():
            row = rows.setdefault(rung, [])
            if level and row and row[-1][2] == level and sample["at"] - row[-1][1] < 1.6:
                row[-1] = (row[-1][0], sample["at"], level)
            elif level:
                row.append((sample["at"] - 1.0, sample["at"], level))
    return rows


def picture(runs: list[Run], args: argparse.Namespace) -> str:
    end = runs[0].phases[2]
    step = max(2.0, end / 100)

    def attained(run: Run, what: str) -> list[tuple[float, float]]:
        found = []
        for i in range(int(end / step)):
            share = kept(run, i * step, (i + 1) * step, args)[what]
            if share is not None:
                found.append(((i + 0.5) * step, share))
        return found

    names = {f"ladder {run.ladder}": run for run in runs}
    panels: list[Lines | Bars] = [
        Lines(f"questions: first token within {args.ttft_ms:g} ms (share)",
              {n: attained(run, "ttft") for n, run in names.items()}, 1.0),
        Lines(f"questions: gaps within {args.itl_ms:g} ms (share)",
              {n: attained(run, "itl") for n, run in names.items()}, 1.0),
        Lines("requests waiting",
              {n: [(s["at"], s["waiting"]) for s in run.samples] for n, run in names.items()}),
        *(Bars(f"rungs taken, ladder {run.ladder}", bars(run)) for run in runs if run.history),
    ]  # fmt: skip
    title = f"{args.factor:g} times what the server can do, from {runs[0].phases[0]:g} s on"
    return svg(title, panels, end, runs[0].phases[:2])
