"""Files that are damaged, or that other readers trip over: read as they are, or refused with one message."""

import json
import logging
import re

import pytest
import tiny
from datasets import Dataset, DatasetDict
from test_sources import compress, fingerprint, read

from pipeline.config.load import load
from pipeline.data import chat_templates, run_tokenizer
from pipeline.system.errors import UserError

GOOD = '{"text": "a"}\n'
NONE = {"text": None}


def write_text(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# Lines that are null


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        ("null\n" + GOOD, [NONE, {"text": "a"}]),
        ("null\n" * 3 + GOOD, [NONE] * 3 + [{"text": "a"}]),
        ("\n  null \r\n" + GOOD, [NONE, {"text": "a"}]),
        ("null " + GOOD, [NONE, {"text": "a"}]),
        (GOOD + "null\n" + GOOD, [{"text": "a"}, NONE, {"text": "a"}]),
        (GOOD + "null", [{"text": "a"}, NONE]),
        ('\ufeffnull\n{"text": "null"}\n', [NONE, {"text": "null"}]),
    ],
)
def test_a_line_that_is_null_is_a_row_without_values(tmp_path, lines, rows, streaming):
    """pyarrow crashes the process where a block of lines begins with null."""
    write_text(tmp_path / "rows.jsonl", lines)
    assert read(tmp_path, streaming, path="rows.jsonl") == rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("size", [1, 20_000])
@pytest.mark.parametrize("before", ["", "null\n", GOOD])
def test_null_on_a_line_of_its_own_within_an_object(tmp_path, streaming, size, before):
    """Objects over several lines; the larger ones are more than a block of pyarrow's."""
    rows = [{"text": "a", "x": [["b", None], [None]], "y": None}, {"text": "c", "x": [[None] * size], "y": "null"}]
    indented = "\n".join(json.dumps(row, indent=1) for row in rows).replace('"y": null', '"y":\nnull')
    write_text(tmp_path / "rows.jsonl", before + indented + "\n")
    found = read(tmp_path, streaming, path="rows.jsonl")
    nothing = {"text": "a" if before == GOOD else None, "x": None, "y": None}
    assert found == ([nothing] if before else []) + rows


@pytest.mark.parametrize("lines", ["null,\n" + GOOD, "nullx\n", "null}\n", GOOD + "null\n]", "null\n5\n"])
def test_what_begins_with_null_and_is_no_json(tmp_path, lines):
    write_text(tmp_path / "rows.jsonl", lines)
    with pytest.raises(UserError, match=r"rows\.jsonl: cannot be read: "):
        read(tmp_path, path="rows.jsonl")


def test_null_in_a_later_block_of_a_large_file(tmp_path):
    """The reader takes 10 MB at a time; here the second 10 MB begin with null lines."""
    long = json.dumps({"text": "a" * 9_985}) + "\n"
    rows = [long] * 1100 + ["null\n"] * 300 + [GOOD]
    rows[1049:1049] = ["null\n"] * 400
    write_text(tmp_path / "rows.jsonl", "".join(rows))
    found = [row["text"] for row in read(tmp_path, path="rows.jsonl")]
    assert [text is None for text in found] == [row == "null\n" for row in rows]


@pytest.mark.parametrize("lines", ["null\n", "null\nnull\n", "null", "{}\n{}\n"])
@pytest.mark.parametrize("compression", [None, ".gz"])
def test_a_file_without_any_column(tmp_path, lines, compression):
    path = write_text(tmp_path / "rows.jsonl", lines)
    path = compress(path, compression) if compression else path
    with pytest.raises(UserError) as error:
        read(tmp_path, path=path.name)
    expected = 'is empty, or its rows have no columns; expected rows such as {"text": "..."}'
    assert str(error.value) == f"{path}: {expected}"


# Texts that look like something else


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "2020-01-01"}, {"text": "2021-02-03T10:00:00Z"}],
        [{"prompt": "2020-01-01 10:00", "completion": "2021-02-03T10:00:00"}],
        [{"messages": [{"role": "user", "content": "2020-01-01"}, {"role": "assistant", "content": "2020-01-02"}]}],
        [{"text": "2020-01-01", "number": 1}, {"text": None, "number": 2}],
    ],
)
def test_texts_that_look_like_dates_stay_text(tmp_path, rows, streaming):
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    assert read(tmp_path, streaming, path="rows.jsonl") == rows


# Files that cannot be read


def test_brackets_without_end(tmp_path):
    write_text(tmp_path / "rows.jsonl", '{"text": "a", "x": ' + "[" * 3000 + "]" * 3000 + "}\n")
    with pytest.raises(UserError) as error:
        read(tmp_path, path="rows.jsonl")
    assert str(error.value).endswith("rows.jsonl: cannot be read: a value has too many brackets within brackets")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("state", ["{", "{}", "[]", '{"_data_files": [{}]}', "\udce9"])
@pytest.mark.parametrize("split", [False, True])
def test_damaged_folder_of_save_to_disk(tmp_path, state, split, streaming):
    rows = Dataset.from_list([{"text": "a"}])
    (DatasetDict(train=rows) if split else rows).save_to_disk(tmp_path / "saved")
    damaged = tmp_path / "saved" / ("train" if split else "") / "state.json"
    damaged.write_text(state, encoding="utf-8", errors="surrogateescape")
    words = r"saved.*cannot be read \(\w+: .*write the folder again with save_to_disk"
    with pytest.raises(UserError, match=words):
        read(tmp_path, streaming, path="saved")
    with pytest.raises(UserError, match=words):
        fingerprint(tmp_path, path="saved")


DAMAGED = {
    "corpus.jsonl": GOOD + '{"text": "b\n',
    "corpus.csv": '"text\n',
    "corpus.parquet": "PAR1 and then nothing",
    "corpus.arrow": "nothing",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_one_message_and_nothing_of_the_library(cli, write_config, tmp_path, name, caplog):
    config = write_config(tmp_path, **{"data.corpus.path": name})
    write_text(tmp_path / name, DAMAGED[name])
    logging.getLogger("datasets").addHandler(caplog.handler)
    try:
        exit_code, shown, message = cli("plan", config)
    finally:
        logging.getLogger("datasets").removeHandler(caplog.handler)
    assert (exit_code, shown, caplog.text) == (2, "", "")
    assert message.startswith(f"error: {tmp_path / name}: ") and message.count("\n") == 1
    assert logging.getLogger("datasets").level == logging.WARNING


# What a new tokenizer is trained on


@pytest.mark.parametrize("streaming", [False, True])
def test_a_new_tokenizer_from_a_file_that_is_not_utf8(cli, write_config, tmp_path, streaming):
    config = write_config(tmp_path, **{"data.corpus.streaming": streaming})
    (tmp_path / "corpus.jsonl").write_bytes('{"text": "Café"}\n'.encode("latin-1"))
    exit_code, _, message = cli("plan", config)
    assert exit_code == 2
    assert re.fullmatch(rf"error: {re.escape(str(tmp_path))}/corpus\.jsonl: cannot be read: .*(UTF|utf).*\n", message)


def test_a_new_tokenizer_from_words_of_any_length(write_config, tmp_path):
    """The time of training grows with the square of a word's length: 64 s for 300,000 characters."""
    config = load(write_config(tmp_path))
    tiny.write_rows(tmp_path / "corpus.jsonl", [{"text": "a" * 2_000_000}, {"text": "Short words."}])
    tokenizer = run_tokenizer.build(config)
    assert tokenizer.decode(tokenizer.encode("aaaa Short")) == "aaaa Short"


def test_long_words_change_no_other_tokenizer(write_config, tmp_path):
    texts = ["b" * 999, "c d " * 300, "e" * 999 + " f"]
    tiny.write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    config = load(write_config(tmp_path / "run", **{"data.corpus.path": str(tmp_path / "corpus.jsonl")}))
    assert list(run_tokenizer._texts(config, config.model.scratch.tokenizer.data))[: len(texts)] == texts


# Chat templates

TEMPLATES = [
    ("Answer:\n{{ 1 / 0 }}", ", line 2: the chat template fails: ZeroDivisionError: division by zero"),
    ("{% import 'x' as y %}", ", line 1: .* imports or includes another file; write all of it in one file"),
    ("\n\n{% include 'x' %}", ", line 3: .* imports or includes another file; write all of it in one file"),
    ("{% macro m() %}\n{{ m() }}{% endmacro %}{{ m() }}", ", line 2: the chat template fails: RecursionError: .*"),
    ("a\n{% for m in messages %}", ", line 2: syntax error in the chat template: Unexpected end of template.*"),
    ("a\n{{ messages | nothing }}", ", line 2: syntax error in the chat template: No filter named 'nothing'."),
    ("\n{{ a.b }}", ", line 2: the chat template fails: 'a' is undefined"),
    ("{% for a in range(100000) %}{{ 'abcdefghij' * 2 }}{% endfor %}", ": .* writes 2,000,000 characters .* 1,000,000"),
    (
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        ": the chat template takes more than 0.3 s for a dialogue of two short messages; look for a long loop in it",
    ),
    (b"a\nCaf\xe9", ", line 2: expected UTF-8, got the byte 0xe9; save the file as UTF-8"),
]


@pytest.mark.parametrize(("template", "words"), TEMPLATES)
def test_broken_template(cli, write_config, tmp_path, monkeypatch, template, words):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.3)
    config = write_config(tmp_path, **{"tokenizer.chat_template": "own.jinja"})
    path = tmp_path / "own.jinja"
    path.write_bytes(template if isinstance(template, bytes) else template.encode())
    exit_code, shown, message = cli("plan", config)
    assert (exit_code, shown) == (2, "")
    assert re.fullmatch(
        rf"error: tokenizer\.chat_template: {re.escape(str(path))}{words}(;|, and)? ?(mend it, or set .*)?\n", message
    )


def test_broken_template_of_the_model(cli, write_config, tmp_path):
    model = tiny.make_model(tmp_path / "model")
    write_text(model / "chat_template.jinja", "{% for m in messages %}")
    exit_code, _, message = cli("plan", write_config(tmp_path, model={"path": "model"}))
    assert exit_code == 2
    assert message.startswith("error: model: its own chat template, line 1: syntax error in the chat template: ")


def test_a_template_may_fail_for_some_rows(cli, write_config, tmp_path, write_rows):
    """What the first try does not meet is a fault of the rows that do, with the template's line."""
    text = (chat_templates.TEMPLATES / "scratch.jinja").read_text()
    write_text(tmp_path / "own.jinja", text + "\n{% if messages[0].content == 'bad' %}{{ 1 / 0 }}{% endif %}")
    config = write_config(tmp_path, **{"tokenizer.chat_template": "own.jinja"})
    rows = [{"prompt": prompt, "completion": "Yes."} for prompt in ("a", "b", "bad", "c")]
    write_rows(tmp_path / "demos.jsonl", rows)
    exit_code, _, message = cli("check-data", config, "--stage", "sft")
    assert exit_code == 2
    assert "1 of 4 rows (25.00%) do not fit their format" in message
    assert "demos.jsonl: row 2: prompt: the chat template fails, line 6: ZeroDivisionError: division by zero" in message


# Damaged tokenizers


@pytest.mark.parametrize("content", ["{", "{}", "[]", "", '{"model": {"type": "BPE"}}', '{"version": "9"}'])
def test_damaged_tokenizer(tmp_path, content):
    """The tokenizers library raises a bare Exception for some of these."""
    write_text(tiny.make_model(tmp_path / "model") / "tokenizer.json", content)
    with pytest.raises(UserError, match=r"model: holds no tokenizer that can be read \(.+\); restore it$"):
        run_tokenizer.open_saved(tmp_path / "model")


def test_damaged_tokenizer_of_the_model(cli, write_config, tmp_path):
    path = tiny.make_model(tmp_path / "model") / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [["no", "token"]]
    write_text(path, json.dumps(content))
    exit_code, shown, message = cli("plan", write_config(tmp_path, model={"path": "model"}))
    assert (exit_code, shown) == (2, "")
    assert message.startswith("error: model.path: no tokenizer at 'model': ") and message.count("\n") == 1


def test_chats_that_look_like_the_traces_of_agents(tmp_path, cli):
    """The datasets library takes such columns for another format, which needs a package of its own."""
    row = {
        "id": 1,
        "source": "web",
        "model": "gpt",
        "system_prompt": "",
        **tiny.conversational(tiny.demonstrations())[0],
    }
    row = {**row, "messages": row.pop("prompt") + row.pop("completion")}
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    tiny.write_rows(tmp_path / "demonstrations.jsonl", [row | {"id": i} for i in range(4)])
    exit_code, _, err = cli("plan", path)
    assert exit_code == 0, err
