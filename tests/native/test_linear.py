"""Packed products against torch's, for every set of kernels and kind of weights."""

from __future__ import annotations

import pytest
import torch

from dynamo_serve.native.library import Kernels
from dynamo_serve.native.packing import pack_linear
from dynamo_serve.native.structs import Type

# Relative to the norm of the result. bfloat16 is exact in its weights here, and rounds what comes
# in; int8 rounds weights to 1/254 of the largest in their row, and where whole numbers are
# multiplied what comes in as well.
TOLERANCE = {Type.FLOAT32: 2e-6, Type.BFLOAT16: 5e-3, Type.INT8: 2e-2}
WHOLE_NUMBERS = ("amx", "avx512_bf16")  # sets that multiply them with int8 weights
SHAPES = ((96, 128), (70, 64), (32, 192), (1, 64))  # outputs, inputs; panels full and in part


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def run(
    kernels: Kernels,
    weights: torch.Tensor,
    x: torch.Tensor,
    kind: Type,
    bias: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    packed = pack_linear(kernels, [weights], [bias], kind=kind, gated=gated)
    out = torch.full((len(x), len(weights) // 2 if gated else len(weights)), float("nan"))
    kernels.linear(packed.struct, x.data_ptr(), out.data_ptr(), len(x))
    return out


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 40, 70, 96, 144, 240, 432, 600])
@pytest.mark.parametrize("kind", list(Type))
def test_products_are_those_of_torch(kernels: Kernels, kind: Type, tokens: int) -> None:
    for outputs, inputs in SHAPES:
        weights = random(outputs, inputs).bfloat16().float()
        x, bias = random(tokens, inputs), random(outputs)
        found = run(kernels, weights, x, kind, bias)
        assert error(found, x @ weights.T + bias) < TOLERANCE[kind], (outputs, inputs)
        assert error(run(kernels, weights, x, kind), x @ weights.T) < TOLERANCE[kind]


@pytest.mark.parametrize("tokens", [33, 48, 65, 96, 129, 144, 240, 336, 432])
@pytest.mark.parametrize("kind", list(Type))
def test_a_new_thread_has_memory_enough(kernels: Kernels, kind: Type, tokens: int) -> None:
    """Many panels and parts of inputs, on a thread that has seen nothing larger; what is written
    beyond its memory the sanitizers tell."""
    kernels.set_threads(1)
    kernels.set_threads(2)
    weights, x = random(512, 2176).bfloat16().float(), random(tokens, 2176)
    assert error(run(kernels, weights, x, kind), x @ weights.T) < 2 * TOLERANCE[kind]


@pytest.mark.parametrize("kind", list(Type))
def test_gated_products_pair_each_gate_with_its_up(kernels: Kernels, kind: Type) -> None:
    for half, tokens in ((32, 3), (48, 33), (5, 17)):
        weights, x, bias = random(2 * half, 64).bfloat16().float(), random(tokens, 64), random(1)
        both = torch.cat([bias.expand(half), torch.arange(half) / half])
        found = run(kernels, weights, x, kind, both, gated=True)
        gate, up = (x @ weights.T + both).split(half, dim=1)
        expected = torch.nn.functional.silu(gate) * up
        assert error(found, expected) < 2 * TOLERANCE[kind], (half, tokens)


@pytest.mark.parametrize("kind", list(Type))
def test_a_row_that_is_no_number_stays_alone_and_is_not_hidden(
    kernels: Kernels, kind: Type
) -> None:
    weights, x = random(64, 64), random(20, 64)
    x[7, 3] = float("nan")
    found = run(kernels, weights, x, kind)
    assert torch.isnan(found[7]).all()
    assert torch.isfinite(found[torch.arange(20) != 7]).all()


@pytest.mark.parametrize("kind", list(Type))
def test_any_number_of_threads_gives_the_same_bits(kernels: Kernels, kind: Type) -> None:
    weights, x = random(512, 128), random(70, 128)
    results = []
    for threads in (1, 2, 5, 3):
        kernels.set_threads(threads)
        results += [run(kernels, weights, x, kind) for _ in range(20)]
    assert all(torch.equal(results[0], result) for result in results)


def test_int8_keeps_what_a_weight_is_to_half_a_step(kernels: Kernels) -> None:
    weights = random(64, 64)
    weights[5] = 0  # a row without a largest weight
    found = run(kernels, weights, torch.eye(64), Type.INT8).T
    step = weights.abs().amax(dim=1, keepdim=True) / 127
    assert ((found - weights).abs() <= 0.51 * step + 1e-6).all()


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in whole numbers, the largest 127, and what one step of the row is worth."""
    worth = x.abs().amax(dim=1) / 127
    return (x * (1 / worth)[:, None]).round().long(), worth


@pytest.mark.parametrize("tokens", [1, 6, 17, 49])
@pytest.mark.parametrize("inputs", [64, 2176, 70_016])
def test_int8_sums_whole_numbers_without_error(kernels: Kernels, inputs: int, tokens: int) -> None:
    """Bit for bit the sets that round what comes in, up to sums that need all of 32 bits."""
    if kernels.name not in WHOLE_NUMBERS:
        pytest.skip("this set multiplies in float")
    weights, x = random(37, inputs), random(tokens, inputs).bfloat16().float()
    weights[3], x[0] = 1, -1  # the largest sum that there is
    (w, steps), (whole, worth) = rounded(weights), rounded(x)
    sums = (whole @ w.T).float()
    assert torch.equal(run(kernels, weights, x, Type.INT8), sums * (steps * worth[:, None]))
