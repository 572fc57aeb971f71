"""A finished run whose weights were drawn, not trained, and its models as plain transformers and peft load them."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.chain import run_folder, staleness
from pipeline.config.load import load
from pipeline.records import manifest
from pipeline.records.manifest import Output, Record
from pipeline.shift.calibration import calibration
from pipeline.system import digests

COMMON = 0.05  # what all embeddings have in common, so that eos can be likely after every token
EOS = 0.1  # how far the output row of eos points there
JUDGE = "def score(prompt, completion):\n    return float((len(prompt) + 2 * len(completion)) % 3)\n"


def make(
    folder: Path,
    stages: dict[str, Any],
    rows: dict[str, list[dict[str, Any]]],
    margins: Sequence[float] = (),
    finish: bool = True,
    varied: bool = False,
    **top: Any,
) -> SimpleNamespace:
    """A run with the training stages of `stages` finished (`finish`), and `rows` as further datasets.

    `margins` are those of the held-out comparisons, as a reward stage keeps them. With `varied` the model says
    something else after every prompt, and eos or pad after some.
    """
    path = tiny.make_run(folder, stages, **top)
    make_eos_likely(folder / "model", varied)
    (folder / "judge.py").write_text(JUDGE)
    for name, some in rows.items():
        tiny.write_rows(folder / f"{name}.jsonl", some)
    names = ("comparisons", "demonstrations", *rows)
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names} | top.get("data", {})})
    config = load(path)
    run_folder.prepare_run(config)
    run = SimpleNamespace(config=path, folder=folder, run_dir=config.run_path)
    for seed, (name, stage) in enumerate(config.stages.items()):
        if finish and stage.type in ("sft", "dpo", "reward"):
            _finish(config, name, seed, margins)
    return run


def make_eos_likely(folder: Path, varied: bool = False) -> None:
    """A random model hardly ever ends; half of the completions should."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        if not varied:
            model.model.embed_tokens.weight += COMMON
        model.lm_head.weight *= 10
        model.lm_head.weight[model.config.eos_token_id] = 10 * EOS if varied else EOS
        if varied:  # where eos is not likely, pad is
            model.lm_head.weight[tokenizer(folder).convert_tokens_to_ids("<pad>")] = -10 * EOS
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 30 if varied else 1
    model.save_pretrained(folder)


def _finish(config: Any, name: str, seed: int, margins: Sequence[float]) -> None:
    """An adapter with random weights as a stage's output, with its record."""
    stage = config.stages[name]
    torch.manual_seed(100 + seed)
    folder = config.run_path / name / "output"
    base = config.resolve(config.model.path)
    if stage.type == "reward":
        inner = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        adapter = LoraConfig(**stage.lora, task_type="SEQ_CLS", modules_to_save=["score"])
    else:
        inner = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapter = LoraConfig(**stage.lora, task_type="CAUSAL_LM")
    model = get_peft_model(inner, adapter)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.05)
            if "score" in key:
                parameter.normal_()
    model.save_pretrained(folder)
    tokenizer(base).save_pretrained(folder)
    metrics: dict[str, Any] = {"loss": 1.0}
    if stage.type == "reward" and margins:
        (folder / "margins.json").write_text(json.dumps(margins))
        metrics["held_out"] = calibration(margins)
    recorded = manifest.read(config.run_path)
    identity = staleness.identify(config, name, recorded)
    record = Record(
        type=stage.type,
        parents={"init": stage.init} if stage.init != "base" else {},
        config=identity.config,
        config_digest=digests.digest(identity.config),
        inputs=identity.inputs,
        datasets={},
        output=Output(kind="adapter", path=f"{name}/output", files=digests.checksums(config.run_path, [folder])),
        tokenizer=recorded.tokenizer.fingerprint,
        metrics=metrics,
        parameters={"trainable": 1, "total": 2},
        seed=0,
        versions={},
        world_size=1,
        started="2026-01-01T00:00:00+00:00",
        duration=1.0,
    )
    manifest.commit(config.run_path, name, record)


def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def policy(run: SimpleNamespace, name: str) -> Any:
    """A policy, by transformers and peft alone; `base` is the base model."""
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    if name != "base":
        model = PeftModel.from_pretrained(model, run.run_dir / name / "output")
    return model.eval()


def reward(run: SimpleNamespace, name: str = "reward") -> Any:
    """The reward model, by transformers and peft alone."""
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model", num_labels=1, dtype=torch.float32)
    return PeftModel.from_pretrained(model, run.run_dir / name / "output").eval()


def prompt_ids(run: SimpleNamespace, prompt: str | list[dict[str, str]]) -> list[int]:
    """The ids of a prompt (one user message, or several messages), by the template as it is written in `tiny`."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    ends = {"user": "", "assistant": "<eos>"}
    text = "".join(f"<{m['role']}>{m['content']}{ends[m['role']]}" for m in messages)
    return tokenizer(run.folder / "model").encode(f"{text}<assistant>", add_special_tokens=False)


@torch.no_grad()
def score(model: Any, ids: list[int]) -> float:
    """The score of one sequence alone, without padding: the head's value at its last token."""
    hidden = model.base_model.model.model(input_ids=torch.tensor([ids])).last_hidden_state
    return float(model.base_model.model.score(hidden[0, -1]))


@torch.no_grad()
def log_distribution(model: Any, ids: list[int], temperature: float) -> torch.Tensor:
    """log p(. | all tokens before) at each position of one sequence but the first, in float64: (length - 1, words)."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return (logits / temperature).log_softmax(-1)
