"""A run that is watched: in a terminal, in a pipe, and by `rlhf status`."""

import json
import os
import pty
import re
import select
import sys
import termios
import time
from pathlib import Path

import pyte
import pytest
import tiny
import warm
from test_equalities import run as run_stages

from pipeline.records import manifest, states
from pipeline.records.progress import Reader
from pipeline.records.states import Chain
from pipeline.show.progress import place_of

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, "-m", "pipeline", "run"]
LONG = tiny.SFT | {"training": {"max_steps": 100_000, "logging_steps": 1, "save_steps": 5, "learning_rate": 1e-5}}


def training_of(folder, name):
    """What the progress file of a stage says of its training."""
    entries = Reader(folder / name / "progress.jsonl").read()
    return [one for one in entries if one.phase == "training"]


def logged(folder, name):
    """All that the trainer has logged, as `log_history.json` has it, without what is about time."""
    history = json.loads((folder / name / "log_history.json").read_text())
    return [{key: value for key, value in log.items() if key not in ("step", "epoch", "episode")} for log in history]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A finished run with held-out rows, and what it has printed into a pipe."""
    folder = tmp_path_factory.mktemp("watched")
    evaluate = {"data": "heldout", "max_new_tokens": 8, "batch_size": 4}
    stages = {"sft": tiny.SFT | {"eval_data": "demonstrations"}, "reward": tiny.REWARD, "ppo": tiny.PPO}
    path = tiny.make_run(folder, stages | {"evaluate": evaluate})
    tiny.write_rows(folder / "heldout.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    data = {name: {"path": f"{name}.jsonl"} for name in ("comparisons", "demonstrations", "heldout")}
    data["demonstrations"]["heldout"] = 0.3
    tiny.edit(path, {"data": data})
    done = warm.rlhf("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


def test_a_pipe_has_a_line_for_each_log(chain):
    folder, printed = chain
    lines = printed.splitlines()
    assert "\x1b" not in printed and "\r" not in printed
    assert not [line for line in lines if line.startswith(("{", "===")) or "%|" in line or "Warning" in line]
    for name, of, words in (("sft", 4, "loss"), ("reward", 4, "loss"), ("ppo", 3, "score")):
        steps = [line for line in lines if re.match(rf"{name}: step \d+/{of}[^:]*: {words} ", line)]
        assert len(steps) == of
        assert f"step {of}/{of}: " in steps[-1]
    assert sum("held-out loss" in line for line in lines) == 2  # before the training and after it
    assert "evaluate: sampling 12 completions from sft" in lines
    for name in ("sft", "reward", "ppo", "evaluate"):
        assert [line for line in lines if line.startswith(f"{name}: finished in ")]
        assert (folder / name / "log.txt").read_text().count(f"{name}: finished in ") == 1
    assert "{'loss'" in (folder / "sft" / "log.txt").read_text()


def test_a_run_whose_length_the_command_line_set_says_so_at_its_end(tmp_path):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    done = warm.rlhf("run", path, "stages.sft.training.max_steps=1", "gate=warn")
    assert done.returncode == 0, done.stdout + done.stderr
    *_, short, whole, _ = done.stdout.splitlines()
    what = "The command line set how long this run was (stages.sft.training.max_steps=1)."
    assert short.startswith(
        f"{what} `rlhf plan {path} gate=warn` says how long the run takes that the config describes."
    )
    assert whole == f"rlhf run {path} gate=warn"
    again = warm.rlhf("run", path, "gate=warn")
    assert again.returncode == 0 and "how long" not in again.stdout


@pytest.mark.parametrize(("name", "of"), [("sft", 4), ("reward", 4), ("ppo", 3)])
def test_the_file_has_what_the_trainer_logged(chain, name, of):
    folder, _ = chain
    entries = Reader(folder / name / "progress.jsonl").read()
    logs = [one.logs for one in entries if one.logs]
    ours = [{key: value for key, value in log.items() if key not in ("epoch", "episode")} for log in logs]
    theirs = logged(folder, name)
    assert len(theirs) >= of
    assert ours[: len(theirs)] == theirs  # what comes after it is the last evaluation
    steps = [one.step for one in training_of(folder, name)]
    assert steps[0] == 0 and steps == sorted(steps) and steps[-1] == of
    assert {one.of for one in training_of(folder, name)} == {of}


def test_an_evaluation_counts_its_batches(chain):
    folder, _ = chain
    phases = {}
    for one in Reader(folder / "evaluate" / "progress.jsonl").read():
        if one.phase:
            phases.setdefault(one.phase, []).append((one.step, one.of))
    for policy in ("base", "sft", "ppo"):
        assert phases[f"sampling from {policy}"][0] == (0, 3)
        assert phases[f"sampling from {policy}"][-1] == (3, 3)
        assert f"measuring the KL of {policy}" in phases
    assert "scoring with reward" in phases


def test_a_resumed_stage_begins_at_its_step(tmp_path, killed_at):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT | {"training": {"save_steps": 2}}})
    killed_at(2)
    with pytest.raises(tiny.Killed):
        run_stages(path, "sft")
    first = next(one.logs for one in training_of(tmp_path / "run", "sft") if one.logs)
    killed_at(None)
    run_stages(path, "sft")
    begun, *rest = training_of(tmp_path / "run", "sft")
    assert (begun.step, begun.of) == (2, 4)
    assert begun.first["loss"] == first["loss"]
    assert [one.step for one in rest if one.logs][:2] == [3, 4]
    place = place_of(tmp_path / "run" / "sft", "sft")
    assert place.first["loss"] == first["loss"] != place.last["loss"]


@pytest.mark.slow
def test_of_two_processes_the_first_one_reports(tmp_path):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    launch = ["--accelerate-config", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")]
    done = warm.rlhf("run", path, *launch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one.step for one in training_of(tmp_path / "run", "sft") if "loss" in one.logs] == [1, 2, 3, 4]
    assert len(re.findall(r"^sft: step \d/4[^:]*: loss", done.stdout, re.MULTILINE)) == 4
    assert done.stdout.count("sft: finished in") == 1


class OnTerminal:
    """`rlhf run` on a terminal of its own, of that size."""

    def __init__(self, columns, lines, *arguments):
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.seen = []  # what was on the screen, each time that something was printed
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            # pytest imports readline, which sets COLUMNS behind the back of os.environ.
            environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            os.chdir(ROOT)
            os.execve(sys.executable, [*RUN, *map(str, arguments)], environment | {"TERM": "xterm-256color"})
        termios.tcsetwinsize(self.terminal, (lines, columns))

    def read_until(self, condition, seconds=240):
        deadline = time.time() + seconds
        while not condition():
            assert time.time() < deadline, "\n".join(self.screen.display)
            if select.select([self.terminal], [], [], 0.2)[0]:
                try:
                    chunk = os.read(self.terminal, 65536)
                except OSError:  # its process has ended
                    return
                self.raw += chunk
                self._stream.feed(chunk)
                if not select.select([self.terminal], [], [], 0.02)[0]:  # else it is in the middle of a drawing
                    self.seen.append([line.rstrip() for line in self.screen.display])

    def wait(self):
        self.read_until(lambda: False)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("columns", [40, 80])
def test_a_run_on_a_terminal(tmp_path, columns):
    training = tiny.REWARD["training"] | {
        "max_steps": 200,
        "logging_steps": 1,
    }  # some of it is drawn, however fast a step is
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "reward": tiny.REWARD | {"training": training}})
    terminal = OnTerminal(columns, 24, path)
    assert terminal.wait() == 0
    text = "\n".join(terminal.screen.display)
    assert "reward: finished in" in text and "shows how to load it" in " ".join(text.split())
    assert not terminal.screen.cursor.hidden and "●" not in text
    assert b"'loss'" not in terminal.raw and b"it/s" not in terminal.raw and b"Traceback" not in terminal.raw
    at_work = [lines for lines in terminal.seen if any(line.startswith("✓ sft  ● reward") for line in lines)]
    assert at_work and any("● sft  · reward" in lines for lines in terminal.seen)
    for lines in at_work:
        start = next(number for number, line in enumerate(lines) if line.startswith("✓ sft  ● reward"))
        assert sum("● reward" in line for line in lines) == 1  # none is left of what was drawn before
        block = [line for line in lines[start:] if line]
        assert 1 <= len(block) <= 5
        assert all(len(line) < columns for line in block), "\n".join(lines)
        assert len(block) == 1 or re.match(r"reward(: [a-z]+| ━*─* ?step \d+/200)", block[1])
    assert any(re.search(r"accuracy \d.*margin", " ".join(lines)) for lines in at_work)


def test_ctrl_c_and_status_from_another_terminal(tmp_path, cli):
    path = tiny.make_run(tmp_path, {"sft": LONG, "dpo": tiny.DPO})
    terminal = OnTerminal(80, 24, path)
    terminal.read_until(lambda: any(re.search(r"step [1-9]\d*/100000", line) for line in terminal.screen.display))
    exit_code, out, err = cli("status", "run")
    assert (exit_code, err) == (0, "")
    assert "\nat work: sft; waiting: dpo\n" in out
    assert re.search(r"^sft: step \d+/100000, \d+.* left: loss \d", out, re.MULTILINE), out
    os.write(terminal.terminal, b"\x03")
    assert terminal.wait() == 130
    text = "\n".join(terminal.screen.display)
    assert "Stopped in sft." in text and "●" not in text and " left" not in text, text
    assert not terminal.screen.cursor.hidden
    assert "\nwaiting: dpo; stopped: sft\n" in cli("status", "run")[1]
    assert manifest.read(tmp_path / "run").stages == {}


def test_status_of_a_run_that_has_no_manifest_yet(cli, tmp_path):
    types = {"sft": "sft", "dpo": "dpo"}
    found = {"sft": "stopped", "dpo": "waiting"}
    Chain(name="tiny", types=types, states=found, launcher=states.this_process()).write(tmp_path / "run")
    assert cli("status", "run") == (0, "\nwaiting: dpo; stopped: sft\n", "")
