"""Trackers hold every stage under its name with its metrics, a resumed one in one curve, and change nothing else."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from tracked import READERS, EventFiles, TrackioDatabase, WandbFolders, run

from pipeline import stage
from pipeline.config import trackers
from pipeline.config.load import load
from pipeline.config.trackers import TRACKERS, trackers_of
from pipeline.records import manifest
from pipeline.records.figures import figures_of, figures_of_record
from pipeline.system.errors import UserError
from pipeline.tracking.attempt import Attempt
from pipeline.tracking.event_files import markdown
from pipeline.tracking.trackers import Trackers

ROOT = Path(__file__).parents[1]
EVERY_STEP = {"save_steps": 2, "max_steps": 4}
ONLINE = {"max_completion_length": 8, "num_generations": 4, "max_steps": 2}
PPO = tiny.PPO | {"training": tiny.PPO["training"] | {"total_episodes": 32, "save_steps": 2}}
EVALUATED = {"eval_data": "held_out", "training": EVERY_STEP | {"eval_strategy": "steps", "eval_steps": 2}}
STAGES: dict[str, Any] = {
    "pretrain": {"data": "texts", "training": {"max_length": 32, "max_steps": 2}},
    "sft": tiny.SFT | EVALUATED,
    "reward": tiny.REWARD | {"eval_data": "pairs"},
    "ppo": PPO | {"eval_data": "held_out", "eval_every": 2},
    "ppo-on-grpo": PPO | {"type": "ppo", "trainer": "grpo"},
    "rloo": {"data": "demonstrations", "eval_data": "held_out", "eval_every": 1, "training": ONLINE},
    "grpo": {"data": "demonstrations", "training": ONLINE | {"log_completions": True, "save_steps": 1}},
    "dpo": tiny.DPO,
    "kto": {"data": "unpaired", "training": {"max_steps": 2}},
    "shift": {"data": "held_out", "policy": "sft", "max_new_tokens": 8, "num_completions": 2},
    "evaluate": {"data": "held_out", "policies": ["ppo", "dpo"], "max_new_tokens": 8, "num_prompts": 4},
}
KILLED = {"sft": 3, "ppo": 3, "ppo-on-grpo": 3, "grpo": 2}  # the step that each dies at; its checkpoint is before it
TRAINED = {  # a curve of each stage that trains
    "pretrain": "train/loss",
    "sft": "train/loss",
    "reward": "train/accuracy",
    "ppo": "train/objective/kl",
    "ppo-on-grpo": "train/objective/kl",
    "rloo": "train/kl",
    "grpo": "train/reward",
    "dpo": "train/rewards/margins",
    "kto": "train/rewards/margins",
}
FINAL = dict.fromkeys(TRAINED, "final/steps") | {
    "ppo": "final/updates",
    "ppo-on-grpo": "final/updates",
    "shift": "final/icc/low",
    "evaluate": "final/ppo/score_win_rate/high",
}


def write(folder: Path, stages: dict[str, Any] = STAGES, **training: Any) -> Path:
    """A run of these stages with all datasets, whose `training:` is that of tiny runs and `training`."""
    folder.mkdir(exist_ok=True)
    path = tiny.make_run(folder, stages, training=tiny.TRAINING | training)
    good = [row | {"completion": row["chosen"], "label": True} for row in tiny.comparisons()]
    bad = [row | {"completion": row["rejected"], "label": False} for row in tiny.comparisons()]
    held_out = [row | {"prompt": f"Once more: {row['prompt']}", "completion": row["chosen"]} for row in good]
    own = {
        "texts": [{"text": row["chosen"]} for row in good],
        "unpaired": [{key: row[key] for key in ("prompt", "completion", "label")} for row in good + bad],
        "pairs": [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in held_out],
        "held_out": [{key: row[key] for key in ("prompt", "completion")} for row in held_out],
    }
    for name, rows in own.items():
        tiny.write_rows(folder / f"{name}.jsonl", rows)
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in ("comparisons", "demonstrations", *own)}})
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder of a whole run, reported to all trackers; some stages died once and went on."""
    folder = tmp_path_factory.mktemp("chain")
    config = load(write(folder, report_to=list(TRACKERS)))
    with pytest.MonkeyPatch.context() as patch:
        # Nobody must be asked or told: trackio would open a Space and send to a server, wandb would go online.
        patch.setenv("TRACKIO_SPACE_ID", "somebody/space")
        patch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9")
        patch.delenv("WANDB_MODE", raising=False)
        patch.setattr("socket.create_connection", _refuse)
        for name in config.stages:
            if name in KILLED:
                run(config, name, dies_at=KILLED[name])
            run(config, name)
    return folder / "run"


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a tracker wants to talk to somebody")


def steps_of(curve: list[tuple[int, float]]) -> list[int]:
    return [step for step, _ in curve]


def of_log(folder: Path, key: str) -> list[tuple[int, float]]:
    """A figure as the trainer's own log has it, one value for a step."""
    values = {
        entry["step"]: entry[key] for entry in json.loads((folder / "log_history.json").read_text()) if key in entry
    }
    return sorted(values.items())


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_there_with_its_metrics(chain, tracker, name):
    """Each curve is the trainer's log, step by step, also where the stage died and went on; so is its record."""
    curves = READERS[tracker](chain / name).curves()
    if name in TRAINED:
        key = TRAINED[name]
        expected = of_log(chain / name, key.removeprefix("train/"))
        assert len(expected) >= 2
        assert steps_of(curves[key]) == steps_of(expected)
        assert [value for _, value in curves[key]] == pytest.approx([value for _, value in expected], rel=1e-5)
    record = manifest.read(chain).stages[name]
    final = figures_of_record(record.type, record.metrics)
    if tracker == "wandb":
        found = WandbFolders(chain / name).pieces[-1]["summary"]
    else:
        found = {key: curve[-1][1] for key, curve in curves.items()}
    assert FINAL[name] in found
    assert {key: found[f"final/{key}"] for key in final} == pytest.approx(final, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", STAGES)
def test_a_run_has_its_name_and_group_and_one_id(chain, name):
    """A resumed stage has two folders at wandb, whose steps do not overlap; `wandb sync` joins folders of one id."""
    pieces = WandbFolders(chain / name).pieces
    assert len(pieces) == (2 if name in KILLED else 1)
    ids = {piece["run"]["run_id"] for piece in pieces}
    assert ids == {json.loads((chain / name / "tracking.json").read_text())["id"]}
    for piece in pieces:
        assert piece["run"]["display_name"] == f"tiny/{name}"
        assert (piece["run"]["run_group"], piece["run"]["project"]) == ("tiny", "rlhf-pipeline")
    steps = [step for piece in pieces for step, _ in piece["history"]]
    assert steps == sorted(set(steps))
    assert [piece["exit_code"] for piece in pieces] == [*[1] * (len(pieces) - 1), 0]
    stored = TrackioDatabase(chain / name)
    assert {(identity, called) for _, identity, called, _ in stored.rows} == {(*ids, f"tiny/{name}")}
    assert {config["_Group"] for config in stored.configs} == {"tiny"}


def test_tables_and_pictures_are_there(chain):
    events = EventFiles(chain / "evaluate")
    assert {"policies", "completions", "config"} <= set(events.tables)
    assert {"report", "advice"} <= set(EventFiles(chain / "shift").tables)
    assert sorted(EventFiles(chain / "shift").images) == ["length", "offsets", "reliability"]
    assert "completions" in EventFiles(chain / "grpo").tables
    rows = [row for _, _, _, row in TrackioDatabase(chain / "evaluate").rows if "policies" in row]
    assert [line["policy"] for line in rows[0]["policies"]["_value"]] == ["base", "sft", "ppo", "dpo"]
    media = [file.name for file in (chain / "shift" / "trackio" / "media").rglob("*.png")]
    assert len(media) == 3
    kept = {file.parent.name for file in (chain / "shift" / "wandb").rglob("media/*/*")}
    assert kept == {"images", "table"}


def test_a_curve_has_one_point_for_a_step(chain):
    """The last step of SFT is evaluated twice, by the trainer and by the stage; the held-out score of RL by itself."""
    for tracker in TRACKERS:
        curves = READERS[tracker](chain / "sft").curves()
        assert steps_of(curves["eval/loss"]) == [0, 2, 4]
        assert steps_of(READERS[tracker](chain / "ppo").curves()["eval/score"]) == [0, 2, 4]
        assert steps_of(READERS[tracker](chain / "rloo").curves()["eval/score"]) == [0, 1, 2]


def test_a_resumed_stage_evaluates_as_often_as_one_that_was_not(chain):
    evaluated = [
        entry["step"] for entry in json.loads((chain / "sft" / "log_history.json").read_text()) if "eval_loss" in entry
    ]
    assert evaluated == [0, 2, 4, 4]  # it died at 3 and went on from 2


def test_completions_of_grpo_are_kept(chain):
    kept = sorted(file.name for file in (chain / "grpo" / "completions").iterdir())
    assert kept == ["completions_00001.parquet", "completions_00002.parquet"]
    assert not (chain / "grpo" / "checkpoints").exists()


def test_a_tracker_changes_nothing(chain, tmp_path):
    config = load(write(tmp_path, {name: STAGES[name] for name in ("pretrain", "sft")}))
    for name in config.stages:
        run(config, name)
        files = [path.name for path in (config.run_path / name).iterdir()]
        assert not [file for file in files if file.startswith(("events", "track", "wandb"))]
    for name in config.stages:
        file = f"{name}/output/adapter_model.safetensors"
        assert (config.run_path / file).read_bytes() == (chain / file).read_bytes()


def test_a_stage_that_runs_anew_has_a_new_curve(tmp_path):
    """Another config, and `--redo`: nothing of the old curve is in the new one."""
    path = write(tmp_path, {"sft": tiny.SFT | {"training": EVERY_STEP}}, report_to="tensorboard")
    ids = []
    for overrides in ((), ("stages.sft.training.learning_rate=0.005",)):
        config = load(path, overrides)
        run(config, "sft", dies_at=3)
        run(config, "sft")
        curve = EventFiles(config.run_path / "sft").curves()["train/loss"]
        assert curve == [(step, pytest.approx(value)) for step, value in of_log(config.run_path / "sft", "loss")]
        ids.append(json.loads((config.run_path / "sft" / "tracking.json").read_text())["id"])
    assert ids[0] != ids[1]


KILL = """
import os, signal, sys
from pipeline import stage
from pipeline.training.curves import Curves

log = Curves.on_log
def log_then_die(self, args, state, control, **kwargs):
    log(self, args, state, control, **kwargs)
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Curves.on_log = log_then_die
stage.main()
"""


def test_killed_by_the_system_it_goes_on_in_one_curve(tmp_path):
    """Nothing can be written at a SIGKILL: what a tracker has not on disk by then is logged again, once."""
    path = write(tmp_path, {"sft": tiny.SFT | {"training": EVERY_STEP}}, report_to=list(TRACKERS))
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of this process
    command = [sys.executable, "-c", KILL, path, "sft"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    config = load(path)
    stage.run(config, "sft")
    for tracker in TRACKERS:
        assert steps_of(READERS[tracker](config.run_path / "sft").curves()["train/loss"]) == [1, 2, 3, 4], tracker


def test_stages_that_are_copies_of_one_process_report(tmp_path, rlhf):
    """TRL has imported wandb and trackio in the process that is copied; nothing of them is shown."""
    evaluate = {"data": "held_out", "policies": [], "max_new_tokens": 4, "num_prompts": 2}
    stages = {"sft": tiny.SFT | {"training": {"save_steps": 2}}, "evaluate": evaluate}
    path = write(tmp_path, stages, report_to=["wandb", "trackio"])
    done = rlhf("run", path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "wandb" not in done.stdout + done.stderr and "trackio" not in (done.stdout + done.stderr).lower()
    folder = load(path).run_path / "evaluate"
    assert len(list(folder.glob("wandb/offline-run-*/files/media/table/*.json"))) == 2
    assert len([row for _, _, _, row in TrackioDatabase(folder).rows if "policies" in row]) == 1


def test_one_process_of_a_launch_reports(tmp_path):
    path = write(tmp_path, {"sft": tiny.SFT | {"training": {"max_steps": 2}}}, report_to=["tensorboard", "trackio"])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [ROOT / "accelerate_configs" / "cpu_2_processes.yaml", "-m", "pipeline.stage", path, "sft"]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = load(path).run_path / "sft"
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    for reader in (EventFiles, TrackioDatabase):
        assert steps_of(reader(folder).curves()["train/loss"]) == [1, 2]


def test_a_crash_closes_the_trackers_as_failed(tmp_path, monkeypatch):
    path = write(tmp_path, {"sft": tiny.SFT}, report_to="wandb")
    config = load(path)
    monkeypatch.setattr("pipeline.stages.sft.fit", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.run(config, "sft")
    assert [piece["exit_code"] for piece in WandbFolders(config.run_path / "sft").pieces] == [1]
    assert json.loads((config.run_path / "sft" / "tracking.json").read_text())["finished"] is False


def test_a_mode_that_wandb_does_not_know_is_one_message(tmp_path, monkeypatch):
    """And what was finished before stays on record."""
    stage.run(load(write(tmp_path, {"sft": tiny.SFT})), "sft")
    config = load(write(tmp_path, {"sft": tiny.SFT}, report_to="wandb"), ("stages.sft.seed=7",))
    before = manifest.read(config.run_path)
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(UserError, match="report_to: wandb cannot start a run"):
        stage.run(config, "sft")
    assert manifest.read(config.run_path) == before


def test_trackio_keeps_all_stages_in_a_folder_of_the_user(tmp_path, monkeypatch):
    shared = tmp_path / "everything"
    monkeypatch.setenv("TRACKIO_DIR", str(shared))
    stages = {"sft": tiny.SFT, "other": tiny.SFT | {"type": "sft"}}
    config = load(write(tmp_path / "run", stages, report_to="trackio"))
    for name in config.stages:
        run(config, name)
        assert not (config.run_path / name / "trackio").exists()
    shutil.copytree(shared, tmp_path / "copy" / "trackio")
    names = {called for _, _, called, _ in TrackioDatabase(tmp_path / "copy").rows}
    assert names == {"tiny/sft", "tiny/other"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["none", "tensorboard"], "`none` stands alone"),
        ("all", "expected one of none, tensorboard, trackio, wandb, got 'all'"),
        (["tensorboard", "mlflow"], "expected one of none, tensorboard, trackio, wandb, got 'mlflow'"),
    ],
)
def test_what_cannot_be_reported_to_is_refused_by_the_plan(tmp_path, cli, value, message):
    exit_code, _, error = cli("plan", write(tmp_path, {"sft": tiny.SFT}, report_to=value))
    assert (exit_code, message in error) == (2, True), error


def test_a_tracker_that_is_not_installed_is_refused_by_the_plan(tmp_path, cli, monkeypatch):
    version = importlib.metadata.version

    def without_wandb(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_wandb)
    path = write(tmp_path, {"sft": tiny.SFT}, report_to=["tensorboard", "wandb"])
    exit_code, _, error = cli("plan", path)
    assert exit_code == 2
    known = "not installed, or in a version that does not work here; pip install 'rlhf-pipeline[trackers]'"
    assert f"training.report_to: wandb: {known}" in error


def test_a_tracker_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["wandb<0.32,>=0.31; extra == 'trackers'", "torch"])
    for version, is_known in (("0.31.4", True), ("0.32.0", False), ("0.17.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        assert (trackers.fault_of("wandb") is None) == is_known


def test_a_tracker_that_fails_at_the_end_does_not_fail_the_stage(tmp_path, monkeypatch, capsys):
    def summarise(self, figures):
        raise OSError("the disk of the tracker is full")

    monkeypatch.setattr(Trackers, "summarise", summarise)
    config = load(write(tmp_path, {"sft": tiny.SFT}, report_to="tensorboard"))
    run(config, "sft")
    assert "sft" in manifest.read(config.run_path).stages
    assert "a tracker did not take the final figures: the disk of the tracker is full" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["run_name=mine", "project=mine", "trackio_space_id=me/mine"])
def test_options_that_would_send_or_rename_are_refused(tmp_path, cli, option):
    exit_code, _, error = cli("plan", write(tmp_path, {"sft": tiny.SFT}), f"stages.sft.training.{option}")
    assert exit_code == 2
    assert f"{option.partition('=')[0]}: is set by the pipeline" in error


def test_stages_that_train_nothing_report_as_the_run_does(tmp_path):
    stages = {name: STAGES[name] for name in ("sft", "reward", "shift")}
    stages["sft"] = stages["sft"] | {"training": {"report_to": ["wandb", "wandb"]}}
    stages["reward"] = tiny.REWARD | {"training": {"report_to": None}}
    config = load(write(tmp_path, stages, report_to="tensorboard"))
    assert {name: trackers_of(config, name) for name in config.stages} == {
        "sft": ["wandb"],
        "reward": [],
        "shift": ["tensorboard"],
    }


def test_only_an_estimate_is_an_interval():
    estimate = {"value": 0.5, "low": 0.4, "high": None}
    values = {"icc": estimate, "alarms": [1, 2, 3], "held_out": {"loss": 2, "right": True}, "advice": "none"}
    assert figures_of(values) == {"icc": 0.5, "icc/low": 0.4, "held_out/loss": 2.0}
    line = {"kl": 1.5, "judge_win_rate": [0.5, 0.4, 0.6], "lengths": [1, 2, 3]}
    found = figures_of_record("evaluate", {"baseline": "sft", "policies": {"ppo": line}})
    assert found == {
        "ppo/kl": 1.5,
        "ppo/judge_win_rate": 0.5,
        "ppo/judge_win_rate/low": 0.4,
        "ppo/judge_win_rate/high": 0.6,
    }


def test_an_attempt_goes_on_until_it_is_finished(tmp_path):
    first = Attempt(tmp_path, "a", resumes=True)
    again = Attempt(tmp_path, "a", resumes=True)
    assert (first.is_new, again.is_new, again.id == first.id) == (True, False, True)
    assert Attempt(tmp_path, "a", resumes=False).id != first.id
    other = Attempt(tmp_path, "b", resumes=True)
    assert other.is_new
    other.finish()
    assert Attempt(tmp_path, "b", resumes=True).is_new
    (tmp_path / "tracking.json").write_text("{half")
    assert Attempt(tmp_path, "b", resumes=True).is_new


def test_a_table_for_tensorboard_keeps_its_shape():
    assert markdown(("a", "b"), [("x|y\nz", None), (0.123456, True)]) == (
        "| a | b |\n| --- | --- |\n| x\\|y z |  |\n| 0.1235 | True |"
    )


def test_without_trackers_nothing_happens(tmp_path):
    trackers = Trackers()
    trackers.log({"loss": 1.0}, 1)
    trackers.table("t", ["a"], [[1.0]])
    trackers.image("i", tmp_path / "no.png")
    trackers.summarise({"loss": 1.0})
