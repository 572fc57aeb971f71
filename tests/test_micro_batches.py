"""Micro-batches of like length lose no row, no token and no weight, and make the step that PPOTrainer's make."""

import pytest
import torch

from pipeline.rl.advantages import Rollout, masks
from pipeline.rl.micro_batches import Extent, micro_batches, pieces
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


def cost(parts: list[list[int]], lengths: list[int], overhead: float) -> float:
    return sum(len(part) * max(lengths[row] for row in part) + overhead for part in parts)


def every_cut(order: list[int], most: int):
    """Every way to cut rows in this order."""
    if not order:
        yield []
    for size in range(1, min(most, len(order)) + 1):
        for rest in every_cut(order[size:], most):
            yield [order[:size], *rest]


@pytest.mark.parametrize("lengths", [*LENGTHS, [128, 120, 60, 5, 4, 4, 3, 1]])
@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("overhead", [0.5, 10.0, 1e6])
def test_pieces_cost_the_least_of_all_cuts(lengths, most, overhead):
    parts = pieces(lengths, most, overhead)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(0 < len(part) <= most for part in parts)
    assert [lengths[row] for part in parts for row in part] == sorted(lengths, reverse=True)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    assert cost(parts, lengths, overhead) == pytest.approx(
        min(cost(cut, lengths, overhead) for cut in every_cut(order, most))
    )


def test_a_dear_pass_is_not_cut_more_often_than_it_must_be():
    assert [len(part) for part in pieces([9, 1, 8, 2, 7], 4, 1e6)] in ([1, 4], [2, 3], [3, 2], [4, 1])
    assert len(pieces([9, 1, 8, 2, 7], 5, 1e6)) == 1
