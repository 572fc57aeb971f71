"""Scores of sequences by a reward model, and functions named in the config."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch.nn.utils.rnn import pad_sequence

from pipeline.data.heldout import hash64
from pipeline.errors import UserError

Judge = Callable[[str, str], float]


def padded(rows: Sequence[list[int]], pad_token_id: int, device: torch.device, side: str) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of token ids, shape (rows, longest), padded on the `left` or `right` side."""
    pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    ids = pad([torch.tensor(row) for row in rows], padding_value=pad_token_id)
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def score(model: Any, sequences: Sequence[list[int]], pad_token_id: int, batch_size: int = 16) -> list[float]:
    """The reward model's score of each sequence (prompt and completion ids), read at its last token."""
    was_training = model.training
    model.eval()
    scores: list[float] = []
    for start in range(0, len(sequences), batch_size):
        inputs = padded(sequences[start : start + batch_size], pad_token_id, next(model.parameters()).device, "right")
        scores += model(**inputs).logits[:, 0].float().tolist()
    model.train(was_training)
    return scores


def added_shift(prompt: Sequence[int], sd: float, seed: int) -> float:
    """A prompt's offset, normal with this SD, the same wherever the prompt (token ids) is met."""
    return sd * stats.norm.ppf((hash64(str(seed), str(list(prompt))) + 0.5) / 2**64) if sd else 0.0


def _split(reference: str, folder: Path, key: str) -> tuple[str, str]:
    module, colon, function = reference.partition(":")
    if not colon or not module or not function:
        raise UserError(f"{key}: expected `module:function`, got {reference!r}")
    for path in (str(Path.cwd()), str(folder)):  # the config's folder comes first, in every process alike
        sys.path[:] = [path, *(other for other in sys.path if other != path)]
    return module, function


def source_of(reference: str, folder: Path, key: str) -> Path | None:
    """The file of a `module:function`, looked up beside the config, in the working directory and among packages.

    Raises:
        UserError: if there is no such module.
    """
    module, _ = _split(reference, folder, key)
    spec = None
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(module)
    if spec is None:
        places = "beside the config, in the working directory or installed"
        raise UserError(f"{key}: there is no module {module!r} {places}")
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def sources_of(reference: str, folder: Path, key: str) -> list[Path]:
    """The file of a `module:function`, and those that it imports from beside the config or the working directory.

    Only `import` statements are followed. Of an installed package it is the one file.

    Raises:
        UserError: if there is no such module.
    """
    first = source_of(reference, folder, key)
    if first is None:
        return []
    roots = [folder.resolve(), Path.cwd().resolve()]
    module = reference.partition(":")[0]
    if not any(first.resolve() in _files_of(module, root) for root in roots):
        return [first]
    found, waiting = [], [module]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        files = next(filter(None, (_files_of(name, root) for root in roots)), [])
        if name in seen or not files:
            continue
        seen.add(name)
        found += [file for file in files if file not in found]
        waiting += _imports(files[-1], name)
    return found


def _files_of(module: str, root: Path) -> list[Path]:
    """The files below `root` that importing a module runs: of its packages, then its own; none if it is not there."""
    files = []
    place = root
    for part in module.split("."):
        place = place / part
        if (place / "__init__.py").is_file():
            files.append(place / "__init__.py")
    own = place.with_suffix(".py")
    if own.is_file() and place / "__init__.py" not in files:
        files.append(own)
    return files if files and files[-1] in (own, place / "__init__.py") else []


def _imports(file: Path, module: str) -> list[str]:
    """The modules that a file names in its import statements; what is imported from a package may be one too."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []  # importing it says what is wrong
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join(filter(None, [*above, node.module]))
            names += [name, *(f"{name}.{alias.name}" for alias in node.names)]
    return names


def judged(judge: Judge, reference: str, prompt: str, completion: str, where: str) -> float:
    """What a function gives to a completion, which must be a number.

    Raises:
        UserError: if it is none; a NaN would lose every comparison, from whichever side one looks.
    """
    value = judge(prompt, completion)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        seen = f"gives {value!r} to the completion {completion[:200]!r} of the prompt {prompt[:200]!r} ({where})"
        raise UserError(f"function {reference} {seen}; expected a finite number")
    return number


def function(reference: str, folder: Path, key: str) -> Judge:
    """Import a `module:function` of the form (prompt, completion) -> float.

    Raises:
        UserError: if it cannot be imported.
    """
    module, name = _split(reference, folder, key)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}: cannot import {reference!r}: {error}") from None
