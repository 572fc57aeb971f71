"""The base model counts by what its files hold, a hub model by its commit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
from huggingface_hub import constants
from test_equalities import run

from pipeline import stage
from pipeline.base import base_model
from pipeline.chain import staleness
from pipeline.config.load import load
from pipeline.records import manifest
from pipeline.show import results
from pipeline.system import digests

SIZE = 5 << 20


@pytest.fixture
def model(tmp_path):
    """A config and a weights file of its base model, both older than the digest of a file is waited for."""
    config = load(tiny.make_run(tmp_path, {"sft": tiny.SFT}))
    weights = tmp_path / "model" / "more.safetensors"
    weights.write_bytes(bytes(SIZE))
    for file in weights.parent.iterdir():
        os.utime(file, (1e9, 1e9))
    return config, weights


def change_in_the_middle(weights):
    """Of the same size, and of the same time as before."""
    with weights.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"1")
    os.utime(weights, (1e9, 1e9))


def test_a_change_in_the_middle_of_the_weights_counts(model):
    config, weights = model
    before = base_model.fingerprint(config)
    change_in_the_middle(weights)
    assert base_model.fingerprint(config) != before


def test_weights_are_read_once(model, monkeypatch):
    config, weights = model
    found = base_model.fingerprint(config)
    read = []
    digest = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda file: (read.append(file), digest(file))[1])
    assert base_model.fingerprint(config) == found
    assert not read
    change_in_the_middle(weights)
    assert base_model.fingerprint(config) != found
    assert read == [weights]


def test_a_copy_elsewhere_is_the_same_model(model):
    config, weights = model
    found = base_model.fingerprint(config)
    (weights.parent / "README.md").write_text("No part of the model.")
    moved = weights.parent.rename(weights.parent.with_name("moved"))
    assert base_model.fingerprint(load(config.source, (f"model.path={moved}",))) == found


def test_a_run_keeps_the_commit_it_began_with(tmp_path):
    """The hub's cache as a download leaves it; the branch moves on between two stages."""
    stages = {"sft": tiny.SFT | {"init": "base"}, "again": tiny.SFT | {"type": "sft", "init": "base"}}
    path = tiny.make_run(tmp_path, stages, model={"path": "own/tiny"})
    cache = Path(constants.HF_HUB_CACHE) / "models--own--tiny"
    commits = {"a" * 40: 0, "b" * 40: 1}
    for commit, seed in commits.items():
        tiny.make_model(cache / "snapshots" / commit, seed)
    (cache / "refs").mkdir()

    def branch_is_at(commit):
        (cache / "refs" / "main").write_text(commit)

    try:
        branch_is_at("a" * 40)
        run(path, "sft")
        branch_is_at("b" * 40)
        found = run(path, "again")
        assert found.model["commit"] == "a" * 40 and found.model["revision"] is None
        one, two = ((tmp_path / "run" / name / "output") for name in stages)
        weights = "adapter_model.safetensors"
        assert (one / weights).read_bytes() == (two / weights).read_bytes()
        assert json.loads((two / "adapter_config.json").read_text())["revision"] == "a" * 40
        assert f'"own/tiny", dtype="float32", revision="{"a" * 40}"' in results.snippet(
            tmp_path / "run", found, found.stages["again"]
        )
        assert all(not decision.run for decision in staleness.decide(load(path), found))
        other = load(path, (f"run_dir={tmp_path / 'other'}",))
        stage.run(other, "sft")
        assert manifest.read(other.run_path).model["commit"] == "b" * 40
        changed = (tmp_path / "other" / "sft" / "output" / weights).read_bytes()
        assert changed != (one / weights).read_bytes()
    finally:
        shutil.rmtree(cache)
