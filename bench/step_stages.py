"""What the time of a step goes to, and how fast each stage is at what it has to do."""

from __future__ import annotations

import sys
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
    that it reads a second, operations a second. Embed has what attention plans, too; outside is
    sampling, and Python."""
    runner = watchable(engine)
    with runner.watched() as spent:
        for _ in range(repeat):
            engine.step(Batch(Phase.DECODE, work))
    kv_bytes = _kv_bytes(engine, runner.native, work)
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


def watchable(engine: LocalEngine) -> NativeRunner:
    """What can say it: raises `SystemExit` where other kernels than the native ones run."""
    assert engine._ready is not None
    runner = engine._ready.runner
    if not isinstance(runner, NativeRunner):
        raise SystemExit("--stages needs the native kernels, and transformers' own modules run")
    return runner


def _kv_bytes(engine: LocalEngine, native: NativeModel, work: Iterable[Work]) -> int:
    """What attention reads of pages; a layer with a window no more than that."""
    assert engine._ready is not None
    num_layers: int = native.struct.num_layers
    per_token = int(engine._ready.spec.facts["kv_bytes_per_token"]) // num_layers
    windows: list[int] = [layer.attention.window or sys.maxsize for layer in _layers(native)]
    seen = [min(w.position, window) for w in work for window in windows]
    return per_token * sum(seen)


def _layers(native: NativeModel) -> Iterable[structs.Layer]:
    model = native.struct
    layers: Iterable[structs.Layer]
    layers = (structs.Layer * model.num_layers).from_address(model.layers)
    return layers


def _weights(native: NativeModel, stage: Stage) -> tuple[int, int]:
    """How many weights a stage multiplies by, in all layers, and their bytes."""
    model = native.struct
    if stage is Stage.HEAD:
        return _size([model.head])
    if stage not in PRODUCTS:
        return 0, 0
    return _size([getattr(layer, PRODUCTS[stage]) for layer in _layers(native)])


def _size(products: Sequence[structs.Linear]) -> tuple[int, int]:
    numbers = sum(product.outputs * product.inputs for product in products)
    return numbers, numbers * ITEM_BYTES[Type(products[0].type)]


def show(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        print("    " + " | ".join(f"{key} {value}" for key, value in row.items()))
