"""What PPO learns from, r(x, y) + delta(x) - b(x) and then the penalty: by the plain reward model, row by row."""

import json

import by_hand
import numpy as np
import pytest
import tiny
import torch
from trl.experimental.ppo import ppo_trainer
from trl.experimental.utils import get_reward

from pipeline import stage
from pipeline.config.load import load
from pipeline.models.generation import Sampling, generate
from pipeline.records import manifest
from pipeline.rl import stress
from pipeline.rl.baselines import LeaveOneOut, Offline, reliability
from pipeline.rl.centred_reward import CentredReward

# Prompts of several lengths, the first one twice with another answer: a reference baseline has both.
TASKS = [
    {"prompt": f"What {'on earth ' * (i % 3)}of {t}?", "completion": f"{t}."} for i, t in enumerate(tiny.TOPICS[:8])
]
TASKS += [{"prompt": TASKS[0]["prompt"], "completion": "Something else."}]
PENALTY, SD, NEW = 3.0, 2.0, 6
TRAINING = {"total_episodes": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
TRAINING |= {"num_ppo_epochs": 1, "num_mini_batches": 1, "response_length": NEW, "temperature": 1.0}
TRAINING |= {"local_rollout_forward_batch_size": 4, "learning_rate": 1e-3, "missing_eos_penalty": PENALTY}
PPO = {"type": "ppo", "data": "tasks", "training": TRAINING, "added_shift": SD}
METHODS = ("none", "sft_mean", "greedy", "reference", "leave_one_out")
STAGES = {"sft": tiny.SFT, "reward": tiny.REWARD}
STAGES |= {method: PPO | {"prompt_baseline": method} for method in METHODS}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return by_hand.make(tmp_path_factory.mktemp("ppo"), STAGES, {"tasks": TASKS})


@pytest.fixture(scope="module")
def tokenizer(run):
    return by_hand.tokenizer(run.folder / "model")


def history(run, name):
    return json.loads((run.run_dir / name / "log_history.json").read_text())


@pytest.fixture
def given(monkeypatch):
    """Each prompt and completion that PPO scores, with the values foretold of it and the score that it is given."""
    found, values = [], []

    def record(model, sequences, pad, start):
        output = get_reward(model, sequences, pad, start)
        if not isinstance(model, CentredReward):
            values[:] = output[0][:, start - 1 : -1, 0].tolist()
            return output
        for ids, score, foretold in zip(sequences.tolist(), output[1].tolist(), values, strict=True):
            completion = [*ids[start:], pad]
            completion = completion[: completion.index(pad)]
            prompt = tuple(token for token in ids[:start] if token != pad)
            found.append((prompt, completion, score, foretold[: len(completion)]))
        return output

    monkeypatch.setattr(ppo_trainer, "get_reward", record)
    return found


def answers_by_hand(run, method, tokenizer):
    """What each prompt's baseline is the mean score of."""
    prompts = [by_hand.prompt_ids(run, task["prompt"]) for task in TASKS]
    if method == "reference":
        found = {}
        for prompt, task in zip(prompts, TASKS, strict=True):
            ids = [*tokenizer.encode(task["completion"], add_special_tokens=False), tokenizer.eos_token_id]
            found.setdefault(tuple(prompt), []).append(ids)
        return found
    model, unique = by_hand.policy(run, "sft"), [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    batches = [unique[start : start + 4] for start in (0, 4)]
    sampling = Sampling(0.0 if method == "greedy" else 1.0, NEW, 4)
    draws = range(1 if method == "greedy" else 4)
    drawn = [[ids for b in batches for ids in generate(model, b, sampling, tokenizer, n)] for n in draws]
    return {tuple(prompt): list(ids) for prompt, ids in zip(unique, zip(*drawn, strict=True), strict=True)}


@pytest.mark.parametrize("method", METHODS)
def test_what_ppo_learns_from(run, given, tokenizer, method):
    """Each part by the plain reward model, one sequence at a time, and PPO's own figures from them."""
    stage.run(load(run.config), method)
    record = manifest.read(run.run_dir).stages[method]
    model, eos = by_hand.reward(run), tokenizer.eos_token_id
    shift = {prompt: stress.added_shift(prompt, SD, 0) for prompt, *_ in given}
    raw = [by_hand.score(model, [*prompt, *ids]) + shift[prompt] for prompt, ids, *_ in given]
    assert len(raw) == 8
    if method == "none":
        baseline = [0.0] * 8
    elif method == "leave_one_out":
        groups = [range(i - i % 4, i - i % 4 + 4) for i in range(8)]
        assert all(len({given[j][0] for j in group}) == 1 for group in groups)
        baseline = [np.mean([raw[j] for j in group if j != i]) for i, group in enumerate(groups)]
    else:
        answers = answers_by_hand(run, method, tokenizer)
        of_prompt = {p: np.mean([by_hand.score(model, [*p, *ids]) for ids in found]) for p, found in answers.items()}
        baseline = [of_prompt[prompt] + shift[prompt] for prompt, *_ in given]
    centred = np.subtract(raw, baseline)
    assert [score for _, _, score, _ in given] == pytest.approx(centred, abs=1e-4)
    ended = np.array([eos in ids for _, ids, *_ in given])
    assert 0 < ended.mean() < 1
    [logged] = [e for e in history(run, method) if "objective/scores" in e]
    target = np.repeat(centred, [len(ids) for _, ids, *_ in given])
    foretold = np.concatenate([values for *_, values in given])
    # With a baseline the critic starts at 0, the mean of what is left; else with what the reward model says.
    assert (np.abs(foretold).max() == 0) == (method != "none")
    residual = target - foretold
    figures = {
        "objective/raw_scores": np.mean(raw),
        "objective/raw_scores_sd": np.std(raw),
        "objective/centred_scores": np.mean(centred),
        "objective/centred_scores_sd": np.std(centred),
        "completions/mean_length": np.mean([len(ids) for _, ids, *_ in given]),
        "completions/missing_eos": 1 - ended.mean(),
        "objective/scores": np.mean(centred - PENALTY * ~ended),
        "value/explained_variance": 1 - residual.var() / target.var(),
    }
    assert {key: logged[key] for key in figures} == pytest.approx(figures, abs=1e-4)
    assert record.metrics["score"] == record.metrics["first_score"] == pytest.approx(np.mean(raw), abs=1e-4)
    assert record.metrics["centred_score"] == pytest.approx(np.mean(centred), abs=1e-4)
    assert (record.metrics["updates"], record.metrics["episodes"]) == (1, 8)
    assert (abs(np.mean(raw) - np.mean(centred)) > 0.1) == (method != "none")


def test_shrinkage_is_towards_the_mean_of_prompts():
    """Of prompts with 3, 1 and 2 scores each counts once; what is not the prompt's own weight is the mean's."""
    scores = {(1,): [1.0, 3.0, 8.0], (2,): [10.0], (3,): [-2.0, 0.0]}
    expected = [0.75 * mean + 0.25 * (4 + 10 - 1) / 3 for mean in (4, 10, -1)]
    found = Offline(scores, 0.75)([(1,), (2,), (3,)], torch.zeros(3))
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("weight", [1.0, 0.75, 0.0])
def test_leave_one_out_in_a_loop(weight):
    """The mean of the prompt's other scores, and for the rest that of the other prompts: never its own."""
    scores = np.random.default_rng(0).normal(size=(3, 4))
    expected = [
        weight * np.delete(scores[i], j).mean() + (1 - weight) * np.delete(scores, i, axis=0).mean()
        for i in range(3)
        for j in range(4)
    ]
    found = LeaveOneOut(4, weight)([], torch.tensor(scores.ravel()))
    assert found.tolist() == pytest.approx(expected)


def test_the_weight_of_a_mean_is_its_reliability():
    """The share of its variance that is the prompt's: simulated, and at the ends."""
    rng = np.random.default_rng(0)
    own = rng.normal(size=200_000) * 0.8
    means = own + rng.normal(size=200_000) * 1.5 / np.sqrt(3)
    icc = 0.8**2 / (0.8**2 + 1.5**2)
    assert reliability(icc, 3) == pytest.approx(np.cov(own, means)[0, 1] / means.var(), abs=0.01)
    assert (reliability(0.3, 1), reliability(0.0, 5), reliability(1.0, 5)) == (pytest.approx(0.3), 0, 1)
