"""What the engine says and refuses at start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamo_serve.config import CacheSection
from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local import kv_cache, startup
from dynamo_serve.engines.local.discovery import (
    LayerRecorder,
    UnsupportedModel,
    discover_layers,
)
from dynamo_serve.engines.local.kv_cache import size_pool
from dynamo_serve.engines.local.loader import load_config, load_model, position_limit
from dynamo_serve.errors import EngineStartError
from tests.engines.local.driver import Driver, Seq, make_engine
from tests.engines.local.zoo import checkpoint, config_of, save_random

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, "AttentionInterface"),
    "falcon": ("FalconConfig", {}, "AttentionInterface"),
    "mamba": ("MambaConfig", {"state_size": 4}, "linear_attention"),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}, ""),
    "jamba": (
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "",
    ),
    "doge": ("DogeConfig", {}, "packed forward failed"),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "conv"),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4},
        "linear_attention",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unsupported_architecture_is_refused_by_name(name: str) -> None:
    kind, changes, reason = REFUSED[name]
    folder = save_random(config_of(kind, changes), name)
    before = set(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(UnsupportedModel, match=kind.removesuffix("Config")) as refusal:
        make_engine(folder).start()
    assert reason in str(refusal.value)
    assert set(ALL_ATTENTION_FUNCTIONS) == before


def test_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import T5Config

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"T5ForConditionalGeneration.*encoder"):
        make_engine(str(tmp_path)).start()


def test_attention_that_reads_no_pages_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # An attention that forgets earlier chunks stands for any state that our pages do not hold.
    from dynamo_serve.engines.local.grouping import Grouping

    original = Grouping._pages
    monkeypatch.setattr(
        Grouping, "_pages", lambda self, row, window: original(self, row, window)[:1] * 9
    )
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM.*differ from its plain forward"):
        make_engine(checkpoint("llama"), kernels="torch").start()


def test_a_step_longer_than_any_sequence_is_examined_within_the_positions() -> None:
    # On CUDA, where this is done to see the activations, a position too high kills the device.
    recorder = LayerRecorder()
    name = "test_recorder"
    ALL_ATTENTION_FUNCTIONS[name] = recorder
    try:
        path = checkpoint("gpt2")
        model = load_model(path, load_config(path), "auto", torch.device("cpu"), name)
        assert len(discover_layers(model, recorder, 300, 256)) == 2
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def test_spec_says_what_was_got() -> None:
    stages: list[tuple[str, float]] = []
    engine = make_engine(
        checkpoint("llama"), kernels="torch", progress=lambda *at: stages.append(at)
    )
    spec = engine.start()
    engine.close()
    assert (spec.page_size, spec.num_pages, spec.vocab_size) == (4, 96, 128)
    assert spec.max_model_len == 256  # the model's limit; the pool would hold 384
    assert spec.facts["architecture"] == "LlamaForCausalLM"
    assert spec.facts["attention_backend"] == spec.facts["kernels"] == "torch"
    assert spec.facts["dtype"] == "float32"
    assert spec.facts["device"] == "cpu"
    assert spec.facts["cuda_graphs"] is False
    per_token = 2 * 2 * 2 * 8 * 4  # layers * (K, V) * heads * dim * bytes
    assert spec.facts["kv_bytes_per_token"] == per_token
    assert 0 < int(spec.facts["weights_read_bytes"]) <= int(spec.facts["weights_bytes"])
    assert spec.facts["kv_pool_bytes"] == 96 * 4 * per_token
    assert stages[0] == ("weights", 0.0) and ("warm-up", 1.0) in stages


@pytest.mark.parametrize(
    ("wishes", "longest"),
    [({"max_model_len": 100}, 100), ({"num_pages": 5}, 20), ({"num_pages": 0}, 256)],
)
def test_longest_sequence_is_the_least_of_model_wish_and_pool(
    wishes: dict[str, int], longest: int
) -> None:
    engine = make_engine(checkpoint("llama"), **wishes)
    spec = engine.start()
    engine.close()
    assert spec.max_model_len == longest
    if wishes == {"num_pages": 0}:  # sized from memory: no more than all sequences can use
        assert spec.num_pages == 16 * 64


def test_wish_beyond_the_model_is_refused() -> None:
    with pytest.raises(EngineStartError, match=r"max_model_len: 257 .* 256 .*LlamaForCausalLM"):
        make_engine(checkpoint("llama"), max_model_len=257).start()


def test_wish_beyond_the_pool_is_not_cut_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(checkpoint("llama"), max_model_len=200, num_pages=10)
    with caplog.at_level(logging.WARNING):
        assert engine.start().max_model_len == 40
    engine.close()
    assert "max_model_len: 200" in caplog.text and "40 tokens" in caplog.text


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


@pytest.mark.parametrize(
    ("kind", "changes", "limit", "reason"),
    [
        ("LlamaConfig", {}, 256, "max_position_embeddings"),
        ("GPT2Config", {"max_position_embeddings": 64}, 64, "max_position_embeddings"),
        (
            "Phi3Config",
            {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 128},
            128,
            "rotary scaling",
        ),
        ("Llama4TextConfig", {"attention_chunk_size": 32}, 32, "attention_chunk_size"),
    ],
)
def test_a_model_is_served_as_far_as_its_answers_are_exact(
    kind: str, changes: dict[str, Any], limit: int, reason: str
) -> None:
    found = position_limit(config_of(kind, changes))
    assert found.num_tokens == limit and reason in found.reason


@pytest.mark.parametrize("backend", ["varlen", "triton"])
def test_named_backend_that_cannot_run_is_no_silent_fallback(backend: str) -> None:
    with pytest.raises(EngineStartError, match=f"engine.attention: {backend} .*CUDA"):
        make_engine(checkpoint("llama"), attention=backend).start()


@pytest.mark.parametrize("device", ["cuda:77", "tpu", "meta"])
def test_missing_device_is_refused(device: str) -> None:
    with pytest.raises(EngineStartError, match=r"engine\.device"):
        make_engine(checkpoint("llama"), device=device).start()


def test_missing_model_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match=r"model\.path"):
        make_engine(str(tmp_path)).start()


def test_pool_that_holds_no_page_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_cache, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(EngineStartError, match="memory_fraction"):
        size_pool(CacheSection(), 1 << 17, 4096, torch.device("cpu"))
    with pytest.raises(EngineStartError, match=r"cache\.num_pages.*at most 32"):
        size_pool(CacheSection(num_pages=33), 1 << 11, 4096, torch.device("cpu"))
    half = CacheSection(memory_fraction=0.5)
    assert size_pool(half, 1 << 11, 4096, torch.device("cpu")).num_pages == 16
    assert size_pool(half, 1 << 11, 17, torch.device("cpu")).num_pages == 2
    assert size_pool(half, 1 << 11, 4096, torch.device("cpu"), 1 << 19).num_pages == 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_run_as_they_are(dtype: str) -> None:
    engine = make_engine(checkpoint("qwen3", dtype))
    assert engine.start().facts["dtype"] == dtype
    driver = Driver(engine, 4, 96)
    seqs = [Seq("a", tuple(range(20))), Seq("b", (7,), Sampling(seed=3))]
    driver.generate(seqs, 5, chunk=6)
    assert [len(seq.output) for seq in seqs] == [5, 5]
    engine.close()


def test_dtype_wish_overrides_the_checkpoint() -> None:
    engine = make_engine(checkpoint("llama"), dtype="bfloat16")
    spec = engine.start()
    engine.close()
    assert spec.facts["dtype"] == "bfloat16"


def test_two_engines_do_not_share_anything() -> None:
    outputs = {}
    engines = {name: make_engine(checkpoint(name)) for name in ("llama", "qwen2")}
    for engine in engines.values():
        engine.start()
    for name, engine in engines.items():
        seq = Seq("same id", tuple(range(9)))
        Driver(engine, 4, 96).generate([seq], 6)
        outputs[name] = seq.output
    engines["llama"].close()
    again = Seq("again", tuple(range(9)))
    Driver(engines["qwen2"], 4, 96).generate([again], 6)
    assert again.output == outputs["qwen2"] != outputs["llama"]
    engines["qwen2"].close()
    engines["qwen2"].close()


def test_a_closed_engine_may_be_started_again_and_remembers_nothing() -> None:
    engine = make_engine(checkpoint("llama"))
    outputs = []
    for _ in range(2):
        engine.start()
        seq = Seq("same id", (5, 6, 7), Sampling(temperature=0.0, repetition_penalty=1.3))
        Driver(engine, 4, 96).generate([seq], 3)
        outputs.append(seq.output)
        engine.close()
    assert outputs[0] == outputs[1]


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        startup.use(torch.device(name), threads=2)
    assert chosen == [torch.device("cuda:1")]
