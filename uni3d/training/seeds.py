"""Seeds by counting: what a step draws depends on the seed and the step alone, so nothing is replayed."""

from __future__ import annotations


def mix_seeds(seed: int, index: int) -> int:
    """One 63-bit seed from two integers (splitmix64 finaliser): neighbouring streams share nothing."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15 + index * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1
