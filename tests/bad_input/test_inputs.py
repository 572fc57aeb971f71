"""Bad input of every kind gives one message that says what was seen and how to mend it, and loses nothing.

The normal run takes every `STEP`-th case, the first of each family, and all of some families. RLHF_ALL_INPUTS=1 takes
all of them; `run_cases.py` beside this file runs them by hand.
"""

import os

import pytest
from catalogue import all_cases
from forked import Case, Zygote, faults, make_bases, report, run_case

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
    process = Zygote(tmp_path_factory.mktemp("zygote"))
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


@pytest.mark.parametrize("base", ["model", "scratch", "finished"])
def test_what_cases_start_from_is_good(base, tmp_path, bases, zygote):
    """A case fails for what it changes: without a change the plan passes."""
    case = Case("good", base, base=base, exit_code=0, stages=("dpo", "ppo", "evaluate"))
    outcome = run_case(case, tmp_path, bases, zygote)
    assert not faults(case, outcome), report(case, outcome)
