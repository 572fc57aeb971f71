"""Scores of sequences by a reward model, and functions named in the config."""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch.nn.utils.rnn import pad_sequence

from pipeline.data.heldout import hash64
from pipeline.errors import UserError

Judge = Callable[[str, str], float]


def padded(rows: Sequence[list[int]], pad_token_id: int, device: torch.device, side: str) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of token ids, shape (rows, longest), padded on the `left` or `right` side."""
    pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    ids = pad([torch.tensor(row) for row in rows], padding_value=pad_token_id)
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def score(model: Any, sequences: Sequence[list[int]], pad_token_id: int, batch_size: int = 16) -> list[float]:
    """The reward model's score of each sequence (prompt and completion ids), read at its last token."""
    was_training = model.training
    model.eval()
    scores: list[float] = []
    for start in range(0, len(sequences), batch_size):
        inputs = padded(sequences[start : start + batch_size], pad_token_id, next(model.parameters()).device, "right")
        scores += model(**inputs).logits[:, 0].float().tolist()
    model.train(was_training)
    return scores


def added_shift(prompt: Sequence[int], sd: float, seed: int) -> float:
    """A prompt's offset, normal with this SD, the same wherever the prompt (token ids) is met."""
    return sd * stats.norm.ppf((hash64(str(seed), str(list(prompt))) + 0.5) / 2**64) if sd else 0.0


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
    spec = None
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(module)
    if spec is None:
        places = "beside the config, in the working directory or installed"
        raise UserError(f"{key}: there is no module {module!r} {places}")
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def function(reference: str, folder: Path, key: str) -> Judge:
    """Import a `module:function` of the form (prompt, completion) -> float.

    Raises:
        UserError: if it cannot be imported.
    """
    module, name = _split(reference, folder, key)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}: cannot import {reference!r}: {error}") from None
