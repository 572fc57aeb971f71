"""What tests share: a quiet offline environment, a tiny run, and two ways to call `rlhf`."""
# ruff: noqa: E402

import os
import tempfile

# Hugging Face's libraries and torch read these once, when they are imported; subprocesses inherit them.
_CACHE = tempfile.TemporaryDirectory(prefix="rlhf-tests-")
os.environ |= {
    "HF_HOME": _CACHE.name,
    "HF_DATASETS_CACHE": f"{_CACHE.name}/datasets",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

REPO = Path(__file__).resolve().parent.parent
REMOVED = object()  # as a value in `write_config`: drop the key
NUM_ROWS = 24
THINGS = ("kettle", "piano", "rabbit", "garden", "bridge", "lamp", "river", "violin")

_CONFIG = {
    "name": "tiny",
    "gate": "off",  # a reward model of two steps would not pass
    "model": {
        "scratch": {
            "architecture": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 128,
                "tie_word_embeddings": True,
            },
            "tokenizer": {"vocab_size": 400, "data": ["corpus", "demos"]},
        },
    },
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "training": {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
    },
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


def _rows(name):
    for i in range(NUM_ROWS):
        thing, prompt = THINGS[i % len(THINGS)], f"Tell me about a {THINGS[i % len(THINGS)]}, part {i}."
        good, bad = f"A {thing} is a fine thing to have.", "No."
        yield {
            "corpus": {"text": f"A {thing} is a fine thing. Many people like a {thing} for {i} reasons."},
            "demos": {"prompt": prompt, "completion": good},
            "comparisons": {"prompt": prompt, "chosen": good, "rejected": bad},
            "prompts": {"prompt": prompt},
        }[name]


def _write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_config(folder, **changes):
    config = copy.deepcopy(_CONFIG)
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
    for name in _CONFIG["data"]:
        _write_rows(folder / f"{name}.jsonl", _rows(name))
    path = folder / "config.yaml"
    YAML().dump(config, path)
    return path


@pytest.fixture(scope="session")
def write_config():
    """`write_config(folder, **changes)`: a tiny run's config with its data files; returns the config's path.

    Changes are dotted: `**{"stages.sft.lora": None}`; the value `write_config.REMOVED` drops the key.
    """
    _write_config.REMOVED = REMOVED
    return _write_config


@pytest.fixture(scope="session")
def write_rows():
    """`write_rows(path, rows)`: a JSONL file."""
    return _write_rows


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _imported():
    # Before any test captures stderr: transformers' log handler keeps the stream it finds when it is imported.
    import pipeline.chain.preflight  # noqa: F401


@pytest.fixture
def rlhf(tmp_path):
    """`rlhf(*args)`: the command in a process of its own, in `tmp_path`."""

    def call(*args):
        command = [sys.executable, "-m", "pipeline", *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return call


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys, _imported):
    """`cli(*args)`: the command in this process, in `tmp_path`; returns (exit code, stdout, stderr)."""
    from pipeline.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # functions named in a config extend it

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["rlhf", *map(str, args)])
        capsys.readouterr()
        exit_code = 0
        try:
            main()
        except SystemExit as error:
            exit_code = error.code or 0
        return exit_code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A folder with config.yaml, its data, and runs/tiny with pretrain, sft and reward finished; copy it."""
    folder = tmp_path_factory.mktemp("finished")
    config = _write_config(folder)
    command = [sys.executable, "-m", "pipeline", "run", config.name, "--until", "reward"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def finished(finished_run, tmp_path):
    """A copy of the finished run in `tmp_path`: its config file and its run folder."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    return SimpleNamespace(config=tmp_path / "config.yaml", run_dir=tmp_path / "runs" / "tiny")


@pytest.fixture(scope="session")
def make_record():
    """`make_record(**changes)`: a manifest record of a stage, as if it were finished."""
    from pipeline.records.manifest import Output, Record

    def make(**changes):
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

    return make


@pytest.fixture(scope="session")
def repo():
    """The repository's root."""
    return REPO
