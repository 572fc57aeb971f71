"""Say how far an export may be from its stage. Nothing here imports torch."""

from dataclasses import dataclass

from pipeline.system.json_object import JsonObject

NAMES = {
    "logit": "largest difference of a logit",
    "log_prob": "largest difference of a log-probability (nats)",
    "mean_log_prob": "mean difference of log-probabilities (nats)",
    "same_token": "share of equal likeliest tokens",
    "score": "largest difference of a score (log-odds)",
    "mean_score": "mean difference of scores (log-odds)",
}
_LEAST = "same_token"  # the figure of those that may not be smaller


@dataclass(frozen=True)
class Limit:
    """What may differ at most, of a policy (nats, shares of positions) and of a reward model (log-odds).

    `log_prob` and `score` hold for every token and row, `mean_log_prob` and `mean_score` on average.
    """

    log_prob: float
    mean_log_prob: float
    same_token: float
    score: float
    mean_score: float


# By the type of the weights that are written, with both sides computed in float32: then only weights can differ.
# A hundred to 600 times what was measured of SmolLM2 in float32, where only the order of sums differs, and 4 to 7 times
# in bfloat16, which keeps 8 bits of a weight. float16 keeps 11: its limits are about an eighth of those.
LIMITS = {
    "float32": Limit(log_prob=0.003, mean_log_prob=0.0003, same_token=0.995, score=0.003, mean_score=0.0005),
    "float16": Limit(log_prob=0.125, mean_log_prob=0.0075, same_token=0.99, score=0.0625, mean_score=0.02),
    "bfloat16": Limit(log_prob=1.0, mean_log_prob=0.06, same_token=0.96, score=0.5, mean_score=0.15),
}
# With each side computed in its own precision: activations are rounded too, in both, and the limit only says that it
# is the same model. Three to nine times what was measured.
AS_USED = Limit(log_prob=2.5, mean_log_prob=0.2, same_token=0.88, score=1.0, mean_score=0.3)

# The share of the adapter's own effect on log-probabilities that an export may be away from its stage. Half of it is
# as near to the stage as to its base: what was trained would be lost, however small it is in nats.
LOST = 0.5
NOTICEABLE = 0.2  # from here on it is told


def in_words(limit: Limit, name: str) -> str:
    """Say how far a figure may go."""
    if not hasattr(limit, name):
        return "none"
    return f"{'at least' if name == _LEAST else 'at most'} {getattr(limit, name):g}"


def faults(figures: JsonObject, limit: Limit) -> list[str]:
    """Say which figures are beyond their limit."""
    beyond = []
    for name, most in vars(limit).items():
        if name not in figures:
            continue
        if (figures[name] < most) if name == _LEAST else not figures[name] <= most:
            beyond.append(f"{NAMES[name]} is {figures[name]:.4g}, expected {in_words(limit, name)}")
    return beyond


def lost_share(figures: JsonObject, effect: float | None) -> float:
    """Return how far an export is from its stage, as a share of what the adapter changes; 0 where that says nothing."""
    moved = figures.get("mean_log_prob", 0.0)
    if effect is None or moved <= LIMITS["float32"].mean_log_prob:
        return 0.0
    return moved / effect if effect > 0 else 0.0
