"""The programs of the README do, with the model that ships with us, what it says that they do."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.architecture.source import ROOT
from tests.patience import PATIENCE_S

PROGRAM = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


def test_the_tour_prints_what_it_says(url: str) -> None:
    found = PROGRAM.findall((ROOT / "README.md").read_text())
    assert sum(bool(expected) for _, expected in found) == 2  # extraction, and the tool loop
    for program, expected in found:
        done = subprocess.run(
            [sys.executable, "-c", program.replace("http://127.0.0.1:8000", url)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected if expected else done.stdout.strip()
