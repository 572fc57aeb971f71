"""Micro-batches of like length lose no row, no token and no weight, and make the step that PPOTrainer's make."""

import pytest
import torch

from pipeline.rl.advantages import Rollout, masks
from pipeline.rl.micro_batches import Extent, micro_batches
from pipeline.training.rollouts import masked_mean

PAD, WIDTH, LONGEST_PROMPT = 0, 9, 5


def rollout(lengths: list[int], prompts: list[int]) -> Rollout:
    """Rows whose tokens are all different."""
    generator = torch.Generator().manual_seed(len(lengths))
    number = len(lengths)
    ids = torch.arange(1, number * (LONGEST_PROMPT + WIDTH) + 1).view(number, -1)
    columns = torch.arange(LONGEST_PROMPT + WIDTH)
    starts, ends = LONGEST_PROMPT - torch.tensor(prompts), LONGEST_PROMPT + torch.tensor(lengths)
    ids[(columns < starts.unsqueeze(1)) | (columns >= ends.unsqueeze(1))] = PAD
    figures = (torch.randn(number, WIDTH, generator=generator) for _ in range(4))
    return Rollout(ids, *masks(torch.tensor(lengths), WIDTH), *figures)


# One has nothing but an empty completion in a group, one is as wide as the rollout.
LENGTHS = [[1, 9, 3, 2, 0, 5, 7, 4], [0, 0, 9, 9, 1, 1, 8, 2], [3] * 8, [0] * 8]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("drawn", [list(range(8)), [5, 2, 7, 0, 3, 6, 1, 4]])
def test_losses_are_the_means_of_the_groups_drawn(lengths, size, drawn):
    rows = rollout(lengths, [5, 1, 2, 4, 3, 3, 1, 2])
    batches = list(micro_batches(rows, Extent.of(rows, PAD), drawn, size))
    found = {"real": torch.zeros(8 // size), "valued": torch.zeros(8 // size)}
    for batch in batches:
        assert len(batch.groups) == size and batch.full_width == WIDTH
        for kind, weights in (("real", batch.of_tokens), ("valued", batch.of_values)):
            figures = (batch.rollout.advantages * weights).sum(1)
            found[kind].index_add_(0, batch.groups, figures)
    for kind, sums in found.items():
        groups = torch.tensor(drawn).split(size)
        expected = [masked_mean(rows.advantages[group], getattr(rows, kind)[group]) for group in groups]
        torch.testing.assert_close(sums, torch.stack(expected))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_row_comes_once_without_its_padding(lengths):
    rows = rollout(lengths, [5, 1, 2, 4, 3, 3, 1, 2])
    drawn = [5, 2, 7, 0, 3, 6, 1, 4]
    batches = list(micro_batches(rows, Extent.of(rows, PAD), drawn, 2))
    assert sorted(tokens(rows)) == sorted(row for batch in batches for row in tokens(batch.rollout))
    longest = [max(batch.rollout.real.sum(1).tolist()) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, most in zip(batches, longest, strict=True):
        assert batch.rollout.real.shape[1] == min(WIDTH, most + 1)
        assert (batch.rollout.sequences[:, 0] != PAD).any()
        assert batch.rollout.valued.sum() == rows.valued[places(rows, batch)].sum()


def tokens(rows: Rollout) -> list[list[int]]:
    return [[token for token in row if token != PAD] for row in rows.sequences.tolist()]


def places(rows: Rollout, batch) -> list[int]:
    """Where the rows of a micro-batch are in the rollout: all tokens differ, and a prompt has one at least."""
    last = LONGEST_PROMPT - 1
    position = batch.rollout.sequences.shape[1] - batch.rollout.real.shape[1] - 1
    return [rows.sequences[:, last].tolist().index(token) for token in batch.rollout.sequences[:, position].tolist()]


def test_a_micro_batch_has_completions_of_like_length():
    """Random ones would all be as long as the longest."""
    rows = rollout([9, 1, 9, 1, 9, 1, 9, 1], [2] * 8)
    widths = [batch.rollout.real.shape[1] for batch in micro_batches(rows, Extent.of(rows, PAD), list(range(8)), 4)]
    assert widths == [9, 2]
