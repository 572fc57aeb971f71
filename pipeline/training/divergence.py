"""How far two language models are apart, in memory that does not grow with the batch times the vocabulary.

Logits are the largest tensors of a language model: 16 rows of 768 tokens and a vocabulary of 152,000 are 7.5 GB in
float32. So they are computed at the positions that are asked for only, for few rows at a time, and every step after
that works on a few of these positions.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from pipeline.models.loading import bare, can_leave_out_logits

Ids = list[int]  # token ids
Model = Callable[..., Any]  # maps `input_ids` and `attention_mask` of shape (rows, length) to an output with `logits`
# How many logits one forward pass may give: 64 MiB in float32. A single row may need more.
MAX_LOGITS = 2**24
# How many tokens of prompts go through a model at once: as many as keep a processor busy.
MAX_TOKENS = 512
# How many logits are compared at once: 4 MiB in float32.
MAX_COMPARED = 2**20


def kl_of_completions(
    policy: nn.Module, reference: Model, prompts: Sequence[Ids], completions: Sequence[Ids], temperature: float = 1.0
) -> list[float]:
    """Return KL(policy || reference) of each completion in nats, summed over positions, exact over the vocabulary.

    The whole distribution at every visited position has far less variance than the log-ratio of the sampled tokens.
    The models have one architecture.
    """
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    lengths = [len(completion) for completion in completions]
    divergences: list[float] = []
    for start, stop in _batches(lengths, _vocabulary(policy)):
        inputs = _inputs(policy, rows[start:stop], max(lengths[start:stop]) + 1)
        # Both are freed before the next ones are computed.
        logits = (policy(**inputs).logits, reference(**inputs).logits)
        for row, length in enumerate(lengths[start:stop]):
            # The logits at position t - 1 are the distribution of token t; rows end at the right edge.
            ours, theirs = (of_model[row, -length - 1 : -1] for of_model in logits)
            divergences.append(kl_per_token(ours, theirs, temperature).sum().item())
            del ours, theirs
        del logits
    return divergences


def kl_per_token(p: torch.Tensor, q: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return KL(p || q) in nats at each position, from logits of shape (positions, vocabulary)."""
    pieces = []
    for ours, theirs in _pieces(p, q):
        p_logs = ours.float().div(temperature).log_softmax(-1)
        q_logs = theirs.float().div(temperature).log_softmax(-1)
        pieces.append((p_logs.exp() * (p_logs - q_logs)).sum(-1))
    return torch.cat(pieces)


def largest_kl(policy: nn.Module, reference: Model, ids: Ids) -> float:
    """Return the largest KL(policy || reference) in nats over the positions of one row."""
    inputs = _inputs(policy, [ids], len(ids))
    return kl_per_token(policy(**inputs).logits[0], reference(**inputs).logits[0]).abs().max().item()


def log_probs(model: nn.Module, ids: Ids) -> torch.Tensor:
    """Return the log-probability in nats of every token but the first, given those before it; shape (tokens - 1,)."""
    logits = model(**_inputs(model, [ids], len(ids))).logits[0, :-1]
    tokens = torch.tensor(ids[1:], device=logits.device).unsqueeze(1)
    pieces = []
    for part, targets in _pieces(logits, tokens):
        pieces.append(part.float().log_softmax(-1).gather(1, targets).squeeze(1))
    return torch.cat(pieces)


def likeliest_next(model: nn.Module, prompts: Sequence[Ids]) -> list[int]:
    """Return the likeliest token after each prompt.

    Prompts of like length go through the model together, padded on the left. For the few models that read padding as
    text, such as RWKV, it is thus the likeliest token of a slightly other prompt.
    """
    limit = max(1, MAX_LOGITS // _vocabulary(model))
    if "logits_to_keep" in _parameters(model):
        limit = MAX_TOKENS
    remaining = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    tokens = [0] * len(prompts)
    while remaining:
        longest = len(prompts[remaining[-1]])
        number = max(1, limit // longest)
        batch = remaining[-number:]
        del remaining[-number:]
        logits = model(**_inputs(model, [prompts[i] for i in batch], 1)).logits[:, -1]
        for i, token in zip(batch, logits.argmax(-1).tolist(), strict=True):
            tokens[i] = token
    return tokens


def _pieces(logits: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut both tensors into pieces of few positions, so that what is computed from a piece is small."""
    step = max(1, MAX_COMPARED // logits.shape[-1])
    return zip(logits.split(step), other.split(step), strict=True)


def _inputs(model: nn.Module, rows: Sequence[Ids], number: int) -> dict[str, Any]:
    """Pad rows on the left, and ask for the logits of their last `number` positions where the model can do so."""
    device = next(model.parameters()).device
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, "left")
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    parameters = _parameters(model)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if len(rows) > 1 and ("position_ids" in parameters or takes_any):  # BLOOM counts positions by the mask
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if can_leave_out_logits(model):
        inputs["logits_to_keep"] = number
    return inputs


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return what the language model takes."""
    return inspect.signature(bare(model).forward).parameters


def _vocabulary(model: nn.Module) -> int:
    config = bare(model).config
    assert isinstance(config, PreTrainedConfig)
    return config.get_text_config().vocab_size


def _batches(lengths: Sequence[int], vocabulary: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, by their completions' lengths, whose logits stay below `MAX_LOGITS`; one row at least."""
    start = 0
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths):
            longest = max(lengths[start : stop + 1]) + 1
            if (stop + 1 - start) * longest * vocabulary > MAX_LOGITS:
                break
            stop += 1
        yield start, stop
        start = stop
