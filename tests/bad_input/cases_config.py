"""Bad configs: YAML, keys, types and ranges of our own schema, references between stages, and the command line."""
# ruff: noqa: E501

import re
from typing import Any

from forked import REMOVED, STAGES, Case

OTHER_LORA = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
GOOD = (
    "name: tiny\nmodel: {path: model}\ngate: 'off'\nlora: {r: 4, target_modules: all-linear}\n"
    "training: {use_cpu: true, bf16: false}\ndata:\n  demos: {path: demos.jsonl}\n"
    "stages:\n  sft: {data: demos, training: {max_steps: 1}}\n"
)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)

# name, the file's content, words of the message
YAML_FILES: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("empty", "", ("config.yaml", "mapping")),
    ("blank lines", "\n\n\n", ("config.yaml", "mapping")),
    ("comment only", "# nothing\n", ("config.yaml", "mapping")),
    ("list", "- sft\n- dpo\n", ("config.yaml", "mapping")),
    ("text", "just text\n", ("config.yaml", "mapping")),
    ("number", "17\n", ("config.yaml", "mapping")),
    ("null", "null\n", ("config.yaml", "mapping")),
    ("json that is cut", '{"name": "tiny", "model": {', ("config.yaml", "not valid YAML")),
    ("UTF-16", GOOD.encode("utf-16"), ("config.yaml", "UTF-8|cannot be read")),
    ("Latin-1", GOOD.replace("tiny", "t\xefny").encode("latin-1"), ("config.yaml", "UTF-8|utf-8")),
    ("binary", bytes(range(256)), ("config.yaml", "UTF-8|utf-8|YAML")),
    ("NUL", GOOD.replace("tiny", "ti\0ny"), ("config.yaml", "YAML")),
    ("bell", GOOD.replace("tiny", "ti\x07ny"), ("config.yaml", "YAML")),
    ("tab", GOOD + "tokenizer:\n\tpad_token: x\n", ("config.yaml:11", "not valid YAML", "spaces")),
    ("bracket that is not closed", GOOD + "tokenizer: {pad_token: x\n", ("config.yaml:1[01]", "not valid YAML")),
    ("quote that is not closed", GOOD + "tokenizer: {pad_token: 'x}\n", ("config.yaml:1[01]", "not valid YAML")),
    ("indentation", GOOD + "tokenizer:\n    pad_token: x\n  eos_token: y\n", ("config.yaml:1[012]", "not valid YAML")),
    ("duplicate key", GOOD + "name: other\n", ("config.yaml:10", "duplicate")),
    ("duplicate key below", GOOD.replace("max_steps: 1", "max_steps: 1, max_steps: 2"), ("config.yaml:9", "duplicate")),
    ("unknown anchor", GOOD + "seed: *nowhere\n", ("config.yaml:10", "alias")),
    ("circle of anchors", GOOD + "tokenizer: &t {pad_token: *t}\n", ("config.yaml", "alias|itself|circle|recursive")),
    ("circle of merges", GOOD + "tokenizer: &t {<<: *t}\n", ("config.yaml", "alias|itself|circle|recursive|unknown")),
    ("python tag", GOOD + "seed: !!python/object/apply:os.getcwd []\n", ("config.yaml", "seed|tag")),
    ("own tag", GOOD + "seed: !seed 5\n", ("config.yaml", "seed")),
    ("two documents", GOOD + "---\nname: other\n", ("config.yaml", "document")),
    ("1500 lists deep", GOOD + "seed: " + "[" * 1500 + "]" * 1500 + "\n", ("config.yaml", "deep|nested")),
    ("1500 mappings deep", GOOD + "seed: " + "{a: " * 1500 + "1" + "}" * 1500 + "\n", ("config.yaml", "deep|nested")),
    ("90 lists deep", GOOD + "seed: " + "[" * 90 + "]" * 90 + "\n", ("config.yaml", "deep|nested|seed")),
    ("alias bomb", GOOD + BOMB, ("config.yaml", "alias|values")),
    ("alias bomb in the data", GOOD + BOMB + "training: *a9\n", ("config.yaml",)),
    ("number of 5000 digits", GOOD + f"seed: {'9' * 5000}\n", ("config.yaml", "digits|long|number")),
    (
        "number of 5000 digits as a limit",
        GOOD.replace("demos.jsonl}", f"demos.jsonl, limit: {'9' * 5000}}}"),
        ("digits",),
    ),
    ("float of 5000 digits", GOOD + f"seed: 1.{'9' * 5000}\n", ("config.yaml", "seed|digits")),
    ("10 MB of spaces", GOOD + "seed: '" + " " * 10_000_000 + "'\n", ("config.yaml", "larger than 1 MiB")),
    ("key that is a list", GOOD + "? [a, b]\n: 1\n", ("config.yaml", "unknown key|key")),
    ("key that is a number", GOOD + "17: 1\n", ("config.yaml:10", "17", "unknown key")),
    ("key that is null", GOOD + "~: 1\n", ("config.yaml", "unknown key|key")),
    ("key that is true", GOOD + "true: 1\n", ("config.yaml", "True", "unknown key")),
    ("key in markup", GOOD + "'[red]x[/]': 1\n", (re.escape("[red]x[/]"), "unknown key")),
    ("date", GOOD + "seed: 2024-01-01\n", ("config.yaml:10", "seed", "2024-01-01")),
    ("name is a number", GOOD.replace("name: tiny", "name: 17"), ("config.yaml:1", "name", "17")),
    ("set", GOOD + "training: !!set {a, b}\n", ("config.yaml",)),
    ("name is off", GOOD.replace("gate: 'off'", "gate: on"), ("config.yaml:3", "gate", "stop")),
]

# dotted key, kind; every bad value of that kind is tried
KEYS: list[tuple[str, str]] = [
    ("name", "name"),
    ("run_dir", "text or null"),
    ("seed", "integer"),
    ("model", "section"),
    ("model.path", "text or null"),
    ("model.revision", "text or null"),
    ("model.dtype", "choice"),
    ("model.attn_implementation", "text or null"),
    ("model.trust_remote_code", "truth"),
    ("model.scratch", "section"),
    ("tokenizer", "section"),
    ("tokenizer.chat_template", "text or null"),
    ("tokenizer.pad_token", "text or null"),
    ("tokenizer.eos_token", "text or null"),
    ("quantization", "section"),
    ("lora", "section"),
    ("training", "section"),
    ("data", "section"),
    ("data.demos", "section"),
    ("data.demos.path", "text or null"),
    ("data.demos.format", "choice"),
    ("data.demos.columns", "section"),
    ("data.demos.limit", "count"),
    ("data.demos.heldout", "open share"),
    ("data.demos.streaming", "truth"),
    ("data.demos.shuffle_buffer", "count"),
    ("data.demos.sources", "list"),
    ("too_long", "choice"),
    ("checks", "section"),
    ("checks.malformed", "share"),
    ("checks.too_long", "share"),
    ("checks.eos", "share"),
    ("gate", "choice"),
    ("gate_limits", "section"),
    ("gate_limits.accuracy", "share"),
    ("gate_limits.within_sd", "measure"),
    ("stages", "section"),
    ("stages.sft", "section"),
    ("stages.sft.type", "choice"),
    ("stages.sft.data", "text"),
    ("stages.sft.eval_data", "text or null"),
    ("stages.sft.init", "text or null"),
    ("stages.sft.seed", "integer"),
    ("stages.sft.lora", "section"),
    ("stages.sft.training", "section"),
    ("stages.sft.accelerate_config", "text or null"),
    ("stages.ppo.reward", "text or null"),
    ("stages.ppo.max_prompt_length", "count"),
    ("stages.ppo.added_shift", "measure"),
    ("stages.ppo.on_alarm", "choice"),
    ("stages.ppo.eval_every", "count"),
    ("stages.ppo.num_eval_prompts", "count"),
    ("stages.ppo.prompt_baseline", "choice"),
    ("stages.ppo.baseline_completions", "count"),
    ("stages.ppo.baseline_shrinkage", "truth"),
    ("stages.grpo.reward_functions", "list"),
    ("stages.evaluate.policies", "list"),
    ("stages.evaluate.baseline", "text or null"),
    ("stages.evaluate.judge", "text or null"),
    ("stages.evaluate.temperature", "above zero"),
    ("stages.evaluate.max_new_tokens", "count"),
    ("stages.evaluate.num_prompts", "count"),
    ("stages.evaluate.batch_size", "count"),
    ("stages.shift.num_completions", "count"),
    ("stages.shift.policy", "text or null"),
]
NAN, INF = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "name": [None, 5, "", "a/b", "../up", ".hidden", "a b", "x" * 300, "\xe4", ["a"]],
    "text": [None, 5, True, ["a"], {"a": 1}, ""],
    "text or null": [5, True, ["a"], {"a": 1}, ""],
    "integer": ["five", 1.5, True, [1], INF],
    "count": [0, -1, 1.5, "five", True, NAN, [1]],
    "share": [-0.1, 1.5, "half", NAN, INF, True],
    "open share": [0, 1, -0.5, "half", NAN, None],
    "measure": [-1, "much", NAN, INF, [1]],
    "above zero": [0, -1, NAN, INF, "hot", None],
    "truth": ["perhaps", 1, None, [True]],
    "choice": ["other", 5, None, ["stop"], ""],
    "section": [5, "text", ["a"], True],
    "list": [5, "text", {"a": 1}, [5]],
}
# What some messages show in another way than as it was written.
SEEN = {"None": "None|null|is required|is none", "nan": "nan", "inf": "inf"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 20 else f"{text[:8]}... ({len(text)})"


def _keys() -> list[Case]:
    cases = []
    for key, kind in KEYS:
        section, _, rest = key.partition(".")
        stage = rest.split(".")[0] if section == "stages" else ""
        stages = (stage,) if stage in STAGES else ()
        for value in BAD[kind]:
            seen = "" if isinstance(value, (list, dict)) else repr(value)
            words = (re.escape(key), SEEN.get(seen, re.escape(seen[:40])))
            cases.append(Case("key", f"{key}={_short(value)}", words, changes={key: value}, stages=stages))
    return cases


# name, changes, stages, words
WIRING: list[tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = [
    ("no stages", {"stages": {}}, (), ("stages", "required")),
    ("no data", {"data": REMOVED}, (), ("data", "required")),
    ("no model", {"model": REMOVED}, (), ("model", "required")),
    ("no name", {"name": REMOVED}, (), ("name", "required")),
    ("path and scratch", {"model.scratch": {"architecture": {}, "tokenizer": {"data": ["demos"]}}}, (), ("model", "either")),
    ("neither path nor scratch", {"model": {"dtype": "float32"}}, (), ("model", "either")),
    ("unknown type", {"stages.sft.type": "sfft"}, (), ("sfft", "did you mean 'sft'")),
    ("name that is no type", {"stages.warmup": {"data": "demos"}}, (), ("stages.warmup", "type")),
    ("stage named base", {"stages.base": {"type": "dpo", "data": "comparisons"}}, (), ("stages.base", "another")),
    ("stage named cache", {"stages.cache": {"type": "dpo", "data": "comparisons"}}, (), ("stages.cache", "another")),
    ("stage named tokenizer", {"stages.tokenizer": {"type": "dpo", "data": "comparisons"}}, (), ("stages.tokenizer",)),
    ("stage named manifest", {"stages.manifest.json": {"type": "dpo"}}, (), ("stages.manifest",)),
    ("stage named ..", {"stages": {"..": {"type": "sft", "data": "demos"}}}, (), ("stages",)),
    ("stage named a/b", {"stages": {"a/b": {"type": "sft", "data": "demos"}}}, (), ("stages", "a/b")),
    ("stage of 300 letters", {"stages": {"s" * 300: {"type": "sft", "data": "demos"}}}, (), ("stages", "letters|characters")),
    ("unknown parent", {"stages.dpo.init": "sff"}, ("dpo",), ("stages.dpo.init", "did you mean 'sft'")),
    ("parent is a reward model", {"stages.dpo.init": "reward"}, ("reward", "dpo"), ("stages.dpo.init", "of type reward")),
    ("parent is an evaluation", {"stages.dpo.init": "evaluate"}, ("dpo", "evaluate"), ("stages.dpo.init", "evaluate")),
    ("own parent", {"stages.sft.init": "sft"}, (), ("circle", "sft")),
    ("circle of two", {"stages.sft.init": "dpo"}, ("dpo",), ("circle", "sft", "dpo")),
    ("circle through the reward model", {"stages.reward.init": "ppo"}, ("ppo",), ("circle", "ppo")),
    ("reward model is a policy", {"stages.ppo.reward": "sft"}, ("ppo",), ("stages.ppo.reward", "of type sft")),
    ("unknown reward model", {"stages.ppo.reward": "rewrd"}, ("ppo",), ("stages.ppo.reward", "did you mean 'reward'")),
    ("reward: base", {"stages.ppo.reward": "base"}, ("ppo",), ("stages.ppo.reward", "base")),
    ("no reward model", {"stages.reward": REMOVED}, ("ppo",), ("stages.ppo.reward", "type reward")),
    ("no reward model for grpo", {"stages.reward": REMOVED}, ("grpo",), ("stages.grpo.reward", "needs a reward")),
    ("two sft stages", {"stages.second": {"type": "sft", "data": "demos"}}, ("dpo",), ("stages.dpo.init", "choose one")),
    ("no sft stage", {"stages.sft": REMOVED}, ("dpo",), ("stages.dpo.init", "no sft stage")),
    ("unknown dataset", {"stages.sft.data": "demoss"}, (), ("stages.sft.data", "did you mean 'demos'")),
    ("unknown held-out dataset", {"stages.sft.eval_data": "demoss"}, (), ("stages.sft.eval_data", "did you mean 'demos'")),
    ("unknown baseline", {"stages.evaluate.baseline": "sftt"}, ("evaluate",), ("stages.evaluate.baseline", "sft")),
    ("baseline is a reward model", {"stages.evaluate.baseline": "reward"}, ("reward", "evaluate"), ("of type reward",)),
    ("unknown policy", {"stages.evaluate.policies": ["pppo"]}, ("evaluate",), ("stages.evaluate.policies", "pppo")),
    ("policy is a reward model", {"stages.evaluate.policies": ["reward"]}, ("reward", "evaluate"), ("policies", "reward")),
    ("unknown shift report", {"stages.ppo.shift": "report"}, ("ppo",), ("stages.ppo.shift", "report")),
    ("alarm without held-out prompts", {"stages.ppo.on_alarm": "stop"}, ("ppo",), ("stages.ppo", "eval_data")),
    ("shrinkage without a report", {"stages.ppo.baseline_shrinkage": True}, ("ppo",), ("baseline_shrinkage", "needs")),
    ("groups that do not fit", {"stages.ppo.prompt_baseline": "leave_one_out", "stages.ppo.baseline_completions": 3},
     ("ppo",), ("whole groups of 3",)),
    ("eval_strategy without data", {"stages.sft.training.eval_strategy": "epoch"}, (), ("eval_data",)),
    ("training of an evaluation", {"stages.evaluate.training": {}}, ("evaluate",), ("stages.evaluate.training", "unknown")),
    ("lora of an evaluation", {"stages.evaluate.lora": OTHER_LORA}, ("evaluate",), ("stages.evaluate.lora", "unknown")),
    ("judge of a training stage", {"stages.sft.judge": "a:b"}, (), ("stages.sft.judge", "unknown key")),
    ("quantised and full", {"quantization": {"load_in_4bit": True}, "lora": None}, (), ("stages.sft.lora", "in full")),
    ("other shape on a quantised base", {"quantization": {"load_in_4bit": True}, "stages.dpo.lora": OTHER_LORA}, ("dpo",),
     ("stages.dpo.lora", "differs in shape")),
    ("bfloat16 and full", {"model.dtype": "bfloat16", "lora": None}, (), ("stages.sft.lora", "bfloat16")),
    ("flash attention in float32", {"model.attn_implementation": "flash_attention_2"}, (), ("attn_implementation",)),
    ("streaming for sft", {"data.demos.streaming": True}, (), ("stages.sft.data", "only pretraining")),
    ("sources and path", {"data.demos.sources": [{"path": "demos.jsonl"}]}, (), ("data.demos", "either")),
    ("neither sources nor path", {"data.demos": {"limit": 5}}, (), ("data.demos", "either")),
    ("weight of a single source", {"data.demos.weight": 2.0}, (), ("data.demos.weight", "only the entries")),
    ("weights of some", {"data.demos": {"sources": [{"path": "demos.jsonl", "weight": 1.0}, {"path": "demos.jsonl"}]}}, (),
     ("data.demos.sources", "all of them")),
    ("weight 0", {"data.demos": {"sources": [{"path": "demos.jsonl", "weight": 0.0}]}}, (), ("weight", "greater than 0")),
    ("weight NaN", {"data.demos": {"sources": [{"path": "demos.jsonl", "weight": NAN}]}}, (), ("weight", "nan")),
    ("weight infinite", {"data.demos": {"sources": [{"path": "demos.jsonl", "weight": INF}]}}, (), ("weight", "inf")),
    ("source without path", {"data.demos": {"sources": [{"format": "text"}]}}, (), ("sources.0.path", "required")),
    ("source that is text", {"data.demos": {"sources": ["demos.jsonl"]}}, (), ("sources.0",)),
    ("typo in a source", {"data.demos": {"sources": [{"path": "demos.jsonl", "formt": "text"}]}}, (), ("did you mean 'format'",)),
    ("dataset named a/b", {"data": {"a/b": {"path": "demos.jsonl"}}, "stages.sft.data": "a/b"}, (), ("data", "a/b")),
    ("typo at the top", {"tokenzer": {}}, (), ("tokenzer", "did you mean 'tokenizer'")),
    ("typo of a stage's key", {"stages.sft.sead": 1}, (), ("stages.sft.sead", "did you mean 'seed'")),
    ("typo of a training option", {"stages.sft.training.learning_rat": 1}, (), ("did you mean 'learning_rate'",)),
    ("typo of a LoRA option", {"lora.lora_alfa": 1}, (), ("lora.lora_alfa", "did you mean 'lora_alpha'")),
    ("typo of quantization", {"quantization.load_in_4bits": True}, (), ("did you mean 'load_in_4bit'",)),
    ("typo of a check", {"checks.malformd": 0.5}, (), ("checks.malformd", "did you mean 'malformed'")),
    ("typo of a gate limit", {"gate_limits.acuracy": 0.5}, (), ("did you mean 'accuracy'",)),
    ("source as a key", {"source": "x"}, (), ("source", "unknown key")),
    ("source of a dataset", {"data.demos.source": "x"}, (), ("data.demos.source", "unknown key")),
]  # fmt: skip

# arguments after `rlhf`, words
COMMANDS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("plan", "nowhere.yaml"), ("nowhere.yaml", "no such file")),
    (("plan", "."), (r"\.: ", "folder|directory")),
    (("plan", "demos.jsonl"), ("demos.jsonl",)),
    (("plan", "model/model.safetensors"), ("model.safetensors", "UTF-8|utf-8|YAML")),
    (("plan", "/dev/null"), ("/dev/null", "mapping")),
    (("plan", "config.yaml", "stages.sft.training.learning_rate"), ("KEY=VALUE",)),
    (("plan", "config.yaml", "=1"), ("KEY=VALUE",)),
    (("plan", "config.yaml", "a..b=1"), ("KEY=VALUE",)),
    (("plan", "config.yaml", "seed=[1"), ("seed=", "not a valid YAML value")),
    (("plan", "config.yaml", "stages.sft.data.path=x"), ("'data' holds a value",)),
    (("plan", "config.yaml", "seed=five"), ("override 'seed=five'", "integer")),
    (("plan", "config.yaml", "seed="), ("override 'seed='", "None|null")),
    (("plan", "config.yaml", "training.learning_rate=.nan"), ("override", "nan", "finite|number")),
    (("plan", "config.yaml", "training.learning_rate=-.inf"), ("override", "-inf", "finite|number")),
    (("plan", "config.yaml", "stages.sft.training.learning_rat=1"), ("did you mean 'learning_rate'",)),
    (("plan", "config.yaml", "trainin.max_steps=1"), ("did you mean 'training'",)),
    (("plan", "config.yaml", f"seed={'[' * 1500}"), ("override", "deep|nested|not a valid YAML")),
    (("plan", "config.yaml", f"seed={'9' * 5000}"), ("override", "digits|long|number")),
    (("plan", "config.yaml", "seed=!!python/object:os.system x"), ("override", "not a valid YAML value|seed")),
    (("plan", "config.yaml", "data.demos.path="), ("data.demos",)),
    (("plan", "config.yaml", "data.demos.path=''"), ("data.demos.path", "empty")),
    (("plan", "config.yaml", "--accelerate-config", "no.yaml"), ("--accelerate-config", "no such file")),
    (("plan", "config.yaml", "--accelerate-config", "demos.jsonl"), ("--accelerate-config", "demos.jsonl")),
    (("plan", "config.yaml", "--accelerate-config", "model"), ("--accelerate-config", "model")),
    (("plan", "config.yaml", "stages.sft.accelerate_config=no.yaml"), ("stages.sft.accelerate_config", "no such file")),
    (("run", "config.yaml", "--until", "rewrd"), ("--until", "rewrd")),
    (("run", "config.yaml", "--only", "stf"), ("--only", "did you mean 'sft'")),
    (("run", "config.yaml", "--redo", "stf"), ("--redo", "did you mean 'sft'")),
    (("run", "config.yaml", "--only", ""), ("--only", "''")),
    (("run", "config.yaml", "--until", "base"), ("--until", "base")),
    (("run", "config.yaml", "stages.dpo={data: comparisons}", "--only", "dpo"), ("--only dpo", "needs 'sft' first")),
    (("run", "config.yaml", "stages.dpo={data: comparisons}", "--until", "sft", "--redo", "dpo"), ("--redo dpo", "--until sft")),
    (("check-data", "config.yaml", "--stage", "stf"), ("--stage", "did you mean 'sft'")),
    (("status", "nowhere"), ("nowhere", "manifest.json")),
    (("status", "."), ("manifest.json",)),
    (("status", "config.yaml"), ("config.yaml",)),
    (("status", "model"), ("manifest.json",)),
    (("shift", "nowhere"), ("nowhere", "manifest.json")),
    (("shift", "."), ("manifest.json",)),
]  # fmt: skip
# What click refuses; its messages begin otherwise ("Error: ...", under the usage).
USAGE: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("plan",), ("CONFIG",)),
    (("plan", "config.yaml", "--untill", "sft"), ("--untill",)),
    (("plann", "config.yaml"), ("plann",)),
    (("check-data", "config.yaml", "--sample", "-1"), ("--sample", "-1")),
    (("check-data", "config.yaml", "--sample", "many"), ("--sample", "many")),
    (("run", "config.yaml", "--until"), ("--until",)),
]


def _commands() -> list[Case]:
    cases = [Case("command", _line(argv), words, argv) for argv, words in COMMANDS]
    return cases + [Case("usage", _line(argv), words, argv, usage=True) for argv, words in USAGE]


def _line(argv: tuple[str, ...]) -> str:
    line = " ".join(argv)
    return line if len(line) < 90 else f"{line[:60]}... ({len(line)})"


def cases() -> list[Case]:
    """All cases of this file."""
    found = [Case("yaml", name, words, config=content) for name, content, words in YAML_FILES]
    found += _keys()
    found += [Case("wiring", name, words, changes=changes, stages=stages) for name, changes, stages, words in WIRING]
    return found + _commands()
