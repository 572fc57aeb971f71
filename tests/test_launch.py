"""What a stage finds of devices and of other processes: nothing that reading the config has decided, or refused."""

import errno
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
import warm
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from rich.console import Console
from test_equalities import run

from pipeline import stage
from pipeline.chain import run_folder
from pipeline.config import precision
from pipeline.config.load import load
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.launch import channel, files, joining, process, sharding
from pipeline.records import manifest
from pipeline.stages import ppo
from pipeline.system import device
from pipeline.system.errors import StageFailed, UserError
from pipeline.training.assertions import finite

ROOT = Path(__file__).parents[1]
STAGES = {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": tiny.PPO, "dpo": tiny.DPO}

# Reading a config builds TRL's config classes, which look for a device and join the other processes. "meta" stands for
# a GPU; waiting for a second process that never comes would not end.
LOOK = """
import os, sys, torch
from pipeline.config.load import load
before = dict(os.environ)
load(sys.argv[1])
assert dict(os.environ) == before
assert not torch.distributed.is_initialized()
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)
os.environ["ACCELERATE_TORCH_DEVICE"] = "meta"
from accelerate import PartialState
print(PartialState().device)
"""


@pytest.mark.parametrize("world_size", [None, 2])
def test_reading_a_config_joins_no_process_and_chooses_no_device(tmp_path, world_size):
    path = tiny.make_run(tmp_path, STAGES)
    own = {}
    if world_size:
        own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        own |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    command = [sys.executable, "-c", LOOK, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "meta"


def test_reading_a_config_leaves_a_state_that_is_there(tmp_path, monkeypatch):
    path = tiny.make_run(tmp_path, STAGES)
    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", "a GPU")
    states = [dict(state._shared_state) for state in (PartialState, AcceleratorState)]
    assert load(path).stages
    assert [dict(state._shared_state) for state in (PartialState, AcceleratorState)] == states


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    run(tiny.make_run(folder, STAGES), "sft", "reward")
    return folder


def test_a_launchers_options_do_not_reach_a_stage(parents, tmp_path, monkeypatch, capsys):
    """accelerate would take them where the stage says no precision: then PPO's first ratio would not be 1."""
    launchers = {"plain": {}, "launched": {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "1"}}
    for where, options in launchers.items():
        path = shutil.copytree(parents, tmp_path / where) / "tiny.yaml"
        tiny.edit(path, {"run_dir": str(tmp_path / where / "run")})
        manifest.drop(tmp_path / where / "run", ["reward"])
        for name in ("reward", "ppo"):
            for option, value in options.items():
                monkeypatch.setenv(f"ACCELERATE_{option}", value)
            run(path, name)
    for name in ("reward", "ppo"):
        plain, launched = (tmp_path / where / "run" for where in launchers)
        assert manifest.read(plain).stages[name].metrics == manifest.read(launched).stages[name].metrics
        weights = f"{name}/output/adapter_model.safetensors"
        assert (plain / weights).read_bytes() == (launched / weights).read_bytes()
    said = capsys.readouterr().out
    assert "reward: mixed_precision bf16 of the launcher is ignored: precision comes from model.dtype and bf16" in said
    assert "ppo: gradient_accumulation_steps 1 of the launcher is ignored: the stage's own is 2" in said


FILES = ROOT / "accelerate_configs"
TRAINED = tuple(name for name, row in STAGE_TYPES.items() if row.trl_config is not None)
REFUSED = {
    "fsdp2.yaml": {*TRAINED, "shift", "evaluate"},
    "zero3.yaml": {"reward", "ppo", "rloo", "grpo", "dpo", "kto", "shift", "evaluate"},
    "zero2.yaml": {"rloo", "dpo", "kto"},  # grpo has no reference by default
    "multi_gpu.yaml": set(),
    "single_gpu.yaml": set(),
    "cpu_2_processes.yaml": set(),
}


@pytest.fixture(scope="module")
def every_type(tmp_path_factory):
    """A config with a stage of every type."""
    rl = {"data": "demonstrations", "training": {"num_generations": 4}}
    sampled = {"data": "held_out", "max_new_tokens": 8}
    stages = {"pretrain": {"data": "texts", "training": {"max_length": 32}}, **STAGES, "rloo": rl, "grpo": rl}
    stages |= {"dpo": tiny.DPO, "kto": {"data": "labelled"}, "shift": sampled, "evaluate": sampled}
    path = tiny.make_run(tmp_path_factory.mktemp("types"), stages)
    tiny.write_rows(path.parent / "texts.jsonl", [{"text": row["chosen"]} for row in tiny.comparisons()])
    tiny.write_rows(path.parent / "held_out.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    labelled = [row | {"label": number % 2 == 0} for number, row in enumerate(tiny.demonstrations())]
    tiny.write_rows(path.parent / "labelled.jsonl", labelled)
    names = ("comparisons", "demonstrations", "texts", "held_out", "labelled")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    return path


def test_every_file_is_in_the_table():
    assert {file.name for file in FILES.glob("*.yaml")} == set(REFUSED)


@pytest.mark.parametrize("file", REFUSED)
def test_the_plan_refuses_what_a_launch_cannot_carry(every_type, file):
    config = load(every_type)
    try:
        files.of_stages(config, list(config.stages), str(FILES / file))
        refused = []
    except UserError as error:
        _, *refused = str(error).splitlines()
    assert {line.split(": ")[0].strip() for line in refused} == {f"stages.{name}" for name in REFUSED[file]}
    for line in refused:
        assert f"--accelerate-config is {FILES / file}" in line and "; use accelerate_configs/multi_gpu.yaml" in line


def test_what_decides_beside_the_type(every_type, monkeypatch):
    """A parent's adapter that must be merged under ZeRO-3; a KL penalty under ZeRO-2; a stage's own file."""
    file = str(FILES / "zero3.yaml")
    full = load(every_type, ("stages.sft.lora=null", f"stages.sft.accelerate_config={file}"))
    with pytest.raises(
        UserError, match=r"stages.sft: stages.sft.accelerate_config is .*zero3.yaml: .* would be merged"
    ):
        files.of_stages(full, ["sft", "reward"], None)
    mixed = load(every_type, ("stages.reward.training.bf16=true",))
    with pytest.raises(UserError, match="reward does not run under DeepSpeed ZeRO-2: in mixed precision it rounds the"):
        files.of_stages(mixed, ["reward"], str(FILES / "zero2.yaml"))
    clipped = load(every_type, ("stages.ppo.training.max_grad_norm=0.5",))
    with pytest.raises(UserError, match="gradients would be clipped as DeepSpeed's options say"):
        files.of_stages(clipped, ["ppo"], str(FILES / "zero2.yaml"))
    half = load(every_type, ("model.dtype=bfloat16", "stages.sft.training.bf16=true"))
    assert files.of_stages(half, ["sft"], str(FILES / "zero2.yaml"))
    for name in ("ppo", "reward"):
        with pytest.raises(UserError, match=r"without autocast DeepSpeed takes float32 weights only"):
            files.of_stages(half, [name], str(FILES / "zero2.yaml"))
    # Without instructions for bf16 autocast is off, unless somebody asks for it.
    monkeypatch.setattr(device, "_has_bf16_instructions", lambda: False)
    silent = load(every_type, ("model.dtype=bfloat16", "stages.sft.training.bf16=null"))
    with pytest.raises(UserError, match=r"without autocast DeepSpeed takes float32 weights only"):
        files.of_stages(silent, ["sft"], str(FILES / "zero2.yaml"))
    assert files.of_stages(half, ["sft"], str(FILES / "zero2.yaml"))
    with_kl = load(every_type, ("stages.grpo.training.beta=0.04", "stages.rloo.training.beta=0"))
    assert files.of_stages(with_kl, ["rloo"], str(FILES / "zero2.yaml"))
    with pytest.raises(UserError, match="grpo does not run under DeepSpeed ZeRO-2"):
        files.of_stages(with_kl, ["grpo"], str(FILES / "zero2.yaml"))


def test_a_deepspeed_file_of_its_own(every_type, tmp_path, monkeypatch):
    """Its path counts from the working directory, as accelerate reads it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "own.yaml"
    file.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n")
    with pytest.raises(UserError, match="reward does not run under DeepSpeed ZeRO-3"):
        files.of_stages(load(every_type), ["reward"], str(file))
    for content, word in {"[1, 2]": "holds no mapping", "a: [": "cannot be read"}.items():
        file.write_text(content)
        with pytest.raises(UserError, match=f"--accelerate-config: .*own.yaml {word}"):
            files.of_stages(load(every_type), ["reward"], str(file))


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed ZeRO-3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "DeepSpeed ZeRO-2"),
    ],
)
def test_a_stage_started_by_hand_refuses_it_too(parents, monkeypatch, environment, kind):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"stages.dpo: dpo does not run under {kind}"):
        run(parents / "tiny.yaml", "dpo")


def test_under_deepspeed_ppo_has_four_models(parents, monkeypatch, capsys):
    """DeepSpeed itself is not there; the models are those it would be given, and its first question is their size."""
    made = {}
    separate = ppo.separate_models

    def keep(*args):
        made["models"] = separate(*args)
        return made["models"]

    monkeypatch.setattr(ppo, "separate_models", keep)
    monkeypatch.setattr(sharding, "of_process", lambda: sharding.ZERO_2)
    centred = []
    init = ppo.CentredReward.__init__
    monkeypatch.setattr(ppo.CentredReward, "__init__", lambda self, *a: (init(self, *a), centred.append(self))[0])
    record = run(parents / "tiny.yaml", "ppo").stages["ppo"]
    assert "ppo: its four models are separate" in capsys.readouterr().out
    assert record.metrics["initial_kl"] == pytest.approx(0, abs=1e-6)
    models = [made["models"].policy, made["models"].reference, made["models"].value, centred[0]]
    assert [model.config.hidden_size for model in models] == [64] * 4
    assert len({id(p) for model in models for p in model.parameters()}) == sum(
        len(list(model.parameters())) for model in models
    )


def test_finite_weights():
    good = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    split_away = torch.nn.Parameter(torch.empty(0))
    replaced = torch.nn.Parameter(torch.empty(2, device="meta"))
    assert finite([good, split_away, replaced]) and finite([split_away])
    for bad in (math.nan, math.inf, -math.inf):
        assert not finite([good, torch.nn.Parameter(torch.tensor([0.0, bad]))])
        split_away.ds_tensor = torch.tensor([bad])  # where ZeRO-3 keeps this process's part
        assert not finite([good, split_away])


def test_an_error_that_another_process_finds_is_said(monkeypatch, capsys, tmp_path):
    """A judge's value of a row that is not the first process's, for example."""

    def find(*_):
        raise UserError("row 3 is bad")

    monkeypatch.setenv("RANK", "1")
    (tmp_path / "launch.json").write_text("{}")
    monkeypatch.setenv(channel.FOLDER, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["stage", "config.yaml", "evaluate"])
    monkeypatch.setattr(stage, "load", find)
    with pytest.raises(SystemExit) as stopped:
        stage.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "\nerror: row 3 is bad\n"
    assert channel.error_in(tmp_path) == "row 3 is bad"  # for the launcher
    assert channel.FOLDER not in os.environ  # a run that a user's function starts is another launcher's


def test_of_several_errors_the_first_is_told(tmp_path):
    """Another process may fail only since the first has gone; a file that is half written is no error."""
    assert channel.error_in(tmp_path) is None
    (tmp_path / "7.partial").write_text("row")
    assert channel.error_in(tmp_path) is None
    message = "row 3 is bad:\n  it ends in \udcff"
    channel.report_error(tmp_path, message)
    os.utime(next(tmp_path.glob("*.txt")), (1, 1))
    (tmp_path / "9.txt").write_text("the others are gone")
    assert channel.error_in(tmp_path) == "row 3 is bad:\n  it ends in \\udcff"


def test_an_error_by_hand_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.delenv(channel.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    launch, folder = channel.received()
    assert launch == channel.Launch() and folder is None
    channel.report_error(folder, "row 3 is bad")
    assert list(tmp_path.iterdir()) == []


SAID = channel.Launch(launcher=7, reason="config changed: model.revision ('\u00e9' -> '\u0436\0')", redo=True)


def test_what_the_launcher_says_arrives_once(monkeypatch, tmp_path):
    """In any locale, and a process that the stage starts hears nothing of it."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with channel.opened(SAID, tmp_path) as folder:
        assert folder.isascii() and not folder.startswith(str(tmp_path))
        monkeypatch.setenv(channel.FOLDER, folder)
        assert channel.received() == (SAID, Path(folder))
        assert channel.FOLDER not in os.environ and "PYTHONSAFEPATH" not in os.environ
        assert channel.received() == (channel.Launch(), None)
    assert not Path(folder).exists()
    monkeypatch.setenv(channel.FOLDER, folder)
    with pytest.raises(UserError, match="the `rlhf run` that starts this stage has ended"):
        channel.received()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_full_temporary_folder_stops_no_stage(monkeypatch, tmp_path, what):
    """Neither a folder nor a file can be made there; the stage, which has never run, takes its run folder as it is."""
    config = load(tiny.make_run(tmp_path, {"sft": tiny.SFT}))
    make_folder = channel.tempfile.mkdtemp
    write = channel._write

    def full(suffix=None, prefix=None, dir=None):
        if dir is None and what == "folder":
            raise OSError(errno.ENOSPC, "no space")
        return make_folder(suffix, prefix, dir)

    def write_unless_full(folder, launch):
        if what == "file" and not folder.startswith(str(config.run_path)):
            raise OSError(errno.ENOSPC, "no space")
        write(folder, launch)

    monkeypatch.setattr(channel.tempfile, "mkdtemp", full)
    monkeypatch.setattr(channel, "_write", write_unless_full)
    seen = []

    def look(*_):
        monkeypatch.undo()
        run_folder.open_run(config)  # as a stage does before it takes its lock
        seen.extend(path.name for path in config.run_path.glob("launch-*"))
        return [sys.executable, "-c", "raise SystemExit(1)"]

    class Popen(subprocess.Popen):
        def __init__(self, argv, **options):
            super().__init__(look(), **options)

    monkeypatch.setattr(process.subprocess, "Popen", Popen)
    with (tmp_path / "shown.txt").open("w") as shown, pytest.raises(StageFailed):
        process.run_stage(config, "sft", (), None, "not finished yet", False, Console(file=shown))
    assert len(seen) == 1
    assert [path.name for path in config.run_path.iterdir()] == ["sft"]


# In the place of a stage: a process of a launch leaves an error, and the launch ends as torchrun does; then a crash
# whose log looks like a user's error.
FAILS = """
import sys
from pipeline.launch import channel
launch, folder = channel.received()
assert launch.reason == "not finished yet" and not launch.redo
if sys.argv[1] == "user":
    channel.report_error(folder, "judge gave None")
print("error: an old message\\nexitcode : 2 \\nChildFailedError", flush=True)
raise SystemExit(1)
"""


@pytest.mark.parametrize(
    ("kind", "exit_code", "words"),
    [("user", 2, "stage 'sft' stopped: judge gave None"), ("crash", 1, "stage 'sft' ended with exit code 1. The last")],
)
def test_the_launcher_reads_the_error_and_not_the_log(tmp_path, monkeypatch, kind, exit_code, words):
    config = load(tiny.make_run(tmp_path, {"sft": tiny.SFT}))
    monkeypatch.setattr(process, "command", lambda *_: [sys.executable, "-c", FAILS, kind])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with (tmp_path / "shown.txt").open("w") as shown, pytest.raises(StageFailed) as failed:
        process.run_stage(config, "sft", (), None, "not finished yet", False, Console(file=shown))
    assert failed.value.exit_code == exit_code
    assert str(failed.value).startswith(words)
    assert [path.name for path in (config.run_path / "sft").iterdir()] == ["log.txt"]


def test_one_process_does_not_share_its_batch_among_gpus(monkeypatch):
    """torch's DataParallel would multiply the batch by the number of GPUs."""
    seen = types.SimpleNamespace(num_processes=1, device=torch.device("cuda"), distributed_type=DistributedType.NO)
    monkeypatch.setattr(joining, "PartialState", lambda **_: seen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert joining.join_processes({}) is seen
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"one process sees 2 GPUs: .* Set CUDA_VISIBLE_DEVICES to one of them"):
        joining.join_processes({})
    seen.distributed_type = DistributedType.MULTI_GPU
    assert joining.join_processes({}) is seen


def test_one_process_sees_one_gpu_under_accelerate_too(every_type, tmp_path, monkeypatch):
    config = load(every_type)
    own = {}
    for name, text in (("none", ""), ("own", "gpu_ids: '2'\n"), ("all", "gpu_ids: all\n")):
        own[name] = tmp_path / f"{name}.yaml"
        own[name].write_text(f"distributed_type: 'NO'\n{text}")

    def gpu_ids(file):
        argv = process.command(config, "sft", (), str(file))
        return argv[argv.index("--gpu_ids") + 1] if "--gpu_ids" in argv else None

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert load_config_from_file(str(FILES / "single_gpu.yaml")).gpu_ids == "0"
    assert [gpu_ids(file) for file in (FILES / "single_gpu.yaml", *own.values())] == [None, "0", None, "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert [gpu_ids(file) for file in (FILES / "single_gpu.yaml", *own.values())] == ["3"] * 4
    assert gpu_ids(FILES / "multi_gpu.yaml") is None


def test_a_stage_on_the_cpu_sees_no_gpu(every_type, monkeypatch):
    """PEFT would read its adapters through one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert process.environment()["CUDA_VISIBLE_DEVICES"] == "3"
    assert process.environment("multi_gpu.yaml")["CUDA_VISIBLE_DEVICES"] == "3,4"
    assert process.environment(None, True)["CUDA_VISIBLE_DEVICES"] == ""
    assert process.environment("multi_gpu.yaml", True)["CUDA_VISIBLE_DEVICES"] == "3,4"  # its file says what it sees
    config = load(every_type, ("training.use_cpu=false", "stages.sft.training.use_cpu=true"))
    assert [precision.asks_for_cpu(config, name) for name in ("sft", "reward")] == [True, False]


JOIN = """
import sys, torch
from pipeline.launch.joining import join_processes
join_processes({"use_cpu": True} | eval(sys.argv[1]))
group = torch.distributed.distributed_c10d._get_default_group()
print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""


@pytest.mark.parametrize(("training", "seconds"), [({"ddp_timeout": 77}, 77), ({}, 1800)])
def test_processes_wait_for_one_another_as_long_as_ddp_timeout_says(training, seconds):
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", JOIN, str(training)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | launched, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == seconds


def test_a_file_that_is_named_like_the_package(tmp_path):
    """The working directory holds a pipeline.py, the judge lies beside the config; with and without accelerate."""
    sampled = {"data": "demonstrations", "max_new_tokens": 4, "num_prompts": 2, "policies": [], "judge": "judge:score"}
    (tmp_path / "own").mkdir()
    sft = tiny.SFT | {"accelerate_config": str(FILES / "single_gpu.yaml"), "training": {"max_steps": 1}}
    data = {"demonstrations": {"path": "demonstrations.jsonl", "heldout": 0.5}}
    path = tiny.make_run(tmp_path / "own", {"sft": sft, "evaluate": sampled}, data=data)
    (path.parent / "judge.py").write_text("def score(prompt, completion):\n    return len(completion)\n")
    (tmp_path / "pipeline.py").write_text("raise SystemExit('the wrong pipeline')\n")
    command = [sys.executable, "-P", "-m", "pipeline", "run", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = manifest.read(path.parent / "run").stages
    assert "judge" in found["evaluate"].metrics["policies"]["sft"]


def test_an_error_in_one_process_under_accelerate_is_the_users_message(tmp_path):
    """With its reasons, which stand on lines of their own; what a judge starts finds the modules beside it."""
    sampled = {"data": "demonstrations", "max_new_tokens": 4, "num_prompts": 2, "policies": [], "judge": "judge:score"}
    data = {"demonstrations": {"path": "demonstrations.jsonl", "heldout": 0.5}}
    stages = {"sft": tiny.SFT | {"training": {"max_steps": 1}}, "evaluate": sampled}
    path = tiny.make_run(tmp_path, stages, data=data)
    (tmp_path / "solution.py").write_text("ANSWER = 42\n")
    (tmp_path / "check.py").write_text("import solution\nprint(solution.ANSWER)\n")
    (tmp_path / "judge.py").write_text(
        "import pathlib, subprocess, sys\n"
        "def score(prompt, completion):\n"
        "    command = [sys.executable, pathlib.Path(__file__).with_name('check.py')]\n"
        "    found = subprocess.run(command, capture_output=True, text=True).stdout\n"
        "    return float(found) if completion in ('', 'Yes.') else f'it is{found}'\n"
    )
    launch = tmp_path / "single.yaml"
    launch.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n")
    done = warm.rlhf("run", path, "--accelerate-config", launch, folder=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: stage 'evaluate' stopped: function judge:score gives 'it is42\\n' to"), (
        done.stderr
    )


def test_the_environment_is_read_when_it_is_asked_for(monkeypatch):
    """The datasets library puts a copy in the place of `os.environ`, which a default of an argument would not see."""
    monkeypatch.setattr(os, "environ", {"ACCELERATE_USE_FSDP": "true"})
    assert sharding.of_process() == sharding.FSDP
