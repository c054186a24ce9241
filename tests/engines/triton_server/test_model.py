"""triton_models/dserve without Triton: what a real server's tests cannot make happen."""

from __future__ import annotations

import importlib.util
import json
import queue
import sys
import threading
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from scripts.tritonserver import MODELS


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", MagicMock())
    path = MODELS / "dserve" / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("dserve_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def request(sender: MagicMock) -> Any:
    wishes = np.array([json.dumps({"max_tokens": 2}).encode()], dtype=np.object_)
    values = {"input_ids": np.array([1, 2]), "request": wishes}
    tensors = [
        SimpleNamespace(name=lambda name=name: name, as_numpy=lambda value=value: value)
        for name, value in values.items()
    ]
    return SimpleNamespace(
        inputs=lambda: tensors, request_id=lambda: "r", get_response_sender=lambda: sender
    )


def test_who_comes_when_the_engine_has_ended_is_told_so(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = module.TritonPythonModel()
    model.live, model.lock, model.commands = {}, threading.Lock(), queue.SimpleQueue()
    model.numbers, model.settled, model.failure = count(), threading.Event(), None
    model.spec = SimpleNamespace(max_model_len=64, vocab_size=64)

    def ends(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "run_engine", ends)
    before, after = MagicMock(), MagicMock()
    model.execute([request(before)])
    assert not before.send.called
    model._run(None)
    model.execute([request(after)])
    assert before.send.call_count == after.send.call_count == 1
    said = [call.args[0] for call in module.pb_utils.TritonError.call_args_list]
    assert said == ["the engine is not healthy: out of memory"] * 2
    assert not model.live
