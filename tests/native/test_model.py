"""Whole models in bfloat16 and int8 on every set of kernels, against transformers' forward."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dynamo_serve.engines.local.native_runner import NativeRunner
from dynamo_serve.errors import EngineStartError
from dynamo_serve.native import library
from dynamo_serve.native.library import Kernels, NativeUnavailable, choose
from dynamo_serve.native.structs import Stage
from tests.engines.local.driver import Driver, Seq, errors_found, make_engine
from tests.engines.local.native import NATIVE, require_kernels
from tests.engines.local.zoo import COMMON, MODELS, checkpoint, expected_tokens

WIDE = {"hidden_size": 128, "intermediate_size": 192}  # what tiles need: multiples of 64


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a bfloat16 model of a family whose widths are those of tiles."""
    import transformers

    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            kind, changes = MODELS[name]
            config = getattr(transformers, kind)(**{**COMMON, **changes, **WIDE, "head_dim": 32})
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
            made[name] = str(tmp_path_factory.mktemp(name))
            model.save_pretrained(made[name])
        return made[name]

    return make


def compared(monkeypatch: pytest.MonkeyPatch, **wishes: Any) -> float:
    """The error that the check at start found."""
    found = errors_found(monkeypatch)
    engine = make_engine(**wishes)
    spec = engine.start()
    assert spec.facts["kernels"] == wishes["kernels"]
    driver = Driver(engine, 4, 96)
    seqs = [Seq(str(i), tuple(range(3, 3 + length))) for i, length in enumerate((1, 9, 40))]
    driver.step([(seq, len(seq.prompt)) for seq in seqs])
    driver.generate(seqs, 4)
    assert all(len(seq.output) == 4 for seq in seqs)
    engine.close()
    return found[0]


@pytest.mark.parametrize("name", NATIVE)
def test_bfloat16_is_as_near_as_rounding_allows(
    kernels: Kernels, name: str, wide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compared(monkeypatch, path=wide(name), kernels=kernels.name) < 0.03


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_int8_stays_near(
    kernels: Kernels, name: str, wide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = {"path": wide(name), "kernels": kernels.name, "quantization": "int8"}
    assert compared(monkeypatch, **wishes) < 0.08


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_is_held_for_another_ends_the_same(
    kernels: Kernels, dtype: str, wide: Any
) -> None:
    """After each layer in turn, a longer and a shorter prompt, against the same without holding."""
    engine = make_engine(wide("qwen3"), kernels=kernels.name, dtype=dtype)
    assert engine.start().holds_steps
    long, short = tuple(range(3, 60)), tuple(range(70, 75))
    calm = Driver(engine, 4, 96)
    alone = [Seq(f"alone{i}", prompt) for i, prompt in enumerate((long, short))]
    calm.generate(alone, 3)
    calls = 0
    for held, other in ((long, short), (short, long)):
        for layer in range(COMMON["num_hidden_layers"] - 1):
            driver, count, inner = Driver(engine, 4, 96), 0, Seq("inner", other)

            def between() -> None:
                nonlocal count, calls
                count, calls = count + 1, calls + 1
                if count == layer + 1:  # noqa: B023
                    driver.step([(inner, len(inner.prompt))])  # noqa: B023

            outer = Seq("outer", held)
            engine.hold_for(between, 0.0)
            driver.generate([outer], 1)
            assert count == COMMON["num_hidden_layers"] - 1, "once after each layer but the last"
            engine.hold_for(lambda: None, 0.0)
            driver.generate([outer, inner], 3)
            whole = {seq.prompt: seq.output for seq in (outer, inner)}
            assert whole == {seq.prompt: seq.output for seq in alone}
    assert calls
    engine.close()


def test_what_a_step_has_spent_is_known_by_stage(kernels: Kernels, wide: Any) -> None:
    engine = make_engine(wide("gemma2"), kernels=kernels.name)
    engine.start()
    assert engine._ready is not None
    runner = engine._ready.runner
    assert isinstance(runner, NativeRunner)
    driver = Driver(engine, 4, 96)
    plain, watched, after = (Seq(name, tuple(range(3, 43))) for name in ("a", "b", "c"))
    driver.generate([plain], 5)
    began = time.perf_counter()
    with runner.watched() as spent:
        driver.generate([watched], 5)
        assert not spent, "before its end nothing is known"
    took = time.perf_counter() - began
    known = dict(spent)
    driver.generate([after], 5)
    engine.close()
    assert list(known) == list(Stage) and all(seconds > 0 for seconds in known.values())
    assert sum(known.values()) < took
    assert spent == known, "others are not counted"
    assert plain.output == watched.output == after.output


def test_what_cannot_be_quantized_is_refused_with_the_reason() -> None:
    with pytest.raises(EngineStartError, match=r"model.quantization: int8 .* widths"):
        make_engine(checkpoint("llama"), quantization="int8").start()  # too narrow for tiles
    with pytest.raises(EngineStartError, match=r"model.quantization.* family gpt2"):
        make_engine(checkpoint("gpt2"), quantization="int8").start()
    with pytest.raises(
        EngineStartError, match=r"model.lighter: int8 .*; .* leave model.lighter out"
    ):
        make_engine(checkpoint("llama"), lighter="int8").start()  # said now, not when it is wanted


def test_a_packed_model_that_differs_is_loaded_again_for_transformers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dynamo_serve.engines.local.native_model import _Packer

    original = _Packer.norm
    monkeypatch.setattr(  # stands for a family that changed in a way we did not see
        _Packer, "norm", lambda self, module: original(self, module and _halved(module))
    )
    engine = make_engine(checkpoint("llama"))
    with caplog.at_level("INFO"):
        spec = engine.start()
    engine.close()
    assert (spec.facts["kernels"], spec.facts["attention_backend"]) == ("torch", "native")
    assert "do not suit this model" in caplog.text and "differ" in caplog.text
    with pytest.raises(EngineStartError, match=r"differ.*leave engine.kernels .* at auto"):
        make_engine(checkpoint("llama"), kernels="avx2").start()


def _halved(module: torch.nn.Module) -> torch.nn.Module:
    other = torch.nn.Module()
    other.weight = torch.nn.Parameter(torch.linspace(-1, 3, module.weight.numel()))
    return other


def test_without_a_build_everything_runs_on_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library._library.cache_clear()
    try:
        with pytest.raises(NativeUnavailable, match="not built"):
            choose("auto")
        engine = make_engine(checkpoint("llama"))
        with caplog.at_level("INFO"):
            spec = engine.start()
        engine.close()
        assert spec.facts["kernels"] == spec.facts["attention_backend"] == "torch"
        assert "not built" in caplog.text
        with pytest.raises(EngineStartError, match=r"engine.kernels: .*not built"):
            make_engine(checkpoint("llama"), kernels="avx2").start()
    finally:
        library._library.cache_clear()


def test_a_set_that_the_processor_lacks_is_named_with_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_kernels("avx2")
    found = {"avx2": library.available()["avx2"]}
    monkeypatch.setattr(library, "available", lambda: found)
    with pytest.raises(NativeUnavailable, match=r"runs avx2, but not amx"):
        choose("amx")


def test_a_wish_shorter_than_the_check_s_prompts_is_served() -> None:
    engine = make_engine(checkpoint("qwen3"), max_model_len=5)
    assert engine.start().max_model_len == 5
    seq = Seq("a", (3, 4))
    driver = Driver(engine, 4, 96)
    driver.step([(seq, 2)])
    driver.generate([seq], 3)
    assert tuple(seq.output) == expected_tokens("qwen3", seq.prompt, 3)
    engine.close()


def test_a_product_that_is_no_plain_one_is_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dynamo_serve.engines.local import loader, startup

    class Adapted(torch.nn.Linear):  # type: ignore[misc]
        """Stands for an adapter or a quantized layer: other arithmetic behind the same weights."""

    def with_adapter(*args: Any, **more: Any) -> Any:
        model = load(*args, **more)
        model.model.layers[1].mlp.down_proj.__class__ = Adapted
        return model

    load = loader.load_model
    monkeypatch.setattr(startup, "load_model", with_adapter)
    engine = make_engine(checkpoint("llama"))
    with caplog.at_level("INFO"):
        assert engine.start().facts["kernels"] == "torch"
    engine.close()
    assert "one of its products is a Adapted" in caplog.text


def test_a_build_from_other_sources_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    require_kernels("avx2")
    library._library.cache_clear()
    monkeypatch.setattr(hashlib, "sha256", lambda data: SimpleNamespace(hexdigest=str))
    try:
        with pytest.raises(NativeUnavailable, match="other sources; install again"):
            choose("auto")
    finally:
        library._library.cache_clear()


def test_a_truncated_library_is_found_out_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require_kernels("avx2")
    whole = next(library.FOLDER.glob("_kernels*"))
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library._library.cache_clear()
    try:
        for size, reason in ((20_000, "is broken"), (30, "is broken"), (0, "cannot be loaded")):
            (tmp_path / whole.name).write_bytes(whole.read_bytes()[:size])
            with pytest.raises(NativeUnavailable, match=f"{reason}.*install the package again"):
                choose("auto")
    finally:
        library._library.cache_clear()
