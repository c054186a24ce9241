"""What `bench.steps --stages` tells of a step."""

from __future__ import annotations

import pytest

from bench.step_stages import stages, watchable
from bench.steps import work_of
from dynamo_serve.native.structs import Stage
from tests.engines.local.driver import make_engine
from tests.engines.local.native import require_kernels
from tests.engines.local.zoo import checkpoint


def test_a_row_for_each_stage_with_what_it_reads_and_multiplies() -> None:
    require_kernels("avx2")
    engine = make_engine(checkpoint("gemma2"), kernels="avx2")
    engine.start()
    rows = stages(engine, work_of(2, 40, 1, 4), 3)
    engine.close()
    assert [row["stage"] for row in rows] == [stage.name.lower() for stage in Stage]
    multiply = [row["stage"] for row in rows if "tera_per_second" in row]
    assert multiply == ["qkv", "out", "gate_up", "down", "head"]
    assert [row["stage"] for row in rows if "read_gb_per_second" in row] == sorted(
        [*multiply, "attend"], key=lambda name: Stage[name.upper()]
    )


def test_transformers_own_modules_cannot_say() -> None:
    engine = make_engine(checkpoint("gemma2"), kernels="torch")
    engine.start()
    with pytest.raises(SystemExit, match="native kernels"):
        watchable(engine)
    engine.close()
