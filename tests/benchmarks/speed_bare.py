"""The stages of `speed.py` in bare TRL: models from transformers and PEFT, rows in TRL's own forms, TRL's trainers.

Policies start from the same adapters as the pipeline's stages do, and a new adapter is drawn with the same seed. Rows
become the same token ids, by the run's tokenizer with its chat template. PPO has four models, each with weights of its
own, as PPOTrainer takes them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

Rows = list[dict[str, Any]]


class Bare:
    """What the stages need: the base, the finished run whose adapters they start from, and where to write."""

    def __init__(self, base: str, dtype: str, run: Path, data: Path, output: Path, lora: dict[str, Any]):
        self.base = base
        self.dtype = getattr(torch, dtype)
        self.run = run
        self.data = data
        self.output = str(output)
        self.lora = lora
        self.tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")

    def args(self, config_class: type, options: dict[str, Any]) -> Any:
        return config_class(output_dir=self.output, report_to="none", seed=0, **options)

    def rows(self, name: str) -> Rows:
        lines = (self.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def texts(self, name: str) -> Dataset:
        """Rows whose prompts are rendered with the chat template; TRL puts an eos behind each completion."""
        return Dataset.from_list([row | {"prompt": self._rendered(row["prompt"])} for row in self.rows(name)])

    def _rendered(self, prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def new(self, task: str, **options: Any) -> LoraConfig:
        return LoraConfig(**self.lora, task_type=task, **options)

    def causal(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype)

    def policy(self, trainable: bool = True) -> Any:
        return PeftModel.from_pretrained(self.causal(), str(self.run / "start" / "output"), is_trainable=trainable)

    def score(self, trainable: bool = False) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=1, dtype=self.dtype)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        model = PeftModel.from_pretrained(model, str(self.run / "judge" / "output"), is_trainable=trainable)
        model.score.float()  # its head is float32, as it was trained
        model.score.register_forward_pre_hook(lambda _, hidden: hidden[0].float())
        return model


def pretrain(bare: Bare, options: dict[str, Any]) -> Any:
    options = {"packing": True, "packing_strategy": "wrapped"} | options
    return SFTTrainer(
        bare.causal(),
        bare.args(SFTConfig, options),
        train_dataset=Dataset.from_list(bare.rows("texts")),
        processing_class=bare.tokenizer,
        peft_config=bare.new("CAUSAL_LM"),
    )


def sft(bare: Bare, options: dict[str, Any]) -> Any:
    return SFTTrainer(
        bare.causal(),
        bare.args(SFTConfig, options),
        train_dataset=bare.texts("demonstrations"),
        processing_class=bare.tokenizer,
        peft_config=bare.new("CAUSAL_LM"),
    )


def reward(bare: Bare, options: dict[str, Any]) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(bare.base, num_labels=1, dtype=bare.dtype)
    model.score.float()  # in bfloat16 most of its steps would be rounded away
    model.score.register_forward_pre_hook(lambda _, hidden: hidden[0].float())
    return RewardTrainer(
        model,
        bare.args(RewardConfig, options),
        train_dataset=bare.texts("comparisons"),
        processing_class=bare.tokenizer,
        peft_config=bare.new("SEQ_CLS", modules_to_save=["score"]),
    )


def dpo(bare: Bare, options: dict[str, Any]) -> Any:
    rows = bare.texts("comparisons")
    args = bare.args(DPOConfig, options)
    return DPOTrainer(bare.policy(), None, args, train_dataset=rows, processing_class=bare.tokenizer)


def kto(bare: Bare, options: dict[str, Any]) -> Any:
    rows = bare.texts("unpaired").shuffle(seed=0)  # as the pipeline does: with other rows it would be other work
    args = bare.args(KTOConfig, options)
    return KTOTrainer(bare.policy(), None, args, train_dataset=rows, processing_class=bare.tokenizer)


def _groups(bare: Bare, args: Any, trainer_class: Callable[..., Any]) -> Any:
    """A trainer that compares the completions of a prompt; TRL scores their texts with the reward model."""
    score = bare.score().to(args.device).eval()
    return trainer_class(
        bare.policy(),
        [score],
        args,
        train_dataset=bare.texts("demonstrations").select_columns(["prompt"]),
        processing_class=bare.tokenizer,
        reward_processing_classes=[AutoTokenizer.from_pretrained(bare.run / "tokenizer")],
    )


def rloo(bare: Bare, options: dict[str, Any]) -> Any:
    return _groups(bare, bare.args(RLOOConfig, {"disable_dropout": True} | options), RLOOTrainer)


def grpo(bare: Bare, options: dict[str, Any]) -> Any:
    return _groups(bare, bare.args(GRPOConfig, {"disable_dropout": True} | options), GRPOTrainer)


def ppo(bare: Bare, options: dict[str, Any]) -> Any:
    own = {"stop_token": "eos", "missing_eos_penalty": 1.0, "num_sample_generations": 0, "save_strategy": "no"}
    args = bare.args(PPOConfig, own | {"bf16": False} | options)
    tokenizer = AutoTokenizer.from_pretrained(bare.run / "tokenizer", padding_side="left")
    rows = Dataset.from_dict({"input_ids": tokenizer(bare.texts("demonstrations")["prompt"][:])["input_ids"]})
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=bare.policy(),
        ref_model=bare.policy(trainable=False),
        reward_model=bare.score(),
        value_model=bare.score(trainable=True),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


STAGES: dict[str, Callable[[Bare, dict[str, Any]], Any]] = {
    "pretrain": pretrain,
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "kto": kto,
    "rloo": rloo,
    "grpo": grpo,
    "ppo": ppo,
    "ppo-on-grpo": ppo,
}
