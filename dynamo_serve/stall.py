"""When an engine that shows nothing for a while is in trouble, and when it is lost."""

from __future__ import annotations

from typing import NamedTuple

RED_SECONDS = 3.0  # a step may take so long whatever was predicted, before the server is unready
RED_FACTOR = 10.0  # … or so many times what was predicted
LOST_FACTOR = 30.0  # and so many times, at least, before the engine is given up


class Stall(NamedTuple):
    """Something takes `seconds`, of which `predicted` were foreseen."""

    what: str
    seconds: float
    predicted: float

    @property
    def is_red(self) -> bool:
        return self.seconds > max(RED_SECONDS, RED_FACTOR * self.predicted)

    def is_lost(self, timeout: float) -> bool:
        return timeout > 0 and self.seconds > max(timeout, LOST_FACTOR * self.predicted)

    def __str__(self) -> str:
        foreseen = f", {self.predicted:.2f} s foreseen" if self.predicted else ""
        return f"the engine makes no progress: {self.what} for {self.seconds:.1f} s{foreseen}"
