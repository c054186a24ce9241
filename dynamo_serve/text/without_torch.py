"""A process that tokenizes and computes nothing: transformers in it does without torch."""

from __future__ import annotations

import os
import sys

ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def leave_torch_out() -> None:
    """Have transformers find no torch in this process: 180 MiB and a second of its start less.

    To be called before anything imports transformers, which looks once and keeps to what it found.
    torch itself can be imported as ever, and processes that are started know nothing of it.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    was = os.environ.get(ADVICE)
    os.environ[ADVICE] = "1"  # that models cannot be had without it is not news here
    sys.modules["torch"] = None  # type: ignore[assignment]  # so Python says that there is none
    try:
        import transformers  # noqa: F401, PLC0415
    finally:
        del sys.modules["torch"]
        if was is None:
            del os.environ[ADVICE]
        else:
            os.environ[ADVICE] = was
