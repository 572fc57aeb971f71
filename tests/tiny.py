"""Tiny runs for tests that really train: their models, data and configs, made on the spot.

`make_run` writes a run of some stages on a model in a folder, `write_config` one of the whole chain on a model that the
run makes from scratch.
"""

import copy
import json
from collections.abc import Iterable
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
from pipeline.records.manifest import Output, Record

TOPICS = ["tea", "rain", "books", "the sea", "bread", "music", "cats", "winter", "maps", "clay", "salt", "wool"]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
}
TRAINING = SMALL | {"max_steps": 4, "learning_rate": 1e-2}
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


def make_model(folder: Path, seed: int = 0, vocabulary: int | None = None) -> Path:
    """Write a random Llama of about 30,000 parameters with a tokenizer as an ordinary folder.

    `vocabulary`: rows of its embeddings, if they are more than its tokenizer has tokens.
    """
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
        vocab_size=vocabulary or len(tokenizer),
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


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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
    YAML().dump(config, path)
    return path


def edit(path: Path, changes: dict[str, Any]) -> None:
    """Replace top-level sections of a config file."""
    yaml = YAML()
    config = yaml.load(path)
    config.update(changes)
    yaml.dump(config, path)


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


class Killed(Exception):
    """Ends a stage in a test as a kill would, behind all that it has written."""


REMOVED = object()  # as a value in `write_config`: drop the key
NUM_ROWS = 24
THINGS = ("kettle", "piano", "rabbit", "garden", "bridge", "lamp", "river", "violin")
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
CHAIN = {
    "name": "tiny",
    "gate": "off",  # a reward model of two steps would not pass
    "model": {
        "scratch": {
            "architecture": ARCHITECTURE,
            "tokenizer": {"vocab_size": 400, "data": ["corpus", "demos"]},
        },
    },
    "lora": LORA,
    "training": SMALL,
    "data": {name: {"path": f"{name}.jsonl"} for name in ("corpus", "demos", "comparisons", "prompts")},
    "stages": {
        "pretrain": {"data": "corpus", "lora": None, "training": {"max_steps": 2, "max_length": 64}},
        "sft": {"data": "demos", "training": {"max_steps": 2, "learning_rate": 1.0e-3}},
        "reward": {"data": "comparisons", "training": {"max_steps": 2}},
        "ppo": {
            "data": "prompts",
            "training": {"total_episodes": 4, "num_mini_batches": 1, "num_ppo_epochs": 1, "response_length": 8},
        },
        "dpo": {"data": "comparisons", "training": {"max_steps": 1}},
        "evaluate": {"data": "prompts", "max_new_tokens": 8, "num_prompts": 4, "batch_size": 4},
    },
}


def chain_rows() -> dict[str, list[dict[str, str]]]:
    """The rows of the chain's datasets, by name."""
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in CHAIN["data"]}
    for i in range(NUM_ROWS):
        thing = THINGS[i % len(THINGS)]
        prompt = f"Tell me about a {thing}, part {i}."
        answer = f"A {thing} is a fine thing to have."
        rows["corpus"].append({"text": f"A {thing} is a fine thing. Many people like a {thing} for {i} reasons."})
        rows["demos"].append({"prompt": prompt, "completion": answer})
        rows["comparisons"].append({"prompt": prompt, "chosen": answer, "rejected": "No."})
        rows["prompts"].append({"prompt": prompt})
    return rows


def write_config(folder: Path, **changes: Any) -> Path:
    """Write the chain's config and data into `folder`; a change is a dotted key, `REMOVED` as its value drops it."""
    config: dict[str, Any] = copy.deepcopy(CHAIN)
    for dotted, value in changes.items():
        *above, last = dotted.split(".")
        section = config
        for key in above:
            section = section.setdefault(key, {})
        if value is REMOVED:
            del section[last]
        else:
            section[last] = copy.deepcopy(value)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in chain_rows().items():
        write_rows(folder / f"{name}.jsonl", rows)
    path = folder / "config.yaml"
    YAML().dump(config, path)
    return path


def make_record(**changes: Any) -> Record:
    """A manifest record of a stage, as if it were finished."""
    fields = {
        "type": "sft",
        "parents": {},
        "config": {"seed": 0},
        "config_digest": "0",
        "inputs": {"data": "1"},
        "datasets": {},
        "output": Output(kind="full", path="sft/output", files={}),
        "tokenizer": "2",
        "metrics": {"loss": 1.0},
        "parameters": {"trainable": 1, "total": 2},
        "seed": 0,
        "versions": {},
        "world_size": 1,
        "started": "2026-01-01T00:00:00+00:00",
        "duration": 1.0,
    }
    return Record(**(fields | changes))


class StageRows(Datasets):
    """The datasets of a config, asked for by stage and role."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__(run_data(config), tokenizer, run_tokenizer.fingerprint(tokenizer))
        self.config = config

    def prepare(self, stage: str, role: str) -> Prepared:
        return super().prepare(request(self.config, stage, role))

    def kind(self, stage: str) -> RowKind:
        return ROWS[request(self.config, stage, "data").rows]
