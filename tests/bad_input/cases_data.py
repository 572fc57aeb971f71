"""Bad data: files that cannot be read, rows that cannot be used, and chat templates."""
# ruff: noqa: E501

import bz2
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import tiny
from forked import ROWS, Case

GOOD = {
    "demos": {"prompt": "Is a lamp good?", "completion": "Yes."},
    "comparisons": {"prompt": "Is a lamp good?", "chosen": "Yes.", "rejected": "No."},
    "prompts": {"prompt": "Is a lamp good?"},
    "corpus": {"text": "A lamp is good."},
}
STAGE_OF = {"demos": (), "comparisons": ("dpo",), "prompts": ("evaluate",), "corpus": ("pretrain",)}
LINES = "".join(json.dumps(row) + "\n" for row in ROWS["demos"])
CSV = "prompt,completion\n" + "Why?,So.\n" * 5
NESTED = '{"prompt": "Why?", "completion": ' + "[" * 3000 + "]" * 3000 + "}\n"


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": ["a"] * 50, "completion": ["b"] * 50}), folder / "demos.parquet")


def _cut_parquet(folder: Path) -> None:
    _parquet(folder)
    file = folder / "demos.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def _saved(content: str | None) -> Any:
    def setup(folder: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(ROWS["demos"]).save_to_disk(folder / "saved")
        if content is None:
            (folder / "saved" / "data-00000-of-00001.arrow").unlink()
        else:
            (folder / "saved" / "state.json").write_text(content)

    return setup


# name, path, files, words; of the dataset `demos`
FILES: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("not there", "nowhere.jsonl", {}, ("data.demos.path", "no such file")),
    ("not there, as a folder", "./nowhere", {}, ("data.demos.path", "no such file")),
    ("not there, as a glob", "nowhere/*.jsonl", {}, ("data.demos.path", "no such file")),
    ("not there, absolute", "/nowhere/demos.jsonl", {}, ("data.demos.path", "no such file")),
    ("not there, at home", "~/nowhere.jsonl", {}, ("data.demos.path", "no such file")),
    ("home of nobody", "~nobody-at-all/demos.jsonl", {}, ("data.demos.path", "home")),
    ("hub id that is not there", "someone/nothing-of-this-name", {}, ("someone/nothing-of-this-name", "hub")),
    ("a word", "demonstrations", {}, ("demonstrations", "hub|file")),
    ("a URL", "https://example.org/demos.jsonl", {}, ("data.demos.path", "no such file|https")),
    ("NUL in the path", "demos\0.jsonl", {}, ("data.demos.path|YAML", "NUL|character")),
    ("300 letters", "x" * 300 + ".jsonl", {}, ("data.demos.path", "255")),
    ("a PDF", "notes.pdf", {"notes.pdf": b"%PDF-1.4"}, ("data.demos.path", "notes.pdf", "expected")),
    ("a zip of nothing", "demos.jsonl.zip", {"demos.jsonl.zip": b"PK\5\6" + bytes(18)}, ("demos.jsonl.zip",)),
    ("a gz that is none", "demos.jsonl.gz", {"demos.jsonl.gz": b"no gzip"}, ("demos.jsonl.gz", "cannot be read")),
    ("a gz that is cut", "d.jsonl.gz", {"d.jsonl.gz": gzip.compress(LINES.encode())[:-30]}, ("d.jsonl.gz", "cannot be read")),
    ("a bz2 that is cut", "d.jsonl.bz2", {"d.jsonl.bz2": bz2.compress(LINES.encode())[:-30]}, ("d.jsonl.bz2", "cannot be read")),
    ("an xz that is none", "d.jsonl.xz", {"d.jsonl.xz": b"no xz"}, ("d.jsonl.xz", "cannot be read")),
    ("a parquet that is none", "demos.parquet", {"demos.parquet": b"PAR1 no"}, ("demos.parquet", "cannot be read")),
    ("an arrow that is none", "demos.arrow", {"demos.arrow": b"ARROW1 no"}, ("demos.arrow", "cannot be read")),
    ("empty jsonl", "e.jsonl", {"e.jsonl": ""}, ("e.jsonl", "empty")),
    ("blank jsonl", "e.jsonl", {"e.jsonl": "\n\n  \n"}, ("e.jsonl", "empty")),
    ("empty list", "e.json", {"e.json": "[]"}, ("e.json", "empty")),
    ("empty object", "e.json", {"e.json": "{}"}, ("e.json",)),
    ("head of a csv", "e.csv", {"e.csv": "prompt,completion\n"}, ("e.csv", "empty")),
    ("empty csv", "e.csv", {"e.csv": ""}, ("e.csv", "empty")),
    ("empty txt", "e.txt", {"e.txt": ""}, ("e.txt", "empty")),
    ("empty parquet", "e.parquet", {"e.parquet": b""}, ("e.parquet", "empty")),
    ("empty folder", "folder", {"folder/.hidden": "x"}, ("data.demos.path", "folder")),
    ("folder of pictures", "folder", {"folder/a.png": b"x"}, ("data.demos.path", "folder", "expected")),
    ("folder of two kinds", "folder", {"folder/a.jsonl": LINES, "folder/b.csv": CSV}, ("different kinds", "sources")),
    ("glob of two kinds", "folder/*", {"folder/a.jsonl": LINES, "folder/b.csv": CSV}, ("different kinds", "sources")),
    ("cut line", "d.jsonl", {"d.jsonl": LINES + '{"prompt": "Wh'}, ("d.jsonl", "cannot be read", "row 12")),
    ("a line of text", "d.jsonl", {"d.jsonl": LINES + "and so on\n"}, ("d.jsonl", "cannot be read")),
    ("single quotes", "d.jsonl", {"d.jsonl": "{'prompt': 'a', 'completion': 'b'}\n"}, ("d.jsonl", "cannot be read")),
    ("lines of null", "d.jsonl", {"d.jsonl": "null\n" * 5}, ("d.jsonl",)),
    ("lines of numbers", "d.jsonl", {"d.jsonl": "1\n2\n3\n"}, ("d.jsonl",)),
    ("lines of texts", "d.jsonl", {"d.jsonl": '"a"\n"b"\n'}, ("d.jsonl",)),
    ("lines of lists", "d.jsonl", {"d.jsonl": '["a", "b"]\n' * 3}, ("d.jsonl",)),
    ("lines of {}", "d.jsonl", {"d.jsonl": "{}\n" * 5}, ("d.jsonl",)),
    ("a null among rows", "d.jsonl", {"d.jsonl": LINES + "null\n" + LINES}, ("d.jsonl",)),
    ("a number", "d.json", {"d.json": "17"}, ("d.json",)),
    ("a list of numbers", "d.json", {"d.json": "[1, 2, 3]"}, ("d.json",)),
    ("a list of nulls", "d.json", {"d.json": "[null, null]"}, ("d.json",)),
    ("json that is cut", "d.json", {"d.json": json.dumps(ROWS["demos"])[:-10]}, ("d.json", "cannot be read")),
    ("html", "d.jsonl", {"d.jsonl": "<html><body>404</body></html>"}, ("d.jsonl", "cannot be read")),
    ("git-lfs pointer", "d.jsonl", {"d.jsonl": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"}, ("d.jsonl",)),
    ("UTF-16", "d.jsonl", {"d.jsonl": LINES.encode("utf-16")}, ("d.jsonl", "cannot be read")),
    ("Latin-1", "d.jsonl", {"d.jsonl": '{"prompt": "caf\xe9", "completion": "b"}\n'.encode("latin-1")}, ("d.jsonl", "cannot be read")),
    ("binary", "d.jsonl", {"d.jsonl": bytes(range(256)) * 10}, ("d.jsonl", "cannot be read")),
    ("zeros", "d.jsonl", {"d.jsonl": bytes(1000)}, ("d.jsonl",)),
    ("3000 brackets", "d.jsonl", {"d.jsonl": NESTED}, ("d.jsonl",)),
    ("number of 5000 digits", "d.jsonl", {"d.jsonl": '{"prompt": "a", "completion": ' + "9" * 5000 + "}\n"}, ("d.jsonl",)),
    ("csv with too few cells", "d.csv", {"d.csv": 'prompt,completion\n"a\n'}, ("d.csv",)),
    ("csv with too many cells", "d.csv", {"d.csv": CSV + "a,b,c,d\n"}, ("d.csv", "cannot be read")),
    ("csv in Latin-1", "d.csv", {"d.csv": "prompt,completion\ncaf\xe9,b\n".encode("latin-1")}, ("d.csv", "cannot be read")),
    ("csv without a head", "d.csv", {"d.csv": "Why?,So.\nWho?,He.\n"}, ("d.csv", "columns")),
    ("txt for demonstrations", "d.txt", {"d.txt": "one\ntwo\n"}, ("d.txt", "expected")),
    ("columns of no format", "d.jsonl", {"d.jsonl": [{"a": "x", "b": "y"}] * 3}, ("d.jsonl", "columns a, b", "columns:")),
    ("rows of comparisons for sft", "d.jsonl", {"d.jsonl": [{"chosen": "", "rejected": "x"}] * 3}, ("d.jsonl",)),
    ("columns change", "d.jsonl", {"d.jsonl": LINES + '{"other": 1}\n'}, ("d.jsonl",)),
    ("type changes", "d.jsonl", {"d.jsonl": LINES + '{"prompt": ["a"], "completion": 5}\n'}, ("d.jsonl",)),
    ("column given twice", "d.jsonl", {"d.jsonl": '{"prompt": "a", "prompt": "b"}\n' * 3}, ("d.jsonl",)),
]  # fmt: skip
# dataset, name of the fault, the row's changes, words beside file and row
ROW_FAULTS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("demos", "empty completion", {"completion": ""}, ("completion",)),
    ("demos", "blank completion", {"completion": " \n "}, ("completion",)),
    ("demos", "null completion", {"completion": None}, ("completion",)),
    ("demos", "empty prompt", {"prompt": ""}, ("prompt",)),
    ("demos", "null prompt", {"prompt": None}, ("prompt",)),
    ("comparisons", "empty chosen", {"chosen": ""}, ("chosen",)),
    ("comparisons", "null rejected", {"rejected": None}, ("rejected",)),
    ("comparisons", "empty prompt", {"prompt": ""}, ("prompt",)),
    ("comparisons", "number", {"chosen": 7}, ("chosen",)),
    ("comparisons", "truth value", {"chosen": True}, ("chosen",)),
    ("comparisons", "list of numbers", {"chosen": [1, 2]}, ("chosen",)),
    ("comparisons", "mapping", {"chosen": {"text": "Yes."}}, ("chosen",)),
    ("comparisons", "same answers", {"rejected": "Yes."}, ("same|identical",)),
    ("prompts", "null", {"prompt": None}, ("prompt",)),
    ("prompts", "empty", {"prompt": ""}, ("prompt",)),
    ("prompts", "number", {"prompt": 5}, ("prompt",)),
    ("corpus", "null", {"text": None}, ("text",)),
    ("corpus", "list", {"text": ["a"]}, ("text",)),
]
USER, SAID = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
# name, messages, words beside file and row
MESSAGES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("unknown role", [USER, {"role": "robot", "content": "So."}], ("robot", "role")),
    ("role null", [USER, {"role": None, "content": "So."}], ("role",)),
    ("no role", [USER, {"content": "So."}], ("role",)),
    ("role number", [USER, {"role": 5, "content": "So."}], ("role",)),
    ("content null", [USER, {"role": "assistant", "content": None}], ("content|messages",)),
    ("content empty", [USER, {"role": "assistant", "content": ""}], ("content|messages|empty",)),
    ("content number", [USER, {"role": "assistant", "content": 5}], ("content|messages",)),
    ("no content", [USER, {"role": "assistant"}], ("content|messages",)),
    ("no messages", [], ("messages|empty",)),
    ("null", None, ("messages",)),
    ("text", "Why? So.", ("messages",)),
    ("list of texts", ["Why?", "So."], ("messages",)),
    ("no answer", [USER], ("assistant|messages|roles",)),
    ("answer first", [SAID, USER], ("roles|messages",)),
    ("two users", [USER, USER, SAID], ("roles|messages",)),
    ("system at the end", [USER, SAID, {"role": "system", "content": "x"}], ("roles|messages",)),
    ("image", [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, SAID], ("image|messages",)),
    ("audio", [{"role": "user", "content": [{"type": "input_audio", "data": "x"}]}, SAID], ("audio|messages",)),
    ("part without text", [{"role": "user", "content": [{"type": "text"}]}, SAID], ("messages|text",)),
]
# name, content of the template's file, words
TEMPLATES: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("syntax error", "{% for m in messages %}{{ m.content }", ("own.jinja",)),
    ("unknown tag", "{% fro m in messages %}{% endfor %}", ("own.jinja", "fro")),
    ("division by zero", "{{ 1 / 0 }}", ("own.jinja", "zero")),
    ("undefined", "{{ nothing.at.all }}", ("own.jinja", "nothing")),
    ("unknown filter", "{{ messages | nofilter }}", ("own.jinja", "nofilter")),
    ("import", "{% import 'other.jinja' as o %}{{ messages }}", ("own.jinja",)),
    ("include", "{% include 'other.jinja' %}", ("own.jinja",)),
    ("endless macro", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", ("own.jinja",)),
    ("endless loop", "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}", ("own.jinja",)),
    ("range of 1e10", "{% for i in range(10000000000) %}x{% endfor %}", ("own.jinja",)),
    ("100 MB", "{{ 'x' * 100000000 }}", ("own.jinja",)),
    ("sandbox", "{{ messages.__class__.__mro__ }}", ("own.jinja",)),
    ("raise_exception", "{{ raise_exception('no such roles') }}", ("no such roles",)),
    ("empty", "", ("own.jinja",)),
    ("blank", "  \n", ("own.jinja",)),
    ("constant", "Hello.", ("own.jinja",)),
    ("drops the answer", "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", ("template",)),
    ("Latin-1", "{# caf\xe9 #}{{ messages }}".encode("latin-1"), ("own.jinja", "UTF-8|utf-8")),
    ("binary", bytes(range(256)), ("own.jinja",)),
]  # fmt: skip


def _file_cases() -> list[Case]:
    found = []
    for name, path, files, words in FILES:
        found.append(Case("data file", name, words, changes={"data.demos.path": path}, files=files))
    changes: dict[str, Any] = {"data.demos.path": "demos.parquet"}
    found.append(
        Case(
            "data file",
            "a parquet that is cut",
            ("demos.parquet", "cannot be read"),
            changes=changes,
            setup=_cut_parquet,
        )
    )
    changes = {"data.demos.path": "saved"}
    for content in ("{", "{}", "[]", "null", '{"_data_files": 5}', '{"_data_files": [{"filename": "no.arrow"}]}'):
        found.append(Case("saved", f"state.json {content}", ("saved",), changes=changes, setup=_saved(content)))
    found.append(Case("saved", "rows are gone", ("saved",), changes=changes, setup=_saved(None)))
    found.append(
        Case("saved", "split of none", ("saved",), changes=changes | {"data.demos.split": "test"}, setup=_saved("{}"))
    )
    fifo = {"data.demos.path": "pipe.jsonl"}
    found.append(
        Case(
            "data file", "a pipe", ("pipe.jsonl",), changes=fifo, setup=lambda folder: os.mkfifo(folder / "pipe.jsonl")
        )
    )
    found.append(
        Case("data file", "a device", ("/dev/zero|data.demos.path",), changes={"data.demos.path": "/dev/zero"})
    )
    link = {"data.demos.path": "link.jsonl"}
    circle = lambda folder: (folder / "link.jsonl").symlink_to("link.jsonl")  # noqa: E731
    found.append(Case("data file", "a link to itself", ("link.jsonl",), changes=link, setup=circle))
    broken = lambda folder: (folder / "link.jsonl").symlink_to("nowhere")  # noqa: E731
    found.append(Case("data file", "a link to nothing", ("link.jsonl",), changes=link, setup=broken))
    for kind, content in (
        ("null lines", "null\n" * 5),
        ("Latin-1", b'{"text": "caf\xe9"}\n'),
        ("no json", "x\n"),
        ("numbers", "1\n2\n"),
    ):
        words = ("corpus.jsonl",)
        found.append(Case("scratch data", kind, words, base="scratch", files={"corpus.jsonl": content}))
    return found


def _row_cases() -> list[Case]:
    found = []
    for dataset, name, fault, more in ROW_FAULTS:
        rows = [GOOD[dataset]] * 3 + [GOOD[dataset] | fault] + [GOOD[dataset]]
        words = (rf"{dataset}\.jsonl", "row 3", *more)
        stages = STAGE_OF[dataset]
        found.append(Case("row", f"{dataset}, {name}", words, files={f"{dataset}.jsonl": rows}, stages=stages))
    for name, messages, more in MESSAGES:
        good = [{"messages": [USER, SAID]}]
        words = (r"demos\.jsonl", "row 3", *more)
        found.append(Case("messages", name, words, files={"demos.jsonl": good * 3 + [{"messages": messages}]}))
    sharegpt = [
        ("unknown turn", [{"from": "human", "value": "a"}, {"from": "robot", "value": "b"}], ("robot|from",)),
        (
            "no value",
            [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}],
            ("value|conversations|content",),
        ),
        ("empty", [], ("conversations|empty|messages",)),
    ]
    for name, turns, more in sharegpt:
        good = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
        files = {"demos.jsonl": good * 3 + [{"conversations": turns}]}
        found.append(Case("sharegpt", name, (r"demos\.jsonl", "row 3", *more), files=files))
    return found


def _setting_cases() -> list[Case]:
    """Formats, columns, limits and lengths that do not fit the data."""
    settings: list[tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = [
        ("format of others", {"data.demos.format": "comparison"}, (), ("demos.jsonl", "expected|columns")),
        ("format hh", {"data.demos.format": "hh"}, (), ("demos.jsonl", "expected|columns")),
        ("format messages", {"data.demos.format": "messages"}, (), ("demos.jsonl", "expected|columns")),
        (
            "column that is not there",
            {"data.demos.columns": {"promt": "prompt"}},
            (),
            ("'promt'", "did you mean 'prompt'"),
        ),
        (
            "two columns to one",
            {"data.demos.columns": {"prompt": "x", "completion": "x"}},
            (),
            ("several columns to one", "x"),
        ),
        ("column renamed away", {"data.demos.columns": {"completion": "other"}}, (), ("demos.jsonl", "columns")),
        ("split of a file", {"data.demos.split": "test"}, (), ("data.demos.split", "no effect")),
        ("revision of a file", {"data.demos.revision": "main"}, (), ("data.demos.revision", "no effect")),
        ("name of a file", {"data.demos.name": "default"}, (), ("data.demos.name", "no effect")),
        (
            "demonstrations for dpo",
            {"stages.dpo.data": "demos"},
            ("dpo",),
            ("stages.dpo", "demos.jsonl", "expected comparisons"),
        ),
        (
            "demonstrations for reward",
            {"stages.reward.data": "demos"},
            ("reward",),
            ("stages.reward", "expected comparisons"),
        ),
        ("comparisons of a corpus", {"stages.dpo.data": "corpus"}, ("dpo",), ("corpus.jsonl", "expected")),
        ("prompts for sft", {"stages.sft.data": "prompts"}, (), ("stages.sft", "prompts.jsonl", "expected")),
        ("corpus for sft", {"stages.sft.data": "corpus"}, (), ("stages.sft", "corpus.jsonl", "expected")),
        ("all too long", {"stages.sft.training.max_length": 3}, (), ("demos.jsonl", "max_length = 3")),
        (
            "all prompts too long",
            {"stages.evaluate.max_prompt_length": 2},
            ("evaluate",),
            ("prompts.jsonl", "max_prompt_length"),
        ),
        ("longer than the model", {"stages.evaluate.max_new_tokens": 500}, ("evaluate",), ("500", "128 positions")),
        (
            "fewer prompts than a batch",
            {"stages.ppo.training.gradient_accumulation_steps": 64},
            ("ppo",),
            ("fewer than one batch", "256"),
        ),
        (
            "all held out",
            {"stages.sft.eval_data": "demos", "data.demos.heldout": 0.999},
            (),
            ("demos", "held out|prompts"),
        ),
        ("no such token", {"tokenizer.pad_token": "<nothing>"}, (), ("tokenizer.pad_token", "vocabulary")),
        ("pad is eos", {"tokenizer.pad_token": "<eos>"}, (), ("tokenizer.pad_token", "same as eos")),
        ("eos is unknown", {"tokenizer.eos_token": "<end>"}, (), ("tokenizer.eos_token", "vocabulary")),
        ("eos is pad", {"tokenizer.eos_token": "<pad>"}, (), ("pad|eos",)),
        ("no such template", {"tokenizer.chat_template": "chatlm"}, (), ("tokenizer.chat_template", "chatml")),
        ("template is a folder", {"tokenizer.chat_template": "model"}, (), ("tokenizer.chat_template", "model")),
        ("checks allow none", {"checks.duplicate": 0, "data.demos.path": "twice.jsonl"}, (), ("twice.jsonl",)),
    ]
    files = {"twice.jsonl": [GOOD["demos"]] * 4}
    return [
        Case("setting", name, words, changes=changes, stages=stages, files=files)
        for name, changes, stages, words in settings
    ]


def _template_cases() -> list[Case]:
    found = []
    changes = {"tokenizer.chat_template": "own.jinja"}
    for name, content, words in TEMPLATES:
        escaped = tuple(re.escape(word) if "|" not in word else word for word in words)
        found.append(Case("template", name, escaped, changes=changes, files={"own.jinja": content}))
    conversation = tiny.conversational(ROWS["demos"])
    files = {"own.jinja": "{{ raise_exception('no system') }}", "demos.jsonl": conversation}
    found.append(Case("template", "refuses every row", ("no system",), changes=changes, files=files))
    return found


def cases() -> list[Case]:
    """All cases of this file."""
    return _file_cases() + _row_cases() + _setting_cases() + _template_cases()
