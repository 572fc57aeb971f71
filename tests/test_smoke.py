"""A smoke run takes every stage through two steps beside the run, and foretells what the run takes."""

import hashlib
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
from filelock import FileLock
from trl.trainer.utils import RepeatSampler

from pipeline import stage
from pipeline.chain import basis, budget, cuts, forecast, preflight, smoke
from pipeline.chain.sizes import Size
from pipeline.config import batch_sizes
from pipeline.config.load import load
from pipeline.config.options import effective
from pipeline.config.schema import Ppo, Sampled
from pipeline.config.stage_types import KINDS
from pipeline.data import run_tokenizer
from pipeline.data.sieve import spread
from pipeline.launch import devices, files, process
from pipeline.records import manifest
from pipeline.records.progress import Entry, Reader
from pipeline.records.stage_folder import LOCK
from pipeline.system import locks
from pipeline.system.device import Device, num_cores

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = Device("cpu", "CPU", "no GPU is visible", "slow")
GPU = Device("cuda", "a GPU", "a GPU is visible", "native")
PPO = {"total_episodes": 48, "num_mini_batches": 1, "num_ppo_epochs": 1, "response_length": 8}
ONLINE = {"num_generations": 2, "max_completion_length": 8, "num_train_epochs": 1}
EVALUATE = {"data": "comparisons", "policies": [], "max_new_tokens": 4}
EVERY_TYPE = {
    "gate": "stop",
    "data.comparisons.heldout": 0.4,
    "data.labelled": {"path": "labelled.jsonl"},
    "stages.pretrain.training": {"num_train_epochs": 3, "max_length": 64},
    "stages.sft.training": {"num_train_epochs": 2, "learning_rate": 1e-3},
    "stages.reward": {"data": "comparisons", "eval_data": "comparisons", "training": {"num_train_epochs": 2}},
    "stages.ppo.training": PPO,
    "stages.ppo-on-grpo": {"type": "ppo", "trainer": "grpo", "data": "prompts", "training": PPO},
    "stages.rloo": {"data": "prompts", "training": ONLINE},
    "stages.grpo": {"data": "prompts", "training": ONLINE},
    "stages.dpo.training": {"num_train_epochs": 1},
    "stages.kto": {"data": "labelled", "training": {"num_train_epochs": 1}},
    "stages.evaluate": {"data": "comparisons", "max_new_tokens": 8, "batch_size": 4},
}


def write(folder):
    """Write the config of every type of stage with its data; returns its path."""
    path = tiny.write_config(folder, **EVERY_TYPE)
    labelled = [row | {"label": number % 2 == 0} for number, row in enumerate(tiny.chain_rows()["demos"])]
    tiny.write_rows(folder / "labelled.jsonl", labelled)
    return path


def contents(folder):
    """The digest of every file below a folder."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def words(text):
    return " ".join(text.split())


def rows_of(shown, title):
    """The cells of a table that was shown, by their first one."""
    cells: dict[str, list[str]] = {}
    name = ""
    for line in shown.split(title, 1)[1].splitlines():
        row = [cell.strip() for cell in line.split("│")[1:-1]]
        if row and row[0]:
            name = row[0]
            cells[name] = row
        elif row:
            cells[name] = [f"{a} {b}".strip() for a, b in zip(cells[name], row, strict=True)]
        elif line.startswith("└"):
            break
    return cells


def test_every_type_of_stage_beside_the_run(tmp_path, rlhf, cli):
    path = write(tmp_path)
    config = load(path)
    assert {its.kind for its in config.stages.values()} == KINDS.keys()
    before = rows_of(cli("plan", path)[1], "tiny: plan")
    code, _, err = cli("plan", path, "--minutes", "1")
    assert code == 2 and f"from a smoke run; run it first:\n  rlhf run {path} --smoke\n" in err
    done = rlhf("run", path, "--smoke")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    folder = tmp_path / "runs" / "tiny-smoke"
    assert not folder.with_name("tiny").exists()
    recorded = manifest.read(folder)
    assert recorded.name == "tiny-smoke"
    assert list(recorded.stages) == list(config.stages)
    for name, record in recorded.stages.items():
        steps = record.metrics.get("updates", record.metrics.get("steps"))
        assert steps == (None if isinstance(config.stages[name], Sampled) else 2), name
    changed = rows_of(done.stdout, "what is changed")
    rows = recorded.stages["sft"].datasets["data"]["rows"]  # the others are evaluated on
    assert changed["sft"] == ["sft", f"8 of {rows}", f"2 of {math.ceil(rows / 4) * 2}", "4", ""]
    assert changed["ppo"] == ["ppo", f"8 of {rows}", "2 of 12", "4", "8"]
    assert "Every stage works." in done.stdout and ": gate: " not in done.stdout
    measured = forecast.read(folder)
    assert list(measured) == list(config.stages)
    check_forecast(config, measured["sft"], folder)
    code, out, err = cli("plan", path)
    assert code == 0, err
    assert "as the smoke run foretells" in out
    after = rows_of(out, "tiny: plan")
    for name, row in before.items():
        time = after[name].pop(-2)
        assert after[name] == row  # the same rows, tokens, steps and parameters
        assert float(time.split()[0]) > 0, name
    check_values(path, cli, sum(seconds(row[-2]) for row in rows_of(out, "tiny: plan").values()))
    # Another device, type or adapter would take another time.
    other = rows_of(cli("plan", path, "lora.r=2")[1], "tiny: plan")
    assert other["sft"][-2] == "" and other["pretrain"][-2] != ""


def seconds(text):
    number, unit = text.split()
    return float(number) * {"s": 1, "min": 60, "hours": 3600}[unit]


def check_values(path, cli, total):
    """The command for a shorter run is one that the plan foretells the same time of; a long time changes nothing."""
    code, out, err = cli("plan", path, "--minutes", "0.01")
    assert code == 0, err
    found = {name: row for name, row in rows_of(out, "tiny: a run of").items() if name != "stage"}
    assert all(" of " in row[1] for name, row in found.items() if name not in ("reward-shift", "evaluate")), found
    then = {name: row[3] for name, row in found.items()}
    assert then.keys() == load(path).stages.keys()
    assert "It cannot be shorter: " in out and "The gate may stop it" in out
    assert total > sum(map(seconds, then.values()))
    lines = out.splitlines()
    command = shlex.split(lines[-1])
    (least,) = [line for line in lines if line.startswith("The least that says something takes about ")]
    _, _, longer = lines[lines.index(least) + 1].partition("rlhf plan ")
    assert longer == f"{path} --minutes 1"
    assert command[:3] == ["rlhf", "run", str(path)]
    code, shown, err = cli("plan", *command[2:])
    assert code == 0, err
    assert {name: row[-2] for name, row in rows_of(shown, "tiny: plan").items() if name != "stage"} == then
    beside = cli("plan", *command[2:], "name=tiny-try")[1]  # as it is offered
    assert {name: row[-2] for name, row in rows_of(beside, "tiny-try: plan").items() if name != "stage"} == then
    out = cli("plan", path, "--minutes", "600")[1]
    assert {row[1] for name, row in rows_of(out, "tiny: a run of").items() if name != "stage"} == {"-"}
    assert out.splitlines()[-2:] == ["The run:", f"rlhf run {path}"]


def check_forecast(config, one, folder):
    """What is foretold of SFT is what was measured, times the tokens of the run; told apart from the log's tokens."""
    times = {entry.step: entry.time for entry in Reader(folder / "sft" / "progress.jsonl").read() if entry.logs}
    history = json.loads((folder / "sft" / "log_history.json").read_text())
    seen = {entry["step"]: entry["num_tokens"] for entry in history if "num_tokens" in entry}
    assert one.units["training"] == pytest.approx(seen[2] - seen[1], abs=1e-6)
    assert 0 < one.seconds["training"] <= times[2] - times[1] + 1e-6
    data = tiny.StageRows(config, run_tokenizer.open_saved(folder / "tokenizer", False))
    lengths = [len(ids) for ids in data.prepare("sft", "data").rows["input_ids"]]
    size = Size(len(lengths), sum(lengths), len(lengths), 8, 0, 0, 0)
    speed = one.seconds["training"] / one.units["training"]
    looked_at = one.seconds["first_tokens"] / one.units["first_tokens"] * sum(lengths)
    expected = one.fixed + speed * 2 * sum(lengths) + looked_at
    assert forecast.seconds(one, forecast.work(config, "sft", size)) == pytest.approx(expected, rel=1e-12)


def in_this_process(config, name, overrides, *_):
    """Run a stage here: it would import for ten seconds in a process of its own."""
    stage.run(load(config.source, overrides), name)


def test_a_second_one_begins_anew_and_leaves_the_run_alone(tmp_path, cli, monkeypatch):
    lock = tmp_path / "runs" / ".tiny-smoke.lock"
    held: list[bool] = []

    def run_stage(*args):
        held.append(locks.is_held(lock))
        in_this_process(*args)

    monkeypatch.setattr(process, "run_stage", run_stage)
    path = tiny.write_config(tmp_path)
    assert cli("run", path, "--until", "sft")[0] == 0
    run = tmp_path / "runs" / "tiny"
    before = contents(run)
    folder = run.with_name("tiny-smoke")
    started = []
    for _ in range(2):
        code, _, err = cli("run", path, "--smoke", "--until", "sft", "training.learning_rate=0.5")
        assert code == 0, err
        recorded = manifest.read(folder)
        assert list(recorded.stages) == ["pretrain", "sft"]
        assert {record.reason for record in recorded.stages.values()} == {manifest.NOT_FINISHED}
        started.append(json.loads((folder / "sft" / "progress.jsonl").read_text().splitlines()[0])["time"])
    assert started[0] < started[1]
    assert held == [False] * 2 + [True] * 4 and not locks.is_held(lock)
    assert contents(run) == before
    # What the run keeps of its data is as it was: nothing is stale.
    plan = rows_of(cli("plan", path)[1], "tiny: plan")
    assert [plan[name][-1] for name in ("pretrain", "sft")] == ["skip: finished, nothing changed"] * 2
    with FileLock(folder / "sft" / LOCK).acquire(timeout=0):
        code, _, err = cli("run", path, "--smoke", "--until", "sft")
    assert code == 2 and "another process works in" in err and (folder / "sft" / "output").is_dir()
    # Between two stages no process holds a stage's lock.
    monkeypatch.setattr(smoke, "WAIT", 0)
    with FileLock(lock).acquire(timeout=0):
        code, _, err = cli("run", path, "--smoke", "--until", "sft")
    said = words(err)
    assert code == 2 and f"another smoke run is at work in {folder}; give the same command again when" in said
    assert (folder / "sft" / "output").is_dir()


def test_a_run_that_has_the_name_of_a_smoke_run_is_left_alone(tmp_path, cli):
    path = tiny.write_config(tmp_path)
    folder = tmp_path / "runs" / "tiny-smoke"
    (folder / "sft" / "output").mkdir(parents=True)
    (folder / "sft" / LOCK).touch()
    (folder / "sft" / "output" / "weights").write_text("dear")
    manifest.update(folder, "tiny-smoke")
    before = contents(folder)
    code, _, err = cli("run", path, "--smoke")
    assert code == 2 and "holds a run that is no smoke run, and a smoke run would remove it" in err
    assert contents(folder) == before


FAILS = """
from pathlib import Path

def score(prompt, completion):
    if Path(__file__).with_name("run-smoke").joinpath("sft", "output").is_dir():
        raise ValueError("the judge is out")
    return 1.0
"""


def test_a_stage_that_fails_ends_it(tmp_path, rlhf):
    """The function works when it is tried before the first stage, and fails once SFT is finished."""
    (tmp_path / "judge.py").write_text(FAILS)
    online = {"num_generations": 2, "max_completion_length": 4}
    stages = {
        "sft": tiny.SFT,
        "rloo": {"data": "demonstrations", "reward_functions": ["judge:score"], "training": online},
        "dpo": tiny.DPO,
    }
    path = tiny.make_run(tmp_path, stages)
    done = rlhf("run", path, "--smoke")
    assert done.returncode == 2
    assert "stage 'rloo'" in done.stderr and "the judge is out" in done.stderr
    folder = tmp_path / "run-smoke"
    assert list(manifest.read(folder).stages) == ["sft"]
    assert forecast.read(folder) == {} and not (folder / "dpo").exists()
    assert "Every stage works" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_rewards_that_tell_nothing_apart_end_no_smoke_run(tmp_path, cli, monkeypatch):
    """In two steps no answer may be right. In the run itself this would be a fault."""
    monkeypatch.setattr(process, "run_stage", in_this_process)
    (tmp_path / "judge.py").write_text("def same(prompt, completion):\n    return 1.0\n")
    online = {"num_generations": 2, "max_completion_length": 4, "beta": 0.0}
    grpo = {"data": "demonstrations", "reward_functions": ["judge:same"], "training": online}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "grpo": grpo})
    code, _, err = cli("run", path, "--smoke")
    assert code == 0, err
    said = [entry.said for entry in Reader(tmp_path / "run-smoke" / "grpo" / "progress.jsonl").read() if entry.said]
    assert any("grpo: all completions of each prompt had equal rewards" in text for text in said)


def test_a_gpu_keeps_whole_batches_of_held_out_rows():
    """They decide about memory, as the rows that are trained on do; a stream's own rows are not counted."""
    config = load(CONFIGS / "quickstart.yaml", ("stages.reward.training.per_device_train_batch_size=1",))
    assert config.stages["reward"].eval_data is not None
    assert cuts_of(config, GPU)["reward"].rows == 8  # TRL's per_device_eval_batch_size
    assert cuts_of(config, GPU)["dpo"].rows == 2 * 16
    for processes, rows in ((1, 100), (4, 400)):
        on = dict.fromkeys(config.stages, GPU)
        its = cuts.of_stages(config, sizes_of(config), on, dict.fromkeys(config.stages, processes))
        assert its["evaluate"].rows == rows  # a batch for each process


def test_options_that_it_cannot_take(tmp_path, cli):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    code, _, err = cli("run", path, "--smoke", "--only", "sft")
    assert code == 2 and "--smoke begins anew with all stages" in err


def sizes_of(config, per_row=300, parameters=0):
    """Sizes as if every stage had 1000 rows."""
    sizes = {}
    for name, its in config.stages.items():
        steps = 0 if isinstance(its, Sampled) else 500
        sizes[name] = Size(1000, 1000 * per_row, 1000, steps, 0, 0, parameters if steps else 0)
    return sizes


def cuts_of(config, device, **sizes):
    on = dict.fromkeys(config.stages, device)
    return cuts.of_stages(config, sizes_of(config, **sizes), on, dict.fromkeys(config.stages, 1))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_every_shipped_config_can_be_made_short(file, device):
    """All that is changed is right for TRL too. A GPU keeps what decides about memory."""
    config = load(file)
    its = cuts_of(config, device, parameters=500_000_000)
    short = load(file, smoke.overrides(config, its, device is GPU))
    assert short.run_path == config.run_path.with_name(f"{config.name}-smoke")
    assert list(short.stages) == list(config.stages)
    memory = ("per_device_train_batch_size", "max_length", "response_length", "max_completion_length")
    changed = {"total_episodes", "max_steps", "logging_steps", "logging_strategy", "report_to", *memory}
    changed |= {"gradient_accumulation_steps", "num_generations"}
    for name, its in short.stages.items():
        if isinstance(its, Sampled):
            continue
        before = config.stages[name].training
        after = its.training
        if device is GPU:
            assert {key: after.get(key) for key in memory} == {key: before.get(key) for key in memory}, name
        if isinstance(its, Ppo):
            batch = after["per_device_train_batch_size"] * after["gradient_accumulation_steps"]
            assert after["total_episodes"] == cuts.STEPS * batch == short.smoke.rows[name], name
        else:
            assert after["max_steps"] == cuts.STEPS
        others = {key: value for key, value in before.items() if key not in changed}
        assert {key: value for key, value in after.items() if key not in changed} == others, name
    for key in ("model", "tokenizer", "quantization", "lora", "data", "checks", "seed"):
        assert getattr(short, key) == getattr(config, key)


def test_a_cpu_computes_smaller_batches_of_a_large_model_only():
    config = load(CONFIGS / "quickstart.yaml")
    small = cuts_of(config, CPU, per_row=30, parameters=600_000)
    assert [small[name].batch for name in ("sft", "ppo", "evaluate")] == [16, 64, 100]
    assert small["ppo"].options["response_length"] == 48
    large = cuts_of(config, CPU, per_row=30, parameters=10**9)
    assert [large[name].batch for name in ("sft", "ppo", "evaluate")] == [2, 4, 2]  # PPO has 4 mini-batches
    assert [cuts_of(config, CPU, per_row=300, parameters=10**9)[name].batch for name in ("sft", "dpo")] == [1, 1]
    other = load(CONFIGS / "qwen2.5-0.5b-lora.yaml")
    assert cuts_of(other, CPU, parameters=10**9)["kto"].batch == 2  # it compares the rows of a batch
    assert large["ppo"].options["response_length"] == cuts.SHORTEST


def test_few_rows_are_spread_over_their_lengths():
    lengths = np.array([5, 1, 9, 3, 7, 2, 8, 4, 6, 10])
    kept = lengths != 9
    assert sorted(lengths[spread(kept, lengths, 3, longest=True)]) == [3, 6, 10]
    assert sorted(lengths[spread(kept, lengths, 2, longest=False)]) == [2, 4]
    assert sorted(lengths[spread(kept, lengths, 20, longest=False)]) == sorted(lengths[kept])
    assert not spread(np.zeros(10, bool), lengths, 3, longest=True).any()


def entries(*places):
    return [Entry(time=time, phase=phase, step=step, of=3, logs=logs) for time, phase, step, logs in places]


def test_what_is_measured_of_a_stage(tmp_path):
    """Seconds by kind of work: of the first step none, nor of what is fixed."""
    config = load(tiny.make_run(tmp_path, {"sft": tiny.SFT | {"eval_data": "comparisons"}, "evaluate": EVALUATE}))
    size = Size(12, 240, 12, 3, 4, 50, 1000)
    log = entries(
        (0, "loading", None, {}),
        (7, "comparing the first batch with the parent", None, {}),
        (9, "loading", None, {}),
        (10, "held-out batches", 0, {}),
        (13, "held-out batches", 1, {}),
        (14, "training", 0, {}),
        (19, "training", 1, {"num_tokens": 60}),
        (20, "training", 2, {"num_tokens": 160}),
        (22, "training", 3, {"num_tokens": 240}),
        (27, "training", 3, {"loss": 1.0}),  # a checkpoint was saved
        (28, "finishing", None, {}),
        (29, "held-out batches", 0, {}),
        (31, "looking at first tokens", None, {}),
        (32, "finishing", None, {}),
    )
    record = tiny.make_record(duration=40.0)
    fixed, seconds, units = forecast.of_stage(config, "sft", size, record, log, 1)
    assert seconds == {"training": 3.0, "held_out": 4.0 + 2.0, "first_batch": 2.0, "first_tokens": 1.0}
    assert units == {"training": 240 * (1 - 60 / 240), "held_out": 2 * 50, "first_batch": 4 * 20, "first_tokens": 240}
    assert fixed == 40 - 3 / (1 - 60 / 240) - 6 - 2 - 1
    one = forecast.Measured(basis={}, duration=40.0, fixed=fixed, seconds=seconds, units=units)
    wanted = {"training": 1800.0, "held_out": 500.0, "first_batch": 80.0, "first_tokens": 480.0}
    expected = fixed + 3.0 / 180.0 * 1800.0 + 6.0 / 100.0 * 500.0 + 2.0 + 2.0
    assert forecast.seconds(one, wanted) == pytest.approx(expected, rel=1e-12)
    log = entries(
        (0, "loading", None, {}),
        (5, "sampling from base", 0, {}),
        (9, "measuring the KL of base", None, {}),
        (12, "loading", None, {}),
        (20, "finishing", None, {}),
    )
    fixed, seconds, units = forecast.of_stage(config, "evaluate", size, record, log, 1)
    assert (fixed, seconds) == (40 - 7, {"sampling": 4.0, "scoring": 3.0})
    # Base and sft, each in one batch of 12 prompts.
    assert units == {"sampling": 2 * 4 * 40 + 2 * 12 * (20 + 5 * 4), "scoring": 2 * 12 * (20 + 4)}


REUSED = {
    "num_iterations": 2,
    "steps_per_generation": 2,
    "num_generations": 2,
    "max_completion_length": 6,
    "beta": 0.0,
    "num_train_epochs": 1,
}
SIZES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 2}
JUDGE = "def words(prompt, completion):\n    return float(len(completion))\n"


def reusing_run(folder):
    """A run of GRPO that samples before its steps 1, 5, 9: for two steps at once, and each is made twice."""
    (folder / "judge.py").write_text(JUDGE)
    grpo = {"init": "base", "data": "demonstrations", "reward_functions": ["judge:words"], "training": REUSED}
    path = tiny.make_run(folder, {"grpo": grpo}, training=tiny.SMALL)
    left_over = {"prompt": "What is left?", "completion": "This one, which fills no batch."}
    tiny.write_rows(folder / "demonstrations.jsonl", [*tiny.demonstrations(), left_over])
    return path


def test_a_whole_cycle_is_measured_where_completions_are_learned_from_again(tmp_path):
    """By hand: a step takes 10 s if it samples, and 1 s if it does not."""
    config = load(reusing_run(tmp_path))
    size = Size(12, 240, 12, 40, 0, 0, 1000)
    cut = cuts.of_stages(config, {"grpo": size}, {"grpo": CPU}, {"grpo": 1})["grpo"]
    assert (cut.steps, cut.options["max_steps"], cut.rows) == (5, 5, 2 * 2 * 4)
    times = [(0, 0), (12, 1), (13, 2), (14, 3), (15, 4), (25, 5)]
    logs = {1: {"num_tokens": 90}, 5: {"num_tokens": 130}}  # of those that it has sampled
    log = entries((0, "loading", None, {}), *((time, "training", step, logs.get(step, {})) for time, step in times))
    short = Size(12, 240, 12, 5, 0, 0, 1000)
    fixed, seconds, units = forecast.of_stage(config, "grpo", short, tiny.make_record(duration=60.0), log, 1)
    assert seconds == {"training": 13.0}
    assert units == {"training": pytest.approx(4 * 4 * (20 + 6))}
    assert fixed == 60 - 13 * 5 / 4
    one = forecast.Measured(basis={}, duration=60.0, fixed=fixed, seconds=seconds, units=units)
    wanted = forecast.work(config, "grpo", size)
    assert forecast.seconds(one, wanted) == pytest.approx(fixed + 10 * 13)  # 40 steps are 10 cycles


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        ({}, 1),
        ({"num_iterations": 3}, 3),
        ({"steps_per_generation": 4}, 2),
        ({"steps_per_generation": 1}, 1),
        ({"steps_per_generation": 3}, 3),  # two samplings
        ({"generation_batch_size": 32, "num_iterations": 2}, 4),
    ],
)
def test_how_many_steps_a_cycle_and_an_epoch_have(sizes, steps):
    """The steps of an epoch as TRL's sampler repeats prompts; it leaves out those that are too few to sample for."""
    options = effective("grpo", SIZES | {"num_train_epochs": 1} | sizes)
    assert batch_sizes.cycle(options) == steps
    batches = batch_sizes.batches_per_sampling(options)
    at_once = 8 * batches // 2
    for prompts in (3 * at_once, 3 * at_once + 1, 4 * at_once - 1):
        sampler = RepeatSampler(range(prompts), 2, at_once, options["num_iterations"] * batches)
        learned = len(sampler) // (8 * batches)
        assert preflight._steps_online(options, prompts) == math.ceil(learned / 2)


def test_the_plan_counts_the_steps_that_are_made(tmp_path, cli, monkeypatch):
    """A real smoke run of such a stage: it samples twice, and the plan's steps are those that GRPOTrainer makes."""
    monkeypatch.setattr(process, "run_stage", in_this_process)
    path = reusing_run(tmp_path)
    code, out, err = cli("run", path, "--smoke")
    assert code == 0, err
    # 13 prompts, 4 at once for 2 steps, each made twice; TRL leaves out the last prompt.
    assert rows_of(out, "what is changed")["grpo"][2] == "5 of 12"
    history = json.loads((tmp_path / "run-smoke" / "grpo" / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "num_tokens" in entry] == [1, 5]  # the steps that sampled
    measured = forecast.read(tmp_path / "run-smoke")["grpo"]
    config = load(path)
    device = devices.of_stages(config, {"grpo": None})["grpo"]
    assert measured.basis == basis.of_stage(config, "grpo", device, 1, None)
    say_what_has_changed(path, cli, monkeypatch)
    launch = tmp_path / "launch.yaml"
    others = []
    for kind in ("MULTI_CPU", "FSDP"):
        launch.write_text(f"distributed_type: {kind}\n")
        others.append(basis.of_stage(config, "grpo", device, 1, files.digests({"grpo": str(launch)})["grpo"]))
    assert others[0] != others[1]
    for other in others:
        assert basis.differences(measured.basis, other) == ["another accelerate_config"]
    stage.run(config, "grpo")
    assert manifest.read(tmp_path / "run").stages["grpo"].metrics["steps"] == 12


def say_what_has_changed(path, cli, monkeypatch):
    """A plan whose times do not count says why, and how to get new ones."""
    out = words(cli("plan", path)[1])
    assert "as the smoke run foretells" in out and "do not count" not in out
    cores = num_cores()
    monkeypatch.setattr(basis, "num_cores", lambda: cores + 1)
    code, out, err = cli("plan", path, "stages.grpo.training.optim=sgd")
    assert code == 0, err
    assert "foretells" not in out
    changed = f"{cores} core{'' if cores == 1 else 's'}, here are {cores + 1}; training.optim "
    said = words(out).split("warning: ")[1]
    assert said.startswith(f"the smoke run's times of grpo do not count. They were measured otherwise: {changed}")
    assert "now sgd. Run `rlhf run CONFIG --smoke` for new ones" in said
    monkeypatch.undo()


def test_work_of_each_kind(tmp_path):
    """In tokens, by hand: epochs, looks at held-out rows, episodes, completions for a baseline."""
    stages = {
        "sft": {"data": "demonstrations", "eval_data": "demonstrations", "training": {"eval_strategy": "epoch"}},
        "reward": tiny.REWARD | {"eval_data": "comparisons"},
        "ppo": tiny.PPO | {"data": "comparisons", "prompt_baseline": "sft_mean"},
        "grpo": {"data": "comparisons", "training": {"max_completion_length": 6, "num_generations": 2}},
        "evaluate": EVALUATE,
    }
    stages["reward"]["training"] = {"eval_strategy": "steps", "eval_steps": 4, "max_length": 64}
    config = load(tiny.make_run(tmp_path, stages, training=tiny.SMALL | {"num_train_epochs": 3}))
    size = Size(10, 200, 10, 9, 3, 40, 1000)
    looks = {"first_batch": 4 * 20, "first_tokens": 10 * 20}
    assert forecast.work(config, "sft", size) == {"training": 600, "held_out": (2 + 3) * 40} | looks
    assert forecast.work(config, "reward", size) == {"training": 600, "held_out": (2 + 2) * 40} | looks
    assert forecast.work(config, "ppo", size) == {"training": 24 * (20 + 12), "sampling": 1280, "scoring": 10 * 4 * 32}
    assert forecast.work(config, "grpo", size) == {"training": 9 * 4 * (20 + 6)}
    assert forecast.work(config, "reward", size, 4) == {"training": 600, "held_out": (2 + 0) * 40} | looks
    assert forecast.work(config, "grpo", size, 4) == {"training": 9 * 4 * (20 + 6)}  # as many prompts as ever
    assert forecast.operations(config, "sft", size, 1000, 1) == 1000 * (6 * 600 + 2 * 200)
    assert forecast.operations(config, "ppo", size, 1000, 1) == 1000 * (6 * 2 * 2 * 24 * 32 + 2 * 40 * 32)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_the_longest_of_a_batch_on_average(rows):
    """Of lengths that are evenly spread, and of others against drawn batches."""
    even = Size(100, 5000, 100, 0, 0, 0, 0, ((0.0, 0), (0.5, 50), (0.9, 90), (0.99, 99), (1.0, 100)))
    assert even.longest_of(rows) == pytest.approx(100 * rows / (rows + 1))
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 0.6, 5000).astype(int)
    shares = (0.0, 0.5, 0.9, 0.99, 1.0)
    quantiles = np.quantile(lengths, shares, method="higher").tolist()
    size = Size(5000, int(lengths.sum()), 5000, 0, 0, 0, 0, tuple(zip(shares, quantiles, strict=True)))
    drawn = rng.choice(lengths, (4000, rows)).max(axis=1).mean()
    assert size.longest_of(rows) == pytest.approx(drawn, rel=0.15)
    assert Size(10, 200, 10, 0, 0, 0, 0).longest_of(rows) == 20


def test_prompts_are_padded_to_the_longest_of_their_batch(tmp_path):
    config = load(tiny.make_run(tmp_path, {"sft": tiny.SFT, "evaluate": EVALUATE | {"batch_size": 4}}))
    size = Size(12, 240, 12, 3, 0, 0, 1000, ((0.0, 10), (0.5, 20), (0.9, 30), (0.99, 40), (1.0, 40)))
    work = forecast.work(config, "evaluate", size)
    padded = size.longest_of(4)
    assert 20 < padded < 40
    assert work["sampling"] == pytest.approx(3 * 2 * 4 * 40 + 2 * 12 * (padded + 5 * 4))
    assert work["scoring"] == 2 * 12 * (20 + 4)


def test_a_plan_warns_of_days_on_a_cpu(tmp_path, cli):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "dpo": tiny.DPO})
    assert "on this CPU" not in cli("plan", path)[1]
    code, out, _ = cli("plan", path, "stages.sft.training.max_steps=1000000000000")
    said = words(out).split("warning: ")[1]
    assert code == 0 and said.startswith("on this CPU the run would take about ")
    assert "(most of it: sft " in said and "`rlhf run CONFIG --smoke` measures it" in said


# A run as long as somebody has


def test_the_stages_that_take_longest_are_made_shorter_first():
    found = {
        "short": budget.Lever(rows=100, fewest=10, per_row=0.1, fixed=1),
        "long": budget.Lever(rows=1000, fewest=10, per_row=0.5, fixed=2),
        "longer": budget.Lever(rows=1000, fewest=10, per_row=1.0, fixed=3),
    }
    assert budget.fit(found, 1e6) == {name: lever.rows for name, lever in found.items()}
    for share in range(1, 200):  # the whole is never one row less
        odd = {"only": budget.Lever(rows=1024, fewest=10, per_row=7.431 / share, fixed=5)}
        assert budget.fit(odd, 1e12) == budget.fit(odd, 5 + 1024 * 7.431 / share) == {"only": 1024}
    rows = budget.fit(found, 116)
    assert rows == {"short": 100, "long": 100, "longer": 50}  # 10 s, and 50 s for each of the two others
    assert budget.fit(found, 0) == {"short": 10, "long": 10, "longer": 10}


@pytest.mark.parametrize(
    ("then", "steps", "accumulated"), [(80, 10, 2), (79, 19, 1), (40, 10, 1), (160, 20, 2), (120, 15, 2)]
)
def test_fewer_rows_are_smaller_batches_before_they_are_too_few_steps(tmp_path, then, steps, accumulated):
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT | {"training": training}})
    change = budget.change(load(path), "sft", 200, then, 1)
    expected = {"training.max_steps": steps}
    if accumulated != 2:
        expected["training.gradient_accumulation_steps"] = accumulated
    assert change.keys == expected
    assert budget.change(load(path), "sft", 200, 200, 1).keys == {}


def test_smaller_batches_are_told_and_a_warm_up_stays_its_share(tmp_path):
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "warmup_steps": 6}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT | {"training": training}})
    change = budget.change(load(path), "sft", 96, 76, 1)
    assert change.words == ["19 steps of 4 rows instead of 12 of 8"]
    keys = budget.change(load(path), "sft", 480, 160, 1).keys
    assert keys == {"training.max_steps": 20, "training.warmup_steps": 2}


def test_completions_that_serve_several_steps_stay_together(tmp_path):
    """Four batches are sampled at once and learned from four times: that is a cycle of 16 steps."""
    training = ONLINE | {"per_device_train_batch_size": 2, "steps_per_generation": 4, "num_iterations": 4}
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, "grpo": {"data": "demonstrations", "training": training}}
    config = load(tiny.make_run(tmp_path, stages))
    batch = batch_sizes.batch_of(effective("grpo", config.stages["grpo"].training))
    assert budget.change(config, "grpo", 12 * batch, 10 * batch, 1).keys == {}
    assert budget.change(config, "grpo", 64 * batch, 10 * batch, 1).keys == {"training.max_steps": 16}
    assert budget.change(config, "grpo", 64 * batch, 31 * batch, 1).keys == {"training.max_steps": 16}  # in the time
    assert budget.change(config, "grpo", 64 * batch, 32 * batch, 1).keys == {"training.max_steps": 32}


def test_what_is_too_little_says_so(tmp_path):
    """Where the fewest rows that say something take too long, there are fewer still."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT | {"training": {"per_device_train_batch_size": 4}}})
    config = load(path)
    size = Size(rows=400, tokens=4000, sequences=400, steps=100, eval_rows=0, eval_tokens=0, parameters=10)
    measured = forecast.Measured(basis={}, duration=3, fixed=1, seconds={"training": 1.0}, units={"training": 10.0})
    changes, least = budget.changes(config, {"sft": size}, {"sft": measured}, {"sft": 1}, 100)
    assert (changes["sft"].keys, least) == ({"training.max_steps": 24}, None)  # a second a row
    changes, least = budget.changes(config, {"sft": size}, {"sft": measured}, {"sft": 1}, 11)
    assert (changes["sft"].keys, least) == ({"training.max_steps": 2}, 41)
