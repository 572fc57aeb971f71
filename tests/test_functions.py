"""Functions named in the config: what counts as a change of one, and what it may give."""

import math
import shutil

import pytest
import tiny
from test_equalities import run

from pipeline.chain import staleness
from pipeline.config import functions
from pipeline.config.load import load
from pipeline.records import manifest
from pipeline.system.errors import UserError

GRPO = {"data": "demonstrations", "init": "base", "reward_functions": ["judges.own:score"]}
GRPO |= {"training": {"max_completion_length": 8, "num_generations": 4, "max_steps": 1}}
FILES = {
    "judges/__init__.py": "",
    "judges/own.py": "from . import words\nfrom .rules.length import limit\nimport shared.text as text\n"
    "import json, torch\n"
    "def score(prompt, completion):\n    return float(len(completion))\n",
    "judges/words.py": "GOOD = ['tea']\n",
    "judges/other.py": "BAD = 1\n",
    "judges/rules/__init__.py": "X = 1\n",
    "judges/rules/length.py": "def limit():\n    import late\n",
    "late.py": "Y = 1\n",
    "shared/__init__.py": "",
    "shared/text.py": "import judges.own\n",  # a circle
    "unused.py": "",
}
COUNTS = set(FILES) - {"judges/other.py", "unused.py"}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(functions.sys, "path", [*functions.sys.path])
    found = tiny.make_run(tmp_path, {"grpo": GRPO})
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    yield found
    for name in [name for name in functions.sys.modules if name.split(".")[0] in ("judges", "shared", "late")]:
        del functions.sys.modules[name]


def inputs(path):
    config = load(path)
    return staleness.identify(config, "grpo", manifest.Manifest(name="tiny")).inputs["function judges.own:score"]


def test_a_function_counts_with_what_it_imports_from_beside_it(path):
    files = functions.sources_of("judges.own:score", path.parent, "key")
    assert {file.relative_to(path.parent).as_posix() for file in files} == COUNTS
    before = inputs(path)
    for name in FILES:
        file = path.parent / name
        file.write_text(FILES[name] + "\n# changed\n")
        assert (inputs(path) != before) == (name in COUNTS), name
        file.write_text(FILES[name])
    assert inputs(path) == before


def test_an_installed_function_is_one_file(path):
    (file,) = functions.sources_of("json.decoder:JSONDecoder", path.parent, "key")
    assert file.name == "decoder.py"
    (path.parent / "alone.py").write_text("import torch\n")
    assert functions.sources_of("alone:score", path.parent, "key") == [path.parent / "alone.py"]


RARE = "import math\ndef score(prompt, completion):\n    return {} if completion not in ('', 'Yes.') else 1.0\n"


@pytest.mark.parametrize("value", ["math.nan", "math.inf", "None", "'1.0'", "[1.0]", "{}['no']"])
def test_a_reward_function_that_gives_no_number_in_training(path, value):
    """TRL takes NaN for a reward that does not count."""
    text = RARE.format(value)
    (path.parent / "judges" / "own.py").write_text(text)
    wrong = r"function judges.own:score (gives|fails at) .*the completion .* of the prompt 'Tell .*' \(row 0 of the"
    with pytest.raises(UserError, match=wrong):
        run(path, "grpo")


def test_a_judge_that_gives_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(functions.sys, "path", [*functions.sys.path])
    (tmp_path / "rare.py").write_text("def score(prompt, completion):\n    return float('nan')\n")
    evaluate = {"data": "demonstrations", "max_new_tokens": 4, "policies": [], "judge": "rare:score"}
    stages = {"sft": tiny.SFT | {"training": {"max_steps": 1}}, "evaluate": evaluate}
    data = {"demonstrations": {"path": "demonstrations.jsonl", "heldout": 0.5}}
    wrong = r"function rare:score gives nan to the completion .* of the prompt 'Tell .* \(row 0, policy base\)"
    with pytest.raises(UserError, match=wrong):
        run(tiny.make_run(tmp_path, stages, data=data), "sft", "evaluate")


def test_numbers_pass():
    for value in (1, True, 0.5, math.pi):
        assert functions.judged(lambda *_, it=value: it, "a:b", "p", "c", "here") == float(value)


BROKEN = {
    "def score(prompt):\n    return 1": "with a prompt and a completion (too many positional arguments)",
    "def score(prompt, completion, extra):\n    return 1": "(missing a required argument: 'extra'); expected `",
    "def score(*, prompt, completion):\n    return 1": "cannot be called with a prompt and a completion",
    "def score(prompts, completions, **kwargs):\n    return [1.0 for _ in prompts]": "gives [1.0, 1.0",
    "async def score(prompt, completion):\n    return 1": "gives a coroutine (it is an `async def`)",
    "score = 5": "'mine:score' is 5; expected `def score(prompt: str, completion: str) -> float`",
    "def score(prompt, completion):\n    return '1.0'": "gives '1.0' to the completion 'Yes.' of the prompt 'Tell me",
    "def score(prompt, completion):\n    return 1j": "gives 1j to",
    "def score(prompt, completion):\n    return 10**400": "expected a finite number",
    "def score(prompt, completion):\n    return 1 / len(completion)": "ZeroDivisionError: division by zero (mine.py",
    "import json\ndef score(prompt, completion):\n    return json.loads(completion)": "(mine.py, line 3)",
    "def score(prompt, completion):\n    import sys\n    sys.exit()": "it ends the program with sys.exit(None)",
    "import sys\nprint('no key')\nsys.exit(0)": "Make it work, then give the same command again (it printed: no key)",
    "def score(": "cannot import 'mine:score': SyntaxError: '(' was never closed (mine.py, line 1)",
    "x = 1 / 0": "cannot import 'mine:score': ZeroDivisionError: division by zero (mine.py, line 1)",
    "x = '\0'": "cannot import 'mine:score': ",
    "import nothing_like_this": "ModuleNotFoundError: No module named 'nothing_like_this' (mine.py, line 1)",
    "y = 1": "'mine' has no function 'score'; valid here: ",
    "import os\nos._exit(3)": "stages.evaluate.judge: 'mine:score' ends its process (exit code 3) when it is tried",
    "raise BaseException('at all')": "BaseException: at all (mine.py, line 1)",
}


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory):
    """A folder whose config has a judge, `mine:score`; copy it."""
    folder = tmp_path_factory.mktemp("judge")
    evaluate = {"data": "demonstrations", "policies": [], "judge": "mine:score", "max_new_tokens": 4}
    data = {"demonstrations": {"path": "demonstrations.jsonl", "heldout": 0.5}}
    tiny.make_run(folder, {"sft": tiny.SFT, "evaluate": evaluate}, data=data, run_dir=None)
    return folder


@pytest.fixture
def plan_of(judged_run, tmp_path, cli):
    """`plan_of(code, *arguments)`: the plan with this code as the judge's module."""
    shutil.copytree(judged_run, tmp_path, dirs_exist_ok=True)

    def plan_of(code, *arguments):
        (tmp_path / "mine.py").write_text(code)
        try:
            return cli("plan", "tiny.yaml", *arguments)
        finally:
            functions.sys.modules.pop("mine", None)
            functions.importlib.invalidate_caches()
            shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)

    return plan_of


@pytest.mark.parametrize("code", BROKEN)
def test_a_function_is_tried_before_anything_is_trained(plan_of, code):
    exit_code, out, err = plan_of(code)
    assert exit_code == 2, out + err
    assert BROKEN[code] in err
    assert "\n  stages.evaluate: stages.evaluate.judge: " in err or "stages.evaluate: function mine" in err, err
    assert len(err.splitlines()) == 2


def test_what_a_function_prints_is_not_shown_in_a_plan(plan_of):
    exit_code, out, err = plan_of("print('hello')\ndef score(prompt, completion):\n    print('hi')\n    return 1")
    assert exit_code == 0, err
    assert "hello" not in out + err and "hi\n" not in out + err


@pytest.mark.parametrize("reference", ["../mine.py:score", ".mine:score", "mine.py", ":score", "a b:c"])
def test_a_reference_that_is_no_module_and_function(plan_of, reference):
    exit_code, _, err = plan_of("", f"stages.evaluate.judge={reference}")
    assert exit_code == 2
    assert f"expected `module:function`, two names of Python, got {reference!r}" in err


def test_what_a_function_loads_does_not_stay(plan_of):
    """A model on the GPU, for example, would be there while the stages train."""
    exit_code, _, err = plan_of("import os\ndef score(prompt, completion):\n    print(os.getpid())\n    return 'no'")
    assert exit_code == 2
    assert "mine" not in functions.sys.modules
    assert int(err.rpartition("(it printed: ")[2].split(")")[0]) != functions.os.getpid()
