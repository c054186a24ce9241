"""Exits with 0 if the last test run failed in so few tests that they are worth a second look.

What passes then was unsteady: its name is printed, and it is the test that wants mending.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MOST = 3
LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")


def main() -> int:
    if not LAST_FAILED.is_file():
        print("no test has failed: the run broke off", file=sys.stderr)
        return 1
    failed = json.loads(LAST_FAILED.read_text())
    for name in failed:
        print(f"failed, and asked again if no more than {MOST} are: {name}", file=sys.stderr)
    return int(not 1 <= len(failed) <= MOST)


if __name__ == "__main__":
    sys.exit(main())
