"""Measure how far an export is from its stage: outputs on the same rows, their differences, and what is allowed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.export.job import Row
from pipeline.models import scoring
from pipeline.models.loading import Model
from pipeline.system.json_object import JsonObject

MAX_POSITIONS = 512  # of all rows together
MAX_LOGITS = 2**26  # 256 MiB in float32, in a file


def positions(rows: Sequence[Row], vocabulary: int) -> list[range]:
    """Choose the positions of each row whose outputs are compared: of its completion, from its first token on.

    The logits at a position are the distribution of the next token.
    """
    most = max(1, min(MAX_POSITIONS, MAX_LOGITS // vocabulary) // len(rows))
    return [range(row.start - 1, min(len(row.ids) - 1, row.start - 1 + most)) for row in rows]


@torch.no_grad()
def logits_of(model: Model, ids: list[int], where: range) -> np.ndarray:
    """Return the logits at some positions of a row, shape (positions, vocabulary), in float32."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, where.start : where.stop]
    return logits.float().numpy()


def save_logits(model: Model, rows: Sequence[Row], file: Path) -> None:
    """Write the logits of all rows to a file, one row at a time."""
    vocabulary = _vocabulary(model, rows)
    chosen = positions(rows, vocabulary)
    shape = (sum(map(len, chosen)), vocabulary)
    saved = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for row, where in zip(rows, chosen, strict=True):
        saved[start : start + len(where)] = logits_of(model, row.ids, where)
        start += len(where)
    saved.flush()


def _vocabulary(model: Model, rows: Sequence[Row]) -> int:
    return logits_of(model, rows[0].ids[:1], range(0, 1)).shape[1]


def compare_logits(model: Model, rows: Sequence[Row], file: Path) -> JsonObject:
    """Return the differences between a policy's outputs and those in a file.

    `logit` is the largest difference of any logit, `log_prob` and `mean_log_prob` those of the rows' own tokens in
    nats, `same_token` the share of positions with the same likeliest token.
    """
    expected = np.load(file, mmap_mode="r")
    largest = 0.0
    moved: list[np.ndarray] = []
    same = 0
    start = 0
    for row, where in zip(rows, positions(rows, expected.shape[1]), strict=True):
        theirs = np.asarray(expected[start : start + len(where)])
        ours = logits_of(model, row.ids, where)[:, : expected.shape[1]]
        start += len(where)
        targets = row.ids[where.start + 1 : where.stop + 1]
        moved.append(np.abs(_log_probs(ours, targets) - _log_probs(theirs, targets)))
        largest = max(largest, float(np.abs(ours - theirs).max()))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    differences = np.concatenate(moved)
    return {
        "positions": start,
        "logit": _finite(largest),
        "log_prob": _finite(differences.max()),
        "mean_log_prob": _finite(differences.mean()),
        "same_token": same / start,
    }


def _finite(value: float | np.floating) -> float:
    """Return a difference as JSON can hold it: what is no number is beyond all limits."""
    return float(value) if np.isfinite(value) else 1e9


def _log_probs(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Return the log-probability of each token in nats."""
    logs = torch.from_numpy(np.ascontiguousarray(logits)).double().log_softmax(-1)
    return logs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).numpy()


def scores_of(model: Model, rows: Sequence[Row], pad_token_id: int) -> list[float]:
    """Return the score of each row."""
    return scoring.score(model, [row.ids for row in rows], pad_token_id, batch_size=1)


def compare_scores(ours: Sequence[float], theirs: Sequence[float]) -> JsonObject:
    """Return the largest and the mean difference of scores, and the SD of the scores themselves, in log-odds."""
    differences = np.abs(np.array(ours) - np.array(theirs))
    return {
        "rows": len(theirs),
        "score": _finite(differences.max()),
        "mean_score": _finite(differences.mean()),
        "sd": _finite(np.std(theirs)),
    }
