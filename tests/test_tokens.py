"""Every stage meets the same tokens: those that RL samples from, with BOS where the tokenizer begins a text with it."""

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.config.load import load
from pipeline.data import joints, run_tokenizer
from pipeline.stages.rloo_grpo import prompt_ids

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Tell me about tea."},
    {"role": "assistant", "content": "I like tea."},
    {"role": "user", "content": "And\nrain?  Hé"},
    {"role": "assistant", "content": " no rain 👋"},
    {"role": "user", "content": "more"},
]
ANSWER = {"role": "assistant", "content": "I like rain because it is good."}
OTHER = {"role": "assistant", "content": "No rain."}
# Templates whose answers begin after a letter, a space, a line break and a special token.
HEADERS = {"letter": "A:", "space": "A: ", "line": "A\n", "special": "<unk>"}


def make_tokenizer(kind):
    """A tokenizer built like Llama 2's, like Mistral's with `prepend_scheme: first`, or byte-level, with BOS."""
    words = [text.replace(" ", "▁") for row in tiny.comparisons() for text in row.values()]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    if kind in ("llama2", "metaspace"):
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.train_from_iterator(words, trainer)
    if kind == "llama2":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind in ("llama2", "metaspace"):
        spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*spaces, decoders.Strip(content=" ", left=1)])
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix space")
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator([text for row in tiny.comparisons() for text in row.values()], trainer)
    if kind != "no bos":
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


KINDS = ("llama2", "metaspace", "prefix space", "byte-level", "no bos")
SENTENCEPIECE = KINDS[:3]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make(folder, kind, **top):
    """A run with such a tokenizer, its rows and a model of its size."""
    stages = {
        "pretrain": {"data": "texts", "training": {"packing": False, "max_length": 64}},
        "sft": {"data": "dialogues", "init": "base"},
        "reward": {"data": "pairs"},
        "dpo": {"data": "pairs"},
        "ppo": {"data": "pairs"},
    }
    names = ("texts", "dialogues", "pairs")
    path = tiny.make_run(folder, stages, data={name: {"path": f"{name}.jsonl"} for name in names}, **top)
    tiny.write_rows(folder / "texts.jsonl", [{"text": "I like tea."}, {"text": "<s>I like rain."}])
    tiny.write_rows(folder / "dialogues.jsonl", [{"messages": [*TURNS, ANSWER]}])
    tiny.write_rows(folder / "pairs.jsonl", [{"prompt": TURNS, "chosen": [ANSWER], "rejected": [OTHER]}])
    (folder / "model" / "chat_template.jinja").unlink()
    make_tokenizer(kind).save_pretrained(folder / "model")
    return path


def read(path, *overrides):
    config = load(path, overrides)
    tokenizer = run_tokenizer.build(config)
    return tiny.StageRows(config, tokenizer)


def sampled_from(tokenizer, messages):
    """The prompt as TRL's RLOO and GRPO encode it."""
    (ids,) = tokenizer.apply_chat_template([messages], add_generation_prompt=True, tokenize=True)["input_ids"]
    return ids


def answers(row):
    """Where each answer begins, and its ids."""
    ids, mask = row["input_ids"], row["completion_mask"]
    starts = [i for i, bit in enumerate(mask) if bit and not mask[i - 1]]
    ends = [next((j for j in range(i, len(mask)) if not mask[j]), len(mask)) for i in starts]
    return [(start, ids[start:end]) for start, end in zip(starts, ends, strict=True)]


def own_template(folder, header):
    text = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}" + header + "{{ m.content }}</s>"
    text += "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    text += "{% if add_generation_prompt %}" + header + "{% endif %}"
    (folder / "own.jinja").write_text(text)
    return {"tokenizer": {"chat_template": "own.jinja"}}


@pytest.mark.parametrize("template", ["plain", "chatml", "verbatim", "letter", "line", "special"])
def test_prompts_in_sft_are_those_that_rl_samples_from(tmp_path, kind, template):
    own = {"tokenizer": {"chat_template": template}}
    if template == "chatml":
        own["tokenizer"]["eos_token"] = "<|im_end|>"
    if template in HEADERS:
        own = own_template(tmp_path, HEADERS[template])
    made = read(make(tmp_path, kind, **own))
    tokenizer = made.tokenizer
    (row,) = made.prepare("sft", "data").rows
    turns = [i for i, message in enumerate([*TURNS, ANSWER]) if message["role"] == "assistant"]
    found = answers(row)
    assert len(found) == len(turns) == 3
    for turn, (start, ids) in zip(turns, found, strict=True):
        text = tokenizer.apply_chat_template(TURNS[:turn], add_generation_prompt=True, tokenize=False)
        assert row["input_ids"][:start] == sampled_from(tokenizer, TURNS[:turn]) == prompt_ids(tokenizer, TURNS[:turn])
        assert joints.token_ids(tokenizer, [text]) == [row["input_ids"][:start]]
        assert ids[-1] == tokenizer.eos_token_id
    assert made.prepare("sft", "data").audit.noticed["other_tokens"].count == 0
    (pair,) = made.prepare("reward", "data").rows
    (prompt,) = made.prepare("ppo", "data").rows
    start, ids = found[-1]
    assert pair["prompt_ids"] == prompt["prompt_ids"] == row["input_ids"][:start]
    assert pair["chosen_ids"] == ids
    if template == "plain":  # no space more than the tokenizer makes of the text
        whole = tokenizer.apply_chat_template([*TURNS, ANSWER], tokenize=False)
        assert row["input_ids"] == [*joints.token_ids(tokenizer, [whole.rpartition("</s>")[0]])[0], 2]
        assert made.prepare("dpo", "data").rows[:] == made.prepare("reward", "data").rows[:]


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_an_answer_after_a_space_follows_the_prompts_own_tokens(tmp_path, kind):
    """The prompt ends with the token of a space, so the answer's first token has no space of its own."""
    made = read(make(tmp_path, kind, **own_template(tmp_path, HEADERS["space"])))
    (pair,) = made.prepare("reward", "data").rows
    assert pair["prompt_ids"] == sampled_from(made.tokenizer, TURNS)
    text = made.tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"])
    assert text.endswith(f"A: {ANSWER['content']}</s>")


@pytest.mark.parametrize("kind", SENTENCEPIECE)
@pytest.mark.parametrize(("header", "count"), [("space", 1), ("letter", 0)])
def test_earlier_answers_in_other_tokens_are_counted(tmp_path, kind, header, count):
    """After a header that ends with a space an answer begins without one; in a later prompt the two are one token."""
    audit = read(make(tmp_path, kind, **own_template(tmp_path, HEADERS[header]))).prepare("sft", "data").audit
    assert audit.noticed["other_tokens"].count == count


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_parts_have_the_ids_they_have_within_the_text(kind):
    tokenizer = make_tokenizer(kind)
    (whole, before, alone) = joints.token_ids(tokenizer, ["I like:tea.", "I like:", "tea."])
    assert before + alone != whole  # what encoding the parts apart would give
    assert joints.continuations(tokenizer, [("", "I like:"), ("I like:", "tea.")]) == [before, whole[len(before) :]]


@pytest.mark.parametrize("template", [None, "plain", "chatml", "verbatim", "scratch"])
def test_rows_begin_with_bos_where_the_tokenizer_begins_texts_with_it(tmp_path, kind, template):
    made = read(make(tmp_path, kind, tokenizer={"chat_template": template}))
    bos = [] if kind == "no bos" else [1]
    rows = {name: made.prepare(name, "data").rows for name in ("pretrain", "sft", "reward", "dpo", "ppo")}
    starts = [rows["pretrain"]["input_ids"][0], *rows["sft"]["input_ids"]]
    starts += [*rows["reward"]["prompt_ids"], *rows["dpo"]["prompt_ids"]]
    for ids in starts:
        assert ids[: len(bos)] == bos
    (prompt,) = rows["ppo"]["prompt_ids"]
    assert prompt == sampled_from(made.tokenizer, TURNS)
    for stage, columns in (("sft", ["input_ids"]), ("reward", ["prompt_ids", "chosen_ids"]), ("ppo", ["prompt_ids"])):
        (row,) = rows[stage]
        assert sum(row[column].count(1) for column in columns) == len(bos)
    assert [ids.count(1) for ids in rows["pretrain"]["input_ids"]] == [len(bos), 1]  # the second text brings its own
    if kind != "no bos":
        assert rows["pretrain"]["input_ids"][0][:-1] == made.tokenizer("I like tea.")["input_ids"]


@pytest.mark.parametrize(("stage", "column"), [("sft", "input_ids"), ("reward", "prompt_ids"), ("ppo", "prompt_ids")])
def test_a_prompt_that_is_cut_keeps_its_bos(tmp_path, stage, column):
    path = make(tmp_path, "llama2", too_long="truncate")
    whole = read(path).prepare(stage, "data").rows[0]
    sides = max(len(whole[side]) for side in ("chosen_ids", "rejected_ids")) if stage == "reward" else 0
    key = "max_prompt_length" if stage == "ppo" else "training.max_length"
    made = read(path, f"stages.{stage}.{key}={len(whole[column]) + sides - 5}")
    cut = made.prepare(stage, "data")
    assert cut.audit.noticed["truncated"].count == 1
    (row,) = cut.rows
    assert row[column] == [1, *whole[column][6:]]


def test_check_data_says_whether_rows_begin_with_bos(cli, tmp_path):
    path = make(tmp_path, "llama2")
    _, shown, _ = cli("check-data", path, "--sample", 1)
    assert "Rows begin with BOS ('<s>'), which the tokenizer puts before every text." in shown
    assert "<s> System: Be kind." in shown and "do not begin with the BOS" not in shown
    (tmp_path / "bare.jinja").write_text(tiny.TEMPLATE)
    tiny.edit(path, {"tokenizer": {"chat_template": "bare.jinja"}})
    _, shown, _ = cli("check-data", path)
    assert "Rows of sft, reward, dpo, ppo begin without BOS, but the tokenizer puts '<s>' before every text" in shown
    make_tokenizer("no bos").save_pretrained(tmp_path / "model")
    _, shown, _ = cli("check-data", path)
    assert "The tokenizer puts no BOS before a text: rows begin as the chat template writes them." in shown
