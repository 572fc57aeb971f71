"""The watchdog fires on each kind of bad run and not on healthy ones; the best policy is kept, and looking is free."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainingArguments

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.models.generation import same_random_numbers
from pipeline.rl.best_policy import BestPolicy
from pipeline.rl.healthy_ranges import HEALTHY, measures_of
from pipeline.rl.watchdog import Stopped, Watchdog

MEASURES = {name: row.watched for name, row in STAGE_TYPES.items() if row.watched}
RANGES = {healthy.measure: healthy for healthy in HEALTHY}
# PPO of a small model as TRL logged it, 30 updates whose score rose from -0.43 to 1.43.
KL = [0, 0.35, 0.84, 1.63, 2.79, 3.26, 3.72, 3.75, 3.97, 3.36, 3.09, 3.68, 4.14, 3.96, 3.44, 3.85, 3.66, 3.66, 3.84]
KL += [4.43, 4.04, 4.37, 3.81, 4.65, 4.56, 3.89, 4.28, 3.43, 3.95, 4.11]
ENTROPY = [5.58, 6.09, 6.54, 6.28, 8.2, 8.89, 7.28, 6.07, 6.53, 5.73, 4.22, 5.76, 5.8, 5.43, 4.48, 5.79, 5.21, 5.06]
ENTROPY += [4.82, 3.76, 5.31, 5.06, 4.7, 6.07, 3.6, 4.9, 3.35, 5.55, 3.72, 4.06]
CLIPPED = [0.061, 0.051, 0.04, 0.037, 0.038, 0.036, 0.023, 0.026, 0.025, 0.019, 0.017, 0.02, 0.019, 0.02, 0.013, 0.016]
CLIPPED += [0.012, 0.012, 0.013, 0.012, 0.012, 0.007, 0.007, 0.008, 0.004, 0.004, 0.003, 0.003, 0.001, 0]
# The keys of a real log of each type that are not watched, NaN to show that they are not.
OTHERS = {"loss/policy_avg": math.nan, "loss": math.nan, "grad_norm": math.nan, "eval_kl": math.nan, "reward": math.nan}


def healthy_logs(stage_type, num_updates=30):
    for i in range(num_updates):
        shared = {"completions/mean_length": 5.0 + i % 3} | OTHERS
        if stage_type == "ppo":
            ours = {"completions/missing_eos": 0.05 * (i % 2), "value/explained_variance": min(0.8, -3 + i / 3)}
            theirs = {"objective/kl": KL[i], "objective/entropy": ENTROPY[i], "policy/clipfrac_avg": CLIPPED[i]}
            yield shared | ours | theirs
        else:
            zero = {"frac_reward_zero_std": 0.25 * (i % 2), "clip_ratio/region_mean": CLIPPED[i]}
            kl = {"kl": KL[i] / 6, "entropy": ENTROPY[i] / 6, "completions/clipped_ratio": 0.02}
            yield shared | zero | kl


def watch(stage_type, logs, on_alarm="warn", finite=lambda: True, centred=False):
    """What a watchdog says and decides about a run whose trainer logs these."""
    said, control, state = [], TrainerControl(), SimpleNamespace(global_step=0, log_history=[])
    watchdog = Watchdog(stage_type, on_alarm, said.append, finite, centred, raises=stage_type == "ppo")
    watchdog.on_train_begin(None, state, control)
    for update, entry in enumerate(logs, start=1):
        state.global_step = update
        watchdog.on_log(None, state, control, logs=entry)
        watchdog.on_step_end(None, state, control)
    return SimpleNamespace(alarms=watchdog.alarms, said=said, control=control, updates=update)


def run_with(stage_type, name, values):
    """A healthy run but for one value, which after the first two updates is `values`, again and again."""
    logs = list(healthy_logs(stage_type))
    for i in range(2, len(logs)):
        logs[i][name] = values[i % len(values)]
    return logs


@pytest.mark.parametrize("stage_type", MEASURES)
def test_healthy_run_has_no_alarm(stage_type):
    result = watch(stage_type, healthy_logs(stage_type), "stop")
    assert result.alarms == result.said == [] and not result.control.should_training_stop
    values = measures_of(stage_type, next(healthy_logs(stage_type)))
    own = "explained_variance" if stage_type == "ppo" else "frac_reward_zero_std"
    assert set(values) == {"kl", "entropy", "length", "clip_fraction", "missing_eos", own}


BAD = [
    ("ppo", "objective/kl", "kl", -1.5),
    ("ppo", "objective/kl", "kl", 63.0),
    ("rloo", "kl", "kl", 12.0),  # per token; 60 to 84 per completion
    ("rloo", "kl", "kl", -0.4),
    ("grpo", "kl", "kl", 12.0),
    ("ppo", "objective/entropy", "entropy", 0.2),
    ("ppo", "objective/entropy", "entropy", 40.0),
    ("grpo", "entropy", "entropy", 0.01),
    ("rloo", "entropy", "entropy", 5.0),
    ("ppo", "completions/mean_length", "length", 16.0),
    ("rloo", "completions/mean_length", "length", 1.0),
    ("ppo", "policy/clipfrac_avg", "clip_fraction", 0.6),
    ("rloo", "clip_ratio/region_mean", "clip_fraction", 0.6),
    ("grpo", "clip_ratio", "clip_fraction", 0.6),
    ("ppo", "value/explained_variance", "explained_variance", -1.2),
    ("ppo", "completions/missing_eos", "missing_eos", 0.6),
    ("grpo", "completions/clipped_ratio", "missing_eos", 0.6),
    ("rloo", "frac_reward_zero_std", "frac_reward_zero_std", 0.95),
]


@pytest.mark.parametrize(("stage_type", "name", "measure", "bad"), BAD)
def test_each_range_fires_once_and_says_what_to_do(stage_type, name, measure, bad):
    healthy = RANGES[measure]
    result = watch(stage_type, run_with(stage_type, name, [bad]))
    alarm = next(alarm for alarm in result.alarms if alarm["measure"] == measure)
    since = max(3, healthy.warm_up + 1)
    assert alarm["update"] == since + healthy.patience - 1
    assert alarm["causes"] == healthy.causes and set(alarm) == {"measure", "value", "low", "high", "update", "causes"}
    assert json.loads(json.dumps(alarm, allow_nan=False)) == alarm
    [message] = [message for message in result.said if f"watchdog: {measure} " in message]
    assert f"at update {alarm['update']}" in message and f"since update {since}\n" in message
    assert f"{alarm['value']:.3g}" in message and healthy.causes in message and healthy.remedy in message
    assert not result.control.should_training_stop


def test_a_baseline_that_is_set_is_no_remedy():
    """Of the critic's errors alone: NaN and other measures have the same causes with a baseline."""
    name = "value/explained_variance"
    [plain], [centred] = (watch("ppo", run_with("ppo", name, [-1.2]), centred=set_).said for set_ in (False, True))
    assert "prompt_baseline" in plain and "prompt_baseline" not in centred and "shift" not in centred
    assert plain.splitlines()[0] == centred.splitlines()[0] and "`vf_coef`" in centred
    for other, bad in ((name, math.nan), ("objective/kl", 63.0)):
        logs = run_with("ppo", other, [bad])
        assert watch("ppo", logs).said == watch("ppo", logs, centred=True).said != []


def test_every_range_and_both_its_bounds_are_tried():
    assert {measure for _, _, measure, _ in BAD} == set(RANGES) == {m for t in MEASURES.values() for m, _ in t.values()}


def test_weights_that_are_not_finite_are_an_alarm_at_once():
    """Nothing need be logged: the next completions cannot be sampled any more."""
    looks = iter([True] * 4 + [False] * 26)
    result = watch("grpo", ({} for _ in range(30)), "stop", lambda: next(looks))
    [alarm] = result.alarms
    assert (alarm["measure"], alarm["value"], alarm["update"]) == ("weights", None, 5)
    assert len(result.said) == 1 and "watchdog: weights is nan at update 5" in result.said[0]
    assert "lower the learning rate" in result.said[0] and result.control.should_training_stop
    looks = iter([True] * 4 + [False] * 26)
    with pytest.raises(Stopped, match="weights is nan at update 5"):
        watch("ppo", ({} for _ in range(30)), "stop", lambda: next(looks))


def test_bounds_are_where_they_are_written():
    for value, fires in ((49.9, False), (50.1, True), (-0.9, False), (-1.1, True)):
        assert bool(watch("ppo", run_with("ppo", "objective/kl", [value])).alarms) == fires


def test_alarm_needs_patience_updates_in_a_row():
    [alarm] = watch("ppo", run_with("ppo", "policy/clipfrac_avg", [0.6])).alarms
    assert (alarm["low"], alarm["high"], alarm["update"]) == (None, 0.5, 7)
    assert not watch("ppo", run_with("ppo", "policy/clipfrac_avg", [0.6, 0.6, 0.6, 0.6, 0.4])).alarms


def test_share_without_eos_must_have_doubled():
    logs = [{"completions/clipped_ratio": share} for share in [0.4] + [0.7] * 9]
    assert not watch("rloo", logs).alarms
    logs = [{"completions/clipped_ratio": share} for share in [0.4] + [0.9] * 9]
    [alarm] = watch("rloo", logs).alarms
    assert alarm["high"] == pytest.approx(0.8)
    assert not watch("rloo", [{"completions/clipped_ratio": 1.0}] * 9).alarms


def test_units_are_those_of_the_ranges():
    # 3 completions of 2, 4 and 6 tokens at 0.5 nats a token: 2 nats a completion.
    assert measures_of("rloo", {"kl": 0.5, "completions/mean_length": 4.0})["kl"] == 2.0
    assert measures_of("ppo", {"objective/entropy": 6.0, "completions/mean_length": 4.0})["entropy"] == 1.5
    assert measures_of("ppo", {"objective/kl": 2.0})["kl"] == 2.0
    assert "entropy" not in measures_of("ppo", {"objective/entropy": 6.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_value_that_is_not_finite_is_an_alarm_at_once(value):
    first = [{"objective/kl": value, "policy/clipfrac_avg": 0.1}]
    result = watch("ppo", [*first, {"objective/kl": 1.0}, *first])
    [alarm] = result.alarms
    assert (alarm["measure"], alarm["value"], alarm["update"]) == ("kl", None, 1)
    assert "diverged" in alarm["causes"] and len(result.said) == 1
    [alarm] = watch("rloo", [{"entropy": value}]).alarms  # of a range relative to a first value that is missing
    assert alarm["low"] is alarm["high"] is None
    json.dumps(alarm, allow_nan=False)


def test_stop_raises_out_of_ppo_and_asks_the_other_trainers():
    logs = run_with("ppo", "objective/kl", [60.0])
    with pytest.raises(Stopped, match="kl is 60 nats per completion at update 5"):
        watch("ppo", logs, "stop")
    result = watch("rloo", run_with("rloo", "kl", [20.0])[:5], "stop")
    assert result.control.should_training_stop and len(result.said) == 1


def test_a_resumed_run_goes_on_counting():
    logs = run_with("rloo", "entropy", [0.01])
    for steps in (1, 4, 20):
        history = [entry | {"step": step} for step, entry in enumerate(logs[:steps], start=1)]
        state, control = SimpleNamespace(global_step=steps, log_history=history), TrainerControl()
        watchdog = Watchdog("rloo", "warn", lambda message: None)
        watchdog.on_train_begin(None, state, control)
        for update in range(steps, len(logs)):
            state.global_step = update + 1
            watchdog.on_log(None, state, control, logs=logs[update])
        assert watchdog.alarms == watch("rloo", logs).alarms != []


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
def test_looking_takes_no_random_numbers(device):
    def draw():
        return random.random(), np.random.permutation(50).tolist(), torch.rand(3, device=device).tolist()

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = [draw(), draw()]
    seed()
    first = draw()
    with same_random_numbers():
        seed()
        draw()
    assert [first, draw()] == expected
    seed()
    draw()
    with pytest.raises(ZeroDivisionError), same_random_numbers():
        draw()
        raise ZeroDivisionError
    assert draw() == expected[1]


def follow(scores, every=1):
    """A BestPolicy that sees these scores; its parameter is the number of the update."""
    parameter = nn.Parameter(torch.zeros(2))
    rest = iter(scores)
    best = BestPolicy({"w": parameter}, lambda: next(rest), every, lambda message: None)
    state = SimpleNamespace(global_step=0)
    best.on_train_begin(None, state, None)
    for update in range(1, (len(scores) - 1) * every + 1):
        state.global_step = update
        parameter.data.fill_(update)
        best.on_step_end(None, state, None)
    best.on_train_end(None, state, None)
    return best, parameter


def test_best_policy_is_the_best_not_the_last_and_comes_back_in_place():
    best, parameter = follow([0.1, 0.5, 0.9, 0.7], every=5)
    address = parameter.data_ptr()
    assert [entry["update"] for entry in best.history] == [0, 5, 10, 15]
    assert best.restore() == (10, 0.9)
    assert parameter.data_ptr() == address and parameter.tolist() == [10, 10] and parameter.requires_grad
    best, parameter = follow([0.3, 0.2, math.nan, 0.3])
    assert best.restore() == (0, 0.3) and parameter.tolist() == [0, 0]
    best, parameter = follow([math.nan, -2.0, math.nan])
    assert best.restore() == (1, -2.0)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": ((self.line(nn.functional.dropout(x, 0.5)) - labels) ** 2).mean()}


def train(tmp_path, watching):
    """A real Trainer, whose loss draws random numbers; the score falls as the weights move away from step 3's."""
    torch.manual_seed(0)
    model, weights, said = Line(), [], []
    rows = [{"x": torch.randn(4), "labels": torch.ones(1)} for _ in range(32)]

    def evaluate():
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        weights.append(model.line.weight.detach().clone())
        return -abs(len(weights) - 1 - 3) + torch.rand(1).item()

    args = {"learning_rate": 0.1, "logging_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args |= {"max_steps": 8, "per_device_train_batch_size": 4, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **args), train_dataset=rows)
    best = BestPolicy(dict(model.named_parameters()), evaluate, 1, said.append)
    watchdog = Watchdog("rloo", "stop", said.append)
    if watching:
        trainer.add_callback(best)
        trainer.add_callback(watchdog)
    trainer.train()
    return SimpleNamespace(model=model, weights=weights, best=best, watchdog=watchdog, trainer=trainer, said=said)


def test_in_a_real_trainer_looking_changes_nothing_and_the_best_weights_return(tmp_path):
    plain, seen = train(tmp_path, False), train(tmp_path, True)
    for ours, theirs in zip(seen.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(seen.weights) == 9 and not seen.watchdog.alarms
    assert not torch.equal(seen.model.line.weight, seen.weights[3])
    update, score = seen.best.restore()
    assert update == 3 and score == max(entry["score"] for entry in seen.best.history)
    assert torch.equal(seen.model.line.weight, seen.weights[3])


def test_stop_ends_a_real_trainer_after_the_update(tmp_path, monkeypatch):
    log = Trainer.log

    def with_kl(self, logs, *rest):
        log(self, logs | {"kl": 60.0, "completions/mean_length": 1.0}, *rest)

    monkeypatch.setattr(Trainer, "log", with_kl)
    run = train(tmp_path, True)
    assert run.trainer.state.global_step == RANGES["kl"].patience and len(run.watchdog.alarms) == 1
    assert run.best.history[-1]["update"] == 3
