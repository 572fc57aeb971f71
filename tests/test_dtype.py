"""`model.dtype: auto`, the default: which type the weights of a run get, what the plan says, what runs again."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_equalities import run

from pipeline.base import dtype
from pipeline.chain import staleness
from pipeline.config.load import load
from pipeline.records import manifest
from pipeline.show import results
from pipeline.system.cache import cache_folder
from pipeline.system.errors import UserError

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
OTHER_SHAPE = tiny.LORA | {"r": 2}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def store(model: Path, files: str, name: str | None, key: str = "dtype") -> None:
    """Store a model in the type `files`; its config.json calls it `name`, or nothing."""
    weights = model / "model.safetensors"
    stored = {weight: value.to(TYPES[files]) for weight, value in load_file(weights).items()}
    stored["model.norm.weight"] = stored["model.norm.weight"].float()  # a few weights are often of another type
    save_file(stored, weights, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    if name is not None:
        config[key] = name
    (model / "config.json").write_text(json.dumps(config))


@pytest.fixture
def path(tmp_path):
    """A run whose stages all train an adapter of one shape, from a base that is stored in bfloat16."""
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, "dpo": tiny.DPO}
    path = tiny.make_run(tmp_path, stages, training=tiny.TRAINING | {"max_steps": 1})
    store(tmp_path / "model", "bfloat16", "bfloat16")
    return path


def chosen(path: Path, *overrides: str) -> str:
    return dtype.choose(load(path, overrides)).dtype


def change_stage(path: Path, name: str, **keys: object) -> None:
    """Lay keys over a stage of the config."""
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, "dpo": tiny.DPO}
    tiny.edit(path, {"stages": stages | {name: stages[name] | keys}})


@pytest.mark.parametrize(
    ("files", "name", "key", "expected"),
    [
        ("float32", "float32", "dtype", "float32"),
        ("bfloat16", "bfloat16", "dtype", "bfloat16"),
        ("bfloat16", "bfloat16", "torch_dtype", "bfloat16"),
        ("bfloat16", None, "", "bfloat16"),
        ("float32", None, "", "float32"),
        ("float16", "float16", "torch_dtype", "float32"),
        ("float16", None, "", "float32"),
        ("float64", "float64", "dtype", "float32"),
    ],
)
def test_the_type_of_the_base_where_adapters_train(path, files, name, key, expected):
    store(tiny.make_model(path.parent / "model"), files, name, key)
    assert chosen(path) == expected
    assert chosen(path, f"quantization={json.dumps(FOUR_BIT)}") == expected
    record = run(path, "sft")
    assert record.model["dtype"] == expected
    assert record.stages["sft"].config["model.dtype"] == expected
    assert f'dtype="{expected}"' in results.snippet(path.parent / "run", record, record.stages["sft"])


def test_files_know_better_than_their_config(path):
    """Or weights in float32 would be rounded."""
    store(tiny.make_model(path.parent / "model"), "float32", "bfloat16")
    assert chosen(path) == "float32"


def test_a_model_of_several_parts(path):
    """The type stands with its language model, in a config whose weights are not in safetensors."""
    config = path.parent / "model" / "config.json"
    values = json.loads(config.read_text())
    del values["dtype"]
    config.write_text(json.dumps(values | {"text_config": {"dtype": "bfloat16"}}))
    (config.parent / "model.safetensors").rename(config.parent / "model.bin")
    assert chosen(path) == "bfloat16"


def test_files_without_weights_say_nothing(path):
    (path.parent / "model" / "model.safetensors").rename(path.parent / "model" / "model.bin")
    config = path.parent / "model" / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    assert chosen(path) == "float32"


def test_auto_is_the_run_with_the_type_written_out(path):
    """The adapters, to the last bit; and another type gives others."""
    for written in ("auto", "bfloat16", "float32"):
        config = path.with_name(f"{written}.yaml")
        shutil.copy(path, config)
        tiny.edit(config, {"run_dir": str(path.parent / written), "model": {"path": "model", "dtype": written}})
        run(config, "sft", "reward")
    for name in ("sft", "reward"):
        auto, same, other = (
            (path.parent / run_dir / name / "output" / "adapter_model.safetensors").read_bytes()
            for run_dir in ("auto", "bfloat16", "float32")
        )
        assert auto == same != other


@pytest.mark.parametrize(
    ("stage", "keys", "why"),
    [
        ("sft", {"lora": None}, "sft trains all weights"),
        ("dpo", {"lora": None}, "dpo trains all weights"),
        ("dpo", {"lora": OTHER_SHAPE}, "dpo merges the adapter of sft into full weights"),
    ],
)
def test_full_weights_are_float32_in_the_whole_run(path, stage, keys, why):
    change_stage(path, stage, **keys)
    assert dtype.choose(load(path)) == dtype.Choice("float32", f"`auto`: {why}")
    record = run(path, "sft", "dpo")
    for name in ("sft", "dpo"):
        assert record.stages[name].config["model.dtype"] == "float32"
    written = path.parent / "run" / stage / ("output" if keys["lora"] is None else "merged") / "model.safetensors"
    assert {weight.dtype for weight in load_file(written).values()} == {torch.float32}


def test_a_new_model_is_float32(write_config, tmp_path):
    config = load(write_config(tmp_path))
    assert dtype.choose(config) == dtype.Choice("float32", "`auto`: the model is new")


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_head_on_a_base_in_half_precision_is_float32(path, stored):
    """With the adapter beneath it; a base in bfloat16 stays in bfloat16."""
    store(tiny.make_model(path.parent / "model"), stored, stored)
    record = run(path, "sft", "reward")
    assert record.model["dtype"] == {"bfloat16": "bfloat16", "float16": "float32"}[stored]
    saved = load_file(path.parent / "run" / "reward" / "output" / "adapter_model.safetensors")
    assert any("score" in name for name in saved)
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


# What runs again


def reasons(path: Path, *overrides: str) -> dict[str, str]:
    """The reason why each stage runs that would run."""
    config = load(path, overrides)
    return {one.stage: one.reason for one in staleness.decide(config, manifest.read(config.run_path)) if one.run}


def test_only_another_type_makes_stages_run_again(path):
    run(path, "sft", "reward", "dpo")
    assert reasons(path) == {}
    assert reasons(path, "model.dtype=bfloat16") == {}
    change = "config changed: model.dtype ('bfloat16' -> 'float32')"
    assert reasons(path, "model.dtype=float32")["sft"] == change
    assert reasons(path, "stages.dpo.lora=null")["sft"] == change  # its base is that of all stages


def test_a_run_that_was_finished_with_the_type_written_out(path):
    """As by an earlier version, whose default was float32."""
    tiny.edit(path, {"model": {"path": "model", "dtype": "float32"}})
    run(path, "sft")
    tiny.edit(path, {"model": {"path": "model"}})
    assert reasons(path)["sft"] == "config changed: model.dtype ('float32' -> 'bfloat16')"
    assert "sft" not in reasons(path, "stages.dpo.lora=null")


# Models of the hub


@pytest.fixture
def hub_model(path):
    """The base as a download leaves it in the hub's cache; the run names it by its id."""
    cache = Path(constants.HF_HUB_CACHE) / "models--own--typed"
    shutil.copytree(path.parent / "model", cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    tiny.edit(path, {"model": {"path": "own/typed"}})
    yield cache
    shutil.rmtree(cache, ignore_errors=True)


def test_a_hub_model_by_its_config(path, hub_model):
    assert chosen(path) == "bfloat16"


def test_a_hub_model_whose_config_says_nothing(path, hub_model):
    """Its files may come later than the plan, so they do not count."""
    store(hub_model / "snapshots" / ("a" * 40), "bfloat16", None)
    assert chosen(path) == "float32"


def test_a_hub_model_that_is_not_here(path, hub_model, cli):
    shutil.rmtree(hub_model)
    with pytest.raises(UserError, match=r"model\.path: no model at 'own/typed'"):
        chosen(path)
    assert chosen(path, "model.dtype=bfloat16") == "bfloat16"
    exit_code, _, err = cli("plan", "tiny.yaml")
    assert exit_code == 2 and "model.path: no" in err and "Traceback" not in err


def test_a_finished_run_whose_hub_model_is_gone(path, hub_model, cli):
    run(path, "sft", "reward", "dpo")
    shutil.rmtree(hub_model)
    exit_code, out, err = cli("run", "tiny.yaml")
    assert exit_code == 0, err
    assert out.count("skip: finished") == 3
    assert "Weights: bfloat16" in out


def test_what_a_run_made_of_a_lost_base_says_nothing_to_another(path, hub_model):
    """A run may have another type than its base, whose files are gone here, and come back."""
    run(path, "sft")
    config = load(path)
    file = config.run_path / "manifest.json"
    file.write_text(file.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    shutil.rmtree(cache_folder() / "kept", ignore_errors=True)
    away = hub_model.with_name("away")
    hub_model.rename(away)
    assert dtype._stored(config) == "float32"
    away.rename(hub_model)
    assert dtype._stored(config) == "bfloat16"


# The plan


def notes(out: str) -> dict[str, str]:
    """The plan's lines on the weights and on gradient checkpointing."""
    lines = [line for line in out.splitlines() if line.startswith(("Weights: ", "Gradient checkpointing"))]
    return {line.partition(" ")[0]: line for line in lines}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "Weights: bfloat16 (`auto`: model is stored in it, and every stage trains an adapter)"),
        (("stages.sft.lora=null",), "Weights: float32 (`auto`: sft trains all weights)"),
        (("model.dtype=bfloat16",), "Weights: bfloat16 (the config says so)"),
    ],
)
def test_the_plan_says_the_type_and_why(path, cli, overrides, words):
    exit_code, out, err = cli("plan", "tiny.yaml", *overrides)
    assert exit_code == 0, err
    assert notes(out)["Weights:"] == words


def test_the_plan_says_why_float16_is_not_taken(path, cli):
    store(tiny.make_model(path.parent / "model"), "float16", "float16")
    exit_code, out, err = cli("plan", "tiny.yaml")
    assert exit_code == 0, err
    words = "model is stored in float16, whose numbers overflow above 65,504 and bfloat16 would round"
    assert words in notes(out)["Weights:"]


def test_the_plan_says_what_gradient_checkpointing_costs(path, cli):
    """Of the stages that run with it; it is on where the config is silent."""
    assert "Gradient" not in notes(cli("plan", "tiny.yaml")[1])  # the run's own options turn it off
    on = "training.gradient_checkpointing=true"
    cost = "about a quarter more time, for less memory; `gradient_checkpointing: false` turns it off"
    cost += ", and wants a new smoke run"
    out = cli("plan", "tiny.yaml", on, "stages.reward.training.gradient_checkpointing=false")[1]
    assert notes(out)["Gradient"] == f"Gradient checkpointing, on in sft, dpo: {cost}"
    tiny.edit(path, {"training": {"max_steps": 1, "use_cpu": True}})
    assert notes(cli("plan", "tiny.yaml")[1])["Gradient"] == f"Gradient checkpointing, on in sft, reward, dpo: {cost}"
    run(path, "sft")
    assert notes(cli("plan", "tiny.yaml")[1])["Gradient"] == f"Gradient checkpointing, on in reward, dpo: {cost}"
