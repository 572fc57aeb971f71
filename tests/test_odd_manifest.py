"""A manifest that parses and yet cannot be: one message that says where, what was seen and what was expected."""

import json

import pytest

from pipeline.records import manifest
from pipeline.records.manifest import Manifest, Output, TokenizerRecord
from pipeline.shift.advice import advice
from pipeline.shift.calibration import calibration
from pipeline.shift.measure import measure

SUMMARY = {"prompts": 4, "kl": 0.1, "length": 3.0, "ended": 0.5, "score": 0.5, "score_win_rate": [0.5, 0.4, 0.6]}
TOKENIZER = TokenizerRecord(source="0", fingerprint="1", pad_token="<pad>", eos_token="<eos>", template="2")


@pytest.fixture
def run_dir(tmp_path, make_record):
    """A run folder whose manifest has a stage of each kind; what it says of files is not looked at here."""
    texts = ("Tell me about [red]tea[/red].", "Tell me about rain.")
    prompts = [{"prompt": text, "tokens": 3, "scores": [0.0, 1.0, 0.5], "lengths": [2, 3, 4]} for text in texts]
    shifted = measure(prompts, calibration([1.0, 2.0, -1.0, 0.5]))
    shifted["advice"] = advice(shifted)
    policies = {"base": SUMMARY, "sft": SUMMARY, "dpo": SUMMARY}
    report = Output(kind="report", path="report/output", files={})
    adapter = Output(kind="adapter", path="dpo/output", full="sft/output", files={"dpo/output/weights": "0"})
    records = {
        "sft": make_record(metrics={"loss": 1.0, "steps": 2}, output=Output(kind="full", path="sft/output", files={})),
        "dpo": make_record(type="dpo", output=adapter),
        "reward-shift": make_record(type="shift", parents={"reward": "sft"}, metrics=shifted, output=report),
        "evaluate": make_record(type="evaluate", metrics={"baseline": "sft", "policies": policies}, output=report),
    }
    model = {"path": "some/base", "dtype": "float32", "quantization": None}
    folder = tmp_path / "runs" / "tiny"
    manifest.write(folder, Manifest(name="tiny", model=model, tokenizer=TOKENIZER, stages=records))
    return folder


def replace(run_dir, where, value):
    """Put `value` at a place of the manifest; `...` takes the place away."""
    path = run_dir / manifest.FILE
    raw = json.loads(path.read_text())
    node = raw
    *above, last = where
    for key in above:
        node = node[key]
    if value is ...:
        del node[last]
    elif last == "rename":
        raw["stages"] = {value if name == above[-1] else name: record for name, record in raw["stages"].items()}
    else:
        node[last] = value
    path.write_text(json.dumps(raw))
    return path.read_bytes()


def test_the_manifest_itself_is_taken(cli, run_dir):
    exit_code, stdout, stderr = cli("status", run_dir)
    assert (exit_code, stderr) == (0, "")
    assert "win rate 0.50 [0.40, 0.60]" in stdout
    exit_code, stdout, stderr = cli("shift", run_dir)
    assert (exit_code, stderr) == (0, "")
    assert "Tell me about [red]tea[/red]." in stdout


SFT, DPO, EVALUATE, SHIFT = (("stages", name) for name in ("sft", "dpo", "evaluate", "reward-shift"))
ODD = [
    (("schema_version",), True, "schema version True", "this version reads 1"),
    (("schema_version",), "1", "schema version 1", "this version reads 1"),
    (("name",), "[red]x[/red]", "damaged at name", 'expected letters, digits, `_`, `.` and `-`, got "[red]x[/red]"'),
    (("name",), 5, "damaged at name", "expected a valid string, got 5"),
    (("model", "dtype"), "float8", "damaged at model.dtype", "expected 'float32', 'bfloat16' or 'float16'"),
    (("model", "path"), ["a"], "damaged at model.path", 'expected a valid string, got ["a"]'),
    (("tokenizer", "eos_token"), None, "damaged at tokenizer.eos_token", "expected a valid string, got null"),
    (("stages", "new"), {}, "damaged at stages.new.type", "expected this field, got none"),
    ((*SFT, "rename"), "[/]", "damaged at stages.[/]", "expected a name of letters"),
    ((*SFT, "rename"), "..", "damaged at stages...", "expected a name of letters"),
    ((*SFT, "type"), "orpo", "damaged at stages.sft.type", "expected one of dpo, evaluate, grpo"),
    ((*SFT, "duration"), "long", "damaged at stages.sft.duration", 'expected a valid number, got "long"'),
    ((*SFT, "duration"), float("nan"), "damaged at stages.sft.duration", "expected a finite number, got NaN"),
    ((*SFT, "seed"), True, "damaged at stages.sft.seed", "expected a valid integer, got true"),
    ((*SFT, "metrics"), "good", "damaged at stages.sft.metrics", 'expected a valid dictionary, got "good"'),
    ((*SFT, "metrics", "loss"), "low", "damaged at stages.sft.metrics.loss", 'expected a number or null, got "low"'),
    ((*SFT, "metrics", "loss"), [1], "damaged at stages.sft.metrics.loss", "expected a number or null, got [1]"),
    ((*SFT, "metrics", "eval_loss"), {}, "damaged at stages.sft.metrics.eval_loss", "expected a valid number, got {}"),
    ((*SFT, "metrics", "first_token"), 1, "damaged at stages.sft.metrics.first_token", "expected a valid dictionary"),
    ((*SFT, "metrics", "held_out"), {}, "damaged at stages.sft.metrics.held_out.count", "expected this field"),
    ((*SFT, "output", "path"), "../../etc", "stages.sft.output.path", "inside the run folder"),
    ((*SFT, "output", "path"), "/etc", "stages.sft.output.path", "inside the run folder"),
    ((*SFT, "output", "path"), "", "stages.sft.output.path", "inside the run folder"),
    ((*DPO, "output", "full"), "sft/../../x", "stages.dpo.output.full", "inside the run folder"),
    ((*DPO, "output", "files"), {"a/../../b": "0"}, "stages.dpo.output.files", "inside the run folder"),
    ((*DPO, "output", "kind"), "folder", "stages.dpo.output.kind", "expected 'full', 'adapter' or 'report'"),
    ((*EVALUATE, "metrics"), {}, "stages.evaluate.metrics.baseline", "expected this field, got none"),
    ((*EVALUATE, "metrics", "baseline"), "ppo", "evaluate.metrics.baseline", "one of the policies (base, sft, dpo)"),
    ((*EVALUATE, "metrics", "policies"), ["sft"], "evaluate.metrics.policies", "expected a valid dictionary"),
    ((*EVALUATE, "metrics", "policies", "sft", "kl"), "0", "metrics.policies.sft.kl", "expected a valid number"),
    ((*EVALUATE, "metrics", "policies", "sft", "score_win_rate"), [1.0], "sft.score_win_rate", "at least 3 items"),
    ((*SHIFT, "parents"), {}, "stages.reward-shift.parents.reward", "got none"),
    ((*SHIFT, "metrics", "icc"), 0.5, "stages.reward-shift.metrics.icc", "expected a valid dictionary"),
    ((*SHIFT, "metrics", "advice"), ..., "stages.reward-shift.metrics.advice", "expected this field, got none"),
    ((*SHIFT, "metrics", "largest", 0, "offset"), None, "metrics.largest.0.offset", "expected a valid number"),
    ((*SHIFT, "metrics", "comparisons", "ece"), "x", "metrics.comparisons.ece", "expected a valid number"),
]  # fmt: skip


@pytest.mark.parametrize(("where", "value", "place", "words"), ODD)
def test_odd_value_is_one_message(cli, run_dir, where, value, place, words):
    before = replace(run_dir, where, value)
    exit_code, stdout, stderr = cli("status", run_dir)
    assert (exit_code, stdout) == (2, "")
    assert stderr.startswith(f"error: {run_dir / manifest.FILE}: ")
    assert len(stderr.splitlines()) == 1
    assert place in stderr
    assert words in stderr
    assert "Restore it from a copy, or move the run folder away" in stderr
    assert (run_dir / manifest.FILE).read_bytes() == before


@pytest.mark.parametrize("command", ["run", "plan"])
def test_odd_manifest_ends_a_run_before_anything_is_done(cli, run_dir, write_config, tmp_path, command):
    config = write_config(tmp_path)
    before = replace(run_dir, (*EVALUATE, "metrics"), {})
    exit_code, stdout, stderr = cli(command, config)
    assert (exit_code, stdout) == (2, "")
    assert stderr.startswith(f"error: {run_dir / manifest.FILE}: damaged at stages.evaluate.metrics.baseline: ")
    assert len(stderr.splitlines()) == 1
    assert (run_dir / manifest.FILE).read_bytes() == before
    assert [path.name for path in run_dir.iterdir()] == [manifest.FILE]


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[1]", '"text"', "1" * 5000, "", "\xff"])
def test_what_is_no_manifest_at_all(cli, run_dir, content):
    (run_dir / manifest.FILE).write_text(content, encoding="latin-1")
    exit_code, stdout, stderr = cli("status", run_dir)
    assert (exit_code, stdout) == (2, "")
    assert stderr.startswith(f"error: {run_dir / manifest.FILE}: damaged: expected a manifest in JSON, got ")
    assert len(stderr.splitlines()) == 1


def test_a_win_rate_that_is_not_there(cli, run_dir):
    """A baseline with a score, and a policy without: the table has a gap."""
    replace(run_dir, (*EVALUATE, "metrics", "policies", "dpo"), {"prompts": 4})
    exit_code, stdout, stderr = cli("status", run_dir)
    assert (exit_code, stderr) == (0, "")
    row = next(line for line in stdout.splitlines() if line.startswith("│ dpo ") and "nan" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["dpo", "nan", "-", "nan", "nan", "nan %"]


@pytest.mark.parametrize("path", ['a "quoted" folder', "ünï 漢字", "back\\slash"])
def test_the_shown_code_is_python_whatever_the_path(cli, run_dir, path):
    moved = run_dir.rename(run_dir.parent / path)
    exit_code, stdout, _ = cli("status", moved)
    assert exit_code == 0
    line = next(line for line in stdout.splitlines() if line.startswith("tokenizer = "))
    names = {"AutoTokenizer": type("", (), {"from_pretrained": staticmethod(str)})}
    exec(line, names)
    assert names["tokenizer"] == str(moved / "sft" / "output")
