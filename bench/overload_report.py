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
    status: int = 0  # 0: no answer in time, -1: not sent, too many were open, -2: cancelled
    ttft: float | None = None
    tokens: list[float] = field(default_factory=list)
    retry_after: float = 0.0


@dataclass
class Run:
    """What happened with one setting of `scheduler.ladder`."""

    ladder: str
    capacity: float
    overload: tuple[float, float]  # when it begins and ends
    calm: float  # seconds, once all is as it was
    wait: float  # seconds that this may take at most
    over_at: float | None = None  # when it was: no backlog, no rung
    backlog_gone_at: float | None = None
    undone_at: float | None = None  # every rung, for the last time
    sent: list[Sent] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    behind: float = 0.0  # seconds by which the client was late: it should be next to none

    @property
    def last(self) -> float:
        """The end of the run."""
        end = self.overload[1] + self.wait if self.over_at is None else self.over_at
        return end + self.calm

    def look(self, now: float) -> None:
        """A sample was taken: is all as it was before the overload?"""
        end = self.overload[1]
        if now < end:
            return
        if self.backlog_gone_at is None and not self.backlog:
            self.backlog_gone_at = now
        if any(self.samples[-1]["rungs"].values()):
            self.undone_at = None
        elif self.undone_at is None:
            self.undone_at = now
        if self.over_at is None and now - end >= self.wait:
            self.over_at = end + self.wait
        elif self.over_at is None and self.backlog_gone_at and self.undone_at:
            self.over_at = now

    @property
    def backlog(self) -> int:
        """Jobs sent in the overload that are still open."""
        begin, end = self.overload
        mine = (s for s in self.sent if s.kind == "batch" and begin <= s.at < end)
        return sum(s.status == 0 for s in mine)


def kept(run: Run, begin: float, end: float, args: argparse.Namespace) -> dict[str, float | None]:
    """The shares of targets kept, for questions that were sent between two times."""
    mine = [s for s in run.sent if s.kind == "questions" and begin <= s.at < end]
    # The last may have had no time to be answered.
    mine = [s for s in mine if s.status or s.at < run.last - args.ttft_ms / 1e3]
    in_time = [s.ttft is not None and s.ttft <= args.ttft_ms / 1e3 for s in mine]
    gaps = [b - a for s in mine for a, b in zip(s.tokens, s.tokens[1:], strict=False)]
    short = [gap <= args.itl_ms / 1e3 for gap in gaps]
    return {
        "ttft": sum(in_time) / len(in_time) if in_time else None,
        "itl": sum(short) / len(short) if short else None,
    }


def phases(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    (begin, end), last = run.overload, run.last
    over = end + run.wait if run.over_at is None else run.over_at

    def later(at: float | None) -> float | None:
        return None if at is None else round(at - end, 1)

    batch = [s for s in run.sent if s.kind == "batch"]
    return {
        "ladder": run.ladder,
        "capacity_per_s": run.capacity,
        "client_behind_s": round(run.behind, 2),
        "before": kept(run, 0.0, begin, args),
        "overload": kept(run, begin, end, args),
        "until_all_is_as_it_was": kept(run, end, over, args),
        "after": kept(run, over, last, args),
        # Seconds after the end of the overload; null: not within `--wait`.
        "backlog_gone_after_s": later(run.backlog_gone_at),
        "all_undone_after_s": later(run.undone_at),
        "batch": {
            "answered": sum(s.status == 200 for s in batch),
            "shed": sum(s.status == 503 for s in batch),
            "cancelled": sum(s.status == -2 for s in batch),
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
    end = max(run.last for run in runs)
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
    title = f"{args.factor:g} times what the server can do, from {runs[0].overload[0]:g} s on"
    return svg(title, panels, end, runs[0].overload)
