"""Scores of sequences by a reward model, and functions named in the config."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError

Judge = Callable[[str, str], float]


@torch.no_grad()
def score(model: Any, sequences: Sequence[list[int]], pad_token_id: int, batch_size: int = 16) -> list[float]:
    """The reward model's score of each sequence (prompt and completion ids), read at its last token."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    scores: list[float] = []
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in batch], device=device)
        lengths = torch.tensor([len(row) for row in batch], device=device)
        mask = torch.arange(longest, device=device)[None, :] < lengths[:, None]
        scores += model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float().tolist()
    model.train(was_training)
    return scores


def _split(reference: str, folder: Path, key: str) -> tuple[str, str]:
    module, colon, function = reference.partition(":")
    if not colon or not module or not function:
        raise UserError(f"{key}: expected `module:function`, got {reference!r}")
    for path in (str(Path.cwd()), str(folder)):  # the config's folder comes first, in every process alike
        sys.path[:] = [path, *(other for other in sys.path if other != path)]
    return module, function


def source_of(reference: str, folder: Path, key: str) -> Path | None:
    """The file of a `module:function`, looked up beside the config, in the working directory and among packages.

    Raises:
        UserError: if there is no such module.
    """
    module, _ = _split(reference, folder, key)
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise UserError(
            f"{key}: there is no module {module!r} beside the config, in the working directory or installed"
        )
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def function(reference: str, folder: Path, key: str) -> Judge:
    """Import a `module:function` of the form (prompt, completion) -> float.

    Raises:
        UserError: if it cannot be imported.
    """
    module, name = _split(reference, folder, key)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}: cannot import {reference!r}: {error}") from None
    return found
