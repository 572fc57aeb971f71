"""Every alarm's threshold, window and direction: one run of values on which it just fires, one on which it does not."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl

from pipeline.rl.best_policy import BestPolicy
from pipeline.rl.healthy_ranges import HEALTHY
from pipeline.rl.watchdog import Watchdog

LENGTH = 8.0  # tokens, a power of two: means times it are exact
UP, DOWN = math.inf, -math.inf


def watch(kind, name, values, rest=None):
    """The alarms and messages of a run that logs these values of one name, and the mean length of its completions."""
    said, state = [], SimpleNamespace(global_step=0, log_history=[])
    watchdog = Watchdog(kind, "warn", said.append)
    for update, value in enumerate(values, start=1):
        state.global_step = update
        logs = {"completions/mean_length": LENGTH} | (rest or {}) | {name: value}
        watchdog.on_log(None, state, TrainerControl(), logs=logs)
    return watchdog.alarms, said


# Stage type, name in its log, measure, first value, bound in the log's unit, direction, patience, warm-up. The first
# value is fine; where a bound is a multiple of the first, so is the number here.
BOUNDS = [
    ("ppo", "objective/kl", "kl", 0.0, 50.0, UP, 3, 0),
    ("ppo", "objective/kl", "kl", 0.0, -1.0, DOWN, 3, 0),
    ("rloo", "kl", "kl", 0.0, 50.0 / LENGTH, UP, 3, 0),
    ("rloo", "kl", "kl", 0.0, -1.0 / LENGTH, DOWN, 3, 0),
    ("grpo", "kl", "kl", 0.0, 50.0 / LENGTH, UP, 3, 0),
    ("ppo", "objective/entropy", "entropy", 4.0, 12.0, UP, 5, 0),
    ("ppo", "objective/entropy", "entropy", 4.0, 0.4, DOWN, 5, 0),
    ("rloo", "entropy", "entropy", 2.0, 6.0, UP, 5, 0),
    ("grpo", "entropy", "entropy", 2.0, 0.2, DOWN, 5, 0),
    ("ppo", "completions/mean_length", "length", 12.0, 36.0, UP, 5, 0),
    ("grpo", "completions/mean_length", "length", 12.0, 4.0, DOWN, 5, 0),
    ("ppo", "policy/clipfrac_avg", "clip_fraction", 0.1, 0.5, UP, 5, 0),
    ("rloo", "clip_ratio/region_mean", "clip_fraction", 0.1, 0.5, UP, 5, 0),
    ("grpo", "clip_ratio/region_mean", "clip_fraction", 0.1, 0.5, UP, 5, 0),
    ("ppo", "value/explained_variance", "explained_variance", 0.0, -1.0, DOWN, 5, 10),
    ("ppo", "completions/missing_eos", "missing_eos", 0.3, 0.6, UP, 5, 0),
    ("rloo", "completions/clipped_ratio", "missing_eos", 0.3, 0.6, UP, 5, 0),
    ("grpo", "completions/clipped_ratio", "missing_eos", 0.1, 0.5, UP, 5, 0),  # up to a half it is fine
    ("rloo", "frac_reward_zero_std", "frac_reward_zero_std", 0.0, 0.9, UP, 5, 0),
]


@pytest.mark.parametrize(("kind", "name", "measure", "first", "bound", "side", "patience", "warm_up"), BOUNDS)
def test_an_alarm_fires_just_beyond_its_bound(kind, name, measure, first, bound, side, patience, warm_up):
    out = bound + math.copysign(1e-3 * max(abs(bound), 1e-2), side)
    inside = bound - math.copysign(1e-3 * max(abs(bound), 1e-2), side)
    before = [first] * max(1, warm_up)
    assert watch(kind, name, [*before, *[inside] * 12])[0] == []
    # One update less than its patience, and then back.
    assert watch(kind, name, [*before, *[out] * (patience - 1), inside, *[out] * (patience - 1)])[0] == []
    [alarm], [said] = watch(kind, name, [*before, *[out] * (patience + 9)])
    assert (alarm["measure"], alarm["update"]) == (measure, len(before) + patience)
    assert f"since update {len(before) + 1}" in said
    factor = LENGTH if (measure, kind) in {("kl", "rloo"), ("kl", "grpo")} else 1.0
    factor = 1 / LENGTH if name == "objective/entropy" else factor
    assert alarm["value"] == pytest.approx(out * factor)
    assert alarm["high" if side > 0 else "low"] == pytest.approx(bound * factor)


@pytest.mark.parametrize(("kind", "name", "bound"), [("ppo", "objective/kl", 50.0), ("ppo", "objective/kl", -1.0)])
def test_the_bound_itself_is_healthy(kind, name, bound):
    assert watch(kind, name, [0.0, *[bound] * 9])[0] == []


def test_every_bound_there_is_has_a_row():
    expected = {(r.measure, side) for r in HEALTHY for side, end in ((UP, r.high), (DOWN, r.low)) if math.isfinite(end)}
    assert {(measure, side) for _, _, measure, _, _, side, _, _ in BOUNDS} == expected


def test_the_warm_up_of_the_critic_ends_after_ten_updates():
    name = "value/explained_variance"
    assert watch("ppo", name, [-9.0] * 10 + [0.5] * 9)[0] == []
    [alarm], _ = watch("ppo", name, [-9.0] * 30)
    assert alarm["update"] == 15  # the eleventh is the first of five


def test_the_scale_is_the_first_value():
    """Not the last one: a slow decline is one too."""
    slow = [4.0 * 0.8**i for i in range(20)]
    [alarm], _ = watch("rloo", "entropy", slow)
    first = next(i for i, value in enumerate(slow, start=1) if value < 0.4)
    assert alarm["update"] == first + 4 and alarm["low"] == pytest.approx(0.4)


def test_completions_of_no_token_have_length_one():
    """Or one empty batch would make a KL 0, and an entropy infinite."""
    empty = {"completions/mean_length": 0.0}
    [alarm], _ = watch("rloo", "kl", [0.0, *[50.1] * 9], empty)
    assert alarm["value"] == 50.1
    assert watch("ppo", "objective/entropy", [4.0] * 9, empty)[0] == []


def test_a_measure_is_warned_of_once():
    alarms, said = watch("ppo", "objective/kl", [0.0, *[60.0] * 20, 0.0, *[60.0] * 20, math.nan])
    assert len(alarms) == len(said) == 1


def follow(scores, every):
    """What a BestPolicy that looks at every `every`th update keeps; there is one score for each update."""
    parameter, at = nn.Parameter(torch.zeros(1)), {"update": 0}
    best = BestPolicy({"w": parameter}, lambda: scores[at["update"]], every, lambda message: None)
    state = SimpleNamespace(global_step=0)
    best.on_train_begin(None, state, None)
    for update in range(1, len(scores)):
        at["update"] = state.global_step = update
        parameter.data.fill_(update)
        best.on_step_end(None, state, None)
    best.on_train_end(None, state, None)
    kept = best.restore()
    assert parameter.item() == kept[0]
    return [entry["update"] for entry in best.history], kept


def test_the_best_of_what_was_looked_at():
    assert follow([0.5, 0.9, 0.6, 0.8, 0.7, 0.75], 2) == ([0, 2, 4, 5], (5, 0.75))
    assert follow([0.5, 0.9, 0.6, 0.8, 0.7], 3) == ([0, 3, 4], (3, 0.8))
    assert follow([0.5, 0.5, 0.5], 1) == ([0, 1, 2], (0, 0.5))  # of equals the first
    assert follow([-0.5, -0.7, -0.6], 1) == ([0, 1, 2], (0, -0.5))
