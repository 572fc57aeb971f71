"""A tiny language model with its tokenizer and a little data, made on the spot, for tests that really train."""

import json
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.config.requests import request, run_data
from pipeline.config.schema import RunConfig
from pipeline.data import run_tokenizer
from pipeline.data.prepare import Datasets, Prepared
from pipeline.data.row_kind import RowKind
from pipeline.data.rows import ROWS

TOPICS = ["tea", "rain", "books", "the sea", "bread", "music", "cats", "winter", "maps", "clay", "salt", "wool"]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{{ m.content }}<eos>"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def comparisons() -> list[dict[str, str]]:
    return [
        {
            "prompt": f"Tell me about {topic}.",
            "chosen": f"I like {topic} because it is good.",
            "rejected": f"No {topic}.",
        }
        for topic in TOPICS
    ]


def demonstrations() -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in comparisons()]


def conversational(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Rows with strings in TRL's conversational form."""
    role = {"prompt": "user"}
    return [{k: [{"role": role.get(k, "assistant"), "content": v}] for k, v in row.items()} for row in rows]


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write a random Llama of about 30,000 parameters with a tokenizer as an ordinary folder."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<user>", "<assistant>", "<system>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text for row in comparisons() for text in row.values()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, stages: dict[str, Any], **top: Any) -> Path:
    """Write a run's config with its model and data into `folder`; every stage gets `TRAINING` beneath its own."""
    make_model(folder / "model")
    write_rows(folder / "comparisons.jsonl", comparisons())
    write_rows(folder / "demonstrations.jsonl", demonstrations())
    config = {
        "name": "tiny",
        "gate": "off",  # a reward model of four steps would not pass
        "run_dir": str(folder / "run"),
        "model": {"path": "model"},
        "lora": LORA,
        "training": TRAINING,
        "data": {name: {"path": f"{name}.jsonl"} for name in ("comparisons", "demonstrations")},
        "stages": stages,
    } | top
    path = folder / "tiny.yaml"
    with path.open("w") as file:
        YAML().dump(config, file)
    return path


def edit(path: Path, changes: dict[str, Any]) -> None:
    """Replace top-level sections of a config file."""
    yaml = YAML()
    config = yaml.load(path)
    config.update(changes)
    with path.open("w") as file:
        yaml.dump(config, file)


SFT = {"data": "demonstrations"}
REWARD = {"data": "comparisons", "training": {"max_length": 64}}
DPO = {"data": "comparisons", "training": {"max_length": 64, "beta": 0.1}}
PPO = {
    "data": "demonstrations",
    "training": {
        "total_episodes": 24,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2,
        "response_length": 12,
        "local_rollout_forward_batch_size": 8,
        "temperature": 1.0,
        "learning_rate": 1e-2,
    },
}


class StageRows(Datasets):
    """The datasets of a config, asked for by stage and role."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__(run_data(config), tokenizer, run_tokenizer.fingerprint(tokenizer))
        self.config = config

    def prepare(self, stage: str, role: str) -> Prepared:
        return super().prepare(request(self.config, stage, role))

    def kind(self, stage: str) -> RowKind:
        return ROWS[request(self.config, stage, "data").rows]
