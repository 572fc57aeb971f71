"""Datasets: from the files people have to the token ids every stage shares.

A row is brought into messages first, then rendered with the run's one chat template and tokenised, the same way for
every stage: a prompt ends with the template's assistant header, what the assistant says with eos. TRL's trainers are
handed token ids, so nothing is filtered, truncated or templated differently behind our back.
"""

import glob
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from pipeline.errors import UserError, nearest, reason_of
from pipeline.manifest import digest, file_digest
from pipeline.options import length_limit
from pipeline.schema import Data, RunConfig

# Prepared rows are cached by this too: another version of this file may prepare them otherwise.
_CODE = file_digest(Path(__file__))
Messages = list[dict[str, str]]
Row = dict[str, Any]
_SUFFIXES = {"json": ".json .jsonl", "csv": ".csv .tsv", "parquet": ".parquet", "arrow": ".arrow", "text": ".txt"}
LOADERS = {suffix: loader for loader, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
# The columns that tell a format; the first that is there decides.
COLUMNS = {"sharegpt": "conversations", "comparison": "chosen rejected", "messages": "messages"}
COLUMNS |= {"alpaca": "instruction output", "prompt_completion": "prompt completion"}
COLUMNS |= {"prompt": "prompt", "text": "text"}
# What a stage takes, and the fields one of which its rows must have.
WANTED_BY = {"pretrain": "text", "sft": "demonstrations", "reward": "comparisons", "dpo": "comparisons"}
WANTED_BY |= dict.fromkeys(("ppo", "rloo", "grpo", "evaluate"), "prompts")
NEEDS = {"text": ["text"], "demonstrations": ["completion", "chosen"], "comparisons": ["chosen"], "prompts": ["prompt"]}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Source:
    """A dataset of the config with its place resolved: local files, or none of them and a hub id."""

    name: str
    spec: Data
    files: tuple[Path, ...]

    @property
    def label(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"dataset {self.name!r} ({self.spec.path})"


def find(config: RunConfig, name: str) -> Source:
    """Resolve a dataset's path against the config's folder.

    Raises:
        UserError: if the path looks like a file and is not there, or is of a kind that cannot be read.
    """
    spec = config.data[name]
    pattern = str(config.folder / Path(spec.path).expanduser())
    matches = [Path(match) for match in sorted(glob.glob(pattern))]  # noqa: PTH207
    files = [file for match in matches for file in (sorted(match.iterdir()) if match.is_dir() else [match])]
    local = Path(spec.path).suffix in LOADERS or spec.path.startswith((".", "/", "~")) or "*" in spec.path
    if not files and (local or spec.path.count("/") > 1):
        raise UserError(f"data.{name}.path: no such file: {pattern}")
    for file in files:
        if file.suffix not in LOADERS:
            raise UserError(f"data.{name}.path: cannot read {file}: expected one of {', '.join(LOADERS)}")
    return Source(name, spec, tuple(file.resolve() for file in files))


def fingerprint(source: Source) -> str:
    """Digest of a dataset's content and of how it is read; local files count by content, not by path."""
    spec = source.spec
    if source.files:
        content: Any = [file_digest(file) for file in source.files]
    else:
        content = [spec.path, spec.name, spec.split, _from_hub(source, load_dataset_builder).hash]
    return digest([content, spec.format, spec.columns, spec.limit])


def _from_hub(source: Source, load: Callable[..., Any], **options: Any) -> Any:
    spec = source.spec
    try:
        return load(spec.path, name=spec.name, revision=spec.revision, **options)
    except (OSError, ValueError) as error:
        what = f"cannot load {spec.path!r} from the hub, nor is it a file"
        raise UserError(f"data.{source.name}: {what}: {reason_of(error)}") from None


def load(source: Source) -> Dataset:
    """The rows of a dataset with our column names, cut to its limit.

    Raises:
        UserError: if the files cannot be read, a mapped column is not there, or no rows are left.
    """
    spec = source.spec
    disable_progress_bars()
    empty = UserError(f"{source.label}: is empty; expected at least one row")
    if source.files:
        kinds = {LOADERS[file.suffix] for file in source.files}
        if len(kinds) > 1:
            raise UserError(f"data.{source.name}: files of different kinds in one dataset: {', '.join(sorted(kinds))}")
        if not any(file.stat().st_size for file in source.files):
            raise empty
        options = {"sep": "\t"} if source.files[0].suffix == ".tsv" else {}
        try:
            rows = load_dataset(kinds.pop(), data_files=list(map(str, source.files)), split=spec.split, **options)
        except (DatasetGenerationError, ValueError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[-1]
            if "corresponds to no data" in reason or "No columns to parse" in reason:
                raise empty from None
            raise UserError(f"{source.label}: cannot be read: {reason}") from None
    else:
        rows = _from_hub(source, load_dataset, split=spec.split)
    for theirs, ours in spec.columns.items():
        if theirs not in rows.column_names:
            hint = nearest(theirs, rows.column_names)
            raise UserError(f"{source.label}: `columns` maps {theirs!r}, which is not a column; {hint}")
        if theirs != ours:
            rows = rows.remove_columns([ours] if ours in rows.column_names else []).rename_column(theirs, ours)
    if spec.limit is not None:
        rows = rows.select(range(min(spec.limit, len(rows))))
    if not len(rows):
        raise empty
    return rows


def detect(source: Source, columns: list[str]) -> str:
    """The format of a dataset: the one named in the config, or the one its columns tell."""
    if source.spec.format != "auto":
        return source.spec.format
    for name, needed in COLUMNS.items():
        if set(needed.split()) <= set(columns):
            return name
    raise UserError(
        f"{source.label}: has the columns {', '.join(columns)}; expected text, prompt + completion, messages, "
        "instruction + output, prompt + chosen + rejected, conversations, or a `columns:` mapping to these"
    )


class _RowError(Exception):
    """A fault of one row: the field, what was seen, what was expected."""


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise _RowError(f"{field}: expected text, got {value!r}")
    if not value.strip():
        raise _RowError(f"{field}: is empty")
    return value


def _messages(row: Row, field: str, role: str | None = None) -> Messages:
    """A field as messages: a string becomes one message of `role`; lists and ShareGPT turns are checked."""
    value = row.get(field)
    if isinstance(value, str) and role:
        return [{"role": role, "content": _text(row, field)}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise _RowError(f"{field}: expected {'text or ' if role else ''}a list of messages, got {value!r}")
    messages = []
    for turn in turns:
        said = turn if isinstance(turn, dict) else {}
        speaker = said.get("role") or _SHAREGPT_ROLES.get(said.get("from"))
        content = said.get("content") or said.get("value")
        if speaker not in ("system", "user", "assistant") or not isinstance(content, str) or not content.strip():
            raise _RowError(f"{field}: expected messages with a role and text, got {turn!r}")
        messages.append({"role": speaker, "content": content})
    return messages


def _comparison(row: Row, prompt_field: str | None) -> Row:
    chosen, rejected = _messages(row, "chosen", "assistant"), _messages(row, "rejected", "assistant")
    if prompt_field is None or len(chosen) > 1:  # whole dialogues: the prompt is what both sides share
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
        prompt = [message for message, _ in pairs]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt = _messages(row, prompt_field, "user")
    if not prompt or prompt[-1]["role"] != "user":
        raise _RowError(f"prompt: expected it to end with a user's message, got {prompt!r}")
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) != 1 or side[0]["role"] != "assistant":
            raise _RowError(f"{field}: expected one assistant's message after the prompt, got {side!r}")
    return {"prompt": prompt, "chosen": chosen[0]["content"], "rejected": rejected[0]["content"]}


def _conversation(messages: Messages) -> Row:
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        roles = ", ".join(message["role"] for message in messages)
        raise _RowError(f"messages: expected the last two to be user and assistant, got {roles}")
    return {"prompt": messages[:-1], "completion": messages[-1]["content"]}


def to_messages(row: Row, shape: str) -> Row:
    """One row of any format as `prompt` (messages) with `completion`, or `chosen` and `rejected` (text), or neither."""
    if shape == "text":
        return {"text": _text(row, "text")}
    if shape == "prompt":
        return {"prompt": _messages(row, "prompt", "user")}
    if shape == "prompt_completion":
        completion = _messages(row, "completion", "assistant")
        return {"prompt": _messages(row, "prompt", "user"), "completion": completion[-1]["content"]}
    if shape == "messages":
        return _conversation(_messages(row, "messages"))
    if shape == "alpaca":
        extra = row.get("input")
        prompt = _text(row, "instruction") + (f"\n\n{extra}" if isinstance(extra, str) and extra.strip() else "")
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return {"prompt": [*system, {"role": "user", "content": prompt}], "completion": _text(row, "output")}
    if shape == "comparison":
        return _comparison(row, "prompt" if row.get("prompt") else None)
    # ShareGPT; with `chosen` and `rejected` beside the conversation it is LLaMA-Factory's ranking variant
    return _comparison(row, "conversations") if row.get("chosen") else _conversation(_messages(row, "conversations"))


def rows_for(source: Source, want: str) -> Dataset:
    """A dataset's rows in the shape a stage wants: `text`, `demonstrations`, `comparisons` or `prompts`.

    Raises:
        UserError: naming file, row and field where a row does not fit, or the columns where the whole set does not.
    """
    raw = load(source)
    shape = detect(source, raw.column_names)

    def convert(row: Row, index: int) -> Row:
        try:
            if want == "text" and shape != "text" and "text" in row:
                return {"text": _text(row, "text")}
            converted = to_messages(row, shape)
        except _RowError as error:
            raise UserError(f"{source.label}: row {index}: {error}") from None
        if want == "demonstrations" and "chosen" in converted:
            return {"prompt": converted["prompt"], "completion": converted["chosen"]}
        return {"prompt": converted["prompt"]} if want == "prompts" and "prompt" in converted else converted

    first = convert(raw[0], 0)
    if not any(need in first for need in NEEDS[want]):
        seen = f"holds {shape} rows (columns {', '.join(raw.column_names)}), expected {want}"
        raise UserError(f"{source.label}: {seen}; name another dataset, or map its columns with `columns:`")
    key = digest([raw._fingerprint, shape, want, _CODE])[:16]
    return raw.map(convert, with_indices=True, remove_columns=raw.column_names, new_fingerprint=key)


def prompt_text(tokenizer: Any, prompt: Messages) -> str:
    """A prompt as the model sees it, up to and including the assistant's header."""
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def prompt_ids(tokenizer: Any, prompt: Messages) -> list[int]:
    return _encode(tokenizer, prompt_text(tokenizer, prompt))


def encode_turns(tokenizer: Any, messages: Messages, first: int = 0) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue that ends with the assistant, and a mask with 1 on what the assistant says.

    Assistant turns before message `first` count as prompt. Each turn's ids end with eos, and the prompt before it is
    tokenised apart from it, as generation meets them. What a template writes after the last eos (ChatML's newline) is
    cut: a policy stops at eos, so the reward model must be trained to read the score there.
    """
    ids: list[int] = []
    mask: list[int] = []
    done = ""

    def append(text: str, bit: int) -> None:
        ids.extend(_encode(tokenizer, text))
        mask.extend([bit] * (len(ids) - len(mask)))

    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first:
            continue
        head = prompt_text(tokenizer, messages[:i])
        text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (head.startswith(done) and text.startswith(head)):
            raise UserError(
                "the chat template renders a prompt differently when an answer follows it, so prompt and completion "
                f"cannot be told apart; set tokenizer.chat_template. Prompt: {head!r}, with answer: {text!r}"
            )
        said, eos, after = text[len(head) :].rpartition(tokenizer.eos_token)
        append(head[len(done) :], 0)
        append(said if eos else after, 1)
        ids.append(tokenizer.eos_token_id)
        mask.append(1)
        done = text[: len(text) - len(after)] if eos else text
    return ids, mask


def tokenise(rows: Dataset, want: str, tokenizer: Any, key: str) -> Dataset:
    """Token ids of rows, the same in every stage.

    `input_ids` (text), with `completion_mask` (demonstrations), `prompt_ids` with `chosen_ids` and `rejected_ids`
    (comparisons), `prompt_ids` beside the messages (prompts). `key` is the tokenizer's fingerprint, for the cache.
    """

    def turns(row: Row, side: str, first: int) -> tuple[list[int], list[int]]:
        return encode_turns(tokenizer, [*row["prompt"], {"role": "assistant", "content": row[side]}], first)

    def ids_of(row: Row) -> Row:
        if want == "text":
            return {"input_ids": [*_encode(tokenizer, row["text"]), tokenizer.eos_token_id]}
        if want == "demonstrations":
            ids, mask = turns(row, "completion", 0)
            return {"input_ids": ids, "completion_mask": mask}
        encoded = {"prompt_ids": prompt_ids(tokenizer, row["prompt"])}
        for side in ("chosen", "rejected") if want == "comparisons" else ():
            ids, _ = turns(row, side, len(row["prompt"]))
            encoded[f"{side}_ids"] = ids[len(encoded["prompt_ids"]) :]
        return encoded

    remove = [] if want == "prompts" else rows.column_names
    return rows.map(ids_of, remove_columns=remove, new_fingerprint=digest([rows._fingerprint, key, want, _CODE])[:16])


def prepare(config: RunConfig, stage: str, dataset: str, tokenizer: Any, key: str) -> tuple[Dataset, int]:
    """The token ids of a dataset in the shape a stage wants, and the number of rows dropped since they are too long."""
    want, source = WANTED_BY[config.stages[stage].type], find(config, dataset)
    rows = tokenise(rows_for(source, want), want, tokenizer, key)
    kept = within(rows, *length_limit(config.stages[stage]), source)
    return kept, len(rows) - len(kept)


def within(rows: Dataset, limit_name: str, max_length: int | None, source: Source) -> Dataset:
    """The rows whose prompt with its longest side fits `max_length` tokens; the caller reports the difference.

    Raises:
        UserError: if none is left.
    """
    if max_length is None:
        return rows
    sides = [column for column in ("chosen_ids", "rejected_ids") if column in rows.column_names]

    def fits(row: Row) -> bool:
        return len(row["prompt_ids"]) + max((len(row[side]) for side in sides), default=0) <= max_length

    kept = rows.filter(fits, new_fingerprint=digest([rows._fingerprint, max_length, sides])[:16])
    if not len(kept):
        raise UserError(f"{source.label}: all {len(rows)} rows are longer than {limit_name} = {max_length} tokens")
    return kept


def num_tokens(rows: Dataset) -> int:
    """Tokens of a tokenised dataset, all sides counted."""
    columns = [column for column in rows.column_names if column.endswith("_ids")]
    return sum(len(ids) for column in columns for ids in rows[column])
