"""Every set of kernels that this machine runs; the others are skipped with the reason."""

from __future__ import annotations

import pytest

from dynamo_serve.native.library import Kernels, available
from tests.engines.local.native import KERNEL_SETS, require_kernels


@pytest.fixture(params=KERNEL_SETS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    require_kernels(request.param)
    found = available()[request.param]
    found.set_threads(2)
    return found
