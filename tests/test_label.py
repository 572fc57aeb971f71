"""`rlhf label`: which pairs are asked, that no answer is ever lost or counted twice, and what follows from answers."""

import hashlib
import http.client
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
from label_runs import about, made, rows_of, start
from rich.console import Console
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from pipeline.chain import staleness
from pipeline.config.load import load
from pipeline.data import heldout
from pipeline.export import source
from pipeline.label import command, evaluated, figures, folder, pairs, result, run, sample
from pipeline.label.answers import Answers
from pipeline.label.asked import Asked
from pipeline.label.labels import Labels
from pipeline.label.pairs import Completion, Pair
from pipeline.models import run_models
from pipeline.models.generation import Sampling, generate
from pipeline.models.loading import load_policy
from pipeline.records import manifest
from pipeline.records.manifest import Origin
from pipeline.show import results
from pipeline.system import digests

N = 12


def opened(place: Path, run_dir: Path, **options) -> Labels:
    """The labels in a folder, begun if they were not, by what the command itself does."""
    asked = Asked(run_dir, to=place, **options)
    place.mkdir(exist_ok=True)
    return command._opened(asked, asked.name(), place, manifest.read(run_dir), Console(quiet=True))


@pytest.fixture(scope="module")
def begun_once(finished_run, tmp_path_factory, _imported):
    """Labels of the finished run's last policy, without an answer."""
    place = tmp_path_factory.mktemp("labels") / "ann"
    opened(place, finished_run / "runs" / "tiny", pairs=N, twice=0.5, by="ann")
    return place


@pytest.fixture
def begun(begun_once, finished_run, tmp_path):
    """A copy of the labels, opened."""
    place = shutil.copytree(begun_once, tmp_path / "ann")
    return opened(place, finished_run / "runs" / "tiny")


def ask(port: int, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    if body is not None:
        headers["Content-Type"] = "application/json"
    method = "GET" if body is None else "POST"
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


# What is asked


def test_pairs_are_of_the_last_policy_and_the_least_sure_come_first(begun, finished_run):
    run_dir = finished_run / "runs" / "tiny"
    assert len(begun.pairs) == N
    assert {one.policy for pair in begun.pairs for one in pair.completions} == {"sft"}
    margins = [abs(pair.margin) for pair in begun.pairs]
    assert margins == sorted(margins) and margins[0] < margins[-1]
    trained_on = {row["prompt"] for row in tiny.chain_rows()["demos"]}
    assert {pair.prompt[-1]["content"] for pair in begun.pairs} <= trained_on
    shown: dict = {}
    recorded = manifest.read(run_dir)
    exec(results.snippet(run_dir, recorded, recorded.stages["reward"]), shown)  # the code that `rlhf status` prints
    compared = 0
    for pair in begun.pairs:
        for one in pair.completions:
            assert one.text.strip()
            text = shown["tokenizer"].apply_chat_template(pair.prompt, tokenize=False, add_generation_prompt=True)
            ids = shown["tokenizer"](text + one.text + "<eos>" * one.ended, return_tensors="pt")
            if ids["input_ids"].shape[1] - len(shown["tokenizer"](text)["input_ids"]) == one.length:  # same tokens
                compared += 1
                with torch.no_grad():
                    assert shown["model"](**ids).logits.item() == pytest.approx(one.score, abs=1e-5)
    assert compared > 0


def test_one_completion_of_each_of_two_policies(finished, cli, tmp_path):
    """Each is what its own policy gives, loaded by the code that `rlhf status` prints.

    Where all completions are equal or empty there is no pair: here at temperature 0, where only special tokens come.
    """
    both = ("pretrain", "sft")
    options = ("--policy", "pretrain", "--policy", "sft", "--temperature", 0, "--order", "random")
    code, _, error = cli("label", finished.run_dir, *options)
    assert code == 2 and "all pairs of completions were equal or empty" in error
    recorded = manifest.read(finished.run_dir)
    record = recorded.stages["sft"]
    adapter = finished.run_dir / "sft" / "output" / "adapter_model.safetensors"
    torch.manual_seed(0)  # after two steps its policy is still that of pretrain
    save_file({name: weight + torch.randn_like(weight) for name, weight in load_file(adapter).items()}, adapter)
    files = record.output.files | digests.checksums(finished.run_dir, [adapter.parent])
    record = record.model_copy(update={"output": record.output.model_copy(update={"files": files})})
    manifest.write(finished.run_dir, recorded.model_copy(update={"stages": recorded.stages | {"sft": record}}))
    labels = opened(tmp_path / "two", finished.run_dir, policies=both, pairs=4, order="random")
    sampled: dict[tuple[str, int], list[str]] = {}
    for name in both:
        shown: dict = {}
        exec(results.snippet(finished.run_dir, recorded, recorded.stages[name]), shown)
        tokenizer = shown["tokenizer"]
        prompts = [
            tokenizer(tokenizer.apply_chat_template(pair.prompt, tokenize=False, add_generation_prompt=True))
            for pair in labels.pairs
        ]
        ids = [prompt["input_ids"] for prompt in prompts]
        for draw in (0, 1):
            drawn = generate(shown["model"].eval(), ids, Sampling(1.0, 8, 4, 0), tokenizer, draw)
            sampled[name, draw] = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    for number, name in enumerate(both):
        assert {pair.completions[number].policy for pair in labels.pairs} == {name}
        assert [pair.completions[number].text for pair in labels.pairs] == sampled[name, number]
        assert sampled["sft", number] != sampled["pretrain", number]


def test_prompts_of_the_evaluation_are_left_out(finished, cli, tmp_path):
    """Of a dataset that is split and of a file, whatever the spacing and case; the rest is asked, again and again."""
    (tmp_path / "yes.py").write_text("def judge(prompt, completion):\n    return len(completion)\n")
    config = load(finished.config)
    share = config.data["prompts"].heldout
    prompts = [row["prompt"] for row in tiny.chain_rows()["prompts"]]
    keys = {prompt: heldout.key({"prompt": [{"role": "user", "content": prompt}]}) for prompt in prompts}
    held_out = {prompt for prompt in prompts if keys[prompt] < share * 2**64}
    assert 0 < len(held_out) < 6
    file = tmp_path / "mine.jsonl"
    tiny.write_rows(file, [{"prompt": "A new prompt."}, *({"prompt": f" {one.upper()} "} for one in held_out)])
    for given, expected in (("prompts", set(prompts) - held_out), (file, {"A new prompt."})):
        place = tmp_path / "labels" / Path(given).stem
        options = ("--prompts", given, "--judge", "yes:judge", "--pairs", 30, "--to", place)
        code, shown, error = cli("label", finished.run_dir, *options)
        assert (code, error) == (0, "")
        total = len(expected) + len(held_out)
        assert f"{len(held_out)} of {total} rows of {given} have a prompt that the run is evaluated on" in shown
        assert {pair.prompt[0]["content"] for pair in pairs.read(place / "pairs.jsonl")} == expected
        assert about(place)["prompts"] | {"fingerprint": ""} == {
            "given": str(given),
            "fingerprint": "",
            "rows": total,
            "held_out": len(held_out),
            "used": len(expected),
        }
        texts = [tuple(sorted(c.text for c in pair.completions)) for pair in pairs.read(place / "pairs.jsonl")]
        assert len(set(texts)) == len(texts) == 30


@pytest.fixture
def with_evaluation(finished):
    """The finished run, with the record that its evaluation would have: on a share of `prompts`."""
    recorded = manifest.read(finished.run_dir)
    config = load(finished.config)
    inputs = staleness.identify(config, "evaluate", recorded).inputs
    metrics = {"baseline": "sft", "policies": {"sft": {"prompts": 1}}}
    datasets = {"data": {"dataset": "prompts"}}
    settings = {"max_new_tokens": 6, "temperature": 0.5, "max_prompt_length": 64, "batch_size": 3}
    record = tiny.make_record(type="evaluate", inputs=inputs, datasets=datasets, metrics=metrics, config=settings)
    manifest.write(finished.run_dir, recorded.model_copy(update={"stages": recorded.stages | {"evaluate": record}}))
    return finished


def held_out(run, stages=None, **data) -> list[str]:
    """What the run's config does not hold out any more, after a change of its stages or of the section `prompts`."""
    sections = tiny.CHAIN["data"] | {"prompts": {"path": "prompts.jsonl", **data}}
    tiny.edit(run.config, {"data": sections, "stages": stages or tiny.CHAIN["stages"]})
    return evaluated.differences(load(run.config), manifest.read(run.run_dir))


def test_what_the_run_was_evaluated_on_must_still_be_held_out(with_evaluation):
    """More may be held out now, and a dataset may have another name; less is told, whatever has changed."""
    stages = tiny.CHAIN["stages"]
    on_comparisons = stages | {"evaluate": stages["evaluate"] | {"data": "comparisons"}}
    without_ppo = {name: stage for name, stage in stages.items() if name != "ppo"}  # then nothing trains on `prompts`
    assert held_out(with_evaluation) == held_out(with_evaluation, heldout=0.2) == []
    assert held_out(with_evaluation, without_ppo) == []
    (lower,) = held_out(with_evaluation, heldout=0.01)
    assert lower == "evaluate held out 0.05 of the prompts of prompts, now it is 0.01 of the prompts, by `heldout`"
    assert held_out(with_evaluation, limit=20)[0].startswith("prompts has changed since evaluate read it")
    assert held_out(with_evaluation, on_comparisons) == ["evaluate was evaluated on prompts, and now no stage is"]


def test_labels_need_what_the_run_was_evaluated_on(with_evaluation, cli, tmp_path):
    """A file of other prompts is taken all the same, which is said and on record."""
    (tmp_path / "yes.py").write_text("def judge(prompt, completion):\n    return len(completion)\n")
    config = with_evaluation.config  # the last command named that of the run which this one is a copy of
    options = ("label", with_evaluation.run_dir, "--config", config, "--judge", "yes:judge", "--pairs", 2, "--to")
    file = tmp_path / "prompts.jsonl"
    tiny.write_rows(file, tiny.chain_rows()["prompts"][1:])
    code, _, error = cli(*options, "refused")
    assert code == 2 and error.count("\n") == 1
    assert "does not hold out what the run was evaluated on: prompts has changed since evaluate read it" in error
    assert "Put it back as it was, or give a file of other prompts with --prompts" in error
    mine = tmp_path / "mine.jsonl"
    tiny.write_rows(mine, [{"prompt": "A new prompt."}, {"prompt": "Another new one."}])
    code, shown, error = cli(*options, "taken", "--prompts", mine)
    assert (code, error) == (0, "") and "nobody can tell whether" in shown and "since prompts has changed" in shown
    assert len(about(tmp_path / "taken")["prompts"]["not_compared"]) == 1


def test_completions_are_sampled_as_in_the_last_finished_evaluation(with_evaluation):
    """The config may say something else by now, and may have other evaluations before that one."""
    config = load(with_evaluation.config)
    recorded = manifest.read(with_evaluation.run_dir)
    section = run.sampling_of(recorded, config)
    sampled = (section.max_new_tokens, section.temperature, section.max_prompt_length, section.batch_size)
    assert sampled == (6, 0.5, 64, 3)
    assert run.sampling_of(recorded.without(["evaluate"]), config).max_new_tokens == 8  # what the config says


def test_policies_are_loaded_with_the_runs_attention(finished):
    recorded = manifest.read(finished.run_dir)
    manifest.write(finished.run_dir, recorded.model_copy(update={"model": {"attn_implementation": "eager"}}))
    found = source.find(finished.run_dir, "sft")
    tokenizer = run_models.tokenizer(finished.run_dir, recorded)
    model = sample._loaded(load_policy, found, tokenizer)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("number", [1, 2, 3, 19, 100])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_questions(number, share):
    """Each pair once, a share of them again: later, and with the sides swapped."""
    lefts = []
    for seed in range(20):
        drawn = pairs.arranged(made(number), share, seed)
        asked = pairs.questions(drawn, seed)
        assert pairs.questions(drawn, seed) == asked
        firsts = [question for question in asked if not question.again]
        seconds = [question for question in asked if question.again]
        assert [question.pair for question in firsts] == list(range(number))
        assert len(seconds) == (round(share * number) if number > 1 else 0)
        assert len({question.number for question in asked}) == len(asked)
        for question in seconds:
            before = asked.index(firsts[question.pair])
            assert question.left == 1 - firsts[question.pair].left
            gap = asked.index(question) - before - 1
            assert gap >= (9 if number == 100 else 1 if number > 3 else 0), (seed, question)
        lefts += [question.left for question in firsts]
    if len(lefts) > 300:
        assert 0.4 < sum(lefts) / len(lefts) < 0.6


# Answers


def test_a_file_of_answers_can_be_cut_anywhere(tmp_path):
    """As a kill cuts it: lines before the cut count, the rest does not, and what follows is kept."""
    whole = tmp_path / "whole"
    answers = Answers(whole)
    states = [[]]
    for step in range(6):
        if step == 3:
            answers.undo()
        else:
            answers.add(step, ("left", "right", "tie", "skip")[step % 4], 1.5)
        states.append([(one.question, one.opinion) for one in answers.standing])
    assert states[-1] == [(0, "left"), (1, "right"), (4, "left"), (5, "right")]
    content = whole.read_bytes()
    for cut in range(len(content) + 1):
        file = tmp_path / "cut"
        file.write_bytes(content[:cut])
        answers = Answers(file)
        complete = len([line for line in content[:cut].split(b"\n") if line.endswith(b"}")])
        assert [(one.question, one.opinion) for one in answers.standing] == states[complete]
        answers.add(9, "tie", 2.0)
        assert [one.question for one in Answers(file).standing] == [*(q for q, _ in states[complete]), 9]


def test_answers_become_comparisons(begun):
    """Ties and skips do not; of pairs asked twice those with one answer, once."""
    for _ in range(N // 2):
        begun.answer(begun.next, "left", 1.0)
    assert len(rows_of(begun.place)) == len({question.pair for question in begun.questions[: N // 2]})
    begun.undo()
    begun.answer(begun.next, "tie", 1.0)
    while begun.answers.standing:
        begun.undo()
    assert rows_of(begun.place) == []
    while begun.next is not None:
        question = begun.next
        opinion = "skip" if question.pair == 0 else "tie" if question.pair == 1 else None
        better = 1 if question.again and question.pair % 4 == 2 else 0  # changes its mind on some
        begun.answer(question, opinion or ("left" if question.left == better else "right"), 1.0)
    twice = {pair for pair in range(N) if begun.pairs[pair].twice}
    changed = {pair for pair in twice if pair % 4 == 2}
    expected = [pair for pair in range(N) if pair not in {0, 1, *changed}]
    assert len(twice) == N // 2 and changed
    assert rows_of(begun.place) == [
        {
            "prompt": begun.pairs[pair].prompt,
            "chosen": [{"role": "assistant", "content": begun.pairs[pair].completions[0].text}],
            "rejected": [{"role": "assistant", "content": begun.pairs[pair].completions[1].text}],
        }
        for pair in expected
    ]
    text = (begun.place / "comparisons.jsonl").read_bytes()
    shown = about(begun.place)
    assert shown["comparisons"]["sha256"] == hashlib.sha256(text).hexdigest()
    assert (shown["comparisons"]["rows"], shown["figures"]["disagreeing"]) == (len(expected), len(changed))
    again = Labels(begun.place, shown)
    assert again.next is None and again.figures() == begun.figures()


def test_comparisons_train_a_reward_model(begun, finished, cli):
    while begun.next is not None:
        begun.answer(begun.next, "left" if begun.next.left == 0 else "right", 1.0)
    tiny.edit(finished.config, {"data": tiny.CHAIN["data"] | {"comparisons": {"path": "ann/comparisons.jsonl"}}})
    code, _, error = cli("run", finished.config, "--only", "reward")
    assert (code, error) == (0, "")
    used = manifest.read(finished.run_dir).stages["reward"].datasets["data"]
    assert used["dataset"] == "comparisons" and used["rows"] == N


# Figures


def answered(drawn: list[Pair], say, seed: int = 0) -> figures.Figures:
    """Figures of one who answers `say(pair, question)`: left, right, tie or skip."""
    asked = pairs.questions(drawn, seed)
    given = {
        question.number: figures.Answer(question.number, say(drawn[question.pair], question), 2.0, "")
        for question in asked
    }
    return figures.figures(drawn, asked, given)


def test_figures_by_hand():
    """Four pairs, two of them asked twice. Completions 0 are chosen in pairs 0 and 3, completion 1 in pair 1."""
    drawn = [
        Pair([], (Completion("a", "long text", 3, True, 1.0), Completion("b", "short", 1, True, 0.0)), 0, True),
        Pair([], (Completion("a", "longer text", 3, True, 1.0), Completion("b", "short", 1, True, 0.0)), 0, True),
        Pair([], (Completion("a", "one", 3, True, 1.0), Completion("b", "two", 1, True, 1.0)), 0, False),
        Pair([], (Completion("a", "same", 3, True, 0.5), Completion("b", "size", 1, True, 0.0)), 1, False),
    ]
    asked = pairs.questions(drawn, 0)
    said = {0: "left", 1: "right", 2: "right", 3: "tie", 4: "skip", 6: "right"}  # by number: 2 * pair + again
    times = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0, 6: 60.0}
    found = figures.figures(drawn, asked, {n: figures.Answer(n, said[n], times[n], "") for n in said})
    counts = {key: found[key] for key in ("questions", "answered", "ties", "skips", "comparisons", "disagreeing")}
    assert counts == {"questions": 6, "answered": 6, "ties": 1, "skips": 1, "comparisons": 2, "disagreeing": 1}
    shares = {key: (value["value"]["value"], value["of"]) for key, value in found.items() if isinstance(value, dict)}
    assert shares == {
        "same_answer": (0.5, 2),  # pair 0 the same, pair 1 not
        "left": (0.25, 4),  # once of left, right, right, right
        "longer": (0.5, 2),  # pair 0 yes, pair 1 no, pair 3 equal
        "as_reward_model": (2 / 3, 3),  # pair 0 yes, pair 1 no, pair 3 yes
        "first_policy": (2 / 3, 3),
    }
    assert found["seconds"] == 3.5
    # Wilson (1927) at 1 of 4: the roots of (p - 0.25)^2 = 1.959964^2 p (1 - p) / 4
    low, high = found["left"]["value"]["low"], found["left"]["value"]["high"]
    for root in (low, high):
        assert (root - 0.25) ** 2 == pytest.approx(1.959964**2 * root * (1 - root) / 4, rel=1e-5)
    shown = {name: (value, of) for name, value, of in result.lines(found)}
    assert shown["left side chosen"] == ("0.25 [0.05, 0.70]", "4 answers for a side")


def test_nothing_answered_has_no_figures():
    found = figures.figures(made(3), pairs.questions(made(3), 0), {})
    assert [found[key]["value"] for key in ("same_answer", "left", "longer", "as_reward_model")] == [None] * 4
    assert [cells[1] for cells in result.lines(found)] == ["-"] * 5


def test_a_person_with_noise():
    """Wrong in one of five answers: agrees with himself in 0.8^2 + 0.2^2 = 0.68, and prefers no side."""
    drawn = pairs.arranged(made(4000, a=1.0, b=0.0), 1.0, 3)
    noise = random.Random(5)

    def say(_, question):
        is_left = (question.left == 0) != (noise.random() < 0.2)
        return "left" if is_left else "right"

    found = answered(drawn, say)
    for key, expected in (("same_answer", 0.68), ("left", 0.5), ("as_reward_model", 0.8), ("first_policy", 0.8)):
        value = found[key]["value"]
        assert value["low"] < expected < value["high"] and value["high"] - value["low"] < 0.04, key
    assert found["comparisons"] == 4000 - found["disagreeing"]


def test_one_who_always_says_left():
    found = answered(pairs.arranged(made(200), 1.0, 3), lambda pair, question: "left")
    assert found["left"]["value"]["value"] == 1.0
    assert (found["same_answer"]["value"]["value"], found["same_answer"]["of"]) == (0.0, 200)
    assert (found["comparisons"], found["disagreeing"]) == (0, 200)


# Judges

JUDGES = """
from pathlib import Path

def longer(prompt, completion):
    return len(completion)

def left(prompt, one, other):
    with Path("calls.txt").open("a") as file:
        file.write("x")
    if Path("calls.txt").stat().st_size == 9:
        raise RuntimeError("no more")
    return 1

def nothing(prompt):
    return 1

def nan(prompt, completion):
    return float("nan")
"""


def test_judges(finished, cli, tmp_path):
    """In both orders; one that fails goes on where it was; nothing of the run is changed."""
    (tmp_path / "mine.py").write_text(JUDGES)
    before = {path: path.read_bytes() for path in finished.run_dir.rglob("*") if path.is_file()}
    code, shown, error = cli("label", finished.run_dir, "--judge", "mine:longer", "--pairs", 10)
    place = tmp_path / "labels" / "tiny" / "mine.longer"
    assert (code, error) == (0, "") and str(place) in shown
    found = about(place)["figures"]
    assert (found["questions"], found["answered"]) == (20, 20)
    assert found["ties"] % 2 == 0 and (found["same_answer"]["value"]["value"], found["same_answer"]["of"]) == (1.0, 10)
    assert found["longer"]["value"]["value"] == 1.0 and found["left"]["value"]["value"] == 0.5
    sides = [(len(row["chosen"][0]["content"]), len(row["rejected"][0]["content"])) for row in rows_of(place)]
    assert len(sides) == found["longer"]["of"] > 5 and all(chosen > rejected for chosen, rejected in sides)

    options = ("label", finished.run_dir, "--judge", "mine:left", "--pairs", 10, "--to", "left")
    code, _, error = cli(*options)
    assert code == 2 and "function mine:left fails at the completions" in error and "no more" in error
    assert about(tmp_path / "left")["figures"]["answered"] == 8
    (tmp_path / "mine.py").write_text(JUDGES + "\n")
    code, _, error = cli(*options)
    assert code == 2 and "--judge: mine.py has changed since the labels in" in error
    (tmp_path / "mine.py").write_text(JUDGES)
    code, shown, error = cli(*options)
    assert (code, error) == (0, "") and (tmp_path / "calls.txt").stat().st_size == 21
    found = about(tmp_path / "left")["figures"]
    assert found["left"]["value"]["value"] == 1.0 and found["same_answer"]["value"]["value"] == 0.0
    assert rows_of(tmp_path / "left") == [] and "Left out, since two answers to them differ: 10 pairs" in shown
    assert {path: path.read_bytes() for path in finished.run_dir.rglob("*") if path.is_file()} == before

    for name, message in (
        ("nothing", "expected `def nothing(prompt: str, completion: str) -> float`, or with `prompt: str, left: str"),
        ("nan", "gives nan to the completion"),
        ("none", "has no function 'none'"),
    ):
        code, _, error = cli("label", finished.run_dir, "--judge", f"mine:{name}", "--pairs", 2, "--to", name)
        assert code == 2 and message in error


# The command


def test_lineage(begun, finished_run):
    begun.write()
    shown = about(begun.place)
    recorded = manifest.read(finished_run / "runs" / "tiny")
    (policy,) = shown["policies"]
    assert (policy["stage"], policy["files"]) == ("sft", recorded.stages["sft"].output.files)
    assert policy["config_digest"] == recorded.stages["sft"].config_digest
    assert shown["reward_model"]["files"] == recorded.stages["reward"].output.files
    assert shown["settings"] == {
        "policies": ["sft"],
        "prompts": "demos",
        "pairs": N,
        "order": "unsure",
        "twice": 0.5,
        "temperature": 1.0,
        "max_new_tokens": 8,  # the evaluation's
        "seed": 0,
        "by": "ann",
        "judge": None,
    }
    assert {"rlhf-pipeline", "torch"} <= shown["versions"].keys() and shown["begun"] <= shown["changed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "sfd"], "there is no finished stage 'sfd'; did you mean 'sft'?"),
        (["--policy", "reward"], "'reward' is a reward model, which completes nothing; policies here: pretrain, sft"),
        (["--policy", "sft", "--policy", "sft"], "expected one stage or two different ones, got sft, sft"),
        (["--prompts", "promts"], "'promts' is neither a file nor a dataset of"),
        (["--policy", "pretrain"], "does not say which prompts pretrain learned from; name some with --prompts"),
        (["--prompts", "corpus"], "holds text rows (columns text), expected prompts"),
        (["--temperature", "0"], "at 0 both completions of a policy are the same"),
        (["--max-new-tokens", "1000"], "1000 are too many: the longest prompt has"),
        (["--to", "x.jsonl"], "is a file's name; give a folder"),
        (["--to", "runs/tiny/labels"], "lies within the run folder"),
        (["--to", "."], "which belongs to no labels; give another folder"),
        (["--by", "a/b"], "--by: expected a name of letters"),
        (["--judge", "nowhere:judge"], "there is no module 'nowhere'"),
        (["--prompts", "tools.jsonl"], "expected a prompt without tools: "),
        (["--temperature", "nan"], "--temperature: expected a finite number, got nan"),
        (["--twice", "nan"], "--twice: expected a finite number, got nan"),
        (["--temperature", "inf"], "--temperature: expected a finite number, got inf"),
        (["--twice", "0.5", "--judge", "mine:longer"], "a judge is asked for every pair in both orders"),
        (["--config", "other.yaml"], "is the config of 'other'; "),
        (["--pairs", "0"], "0 is not in the range x>=1"),
    ],
)
def test_bad_input(finished, cli, tmp_path, options, message):
    (tmp_path / "mine.py").write_text(JUDGES)
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    tiny.write_rows(tmp_path / "tools.jsonl", [{"prompt": "What is salt?", "tools": [tool]}])
    tiny.edit(shutil.copy(finished.config, tmp_path / "other.yaml"), {"name": "other"})
    code, _, error = cli("label", finished.run_dir, *options)
    assert code == 2 and message in error, error
    assert list(tmp_path.glob("**/label.json")) == []


def test_a_policy_of_another_run_needs_prompts(finished, cli):
    recorded = manifest.read(finished.run_dir)
    record = recorded.stages["pretrain"]
    origin = Origin(run="../one", path="/one", name="one", stage="policy", stages={"policy": record})
    stages = recorded.stages | {"pretrain": record.model_copy(update={"origin": origin})}
    manifest.write(finished.run_dir, recorded.model_copy(update={"stages": stages}))
    code, _, error = cli("label", finished.run_dir, "--policy", "pretrain")
    assert code == 2 and "pretrain was taken from another run (policy of ../one), with data of its own" in error
    assert error.rstrip().endswith("name some with --prompts")


def test_the_printed_section_is_yaml(begun, tmp_path):
    """It replaces the section `comparisons`, whatever the folder is called."""
    place = shutil.copytree(begun.place, tmp_path / "a: b, {c} #é")
    labels = Labels(place, about(place))
    while labels.next is not None:
        labels.answer(labels.next, "left" if labels.next.left == 0 else "right", 1.0)
    console = Console(record=True, width=40)
    result.terminal(labels, console)
    section = console.export_text().partition("For a config:")[2]
    assert YAML().load(section) == {"data": {"comparisons": {"path": str(place / "comparisons.jsonl")}}}


def test_a_run_without_what_is_needed(finished, cli, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, error = cli("label", empty)
    assert code == 2 and "expected a run folder" in error
    (finished.run_dir / "last_run.json").unlink()
    code, _, error = cli("label", finished.run_dir)
    assert code == 2 and "name the file with --config" in error
    manifest.drop(finished.run_dir, ["reward"])
    code, _, error = cli("label", finished.run_dir, "--config", finished.config, "--order", "unsure")
    assert code == 2 and "the run has no finished reward model to be unsure" in error
    (weights,) = (finished.run_dir / "sft" / "output").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    code, _, error = cli("label", finished.run_dir, "--config", finished.config)
    assert code == 2 and f"{weights} has changed since the stage finished" in error


def test_labels_go_on_as_they_were_begun(begun, finished, cli, tmp_path):
    """Another option is refused, and so is another policy; two commands at once are too."""
    for options, message in (
        (["--pairs", 13], "--pairs: the labels in"),
        (["--policy", "pretrain"], "were begun with sft, now it is pretrain"),
        (["--judge", "mine:longer"], "were begun with none, now it is mine:longer"),
        (["--prompts", "prompts"], "were begun with demos, now it is prompts"),
    ):
        code, _, error = cli("label", finished.run_dir, "--to", begun.place, *options)
        assert code == 2 and message in error, error
    with folder.held(begun.place):
        code, _, error = cli("label", finished.run_dir, "--to", begun.place)
        assert code == 2 and "is open in another `rlhf label`" in error
    for path in sorted(begun.place.iterdir()):
        assert path.name in ("label.json", "pairs.jsonl", "answers.jsonl", "comparisons.jsonl", ".lock")
    while begun.next is not None:
        begun.answer(begun.next, "left", 1.0)
    code, shown, error = cli("label", finished.run_dir, "--to", begun.place)
    assert (code, error) == (0, "") and f"{len(begun.questions)} of {len(begun.questions)} questions" in shown
    assert "http" not in shown
    recorded = manifest.read(finished.run_dir)
    record = recorded.stages["sft"].model_copy(update={"config_digest": "1"})
    manifest.write(finished.run_dir, recorded.model_copy(update={"stages": recorded.stages | {"sft": record}}))
    code, _, error = cli("label", finished.run_dir, "--to", begun.place)
    assert code == 2 and "are of another 'sft' than" in error
    (begun.place / "label.json").unlink()
    code, _, error = cli("label", finished.run_dir, "--to", begun.place)
    assert code == 2 and "holds answers, and label.json is gone" in error


def test_the_page_is_blind_and_for_this_machine(finished, tmp_path):
    """The real command: what the browser gets names no policy and no score, and nobody else gets anything."""
    place = tmp_path / "two"
    options = ("--policy", "pretrain", "--policy", "sft", "--pairs", 8, "--twice", 0.25, "--to", place)
    process, port, secret = start(finished.run_dir, tmp_path, *options)
    try:
        sampled = pairs.read(place / "pairs.jsonl")
        scores = {str(abs(one.score))[:6] for pair in sampled for one in pair.completions}
        everything = b"".join(ask(port, secret + name)[1] for name in ("", "page.js", "page.css", "style.css"))
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Host": f"evil.example:{port}"}):
            assert ask(port, secret + "state", {}, **headers)[0] == 403
            assert ask(port, secret, **headers)[0] == 403
        assert ask(port, secret + "pairs.jsonl")[0] == ask(port, secret + "label.json")[0] == 404
        left = []
        for number in range(10):
            status, content = ask(port, secret + "state", {})
            state = json.loads(content)
            assert status == 200 and state.keys() == {"answered", "total", "question"}
            assert (state["answered"], state["total"]) == (number, 10)
            question = state["question"]
            assert question.keys() == {"number", "prompt", "left", "right", "left_cut_off", "right_cut_off"}
            pair = sampled[question["number"] // 2]
            assert {question["left"], question["right"]} == {one.text for one in pair.completions}
            left.append(next(one.policy for one in pair.completions if one.text == question["left"]))
            everything += content
            body = {"question": question["number"], "answer": "left", "seconds": 1.25}
            for _ in range(2):  # a browser may send it again
                status, content = ask(port, secret + "answer", body)
                assert status == 200
                everything += content
        assert set(left) == {"pretrain", "sft"}
        assert json.loads(content)["question"] is None and json.loads(content)["result"]
        assert b"pretrain" not in everything and b'"sft' not in everything and b"score" not in everything
        assert [score for score in scores if score.encode() in everything] == []
        for body in ({"question": 0, "answer": "both", "seconds": 1}, {"question": 0, "answer": "tie", "seconds": -1}):
            assert ask(port, secret + "answer", body)[0] == 400
        assert json.loads(ask(port, secret + "undo", {"answered": 9})[1])["answered"] == 10  # an older page
        assert json.loads(ask(port, secret + "undo", {"answered": 10})[1])["answered"] == 9
        process.send_signal(signal.SIGINT)
        shown = process.communicate(timeout=20)[0]
    finally:
        process.kill()
    assert process.returncode == 0
    assert "9 of 10 questions are answered" in shown and "pretrain chosen" in shown and "left side chosen" in shown
    assert [answer.opinion for answer in Answers(place / "answers.jsonl").standing] == ["left"] * 9
