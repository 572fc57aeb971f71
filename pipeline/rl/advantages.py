"""Compute what PPO learns from, as TRL's PPOTrainer does: rewards of tokens, advantages (GAE), returns and both losses.

All tensors of tokens have the shape (rows, width): one row for each completion, cut after its first eos, with padding
behind. A row counts `lengths` tokens. Its score is the reward of the position after them, if there is one, so that a
value is foretold for one position more than there are tokens.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch

from pipeline.training.rollouts import masked_mean

PADDING = 1.0  # PPOTrainer's log-probability of padding, which is in the figures that it logs


@dataclass(frozen=True)
class Rewards:
    """Hold the reward of each token, and its KL to the reference in nats."""

    rewards: torch.Tensor
    kl: torch.Tensor


@dataclass(frozen=True)
class Rollout:
    """Hold what the epochs on a rollout need of it.

    `sequences` are prompts and completions, shape (rows, prompt length + width), with padding on both sides. `real`
    tells tokens from padding, `valued` the positions whose value counts.
    """

    sequences: torch.Tensor
    real: torch.Tensor
    valued: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def take(self, rows: torch.Tensor) -> "Rollout":
        """Return some of its rows."""
        return Rollout(*(getattr(self, field.name)[rows] for field in fields(self)))

    def cut(self, padding: int, width: int) -> "Rollout":
        """Return it without its first `padding` columns, which are before the prompts, and with `width` positions."""
        length = self.sequences.shape[1] - self.real.shape[1]
        of_tokens = (getattr(self, field.name)[:, :width] for field in fields(self)[1:])
        return Rollout(self.sequences[:, padding : length + width], *of_tokens)


def masks(lengths: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which positions hold tokens, and which have a value that counts."""
    positions = torch.arange(width, device=lengths.device).expand(len(lengths), -1)
    return positions < lengths.unsqueeze(1), positions <= lengths.unsqueeze(1)


def whitened(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Scale values to variance 1 within the mask, and shift them to mean 0 if asked to."""
    mean = masked_mean(values, mask)
    number = mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * number / (number - 1)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return scaled if shift_mean else scaled + mean


def token_rewards(
    log_probs: torch.Tensor,
    reference: torch.Tensor,
    scores: torch.Tensor,
    lengths: torch.Tensor,
    kl_coef: float,
    kl_estimator: Literal["k1", "k3"],
    whiten: bool,
) -> Rewards:
    """Return the penalty for leaving the reference at each token, and the completion's score behind the last.

    `log_probs` and `reference` are the log-probabilities of policy and reference, equal where there is padding;
    `scores` and `lengths` have the shape (rows,).
    """
    width = log_probs.shape[1]
    ratio = reference - log_probs
    kl = -ratio if kl_estimator == "k1" else (ratio.exp() - 1) - ratio
    rewards = -kl_coef * kl
    rows = torch.arange(len(rewards), device=rewards.device)
    rewards[rows, torch.where(lengths < width, lengths, lengths - 1)] += scores
    if whiten:
        valued = masks(lengths, width)[1]
        rewards = whitened(rewards, valued, shift_mean=False).masked_fill(~valued, 0)
    return Rewards(rewards, kl)


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, real: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GAE's advantages, whitened over the tokens and 0 elsewhere, and the returns, from before the whitening."""
    width = rewards.shape[1]
    advantage = torch.zeros_like(rewards[:, 0])
    backwards = []
    for position in reversed(range(width)):
        following = values[:, position + 1] if position < width - 1 else 0.0
        surprise = rewards[:, position] + gamma * following - values[:, position]
        advantage = surprise + gamma * lam * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], 1)
    returns = advantages + values
    return whitened(advantages, real).masked_fill(~real, 0), returns


@dataclass(frozen=True)
class Loss:
    """Hold the losses of positions, and at which of them clipping decides; both of shape (rows, width)."""

    losses: torch.Tensor
    clipped: torch.Tensor


def value_loss(values: torch.Tensor, rollout: Rollout, cliprange: float) -> Loss:
    """Return half the squared errors of the values; a value gains nothing beyond `cliprange` from what it was."""
    values = values.masked_fill(~rollout.valued, 0)
    near = values.clamp(rollout.values - cliprange, rollout.values + cliprange)
    errors = (values - rollout.returns) ** 2
    errors_near = (near - rollout.returns) ** 2
    return Loss(0.5 * torch.max(errors, errors_near), errors_near > errors)


def policy_loss(ratio: torch.Tensor, rollout: Rollout, cliprange: float) -> Loss:
    """Return PPO's clipped losses; `ratio` is of new to old probabilities, 1 where there is padding."""
    losses = -rollout.advantages * ratio
    losses_near = -rollout.advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return Loss(torch.max(losses, losses_near), losses_near > losses)
