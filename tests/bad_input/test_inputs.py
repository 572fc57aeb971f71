"""Bad input of every kind gives one message that says what was seen and how to mend it, and loses nothing.

The normal run takes every `STEP`-th case, the first of each family, and all of some families. RLHF_ALL_INPUTS=1 takes
all of them; `run_cases.py` beside this file runs them by hand.
"""

import os

import pytest
from catalogue import all_cases
from forked import Case, Outcome, faults, make_bases, make_zygote, report, run_case, run_command, write_case

STEP = 5
WHOLE = ("yaml",)  # families that always run whole


def _chosen():
    """The cases of this run, in order."""
    if os.environ.get("RLHF_ALL_INPUTS"):
        return all_cases()
    chosen, families = [], set()
    for number, case in enumerate(all_cases()):
        if number % STEP == 0 or case.family not in families or case.family in WHOLE:
            chosen.append(case)
        families.add(case.family)
    return chosen


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    """The process that runs the cases."""
    process = make_zygote(tmp_path_factory.mktemp("zygote"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def bases(tmp_path_factory, zygote):
    """The folders that cases start from."""
    return make_bases(tmp_path_factory.mktemp("bases"), zygote)


@pytest.mark.parametrize("case", _chosen(), ids=lambda case: case.id)
def test_bad_input(case, tmp_path, bases, zygote):
    outcome = run_case(case, tmp_path, bases, zygote)
    assert not faults(case, outcome), report(case, outcome)


@pytest.mark.parametrize(
    ("base", "stages"),
    [
        ("model", ("dpo", "ppo")),
        ("model", ("rloo", "grpo")),
        ("model", ("evaluate",)),
        ("model", ("shift", "pretrain")),
        ("scratch", ("dpo",)),
        ("finished", ("dpo",)),
    ],
)
def test_what_cases_start_from_is_good(base, stages, tmp_path, bases, zygote):
    """A case fails for what it changes: without a change the plan passes, and writes nothing."""
    case = Case("good", base, base=base, exit_code=0, stages=stages)
    outcome = run_case(case, tmp_path, bases, zygote)
    assert not faults(case, outcome), report(case, outcome)


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        ({"exit_code": 1}, "exit code 1"),
        ({"exit_code": -11}, "signal 11"),
        ({"exit_code": -9, "hung": True}, "did not end"),
        ({"stderr": "Traceback (most recent call last):\nerror: a.yaml"}, "traceback"),
        ({"stderr": "warning\nerror: a.yaml: expected b"}, "other lines above"),
        ({"stderr": "error: a.yaml: expected b\nwarning"}, "other lines below"),
        ({"stderr": "error: a.yaml\nerror: expected b"}, "2 messages"),
        ({"stderr": ""}, "0 messages"),
        ({"stderr": "error: expected b"}, "says nothing like"),
        ({"stderr": "error: a.yaml has b"}, "how to mend it"),
        ({"touched": ("data.jsonl",)}, "wrote, changed or removed data.jsonl"),
    ],
)
def test_a_fault_is_seen(outcome, fault):
    """The harness itself: what a case must not do is named."""
    case = Case("own", "case", (r"a\.yaml",))
    good = {
        "exit_code": 2,
        "hung": False,
        "seconds": 0.1,
        "stdout": "",
        "stderr": "error: a.yaml: expected b",
        "touched": (),
    }
    assert not faults(case, Outcome(**good))
    found = faults(case, Outcome(**(good | outcome)))
    assert any(fault in line for line in found), found


@pytest.mark.parametrize(
    ("code", "exit_code", "hung"),
    [("import os; os.kill(os.getppid(), 11)", -11, False), ("while True: pass", -9, True)],
)
def test_a_crash_and_a_hang_are_seen(code, exit_code, hung, tmp_path, bases, zygote):
    """The plan waits for a judge, which ends it or never ends itself; the next case runs as before."""
    case = Case(
        "own", "judge", files={"own.py": code}, stages=("evaluate",), changes={"stages.evaluate.judge": "own:score"}
    )
    write_case(case, tmp_path, bases)
    outcome = run_command(zygote, case.command, tmp_path, limit=3)
    assert (outcome.exit_code, outcome.hung) == (exit_code, hung)
    assert run_command(zygote, ("status", "nowhere"), tmp_path).exit_code == 2
