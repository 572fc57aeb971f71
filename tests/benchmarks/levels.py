"""Reward models whose network carries a level per prompt: r(x, y) + delta(x), learnt from r's own scores.

    python tests/benchmarks/levels.py CONFIG RUN_DIR --size 10

puts such a reward model in the place of the one that the run's `reward` stage has put out. It is refitted in rounds,
until its scores of other completions correlate with r's within prompts by 0.9. Prints what it has learnt: that
correlation (`within`), the one of what it adds per prompt with delta (`level`), the SD of what it adds (`size`) and of
its scores within prompts (`within_sd`), both in within-prompt SDs of r, and the number of rounds.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from pipeline import stage
from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.data.encode import prompt_ids
from pipeline.models import scoring
from pipeline.models.generation import Sampling
from pipeline.models.loading import load_reward
from pipeline.records import manifest
from pipeline.system import digests
from pipeline.training.completions import completions
from pipeline.training.context import StageContext

Ids = list[int]  # token ids
ENOUGH = 0.9  # correlation with r within prompts


def within_sd(scores: Sequence[Sequence[float]]) -> float:
    """SD within prompts of scores given by prompt."""
    return float(np.sqrt(np.concatenate([np.var(group, ddof=1, keepdims=True) for group in scores]).mean()))


def of_last_word(prompts: Sequence[str], seed: int) -> np.ndarray:
    """delta(x) of each prompt: a normal number for its last word, with mean 0 and SD 1 over the prompts."""
    words = [re.findall(r"\w+", prompt.lower())[-1] for prompt in prompts]
    rng = np.random.default_rng(seed)
    number = {word: rng.normal() for word in sorted(set(words))}
    levels = np.array([number[word] for word in words])
    return (levels - levels.mean()) / levels.std()


def targets_of(
    model: Any, prompts: list[Ids], completions: list[list[Ids]], levels: Sequence[float], pad: int
) -> list[torch.Tensor]:
    """A reward model's scores of each prompt's completions, with the level of the prompt added."""
    sequences = [p + ids for p, group in zip(prompts, completions, strict=True) for ids in group]
    scores = iter(scoring.score(model, sequences, pad, 64))
    pairs = zip(completions, levels, strict=True)
    return [torch.tensor([next(scores) + float(level) for _ in group]) for group, level in pairs]


def refit(
    model: Any,
    prompts: list[Ids],
    completions: list[list[Ids]],
    targets: list[torch.Tensor],
    pad: int,
    *,
    steps: int,
    learning_rate: float,
    prompts_per_step: int = 16,
    completions_per_prompt: int = 2,
    head_rate: float = 1.0,
    beta2: float = 0.999,
    seed: int = 0,
) -> None:
    """Teach a reward model these scores of its prompts' completions; trains `model` in place.

    The loss is the squared error in units of the within-prompt variance, of the mean over a prompt's completions and
    of what each differs from that mean by. The score head learns at `head_rate` times the learning rate; `beta2` is
    Adam's.
    """
    sequences = [[p + ids for ids in group] for p, group in zip(prompts, completions, strict=True)]
    scale = within_sd([target.tolist() for target in targets])
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    rates = [learning_rate * (head_rate if "score" in name else 1) for name, _ in named]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, beta2))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    model.eval()  # no dropout; the gradients are there all the same
    for _ in range(steps):
        taken = rng.choice(len(prompts), prompts_per_step, replace=len(prompts) < prompts_per_step)
        rows: list[Ids] = []
        wanted: list[torch.Tensor] = []
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
    files = digests.checksums(run_dir, [folder])
    output = record.output.model_copy(update={"files": record.output.files | files})
    manifest.commit(run_dir, stage, record.model_copy(update={"output": output}))


def learnt(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], delta: np.ndarray) -> dict[str, float]:
    """How much of r and of delta is in the scores `after`, from those `before`, both by prompt."""
    old, new = np.array(before), np.array(after)
    within = [(scores - scores.mean(1, keepdims=True)).ravel() for scores in (old, new)]
    added = new.mean(1) - old.mean(1)
    return {
        "within": float(np.corrcoef(*within)[0, 1]),
        "level": float(np.corrcoef(added, delta)[0, 1]),
        "size": float(added.std() / within_sd(before)),
        "within_sd": within_sd(after) / within_sd(before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("run_dir")
    parser.add_argument("--size", type=float, required=True, help="SD of the level, in within-prompt SDs of the score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", default=["sft"], help="stages whose completions it is refitted on")
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--steps", type=int, default=1400, help="of a round")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    PartialState(cpu=True)
    config = load(args.config, (f"run_dir={args.run_dir}", f"seed={args.seed}"))
    tokenizer = run_tokenizer.open_saved(config.run_path / "tokenizer")
    ctx = StageContext(config, "reward", tokenizer, "", stage._loader(config, tokenizer), "")
    data = Path(config.resolve(config.data["prompts"].path))
    texts = list(dict.fromkeys(json.loads(line)["prompt"] for line in data.read_text().splitlines()))
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    options = config.stages["ppo"].training if "ppo" in config.stages else {}
    sampling = Sampling(options.get("temperature", 1.0), options.get("response_length", 48), 64, args.seed)
    drawn: list[list[Ids]] = [[] for _ in prompts]
    fresh: list[list[Ids]] = [[] for _ in prompts]
    for policy in args.policies:
        for number, of_prompt in enumerate(completions(ctx, policy, prompts, sampling, 16)):
            drawn[number] += of_prompt[:14]
            fresh[number] += of_prompt[14:]
    reward = load_reward(ctx.loader, ctx.weights_of("reward"), trainable=True)
    pad = tokenizer.pad_token_id

    def scores_of(completions_of: list[list[Ids]]) -> list[list[float]]:
        sequences = [p + ids for p, group in zip(prompts, completions_of, strict=True) for ids in group]
        scores = iter(scoring.score(reward, sequences, pad, 64))
        return [[next(scores) for _ in group] for group in completions_of]

    before = scores_of(fresh)
    delta = of_last_word(texts, args.seed)
    targets = targets_of(reward, prompts, drawn, delta * args.size * within_sd(before), pad)
    found: dict[str, float] = {}
    for number in range(args.rounds):
        refit(
            reward,
            prompts,
            drawn,
            targets,
            pad,
            steps=args.steps,
            learning_rate=args.learning_rate / (2 if number else 1),
            prompts_per_step=16,
            completions_per_prompt=4,
            head_rate=5.0,
            beta2=0.99,
            seed=number,
        )
        found = learnt(before, scores_of(fresh), delta) | {"rounds": number + 1}
        if found["within"] >= ENOUGH:
            break
    install(config.run_path, "reward", reward)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
