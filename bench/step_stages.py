"""What the time of a step goes to, and how fast each stage is at what it has to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dynamo_serve.core.batch import Batch, Phase, Work
from dynamo_serve.engines.local import LocalEngine
from dynamo_serve.engines.local.native_model import NativeModel
from dynamo_serve.engines.local.native_runner import NativeRunner
from dynamo_serve.native import structs
from dynamo_serve.native.structs import Stage, Type

ITEM_BYTES = {Type.FLOAT32: 4, Type.BFLOAT16: 2, Type.INT8: 1}
PRODUCTS = {Stage.QKV: "qkv", Stage.OUT: "out", Stage.GATE_UP: "gate_up", Stage.DOWN: "down"}


def stages(engine: LocalEngine, work: tuple[Work, ...], repeat: int) -> list[dict[str, Any]]:
    """A row for each stage of a step of `work`: milliseconds (the mean of `repeat` steps), bytes
    that it reads a second, operations a second. Outside is planning, sampling, and Python."""
    assert engine._ready is not None
    runner = engine._ready.runner
    assert isinstance(runner, NativeRunner), "only native kernels can say"
    with runner.watched() as spent:
        for _ in range(repeat):
            engine.step(Batch(Phase.DECODE, work))
    kv_bytes = sum(w.position * int(engine._ready.spec.facts["kv_bytes_per_token"]) for w in work)
    tokens = sum(len(w.token_ids) for w in work)
    rows = []
    for stage, seconds in spent.items():
        took = seconds / repeat
        weights, weight_bytes = _weights(runner.native, stage)
        reads = kv_bytes if stage is Stage.ATTEND else weight_bytes
        times = sum(w.samples for w in work) if stage is Stage.HEAD else tokens
        row: dict[str, Any] = {"stage": stage.name.lower(), "ms": round(took * 1e3, 2)}
        if reads:
            row["read_gb_per_second"] = round(reads / took / 1e9, 1)
        if weights:
            row["tera_per_second"] = round(2 * weights * times / took / 1e12, 3)
        rows.append(row)
    return rows


def _weights(native: NativeModel, stage: Stage) -> tuple[int, int]:
    """How many weights a stage multiplies by, in all layers, and their bytes."""
    model = native.struct
    if stage is Stage.HEAD:
        return _size([model.head])
    if stage not in PRODUCTS:
        return 0, 0
    layers = (structs.Layer * model.num_layers).from_address(model.layers)
    return _size([getattr(layer, PRODUCTS[stage]) for layer in layers])


def _size(products: Sequence[structs.Linear]) -> tuple[int, int]:
    numbers = sum(product.outputs * product.inputs for product in products)
    return numbers, numbers * ITEM_BYTES[Type(products[0].type)]


def show(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        print("    " + " | ".join(f"{key} {value}" for key, value in row.items()))
