"""`rlhf --help` and `rlhf status` answer at once: neither imports torch or what imports it."""

import subprocess
import sys

import pytest

from pipeline.cli import cli
from pipeline.records import manifest

HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "accelerate"}


def imported(*args):
    """Exit code, stdout and top-level packages imported by `rlhf ARGS`."""
    command = [sys.executable, "-X", "importtime", "-m", "pipeline", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "pipeline.cli" in names, done.stderr
    return done.returncode, done.stdout, {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["run", "--help"]])
def test_help_imports_nothing_heavy(args):
    exit_code, stdout, packages = imported(*args)
    assert exit_code == 0
    assert stdout
    assert not packages & HEAVY


def test_help_lists_every_command_in_a_whole_sentence():
    _, stdout, _ = imported("--help")
    lines = stdout.partition("Commands:\n")[2].splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(cli.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_status_imports_nothing_heavy(tmp_path, make_record):
    manifest.write(tmp_path, manifest.Manifest(name="tiny", model={"path": "some/base", "dtype": "float32"}))
    manifest.commit(tmp_path, "sft", make_record())
    exit_code, stdout, packages = imported("status", tmp_path)
    assert exit_code == 0
    assert "sft" in stdout
    assert "AutoModelForCausalLM.from_pretrained" in stdout
    assert not packages & HEAVY
