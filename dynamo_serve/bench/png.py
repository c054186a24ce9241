"""Charts as PNG files for a README, drawn by a browser that is already here.

The pictures are those of the report, so nothing draws a chart a second time in another way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynamo_serve.bench.figures import summaries
from dynamo_serve.bench.page import bare
from dynamo_serve.bench.plot import Chart
from dynamo_serve.bench.plots import distributions, sweep
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.repeats import grouped
from dynamo_serve.bench.timeline import charts
from dynamo_serve.errors import ConfigError

BROWSERS = (
    *("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome"),
    *("google-chrome-stable", "chrome", "microsoft-edge"),
)
SIZE = (720, 450)
SHARPNESS = 2
PATIENCE_S = 60


def write(runs: Sequence[Run], folder: Path) -> list[Path]:
    """One file for each chart that has data: of one run its own, of several those over the load.
    Raises `ConfigError` if there is no browser, or it draws nothing."""
    program = browser()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in drawings(runs):
        path = folder / f"{_name(chart.title)}.png"
        _shoot(program, bare(chart), path)
        written.append(path)
    return written


def drawings(runs: Sequence[Run]) -> list[Chart]:
    if len(runs) == 1:
        drawn = [*charts(runs[0]), *distributions(runs[0], runs[0].about.get("loop") != "closed")]
    else:
        drawn = sweep([summaries(group) for _, group in grouped(runs)])
    return [chart for chart in drawn if any(line.points for line in chart.lines)]


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise ConfigError(
            "--png needs a browser to draw with, and none is on the PATH: install chromium "
            "(apt install chromium), or leave --png out and use --html"
        )
    return found


def _shoot(program: str, html: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as home:
        source = Path(home) / "chart.html"
        source.write_text(html)
        flags = [
            *(
                "--headless",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={home}/profile",
            ),
            *(f"--window-size={SIZE[0]},{SIZE[1]}", f"--force-device-scale-factor={SHARPNESS}"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # it refuses to start for root else
        ]
        command = [program, *flags, f"--screenshot={path.absolute()}", source.as_uri()]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=PATIENCE_S
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"--png: {program} drew nothing within {PATIENCE_S} s") from None
    if done.returncode or not path.is_file():
        why = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
        raise ConfigError(f"--png: {program} drew nothing: {why}")


def _name(title: str) -> str:
    letters = "".join(c if c.isalnum() else "-" for c in title.lower())
    return "-".join(part for part in letters.split("-") if part)
