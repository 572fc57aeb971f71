"""Stages are copies of one process that has the libraries loaded, and behave as if their command had been run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny

from pipeline.launch import process
from pipeline.launch.stage_server import StageServer, receive_number
from pipeline.records import manifest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "pyarrow", "numpy"}
IMPORT = re.compile(r"import time:.*\| +(\w+)$", re.MULTILINE)
LONG = {"training": {"max_steps": 100_000, "logging_steps": 1, "save_steps": 5, "learning_rate": 1e-5}}


def run(path, **environment):
    command = [sys.executable, "-m", "pipeline", "run", str(path)]
    variables = os.environ | environment
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, env=variables, timeout=300)


def test_no_stage_imports_the_libraries(tmp_path):
    """Python itself writes what a process imports to its stderr, which is the stage's log."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "reward": tiny.REWARD})
    done = run(path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stdout[-3000:]
    logs = {name: (tmp_path / "run" / name / "log.txt").read_text() for name in ("sft", "reward")}
    imported = {name: set(IMPORT.findall(text)) for name, text in logs.items()}
    assert {name: modules & HEAVY for name, modules in imported.items()} == {"sft": set(), "reward": set()}
    assert all("finished in" in text for text in logs.values())
    command = logs["sft"].splitlines()[0].removeprefix("$ ").split()
    by_hand = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    )
    assert by_hand.stdout == "sft: finished already, and nothing changed\n"
    assert set(IMPORT.findall(by_hand.stderr)) >= HEAVY - {"trl"}  # which a kept config does without


@pytest.fixture(scope="module")
def server():
    with StageServer(process.environment()) as running:
        yield running


def started(server, *arguments):
    """How a command ends and what it prints, by the server and by itself."""
    command = [sys.executable, "-u", "-m", "pipeline.stage", *map(str, arguments)]
    variables = server._environment
    forked = server.start(command, variables)
    said = forked.stdout.read()
    by_itself = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return (forked.wait(), said), (by_itself.returncode, by_itself.stdout)


@pytest.mark.parametrize("kind", ["no arguments", "a mistake"])
def test_it_ends_and_speaks_as_its_command_does(server, tmp_path, kind):
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    arguments = {
        "no arguments": (),
        "a mistake": (path, "sft", "stages.sft.training.learning_rat=1"),
    }[kind]
    forked, by_itself = started(server, *arguments)
    assert forked == by_itself
    assert forked[0] == (1 if kind == "no arguments" else 2) and forked[1]


# What a stage's process is, said by a judge, which is imported in it.
LOOK = """
import json, os, signal, sys, threading
import torch
FACTS = {
    "stdin": os.readlink("/proc/self/fd/0"),
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
    "variable": os.environ.get("SET_FOR_THIS"),
    "cuda check": os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"),
    "argv": sys.argv[1:],
    "path": sys.path[2:],
    "bad fork": torch.cuda._is_in_bad_fork(),
    "threads": torch.get_num_threads(),
    "sockets": [1 for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
                and os.readlink(f"/proc/self/fd/{fd}").startswith("socket")],
}
print("facts", json.dumps(FACTS, sort_keys=True), flush=True)
def score(prompt, completion):
    return 1.0
"""


def test_its_process_is_like_one_of_its_own(server, tmp_path):
    """Environment, signals, files, arguments and threads."""
    data = {"demonstrations": {"path": "demonstrations.jsonl", "heldout": 0.5}}
    evaluate = {"data": "demonstrations", "policies": [], "judge": "judge:score", "max_new_tokens": 2, "num_prompts": 2}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT | {"training": {"max_steps": 1}}, "evaluate": evaluate}, data=data)
    (tmp_path / "judge.py").write_text(LOOK)
    variables = server._environment | {"SET_FOR_THIS": "yes"}
    facts = []
    for start in (server.start, process._started):
        for name in ("sft", "evaluate"):
            command = [sys.executable, "-u", "-m", "pipeline.stage", str(path), name]
            stage = start(command, variables, *([None] if start == process._started else []))
            said = stage.stdout.read().decode()
            assert stage.wait() == 0, said
        facts += [line for line in said.splitlines() if line.startswith("facts")]
        manifest.drop(tmp_path / "run", ["sft", "evaluate"])
    assert len(facts) == 2 and facts[0] == facts[1]
    assert '"variable": "yes"' in facts[0] and '"sockets": []' in facts[0] and '"cuda check": null' in facts[0]


def test_without_its_server_a_stage_is_started_by_its_command(tmp_path):
    """It was killed before it could start the first stage."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    variables = process.environment()
    with StageServer(variables) as server:
        server.warm_up()
        server._process.kill()
        command = [sys.executable, "-u", "-m", "pipeline.stage", str(path), "dpo"]
        assert server.start(command, variables) is None
        stage = process._started(command, variables, server)
        assert b"there is no stage 'dpo'" in stage.stdout.read() and stage.wait() == 2


def outcome(script, *arguments, **environment):
    """What a script prints that has the stage server's module."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


# A machine with a GPU, as far as importing goes: whoever asks CUDA for it has touched it.
WITH_GPU = """
import sys
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
touched = []
torch.cuda._lazy_init = lambda: touched.append("touched")
torch.cuda.get_device_capability = lambda device=None: touched.append("asked") or (9, 0)
from pipeline import stage_server
"""


def test_no_import_touches_a_gpu():
    """Or copies could not use it. bitsandbytes asks for it, and is imported by those who use it."""
    said = outcome(
        WITH_GPU
        + """
stage_server.load()
print(touched, type(sys.modules["bitsandbytes"]).__name__)
torch.cuda.is_available = lambda: False  # this torch has no CUDA, which the import would need
from peft import helpers
from peft.import_utils import is_bnb_4bit_available
print(is_bnb_4bit_available(), helpers.bnb.nn.Linear4bit)
import bitsandbytes
print(type(bitsandbytes), bitsandbytes.nn is helpers.bnb.nn)
"""
    )
    linear = "<class 'bitsandbytes.nn.modules.Linear4bit'>"
    assert said == ["[] _Postponed", f"True {linear}", "<class 'module'> True"]


def test_a_server_that_has_touched_a_gpu_starts_nothing(tmp_path):
    """Stages are then started by their commands."""
    script = "import torch; torch.cuda.is_initialized = lambda: True; from pipeline import stage_server as s; s.main()"
    ours, theirs = socket.socketpair()
    with ours:
        command = [sys.executable, "-c", script, str(theirs.fileno())]
        with theirs:
            server = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        assert receive_number(ours) is None and server.wait(60) == 0


@pytest.mark.parametrize("is_bad", [False, True])
def test_a_copy_that_could_not_use_a_gpu_becomes_the_command(tmp_path, is_bad):
    """The driver does not tell the number of GPUs, so that torch has asked CUDA for it."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    lines = ["import torch", f"torch.cuda._is_in_bad_fork = lambda: {is_bad}", "from pipeline import stage_server"]
    (tmp_path / "server.py").write_text("\n".join([*lines, "stage_server.main()"]))
    variables = process.environment() | {"PYTHONPROFILEIMPORTTIME": "1"}
    ours, theirs = socket.socketpair()
    server = StageServer(variables)
    with theirs:
        command = [sys.executable, str(tmp_path / "server.py"), str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        server._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    server._launcher = ours
    with server:
        stage = server.start([sys.executable, "-u", "-m", "pipeline.stage", str(path), "dpo"], variables)
        said = stage.stdout.read().decode()
        assert "there is no stage 'dpo'" in said and stage.wait() == 2
        assert bool(IMPORT.findall(said)) == is_bad


def test_a_server_that_talks_while_it_starts_is_not_stopped_by_it(tmp_path):
    """Python writes more than a pipe holds."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    with StageServer(process.environment() | {"PYTHONVERBOSE": "2"}) as talking:
        command = [sys.executable, "-u", "-m", "pipeline.stage", str(path), "dpo"]
        stage = talking.start(command, talking._environment | {"PYTHONVERBOSE": ""})
        assert b"there is no stage 'dpo'" in stage.stdout.read() and stage.wait() == 2


def test_what_old_code_found_right_is_not_kept_for_new_code(tmp_path):
    """The package is edited while the server runs."""
    (tmp_path / "rules.py").write_text("OLD = True\n")
    script = """
import os, sys
from pathlib import Path
from pipeline import stage_server
from pipeline.system import kept
kept._PACKAGE = Path(sys.argv[2])
before = kept.installation()
kept.installation.cache_clear()
stage_server.load = lambda: (kept._PACKAGE / "rules.py").write_text("OLD = False")
stage_server.serve = lambda *_: sys.stderr.write(str(kept.installation() == before)) and False
stage_server._direct = lambda _: None
sys.argv[1] = str(os.dup(0))
stage_server.main()
kept.installation.cache_clear()
print(kept.installation() == before)
"""
    command = [sys.executable, "-c", script, "", str(tmp_path)]
    with socket.socket() as stdin:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("False\n", "True")


def wait_for(condition, seconds=90):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("target", ["stage", "launcher", "server", "group"])
def test_a_killed_process_leaves_none(tmp_path, target):
    """kill -9 of the launcher, of the server or of the stage; Ctrl-C, which goes to the whole group."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT | LONG})
    command = [sys.executable, "-m", "pipeline", "run", str(path)]
    with (tmp_path / "out.txt").open("w") as out:
        launcher = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True)
    log = tmp_path / "run" / "sft" / "log.txt"
    try:
        wait_for(lambda: "sft: step " in (tmp_path / "out.txt").read_text())
        (server,) = psutil.Process(launcher.pid).children()
        (stage,) = server.children()
        if target == "group":
            os.killpg(launcher.pid, signal.SIGINT)
        else:
            {"stage": stage, "launcher": psutil.Process(launcher.pid), "server": server}[target].kill()
        if target == "server":  # the stage goes on, and the launcher shows it
            lines = log.read_text().count("'loss'")
            wait_for(lambda: log.read_text().count("'loss'") > lines + 3)
            stage.kill()
        exit_code = launcher.wait(timeout=60)
        _, alive = psutil.wait_procs([server, stage], timeout=20)
        assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    text = (tmp_path / "out.txt").read_text()
    words = {
        "stage": (1, "error: stage 'sft' was ended by signal 9 (Killed). The last lines of"),
        "launcher": (-signal.SIGKILL, "sft: step "),
        "server": (1, "error: stage 'sft' ended, and nobody saw how: the process that starts the stages was killed"),
        "group": (130, "Stopped in sft. The same command goes on from the last checkpoint of sft"),
    }
    assert (exit_code, words[target][1] in text) == (words[target][0], True), text[-3000:]
    assert "Traceback" not in text or target == "group"
