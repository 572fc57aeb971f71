"""Run folders that an earlier version finished: this version takes their stages as finished."""

import dataclasses
import tarfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from trl import DPOConfig

from pipeline.chain import staleness
from pipeline.config import options
from pipeline.config.load import load
from pipeline.config.schema import Ppo, Strict
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.records import manifest
from pipeline.system.errors import UserError

ARCHIVE = Path(__file__).parent / "fixtures" / "finished_before.tar.xz"
STAGES = {
    "config": ["pretrain", "sft", "reward", "reward-shift", "ppo", "rloo", "grpo", "dpo", "evaluate"],
    "base": ["sft", "dpo"],
}
RUNS = {"config": "before", "base": "base"}


@pytest.fixture
def older(tmp_path):
    """The earlier version's configs, data and run folders, in `tmp_path`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.parametrize("name", STAGES)
def test_stages_that_an_earlier_version_finished_are_skipped(rlhf, older, name):
    """By the real command, in a process of its own."""
    run_dir = older / "runs" / RUNS[name]
    before = manifest.read(run_dir).stages
    assert list(before) == STAGES[name]
    done = rlhf("run", f"{name}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("skip: finished, nothing") == len(STAGES[name]), done.stdout
    assert manifest.read(run_dir).stages == before
    assert not list(run_dir.rglob("log.txt"))  # no process of a stage was started


# Defaults, in the configs of records


def decide(older, *overrides, name="config"):
    """The reason why each stage runs that would run."""
    config = load(older / f"{name}.yaml", (f"run_dir={older / 'runs' / RUNS[name]}", *overrides))
    return {d.stage: d.reason for d in staleness.decide(config, manifest.read(config.run_path)) if d.run}


def edit_record(older, change, stage, name="config"):
    """Change the config on record of a stage, as if another version had written it."""
    run_dir = older / "runs" / RUNS[name]
    recorded = manifest.read(run_dir)
    config = dict(recorded.stages[stage].config)
    change(config)
    record = recorded.stages[stage].model_copy(update={"config": config})
    manifest.commit(run_dir, stage, record)


@pytest.mark.parametrize(
    ("stage", "key", "override", "words"),
    [
        ("ppo", "max_prompt_length", "stages.ppo.max_prompt_length=64", "max_prompt_length (512 -> 64)"),
        ("grpo", "on_alarm", "stages.grpo.eval_every=5", "eval_every (10 -> 5)"),
        ("dpo", "model.dtype", "stages.dpo.lora.r=4", "lora.r (2 -> 4)"),
        ("evaluate", "temperature", "stages.evaluate.temperature=0.5", "temperature (1.0 -> 0.5)"),
    ],
)
def test_a_key_that_a_record_lacks_counts_as_its_default(older, stage, key, override, words):
    """As after a version that adds the key; any other value than the default is a change."""
    edit_record(older, lambda config: config.pop(key), stage)
    assert decide(older) == {}
    assert words in decide(older, override)[stage]


def test_a_new_key_of_a_section(older, monkeypatch):
    """A key with a default, in the class of a stage's section and in a section within it."""

    class Inner(Strict):
        depth: int = 3
        width: int = 5

    class NewPpo(Ppo):
        clip: float = 0.25
        search: Inner = Inner()

    row = dataclasses.replace(STAGE_TYPES["ppo"], section=NewPpo)
    monkeypatch.setitem(STAGE_TYPES, "ppo", row)
    assert decide(older) == {}
    assert decide(older, "stages.ppo.clip=0.5")["ppo"] == "config changed: clip (0.25 -> 0.5)"
    assert decide(older, "stages.ppo.search.depth=4")["ppo"] == "config changed: search.depth (3 -> 4)"


def test_a_key_on_record_that_is_no_more(older):
    edit_record(older, lambda config: config.update(warmth=None), "dpo")
    assert decide(older) == {"dpo": "config changed: warmth (None -> 'unset')", "evaluate": "dpo runs again"}


@pytest.mark.parametrize("option", ["packing=true", "packing_strategy=wrapped"])
def test_our_default_for_an_option_of_trl_may_be_written_out(older, option):
    """Records of earlier versions do not hold it; those of this version do."""
    assert "training.packing" not in manifest.read(older / "runs" / "before").stages["pretrain"].config
    assert decide(older, f"stages.pretrain.training.{option}") == {}
    changed = decide(older, "stages.pretrain.training.packing=false")["pretrain"]
    assert changed == "config changed: training.packing (True -> False)"


def test_a_default_of_ours_that_changes_is_a_change(older, monkeypatch):
    """For a record that holds the old one: the record of a key of ours, and of an option of TRL."""
    config = load(older / "config.yaml")
    identity = staleness.identify(config, "pretrain", manifest.read(older / "runs" / "before"))
    assert identity.config["training.packing_strategy"] == "wrapped"
    edit_record(older, lambda recorded: recorded.update(identity.config), "pretrain")
    assert decide(older) == {}
    monkeypatch.setitem(options.DEFAULTS, "pretrain", {"packing": True, "packing_strategy": "bfd"})
    assert decide(older)["pretrain"] == "config changed: training.packing_strategy ('wrapped' -> 'bfd')"


def test_trls_own_default_is_not_ours(older):
    """It is not on record which value it had: TRL may have changed it since."""
    assert load(older / "base.yaml").stages["dpo"].training["beta"] == DPOConfig.beta
    edit_record(older, lambda config: config.pop("training.beta"), "dpo", "base")
    assert decide(older, name="base") == {"dpo": "config changed: training.beta ('unset' -> 0.1)"}


def test_an_adapter_with_peft_s_defaults_is_not_no_adapter(older):
    """Earlier versions recorded `lora: {}` as nothing at all."""
    for key in ("r", "lora_alpha", "lora_dropout", "target_modules"):
        edit_record(older, lambda config, key=key: config.pop(f"lora.{key}"), "dpo", "base")
    yaml = YAML()
    config = yaml.load(older / "base.yaml")
    config["stages"]["dpo"]["lora"] = {}
    yaml.dump(config, older / "base.yaml")
    assert decide(older, name="base") == {}
    recorded = manifest.read(older / "runs" / "base")
    now = staleness.identify(load(older / "base.yaml"), "dpo", recorded).config
    edit_record(older, lambda config: config.update(now), "dpo", "base")
    assert decide(older, name="base") == {}
    config["stages"]["dpo"]["lora"] = None
    yaml.dump(config, older / "base.yaml")
    assert decide(older, name="base") == {"dpo": "config changed: lora ({} -> None)"}
    sft = staleness.identify(load(older / "base.yaml"), "sft", recorded).config
    assert sft["lora"] is None


def test_a_stage_asks_only_for_those_it_builds_on(older):
    """The data of others need not be there."""
    config = load(older / "config.yaml", (f"run_dir={older / 'runs' / 'before'}",))
    recorded = manifest.read(config.run_path)
    (older / "demos.jsonl").unlink()
    [pretrain] = staleness.decide(config, recorded, names=["pretrain"])
    assert not pretrain.run
    assert pretrain.identity == staleness.identify(config, "pretrain", recorded)
    [pretrain, sft, grpo] = staleness.decide(config, recorded, names=["pretrain", "sft", "grpo"])
    assert not pretrain.run
    assert sft.run and sft.identity is None and sft.reason == "its data or functions cannot be read"
    assert grpo.run and grpo.identity is None and grpo.reason == "sft runs again"
    with pytest.raises(UserError, match=r"demos\.jsonl"):
        staleness.identify(config, "sft", recorded)
