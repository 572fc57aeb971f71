"""Every verdict of the gate, just on either side of its limit, and by which end of its interval."""

import pytest

from pipeline.chain import gate
from pipeline.config.load import load
from pipeline.records.manifest import Manifest
from pipeline.system.errors import UserError

ACCURACY, SPREAD, LENGTH = "held-out accuracy", "within-prompt SD", "score and length"
LOSS, TOKEN = "held-out loss", "first token"
E = 1e-6


@pytest.fixture(scope="module")
def configs(write_config, tmp_path_factory):
    """The tiny run's config with the gate's three modes, read once."""
    modes = ("stop", "warn", "off")
    return {mode: load(write_config(tmp_path_factory.mktemp(mode), gate=mode)) for mode in modes}


def interval(low, value, high):
    return {"value": value, "low": low, "high": high}


GOOD = {ACCURACY: interval(0.6, 0.7, 0.8), SPREAD: interval(0.9, 1.0, 1.1), LENGTH: interval(0.4, 0.5, 0.6)}
GOOD |= {LOSS: (2.0, 3.0), TOKEN: 0.25}


def recorded(make_record, **changes):
    figures = GOOD | changes
    loss, before = figures[LOSS]
    first = {"special": figures[TOKEN], "prompts": 64, "likeliest": "A"}
    sft = make_record(metrics={"eval_loss": loss, "initial_eval_loss": before, "first_token": first})
    reward = make_record(type="reward", metrics={"held_out": {"count": 100, "accuracy": figures[ACCURACY]}})
    shift = {"within_sd": figures[SPREAD], "length_correlation": figures[LENGTH]}
    stages = {"sft": sft, "reward": reward, "reward-shift": make_record(type="shift", metrics=shift)}
    return Manifest(name="tiny", stages=stages)


CASES = [
    # All of the interval must be above one half, whatever its middle.
    (ACCURACY, interval(0.5 + E, 0.51, 0.52), True),
    (ACCURACY, interval(0.5, 0.9, 0.95), False),
    (ACCURACY, interval(0.5 - E, 0.9, 0.95), False),
    # The high end must reach 0.05.
    (SPREAD, interval(0.0, 0.01, 0.05), True),
    (SPREAD, interval(0.0, 0.01, 0.05 - E), False),
    # The end that is nearer to 0 must be below 0.85, on either side.
    (LENGTH, interval(0.85 - E, 0.99, 1.0), True),
    (LENGTH, interval(0.85, 0.9, 1.0), False),
    (LENGTH, interval(-1.0, -0.99, -0.85 + E), True),
    (LENGTH, interval(-1.0, -0.9, -0.85), False),
    (LENGTH, interval(-0.99, 0.9, 0.99), True),
    (LOSS, (3.0 - E, 3.0), True),
    (LOSS, (3.0, 3.0), False),
    (LOSS, (None, 3.0), False),  # the manifest holds NaN as null
    (TOKEN, 0.5, True),
    (TOKEN, 0.5 + E, False),
]


@pytest.mark.parametrize(("what", "figure", "passes"), CASES)
def test_a_figure_on_either_side_of_its_limit(configs, make_record, what, figure, passes):
    found = recorded(make_record, **{what: figure})
    verdicts = {verdict.what: verdict.passed for verdict in gate.verdicts(configs["stop"], "ppo", found)}
    assert verdicts == dict.fromkeys(GOOD, True) | {what: passes}
    assert len(gate.check(configs["warn"], "ppo", found)) == 5
    assert gate.check(configs["off"], "ppo", found) == []
    if passes:
        assert len(gate.check(configs["stop"], "ppo", found)) == 5
    else:
        with pytest.raises(UserError, match=f"{what}: FAILED"):
            gate.check(configs["stop"], "ppo", found)


def test_what_is_not_measured_stops_nothing(configs, make_record):
    found = recorded(make_record, **{SPREAD: interval(None, 0.0, None), LENGTH: interval(None, 1.0, None)})
    del found.stages["reward"].metrics["held_out"]
    verdicts = {verdict.what: verdict.passed for verdict in gate.check(configs["stop"], "ppo", found)}
    assert verdicts == {LOSS: True, TOKEN: True, ACCURACY: None, SPREAD: None, LENGTH: None}
