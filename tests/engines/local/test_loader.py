"""Checkpoints that are damaged, odd, or ask for more than we do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dynamo_serve.errors import EngineStartError
from tests.engines.local.driver import make_engine
from tests.engines.local.zoo import checkpoint


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_a_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [cut_short, lose_a_tensor, change_a_width])
def test_a_checkpoint_that_is_not_whole_is_refused(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    damage(folder)
    with pytest.raises(EngineStartError, match=r"model\.path"):
        make_engine(str(folder)).start()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "zero"),
        ({"dtype": "float3"}, "float3"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "code.C"}},
            "custom code",
        ),
    ],
)
def test_settings_that_make_no_model_are_refused_without_a_question(
    changes: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []

    def ask(question: str = "") -> str:
        questions.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", ask)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(EngineStartError, match=rf"model\.path: .*{reason}"):
        make_engine(str(folder)).start()
    assert questions == []


def test_a_checkpoint_in_another_dtype_is_refused_and_may_be_converted() -> None:
    with pytest.raises(EngineStartError, match=r"model\.dtype: .*float64.*choose one of float32"):
        make_engine(checkpoint("llama", "float64")).start()
    engine = make_engine(checkpoint("llama", "float64"), dtype="float32")
    assert engine.start().facts["dtype"] == "float32"
    engine.close()
