"""What several processes of a stage agree on and share."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.system import processes
from pipeline.system.errors import UserError

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
from accelerate import PartialState
from pipeline.system.errors import UserError
from pipeline.system.processes import gather_in_order, same_everywhere, share_of

state = PartialState(cpu=True)
assert state.num_processes == 2

def refuse():
    raise UserError(f"{state.process_index} refuses")

try:
    same_everywhere(refuse)
except UserError as error:
    message = str(error)
words = "abcde"
letters = share_of(words)
results = {
    "index": same_everywhere(lambda: state.process_index),
    "nothing": same_everywhere(lambda: None),
    "message": message,
    "share": letters,
    "numbers": list(share_of(range(5))),
    "ordered": gather_in_order([letter.upper() for letter in letters]),
    "one": gather_in_order(list(share_of([7]))),
    "empty": gather_in_order(share_of([])),
}
print(json.dumps(results))
state.destroy_process_group()
"""
SAME = {"index": 0, "nothing": None, "message": "0 refuses", "ordered": list("ABCDE"), "one": [7], "empty": []}


@pytest.fixture(scope="module")
def two():
    """What each of two processes says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    started = []
    for rank in ("0", "1"):
        environment = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", PROGRAM]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = []
    try:
        for process in started:
            outputs.append(process.communicate(timeout=120)[0])
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0]
    return [json.loads(output) for output in outputs]


def test_two_processes_agree(two):
    """Also on the error of the main one: without it the other would wait for ever."""
    for result in two:
        assert {key: result[key] for key in SAME} == SAME


def test_shares(two):
    """Every second item each. Other shares would put other rows into one batch, and padding changes the last bits."""
    assert [result["share"] for result in two] == ["ace", "bd"]
    assert [result["numbers"] for result in two] == [[0, 2, 4], [1, 3]]


def test_one_process_alone():
    def refuse():
        raise UserError("refused")

    assert processes.same_everywhere(lambda: 3) == 3
    with pytest.raises(UserError, match=r"^refused$"):
        processes.same_everywhere(refuse)
    assert processes.share_of([1, 2, 3]) == [1, 2, 3]
    assert processes.gather_in_order([1, 2, 3]) == [1, 2, 3]
