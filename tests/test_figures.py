"""What evaluate and the shift report say, computed a second time by plain transformers, peft and numpy, row by row."""

import itertools
import json
import math
from collections import Counter
from fractions import Fraction
from statistics import NormalDist

import by_hand
import numpy as np
import pytest
import tiny
import torch
from scipy import stats

from pipeline import stage
from pipeline.chain import staleness
from pipeline.config.load import load
from pipeline.models.generation import Sampling, generate
from pipeline.records import manifest
from pipeline.stages.evaluate import win_rate
from pipeline.training import divergence

TEMPERATURE, LENGTH, BATCH, SEED = 0.7, 6, 5, 3
ALL = [[{"role": "user", "content": f"What of {topic}?"}] for topic in tiny.TOPICS]
ALL[3] = [*ALL[3], {"role": "assistant", "content": "It is good."}, {"role": "user", "content": "Why is that?"}]
PROMPTS = ALL[:11]  # that are evaluated on
# Repeated prompts count once, at their first place.
ROWS = [{"prompt": prompt} for prompt in [*ALL[:4], ALL[0], *ALL[4:], ALL[2], ALL[2]]]
TEXTS = [prompt[-1]["content"] for prompt in PROMPTS]
SAMPLED = {"data": "prompts", "seed": SEED, "temperature": TEMPERATURE, "max_new_tokens": LENGTH, "batch_size": BATCH}
EVALUATE = SAMPLED | {"judge": "judge:score", "num_prompts": len(PROMPTS), "policies": ["dpo"]}
SHIFT = SAMPLED | {"num_prompts": len(PROMPTS), "num_completions": 3, "policy": "dpo"}
STAGES = {"sft": tiny.SFT, "reward": tiny.REWARD, "dpo": tiny.DPO, "shift": SHIFT, "evaluate": EVALUATE}
CLOSE = EVALUATE | {"type": "evaluate", "temperature": 0.1, "max_new_tokens": 3, "judge": None, "policies": []}
STAGES["close"] = CLOSE
POLICIES = ["base", "sft", "dpo"]
MARGINS = [1.5, -0.25, 0.0, 3.0, 0.75]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an evaluation and a shift report; its records and what they keep of each row."""
    made = by_hand.make(tmp_path_factory.mktemp("figures"), STAGES, {"prompts": ROWS}, margins=MARGINS)
    config = load(made.config)
    for name in ("evaluate", "close", "shift"):
        stage.run(config, name)
        output = made.run_dir / name / "output"
        lines = (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        setattr(made, name, manifest.read(made.run_dir).stages[name])
        setattr(made, f"{name}_rows", [json.loads(line) for line in lines])
    return made


@pytest.fixture(scope="module")
def tokenizer(run):
    return by_hand.tokenizer(run.folder / "model")


@pytest.fixture(scope="module")
def drawn(run, tokenizer):
    """`drawn[policy][draw][row]`: token ids of completions, sampled from models that were loaded apart."""
    sampling, found = Sampling(TEMPERATURE, LENGTH, BATCH, SEED), {}
    prompts = [by_hand.prompt_ids(run, prompt) for prompt in PROMPTS]
    batches = [prompts[start : start + BATCH] for start in (0, 5, 10)]
    for name in POLICIES:
        model = by_hand.policy(run, name)
        found[name] = [
            [ids for batch in batches for ids in generate(model, batch, sampling, tokenizer, draw)] for draw in range(3)
        ]
    return found


@pytest.fixture(scope="module")
def completions(drawn):
    """The completions of each policy that evaluate looks at."""
    return {name: draws[0] for name, draws in drawn.items()}


def entries(run, name):
    return [row[name] for row in run.evaluate_rows]


def test_rows_and_completions(run, tokenizer, completions):
    """The first `num_prompts` different prompts, in order; each policy's own completion, eos included in its length."""
    assert [row["prompt"] for row in run.evaluate_rows] == PROMPTS
    assert list(run.evaluate.metrics["policies"]) == POLICIES and run.evaluate.metrics["baseline"] == "sft"
    shares = []
    for name in POLICIES:
        for entry, ids in zip(entries(run, name), completions[name], strict=True):
            assert entry["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert entry["length"] == len(ids) <= LENGTH
            assert entry["ended"] == (ids[-1] == tokenizer.eos_token_id)
            assert tokenizer.eos_token_id not in ids[:-1] and (entry["ended"] or len(ids) == LENGTH)
        summary = run.evaluate.metrics["policies"][name]
        assert summary["prompts"] == len(PROMPTS)
        assert summary["length"] == pytest.approx(sum(map(len, completions[name])) / 11)
        assert summary["ended"] == pytest.approx(sum(e["ended"] for e in entries(run, name)) / 11)
        shares.append(summary["ended"])
    assert 0 < min(shares) < max(shares) < 1 or 0 < sorted(shares)[1] < 1  # some end, some are cut off
    assert run.evaluate.datasets["data"]["used"] == 11
    assert run.evaluate.datasets["data"]["dropped"] == {"same_prompt": 3}
    assert json.loads((run.run_dir / "evaluate/output/table.json").read_text()) == run.evaluate.metrics["policies"]


def test_kl_is_of_the_policy_to_the_baseline_on_its_own_completions(run, completions):
    """At the sampling temperature, over the completion's positions, that of eos included, prompts and padding not."""
    baseline = by_hand.policy(run, "sft")
    for name in POLICIES:
        policy, found = by_hand.policy(run, name), []
        for prompt, ids, entry in zip(PROMPTS, completions[name], entries(run, name), strict=True):
            prompt_ids = by_hand.prompt_ids(run, prompt)
            p, q = (by_hand.log_distribution(m, prompt_ids + ids, TEMPERATURE) for m in (policy, baseline))
            per_token = (p.exp() * (p - q)).sum(-1)[-len(ids) :]
            found.append(float(per_token.sum()))
            assert entry["kl"] == pytest.approx(found[-1], abs=1e-5)
        assert run.evaluate.metrics["policies"][name]["kl"] == pytest.approx(np.mean(found), abs=1e-5)
        assert (np.mean(found) > 0.5) == (name != "sft")  # or nothing would be tested


def test_the_largest_kl_of_a_row(run):
    """What the check of the reference looks at: of all positions, the one that is furthest off."""
    policy, reference = by_hand.policy(run, "dpo"), by_hand.policy(run, "sft")
    ids = by_hand.prompt_ids(run, PROMPTS[3])
    p, q = (by_hand.log_distribution(model, [*ids, 0], 1.0) for model in (policy, reference))
    per_token = (p.exp() * (p - q)).sum(-1)
    with torch.no_grad():
        found = divergence.largest_kl(policy, reference, ids)
    assert found == pytest.approx(per_token.max().item(), abs=1e-5)
    assert per_token.max() > 1.1 * per_token.mean()


def test_scores_are_the_reward_models_of_prompt_and_completion(run, completions):
    model = by_hand.reward(run)
    for name in POLICIES:
        expected = [
            by_hand.score(model, by_hand.prompt_ids(run, prompt) + ids)
            for prompt, ids in zip(PROMPTS, completions[name], strict=True)
        ]
        assert [entry["score"] for entry in entries(run, name)] == pytest.approx(expected, abs=1e-5)
        assert run.evaluate.metrics["policies"][name]["score"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_the_judge_sees_the_prompt_and_the_completion_as_text(run):
    for name in POLICIES:
        pairs = [(prompt, entry["completion"]) for prompt, entry in zip(TEXTS, entries(run, name), strict=True)]
        expected = [(len(prompt) + 2 * len(text)) % 3 for prompt, text in pairs]
        assert [entry["judge"] for entry in entries(run, name)] == expected
        assert run.evaluate.metrics["policies"][name]["judge"] == pytest.approx(np.mean(expected))


def bootstrap_of_halves(halves):
    """The 2.5 % and 97.5 % points of the mean of a resample, without resampling, and how far they are from a step.

    `halves` are twice the wins of each prompt. The sum over a resample has the distribution that its counts have.
    """
    one = np.bincount(halves, minlength=3) / len(halves)
    total = np.ones(1)
    for _ in halves:
        total = np.convolve(total, one)
    below = total.cumsum()
    places = [int((below < level).sum()) for level in (0.025, 0.975)]
    slack = min(
        abs(below[k + step] - level) for k, level in zip(places, (0.025, 0.975), strict=True) for step in (-1, 0)
    )
    return [place / 2 / len(halves) for place in places], slack


@pytest.mark.parametrize("measure", ["score", "judge"])
def test_win_rates_count_each_prompt_once_and_a_tie_half(run, measure):
    ties = 0
    for name in POLICIES:
        pairs = [
            (ours[measure], theirs[measure])
            for ours, theirs in zip(entries(run, name), entries(run, "sft"), strict=True)
        ]
        signs = Counter((ours > theirs) - (ours < theirs) for ours, theirs in pairs)
        ties += signs[0] if name != "sft" else 0
        rate, low, high = run.evaluate.metrics["policies"][name][f"{measure}_win_rate"]
        assert rate == pytest.approx(float(Fraction(2 * signs[1] + signs[0], 2 * len(PROMPTS))))
        if name == "sft":
            assert (rate, low, high) == (0.5, 0.5, 0.5)
            continue
        ends, _ = bootstrap_of_halves([1 + (ours > theirs) - (ours < theirs) for ours, theirs in pairs])
        assert [low, high] == pytest.approx(ends, abs=0.5 / len(PROMPTS) + 1e-9)  # a step of the mean
    assert ties > 1


@pytest.mark.parametrize(
    ("wins", "ties", "losses"), [(7, 2, 3), (3, 2, 7), (10, 0, 5), (1, 8, 1), (36, 4, 11), (0, 3, 4)]
)
def test_the_interval_of_a_win_rate_is_the_bootstraps_over_prompts(wins, ties, losses):
    """Percentiles of 9,999 resamples fall on the exact steps, where these are not at 2.5 % themselves."""
    ours = [1.0] * wins + [0.0] * ties + [-1.0] * losses
    halves = [2] * wins + [1] * ties + [0] * losses
    ends, slack = bootstrap_of_halves(halves)
    assert slack > 0.001
    assert win_rate(ours, [0.0] * len(ours)) == pytest.approx((sum(halves) / 2 / len(ours), *ends))


def test_a_win_rate_without_variation():
    """After n wins of n prompts Wilson's interval begins at n / (n + z^2)."""
    for number in (1, 2, 20, 100):
        end = pytest.approx(number / (number + NormalDist().inv_cdf(0.975) ** 2))
        assert win_rate([2.0] * number, [1.0] * number) == (1, end, 1)
        rate, low, high = win_rate([1.0] * number, [2.0] * number)
        assert (rate, low, 1 - high) == (0, 0, end)
    assert win_rate([1.0, 1.0], [1.0, 1.0]) == (0.5, 0.5, 0.5)


def test_equal_completions_tie(run):
    """Whatever is scored beside them: in another batch the same completion has another score, by rounding."""
    equal = [row["base"]["score"] == row["sft"]["score"] for row in run.close_rows]
    assert equal == [row["base"]["completion"] == row["sft"]["completion"] for row in run.close_rows]
    assert 1 < sum(equal) < len(equal)


# The shift report


def test_scores_and_lengths_of_the_shift_report_are_those_of_its_prompts(run, tokenizer, drawn):
    model = by_hand.reward(run)
    assert [row["prompt"] for row in run.shift_rows] == TEXTS
    for i, row in enumerate(run.shift_rows):
        prompt = by_hand.prompt_ids(run, PROMPTS[i])
        ids = [drawn["dpo"][draw][i] for draw in range(3)]
        assert row["tokens"] == len(prompt)
        assert row["lengths"] == [len(completion) for completion in ids]
        assert row["completions"] == [tokenizer.decode(completion, skip_special_tokens=True) for completion in ids]
        assert row["scores"] == pytest.approx([by_hand.score(model, prompt + c) for c in ids], abs=1e-5)
    assert len({tuple(row["lengths"]) for row in run.shift_rows}) > 3


def test_figures_of_the_shift_report(run):
    found, rows = run.shift.metrics, run.shift_rows
    scores = np.array([row["scores"] for row in rows])
    within = scores.var(1, ddof=1).mean()
    between = scores.mean(1).var(ddof=1) - within / 3
    assert between > 0
    assert found["within_sd"]["value"] == pytest.approx(math.sqrt(within))
    assert found["between_sd"]["value"] == pytest.approx(math.sqrt(between))
    assert found["icc"]["value"] == pytest.approx(between / (between + within))
    lengths = np.array([row["lengths"] for row in rows], float)
    apart = [(x - x.mean(1, keepdims=True)).ravel() for x in (scores, lengths)]
    assert found["length_correlation"]["value"] == pytest.approx(stats.pearsonr(*apart).statistic)
    tokens = [row["tokens"] for row in rows]
    assert found["offset_prompt_length"]["value"] == pytest.approx(stats.pearsonr(scores.mean(1), tokens).statistic)
    flat = stats.binomtest(int((scores.std(1, ddof=1) < 0.1).sum()), 11)
    ends = flat.proportion_ci(method="wilson")
    assert found["flat_prompts"] == pytest.approx({"value": flat.statistic, "low": ends.low, "high": ends.high})
    offsets = {row["prompt"]: mean - scores.mean(1).mean() for row, mean in zip(rows, scores.mean(1), strict=True)}
    ranked = sorted(offsets, key=offsets.get)
    assert [entry["prompt"] for entry in found["smallest"]] == ranked[:3]
    assert [entry["prompt"] for entry in found["largest"]] == ranked[:-4:-1]
    for entry in found["smallest"] + found["largest"]:
        assert entry["offset"] == pytest.approx(offsets[entry["prompt"]])
        spread = scores[TEXTS.index(entry["prompt"])].std(ddof=1)
        assert entry["within_sd"] == pytest.approx(spread)
    quantiles = {str(q): np.sort(scores.ravel())[round(q * 32)] for q in (0.25, 0.5, 0.75)}
    assert {key: found["score_quantiles"][key] for key in quantiles} == pytest.approx(quantiles)
    assert (found["prompts"], found["completions"]) == (11, 33)
    # The margins are those that the reward stage kept: 3 right, 1 wrong, 1 tie.
    assert found["comparisons"]["count"] == 5 and found["comparisons"]["accuracy"]["value"] == pytest.approx(3.5 / 5)
    losses = [math.log1p(math.exp(-margin)) for margin in MARGINS]
    assert found["comparisons"]["loss"] == pytest.approx(sum(losses) / 5)


# What is kept, and why a stage would run


def test_completions_are_kept_by_policy_and_sampling(run, capsys, tmp_path):
    """A second evaluation that samples otherwise draws anew, one that does not takes what is there."""
    config = load(run.config, (f"run_dir={run.run_dir}",))
    assert not [d.stage for d in staleness.decide(config, manifest.read(run.run_dir)) if d.run]
    files = sorted((run.run_dir / "cache").glob("completions-*.jsonl"))
    # Of two policies at a low temperature, and of three; the report's and evaluate's of dpo are one.
    sizes = sorted(sum(map(bool, file.read_text().splitlines())) for file in files)
    assert sizes == [3, 3, 3, 3, 9]  # batches: three draws of dpo, one of the others


def read_table(text, title):
    """The cells of the table below a title, by row and column."""
    lines = text[text.index(title) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("┃"))
    split = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in lines[start:]]
    header, body = split[0], itertools.takewhile(lambda cells: cells, split[2:])
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in body}


def test_the_result_table_says_what_is_on_record(run, cli):
    code, shown, _ = cli("status", run.run_dir)
    assert code == 0 and "evaluate on 11 held-out prompts, win rates against sft" in shown
    table = read_table(shown, "evaluate on 11")
    assert list(table) == POLICIES
    for name, summary in run.evaluate.metrics["policies"].items():
        rates = {m: "{:.2f} [{:.2f}, {:.2f}]".format(*summary[f"{m}_win_rate"]) for m in ("judge", "score")}
        assert table[name] == {
            "policy": name,
            "judge": f"{summary['judge']:.3f}",
            "win rate (judge)": "-" if name == "sft" else rates["judge"],
            "reward model": f"{summary['score']:.3f}",
            "win rate (reward model)": "-" if name == "sft" else rates["score"],
            "KL (nats)": f"{summary['kl']:.2f}",
            "length": f"{summary['length']:.1f}",
            "ended": f"{100 * summary['ended']:.0f} %",
        }
    # The headline of the stage is that of the judge, of the policies that are compared.
    rate = run.evaluate.metrics["policies"]["dpo"]["judge_win_rate"]
    assert "dpo: win rate {:.2f} [{:.2f},".format(*rate) in shown and "base: win rate" not in shown
    figures = run.shift.metrics
    said = {"ICC": "icc", "within-prompt SD": "within_sd", "score and length": "length_correlation"}
    told = [f"{label} {{value:.2f}} [{{low:.2f}}, {{high:.2f}}]".format(**figures[key]) for label, key in said.items()]
    accuracy = "accuracy {value:.2f} [{low:.2f}, {high:.2f}]".format(**figures["comparisons"]["accuracy"])
    assert f"shift: {', '.join([*told, accuracy])}" in shown


def test_the_shift_table_says_what_is_on_record(run, cli):
    code, shown, _ = cli("shift", run.run_dir)
    assert code == 0 and "11 held-out prompts, 33 completions" in shown
    table, figures = read_table(shown, "11 held-out prompts"), run.shift.metrics
    interval = "{value:.2f} [{low:.2f}, {high:.2f}]"
    compared = figures["comparisons"]
    expected = {
        "ICC": interval.format(**figures["icc"]),
        "between-prompt SD": interval.format(**figures["between_sd"]),
        "within-prompt SD": interval.format(**figures["within_sd"]),
        "score and length": interval.format(**figures["length_correlation"]),
        "offset and prompt length": interval.format(**figures["offset_prompt_length"]),
        "loss": f"{compared['loss']:.2f}",
        "calibration error": f"{compared['ece']:.2f}",
    }
    quantiles = figures["score_quantiles"]
    expected["score"] = f"{quantiles['0.5']:.2f} [{quantiles['0.05']:.2f}, {quantiles['0.95']:.2f}]"
    for name, share in {"flat prompts": figures["flat_prompts"], "accuracy": compared["accuracy"]}.items():
        expected[name] = "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * share[k] for k in ("value", "low", "high")))
    quarters = [100 * part["accuracy"]["value"] for part in compared["accuracy_by_margin"]]
    expected["accuracy by margin"] = ", ".join(f"{quarter:.0f}" for quarter in quarters) + " %"
    assert {name: cells["value"] for name, cells in table.items()} == expected
    extremes = read_table(shown, "Largest and smallest offsets")
    for entry in figures["largest"] + figures["smallest"]:
        cells = extremes[entry["prompt"]]
        assert cells["offset"] == f"{entry['offset']:+.2f}"
        assert cells["within-prompt SD"] == f"{entry['within_sd']:.2f}"
    assert list(extremes) == [e["prompt"] for e in figures["largest"] + figures["smallest"][::-1]]
