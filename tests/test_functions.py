"""Functions named in the config: what counts as a change of one, and what it may give."""

import math

import pytest
import tiny
from test_equalities import run

from pipeline import manifest, plan, scoring
from pipeline.config import load
from pipeline.errors import UserError

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
    monkeypatch.setattr(scoring.sys, "path", [*scoring.sys.path])
    found = tiny.make_run(tmp_path, {"grpo": GRPO})
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    yield found
    for name in [name for name in scoring.sys.modules if name.split(".")[0] in ("judges", "shared", "late")]:
        del scoring.sys.modules[name]


def inputs(path):
    config = load(path)
    return plan.identify(config, "grpo", manifest.Manifest(name="tiny")).inputs["function judges.own:score"]


def test_a_function_counts_with_what_it_imports_from_beside_it(path):
    files = scoring.sources_of("judges.own:score", path.parent, "key")
    assert {file.relative_to(path.parent).as_posix() for file in files} == COUNTS
    before = inputs(path)
    for name in FILES:
        file = path.parent / name
        file.write_text(FILES[name] + "\n# changed\n")
        assert (inputs(path) != before) == (name in COUNTS), name
        file.write_text(FILES[name])
    assert inputs(path) == before


def test_an_installed_function_is_one_file(path):
    (file,) = scoring.sources_of("json.decoder:JSONDecoder", path.parent, "key")
    assert file.name == "decoder.py"
    (path.parent / "alone.py").write_text("import torch\n")
    assert scoring.sources_of("alone:score", path.parent, "key") == [path.parent / "alone.py"]


@pytest.mark.parametrize("value", ["math.nan", "math.inf", "None", "'good'", "[1.0]"])
def test_a_reward_function_that_gives_no_number(path, value):
    """TRL takes NaN for a reward that does not count."""
    text = f"import math\ndef score(prompt, completion):\n    return {value}\n"
    (path.parent / "judges" / "own.py").write_text(text)
    wrong = r"function judges.own:score gives .* to the completion .* of the prompt 'Tell me about .*' \(row 0 of the"
    with pytest.raises(UserError, match=wrong):
        run(path, "grpo")


def test_a_judge_that_gives_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring.sys, "path", [*scoring.sys.path])
    (tmp_path / "rare.py").write_text("def score(prompt, completion):\n    return float('nan')\n")
    evaluate = {"data": "demonstrations", "max_new_tokens": 4, "policies": [], "judge": "rare:score"}
    stages = {"sft": tiny.SFT | {"training": {"max_steps": 1}}, "evaluate": evaluate}
    data = {"demonstrations": {"path": "demonstrations.jsonl", "heldout": 0.5}}
    wrong = r"function rare:score gives nan to the completion .* of the prompt 'Tell .* \(row 0, policy base\)"
    with pytest.raises(UserError, match=wrong):
        run(tiny.make_run(tmp_path, stages, data=data), "sft", "evaluate")


def test_numbers_pass():
    for value in (1, True, 0.5, math.pi):
        assert scoring.judged(lambda *_, it=value: it, "a:b", "p", "c", "here") == float(value)
