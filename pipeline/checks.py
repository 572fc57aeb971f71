"""Checks at the start and end of a stage. A failed one stops the stage and names its cause."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError

NUM_FIRST = 64  # prompts whose first token is looked at


class CheckFailed(UserError):
    """The stage would train the wrong thing, or hand on what it did not train."""


def trains_exactly(modules: Sequence[nn.Module], expected: Callable[[str], bool]) -> None:
    """Every parameter whose name is `expected` trains, and no other.

    Switching adapters freezes and unfreezes parameters in several releases of PEFT; a run that trains nothing, or
    the reference too, must not start.
    """
    names = {name: p.requires_grad for module in modules for name, p in module.named_parameters()}
    frozen = [name for name, trains in names.items() if expected(name) and not trains]
    loose = [name for name, trains in names.items() if trains and not expected(name)]
    if frozen or loose or not any(names.values()):
        missing = f"{len(frozen)} that should are frozen ({', '.join(frozen[:3])})"
        extra = f"{len(loose)} that should not would train ({', '.join(loose[:3])})"
        raise CheckFailed(f"the wrong parameters would train: {missing}, {extra}")


def fingerprint_of(parameters: Sequence[nn.Parameter]) -> list[float]:
    """A number per parameter that changes when it trains."""
    return [p.detach().double().abs().sum().item() for p in parameters]


def has_trained(before: list[float], parameters: Sequence[nn.Parameter], what: str) -> None:
    if before and before == fingerprint_of(parameters):
        raise CheckFailed(f"{what}: no parameter changed during training, although all {len(before)} should train")


def reference_is_parent(policy: Any, reference: Any, rows: Sequence[list[int]], device: torch.device) -> float:
    """KL of the policy to the reference on the tokens of `rows`, in nats per token; must be 0 before any update.

    `policy` and `reference` map `input_ids` of shape (1, length) to an output with `logits`.
    """
    largest = 0.0
    with torch.no_grad():
        for ids in rows:
            inputs = {"input_ids": torch.tensor([ids], device=device)}
            p = policy(**inputs).logits.float().log_softmax(-1)
            q = reference(**inputs).logits.float().log_softmax(-1)
            largest = max(largest, (p.exp() * (p - q)).sum(-1).abs().max().item())
    if not largest < 1e-4:
        seen = f"KL to it is {largest:.4g} nats per token before the first update, expected 0"
        raise CheckFailed(f"the reference is not the parent: {seen}. Their weights differ")
    return largest


def eos_in_labels(rows: Any, eos_token_id: int) -> None:
    """The rows end with eos as a label, so that the policy learns to stop."""
    sample = rows.select(range(min(64, len(rows))))
    column = "labels" if "labels" in sample.column_names else "input_ids"
    if not any(eos_token_id in labels for labels in sample[column]):
        mend = "set tokenizer.eos_token to the token that ends an answer in the chat template"
        raise CheckFailed(f"no eos among the labels of the first rows: the policy would never learn to stop; {mend}")


@torch.no_grad()
def first_token(trainer: Any, prompts: Sequence[list[int]], tokenizer: Any) -> dict[str, Any]:
    """The likeliest first tokens of completions: the share that is special, and the most frequent of all, as text."""
    model, device = trainer.model, trainer.accelerator.device
    training = model.training
    model.eval()
    with trainer.compute_loss_context_manager():
        found = [model(input_ids=torch.tensor([ids], device=device)).logits[0, -1].argmax().item() for ids in prompts]
    model.train(training)
    special = sum(token in tokenizer.all_special_ids for token in found) / len(found)
    return {"special": special, "prompts": len(found), "likeliest": tokenizer.decode(statistics.mode(found))}


def finite_scores(name: str, scores: Sequence[float]) -> None:
    """Scores of the reward model of stage `name` are numbers."""
    wrong = sum(not math.isfinite(score) for score in scores)
    if wrong:
        mend = "lower its learning rate, or train it in bf16 or fp32 rather than fp16"
        raise UserError(f"{name}: {wrong} of {len(scores)} scores of the reward model are not finite: {mend}")


def same_scores(before: Sequence[float], after: Sequence[float], tolerance: float) -> float:
    """Scores of the reward model in memory and of the one read back from disk."""
    largest = max(abs(a - b) for a, b in zip(before, after, strict=True))
    if not largest <= tolerance:
        raise CheckFailed(f"the saved reward model scores differently when reloaded: by {largest:.4g}, expected 0")
    return largest
