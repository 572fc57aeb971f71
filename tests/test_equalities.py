"""What a stage does against something independent: bare TRL, separate models, a new process, an uninterrupted run."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from pipeline import stage
from pipeline.config.load import load
from pipeline.config.stage_types import config_class
from pipeline.models import scoring
from pipeline.models.loading import Loader, Weights, continue_policy, load_reward, merge
from pipeline.models.ppo import Models, shared_models
from pipeline.records import manifest
from pipeline.show import results
from pipeline.stages import ppo
from pipeline.system import digests
from pipeline.system.errors import UserError
from pipeline.training import assertions, checkpoints, divergence
from pipeline.training.trainers import ppo_trainer_class

QUANTISED = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


def run(config_path: Path, *stages: str) -> manifest.Manifest:
    config = load(config_path)
    for name in stages:
        stage.run(config, name)
    return manifest.read(config.run_path)


def losses(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "run" / name / "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def bare_losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def bare_args(config_class, folder: Path, **options):
    return config_class(output_dir=str(folder / "bare"), report_to="none", seed=0, **(tiny.TRAINING | options))


def causal(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


@pytest.mark.parametrize("lora", [tiny.LORA, None], ids=["lora", "full"])
def test_sft_is_bare_trl(tmp_path, lora):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT}, lora=lora)
    run(path, "sft")
    set_seed(0)
    trainer = SFTTrainer(
        model=causal(tmp_path),
        args=bare_args(SFTConfig, tmp_path),
        train_dataset=Dataset.from_list(tiny.conversational(tiny.demonstrations())),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
        peft_config=LoraConfig(**lora, task_type="CAUSAL_LM") if lora else None,
    )
    expected = bare_losses(trainer)
    assert len(expected) == 4 and expected[0] != expected[-1]
    np.testing.assert_allclose(losses(tmp_path, "sft"), expected, atol=1e-6)


def test_reward_is_bare_trl(tmp_path):
    path = tiny.make_run(tmp_path, {"reward": tiny.REWARD | {"init": "base"}})
    run(path, "reward")
    trainer = RewardTrainer(
        model=str(tmp_path / "model"),
        args=bare_args(RewardConfig, tmp_path, max_length=64),
        train_dataset=Dataset.from_list(tiny.conversational(tiny.comparisons())),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
        peft_config=LoraConfig(**tiny.LORA, task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    expected = bare_losses(trainer)
    assert expected[0] != expected[-1]
    np.testing.assert_allclose(losses(tmp_path, "reward"), expected, atol=1e-6)


@pytest.mark.parametrize("lora", [tiny.LORA, None], ids=["lora", "full"])
def test_dpo_is_bare_trl(tmp_path, lora):
    path = tiny.make_run(tmp_path, {"dpo": tiny.DPO | {"init": "base"}}, lora=lora)
    run(path, "dpo")
    set_seed(0)
    trainer = DPOTrainer(
        model=causal(tmp_path),
        ref_model=None if lora else causal(tmp_path),
        args=bare_args(DPOConfig, tmp_path, max_length=64, beta=0.1),
        train_dataset=Dataset.from_list(tiny.conversational(tiny.comparisons())),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
        peft_config=LoraConfig(**lora, task_type="CAUSAL_LM") if lora else None,
    )
    expected = bare_losses(trainer)
    assert expected[0] != expected[-1]
    np.testing.assert_allclose(losses(tmp_path, "dpo"), expected, atol=1e-6)


@pytest.mark.parametrize("quantization", [None, QUANTISED], ids=["plain", "4bit"])
def test_first_dpo_loss_from_an_sft_adapter_is_ln_2(tmp_path, quantization):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "dpo": tiny.DPO}, quantization=quantization)
    recorded = run(path, "sft", "dpo")
    assert recorded.stages["dpo"].metrics["initial_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trained = losses(tmp_path, "dpo")
    assert trained[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trained[-1] < trained[0]


def test_quantised_stages_never_merge(tmp_path, monkeypatch):
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, "dpo": tiny.DPO, "ppo": tiny.PPO}
    path = tiny.make_run(tmp_path, stages, quantization=QUANTISED)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda *_, **__: pytest.fail("merged"), raising=False)
    recorded = run(path, "sft", "reward", "dpo", "ppo")
    for name, record in recorded.stages.items():
        assert (record.output.kind, record.output.full) == ("adapter", None), name
    assert not list((tmp_path / "run").rglob("merged"))
    loader = Loader(base="model", quantization=QUANTISED)
    with pytest.raises(AssertionError, match="quantised"):
        merge(loader, Weights("model", "adapter"), tmp_path / "merged", None)


def test_lora_of_another_shape_merges_and_reloads(tmp_path):
    other = tiny.LORA | {"r": 8}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "dpo": tiny.DPO | {"lora": other}})
    recorded = run(path, "sft", "dpo")
    assert recorded.stages["dpo"].output.full == "dpo/merged"
    assert recorded.stages["dpo"].metrics["initial_loss"] == pytest.approx(math.log(2), abs=1e-6)
    ids = torch.tensor([[5, 9, 33, 60]])
    sft = PeftModel.from_pretrained(causal(tmp_path), tmp_path / "run" / "sft" / "output")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "dpo" / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(ids).logits, sft(ids).logits, atol=1e-5, rtol=1e-5)


def test_reward_starts_from_the_sft_adapter(tmp_path):
    still = {"training": {"max_length": 64, "max_steps": 1, "learning_rate": 1e-12}}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "reward": tiny.REWARD | still})
    run(path, "sft", "reward")
    sft, reward = (
        load_file(tmp_path / "run" / name / "output" / "adapter_model.safetensors") for name in ("sft", "reward")
    )
    assert set(reward) - set(sft) == {"base_model.model.score.weight"}
    for name, weight in sft.items():
        torch.testing.assert_close(reward[name], weight)


SCORER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
model.config.pad_token_id = 0
with torch.no_grad():
    print(json.dumps([model(input_ids=torch.tensor([row])).logits[0, 0].item() for row in ids]))
"""


def test_reward_scores_are_equal_in_a_new_process(tmp_path):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "reward": tiny.REWARD})
    recorded = run(path, "sft", "reward")
    assert recorded.stages["reward"].metrics["reload_difference"] <= 1e-6
    base, adapter = tmp_path / "model", tmp_path / "run" / "reward" / "output"
    ids = [[2, 40, 50, 60, 3, 77, 1], [2, 90, 3, 80, 81, 1]]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        here = [model(input_ids=torch.tensor([row])).logits[0, 0].item() for row in ids]
    there = subprocess.run(
        [sys.executable, "-c", SCORER, str(base), str(adapter), json.dumps(ids)],
        capture_output=True,
        text=True,
        check=True,
    )
    np.testing.assert_allclose(json.loads(there.stdout.splitlines()[-1]), here, atol=1e-6)
    assert here[0] != here[1]


@pytest.mark.parametrize(
    ("lora", "pad", "dtype", "quantization"),
    [
        (tiny.LORA, "eos", "float32", None),
        (tiny.LORA, None, "float32", None),
        (None, "eos", "float32", None),
        (tiny.LORA, "eos", "bfloat16", None),
        (tiny.LORA, "eos", "float32", QUANTISED),
    ],
)
def test_the_shown_code_gives_the_scores_of_the_run(tmp_path, lora, pad, dtype, quantization):
    """Of a batch too, whose shorter row is padded, and where the base's pad token is its eos, or where it has none."""
    path = tiny.make_run(
        tmp_path,
        {"reward": tiny.REWARD | {"init": "base"}},
        lora=lora,
        model={"path": "model", "dtype": dtype},
        quantization=quantization,
    )
    shipped = json.loads((tmp_path / "model" / "config.json").read_text())
    pad_token_id = shipped["eos_token_id"] if pad == "eos" else None
    (tmp_path / "model" / "config.json").write_text(json.dumps(shipped | {"pad_token_id": pad_token_id}))
    recorded = run(path, "reward")
    output = tmp_path / "run" / "reward" / "output"
    shown: dict = {}
    exec(results.snippet(tmp_path / "run", recorded, recorded.stages["reward"]), shown)
    tokenizer, texts = shown["tokenizer"], ["Tell me about tea.<eos>", "I like rain because it is good.<eos>"]
    with torch.no_grad():
        here = shown["model"].eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    loader = Loader(
        base=str(tmp_path / "model"), dtype=dtype, quantization=quantization, pad_token_id=tokenizer.pad_token_id
    )
    weights = Weights(str(tmp_path / "model"), str(output)) if lora else Weights(str(output))
    ids = tokenizer(texts)["input_ids"]
    assert len(ids[0]) < len(ids[1]) and ids[0][-1] == tokenizer.eos_token_id
    model = load_reward(loader, weights)
    there = [scoring.score(model, [row], tokenizer.pad_token_id)[0] for row in ids]
    # On a CPU bitsandbytes has a kernel of its own for 4-bit weights that are not trained, which rounds to bf16.
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-2 if quantization else 1e-6)


def four_separate_models(base: Path, parent: Path, reward: Path) -> Models:
    """PPO's four models as plain PEFT models, each on a base of its own."""

    def policy(trainable: bool):
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), parent, is_trainable=trainable
        )

    def score(trainable: bool):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        return PeftModel.from_pretrained(model, reward, is_trainable=trainable)

    return Models(policy(True), policy(False), score(False), score(True))


def ppo_metrics(models: Models, tokenizer, folder: Path, gradient_checkpointing: bool) -> list[dict[str, float]]:
    options = (
        tiny.TRAINING | {"max_steps": -1} | tiny.PPO["training"] | {"gradient_checkpointing": gradient_checkpointing}
    )
    args = config_class("ppo")(
        output_dir=str(folder), report_to="none", seed=0, stop_token="eos", save_strategy="no",
        num_sample_generations=0, missing_eos_penalty=1.0, **options,
    )  # fmt: skip
    if gradient_checkpointing:
        for model in {id(m): m for m in (models.policy, models.value) if hasattr(m, "peft_config")}.values():
            model.gradient_checkpointing_enable()
    rows = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            for row in tiny.conversational(tiny.demonstrations())]  # fmt: skip
    prompts = Dataset.from_dict({"input_ids": rows})
    set_seed(0)
    trainer = ppo_trainer_class()(
        args=args, processing_class=tokenizer, model=models.policy, ref_model=models.reference,
        reward_model=models.reward, value_model=models.value, train_dataset=prompts, eval_dataset=prompts,
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    ppo.one_step_per_accumulation(trainer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "objective/kl" in entry]


@pytest.fixture(scope="module")
def sft_and_reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    run(tiny.make_run(folder, {"sft": tiny.SFT, "reward": tiny.REWARD}), "sft", "reward")
    return folder


def test_an_adapter_names_its_base_wherever_it_is_loaded_from(sft_and_reward):
    """The config says `model`, beside itself; PEFT would look that up in the working directory."""
    for name in ("sft", "reward"):
        config = json.loads((sft_and_reward / "run" / name / "output" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(sft_and_reward / "model")


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_shared_backbone_ppo_is_four_separate_models(sft_and_reward, tmp_path, gradient_checkpointing):
    base, outputs = sft_and_reward / "model", sft_and_reward / "run"
    parent, reward = outputs / "sft" / "output", outputs / "reward" / "output"
    tokenizer = AutoTokenizer.from_pretrained(outputs / "tokenizer", padding_side="left")
    loader = Loader(base=str(base), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    policy = continue_policy(loader, Weights(str(base), str(parent)), tiny.LORA, 0)
    shared = shared_models(policy, Weights(str(base), str(reward)))
    before = {name: p.detach().clone() for name, p in shared.policy.named_parameters()}
    heads = [copy.deepcopy(view.score.weight) for view in (shared.reward, shared.value)]
    separate = four_separate_models(base, parent, reward)
    separate.policy.generation_config.pad_token_id = tokenizer.pad_token_id

    ours = ppo_metrics(shared, tokenizer, tmp_path / "shared", gradient_checkpointing)
    theirs = ppo_metrics(separate, tokenizer, tmp_path / "separate", gradient_checkpointing)

    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for key in (key for key in b if "/" in key):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
    assert ours[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    changed = {name for name, p in shared.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".default." in name or ".value." in name}
    assert torch.equal(shared.reward.score.weight, heads[0])
    assert not torch.equal(shared.value.score.weight, heads[1])


def test_full_ppo_trains_policy_and_critic(tmp_path):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": tiny.PPO}, lora=None)
    recorded = run(path, "sft", "reward", "ppo")
    record = recorded.stages["ppo"]
    assert record.output.kind == "full"
    assert record.metrics["initial_kl"] == pytest.approx(0, abs=1e-6)
    sft, policy = (load_file(tmp_path / "run" / name / "output" / "model.safetensors") for name in ("sft", "ppo"))
    assert any(not torch.equal(policy[name], sft[name]) for name in sft)


def test_ppo_refuses_a_critic_that_cannot_learn(sft_and_reward):
    merged = get_peft_model(causal(sft_and_reward), LoraConfig(**tiny.LORA)).merge_and_unload()
    assert not any(p.requires_grad for p in merged.parameters())  # the trap: a merged model trains nothing
    with pytest.raises(UserError, match="frozen"):
        assertions.trains_exactly([merged], lambda name: True)


def test_the_held_out_loss_before_training_is_the_parents(tmp_path):
    """Not that of the first training steps: how often it is logged does not matter."""
    stages = {name: spec | {"eval_data": name} for name, spec in {"sft": tiny.SFT, "dpo": tiny.DPO}.items()}
    held_out = {"sft": tiny.demonstrations()[:5], "dpo": tiny.comparisons()[:5]}
    path = tiny.make_run(tmp_path, stages, training=tiny.TRAINING | {"logging_steps": 4})
    for name, rows in held_out.items():
        tiny.write_rows(tmp_path / f"{name}.jsonl", [row | {"prompt": f"{row['prompt']} Well?"} for row in rows])
    data = {name: {"path": f"{name}.jsonl"} for name in ("comparisons", "demonstrations", *stages)}
    tiny.edit(path, {"data": data})
    found = {name: record.metrics for name, record in run(path, *stages).stages.items()}
    assert found["dpo"]["initial_eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    rows = [row | {"prompt": f"{row['prompt']} Well?"} for row in held_out["sft"]]
    trainer = SFTTrainer(
        model=causal(tmp_path),
        args=bare_args(SFTConfig, tmp_path),
        train_dataset=Dataset.from_list(tiny.conversational(rows)),
        eval_dataset=Dataset.from_list(tiny.conversational(rows)),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    assert found["sft"]["initial_eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
    assert found["sft"]["eval_loss"] < found["sft"]["initial_eval_loss"]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_weights_that_are_no_numbers_are_not_handed_on(tmp_path, name):
    """TRL logs a loss of 0.0 for NaN, and a NaN counts as a weight that has changed."""
    spec = {"sft": tiny.SFT, "reward": tiny.REWARD, "dpo": tiny.DPO}[name]
    diverging = spec | {"init": "base", "training": spec.get("training", {}) | {"learning_rate": 1e38}}
    path = tiny.make_run(tmp_path, {name: diverging})
    with pytest.raises(UserError, match=f"{name}: its weights are no longer finite numbers.* Lower its learning rate"):
        run(path, name)
    assert name not in manifest.read(tmp_path / "run").stages


@pytest.mark.parametrize("measure", ["KL to sft", "scores of the reward model"])
def test_an_evaluation_with_figures_that_are_no_numbers(tmp_path, monkeypatch, measure):
    evaluate = {"data": "held_out", "policies": [], "max_new_tokens": 4, "num_prompts": 2}
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, "evaluate": evaluate}
    path = tiny.make_run(tmp_path, stages)
    tiny.write_rows(tmp_path / "held_out.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    names = ("comparisons", "demonstrations", "held_out")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    run(path, "sft", "reward")
    module, function = (divergence, "kl_of_completions") if measure == "KL to sft" else (scoring, "score")
    monkeypatch.setattr(module, function, lambda *_: [math.nan, 0.0])
    with pytest.raises(UserError, match=rf"{measure} (is|are) not finite|1 of 2 {measure} are not finite"):
        run(path, "evaluate")
    assert "evaluate" not in manifest.read(tmp_path / "run").stages


def test_an_evaluation_holds_the_base_once(tmp_path, monkeypatch):
    """Its policies are adapters on one base; one that has weights of its own takes the room of a second model."""
    evaluate = {"data": "held_out", "policies": ["sft", "dpo", "full"], "max_new_tokens": 4, "num_prompts": 2}
    training = {"max_steps": 1}
    stages = {
        "sft": tiny.SFT | {"training": training},
        "dpo": tiny.DPO | {"training": training},
        "full": tiny.DPO | {"type": "dpo", "lora": None, "training": training},
        "evaluate": evaluate | {"baseline": "sft"},
    }
    path = tiny.make_run(tmp_path, stages)
    tiny.write_rows(tmp_path / "held_out.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    names = ("comparisons", "demonstrations", "held_out")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    run(path, "sft", "dpo", "full")
    loaded = []
    causal_of = Loader.causal
    monkeypatch.setattr(Loader, "causal", lambda self, full: loaded.append(Path(full).name) or causal_of(self, full))
    run(path, "evaluate")
    assert loaded == ["model", "output"]


class Killed(Exception):
    pass


@pytest.mark.parametrize(("name", "killed_at"), [("sft", 4), ("reward", 4), ("dpo", 4), ("sft", 5)])
def test_resumed_is_uninterrupted(tmp_path, monkeypatch, name, killed_at):
    """Also when it was killed after its last step: it makes no step more."""
    last = max(5, killed_at)
    steps = {"max_steps": last, "save_steps": 2, "save_strategy": "steps"}
    steps["lr_scheduler_type"] = "constant"  # a step too many would show
    spec = {"sft": tiny.SFT, "reward": tiny.REWARD, "dpo": tiny.DPO}[name]
    spec = spec | {"training": spec.get("training", {}) | steps}
    stages = {"sft": tiny.SFT} | {name: spec}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    run(tiny.make_run(whole, stages), *stages)

    path = tiny.make_run(parts, stages)
    run(path, *(other for other in stages if other != name))
    mark = checkpoints.MarkComplete.on_save

    def mark_then_die(self, args, state, control, **kwargs):
        mark(self, args, state, control, **kwargs)
        if state.global_step == killed_at:
            raise Killed

    monkeypatch.setattr(checkpoints.MarkComplete, "on_save", mark_then_die)
    with pytest.raises(Killed):
        run(path, name)
    monkeypatch.setattr(checkpoints.MarkComplete, "on_save", mark)
    assert name not in manifest.read(parts / "run").stages
    recorded = run(path, name)
    assert recorded.stages[name].resumed_from_step == killed_at
    assert recorded.stages[name].metrics["steps"] == last

    a, b = (load_file(folder / "run" / name / "output" / "adapter_model.safetensors") for folder in (whole, parts))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=1e-5)


def test_damaged_checkpoints_fall_back(tmp_path, capsys):
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w" * step)
        if step != 6:
            (folder / checkpoints.MARKER).write_text(json.dumps(digests.checksums(folder, [folder])))
    (tmp_path / "checkpoint-4" / "weights").write_text("cut")
    found, messages = checkpoints.newest_complete(tmp_path)
    assert found == tmp_path / "checkpoint-2"
    assert ["checkpoint-6" in messages[0], "checkpoint-4" in messages[1]] == [True, True]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("lora", [tiny.LORA, None], ids=["lora", "full"])
def test_reference_log_probs_of_a_cache_are_those_of_the_stage(tmp_path, lora, bf16):
    """TRL's cache of them knows rows and weights only; `ld_alpha` changes them, and all stages share the cache."""
    options = {"precompute_ref_log_probs": True, "learning_rate": 1e-9}
    stages = {"sft": tiny.SFT}
    for name, more in {"half": {"ld_alpha": 0.5}, "whole": {}, "quarter": {"ld_alpha": 0.25}}.items():
        stages[name] = tiny.DPO | {"type": "dpo", "training": tiny.DPO["training"] | options | more}
    path = tiny.make_run(tmp_path, stages, lora=lora, training=tiny.TRAINING | {"bf16": bf16})
    found = run(path, *stages).stages
    for name in ("half", "whole", "quarter"):
        assert found[name].metrics["initial_loss"] == pytest.approx(math.log(2), abs=1e-5), name
        assert found[name].metrics["first_rewards/margins"] == pytest.approx(0, abs=1e-4), name


def test_a_wrong_reference_is_noticed_in_mixed_precision_too(tmp_path, monkeypatch):
    """With log-probabilities that were computed before the training, and an allowance for rounding."""
    options = {"precompute_ref_log_probs": True, "bf16": True}
    stages = {"sft": tiny.SFT, "dpo": tiny.DPO | {"training": tiny.DPO["training"] | options}}
    path = tiny.make_run(tmp_path, stages)
    run(path, "sft")
    original = DPOTrainer.compute_ref_log_probs

    def base_instead(self, model, inputs):
        with model.disable_adapter():
            return original(self, model, inputs)

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", base_instead)
    with pytest.raises(assertions.CheckFailed, match="the reference is not the parent: margins of "):
        run(path, "dpo")
