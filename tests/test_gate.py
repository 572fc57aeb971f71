"""The gate before RL and the reports it reads; on real reward models it decides in test_quickstart.py."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import warm
from ruamel.yaml import YAML

from pipeline import launcher
from pipeline.chain import gate, staleness
from pipeline.config import graph
from pipeline.config.load import load
from pipeline.data.encode import prompt_ids
from pipeline.models import scoring
from pipeline.models.generation import Sampling
from pipeline.records import manifest
from pipeline.records.manifest import Manifest
from pipeline.shift.advice import advice
from pipeline.shift.calibration import calibration
from pipeline.shift.measure import measure
from pipeline.show.results import snippet
from pipeline.system.digests import digest
from pipeline.system.errors import UserError
from pipeline.training.completions import identity_of

ROOT = Path(__file__).parents[1]


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def resolve(write_config, tmp_path):
    """`resolve(**changes)`: the tiny run's config with the gate on and with changes, loaded."""

    def call(**changes):
        return load(write_config(tmp_path, **({"gate": "stop"} | changes)))

    return call


def estimate(value, low, high):
    return {"value": value, "low": low, "high": high}


GOOD = {
    "accuracy": estimate(0.7, 0.6, 0.8),
    "within_sd": estimate(1.0, 0.9, 1.1),
    "length_correlation": estimate(0.5, 0.4, 0.6),
}
GOOD_SFT = {"loss": 1.0, "first_loss": 1.5, "initial_eval_loss": 3.0, "eval_loss": 2.0}
GOOD_SFT |= {"first_token": {"special": 0.25, "prompts": 64, "likeliest": "A"}}


@pytest.fixture
def recorded(make_record):
    """`recorded(sft, **figures)`: a manifest with an SFT and a reward model that pass, but for what is changed.

    A figure that is `UNMEASURED` is not on record.
    """

    def call(sft=None, **changes):
        figures = GOOD | changes
        stages = {"sft": make_record(metrics=GOOD_SFT | (sft or {})), "reward": make_record(type="reward")}
        if figures["accuracy"] is not UNMEASURED:
            stages["reward"].metrics["held_out"] = {"count": 100, "accuracy": figures["accuracy"]}
        if figures["within_sd"] is not UNMEASURED:
            metrics = {key: figures[key] for key in ("within_sd", "length_correlation")}
            stages["reward-shift"] = make_record(type="shift", metrics=metrics)
        return Manifest(name="tiny", stages=stages)

    return call


UNMEASURED = object()
ACCURACY, SPREAD, LENGTH = "held-out accuracy", "within-prompt SD", "score and length"
LOSS, TOKEN = "held-out loss", "first token"


def passed(config, found, stage="ppo"):
    return {verdict.what: verdict.passed for verdict in gate.verdicts(config, stage, found)}


def test_what_is_good_enough_passes(resolve, recorded):
    config, found = resolve(), recorded()
    assert passed(config, found) == dict.fromkeys((LOSS, TOKEN, ACCURACY, SPREAD, LENGTH), True)
    assert [verdict.stage for verdict in gate.check(config, "ppo", found)] == ["sft"] * 2 + ["reward"] * 3
    assert "passed: 0.70 [0.60, 0.80] on 100 comparisons" in str(gate.check(config, "ppo", found)[2])


# The interval decides: all of it for the accuracy, its nearer end for what may only be measured badly.
FIGURES = [
    ("accuracy", estimate(0.6, 0.51, 0.7), ACCURACY, True, "0.60 [0.51, 0.70]"),
    ("accuracy", estimate(0.6, 0.5, 0.7), ACCURACY, False, "0.60 [0.50, 0.70]"),
    ("accuracy", estimate(0.3, 0.2, 0.4), ACCURACY, False, "0.30 [0.20, 0.40]"),
    ("within_sd", estimate(0.03, 0.01, 0.05), SPREAD, True, "0.03 [0.01, 0.05]"),
    ("within_sd", estimate(0.03, 0.01, 0.04), SPREAD, False, "0.03 [0.01, 0.04]"),
    ("length_correlation", estimate(0.95, 0.84, 0.97), LENGTH, True, "0.95 [0.84, 0.97]"),
    ("length_correlation", estimate(0.95, 0.86, 0.97), LENGTH, False, "0.95 [0.86, 0.97]"),
    ("length_correlation", estimate(-0.95, -0.97, -0.84), LENGTH, True, "-0.95 [-0.97, -0.84]"),
    ("length_correlation", estimate(-0.95, -0.97, -0.86), LENGTH, False, "-0.95 [-0.97, -0.86]"),
    ("length_correlation", estimate(0.0, -0.95, 0.95), LENGTH, True, "0.00 [-0.95, 0.95]"),
]
LIMITS = {ACCURACY: "0.5", SPREAD: "0.05", LENGTH: "0.85"}
MENDS = {ACCURACY: "cleaner labels", SPREAD: "RL has no signal", LENGTH: "balance the lengths"}


@pytest.mark.parametrize(("figure", "ends", "what", "passes", "seen"), FIGURES)
def test_each_figure_of_a_reward_model(resolve, recorded, figure, ends, what, passes, seen):
    config, found = resolve(), recorded(**{figure: ends})
    judged = passed(config, found)
    assert judged.pop(what) == passes
    assert all(judged.values())
    if passes:
        assert len(gate.check(config, "ppo", found)) == 5
        return
    with pytest.raises(UserError) as raised:
        gate.check(config, "ppo", found)
    message = str(raised.value)
    for word in ("ppo does not start", f"reward: {what}: FAILED: {seen}", f" {LIMITS[what]}. ", MENDS[what]):
        assert word in message
    assert "gate_limits" in message and "gate: warn" in message
    assert message.count("FAILED") == 1 and "passed" not in message


POLICIES = [
    ({"eval_loss": 2.9}, LOSS, True, ""),
    ({"eval_loss": 3.0}, LOSS, False, "3.000 after training, 3.000 before"),
    ({"eval_loss": None}, LOSS, False, "nan after training"),  # the manifest's null is NaN
    ({"eval_loss": 2.9, "initial_eval_loss": 2.8}, LOSS, False, "2.900 after training, 2.800 before"),
    ({"first_token": {"special": 0.5, "prompts": 64, "likeliest": "<eos>"}}, TOKEN, True, ""),
    ({"first_token": {"special": 0.75, "prompts": 64, "likeliest": "<eos>"}}, TOKEN, False, "75% of 64 prompts"),
]


@pytest.mark.parametrize(("metrics", "what", "passes", "seen"), POLICIES)
@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_each_figure_of_a_policy(resolve, recorded, stage, metrics, what, passes, seen):
    config, found = resolve(), recorded(metrics)
    judged = passed(config, found, stage)
    assert judged.pop(what) == passes
    assert all(judged.values())
    if not passes:
        with pytest.raises(UserError, match=f"sft: {what}: FAILED: {seen}"):
            gate.check(config, stage, found)


def test_what_was_not_measured_neither_stops_nor_passes(resolve, recorded):
    config = resolve()
    found = recorded(accuracy=UNMEASURED, within_sd=UNMEASURED)
    assert passed(config, found) == {LOSS: True, TOKEN: True, ACCURACY: None, "shift report": None}
    told = [str(verdict) for verdict in gate.check(config, "ppo", found)][2:]
    assert "not measured: it has no held-out comparisons. Give it `eval_data`" in told[0]
    assert "not measured: there is none. Add a stage of type shift" in told[1]
    # One prompt has no interval, and two completions of it always correlate by 1.
    one = recorded(within_sd=estimate(0.0, None, None), length_correlation=estimate(1.0, None, None))
    assert passed(config, one) == {LOSS: True, TOKEN: True, ACCURACY: True, SPREAD: None, LENGTH: None}
    assert "score and length: not measured: 1.00 has no interval" in str(gate.check(config, "ppo", one)[4])
    # Completions of one length say nothing about it.
    assert LENGTH not in passed(config, recorded(length_correlation=None))
    bare = Manifest(name="tiny", stages=recorded().stages | {"sft": recorded().stages["reward"]})
    assert {LOSS, TOKEN}.isdisjoint(passed(config, bare))


def test_a_dpo_is_judged_by_its_policy_alone(resolve, recorded):
    bad = recorded(accuracy=GOOD["accuracy"] | {"low": 0.1})
    assert passed(resolve(), bad, "dpo") == {LOSS: True, TOKEN: True}
    assert gate.check(resolve(), "dpo", bad)
    assert gate.check(resolve(), "sft", bad) == gate.check(resolve(), "evaluate", bad) == []


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_rl_on_functions_alone_has_no_reward_model_to_judge(resolve, recorded, kind):
    changes = {"stages.ppo.type": kind, "stages.ppo.training": {"num_generations": 2}}
    bad = recorded(accuracy=GOOD["accuracy"] | {"low": 0.1})
    assert passed(resolve(**changes), bad)[ACCURACY] is False
    functions = resolve(**changes, **{"stages.ppo.reward_functions": ["judge:score"]})
    assert passed(functions, bad) == {LOSS: True, TOKEN: True}


BAD = {
    "accuracy": estimate(0.4, 0.3, 0.5),
    "within_sd": estimate(0.01, 0.0, 0.02),
    "length_correlation": estimate(0.99, 0.98, 1.0),
}
BAD_SFT = {"first_token": {"special": 1.0, "prompts": 64, "likeliest": "<eos>"}}


def test_all_that_failed_is_named_at_once(resolve, recorded):
    with pytest.raises(UserError) as raised:
        gate.check(resolve(), "ppo", recorded(BAD_SFT, **BAD))
    assert [what in str(raised.value) for what in (TOKEN, ACCURACY, SPREAD, LENGTH)] == [True] * 4


def test_warn_goes_on_and_off_does_not_look(resolve, recorded):
    bad = recorded(BAD_SFT, **BAD)
    told = [str(verdict) for verdict in gate.check(resolve(gate="warn"), "ppo", bad)]
    assert sum("FAILED" in line for line in told) == 4
    assert gate.check(resolve(gate="off"), "ppo", bad) == []


def test_a_limit_of_null_is_not_asked(resolve, recorded):
    config = resolve(gate_limits=dict.fromkeys(("accuracy", "within_sd", "length_correlation", "first_token")))
    assert passed(config, recorded(BAD_SFT, **BAD)) == {LOSS: True}
    assert passed(config, recorded(BAD_SFT, accuracy=UNMEASURED, within_sd=UNMEASURED)) == {LOSS: True}
    strict = resolve(gate_limits={"accuracy": 0.65, "within_sd": None})
    assert passed(strict, recorded(**BAD | {"accuracy": GOOD["accuracy"]}))[ACCURACY] is False
    assert SPREAD not in passed(strict, recorded(**BAD))


def added(config):
    return {name: stage for name, stage in config.stages.items() if stage.type == "shift"}


def test_a_shift_stage_is_added_with_evaluates_data_and_settings(resolve):
    own = {"temperature": 0.7, "max_new_tokens": 5, "max_prompt_length": 99, "batch_size": 3, "seed": 11}
    config = resolve(**{f"stages.evaluate.{key}": value for key, value in own.items()})
    assert list(config.stages) == ["pretrain", "sft", "reward", "reward-shift", "ppo", "dpo", "evaluate"]
    stage = config.stages["reward-shift"]
    assert {key: getattr(stage, key) for key in own} == own
    assert (stage.data, stage.reward, stage.policy) == ("prompts", "reward", "sft")
    assert (stage.num_prompts, stage.num_completions) == (200, 4)
    assert config.stages["ppo"].shift == "reward-shift"
    assert graph.waits_for(config.stages["ppo"]) == {"sft", "reward", "reward-shift"}
    assert graph.parents(config.stages["ppo"]) == {"init": "sft", "reward": "reward"}


def test_without_an_evaluate_stage_it_takes_eval_data(resolve):
    nothing = {"stages.evaluate": tiny.REMOVED}
    assert added(resolve(**nothing)) == {}
    config = resolve(**nothing, **{"stages.reward.eval_data": "comparisons"})
    assert config.stages["reward-shift"].data == "comparisons"
    assert config.stages["ppo"].shift == "reward-shift"


def test_every_reward_model_has_its_own(resolve):
    other = {"type": "reward", "data": "comparisons"}
    changes = {"stages.other": other, "stages.ppo.reward": "other", "stages.evaluate.reward": "reward"}
    config = resolve(**changes)
    assert {name: stage.reward for name, stage in added(config).items()} == {
        "reward-shift": "reward",
        "other-shift": "other",
    }
    assert config.stages["ppo"].shift == "other-shift"


def test_with_the_gate_off_none_is_added(write_config, tmp_path):
    path = write_config(tmp_path, gate="off")
    assert "gate: off\n" in path.read_text()  # unquoted, which YAML 1.1 took for false
    config = load(path)
    assert added(config) == {} and config.stages["ppo"].shift is None


@pytest.mark.parametrize("own", [{"seed": 5}, {"temperature": 0.5, "data": "comparisons"}, {}])
def test_a_declared_one_says_only_what_differs(resolve, own):
    evaluate = {f"stages.evaluate.{key}": value for key, value in {"seed": 11, "temperature": 0.7}.items()}
    config = resolve(**evaluate, **{"stages.reward-shift": {"num_completions": 8, "policy": "base"} | own})
    (stage,) = added(config).values()
    expected = {"seed": 11, "temperature": 0.7, "max_new_tokens": 8, "batch_size": 4, "data": "prompts"} | own
    assert {key: getattr(stage, key) for key in expected} == expected
    assert (stage.reward, stage.policy, stage.num_completions, stage.num_prompts) == ("reward", "base", 8, 200)
    assert config.stages["ppo"].shift == "reward-shift"


def test_the_added_one_is_changed_by_its_name_on_the_command_line(write_config, tmp_path):
    path = write_config(tmp_path, gate="stop")
    stages = load(path, ("stages.reward-shift.num_prompts=7",)).stages
    assert stages["reward-shift"].model_copy(update={"num_prompts": 200}) == load(path).stages["reward-shift"]
    assert stages["reward-shift"].num_prompts == 7
    with pytest.raises(UserError, match="'rewart-shift' is no stage type"):
        load(path, ("stages.rewart-shift.num_prompts=7",))


def test_a_declared_one_needs_prompts_from_somewhere(resolve):
    nothing = {"stages.evaluate": tiny.REMOVED, "stages.shift": {}}
    with pytest.raises(UserError, match=r"stages.shift.data: is required"):
        resolve(**nothing)
    assert resolve(**nothing, **{"stages.reward.eval_data": "prompts"}).stages["shift"].data == "prompts"


@pytest.mark.parametrize("mode", ["stop", "off"])
def test_a_declared_one_with_another_name_is_found(resolve, mode):
    config = resolve(gate=mode, **{"stages.offsets": {"type": "shift", "data": "prompts", "num_completions": 2}})
    assert list(added(config)) == ["offsets"]
    assert (config.stages["offsets"].reward, config.stages["offsets"].policy) == ("reward", "sft")
    assert config.stages["ppo"].shift == "offsets"


@pytest.mark.parametrize("first", [True, False])
def test_a_report_on_what_rl_has_made_is_not_what_it_waits_for(resolve, first):
    late, own = {"type": "shift", "policy": "ppo"}, {"type": "shift", "policy": "base"}
    config = resolve(**{"stages.late": late})
    assert config.stages["ppo"].shift == "reward-shift"
    order = list(config.stages)
    assert order.index("reward-shift") < order.index("ppo") < order.index("late")
    both = [("stages.late", late), ("stages.own", own)]
    config = resolve(**dict(both if first else both[::-1]))
    assert sorted(added(config)) == ["late", "own"] and config.stages["ppo"].shift == "own"
    with pytest.raises(UserError, match="circle"):
        resolve(**{"stages.late": late, "stages.ppo.shift": "late"})


def test_until_ppo_runs_the_shift_stage_too(resolve):
    config = resolve()
    assert launcher.select(config, "ppo", None, ()) == ["pretrain", "sft", "reward", "reward-shift", "ppo"]
    assert launcher.select(config, "dpo", None, ()) == ["pretrain", "sft", "dpo"]
    assert launcher.select(config, "reward-shift", None, ()) == ["pretrain", "sft", "reward", "reward-shift"]


@pytest.mark.parametrize(
    ("own", "place", "hint"),
    [
        ({"policy": "sff"}, "stages.offsets.policy", "'sft'"),
        ({"policy": "reward"}, "stages.offsets.policy", "pretrain"),
        ({"reward": "rewart"}, "stages.offsets.reward", "'reward'"),
        ({"reward": "sft"}, "stages.offsets.reward", "reward"),
        ({"num_completion": 4}, "stages.offsets.num_completion", "num_completions"),
        ({"num_completions": 1}, "stages.offsets.num_completions", "2"),
        ({"data": "prompt"}, "stages.offsets.data", "'prompts'"),
    ],
)
def test_wrong_names_are_told_with_the_nearest(resolve, own, place, hint):
    with pytest.raises(UserError) as raised:
        resolve(**{"stages.offsets": {"type": "shift", "data": "prompts"} | own})
    (line,) = [line for line in str(raised.value).splitlines() if place in line]
    assert hint in line


def test_a_report_on_another_reward_model_is_refused(resolve):
    with pytest.raises(UserError, match="there is no report on its reward model 'reward-shif'; did you mean 'reward-"):
        resolve(**{"stages.ppo.shift": "reward-shif"})
    with pytest.raises(UserError, match="sft"):
        resolve(**{"stages.ppo.shift": "sft"})


def test_the_report_is_an_input_only_of_shrinkage(resolve):
    changes = {"stages.ppo.prompt_baseline": "sft_mean"}
    assert graph.descendants(resolve(**changes), "reward-shift") == []
    shrunk = resolve(**changes, **{"stages.ppo.baseline_shrinkage": True})
    assert graph.descendants(shrunk, "reward-shift") == ["ppo", "evaluate"]
    with pytest.raises(UserError, match="baseline_shrinkage"):
        resolve(gate="off", **changes, **{"stages.ppo.baseline_shrinkage": True})


def test_shrinkage_uses_the_icc_at_the_temperature_of_ppo(resolve):
    shrunk = {"stages.ppo.prompt_baseline": "sft_mean", "stages.ppo.baseline_shrinkage": True}
    sampled = {"stages.evaluate.temperature": 0.9, "stages.reward-shift.num_prompts": 3}
    assert resolve(**shrunk).stages["reward-shift"].temperature == 0.7  # TRL's default for PPO
    assert resolve(**shrunk, **sampled).stages["reward-shift"].temperature == 0.7
    assert resolve(**sampled).stages["reward-shift"].temperature == 0.9
    own = {"stages.reward-shift.temperature": 1.0}
    assert resolve(**shrunk, **own, **{"stages.ppo.training.temperature": 1.0}).stages["ppo"].shift == "reward-shift"
    wrong = "measures the ICC at temperature 1, PPO samples at 0.7; give stages.reward-shift `temperature: 0.7`"
    with pytest.raises(UserError, match=wrong):
        resolve(**shrunk, **own)


TOPICS = ["soup", "snow", "trains", "paint", "chess", "honey", "dogs", "glass"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny run with two reward models, one of them centred, PPO, and a DPO that hardly moves from its parent."""
    folder = tmp_path_factory.mktemp("small")
    longer = {"max_steps": 30, "max_length": 64}
    reward = {"type": "reward", "data": "comparisons", "eval_data": "held_out", "training": longer}
    centred = longer | {"center_rewards_coefficient": 1.0}
    stages = {
        "sft": tiny.SFT | {"training": {"max_steps": 30}},
        "reward": reward,
        "centred": reward | {"training": centred},
        "ppo": tiny.PPO | {"reward": "reward"},
        "dpo": tiny.DPO | {"training": {"max_length": 64, "learning_rate": 1e-8}},
        "evaluate": {"data": "prompts", "policies": ["dpo"], "reward": "reward", "max_new_tokens": 12, "batch_size": 5},
    }
    path = tiny.make_run(folder, stages, gate="warn")
    tiny.write_rows(folder / "prompts.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    held_out = [
        {
            "prompt": f"Tell me about {topic}.",
            "chosen": f"I like {topic} because it is good.",
            "rejected": f"No {topic}.",
        }
        for topic in TOPICS
    ]
    tiny.write_rows(folder / "held_out.jsonl", held_out)
    names = ("comparisons", "demonstrations", "prompts", "held_out")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    result = warm.rlhf("run", path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    run_dir = folder / "run"
    return SimpleNamespace(config=path, run_dir=run_dir, output=result.stdout, reports=run_dir / "reward-shift/output")


def report_of(output):
    return json.loads((output / "report.json").read_text())


@pytest.mark.slow
def test_the_report_is_that_of_its_samples(small):
    """Figures are recomputed from samples.jsonl, its scores by the saved reward model one completion at a time."""
    samples, report = read_rows(small.reports / "samples.jsonl"), report_of(small.reports)
    assert len(samples) == report["prompts"] == len(tiny.TOPICS) and report["completions"] == 4 * len(samples)
    margins = json.loads((small.run_dir / "reward" / "output" / "margins.json").read_text())
    assert len(margins) == len(TOPICS)
    again = measure(samples, calibration(margins))
    assert report == again | {"advice": advice(again)}
    record = manifest.read(small.run_dir).stages["reward-shift"]
    assert record.metrics == report and record.output.kind == "report"
    assert record.parents == {"reward": "reward", "policy": "sft"}

    model, tokenizer = reloaded(small, "reward")
    (cache,) = (small.run_dir / "cache").glob(f"completions-{cache_of(small, 'sft')}*.jsonl")
    drawn = [ids for line in read_rows(cache) if line for ids in line["completions"]]
    for i, sample in enumerate(samples):
        ids = prompt_ids(tokenizer, [{"role": "user", "content": sample["prompt"]}])
        assert len(ids) == sample["tokens"]
        for k in range(4):
            completion = drawn[k * len(samples) + i]
            assert tokenizer.decode(completion, skip_special_tokens=True) == sample["completions"][k]
            assert len(completion) == sample["lengths"][k] <= 12
            (score,) = scoring.score(model, [ids + completion], tokenizer.pad_token_id)
            assert score == pytest.approx(sample["scores"][k], abs=1e-5)
    pairs = held_out_scores(small, "reward")
    assert margins == pytest.approx([chosen - rejected for chosen, rejected in pairs], abs=1e-5)


def reloaded(run, name):
    """A saved reward model and its tokenizer, as `rlhf status` says to load them."""
    loaded: dict = {}
    recorded = manifest.read(run.run_dir)
    exec(snippet(run.run_dir, recorded, recorded.stages[name]), loaded)
    return loaded["model"].eval(), loaded["tokenizer"]


def held_out_scores(run, name):
    """Scores of chosen and rejected of every held-out comparison, in order."""
    (model, tokenizer), found = reloaded(run, name), []
    for row in read_rows(run.config.parent / "held_out.jsonl"):
        ids = prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}])
        sides = [ids + tokenizer(f"{row[side]}<eos>")["input_ids"] for side in ("chosen", "rejected")]
        found.append(scoring.score(model, sides, tokenizer.pad_token_id))
    return found


def cache_of(run, policy):
    """The name of a policy's completions."""
    config = load(run.config)
    ctx, tokenizer = SimpleNamespace(config=config), manifest.read(run.run_dir).tokenizer.fingerprint
    stage = config.stages["evaluate"]
    how = Sampling(stage.temperature, stage.max_new_tokens, stage.batch_size, config.seed_of("evaluate"))
    return digest([identity_of(ctx, policy), tokenizer, asdict(how)])[:16]


@pytest.mark.slow
def test_completions_are_sampled_once(small):
    logs = {name: (small.run_dir / name / "log.txt").read_text() for name in ("reward-shift", "centred-shift")}
    assert "reward-shift: sampling 48 completions from sft" in logs["reward-shift"]
    assert "sampling" not in logs["centred-shift"]
    evaluated = (small.run_dir / "evaluate" / "log.txt").read_text()
    assert "sampling 12 completions from dpo" in evaluated and "completions from sft" not in evaluated
    assert "evaluate: 12 completions of sft are there already, from the same prompts" in evaluated
    rows = read_rows(small.run_dir / "evaluate" / "output" / "samples.jsonl")
    samples = read_rows(small.reports / "samples.jsonl")
    assert [row["prompt"][-1]["content"] for row in rows] == [sample["prompt"] for sample in samples]
    assert [row["sft"]["completion"] for row in rows] == [sample["completions"][0] for sample in samples]
    assert [row["sft"]["score"] for row in rows] == pytest.approx([s["scores"][0] for s in samples], abs=1e-5)
    # Of several completions of a prompt hardly any two are the same.
    assert len({text for sample in samples for text in sample["completions"]}) > 24


@pytest.mark.slow
def test_equal_policies_give_equal_completions(small):
    """Each sampled on its own: DPO's weights differ from SFT's by rounding errors."""
    rows = read_rows(small.run_dir / "evaluate" / "output" / "samples.jsonl")
    assert [row["dpo"]["completion"] for row in rows] == [row["sft"]["completion"] for row in rows]
    dpo = manifest.read(small.run_dir).stages["evaluate"].metrics["policies"]["dpo"]
    assert dpo["kl"] == pytest.approx(0, abs=1e-4) and dpo["score_win_rate"] == [0.5, 0.5, 0.5]
    assert [row["base"]["completion"] for row in rows] != [row["sft"]["completion"] for row in rows]


@pytest.mark.slow
def test_plots_exist(small):
    for name in ("offsets", "length", "reliability"):
        assert (small.reports / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in small.reports.iterdir()} == {".png", ".json", ".jsonl"}


@pytest.mark.slow
def test_verdicts_are_in_the_log_of_the_stage(small):
    log = (small.run_dir / "ppo" / "log.txt").read_text()
    assert log.count("ppo: gate: sft: ") == 1 and log.count("ppo: gate: reward: ") == 3
    assert manifest.read(small.run_dir).stages["ppo"].metrics["episodes"] == 24


@pytest.mark.slow
def test_scores_are_centred_by_the_trainers_option(small):
    """It is TRL's penalty on (chosen + rejected)^2, so both sides lie evenly around 0; the report shows it too."""
    assert manifest.read(small.run_dir).stages["centred"].config["training.center_rewards_coefficient"] == 1.0
    sums = {name: np.square(np.sum(held_out_scores(small, name), 1)).mean() for name in ("centred", "reward")}
    print(sums)
    assert sums["centred"] < sums["reward"] / 3
    squares = {}
    for name in ("centred", "reward"):
        samples = read_rows(small.run_dir / f"{name}-shift" / "output" / "samples.jsonl")
        squares[name] = np.mean([score**2 for sample in samples for score in sample["scores"]])
    print(squares)
    assert squares["centred"] < squares["reward"]


@pytest.mark.slow
def test_a_second_run_skips_the_shift_stage_and_its_options_touch_nothing_else(small):
    def reruns(*overrides, **shift):
        path = small.config.with_name("declared.yaml")
        path.write_bytes(small.config.read_bytes())
        if shift:
            stages = YAML(typ="safe").load(path)["stages"]
            tiny.edit(path, {"stages": stages | {"reward-shift": {"type": "shift", "reward": "reward"} | shift}})
        decisions = staleness.decide(load(path, overrides), manifest.read(small.run_dir))
        return {decision.stage: decision.reason for decision in decisions if decision.run}

    assert reruns() == {}
    same = {"data": "prompts", "max_new_tokens": 12, "batch_size": 5}
    assert reruns(**same) == {}  # declared as it was added
    assert list(reruns(**same, num_completions=5)) == ["reward-shift"]
    assert "num_completions" in reruns(**same, num_completions=5)["reward-shift"]
    assert set(reruns("stages.reward.training.learning_rate=1e-3")) == {"reward", "reward-shift", "ppo", "evaluate"}
    assert reruns("gate=off") == reruns("gate_limits.accuracy=0.9") == {}
    output = warm.rlhf("run", small.config).stdout
    assert output.count("skip: finished, nothing changed") == len(load(small.config).stages) == 8


@pytest.mark.slow
def test_two_processes_give_the_report_of_one(small, tmp_path):
    shutil.copytree(small.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "cache")
    (tmp_path / "run" / "reward-shift" / "log.txt").unlink()
    two = ROOT / "accelerate_configs" / "cpu_2_processes.yaml"
    name = "reward-shift"
    chosen = ["--only", name, "--redo", name, "--accelerate-config", two]
    result = warm.rlhf("run", small.config, f"run_dir={tmp_path / 'run'}", *chosen)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    stages = manifest.read(tmp_path / "run").stages
    assert stages[name].world_size == 2 and "ppo" in stages
    log = (tmp_path / "run" / name / "log.txt").read_text()
    assert log.count("sampling 48 completions") == log.count(f"{name}: finished in") == 1
    output = tmp_path / "run" / name / "output"
    theirs, ours = (read_rows(folder / "samples.jsonl") for folder in (output, small.reports))
    for a, b in zip(theirs, ours, strict=True):
        assert a.pop("scores") == pytest.approx(b.pop("scores"), abs=1e-5)
        assert a == b
    a, b = report_of(output), report_of(small.reports)
    for key in ("icc", "between_sd", "within_sd", "length_correlation", "score_quantiles"):
        assert a[key] == pytest.approx(b[key], abs=1e-3), key
    assert a["comparisons"] == b["comparisons"]


@pytest.mark.slow
def test_the_command_shows_reports(small, cli, tmp_path):
    code, both, _ = cli("shift", small.run_dir)
    assert code == 0 and "reward-shift: scores of reward:" in both and "centred-shift: scores of centred:" in both
    for stage in ("reward", "reward-shift"):
        code, shown, _ = cli("shift", small.run_dir, stage)
        assert code == 0 and "reward-shift: scores of reward" in shown and "centred" not in shown
        figures = report_of(small.reports)
        assert f"{figures['within_sd']['value']:.2f} [{figures['within_sd']['low']:.2f}" in shown
        assert figures["advice"].split()[0] in shown and str(small.reports) in shown.replace("\n", "")
    code, status, _ = cli("status", small.run_dir)
    assert code == 0 and "samples.jsonl: all completions side by side" in status and "report.json" in status


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "hint"), [("rewart", "reward-shift"), ("sft", "reward-shift")])
def test_the_command_knows_no_such_report(small, cli, stage, hint):
    code, out, err = cli("shift", small.run_dir, stage)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert repr(stage) in err and hint in err


def test_the_command_on_a_folder_without_reports(cli, tmp_path, make_record):
    code, _, err = cli("shift", tmp_path)
    assert code == 2 and "manifest.json" in err and err.count("\n") == 1
    code, _, err = cli("shift", tmp_path / "nowhere")
    assert code == 2 and err.count("\n") == 1
    manifest.write(tmp_path, Manifest(name="tiny", stages={"sft": make_record()}))
    code, _, err = cli("shift", tmp_path)
    assert code == 2 and "no shift report here; a stage of type shift makes one" in err


def test_an_override_of_the_report_leaves_it_in_its_place(write_config, tmp_path):
    path = write_config(tmp_path, gate="stop")
    config = load(path)
    changed = load(path, ("stages.reward-shift.num_prompts=3",))
    assert "reward-shift" in config.stages and list(changed.stages) == list(config.stages)
    assert changed.stages["reward-shift"].num_prompts == 3
