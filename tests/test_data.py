"""From a user's file to the token ids of a stage: exact rows, lengths kept, everything wrong counted and named."""

import json
from itertools import chain
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from pipeline.config.load import load
from pipeline.config.schema import Source
from pipeline.data import fingerprints, joints, prepare, run_tokenizer
from pipeline.data.audit import Finding
from pipeline.data.places import Part
from pipeline.show import check_data
from pipeline.show.screen import show
from pipeline.system.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ONLINE = ("ppo", "rloo", "grpo", "evaluate")
TYPES = ("pretrain", "sft", "reward", "dpo", *ONLINE)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def read(tmp_path, model):
    """`read(rows, type, training, **top)`: the datasets of a run whose one stage of that type reads `rows`.

    `rows` are written to rows.jsonl, unless they are a path.
    """

    def make(rows, kind: str, training=None, section=None, max_prompt_length=None, **top) -> tiny.StageRows:
        path = rows if isinstance(rows, Path) else tmp_path / "rows.jsonl"
        if path is not rows:
            tiny.write_rows(path, rows)
        stages = {kind: {"data": "rows"}}
        if kind != "evaluate":
            stages[kind] |= {"training": training or {}, "init": "base"}
        if kind in ONLINE[:3]:
            stages["reward"] = {"data": "pairs", "init": "base"}
        if kind == "evaluate":
            stages |= {"sft": {"data": "pairs"}}
        if kind in ONLINE and max_prompt_length:
            stages[kind]["max_prompt_length"] = max_prompt_length
        tiny.write_rows(tmp_path / "pairs.jsonl", tiny.comparisons())
        data = {"rows": {"path": str(path)} | (section or {}), "pairs": {"path": "pairs.jsonl"}}
        training = {} if kind == "evaluate" else {"use_cpu": True, "bf16": False}
        made = tiny.make_run(tmp_path, stages, data=data, training=training, **top)
        tiny.edit(made, {"model": {"path": str(model)}})
        config = load(made)
        tokenizer = run_tokenizer.build(config)
        return tiny.StageRows(config, tokenizer)

    return make


def texts(read: tiny.StageRows, kind: str) -> list[dict[str, str]]:
    """The rows of a stage, every column of ids as text; what is trained on in brackets."""
    found = []
    stage = read.config.stages[kind]
    for row in read.prepare(kind, "data").rows:
        parts = check_data.parts_of(row, read.kind(kind), stage, read.tokenizer)
        found.append({label: "".join(f"[{said}]" if on else said for said, on in spans) for label, spans in parts})
    return found


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TURNS = [say("system", "Be kind."), say("user", "Hi 👋"), say("assistant", "Hé!"), say("user", "より?")]
HEAD = "<system>Be kind.<user>Hi 👋<assistant>Hé!<eos><user>より?<assistant>"
LEARNT = "<system>Be kind.<user>Hi 👋<assistant>[Hé!<eos>]<user>より?<assistant>[Ja.<eos>]"
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in TURNS
]
HH = "\n\nHuman: Hi 👋\n\nAssistant: Hé!\n\nHuman: より?\n\nAssistant:"
HH_HEAD = HEAD.removeprefix("<system>Be kind.")
PAIR = {"prompt": HEAD, "chosen": "Ja.<eos>", "rejected": "No.<eos>"}
ANSWER = [say("assistant", "Ja.")]
# (a row, stage type, the texts of what the trainer gets)
ROWS = [
    ({"text": "Hé! より"}, "pretrain", {"": "[Hé! より<eos>]"}),
    ({"messages": [*TURNS, *ANSWER]}, "sft", {"": LEARNT}),
    ({"conversations": [*SHAREGPT, {"from": "gpt", "value": "Ja."}]}, "sft", {"": LEARNT}),
    ({"prompt": TURNS, "completion": ANSWER}, "sft", {"": LEARNT}),
    ({"prompt": "Hi", "completion": "Ja."}, "sft", {"": "<user>Hi<assistant>[Ja.<eos>]"}),
    ({"prompt": TURNS, "completion": ANSWER, "label": True}, "sft", {"": LEARNT}),
    (
        {"instruction": "より?", "input": "", "output": "Ja.", "system": "Be kind.", "history": [["Hi 👋", "Hé!"]]},
        "sft",
        {"": LEARNT},
    ),
    ({"instruction": "Say", "input": "mer", "output": "sea"}, "sft", {"": "<user>Say\n\nmer<assistant>[sea<eos>]"}),
    ({"prompt": TURNS, "chosen": ANSWER, "rejected": [say("assistant", "No.")]}, "reward", PAIR),
    ({"chosen": [*TURNS, *ANSWER], "rejected": [*TURNS, say("assistant", "No.")]}, "reward", PAIR),
    (
        {
            "prompt": "より?",
            "chosen": [*TURNS, *ANSWER],
            "rejected": [*TURNS, say("assistant", "No.")],
            "score_chosen": 9.0,
        },
        "reward",
        PAIR,
    ),
    ({"conversations": SHAREGPT, "chosen": ANSWER[0], "rejected": {"from": "gpt", "value": "No."}}, "reward", PAIR),
    ({"chosen": f"{HH} Ja.", "rejected": f"{HH} No."}, "reward", PAIR | {"prompt": HH_HEAD}),
    ({"prompt": HH, "chosen": " Ja.", "rejected": " No."}, "reward", PAIR | {"prompt": HH_HEAD}),
    (
        {"prompt": TURNS, "completions": ["Hm.", "Ja.", "No."], "scores": [0.5, 1, -2]},
        "reward",
        PAIR,
    ),
    (
        {"history": "より?", "human_ref_A": "No.", "human_ref_B": "Ja.", "labels": 0},
        "reward",
        PAIR | {"prompt": "<user>より?<assistant>"},
    ),
    (
        {"prompt": TURNS, "chosen": ANSWER, "rejected": [say("assistant", "No.")]},
        "dpo",
        {"prompt": HEAD, "chosen": "[Ja.<eos>]", "rejected": "[No.<eos>]"},
    ),
    ({"prompt": TURNS, "chosen": ANSWER, "rejected": [say("assistant", "No.")]}, "sft", {"": LEARNT}),
    ({"prompt": TURNS, "chosen": ANSWER, "rejected": [say("assistant", "No.")]}, "ppo", {"prompt": HEAD}),
    ({"messages": [*TURNS, *ANSWER]}, "grpo", {"prompt": HEAD}),
    ({"prompt": TURNS}, "evaluate", {"prompt": HEAD}),
    ({"prompt": HH}, "rloo", {"prompt": HH_HEAD}),
]


@pytest.mark.parametrize(("row", "kind", "expected"), ROWS)
def test_row_as_the_model_sees_it(read, row, kind, expected):
    assert texts(read([row], kind), kind) == [expected]


def test_columns_are_mapped(read):
    rows = [{"q": "Hi", "a": "Ja.", "prompt": 7}]
    made = read(rows, "sft", {}, {"columns": {"q": "prompt", "a": "completion"}})
    assert texts(made, "sft") == [{"": "<user>Hi<assistant>[Ja.<eos>]"}]


def test_prompts_of_dialogue_strings_are_equal_and_end_with_the_header(read):
    """HH-RLHF's layout with nested turns: both sides read one prompt, which ends where the assistant begins."""
    rows = []
    for i in range(12):
        turns = "".join(f"\n\nHuman: q{i} {t}\n\nAssistant: a{i}\n\nwith two lines {t}" for t in range(i % 4))
        rows.append({side: f"{turns}\n\nHuman: last {i}\n\nAssistant: {side} {i}" for side in ("chosen", "rejected")})
    made = read(rows, "reward")
    prepared = made.prepare("reward", "data")
    assert (len(prepared.rows), prepared.audit.num_dropped) == (12, 0)
    for i, row in enumerate(prepared.rows):
        prompt = made.tokenizer.decode(row["prompt_ids"])
        assert prompt.endswith(f"<user>last {i}<assistant>")
        assert prompt.count("<user>") == 1 + i % 4
        assert made.tokenizer.decode(row["chosen_ids"]) == f"chosen {i}<eos>"
        assert made.tokenizer.decode(row["rejected_ids"]) == f"rejected {i}<eos>"


# The data files of a public project


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs data files that are not part of the project")
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("c4_demo.jsonl", {"pretrain": 100}),
        ("alpaca_en_demo.json", dict.fromkeys(("sft", *ONLINE), 999) | {"evaluate": 985}),
        ("dpo_en_demo.json", dict.fromkeys(TYPES[1:], 300) | {"evaluate": 295}),
    ],
)
def test_real_files_unchanged(read, name, counts):
    """As every stage type that they can serve; the others refuse them."""
    found = {}
    for kind in TYPES:
        training = {} if kind in ONLINE else {"max_length": 20_000}
        made = read(SHARED / name, kind, training, max_prompt_length=20_000)
        try:
            prepared = made.prepare(kind, "data")
        except UserError:
            continue
        found[kind] = len(prepared.rows)
        repeated = prepared.audit.dropped.get("same_prompt", Finding(0)).count
        assert prepared.audit.read == found[kind] + repeated
    assert found == counts


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs data files that are not part of the project")
def test_system_turns_of_a_real_file(read):
    rows = json.loads((SHARED / "dpo_en_demo.json").read_text())
    made = read(SHARED / "dpo_en_demo.json", "reward", {"max_length": 20_000})
    expected = ["".join(f"<{turn['from']}>" for turn in row["conversations"]) for row in rows]
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    for theirs, ours in names.items():
        expected = [text.replace(f"<{theirs}>", f"<{ours}>") for text in expected]
    prompts = [made.tokenizer.decode(ids) for ids in made.prepare("reward", "data").rows["prompt_ids"]]
    roles = ("<system>", "<user>", "<assistant>")
    assert sum(text.startswith("<system>") for text in expected) == 80
    for prompt, order, row in zip(prompts, expected, rows, strict=True):
        assert prompt.startswith(f"{order[: order.index('>') + 1]}{row['conversations'][0]['value']}")
        assert prompt.endswith("<assistant>")
        assert sum(map(prompt.count, roles)) >= sum(map(order.count, roles)) + 1


# Lengths


def long_rows() -> list[dict[str, str]]:
    prompts = ["short", "a much longer prompt " * 6]
    return [{"prompt": p, "chosen": c, "rejected": "no"} for p in prompts for c in ("yes", "well " * 40)]


def test_longer_rows_are_dropped_by_default(read):
    made = read(long_rows(), "reward", {"max_length": 60}, checks={"too_long": 1})
    prepared = made.prepare("reward", "data")
    assert [made.tokenizer.decode(ids) for ids in prepared.rows["chosen_ids"]] == ["yes<eos>"]
    assert prepared.audit.record()["dropped"] == {"too_long": 3}
    assert prepared.audit.dropped["too_long"].rows == (1, 2, 3)


@pytest.mark.parametrize("kind", ["reward", "dpo", "sft"])
def test_truncated_prompts_lose_their_start(read, kind):
    """The same rows and the same cut in every stage type, and no answer loses its end."""
    length = 60
    made = read(long_rows(), kind, {"max_length": length}, too_long="truncate", checks={"too_long": 1})
    whole = read(long_rows(), kind, {"max_length": 10_000}).prepare(kind, "data").rows
    prepared = made.prepare(kind, "data")
    assert prepared.audit.record()["dropped"] == {"too_long": 2}
    assert prepared.audit.noticed["truncated"].rows == (2,)
    if kind == "sft":
        assert prepared.rows["input_ids"][0] == whole["input_ids"][0]
        assert prepared.rows["input_ids"][1] == whole["input_ids"][2][-length:]
        assert prepared.rows["completion_mask"][1] == whole["completion_mask"][2][-length:]
        return
    row, before = prepared.rows[1], whole[2]
    assert (row["chosen_ids"], row["rejected_ids"]) == (before["chosen_ids"], before["rejected_ids"])
    kept = length - max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert row["prompt_ids"] == before["prompt_ids"][-kept:]


def test_truncated_prompts_of_online_stages(read):
    rows = [{"prompt": "a b c d e f g h " * n} for n in (1, 9)]
    whole = read(rows, "ppo", max_prompt_length=1000).prepare("ppo", "data").rows["prompt_ids"]
    made = read(rows, "ppo", too_long="truncate", max_prompt_length=40)
    assert made.prepare("ppo", "data").rows["prompt_ids"] == [whole[0], whole[1][-40:]]


@pytest.mark.parametrize("packing", [{"packing": False}, {"packing": True, "packing_strategy": "bfd"}])
def test_texts_are_cut_into_pieces_without_loss(read, packing):
    rows = [{"text": "word " * n} for n in (3, 200)]
    whole = read(rows, "pretrain").prepare("pretrain", "data").rows["input_ids"]
    pieces = read(rows, "pretrain", {"max_length": 16} | packing).prepare("pretrain", "data").rows["input_ids"]
    assert max(map(len, pieces)) == 16
    assert list(chain(*pieces)) == list(chain(*whole))


# What is wrong with rows


def pair(prompt: str, chosen: str = "yes yes", rejected: str = "no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


FAULTY = [
    pair("a"),
    pair("b", "same", " same "),
    pair("c", chosen=""),
    pair("d") | {"rejected": None},
    pair("a"),
    pair("a", "no", "yes yes"),
    pair("e", "one <eos> two"),
    pair("f", "x"),
]


def test_everything_wrong_is_counted_with_its_rows(read):
    made = read(FAULTY, "reward")
    audit = made.prepare("reward", "data").audit
    assert (audit.read, audit.rows) == (8, 5)
    assert {k: f.rows for k, f in audit.dropped.items() if f.count} == {
        "identical": (1,),
        "empty": (2,),
        "malformed": (3,),
    }
    noticed = {k: f.rows for k, f in audit.noticed.items() if f.count}
    assert noticed == {
        "duplicate": (4,),
        "contradictory": (0, 4, 5),
        "special_tokens": (6,),
        "eos": (6,),
        "longer_wins": (0, 4, 6),
    }
    assert audit.record()["dropped"] == {"identical": 1, "empty": 1, "malformed": 1}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("identical", "row 1: chosen: is equal to rejected"),
        ("empty", "row 2: chosen: is empty"),
        ("malformed", "row 3: rejected: expected text or messages, got None"),
        ("duplicate", "row 4"),
        ("contradictory", "row 0"),
        ("special_tokens", "row 6"),
        ("eos", "row 6"),
        ("longer_wins", "row 0"),
    ],
)
def test_a_finding_above_its_threshold_is_a_problem(read, kind, words):
    free = dict.fromkeys(("malformed", "empty", "roles", "identical", "eos"))
    made = read(FAULTY, "reward", checks=free)
    audit = made.prepare("reward", "data").audit
    assert audit.problems(made.config.checks.model_dump()) == []
    share = audit.dropped.get(kind, audit.noticed.get(kind)).count / (
        audit.read if kind in audit.dropped else audit.rows
    )
    assert audit.problems({kind: share}) == []
    (problem,) = audit.problems({kind: share - 0.01})
    assert "rows.jsonl" in problem and words in problem and f"`checks.{kind}`" in problem


def test_check_data_shows_everything_and_then_refuses(cli, tmp_path, read):
    read(FAULTY, "reward")
    exit_code, shown, message = cli("check-data", tmp_path / "tiny.yaml", "--sample", "2")
    assert exit_code == 2
    assert "20 % (at" in shown and "allowed)" in shown  # one row of five; the cell is wrapped
    assert "3 dataset" not in shown and "prefer the longer side" in shown and "have equal chosen and rejected" in shown
    assert "row 7\n" in shown  # of the file: some of the rows before it are left out
    assert "<user>a<assistant>" in shown and "yes yes<eos>" in shown
    for words in ("`checks.identical`", "`checks.empty`", "`checks.malformed`"):
        assert words in message


def test_rows_that_several_stages_get_are_shown_once(cli, tmp_path):
    """As the stage sees them that trains on parts of them; held-out rows of the same dataset are not shown beside."""
    comparisons = {"data": "comparisons", "eval_data": "comparisons"}
    stages = {"sft": tiny.SFT, "reward": comparisons, "dpo": comparisons, "evaluate": {"data": "comparisons"}}
    path = tiny.make_run(tmp_path, stages)
    tiny.edit(
        path, {"data": {name: {"path": f"{name}.jsonl", "heldout": 0.3} for name in ("comparisons", "demonstrations")}}
    )
    _, shown, _ = cli("check-data", path, "--sample", "1")
    titles = [line.partition(" ─")[0] for line in shown.splitlines() if line.endswith("─")]
    assert titles == [
        "sft: demonstrations (train)",
        "reward, dpo: comparisons (train)",
        "evaluate: comparisons (held-out)",
    ]
    (chosen,) = [line for line in shown.splitlines() if line.startswith("chosen: ")]
    assert chosen.startswith("chosen: ⟦")


def test_check_data_of_a_good_run(cli, tmp_path, read):
    read([pair(f"{i}") for i in range(10)], "reward")
    exit_code, shown, message = cli("check-data", tmp_path / "tiny.yaml")
    assert (exit_code, message) == (0, "")
    assert "10" in shown
    exit_code, _, message = cli("check-data", tmp_path / "tiny.yaml", "--stage", "rewrd")
    assert exit_code == 2 and "did you mean 'reward'?" in message


def test_a_row_the_template_refuses_is_a_fault_of_that_row(read, tmp_path):
    """Templates of Gemma and Mistral raise on system messages or on roles that do not take turns."""
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    refusing += "{% endif %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    refusing += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (tmp_path / "strict.jinja").write_text(refusing)
    rows = [{"messages": [say("user", f"q{i}"), say("assistant", "a")]} for i in range(3)]
    rows.insert(1, {"messages": [say("system", "s"), say("user", "q"), say("assistant", "a")]})
    for kind, column in (("sft", ""), ("ppo", "prompt")):
        made = read(rows, kind, tokenizer={"chat_template": "strict.jinja"})
        audit = made.prepare(kind, "data").audit
        assert audit.dropped["roles"].rows == (1,)
        assert "System role not supported" in audit.dropped["roles"].why
        assert [text[column].split("<assistant>")[0] for text in texts(made, kind)] == [
            "<user>q0",
            "<user>q1",
            "<user>q2",
        ]


# Tokens, cache, processes


def test_ids_are_those_of_the_tokenizers_own_call(read):
    made = read([pair("a")], "reward")
    said = ["plain", "", " leading", "Hé 👋 より", "<eos><user>", "two\n\nlines", "x" * 300]
    made.tokenizer.backend_tokenizer.enable_truncation(3)
    made.tokenizer.backend_tokenizer.enable_padding()
    ids = joints.token_ids(made.tokenizer, said)
    assert ids == [made.tokenizer.encode(text, add_special_tokens=False) for text in said]
    assert joints.token_ids(made.tokenizer, []) == []


def test_a_second_time_rows_come_from_the_cache(read, monkeypatch, tmp_path):
    rows = [pair(f"cached {i}") for i in range(20)]
    first = read(rows, "reward").prepare("reward", "data")

    def never(*_):
        raise AssertionError("rows were prepared again")

    monkeypatch.setattr(prepare.TokenIds, "__call__", never)
    again = read(rows, "reward").prepare("reward", "data")
    assert again.rows.to_list() == first.rows.to_list()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "rows.jsonl").rename(moved / "other.jsonl")
    assert read(moved / "other.jsonl", "reward").prepare("reward", "data").rows.to_list() == first.rows.to_list()
    with pytest.raises(AssertionError, match="prepared again"):
        read([pair("changed")], "reward").prepare("reward", "data")


def test_processes_and_slices_change_nothing(read, monkeypatch, tmp_path):
    rows = [pair(f"{i} {i % 7}", "y" * (i % 5 + 1), "n" * (i % 3 + 1)) for i in range(600)] + [pair("bad", chosen="")]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "one"))
    one = read(rows, "reward").prepare("reward", "data")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr(prepare, "NUM_PER_PROCESS", 50)
    monkeypatch.setattr(prepare, "SLICE", 250)
    monkeypatch.setattr(prepare, "num_cores", lambda: 2)
    two = read(rows, "reward").prepare("reward", "data")
    assert len(list((tmp_path / "two").rglob("*_of_00002.arrow"))) == 6
    assert two.rows.to_list() == one.rows.to_list()
    assert two.audit == one.audit


def test_large_files_are_fingerprinted_by_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "_LARGE", 1 << 20)
    path = tmp_path / "big.txt"
    path.write_bytes(b"a" * (3 << 20))
    part = Part("big", Source(path="big.txt"), "text", (path,))
    before = fingerprints.of_source(part)
    with path.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"b")
    assert fingerprints.of_source(part) != before


def test_a_dialogue_cut_at_its_start_is_no_fault(read):
    """Earlier answers may go with the start; what is left still ends every answer with eos."""
    turns = [say("user", "q" * 30), say("assistant", "a" * 30), say("user", "last"), say("assistant", "yes")]
    made = read([{"messages": turns}], "sft", {"max_length": 40}, too_long="truncate")
    audit = made.prepare("sft", "data").audit
    assert (audit.rows, audit.noticed["eos"].count, audit.noticed["truncated"].count) == (1, 0, 1)


def test_eos_in_an_answer_is_kept_where_the_template_writes_none(read, tmp_path):
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (tmp_path / "open.jinja").write_text(plain + "{% if add_generation_prompt %}<assistant>{% endif %}")
    made = read(
        [pair("a", "one<eos>two", "no")], "reward", tokenizer={"chat_template": "open.jinja"}, checks={"eos": 1}
    )
    prepared = made.prepare("reward", "data")
    assert made.tokenizer.decode(prepared.rows["chosen_ids"][0]) == "one<eos>two<eos>"
    assert prepared.audit.noticed["eos"].count == 1


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_prompts_that_trl_renders_are_dropped_where_they_are_too_long(read, kind):
    rows = [{"prompt": "a b c d e f g h " * n} for n in (1, 9)]
    made = read(rows, kind, too_long="truncate", max_prompt_length=40)
    audit = made.prepare(kind, "data").audit
    assert (audit.rows, audit.dropped["too_long"].count, audit.noticed["truncated"].count) == (1, 1, 0)


def test_format_without_its_columns(read):
    made = read([{"content": "a"}], "pretrain", {}, {"format": "text"})
    with pytest.raises(UserError, match="has the columns content; format text needs text"):
        made.prepare("pretrain", "data")


def test_split_of_plain_files_is_refused(read):
    made = read([pair("a")], "reward", {}, {"split": "test"})
    with pytest.raises(UserError, match=r"data\.rows\.split: has no effect on files"):
        made.prepare("reward", "data")


def test_plan_shows_the_data(tmp_path, read):
    made = read([pair(f"{i}") for i in range(10)], "reward")
    console = Console(width=160, record=True)
    for table in check_data.tables({"reward": {"data": made.prepare("reward", "data").audit}}, {}):
        show(table, console)
    shown = console.export_text()
    assert "row " in shown and "chosen" in shown
    heads = [[cell.strip() for cell in line.split("┃")[1:-1]] for line in shown.splitlines() if line.startswith("┃")]
    assert [(head[0], head[-1]) for head in heads] == [
        ("dataset", "tokens per row: median / 90 % / 99 % / longest"),
        ("dataset", "first (from 0)"),
    ]
    longer = next(line.split("│") for line in shown.splitlines() if "prefer the longer side" in line)
    assert [cell.strip() for cell in longer[1:5]] == ["rows", "reward", "train", "prefer the longer side"]
