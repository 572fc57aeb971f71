"""Rows with images, audio or video: each is counted with its reason, and none is read without them."""

import base64

import pytest
import tiny
from datasets import Audio, Dataset, Features, Image, List, Value

from pipeline.data.faults import RowFault, shown
from pipeline.data.media import MEDIA
from pipeline.data.rows import convert

HI = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]
ROWS = {
    "messages": {"messages": HI},
    "prompt_completion": {"prompt": "What is this?", "completion": "A cat."},
    "sharegpt": {"conversations": [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "Describe it.", "output": "A cat."},
    "comparison": {"prompt": "What is this?", "chosen": "A cat.", "rejected": "A dog."},
    "prompt": {"prompt": "What is this?"},
    "scored": {"prompt": "What?", "completions": ["a", "b"], "scores": [1, 0]},
    "hh": {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": "a", "rejected": "b"},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "text": {"text": "A cat."},
}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def fault_of(row, shape, want):
    with pytest.raises(RowFault) as fault:
        convert(row, shape, want)
    return fault.value.kind, str(fault.value)


@pytest.mark.parametrize("column", MEDIA)
@pytest.mark.parametrize("shape", ROWS)
def test_a_column_of_media_is_a_fault_of_the_row(shape, column):
    want = "text" if shape == "text" else "prompts"
    kind, message = fault_of(ROWS[shape] | {column: ["cat.png"]}, shape, want)
    assert kind == "malformed"
    assert message == (
        f"{column}: expected text alone: images, audio and video are not read, got ['cat.png']; "
        f"to read the text without it, rename the column: `columns: {{{column}: unused}}`"
    )


@pytest.mark.parametrize("value", [None, "", [], [None], {}, {"bytes": None, "path": None}, [{"bytes": None}], 0])
@pytest.mark.parametrize("shape", ROWS)
def test_a_column_without_media_is_none(shape, value):
    want = "text" if shape == "text" else "prompts"
    assert convert(ROWS[shape] | {"images": value}, shape, want) == convert(ROWS[shape], shape, want)


class Unseen:
    def __repr__(self):
        raise AssertionError("what a message does not show was looked at")


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "",
        None,
        5,
        {"a": [1, "b", {"c": None}], 2: [[]]},
        "it's",
        ["x" * 300],
        "x" * 198,
        "x" * 199,
        {"a": "é" * 400},
    ],
)
def test_a_value_is_shown_as_python_writes_it_cut_to_200_characters(value):
    text = repr(value)
    assert shown(value) == (text if len(text) <= 200 else f"{text[:200]}...")


def test_no_more_is_looked_at_than_is_shown():
    assert shown(b"\x89PNG" * 1000) == "4000 bytes"
    assert shown([{"image": {"bytes": PNG, "path": "cat.png"}}]) == (
        f"[{{'image': {{'bytes': {len(PNG)} bytes, 'path': 'cat.png'}}}}]"
    )
    assert shown(["x" * 300, Unseen()]) == f"['{'x' * 198}..."
    assert shown({"a": ["x" * 99] * 3, "b": Unseen()}).startswith("{'a': ['xxx")
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[" * 200 + "..."


@pytest.mark.parametrize("value", ["cat.png", b"\x89PNG", {"bytes": None, "path": "cat.png"}, [[{"url": "x"}]], 5])
def test_any_value_counts(value):
    kind, message = fault_of(ROWS["messages"] | {"image": value}, "messages", "demonstrations")
    assert (kind, message.split(",")[0]) == ("malformed", "image: expected text alone: images")


PARTS = [
    {"type": "image"},
    {"type": "image", "image": "cat.png"},
    {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
    {"type": "image_url", "value": "cat.png"},
    {"type": "input_image", "image_url": "data:image/png;base64,"},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "audio", "audio": "cat.wav"},
    {"type": "audio_url", "value": "cat.wav"},
    {"type": "video", "video": ["1.png", "2.png"]},
    {"type": "video_url", "value": "cat.mp4"},
]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_media_is_a_fault_of_the_row(part):
    text = {"type": "text", "text": "What is this?"}
    expected = f"expected text alone: images, audio and video are not read, got {part!r}"
    for parts in ([part, text], [text, part]):
        asked = [{"role": "user", "content": parts}]
        for row, shape, field in (
            ({"messages": [*asked, HI[1]]}, "messages", "messages"),
            ({"prompt": asked, "chosen": "A cat.", "rejected": "A dog."}, "comparison", "prompt"),
            ({"prompt": asked}, "prompt", "prompt"),
        ):
            assert fault_of(row, shape, "prompts") == ("malformed", f"{field}: {expected}")


@pytest.mark.parametrize("part", [{"type": "file"}, {"type": "refusal", "refusal": "No."}, {"type": "document"}])
def test_other_parts_are_told_too(part):
    row = {"messages": [{"role": "user", "content": [part]}, HI[1]]}
    seen = f"messages: expected parts of type 'text', got {part!r}"
    assert fault_of(row, "messages", "prompts") == ("malformed", seen)


def test_images_of_a_message():
    """Ollama's form has them beside a message's content."""
    row = {"messages": [HI[0] | {"images": ["aGk="]}, HI[1]]}
    assert fault_of(row, "messages", "prompts")[1].startswith("messages: expected text alone: ")


@pytest.mark.parametrize("parts", [[("text", "What is this?")], [("text", "What "), ("text", "is this?")]])
def test_parts_that_say_value_for_text(parts):
    content = [{"type": kind, "value": value} for kind, value in parts]
    row = {"messages": [{"role": "user", "content": content}, HI[1]]}
    assert convert(row, "messages", "demonstrations") == {"prompt": HI[:1], "completion": "A cat."}


# From files


def run_of(folder, rows_path, kind="sft", **section):
    stages = {kind: {"data": "rows", "init": "base", "training": {"max_length": 64, "max_steps": 2}}}
    data = {"rows": {"path": rows_path, **section}}
    return tiny.make_run(folder, stages, data=data, training={"use_cpu": True, "bf16": False})


def test_check_data_counts_them_and_shows_the_rest(cli, tmp_path):
    rows = [ROWS["messages"] | {"images": ["cat.png"] if i == 1 else []} for i in range(3)]
    rows.append({"messages": [{"role": "user", "content": [PARTS[2]]}, HI[1]]})
    path = run_of(tmp_path, "rows.jsonl")
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    exit_code, shown, message = cli("check-data", path, "--sample", "2")
    assert exit_code == 2
    assert shown.count("<user>What is this?<assistant>⟦A cat.<eos>⟧") == 2
    assert "2 of 4 rows (50.00%) do not fit their format; `checks.malformed` allows 1.00%. First " in message
    assert "rows.jsonl: row 1: images: expected text alone: images, audio and video are not read, got ['cat" in message
    assert "then " in message and message.rstrip().endswith("rows.jsonl: row 3")


@pytest.mark.parametrize("streaming", [False, True])
def test_raw_text_beside_an_image(cli, tmp_path, streaming):
    path = run_of(tmp_path, "rows.jsonl", "pretrain", streaming=streaming)
    tiny.write_rows(tmp_path / "rows.jsonl", [{"text": f"Text {i}.", "image": f"{i}.png"} for i in range(3)])
    exit_code, _, message = cli("check-data", path)
    assert exit_code == 2
    counted = "of 3 documents none can be used {'malformed': 3}" if streaming else "3 of 3 rows (100.00%) do not fit"
    assert counted in message
    assert "image: expected text alone: images, audio and video are not read, got '0.png'" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_renamed_the_text_is_read(cli, tmp_path, streaming):
    path = run_of(tmp_path, "rows.jsonl", "pretrain", streaming=streaming, columns={"image": "unused"})
    tiny.write_rows(tmp_path / "rows.jsonl", [{"text": f"Text {i}.", "image": f"{i}.png"} for i in range(3)])
    exit_code, shown, message = cli("check-data", path, "--sample", "3")
    assert (exit_code, message) == (0, "")
    assert "Text 2.<eos>" in shown


def test_media_of_a_table_are_not_decoded(cli, tmp_path):
    """They may need other packages, and damaged ones would end the run."""
    rows = [
        {"messages": HI, "images": [], "audio": None},
        {"messages": HI, "images": [{"bytes": PNG, "path": None}], "audio": None},
        {"messages": HI, "images": [{"bytes": b"damaged", "path": None}], "audio": None},
        {"messages": HI, "images": [], "audio": {"bytes": b"damaged", "path": None}},
    ]
    messages = List({"role": Value("string"), "content": Value("string")})
    stored = Dataset.from_list(rows).cast(Features({"messages": messages, "images": List(Image()), "audio": Audio()}))
    stored.to_parquet(tmp_path / "rows.parquet")
    stored.save_to_disk(tmp_path / "saved")
    for place in ("rows.parquet", "saved"):
        exit_code, shown, message = cli("check-data", run_of(tmp_path / place[:4], f"../{place}"), "--sample", "1")
        assert exit_code == 2
        assert "<user>What is this?<assistant>⟦A cat.<eos>⟧" in shown
        assert "3 of 4 rows (75.00%) do not fit their format" in message
        assert "row 1: images: expected text alone" in message and f"'bytes': {len(PNG)} bytes" in message
