"""Put RL under stress: add a shift per prompt to every score."""

from collections.abc import Sequence

from scipy import stats

from pipeline.system.digests import hash64


def added_shift(prompt: Sequence[int], sd: float, seed: int) -> float:
    """Return a prompt's offset, normal with this SD; the same wherever the prompt (token ids) is met."""
    if not sd:
        return 0.0
    quantile = (hash64(str(seed), str(list(prompt))) + 0.5) / 2**64
    return float(sd * stats.norm.ppf(quantile))
