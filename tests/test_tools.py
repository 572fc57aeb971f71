"""Rows with tools: every form gives the same tokens, calls are learnt, results are not, and nothing is left out."""

import datetime
import importlib.util
import json
from pathlib import Path

import pytest
import tiny
from datasets import Dataset
from transformers import AutoTokenizer

from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.data.faults import RowFault
from pipeline.data.formats import detect
from pipeline.data.rows import convert
from pipeline.data.tools import tools_of
from pipeline.show import check_data

TRL = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tool(name, **properties):
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": parameters}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def say(role, content, **more):
    return {"role": role, "content": content, **more}


TOOLS = [tool("weather", city="string"), tool("clock", zone="integer")]
ASK = say("user", "Paris?")
CALLS = [call("weather", city="Paris é"), call("clock", zone=1)]
# The dialogue in OpenAI's form: two calls at once, no text beside them, arguments as JSON.
OPENAI = [
    say("system", "Be kind."),
    ASK,
    say(
        "assistant",
        None,
        tool_calls=[
            {"id": f"c{i}", "type": "function", "function": made["function"] | {"arguments": json.dumps(arguments)}}
            for i, made in enumerate(CALLS)
            for arguments in [made["function"]["arguments"]]
        ],
    ),
    say("tool", '{"sky": "blue"}', tool_call_id="c0"),
    say("tool", "10:00", tool_call_id="c1"),
    say("assistant", "Blue at ten."),
]
SYSTEM, _, CALLING, SKY, TIME, LAST = OPENAI
JSON_CALLS = [json.dumps(made["function"], ensure_ascii=False) for made in CALLS]


def turn(speaker, value):
    return {"from": speaker, "value": value}


def part(kind, value):
    return {"type": kind, "value": value}


SHAREGPT = [turn("system", "Be kind."), turn("human", "Paris?")]
RESULTS = [turn("observation", SKY["content"]), turn("observation", TIME["content"])]
V1 = [
    {"role": "system", "content": [part("text", "Be kind.")], "loss_weight": 0.0},
    {"role": "user", "content": [part("text", "Pa"), part("text", "ris?")], "loss_weight": 0.0},
    {"role": "assistant", "content": [part("tool_call", made) for made in JSON_CALLS], "loss_weight": 1.0},
    {"role": "tool", "content": [part("text", SKY["content"])], "loss_weight": 0.0},
    {"role": "tool", "content": [part("text", TIME["content"])], "loss_weight": 0.0},
    {"role": "assistant", "content": [part("text", "Blue at ten.")], "loss_weight": 1.0},
]
# The same dialogue in the forms that people have.
FORMS = {
    "OpenAI": {"messages": OPENAI, "tools": TOOLS},
    "arguments as mappings": {"messages": [*OPENAI[:2], say("assistant", "", tool_calls=CALLS), SKY, TIME, LAST]},
    "tools without a wrapper": {"messages": OPENAI, "tools": [made["function"] for made in TOOLS]},
    "tools as JSON": {"messages": OPENAI, "tools": json.dumps(TOOLS)},
    "each tool as JSON": {"messages": OPENAI, "functions": [json.dumps(made) for made in TOOLS]},
    "ShareGPT": {
        "conversations": [
            *SHAREGPT,
            turn("function_call", f"[{', '.join(JSON_CALLS)}]"),
            *RESULTS,
            turn("gpt", "Blue at ten."),
        ],
        "tools": json.dumps([made["function"] for made in TOOLS]),
    },
    "a turn for each call": {
        "conversations": [
            *SHAREGPT,
            *(turn("function_call", made) for made in JSON_CALLS),
            *RESULTS,
            turn("gpt", "Blue at ten."),
        ]
    },
    "prompt and completion": {"prompt": OPENAI[:-1], "completion": [LAST]},
    "a system column": {"system": "Be kind.", "messages": OPENAI[1:]},
    "LLaMA-Factory's v1": {"messages": V1, "tools": json.dumps(TOOLS)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tokenizer has the special tokens of ChatML and of Llama 3."""
    folder = tiny.make_model(tmp_path_factory.mktemp("tools") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def read(tmp_path, model):
    """`read(rows, type, template)`: the datasets of a run whose one stage of that type reads `rows`."""

    def make(rows, kind="sft", template="hermes", eos="<|im_end|>", **top):
        if not isinstance(rows, Path):
            tiny.write_rows(tmp_path / "rows.jsonl", rows)
        stages = {kind: {"data": "rows", "init": "base"}}
        if kind in ("sft", "reward", "dpo"):
            stages[kind]["training"] = {"max_length": 4096}
        if kind in ("ppo", "grpo"):
            stages[kind]["max_prompt_length"] = 4096
            stages["reward"] = {"data": "pairs", "init": "base"}
        tiny.write_rows(tmp_path / "pairs.jsonl", tiny.comparisons())
        data = {"rows": {"path": "rows.jsonl"}, "pairs": {"path": "pairs.jsonl"}}
        settings = {"chat_template": str(template), "eos_token": eos}
        path = tiny.make_run(tmp_path, stages, data=data, tokenizer=settings, training={"use_cpu": True, "bf16": False})
        tiny.edit(path, {"model": {"path": str(model)}} | top)
        config = load(path)
        tokenizer = run_tokenizer.build(config)
        return tiny.StageRows(config, tokenizer)

    return make


def ids_of(made, kind="sft"):
    prepared = made.prepare(kind, "data")
    return [{key: row[key] for key in row if key != "prompt"} for row in prepared.rows]


def texts(made, kind="sft"):
    """The rows of a stage as text; what is trained on in brackets."""
    found = []
    for row in made.prepare(kind, "data").rows:
        parts = check_data.parts_of(row, made.kind(kind), made.config.stages[kind], made.tokenizer)
        found.append({label: "".join(f"[{said}]" if on else said for said, on in spans) for label, spans in parts})
    return found


def fault(made, kind="sft"):
    (found,) = [finding for finding in made.prepare(kind, "data").audit.dropped.values() if finding.count]
    return found


# What the model reads


HEAD = (
    "<|im_start|>system\nBe kind.\n\n"
    "You may call one or more functions to assist with the user query. These are their signatures:\n<tools>\n"
    + "\n".join(json.dumps(made) for made in TOOLS)
    + "\n</tools>\n\nFor each function call, return a JSON object with its name and arguments:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n"
)
SAID = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris é"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {"zone": 1}}\n</tool_call>'
)
GIVEN = (
    '<|im_start|>user\n<tool_response>\n{"sky": "blue"}\n</tool_response>\n<tool_response>\n10:00\n</tool_response>'
    "<|im_end|>\n<|im_start|>assistant\n"
)
LEARNT = f"{HEAD}[{SAID}<|im_end|>]\n{GIVEN}[Blue at ten.<|im_end|>]"


def test_loss_is_on_calls_and_answers_and_not_on_results(read):
    made = read([FORMS["OpenAI"]])
    assert texts(made) == [{"": LEARNT}]
    (row,) = made.prepare("sft", "data").rows
    encode = made.tokenizer.encode
    spans = [(HEAD, 0), (SAID, 1), ("<|im_end|>", 1), ("\n" + GIVEN, 0), ("Blue at ten.", 1), ("<|im_end|>", 1)]
    assert row["input_ids"] == [token for text, _ in spans for token in encode(text)]
    assert row["completion_mask"] == [bit for text, bit in spans for _ in encode(text)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tokens(read, form):
    row = FORMS[form] if any(name in FORMS[form] for name in ("tools", "functions")) else FORMS[form] | {"tools": TOOLS}
    assert texts(read([row])) == [{"": LEARNT}]


@pytest.mark.parametrize("text", ["", "I look."])
@pytest.mark.parametrize("name", ["function_call", "tool_calls"])
def test_text_beside_a_call(read, text, name):
    value = call("clock", zone=2)["function"] if name == "function_call" else [call("clock", zone=2)]
    results = [say("function" if name == "function_call" else "tool", "", name="clock")]
    row = {"messages": [ASK, say("assistant", text, **{name: value}), *results, say("assistant", "Two.")]}
    said = f'{text}{text and chr(10)}<tool_call>\n{{"name": "clock", "arguments": {{"zone": 2}}}}\n</tool_call>'
    given = "<|im_start|>user\n<tool_response>\n\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    asked = "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(read([row])) == [{"": f"{asked}[{said}<|im_end|>]\n{given}[Two.<|im_end|>]"}]


def test_a_dialogue_may_end_with_a_call_and_its_prompt_with_a_result(read):
    rows = [{"messages": OPENAI[:3], "tools": TOOLS}, {"messages": OPENAI, "tools": TOOLS}]
    assert texts(read(rows)) == [{"": f"{HEAD}[{SAID}<|im_end|>]"}, {"": LEARNT}]
    assert texts(read(rows, "ppo"), "ppo") == [{"prompt": HEAD}, {"prompt": f"{HEAD}{SAID}<|im_end|>\n{GIVEN}"}]


def test_tools_of_a_table_have_no_keys_of_other_rows(read, tmp_path):
    """A table gives every mapping the keys of all rows, most of them null."""
    rows = [
        {"messages": [ASK, say("assistant", None, tool_calls=[call("weather", city="Rome")])], "tools": TOOLS[:1]},
        {"messages": [ASK, say("assistant", None, tool_calls=[call("clock", zone=3)])], "tools": TOOLS[1:]},
        {"messages": [ASK, say("assistant", "Yes.", tool_calls=None)], "tools": None},
    ]
    expected = texts(read(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    made = read(rows, data={"rows": {"path": "table.parquet"}})
    assert texts(made) == expected
    assert '{"name": "clock", "arguments": {"zone": 3}}' in expected[1][""]
    assert expected[2] == {"": "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n[Yes.<|im_end|>]"}


# Other templates


@pytest.mark.skipif(not (TRL / "qwen2_5.jinja").is_file(), reason="this TRL ships no template of Qwen2.5")
def test_qwens_own_template(read):
    (text,) = texts(read([FORMS["OpenAI"]], template=TRL / "qwen2_5.jinja"))
    calls = text[""].split("[")
    assert text[""].count("]") >= 2
    assert f"<|im_start|>assistant\n[{SAID}<|im_end|>]\n{GIVEN}[Blue at ten.<|im_end|>]" in text[""]
    assert "<|im_start|>system\nBe kind." in calls[0] and '"name": "weather"' in text[""].split(SAID)[0]


@pytest.mark.skipif(not (TRL / "llama3_1.jinja").is_file(), reason="this TRL ships no template of Llama 3.1")
def test_llamas_own_template(read):
    """It takes one call at a time, and leaves out a text beside the call."""
    one = say("assistant", None, tool_calls=CALLS[:1])
    rows = [{"messages": [SYSTEM, ASK, one, SKY, LAST], "tools": TOOLS[:1]}]
    rows += [FORMS["OpenAI"], {"messages": [ASK, one | {"content": "I look."}, SKY, LAST], "tools": TOOLS[:1]}]
    made = read(rows, template=TRL / "llama3_1.jinja", eos="<|eot_id|>")
    (text,) = texts(made)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    said = '{"name": "weather", "parameters": {"city": "Paris é"}}'
    given = f'{header("ipython")}"{{\\"sky\\": \\"blue\\"}}"<|eot_id|>{header("assistant")}'
    assert text[""].endswith(f"{header('assistant')}[{said}<|eot_id|>]{given}[Blue at ten.<|eot_id|>]")
    assert '"name": "weather",' in text[""].split(said)[0]
    dropped = made.prepare("sft", "data").audit.dropped
    assert (dropped["roles"].rows, dropped["malformed"].rows) == ((1,), (2,))
    assert "the chat template refuses it: This model only supports single tool-calls" in dropped["roles"].why
    assert dropped["malformed"].why.startswith("text beside calls of tools: the chat template does not show text")


@pytest.mark.skipif(not (TRL / "deepseekv3.jinja").is_file(), reason="this TRL ships no template of DeepSeek V3")
def test_a_template_that_takes_arguments_as_json(read, tmp_path):
    """DeepSeek's fails for mappings; and it shows no definitions of tools."""
    text = (TRL / "deepseekv3.jinja").read_text(encoding="utf-8")
    (tmp_path / "own.jinja").write_text(text.replace("<think>\\n", ""), encoding="utf-8")
    rows = [{"messages": OPENAI}, {"messages": OPENAI, "tools": TOOLS}]
    made = read(rows, template="own.jinja")
    (text,) = texts(made)
    assert '```json\n{"city": "Paris é"}\n```' in text[""] and '```json\n{"zone": 1}\n```' in text[""]
    assert fault(made).rows == (1,) and fault(made).why.startswith("tools: the chat template does not show tools; ")


NINE = """{%- macro check(id) -%}
{%- if not id is defined or id | length != 9 -%}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
{%- endif -%}{{- id -}}
{%- endmacro -%}
{%- if tools -%}{{- tools | tojson -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content -}}
{%- for call in message.tool_calls or [] -%}{{- check(call.id) + '=' + call.function | tojson -}}{%- endfor -%}
{%- if message.role == 'tool' -%}{{- '=' + check(message.tool_call_id) -}}{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def test_a_template_that_wants_ids_of_nine_characters(read, tmp_path):
    """As Mistral's do. Ids that fit are kept, others are made from a count, the same in a call and its result."""
    (tmp_path / "nine.jinja").write_text(NINE)
    with_id = [CALLS[0] | {"id": "abcdefghi"}, CALLS[1] | {"id": "call_12345678"}]
    swapped = [say("tool", "10:00", tool_call_id="call_12345678"), say("tool", "blue", tool_call_id="abcdefghi")]
    again = [say("assistant", "", tool_calls=CALLS[1:]), say("tool", "11:00"), LAST]
    rows = [{"messages": [ASK, say("assistant", "", tool_calls=with_id), *swapped, *again]}]
    rows.append({"messages": [ASK, LAST]})
    (first,) = [text[""] for text in texts(read([FORMS["ShareGPT"]], template="nine.jinja"))]
    second, plain = [text[""] for text in texts(read(rows, template="nine.jinja"))]

    def said(role, content):
        return f"<|im_start|>{role}\n{content}<|im_end|>"

    def learnt(content):
        return f"<|im_start|>assistant\n[{content}<|im_end|>]"

    weather, clock = JSON_CALLS
    results = said("tool", '{"sky": "blue"}=000000001') + said("tool", "10:00=000000002")
    assert first.endswith(
        said("user", "Paris?") + learnt(f"000000001={weather}000000002={clock}") + results + learnt("Blue at ten.")
    )
    assert second == (
        said("user", "Paris?")
        + learnt(f"abcdefghi={weather}000000002={clock}")
        + said("tool", "10:00=000000002")
        + said("tool", "blue=abcdefghi")
        + learnt(f"000000003={clock}")
        + said("tool", "11:00=000000003")
        + learnt("Blue at ten.")
    )
    assert plain == said("user", "Paris?") + learnt("Blue at ten.")


@pytest.mark.parametrize("template", ["chatml", "plain", "verbatim", "scratch"])
@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": OPENAI, "tools": TOOLS}, "tools"),
        ({"messages": OPENAI}, "calls of tools"),
        ({"messages": [ASK, say("assistant", "Blue.")], "tools": TOOLS}, "tools"),
        ({"messages": [ASK, say("assistant", "weather Paris é")], "tools": json.dumps(TOOLS)}, "tools"),
    ],
)
def test_a_template_without_tools_is_told(read, template, row, what):
    plain = {"messages": [say("user", "Hi"), say("assistant", "Hello!")], "tools": []}
    made = read([plain, row], template=template)
    found = fault(made)
    assert (found.count, found.rows) == (1, (1,))
    mend = "set tokenizer.chat_template to a template with tools, such as `hermes`, or leave these rows out"
    assert found.why == f"{what}: the chat template {template!r} does not show {what}; {mend}"
    (message,) = made.prepare("sft", "data").audit.problems({"malformed": 0.01})
    assert "rows.jsonl: 1 of 2 rows (50.00%) do not fit their format" in message and "First" in message


def read_template(name):
    return (run_tokenizer.chat_templates.TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


BRANCHES = f"{{% if tools %}}{read_template('hermes')}{{% else %}}{read_template('chatml')}{{% endif %}}"


@pytest.mark.parametrize(
    "template", [{"default": read_template("chatml"), "tool_use": read_template("hermes")}, BRANCHES]
)
def test_a_template_that_shows_calls_only_beside_tools(read, template):
    """Rows with calls but without definitions are rendered by the other template, or the other branch of it."""
    made = read([FORMS["OpenAI"], {"messages": OPENAI}, {"messages": [ASK, LAST]}])
    made.tokenizer.chat_template = template
    made = tiny.StageRows(made.config, made.tokenizer)
    assert len(texts(made)) == 2
    assert texts(made)[0] == {"": LEARNT}
    assert fault(made).rows == (1,)
    assert fault(made).why.startswith("calls of tools: the chat template does not show calls of tools; ")


def test_a_template_that_shows_the_first_call_alone(read, tmp_path):
    text = (Path(run_tokenizer.chat_templates.TEMPLATES) / "hermes.jinja").read_text()
    (tmp_path / "first.jinja").write_text(text.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]"))
    made = read([FORMS["OpenAI"]], template="first.jinja")
    assert fault(made).why.startswith("several calls at once: the chat template does not show several calls at once; ")


def test_a_template_that_renders_prompts_differently(read, tmp_path):
    text = "{{ '<last>' if messages[-1].role == 'user' else '' }}" + read_template("chatml")
    (tmp_path / "own.jinja").write_text(text)
    row = {"messages": [say("user", "a"), say("assistant", "b")]}
    why = fault(read([row], template="own.jinja")).why
    what = "the chat template renders the prompt differently when an answer follows it"
    assert why.startswith(f"prompt: {what}: the prompt alone is '<last>")
    mend = "; set tokenizer.chat_template to `chatml` (with tools: `hermes`) or to a file of your own"
    assert why.endswith(mend)
    assert len(ids_of(read([row]))) == len(ids_of(read([row], template="chatml"))) == 1


def test_hermes_is_chatml_where_there_are_no_tools(read):
    row = {"messages": [SYSTEM, ASK, say("assistant", "Blue."), ASK, LAST]}
    assert ids_of(read([row])) == ids_of(read([row], template="chatml"))


# Comparisons and prompts

PAIR = {"chosen": [say("assistant", None, tool_calls=CALLS)], "rejected": [say("assistant", "No.")]}


@pytest.mark.parametrize("kind", ["reward", "dpo"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": OPENAI[:2], **PAIR},
        {"chosen": [*OPENAI[:2], *PAIR["chosen"]], "rejected": [*OPENAI[:2], *PAIR["rejected"]]},
        {
            "conversations": SHAREGPT,
            "chosen": turn("function_call", f"[{', '.join(JSON_CALLS)}]"),
            "rejected": turn("gpt", "No."),
        },
        {"chosen_messages": V1[:3], "rejected_messages": [*V1[:2], say("assistant", "No.", loss_weight=1.0)]},
    ],
)
def test_comparison_of_a_call_with_an_answer(read, row, kind):
    (text,) = texts(read([row | {"tools": TOOLS}], kind), kind)
    sides = {"chosen": f"{SAID}<|im_end|>", "rejected": "No.<|im_end|>"}
    on = (lambda text: f"[{text}]") if kind == "dpo" else str
    assert text == {"prompt": HEAD} | {side: on(said) for side, said in sides.items()}


def test_comparison_after_calls(read):
    row = {"prompt": OPENAI[:-1], "chosen": "Blue.", "rejected": "No.", "tools": TOOLS}
    prompt = f"{HEAD}{SAID}<|im_end|>\n{GIVEN}"
    assert texts(read([row], "reward"), "reward") == [
        {"prompt": prompt, "chosen": "Blue.<|im_end|>", "rejected": "No.<|im_end|>"}
    ]


def test_comparison_of_two_calls_that_differ_in_an_argument(read):
    other = [say("assistant", None, tool_calls=[call("weather", city="Rome"), CALLS[1]])]
    rows = [{"prompt": [ASK], "chosen": PAIR["chosen"], "rejected": side} for side in (other, PAIR["chosen"])]
    made = read(rows, "dpo")
    assert len(ids_of(made, "dpo")) == 1
    assert (fault(made, "dpo").rows, made.prepare("dpo", "data").audit.dropped["identical"].count) == ((1,), 1)


def test_prompts_with_tools_are_sampled_from_by_ppo_and_told_by_grpo(read):
    rows = [{"prompt": OPENAI[:-1], "tools": TOOLS}, {"prompt": [ASK], "tools": TOOLS}, {"prompt": "Hi"}]
    made = read(rows, "ppo")
    prompts = texts(made, "ppo")
    assert prompts[0] == {"prompt": f"{HEAD}{SAID}<|im_end|>\n{GIVEN}"}
    shown = made.prepare("ppo", "data").rows["prompt"][0]
    assert [message["content"] for message in shown][2] == "\n".join(JSON_CALLS)  # as reports show it
    found = fault(read(rows, "grpo"), "grpo")
    assert found.rows == (0, 1)
    assert found.why.startswith("tools: expected a prompt without tools: TRL renders the prompts of rloo and grpo")


def test_a_prompt_is_known_by_its_question_whatever_its_tools(read):
    """So that no stage trains on a prompt with tools that another one is evaluated on."""
    with_tools = [FORMS["OpenAI"], {"prompt": OPENAI[:-1], "tools": TOOLS, "chosen": "a", "rejected": "b"}]
    digests = set()
    for row, kind in ((with_tools[0], "sft"), (with_tools[1], "dpo"), ({"prompt": "paris?"}, "ppo")):
        digests.add(read([row], kind).prepare(kind, "data").audit.prompts)
    assert len(digests) == 1


def test_rows_that_differ_in_their_tools_or_calls_are_no_repeats(read):
    row = FORMS["OpenAI"]
    rows = [row, row | {"tools": TOOLS[:1]}, row | {"messages": OPENAI[:3]}, row]
    noticed = read(rows).prepare("sft", "data").audit.noticed
    assert noticed["duplicate"].rows == (3,)


# Weights


def test_no_loss_on_messages_of_weight_0(read):
    """OpenAI's name and LLaMA-Factory's; what follows the last message that is learnt from is cut."""
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    for name, zero in (("weight", 0), ("loss_weight", 0.0)):
        turns = [say("user", "a"), say("assistant", "b", **{name: zero}), say("user", "c"), say("assistant", "d")]
        more = [say("user", "e"), say("assistant", "f", **{name: zero})]
        expected = {"": f"{asked('a')}b<|im_end|>\n{asked('c')}[d<|im_end|>]"}
        made = read([{"messages": turns}, {"messages": [*turns, *more]}, {"messages": [*turns[:3], more[1]]}])
        assert texts(made) == [expected, expected]
        assert fault(made).rows == (2,)
        noticed = made.prepare("sft", "data").audit.noticed
        assert (noticed["eos"].count, noticed["duplicate"].rows) == (0, (1,))


QUIET = [say("user", "a"), say("assistant", "b", weight=0), say("user", "c"), say("assistant", "d", weight=0)]


@pytest.mark.parametrize(
    ("row", "shape", "field", "length"),
    [
        ({"messages": QUIET}, "messages", "messages", 3),
        ({"messages": QUIET[:2], "tools": TOOLS}, "messages", "messages", 1),
        ({"conversations": [turn("human", "a"), turn("gpt", "b") | {"weight": 0}]}, "sharegpt", "conversations", 1),
        ({"prompt": "a", "completion": QUIET[1:2]}, "prompt_completion", "completion", 1),
        ({"messages": QUIET, "label": True}, "unpaired", "messages", 3),
    ],
)
def test_a_dialogue_of_weight_0_is_a_prompt_and_no_demonstration(row, shape, field, length):
    prompt = [say("user", "a"), say("assistant", "b"), say("user", "c")][:length]
    expected = {"prompt": prompt} | ({"tools": TOOLS} if "tools" in row else {})
    assert convert(row, shape, "prompts") == expected
    with pytest.raises(RowFault) as error:
        convert(row, shape, "demonstrations")
    why = "has nothing to learn from: all of the assistant's messages have weight 0"
    assert (error.value.kind, str(error.value)) == ("malformed", f"{field}: {why}")


def test_a_prompt_of_weight_0_is_sampled_from(read):
    rows = [{"messages": QUIET}, {"messages": [say("user", "x"), say("assistant", "y")]}]
    assert ids_of(read(rows, "ppo"), "ppo")[0] == ids_of(read([{"prompt": QUIET[:3]}], "ppo"), "ppo")[0]


def test_rows_that_differ_in_a_weight_are_no_repeats(read):
    rows = [
        {"messages": [say("user", "a"), say("assistant", "b", weight=w), say("user", "c"), say("assistant", "d")]}
        for w in (0, 1, None)
    ]
    made = read(rows)
    assert made.prepare("sft", "data").audit.noticed["duplicate"].rows == (2,)
    assert [sum(row["completion_mask"]) for row in made.prepare("sft", "data").rows] == [2, 4, 4]


def test_weights_of_comparisons(read):
    before = [say("user", "a"), say("assistant", "b", loss_weight=0), say("user", "c")]
    plain = {"prompt": [say("user", "a"), say("assistant", "b"), say("user", "c")], "chosen": "d", "rejected": "e"}
    weighted = {
        "chosen_messages": [*before, say("assistant", "d", loss_weight=1)],
        "rejected_messages": [*before, say("assistant", "e", loss_weight=1)],
    }
    assert ids_of(read([weighted], "dpo"), "dpo") == ids_of(read([plain], "dpo"), "dpo")
    row = {key: [*before, say("assistant", value, weight=0)] for key, value in (("chosen", "d"), ("rejected", "e"))}
    assert fault(read([row], "dpo"), "dpo").why == "chosen: expected two answers to compare, got one of weight 0"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (say("assistant", "b", weight=0.5), "expected a weight of 0 or 1, got "),
        (say("assistant", "b", loss_weight=2), "expected a weight of 0 or 1, got "),
        (say("assistant", "b", loss_weight="1"), "expected a weight of 0 or 1, got "),
        (say("user", "b", loss_weight=1.0), "expected a loss on the assistant's messages alone, got "),
        (say("assistant", [part("reasoning", "b")]), "expected parts of type 'text', got "),
        (say("assistant", "b", tools=TOOLS), "expected tools in a column of their own, got "),
        (say("assistant", "b", functions=json.dumps(TOOLS)), "expected tools in a column of their own, got "),
        (say("assistant", "b", function_calls="clock(zone=1)"), "expected calls of tools as `tool_calls`, got "),
        (say("assistant", None, function_calls=CALLS), "expected calls of tools as `tool_calls`, got "),
        (say("user", "b", tool_calls=CALLS), "expected calls of tools by the assistant alone, got "),
        (say("assistant", None, tool_calls=[{"name": "f", "arguments": "{"}]), "expected calls with a name and with "),
        (say("function_call", "weather in Paris"), "expected calls with a name and with arguments as a JSON object"),
        (say("assistant", None, function_call={"arguments": {}}), "expected calls with a name and with arguments"),
    ],
)
def test_faults_of_messages(read, message, words):
    made = read([{"messages": [say("user", "a"), message, say("user", "c"), say("assistant", "d")]}])
    assert fault(made).why.startswith(f"messages: {words}")


@pytest.mark.parametrize("nothing", [None, "", [], "[]", "null"])
@pytest.mark.parametrize("key", ["tools", "functions", "function_calls"])
def test_keys_of_messages_that_hold_nothing(key, nothing):
    """A table gives every message the keys of all others."""
    row = {"messages": [ASK | {key: nothing}, LAST | {key: nothing}]}
    assert convert(row, "messages", "demonstrations") == {"prompt": [ASK], "completion": "Blue at ten."}


@pytest.mark.parametrize("tools", ["hammer", ["hammer"], [{"type": "web_search"}], {"a": 1}, 5])
def test_a_column_of_tools_that_holds_none(read, tools):
    made = read([{"messages": [ASK, LAST], "tools": tools}])
    why = fault(made).why
    assert why.startswith("tools: expected definitions of functions with a name, got ")
    assert why.endswith("; to read the rows without it, rename the column: `columns: {tools: unused}`")


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_renamed_the_rows_are_read_without_it(read, name):
    rows = [{"messages": [ASK, LAST], name: "search, calc"}, {"messages": [ASK, LAST], name: "hammer"}]
    made = read(rows, data={"rows": {"path": "rows.jsonl", "columns": {name: "unused"}}})
    assert ids_of(made) == 2 * ids_of(read([{"messages": [ASK, LAST]}]))


@pytest.mark.parametrize(
    "nothing", [None, "", " ", "None", "null", "[]", [], [None], ["None", None], {}, [{"a": None}]]
)
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_a_column_that_says_there_are_no_tools(name, nothing):
    assert tools_of({name: nothing}) == []
    assert tools_of({"tools": nothing, "functions": TOOLS}) == TOOLS
    assert tools_of({name: [None, *TOOLS]}) == TOOLS


BEYOND_JSON = [datetime.datetime(2020, 1, 2), datetime.date(2020, 1, 2), b"\x89PNG", "\ud83d"]


@pytest.mark.parametrize("value", BEYOND_JSON)
def test_values_that_json_cannot_hold(value):
    """Tables have times and bytes; JSON within a text may have half of a surrogate pair."""
    definition = {"name": "clock", "parameters": {"default": value}}
    row = {"messages": [ASK, say("assistant", None, tool_calls=[call("clock", zone=value)])]}
    called_by_id = say("assistant", None, tool_calls=[{"id": "\ud83d", "name": "clock", "arguments": {}}])
    for found, field in (
        (row, "messages"),
        ({"messages": [ASK, called_by_id]}, "messages"),
        ({"messages": [ASK, LAST], "tools": [definition]}, "tools"),
        ({"messages": [ASK, LAST], "functions": definition}, "functions"),
    ):
        with pytest.raises(RowFault, match=f"^{field}: expected values of JSON, got ") as error:
            convert(found, "messages", "demonstrations")
        assert error.value.kind == "malformed"


def test_times_in_a_table_and_half_a_pair_in_json_are_faults_of_their_rows(read, tmp_path):
    timed = say("assistant", None, tool_calls=[call("clock", at=datetime.datetime(2020, 1, 2))])
    Dataset.from_list([{"messages": [ASK, timed]}]).to_parquet(tmp_path / "table.parquet")
    rows = {"messages": [ASK, say("assistant", None, tool_calls=['{"name": "f", "arguments": {"a": "\\ud83d"}}'])]}
    for made in (read([], data={"rows": {"path": "table.parquet"}}), read([rows, {"messages": [ASK, LAST]}])):
        assert fault(made).rows == (0,)
        assert fault(made).why.startswith("messages: expected values of JSON, got ")


# What people see


def test_check_data_shows_the_calls(cli, read, tmp_path):
    for form in ("OpenAI", "ShareGPT", "LLaMA-Factory's v1"):
        read([FORMS[form]])
        exit_code, shown, message = cli("check-data", tmp_path / "tiny.yaml", "--stage", "sft", "--sample", "1")
        assert (exit_code, message) == (0, "")
        assert f"{HEAD}⟦{SAID}<|im_end|>⟧\n{GIVEN}⟦Blue at ten.<|im_end|>⟧" in shown


def test_check_data_shows_a_comparison_of_v1(cli, read, tmp_path):
    row = {f"{side}_messages": [*V1[:2], say("assistant", [part("text", side)])] for side in ("chosen", "rejected")}
    read([row], "dpo")
    exit_code, shown, message = cli("check-data", tmp_path / "tiny.yaml", "--stage", "dpo", "--sample", "1")
    assert (exit_code, message) == (0, "")
    head = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n"
    assert f"prompt: {head}\nchosen: ⟦chosen<|im_end|>⟧\nrejected: ⟦rejected<|im_end|>⟧\n" in shown


def test_check_data_names_the_template_that_shows_no_tools(cli, read, tmp_path):
    read([FORMS["ShareGPT"]], template="chatml")
    exit_code, _, message = cli("check-data", tmp_path / "tiny.yaml", "--stage", "sft", "--sample", "1")
    assert exit_code == 2
    assert "rows.jsonl: row 0: tools: the chat template 'chatml' does not show tools; set tokenizer.chat_t" in message


def test_columns_of_v1_tell_a_comparison():
    row = {"chosen_messages": [ASK, LAST], "rejected_messages": [ASK, say("assistant", "No.")]}
    assert detect(row | {"id": 1}) == "comparison"
    assert convert(row, "comparison", "demonstrations") == {"prompt": [ASK], "completion": "Blue at ten."}
