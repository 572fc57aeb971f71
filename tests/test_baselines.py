"""Prompt baselines: a shift of the reward model changes nothing, and PPO gets the score they promise."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from benchmarks import levels
from safetensors.torch import load_file
from test_chain import ROOT, rlhf
from test_equalities import QUANTISED
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.ppo import ppo_trainer
from trl.experimental.utils import get_reward

from pipeline import stage
from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.data.encode import prompt_ids
from pipeline.models import scoring
from pipeline.models.generation import Sampling, generate
from pipeline.models.loading import load_policy, load_reward
from pipeline.records import manifest
from pipeline.rl import best_policy, stress, watchdog
from pipeline.rl.baselines import LeaveOneOut, Offline, make_baseline, reliability
from pipeline.rl.centred_reward import CentredReward, Rollout, Subtraction, Watched
from pipeline.rl.healthy_ranges import Range
from pipeline.system.errors import UserError
from pipeline.training.completions import completions, identity_of
from pipeline.training.context import StageContext

ANSWERS = ["Yes.", "I like it.", "It is good.", "No.", "I like it because it is good."]
TASKS = [  # prompts and answers of several lengths
    {"prompt": "Please, " * (i % 4) + f"tell me about {topic}.", "completion": ANSWERS[i % len(ANSWERS)]}
    for i, topic in enumerate(tiny.TOPICS)
]
HELD_OUT = [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS[:8]]


def dialogue(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# Prompts with the answer of their own: demonstrations, comparisons, dialogues, and a second answer to the first prompt.
MIXED = [(dialogue(row["prompt"]), row["completion"]) for row in TASKS[:4]]
MIXED += [(dialogue(row["prompt"]), row["chosen"]) for row in tiny.comparisons()[4:7]]
MIXED += [(dialogue(f"Is {topic} good?", "It is.", "Why?"), f"I like {topic}.") for topic in tiny.TOPICS[7:10]]
MIXED += [(MIXED[0][0], "Something else.")]
STEPS = {"max_steps": 30, "max_length": 64}
PARENTS = {"sft": {"data": "tasks", "training": STEPS | {"max_steps": 12}}}
PARENTS |= {"reward": {"data": "comparisons", "training": STEPS}, "shift": {"data": "heldout", "max_new_tokens": 8}}
# With Adam's usual epsilon, 1e-8, an element of the gradient that is rounding noise moves its weight like any other.
ADAM = {"adam_epsilon": 1e-6, "learning_rate": 3e-3}
ONLINE = ADAM | {"max_steps": 8, "num_iterations": 2, "per_device_train_batch_size": 8, "num_generations": 4}
ONLINE |= {"max_completion_length": 10, "beta": 0.05}
PPO = tiny.PPO["training"] | ADAM | {"response_length": 10, "local_rollout_forward_batch_size": 4}
TRAINING = {"ppo": PPO | {"total_episodes": 32}, "rloo": ONLINE, "grpo": ONLINE}  # four rollouts, two passes over each
PENALTY = 3.0  # for completions without eos
DROPOUT = {"lora": tiny.LORA | {"lora_dropout": 0.5}}
KINDS = {"lora": {}, "full": {"lora": None}, "4bit": {"quantization": QUANTISED}, "dropout": DROPOUT}
METHODS = ["sft_mean", "greedy", "leave_one_out", "reference", "rloo", "grpo"]
TOLERANCE = 1e-4  # relative
SD = 5.0


def write_config(folder: Path, name: str, stages: dict, **top) -> Path:
    """A config for the run in `folder`, with the stages the tests build on."""
    path = tiny.make_run(folder, PARENTS | stages, **({"gate": "off"} | top))
    tiny.write_rows(folder / "tasks.jsonl", TASKS)
    tiny.write_rows(folder / "heldout.jsonl", HELD_OUT)
    data = {dataset: {"path": f"{dataset}.jsonl"} for dataset in ("comparisons", "tasks", "heldout")}
    tiny.edit(path, {"data": data | top.get("data", {})})
    return path.rename(folder / f"{name}.yaml")


def make_parents(folder: Path, *names: str, **top) -> Path:
    config = load(write_config(folder, "parents", {}, **top))
    for name in names:
        stage.run(config, name)
    return folder


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    return make_parents(tmp_path_factory.mktemp("baselines"), "sft", "reward", "shift")


def options_of(method: str) -> dict:
    """A stage by the way its scores lose what is the prompt's own."""
    kind = method if method in ("rloo", "grpo") else "ppo"
    own = {} if kind != "ppo" or method == "none" else {"prompt_baseline": method}
    return {"type": kind, "data": "tasks", "training": TRAINING[kind]} | own


def train(folder: Path, name: str, method: str = "none", training: dict | None = None, top: dict | None = None, **own):
    """Run one RL stage on the parents of `folder`; returns its record."""
    options = options_of(method) | own
    options["training"] = options["training"] | (training or {})
    config = load(write_config(folder, name, {name: options}, **(top or {})))
    stage.run(config, name)
    return manifest.read(config.run_path).stages[name]


def context(folder: Path, name: str, top: dict | None = None, **own) -> StageContext:
    """What a PPO stage of this name would be given."""
    config = load(write_config(folder, name, {name: options_of("none") | own}, **(top or {})))
    tokenizer = run_tokenizer.open_saved(config.run_path / "tokenizer")
    return StageContext(config, name, tokenizer, "", stage._loader(config, tokenizer), "")


def prompts_of(ctx: StageContext, rows: list[dict]) -> list[list[int]]:
    return [prompt_ids(ctx.tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in rows]


def history(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / "run" / name / "log_history.json").read_text())


def weights(folder: Path, name: str) -> torch.Tensor:
    """All weights of a stage's output as one vector."""
    (file,) = (folder / "run" / name / "output").glob("*.safetensors")
    return torch.cat([weight.flatten() for _, weight in sorted(load_file(file).items())])


@pytest.fixture
def advantages(monkeypatch) -> list[torch.Tensor]:
    """The advantages of every rollout that is trained on from now on, before PPO whitens them."""
    found: list[torch.Tensor] = []
    whiten = ppo_trainer.masked_whiten

    def record(values, mask, *args, **kwargs):
        found.append(values * mask)
        return whiten(values, mask, *args, **kwargs)

    def recording(method):
        def call(self, *args):
            output = method(self, *args)
            found.append(output["advantages"].clone())
            return output

        return call

    monkeypatch.setattr(ppo_trainer, "masked_whiten", record)
    for trainer in (RLOOTrainer, GRPOTrainer):
        name = "_generate_and_score_completions"
        monkeypatch.setattr(trainer, name, recording(getattr(trainer, name)))
    return found


def difference(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor | float = 0.0) -> float:
    """|found - expected| by |expected - start|, in the Euclidean norm."""
    return ((found - expected).norm() / (expected - start).norm()).item()


def losses(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What was logged of each update's losses, by name."""
    names = ("loss", "grad_norm", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg")
    logged = [entry for entry in history(folder, name) if {"loss", "loss/policy_avg"} & entry.keys()]
    return {key: torch.tensor([e[key] for e in logged], dtype=torch.float64) for key in names if key in logged[0]}


def by_hand(prompt, sd: float, seed: int) -> float:
    """An offset like no distribution: a few prompts far above, the rest lower the longer they are."""
    return sd * (2.0 if sum(prompt) % 3 == 0 else -0.15 * len(prompt))


def differences(parents: Path, advantages: list[torch.Tensor], monkeypatch, method: str) -> list[dict[str, float]]:
    """How far shifts change a stage's advantages, losses and weights, relative to what they are without one."""
    expected, found = None, []
    for delta in ("none", "normal", "by_hand"):
        advantages.clear()
        if delta == "by_hand":
            monkeypatch.setattr(stress, "added_shift", by_hand)
        name = f"{method}-{delta}"
        train(parents, name, method, added_shift=0.0 if delta == "none" else SD)
        taken = losses(parents, name) | {"advantages": torch.cat([part.flatten() for part in advantages])}
        assert len(advantages) == 4
        if expected is None:
            expected = taken
            continue
        start, end, other = (weights(parents, output) for output in ("sft", f"{method}-none", name))
        found.append({key: difference(taken[key], expected[key]) for key in expected})
        found[-1]["weights"] = difference(other, end, start)
        if "loss" in expected:  # a mean of advantages of both signs, so little is left: measured by their size
            size = expected["advantages"].square().mean().sqrt()
            found[-1]["loss"] = ((taken["loss"] - expected["loss"]).abs().max() / size).item()
        print(f"\n{name}: {found[-1]}")
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_shift_changes_nothing(parents, advantages, monkeypatch, method):
    """But for rounding: a score of size |delta| is off by up to 6e-8 |delta| in float32."""
    for found in differences(parents, advantages, monkeypatch, method):
        assert max(found.values()) <= TOLERANCE, found


def test_a_shift_changes_plain_ppo(parents, advantages, monkeypatch):
    """What the tests above would see if a baseline did not take the shift out."""
    for found in differences(parents, advantages, monkeypatch, "none"):
        assert min(found.values()) > 1000 * TOLERANCE, found


@pytest.fixture
def given(monkeypatch) -> list[tuple[list[int], list[int], float]]:
    """Each prompt and completion that PPOTrainer has scored from now on, up to its first padding, and its score."""
    found = []

    def record(model, sequences, pad, start):
        output = get_reward(model, sequences, pad, start)
        if isinstance(model, CentredReward):
            for ids, score in zip(sequences.tolist(), output[1].tolist(), strict=True):
                completion = [*ids[start:], pad]
                prompt = [token for token in ids[:start] if token != pad]
                found.append((prompt, completion[: completion.index(pad)], score))
        return output

    monkeypatch.setattr(ppo_trainer, "get_reward", record)
    return found


def test_centred_score_by_hand(parents):
    """Prompts of several lengths, scored in two parts; completions that end, that do not, with padding inside."""
    ctx = context(parents, "by-hand")
    pad, eos = ctx.tokenizer.pad_token_id, ctx.tokenizer.eos_token_id
    place = ctx.weights_of("reward")
    value = load_reward(ctx.loader, place, trainable=True).eval()
    prompts = prompts_of(ctx, [TASKS[i] for i in (3, 0, 5, 2, 1)])
    answers = [[70, 90, eos, pad], [12, 13, 14, 15], [80, pad, 90, eos], [eos, pad, pad, pad], [pad, 90, 91, eos]]
    scored = [[70, 90, eos], [12, 13, 14, 15], [80], [eos], []]
    inputs = scoring.padded(prompts, pad, torch.device("cpu"), "left")
    start = inputs["input_ids"].shape[1]
    assert len(set(map(len, prompts))) > 2

    subtraction = Subtraction(lambda prompts, scores: scores.new_tensor([len(p) / 3 for p in prompts]), 2.0, 7)
    centred = CentredReward(load_reward(ctx.loader, place), value, eos, subtraction)
    centred.rollout.see(inputs)
    sequences = torch.cat([inputs["input_ids"], torch.tensor(answers)], 1)
    scores, values = [], []
    with torch.no_grad():
        for rows in (slice(0, 2), slice(2, 5)):
            foretold, _, _ = get_reward(value, sequences[rows], pad, start)
            _, score, _ = get_reward(centred, sequences[rows], pad, start)
            scores += score.tolist()
            values += foretold[:, start - 1 : -1, 0].tolist()

    model = load_reward(ctx.loader, place)
    own = scoring.score(model, [p + c for p, c in zip(prompts, scored, strict=True)], pad)
    raw = np.array(own) + [stress.added_shift(prompt, 2.0, 7) for prompt in prompts]
    expected = raw - [len(prompt) / 3 for prompt in prompts]
    np.testing.assert_allclose(scores, expected, atol=1e-5)

    target = np.repeat(expected, [len(c) for c in scored])
    predicted = np.concatenate([row[: len(c)] for row, c in zip(values, scored, strict=True)])
    figures = {
        "objective/raw_scores": raw.mean(),
        "objective/raw_scores_sd": raw.std(),
        "objective/centred_scores": expected.mean(),
        "objective/centred_scores_sd": expected.std(),
        "completions/mean_length": (3 + 4 + 1 + 1 + 0) / 5,  # with eos
        "completions/missing_eos": 1 / 5,  # as PPOTrainer counts it for its penalty: padding inside does not matter
        "value/explained_variance": 1 - (target - predicted).var() / target.var(),
    }
    assert centred.observe() == pytest.approx(figures, abs=1e-5)
    assert centred.observe() == {}  # seen once


@pytest.fixture(scope="module")
def with_levels(of_kind, tmp_path_factory):
    """`with_levels(kind)`: the same parents with a reward model that has learnt a level for each prompt beside r."""
    folders = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(f"levels-{kind}")
            shutil.copytree(of_kind(kind), folders[kind], dirs_exist_ok=True)
            ctx = context(folders[kind], "levels", KINDS[kind])
            prompts, pad = prompts_of(ctx, TASKS), ctx.tokenizer.pad_token_id
            drawn = completions(ctx, "sft", prompts, Sampling(1.0, PPO["response_length"], 12), 8)
            reward = load_reward(ctx.loader, ctx.weights_of("reward"), trainable=True)
            scores = [scoring.score(reward, [p + ids for ids in d], pad) for p, d in zip(prompts, drawn, strict=True)]
            deltas = np.random.default_rng(0).normal(size=len(prompts)) * 5 * levels.within_sd(scores)
            targets = levels.targets_of(reward, prompts, drawn, deltas, pad)
            levels.refit(reward, prompts, drawn, targets, pad, steps=300, learning_rate=3e-3, prompts_per_step=8)
            after = [scoring.score(reward, [p + ids for ids in d], pad) for p, d in zip(prompts, drawn, strict=True)]
            learnt = [np.mean(a) - np.mean(b) for a, b in zip(after, scores, strict=True)]
            assert np.corrcoef(learnt, deltas)[0, 1] > 0.99
            levels.install(folders[kind] / "run", "reward", reward)
        return folders[kind]

    return folder


@pytest.mark.parametrize(("method", "kind"), [("sft_mean", "lora"), ("leave_one_out", "lora"), ("sft_mean", "full")])
def test_a_level_within_the_reward_model_is_not_in_the_advantages(
    of_kind, with_levels, given, advantages, method, kind
):
    """The value model starts from the reward model, level included, and must foretell what is left without it."""
    correlation, explained = {}, {}
    for folder in (of_kind(kind), with_levels(kind)):
        given.clear()
        advantages.clear()
        name = f"level-{method}"
        train(folder, name, method, top=KINDS[kind])
        means = torch.cat([part.sum(1) for part in advantages]) / torch.tensor([len(row[1]) for row in given])
        correlation[folder] = np.corrcoef(means, [score for *_, score in given])[0, 1]
        explained[folder] = [entry["value/explained_variance"] for entry in history(folder, name)]
    print(correlation, explained)
    assert explained[with_levels(kind)][0] >= -0.05
    assert correlation[with_levels(kind)] >= 0.95 * correlation[of_kind(kind)]


def test_prompts_that_are_not_trained_on_are_scored_as_they_are(parents):
    ctx = context(parents, "as-they-are")
    pad = ctx.tokenizer.pad_token_id
    reward, value = (load_reward(ctx.loader, ctx.weights_of("reward")) for _ in range(2))
    subtraction = Subtraction(lambda prompts, scores: pytest.fail("a baseline was taken off"), 2.0, 7)
    centred = CentredReward(reward, value, ctx.tokenizer.eos_token_id, subtraction)
    prompts = prompts_of(ctx, TASKS[:3])
    inputs = scoring.padded(prompts, pad, torch.device("cpu"), "left")
    centred.rollout.forget(inputs)
    sequences = torch.cat([inputs["input_ids"], torch.full((3, 1), 70)], 1)
    with torch.no_grad():
        _, scores, _ = get_reward(centred, sequences, pad, inputs["input_ids"].shape[1])
    model = load_reward(ctx.loader, ctx.weights_of("reward"))
    np.testing.assert_allclose(scores, scoring.score(model, [[*p, 70] for p in prompts], pad), atol=1e-5)
    assert centred.observe() == {}


def test_samples_shown_in_between_are_no_part_of_the_rollout(parents, given):
    training = {"total_episodes": 16, "num_sample_generations": 2}
    train(parents, "shown", "leave_one_out", training, added_shift=SD)
    assert len(given) > 16
    for entry in history(parents, "shown"):
        assert entry["objective/centred_scores"] == pytest.approx(0, abs=1e-5)


@pytest.fixture(scope="module")
def of_kind(parents, tmp_path_factory):
    """`of_kind(kind)`: the folder of a run whose SFT and reward stages are finished."""
    made = {"lora": parents}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_parents(tmp_path_factory.mktemp(kind), "sft", "reward", **KINDS[kind])
        return made[kind]

    return folder


def baseline_answers(ctx: StageContext, method: str) -> dict[tuple[int, ...], list[list[int]]]:
    """The completions that make each prompt's offline baseline, without the pipeline's store of them."""
    if method == "reference":
        found, eos = {}, [ctx.tokenizer.eos_token_id]
        for messages, answer in MIXED:
            ids = ctx.tokenizer(answer, add_special_tokens=False)["input_ids"] + eos
            found.setdefault(tuple(prompt_ids(ctx.tokenizer, messages)), []).append(ids)
        return found
    model, prompts = load_policy(ctx.loader, ctx.weights_of("sft")).eval(), prompts_of(ctx, TASKS)
    if method == "greedy":  # one by one, without padding
        sampling = Sampling(0.0, PPO["response_length"], 1)
        return {tuple(p): generate(model, [p], sampling, ctx.tokenizer) for p in prompts}
    sampling = Sampling(1.0, PPO["response_length"], 4)
    batches = [prompts[i : i + 4] for i in range(0, len(prompts), 4)]
    drawn = [[ids for b in batches for ids in generate(model, b, sampling, ctx.tokenizer, n)] for n in range(4)]
    assert len({json.dumps(draw) for draw in drawn}) == 4
    return {tuple(p): list(ids) for p, ids in zip(prompts, zip(*drawn, strict=True), strict=True)}


def write_mixed(folder: Path) -> dict:
    """The rows of `MIXED` in three formats, as one dataset."""
    tiny.write_rows(folder / "pairs.jsonl", [*TASKS[:4], {"prompt": TASKS[0]["prompt"], "completion": MIXED[-1][1]}])
    tiny.write_rows(folder / "compared.jsonl", tiny.comparisons()[4:7])
    dialogues = [{"messages": dialogue(*(m["content"] for m in before), last)} for before, last in MIXED[7:10]]
    tiny.write_rows(folder / "dialogues.jsonl", dialogues)
    return {"mixed": {"sources": [{"path": f"{name}.jsonl"} for name in ("pairs", "compared", "dialogues")]}}


@pytest.mark.parametrize(
    ("method", "kind"),
    [("sft_mean", kind) for kind in KINDS] + [("greedy", "lora"), ("reference", "lora")],
)
def test_ppo_is_given_the_score_less_the_baseline(of_kind, given, method, kind):
    """r(x, y) + delta(x) - b(x), each computed apart from the pipeline's run; the penalty for eos comes after that."""
    folder = of_kind(kind)
    top, own = KINDS[kind], {}
    if method == "reference":
        top, own = top | {"data": write_mixed(folder)}, {"data": "mixed"}
    training = {"total_episodes": 16, "missing_eos_penalty": PENALTY}
    name = f"given-{method}"
    record = train(folder, name, method, training, top, added_shift=SD, **own)
    assert record.metrics["updates"] == 2 and len(given) == 16

    ctx = context(folder, "apart", top)
    model, pad = load_reward(ctx.loader, ctx.weights_of("reward")).eval(), ctx.tokenizer.pad_token_id
    answers = baseline_answers(ctx, method)
    shares = []
    for prompt, completion, score in given:
        of_baseline = scoring.score(model, [[*prompt, *ids] for ids in answers[tuple(prompt)]], pad, 1)
        (own_score,) = scoring.score(model, [prompt + completion], pad)
        # The shift is in the baseline as in the score.
        assert score == pytest.approx(own_score - np.mean(of_baseline), abs=1e-4)
        shares.append(ctx.tokenizer.eos_token_id not in completion)
    for update, entry in enumerate(history(folder, name)):
        ours = slice(8 * update, 8 * update + 8)
        assert entry["completions/missing_eos"] == np.mean(shares[ours])
        assert entry["completions/mean_length"] == np.mean([len(completion) for _, completion, _ in given[ours]])
        assert entry["objective/centred_scores"] == pytest.approx(np.mean([score for *_, score in given[ours]]))
        penalised = entry["objective/centred_scores"] - PENALTY * entry["completions/missing_eos"]
        assert entry["objective/scores"] == pytest.approx(penalised, abs=1e-5)
        shifts = [stress.added_shift(prompt, SD, 0) for prompt, *_ in given[ours]]
        own_scores = scoring.score(model, [prompt + completion for prompt, completion, _ in given[ours]], pad)
        assert entry["objective/raw_scores"] == pytest.approx(np.mean(np.add(own_scores, shifts)), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_leave_one_out_trains(of_kind, given, kind):
    """Every prompt has its whole group, whose centred scores sum to 0 whatever the shift."""
    folder = of_kind(kind)
    before = weights(folder, "sft")
    train(folder, "groups", "leave_one_out", {"total_episodes": 16}, KINDS[kind], added_shift=SD)
    for i in range(0, 16, 4):
        group = given[i : i + 4]
        assert len({tuple(prompt) for prompt, *_ in group}) == 1
        assert len({tuple(completion) for _, completion, _ in group}) > 1
        assert sum(score for *_, score in group) == pytest.approx(0, abs=1e-4)
    assert not torch.equal(weights(folder, "groups"), before)


def files_of(folder: Path) -> dict[str, bytes]:
    """The store of completions and scores."""
    return {path.name: path.read_bytes() for path in (folder / "run" / "cache").glob("*.json*") if path.stat().st_size}


def test_a_second_stage_samples_and_scores_nothing(parents, capsys):
    """With the same policy, reward model and sampling, whatever else differs; the shift is added to what is kept."""
    few = {"total_episodes": 8}
    train(parents, "first", "sft_mean", few, seed=5)
    before, said = files_of(parents), capsys.readouterr().out
    assert "sampling 48 completions from sft" in said and "scoring completions of 12 prompts" in said
    train(parents, "second", "sft_mean", few | {"kl_coef": 0.2}, seed=5, added_shift=SD)
    said = capsys.readouterr().out
    assert "sampling" not in said and "scoring" not in said
    assert files_of(parents) == before
    train(parents, "third", "greedy", few, seed=5)
    assert "sampling 12 completions from sft" in capsys.readouterr().out


def test_completions_are_drawn_once(parents, capsys):
    ctx, sampling = context(parents, "draws"), Sampling(1.0, 6, 5, seed=77)
    prompts, before = prompts_of(ctx, TASKS), files_of(parents)
    first = completions(ctx, "sft", prompts, sampling, 2)
    (name,) = files_of(parents).keys() - before.keys()
    kept = files_of(parents)[name]
    assert [len(drawn) for drawn in first] == [2] * 12 and "sampling 24 completions" in capsys.readouterr().out

    assert completions(ctx, "sft", prompts, sampling, 2) == first
    assert "sampling" not in capsys.readouterr().out and files_of(parents)[name] == kept

    more = completions(ctx, "sft", prompts, sampling, 3)  # only the third draw is new
    assert [drawn[:2] for drawn in more] == first and "sampling 12 completions" in capsys.readouterr().out

    file = parents / "run" / "cache" / name
    file.write_bytes(kept[:-30])  # its last batch, of two prompts, was half written when the process was killed
    assert completions(ctx, "sft", prompts, sampling, 2) == first
    assert "sampling 2 completions" in capsys.readouterr().out
    assert completions(ctx, "sft", prompts, sampling, 2) == first  # the new line is whole
    assert "sampling" not in capsys.readouterr().out

    completions(ctx, "base", prompts, sampling)
    completions(ctx, "sft", prompts, dataclasses.replace(sampling, seed=78))
    assert len(files_of(parents).keys() - before.keys()) == 3
    identities = {identity_of(context(parents, "other", top), "base") for top in KINDS.values()}
    assert len(identities) == 2  # a quantised base is another policy


def test_changed_parents_are_sampled_and_scored_anew(parents, tmp_path, capsys):
    """The store is kept by the content of policy and reward model, not by their names."""
    folder = tmp_path / "changed"
    shutil.copytree(parents, folder)
    shutil.rmtree(folder / "run" / "cache", ignore_errors=True)
    counts = []
    for changed in (None, "reward", "sft"):
        if changed is not None:
            spec = PARENTS[changed] | {"training": PARENTS[changed]["training"] | {"max_steps": 3}}
            config = load(write_config(folder, "changed", {changed: spec}))
            for name in ("sft", "reward"):
                stage.run(config, name)
        capsys.readouterr()
        own = {} if changed is None else {changed: spec}
        options = options_of("sft_mean")
        options["training"] = options["training"] | {"total_episodes": 8}
        stage.run(load(write_config(folder, "changed", own | {"ppo": options})), "ppo")
        said = capsys.readouterr().out
        counts.append(("sampling" in said, "scoring" in said, len(files_of(folder))))
    assert counts == [(True, True, 2), (False, True, 3), (True, True, 5)]


def test_reliability_is_spearman_brown():
    """k parallel measures of reliability r have that of their mean: the ratio of true to total variance."""
    for between, within, number in ((1.0, 3.0, 4), (2.0, 0.5, 2), (0.3, 0.3, 1)):
        expected = between / (between + within / number)
        assert reliability(between / (between + within), number) == pytest.approx(expected)
    assert (reliability(0.0, 4), reliability(1.0, 4), reliability(0.5, 3)) == (0, 1, 0.75)


@pytest.mark.parametrize(("weight", "expected"), [(1.0, [2, 6, 2]), (0.0, [4, 4, 4]), (0.25, [3.5, 4.5, 3.5])])
def test_offline_baseline_by_hand(weight, expected):
    """Shrunk towards the mean of the prompts' means, each prompt counting once."""
    baseline = Offline({(1,): [1.0, 3.0], (2, 3): [6.0]}, weight)
    found = baseline([(1,), (2, 3), (1,)], torch.tensor([100.0, 200.0, 300.0]))
    assert found.tolist() == expected and found.dtype == torch.float32


SCORES = torch.tensor([1.0, 2, 6, 10, 20, 60], dtype=torch.float64)  # two prompts with three completions each
OWN, OTHERS = [4, 3.5, 1.5, 40, 35, 15], [30, 30, 30, 3, 3, 3]


@pytest.mark.parametrize("weight", [1.0, 0.0, 0.25])
def test_leave_one_out_by_hand(weight):
    baseline = LeaveOneOut(3, weight)
    expected = [weight * own + (1 - weight) * others for own, others in zip(OWN, OTHERS, strict=True)]
    assert baseline([(1,)] * 3 + [(2,)] * 3, SCORES).tolist() == expected
    jacobian = torch.autograd.functional.jacobian(lambda scores: baseline([], scores), SCORES)
    assert jacobian.diagonal().tolist() == [0] * 6  # no score is in its own baseline
    assert torch.allclose(jacobian.sum(1), torch.ones(6, dtype=torch.float64))  # a mean: a common shift passes through
    for i in range(6):
        moved = SCORES.clone()
        moved[i] += 64
        assert baseline([], moved)[i] == baseline([], SCORES)[i]


def test_one_group_alone_has_nothing_to_shrink_toward():
    """A shift common to all scores passes through; towards 0 it would not."""
    assert LeaveOneOut(3, 0.25)([], SCORES[:3]).tolist() == OWN[:3]


@pytest.mark.parametrize(
    ("method", "expected"),
    [("sft_mean", reliability(0.5, 4)), ("greedy", 0.5), ("reference", 0.5), ("leave_one_out", reliability(0.5, 3))],
)
def test_shrinkage_is_by_the_measured_icc(parents, monkeypatch, capsys, method, expected):
    """A baseline of k scores counts by their reliability; leave-one-out has one score less."""
    ctx = context(parents, "shrunk", prompt_baseline=method, baseline_shrinkage=True)
    assert ctx.stage.shift == "shift"
    measured = {"icc": {"value": 0.5, "low": 0.4, "high": 0.6}}
    monkeypatch.setattr(StageContext, "record_of", lambda _, name: SimpleNamespace(metrics=measured))
    reward = load_reward(ctx.loader, ctx.weights_of("reward"))
    answers = {(5, 6): [[7, 8], [9]], (5, 7): [[10]]}
    baseline = make_baseline(ctx, reward, answers, 4)
    assert baseline._weight == expected and f"counts {expected:.2f}" in capsys.readouterr().out
    if method != "leave_one_out":
        means = [np.mean(scoring.score(reward, [[*p, *ids] for ids in answers[p]], 0)) for p in answers]
        shrunk = [expected * mean + (1 - expected) * np.mean(means) for mean in means]
        np.testing.assert_allclose(baseline(list(answers), torch.zeros(2)), shrunk, atol=1e-5)
    measured["icc"] = None
    with pytest.raises(UserError, match="ICC"):
        make_baseline(ctx, reward, answers, 4)


def test_shrinkage_reads_the_stage_of_type_shift(parents):
    """It is an input of the stage: measured anew, the policy is trained anew."""
    few = {"total_episodes": 8}
    record = train(parents, "by-report", "leave_one_out", few, baseline_shrinkage=True)
    assert record.parents["shift"] == "shift"
    assert math.isfinite(record.metrics["centred_score"])


class Batches:
    """What a dataloader of left-padded prompts gives: batches of `size`, and again when asked again."""

    def __init__(self, prompts: list[list[int]], size: int):
        self.batches = [
            scoring.padded(prompts[i : i + size], 0, torch.device("cpu"), "left") for i in range(0, len(prompts), size)
        ]

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_every_prompt_of_a_batch_gets_its_group(group):
    """And the prompts are handed out in the order of the rows, in chunks of any size."""
    prompts = [[10 + i] * (1 + i % 3) for i in range(16)]
    rollout, seen = Rollout(), []
    for batch in Watched(Batches(prompts, 8), rollout.see, group):
        rows = [
            [token for token, real in zip(*row, strict=True) if real]
            for row in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        ]
        assert len(rows) == 8 and rollout.length == batch["input_ids"].shape[1] == 3
        taken = rollout.take(3) + rollout.take(3) + rollout.take(2)
        assert list(map(list, taken)) == rows
        with pytest.raises(AssertionError, match="more completions"):
            rollout.take(1)
        seen += rows
    assert seen == [prompt for prompt in prompts for _ in range(group)]


def test_watching_does_not_change_what_is_trained_on():
    batches = Batches([[5, 6], [7], [8], [9, 9, 9]], 2)
    seen = []
    for found, expected in zip(Watched(batches, seen.append), batches, strict=True):
        assert seen[-1] is found and found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


STOP = {"eval_data": "heldout", "eval_every": 1, "num_eval_prompts": 6}
# A length that no completion has, from the third update on.
IMPOSSIBLE = Range("length", 1000.0, math.inf, 1, "none", "none", warm_up=2)


@pytest.mark.parametrize(("method", "stops_at"), [("sft_mean", 3), ("rloo", 3), ("grpo", 3)])
def test_an_alarm_ends_it_with_the_best_policy(parents, monkeypatch, capsys, method, stops_at):
    monkeypatch.setattr(watchdog, "HEALTHY", (IMPOSSIBLE,))
    look, states = best_policy.BestPolicy._look, {}

    def look_and_keep(self, update, **reported):
        look(self, update, **reported)
        states[update] = {name: p.detach().clone() for name, p in self.parameters.items()}

    monkeypatch.setattr(best_policy.BestPolicy, "_look", look_and_keep)
    name = f"{method}-stop"
    # A learning rate that makes the policy worse.
    record = train(parents, name, method, {"learning_rate": 5e-2}, on_alarm="stop", **STOP)
    metrics = record.metrics
    assert metrics["updates" if "updates" in metrics else "steps"] == stops_at
    assert [(alarm["measure"], alarm["update"]) for alarm in metrics["alarms"]] == [("length", stops_at)]
    scores = {entry["update"]: entry["score"] for entry in metrics["held_out_scores"]}
    assert list(scores) == list(states) == list(range(stops_at if method == "sft_mean" else stops_at + 1))
    best = max(scores, key=scores.get)
    assert metrics["kept_update"] == best
    output = load_file(parents / "run" / name / "output" / "adapter_model.safetensors")
    for update, state in states.items():
        saved = {key.replace(".default.", "."): value for key, value in state.items()}
        assert saved.keys() == output.keys()
        assert all(torch.equal(saved[key], output[key]) for key in saved) == (update == best), update
    said = capsys.readouterr().out
    assert "watchdog: length is" in said and f"the policy of update {best} is kept" in said

    # Before the first update it is the parent's score on the held-out prompts, computed apart.
    ctx = context(parents, "apart")
    size = PPO["local_rollout_forward_batch_size"] if method == "sft_mean" else 6
    sampling, prompts = Sampling(1.0, 10, size), prompts_of(ctx, HELD_OUT)[:6]
    policy = load_policy(ctx.loader, ctx.weights_of("sft")).eval()
    batches = [prompts[i : i + size] for i in range(0, 6, size)]
    drawn = [p + ids for b in batches for p, ids in zip(b, generate(policy, b, sampling, ctx.tokenizer), strict=True)]
    reward = load_reward(ctx.loader, ctx.weights_of("reward"))
    expected = np.mean(scoring.score(reward, drawn, ctx.tokenizer.pad_token_id))
    assert scores[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["leave_one_out", "rloo", "grpo"])
def test_looking_at_held_out_prompts_changes_nothing(parents, method):
    """Not a bit of the weights, where alarms only warn."""
    short = {"total_episodes": 16} if method == "leave_one_out" else {"max_steps": 4}
    train(parents, f"{method}-blind", method, short)
    record = train(parents, f"{method}-watched", method, short, **STOP)
    assert torch.equal(weights(parents, f"{method}-watched"), weights(parents, f"{method}-blind"))
    assert len(record.metrics["held_out_scores"]) > 2 and "kept_update" not in record.metrics


@pytest.mark.parametrize("method", ["leave_one_out", "grpo"])
def test_a_policy_that_diverges_is_an_alarm_and_the_best_is_kept(parents, capsys, method):
    """Its weights are no numbers after the first update: nothing could be sampled any more."""
    record = train(parents, f"{method}-diverged", method, {"learning_rate": 1e38}, on_alarm="stop", **STOP)
    metrics = record.metrics
    assert [(alarm["measure"], alarm["update"]) for alarm in metrics["alarms"]] == [("weights", 1)]
    assert metrics["kept_update"] == 0 and metrics["held_out_scores"][0]["score"] is not None
    assert torch.equal(weights(parents, f"{method}-diverged"), weights(parents, "sft"))
    assert "watchdog: weights is nan at update 1" in capsys.readouterr().out


SHIPPED = {"repetition_penalty": 3.0, "min_p": 0.5, "no_repeat_ngram_size": 1}


def test_what_a_model_is_shipped_with_plays_no_part(tmp_path):
    """A repetition penalty would be in what is sampled but in no log-probability, which PPO shows as KL."""
    config = load(write_config(tmp_path, "shipped", {"ppo": options_of("none")}))
    path = tmp_path / "model" / "generation_config.json"
    plain = path.read_text()
    path.write_text(json.dumps(json.loads(plain) | SHIPPED))
    for name in ("sft", "reward", "shift", "ppo"):
        stage.run(config, name)
    assert history(tmp_path, "ppo")[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    samples = (tmp_path / "run" / "shift" / "output" / "samples.jsonl").read_text()
    path.write_text(plain)
    shutil.rmtree(tmp_path / "run")
    for name in ("sft", "reward", "shift"):
        stage.run(config, name)
    assert (tmp_path / "run" / "shift" / "output" / "samples.jsonl").read_text() == samples


LOO = {"prompt_baseline": "leave_one_out"}
SMALL = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
WRONG = [
    (LOO, SMALL, "per_device_train_batch_size: 6 completions do not make whole groups of 4"),
    (LOO, {"local_rollout_forward_batch_size": 6}, "local_rollout_forward_batch_size: 6 completions do not make"),
    (LOO | {"baseline_completions": 3}, {"local_rollout_forward_batch_size": 6}, "8 completions .* groups of 3"),
    ({"baseline_shrinkage": True}, {}, "baseline_shrinkage: needs a `prompt_baseline`"),
    ({"on_alarm": "stop"}, {}, "`on_alarm: stop` needs `eval_data`"),
    ({"prompt_baseline": "sft_mean", "baseline_completions": 1}, {}, "baseline_completions: .* 2, got 1"),
    ({"prompt_baseline": "mean"}, {}, "prompt_baseline: .*leave_one_out.*, got 'mean'"),
    ({"added_shift": -1.0}, {}, "added_shift: .*, got -1.0"),
]


@pytest.mark.parametrize(("own", "training", "message"), WRONG)
def test_config_errors_are_one_message(tmp_path, own, training, message):
    options = options_of("none") | own
    options["training"] = options["training"] | training
    with pytest.raises(UserError, match=message) as error:
        load(write_config(tmp_path, "wrong", {"ppo": options}))
    assert "1 problem in the config" in str(error.value)


def test_shrinkage_needs_a_report(tmp_path):
    stages = {name: spec for name, spec in PARENTS.items() if name != "shift"}
    path = write_config(tmp_path, "wrong", {"ppo": options_of("sft_mean") | {"baseline_shrinkage": True}})
    tiny.edit(path, {"stages": stages | {"ppo": options_of("sft_mean") | {"baseline_shrinkage": True}}})
    with pytest.raises(UserError, match="a stage of type shift that measured the ICC"):
        load(path)


def test_reference_needs_answers(parents):
    with pytest.raises(UserError, match=r"heldout.*prompt.*demonstrations"):
        train(parents, "no-answers", "reference", data="heldout")


def test_alarms_need_a_reward_model_to_choose_the_policy_by(parents):
    """The score on held-out prompts is the reward model's."""
    (parents / "rewards.py").write_text("def shorter(prompt, completion):\n    return -len(completion)\n")
    own = {"reward_functions": ["rewards:shorter"], **STOP}
    with pytest.raises(UserError, match=r"eval_data.*reward"):
        train(parents, "by-function", "rloo", **own)


@pytest.mark.slow
def test_two_processes(parents, tmp_path):
    """They draw and score together what one process does alone, and train with it."""
    small = {"per_device_train_batch_size": 2, "total_episodes": 16}
    shutil.copytree(parents, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "cache", ignore_errors=True)
    stages = {f"ppo-{method}": options_of(method) for method in ("sft_mean", "leave_one_out")}
    for options in stages.values():
        options |= {"added_shift": SD, "training": options["training"] | small} | STOP
        options |= {"on_alarm": "stop", "num_eval_prompts": 4}  # one batch: the other process has none
    config = write_config(tmp_path, "two", stages)
    output = rlhf("run", config, "--accelerate-config", ROOT / "accelerate_configs" / "cpu_2_processes.yaml")
    found = manifest.read(tmp_path / "run").stages
    assert stages.keys() <= found.keys(), output[-3000:]
    for name in stages:
        assert (found[name].world_size, found[name].metrics["updates"]) == (2, 2)
        assert [entry["update"] for entry in found[name].metrics["held_out_scores"]] == [0, 1, 2]
    assert found["ppo-leave_one_out"].metrics["centred_score"] == pytest.approx(0, abs=1e-5)
    together = stored(tmp_path)
    for file in (tmp_path / "run" / "cache").iterdir():
        file.unlink()
    train(tmp_path, "alone", "sft_mean", small)
    alone = stored(tmp_path)
    assert alone.keys() <= together.keys() and len(alone) == 2
    for name, expected in alone.items():
        assert together[name].keys() == expected.keys()
        for key, value in expected.items():
            assert together[name][key] == (pytest.approx(value, abs=1e-5) if name.startswith("scores") else value)


def stored(folder: Path) -> dict[str, dict]:
    """What is kept in a run's store, by file and key."""
    found = {}
    for name, content in files_of(folder).items():
        entries = [json.loads(line) for line in content.splitlines() if line]
        key, value = ("answers", "scores") if name.startswith("scores") else ("batch", "completions")
        found[name] = {entry[key]: entry[value] for entry in entries}
    return found
