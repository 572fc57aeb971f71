"""The device of a stage and its autocast: chosen by what the machine has, said in the plan, and refused in one message.

This machine may have a GPU or none: where it matters, a test puts one in the place of torch's answers.
"""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console
from test_equalities import run

from pipeline import launcher, stage
from pipeline.config import precision
from pipeline.config.load import load
from pipeline.config.schema import TrainingStage
from pipeline.launch import devices
from pipeline.records import manifest
from pipeline.system import device
from pipeline.system.device import Device
from pipeline.system.errors import UserError
from pipeline.training.context import StageContext

ROOT = Path(__file__).parents[1]
STAGES = {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": tiny.PPO}
SILENT = {"max_steps": 1, "per_device_train_batch_size": 4}  # of the device and of precision
FAST = Device("cpu", "CPU", device.NO_GPU, "native")
SLOW = Device("cpu", "CPU", device.NO_GPU, "slow")
OLD = Device("cuda", "Some GPU", "a GPU is visible", "none")
NEW = Device("cuda", "Some GPU", "a GPU is visible", "native", tf32=True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_drivers", lambda: [])
    monkeypatch.setenv(device.USE_CPU, "")


@pytest.fixture
def path(tmp_path, no_gpu):
    """A run that says nothing of the device, nor of precision."""
    return tiny.make_run(tmp_path, STAGES, training=SILENT)


def notes(out: str) -> dict[str, str]:
    lines = [line for line in out.splitlines() if line.startswith(("Device: ", "Autocast: "))]
    return {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}


@pytest.mark.parametrize(
    ("text", "ability"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16 fma\nbugs\t\t:\n", "native"),
        ("flags\t\t: fpu amx_tile amx_bf16\n", "native"),
        ("processor : 0\nFeatures\t: fp asimd i8mm bf16 dgh\n", "native"),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_vnni\nbugs\t\t: bf16\n", "slow"),
        ("model name : bf16\n", "slow"),
        (None, "slow"),
    ],
)
def test_a_cpu_lists_its_instructions(tmp_path, monkeypatch, text, ability):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(device, "_CPU_INFO", file)
    assert device.cpu("so").bf16 == ability


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not tell them")
def test_this_cpu_is_what_torch_says():
    has = torch.cpu.get_capabilities()
    expected = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    assert (device.cpu("so").bf16 == "native") == expected


@pytest.mark.parametrize(
    ("options", "on", "type_", "given_up"),
    [
        ({}, FAST, "bf16", False),
        ({}, SLOW, "no", True),
        ({}, OLD, "no", True),
        ({}, NEW, "bf16", False),
        ({"bf16": None}, SLOW, "no", True),
        ({"bf16": True}, SLOW, "bf16", False),
        ({"bf16": False}, NEW, "no", False),
        ({"fp16": True}, NEW, "fp16", False),
    ],
)
def test_the_users_word_counts_and_the_default_where_the_device_has_it(path, options, on, type_, given_up):
    config = load(path)
    section = config.stages["sft"].model_copy(update={"training": options})
    choice = precision.autocast(section, on)
    assert (choice.type, choice.given_up) == (type_, given_up)
    assert precision.autocast(config.section("ppo", TrainingStage), on).type == "no"  # PPOTrainer has none


def test_the_plan_says_device_and_precision(path, cli, monkeypatch):
    monkeypatch.setattr(device, "_has_bf16_instructions", lambda: True)
    code, out, err = cli("plan", path)
    assert code == 0, err
    assert notes(out) == {
        "Device": "CPU (no GPU is visible)",
        "Autocast": "bf16 in sft, reward (TRL's default); off in ppo (PPOTrainer has none)",
    }
    monkeypatch.setattr(device, "_has_bf16_instructions", lambda: False)
    code, out, err = cli("plan", path, "stages.reward.training.bf16=true", "stages.sft.training.use_cpu=true")
    assert code == 0, err
    lacks = "the CPU has no instructions for bf16"
    assert notes(out) == {
        "Device": "CPU (`use_cpu: true`) in sft; CPU (no GPU is visible) in reward, ppo",
        "Autocast": f"off in sft ({lacks}, TRL's default; `bf16: true` turns it on all the same); "
        f"bf16 in reward (`bf16: true`, but {lacks}: `bf16: false` may be much faster); "
        "off in ppo (PPOTrainer has none)",
    }


@pytest.mark.parametrize("option", ["fp16", "tf32"])
def test_what_a_cpu_lacks_is_refused_before_anything_is_trained(path, cli, option):
    """By the plan, by the run and by a stage that is started by hand; never by a traceback of TrainingArguments."""
    override = f"stages.reward.training.{option}=true"
    code, _, err = cli("plan", path, override)
    assert code == 2
    head, line = err.splitlines()
    assert head.endswith("1 stage option cannot work on this device")
    assert line.startswith(f"  stages.reward: `{option}: true` needs ") and "CPU (no GPU is visible)" in line
    with pytest.raises(UserError, match="1 stage option cannot work on this device"):
        launcher.run(load(path, (override,)), Console())
    assert not (path.parent / "run" / "sft").exists()
    run(path, "sft")
    with pytest.raises(UserError, match=f"^stages.reward: `{option}: true` needs "):
        stage.run(load(path, (override,)), "reward")


def test_a_gpu_without_bf16_is_told_apart(path):
    config = load(path, ("stages.sft.training.bf16=true", "stages.reward.training.tf32=true"))
    assert precision.faults(config, "sft", NEW) == precision.faults(config, "reward", NEW) == []
    (fault,) = precision.faults(config, "sft", OLD)
    assert fault.startswith("`bf16: true`: the Some GPU cannot compute in bf16.")
    assert len(precision.faults(config, "reward", OLD)) == 1
    assert precision.faults(config, "ppo", OLD) == []
    silent = config.section("sft", TrainingStage).model_copy(update={"training": {}})
    assert precision.autocast(silent, OLD).why == "the Some GPU has no instructions for bf16, TRL's default"


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_config_that_says_nothing_trains_without_a_gpu(path, capsys, monkeypatch, has_bf16):
    """TRL's bf16 is on where the processor has instructions for it, and the stage's log says which."""
    monkeypatch.setattr(device, "_has_bf16_instructions", lambda: has_bf16)
    built = []
    original = StageContext.training_args

    def training_args(self, **ours):
        built.append(original(self, **ours))
        return built[-1]

    monkeypatch.setattr(StageContext, "training_args", training_args)
    run(path, "sft")
    assert [(args.use_cpu, args.bf16) for args in built] == [(True, has_bf16)]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sft: on the ")]
    kind = "bf16 autocast (TRL's default)" if has_bf16 else "no autocast (the CPU has no instructions for bf16"
    assert len(said) == 1 and said[0].startswith(f"sft: on the CPU (no GPU is visible), weights in float32, {kind}")


def test_two_processes_without_a_gpu_and_without_use_cpu(tmp_path):
    """By hand, as the README of accelerate_configs says it, with bf16 as users write it for a GPU."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT}, training=SILENT | {"bf16": True})
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command = [*launch, str(ROOT / "accelerate_configs/cpu_2_processes.yaml"), "-m", "pipeline.stage", str(path), "sft"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sft: on the CPU (") == 1
    assert manifest.read(tmp_path / "run").stages["sft"].world_size == 2


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_shipped_config_asks_for_what_a_cpu_lacks(no_gpu, config):
    """tests/test_shipped.py trains them, with the options that they are shipped with."""
    loaded = load(config)
    found = devices.of_stages(loaded, dict.fromkeys(loaded.stages))
    assert {one.kind for one in found.values()} == {"cpu"}


def test_what_torch_says_of_a_gpu(path, monkeypatch):
    """A GPU of today, one that emulates bf16, one that cannot: as transformers asks before it builds its options."""
    config = load(path)
    on_cpu = load(path, ("training.use_cpu=true",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    kinds = [(9, True, True, "native"), (7, False, True, "slow"), (6, False, False, "none")]
    for major, native, emulated, ability in kinds:
        properties = types.SimpleNamespace(name="Some GPU", major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        supported = {True: emulated, False: native}

        def is_bf16_supported(including_emulation=True, answers=supported):
            return answers[including_emulation]

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        assert device.of_torch() == Device("cuda", "Some GPU", "a GPU is visible", ability, tf32=major >= 8)
    monkeypatch.setenv(device.USE_CPU, "True")  # as `accelerate launch` writes it
    assert device.of_torch().why == "ACCELERATE_USE_CPU is set"
    assert precision.device_of(on_cpu, "sft", NEW).why == "`use_cpu: true`"
    assert precision.device_of(config, "sft", NEW) == NEW


def test_a_launch_file_may_ask_for_the_cpu(path, tmp_path, monkeypatch):
    """accelerate hands `use_cpu` on to one process, and forgets it where it starts several."""
    monkeypatch.setattr(device, "of_stages", lambda: NEW)
    files = {}
    for kind in ("NO", "MULTI_GPU"):
        files[kind] = tmp_path / f"{kind}.yaml"
        files[kind].write_text(f"distributed_type: '{kind}'\nuse_cpu: true\nnum_processes: 1\n")
    found = devices.of_stages(load(path), {"sft": str(files["NO"]), "reward": str(files["MULTI_GPU"]), "ppo": None})
    assert [one.kind for one in found.values()] == ["cpu", "cuda", "cuda"]


def test_the_launcher_imports_no_torch_to_see_that_there_is_no_gpu():
    """And a GPU is looked at by a process of its own: what it takes of its memory ends with it."""
    look = "import sys; from pipeline.system import device; device._drivers = lambda: {}; "
    look += "print(device.of_stages().kind); assert 'torch' not in sys.modules"
    for drivers in ("[]", "['nvidia0']"):
        command = [sys.executable, "-c", look.format(drivers)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "cpu\n"), done.stderr


def test_a_gpu_is_looked_at_once_and_a_missing_one_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv(device.USE_CPU, "")
    monkeypatch.setattr(device, "_drivers", lambda: ["nvidia0"])
    monkeypatch.setattr(device, "_key", lambda: "this boot of this machine")
    answers = [SLOW, NEW, OLD]
    monkeypatch.setattr(device, "_ask", lambda: vars(answers.pop(0)))
    assert [device.of_stages() for _ in range(3)] == [SLOW, NEW, NEW]
