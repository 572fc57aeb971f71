"""Assert at the start and end of a stage that the right thing trains. A failed check stops the stage and says why."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from pipeline.models.loading import to_device
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject
from pipeline.training import divergence

if TYPE_CHECKING:
    from pipeline.training.trainers import TokenisedRows

NUM_COMPARED = 4  # prompts or rows on which the policy is compared with its parent and with the reference
# Rewards that rounding may leave where the reference's log-probabilities were computed earlier, in other batches: in
# float32, and per token where activations are rounded to 8 bits or 11 bits.
EXACT = 1e-4
ROUNDED = 0.05


class CheckFailed(UserError):
    """The stage would train the wrong thing, or hand on what it did not train."""


def trains_exactly(modules: Sequence[nn.Module], expected: Callable[[str], bool]) -> None:
    """Check that every parameter whose name is `expected` trains, and no other.

    Switching adapters freezes and unfreezes parameters in several releases of PEFT; a run that trains nothing, or
    the reference too, must not start.
    """
    trains = {name: p.requires_grad for module in modules for name, p in module.named_parameters()}
    frozen = [name for name in trains if expected(name) and not trains[name]]
    unexpected = [name for name in trains if trains[name] and not expected(name)]
    if frozen or unexpected or not any(trains.values()):
        missing = f"{len(frozen)} that should are frozen ({', '.join(frozen[:3])})"
        extra = f"{len(unexpected)} that should not would train ({', '.join(unexpected[:3])})"
        raise CheckFailed(f"the wrong parameters would train: {missing}, {extra}")


def fingerprint_of(parameters: Sequence[nn.Parameter]) -> list[float]:
    """Return a number for each parameter that changes when the parameter trains: the sum of its absolute values."""
    return [p.detach().abs().sum(dtype=torch.float64).item() for p in parameters]


def has_trained(before: list[float], parameters: Sequence[nn.Parameter], what: str) -> None:
    """Check that some parameter of `what` differs from its `fingerprint_of` before training."""
    if before and before == fingerprint_of(parameters):
        raise CheckFailed(f"{what}: no parameter changed during training, although all {len(before)} should train")


@torch.no_grad()
def parent_log_probs(policy: nn.Module, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Return the log-probabilities in nats that a stage's parent gives to `rows`: of every token but the first.

    `policy` is the model that will train, as it was loaded: nothing has been added to it yet. It is placed on this
    process's device.
    """
    training = policy.training
    to_device(policy)
    log_probs = [divergence.log_probs(policy, ids) for ids in rows]
    policy.train(training)
    return log_probs


@torch.no_grad()
def policy_is_parent(policy: nn.Module, rows: Sequence[list[int]], expected: Sequence[torch.Tensor]) -> None:
    """Check that the policy gives to `rows` the log-probabilities that `parent_log_probs` returned.

    An adapter that changes the weights below it when another one is added would change policy and reference alike.
    """
    training = policy.training
    policy.eval()
    moved = 0.0
    for ids, log_probs in zip(rows, expected, strict=True):
        moved = max(moved, (divergence.log_probs(policy, ids) - log_probs).abs().max().item())
    policy.train(training)
    if not moved < 1e-3:
        fault = f"log-probabilities of tokens differ by up to {moved:.4g} nats before the first update, expected 0"
        raise CheckFailed(f"the policy is not its parent: {fault}")


@torch.no_grad()
def reference_is_parent(policy: nn.Module, reference: nn.Module, rows: Sequence[list[int]]) -> float:
    """Return the largest KL of the policy to the reference on `rows`, in nats per token.

    Raises:
        CheckFailed: if it is not 0; no update may have been made yet.
    """
    training = policy.training
    policy.eval()
    largest = max(divergence.largest_kl(policy, reference, ids) for ids in rows)
    policy.train(training)
    if not largest < 1e-4:
        fault = f"KL to it is {largest:.4g} nats per token before the first update, expected 0"
        raise CheckFailed(f"the reference is not the parent: {fault}. Their weights differ")
    return largest


def _part_here(parameter: nn.Parameter) -> torch.Tensor:
    """Return the part of a parameter that this process holds; under FSDP2 and ZeRO-3 each process holds one.

    FSDP2 gives it by a method, and ZeRO-3 keeps it in an attribute.
    """
    return getattr(parameter, "ds_tensor", getattr(parameter, "to_local", parameter.detach)())


@torch.no_grad()
def finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell whether all weights of all processes are finite numbers; of split ones each process looks at its part."""
    parts = [part for part in map(_part_here, parameters) if part.numel() and not part.is_meta]
    mine = True
    if parts:
        mine = all(torch.stack([part.isfinite().all() for part in parts]).tolist())
    everywhere = gather(torch.tensor([float(mine)], device=PartialState().device))
    assert isinstance(everywhere, torch.Tensor), "a tensor is gathered into one"
    return bool(everywhere.min())


def finite_weights(name: str, parameters: Iterable[nn.Parameter]) -> None:
    """Check that the weights that stage `name` trained are finite numbers."""
    if not finite(parameters):
        fault = "its weights are no longer finite numbers, so training diverged; nothing is handed on"
        raise UserError(f"{name}: {fault}. Lower its learning rate, or train it in bf16 or fp32 rather than fp16")


def eos_in_labels(rows: Dataset, eos_token_id: int) -> None:
    """Check that eos is among the labels of the first rows, so that the policy learns to stop."""
    sample = rows.take(64)
    column = "labels" if "labels" in sample.column_names else "input_ids"
    if not any(eos_token_id in labels for labels in sample[column]):
        mend = "set tokenizer.eos_token to the token that ends an answer in the chat template"
        raise CheckFailed(f"no eos among the labels of the first rows: the policy would never learn to stop; {mend}")


def initial_loss(name: str, trainer: "TokenisedRows", what: str, figures: Sequence[str], is_rounded: bool) -> float:
    """Compute the loss of the first rows before any update, of a trainer whose reference is its parent.

    `figures` are the names of `what` (rewards, or their margins) in the trainer's log; all of them are 0 as long as
    policy and reference are equal. `is_rounded` says whether anything is computed in less than float32.

    Raises:
        CheckFailed: if a figure is not 0: the reference is not the parent.
        UserError: if the loss is no finite number.
    """
    rows = trainer.train_dataset
    size = min(len(rows), trainer.args.per_device_train_batch_size)
    batch = trainer.data_collator([rows[i] for i in range(size)])
    batch = {k: v.to(trainer.args.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    model = trainer.model
    assert model is not None
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():  # as in training
        loss = trainer.compute_loss(model, batch).item()
    model.train()
    # upstream: the trainer keeps the figures of a batch only here, until it logs them. The log must not count these.
    logged = trainer._metrics
    largest = max((abs(value) for figure in figures for value in logged["eval"].get(figure, [])), default=0.0)
    for metrics in logged.values():
        metrics.clear()
    if largest > _tolerance(trainer, batch, is_rounded):
        seen = f"{what} of {largest:.4g} before the first update, expected 0 (loss {loss:.4f})"
        raise CheckFailed(f"the reference is not the parent: {seen}")
    if not math.isfinite(loss):
        raise UserError(f"{name}: the loss of the first rows is {loss}; look at the parent's weights and `model.dtype`")
    return loss


def _tolerance(trainer: "TokenisedRows", batch: dict[str, torch.Tensor], is_rounded: bool) -> float:
    """Return how far rewards may be from 0 before the first update."""
    if not trainer.precompute_ref_logps or not is_rounded:
        return EXACT
    # Errors of single tokens are independent, so that those of a completion grow with the root of its length.
    longest = batch["completion_mask"].sum(1).max().item()
    return trainer.beta * ROUNDED * math.sqrt(2 * longest)


@torch.no_grad()
def first_token(trainer: Trainer, prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    """Look at the likeliest first token of a completion of each prompt, by the trained model.

    Returns the fields of `records.metrics.FirstToken`.
    """
    model = trainer.model
    assert model is not None
    training = model.training
    model.eval()
    tokens = divergence.likeliest_next(model, prompts)
    model.train(training)
    special = sum(token in tokenizer.all_special_ids for token in tokens) / len(tokens)
    return {"special": special, "prompts": len(tokens), "likeliest": str(tokenizer.decode(statistics.mode(tokens)))}


def finite_values(name: str, what: str, values: Sequence[float]) -> None:
    """Check that what was measured of the policy of stage `name` is finite on every completion."""
    wrong = sum(not math.isfinite(value) for value in values)
    if wrong:
        mend = "Its weights have diverged: train it again with a lower learning rate"
        raise UserError(f"{name}: its {what} is not finite on {wrong} of {len(values)} completions. {mend}")


def finite_scores(name: str, scores: Sequence[float]) -> None:
    """Check that the scores of the reward model of stage `name` are finite."""
    wrong = sum(not math.isfinite(score) for score in scores)
    if wrong:
        mend = "lower its learning rate, or train it in bf16 or fp32 rather than fp16"
        raise UserError(f"{name}: {wrong} of {len(scores)} scores of the reward model are not finite: {mend}")


def same_scores(before: Sequence[float], after: Sequence[float], tolerance: float) -> float:
    """Return the largest difference between scores of the reward model in memory and of the one read back from disk.

    Raises:
        CheckFailed: if it is larger than `tolerance`.
    """
    largest = max(abs(a - b) for a, b in zip(before, after, strict=True))
    if not largest <= tolerance:
        raise CheckFailed(f"the saved reward model scores differently when reloaded: by {largest:.4g}, expected 0")
    return largest
