"""KV in 8 bits: how a head of a token lies in a page, and torch's way from numbers to it and back.

Symmetric, in blocks of 32 along the head, each with a bfloat16 that says what one step is worth: a
channel far larger than the others, which keys are known for, coarsens its own block alone. A head
takes `width(dim)` bytes: its whole numbers, then the worths. The kernels do the same
(`native/src/pages.inl`), number by number.
"""

from __future__ import annotations

import torch

BLOCK = 32
STEPS = 127
NEXT_TO_NOTHING = 1e-30  # a block whose step is worth less is zeros


def width(dim: int) -> int:
    """Bytes of a head of `dim` numbers."""
    return dim + 2 * -(-dim // BLOCK)


def quantize(numbers: torch.Tensor) -> torch.Tensor:
    """[..., dim] floats to [..., width(dim)] int8. A block with NaN or infinity becomes NaN."""
    dim = numbers.shape[-1]
    padded = _in_blocks(numbers.float())
    worth = padded.abs().amax(dim=-1) / STEPS
    worth = torch.where(worth < NEXT_TO_NOTHING, torch.zeros_like(worth), worth)
    # The next bfloat16 that is not smaller, so that no number is more than 127 steps.
    upward = ((worth.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    upward = torch.where(worth.isfinite(), upward, torch.full_like(upward, float("nan")))
    inverse = torch.where(upward == 0, torch.zeros_like(worth), 1 / upward.float())
    whole = torch.round(padded * inverse.unsqueeze(-1)).nan_to_num(0, 0, 0).to(torch.int8)
    whole = whole.flatten(-2)[..., :dim]
    return torch.cat([whole, upward.contiguous().view(torch.int8)], dim=-1)


def dequantize(pages: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[..., width(dim)] int8 to [..., dim] of `dtype`."""
    numbers = _in_blocks(pages[..., :dim].float()) * worths(pages, dim).float().unsqueeze(-1)
    if dtype == torch.float16:  # 127 steps may be just beyond what it can say
        numbers = numbers.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return numbers.flatten(-2)[..., :dim].to(dtype)


def _in_blocks(numbers: torch.Tensor) -> torch.Tensor:
    """[..., dim] to [..., blocks, BLOCK], the last one filled up with zeros."""
    missing = -numbers.shape[-1] % BLOCK
    if missing:  # else it would be a copy
        numbers = torch.nn.functional.pad(numbers, (0, missing))
    return numbers.unflatten(-1, (-1, BLOCK))


def worths(pages: torch.Tensor, dim: int) -> torch.Tensor:
    """What a step of each block is worth: a view [..., blocks] of `pages`, as bfloat16."""
    return pages[..., dim:].view(torch.bfloat16)
