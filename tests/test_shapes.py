"""Rows of every format become the messages they say, exactly; a row that does not fit says why, and nothing else."""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.convert import to_messages
from pipeline.data.faults import FAULTS, RowFault
from pipeline.data.formats import FIELDS, detect
from pipeline.data.rows import convert, serves

SHAPES = ("text", "prompt", "prompt_completion", "messages", "alpaca")
SHAPES += ("sharegpt", "unpaired", "comparison", "hh", "scored")
WANTS = ("text", "demonstrations", "comparisons", "unpaired", "prompts")


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def said(speaker, value):
    """A turn as ShareGPT writes it."""
    return {"from": speaker, "value": value}


@dataclass(frozen=True)
class Case:
    """A row, its format, and what it must become."""

    name: str
    shape: str
    row: dict[str, Any]
    prompt: list[dict[str, str]]
    answer: str | None = None  # its completion, or its chosen side
    rejected: str | None = None


CASES = [
    Case("text", "prompt", {"prompt": "Hi"}, [user("Hi")]),
    Case("spaces kept", "prompt", {"prompt": " Hi\n"}, [user(" Hi\n")]),
    Case("messages", "prompt", {"prompt": [user("Hi")]}, [user("Hi")]),
    Case(
        "many turns",
        "prompt",
        {"prompt": [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?")], "id": 3},
        [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?")],
    ),
    Case("text", "prompt_completion", {"prompt": "Hi", "completion": "Hello!"}, [user("Hi")], "Hello!"),
    Case(
        "system column",
        "prompt_completion",
        {"system": "Be brief.", "prompt": "Hi", "completion": "Hello!"},
        [system("Be brief."), user("Hi")],
        "Hello!",
    ),
    Case(
        "blank system column",
        "prompt_completion",
        {"system": " ", "prompt": "Hi", "completion": "Hello!"},
        [user("Hi")],
        "Hello!",
    ),
    Case(
        "messages",
        "prompt_completion",
        {"prompt": [user("Hi")], "completion": [assistant("Hello!")]},
        [user("Hi")],
        "Hello!",
    ),
    Case(
        "one message each",
        "prompt_completion",
        {"prompt": user("Hi"), "completion": assistant("Hello!")},
        [user("Hi")],
        "Hello!",
    ),
    Case(
        "many turns, text",
        "prompt_completion",
        {"prompt": [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?")], "completion": "Because."},
        [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?")],
        "Because.",
    ),
    Case("one turn", "messages", {"messages": [user("Hi"), assistant("Hello!")]}, [user("Hi")], "Hello!"),
    Case(
        "system, many turns",
        "messages",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "Why is the sea salty?"},
                {"role": "assistant", "content": "Rivers carry salt."},
            ]
        },
        [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why is the sea salty?")],
        "Rivers carry salt.",
    ),
    Case(
        "developer",
        "messages",
        {"messages": [{"role": "developer", "content": "Be brief."}, user("Hi"), assistant("Hello!")]},
        [system("Be brief."), user("Hi")],
        "Hello!",
    ),
    Case(
        "parts",
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Why is "}, {"type": "text", "text": "it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Because."}]},
            ]
        },
        [user("Why is it?")],
        "Because.",
    ),
    Case(  # a table has every key in every row
        "keys without values",
        "messages",
        {
            "messages": [
                {"role": "user", "content": "Hi", "name": "Ann", "tool_calls": None, "weight": None},
                {"role": "assistant", "content": "Hello!", "name": None, "tool_calls": [], "weight": 1},
            ]
        },
        [user("Hi")],
        "Hello!",
    ),
    Case(
        "plain", "alpaca", {"instruction": "Name a sea.", "output": "The Baltic."}, [user("Name a sea.")], "The Baltic."
    ),
    Case(
        "input",
        "alpaca",
        {"instruction": "Translate.", "input": "mer", "output": "sea"},
        [user("Translate.\n\nmer")],
        "sea",
    ),
    Case("no input", "alpaca", {"instruction": "Greet.", "input": None, "output": "Hi"}, [user("Greet.")], "Hi"),
    Case("blank input", "alpaca", {"instruction": "Greet.", "input": " ", "output": "Hi"}, [user("Greet.")], "Hi"),
    Case(
        "system",
        "alpaca",
        {"system": "Be brief.", "instruction": "Translate.", "input": "mer", "output": "sea"},
        [system("Be brief."), user("Translate.\n\nmer")],
        "sea",
    ),
    Case(
        "history",
        "alpaca",
        {
            "system": "Be brief.",
            "history": [["Hi", "Hello!"], ["And now?", "Ask."]],
            "instruction": "Translate.",
            "input": "mer",
            "output": "sea",
        },
        [
            system("Be brief."),
            user("Hi"),
            assistant("Hello!"),
            user("And now?"),
            assistant("Ask."),
            user("Translate.\n\nmer"),
        ],
        "sea",
    ),
    Case(
        "no history",
        "alpaca",
        {"history": [], "system": "", "instruction": "Greet.", "input": "", "output": "Hi"},
        [user("Greet.")],
        "Hi",
    ),
    Case(
        "one turn",
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        [user("Hi")],
        "Hello!",
    ),
    Case(
        "system turn, many turns",
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello!"},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Because."},
            ]
        },
        [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?")],
        "Because.",
    ),
    Case(
        "system column",
        "sharegpt",
        {"system": "Be brief.", "conversations": [said("human", "Hi"), said("gpt", "Hello!")], "tools": None},
        [system("Be brief."), user("Hi")],
        "Hello!",
    ),
    Case(
        "other speakers",
        "sharegpt",
        {"conversations": [said("user", "Hi"), said("bot", "Hello!"), said("user", "Why?"), said("model", "Because.")]},
        [user("Hi"), assistant("Hello!"), user("Why?")],
        "Because.",
    ),
    Case(
        "role and content",
        "sharegpt",
        {"conversations": [user("Hi"), assistant("Hello!")]},
        [user("Hi")],
        "Hello!",
    ),
    Case(  # a table in which other rows have sides
        "no sides",
        "sharegpt",
        {"conversations": [said("human", "Hi"), said("gpt", "Hello!")], "chosen": None},
        [user("Hi")],
        "Hello!",
    ),
    Case(
        "ranking",
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "What?"},
        },
        [user("Hi")],
        "Hello!",
        "What?",
    ),
    Case(
        "ranking, system, many turns",
        "sharegpt",
        {
            "conversations": [
                said("system", "Be brief."),
                said("human", "Hi"),
                said("gpt", "Yes?"),
                said("human", "Why?"),
            ],
            "chosen": said("gpt", "Because."),
            "rejected": said("gpt", "No idea."),
        },
        [system("Be brief."), user("Hi"), assistant("Yes?"), user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "ranking, system column",
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [said("human", "Hi")],
            "chosen": said("gpt", "Hello!"),
            "rejected": said("gpt", "What?"),
        },
        [system("Be brief."), user("Hi")],
        "Hello!",
        "What?",
    ),
    Case(
        "text",
        "comparison",
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        [user("Hi")],
        "Hello!",
        "What?",
    ),
    Case(
        "system column",
        "comparison",
        {"system": "Be brief.", "prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        [system("Be brief."), user("Hi")],
        "Hello!",
        "What?",
    ),
    Case(
        "prompt of many turns",
        "comparison",
        {
            "prompt": [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?")],
            "chosen": [assistant("Because.")],
            "rejected": [assistant("No idea.")],
        },
        [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "UltraFeedback, binarized",
        "comparison",
        {
            "prompt": "Why is the sea salty?",
            "prompt_id": "a3b1",
            "chosen": [user("Why is the sea salty?"), assistant("Rivers carry salt.")],
            "rejected": [user("Why is the sea salty?"), assistant("It is not.")],
            "messages": [user("Why is the sea salty?"), assistant("Rivers carry salt.")],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        [user("Why is the sea salty?")],
        "Rivers carry salt.",
        "It is not.",
    ),
    Case(
        "two dialogues",
        "comparison",
        {"chosen": [user("Hi"), assistant("Hello!")], "rejected": [user("Hi"), assistant("What?")]},
        [user("Hi")],
        "Hello!",
        "What?",
    ),
    Case(
        "two dialogues of many turns",
        "comparison",
        {
            "prompt": None,
            "chosen": [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?"), assistant("Because.")],
            "rejected": [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?"), assistant("No idea.")],
        },
        [system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "instruction",
        "comparison",
        {"instruction": "Translate.", "input": "mer", "chosen": "sea", "rejected": "mother"},
        [user("Translate.\n\nmer")],
        "sea",
        "mother",
    ),
    Case(
        "instruction with system and history",
        "comparison",
        {
            "system": "Be brief.",
            "history": [["Hi", "Hello!"]],
            "instruction": "Translate.",
            "input": "",
            "chosen": "sea",
            "rejected": "mother",
        },
        [system("Be brief."), user("Hi"), assistant("Hello!"), user("Translate.")],
        "sea",
        "mother",
    ),
    Case(
        "question",
        "comparison",
        {"system": "", "question": "Why?", "chosen": "Because.", "rejected": "No idea."},
        [user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "question beside an empty prompt",
        "comparison",
        {"prompt": "", "question": "Why?", "chosen": "Because.", "rejected": "No idea."},
        [user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "one turn",
        "hh",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
        [user("Hi")],
        "Hello!",
        "What?",
    ),
    Case(
        "many turns",
        "hh",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\nAsk me.\n\nHuman: Why?\n\nAssistant: Because.\n\nSo it is.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\nAsk me.\n\nHuman: Why?\n\nAssistant: No idea.",
        },
        [user("Hi"), assistant("Hello!\nAsk me."), user("Why?")],
        "Because.\n\nSo it is.",
        "No idea.",
    ),
    Case(
        "names within a line",
        "hh",
        {
            "chosen": "\n\nHuman: Human: or Assistant: ?\n\nAssistant: The\nHuman: one.",
            "rejected": "\n\nHuman: Human: or Assistant: ?\n\nAssistant: None.",
        },
        [user("Human: or Assistant: ?")],
        "The\nHuman: one.",
        "None.",
    ),
    Case(
        "prompt beside",
        "hh",
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " What?"},
        [user("Hi")],
        "Hello!",
        "What?",
    ),
    Case(
        "prompt of many turns beside",
        "hh",
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant: ",
            "chosen": "Because.",
            "rejected": "No idea.",
        },
        [user("Hi"), assistant("Hello!"), user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "prompt beside whole dialogues",
        "hh",
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant:",
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",
            "rejected": "\n\nHuman: Hi\n\nAssistant: What?",
        },
        [user("Hi")],
        "Hello!",
        "What?",
    ),
    Case("prompt alone", "hh", {"prompt": "\n\nHuman: Hi\n\nAssistant:"}, [user("Hi")]),
    Case(
        "prompt of many turns alone",
        "hh",
        {"prompt": "Human: Hi\n\nAssistant: Hello!\n\nHuman: Why?"},
        [user("Hi"), assistant("Hello!"), user("Why?")],
    ),
    Case(
        "SHP, the first is better",
        "scored",
        {"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No idea.", "labels": 1, "score_A": 9},
        [user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "SHP, the second is better",
        "scored",
        {"history": "Why?", "human_ref_A": "No idea.", "human_ref_B": "Because.", "labels": 0, "score_A": 1},
        [user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "scores beside",
        "scored",
        {"prompt": "Why?", "completions": ["Perhaps.", "Because.", "No idea."], "scores": [2, 3.5, -1]},
        [user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "scores beside, prompt of messages, the first of equals",
        "scored",
        {
            "prompt": [system("Be brief."), user("Why?")],
            "completions": ["No.", "Because.", "So.", "What?"],
            "scores": [0, 1, 1, 0],
        },
        [system("Be brief."), user("Why?")],
        "Because.",
        "No.",
    ),
    Case(
        "StackExchange",
        "scored",
        {
            "qid": 7,
            "question": "Why?",
            "answers": [
                {"answer_id": 1, "text": "No idea.", "pm_score": 0, "selected": False},
                {"answer_id": 2, "text": "Because.", "pm_score": 4, "selected": True},
            ],
        },
        [user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "UltraFeedback",
        "scored",
        {
            "source": "evol",
            "instruction": "Why?",
            "completions": [
                {"model": "a", "response": "Perhaps.", "overall_score": 6.5},
                {"model": "b", "response": "No idea.", "overall_score": 1.0},
                {"model": "c", "response": "Because.", "overall_score": 9.0},
            ],
        },
        [user("Why?")],
        "Because.",
        "No idea.",
    ),
    Case(
        "prompt and completion",
        "unpaired",
        {"prompt": "Hi", "completion": "Hello!", "label": True},
        [user("Hi")],
        "Hello!",
    ),
    Case(
        "lists of messages",
        "unpaired",
        {"prompt": [user("Hi")], "completion": [assistant("Hello!")], "label": True},
        [user("Hi")],
        "Hello!",
    ),
    Case(
        "messages",
        "unpaired",
        {"messages": [system("Be brief."), user("Hi"), assistant("Hello!")], "kto_tag": True},
        [system("Be brief."), user("Hi")],
        "Hello!",
    ),
    Case(
        "conversations",
        "unpaired",
        {"conversations": [said("human", "Hi"), said("gpt", "Hello!")], "kto_tag": True},
        [user("Hi")],
        "Hello!",
    ),
    Case(
        "alpaca",
        "unpaired",
        {"instruction": "Translate.", "input": "mer", "output": "sea", "label": True},
        [user("Translate.\n\nmer")],
        "sea",
    ),
]
# Rows of `unpaired` whose completion is not to be learnt from.
REFUSED = [
    Case(
        "prompt and completion, false",
        "unpaired",
        {"prompt": "Hi", "completion": "What?", "label": False},
        [user("Hi")],
        "What?",
    ),
    Case(
        "messages, false",
        "unpaired",
        {"messages": [user("Hi"), assistant("What?")], "kto_tag": False},
        [user("Hi")],
        "What?",
    ),
]


def each(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.shape}: {case.name}") for case in cases])


def test_cases_cover_every_format():
    assert {case.shape for case in CASES} == set(SHAPES) - {"text"}


@each([*CASES, *REFUSED])
def test_detect(case):
    assert detect(case.row) == case.shape


@each([*CASES, *REFUSED])
def test_prompt(case):
    assert convert(case.row, case.shape, "prompts") == {"prompt": case.prompt}


@each([case for case in CASES if case.answer])
def test_demonstration(case):
    """A comparison's is its chosen side."""
    expected = {"prompt": case.prompt, "completion": case.answer}
    assert convert(case.row, case.shape, "demonstrations") == expected


@each([case for case in CASES if case.rejected])
def test_comparison(case):
    expected = {"prompt": case.prompt, "chosen": case.answer, "rejected": case.rejected}
    assert convert(case.row, case.shape, "comparisons") == expected


@each([*CASES, *REFUSED])
def test_row_is_left_as_it_was(case):
    row = copy.deepcopy(case.row)
    to_messages(row, case.shape)
    assert row == case.row


@each(CASES)
def test_serves_what_the_row_holds(case):
    expected = {"prompts"} | ({"demonstrations"} if case.answer else set())
    expected |= {"unpaired"} if case.shape == "unpaired" else set()
    assert serves(case.shape, case.row) == expected | ({"comparisons"} if case.rejected else set())


@each(REFUSED)
def test_false_label(case):
    """It is kept with all that the row holds; it gives no demonstration."""
    assert to_messages(case.row, "unpaired") == {"prompt": case.prompt, "completion": case.answer, "label": False}
    with pytest.raises(RowFault) as fault:
        convert(case.row, "unpaired", "demonstrations")
    assert fault.value.kind == "label_false"
    assert str(fault.value) == "label: is false, so the completion is none to learn from"


def test_completion_beside_a_dialogue():
    """Such a row is not detected as `hh`; a config can say that it is."""
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello!"}
    assert convert(row, "hh", "demonstrations") == {"prompt": [user("Hi")], "completion": "Hello!"}
    assert convert(row, "hh", "prompts") == {"prompt": [user("Hi")]}
    whole = {"completion": "\n\nHuman: Hi\n\nAssistant: Hello!"}
    assert convert(whole, "hh", "demonstrations") == {"prompt": [user("Hi")], "completion": "Hello!"}


@pytest.mark.parametrize("row", [{"text": " The sea is salty.\n"}, {"text": " The sea is salty.\n", "label": True}])
def test_text(row):
    assert detect(row) == "text"
    assert convert(row, "text", "text") == {"text": " The sea is salty.\n"}


def test_text_beside_another_format():
    row = {"text": "Hi! Hello!", "messages": [user("Hi"), assistant("Hello!")]}
    assert detect(row) == "messages"
    assert convert(row, "messages", "text") == {"text": "Hi! Hello!"}
    assert convert(row, "messages", "demonstrations") == {"prompt": [user("Hi")], "completion": "Hello!"}


@pytest.mark.parametrize(
    ("row", "columns"),
    [({}, ""), ({"chosen": "a", "id": 1}, "chosen, id"), ({"question": "a", "answer": "b"}, "question, answer")],
)
def test_no_format(row, columns):
    with pytest.raises(ValueError) as error:
        detect(row)
    assert str(error.value) == (
        f"has the columns {columns}; expected text, prompt + completion, messages, instruction + output, "
        "conversations, chosen + rejected (with or without a prompt), chosen_messages + rejected_messages, "
        "prompt + completions + scores, prompt, or a `columns:` mapping to these"
    )


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"prompt": "Hi", "completion": "Hello!", "label": 1}, "unpaired"),
        ({"prompt": "Hi", "completion": "Hello!", "label": "false"}, "unpaired"),
        ({"prompt": "Hi", "completion": "Hello!", "label": 2}, "prompt_completion"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello!"}, "hh"),
        ({"prompt": "Human: Hi", "chosen": [{"role": "assistant", "content": "a"}], "rejected": []}, "comparison"),
        ({"prompt": "Hi", "completion": "Hello!", "label": None}, "prompt_completion"),
        ({"prompt": "Hi", "label": True}, "prompt"),
        ({"prompt": "Hi", "text": "Hi"}, "prompt"),
        ({"prompt": "The Human: a comedy"}, "prompt"),
        ({"prompt": "Hi", "completions": None, "completion": "Hello!"}, "prompt_completion"),
        ({"conversations": [], "messages": []}, "sharegpt"),
        ({"messages": [], "prompt": "Hi", "completion": "Hello!"}, "messages"),
        ({"chosen": None, "rejected": None}, "comparison"),
        ({"instruction": "Hi", "input": "", "chosen": "a", "rejected": "b", "output": "a"}, "comparison"),
    ],
)
def test_detect_where_more_than_one_would_do(row, shape):
    assert detect(row) == shape


UNICODE = {
    "emoji": "👩🏽‍🚀 liftoff 🎉",
    "CJK": "海はなぜ塩辛いのですか？",
    "combining": "Cafe\u0301 a\u0308 n\u0303",  # not normalised
    "right-to-left": "\u200fلماذا البحر مالح؟ שלום",
    "control and NUL": "a\x00b\u2028c\ufeffd",
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in UNICODE.items()])
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ("prompt", {"prompt": "<q>"}),
        ("prompt", {"prompt": [user("<q>")]}),
        ("prompt_completion", {"prompt": "<q>", "completion": "<a>"}),
        ("messages", {"messages": [user("<q>"), assistant("<a>")]}),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "<q>"}]}, assistant("<a>")]},
        ),
        ("alpaca", {"instruction": "<q>", "output": "<a>"}),
        ("sharegpt", {"conversations": [said("human", "<q>"), said("gpt", "<a>")]}),
        (
            "sharegpt",
            {"conversations": [said("human", "<q>")], "chosen": said("gpt", "<a>"), "rejected": said("gpt", "<b>")},
        ),
        ("comparison", {"prompt": "<q>", "chosen": "<a>", "rejected": "<b>"}),
        ("comparison", {"chosen": [user("<q>"), assistant("<a>")], "rejected": [user("<q>"), assistant("<b>")]}),
        ("hh", {"chosen": "\n\nHuman: <q>\n\nAssistant: <a>", "rejected": "\n\nHuman: <q>\n\nAssistant: <b>"}),
        ("hh", {"prompt": "\n\nHuman: <q>\n\nAssistant:", "chosen": "<a>", "rejected": "<b>"}),
        ("scored", {"history": "<q>", "human_ref_A": "<a>", "human_ref_B": "<b>", "labels": 1}),
        ("scored", {"prompt": "<q>", "completions": ["<b>", "<a>"], "scores": [0, 1]}),
        ("unpaired", {"prompt": "<q>", "completion": "<a>", "label": True}),
    ],
)
def test_unicode(shape, form, text):
    """Every character stays as it is."""

    def fill(value):
        if isinstance(value, str):
            return value.replace("<q>", text).replace("<a>", f"{text}!").replace("<b>", f"{text}?")
        if isinstance(value, list):
            return [fill(item) for item in value]
        return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else value

    row = fill(form)
    assert detect(row) == shape
    assert convert(row, shape, "prompts") == {"prompt": [user(text)]}
    if "demonstrations" in serves(shape, row):
        assert convert(row, shape, "demonstrations") == {"prompt": [user(text)], "completion": f"{text}!"}
    if "comparisons" in serves(shape, row):
        expected = {"prompt": [user(text)], "chosen": f"{text}!", "rejected": f"{text}?"}
        assert convert(row, shape, "comparisons") == expected


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in UNICODE.items()])
def test_unicode_in_text(text):
    assert convert({"text": text}, "text", "text") == {"text": text}


@pytest.mark.parametrize(
    ("shape", "columns", "expected"),
    [
        ("text", {"text"}, {"text"}),
        ("text", {"text", "label"}, {"text"}),
        ("prompt", {"prompt"}, {"prompts"}),
        ("prompt", {"prompt", "text"}, {"prompts"}),
        ("prompt_completion", {"prompt", "completion"}, {"demonstrations", "prompts"}),
        ("messages", {"messages"}, {"demonstrations", "prompts"}),
        ("messages", {"messages", "text"}, {"demonstrations", "prompts"}),
        ("alpaca", {"instruction", "input", "output"}, {"demonstrations", "prompts"}),
        ("alpaca", {"instruction", "input", "output", "text"}, {"demonstrations", "prompts"}),
        ("sharegpt", {"conversations"}, {"demonstrations", "prompts"}),
        ("sharegpt", {"conversations", "system"}, {"demonstrations", "prompts"}),
        ("sharegpt", {"conversations", "chosen", "rejected"}, {"comparisons", "demonstrations", "prompts"}),
        ("comparison", {"prompt", "chosen", "rejected"}, {"comparisons", "demonstrations", "prompts"}),
        ("comparison", {"chosen", "rejected"}, {"comparisons", "demonstrations", "prompts"}),
        ("comparison", {"chosen", "rejected", "text"}, {"comparisons", "demonstrations", "prompts"}),
        ("hh", {"chosen", "rejected"}, {"comparisons", "demonstrations", "prompts"}),
        ("hh", {"prompt", "chosen", "rejected"}, {"comparisons", "demonstrations", "prompts"}),
        ("hh", {"prompt"}, {"prompts"}),
        ("hh", {"prompt", "completion"}, {"demonstrations", "prompts"}),
        (
            "scored",
            {"history", "human_ref_A", "human_ref_B", "labels"},
            {"comparisons", "demonstrations", "prompts"},
        ),
        ("scored", {"prompt", "completions", "scores"}, {"comparisons", "demonstrations", "prompts"}),
        ("scored", {"question", "answers"}, {"comparisons", "demonstrations", "prompts"}),
        ("unpaired", {"prompt", "completion", "label"}, {"demonstrations", "prompts", "unpaired"}),
        ("unpaired", {"messages", "kto_tag"}, {"demonstrations", "prompts", "unpaired"}),
    ],
)
def test_serves(shape, columns, expected):
    assert serves(shape, columns) == expected
    assert serves(shape, sorted(columns)) == expected


# Rows that do not fit: the row, the kind of the fault, the whole message.
TEXT_FAULTS = [
    ({"text": None}, "malformed", "text: expected text, got None"),
    ({"text": 5}, "malformed", "text: expected text, got 5"),
    ({"text": ["a"]}, "malformed", "text: expected text, got ['a']"),
    ({"prompt": "Hi"}, "malformed", "text: expected text, got None"),
    ({"text": ""}, "blank", "text: is blank"),
    ({"text": " \n\t"}, "blank", "text: is blank"),
]
PROMPT_FAULTS = [
    ({"prompt": 5}, "malformed", "prompt: expected text or messages, got 5"),
    ({}, "malformed", "prompt: expected text or messages, got None"),
    ({"prompt": ["Hi"]}, "malformed", "prompt: expected messages with a role and text, got 'Hi'"),
    ({"prompt": {}}, "malformed", "prompt: expected messages with a role and text, got {}"),
    ({"prompt": ""}, "empty", "prompt: is empty"),
    ({"prompt": " \n"}, "empty", "prompt: is empty"),
    ({"prompt": []}, "empty", "prompt: has no messages"),
    ({"prompt": [user(" ")]}, "empty", "prompt: the message of 'user' is empty"),
    (
        {"prompt": [user("Hi"), assistant("Hello!")]},
        "roles",
        "prompt: expected it to end with a user's message, got {'role': 'assistant', 'content': 'Hello!'}",
    ),
    (
        {"prompt": [system("Be brief.")]},
        "roles",
        "prompt: expected it to end with a user's message, got {'role': 'system', 'content': 'Be brief.'}",
    ),
    (
        {"prompt": [user("Hi"), user("Hi?")]},
        "roles",
        "prompt: expected user and assistant in turn, a system message first, got ['user', 'user']",
    ),
    (
        {"prompt": [user("Hi"), system("Be brief."), user("Hi?")]},
        "roles",
        "prompt: expected user and assistant in turn, a system message first, got ['user', 'system', 'user']",
    ),
]
PROMPT_COMPLETION_FAULTS = [
    ({"prompt": "Hi", "completion": 5}, "malformed", "completion: expected text or messages, got 5"),
    ({"prompt": "Hi", "completion": None}, "malformed", "completion: expected text or messages, got None"),
    ({"prompt": None, "completion": "Hello!"}, "malformed", "prompt: expected text or messages, got None"),
    ({"prompt": True, "completion": "Hello!"}, "malformed", "prompt: expected text or messages, got True"),
    ({"prompt": "Hi", "completion": "Hello!", "system": 5}, "malformed", "system: expected text, got 5"),
    ({"prompt": "", "completion": "Hello!"}, "empty", "prompt: is empty"),
    ({"prompt": "Hi", "completion": "\n"}, "empty", "completion: is empty"),
    ({"prompt": "Hi", "completion": []}, "empty", "completion: has no messages"),
    ({"prompt": "Hi", "completion": [assistant("")]}, "empty", "completion: the message of 'assistant' is empty"),
    (
        {"prompt": "Hi", "completion": [user("Hi?")]},
        "roles",
        "completion: expected the last two to be user and assistant, got ['user', 'user']",
    ),
    (
        {"prompt": "Hi", "completion": [assistant("Hello!"), user("Why?")]},
        "roles",
        "completion: expected the last two to be user and assistant, got ['user', 'assistant', 'user']",
    ),
    (
        {"prompt": "Hi", "completion": [assistant("Hello!"), assistant("Ask.")]},
        "roles",
        "completion: expected it to end with a user's message, got {'role': 'assistant', 'content': 'Hello!'}",
    ),
]
MESSAGES_FAULTS = [
    ({"messages": "Hi"}, "malformed", "messages: expected messages, got 'Hi'"),
    ({"messages": None}, "malformed", "messages: expected messages, got None"),
    ({}, "malformed", "messages: expected messages, got None"),
    ({"messages": [None]}, "malformed", "messages: expected messages with a role and text, got None"),
    (
        {"messages": [{"content": "Hi"}, assistant("Hello!")]},
        "malformed",
        "messages: expected messages with a role and text, got {'content': 'Hi'}",
    ),
    (
        {"messages": [user("Hi"), {"role": "assistant", "content": None}]},
        "malformed",
        "messages: expected messages with a role and text, got {'role': 'assistant', 'content': None}",
    ),
    (
        {"messages": [user("Hi"), {"role": "tool", "content": "5"}, assistant("Five.")]},
        "roles",
        "messages: expected user and assistant in turn, a system message first, got ['user', 'tool']",
    ),
    (
        {"messages": [{"role": ["user"], "content": "Hi"}, assistant("Hello!")]},
        "malformed",
        "messages: expected messages with a role and text, got {'role': ['user'], 'content': 'Hi'}",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("A sea.")]},
        "malformed",
        "messages: expected text alone: images, audio and video are not read, got {'type': 'image_url'}",
    ),
    (
        {"messages": [user("Hi"), {"role": "assistant", "content": "Wait.", "tool_calls": [{"id": 1}]}]},
        "malformed",
        "messages: expected calls with a name and with arguments as a JSON object, got {'id': 1}",
    ),
    ({"messages": []}, "empty", "messages: has no messages"),
    ({"messages": [user(""), assistant("Hello!")]}, "empty", "messages: the message of 'user' is empty"),
    (
        {"messages": [{"role": "developer", "content": []}, user("Hi"), assistant("Hello!")]},
        "empty",
        "messages: the message of 'developer' is empty",
    ),
    (
        {"messages": [user("Hi"), assistant("Hello!"), user("Why?")]},
        "roles",
        "messages: expected the last two to be user and assistant, got ['user', 'assistant', 'user']",
    ),
    (
        {"messages": [assistant("Hello!")]},
        "roles",
        "messages: expected the last two to be user and assistant, got ['assistant']",
    ),
    (
        {"messages": [system("Be brief."), assistant("Hello!")]},
        "roles",
        "messages: expected it to end with a user's message, got {'role': 'system', 'content': 'Be brief.'}",
    ),
    (
        {"messages": [user("Hi"), system("Be brief."), user("Hi?"), assistant("Hello!")]},
        "roles",
        "messages: expected user and assistant in turn, a system message first, got ['user', 'system', 'user']",
    ),
    (
        {"messages": [user("Hi"), user("Hi?"), assistant("Hello!")]},
        "roles",
        "messages: expected user and assistant in turn, a system message first, got ['user', 'user']",
    ),
    (
        {"messages": [system("Be brief."), system("Be kind."), user("Hi"), assistant("Hello!")]},
        "roles",
        "messages: expected user and assistant in turn, a system message first, got ['system', 'system', 'user']",
    ),
]
ALPACA_FAULTS = [
    ({"output": "sea"}, "malformed", "instruction: expected text, got None"),
    ({"instruction": ["Translate."], "output": "sea"}, "malformed", "instruction: expected text, got ['Translate.']"),
    ({"instruction": "Translate.", "output": None}, "malformed", "output: expected text, got None"),
    ({"instruction": "Translate.", "input": 5, "output": "sea"}, "malformed", "input: expected text, got 5"),
    ({"instruction": "Hi", "output": "Hello!", "system": ["x"]}, "malformed", "system: expected text, got ['x']"),
    (
        {"instruction": "Hi", "output": "Hello!", "history": [["a", "b", "c"]]},
        "malformed",
        "history: expected pairs of instruction and answer, got ['a', 'b', 'c']",
    ),
    (
        {"instruction": "Hi", "output": "Hello!", "history": [["a", None]]},
        "malformed",
        "history: expected pairs of instruction and answer, got ['a', None]",
    ),
    (
        {"instruction": "Hi", "output": "Hello!", "history": "ab"},
        "malformed",
        "history: expected pairs of instruction and answer, got 'ab'",
    ),
    ({"instruction": " ", "input": "mer", "output": "sea"}, "empty", "instruction: is empty"),
    ({"instruction": "Translate.", "output": ""}, "empty", "output: is empty"),
]
SHAREGPT_FAULTS = [
    ({"conversations": "Hi"}, "malformed", "conversations: expected messages, got 'Hi'"),
    ({}, "malformed", "conversations: expected messages, got None"),
    (
        {"conversations": [said("human", "5?"), said("observation", "5"), said("gpt", "5")]},
        "roles",
        "conversations: expected user and assistant in turn, a system message first, got ['user', 'tool']",
    ),
    (
        {"conversations": [{"from": "human"}, said("gpt", "Hello!")]},
        "malformed",
        "conversations: expected messages with a role and text, got {'from': 'human'}",
    ),
    (
        {"conversations": [said("human", "Hi"), said("gpt", "Hello!")], "system": False},
        "malformed",
        "system: expected text, got False",
    ),
    ({"conversations": []}, "empty", "conversations: has no messages"),
    (
        {"conversations": [said("human", "Hi"), said("gpt", "")]},
        "empty",
        "conversations: the message of 'gpt' is empty",
    ),
    (
        {"conversations": [said("human", "Hi"), said("gpt", "Hello!"), said("human", "Why?")]},
        "roles",
        "conversations: expected the last two to be user and assistant, got ['user', 'assistant', 'user']",
    ),
    (
        {"conversations": [said("gpt", "Hello!"), said("human", "Hi"), said("gpt", "Yes?")]},
        "roles",
        "conversations: expected user and assistant in turn, a system message first, got ['assistant', 'user']",
    ),
    (
        {"conversations": [said("human", "Hi"), said("system", "Be brief."), said("gpt", "Yes?")]},
        "roles",
        "conversations: expected user and assistant in turn, a system message first, got ['user', 'system']",
    ),
]
HI = [said("human", "Hi")]
RANKING_FAULTS = [
    (
        {"conversations": HI, "chosen": said("gpt", "Hello!"), "rejected": None},
        "malformed",
        "rejected: expected text or messages, got None",
    ),
    ({"conversations": HI, "chosen": 5, "rejected": "a"}, "malformed", "chosen: expected text or messages, got 5"),
    (
        {"conversations": HI, "chosen": said("tool", "Hello!"), "rejected": said("gpt", "What?")},
        "roles",
        "chosen: expected one assistant's message after what both sides share, "
        "got [{'role': 'tool', 'content': 'Hello!'}]",
    ),
    (
        {"conversations": None, "chosen": said("gpt", "Hello!"), "rejected": said("gpt", "What?")},
        "malformed",
        "conversations: expected text or messages, got None",
    ),
    (
        {"conversations": [], "chosen": said("gpt", "Hello!"), "rejected": said("gpt", "What?")},
        "empty",
        "conversations: has no messages",
    ),
    (
        {"conversations": HI, "chosen": said("gpt", "Hello!"), "rejected": said("gpt", " ")},
        "empty",
        "rejected: the message of 'gpt' is empty",
    ),
    (
        {"conversations": HI, "chosen": said("gpt", "Hello!"), "rejected": said("gpt", "Hello!\n")},
        "identical",
        "chosen: is equal to rejected: 'Hello!'",
    ),
    (
        {"conversations": HI, "chosen": said("human", "Hello!"), "rejected": said("gpt", "What?")},
        "roles",
        "chosen: expected one assistant's message after what both sides share, "
        "got [{'role': 'user', 'content': 'Hello!'}]",
    ),
    (
        {"conversations": [*HI, said("gpt", "Yes?")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
        "roles",
        "prompt: expected it to end with a user's message, got {'role': 'assistant', 'content': 'Yes?'}",
    ),
]
COMPARISON_FAULTS = [
    ({"prompt": "Hi", "chosen": 5, "rejected": "b"}, "malformed", "chosen: expected text or messages, got 5"),
    ({"prompt": "Hi", "chosen": "a"}, "malformed", "rejected: expected text or messages, got None"),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, "malformed", "prompt: expected text or messages, got 5"),
    ({"instruction": 5, "chosen": "a", "rejected": "b"}, "malformed", "instruction: expected text, got 5"),
    ({"prompt": "Hi", "chosen": "", "rejected": "b"}, "empty", "chosen: is empty"),
    ({"prompt": "Hi", "chosen": "a", "rejected": " "}, "empty", "rejected: is empty"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty", "prompt: is empty"),
    ({"chosen": "a", "rejected": "b"}, "empty", "prompt: is empty, and the sides are no whole dialogues"),
    (
        {"prompt": "", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "empty",
        "prompt: is empty, and the sides are no whole dialogues",
    ),
    ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "identical", "chosen: is equal to rejected: 'a'"),
    ({"prompt": "Hi", "chosen": " a", "rejected": "a\n"}, "identical", "chosen: is equal to rejected: ' a'"),
    (
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("a")]},
        "identical",
        "chosen: is equal to rejected: 'a'",
    ),
    (  # they share nothing
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Why?"), assistant("b")]},
        "roles",
        "chosen: expected one assistant's message after what both sides share, "
        "got [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'a'}]",
    ),
    (  # they differ by more than their last message
        {
            "chosen": [user("Hi"), assistant("a"), user("Why?"), assistant("b")],
            "rejected": [user("Hi"), assistant("c"), user("Why?"), assistant("d")],
        },
        "roles",
        "chosen: expected one assistant's message after what both sides share, got [{'role': 'assistant', 'content': "
        "'a'}, {'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'b'}]",
    ),
    (  # one is a whole dialogue
        {"chosen": "a", "rejected": [user("Hi"), assistant("b")]},
        "roles",
        "rejected: expected one assistant's message after what both sides share, "
        "got [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'b'}]",
    ),
    (  # one goes on
        {
            "chosen": [user("Hi"), assistant("a")],
            "rejected": [user("Hi"), assistant("b"), user("Why?"), assistant("c")],
        },
        "roles",
        "rejected: expected one assistant's message after what both sides share, got [{'role': 'assistant', 'content': "
        "'b'}, {'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'c'}]",
    ),
    (
        {"chosen": [user("Hi"), user("Why?")], "rejected": [user("Hi"), assistant("b")]},
        "roles",
        "chosen: expected one assistant's message after what both sides share, "
        "got [{'role': 'user', 'content': 'Why?'}]",
    ),
    (
        {"prompt": [user("Hi"), assistant("Yes?")], "chosen": "a", "rejected": "b"},
        "roles",
        "prompt: expected it to end with a user's message, got {'role': 'assistant', 'content': 'Yes?'}",
    ),
    (
        {"prompt": [system("Be brief."), user("Hi")], "system": "Be kind.", "chosen": "a", "rejected": "b"},
        "malformed",
        "system: is another than the dialogue's own system message: [{'role': 'system', 'content': 'Be kind.'}]",
    ),
]
HH_FAULTS = [
    (
        {"prompt": "Hi\n\nHuman: Why?", "chosen": "a", "rejected": "b"},
        "malformed",
        "prompt: expected it to begin with 'Human:', got 'Hi\\n\\nHuman: Why?'",
    ),
    ({"prompt": "Hi"}, "malformed", "prompt: expected it to begin with 'Human:', got 'Hi'"),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, "malformed", "prompt: expected it to begin with 'Human:', got 5"),
    ({"chosen": None, "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, "malformed", "chosen: expected text, got None"),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": [assistant("b")]},
        "malformed",
        "rejected: expected text, got [{'role': 'assistant', 'content': 'b'}]",
    ),
    ({"prompt": " "}, "empty", "prompt: is empty"),
    ({"prompt": "\n\nAssistant:"}, "empty", "prompt: is empty"),
    ({"prompt": "\n\nHuman:\n\nAssistant:"}, "empty", "prompt: has an empty turn"),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        "empty",
        "chosen: has an empty turn",
    ),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"},
        "empty",
        "rejected: has an empty turn",
    ),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "a", "rejected": " "}, "empty", "rejected: is empty"),
    ({"chosen": "a", "rejected": "b"}, "malformed", "chosen: expected it to begin with 'Human:', got 'a'"),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant:  a \n"},
        "identical",
        "chosen: is equal to rejected: 'a'",
    ),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Why?\n\nAssistant: b"},
        "roles",
        "chosen: expected one assistant's message after what both sides share, "
        "got [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'a'}]",
    ),
    (
        {
            "chosen": "\n\nHuman: Hi\n\nHuman: Hi?\n\nAssistant: a",
            "rejected": "\n\nHuman: Hi\n\nHuman: Hi?\n\nAssistant: b",
        },
        "roles",
        "prompt: expected user and assistant in turn, a system message first, got ['user', 'user']",
    ),
    (
        {"chosen": "\n\nHuman: Hi\n\nHuman: Hi?", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        "roles",
        "chosen: expected one assistant's message after what both sides share, "
        "got [{'role': 'user', 'content': 'Hi?'}]",
    ),
    (
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello!"},
        "roles",
        "prompt: expected it to end with a user's message, got {'role': 'assistant', 'content': 'Hello!'}",
    ),
    (
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Well,", "chosen": "a", "rejected": "b"},
        "roles",
        "prompt: expected it to end with a user's message, got {'role': 'assistant', 'content': 'Well,'}",
    ),
]
SHP = {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
SCORED_FAULTS = [
    (SHP | {"labels": 2}, "malformed", "labels: expected 1 (A is better) or 0 (B is), got 2"),
    (SHP | {"labels": None}, "malformed", "labels: expected 1 (A is better) or 0 (B is), got None"),
    (SHP | {"labels": "A"}, "malformed", "labels: expected 1 (A is better) or 0 (B is), got 'A'"),
    (SHP | {"labels": [1]}, "malformed", "labels: expected 1 (A is better) or 0 (B is), got [1]"),
    (SHP | {"history": None}, "malformed", "history: expected text, got None"),
    (SHP | {"human_ref_B": 5}, "malformed", "human_ref_B: expected text, got 5"),
    (SHP | {"human_ref_A": ""}, "empty", "human_ref_A: is empty"),
    (SHP | {"history": " "}, "empty", "history: is empty"),
    (SHP | {"human_ref_B": "a "}, "identical", "chosen: is equal to rejected: 'a'"),
    (
        {"prompt": "Why?", "completions": ["a", "b"], "scores": [1]},
        "malformed",
        "completions: expected at least two texts, each with a score, got ['a', 'b']",
    ),
    (
        {"prompt": "Why?", "completions": ["a"], "scores": [1]},
        "malformed",
        "completions: expected at least two texts, each with a score, got ['a']",
    ),
    (
        {"prompt": "Why?", "completions": [], "scores": []},
        "malformed",
        "completions: expected at least two texts, each with a score, got []",
    ),
    (
        {"prompt": "Why?", "completions": "ab", "scores": [1, 2]},
        "malformed",
        "completions: expected at least two texts, each with a score, got 'ab'",
    ),
    (
        {"prompt": "Why?", "completions": ["a", None], "scores": [1, 2]},
        "malformed",
        "completions: expected at least two texts, each with a score, got ['a', None]",
    ),
    (
        {"prompt": "Why?", "completions": ["a", "b"], "scores": [1, "2"]},
        "malformed",
        "completions: expected at least two texts, each with a score, got ['a', 'b']",
    ),
    (
        {"prompt": "Why?", "completions": ["a", "b"], "scores": [1, float("nan")]},
        "malformed",
        "completions: expected at least two texts, each with a score, got ['a', 'b']",
    ),
    (
        {"prompt": "Why?", "completions": ["a", "b"], "scores": [True, False]},
        "malformed",
        "completions: expected at least two texts, each with a score, got ['a', 'b']",
    ),
    (
        {"prompt": "Why?", "completions": ["a", "b"]},
        "malformed",
        "completions: expected at least two texts, each with a score, got ['a', 'b']",
    ),
    (
        {"question": "Why?", "answers": [{"text": "a", "pm_score": 1}, {"text": "b"}]},
        "malformed",
        "answers: expected at least two texts, each with a score, got [{'text': 'a', 'pm_score': 1}, {'text': 'b'}]",
    ),
    (
        {"prompt": "Why?", "completions": None},
        "malformed",
        "prompt: expected a prompt with completions, got {'prompt': 'Why?', 'completions': None}",
    ),
    (
        {"completions": ["a"], "scores": [1]},
        "malformed",
        "prompt: expected a prompt with completions, got {'completions': ['a'], 'scores': [1]}",
    ),
    (
        {"question": 5, "answers": ["a", "b"], "scores": [1, 2]},
        "malformed",
        "question: expected text or messages, got 5",
    ),
    ({"question": " ", "answers": ["a", "b"], "scores": [1, 2]}, "empty", "question: is empty"),
    (
        {"prompt": "Why?", "completions": ["a", " "], "scores": [1, 0]},
        "empty",
        "completions: the best or the worst answer is empty",
    ),
    (
        {"prompt": "Why?", "completions": ["a", ""], "scores": [0, 1]},
        "empty",
        "completions: the best or the worst answer is empty",
    ),
    ({"prompt": "Why?", "completions": ["a", "b"], "scores": [3, 3]}, "tie", "completions: all scores are 3"),
    (
        {"question": "Why?", "answers": [{"text": "a", "pm_score": 0.5}, {"text": "b", "pm_score": 0.5}]},
        "tie",
        "answers: all scores are 0.5",
    ),
    (
        {"prompt": "Why?", "completions": ["a", "b", "a"], "scores": [3, 2, 1]},
        "identical",
        "chosen: is equal to rejected: 'a'",
    ),
    (
        {"prompt": [user("Why?"), assistant("So.")], "completions": ["a", "b"], "scores": [1, 2]},
        "roles",
        "prompt: expected it to end with a user's message, got {'role': 'assistant', 'content': 'So.'}",
    ),
]
UNPAIRED_FAULTS = [
    ({"prompt": "Hi", "completion": "a", "label": None}, "malformed", "label: expected true or false, got None"),
    ({"prompt": "Hi", "completion": "a", "label": 2}, "malformed", "label: expected true or false, got 2"),
    ({"prompt": "Hi", "completion": "a", "label": "good"}, "malformed", "label: expected true or false, got 'good'"),
    (
        {"prompt": "Hi", "completion": None, "label": True},
        "malformed",
        "completion: expected text or messages, got None",
    ),
    ({"prompt": "Hi", "label": True}, "malformed", "completion: expected text or messages, got None"),
    ({"messages": None, "kto_tag": False}, "malformed", "messages: expected messages, got None"),
    ({"prompt": "Hi", "completion": " ", "label": True}, "empty", "completion: is empty"),
    ({"messages": [], "kto_tag": True}, "empty", "messages: has no messages"),
    (
        {"messages": [user("Hi")], "kto_tag": True},
        "roles",
        "messages: expected the last two to be user and assistant, got ['user']",
    ),
]
FAULTY = [("prompt", "prompts", PROMPT_FAULTS), ("text", "text", TEXT_FAULTS)]
FAULTY += [("prompt_completion", "demonstrations", PROMPT_COMPLETION_FAULTS)]
FAULTY += [("messages", "demonstrations", MESSAGES_FAULTS), ("alpaca", "demonstrations", ALPACA_FAULTS)]
FAULTY += [("sharegpt", "demonstrations", SHAREGPT_FAULTS), ("sharegpt", "comparisons", RANKING_FAULTS)]
FAULTY += [("comparison", "comparisons", COMPARISON_FAULTS), ("hh", "comparisons", HH_FAULTS)]
FAULTY += [("scored", "comparisons", SCORED_FAULTS), ("unpaired", "demonstrations", UNPAIRED_FAULTS)]


@pytest.mark.parametrize(
    ("shape", "want", "row", "kind", "message"),
    [(shape, want, *fault) for shape, want, faults in FAULTY for fault in faults],
)
def test_fault(shape, want, row, kind, message):
    with pytest.raises(RowFault) as fault:
        convert(row, shape, want)
    assert (fault.value.kind, str(fault.value)) == (kind, message)
    if shape != "text":
        with pytest.raises(RowFault) as fault:
            convert(row, shape, "prompts")  # a row is whole or at fault, whatever is wanted of it
        assert (fault.value.kind, str(fault.value)) == (kind, message)


def test_fault_shows_the_start_of_a_long_value():
    with pytest.raises(RowFault) as fault:
        convert({"prompt": "Hi", "chosen": "a" * 300, "rejected": "a" * 300}, "comparison", "comparisons")
    assert str(fault.value) == f"chosen: is equal to rejected: '{'a' * 199}..."


def test_every_format_has_faults():
    assert {shape for shape, _, _ in FAULTY} == set(SHAPES)
    kinds = {kind for _, _, faults in FAULTY for _, kind, _ in faults}
    assert kinds | {"label_false"} == set(FAULTS)


# Rows of any values, most of them near to what some format takes.
PROPERTY = settings(deadline=None, max_examples=150, derandomize=True, database=None)
MARKED = ["Human: a", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "\n\nHuman: a\n\nAssistant:"]
MARKED += ["Human:", "Assistant: a"]
texts = st.sampled_from(["", " \n", "a", "b", *MARKED]) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
keys = st.sampled_from(
    ["role", "from", "content", "value", "text", "response", "score", "type", "weight", "tool_calls"]
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
)
speakers = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool"])
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=2)
turns = st.fixed_dictionaries({"role": speakers, "content": texts | parts})
turns |= st.builds(said, speakers, texts)
dialogues = st.lists(turns, max_size=4) | turns
answers = st.lists(st.fixed_dictionaries({"text": texts, "score": st.integers(0, 2)}), max_size=3)
values = texts | dialogues | answers | st.lists(texts | st.integers(0, 2), max_size=3) | st.booleans() | anything
values |= st.lists(st.lists(texts, min_size=2, max_size=2), max_size=2)
arbitrary = st.dictionaries(st.sampled_from(sorted(FIELDS)), values, max_size=6)


def places(value, place=()):
    """The places within a row that hold a value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*place, key)
        yield from places(child, (*place, key))


@st.composite
def damaged(draw, shape):
    """A row of a format with up to two of its values, at any depth, replaced or taken out."""
    row = copy.deepcopy(draw(st.sampled_from([case for case in [*CASES, *REFUSED] if case.shape == shape])).row)
    for _ in range(draw(st.integers(0, 2))):
        *above, last = draw(st.sampled_from([*places(row)] or [("prompt",)]))
        holder = row
        for key in above:
            holder = holder[key]
        if draw(st.booleans()) and last in (holder if isinstance(holder, dict) else range(len(holder))):
            del holder[last]
        else:
            holder[last] = draw(values)
    return row


def rows(shape):
    return arbitrary if shape == "text" else damaged(shape) | arbitrary


def check_canonical(row):
    """A row as stages take it: `text`, or a prompt alone, with a completion, or with two sides that differ."""
    if row.keys() == {"text"}:
        assert isinstance(row["text"], str) and row["text"].strip()
        return
    label, sides = row.get("label", True), row.keys() - {"prompt", "label"}
    assert isinstance(label, bool)
    assert sides in (set(), {"completion"}, {"chosen", "rejected"})
    assert all(isinstance(row[side], str) and row[side].strip() for side in sides)
    assert "chosen" not in row or row["chosen"] != row["rejected"]
    assert all(message.keys() <= {"role", "content", "weight"} for message in row["prompt"])
    assert all(message.get("weight", 0) == 0 for message in row["prompt"])
    spoken = [message for message in row["prompt"] if message["role"] != "tool"]
    assert all(isinstance(message["content"], str) and message["content"].strip() for message in spoken)
    roles = [role for role, _ in itertools.groupby(message["role"] for message in row["prompt"])]
    in_turn = roles[1:] if roles[0] == "system" else roles
    assert in_turn[0] == "user" and len(in_turn) % 2 == 1
    assert all(role == "assistant" if i % 2 else role in ("user", "tool") for i, role in enumerate(in_turn))


HELD = {"text": {"text"}, "demonstrations": {"prompt", "completion"}, "prompts": {"prompt"}}
HELD["comparisons"] = {"prompt", "chosen", "rejected"}
HELD["unpaired"] = {"prompt", "completion", "label"}


@pytest.mark.parametrize("shape", SHAPES)
@PROPERTY
@given(data=st.data())
def test_any_row_is_converted_or_at_fault(shape, data):
    row = data.draw(rows(shape))
    before = repr(row)
    for want in WANTS:
        try:
            converted = convert(row, shape, want)
        except RowFault as fault:
            assert fault.kind in FAULTS
            continue
        check_canonical(converted)
        if want in serves(shape, row):
            assert converted.keys() == HELD[want]
    assert repr(row) == before


@settings(PROPERTY, max_examples=500)
@given(row=st.sampled_from(SHAPES).flatmap(rows))
def test_any_row_has_a_format_or_none(row):
    try:
        assert detect(row) in SHAPES
    except ValueError as error:
        assert str(error).startswith("has the columns ")


# Dialogues written in each format, and read back.
spoken = st.text(min_size=1, max_size=20).map(str.strip)
spoken = spoken.filter(lambda text: text and "Human:" not in text and "Assistant:" not in text)


@st.composite
def comparisons(draw):
    """(Contents of user and assistant in turn, which end with the user's; the better answer; the worse one)."""
    contents = draw(st.lists(spoken, min_size=1, max_size=5).filter(lambda contents: len(contents) % 2 == 1))
    chosen, rejected = draw(st.lists(spoken, min_size=2, max_size=2, unique=True))
    return contents, chosen, rejected


def as_messages(contents):
    return [(user, assistant)[i % 2](text) for i, text in enumerate(contents)]


def as_sharegpt(contents):
    return [said(("human", "gpt")[i % 2], text) for i, text in enumerate(contents)]


def as_hh(contents):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(contents))


def as_history(contents):
    return [list(pair) for pair in zip(contents[:-1:2], contents[1::2], strict=True)]


DEMONSTRATIONS = {
    "prompt_completion": lambda contents, answer: {"prompt": as_messages(contents), "completion": answer},
    "messages": lambda contents, answer: {"messages": as_messages([*contents, answer])},
    "sharegpt": lambda contents, answer: {"conversations": as_sharegpt([*contents, answer])},
    "alpaca": lambda contents, answer: {"history": as_history(contents), "instruction": contents[-1], "output": answer},
    "unpaired": lambda contents, answer: {"messages": as_messages([*contents, answer]), "kto_tag": True},
}
BOTH_SIDES = {
    "sharegpt": lambda contents, a, b: {
        "conversations": as_sharegpt(contents),
        "chosen": {"from": "gpt", "value": a},
        "rejected": {"from": "gpt", "value": b},
    },
    "comparison": lambda contents, a, b: {"prompt": as_messages(contents), "chosen": a, "rejected": b},
    "comparison of dialogues": lambda contents, a, b: {
        "chosen": as_messages([*contents, a]),
        "rejected": as_messages([*contents, b]),
    },
    "comparison with history": lambda contents, a, b: {
        "history": as_history(contents),
        "instruction": contents[-1],
        "chosen": [assistant(a)],
        "rejected": [assistant(b)],
    },
    "hh": lambda contents, a, b: {"chosen": as_hh([*contents, a]), "rejected": as_hh([*contents, b])},
    "hh with prompt": lambda contents, a, b: {
        "prompt": f"{as_hh(contents)}\n\nAssistant:",
        "chosen": f" {a}",
        "rejected": f" {b}",
    },
    "scored": lambda contents, a, b: {"prompt": as_messages(contents), "completions": [b, a], "scores": [-0.5, 2]},
}


@pytest.mark.parametrize("shape", DEMONSTRATIONS)
@PROPERTY
@given(dialogue=comparisons())
def test_demonstrations_come_back(shape, dialogue):
    contents, answer, _ = dialogue
    row = DEMONSTRATIONS[shape](contents, answer)
    assert detect(row) == shape
    assert convert(row, shape, "demonstrations") == {"prompt": as_messages(contents), "completion": answer}


@pytest.mark.parametrize("form", BOTH_SIDES)
@PROPERTY
@given(dialogue=comparisons())
def test_comparisons_come_back(form, dialogue):
    contents, chosen, rejected = dialogue
    row, shape = BOTH_SIDES[form](contents, chosen, rejected), form.split()[0]
    assert detect(row) == shape
    expected = {"prompt": as_messages(contents), "chosen": chosen, "rejected": rejected}
    assert convert(row, shape, "comparisons") == expected


@PROPERTY
@given(dialogue=comparisons())
def test_hh_prompts_come_back(dialogue):
    contents, *_ = dialogue
    for row in ({"prompt": as_hh(contents)}, {"prompt": f"{as_hh(contents)}\n\nAssistant:"}):
        assert detect(row) == "hh"
        assert convert(row, "hh", "prompts") == {"prompt": as_messages(contents)}


def test_system_column_beside_any_dialogue():
    told = [system("Be kind."), user("Hi")]
    for row, shape in (
        ({"prompt": "Hi"}, "prompt"),
        ({"messages": [user("Hi"), assistant("a")]}, "messages"),
        ({"messages": [system("Be kind."), user("Hi"), assistant("a")]}, "messages"),
        ({"prompt": "Hi", "completions": ["a", "b"], "scores": [1, 0]}, "scored"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "a", "rejected": "b"}, "hh"),
        ({"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}, "comparison"),
    ):
        assert convert(row | {"system": "Be kind."}, shape, "prompts") == {"prompt": told}


def test_prompt_messages_beside_whole_dialogues():
    row = {"prompt": [system("Be kind.")]}
    row |= {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}
    expected = {"prompt": [system("Be kind."), user("Hi")], "chosen": "a", "rejected": "b"}
    assert convert(row, "comparison", "comparisons") == expected
    assert convert(row | {"prompt": [user("Hi")]}, "comparison", "prompts") == {"prompt": [user("Hi")]}


@pytest.mark.parametrize(
    ("row", "shape", "want", "kind", "message"),
    [
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}], "chosen": None},
            "sharegpt",
            "comparisons",
            "malformed",
            "chosen: expected text or messages, got None",
        ),
        (
            {"prompt": "Hi"},
            "prompt",
            "demonstrations",
            "malformed",
            "completion: expected an answer to learn from, got none",
        ),
        ({}, "unpaired", "demonstrations", "malformed", "label: expected true or false, got None"),
        (
            {"history": True, "instruction": "a", "output": "b"},
            "alpaca",
            "prompts",
            "malformed",
            "history: expected pairs of instruction and answer, got True",
        ),
        (
            {"history": [["", "b"]], "instruction": "a", "output": "b"},
            "alpaca",
            "prompts",
            "empty",
            "history: has an empty turn: ['', 'b']",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, assistant("a")]},
            "messages",
            "prompts",
            "malformed",
            "messages: expected messages with a role and text, "
            "got {'role': 'user', 'content': [{'type': 'text', 'text': None}]}",
        ),
        (
            {"messages": [user("Hi"), {"role": "assistant", "content": None, "tool_calls": [1]}]},
            "messages",
            "prompts",
            "malformed",
            "messages: expected calls with a name and with arguments as a JSON object, got 1",
        ),
    ],
)
def test_more_faults(row, shape, want, kind, message):
    with pytest.raises(RowFault) as fault:
        convert(row, shape, want)
    assert (fault.value.kind, str(fault.value)) == (kind, message)
