"""Score sequences of token ids with a reward model."""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence


def padded(
    rows: Sequence[list[int]], pad_token_id: int, device: torch.device, side: Literal["left", "right"]
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` of token ids, shape (rows, longest), padded on one side."""
    pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    ids = pad([torch.tensor(row) for row in rows], padding_value=pad_token_id)
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def score(model: nn.Module, sequences: Sequence[list[int]], pad_token_id: int, batch_size: int = 16) -> list[float]:
    """Return the reward model's score of each sequence (prompt and completion ids), read at its last token."""
    was_training = model.training
    model.eval()
    scores: list[float] = []
    for start in range(0, len(sequences), batch_size):
        inputs = padded(sequences[start : start + batch_size], pad_token_id, next(model.parameters()).device, "right")
        scores += model(**inputs).logits[:, 0].float().tolist()
    model.train(was_training)
    return scores
