"""What a plan foresees: a gate that nothing could pass, rows that are all too long, completions that cannot end."""

import math
import re

import by_hand
import pytest
import tiny
from test_figures_plan import key_of

from pipeline.chain import foresight
from pipeline.chain.foresight import fewest_comparisons
from pipeline.config.load import load
from pipeline.shift.calibration import wilson

PPO = tiny.PPO | {"data": "demonstrations", "training": tiny.PPO["training"] | {"total_episodes": 80}}
REWARD = tiny.REWARD | {"eval_data": "held_out"}
DATA = ("comparisons", "demonstrations", "held_out")
EVALUATE = {"data": "held_out", "max_new_tokens": 40}
TRAINING = tiny.TRAINING | {"gradient_checkpointing": False}


def make(folder, num_held_out=25, gate="stop", **stages):
    """A run of SFT, a reward model and PPO, with so many held-out comparisons."""
    stages = {"sft": tiny.SFT, "reward": REWARD, "ppo": PPO, "evaluate": EVALUATE} | stages
    path = tiny.make_run(folder, stages, gate=gate, training=TRAINING)
    rows = [row | {"prompt": f"Once more, {number}: {row['prompt']}"} for number, row in enumerate(many())]
    tiny.write_rows(folder / "held_out.jsonl", rows[:num_held_out])
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in DATA}})
    return path


SMALL = ("tell a win rate to within", "its win rates are ")  # true of all these little runs


def warnings(out, small=False):
    """The warnings of a plan; with `small` those alone that every run on few rows has."""
    said = " ".join(out.split()).split("warning: ")[1:]
    return [text for text in said if any(words in text for words in SMALL) == small]


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("accuracy", [1.0, 0.95, 0.7])
def test_the_fewest_comparisons_are_those_of_the_gates_interval(limit, accuracy):
    fewest = fewest_comparisons(limit, accuracy)
    if accuracy <= limit:
        assert fewest is None
        return
    passing = [count for count in range(1, 800) if wilson(accuracy * count, count).low > limit]
    assert passing[0] == fewest
    assert passing == list(range(fewest, 800))


def test_a_gate_that_no_reward_model_could_pass_is_refused(tmp_path, cli):
    """3 held-out comparisons, all right, give an interval from 0.44: the gate's limit is 0.5."""
    path = make(tmp_path, num_held_out=3)
    code, _, err = cli("plan", path)
    assert code == 2 and "1 stage cannot run" in err
    assert "stages.ppo: the gate cannot pass: reward has 3 held-out comparisons of held_out." in err
    assert "right on all of them needs 4, and one that is right on 70% needs 25." in err
    assert "Name a larger dataset as `stages.reward.eval_data`, or say `gate: warn`" in err
    assert not (tmp_path / "run").exists()
    tiny.edit(path, {"gate": "warn"})
    code, out, err = cli("plan", path)
    assert code == 0, err
    assert any(warning.startswith("stages.ppo: the gate cannot pass: reward has 3") for warning in warnings(out))
    again = cli("plan", path)[1]  # what was found out is kept
    assert warnings(again) == warnings(out)
    tiny.edit(path, {"gate": "off"})
    assert "the gate" not in cli("plan", path)[1]


def test_four_comparisons_can_pass_and_a_limit_may_ask_for_more(tmp_path, cli):
    path = make(tmp_path, num_held_out=4)
    code, out, err = cli("plan", path)
    assert code == 0, err
    (told, *_) = warnings(out)
    assert told.startswith("stages.ppo: the gate may not pass: reward has 4 held-out comparisons of held_out. A reward")
    assert "that is right on 70% of them needs 25. Name a larger dataset as `stages.reward.eval_data`, or say" in told
    code, _, err = cli("plan", path, "gate_limits.accuracy=0.8")
    assert code == 2 and "reward has 4 held-out comparisons" in err and "needs 16." in err
    assert math.isclose(wilson(16, 16).low, 16 / (16 + 1.959964**2), rel_tol=1e-6)
    code, _, err = cli("plan", path, "gate_limits.accuracy=1")
    assert code == 2 and "no reward model can pass a gate of `gate_limits.accuracy` = 1" in err
    assert cli("plan", path, "gate_limits.accuracy=null")[0] == 0


def test_a_dataset_that_is_split_names_its_share(tmp_path, cli):
    """Of 12 prompts two have a key below the share."""
    keys = sorted(key_of(row["prompt"]) / 2**64 for row in tiny.comparisons())
    share = round((keys[1] + keys[2]) / 2, 4)
    assert keys[1] < share < keys[2]
    path = make(tmp_path, reward=tiny.REWARD | {"eval_data": "comparisons"})
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl", "heldout": share} for name in DATA}})
    code, _, err = cli("plan", path)
    assert code == 2 and "reward has 2 held-out comparisons of comparisons." in err
    needed = math.ceil(25 / share)
    words = f"for 25 held-out rows it needs about {needed:,} at `data.comparisons.heldout` = {share:g}, and has 12"
    assert f"Add rows to comparisons: {words}, or say `gate: warn`" in err
    code, _, err = cli("plan", path, "stages.ppo.training.gradient_accumulation_steps=64")
    assert code == 2 and "1 stage cannot run" in err  # and says at once all that is wrong with it
    batch = "(`training.per_device_train_batch_size` = 4 x `training.gradient_accumulation_steps` = 64)"
    assert f"stages.ppo: 10 prompts are fewer than one batch of 256 {batch}; add rows, or lower one" in err
    assert "stages.ppo: the gate cannot pass" in err


def test_a_report_on_one_prompt_is_told(tmp_path, cli):
    path = make(tmp_path, **{"reward-shift": {"num_prompts": 1}})
    code, out, err = cli("plan", path)
    assert code == 0, err
    assert any(
        text.startswith("stages.reward-shift: 1 prompt is too few for the gate's verdicts") for text in warnings(out)
    )
    out = cli("plan", path, "stages.reward-shift.num_prompts=2")[1]
    assert "too few" not in out


def test_completions_that_are_shorter_than_every_demonstration_are_told(tmp_path, cli):
    tokenizer = by_hand.tokenizer(tiny.make_model(tmp_path / "model"))
    lengths = sorted(
        len(tokenizer.encode(f"{row['completion']}<eos>", add_special_tokens=False)) for row in tiny.demonstrations()
    )
    nine_of_ten = lengths[math.ceil(0.9 * (len(lengths) - 1))]
    path = make(tmp_path, evaluate=EVALUATE | {"max_new_tokens": lengths[0]})
    override = "stages.ppo.training.response_length={}"
    code, out, err = cli("plan", path, override.format(lengths[0] - 1))
    assert code == 0, err
    (told,) = warnings(out)
    assert told.startswith(
        f"stages.ppo: `training.response_length` = {lengths[0] - 1} is shorter than every answer of demo"
    )
    assert f"The shortest has {lengths[0]} tokens, nine of ten have {nine_of_ten} or fewer; raise" in told
    assert warnings(cli("plan", path, override.format(lengths[0]))[1]) == []
    config = load(path, (override.format(1), "stages.evaluate.max_new_tokens=1"))
    assert list(foresight.warnings(config, {}, {})) == []  # nothing is known of stages that are not looked at


@pytest.mark.parametrize("allowed", ["0.5", "null"])
def test_rows_that_are_all_too_long_name_the_length_and_the_keys(tmp_path, cli, allowed):
    path = make(tmp_path)
    tokenizer = by_hand.tokenizer(tmp_path / "model")
    texts = [f"<user>{row['prompt']}<assistant>{row['completion']}<eos>" for row in tiny.demonstrations()]
    longest = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    code, _, err = cli("plan", path, "stages.sft.training.max_length=5", f"checks.too_long={allowed}")
    assert code == 2
    words = (
        f"the longest has {longest} tokens: raise `training.max_length`, or say `too_long: truncate` at the top level"
    )
    assert err.rstrip().endswith(words)  # without these rows there are none


def test_of_rows_that_are_too_long_only_what_is_not_set_is_advised(tmp_path, cli):
    """Of two thirds of the comparisons an answer alone is too long: it cannot be cut."""
    path = make(tmp_path, reward=tiny.REWARD | {"eval_data": "comparisons"})
    rows = [row | {"prompt": f"{number} {row['prompt']}"} for number, row in enumerate(tiny.comparisons() * 4)]
    rows = [row | {"chosen": "so " * 60 if number % 3 else row["chosen"]} for number, row in enumerate(rows)]
    tiny.write_rows(tmp_path / "comparisons.jsonl", rows)
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl", "heldout": 0.5} for name in DATA}})
    code, _, err = cli("plan", path, "gate=off")
    said = " ".join(err.split())
    assert code == 2 and "1 stage cannot run" in said  # of two datasets
    for role in ("data", "eval_data"):
        assert f"stages.reward: `{role}`: " in said
    go_on = "or say `checks: {too_long: null}` at the top level to go on without them"
    assert f"raise `training.max_length`, or say `too_long: truncate` at the top level, {go_on}" in said
    code, _, err = cli("plan", path, "gate=off", "too_long=truncate")
    said = " ".join(err.split())
    assert code == 2 and f"raise `training.max_length`, {go_on}" in said and "too_long: truncate" not in said


def test_prompts_that_the_models_positions_cannot_hold_name_the_length_and_the_keys(tmp_path, cli):
    """The model has 128 positions."""
    path = make(tmp_path)
    code, _, err = cli("plan", path, "stages.ppo.training.response_length=120")
    assert code == 2
    assert "and `training.response_length` = 120 make 1" in err and "but the model has 128 positions" in err
    assert "lower `training.response_length` or `max_prompt_length`" in err


def test_an_evaluation_on_a_few_prompts_is_told(tmp_path, cli):
    path = make(tmp_path, evaluate=EVALUATE | {"num_prompts": 4})
    (told,) = warnings(cli("plan", path)[1])
    assert told.startswith("stages.evaluate: 4 held-out prompts of held_out cannot tell policies apart: a win rate of ")
    assert (
        f"could as well be {0.5 - 1.959964 / 4:.2f} or {0.5 + 1.959964 / 4:.2f}. Raise `stages.evaluate.num_prompts`"
        in told
    )
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl", "heldout": 0.3} for name in DATA}})
    changes = ("stages.evaluate.data=comparisons", "gate=off")
    (told,) = warnings(cli("plan", path, *changes)[1])
    assert (
        told.startswith("stages.evaluate: ") and "Add rows to comparisons: for 20 held-out rows it needs about " in told
    )
    tiny.write_rows(tmp_path / "comparisons.jsonl", [row | {"prompt": f"{n}"} for n, row in enumerate(many())])
    (told,) = warnings(cli("plan", path, *changes, "data.comparisons.heldout=0.1")[1])
    assert (
        "Raise `data.comparisons.heldout` to 0.5, or add rows to comparisons: for 20 held-out rows it needs about 200 "
        in told
    )
    assert warnings(cli("plan", path, f"stages.evaluate.num_prompts={foresight.FEWEST_PROMPTS}")[1]) == []


def test_an_evaluation_that_tells_little_says_how_much(tmp_path, cli):
    """29 prompts of a new user; the numbers by hand."""
    path = make(tmp_path, evaluate=EVALUATE | {"data": "prompts"})
    tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"What of {number}?"} for number in range(140)])
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in (*DATA, "prompts")}})

    def told(*overrides):
        return [text for text in warnings(cli("plan", path, *overrides)[1], small=True) if SMALL[0] in text]

    (text,) = told("stages.evaluate.num_prompts=29")
    within = [f"{1.959964 * 0.5 / math.sqrt(number):.2f}" for number in (29, 100)]
    assert within == ["0.18", "0.10"]
    expected = "29 held-out prompts of prompts tell a win rate to within 0.18; 100 tell it to within 0.10. Raise "
    assert text.startswith(f"stages.evaluate: {expected}`stages.evaluate.num_prompts`")
    assert told("stages.evaluate.num_prompts=100") == []


def test_a_judge_that_is_hardly_tested_is_told(tmp_path, cli):
    """A half of 1.96 * 0.5 / sqrt(25) above chance, and for a tenth (1.96 * 0.5 / 0.1)^2 comparisons."""
    path = make(tmp_path)

    def told(*overrides):
        return [text for text in warnings(cli("plan", path, *overrides)[1], small=True) if SMALL[1] in text]

    (text,) = told()
    assert "25 held-out comparisons of held_out tell only a reward model that is right on 70% of them" in text
    assert (
        "One that is right on 60% needs 97. Name a larger dataset as `stages.reward.eval_data`, or name a `judge`"
        in text
    )
    (tmp_path / "judge.py").write_text("def length(prompt, completion):\n    return float(len(completion))\n")
    assert told("stages.evaluate.judge=judge:length") == []


def test_rows_that_are_left_out_as_too_long_are_told_with_the_limit_that_keeps_them(tmp_path, cli):
    """A fifth of the demonstrations, for both stages that learn from them."""
    rows = [{"prompt": f"What of {n}?", "completion": "a b " * (30 if n % 5 == 0 else 2)} for n in range(40)]
    again = {"type": "sft", "init": "base", "data": "demonstrations"}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT, "again": again}, training=TRAINING)
    tiny.write_rows(tmp_path / "demonstrations.jsonl", rows)
    length = "training.max_length"

    def plan(limit):
        return cli("plan", path, *(f"stages.{name}.{length}={limit}" for name in ("sft", "again")), "gate=off")

    code, out, err = plan(60)
    assert code == 0, err
    (text,) = [text for text in warnings(out) if "left out" in text]
    assert text.startswith(f"stages.sft, again: 8 of 40 rows of demonstrations (20%) are longer than `{length}` = 60")
    enough = int(re.search(rf"`{length}` = (\d+) would keep 95 % of these", text)[1])
    assert enough > 60
    assert not [text for text in warnings(plan(enough)[1]) if "left out" in text]


def many():
    return (tiny.comparisons() * 4)[:40]


def test_a_training_of_few_steps_is_told(tmp_path, cli):
    """12 comparisons are 3 batches of 4, in 3 epochs 9; whoever gives `max_steps` knows."""
    path = make(tmp_path, dpo=tiny.DPO)
    assert warnings(cli("plan", path)[1]) == []
    few = [f"stages.{name}.training.max_steps=-1" for name in ("reward", "dpo")]
    told = warnings(cli("plan", path, *few, "stages.reward.training.num_train_epochs=4")[1])
    assert [text.split(":")[0] for text in told] == ["stages.dpo"]  # 12 steps are enough
    batch = "`training.per_device_train_batch_size` = 4 x `training.gradient_accumulation_steps` = 1"
    assert "it trains for 9 optimizer steps on 12 rows of comparisons, which changes a model little." in told[0]
    assert f"raise `training.num_train_epochs` (it is 3), or lower the batch of 4 ({batch})" in told[0]


@pytest.mark.parametrize(("eos", "fits"), [("<|im_end|>", "chatml"), ("<eos>", "scratch"), ("<end>", None)])
def test_a_template_is_advised_whose_tokens_are_in_the_vocabulary(tmp_path, cli, eos, fits):
    path = make(tmp_path)
    model = tmp_path / "model"
    (model / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (model / name).read_text()
        if fits != "scratch":
            text = text.replace("<eos>", eos).replace("<user>", "<|im_start|>").replace("<assistant>", "<|x|>")
        (model / name).write_text(text)
    code, shown, err = cli("check-data", path)
    assert code == 0, err
    (told,) = warnings(shown)
    if fits is None:
        assert "to the form that the model knows: chatml, hermes, scratch, verbatim, or a Jinja file." in told
    else:
        assert f"set `tokenizer.chat_template` to `{fits}`, since the model's vocabulary has its tokens <" in told


def test_a_model_without_a_template_is_told(tmp_path, cli):
    path = make(tmp_path)
    assert warnings(cli("plan", path)[1]) == []
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (told,) = warnings(cli("plan", path)[1])
    assert told.startswith("model.path: model has no chat template, so turns are written as `plain` does.")
    assert warnings(cli("plan", path, "tokenizer.chat_template=plain")[1]) == []


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_fewer_prompts_than_are_sampled_for_at_once_are_refused(tmp_path, cli, kind):
    """TRL would make no step at all, also where `max_steps` names some."""
    training = {"num_generations": 2, "max_completion_length": 8, "max_steps": 1}
    training |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, kind: {"data": "demonstrations", "training": training}}
    code, _, err = cli("plan", tiny.make_run(tmp_path, stages))
    assert code == 2 and f"stages.{kind}: 12 prompts are fewer than the 16 for which TRL samples at once" in err
    stages[kind]["training"] = training | {"gradient_accumulation_steps": 3}
    assert cli("plan", tiny.make_run(tmp_path, stages))[0] == 0


def test_few_updates_of_ppo_are_told(tmp_path, cli):
    path = make(tmp_path)
    (told,) = warnings(cli("plan", path, "stages.ppo.training.total_episodes=72")[1])
    batch = "`training.per_device_train_batch_size` = 4 x `training.gradient_accumulation_steps` = 2"
    assert told.startswith("stages.ppo: 9 updates of the policy change a model little; raise `training.total_episodes`")
    assert f"or lower the batch of 8 ({batch})" in told
