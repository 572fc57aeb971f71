"""Let PPOTrainer sample and train with less: no logits that it does not read, no token behind the last end.

PPOTrainer keeps the logits of a whole rollout (batch x response_length x vocabulary) to read one log-probability per
token, samples `response_length` tokens even when all completions have ended, and computes the logits of the prompts
too. Here the log-probability of a token is read when it is sampled, sampling ends with the longest completion of a
chunk, and a forward pass computes the logits of the completions alone. PPOTrainer's loop stays TRL's: it calls some
functions of its module by name, and `lean` puts others in their place.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline.models.loading import can_leave_out_logits


class LogProbs:
    """Stand in the place of a rollout's logits, and give what PPOTrainer reads from them: log-probabilities in nats."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def __getitem__(self, rows: slice) -> "LogProbs":
        return LogProbs(self.values[rows])


class CompletionLogits:
    """Stand in the place of the logits of prompts and completions, and give those of the completions.

    `logits`: from the last token of the prompts on, shape (rows, completion tokens + 1, vocabulary).
    """

    def __init__(self, logits: torch.Tensor, start: int):
        self._logits = logits
        self._start = start

    def __getitem__(self, place: tuple[slice, slice]) -> torch.Tensor:
        assert place == (slice(None), slice(self._start, -1)), "PPOTrainer reads the completions' logits alone"
        return self._logits[:, :-1]


class LogProbsOfSampled(LogitsProcessor):
    """See each token's logits before the token is sampled, and keep the token's log-probability afterwards."""

    def __init__(self, temperature: float):
        self.num_draws = 0
        self.vocabulary = 1
        self._temperature = temperature
        self._columns: list[torch.Tensor] = []
        self._scores: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._read(input_ids)
        self._scores = scores / self._temperature
        self.num_draws += 1
        self.vocabulary = scores.shape[1]
        return scores

    def _read(self, input_ids: torch.Tensor) -> None:
        """Keep the log-probability of the last token."""
        if self._scores is not None:
            chosen = self._scores.gather(1, input_ids[:, -1:]).squeeze(1)
            self._columns.append(chosen - self._scores.logsumexp(1))
        self._scores = None

    def values(self, sequences: torch.Tensor, length: int) -> torch.Tensor:
        """Return the log-probabilities of what was sampled after `length` tokens, shape (rows, sampled tokens)."""
        width = sequences.shape[1] - length
        if len(self._columns) < width:
            self._read(sequences)
        return torch.stack(self._columns[:width], 1)


class _Rollout:
    """Sample a rollout for PPOTrainer, and know how long its prompts are."""

    def __init__(self, eos_token_id: int):
        self._eos = eos_token_id
        self.length = 0  # of the padded prompts, in tokens

    @torch.no_grad()
    def sample(
        self, model: Any, queries: torch.Tensor, size: int, pad_token_id: int, config: GenerationConfig
    ) -> tuple[torch.Tensor, LogProbs]:
        """Do what TRL's `batch_generation` does; the second value holds log-probabilities for logits."""
        config = copy.copy(config)
        config.eos_token_id = self._eos
        config.pad_token_id = pad_token_id
        self.length = queries.shape[1]
        chunks = [_sample_chunk(model, chunk, pad_token_id, config) for chunk in queries.split(size)]
        # PPOTrainer gives the score to the token after eos, so that there must be one.
        width = min(config.max_new_tokens, max(ids.shape[1] for ids, _ in chunks) + 1)
        responses = torch.cat([_widened(ids, width, pad_token_id) for ids, _ in chunks])
        log_probs = torch.cat([_widened(values, width, 0.0) for _, values in chunks])
        return torch.cat([queries, responses], 1), LogProbs(log_probs)


def _sample_chunk(
    model: Any, queries: torch.Tensor, pad_token_id: int, config: GenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return completions and the log-probabilities of their tokens, both of shape (rows, longest completion)."""
    mask = queries != pad_token_id
    length = queries.shape[1]
    seen = LogProbsOfSampled(config.temperature)
    sequences = model.generate(
        input_ids=torch.masked_fill(queries, ~mask, 0),
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([seen]),
    )
    ones = torch.ones(len(queries), seen.vocabulary, device=sequences.device)
    _draw_the_rest(ones, config.max_new_tokens - seen.num_draws)
    return sequences[:, length:], seen.values(sequences, length)


def _draw_the_rest(ones: torch.Tensor, number: int) -> None:
    """Draw the random numbers of `number` tokens that were not sampled, since all completions had ended.

    So that what is sampled next is what PPOTrainer alone would sample. It is far cheaper than a token. `ones` has the
    shape of the logits of a token, (rows, vocabulary).
    """
    for _ in range(number):
        torch.multinomial(ones, 1)


def _widened(rows: torch.Tensor, width: int, value: float) -> torch.Tensor:
    """Fill up rows on the right; shape (rows, width)."""
    return nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)


class _Narrow:
    """Let a policy, while `keep` is set, compute the logits of the last `keep` positions alone and no hidden states."""

    def __init__(self, model: nn.Module, rollout: _Rollout):
        self.keep: int | None = None
        self._rollout = rollout
        self.hooks = (
            model.register_forward_pre_hook(self._ask, with_kwargs=True),
            model.register_forward_hook(self._answer),
        )

    def _ask(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self.keep is None:
            return None
        return args, options | {"logits_to_keep": self.keep, "output_hidden_states": False}

    def _answer(self, _: nn.Module, __: object, output: Any) -> None:
        if self.keep is not None:
            output.logits = CompletionLogits(output.logits, self._rollout.length - 1)


def extent(sequences: torch.Tensor, length: int, pad_token_id: int) -> slice:
    """Return the columns that are not padding in all rows, and one of the completions' at least.

    A micro-batch may lack the longest prompt or completion of the batch. Prompts have `length` tokens, with padding.
    """
    seen = (sequences != pad_token_id).any(0).byte()
    before, behind = torch.stack([seen.argmax(), seen.flip(0).argmax()]).tolist()  # one wait for the device
    return slice(min(before, length - 1), max(len(seen) - behind, length + 1))


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean where `mask` is true; 0 if it is true nowhere, where TRL's is NaN and ruins the weights.

    A completion that begins with the pad token has no token to train on, and may be alone in its micro-batch.
    """
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _narrow_forward(forward: Callable[..., Any], narrow: list[_Narrow], rollout: _Rollout) -> Callable[..., Any]:
    """Return PPOTrainer's `forward` on what is not padding in all rows, with the logits of the completions alone."""

    def forward_narrow(model: nn.Module, sequences: torch.Tensor, pad_token_id: int) -> Any:
        whole = sequences.shape[1]
        kept = extent(sequences, rollout.length, pad_token_id) if narrow else slice(0, whole)
        for one in narrow:
            one.keep = kept.stop - rollout.length + 1
        try:
            output = forward(model, sequences[:, kept], pad_token_id)
        finally:
            for one in narrow:
                one.keep = None
        if type(output) is tuple:  # of the policy and the value model, whose values are of shape (rows, tokens, 1)
            policy, values = output
            return policy, nn.functional.pad(values, (0, 0, kept.start, whole - kept.stop))
        return output

    return forward_narrow


@contextlib.contextmanager
def lean(ppo_trainer: ModuleType, policies: list[nn.Module], eos_token_id: int) -> Iterator[None]:
    """Let PPOTrainer, whose module is `ppo_trainer`, work as this module says while the block runs.

    `policies` are the models whose logits it reads; they have one architecture. A view of another one of them has its
    logits from that one. PPOTrainer also collects garbage and empties the device's cache several times an update. Both
    wait for the device or take longer than a small model's update, and neither is needed.
    """
    rollout = _Rollout(eos_token_id)
    narrow = [_Narrow(model, rollout) for model in policies if can_leave_out_logits(model)]
    select: Callable[..., torch.Tensor] = ppo_trainer.selective_log_softmax

    def select_from(logits: torch.Tensor | LogProbs, ids: torch.Tensor) -> torch.Tensor:
        if isinstance(logits, LogProbs):
            return logits.values
        width = logits.shape[1]
        return _widened(select(logits, ids[:, :width]), ids.shape[1], 0.0)

    with contextlib.ExitStack() as stack:
        for one in narrow:
            for hook in one.hooks:
                stack.callback(hook.remove)
        for name, value in {
            "batch_generation": rollout.sample,
            "selective_log_softmax": select_from,
            "forward": _narrow_forward(ppo_trainer.forward, narrow, rollout),
            "masked_mean": masked_mean,
            "gc": SimpleNamespace(collect=lambda: 0),
            "empty_cache": lambda: None,
        }.items():
            stack.enter_context(mock.patch.object(ppo_trainer, name, value))
        yield
