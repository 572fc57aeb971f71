"""Which stage the report says to mend first: every rule, its order, and what must not be named."""

import re

import pytest
import report_runs
from report_runs import EARLY, LATE, first_token, metrics_of, record, summary

from pipeline.html import reading, rules, words
from pipeline.records.last_run import Attempt
from pipeline.rl.healthy_ranges import HEALTHY
from pipeline.shift.calibration import calibration

COIN = calibration([1.0, -1.0] * 10)
ALARM = {"measure": "kl", "value": 57.2, "low": -1.0, "high": 50.0, "update": 31, "causes": "reward hacking"}


def run_with(folder, **metrics):
    """A run in which the metrics of some stages are others; a name's `_` stands for `-`."""
    changed = {name.replace("_", "-"): values for name, values in metrics.items()}
    records = {}
    for name in report_runs.PARENTS:
        records[name] = record(name, metrics=metrics_of(name) | changed.get(name, {}))
    return reading.read(report_runs.write(folder, records))


def found(run):
    return [(finding.rule, finding.what) for finding in rules.findings(run)]


def policies(**changes):
    """The metrics of an evaluation in which some policies have other figures."""
    table = metrics_of("evaluate")["policies"]
    return {"policies": table | {name: table[name] | figures for name, figures in changes.items()}}


def test_nothing_is_to_mend_in_a_good_run(tmp_path):
    run = run_with(tmp_path)
    assert found(run) == []
    said = words.summarise(run)
    assert said.state == "All stages are finished." and said.first is None
    assert "wins most often by the judge: 0.70 [0.65, 0.75] of 4 prompts against sft" in said.result


def test_a_tie_has_no_winner(tmp_path):
    tie = {"judge_win_rate": [0.55, 0.38, 0.72]}
    run = run_with(tmp_path, evaluate=policies(ppo=tie, dpo=tie))
    expected = (
        "no policy is better than sft for certain by the judge: the best is ppo with 0.55 [0.38, 0.72] of 4 prompts"
    )
    assert expected in words.summarise(run).result


def test_the_win_rates_of_a_coin_say_nothing(tmp_path):
    scored = {name: {"judge_win_rate": None, "score_win_rate": [0.55, 0.4, 0.7]} for name in ("ppo", "dpo")}
    run = run_with(tmp_path / "coin", evaluate=policies(**scored), reward={"held_out": COIN})
    assert words.summarise(run).result == ""
    assert "no better" not in [rule for rule, _ in found(run)]
    run = run_with(tmp_path / "good", evaluate=policies(**scored))
    assert "is better than sft for certain by the reward model" in words.summarise(run).result
    assert [what for rule, what in found(run) if rule == "no better"] == ["ppo", "dpo"]


RISING = [{"step": step, "eval_loss": loss} for step, loss in enumerate((2.0, 1.0, 1.2))]
LOSES = {"judge_win_rate": [0.3, 0.2, 0.4]}
OVERRATED = {"score_win_rate": [0.9, 0.85, 0.95], "judge_win_rate": [0.6, 0.55, 0.65]}
CASES = [
    ({"sft": {"eval_loss": 2.5}}, [("learned nothing", "sft")], "2.500 after training and was 2.000 before"),
    ({"sft": {"first_token": first_token(0.6)}}, [("empty completions", "sft")], "60% of its prompts"),
    ({"reward": {"held_out": COIN}}, [("chance", "reward")], "includes chance"),
    ({"reward": {"held_out": None}}, [("not measured", "reward")], "Give it `eval_data`"),
    ({"ppo": {"alarms": [ALARM]}}, [("alarm", "ppo")], f"Remedy: {HEALTHY[0].remedy}"),
    ({"evaluate": policies(ppo=OVERRATED)}, [("overrated", "reward")], "It overrates ppo"),
    ({"evaluate": policies(dpo=LOSES)}, [("no better", "dpo")], "It loses to sft by the judge: its win rate is 0.30"),
    (
        {"evaluate": policies(ppo={"judge_win_rate": [0.5, 0.4, 0.6]})},
        [("no better", "ppo")],
        "cannot be told from sft",
    ),
    ({"evaluate": policies(sft={"ended": 0.3})}, [("unended", "sft")], "Only 30% of its completions end"),
    ({"evaluate": policies(dpo={"kl": 80.0})}, [("far", "dpo")], "It is 80 nats from its baseline"),
]


@pytest.mark.parametrize(("metrics", "expected", "text"), CASES)
def test_a_rule_names_its_stage(tmp_path, metrics, expected, text):
    run = run_with(tmp_path, **metrics)
    assert found(run) == expected
    assert text in rules.findings(run)[0].text


def test_every_rule_has_a_case():
    told = {rule for _, expected, _ in CASES for rule, _ in expected}
    elsewhere = {"rows left out", "rows worth a look", "failed", "gate", "overfitted", "by heart", "shift"}  # below
    assert told | elsewhere == {rule.name for rule in rules.RULES}


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_held_out_loss_that_rises_again(tmp_path, stage):
    run = run_with(tmp_path)
    grown = vars(run.stages[stage]) | {"history": RISING}
    run.stages[stage] = type(run.stages[stage])(**grown)
    assert found(run) == [("overfitted", stage)]
    assert "least at step 1 (1.000) and is 1.200 at the end" in rules.findings(run)[0].text
    run.stages[stage] = type(run.stages[stage])(**(grown | {"history": RISING[:2]}))
    assert found(run) == []


def test_rows_are_learned_by_heart_only_when_they_come_again(tmp_path):
    """In the first epoch each row is new when its accuracy is measured."""
    run = run_with(tmp_path, reward={"held_out": calibration([1.0] * 70 + [-1.0] * 30)})
    grown = vars(run.stages["reward"])
    logs = [{"step": 10 * n, "epoch": n / 2, "accuracy": 1.0 if n in (1, 2, 6) else 0.9} for n in range(1, 7)]
    run.stages["reward"] = type(run.stages["reward"])(**(grown | {"history": logs[:2]}))
    assert found(run) == []
    run.stages["reward"] = type(run.stages["reward"])(**(grown | {"history": logs}))
    assert found(run) == [("by heart", "reward")]
    said = (
        "In its last epoch it is right on 95% of rows that it saw before, and on 70% of held-out ones: it learned rows"
    )
    assert rules.findings(run)[0].text.startswith(said)


def with_rows(folder, **section):
    dataset = {"dataset": "rows", "read": 100, "rows": 80, "dropped": {}, "noticed": {}} | section
    records = {name: record(name, datasets={"data": dataset}) for name in report_runs.PARENTS}
    return reading.read(report_runs.write(folder, records))


def test_rows_that_do_not_fit(tmp_path):
    """Once for a dataset, however many stages read it."""
    run = with_rows(tmp_path, dropped={"malformed": 4, "too_long": 16})
    assert found(run) == [("rows left out", "the data of sft")]
    text = rules.findings(run)[0].text
    assert text.startswith("16 of 100 rows of the dataset rows are longer than the limit of tokens and are left out.")
    assert found(with_rows(tmp_path, noticed={"contradictory": 20})) == [("rows worth a look", "the data of sft")]


@pytest.mark.parametrize("kind", ["blank", "held_out", "same_prompt", "weight", "label_false"])
def test_rows_left_out_on_purpose_are_no_fault(tmp_path, kind):
    assert found(with_rows(tmp_path, dropped={kind: 90})) == []


def test_a_stream_has_no_numbers_of_rows(tmp_path):
    dataset = {"dataset": "texts", "split": "train", "streamed": True, "fingerprint": "0"}
    records = {"sft": record("sft", datasets={"data": dataset})}
    assert found(reading.read(report_runs.write(tmp_path, records))) == []


def test_the_first_place_of_the_chain_comes_first(tmp_path):
    """Whatever the order of the rules, and of the stages in the config: data, SFT, reward model, RL."""
    metrics = {"ppo": {"alarms": [ALARM]}, "reward": {"held_out": COIN}, "sft": {"eval_loss": 2.5}}
    metrics["evaluate"] = policies(sft={"ended": 0.3}, dpo=LOSES)
    data = {"dataset": "rows", "read": 100, "rows": 60, "dropped": {"empty": 40}, "noticed": {}}
    records = {}
    for name in reversed(report_runs.PARENTS):
        changes = {"datasets": {"data": data}} if name == "dpo" else {}
        records[name] = record(name, metrics=metrics_of(name) | metrics.get(name, {}), **changes)
    run = reading.read(report_runs.write(tmp_path, records))
    order = ["the data of dpo", "sft", "sft", "reward", "ppo", "dpo"]
    assert [what for _, what in found(run)] == order
    said = words.summarise(run)
    assert said.first.what == "the data of dpo" and [one.what for one in said.others] == order[1:]


def test_the_shift_report_counts_where_ppo_has_no_baseline(tmp_path):
    icc = {"value": 0.8, "low": 0.7, "high": 0.9}
    for baseline, expected in (("none", [("shift", "reward")]), ("sft_mean", [])):
        records = {name: record(name) for name in report_runs.PARENTS}
        records["reward-shift"] = record("reward-shift", metrics=metrics_of("reward-shift") | {"icc": icc})
        records["ppo"] = record("ppo", config={"prompt_baseline": baseline})
        run = reading.read(report_runs.write(tmp_path / baseline, records))
        assert found(run) == expected
    assert "`prompt_baseline`" in words.summarise(reading.read(tmp_path / "none")).first.text


def test_the_baseline_and_the_base_are_not_judged(tmp_path):
    """A run whose only other policy wins, and one that has none."""
    bad = LOSES | {"kl": 99.0}
    assert found(run_with(tmp_path, evaluate=policies(base=bad, sft=bad | {"kl": 0.0}))) == []
    only = {"policies": {"base": summary(**bad), "sft": summary(**LOSES)}}
    run = run_with(tmp_path, evaluate=only)
    assert found(run) == [] and words.summarise(run).result == ""


def test_the_reward_model_that_overrates_is_the_one_trained_against(tmp_path):
    """Not the one that evaluates, nor for a policy that was trained against none."""
    records = {name: record(name) for name in report_runs.PARENTS}
    records["evaluate"] = record("evaluate", metrics=metrics_of("evaluate") | policies(dpo=OVERRATED))
    assert found(reading.read(report_runs.write(tmp_path / "dpo", records))) == []
    records["evaluate"] = record("evaluate", metrics=metrics_of("evaluate") | policies(ppo=OVERRATED))
    folder = report_runs.write(tmp_path / "other", records)
    assert found(reading.read(folder)) == [("overrated", "reward")]
    file = folder / "last_run.json"
    file.write_text(
        re.sub(r'("evaluate":\{"type":"evaluate","parents":\{"reward":)"reward"', r'\1"sft"', file.read_text())
    )
    assert reading.read(folder).stages["evaluate"].parents["reward"] == "sft"
    assert found(reading.read(folder)) == []


def test_a_failed_stage_is_named_with_its_last_line(tmp_path):
    records = {"sft": record("sft")}
    message = "stage 'reward' ended with exit code 1. The last lines of log.txt:\n  CUDA out of memory"
    folder = report_runs.write(tmp_path, records, {"reward": Attempt(state="failed", at=LATE, message=message)})
    (folder / "reward").mkdir()
    (folder / "reward" / "log.txt").write_text("loading\nCUDA out of memory\n")
    said = words.summarise(reading.read(folder))
    assert said.state == "1 of 6 stages are finished. reward failed."
    assert (said.first.rule, said.first.what) == ("failed", "reward")
    assert said.first.text == (
        "It failed: stage 'reward' ended with exit code 1. The last line of its log: CUDA out of memory"
    )


def test_a_rule_says_once_what_the_gate_has_said(tmp_path):
    """The gate's words are there, and those of the rule on the same figure are not."""
    records = {name: record(name) for name in ("sft", "reward", "reward-shift")}
    records["reward"] = record("reward", metrics=metrics_of("reward") | {"held_out": COIN, "accuracy": 0.6})
    folder = report_runs.write(tmp_path, records, {"ppo": Attempt(state="refused", at=LATE, message="no\nway")})
    (folder / "ppo").mkdir()
    verdict = {"stage": "reward", "what": "held-out accuracy", "passed": False, "seen": "0.50", "mend": "More data"}
    (folder / "ppo" / "gate.json").write_text(report_runs.json.dumps({"stops": True, "verdicts": [verdict]}))
    run = reading.read(folder)
    assert found(run) == [("gate", "reward")]
    assert words.summarise(run).state == "3 of 6 stages are finished. The gate does not let ppo start."
    assert "fails the gate (the gate holds ppo): 0.50. More data." in rules.findings(run)[0].text
    assert EARLY < LATE
