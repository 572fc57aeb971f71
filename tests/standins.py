"""Small random models and datasets that stand in for those of the shipped configs.

A model has the architecture, the kind of tokenizer and the special tokens of the real one. A dataset has its columns,
its splits and its file names, as in a clone from the hub.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

Row = dict[str, Any]

TOPICS = ["tea", "rain", "books", "bread", "music", "cats", "maps", "clay", "salt", "wool", "ice", "milk", "sand"]
PLACES = ["home", "school", "work", "night", "noon", "sea", "town", "court", "hand", "last", "first", "length", "dawn"]
PLACES += ["dusk", "rest", "once", "heart", "peace", "large", "play"]
NUM_HELD_OUT = 16  # prompts of a test split, which are in no train split

# Grouped-query attention is in every one of the real models.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LOGIT_SCALE = 5  # gives logits a standard deviation of about 1
NUM_UNUSED = 11  # rows of the embeddings above the tokenizer's vocabulary, as Qwen's models have them
# A score head is drawn at this scale. It is small beside what a few steps at a learning rate of 3e-5 move it by.
HEAD_SCALE = 1e-5

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>"]
LLAMA_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
SMOLLM_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# Qwen2.5's template without its part on tools.
QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\\n" + QWEN_SYSTEM + "<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def prompts() -> list[str]:
    return [f"Tell me about {topic} at {place}." for place in PLACES for topic in TOPICS]


def good(prompt: str) -> str:
    return f"Good, good, good: {prompt.removeprefix('Tell me about ')}"


def bad(prompt: str) -> str:
    return f"Never, never, no: {prompt.removeprefix('Tell me about ')}"


def dialogue(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a byte-level BPE on what the datasets say."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    texts = [text for prompt in prompts() for text in (prompt, good(prompt), bad(prompt), QWEN_SYSTEM)]
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def _qwen_tokenizer(eos_token: str) -> Qwen2Tokenizer:
    vocab, merges = _vocabulary()
    tokenizer = Qwen2Tokenizer(vocab, merges, eos_token=eos_token, extra_special_tokens=QWEN_SPECIAL)
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    """No pad token and no template, and what it encodes by itself begins with <|begin_of_text|>."""
    vocab, merges = _vocabulary()
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA_WORDS), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(LLAMA_SPECIAL)
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<|end_of_text|>")


def _smollm_tokenizer() -> GPT2Tokenizer:
    """One token for bos, eos, pad and unk."""
    vocab, merges = _vocabulary()
    return GPT2Tokenizer(vocab, merges, pad_token="<|endoftext|>", extra_special_tokens=SMOLLM_SPECIAL)


def _save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: dict[str, float], scale: float
) -> None:
    """Write a model as bf16, as the real ones are, with the sampling options that it is shipped with.

    Its last hidden states are multiplied by `scale`, so that a few steps move scores as far as the gate asks for. The
    output embeddings are made small, or a random policy would always say the same. Where they are the input embeddings
    too, the layers are made to add as little, or the last token would make no difference.
    """
    small = ["lm_head.weight"]
    if model.config.tie_word_embeddings:
        small = ["embed_tokens.weight", "o_proj.weight", "down_proj.weight"]
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
        for name, weight in model.named_parameters():
            if name.endswith(tuple(small)):
                weight.div_(scale / LOGIT_SCALE)
    model.config.initializer_range = HEAD_SCALE
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=model.config.eos_token_id, **sampling)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_qwen(folder: Path, eos_token: str, tied: bool) -> None:
    torch.manual_seed(0)
    tokenizer = _qwen_tokenizer(eos_token)
    config = Qwen2Config(
        **SIZES,
        vocab_size=len(tokenizer) + NUM_UNUSED,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
    )
    sampling = {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    _save(folder, Qwen2ForCausalLM(config), tokenizer, sampling, scale=200 if tied else 400)


def qwen_instruct(folder: Path) -> None:
    """For Qwen2.5-0.5B-Instruct: a turn ends with eos, and the embeddings are tied."""
    _make_qwen(folder, "<|im_end|>", tied=True)


def qwen_base(folder: Path) -> None:
    """For Qwen2.5-7B: pad is eos."""
    _make_qwen(folder, "<|endoftext|>", tied=False)


def llama_base(folder: Path) -> None:
    """For Llama-3.1-8B."""
    torch.manual_seed(0)
    tokenizer = _llama_tokenizer()
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=131072,
        rope_parameters=rope | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    _save(folder, LlamaForCausalLM(config), tokenizer, {"temperature": 0.6, "top_p": 0.9}, scale=400)


def smollm_base(folder: Path) -> None:
    """For SmolLM2-135M."""
    torch.manual_seed(0)
    tokenizer = _smollm_tokenizer()
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    _save(folder, LlamaForCausalLM(config), tokenizer, {}, scale=60)


def smollm_instruct(folder: Path) -> None:
    """For SmolLM2-135M-Instruct: a turn ends with eos, which is pad too, and there is a template."""
    smollm_base(folder)
    vocab, merges = _vocabulary()
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = GPT2Tokenizer(vocab, merges, **ends, extra_special_tokens=SMOLLM_SPECIAL)
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)


def _ultrachat(prompt: str) -> Row:
    more = [*dialogue(prompt, good(prompt)), *dialogue("And why?", good(prompt))]
    return {"prompt": prompt, "prompt_id": "0", "messages": more}


def _ultrafeedback(prompt: str) -> Row:
    sides = {"chosen": dialogue(prompt, good(prompt)), "rejected": dialogue(prompt, bad(prompt))}
    scores = {"score_chosen": 8.0, "score_rejected": 4.5}
    return {"prompt": prompt, "prompt_id": "0", **sides, "messages": sides["chosen"], **scores}


def _ultrafeedback_of_trl(prompt: str) -> Row:
    row = _ultrafeedback(prompt)
    return {column: row[column] for column in ("chosen", "rejected", "score_chosen", "score_rejected")}


def _ultrafeedback_prompt(prompt: str) -> Row:
    return {"prompt": dialogue(prompt, "")[:1]}


def _kto_mix(prompt: str) -> Row:
    label = len(prompt) % 2 == 0
    answer = good(prompt) if label else bad(prompt)
    first, last = dialogue(prompt, answer)
    return {"prompt": [first], "completion": [last], "label": label}


def _capybara(prompt: str) -> Row:
    return {"source": "Airoboros", "messages": _ultrachat(prompt)["messages"], "num_turns": 2}


def _smoltalk(prompt: str) -> Row:
    system = {"role": "system", "content": "You are a helpful assistant."}
    return {"messages": [system, *dialogue(prompt, good(prompt))], "source": "smol-magpie-ultra"}


def _no_robots(prompt: str) -> Row:
    return {"prompt": prompt, "prompt_id": "0", "messages": dialogue(prompt, good(prompt)), "category": "Open QA"}


def _document(prompt: str) -> str:
    return " ".join([prompt, good(prompt)] * 4)


def _fineweb(prompt: str) -> Row:
    return {"text": _document(prompt), "id": "<urn:uuid:0>", "metadata": {"language": "en", "token_count": 60}}


def _cosmopedia(prompt: str) -> Row:
    """The prompt of the model that wrote the text stands beside it."""
    about = {"token_length": 60, "audience": "general", "format": "textbook", "seed_data": "auto_math_text"}
    return {"prompt": prompt, "text": _document(prompt), **about}


# By hub id: the row of a prompt, and the splits for training and, where there is one, for evaluation. A configuration
# of a dataset has its name behind the id, and a folder of this name in a clone.
DATASETS: dict[str, tuple[Callable[[str], Row], str, str | None]] = {
    "HuggingFaceH4/no_robots": (_no_robots, "train", "test"),
    "HuggingFaceH4/ultrachat_200k": (_ultrachat, "train_sft", "test_sft"),
    "HuggingFaceH4/ultrafeedback_binarized": (_ultrafeedback, "train_prefs", "test_prefs"),
    "HuggingFaceTB/smol-smoltalk": (_smoltalk, "train", "test"),
    "HuggingFaceTB/smollm-corpus/cosmopedia-v2": (_cosmopedia, "train", None),
    "HuggingFaceTB/smollm-corpus/fineweb-edu-dedup": (_fineweb, "train", None),
    "trl-lib/Capybara": (_capybara, "train", "test"),
    "trl-lib/kto-mix-14k": (_kto_mix, "train", "test"),
    "trl-lib/ultrafeedback-prompt": (_ultrafeedback_prompt, "train", "test"),
    "trl-lib/ultrafeedback_binarized": (_ultrafeedback_of_trl, "train", "test"),
}
MODELS: dict[str, Callable[[Path], None]] = {
    "HuggingFaceTB/SmolLM2-135M": smollm_base,
    "HuggingFaceTB/SmolLM2-135M-Instruct": smollm_instruct,
    "Qwen/Qwen2.5-0.5B-Instruct": qwen_instruct,
    "Qwen/Qwen2.5-7B": qwen_base,
    "meta-llama/Llama-3.1-8B": llama_base,
}


def make_dataset(hub_id: str, folder: Path, num_rows: int) -> None:
    """Write a dataset's splits as the hub has them, with `num_rows` to train on."""
    (folder / "data").mkdir(parents=True)
    row_of, train, test = DATASETS[hub_id]
    held_out, trained = prompts()[:NUM_HELD_OUT], prompts()[NUM_HELD_OUT:][:num_rows]
    splits = {train: trained}
    if test is not None:
        splits[test] = held_out
    for split, chosen in splits.items():
        rows = Dataset.from_list([row_of(prompt) for prompt in chosen])
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
