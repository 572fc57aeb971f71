"""What a plan says: rows, tokens, steps, parameters, which side of the split, and why a stage runs; counted apart."""

import hashlib
import itertools
import json
import math
import re
import unicodedata

import by_hand
import numpy as np
import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM
from trl import pack_dataset

from pipeline import stage
from pipeline.chain import preflight, staleness
from pipeline.config import graph
from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.models.loading import from_scratch
from pipeline.records import manifest
from pipeline.show import tables
from pipeline.system import digests

DEMOS = [*tiny.demonstrations(), {"prompt": "Well?", "completion": "Yes. " * 40}]  # the last one is too long
PAIRS = [row | {"rejected": "I do not like it at all, " + row["chosen"]} for row in tiny.comparisons()[:3]]
PAIRS += tiny.comparisons()[2:]  # prefer the longer side; the third prompt occurs twice
PAIRS += [{"prompt": "Long?", "chosen": "No.", "rejected": "Yes. " * 40}]
SHARED = [{"prompt": f"What of {topic} {i}?", "completion": "Good."} for i in range(5) for topic in tiny.TOPICS]
for i, row in enumerate(SHARED[:30]):  # the same prompt, however it is written
    row["prompt"] = row["prompt"].upper() if i % 2 else row["prompt"].replace(" ", " \n ")
OTHER = [row | {"prompt": f" {row['prompt'].title()}"} for row in SHARED[20:40]] + DEMOS[:3]
TEXTS = [{"text": f"Of {topic} there is much to be said, and it has been said. " * 3} for topic in tiny.TOPICS]
ROWS = {"demos": DEMOS, "pairs": PAIRS, "shared": SHARED, "texts": TEXTS, "other": OTHER}
ROLLOUT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "response_length": 8}


def stage_of(kind, data, **training):
    own = {"init": "base"} | ({"reward": "reward"} if kind in ("ppo", "rloo", "grpo") else {})
    options = {} if kind == "ppo" else {"max_steps": -1}
    options |= {"max_length": 60} if kind in ("sft", "reward", "dpo") else {}
    options |= {"max_completion_length": 8} if kind in ("rloo", "grpo") else {}
    return {"type": kind, "data": data, "training": options | training} | own


# A stage and its optimizer steps, by hand: of 12 demonstrations and 13 comparisons that are short enough.
STEPS = {
    "sft": (stage_of("sft", "demos", per_device_train_batch_size=2, gradient_accumulation_steps=2), 3 * 3),
    "partial": (stage_of("sft", "demos", per_device_train_batch_size=5, num_train_epochs=2), 3 * 2),
    "part-epochs": (stage_of("sft", "demos", per_device_train_batch_size=8, num_train_epochs=1.5), math.ceil(2 * 1.5)),
    "less": (stage_of("sft", "demos", per_device_train_batch_size=8, num_train_epochs=0.6), math.ceil(2 * 0.6)),
    "short": (stage_of("sft", "demos", max_steps=7), 7),
    "full": (stage_of("sft", "demos", num_train_epochs=1) | {"lora": None}, 3),
    "reward": (stage_of("reward", "pairs", num_train_epochs=1), 4),
    "dpo": (stage_of("dpo", "pairs", per_device_train_batch_size=3, num_train_epochs=2), 5 * 2),
    "ppo": (stage_of("ppo", "demos", **ROLLOUT, total_episodes=17), 3),
    "ppo-epochs": (stage_of("ppo", "demos", **ROLLOUT, num_train_epochs=3), math.ceil(13 * 3 / 8)),
    "rloo": (stage_of("rloo", "demos", num_generations=2, num_train_epochs=1), 13 // 2),  # of 2 prompts
    "grpo": (stage_of("grpo", "demos", num_generations=4, num_train_epochs=2), math.ceil(13 * 4 / 4) * 2),
    "learns": (stage_of("sft", "shared") | {"eval_data": "shared"}, None),
    "cleaned": (stage_of("sft", "other"), None),
    "packed": (stage_of("pretrain", "texts", max_length=26, packing=True, num_train_epochs=1), None),
    "pieces": (stage_of("pretrain", "texts", max_length=25, packing=False, num_train_epochs=1), None),
}
EVALUATE = {"data": "shared", "baseline": "sft", "policies": [], "max_new_tokens": 4}
SHARE = 0.4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a stage for each row of STEPS, and the facts of its plan."""
    folder = tmp_path_factory.mktemp("plan")
    stages = {name: stage for name, (stage, _) in STEPS.items()} | {"evaluate": EVALUATE}
    path = tiny.make_run(folder, stages)
    for name, rows in ROWS.items():
        tiny.write_rows(folder / f"{name}.jsonl", rows)
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl", "heldout": SHARE} for name in ROWS}})
    config = load(path)
    tokenizer = run_tokenizer.build(config)
    facts = preflight.check(config, list(config.stages), tokenizer, run_tokenizer.fingerprint(tokenizer))
    return path, tokenizer, facts


def number(tokenizer, text):
    return len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", [name for name, (_, steps) in STEPS.items() if steps])
def test_steps_by_hand(made, name):
    assert made[2][name].steps == STEPS[name][1]


def test_steps_of_texts(made):
    """Packed into pieces of 26 as TRL does it, the last one shorter; or each text cut by itself, into pieces of 25."""
    _, tokenizer, facts = made
    ids = [[*tokenizer.encode(row["text"], add_special_tokens=False), tokenizer.eos_token_id] for row in TEXTS]
    total = sum(map(len, ids))
    assert facts["packed"].audits["data"].tokens == facts["pieces"].audits["data"].tokens == total
    packed = pack_dataset(Dataset.from_dict({"input_ids": ids}), 26, "wrapped")
    assert total // 26 % 4 == 0 and len(packed) == total // 26 + 1  # a step for the last piece alone
    assert facts["packed"].steps == math.ceil(len(packed) / 4)
    assert facts["pieces"].steps == math.ceil(sum(math.ceil(len(row) / 25) for row in ids) / 4)


def test_rows_and_tokens(made):
    _, tokenizer, facts = made
    demos, pairs = facts["sft"].audits["data"], facts["reward"].audits["data"]
    asked = [number(tokenizer, f"<user>{row['prompt']}<assistant>") for row in DEMOS]
    answers = [number(tokenizer, f"{row['completion']}<eos>") for row in DEMOS]
    assert answers[-1] > 60 > max(a + b for a, b in zip(asked[:-1], answers[:-1], strict=True))
    assert (demos.read, demos.rows, demos.num_dropped) == (13, 12, 1)
    assert demos.tokens == sum(asked[:-1]) + sum(answers[:-1])
    assert demos.lengths["prompt"][-1] == max(asked[:-1]) and demos.lengths["completion"][-1] == max(answers[:-1])
    assert demos.lengths["row"][0] == min(a + b for a, b in zip(asked[:-1], answers[:-1], strict=True))
    prompts = facts["ppo"].audits["data"]
    assert (prompts.rows, prompts.tokens) == (13, sum(asked))
    kept = PAIRS[:-1]
    sides = {side: [number(tokenizer, f"{row[side]}<eos>") for row in kept] for side in ("chosen", "rejected")}
    asked = [number(tokenizer, f"<user>{row['prompt']}<assistant>") for row in kept]
    assert (pairs.read, pairs.rows, pairs.dropped["too_long"].count) == (14, 13, 1)
    assert pairs.tokens == sum(asked) + sum(sides["chosen"]) + sum(sides["rejected"])
    longest = [a + max(b, c) for a, b, c in zip(asked, sides["chosen"], sides["rejected"], strict=True)]
    assert (pairs.lengths["row"][0], pairs.lengths["row"][-1]) == (min(longest), max(longest))
    wins = sum(a > b for a, b in zip(sides["chosen"], sides["rejected"], strict=True))
    assert pairs.noticed["longer_wins"].count == wins == 10
    assert pairs.prompts[0] == 12
    limit = [row for row in longest if row == max(longest)]
    assert len(limit) < 13  # there are several lengths


def test_a_row_of_the_limit_is_not_too_long(made):
    path, tokenizer, facts = made
    longest = facts["sft"].audits["data"].lengths["row"][-1]
    rows = {}
    for limit in (longest, longest - 1):
        config = load(path, (f"stages.sft.training.max_length={limit}",))
        checked = preflight.check(config, ["sft"], tokenizer, "key")
        rows[limit] = checked["sft"].audits["data"].rows
    number_of_longest = sum(
        number(tokenizer, f"<user>{r['prompt']}<assistant>{r['completion']}<eos>") == longest for r in DEMOS[:-1]
    )
    assert rows == {longest: 12, longest - 1: 12 - number_of_longest}


def test_parameters_are_those_of_the_model_and_its_adapter(made):
    path, _, facts = made
    base = AutoModelForCausalLM.from_pretrained(path.parent / "model")
    assert facts["full"].parameters == {"trainable": base.num_parameters(), "total": base.num_parameters()}
    model = get_peft_model(base, LoraConfig(**tiny.LORA, task_type="CAUSAL_LM"))
    trainable, total = model.get_nb_trainable_parameters()
    assert facts["sft"].parameters == {"trainable": trainable, "total": total}
    assert facts["evaluate"].parameters is facts["evaluate"].steps is None


def test_tied_embeddings_count_once_and_the_plan_says_the_parts(tmp_path, cli):
    """Of a new model whose output layer is its embeddings: its base, an adapter on it, and a score head."""
    path = tiny.write_config(tmp_path)
    config = load(path)
    tokenizer = run_tokenizer.build(config)
    names = ["pretrain", "sft", "reward"]
    facts = preflight.check(config, names, tokenizer, run_tokenizer.fingerprint(tokenizer))
    base = from_scratch(dict(tiny.ARCHITECTURE), tokenizer, "float32", seed=0)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    size = sum(parameter.numel() for parameter in base.parameters())  # what is tied comes once
    adapted = get_peft_model(base, LoraConfig(**tiny.LORA, task_type="CAUSAL_LM"))
    adapter = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert facts["pretrain"].parameters == {"trainable": size, "total": size}
    assert facts["sft"].parameters == facts["reward"].parameters == {"trainable": adapter, "total": size + adapter}
    assert (facts["sft"].head, facts["reward"].head) == (None, tiny.ARCHITECTURE["hidden_size"])
    code, out, err = cli("plan", path)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("Parameters: ")]
    assert line == (
        f"Parameters: {tables.count(size)} in the base model; "
        f"{tables.count(adapter)} in an adapter (sft, reward, ppo, dpo); "
        "32 in a score head (reward); not counted: the value model and the reward model of ppo"
    )


def key_of(prompt):
    """By the rule as the documentation has it: 8 bytes of BLAKE2b of the prompt, whatever its case and spaces."""
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def test_which_rows_are_held_out(made):
    """Of a dataset that one stage trains on and another evaluates on; what another holds of these is left out there."""
    _, tokenizer, facts = made
    held_out = [row for row in SHARED if key_of(row["prompt"]) / 2**64 < SHARE]
    assert 10 < len(held_out) < 40
    evaluated = facts["evaluate"].audits["data"]
    for audit in (evaluated, facts["learns"].audits["eval_data"]):
        assert (audit.rows, audit.read, audit.split) == (len(held_out), len(held_out), "held-out")
    trained = facts["learns"].audits["data"]
    assert (trained.rows, trained.read, trained.split) == (60 - len(held_out), 60 - len(held_out), "train")
    assert evaluated.tokens == sum(number(tokenizer, f"<user>{row['prompt']}<assistant>") for row in held_out)
    keys = sorted(key_of(row["prompt"]) for row in held_out)
    digest = hashlib.sha256(np.array(keys, np.uint64).tobytes()).hexdigest()
    assert evaluated.record()["prompts_digest"] == digest and evaluated.record()["prompts"] == len(held_out)
    cleaned = facts["cleaned"].audits["data"]
    removed = sum(key_of(row["prompt"]) in keys for row in OTHER)
    assert 0 < removed < 20
    assert (cleaned.read, cleaned.rows, cleaned.dropped["held_out"].count) == (23, 23 - removed, removed)


def test_the_table_of_the_plan_says_these_numbers(made, cli):
    path, _, facts = made
    code, shown, _ = cli("plan", path)
    assert code == 0
    cells = {}
    for line in shown.splitlines():
        row = [cell.strip() for cell in line.split("│")[1:-1]]
        if row and row[0]:
            name = row[0]
            cells[name] = row
        elif row:  # what a column did not hold in one line
            cells[name] = [f"{a} {b}".strip() for a, b in zip(cells[name], row, strict=True)]
    for name, fact in facts.items():
        audit, row = fact.audits["data"], cells[name]
        left_out = f" ({audit.num_dropped} left out)" if audit.num_dropped else ""
        counts = f"{tables.count(audit.rows)}, {tables.count(audit.tokens)}{left_out}"
        assert row[4].startswith(f"{audit.dataset}: {counts}"), name
        amount = amount_of(STEPS[name][0], fact) if fact.steps else f"{tables.count(audit.rows)} prompts"
        assert row[5] == f"{fact.steps or ''} {amount}".strip()
        if fact.parameters:
            assert row[6] == f"{tables.count(fact.parameters['trainable'])} of {tables.count(fact.parameters['total'])}"
        assert row[7] == "run"


def amount_of(stage, fact):
    """What a stage works on, in the plan's words: the tokens of its epochs, or its own completions."""
    options, audit = stage["training"], fact.audits["data"]
    epochs = options.get("num_train_epochs", 3)
    if stage["type"] == "ppo":
        return f"{options.get('total_episodes') or int(epochs * audit.rows)} episodes"
    if stage["type"] in ("rloo", "grpo"):
        return f"{fact.steps * 4} completions"
    tokens = audit.tokens * epochs
    if options.get("max_steps", -1) > 0:
        tokens = options["max_steps"] * 4 * audit.tokens / audit.rows
    return f"{tables.count(round(tokens))} tokens"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A finished run that packs 1500 texts, and 1500 dialogues by bins; its config, and the facts of its plan."""
    folder = tmp_path_factory.mktemp("packed")
    own = {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 1, "save_strategy": "no"}
    stages = {
        "pretrain": {"data": "many", "lora": None, "training": own | {"max_length": 98}},
        "sft": {"data": "dialogues", "training": own | {"packing": True, "max_length": 128, "packing_strategy": "bfd"}},
    }
    path = tiny.make_run(folder, stages, training=tiny.SMALL | {"logging_steps": 500})
    topics = itertools.cycle(tiny.TOPICS)
    tiny.write_rows(folder / "many.jsonl", ({"text": f"On {next(topics)}."} for _ in range(1500)))
    rows = ({"prompt": f"{next(topics)}?", "completion": "Yes. " * (number % 4 + 1)} for number in range(1500))
    tiny.write_rows(folder / "dialogues.jsonl", rows)
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in ("many", "dialogues")}})
    config = load(path)
    tokenizer = run_tokenizer.build(config)
    return config, preflight.check(config, list(config.stages), tokenizer, run_tokenizer.fingerprint(tokenizer))


def test_steps_of_more_rows_than_are_packed_together(packed):
    """TRL packs 1000 rows at a time, each time with a last piece that is shorter: the plan has the trainer's steps."""
    config, facts = packed
    for name in config.stages:
        stage.run(config, name)
    done = manifest.read(config.run_path).stages
    assert {name: fact.steps for name, fact in facts.items()} == {n: done[n].metrics["steps"] for n in facts}
    tokens = facts["pretrain"].audits["data"].tokens
    assert facts["pretrain"].steps == math.ceil(tokens / 98) + 1  # a stream of all rows would be one piece shorter


def test_how_numbers_are_written():
    written = {0: "0", 999: "999", 1000: "1k", 1234: "1.23k", 999_499: "999k", 10**6: "1M", 2_345_678: "2.35M"}
    written |= {10**9: "1B", 7_610_000_000: "7.61B"}
    assert {value: tables.count(value) for value in written} == written


def test_status_says_durations_and_headlines(cli, make_record, tmp_path):
    metrics = {"first_loss": 2.5, "loss": 0.012345, "eval_loss": 0.0012345, "mean_token_accuracy": None}
    stages = {name: make_record(duration=seconds) for name, seconds in TOOK.values()}
    stages["learnt"] = make_record(metrics=metrics, duration=1.4)
    manifest.write(tmp_path, manifest.Manifest(name="tiny", model={"path": "b", "dtype": "float32"}, stages=stages))
    code, shown, _ = cli("status", tmp_path)
    assert code == 0
    took = {
        row[0]: row[3] for line in shown.splitlines() if len(row := [c.strip() for c in line.split("│")[1:-1]]) == 6
    }
    assert took == {name: text for text, (name, _) in TOOK.items()} | {"learnt": "1s"}
    said = "first loss 2.500, loss 0.012, held-out loss 0.00123, token accuracy nan"
    assert said in re.sub(r"\s+", " ", shown)


TOOK = {"0s": ("a", 0.4), "59s": ("b", 59.4), "1m 00s": ("c", 59.6), "61m".replace("61m", "1h 01m"): ("d", 3660.0)}
TOOK |= {"2m 05s": ("e", 125.0)}


# Why a stage runs


STAGES = {"sft": tiny.SFT, "reward": tiny.REWARD | {"seed": 3}, "dpo": tiny.DPO}
STAGES["evaluate"] = {"data": "prompts", "judge": "judge:score", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    rows = {"prompts": [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS]}
    return by_hand.make(tmp_path_factory.mktemp("finished"), STAGES, rows)


def reasons(run, *overrides, redo=(), config=None):
    decisions = staleness.decide(load(config or run.config, overrides), manifest.read(run.run_dir), redo)
    assert [decision.stage for decision in decisions] == list(STAGES)
    assert decisions.pop().reason == "not finished yet"
    return [decision.reason if decision.run else "" for decision in decisions]


def test_why_a_stage_runs(finished):
    again = "sft runs again"
    assert reasons(finished) == ["", "", ""]
    rate = "config changed: training.learning_rate (0.01 -> 0.002)"
    assert reasons(finished, "stages.sft.training.learning_rate=2e-3") == [rate, again, again]
    assert reasons(finished, "stages.reward.seed=7") == ["", "config changed: seed (3 -> 7)", ""]
    assert reasons(finished, "seed=7") == ["config changed: seed (0 -> 7)", again, again]
    beta = "config changed: training.beta (0.1 -> 0.2)"
    assert reasons(finished, "stages.dpo.training.beta=0.2") == ["", "", beta]
    assert reasons(finished, "stages.sft.training.weight_decay=0.1")[0].endswith(
        "training.weight_decay ('unset' -> 0.1)"
    )
    assert reasons(finished, "training.logging_steps=5", "training.save_steps=9") == ["", "", ""]
    assert reasons(finished, redo=("reward",)) == ["", "asked for with --redo", ""]
    assert reasons(finished, "data.comparisons.limit=5") == ["", "input changed: data", "input changed: data"]
    assert reasons(finished, "stages.evaluate.max_new_tokens=5") == ["", "", ""]


def test_an_option_that_is_taken_out_is_a_change(finished):
    yaml, path = YAML(), finished.folder / "other.yaml"
    config = yaml.load(finished.config)
    del config["stages"]["dpo"]["training"]["beta"]
    yaml.dump(config, path)
    assert reasons(finished, config=path) == ["", "", "config changed: training.beta (0.1 -> 'unset')"]


def test_inputs_are_known_by_content(finished):
    """Data, functions, the base and a parent's output: a digest of what is in the files, by hand."""
    config, recorded = load(finished.config), manifest.read(finished.run_dir)
    identity = staleness.identify(config, "evaluate", recorded)
    files = recorded.stages["sft"].output.files
    weights = finished.run_dir / "sft" / "output" / "adapter_model.safetensors"
    assert files["sft/output/adapter_model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert identity.inputs["baseline"] == hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    judge = (finished.folder / "judge.py").read_bytes()
    assert identity.inputs["function judge:score"] == hashlib.sha256(judge).hexdigest()
    assert set(identity.inputs) == {"data", "baseline", "reward", "policies.sft", "policies.dpo"} - {"policies.sft"} | {
        "base model",
        "function judge:score",
    }
    assert len(set(identity.inputs.values())) == len(identity.inputs)


def test_digests_by_hand(tmp_path):
    """SHA-256 of JSON with sorted keys; of files by their path, those in folders too."""
    value = {"b": [1, 2.5, None], "a": {"d": "é", "c": True}}
    text = b'{"a": {"c": true, "d": "\\u00e9"}, "b": [1, 2.5, null]}'
    assert digests.digest(value) == hashlib.sha256(text).hexdigest()
    (tmp_path / "x" / "inner").mkdir(parents=True)
    contents = {"x/one": b"1", "x/inner/two": b"2"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert digests.checksums(tmp_path, [tmp_path / "x"]) == expected


def test_ancestors_and_descendants(finished):
    config = load(finished.config)
    assert graph.descendants(config, "sft") == ["reward", "dpo", "evaluate"]
    assert graph.descendants(config, "reward") == ["evaluate"]
    assert graph.ancestors(config, "evaluate") == ["sft", "reward", "dpo"]
    pairs = list(itertools.product(config.stages, repeat=2))
    assert all((a in graph.ancestors(config, b)) == (b in graph.descendants(config, a)) for a, b in pairs)


def test_texts_are_kept_apart_from_texts_and_prompts_from_prompts(write_config, tmp_path):
    """A text that is pretrained on may hold a prompt that is evaluated on: nobody could keep them apart."""
    changes = {
        "data.texts": {"path": "corpus.jsonl"},
        "data.questions": {"path": "prompts.jsonl"},
        "stages.pretrain.eval_data": "texts",
        "stages.evaluate.data": "questions",
    }
    config = load(write_config(tmp_path, **changes))
    assert graph.evaluated_beside(config, "corpus") == ["texts"]
    assert graph.evaluated_beside(config, "demos") == ["questions"]
    assert graph.evaluated_beside(config, "questions") == []
