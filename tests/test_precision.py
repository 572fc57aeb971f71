"""Every type of training stage in every precision, with TRL's default options, with LoRA and with all weights.

A cell of the table trains what it should, starts at its parent, and its output read back from disk says the same; or
the plan refuses it. The README's table is the one that is found here.
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

from pipeline import context, divergence, fit, manifest, models, scoring
from pipeline.config import load
from pipeline.data.encode import prompt_ids
from pipeline.errors import UserError
from pipeline.lineage import place_of
from pipeline.stages import dpo, online, ppo, pretrain, reward, sft

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
# What a user writes for each precision; TRL's own default is bf16 autocast.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32 weights, bf16 autocast": {},
    "bfloat16 weights, bf16 autocast": {"dtype": "bfloat16"},
    "bfloat16 weights, no autocast": {"dtype": "bfloat16", "bf16": False},
    "float32 weights, no autocast": {"bf16": False},
    "4-bit base, bf16 autocast": {"dtype": "bfloat16", "quantization": FOUR_BIT},
}
WEIGHTS = {"LoRA": tiny.LORA, "all": None}
CHAIN = ("pretrain", "sft", "reward", "ppo", "rloo", "grpo", "dpo", "shift", "evaluate")
TRAINED = CHAIN[:-2]
ONLINE = {"max_completion_length": 8, "num_generations": 4, "beta": 0.04}
STAGES = {
    "pretrain": {"data": "texts", "training": {"max_length": 32}},
    "sft": tiny.SFT | {"init": "pretrain"},
    "reward": tiny.REWARD | {"eval_data": "held_out"},
    "ppo": tiny.PPO,
    "rloo": {"data": "demonstrations", "training": ONLINE},
    "grpo": {"data": "demonstrations", "training": ONLINE},
    "dpo": tiny.DPO,
    "shift": {"data": "held_out", "policy": "sft", "max_new_tokens": 8},
    "evaluate": {"data": "held_out", "max_new_tokens": 8},
}


def make_run(folder: Path, weights: str, precision: dict[str, Any]) -> Path:
    """A run of all stages whose options are TRL's but for sizes, the learning rate and the precision."""
    own = {"use_cpu": True, "max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    if "bf16" in precision:
        own["bf16"] = precision["bf16"]
    path = tiny.make_run(folder, STAGES, lora=WEIGHTS[weights], training=own | {"logging_steps": 1})
    tiny.write_rows(folder / "texts.jsonl", [{"text": row["chosen"]} for row in tiny.comparisons()])
    held_out = [row | {"prompt": f"Once more: {row['prompt']}"} for row in tiny.comparisons()]
    tiny.write_rows(folder / "held_out.jsonl", held_out)
    names = ("comparisons", "demonstrations", "texts", "held_out")
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
        for module in (pretrain, sft, reward, online, dpo):
            monkeypatch.setattr(module, "fit", functools.partial(self._fit, fit.fit))
        monkeypatch.setattr(ppo, "_train", functools.partial(self._train, ppo._train))

    def _remember(self, model: Any) -> None:
        self.model = model
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def _fit(self, original: Any, ctx: Any, trainer: Any, *args: Any, **metrics: Any) -> context.Result:
        self._remember(trainer.model)
        result = original(ctx, trainer, *args, **metrics)
        self.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        return result

    def _train(self, original: Any, ctx: Any, trainer: Any, made: Any, *args: Any) -> float:
        self._remember(made.policy)
        self.value_head = made.value.score
        self.value_before = made.value.score.weight.detach().clone()
        return original(ctx, trainer, made, *args)


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
    if name == "ppo":
        heads.append((kept.value_before, kept.value_head.weight))
    assert len(heads) == (name in ("reward", "ppo"))
    for old, new in heads:
        assert new.dtype == torch.float32
        assert (old != new).float().mean() > 0.99, name


def check_read_back(kept: Kept, config: Any, ctx: context.StageContext, name: str) -> None:
    """The output says what the model in memory says, to the last digit."""
    weights = ctx.weights(place_of(config, name))
    texts = [prompt_ids(ctx.tokenizer, [{"role": "user", "content": f"Tell me about {t}."}]) for t in tiny.TOPICS[:4]]
    kept.model.eval()
    if name == "reward":
        read = models.load_reward(ctx.loader, weights)
        assert scoring.score(read, texts, 0) == scoring.score(kept.model, texts, 0)
        return
    read = models.load_policy(ctx.loader, weights)
    with torch.no_grad():
        for ids in texts:
            assert torch.equal(divergence.log_probs(read, ids), divergence.log_probs(kept.model, ids)), name


def cells(folder: Path, weights: str, precision: str, kept: Kept, capture: Any) -> dict[str, str]:
    """What becomes of each type of stage: `yes`, or why the plan refuses it."""
    path = make_run(folder, weights, PRECISIONS[precision])
    try:
        config = load(path)
    except UserError as error:
        lines = str(error).splitlines()[1:]
        refused = {name: next((line for line in lines if f"stages.{name}." in line), "") for name in TRAINED}
        assert all(refused.values()), error
        return {name: f"refused: {line.rpartition(': ')[2]}" for name, line in refused.items()}
    for name in CHAIN:
        found = run(path, name).stages[name]
        manifest.verify(config.run_path, name, found)
        ctx = capture[-1]
        if name in TRAINED:
            check_trained(kept, name)
            check_read_back(kept, config, ctx, name)
        if name in ("ppo", "rloo", "grpo"):
            assert found.metrics["initial_kl"] == 0
        if name == "dpo":
            assert found.metrics["initial_loss"] == pytest.approx(math.log(2), abs=1e-6)
        if name == "reward":
            assert found.metrics["reload_difference"] == 0
        if name == "evaluate":
            assert found.metrics["policies"]["sft"]["kl"] == 0
    return dict.fromkeys(CHAIN, "yes")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_stage_in_every_precision(tmp_path, monkeypatch, kept, precision, weights):
    contexts: list[context.StageContext] = []
    init = context.StageContext.__init__
    monkeypatch.setattr(context.StageContext, "__init__", lambda self, *a: (init(self, *a), contexts.append(self))[0])
    found = cells(tmp_path, weights, precision, kept, contexts)
    print(found)
