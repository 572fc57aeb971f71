"""How completions are drawn and kept: against frequencies, a loop by hand, and the distributions that are said."""

import dataclasses
import itertools

import by_hand
import numpy as np
import pytest
import tiny
import torch
from scipy import stats

from pipeline import stage
from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.models.generation import Sampling, generate
from pipeline.records import manifest
from pipeline.rl import stress
from pipeline.training.completions import completions
from pipeline.training.context import StageContext

# Prompts of several lengths.
TASKS = [
    {"prompt": f"What {'on earth ' * (i % 3)}of {t}?", "completion": f"{t}."} for i, t in enumerate(tiny.TOPICS[:8])
]
TASKS += [{"prompt": TASKS[0]["prompt"], "completion": "Something else."}]
NEW = 6  # tokens
STAGES = {"sft": tiny.SFT, "reward": tiny.REWARD}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return by_hand.make(tmp_path_factory.mktemp("sampling"), STAGES, {"tasks": TASKS})


@pytest.fixture(scope="module")
def tokenizer(run):
    return by_hand.tokenizer(run.folder / "model")


@pytest.fixture(scope="module")
def policy(run):
    return by_hand.policy(run, "sft")


def first_tokens(policy, tokenizer, prompt, temperature, number=3000):
    drawn = generate(policy, [prompt] * number, Sampling(temperature, 1, number), tokenizer)
    return np.bincount([ids[0] for ids in drawn], minlength=len(tokenizer))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_as_frequent_as_their_probabilities(run, policy, tokenizer, temperature):
    """Of the whole distribution: nothing is cut off at its end."""
    prompt = by_hand.prompt_ids(run, "What of tea?")
    counts = first_tokens(policy, tokenizer, prompt, temperature)
    expected = by_hand.log_distribution(policy, [*prompt, 0], temperature)[-1].exp().numpy() * counts.sum()
    often = expected >= 5
    assert often.sum() > 20
    seen, wanted = (np.append(x[often], x[~often].sum()) for x in (counts, expected))
    assert stats.chisquare(seen, wanted).pvalue > 0.01
    other = by_hand.log_distribution(policy, [*prompt, 0], temperature * 1.5)[-1].exp().numpy() * counts.sum()
    wanted = np.append(other[often], other[~often].sum())
    assert stats.chisquare(seen, wanted).pvalue < 1e-4  # or a wrong temperature would pass too


def test_greedy_completions_are_those_of_a_loop(run, policy, tokenizer):
    """One token at a time, without padding or cache; they end with eos, or after `max_new_tokens`."""
    policies = (policy, by_hand.policy(run, "base"))
    prompts = [by_hand.prompt_ids(run, task["prompt"]) for task in TASKS]
    ends = set()
    for model, limit in itertools.product(policies, (1, NEW)):
        expected = []
        for prompt in prompts:
            ids = []
            while len(ids) < limit and tokenizer.eos_token_id not in ids:
                ids.append(int(by_hand.log_distribution(model, [*prompt, *ids, 0], 1.0)[-1].argmax()))
            expected.append(ids)
            ends.add(tokenizer.eos_token_id in ids)
        assert generate(model, prompts, Sampling(0.0, limit, 9), tokenizer) == expected
    assert ends == {True, False}


def test_a_completion_ends_with_its_first_eos_or_is_cut_off(run, policy, tokenizer):
    prompts = [by_hand.prompt_ids(run, task["prompt"]) for task in TASKS] * 8
    drawn = generate(policy, prompts, Sampling(1.0, NEW, 72), tokenizer)
    for ids in drawn:
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1 if tokenizer.eos_token_id in ids else len(ids) == NEW
    assert {len(ids) for ids in drawn} == set(range(1, NEW + 1))


def test_seed_draw_and_prompts_decide_what_is_drawn(run, policy, tokenizer):
    prompts = [by_hand.prompt_ids(run, task["prompt"]) for task in TASKS]
    sampling = Sampling(1.0, NEW, 9, seed=4)
    first = generate(policy, prompts, sampling, tokenizer)
    torch.rand(7)
    assert generate(policy, prompts, sampling, tokenizer) == first
    others = [
        generate(policy, prompts, sampling, tokenizer, draw=1),
        generate(policy, prompts, dataclasses.replace(sampling, seed=5), tokenizer),
        generate(policy, prompts[::-1], sampling, tokenizer)[::-1],
    ]
    for other in others:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < len(prompts) / 2


def context(run, name="reward", key="key"):
    """What a stage would be given."""
    config = load(run.config)
    opened = run_tokenizer.open_saved(config.run_path / "tokenizer")
    return StageContext(config, name, opened, key, stage._loader(config, opened), "")


def test_what_is_kept_is_found_by_all_that_decides_it(run, tokenizer, capsys):
    """Weights, tokenizer and sampling: with another one completions are drawn anew, and they are another store."""
    prompts = [by_hand.prompt_ids(run, task["prompt"]) for task in TASKS[:3]]
    sampling = Sampling(1.0, 3, 2, seed=9)

    def draw(ctx, policy="sft", number=2, **changes):
        before = len(list(ctx.cache.glob("completions-*")))
        found = completions(ctx, policy, prompts, dataclasses.replace(sampling, **changes), number)
        said = capsys.readouterr().out
        drawn = int(said.split("sampling ")[1].split()[0]) if "sampling" in said else 0
        return found, drawn, len(list(ctx.cache.glob("completions-*"))) > before

    ctx = context(run)
    first = draw(ctx)
    assert first[1:] == (6, True)
    model = by_hand.policy(run, "sft")
    batches = [prompts[0:2], prompts[2:3]]
    alone = [[ids for b in batches for ids in generate(model, b, sampling, tokenizer, n)] for n in range(2)]
    assert first[0] == [list(pair) for pair in zip(*alone, strict=True)]
    assert draw(ctx) == (first[0], 0, False)
    assert draw(ctx, number=1) == ([drawn[:1] for drawn in first[0]], 0, False)
    for changes in ({"temperature": 0.9}, {"max_new_tokens": 2}, {"batch_size": 3}, {"seed": 10}):
        assert draw(ctx, **changes)[1:] == (6, True), changes
    base = draw(ctx, "base")
    assert base[1:] == (6, True)
    model = by_hand.policy(run, "base")
    assert [drawn[0] for drawn in base[0]] == [ids for b in batches for ids in generate(model, b, sampling, tokenizer)]
    assert draw(context(run, key="another"))[1:] == (6, True)
    record = ctx.record_of("sft")
    files = record.output.files | {"sft/output/adapter_model.safetensors": "other weights"}
    changed = record.model_copy(update={"output": record.output.model_copy(update={"files": files})})
    manifest.commit(run.run_dir, "sft", changed)
    assert draw(ctx)[1:] == (6, True)
    manifest.commit(run.run_dir, "sft", record)
    assert draw(ctx) == (first[0], 0, False)


def test_the_added_shift_is_normal_and_the_prompts_own():
    """With the SD that is asked for; another seed shifts otherwise."""
    prompts = [[i % 7, i] for i in range(4000)]
    found = np.array([stress.added_shift(prompt, 3.0, 1) for prompt in prompts])
    assert stats.kstest(found / 3, "norm").pvalue > 0.01
    assert [stress.added_shift(tuple(prompt), 1.5, 1) for prompt in prompts[:9]] == pytest.approx(found[:9] / 2)
    assert abs(np.corrcoef(found, [stress.added_shift(prompt, 3.0, 2) for prompt in prompts])[0, 1]) < 0.05
    assert stress.added_shift([1, 2], 0.0, 1) == 0
