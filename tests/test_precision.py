"""Every type of training stage in every precision, with TRL's default options, with LoRA and with all weights.

A cell of the table trains what it should, starts at its parent, and its output read back from disk says the same; or
the plan refuses it. The table of configs/README.md is the one that is found here.
"""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from test_equalities import run
from test_readme import README, table

from pipeline.config.lineage import place_of
from pipeline.config.load import load
from pipeline.data.encode import prompt_ids
from pipeline.models import loading, scoring
from pipeline.records import manifest
from pipeline.stages import dpo, kto, ppo, ppo_on_grpo, pretrain, reward, rloo_grpo, sft
from pipeline.system.errors import UserError
from pipeline.training import context, divergence, fit

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
# What a user writes for each precision; bf16 autocast is TRL's default, where the machine is made for it.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32, bf16 autocast": {"bf16": True},
    "bfloat16, bf16 autocast": {"dtype": "bfloat16", "bf16": True},
    "bfloat16, no autocast": {"dtype": "bfloat16", "bf16": False},
    "float32, no autocast": {"bf16": False},
    "4-bit, bf16 autocast": {"dtype": "bfloat16", "quantization": FOUR_BIT, "bf16": True},
}
WEIGHTS = {"LoRA": tiny.LORA, "all": None}
ON_GRPO = "ppo-on-grpo"  # PPO by the other trainer, which trains adapters alone
CHAIN = ("pretrain", "sft", "reward", "ppo", ON_GRPO, "rloo", "grpo", "dpo", "kto", "shift", "evaluate")
TRAINED = CHAIN[:-2]
ONLINE = {"max_completion_length": 8, "num_generations": 4, "beta": 0.04}
STAGES = {
    "pretrain": {"data": "texts", "training": {"max_length": 32}},
    "sft": tiny.SFT | {"init": "pretrain"},
    "reward": tiny.REWARD | {"eval_data": "held_out"},
    "ppo": tiny.PPO,
    ON_GRPO: tiny.PPO | {"type": "ppo", "trainer": "grpo"},
    "rloo": {"data": "demonstrations", "training": ONLINE},
    "grpo": {"data": "demonstrations", "training": ONLINE},
    "dpo": tiny.DPO,
    "kto": {"data": "unpaired"},
    "shift": {"data": "held_out", "policy": "sft", "max_new_tokens": 8},
    "evaluate": {"data": "held_out", "max_new_tokens": 8},
}


def chain_of(weights: str) -> list[str]:
    """The stages that train such weights."""
    return [name for name in CHAIN if name != ON_GRPO or weights == "LoRA"]


def make_run(folder: Path, weights: str, precision: dict[str, Any]) -> Path:
    """A run of all stages whose options are TRL's but for sizes, the learning rate and the precision."""
    own = {"use_cpu": True, "max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    if "bf16" in precision:
        own["bf16"] = precision["bf16"]
    stages = {name: stage for name, stage in STAGES.items() if name in chain_of(weights)}
    path = tiny.make_run(folder, stages, lora=WEIGHTS[weights], training=own | {"logging_steps": 1})
    tiny.write_rows(folder / "texts.jsonl", [{"text": row["chosen"]} for row in tiny.comparisons()])
    held_out = [row | {"prompt": f"Once more: {row['prompt']}"} for row in tiny.comparisons()]
    tiny.write_rows(folder / "held_out.jsonl", held_out)
    good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in tiny.comparisons()]
    bad = [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in tiny.comparisons()]
    tiny.write_rows(folder / "unpaired.jsonl", [*good, *bad])
    names = ("comparisons", "demonstrations", "unpaired", "texts", "held_out")
    changes = {"data": {name: {"path": f"{name}.jsonl"} for name in names}}
    changes["model"] = {"path": "model", "dtype": precision.get("dtype", "float32")}
    if "quantization" in precision:
        changes["quantization"] = precision["quantization"]
    tiny.edit(path, changes)
    return path


class Kept:
    """The models of the last stage that was run, as they were when its training had ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.model: Any = None
        self.before: dict[str, torch.Tensor] = {}
        for module in (pretrain, sft, reward, rloo_grpo, dpo, kto):
            monkeypatch.setattr(module, "fit", functools.partial(self._fit, fit.fit))
        for module in (ppo, ppo_on_grpo):
            monkeypatch.setattr(module, "train_checked", functools.partial(self._train, module.train_checked))

    def _remember(self, model: Any) -> None:
        self.model = model
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def _fit(self, original: Any, ctx: Any, trainer: Any, *args: Any, **metrics: Any) -> context.Result:
        self._remember(trainer.model)
        result = original(ctx, trainer, *args, **metrics)
        self.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        return result

    def _train(self, original: Any, ctx: Any, made: Any, *args: Any) -> float:
        self._remember(made.policy)
        self.value_head = made.value.score
        self.value_before = made.value.score.weight.detach().clone()
        return original(ctx, made, *args)


@pytest.fixture
def kept(monkeypatch):
    return Kept(monkeypatch)


def check_trained(kept: Kept, name: str) -> None:
    """What trained is float32 but for full weights in bfloat16, and it moved; heads in every element."""
    after = dict(kept.model.named_parameters())
    moved = [name for name, weight in kept.before.items() if not torch.equal(weight, after[name])]
    if isinstance(kept.model, PeftModel):
        assert all(after[name].dtype == torch.float32 for name in kept.before), name
        # The policy's half of PPO's adapters is as large as the value model's.
        assert len(moved) == len(kept.before), name
    assert len(moved) > 0.9 * len(kept.before), name
    heads = [(kept.before[key], after[key]) for key in kept.before if "score" in key]
    if name in ("ppo", ON_GRPO):
        heads.append((kept.value_before, kept.value_head.weight))
    assert len(heads) == (name in ("reward", "ppo", ON_GRPO))
    for old, new in heads:
        assert new.dtype == torch.float32
        assert (old != new).float().mean() > 0.99, name


def check_read_back(kept: Kept, config: Any, ctx: context.StageContext, name: str) -> None:
    """The output says what the model in memory says, to the last digit."""
    weights = ctx.weights(place_of(config, name))
    texts = [prompt_ids(ctx.tokenizer, [{"role": "user", "content": f"Tell me about {t}."}]) for t in tiny.TOPICS[:4]]
    kept.model.eval()
    if name == "reward":
        read = loading.load_reward(ctx.loader, weights)
        assert scoring.score(read, texts, 0) == scoring.score(kept.model, texts, 0)
        return
    read = loading.load_policy(ctx.loader, weights)
    with torch.no_grad():
        for ids in texts:
            assert torch.equal(divergence.log_probs(read, ids), divergence.log_probs(kept.model, ids)), name


def check_stage(found: manifest.Record) -> None:
    """It started at its parent, and the reward model read back from disk scored the same."""
    expected = {
        "ppo": ("initial_kl", 0),
        "rloo": ("initial_kl", 0),
        "grpo": ("initial_kl", 0),
        "dpo": ("initial_loss", pytest.approx(math.log(2), abs=1e-6)),
        "kto": ("initial_loss", 0.5),
        "reward": ("reload_difference", 0),
    }
    if found.type in expected:
        metric, value = expected[found.type]
        assert found.metrics[metric] == value, found.type
    if found.type == "evaluate":
        assert found.metrics["policies"]["sft"]["kl"] == 0


def run_all(path: Path, kept: Kept, contexts: list[context.StageContext]) -> dict[str, str]:
    """Run every stage and check it; what the table says of each."""
    config = load(path)
    for name in config.stages:
        found = run(path, name).stages[name]
        manifest.verify(config.run_path, name, found)
        check_stage(found)
        if name in TRAINED:
            check_trained(kept, name)
            check_read_back(kept, config, contexts[-1], name)
    return dict.fromkeys(CHAIN, "refused") | dict.fromkeys(config.stages, "yes")


def refusals(error: UserError) -> dict[str, str]:
    """What the table says of stages that the config refuses: of the training ones, all."""
    lines = str(error).splitlines()[1:]
    reasons = {}
    for name in chain_of("all")[:-2]:
        (line,) = (line for line in lines if f": stages.{name}.lora: " in line)
        reasons[name] = line.partition(f"stages.{name}.lora: ")[2]
    assert len(set(reasons.values())) == 1
    return dict.fromkeys(TRAINED, "refused") | {"why": reasons["sft"].partition(";")[0]}


def in_readme(precision: str, weights: str, found: dict[str, str]) -> str:
    """The row of a precision, as configs/README.md has it."""
    cells = [precision, weights, *(found.get(name, "-") for name in CHAIN), found.get("why", "")]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_stage_in_every_precision(tmp_path, monkeypatch, kept, precision, weights):
    contexts: list[context.StageContext] = []
    init = context.StageContext.__init__

    def made(self, *values, **named):
        init(self, *values, **named)
        contexts.append(self)

    monkeypatch.setattr(context.StageContext, "__init__", made)
    path = make_run(tmp_path, weights, PRECISIONS[precision])
    try:
        found = run_all(path, kept, contexts)
    except UserError as error:
        found = refusals(error)
    row = in_readme(precision, weights, found)
    assert row in README.splitlines(), f"the README files have no such row:\n{row}"


def test_the_table_has_no_other_rows():
    rows = table("precision")
    assert [(row[0], row[1]) for row in rows] == [(p, w) for p in PRECISIONS for w in WEIGHTS]
