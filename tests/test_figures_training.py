"""What the records of training stages say, from the weights that were saved, by plain transformers and peft."""

import json
import math
from collections import Counter

import by_hand
import numpy as np
import pytest
import tiny
import torch

from pipeline import stage
from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.records import manifest
from pipeline.rl import stress
from pipeline.stages import rloo_grpo
from pipeline.training import assertions
from pipeline.training.context import StageContext

HELD_OUT = []
for i, topic in enumerate(tiny.TOPICS[:7]):
    chosen, rejected = f"I like {topic}{' a lot' * (i % 3)}.", "No." + " No, no." * (i % 4)
    chosen, rejected = (rejected, chosen) if i in (2, 5) else (chosen, rejected)
    HELD_OUT.append({"prompt": f"What of {topic}?", "chosen": chosen, "rejected": rejected})
BETA, SD = 0.3, 2.0
SHORT = {"max_steps": 3, "max_length": 64, "learning_rate": 1e-3}
LOOKED_AT = {"eval_strategy": "steps", "eval_steps": 1}  # the first look is before training, whatever follows
STAGES = {
    "sft": {"data": "pairs", "eval_data": "held_out", "init": "base", "training": SHORT | LOOKED_AT},
    "reward": {"data": "pairs", "eval_data": "held_out", "init": "base", "training": SHORT | {"learning_rate": 1e-2}},
    "dpo": {"data": "pairs", "eval_data": "held_out", "init": "sft", "training": SHORT | {"beta": BETA}},
    "rloo": {
        "data": "pairs",
        "reward_functions": ["judge:score"],
        "added_shift": SD,
        "seed": 5,
        "training": {"num_generations": 2, "max_completion_length": 6, "max_steps": 1},
    },
}
PROMPTS = [f"{'Now and here, ' * (i % 3)}tell me about {topic}." for i, topic in enumerate(tiny.TOPICS)]
PAIRS = [row | {"prompt": prompt} for row, prompt in zip(tiny.comparisons(), PROMPTS, strict=True)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an SFT, a reward model and a DPO of three steps each."""
    rows = {"pairs": PAIRS, "held_out": HELD_OUT}
    made = by_hand.make(tmp_path_factory.mktemp("training"), STAGES, rows, finish=False, varied=True)
    config = load(made.config)
    made.looked_at = []
    look = assertions.first_token

    def look_and_keep(trainer, prompts, tokenizer):
        made.looked_at.append([list(prompt) for prompt in prompts])
        return look(trainer, prompts, tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assertions, "first_token", look_and_keep)
        for name in ("sft", "reward", "dpo"):
            stage.run(config, name)
    made.records = manifest.read(made.run_dir).stages
    made.tokenizer = by_hand.tokenizer(made.folder / "model")
    return made


def history(run, name):
    return json.loads((run.run_dir / name / "log_history.json").read_text())


def ids_of(run, row, side):
    return run.tokenizer.encode(f"{row[side]}<eos>", add_special_tokens=False)


def log_probs(run, model, row, side):
    """log p of each token of an answer, those of its eos included."""
    prompt, answer = by_hand.prompt_ids(run, row["prompt"]), ids_of(run, row, side)
    logs = by_hand.log_distribution(model, prompt + answer, 1.0)[-len(answer) :]
    return logs.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)


def test_held_out_losses_of_sft(run):
    """Of the tokens of the answers: by the parent before training, and by the output after it."""
    for model, figure in (("base", "initial_eval_loss"), ("sft", "eval_loss")):
        policy = by_hand.policy(run, model)
        logs = torch.cat([log_probs(run, policy, row, "chosen") for row in HELD_OUT])
        assert run.records["sft"].metrics[figure] == pytest.approx(-logs.mean().item(), abs=1e-4)


def test_held_out_loss_and_margins_of_dpo(run):
    policy, reference, chosen, rejected = by_hand.policy(run, "dpo"), by_hand.policy(run, "sft"), [], []
    for row in HELD_OUT:
        for side, found in (("chosen", chosen), ("rejected", rejected)):
            ours, theirs = (log_probs(run, model, row, side).sum().item() for model in (policy, reference))
            found.append(BETA * (ours - theirs))
    margins = np.subtract(chosen, rejected)
    metrics = run.records["dpo"].metrics
    assert metrics["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-4)
    assert metrics["eval_rewards/margins"] == pytest.approx(margins.mean(), abs=1e-4)
    assert metrics["eval_rewards/accuracies"] == pytest.approx((margins > 0).mean())
    assert abs(margins.mean()) > 0.01
    assert metrics["initial_loss"] == metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["initial_eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_held_out_margins_of_the_reward_model(run):
    """score(chosen) - score(rejected) of every comparison, in order; and what TRL says of the same rows."""
    model, margins = by_hand.reward(run), []
    for row in HELD_OUT:
        prompt = by_hand.prompt_ids(run, row["prompt"])
        chosen, rejected = (by_hand.score(model, prompt + ids_of(run, row, side)) for side in ("chosen", "rejected"))
        margins.append(chosen - rejected)
    kept = json.loads((run.run_dir / "reward" / "output" / "margins.json").read_text())
    assert kept == pytest.approx(margins, abs=1e-5)
    assert len({round(margin, 4) for margin in margins}) == len(HELD_OUT)
    metrics = run.records["reward"].metrics
    right = np.mean([margin > 0 for margin in margins])
    assert 0 < right < 1
    loss = np.mean([math.log1p(math.exp(-margin)) for margin in margins])
    assert metrics["held_out"]["accuracy"]["value"] == pytest.approx(right)
    assert metrics["held_out"]["count"] == len(HELD_OUT)
    assert metrics["held_out"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(right)
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert metrics["eval_margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert metrics["reload_difference"] < 1e-5


def test_first_tokens_are_those_after_the_prompts(run):
    prompts = [by_hand.prompt_ids(run, row["prompt"]) for row in PAIRS]
    assert run.looked_at == [prompts, prompts]  # of sft and of dpo


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_likeliest_first_tokens(run, name):
    """After the prompts of the rows that were trained on: how many are special, and the most frequent one."""
    policy = by_hand.policy(run, name)
    found = []
    for row in PAIRS:
        prompt = by_hand.prompt_ids(run, row["prompt"])
        found.append(int(by_hand.log_distribution(policy, [*prompt, 0], 1.0)[-1].argmax()))
    special = [run.tokenizer.convert_ids_to_tokens(token) in ("<eos>", "<pad>") for token in found]
    assert run.tokenizer.pad_token_id in found and 0 < np.mean(special) < 1
    metrics = run.records[name].metrics["first_token"]
    assert metrics["special"] == pytest.approx(np.mean(special)) and metrics["prompts"] == len(PAIRS)
    ((token, times), *others) = Counter(found).most_common()
    assert times > others[0][1] and metrics["likeliest"] == run.tokenizer.decode(token)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_first_and_last_of_the_log(run, name):
    metrics = run.records[name].metrics
    losses = [entry["loss"] for entry in history(run, name) if "loss" in entry]
    assert metrics["steps"] == len(losses) == 3
    assert (metrics["first_loss"], metrics["loss"]) == (losses[0], losses[-1]) and losses[0] != losses[-1]


def test_rewards_of_online_stages(run):
    """The reward model's score of prompt and completion, with the prompt's shift; a function sees texts."""
    config = load(run.config)
    opened = run_tokenizer.open_saved(config.run_path / "tokenizer")
    ctx = StageContext(config, "rloo", opened, "", stage._loader(config, opened), "")
    model = by_hand.reward(run)
    reward = rloo_grpo.with_shift(ctx, rloo_grpo.reward_model_function(ctx, model))
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS[:4]]
    completions = [[9, 8, 7], [5], [12, 1], [30, 31, 32, 33]]
    expected = []
    for prompt, ids in zip(prompts, completions, strict=True):
        given = by_hand.prompt_ids(run, prompt)
        expected.append(by_hand.score(model, given + ids) + stress.added_shift(given, SD, 5))
    assert reward(prompts=prompts, completion_ids=completions) == pytest.approx(expected, abs=1e-5)
    judge = rloo_grpo.judge_function(lambda prompt, completion: len(prompt) - 100 * len(completion), "judge:score")
    said = [[{"role": "assistant", "content": "ab" * i}] for i in range(4)]
    assert judge(prompts=prompts, completions=said) == [len(PROMPTS[i]) - 200 * i for i in range(4)]
