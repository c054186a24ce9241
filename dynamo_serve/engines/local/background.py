"""Threads that work beside the steps, and give way to them."""

from __future__ import annotations

import os
import sys
import threading

LEAST = 19  # as nice as there is: of work that only idle moments are good enough for


def step_back(nice: int) -> None:
    """This thread is so nice from now on, unless it is already: nobody but root may be less nice.

    On Linux: elsewhere it would be the whole process.
    """
    thread = threading.get_native_id()
    if sys.platform == "linux" and os.getpriority(os.PRIO_PROCESS, thread) < nice:
        os.setpriority(os.PRIO_PROCESS, thread, nice)
