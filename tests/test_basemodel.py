"""The base model counts by what its files hold."""

import os

import pytest
import tiny

from pipeline import basemodel, manifest
from pipeline.config import load

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
    before = basemodel.digest_of(config)
    change_in_the_middle(weights)
    assert basemodel.digest_of(config) != before


def test_weights_are_read_once(model, monkeypatch):
    config, weights = model
    found = basemodel.digest_of(config)
    read = []
    digest = manifest.file_digest
    monkeypatch.setattr(manifest, "file_digest", lambda file: (read.append(file), digest(file))[1])
    assert basemodel.digest_of(config) == found
    assert not read
    change_in_the_middle(weights)
    assert basemodel.digest_of(config) != found
    assert read == [weights]


def test_a_copy_elsewhere_is_the_same_model(model):
    config, weights = model
    found = basemodel.digest_of(config)
    (weights.parent / "README.md").write_text("No part of the model.")
    moved = weights.parent.rename(weights.parent.with_name("moved"))
    assert basemodel.digest_of(load(config.source, (f"model.path={moved}",))) == found
