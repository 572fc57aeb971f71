"""Cases of bad input, and what runs hundreds of them in minutes: the package is imported once, a fork runs each case.

A case says what is written into a temporary folder, the command that is called there, and what must come of it.
`run_case` returns what came; `faults` compares the two. By default a case must end with exit code 2 and one message
that holds the expected words and says how to mend it, must print no traceback, and must leave every file as it was.
"""

import copy
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tiny
from ruamel.yaml import YAML
from warm import Zygote

REMOVED = "<removed>"  # as a changed value: the key is dropped
LIMIT = 60  # seconds after which a command counts as hung
# What tells a reader what to do: one of these must stand in a message.
MEND = re.compile(
    r"expected|did you mean|valid here|must|is required|give|set |choose|name |use |add |restore|redo|run |should|"
    r"let |indent |leave|lower|drop|remove|look at|undo|take another|make |install|move|write|check|save|either|free|"
    r"only |needs|does not take|change |vocabulary|nor is it a file|"
    r"list them|take the|map|cannot be|greater than|less than|not between|no name here is near|no such file",
    re.IGNORECASE,
)

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "gate": "off",
    "model": {"path": "model"},
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "training": {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 4},
    "data": {name: {"path": f"{name}.jsonl"} for name in ("corpus", "demos", "comparisons", "prompts")},
    "stages": {"sft": {"data": "demos", "training": {"max_steps": 1}}},
}
ONLINE = {"max_steps": 1, "num_generations": 2, "max_completion_length": 8}
# Stages that a case may ask for beside sft.
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"data": "corpus", "lora": None, "training": {"max_steps": 1, "max_length": 32}},
    "reward": {"data": "comparisons", "training": {"max_steps": 1}},
    "dpo": {"data": "comparisons", "training": {"max_steps": 1}},
    "ppo": {"data": "prompts", "training": {"total_episodes": 4, "response_length": 4, "num_ppo_epochs": 1}},
    "rloo": {"data": "prompts", "training": ONLINE},
    "grpo": {"data": "prompts", "training": ONLINE},
    "shift": {"data": "prompts", "num_prompts": 4, "max_new_tokens": 4},
    "evaluate": {"data": "prompts", "max_new_tokens": 4, "num_prompts": 4},
}
# What a stage of each type takes for granted beside sft.
NEEDED = {"ppo": ("reward",), "rloo": ("reward",), "grpo": ("reward",), "shift": ("reward",)}
ROWS: dict[str, list[dict[str, Any]]] = {
    "corpus": [{"text": f"{topic} is a fine thing to think about, number {i}."} for i, topic in enumerate(tiny.TOPICS)],
    "demos": tiny.demonstrations(),
    "comparisons": tiny.comparisons(),
    "prompts": [{"prompt": f"What is {topic} like?"} for topic in tiny.TOPICS],  # others: they are held out
}
SCRATCH = {
    "architecture": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
    },
    "tokenizer": {"vocab_size": 300, "data": ["corpus"]},
}


@dataclass(frozen=True)
class Case:
    """One bad input.

    `changes` are dotted keys of the config; `stages` are taken from STAGES; `config` replaces the file's text or
    bytes; `files` are written beside it: rows for a jsonl file, text, or bytes. `setup` changes the folder at last.
    `base`: `model` (a folder of a tiny model), `scratch`, or `finished` (a run folder with sft and reward finished).
    """

    family: str
    name: str
    words: tuple[str, ...] = ()
    command: tuple[str, ...] = ("plan", "config.yaml")
    changes: dict[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    config: str | bytes | None = None
    files: dict[str, Any] = field(default_factory=dict)
    setup: Callable[[Path], None] | None = None
    base: str = "model"
    environment: dict[str, str | None] = field(default_factory=dict)
    exit_code: int = 2
    writes: tuple[str, ...] = ()
    limit: float = LIMIT
    mend: bool = True
    usage: bool = False  # the command line is refused before the command begins, in click's form

    @property
    def id(self) -> str:
        return f"{self.family}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """How a command ended, what it printed, and the files it changed, made or removed."""

    exit_code: int
    hung: bool
    seconds: float
    stdout: str
    stderr: str
    touched: tuple[str, ...]


def make_zygote(scratch: Path) -> Zygote:
    """The process that runs the cases, with caches of its own. To be closed."""
    cache = scratch / "cache"
    cache.mkdir(parents=True)
    return Zygote(scratch, {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets"), "COLUMNS": "160"})


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder with its content, every link with its target, every empty folder."""
    found: dict[str, bytes | str] = {}
    for where, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(where) / name
            key = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[key] = f"-> {path.readlink()}"
            elif path.is_file():
                found[key] = path.read_bytes()
            elif not path.is_dir():
                found[key] = "special"
            else:
                found[key] = "folder"
    return found


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config with dotted keys replaced, added or dropped."""
    config = copy.deepcopy(config)
    for dotted, value in changes.items():
        *above, last = dotted.split(".")
        section = config
        for key in above:
            section = section.setdefault(key, {})
        if isinstance(value, str) and value == REMOVED:
            section.pop(last, None)
        else:
            section[last] = copy.deepcopy(value)
    return config


def config_of(case: Case) -> dict[str, Any]:
    """The config of a case, as a mapping."""
    config = copy.deepcopy(CONFIG)
    wanted: list[str] = []
    for name in case.stages:
        wanted += [*NEEDED.get(name, ()), name]
    if case.base == "scratch":
        config["model"] = {"scratch": copy.deepcopy(SCRATCH)}
        wanted.insert(0, "pretrain")
    if case.base == "finished":
        wanted.insert(0, "reward")
    for name in wanted:
        if name == "sft":
            continue
        config["stages"][name] = copy.deepcopy(STAGES[name])
    return changed(config, case.changes)


def write_file(path: Path, content: Any) -> None:
    """Rows as jsonl, text, or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        tiny.write_rows(path, content)


def write_case(case: Case, folder: Path, bases: Path) -> None:
    """Write what a case is about into an empty folder. `bases` holds the folders `model` and `finished`."""
    if case.base == "finished":
        shutil.copytree(bases / "finished", folder, dirs_exist_ok=True)
    elif case.base == "model":
        shutil.copytree(bases / "model", folder / "model")
    for name, rows in ROWS.items():
        write_file(folder / f"{name}.jsonl", rows)
    if case.config is not None:
        write_file(folder / "config.yaml", case.config)
    else:
        with (folder / "config.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(config_of(case), file)
    for name, content in case.files.items():
        write_file(folder / name, content)
    if case.setup is not None:
        case.setup(folder)


def make_bases(folder: Path, zygote: Zygote) -> Path:
    """The folders that cases start from: a model, and a run with sft and reward finished."""
    tiny.make_model(folder / "model")
    finished = folder / "finished"
    finished.mkdir()
    write_case(Case("base", "finished", stages=("reward",)), finished, folder)
    for stage in ("sft", "reward"):
        done = run_command(zygote, ("config.yaml", stage), finished, limit=300, module="stage")
        assert done.exit_code == 0, done.stdout + done.stderr
    return folder


def run_command(
    zygote: Zygote,
    argv: tuple[str, ...],
    folder: Path,
    environment: dict[str, str | None] | None = None,
    limit: float = LIMIT,
    module: str = "cli",
) -> Outcome:
    """Run `rlhf *argv` (or the module of one stage) in `folder`, and look for what it changed there."""
    before = snapshot(folder)
    answer = zygote.run(argv, folder, {"HOME": str(folder)} | (environment or {}), limit, module)
    after = snapshot(folder)
    touched = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return Outcome(**asdict(answer), touched=tuple(touched))


def run_case(case: Case, folder: Path, bases: Path, zygote: Zygote) -> Outcome:
    """Write a case into an empty folder and run its command there."""
    write_case(case, folder, bases)
    return run_command(zygote, case.command, folder, case.environment, case.limit)


def faults(case: Case, outcome: Outcome) -> list[str]:
    """What is not as the case expects it."""
    found = []
    if outcome.hung:
        found.append(f"did not end within {case.limit:g} seconds")
    elif outcome.exit_code < 0:
        found.append(f"was ended by signal {-outcome.exit_code}")
    elif outcome.exit_code != case.exit_code:
        found.append(f"exit code {outcome.exit_code}, expected {case.exit_code}")
    if "Traceback (most recent call last)" in outcome.stderr + outcome.stdout:
        found.append("prints a traceback")
    elif not outcome.hung:
        found += _message_faults(case, outcome.stderr)
    for word in case.words:
        if not re.search(word, outcome.stderr if case.exit_code else outcome.stdout, re.IGNORECASE | re.DOTALL):
            found.append(f"says nothing like {word!r}")
    for path in outcome.touched:
        if not path.startswith(case.writes or ("\0",)):
            found.append(f"wrote, changed or removed {path}")
    return found


def _message_faults(case: Case, stderr: str) -> list[str]:
    """What is wrong with the form of what was printed on stderr."""
    lines = stderr.splitlines()
    if case.exit_code == 0:
        return [f"stderr is not empty: {lines[0]!r}"] if lines else []
    if case.usage:
        return [] if [line for line in lines if line.startswith("Error: ")] == lines[-1:] else ["has no usage error"]
    first = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    found = []
    if len(first) != 1:
        found.append(f"has {len(first)} messages, expected one")
    elif first[0] != 0:
        found.append(f"prints other lines above its message: {lines[0]!r}")
    elif not all(line.startswith("  ") for line in lines[1:]):
        found.append("prints other lines below its message")
    if case.mend and not MEND.search(stderr):
        found.append("does not say how to mend it")
    if len(stderr) > 20_000:
        found.append(f"is {len(stderr)} characters long")
    return found


def report(case: Case, outcome: Outcome) -> str:
    """What a reader of a failed case needs to see."""
    lines = [case.id, f"$ rlhf {' '.join(case.command)}", *(f"- {fault}" for fault in faults(case, outcome))]
    lines.append(f"exit code {outcome.exit_code} after {outcome.seconds:.1f} s; stderr:")
    return "\n".join([*lines, outcome.stderr[-1500:]])
