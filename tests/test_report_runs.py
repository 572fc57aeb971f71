"""When the report is made and what `rlhf run` keeps for it; the command, and what it refuses."""

import contextlib
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
import report_runs
import tiny
from report_runs import record
from rich.console import Console

from pipeline import launcher
from pipeline.chain import gate
from pipeline.config.load import load
from pipeline.html import page, reading
from pipeline.launch import process
from pipeline.records import last_run, manifest
from pipeline.records.last_run import Attempt, LastRun, Planned
from pipeline.system.errors import StageFailed, UserError

TOKENIZER = manifest.TokenizerRecord(source="0", fingerprint="2", pad_token="p", eos_token="e", template="t")


def states(folder):
    return {name: stage.state for name, stage in reading.read(folder).stages.items()}


# What rlhf run keeps


def test_the_gate_keeps_its_verdicts(tmp_path, write_config):
    """Of a stage that it stops, and of one that it lets through; without the gate there are none."""
    records = {name: record(name) for name in ("sft", "reward", "reward-shift")}
    coin = {"held_out": report_runs.calibration([1.0, -1.0] * 10)}
    records["reward"] = record("reward", metrics=coin)
    recorded = manifest.Manifest(name="tiny", stages=records)
    config = load(write_config(tmp_path, gate="stop", run_dir=str(tmp_path / "run")))
    folder = config.run_path / "ppo"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="ppo does not start"):
        gate.check(config, "ppo", recorded)
    kept = json.loads((folder / "gate.json").read_text())
    failed = [one for one in kept["verdicts"] if one["passed"] is False]
    assert kept["stops"] and [(one["stage"], one["what"]) for one in failed] == [("reward", "held-out accuracy")]
    gate.check(config.model_copy(update={"gate": "warn"}), "ppo", recorded)
    assert json.loads((folder / "gate.json").read_text()) == kept | {"stops": False}
    gate.check(config.model_copy(update={"gate": "off"}), "ppo", recorded)
    assert not (folder / "gate.json").exists()


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """`chain(outcomes, *overrides)`: `rlhf run` of sft and dpo whose processes are replaced; returns config, output."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "dpo": tiny.DPO})

    def run(outcomes, *overrides):
        config = load(path, overrides)

        def run_stage(_, name, *__):
            if outcomes[name] is not None:
                raise outcomes[name]
            made = manifest.read(config.run_path) or manifest.Manifest(name="tiny", tokenizer=TOKENIZER)
            made = made.model_copy(update={"stages": made.stages | {name: record(name, started=last_run.now())}})
            manifest.write(config.run_path, made)

        monkeypatch.setattr(process, "run_stage", run_stage)
        shown = io.StringIO()
        with contextlib.suppress(StageFailed, KeyboardInterrupt):
            launcher.run(config, Console(file=shown, width=1000), overrides)
        return config, shown.getvalue()

    return run


def test_a_run_whose_first_stage_fails_has_a_report(chain):
    config, shown = chain({"sft": StageFailed("stage 'sft' stopped: row 3 is bad", 2)})
    assert f"The report is {config.run_path / 'report.html'}" in shown
    assert "stage &#39;sft&#39; stopped: row 3 is bad" in (config.run_path / "report.html").read_text()
    assert last_run.read(config.run_path).attempts["sft"].state == "refused"
    assert states(config.run_path) == {"sft": "failed", "dpo": "waiting"}


def test_how_a_stage_ended_stays_until_its_next_start(chain):
    config, _ = chain({"sft": None, "dpo": StageFailed("stage 'dpo' was ended by signal 9", 1)}, "stages.dpo.seed=7")
    assert states(config.run_path) == {"sft": "finished", "dpo": "failed"}
    assert "stages.dpo.seed=7" in last_run.read(config.run_path).command
    (config.run_path / manifest.FILE).unlink()
    config, _ = chain({"sft": KeyboardInterrupt(), "dpo": None})
    kept = last_run.read(config.run_path)
    assert {name: attempt.state for name, attempt in kept.attempts.items()} == {"sft": "stopped", "dpo": "failed"}


def planned(**reasons):
    stages = {name: Planned(type="sft", parents={}, reason=reason) for name, reason in reasons.items()}
    return LastRun(started=report_runs.STARTED, command=["rlhf"], folder="/", config="", stages=stages)


@pytest.mark.parametrize(
    ("attempts", "is_left"),
    [
        ({}, True),  # it was not reached
        ({"sft": Attempt(state="finished", at=report_runs.EARLY)}, True),  # by an earlier command
        ({"sft": Attempt(state="finished", at=report_runs.LATE)}, False),
        ({"sft": Attempt(state="stopped", at=report_runs.LATE)}, True),
        ({"sft": Attempt(state="refused", at=report_runs.EARLY)}, True),
    ],
)
def test_a_change_that_is_taken_back_leaves_nothing(tmp_path, attempts, is_left):
    """A stage was to run again and has its record all the same: why it was to run is forgotten too."""
    path = tmp_path / last_run.FILE
    path.write_text(planned(sft="config changed").model_copy(update={"attempts": attempts}).model_dump_json())
    before = path.read_bytes()
    assert last_run.settle(tmp_path, planned(sft=None)) is is_left
    kept = last_run.read(tmp_path)
    if is_left:
        assert kept.stages["sft"].reason is None
        assert {one.state for one in kept.attempts.values()} <= {"finished"}
    else:
        assert path.read_bytes() == before  # of a run that has just finished
    assert last_run.settle(tmp_path, planned(sft=None)) is False


def test_a_stage_that_is_still_to_run_is_left(tmp_path):
    stopped = {"sft": Attempt(state="stopped", at=report_runs.LATE)}
    (tmp_path / last_run.FILE).write_text(
        planned(sft="config changed").model_copy(update={"attempts": stopped}).model_dump_json()
    )
    assert last_run.settle(tmp_path, planned(sft="config changed")) is False
    assert last_run.read(tmp_path).attempts == stopped


def test_a_report_that_cannot_be_made_fails_no_run(chain, monkeypatch):
    def render(_):
        raise RuntimeError("a bug of the page")

    monkeypatch.setattr(page, "render", render)
    config, shown = chain({"sft": None, "dpo": None})
    assert "No report was made: a bug of the page" in shown and "Everything is in" in shown
    assert states(config.run_path) == {"sft": "finished", "dpo": "finished"}


def test_an_unchanged_run_keeps_its_report(finished, cli):
    """The fixture's run has made it; it is made again only if it is gone or older than the last record."""
    report = finished.run_dir / "report.html"
    os.utime(report, (2e9, 2e9))
    before = report.stat()
    exit_code, shown, _ = cli("run", finished.config, "--until", "reward")
    assert exit_code == 0 and "The report is" not in shown
    assert report.stat().st_mtime_ns == before.st_mtime_ns and report.stat().st_ino == before.st_ino
    os.utime(report, (1, 1))
    _, shown, _ = cli("run", finished.config, "--until", "reward")
    assert f"The report is {report}" in shown and report.stat().st_mtime > 1
    html = report.read_text()
    assert "3 of " in html and "rlhf run" in html and "loss of sft by step." in html


# The command


def test_a_relative_folder_and_several(cli, tmp_path):
    report_runs.write(tmp_path / "one")
    report_runs.write(tmp_path / "two", {name: record(name, config={"lora.r": 8}) for name in report_runs.PARENTS})
    assert cli("report", "one")[0] == 0
    assert (tmp_path / "one" / "report.html").is_file()
    exit_code, shown, _ = cli("report", "one", "two")
    assert exit_code == 0 and "The report is report.html" in shown
    html = (tmp_path / "report.html").read_text()
    assert "2 runs compared" in html and f"{tmp_path}/two" in html
    assert re.search(r'<th scope="row">sft: lora\.r</th>\s*<td>unset</td>\s*<td>8</td>', html)
    assert html.count('id="run1-chain"') == html.count('id="run2-chain"') == 1


def test_a_run_of_an_earlier_version(cli, tmp_path):
    with tarfile.open(Path(__file__).parent / "fixtures" / "finished_before.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    exit_code, _, err = cli("report", tmp_path / "runs" / "before")
    assert (exit_code, err) == (0, "")
    html = (tmp_path / "runs" / "before" / "report.html").read_text()
    assert "All stages are finished." in html and "The command is not on record" in html
    assert html.count('<details class="stage"') == 9


BAD = {
    "no run folder": (lambda folder: folder.mkdir(), "no manifest.json here; expected a run folder"),
    "damaged": (lambda folder: (report_runs.write(folder) / "manifest.json").write_text("{"), "damaged"),
    "foreign file": (lambda folder: (report_runs.write(folder) / "report.html").write_text("mine"), "something else"),
    "no file": (lambda folder: (report_runs.write(folder) / "report.html").mkdir(), "give another file with --to"),
    "not there": (lambda folder: None, "no manifest.json here"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_message(cli, tmp_path, name):
    make, text = BAD[name]
    make(tmp_path / "run")
    exit_code, shown, err = cli("report", "run")
    assert (exit_code, shown) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and text in err
    assert not list(tmp_path.rglob("*.tmp"))
    assert name != "foreign file" or (tmp_path / "run" / "report.html").read_text() == "mine"


def test_a_folder_that_cannot_be_written(cli, tmp_path, monkeypatch):
    """The report goes elsewhere."""
    folder = report_runs.write(tmp_path / "run")
    write = Path.write_bytes

    def refuse(path, content):
        if path.parent == folder:
            raise OSError(30, "Read-only file system")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    exit_code, _, err = cli("report", folder)
    assert exit_code == 2 and "(Read-only file system); give another file with --to" in err
    assert cli("report", folder, "--to", tmp_path / "elsewhere.html")[0] == 0
    assert (tmp_path / "elsewhere.html").is_file()
