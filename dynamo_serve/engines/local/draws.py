"""Random numbers that are a pure function of (seed, position)."""

from __future__ import annotations

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the SplitMix64 increment


def _mix(x: int) -> int:
    """The SplitMix64 finalizer (Steele, Lea and Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at `position`; a multiple of 2**-48, so never rounded up.

    The seed is mixed before the position joins it, so that neighbouring seeds do not yield the
    same numbers shifted by a position.
    """
    start = _mix((seed + GOLDEN) & MASK)
    return (_mix((start + (position + 1) * GOLDEN) & MASK) >> 16) * 2.0**-48
