"""How far a run is."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from dataclasses import dataclass, field

from dynamo_serve.bench.driver import Tally

Progress = Callable[[float, str], None]
COUNTS = 4  # begun, ended, failed, refused


@dataclass(slots=True)
class Meter:
    """Draws how far this process is; or writes it where another one adds it up (`shared`)."""

    total: int | None
    duration: float | None
    progress: Progress | None
    shared: MutableSequence[int] | None = None
    tally: Tally = field(default_factory=Tally)

    def draw(self, now: float, *, is_over: bool = False) -> None:
        tally = self.tally
        counts = (tally.begun, tally.ended, tally.failed, tally.refused)
        if self.shared is not None:
            self.shared[:] = counts
        elif self.progress is not None:
            fraction = 1.0 if is_over else self.fraction(now, tally.ended)
            self.progress(fraction, note(*counts))

    def fraction(self, now: float, ended: int) -> float:
        """Short of 1: only the end is the end."""
        by_count = ended / self.total if self.total else 0.0
        by_time = now / self.duration if self.duration else 0.0
        return min(0.999, max(by_count, by_time, 0.0))


def note(begun: int, ended: int, failed: int, refused: int) -> str:
    said = f"{begun - ended} under way, {ended} done"
    for count, name in ((refused, "refused"), (failed, "failed")):
        said += f", {count} {name}" if count else ""
    return said
