"""The manifest of a run folder, and what is decided from it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.chain import run_folder, staleness
from pipeline.config.load import load
from pipeline.records import manifest
from pipeline.records.manifest import Manifest, Output
from pipeline.system import digests
from pipeline.system.errors import UserError


@pytest.fixture
def run_dir(tmp_path):
    manifest.write(tmp_path, Manifest(name="tiny"))
    return tmp_path


def test_no_manifest_yet(tmp_path):
    assert manifest.read(tmp_path) is None
    assert manifest.read(tmp_path / "nowhere") is None


def test_commit_and_drop(run_dir, make_record):
    records = {name: make_record(seed=seed) for seed, name in enumerate(("pretrain", "sft", "dpo"))}
    for name, record in records.items():
        manifest.commit(run_dir, name, record)
    assert manifest.read(run_dir) == Manifest(name="tiny", stages=records)
    manifest.drop(run_dir, ["sft", "never there"])
    assert list(manifest.read(run_dir).stages) == ["pretrain", "dpo"]


def test_a_record_without_a_reason_is_read(run_dir, make_record):
    """As earlier versions wrote it."""
    manifest.commit(run_dir, "sft", make_record(reason="seed: 0 -> 1"))
    assert manifest.read(run_dir).stages["sft"].reason == "seed: 0 -> 1"
    content = json.loads((run_dir / manifest.FILE).read_text())
    del content["stages"]["sft"]["reason"]
    (run_dir / manifest.FILE).write_text(json.dumps(content))
    assert manifest.read(run_dir).stages["sft"].reason is None


def test_drop_of_nothing_leaves_the_file(run_dir):
    before = (run_dir / manifest.FILE).stat()
    manifest.drop(run_dir, ["sft"])
    after = (run_dir / manifest.FILE).stat()  # reading it changes only the time of access
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_update_keeps_the_stages(run_dir, make_record):
    manifest.commit(run_dir, "sft", make_record())
    manifest.update(run_dir, "tiny", model={"path": "some/model"})
    recorded = manifest.read(run_dir)
    assert recorded.model == {"path": "some/model"}
    assert list(recorded.stages) == ["sft"]


def test_commits_at_the_same_time_are_all_kept(run_dir, make_record):
    names = [f"stage{i}" for i in range(8)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: manifest.commit(run_dir, name, make_record()), names))
    assert sorted(manifest.read(run_dir).stages) == names


@pytest.mark.parametrize(("owner", "function"), [(os, "fsync"), (Path, "replace")])
def test_crash_while_writing_leaves_the_old_manifest(run_dir, make_record, monkeypatch, owner, function):
    manifest.commit(run_dir, "sft", make_record())
    before = (run_dir / manifest.FILE).read_bytes()

    def crash(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, crash)
        with pytest.raises(OSError, match="no space left"):
            manifest.commit(run_dir, "dpo", make_record())
    assert (run_dir / manifest.FILE).read_bytes() == before
    manifest.commit(run_dir, "dpo", make_record())  # what the crash left behind is in nobody's way
    assert list(manifest.read(run_dir).stages) == ["sft", "dpo"]


def test_verify(run_dir, make_record):
    weights = run_dir / "sft" / "output" / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"123")
    files = digests.checksums(run_dir, [weights.parent])
    # The SHA-256 of "123", from sha256sum.
    assert files == {"sft/output/weights": "a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3"}
    record = make_record(output=Output(kind="full", path="sft/output", files=files))
    manifest.verify(run_dir, "sft", record)
    weights.write_bytes(b"124")
    with pytest.raises(UserError, match=r"weights has changed.*--redo sft"):
        manifest.verify(run_dir, "sft", record)
    weights.unlink()
    with pytest.raises(UserError, match=r"weights is missing.*--redo sft"):
        manifest.verify(run_dir, "sft", record)


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digests.digest({"a": 1, "b": [2]}) == digests.digest({"b": [2], "a": 1})
    assert digests.digest({"a": 1}) != digests.digest({"a": "1"})


# Decisions. `finished` is a copy: the run folder lies elsewhere than when its stages ran.


@pytest.fixture
def decide(finished, monkeypatch, tmp_path):
    """`decide(*overrides)`: for each stage whether it would run, and the reasons."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides, redo=()):
        config = load(finished.config, overrides)
        decisions = staleness.decide(config, manifest.read(config.run_path), redo)
        return {d.stage for d in decisions if d.run}, {d.stage: d.reason for d in decisions}

    return call


UNFINISHED = {"ppo", "dpo", "evaluate"}


def test_moved_run_is_current(decide, finished):
    runs, reasons = decide()
    assert runs == UNFINISHED
    assert reasons["sft"].startswith("finished")
    assert reasons["dpo"] == "not finished yet"
    for name, record in manifest.read(finished.run_dir).stages.items():
        assert record.output.files
        manifest.verify(finished.run_dir, name, record)


def everything_in(folder):
    """Every path below a folder with its size, its time of change and its rights."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        seen = path.stat()
        found[path] = (seen.st_size, seen.st_mtime_ns, seen.st_mode)
    return found


def test_plan_and_status_of_a_moved_run_folder_that_cannot_be_written(cli, finished, tmp_path):
    run_dir = finished.run_dir.rename(tmp_path / "moved to ü")
    for path in (run_dir, *run_dir.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = everything_in(run_dir)
    try:
        exit_code, stdout, stderr = cli("plan", finished.config, f"run_dir={run_dir}")
        assert (exit_code, stderr) == (0, "")
        assert stdout.count("skip: finished, nothing") == 3
        exit_code, stdout, stderr = cli("status", run_dir)
        assert (exit_code, stderr) == (0, "")
        assert f'from_pretrained("{run_dir}/sft/output")' in stdout
        assert everything_in(run_dir) == before  # for root, to whom the rights say nothing
    finally:
        for path in (run_dir, *run_dir.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.parametrize(
    ("override", "again", "words"),
    [
        ("stages.sft.training.learning_rate=2e-3", {"sft", "reward"}, ["training.learning_rate", "0.001 -> 0.002"]),
        ("stages.reward.seed=7", {"reward"}, ["seed", "0 -> 7"]),
        ("seed=7", {"pretrain", "sft", "reward"}, []),
        ("stages.sft.lora.r=8", {"sft", "reward"}, []),
        ("stages.pretrain.training.max_steps=3", {"pretrain", "sft", "reward"}, []),
        ("data.demos.limit=8", {"sft", "reward"}, ["input changed: data"]),
        ("training.logging_steps=5", set(), []),
        ("stages.sft.training.save_steps=5", set(), []),
        ("stages.dpo.training.beta=0.3", set(), []),
        ("too_long=truncate", set(), []),  # no row was too long
    ],
)
def test_what_a_change_runs_again(decide, override, again, words):
    runs, reasons = decide(override)
    assert runs - UNFINISHED == again
    for word in words:
        assert any(word in reason for reason in reasons.values()), reasons


@pytest.mark.parametrize("counts", [{"dropped": {"too_long": 1}}, {"noticed": {"truncated": 2}}, None])
def test_what_to_do_with_long_rows_matters_where_there_are_some(decide, finished, counts):
    """Of a record of an earlier version nothing may be known."""
    record = manifest.read(finished.run_dir).stages["sft"]
    (account,) = record.datasets.values()
    datasets = {} if counts is None else {"data": account | counts}
    manifest.commit(finished.run_dir, "sft", record.model_copy(update={"datasets": datasets}))
    runs, reasons = decide("too_long=truncate")
    assert runs == UNFINISHED | {"sft", "reward"}
    assert "too_long ('drop' -> 'truncate')" in reasons["sft"]


def test_changed_data_runs_again_and_rewritten_data_does_not(decide, finished, write_rows):
    path = finished.config.parent / "comparisons.jsonl"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert decide()[0] == UNFINISHED
    path.write_bytes(content.replace(b'"No."', b'"Never."', 1))
    runs, reasons = decide()
    assert runs == UNFINISHED | {"reward"}
    assert "input changed: data" in reasons["reward"]


def test_redo_runs_what_depends_on_it(decide):
    runs, reasons = decide(redo=("sft",))
    assert runs == UNFINISHED | {"sft", "reward"}
    assert "--redo" in reasons["sft"]
    assert "sft runs again" in reasons["reward"]


def test_lost_tokenizer_is_saved_again(finished, monkeypatch, tmp_path):
    """Without it no further stage could start, although the manifest says that nothing changed."""
    monkeypatch.chdir(tmp_path)
    tokenizer = finished.run_dir / "tokenizer"
    for path in tokenizer.iterdir():
        path.unlink()
    tokenizer.rmdir()
    run_folder.prepare_run(load(finished.config))
    assert (tokenizer / "tokenizer.json").is_file()


def test_status_shows_metrics_that_are_no_numbers(cli, tmp_path, make_record):
    manifest.write(tmp_path, Manifest(name="tiny", model={"path": "some/base", "dtype": "float32"}))
    manifest.commit(tmp_path, "sft", make_record(metrics={"first_loss": None, "loss": float("nan")}))
    summary = {
        "prompts": 4,
        "kl": None,
        "length": 3.0,
        "ended": None,
        "score": 0.5,
        "score_win_rate": [0.5, None, None],
    }
    metrics = {"baseline": "sft", "policies": {"base": summary, "sft": summary, "ppo": summary}}
    manifest.commit(tmp_path, "evaluate", make_record(type="evaluate", metrics=metrics))
    exit_code, stdout, _ = cli("status", tmp_path)
    assert exit_code == 0
    assert "first loss nan, loss nan" in stdout
    assert "win rate 0.50 [nan, nan]" in stdout


def test_status_says_why_a_stage_ran(cli, tmp_path, make_record):
    """Records of earlier versions do not know it."""
    manifest.write(tmp_path, Manifest(name="tiny", model={"path": "some/base", "dtype": "float32"}))
    manifest.commit(tmp_path, "sft", make_record(reason="config changed: training.learning_rate (0.1 -> 0.2)"))
    manifest.commit(tmp_path, "dpo", make_record(type="dpo"))
    _, stdout, _ = cli("status", tmp_path)
    assert "sft\nwhy it ran: config changed: training.learning_rate (0.1 -> 0.2)\n" in stdout
    assert stdout.count("why it ran") == 1


@pytest.mark.parametrize("option", [("--until", "reward"), ("--only", "sft")])
def test_redo_of_a_stage_that_would_not_run(cli, write_config, make_record, tmp_path, option):
    path, run_dir = write_config(tmp_path), tmp_path / "runs" / "tiny"
    manifest.write(run_dir, manifest.Manifest(name="tiny", stages={"dpo": make_record(type="dpo")}))
    (run_dir / "dpo" / "checkpoints").mkdir(parents=True)
    before = (run_dir / "manifest.json").read_bytes()
    exit_code, _, message = cli("run", path, "--redo", "dpo", *option)
    assert exit_code == 2
    assert "--redo dpo: 'dpo' would lose its record and not run, since " + " ".join(option) in message
    assert (run_dir / "manifest.json").read_bytes() == before
    assert (run_dir / "dpo" / "checkpoints").is_dir()
