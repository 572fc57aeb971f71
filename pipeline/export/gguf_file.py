"""Write a policy as one GGUF file, as llama.cpp and what is built on it read it, by the `gguf` package.

What cannot be written so that it is read back as the same model is refused before any weights are loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.data.joints import begins_with
from pipeline.system.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = ("llama", "qwen2")  # as transformers and GGUF both name them
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How a tokenizer cuts text before BPE -> llama.cpp's name of it.
_PRE_TOKENIZERS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _SPLIT.format("")), ("ByteLevel", False)): "qwen2",
    (("Split", _SPLIT.format("{1,3}")), ("ByteLevel", False)): "llama-bpe",
}


class _Type(NamedTuple):
    """The numbers of a type of weights in GGUF: of a tensor, and of a file that mostly has it."""

    tensor: str
    file: str


TYPES = {
    "float32": _Type("F32", "ALL_F32"),
    "float16": _Type("F16", "MOSTLY_F16"),
    "bfloat16": _Type("BF16", "MOSTLY_BF16"),
}


def check(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a model that cannot be written.

    Raises:
        UserError: if its architecture, an option of it or its tokenizer is not covered, or `gguf` is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--as gguf: needs the package gguf; install it with `pip install 'gguf>=0.17,<0.20'`") from None
    fault = _fault_of_config(config)
    if fault is None and _pre_tokenizer(tokenizer) is None:
        fault = "its tokenizer is none of the byte-level BPE tokenizers of GPT-2, SmolLM2, Qwen2 and Llama 3"
    if fault is not None:
        raise UserError(f"--as gguf: {fault}. Export it with `--as merged`, and convert it with llama.cpp's script")


def _fault_of_config(config: PreTrainedConfig) -> str | None:
    """Say what of a model's architecture is not covered; None if all is."""
    if config.model_type not in ARCHITECTURES:
        return f"the architecture {config.model_type!r} is not covered; {' and '.join(ARCHITECTURES)} are"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        return f"rotary positions of type {kind!r} are not covered"
    if config.model_type == "llama":
        for option in ("attention_bias", "mlp_bias"):
            if getattr(config, option, False):
                return f"a llama model with `{option}` is not covered"
    if getattr(config, "use_sliding_window", False):
        return "attention with a sliding window is not covered"
    return None


def _pre_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return llama.cpp's name for how a byte-level BPE tokenizer cuts text; None for any other tokenizer."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] != "BPE" or rules.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    before = rules.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    options = {"ByteLevel": "use_regex", "Digits": "individual_digits"}
    key = []
    for part in parts:
        kind = part.get("type")
        if kind == "Split":
            key.append((kind, part["pattern"].get("Regex")))
        elif kind in options and not part.get("add_prefix_space"):
            key.append((kind, part.get(options[kind])))
        else:
            return None
    return _PRE_TOKENIZERS.get(tuple(key))


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, file: Path, dtype: str, name: str) -> None:
    """Write a model, whose weights are float32, with its tokenizer and chat template; weights become `dtype`.

    Vectors stay float32, as llama.cpp expects them. One tensor is converted at a time.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[TYPES[dtype].file])
    _add_config(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for label, tensor, kind in _tensors(model, dtype):
        shape, data_type, size = _layout(tensor, kind)
        writer.add_tensor_info(label, shape, data_type, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor, kind in _tensors(model, dtype):
        writer.write_tensor_data(gguf.quants.quantize(tensor.numpy(), kind))
    writer.close()


def _add_config(writer: "GGUFWriter", config: PreTrainedConfig) -> None:
    size_of_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size_of_head)
    writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", 10000.0))
    writer.add_key_length(size_of_head)
    writer.add_value_length(size_of_head)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerFast, num_rows: int) -> None:
    """Add the vocabulary, one token for each row of the embedding, the merges, special tokens and the template."""
    from gguf import TokenType

    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{id}]" for id in range(num_rows)]
    types = [TokenType.UNUSED] * num_rows
    for token, id in tokenizer.get_vocab().items():
        tokens[id] = token
        types[id] = TokenType.NORMAL
    for id, token in tokenizer.added_tokens_decoder.items():
        types[id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cast(str, _pre_tokenizer(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = rules["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    special = {
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
        "bos": writer.add_bos_token_id,
        "unk": writer.add_unk_token_id,
    }
    for kind, add in special.items():
        id = getattr(tokenizer, f"{kind}_token_id")
        if id is not None:
            add(id)
    writer.add_add_bos_token(begins_with(tokenizer) is not None)
    writer.add_chat_template(str(tokenizer.chat_template))


def _tensors(model: PreTrainedModel, dtype: str) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Yield GGUF's name of each tensor, the tensor in float32, and the type that it gets."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"{key} has a name in GGUF, since the architecture is covered"
        tensor = tensor.detach().float()
        layer = key.split(".")[-2]
        if config.model_type == "llama" and layer in heads:
            tensor = _permuted(tensor, heads[layer])
        kind = gguf.GGMLQuantizationType[TYPES[dtype].tensor]
        yield name, tensor.contiguous(), kind if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32


def _permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Order the rows of a head as llama.cpp rotates them: pairs beside each other, not the halves of a head."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _layout(tensor: torch.Tensor, kind: Any) -> tuple[tuple[int, ...], Any, int]:
    """Return shape, numpy's type and size in bytes of a tensor as it will be written; bfloat16 counts in bytes."""
    size = 4 if kind.name == "F32" else 2
    *outer, last = tensor.shape
    if kind.name == "BF16":
        return (*outer, 2 * last), np.dtype(np.uint8), 2 * tensor.numel()
    return (*outer, last), np.dtype(np.float32 if size == 4 else np.float16), size * tensor.numel()
