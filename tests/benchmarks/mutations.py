"""Break the figures that people read, one place at a time, and see whether the fast tests notice.

    python tests/benchmarks/mutations.py                          # all mutations, by the tests of this checkout
    python tests/benchmarks/mutations.py --only watchdog gate     # those whose file or name holds one of the words
    python tests/benchmarks/mutations.py --list
    git worktree add /tmp/before COMMIT && python tests/benchmarks/mutations.py --tests /tmp/before/tests

A mutation replaces one text, which must occur exactly once in its file, by another. It is applied to a copy of the
package in a temporary folder, where the tests named with it run until one fails. With `--tests` the tests are those of
another checkout, for the same mutations of this package; of the named files those that it does not have are left out.
First every test must pass on the package as it is.

torch, transformers and TRL are imported once, and every run is a fork of this process. All mutations take about
20 minutes on one slow core.
"""

import argparse
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import mutations_list
from mutations_list import Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("pipeline", "configs", "accelerate_configs", "README.md", "pyproject.toml", "CHANGELOG.md")
IMPORTED = (
    "accelerate",
    "click",
    "datasets",
    "filelock",
    "hypothesis",
    "matplotlib.pyplot",
    "peft",
    "pydantic",
    "pytest",
)
IMPORTED += ("rich.table", "ruamel.yaml", "scipy.stats", "statsmodels.formula.api", "trl.experimental.ppo")
PASSED, FAILED, NO_TESTS = 0, 1, 5  # exit codes of pytest
TIMEOUT = 300  # seconds for the tests of one file; a mutation that makes them hang is caught


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: caught, survived, or broken (no test could run); the test that failed; seconds."""

    verdict: str
    test: str
    seconds: float


def faults(mutations: list[Mutation]) -> list[str]:
    """The mutations that no longer fit the package."""
    found = []
    for mutation in mutations:
        count = (ROOT / "pipeline" / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if count != 1:
            found.append(f"{mutation}: the old text occurs {count} times, expected once:\n    {mutation.old!r}")
    names = [str(mutation) for mutation in mutations]
    found += [f"{name}: the name occurs twice" for name in sorted(set(names)) if names.count(name) > 1]
    return found


def make_copy(tests: Path, folder: Path, mutation: Mutation | None) -> None:
    """The package with a mutation, and the tests, as a checkout of their own in `folder`."""
    ignored = shutil.ignore_patterns("__pycache__", ".pytest_cache", "*.pyc")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.is_file():
            shutil.copy(source, folder / name)
    shutil.copytree(tests, folder / "tests", ignore=ignored)
    if mutation is not None:
        path = folder / "pipeline" / mutation.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def import_once() -> None:
    """Import what all tests import, but not the package."""
    cache = tempfile.mkdtemp(prefix="rlhf-mutations-")
    os.environ |= {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "MPLBACKEND": "agg"}
    sys.dont_write_bytecode = True
    for name in IMPORTED:
        importlib.import_module(name)
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "LlamaForCausalLM", "Trainer"):
        getattr(transformers, name)  # transformers and TRL import what they hold when it is asked for
    for name in ("SFT", "Reward", "DPO", "RLOO", "GRPO"):
        getattr(trl, f"{name}Trainer")
    assert not any(name.split(".")[0] == "pipeline" for name in sys.modules)


def run_pytest(folder: Path, arguments: list[str], log: Path) -> int:
    """Run tests of a copy in a fork of this process; returns pytest's exit code, or -1 where it did not end."""
    child = os.fork()
    if child == 0:
        _in_child(folder, arguments, log)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def _in_child(folder: Path, arguments: list[str], log: Path) -> None:
    """Become a test run of a copy; never returns."""
    code = 3
    try:
        os.setsid()  # what the tests start ends with them
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(folder)
        here = Path(__file__).resolve().parent
        sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != here)]
        for name in ("mutations_list", "mutations"):
            sys.modules.pop(name, None)
        os.environ["PYTHONPATH"] = str(folder)
        import datasets
        import pytest

        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-W", "ignore", "--basetemp", "tmp"]
        code = int(pytest.main([*arguments, *options, "--rootdir", str(folder)]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def commands(tests: tuple[str, ...], folder: Path) -> list[list[str]]:
    """pytest's arguments for each of the named files that there is."""
    found = []
    for entry in tests:
        name, _, chosen = entry.partition(" -k ")
        if (folder / name).is_file():
            found.append([f"tests/{name}", *(["-k", chosen.strip("'")] if chosen else [])])
    return found


def try_tests(tests: Path, mutation: Mutation | None, entries: tuple[str, ...]) -> Outcome:
    """Run the tests on a copy of the package until one fails."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rlhf-mutation-") as name:
        folder, log = Path(name), Path(name) / "log.txt"
        make_copy(tests, folder, mutation)
        verdict, test = "survived", ""
        for arguments in commands(entries, tests):
            code = run_pytest(folder, arguments, log)
            if code in (PASSED, NO_TESTS):
                continue
            said = log.read_text(errors="replace")
            failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", said, re.MULTILINE)
            test = failed[-1] if failed else arguments[0]
            verdict = "caught"
            if code == -1:
                test = f"{arguments[0]} (does not end)"
            elif code != FAILED:
                verdict = "broken"
                print(said[-3000:])
            elif mutation is None:
                print(said[-6000:])
            break
    return Outcome(verdict, test, time.monotonic() - started)


def chosen_tests(mutation: Mutation, tests: Path, first: bool) -> tuple[str, ...]:
    """Those of the tests that are named with a mutation that there are."""
    found = [entry for entry in mutation.tests if commands((entry,), tests)]
    return tuple(found[:1] if first else found)


def check_unchanged(tests: Path, entries: list[str]) -> None:
    """All tests that are named pass on the package as it is."""
    for entry in entries:
        outcome = try_tests(tests, None, (entry,))
        print(f"as it is    {outcome.seconds:6.1f} s  {entry}", flush=True)
        if outcome.verdict != "survived":
            raise SystemExit(f"the tests do not pass on the package as it is: {outcome.test}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=[""], help="parts of files or names")
    parser.add_argument("--list", action="store_true", help="show the mutations and run nothing")
    parser.add_argument("--first", action="store_true", help="run only the first test file that is named with each")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="the tests of another checkout")
    options = parser.parse_args()
    chosen = [m for m in mutations_list.MUTATIONS if any(pattern in str(m) for pattern in options.only)]
    if options.list:
        for mutation in chosen:
            print(f"{mutation}\n    - {mutation.old}\n    + {mutation.new}")
        print(f"{len(chosen)} mutations")
    if wrong := faults(mutations_list.MUTATIONS):
        raise SystemExit("\n".join(["the list is out of date:", *wrong]))
    if options.list:
        return
    tests = options.tests.resolve()
    import_once()
    entries = {mutation: chosen_tests(mutation, tests, options.first) for mutation in chosen}
    check_unchanged(tests, list(dict.fromkeys(entry for named in entries.values() for entry in named)))
    outcomes = {}
    for mutation in chosen:
        outcomes[mutation] = outcome = try_tests(tests, mutation, entries[mutation])
        print(f"{outcome.verdict:10} {outcome.seconds:6.1f} s  {mutation}  {outcome.test}", flush=True)
    report(outcomes)


def report(outcomes: dict[Mutation, Outcome]) -> None:
    """The totals by file, and those that survived; the exit code is 1 if there are any."""
    print()
    for file in dict.fromkeys(mutation.file for mutation in outcomes):
        of_file = [outcome.verdict for mutation, outcome in outcomes.items() if mutation.file == file]
        print(f"{file:24} {of_file.count('caught'):4} of {len(of_file)} caught")
    left = [mutation for mutation, outcome in outcomes.items() if outcome.verdict != "caught"]
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    print(f"{len(outcomes)} mutations, {len(outcomes) - len(left)} caught, {len(left)} not, in {seconds:.0f} s")
    for mutation in left:
        print(f"{outcomes[mutation].verdict}: {mutation}: {mutation.old!r} -> {mutation.new!r}")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
