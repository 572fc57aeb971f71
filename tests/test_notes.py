"""Notes below a result table: each rule on a table that it is about and on one that it is not, and its statistics."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import tiny
from scipy import stats
from test_equalities import run
from test_readme import fences

from pipeline.records import manifest
from pipeline.shift.estimate import Estimate
from pipeline.show.notes import FEW, RULES, Scale, needed_prompts, notes
from pipeline.show.results import MEASURES
from pipeline.stages.evaluate import win_rate

GOOD = {"prompts": 200, "length": 20.0, "ended": 0.97, "same": 3, "judge": 0.5, "judge_win_rate": [0.7, 0.63, 0.77]}
TIE = {"judge_win_rate": [0.5, 0.5, 0.5], "same": 200}
OPEN = {"judge_win_rate": [0.55, 0.485, 0.615]}
MEASURE = [("judge", "judge")]
# By which a rule's text is known.
WORDS = {
    "few_prompts": "prompts are few:",
    "nothing_ends": "of any policy ends",
    "never_ends": "and those of others do",
    "mostly_cut": "Most completions of these",
    "chance": "cannot be told from chance",
    "reversed": "wrong more often than right",
    "rounding": "rounding in",
    "same": "give the same completion",
    "not_separated": "would show it",
    "no_difference": "no difference to look for",
}


def said(base=None, sft=None, ppo=None, dpo=None):
    """Which rules speak, and their texts."""
    changes = {"base": base, "sft": sft or TIE, "ppo": ppo, "dpo": dpo}
    policies = {name: GOOD | (change or {}) for name, change in changes.items()}
    texts = list(notes("sft", policies, MEASURE))
    names = [name for text in texts for name, words in WORDS.items() if words in text]
    assert len(names) == len(texts)
    return names, texts


def test_every_rule_is_tested_by_its_words():
    assert [name for rule, (name, words) in zip(RULES, WORDS.items(), strict=True) if words in rule.text] == list(WORDS)
    assert list(WORDS) == [rule.name for rule in RULES]


def test_nothing_is_said_of_a_table_that_speaks_for_itself():
    assert said() == ([], [])
    assert said(base=OPEN | {"ended": 0.0}) == ([], [])  # the base is not what is compared


def test_a_policy_that_is_its_parent():
    names, texts = said(ppo=TIE, dpo={"same": 99})
    assert names == ["same"] and texts[0].startswith("ppo and sft give the same completion on 200 of 200 prompts:")
    assert said(ppo={"same": 100})[1][0].startswith("ppo and sft give the same completion on 100 of 200 prompts:")


def test_completions_that_do_not_end():
    cut = {"ended": 0.0, "length": 24.0}
    names, texts = said(base=cut, sft=TIE | cut, ppo=cut, dpo=cut)
    assert names == ["nothing_ends"] and "all were cut off after 24 tokens" in texts[0] and "max_new_tokens" in texts[0]
    names, texts = said(ppo=cut, dpo={"ended": 0.34})
    assert names == ["never_ends", "mostly_cut"]
    assert texts[0].startswith("No completion of ppo ends by itself, and those of others do")
    assert texts[1].endswith("The share that ends by itself: 34% of dpo's.")
    names, texts = said(sft=TIE | {"ended": 0.2}, ppo={"ended": 0.15}, dpo={"ended": 0.25})
    assert names == ["mostly_cut"]  # once for all
    assert texts[0].endswith("The share that ends by itself: 20% of sft's, 15% of ppo's and 25% of dpo's.")


def test_a_reward_model_that_is_a_coin():
    """Its win rates are no reason to look for a difference with more prompts. A judge's are."""
    policies = {name: GOOD | {"score": 0.1, "score_win_rate": [0.55, 0.38, 0.72]} for name in ("sft", "ppo")}
    policies["sft"] |= TIE
    coin = Scale("float32", "reward", Estimate(0.43, 0.1, 0.82), 7)
    (text,) = notes("sft", policies, [("score", "reward")], coin)
    assert text.startswith("The win rates by the reward model say nothing: reward cannot be told from chance.")
    assert "Its accuracy is 0.43 [0.10, 0.82] on 7 held-out comparisons." in text
    swapped = dataclasses.replace(coin, accuracy=Estimate(0.3, 0.24, 0.37))
    (text,) = notes("sft", policies, [("score", "reward")], swapped)
    assert "reward is wrong more often than right" in text
    good = dataclasses.replace(coin, accuracy=Estimate(0.8, 0.7, 0.9))
    (text,) = notes("sft", policies, [("score", "reward")], good)
    assert "do not separate ppo from sft" in text
    both = [("judge", "judge"), ("score", "reward")]
    assert list(notes("sft", policies, both, coin)) == []


def test_a_kl_that_is_rounding():
    """Of a policy that wins for certain it is not said: it has moved."""
    tie = {"judge_win_rate": [0.5, 0.4, 0.6]}
    kls = {"sft": 0.0, "ppo": 0.07, "dpo": 0.05, "far": 0.06, "moved": 0.05}
    policies = {name: GOOD | tie | {"kl": kl} for name, kl in kls.items()}
    policies["far"]["length"] = 19.0
    policies["moved"]["judge_win_rate"] = [0.7, 0.6, 0.8]
    (text,) = [text for text in notes("sft", policies, MEASURE, Scale("bfloat16")) if "rounding" in text]
    assert text.startswith("The KL of dpo is no larger than rounding in bfloat16 can make by itself")
    assert "it may be smaller than it says" in text
    assert not [text for text in notes("sft", policies, MEASURE, Scale("float32")) if "rounding" in text]


def test_prompts_that_do_not_separate():
    names, texts = said(ppo=OPEN)
    assert names == ["not_separated"]
    sd = 0.065 / stats.norm.ppf(0.975) * math.sqrt(200)
    needed = ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * sd / 0.05) ** 2
    expected = (
        "200 prompts do not separate ppo from sft by the judge (win rate 0.55 [0.48, 0.61]). If the difference is "
    )
    assert texts[0].startswith(expected) and f" {math.ceil(needed)} prompts would show it" in texts[0]
    for rate in ([0.5, 0.43, 0.57], [0.501, 0.43, 0.57]):
        assert said(ppo={"judge_win_rate": rate})[0] == ["no_difference"]
    names, texts = said(**{name: {"prompts": FEW - 1, "same": 0} for name in ("base", "sft", "ppo", "dpo")})
    assert names == ["few_prompts"] and texts[0].startswith("19 prompts are few")


def test_records_of_older_versions_and_without_a_reward_are_taken():
    older = {name: {"prompts": 200, "length": None, "ended": None} for name in ("base", "sft", "ppo")}
    assert list(notes("sft", older, [])) == []
    odd = GOOD | {"judge_win_rate": [0.5, None, None]}
    assert list(notes("sft", {"sft": odd, "ppo": odd}, MEASURE)) == []


@pytest.mark.parametrize(("win", "tie"), [(0.35, 0.4), (0.57, 0.0), (0.2, 0.7), (0.4, 0.1)])
def test_as_many_prompts_tell_the_difference_in_four_of_five_evaluations(win, tie):
    """Draw evaluations of the number that is said, with ties as they are between policies of one parent."""
    rng = np.random.default_rng(0)
    values, odds = np.array([1.0, 0.5, 0.0]), np.array([win, tie, 1 - win - tie])
    rate = values @ odds
    sd = math.sqrt((values - rate) ** 2 @ odds)
    half = stats.norm.ppf(0.975) * sd / math.sqrt(300)
    needed = needed_prompts(Estimate(rate, rate - half, rate + half), 300)
    assert 50 < needed < 2000
    wins, ties, _ = rng.multinomial(needed, odds, size=4000).T
    rates = (wins + ties / 2) / needed
    spreads = np.sqrt((wins + ties / 4) / needed - rates**2)
    separated = abs(rates - 0.5) > stats.norm.ppf(0.975) * spreads / math.sqrt(needed)
    assert separated.mean() == pytest.approx(0.8, abs=0.035)


def test_the_interval_tells_the_spread_of_a_prompt():
    """The formula on the wins themselves, against the bootstrap's interval that stands on record."""
    wins = np.random.default_rng(0).choice([1.0, 0.5, 0.0], 300, p=[0.35, 0.4, 0.25])
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    expected = (z * wins.std() / (wins.mean() - 0.5)) ** 2
    assert needed_prompts(win_rate(wins, np.full(300, 0.5)), 300) == pytest.approx(expected, rel=0.1)


def test_a_clean_sweep_of_few_prompts_needs_more_of_them():
    """By hand: Wilson's interval of 3 wins of 3 is [3 / (3 + z^2), 1], and a coin of its middle is told apart by n."""
    low = 3 / (3 + stats.norm.ppf(0.975) ** 2)
    middle = (low + 1) / 2
    needed = ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / (middle - 0.5)) ** 2 * middle * (1 - middle)
    assert needed_prompts(win_rate([1.0] * 3, [0.0] * 3), 3) == math.ceil(needed) == 33
    assert needed_prompts(win_rate([0.0] * 3, [1.0] * 3), 3) == 33


def test_with_few_prompts_an_interval_holds_less_often_than_it_says():
    """The percentile bootstrap of a share has the quantiles of a binomial; at a win rate of 0.9."""

    def coverage(number):
        counts = np.arange(number + 1)
        low, high = (stats.binom.ppf(q, number, counts / number) / number for q in (0.025, 0.975))
        return stats.binom.pmf(counts, number, 0.9)[(low <= 0.9) & (high >= 0.9)].sum()

    assert max(coverage(number) for number in range(5, FEW)) < 0.85 < coverage(FEW)
    assert coverage(100) > 0.94


def test_an_evaluation_counts_the_same_completions(tmp_path, cli):
    """One policy is a copy of the baseline's weights but for a step that is too small to be seen, the other trained."""
    stages = {
        "sft": tiny.SFT,
        "dpo": tiny.DPO | {"training": tiny.DPO["training"] | {"learning_rate": 1e-7, "max_steps": 1}},
        "far": {"type": "dpo"} | tiny.DPO,
        "evaluate": {"data": "demonstrations", "max_new_tokens": 4, "policies": ["dpo", "far"]},
    }
    data = {name: {"path": f"{name}.jsonl", "heldout": 0.5} for name in ("comparisons", "demonstrations")}
    path = tiny.make_run(tmp_path, stages, data=data)
    run(path, *stages)
    record = manifest.read(tmp_path / "run").stages["evaluate"]
    rows = [json.loads(line) for line in (tmp_path / "run/evaluate/output/samples.jsonl").read_text().splitlines()]
    for name, summary in record.metrics["policies"].items():
        keys = ("completion", "length", "ended")
        same = sum(all(row[name][key] == row["sft"][key] for key in keys) for row in rows)
        assert summary["same"] == same
    assert record.metrics["policies"]["dpo"]["same"] == len(rows) < FEW
    assert record.metrics["policies"]["far"]["same"] < len(rows)
    code, out, err = cli("status", tmp_path / "run")
    assert code == 0, err
    text = " ".join(out.split())
    assert f"- dpo and sft give the same completion on {len(rows)} of {len(rows)} prompts:" in text
    assert f"- {len(rows)} prompts are few:" in text


def test_the_readmes_table_needs_no_note():
    """What is shown there as the quickstart's output ends with the table."""
    (shown,) = fences("output: quickstart")
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    policies = {}
    for name, judge, wins, _, _, _, length, ended in lines:
        rate = None if wins == "-" else [float(part) for part in re.findall(r"[\d.]+", wins)]
        policies[name] = {
            "prompts": 300,
            "length": float(length),
            "ended": float(ended[:-2]) / 100,
            "judge": float(judge),
        }
        policies[name] |= {} if rate is None else {"judge_win_rate": rate}
    assert list(notes("sft", policies, list(MEASURES.items()))) == []
    assert shown.rstrip().endswith("┘")
