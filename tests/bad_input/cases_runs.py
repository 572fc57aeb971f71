"""Bad base models, functions, run folders and surroundings."""
# ruff: noqa: E501

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import Case

WEIGHTS = "model/model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 400000\n"
Change = Callable[[Path], None]


def _remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def _write(name: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def _cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _in_json(name: str, edit: Callable[[Any], None]) -> Change:
    def change(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        edit(raw)
        (folder / name).write_text(json.dumps(raw))

    return change


def _tensors(edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        save_file(edit(tensors), folder / WEIGHTS, metadata={"format": "pt"})

    return change


def _without_one(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in name}


def _pickle(folder: Path) -> None:
    import torch

    (folder / WEIGHTS).unlink()
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 2)}, folder / "model" / "pytorch_model.bin")


def _index_alone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"a": "no.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


CONFIG = "model/config.json"
# name, change, words
MODELS: list[tuple[str, Change, tuple[str, ...]]] = [
    ("no weights", _remove(WEIGHTS), ("model", "weights|safetensors")),
    ("empty weights", _write(WEIGHTS, b""), ("model", "weights|safetensors")),
    ("cut weights", _cut(WEIGHTS, 5000), ("model", "weights|safetensors")),
    ("weights cut by a byte", _cut(WEIGHTS, -1), ("model", "weights|safetensors")),
    ("git-lfs pointer", _write(WEIGHTS, POINTER), ("model", "weights|safetensors|lfs")),
    ("text for weights", _write(WEIGHTS, "no weights"), ("model", "weights|safetensors")),
    ("a pickle of other weights", _pickle, ("model", "weights|missing|pytorch_model")),
    ("index without its shards", _index_alone, ("model", "weights|shard|no.safetensors|index")),
    ("prefix module.", _tensors(lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()}), ("model", "weights|missing")),
    ("a tensor is missing", _tensors(_without_one), ("model", "q_proj|missing|weights")),
    ("a tensor has another shape", _tensors(lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"][:5].clone()}), ("model", "norm|shape|size|weights")),
    ("no tensors", _tensors(lambda tensors: {}), ("model", "weights|missing")),
    ("other hidden size in config.json", _in_json(CONFIG, lambda raw: raw.update(hidden_size=32, head_dim=16)), ("model", "shape|size|weights")),
    ("more layers in config.json", _in_json(CONFIG, lambda raw: raw.update(num_hidden_layers=4)), ("model", "missing|weights|layers")),
    ("smaller vocabulary in config.json", _in_json(CONFIG, lambda raw: raw.update(vocab_size=100)), ("model|tokenizer", "vocab|embed|shape|size")),
    ("other model_type", _in_json(CONFIG, lambda raw: raw.update(model_type="gpt2")), ("model", "weights|missing|gpt2")),
    ("unknown model_type", _in_json(CONFIG, lambda raw: raw.update(model_type="lama")), ("model", "lama|model type")),
    ("no model_type", _in_json(CONFIG, lambda raw: raw.pop("model_type")), ("model", "model_type|model type")),
    ("encoder", _in_json(CONFIG, lambda raw: raw.update(model_type="bert")), ("model", "bert|encoder|weights|missing")),
    ("no config.json", _remove(CONFIG), ("model", "config.json|model_type")),
    ("empty config.json", _write(CONFIG, ""), ("model", "config.json")),
    ("cut config.json", _cut(CONFIG, 50), ("model", "config.json")),
    ("config.json is a list", _write(CONFIG, "[]"), ("model", "config.json|config")),
    ("config.json in UTF-16", _write(CONFIG, "{}".encode("utf-16")), ("model", "config.json")),
    ("hidden_size is text", _in_json(CONFIG, lambda raw: raw.update(hidden_size="many")), ("model", "hidden_size|many")),
    ("10**40 layers", _in_json(CONFIG, lambda raw: raw.update(num_hidden_layers=10**40)), ("model", "layers|weights|number")),
    ("no heads", _in_json(CONFIG, lambda raw: raw.update(num_attention_heads=0)), ("model", "heads|zero")),
    ("no tokenizer", _remove("model/tokenizer.json", "model/tokenizer_config.json"), ("model", "tokenizer")),
    ("empty tokenizer.json", _write("model/tokenizer.json", ""), ("model", "tokenizer")),
    ("cut tokenizer.json", _cut("model/tokenizer.json", 300), ("model", "tokenizer")),
    ("tokenizer.json of others", _write("model/tokenizer.json", '{"a": 1}'), ("model", "tokenizer")),
    ("cut tokenizer_config.json", _cut("model/tokenizer_config.json", 30), ("model", "tokenizer")),
    ("tokenizer without eos", _in_json("model/tokenizer_config.json", lambda raw: raw.pop("eos_token", None)), ("eos",)),
    ("code of its own", _in_json(CONFIG, lambda raw: raw.update(model_type="own", auto_map={"AutoConfig": "own.Own"})), ("trust_remote_code|own",)),
]  # fmt: skip
# name, path, words
PATHS: list[tuple[str, str, tuple[str, ...]]] = [
    ("not there", "nowhere", ("model.path", "nowhere")),
    ("not there, relative", "./nowhere", ("model.path", "nowhere")),
    ("not there, absolute", "/nowhere/model", ("model.path", "nowhere")),
    ("home of nobody", "~nobody-at-all/model", ("model.path", "home")),
    ("a file", "demos.jsonl", ("model.path", "demos.jsonl")),
    ("an empty folder", "empty", ("model.path", "empty")),
    ("the config's folder", ".", ("model.path",)),
    ("hub id", "someone/nothing-of-this-name", ("model.path", "someone/nothing-of-this-name")),
    ("three parts", "a/b/c", ("model.path", "a/b/c")),
    ("odd letters", "some one/mo del!", ("model.path", "some one/mo del!")),
    ("300 letters", "x" * 300, ("model.path", "255")),
    ("NUL", "mo\0del", ("model.path|YAML", "NUL|character")),
    ("a URL", "https://huggingface.co/gpt2", ("model.path", "huggingface.co/gpt2")),
]
SCORE = "def score(prompt, completion):\n    return 1.0\n"
# name, reference, content of own.py, words
FUNCTIONS: list[tuple[str, str, str | bytes, tuple[str, ...]]] = [
    ("no colon", "own", SCORE, ("module:function", "'own'")),
    ("no module", ":score", SCORE, ("module:function",)),
    ("no function", "own:", SCORE, ("module:function",)),
    ("a file", "own.py:score", SCORE, ("own.py|own",)),
    ("a path", "../mine.py:score", SCORE, ("mine",)),
    ("relative", ".own:score", SCORE, (r"\.own",)),
    ("not there", "nowhere:score", SCORE, ("no module 'nowhere'",)),
    ("no such function", "own:scor", SCORE, ("scor",)),
    ("not callable", "own:score", "score = 5\n", ("own:score",)),
    ("a class attribute", "own:a.b", SCORE, ("own:a.b|a.b",)),
    ("syntax error", "own:score", "def score(:\n", ("own",)),
    ("NUL byte", "own:score", b"score\0= 1\n", ("own",)),
    ("Latin-1", "own:score", "name = 'caf\xe9'\n".encode("latin-1") + SCORE.encode(), ("own",)),
    ("import error", "own:score", "import nothing_of_this_name\n", ("own", "nothing_of_this_name")),
    ("raises at import", "own:score", "1 / 0\n", ("own", "zero")),
    ("sys.exit(0)", "own:score", "import sys\nsys.exit(0)\n", ("own",)),
    ("sys.exit(5)", "own:score", "import sys\nsys.exit(5)\n", ("own",)),
    ("os exit by exception", "own:score", "raise BaseException('no')\n", ("own",)),
    ("no argument", "own:score", "def score():\n    return 1.0\n", ("own:score", "argument")),
    ("one argument", "own:score", "def score(completion):\n    return 1.0\n", ("own:score", "argument")),
    ("three arguments", "own:score", "def score(a, b, c):\n    return 1.0\n", ("own:score", "argument")),
    ("keyword-only", "own:score", "def score(*, prompt, completion):\n    return 1.0\n", ("own:score", "argument")),
    ("TRL's signature", "own:score", "def score(prompts, completions, completion_ids, **kwargs):\n    return [1.0]\n", ("own:score", "argument")),
    ("a coroutine", "own:score", "async def score(prompt, completion):\n    return 1.0\n", ("own:score",)),
]  # fmt: skip
RUN, MANIFEST = "runs/tiny", "runs/tiny/manifest.json"
SFT = f"{RUN}/sft/output"
PLAN, STATUS, RUN_IT = ("plan", "config.yaml"), ("status", RUN), ("run", "config.yaml")


def _adapter(folder: Path) -> Path:
    return folder / SFT / "adapter_model.safetensors"


def _longer(folder: Path) -> None:
    path = _adapter(folder)
    path.write_bytes(path.read_bytes() + b"\0")


def _record(**changes: Any) -> Change:
    return _in_json(MANIFEST, lambda raw: raw["stages"]["sft"].update(changes))


# name, change, commands, words
RUNS: list[tuple[str, Change, tuple[tuple[str, ...], ...], tuple[str, ...]]] = [
    ("manifest is cut", _cut(MANIFEST, 100), (PLAN, STATUS, RUN_IT), ("manifest.json", "damaged")),
    ("manifest is empty", _write(MANIFEST, ""), (PLAN, STATUS), ("manifest.json", "damaged")),
    ("manifest is binary", _write(MANIFEST, b"\xff\xfe"), (PLAN, STATUS), ("manifest.json", "damaged")),
    ("manifest is a list", _write(MANIFEST, "[]"), (PLAN, STATUS), ("manifest.json", "damaged")),
    ("manifest is null", _write(MANIFEST, "null"), (PLAN, STATUS), ("manifest.json", "damaged")),
    ("manifest is {}", _write(MANIFEST, "{}"), (PLAN, STATUS), ("manifest.json", "damaged")),
    ("manifest of another schema", _in_json(MANIFEST, lambda raw: raw.update(schema_version=99)), (PLAN, STATUS), ("schema version 99",)),
    ("schema true", _in_json(MANIFEST, lambda raw: raw.update(schema_version=True)), (PLAN, STATUS), ("manifest.json", "schema")),
    ("unknown field", _in_json(MANIFEST, lambda raw: raw.update(more=1)), (PLAN, STATUS), ("manifest.json", "more")),
    ("stages is a list", _in_json(MANIFEST, lambda raw: raw.update(stages=[])), (PLAN, STATUS), ("manifest.json", "stages")),
    ("no tokenizer", _in_json(MANIFEST, lambda raw: raw.update(tokenizer=None)), (PLAN,), ("manifest.json", "tokenizer")),
    ("no name", _in_json(MANIFEST, lambda raw: raw.pop("name")), (PLAN, STATUS), ("manifest.json", "name")),
    ("seed is text", _record(seed="x"), (PLAN, STATUS), ("manifest.json", "seed")),
    ("type is unknown", _record(type="sfft"), (STATUS,), ("manifest.json", "sfft")),
    ("metrics are text", _record(metrics={"loss": "low", "first_loss": "high"}), (STATUS,), ("manifest.json", "metrics|loss")),
    ("output is elsewhere", _record(output={"kind": "adapter", "path": "../../etc", "full": None, "files": {}}), (PLAN, STATUS), ("manifest.json", "path")),
    ("output is absolute", _record(output={"kind": "adapter", "path": "/etc", "full": None, "files": {}}), (PLAN, STATUS), ("manifest.json", "path")),
    ("manifest is a folder", lambda folder: ((folder / MANIFEST).unlink(), (folder / MANIFEST).mkdir()), (PLAN, STATUS), ("runs/tiny",)),
    ("weights are longer", _longer, (PLAN, RUN_IT), ("adapter_model.safetensors", "has changed", "--redo sft")),
    ("weights are gone", lambda folder: _adapter(folder).unlink(), (PLAN, RUN_IT), ("adapter_model.safetensors", "is missing")),
    ("output is gone", lambda folder: shutil.rmtree(folder / SFT), (PLAN,), ("is missing", "--redo sft")),
    ("tokenizer.json is cut", _cut(f"{RUN}/tokenizer/tokenizer.json", 100), (PLAN,), ("runs/tiny/tokenizer", "restore")),
    ("tokenizer.json is empty", _write(f"{RUN}/tokenizer/tokenizer.json", "{}"), (PLAN,), ("runs/tiny/tokenizer", "restore")),
    ("tokenizer_config.json is cut", _cut(f"{RUN}/tokenizer/tokenizer_config.json", 20), (PLAN,), ("runs/tiny/tokenizer", "restore")),
    ("tokenizer has another template", _write(f"{RUN}/tokenizer/chat_template.jinja", "{{ messages }}"), (PLAN,), ("runs/tiny/tokenizer", "restore|another")),
    ("run of another name", _in_json(MANIFEST, lambda raw: raw.update(name="other")), (PLAN, RUN_IT), ("'other'", "'tiny'")),
]  # fmt: skip
# name, value of run_dir, change, words
RUN_DIRS: list[tuple[str, str, Change | None, tuple[str, ...]]] = [
    ("a file", "corpus.jsonl", None, ("run_dir", "corpus.jsonl")),
    ("below a file", "corpus.jsonl/run", None, ("run_dir", "corpus.jsonl")),
    ("NUL", "ru\0n", None, ("run_dir|YAML", "NUL|character")),
    ("home of nobody", "~nobody-at-all/run", None, ("run_dir", "home")),
    ("below /proc", "/proc/run", None, ("run_dir", "/proc")),
    ("below /sys", "/sys/run", None, ("run_dir", "/sys")),
    ("below /dev/null", "/dev/null/run", None, ("run_dir", "/dev/null")),
    ("300 letters", "x" * 300, None, ("run_dir", "255")),
    ("5000 letters", "x/" * 2500, None, ("run_dir", "4095")),
    ("a link to itself", "link", lambda folder: (folder / "link").symlink_to("link"), ("run_dir", "link")),
    ("empty", "", None, ("run_dir", "empty")),
    ("blank", "  ", None, ("run_dir",)),
    ("the data's folder", ".", _write("sft/output/mine.txt", "mine"), ("sft", "run_dir|folder")),
]


def _run_cases() -> list[Case]:
    found = []
    for name, change, commands, words in RUNS:
        for command in commands:
            found.append(Case("run folder", f"{name}, {command[0]}", words, command, base="finished", setup=change))
    for name, value, change, words in RUN_DIRS:
        found.append(Case("run_dir", name, words, changes={"run_dir": value}, setup=change))
    settings = [
        (
            "other template",
            {"tokenizer.chat_template": "chatml"},
            ("sft, reward", "another tokenizer", "chat template changed"),
        ),
        ("other pad token", {"tokenizer.pad_token": "<system>"}, ("sft, reward", "another tokenizer", "<system>")),
        ("other name", {"name": "other", "run_dir": RUN}, ("'tiny'", "'other'")),
    ]
    for name, changes, words in settings:
        found.append(Case("run folder", name, words, base="finished", changes=changes))
    only = ("run", "config.yaml", "--only", "dpo", "stages.dpo={data: comparisons}", "stages.sft.training.max_steps=2")
    found.append(
        Case(
            "run folder", "only, but the parent has changed", ("--only dpo", "needs 'sft' first"), only, base="finished"
        )
    )
    return found


def _environment_cases() -> list[Case]:
    """Surroundings that the command cannot work in, and odd ones in which a good config must pass."""
    found = []
    for name, environment in (
        ("no HOME", {"HOME": None}),
        ("HOME is not there", {"HOME": "/nowhere"}),
        ("no PATH", {"PATH": None}),
        ("ASCII", {"LC_ALL": "C", "LANG": "C"}),
        ("40 columns", {"COLUMNS": "40"}),
        ("odd COLUMNS", {"COLUMNS": "wide"}),
        ("launcher that is gone", {"RLHF_LAUNCH_FOLDER": "/nowhere"}),
        (
            "ranks",
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        ),
        ("accelerate's mixed precision", {"ACCELERATE_MIXED_PRECISION": "fp8"}),
    ):
        found.append(Case("surroundings", name, (), environment=environment, exit_code=0))
    return found


def cases() -> list[Case]:
    """All cases of this file."""
    found = [Case("model", name, words, setup=change) for name, change, words in MODELS]
    for name, path, words in PATHS:
        setup: Change | None = (lambda folder: (folder / "empty").mkdir()) if path == "empty" else None
        found.append(Case("model path", name, words, changes={"model.path": path}, setup=setup))
    for name, reference, content, words in FUNCTIONS:
        changes: dict[str, Any] = {"stages.evaluate.judge": reference}
        found.append(Case("judge", name, words, changes=changes, stages=("evaluate",), files={"own.py": content}))
        changes = {"stages.rloo.reward_functions": [reference], "stages.rloo.training.max_completion_length": 8}
        found.append(Case("reward function", name, words, changes=changes, stages=("rloo",), files={"own.py": content}))
    return found + _run_cases() + _environment_cases()
