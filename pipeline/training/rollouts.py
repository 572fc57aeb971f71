"""Sample the rollouts of PPOTrainer without keeping their logits, and only as long as completions last.

PPOTrainer samples a rollout in chunks, keeps the logits of all of them (batch x response_length x vocabulary), and
reads one log-probability per token from each. Here a chunk's log-probabilities are read when it has been sampled, so
that its logits are freed before the next chunk. PPOTrainer's loop stays TRL's: it calls two functions of its module by
name, and `lean` puts others in their place.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from transformers import GenerationConfig


class LogProbs:
    """Stand in the place of a rollout's logits, and give what PPOTrainer reads from them: log-probabilities in nats."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def __getitem__(self, rows: slice) -> "LogProbs":
        return LogProbs(self.values[rows])


@contextlib.contextmanager
def lean(ppo_trainer: ModuleType, eos_token_id: int) -> Iterator[None]:
    """Let PPOTrainer, whose module is `ppo_trainer`, sample as this module does while the block runs.

    It collects garbage twice an update too, which takes longer than a small model's update: that is left to Python.
    """
    select: Callable[..., torch.Tensor] = ppo_trainer.selective_log_softmax

    def sample(
        model: Any, queries: torch.Tensor, size: int, pad_token_id: int, config: GenerationConfig
    ) -> tuple[torch.Tensor, LogProbs]:
        config = copy.copy(config)
        config.eos_token_id = eos_token_id
        config.pad_token_id = pad_token_id
        responses: list[torch.Tensor] = []
        log_probs: list[torch.Tensor] = []
        length = queries.shape[1]
        for chunk in queries.split(size):
            sequences, logits = ppo_trainer.generate(model, chunk, pad_token_id, config)
            responses.append(sequences[:, length:])
            log_probs.append(select(logits, responses[-1]))
            _draw_the_rest(logits, config)
        # PPOTrainer gives the score to the token after eos, so that there must be one.
        width = min(config.max_new_tokens, max(part.shape[1] for part in responses) + 1)
        found = torch.cat([_widened(part, width, pad_token_id) for part in responses])
        return torch.cat([queries, found], 1), LogProbs(torch.cat([_widened(part, width, 0.0) for part in log_probs]))

    def select_from(logits: torch.Tensor | LogProbs, ids: torch.Tensor) -> torch.Tensor:
        return logits.values if isinstance(logits, LogProbs) else select(logits, ids)

    with (
        mock.patch.object(ppo_trainer, "batch_generation", torch.no_grad()(sample)),
        mock.patch.object(ppo_trainer, "selective_log_softmax", select_from),
        mock.patch.object(ppo_trainer, "gc", SimpleNamespace(collect=lambda: 0)),
    ):
        yield


def _widened(rows: torch.Tensor, width: int, value: float) -> torch.Tensor:
    """Fill up rows on the right; shape (rows, width)."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)


def _draw_the_rest(logits: torch.Tensor, config: GenerationConfig) -> None:
    """Draw the random numbers of the tokens that were not sampled, since all completions had ended.

    So that what is sampled next is what PPOTrainer alone would sample. It is far cheaper than a token.
    """
    number = config.max_new_tokens - logits.shape[1]
    if number > 0:
        flat = torch.ones_like(logits[:, 0])
        for _ in range(number):
            torch.multinomial(flat, 1)
