"""A stress test of RL: a shift per prompt that is added to every score."""

from collections.abc import Sequence

from scipy import stats

from pipeline.system.digests import hash64


def added_shift(prompt: Sequence[int], sd: float, seed: int) -> float:
    """A prompt's offset, normal with this SD, the same wherever the prompt (token ids) is met."""
    return sd * stats.norm.ppf((hash64(str(seed), str(list(prompt))) + 0.5) / 2**64) if sd else 0.0
