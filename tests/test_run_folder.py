"""What lies in a run folder: other people's files, a damaged tokenizer, and equal files of equal runs."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
from rich.console import Console

from pipeline import launcher, stage
from pipeline.chain import run_folder
from pipeline.config.load import load
from pipeline.records import manifest
from pipeline.system.cache import cache_folder
from pipeline.system.errors import UserError

FOREIGN = ["sft/output/mine.txt", "sft/checkpoints/mine.txt", "sft/merged/mine.txt", "sft/output.new/mine.txt"]
FOREIGN += ["sft/notes.md", "tokenizer/tokenizer.json"]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("run_dir", [".", "work"])
def test_files_of_others_are_never_written_over(tmp_path, cli, name, run_dir):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT}, run_dir=run_dir)
    mine = tmp_path / run_dir / name
    mine.parent.mkdir(parents=True)
    mine.write_text("three years of work")
    before = files(tmp_path)
    for command in ("plan", "run"):
        exit_code, _, err = cli(command, path)
        assert exit_code == 2
        folder = tmp_path / run_dir / name.split("/")[0]
        assert err.startswith(f"error: run_dir: {folder} holds files that no run has put there"), err
        assert "give another `run_dir`, or move those files away" in err
    with pytest.raises(UserError, match="holds files that no run has put there"):  # also if started by hand
        stage.run(load(path), "sft")
    assert files(tmp_path) == before


def test_files_that_come_while_the_run_is_at_work(tmp_path, monkeypatch):
    """Nothing is written beside them, not even a log."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "dpo": tiny.DPO})
    mine = tmp_path / "run" / "dpo" / "notes.md"
    started = []

    def run_stage(config, name, *_):
        started.append(name)
        mine.parent.mkdir(parents=True)
        mine.write_text("three years of work")

    monkeypatch.setattr(launcher.process, "run_stage", run_stage)
    with pytest.raises(UserError, match="dpo holds files that no run has put there"):
        launcher.run(load(path), Console(quiet=True))
    assert started == ["sft"]
    assert files(mine.parent) == {"notes.md": b"three years of work"}


def test_a_parent_whose_record_is_dropped_meanwhile(finished):
    """By another process that runs it again."""
    config = load(finished.config, (f"run_dir={finished.run_dir}",))
    fingerprint = manifest.read(finished.run_dir).tokenizer.fingerprint
    stage._same_tokenizer(config, "reward", fingerprint)
    manifest.drop(finished.run_dir, ["sft"])
    with pytest.raises(UserError, match=r"the record of 'sft' is gone: another process runs it again"):
        stage._same_tokenizer(config, "reward", fingerprint)


def test_a_file_where_a_stage_has_its_folder(tmp_path, cli):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT}, run_dir=".")
    (tmp_path / "sft").write_text("mine")
    exit_code, _, err = cli("run", path)
    assert exit_code == 2 and f"{tmp_path / 'sft'} holds files that no run has put there" in err
    assert (tmp_path / "sft").read_text() == "mine"


def test_a_new_stage_whose_folder_is_there_already(finished, cli):
    """In a real run folder too: the user's notes lie where a new stage would put its output."""
    notes = finished.run_dir / "notes" / "output"
    notes.mkdir(parents=True)
    (notes / "mine.txt").write_text("mine")
    dpo = {"type": "dpo", "init": "sft", "data": "comparisons"}
    tiny.edit(finished.config, {"stages": stages_of(finished.config) | {"notes": dpo}})
    exit_code, _, err = cli("run", finished.config)
    assert exit_code == 2 and f"{finished.run_dir / 'notes'} holds files that no run has put there" in err
    assert (notes / "mine.txt").read_text() == "mine"


def stages_of(path):
    return dict(tiny.YAML().load(path)["stages"])


def test_what_an_interrupted_stage_left_is_the_runs_own(tmp_path, cli):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    left = tmp_path / "run" / "sft"
    left.mkdir(parents=True)
    (left / "log.txt").write_text("$ python -m pipeline.stage\n")  # stopped before the stage began
    assert cli("plan", path)[0] == 0
    (left / ".lock").touch()
    (left / "checkpoints").mkdir()
    assert cli("plan", path)[0] == 0


def test_a_run_folder_within_another(finished, cli):
    for inner in ("sft/output", "sft/output/deeper/still", "new"):
        exit_code, _, err = cli("run", finished.config, "name=other", f"run_dir={finished.run_dir / inner}")
        assert exit_code == 2
        assert f"lies within the run folder {finished.run_dir}; give another `run_dir`" in err


def test_another_programs_manifest_above_does_not_count(tmp_path, cli):
    (tmp_path / "manifest.json").write_text('{"name": "a browser extension", "manifest_version": 3}')
    assert cli("plan", tiny.make_run(tmp_path, {"sft": tiny.SFT}))[0] == 0


def damage(file):
    """Swap two tokens of the vocabulary: a tokenizer that loads and gives other ids."""
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))


def test_a_damaged_tokenizer_is_refused_before_rows_are_cached_under_its_name(finished, cli):
    saved = finished.run_dir / "tokenizer" / "tokenizer.json"
    good = saved.read_bytes()
    damage(saved)
    cache = cache_folder()
    before = {path for path in cache.rglob("*.arrow") if "raw" not in path.parts}
    for command in ("plan", "run", "check-data"):
        exit_code, _, err = cli(command, finished.config)
        assert exit_code == 2
        assert (
            f"{saved.parent} is not the tokenizer this run was started with. Restore that folder, or remove it" in err
        )
    assert {path for path in cache.rglob("*.arrow") if "raw" not in path.parts} == before
    shutil.rmtree(saved.parent)
    assert run_folder.prepare_run(load(finished.config)).stages.keys() == {"pretrain", "sft", "reward"}
    assert saved.read_bytes() == good


def test_equal_runs_have_equal_files(tmp_path):
    """Also where Python's sets have another order: PEFT keeps `target_modules` as one."""
    recorded = {}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT | {"training": {"max_steps": 1}}})
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-m", "pipeline.stage", str(path), "sft", f"run_dir={tmp_path / seed}"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        recorded[seed] = manifest.read(tmp_path / seed).stages["sft"]
    assert recorded["1"].output == recorded["2"].output
    assert "sft/output/adapter_config.json" in recorded["1"].output.files
