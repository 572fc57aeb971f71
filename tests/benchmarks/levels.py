"""Reward models whose network carries a level per prompt: r(x, y) + delta(x), learnt from r's own scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from pipeline import manifest, scoring

Ids = list[int]  # token ids


def within_sd(scores: Sequence[Sequence[float]]) -> float:
    """SD within prompts of scores given by prompt."""
    return float(np.sqrt(np.concatenate([np.var(group, ddof=1, keepdims=True) for group in scores]).mean()))


def refit(
    model: Any,
    prompts: list[Ids],
    completions: list[list[Ids]],
    levels: Sequence[float],
    pad: int,
    *,
    steps: int,
    learning_rate: float,
    prompts_per_step: int = 16,
    completions_per_prompt: int = 2,
    seed: int = 0,
) -> None:
    """Teach a reward model the level of each prompt beside its own scores; trains `model` in place.

    The loss is the squared error in units of the within-prompt variance, of the mean over a prompt's completions and
    of what each differs from that mean by.
    """
    sequences = [[p + ids for ids in group] for p, group in zip(prompts, completions, strict=True)]
    flat = iter(scoring.score(model, [ids for group in sequences for ids in group], pad, 64))
    targets = [
        torch.tensor([next(flat) + level for _ in group]) for group, level in zip(sequences, levels, strict=True)
    ]
    scale = within_sd([target.tolist() for target in targets])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    model.eval()  # no dropout; the gradients are there all the same
    for _ in range(steps):
        taken, rows, wanted = (
            rng.choice(len(prompts), prompts_per_step, replace=len(prompts) < prompts_per_step),
            [],
            [],
        )
        for i in taken:
            for j in rng.choice(len(sequences[i]), completions_per_prompt, replace=False):
                rows.append(sequences[i][j])
                wanted.append(targets[i][j])
        found = model(**scoring.padded(rows, pad, parameters[0].device, "right")).logits[:, 0].float()
        error = ((found - torch.stack(wanted)) / scale).view(-1, completions_per_prompt)
        mean = error.mean(1, keepdim=True)
        loss = (error - mean).square().mean() + mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def install(run_dir: Path, stage: str, model: Any) -> None:
    """Put a reward model in the place of what a finished stage has put out; what was made from that is stale then."""
    record = manifest.read(run_dir).stages[stage]
    folder = run_dir / record.output.path
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    trained = get_peft_model_state_dict(model) if record.output.kind == "adapter" else model.state_dict()
    assert all(state[name].shape == trained[name].shape for name in state)
    save_file({name: trained[name].contiguous() for name in state}, file, {"format": "pt"})
    files = manifest.checksums(run_dir, [folder])
    output = record.output.model_copy(update={"files": record.output.files | files})
    manifest.commit(run_dir, stage, record.model_copy(update={"output": output}))
