"""One split for a whole run: no prompt is trained on and evaluated on, and every row is accounted for."""

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.chain import staleness
from pipeline.config import load as configs
from pipeline.data import heldout, prepare, run_tokenizer, sieve
from pipeline.records.manifest import Manifest
from pipeline.system.errors import UserError

NUM_PROMPTS = 40
PER_PROMPT = 2
TRAINING = ("sft", "reward", "dpo", "ppo")


def topic(i):
    return f"Tell me about the {tiny.TOPICS[i % len(tiny.TOPICS)]} of town {i}."


def pairs(prompts, per_prompt=PER_PROMPT):
    """Comparisons, several of each prompt; they serve demonstrations and prompts too."""
    return [
        {"prompt": prompt, "chosen": f"Good {i} {j}.", "rejected": f"Bad {i} {j}."}
        for j in range(per_prompt)
        for i, prompt in enumerate(prompts)
    ]


PROMPTS = [topic(i) for i in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def make(write_config, model):
    """`make(folder, data, stages)`: the datasets of a run; `data` has rows, or a section of the config, by name.

    `shares` are the held-out shares of datasets, 0.3 by default; `top` are more sections of the config.
    """

    def call(folder, data, stages, shares=None, **top):
        sections = {}
        for name, rows in data.items():
            section = rows if isinstance(rows, dict) else {"path": f"{name}.rows.jsonl"}
            sections[name] = {"heldout": 0.3} | section | ({"heldout": shares[name]} if name in (shares or {}) else {})
        stages = {name: {"data": stage} if isinstance(stage, str) else stage for name, stage in stages.items()}
        changes = {"model": {"path": str(model)}, "data": sections, "stages": stages, **top}
        path = write_config(folder, **changes)
        for name, rows in data.items():
            if not isinstance(rows, dict):
                lines = [json.dumps(row) + "\n" for row in rows]
                (folder / f"{name}.rows.jsonl").write_text("".join(lines), encoding="utf-8")
        config = configs.load(path)
        tokenizer = run_tokenizer.build(config)
        return tiny.StageRows(config, tokenizer)

    return call


@pytest.fixture
def new_cache(tmp_path_factory, monkeypatch):
    """`new_cache()`: an empty cache from here on."""

    def call():
        folder = tmp_path_factory.mktemp("cache")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
        return folder

    return call


def texts(read, prepared):
    """The rows as text: what the token ids stand for."""
    columns = [name for name in prepared.rows.column_names if name.endswith("ids")]
    return ["".join(map(read.tokenizer.decode, ids)) for ids in zip(*(prepared.rows[c] for c in columns), strict=True)]


def prompts(read, stage, role="data"):
    """The first user message of every row that a stage gets, as it was written."""
    rows = texts(read, read.prepare(stage, role))
    return [re.search(r"<user>(.*?)<assistant>", row, re.DOTALL)[1] for row in rows]


def check_counts(audit):
    assert audit.read == audit.rows + sum(finding.count for finding in audit.dropped.values())
    assert audit.rows == audit.read - audit.num_dropped


# One dataset that is trained on and evaluated on


def test_sides_of_a_shared_dataset(make, tmp_path):
    """Every stage type trains on the same prompts, the others are evaluated on; no prompt is on both sides."""
    stages = dict.fromkeys([*TRAINING, "evaluate"], "pairs")
    stages["reward"] = {"data": "pairs", "eval_data": "pairs"}
    read = make(tmp_path, {"pairs": pairs(PROMPTS)}, stages)
    trained = {stage: Counter(prompts(read, stage)) for stage in TRAINING}
    evaluated = [Counter(prompts(read, "evaluate")), Counter(prompts(read, "reward", "eval_data"))]
    assert 0.1 * NUM_PROMPTS < len(evaluated[0]) < 0.5 * NUM_PROMPTS
    assert evaluated[0] == dict.fromkeys(evaluated[1], 1)  # evaluate takes each prompt once
    for found in trained.values():
        assert found == trained["sft"]
        assert not found.keys() & evaluated[0].keys()
        assert found + evaluated[1] == dict.fromkeys(PROMPTS, PER_PROMPT)

    held_out = read.prepare("reward", "eval_data").audit
    once = read.prepare("evaluate", "data").audit
    assert (once.read, once.dropped["same_prompt"].count) == (held_out.read, held_out.read - len(evaluated[0]))
    for stage in TRAINING:
        audit = read.prepare(stage, "data").audit
        assert (audit.split, held_out.split) == ("train", "held-out")
        assert audit.read + held_out.read == NUM_PROMPTS * PER_PROMPT
        check_counts(audit)
    check_counts(held_out)


def test_share(make, tmp_path):
    """About the share that is asked for; what a small share holds out, a larger one does too."""
    many = [topic(i) for i in range(400)]
    sides = []
    for share in (0.1, 0.5, 0.9):
        read = make(tmp_path, {"many": pairs(many, 1)}, {"sft": "many", "evaluate": "many"}, shares={"many": share})
        sides.append(set(prompts(read, "evaluate")))
        assert abs(len(sides[-1]) / len(many) - share) < 0.06
        assert set(prompts(read, "sft")) == set(many) - sides[-1]
    assert sides[0] < sides[1] < sides[2]


@pytest.mark.parametrize("change", ["order", "elsewhere", "seed", "kind", "subset", "duplicates"])
def test_side_depends_on_the_prompt_alone(make, tmp_path, new_cache, change):
    rows, top = pairs(PROMPTS), {}
    stages = {"sft": "pairs", "evaluate": "pairs"}
    before = make(tmp_path / "before", {"pairs": rows}, stages)
    held_out = set(prompts(before, "evaluate"))
    new_cache()
    folder, data = tmp_path / "after", {"pairs": rows}
    if change == "order":
        data = {"pairs": random.Random(1).sample(rows, len(rows))}
    elif change == "elsewhere":
        folder = tmp_path / "a" / "copy" / "elsewhere"
    elif change == "seed":
        stages, top = {"sft": {"data": "pairs", "seed": 3}, "evaluate": {"data": "pairs", "seed": 4}}, {"seed": 5}
    elif change == "kind":
        (tmp_path / "pairs.json").write_text(json.dumps(rows))
        data = {"pairs": {"path": str(tmp_path / "pairs.json")}}
    elif change == "subset":
        data = {"pairs": rows[: NUM_PROMPTS // 2]}
    else:
        data = {"pairs": [*rows, *({**row, "chosen": "Another."} for row in rows)]}
    after = make(folder, data, stages, **top)
    expected = {row["prompt"] for row in rows[: NUM_PROMPTS // 2]} if change == "subset" else set(PROMPTS)
    assert set(prompts(after, "evaluate")) == held_out & expected
    assert set(prompts(after, "sft")) == expected - held_out


def test_side_does_not_depend_on_processes(make, tmp_path, new_cache, monkeypatch):
    read = make(tmp_path, {"pairs": pairs(PROMPTS)}, {"sft": "pairs", "reward": "pairs", "evaluate": "pairs"})
    monkeypatch.setattr(prepare, "NUM_PER_PROCESS", 10)
    found = []
    for cores in (1, 2):
        cache = new_cache()
        monkeypatch.setattr(prepare, "num_cores", lambda cores=cores: cores)
        found.append([texts(read, read.prepare(stage, "data")) for stage in ("sft", "evaluate")])
        assert bool(list(cache.rglob("*_of_00002.arrow"))) == (cores == 2)
    assert found[0] == found[1]


def test_dialogue_and_its_first_turn_are_on_one_side(make, tmp_path):
    talks = []
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Gladly."}]
        more = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Then more."}]
        system = [{"role": "system", "content": "Be brief."}]
        talks += [{"messages": turns}, {"messages": turns + more}, {"messages": system + turns + more}]
    read = make(tmp_path, {"talks": talks}, {"sft": "talks", "evaluate": "talks"})
    trained, evaluated = Counter(prompts(read, "sft")), Counter(prompts(read, "evaluate"))
    assert trained and evaluated
    assert not trained.keys() & evaluated.keys()
    assert trained + evaluated == dict.fromkeys(PROMPTS, 3)


# Prompts under several datasets


def full_width(text):
    return "".join("\u3000" if c == " " else chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


VARIANTS = [
    str,
    str.upper,
    lambda text: f"  {text}\n",
    lambda text: text.replace(" ", "\u00a0"),
    lambda text: text.replace(" ", " \n\t "),
    full_width,
    lambda text: full_width(text.lower()),
]


def variant(i, shift):
    """A prompt as the dataset number `shift` writes it."""
    return VARIANTS[(i + shift) % len(VARIANTS)](PROMPTS[i])


WRITTEN = {write(prompt): i for i, prompt in enumerate(PROMPTS) for write in VARIANTS}


def sides(read):
    """The numbers of the prompts that some stage trains on, and of those that some stage evaluates on."""
    found = {"train": set(), "held-out": set()}
    for name, stage in read.config.stages.items():
        for role in ("data", "eval_data"):
            if getattr(stage, role, None):
                audit = read.prepare(name, role).audit
                found[audit.split] |= {WRITTEN[prompt] for prompt in prompts(read, name, role)}
                check_counts(audit)
    return found["train"], found["held-out"]


LAYOUTS = {
    "evaluate": {"sft": "a", "reward": "a", "dpo": "a", "ppo": "a", "evaluate": "b"},
    "eval_data": {"sft": "a", "reward": {"data": "a", "eval_data": "b"}},
    "of another stage": {"sft": "a", "reward": {"data": "c", "eval_data": "b"}, "dpo": "a"},
    "prompts": {"sft": "c", "reward": "c", "ppo": "a", "evaluate": "b"},
}


@pytest.mark.parametrize("stages", LAYOUTS.values(), ids=LAYOUTS)
def test_prompts_of_another_dataset_are_not_trained_on(make, tmp_path, stages):
    """`b` is evaluated on and holds every second prompt of `a`, written otherwise; `c` has prompts of its own."""
    data = {
        "a": pairs([variant(i, 0) for i in range(30)]),
        "b": pairs([variant(i, 1) for i in range(0, 30, 2)]),
        "c": pairs([variant(i, 2) for i in range(30, 40)]),
    }
    read = make(tmp_path, data, stages)
    assert not {row["prompt"] for row in data["a"]} & {row["prompt"] for row in data["b"]}
    trained, evaluated = sides(read)
    assert not trained & evaluated
    assert evaluated == set(range(0, 30, 2))
    for name, stage in read.config.stages.items():
        if stage.data == "b":
            continue
        audit = read.prepare(name, "data").audit
        gone, rows = (15 * PER_PROMPT, 30 * PER_PROMPT) if stage.data == "a" else (0, 10 * PER_PROMPT)
        assert (audit.read, audit.rows) == (rows, rows - gone)
        assert audit.dropped["held_out"].count == gone == audit.num_dropped
        if gone:
            assert audit.place(audit.dropped["held_out"].rows[0]) == f"{tmp_path / 'a.rows.jsonl'}: row 0"


def test_two_shared_datasets(make, tmp_path):
    """Both are trained on and evaluated on, with other shares; each side of one keeps clear of the other's."""
    data = {
        "a": pairs([variant(i, 0) for i in range(30)]),
        "b": pairs([variant(i, 1) for i in range(10, 40)]),
    }
    stages = {"sft": "a", "reward": {"data": "b", "eval_data": "a"}, "ppo": "a", "evaluate": "b"}
    read = make(tmp_path, data, stages, shares={"b": 0.6})
    trained, evaluated = sides(read)
    assert not trained & evaluated
    assert trained | evaluated == set(range(40))
    on_a, on_b = read.prepare("sft", "data").audit, read.prepare("reward", "data").audit
    assert on_a.read + read.prepare("reward", "eval_data").audit.read == 30 * PER_PROMPT
    assert on_b.read + read.prepare("evaluate", "data").audit.read == 30 * PER_PROMPT
    assert on_a.dropped["held_out"].count > 0 == on_b.dropped["held_out"].count  # b holds out all that a does
    assert read.prepare("ppo", "data").audit.dropped["held_out"] == on_a.dropped["held_out"]


def test_same_file_under_two_names(make, tmp_path):
    """What is evaluated on under another name is not trained on: nothing is left, and the message says why."""
    rows = pairs(PROMPTS)
    data = {"mine": rows, "theirs": {"path": "mine.rows.jsonl"}}
    read = make(tmp_path, data, {"sft": "mine", "evaluate": "theirs"})
    audit = read.prepare("sft", "data").audit
    assert (audit.rows, audit.dropped["held_out"].count) == (0, len(rows))
    (problem,) = audit.problems(read.config.checks.model_dump())
    assert "another dataset is evaluated on" in problem


def test_dataset_that_is_only_evaluated_on_is_held_out_whole(make, tmp_path):
    read = make(tmp_path, {"a": pairs(PROMPTS[:10]), "b": pairs(PROMPTS[10:])}, {"sft": "a", "evaluate": "b"})
    audit = read.prepare("evaluate", "data").audit
    assert prompts(read, "evaluate") == PROMPTS[10:]
    assert (audit.read, audit.rows, audit.split) == (60, 30, "held-out")
    assert prompts(read, "sft") == PROMPTS[:10] * PER_PROMPT  # and what is only trained on is trained on whole


# What the manifest compares

REMOVED = "data: held-out prompts in it"


def identity(read, stage):
    return staleness.identify(read.config, stage, Manifest(name="tiny"))


def test_removed_prompts_are_an_input(make, tmp_path):
    data = {"a": pairs(PROMPTS[:20]), "some": pairs([p.upper() for p in PROMPTS[15:25]]), "more": pairs(PROMPTS[10:])}
    stages = {"sft": "a", "evaluate": "some"}
    some = identity(make(tmp_path, data, stages), "sft")
    more = identity(make(tmp_path, data, stages | {"evaluate": "more"}), "sft")
    assert REMOVED in some.inputs
    assert REMOVED in more.inputs
    assert some.inputs[REMOVED] != more.inputs[REMOVED]
    same = data | {"some": pairs(PROMPTS[15:20][::-1])}
    assert identity(make(tmp_path / "same", same, stages), "sft") == some


@pytest.mark.parametrize("evaluation", [{"evaluate": "other"}, {"sft": {"data": "a", "eval_data": "other"}}])
def test_evaluation_on_other_prompts_changes_no_training(make, tmp_path, evaluation):
    data, stages = {"a": pairs(PROMPTS[:20]), "other": pairs(PROMPTS[20:])}, {"sft": "a", "dpo": "a"}
    alone = make(tmp_path, data, stages)
    beside = make(tmp_path, data, stages | evaluation)
    assert identity(alone, "dpo") == identity(beside, "dpo")
    assert REMOVED not in identity(beside, "sft").inputs
    if "evaluate" in evaluation:
        assert identity(alone, "sft") == identity(beside, "sft")
    assert texts(alone, alone.prepare("sft", "data")) == texts(beside, beside.prepare("sft", "data"))


def test_share_is_an_input_of_both_sides(make, tmp_path):
    data, share = {"a": pairs(PROMPTS)}, "data: held-out share"
    assert share not in identity(make(tmp_path, data, {"sft": "a"}), "sft").inputs
    shared = make(tmp_path, data, {"sft": "a", "evaluate": "a"})
    assert identity(shared, "sft").inputs[share] == identity(shared, "evaluate").inputs[share] == "0.3"
    assert REMOVED not in identity(shared, "sft").inputs


# Properties

WORDS = ["tea", "rain", "Bread", "zürich", "été", "7", "c++", "漢字", "ﬁne"]
GAPS = [" ", "  ", "\n", "\t", "\u00a0", "\u3000", " \r\n\u2003"]
CASES = [str, str.upper, str.lower, str.title, full_width]
FORMS = ["NFC", "NFD", "NFKC", "NFKD"]


@st.composite
def written(draw, words=None):
    """A prompt, as a tuple of words, and one way to write it."""
    words = words or tuple(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)))
    text = "".join(draw(st.sampled_from(GAPS)) + draw(st.sampled_from(CASES))(word) for word in words)
    text = text if draw(st.booleans()) else text.lstrip() + draw(st.sampled_from(["", *GAPS]))
    return words, unicodedata.normalize(draw(st.sampled_from(FORMS)), text)


@given(st.data(), written())
def test_key_is_of_the_words(data, one):
    """Spacing, case and Unicode form do not matter, words and their order do; nor does what follows the prompt."""
    words, text = one
    _, same = data.draw(written(words))
    others, other = data.draw(written())
    ask = {"prompt": [{"role": "user", "content": text}]}
    system = {"role": "system", "content": other}
    later = [{"role": "assistant", "content": other}, {"role": "user", "content": other}]
    key = heldout.key(ask)
    assert heldout.key({"prompt": [{"role": "user", "content": same}], "completion": other}) == key
    assert heldout.key({"prompt": [system, *ask["prompt"], *later], "chosen": other, "rejected": text}) == key
    assert heldout.key({"text": same}) == key
    assert (heldout.key({"text": other}) == key) == (others == words)


def test_key_by_hand():
    """A key is the same on every machine: 8 bytes of BLAKE2b, the most significant one first."""
    expected = int.from_bytes(hashlib.blake2b(b"is fish & tea fine?", digest_size=8).digest(), "big")
    assert heldout.key({"text": "\u00a0Is\u3000 fi\uff53h\n& TEA \ufb01ne\uff1f "}) == expected


@given(st.lists(st.integers(0, 2**64 - 1)), st.floats(1e-9, 1 - 1e-9), st.floats(1e-9, 1 - 1e-9))
def test_share_of_all_keys(keys, one, other):
    keys, (small, large) = np.array(keys, np.uint64), sorted([one, other])
    below = heldout.is_below(keys, small)
    assert below.tolist() == [int(key) < int(small * 2**64) for key in keys]
    assert not (below & ~heldout.is_below(keys, large)).any()


SLOW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@SLOW
@given(first=st.lists(written(), min_size=1, max_size=12), second=st.lists(written(), min_size=1, max_size=12))
def test_no_leak_property(make, tmp_path_factory, first, second):
    """Whatever prompts two datasets share: none is in the rows of a training stage and of an evaluation."""
    number = {text: words for words, text in first + second}
    data = {"a": pairs([text for _, text in first]), "b": pairs([text for _, text in second])}
    stages = {"sft": "a", "reward": {"data": "a", "eval_data": "b"}, "ppo": "b", "evaluate": "a"}
    read = make(tmp_path_factory.mktemp("leak"), data, stages)
    trained, evaluated, counted = set(), set(), Counter()
    for stage, role in [("sft", "data"), ("reward", "eval_data"), ("ppo", "data"), ("evaluate", "data")]:
        audit = read.prepare(stage, role).audit
        check_counts(audit)
        found = prompts(read, stage, role)
        assert len(found) == audit.rows
        (trained if audit.split == "train" else evaluated).update(number[text] for text in found)
        counted[audit.dataset] += audit.read
        allowed = [finding.count for kind, finding in audit.dropped.items() if kind in ("held_out", "same_prompt")]
        assert audit.num_dropped == sum(allowed)
    assert not trained & evaluated
    assert trained | evaluated == set(number.values())
    assert counted == {name: len(rows) for name, rows in data.items()}
    assert prompts(read, "reward") == prompts(read, "sft")


LONG = "word " * 80
LIMITS = {stage: {"training": {"max_length": 60}} for stage in ("sft", "reward")}
LIMITS["grpo"] = {"max_prompt_length": 60, "reward_functions": ["m:f"], "training": {"num_generations": 2}}
# Faulty values of a field, with the kind that they are counted under.
TEXT_FAULTS = [(None, "malformed"), (7, "malformed"), ("", "empty"), (" \n\u00a0", "empty"), (LONG, "too_long")]


def comparison(i, fault=None):
    row = {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}."}
    return row | (fault or {}), f"<user>Question {i}?<assistant>Yes, {i}.<eos>No, {i}.<eos>"


COMPARISON_FAULTS = [({side: value}, kind) for side in ("chosen", "rejected") for value, kind in TEXT_FAULTS]
COMPARISON_FAULTS += [({"prompt": value}, kind) for value, kind in [(None, "empty"), *TEXT_FAULTS[1:]]]
COMPARISON_FAULTS += [({"chosen": "Same.", "rejected": side}, "identical") for side in ("Same.", " Same.\n")]


def dialogue(i, fault=None):
    said = [("user", f"Question {i}?"), ("assistant", f"Answer {i}.")]
    said += [("user", "Why?"), ("assistant", "Because.")] if i % 2 else []
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    return row | (fault or {}), "".join(f"<{role}>{text}{'<eos>' * (role == 'assistant')}" for role, text in said)


def turns(*said):
    return {"messages": [{"role": role, "content": content} for role, content in said]}


DIALOGUE_FAULTS = [
    ({"messages": None}, "malformed"),
    ({"messages": []}, "empty"),
    (turns(("user", "Yes?"), ("robot", "No.")), "malformed"),
    (turns(("user", None), ("assistant", "No.")), "malformed"),
    (turns(("user", "Yes?"), ("assistant", " ")), "empty"),
    (turns(("user", ""), ("assistant", "No.")), "empty"),
    (turns(("user", "Yes?")), "roles"),
    (turns(("user", "Yes?"), ("user", "Yes?"), ("assistant", "No.")), "roles"),
    (turns(("assistant", "No."), ("user", "Yes?")), "roles"),
    (turns(("user", "Yes?"), ("system", "Be brief."), ("assistant", "No.")), "roles"),
    (turns(("user", "Yes?"), ("assistant", LONG)), "too_long"),
    (turns(("user", LONG), ("assistant", "No.")), "too_long"),
]


def prompt(i, fault=None):
    """A string, or messages."""
    text = f"Question {i}?"
    row = {"prompt": [{"role": "user", "content": text}] if i % 2 else text}
    return row | (fault or {}), f"<user>{text}<assistant>"


PROMPT_FAULTS = [({"prompt": value}, kind) for value, kind in TEXT_FAULTS]
PROMPT_FAULTS += [({"prompt": []}, "empty"), ({"prompt": [None]}, "malformed"), ({"prompt": {"a": 1}}, "malformed")]
PROMPT_FAULTS += [
    ({"prompt": turns(*said)["messages"]}, kind)
    for said, kind in [
        ([("user", "Yes?"), ("assistant", "No.")], "roles"),
        ([("assistant", "No."), ("user", "Yes?")], "roles"),
        ([("user", "Yes?"), ("user", "Yes?")], "roles"),
        ([("user", "Yes?"), ("assistant", ""), ("user", "Yes?")], "empty"),
        ([("robot", "Yes?")], "malformed"),
        ([("user", "Yes?"), ("assistant", LONG), ("user", "Yes?")], "too_long"),
    ]
]


@pytest.mark.parametrize(
    ("stage", "row_of", "faults"),
    [
        ("reward", comparison, COMPARISON_FAULTS),
        ("grpo", prompt, PROMPT_FAULTS),
        ("sft", dialogue, DIALOGUE_FAULTS),
    ],
)
@SLOW
@given(data=st.data())
def test_conservation_property(make, tmp_path_factory, stage, row_of, faults, data):
    """Every row is kept or counted under its fault; the good ones are all kept, in order, and are what was written."""
    drawn = data.draw(st.lists(st.one_of(st.none(), st.sampled_from(faults)), min_size=1, max_size=25))
    rows, good = [], []
    for i, fault in enumerate(drawn):
        row, text = row_of(i, fault and fault[0])
        rows.append(row)
        good += [] if fault else [text]
    config = {"data": "rows", "init": "base"} | LIMITS[stage]
    read = make(tmp_path_factory.mktemp("rows"), {"rows": rows}, {stage: config})
    prepared = read.prepare(stage, "data")
    audit = prepared.audit
    assert texts(read, prepared) == good
    assert (audit.read, audit.rows) == (len(rows), len(good))
    check_counts(audit)
    expected = Counter(fault[1] for fault in drawn if fault)
    assert {kind: finding.count for kind, finding in audit.dropped.items() if finding.count} == expected
    for kind, finding in audit.dropped.items():
        places = [i for i, fault in enumerate(drawn) if fault and fault[1] == kind]
        assert list(finding.rows) == places[: sieve.NUM_NAMED]


# Rows that only one of several stages can use


def test_rows_labelled_false_are_counted_once(make, tmp_path):
    rows = [{"prompt": f"Question {i}?", "completion": f"Answer {i}.", "label": i % 3 > 0} for i in range(40)]
    read = make(tmp_path, {"a": rows}, {"sft": "a", "evaluate": "a"})
    sft, evaluate = read.prepare("sft", "data").audit, read.prepare("evaluate", "data").audit
    assert sft.read + evaluate.read == 40
    assert evaluate.num_dropped == 0
    assert sft.dropped["label_false"].count == sft.num_dropped > 0


def test_first_label_that_is_missing_hides_none(make, tmp_path):
    rows = [
        {"prompt": f"Question {i}?", "completion": "Answer.", "label": None if i == 0 else False} for i in range(200)
    ]
    read = make(tmp_path, {"a": rows}, {"sft": "a"})
    audit = read.prepare("sft", "data").audit
    assert (audit.rows, audit.dropped["label_false"].count, audit.dropped["malformed"].count) == (0, 199, 1)


def test_raw_text_is_no_side_column(make, tmp_path):
    """Otherwise a prompt held out from SFT could be pretrained on, in a column of the same rows."""
    rows = [{"prompt": f"Question {i}?", "completion": "Answer.", "text": f"Question {i}? Answer."} for i in range(20)]
    read = make(tmp_path, {"a": rows}, {"pretrain": "a", "sft": "a", "evaluate": "a"})
    with pytest.raises(UserError, match="expected text"):
        read.prepare("pretrain", "data")
