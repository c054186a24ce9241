"""KV in 8 bits: how near it stays, and that kernels and torch keep the same."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynamo_serve.core.batch import Batch, Phase
from dynamo_serve.core.request import Finish
from dynamo_serve.engines.local import LocalEngine
from dynamo_serve.engines.local.attention import LayerSpec
from dynamo_serve.engines.local.int8_pages import BLOCK, dequantize, quantize, width, worths
from dynamo_serve.engines.local.kv_cache import KVCache, PoolSize, bytes_per_token, page_dtype
from dynamo_serve.errors import EngineStartError
from tests.engines.local.driver import Driver, Seq, errors_found, make_engine
from tests.engines.local.native import KERNEL_SETS, require_kernels
from tests.engines.local.zoo import MODELS, checkpoint, config_of, save_random

PROMPT = tuple(range(30, 53))
NEAR = 0.03  # of the logits' norm, in float32; the worst of the zoo is off by half of it


# ── the format ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dim", [2, 8, 32, 40, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_number_is_off_by_half_a_step_of_its_block(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    numbers = (torch.randn(50, 3, dim) * torch.rand(50, 3, 1) * 100).to(dtype)
    pages = quantize(numbers)
    assert pages.dtype == torch.int8 and pages.shape == (50, 3, width(dim))
    found = dequantize(pages, dim, torch.float32)
    for first in range(0, dim, BLOCK):
        block = numbers[..., first : first + BLOCK].float()
        step = block.abs().amax(dim=-1, keepdim=True) / 127 * (1 + 2**-7)  # rounded up to bfloat16
        off = (found[..., first : first + BLOCK] - block).abs()
        assert (off <= step / 2 * (1 + 1e-6)).all()


def test_the_largest_number_of_float16_stays_finite() -> None:
    largest = torch.full((32,), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert torch.equal(dequantize(quantize(largest), 32, torch.float16), largest)


def test_a_large_channel_coarsens_its_own_block_alone() -> None:
    numbers = torch.randn(128)
    numbers[70] = 1000.0
    off = (dequantize(quantize(numbers), 128, torch.float32) - numbers).abs()
    assert off[:64].max() < 0.02 and off[96:].max() < 0.02
    assert off[64:96].max() > 0.1


def test_zeros_next_to_nothing_and_what_is_no_number() -> None:
    assert not dequantize(quantize(torch.zeros(64)), 64, torch.float32).any()
    assert not dequantize(quantize(torch.full((64,), 1e-36)), 64, torch.float32).any()
    largest = torch.full((32,), torch.finfo(torch.float32).max)
    assert not dequantize(quantize(largest), 32, torch.float32).isnan().any()
    for bad in (math.nan, math.inf, -math.inf):
        numbers = torch.ones(96)
        numbers[40] = bad
        found = dequantize(quantize(numbers), 96, torch.float32)
        assert found[32:64].isnan().all()
        assert (found[:32] - 1).abs().max() < 0.01 and (found[64:] - 1).abs().max() < 0.01


def test_pages_take_a_byte_for_a_number_and_a_sixteenth_more() -> None:
    layers = [LayerSpec(16, 8, 128, 128, 1.0)] * 28
    assert bytes_per_token(layers, torch.bfloat16) == 114_688
    assert bytes_per_token(layers, torch.int8) == 114_688 // 2 * 17 // 16


# ── models ────────────────────────────────────────────────────────────────────────────────────


def logits(engine: LocalEngine, prompt: tuple[int, ...], cut: int) -> torch.Tensor:
    """Of the token after `prompt`, which runs in two steps."""
    assert engine._ready is not None
    driver, seq = Driver(engine, 4, 96), Seq("a", prompt)
    if cut:
        driver.step([(seq, cut)])
    work = driver.work(seq, len(prompt) - cut)
    with torch.inference_mode():
        found = engine._ready.run([work]).logits.clone()
    engine.drop(["a"])
    return found


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_architecture_stays_near(
    name: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the check at start, whose second chunk reads what the first has written."""
    found = errors_found(monkeypatch)
    engine = make_engine(checkpoint(name), kernels=kernels, kv_dtype="int8")
    facts = engine.start().facts
    whole, cut = (logits(engine, PROMPT, place) for place in (0, 9))
    engine.close()
    assert (facts["kv_dtype"], facts["dtype"]) == ("int8", "float32")
    assert 1e-5 < found[0] < NEAR, "off by as much as 8 bits are, no less"
    # Cut elsewhere it is the same, but for a number that was rounded the other way.
    torch.testing.assert_close(cut, whole, atol=0.01 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "phi3"])
@pytest.mark.parametrize("kernels", KERNEL_SETS)
def test_kernels_keep_what_torch_would_make_of_their_numbers(kernels: str, name: str) -> None:
    """In the first layer, whose keys and values do not depend on what attention read."""
    require_kernels(kernels)
    held = {}
    for kv_dtype in ("auto", "int8"):
        engine = make_engine(checkpoint(name), kernels=kernels, kv_dtype=kv_dtype)
        assert engine.start().facts["kernels"] == kernels
        driver, seq = Driver(engine, 4, 96), Seq("a", PROMPT)
        driver.step([(seq, len(PROMPT))])
        assert engine._ready is not None
        held[kv_dtype] = [t[seq.pages[:5]].clone() for t in engine._ready.cache.layers[0]]
        engine.close()
    for exact, found in zip(held["auto"], held["int8"], strict=True):
        assert exact.abs().min() > 0
        assert torch.equal(quantize(exact), found)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_what_is_no_number_ends_its_sequence_and_leaves_no_trace(kernels: str) -> None:
    engine = make_engine(checkpoint("llama"), kernels=kernels, kv_dtype="int8")
    engine.start()
    assert engine._ready is not None
    driver = Driver(engine, 4, 96)
    good, bad = Seq("good", (5, 6, 7)), Seq("bad", (8, 9, 10))
    driver.step([(good, 3), (bad, 3)])
    for pages in engine._ready.cache.layers:
        worths(pages.keys, 8)[bad.pages[0]] = math.nan
    work = (driver.work(good, 1), driver.work(bad, 1))
    outputs = {o.seq_id: o for o in engine.step(Batch(Phase.DECODE, work))}
    assert outputs["good"].finish is None and outputs["bad"].finish is Finish.ERROR
    for pages in engine._ready.cache.layers:
        assert all(worths(tensor, 8).isfinite().all() for tensor in pages)
    engine.close()


def test_scrubbing_leaves_whole_numbers_alone() -> None:
    layer = LayerSpec(4, 2, 64, 64, 1.0)
    cache = KVCache([layer], PoolSize(4, 4, 1), torch.int8, torch.device("cpu"))
    keys = cache.layers[0].keys
    keys.copy_(quantize(torch.randn(5, 4, 2, 64)))
    before = keys.clone()
    worths(keys, 64)[2, 1, 0, 1] = math.nan
    cache.scrub([1, 2])
    assert worths(keys, 64)[2, 1, 0, 1] == 0
    worths(keys, 64)[2, 1, 0, 1] = worths(before, 64)[2, 1, 0, 1]
    assert torch.equal(keys, before)


# ── settings ──────────────────────────────────────────────────────────────────────────────────


def test_the_pool_of_the_same_memory_holds_more_tokens() -> None:
    pages = {}
    for kv_dtype in ("auto", "int8"):
        engine = make_engine(checkpoint("qwen3"), kv_dtype=kv_dtype)
        spec = engine.start()
        engine.close()
        pages[kv_dtype] = int(spec.facts["kv_pool_bytes"]), int(spec.facts["kv_bytes_per_token"])
    assert pages["auto"][0] / pages["int8"][0] == pages["auto"][1] / pages["int8"][1] == 4 * 16 / 18


def test_where_it_cannot_be_is_said_with_the_remedy() -> None:
    with pytest.raises(
        EngineStartError, match=r"cache.kv_dtype: int8 needs .* even .*leave it out"
    ):
        page_dtype("int8", torch.float32, [LayerSpec(4, 2, 7, 7, 1.0)])


def test_a_model_that_it_does_not_suit_says_so_at_start() -> None:
    """Two channels of the keys far larger than the others, which their blocks cannot hold."""
    config = config_of("Qwen2Config", {"hidden_size": 128, "intermediate_size": 128})
    folder = save_random(config, "outlier")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        bias = torch.zeros_like(layer.self_attn.k_proj.bias).view(-1, 32)
        bias[:, 15], bias[:, 31] = 1e3, -5e2
        with torch.no_grad():
            layer.self_attn.k_proj.bias.copy_(bias.flatten())
    model.save_pretrained(folder)
    engine = make_engine(folder, dtype="float32")
    assert engine.start().facts["kv_dtype"] == "float32"
    engine.close()
    engine = make_engine(folder, dtype="float32", kv_dtype="int8")
    with pytest.raises(EngineStartError, match=r"^cache.kv_dtype: int8 .*leave it at auto"):
        engine.start()
