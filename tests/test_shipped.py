"""Every shipped config runs to its end from its own file, the one for own data by the README's commands.

The model and the data are small stand-ins of the same kind, and what is long is cut short. Each test says which keys
that changes, and that all others are as shipped: precision, quantisation, adapters, batch sizes, learning rates,
schedules and the gate, which stops a run on a reward model that is not good enough.
"""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standins
import tiny
from test_precision import check_stage
from test_readme import fences

from pipeline import stage
from pipeline.config.load import load
from pipeline.config.schema import Ppo, RunConfig, Source, TrainingStage
from pipeline.launch import process
from pipeline.records import manifest

Overrides = dict[str, str | int | bool]

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = "quickstart.yaml"  # run by test_quickstart.py, with nothing changed
OWN_DATA = "own-data.yaml"  # on files as people have them
MULTI_GPU = "qwen2.5-7b-multi-gpu.yaml"
# What a test may change, by the last part of its key, and why.
REASONS = {
    "path": "there is no hub: a folder holds a stand-in of the same kind",
    "sources": "the same for each of them; a folder has no `name` of a configuration",
    "total_episodes": "two updates are enough to see PPO train",
    "max_steps": "two steps are enough to see pretraining, RLOO and GRPO train",
    "response_length": "a random model does not stop by itself",
    "max_completion_length": "a random model does not stop by itself",
    "max_new_tokens": "a random model does not stop by itself",
    "accelerate_config": "two CPU processes take the place of four GPUs",
}
# By config, what is changed beside its model and data. The other stages are short because their rows are few.
SHORT: dict[str, Overrides] = {
    "smollm2-135m.yaml": {
        "stages.pretrain.training.max_steps": 2,
        "stages.ppo.training.total_episodes": 64,
        "stages.ppo.training.response_length": 8,
        "stages.evaluate.max_new_tokens": 8,
    },
    "qwen2.5-0.5b-lora.yaml": {
        "stages.ppo.training.total_episodes": 64,
        "stages.ppo.training.response_length": 8,
        "stages.rloo.training.max_steps": 2,
        "stages.rloo.training.max_completion_length": 8,
        "stages.grpo.training.max_steps": 2,
        "stages.grpo.training.max_completion_length": 8,
        "stages.evaluate.max_new_tokens": 8,
    },
    "llama3.1-8b-qlora.yaml": {
        "stages.ppo.training.total_episodes": 32,
        "stages.ppo.training.response_length": 8,
        "stages.evaluate.max_new_tokens": 8,
    },
    MULTI_GPU: {
        "stages.sft.accelerate_config": "../accelerate_configs/cpu_2_processes.yaml",
        "stages.reward.accelerate_config": "../accelerate_configs/cpu_2_processes.yaml",
        "stages.ppo.accelerate_config": "../accelerate_configs/cpu_2_processes.yaml",
        "stages.dpo.accelerate_config": "../accelerate_configs/cpu_2_processes.yaml",
        "stages.ppo.training.total_episodes": 64,
        "stages.ppo.training.response_length": 8,
        "stages.evaluate.max_new_tokens": 8,
    },
}
ONE_PROCESS = sorted(SHORT.keys() - {MULTI_GPU})
NUM_ROWS = 64  # of a dataset to train on
# Comparisons where these are too few for a reward model that the gate lets pass.
MORE_COMPARISONS = {"smollm2-135m.yaml": 128}


def stand_in(source: Source, folder: Path, num_rows: int) -> str:
    """Make the stand-in of a source in `folder`, unless it is there; returns its path."""
    hub_id = source.path if source.name is None else f"{source.path}/{source.name}"
    place = folder / hub_id.replace("/", "--")
    if not place.exists():
        standins.make_dataset(hub_id, place, num_rows)
    return str(place)


def stand_ins(config: RunConfig, folder: Path) -> Overrides:
    """Make a config's model and datasets in `folder`; returns what puts them in the place of its own."""
    standins.MODELS[config.model.path](folder / "model")
    paths: Overrides = {"model.path": str(folder / "model")}
    for name, dataset in config.data.items():
        num_rows = NUM_ROWS
        if "preferences" in name:
            num_rows = MORE_COMPARISONS.get(config.source.name, NUM_ROWS)
        if dataset.sources:
            sources = []
            for source in dataset.sources:
                own = source.model_dump(exclude_unset=True, exclude={"name"})
                sources.append(own | {"path": stand_in(source, folder, num_rows)})
            paths[f"data.{name}.sources"] = json.dumps(sources)
        else:
            paths[f"data.{name}.path"] = stand_in(dataset, folder, num_rows)
    return paths


def arguments(overrides: Overrides) -> tuple[str, ...]:
    """Overrides as the command line takes them."""
    return tuple(f"{key}={value}" for key, value in overrides.items())


def flat(section: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested sections, and of lists of them."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict):
            values |= flat(value, f"{above}{key}.")
        else:
            values[f"{above}{key}"] = value
    return values


def reached(config: RunConfig, key: str) -> set[str]:
    """The keys of the resolved config that an override of `key` changes.

    A run's `training` goes to every stage that trains. The report on a reward model samples as evaluate does.
    """
    keys = {key}
    if key.startswith("training."):
        keys |= {f"stages.{name}.{key}" for name, its in config.stages.items() if isinstance(its, TrainingStage)}
    if key.startswith("stages.evaluate."):
        keys.add(key.replace("evaluate", "reward-shift"))
    if key.endswith(".sources"):
        keys = set()
        for number, source in enumerate(config.data[key.split(".")[1]].sources):
            keys.add(f"{key}.{number}.path")
            if source.name is not None:
                keys.add(f"{key}.{number}.name")
    return keys


def check_overrides(path: Path, overrides: Overrides) -> None:
    """What the overrides change has a reason, and all other keys of the resolved config are as shipped."""
    assert {key.rpartition(".")[2] for key in overrides} <= REASONS.keys()
    shipped = load(path)
    before = flat(shipped.model_dump())
    after = flat(load(path, arguments(overrides)).model_dump())
    changed = before.keys() ^ after.keys()
    changed |= {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert changed == set().union(*(reached(shipped, key) for key in overrides))


def check_records(config: RunConfig, run_dir: Path) -> None:
    """Every stage is finished, started from its parent and left what its record says."""
    recorded = manifest.read(run_dir).stages
    assert list(recorded) == list(config.stages)
    for name, record in recorded.items():
        manifest.verify(run_dir, name, record)
        check_stage(record)
        if isinstance(config.stages[name], TrainingStage):
            check_data(config, config.stages[name], record)
        if isinstance(config.stages[name], Ppo):
            check_ppo(config.stages[name], record)


def check_data(config: RunConfig, stage: TrainingStage, record: manifest.Record) -> None:
    """A stream was read while it trained, and sources with weights were mixed by them."""
    dataset, account = config.data[stage.data], record.datasets["data"]
    assert account.get("streamed", False) == dataset.streaming
    if dataset.streaming:
        assert account["dropped"] == {}
        assert account["read"] > len(dataset.sources) * NUM_ROWS  # it has begun another pass
    elif dataset.sources:
        weights = [source.weight for source in dataset.sources]
        assert None not in weights and len(set(weights)) > 1
        # All have as many rows, so the one with the largest weight runs out first.
        taken = [NUM_ROWS * weight // max(weights) for weight in weights]
        assert account["rows"] == sum(taken)
        assert account["dropped"] == {"weight": len(weights) * NUM_ROWS - sum(taken)}


def check_ppo(stage: Ppo, record: manifest.Record) -> None:
    """With held-out prompts it looked at them before and after; with a baseline of the batch, that cancels its mean."""
    metrics = record.metrics
    assert metrics["alarms"] == []
    assert ("held_out_scores" in metrics) == (stage.eval_data is not None)
    if stage.eval_data is not None:
        assert [look["update"] for look in metrics["held_out_scores"]] == [0, metrics["updates"]]
        assert all(math.isfinite(look["score"]) for look in metrics["held_out_scores"])
    if stage.prompt_baseline == "leave_one_out":
        for when in ("first_", ""):  # the last has no prefix
            assert abs(metrics[f"{when}centred_score"]) < 1e-4 < abs(metrics[f"{when}score"])


@pytest.fixture
def one_process(cli, monkeypatch):
    """`rlhf` in this process, with its stages: each would import for ten seconds in one of its own."""

    def run_stage(config: RunConfig, name: str, overrides: tuple[str, ...], launch: str | None, *_: Any) -> None:
        assert launch is None
        stage.run(load(config.source, overrides), name)

    monkeypatch.setattr(process, "run_stage", run_stage)

    def call(*args: str | Path) -> str:
        code, out, err = cli(*args)
        assert code == 0, err
        return out

    return call


def test_every_shipped_config_is_run():
    (quickstart,) = fences("command: quickstart")
    assert f"configs/{QUICKSTART}" in quickstart
    assert {path.name for path in CONFIGS.glob("*.yaml")} == {*SHORT, QUICKSTART, OWN_DATA}


def test_the_shipped_configs_show_what_sets_the_project_apart():
    configs = [load(path) for path in CONFIGS.glob("*.yaml")]
    datasets = [dataset for config in configs for dataset in config.data.values()]
    assert any(dataset.streaming for dataset in datasets)
    assert any(dataset.sources and dataset.sources[0].weight and not dataset.streaming for dataset in datasets)
    stages = [stage for config in configs for stage in config.stages.values() if isinstance(stage, Ppo)]
    assert any(s.prompt_baseline != "none" and s.on_alarm == "stop" and s.eval_data is not None for s in stages)


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_a_config_for_one_gpu(tmp_path, one_process, name):
    path = CONFIGS / name
    config = load(path)
    overrides = stand_ins(config, tmp_path) | SHORT[name]
    check_overrides(path, overrides)
    one_process("run", path, *arguments(overrides))
    run_dir = tmp_path / "runs" / config.name
    check_records(config, run_dir)
    assert "dpo" in one_process("status", run_dir)
    if any(isinstance(its, Ppo) and its.on_alarm == "stop" for its in config.stages.values()):
        diverge(path, config, overrides, one_process)


def diverge(path: Path, config: RunConfig, overrides: Overrides, one_process: Callable[..., str]) -> None:
    """Run PPO again, as it is shipped but at a rate at which it diverges: it ends, and hands on the best policy."""
    (name,) = (name for name, its in config.stages.items() if isinstance(its, Ppo))
    rate = {f"stages.{name}.training.learning_rate": "1e30"}
    output = one_process("run", path, *arguments(overrides | rate), "--only", name)
    assert "the policy of update 0 is kept" in output
    metrics = manifest.read(config.run_path).stages[name].metrics
    assert [alarm["measure"] for alarm in metrics["alarms"]] == ["weights"]
    assert metrics["kept_update"] == 0 and metrics["updates"] == 1


def test_the_config_for_several_gpus(tmp_path, rlhf):
    """With two CPU processes for each stage that trains."""
    path = CONFIGS / MULTI_GPU
    config = load(path)
    overrides = stand_ins(config, tmp_path) | SHORT[MULTI_GPU]
    check_overrides(path, overrides)
    result = rlhf("run", path, *arguments(overrides))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    run_dir = tmp_path / "runs" / config.name
    check_records(config, run_dir)
    for name, record in manifest.read(run_dir).stages.items():
        assert record.world_size == (2 if isinstance(config.stages[name], TrainingStage) else 1), name
        # Written once, by one process: one line says so.
        assert (run_dir / name / "log.txt").read_text().count(f"{name}: finished in") == 1
    assert not list(run_dir.rglob("*.tmp"))
    status = rlhf("status", run_dir)
    assert status.returncode == 0 and "dpo" in status.stdout


def alpaca(number: int, prompt: str) -> dict[str, str]:
    """A demonstration as in files for Alpaca; every third has an input beside its instruction."""
    words = {"instruction": prompt, "input": ""}
    if number % 3 == 0:
        words = {"instruction": "Do as I say.", "input": prompt}
    return words | {"output": standins.good(prompt)}


def sharegpt(number: int, prompt: str) -> dict[str, Any]:
    """A comparison as in files for ShareGPT; some have a system message, some are in the middle of a dialogue."""
    turns = [{"from": "human", "value": prompt}]
    if number % 4 == 0:
        turns = [{"from": "system", "value": "Be kind."}, *turns]
    if number % 4 == 1:
        turns = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello."}, *turns]
    sides = {"chosen": standins.good(prompt), "rejected": standins.bad(prompt)}
    return {"conversations": turns} | {side: {"from": "gpt", "value": text} for side, text in sides.items()}


def with_ppo(text: str) -> str:
    """Take the # away before the PPO stage."""
    lines = text.splitlines()
    (start,) = (at for at, line in enumerate(lines) if line == "  # ppo:")
    end = lines.index(next(line for line in lines[start:] if not line.startswith("  #")))
    return "\n".join([*lines[:start], *(line.replace("# ", "", 1) for line in lines[start:end]), *lines[end:]])


def test_the_config_for_own_data(tmp_path, one_process):
    """With PPO switched on: plan, smoke run and run."""
    shipped = CONFIGS / OWN_DATA
    path = tmp_path / OWN_DATA
    path.write_text(with_ppo(shipped.read_text(encoding="utf-8")), encoding="utf-8")
    config = load(path)
    assert [name for name in config.stages if name != "ppo"] == list(load(shipped).stages)
    standins.MODELS[config.model.path](tmp_path / config.model.path)
    prompts = standins.prompts()[:240]
    tiny.write_rows(tmp_path / "demonstrations.jsonl", (alpaca(n, prompt) for n, prompt in enumerate(prompts)))
    tiny.write_rows(tmp_path / "comparisons.jsonl", (sharegpt(n, prompt) for n, prompt in enumerate(prompts)))
    overrides = {
        "stages.ppo.training.total_episodes": 32,
        "stages.ppo.training.response_length": 8,
        "stages.evaluate.max_new_tokens": 8,
    }
    check_overrides(path, overrides)
    (commands,) = fences("commands: own data")
    copy, look, plan, trial, run = (shlex.split(line)[1:] for line in commands.splitlines())
    assert copy[0] == f"configs/{OWN_DATA}"
    assert "\u27e6" in one_process(*look)
    told = one_process(*plan, "stages.evaluate.max_new_tokens=200").split("warning: ")[1:]
    expected = ["stages.ppo: the gate may not pass: reward has 17 held", "stages.evaluate: 17 held-out prompts of comp"]
    expected.append("stages.evaluate: its win rates are reward's, and 17 held-out comparisons of comparisons tell only")
    assert [text[: len(words)] for text, words in zip(told, expected, strict=True)] == expected  # of 240 rows, rightly
    assert "Every stage works." in one_process(*trial, *arguments(overrides))
    assert "as the smoke run foretells" in one_process(*run, *arguments(overrides))
    check_records(config, tmp_path / "runs" / config.name)
