"""Settings of the test process that must be in place before torch is imported."""

import inspect
import os

import httpx
from hypothesis import HealthCheck, settings

from tests.patience import PATIENCE_S

# Torch's threads spin at barriers by default and starve whatever else runs on a small machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["HF_HUB_OFFLINE"] = "1"

# What httpx waits for if it is not told otherwise: five seconds, which a busy machine may well need
# for an answer. One object is the default of all that it does.
_default = inspect.signature(httpx.Client).parameters["timeout"].default
_default.connect = _default.read = _default.write = _default.pool = PATIENCE_S

# How long an example takes says nothing about what is tested.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("new", patient, derandomize=False)
# The same examples every time: what fails does so for a change. Others are for who looks for them.
settings.register_profile("same", patient, derandomize=True)
settings.load_profile("same")
