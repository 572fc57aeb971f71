"""Let completions of like length go through the models together: padding costs as much as tokens do.

A rollout may be cut in any way while it is scored: `pieces` does it. While it trains, the rows of a micro-batch also
decide what a token weighs: PPOTrainer takes them at random, the loss of a token is the mean over the micro-batch's
tokens, and each micro-batch counts the same. So `micro_batches` draws the rows into groups, as PPOTrainer draws its
micro-batches, and every token gets the weight that it has in its group. Then the rows of a step are sorted by length,
and go through the models in that order. The loss of the step stays the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.rl.advantages import Rollout


@dataclass(frozen=True)
class MicroBatch:
    """Hold the rows that go through the models together, as wide as the longest prompt and completion among them need.

    `groups` says which group a row was drawn into, shape (rows,). `of_tokens` and `of_values` are the weights of
    positions in the mean of their group, shape (rows, width). `full_width` is the width of the whole rollout.
    """

    rollout: Rollout
    groups: torch.Tensor
    of_tokens: torch.Tensor
    of_values: torch.Tensor
    full_width: int


@dataclass(frozen=True)
class Extent:
    """Say where the tokens of each row are: its padding before the prompt, and its completion's length, in tokens."""

    padding: list[int]
    lengths: list[int]

    @classmethod
    def of(cls, rollout: Rollout, pad_token_id: int) -> "Extent":
        """Look once at a whole rollout: each look waits for the device."""
        padding = (rollout.sequences != pad_token_id).byte().argmax(1)
        return cls(padding.tolist(), rollout.real.sum(1).tolist())


def weights(mask: torch.Tensor, size: int) -> torch.Tensor:
    """Return what each position weighs in the mean of its group, `size` rows side by side; 0 outside the mask.

    A group without any position has the weights 0.
    """
    groups = mask.reshape(-1, size * mask.shape[1])
    return (groups / groups.sum(1, keepdim=True).clamp(min=1)).view_as(mask)


def micro_batches(rollout: Rollout, extent: Extent, drawn: list[int], size: int) -> Iterator[MicroBatch]:
    """Cut the rows `drawn` for a step into micro-batches of `size`, the longest completions first.

    So a step that needs more memory than there is fails at once, and what the first micro-batch took serves the others.
    """
    width = rollout.real.shape[1]
    rows = rollout.take(torch.tensor(drawn, device=rollout.real.device))
    of_tokens = weights(rows.real, size)
    of_values = weights(rows.valued, size)
    # Stable: rows of one length stay in the order in which they were drawn.
    places = sorted(range(len(drawn)), key=lambda place: -extent.lengths[drawn[place]])
    for start in range(0, len(places), size):
        chosen = places[start : start + size]
        longest = min(width, extent.lengths[drawn[chosen[0]]] + 1)  # the value behind the last token counts
        padding = min(extent.padding[drawn[place]] for place in chosen)
        index = torch.tensor(chosen, device=of_tokens.device)
        yield MicroBatch(
            rows.take(index).cut(padding, longest),
            index // size,
            of_tokens[index, :longest],
            of_values[index, :longest],
            width,
        )


def pieces(lengths: Sequence[int], most: int, overhead: float) -> list[list[int]]:
    """Cut rows into pieces of at most `most`, the longest first, so that they cost least; return the rows' numbers.

    A piece costs as many tokens as it has with padding, and `overhead` tokens more. `lengths` are in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    costs = [0.0]  # of the first rows in this order, by their number
    starts = [0]  # of the last piece among them
    for stop in range(1, len(order) + 1):
        choices = range(max(0, stop - most), stop)
        totals = [costs[start] + (stop - start) * lengths[order[start]] + overhead for start in choices]
        costs.append(min(totals))
        starts.append(choices[totals.index(min(totals))])
    found: list[list[int]] = []
    stop = len(order)
    while stop:
        found.append(order[starts[stop] : stop])
        stop = starts[stop]
    return found[::-1]
