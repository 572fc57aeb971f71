"""Ranges of numbers: every number of a library's options has one, and the table says what it means to say."""

import math
import typing

import pytest

from pipeline.config import choices, options, ranges
from pipeline.config.load import load
from pipeline.config.ranges import ANY, RANGES, Range
from pipeline.config.stage_types import KINDS as TYPES

TRAINED = [name for name, row in TYPES.items() if row.trl_config is not None]
KINDS = ("training", *TRAINED, "lora", "quantization")


def parts(hint):
    """A type and all that it is made of."""
    return [hint, *(part for inner in typing.get_args(hint) for part in parts(inner))]


def numeric(kind):
    """The options of a section that hold a number and that the pipeline does not set itself."""
    owned = options.owned_by(kind)
    hints = options._field_types(kind)
    return {key for key, hint in hints.items() if key not in owned and {int, float} & set(parts(hint))}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_a_range(kind):
    found = numeric(kind)
    assert found
    assert {key for key in found if options.range_of(kind, key) is None} <= ANY


def test_every_range_belongs_to_an_option():
    known = {key for kind in KINDS for key in options._field_types(kind)}
    for kind, row in TYPES.items():
        assert not row.trl_config or not (row.words.keys() | row.bounds.keys()) - options._field_types(kind).keys()
    assert not (RANGES.keys() | ANY) - known
    assert not {name for name in choices._WORDS if name not in known}
    assert not RANGES.keys() & ANY


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_in_their_ranges(kind):
    looked_at = 0
    for key in numeric(kind):
        default = options._default_of(kind, key) if kind != "quantization" else None
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert ranges.fault_of(default, options.range_of(kind, key)) is None, key
            looked_at += 1
    assert looked_at or kind == "quantization"


@pytest.mark.parametrize("kind", KINDS)
def test_every_default_word_is_known(kind):
    for key, hint in options._field_types(kind).items():
        default = options._default_of(kind, key) if kind != "quantization" else None
        if isinstance(default, str):
            assert choices.fault_of(kind, key, default, hint) is None, key


@pytest.mark.parametrize(
    ("rule", "inside", "outside", "words"),
    [
        (Range(low=1), [1, 2.5, 10**9], [0, 0.99, -1], "at least 1"),
        (Range(low=0, above=True), [1e-9, 5], [0, -1e-9], "above 0"),
        (Range(low=0, high=1), [0, 0.5, 1], [-0.01, 1.01], "at least 0 and at most 1"),
        (Range(low=0, high=1, below=True), [0, 0.999], [1, -0.1], "at least 0 and below 1"),
        (Range(low=0, high=1, above=True), [0.001, 1], [0, 1.1], "above 0 and at most 1"),
        (Range(low=1, also=(-1,)), [-1, 1, 7], [0, -2, 0.5], "-1 or at least 1"),
        (Range(steps=True), [1, 500, 0.1, 0.999, 2.0], [0, -1, 1.5, -0.5], "a whole number from 1, or a share"),
        (Range(high=3), [-100, 3], [3.1], "at most 3"),
    ],
)
def test_range(rule, inside, outside, words):
    assert all(rule.holds(number) for number in inside)
    assert not any(rule.holds(number) for number in outside)
    assert str(rule).startswith(words)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 2**63, -(2**63), [1.0, math.nan], {"a": {"b": math.inf}}]
)
def test_numbers_that_nothing_can_use(value):
    for kind, key in (("sft", "learning_rate"), ("rloo", "reward_clip_range"), ("sft", "lr_scheduler_kwargs")):
        assert ranges.fault_of(value, options.range_of(kind, key)) is not None
    assert ranges.fault_of([-(2.0**62), 2**63 - 1], options.range_of("rloo", "reward_clip_range")) is None


@pytest.mark.parametrize(
    "option",
    [
        "training.max_steps=-1",
        "training.max_grad_norm=0",
        "training.warmup_steps=0.1",
        "training.logging_steps=0.25",
        "training.save_total_limit=null",
        "training.learning_rate=1e-5",
        "stages.sft.training.max_length=null",
        "stages.sft.training.lr_scheduler_type=cosine",
        "stages.sft.training.loss_type=dft",
        "stages.dpo.training.loss_type=[sigmoid, sft]",
        "stages.dpo.training.loss_type=ipo",
        "stages.ppo.training.kl_coef=0",
        "stages.ppo.training.missing_eos_penalty=null",
        "lora.lora_dropout=0",
        "lora.target_modules=.*q_proj",
        "seed=4294967295",
    ],
)
def test_numbers_and_words_that_make_sense(write_config, tmp_path, option):
    load(write_config(tmp_path), (option,))
