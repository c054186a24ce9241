"""How far the start-up is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TextIO

log = logging.getLogger(__name__)

WIDTH = 30
LOG_EVERY_S = 5.0
CLEAR = "\x1b[K"  # the rest of the line


class Progress:
    """Called with (stage, fraction 0..1) as often as the caller likes; a note says more."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._clock = clock
        self._stage: str | None = None
        self._since = self._logged = 0.0

    def __call__(self, stage: str, fraction: float, note: str = "") -> None:
        if stage != self._stage:
            self._begin(stage)
        if self._is_terminal:
            self._draw(stage, fraction, note)
        elif fraction < 1 and self._clock() - self._logged >= LOG_EVERY_S:
            self._logged = self._clock()
            log.info("%s: %d %%%s", stage, fraction * 100, note and f", {note}")
        if fraction >= 1:
            self._end(stage)

    def _begin(self, stage: str) -> None:
        if self._stage is not None and self._is_terminal:
            self._out.write("\n")  # the stage before never said that it was done
        self._stage = stage
        self._since = self._logged = self._clock()
        if not self._is_terminal:
            log.info("%s: started", stage)

    def _draw(self, stage: str, fraction: float, note: str) -> None:
        filled = round(min(max(fraction, 0.0), 1.0) * WIDTH)
        bar = "#" * filled + "-" * (WIDTH - filled)
        rest = f"  {note}{CLEAR}" if note else ""  # the note before may have been longer
        self._out.write(f"\r{stage:<10} [{bar}] {fraction:4.0%}{rest}")
        self._out.flush()

    def _end(self, stage: str) -> None:
        seconds = self._clock() - self._since
        self._stage = None
        if self._is_terminal:
            self._out.write(f"  {seconds:.1f} s\n")
        else:
            log.info("%s: done in %.1f s", stage, seconds)
