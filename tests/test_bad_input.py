"""Bad input gives one message and exit code 2, no traceback, and leaves every file as it was."""

import json
import re
import subprocess

import pytest
import tiny

from pipeline.config.stage_types import STAGE_TYPES

QUANTIZATION = {"load_in_4bit": True}
OTHER_SHAPE = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
# Stages of the types that the tiny run does not have.
MORE_STAGES = {
    "rloo": {"data": "prompts", "training": {"max_steps": 1, "num_generations": 2}},
    "grpo": {"data": "prompts", "training": {"max_steps": 1, "num_generations": 2}},
    "kto": {"data": "demos"},
}
TRAINING_TYPES = tuple(name for name, row in STAGE_TYPES.items() if row.trl_config is not None)


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_message(exit_code, stderr):
    first, *more = stderr.splitlines()
    assert exit_code == 2, stderr
    assert first.startswith("error: "), stderr
    assert all(line.startswith("  ") for line in more), stderr  # details of the one message, indented


@pytest.fixture
def refused(cli, monkeypatch, tmp_path):
    """`refused(*args)`: call `rlhf`, which must refuse and start or write nothing; returns the message."""

    popen = subprocess.Popen

    def start(command, *args, **options):
        assert "pipeline.stage" not in command, f"a stage was started: {command}"
        return popen(command, *args, **options)  # a function is tried in a process of its own

    def call(*args):
        before = snapshot(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", start)
            exit_code, _, stderr = cli(*args)
        check_message(exit_code, stderr)
        assert snapshot(tmp_path) == before
        return stderr

    return call


@pytest.fixture
def refused_config(refused, write_config, tmp_path):
    """`refused_config(*words, **changes)`: a config with changes, which `rlhf run` must refuse with these words."""

    def call(*words, **changes):
        message = refused("run", write_config(tmp_path, **changes))
        for word in words:
            assert word in message
        return message

    return call


def line_of(path, key):
    """The line on which a key stands that occurs once."""
    (line,) = [n for n, text in enumerate(path.read_text().splitlines(), 1) if text.strip().startswith(f"{key}:")]
    return line


def assert_typo_is_named(refused, config, dotted, nearest):
    message = refused("run", config)
    assert f"{config}:{line_of(config, dotted.rpartition('.')[2])}: {dotted}: " in message
    assert f"did you mean '{nearest}'?" in message
    assert "1 problem " in message


@pytest.mark.parametrize(
    ("dotted", "nearest"),
    [
        ("tokenzer", "tokenizer"),
        ("model.dtyp", "dtype"),
        ("model.scratch.tokeniser", "tokenizer"),
        ("model.scratch.architecture.hiden_size", "hidden_size"),
        ("model.scratch.tokenizer.vocab_siz", "vocab_size"),
        ("tokenizer.pad_tokn", "pad_token"),
        ("data.corpus.formt", "format"),
        ("stages.evaluate.max_new_token", "max_new_tokens"),
        ("stages.sft.lora.lora_alfa", "lora_alpha"),
        ("lora.lora_alfa", "lora_alpha"),
        ("quantization.load_in_4bits", "load_in_4bit"),
        ("training.learning_rat", "learning_rate"),
    ],
)
def test_unknown_key(refused, write_config, tmp_path, dotted, nearest):
    assert_typo_is_named(refused, write_config(tmp_path, **{dotted: 1}), dotted, nearest)


@pytest.mark.parametrize("stage", [*TRAINING_TYPES, "evaluate"])
def test_unknown_key_of_a_stage(refused, write_config, tmp_path, stage):
    stages = {f"stages.{name}": section for name, section in MORE_STAGES.items()}
    config = write_config(tmp_path, **stages, **{f"stages.{stage}.sead": 1})
    assert_typo_is_named(refused, config, f"stages.{stage}.sead", "seed")


@pytest.mark.parametrize("stage", TRAINING_TYPES)
def test_unknown_training_option(refused, write_config, tmp_path, stage):
    stages = {f"stages.{name}": section for name, section in MORE_STAGES.items()}
    config = write_config(tmp_path, **stages, **{f"stages.{stage}.training.learning_rat": 1})
    assert_typo_is_named(refused, config, f"stages.{stage}.training.learning_rat", "learning_rate")


def test_evaluate_takes_no_training_section(refused_config):
    refused_config("stages.evaluate.training", "unknown key", **{"stages.evaluate.training": {"max_steps": 1}})


def test_all_problems_at_once(refused_config):
    message = refused_config(
        "4 problems",
        "stages.sft.training.learning_rat",
        "stages.ppo.training.kl_coef",
        "stages.evaluate.temperature",
        "seed",
        seed="zero",
        **{
            "stages.sft.training.learning_rat": 1,
            "stages.ppo.training.kl_coef": "small",
            "stages.evaluate.temperature": 0,
        },
    )
    lines = [int(line) for line in re.findall(r"config\.yaml:(\d+): ", message)]
    assert len(lines) == 4
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("seed", "zero"),
        ("seed", True),
        ("name", "a/b"),
        ("model", "gpt2"),
        ("lora", 5),
        ("lora.r", "many"),
        ("training", "fast"),
        ("training.logging_steps", "often"),
        ("data.corpus", "corpus.jsonl"),
        ("data.corpus.limit", 0),
        ("stages", ["sft"]),
        ("stages", {}),
        ("stages.sft", "demos"),
        ("stages.sft.training", "fast"),
        ("stages.sft.training.max_steps", "many"),
        ("stages.sft.training.learning_rate", True),
        ("stages.sft.training.gradient_checkpointing", "perhaps"),
        ("stages.ppo.max_prompt_length", -1),
        ("stages.evaluate.temperature", 0),
    ],
)
def test_wrong_value(refused_config, dotted, value):
    refused_config(f"{dotted}: ", **{dotted: value})


@pytest.mark.parametrize(
    ("dotted", "reason"),
    [
        ("stages.sft.training.output_dir", "run folder"),
        ("stages.sft.training.seed", "`seed`"),
        ("stages.sft.training.push_to_hub", "never uploads"),
        ("stages.sft.training.resume_from_checkpoint", "by itself"),
        ("stages.dpo.training.pad_token", "tokenizer"),
        ("stages.ppo.training.stop_token", "eos"),
        ("stages.ppo.training.bf16", "model.dtype"),
        ("training.output_dir", "run folder"),
        ("lora.task_type", "type decides"),
        ("stages.sft.lora.modules_to_save", "head"),
    ],
)
def test_option_of_the_pipeline(refused_config, dotted, reason):
    refused_config(f"{dotted}: is set by the pipeline", reason, **{dotted: True})


@pytest.mark.parametrize(
    ("appended", "word"),
    [
        ("seed: 1\nseed: 2\n", "duplicate"),
        ("tokenizer: {pad_token: x\n", "not valid YAML"),
        ("tokenizer:\n\tpad_token: x\n", "not valid YAML"),
    ],
)
def test_yaml_error_has_its_line(refused, write_config, tmp_path, appended, word):
    config = write_config(tmp_path)
    num_lines = len(config.read_text().splitlines())
    config.write_text(config.read_text() + appended)
    message = refused("run", config)
    assert word in message
    line = int(re.search(r"config\.yaml:(\d+)", message)[1])
    assert num_lines < line <= num_lines + 3


@pytest.mark.parametrize("content", [b"", b"- sft\n", b"just text\n", b"\xff\xfe\x00name", b"name: tiny\n"])
def test_file_that_is_no_config(refused, tmp_path, content):
    config = tmp_path / "config.yaml"
    config.write_bytes(content)
    assert str(config) in refused("run", config)


def test_no_config_file(refused, tmp_path):
    assert "no such file" in refused("run", "nowhere.yaml")
    assert str(tmp_path) in refused("plan", tmp_path)


@pytest.mark.parametrize(
    ("dotted", "value", "word"),
    [
        ("stages.sft.init", "pretrai", "did you mean 'pretrain'?"),
        ("stages.dpo.init", "sff", "did you mean 'sft'?"),
        ("stages.ppo.reward", "rewrd", "did you mean 'reward'?"),
        ("stages.evaluate.baseline", "sftt", "did you mean 'sft'?"),
        ("stages.evaluate.policies", ["pppo"], "did you mean 'ppo'?"),
        ("stages.sft.data", "demoss", "did you mean 'demos'?"),
        ("stages.sft.eval_data", "demoss", "did you mean 'demos'?"),
        ("model.scratch.tokenizer.data", ["corpsu"], "did you mean 'corpus'?"),
        ("stages.dpo.init", "reward", "is of type reward"),
        ("stages.ppo.reward", "sft", "is of type sft"),
        ("stages.evaluate.baseline", "reward", "is of type reward"),
    ],
)
def test_unknown_reference(refused_config, dotted, value, word):
    refused_config(f"{dotted}: ", word, **{dotted: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages.sft.type": "sfft"}, ["'sfft'", "did you mean 'sft'?"]),
        ({"stages.warmup": {"data": "demos"}}, ["stages.warmup", "'warmup'", "type"]),
        ({"stages.base": {"type": "sft", "data": "demos"}}, ["stages.base", "base model"]),
        ({"stages.sft.init": "ppo"}, ["circle", "sft", "ppo"]),
        ({"stages.sft.init": "sft"}, ["circle", "sft"]),
        ({"stages.dpo2": {"type": "dpo", "data": "comparisons", "init": "dpo2"}}, ["circle", "dpo2"]),
        ({"stages.second": {"type": "sft", "data": "demos"}}, ["stages.dpo.init", "choose one of sft, second"]),
        ({"model.path": "some/model"}, ["model", "either `path`", "`scratch`"]),
        ({"model": {"dtype": "float32"}}, ["model", "either `path`", "`scratch`"]),
        ({"stages.pretrain.lora": OTHER_SHAPE}, ["stages.pretrain", "no weights yet", "`lora: null`"]),
        ({"stages.sft.init": "base"}, ["stages.sft", "no weights yet", "pretrain"]),
        ({"quantization": QUANTIZATION}, ["quantization", "from scratch"]),
        ({"stages.tokenizer": {"type": "dpo", "data": "comparisons"}}, ["stages.tokenizer"]),  # a folder of the run
        ({"stages.dpo.training.eval_strategy": "epoch"}, ["stages.dpo", "eval"]),
        ({"stages.dpo.training.lr_scheduler_type": "cosin"}, ["stages.dpo.training", "cosin"]),
        ({"training.lr_scheduler_type": "cosin"}, ["training", "cosin"]),
        ({"training.optim": "adamww"}, ["training", "adamww"]),
        ({"stages.ppo.training.num_mini_batches": 3}, ["stages.ppo.training", "num_mini_batches"]),
        ({"training.per_device_train_batch_size": 5, "stages.ppo.training.num_mini_batches": 2}, ["num_mini_batches"]),
    ],
    ids=" ".join,
)
def test_run_that_cannot_be(refused_config, changes, words):
    refused_config(*words, **changes)


def test_ppo_without_reward_model(refused_config):
    refused_config("stages.ppo.reward", "add a stage of type reward", **{"stages.reward": tiny.REMOVED})


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_online_stage_without_reward(refused_config, kind):
    changes = {"stages.reward": tiny.REMOVED, "stages.ppo": MORE_STAGES[kind] | {"type": kind}}
    refused_config("stages.ppo.reward", f"{kind} needs a reward", **changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"stages.dpo.lora": None}, "cannot be trained in full"),
        ({"stages.dpo.lora": OTHER_SHAPE}, "differs in shape from the adapter of 'sft'"),
    ],
)
def test_weights_of_a_quantised_base(refused_config, changes, word):
    base = {"model": {"path": "some/model"}, "quantization": QUANTIZATION, "stages.pretrain": tiny.REMOVED}
    refused_config("1 problem ", "stages.dpo.lora: ", word, **base, **changes)


# Data


@pytest.mark.parametrize("dataset", ["corpus", "prompts"])  # the tokenizer reads the first, only stages the second
@pytest.mark.parametrize("path", ["nowhere.jsonl", "./nowhere", "*.csv", "notes.pdf"])
def test_data_file_missing(refused_config, tmp_path, dataset, path):
    (tmp_path / "notes.pdf").write_text("no table")
    refused_config(f"data.{dataset}.path", path.removeprefix("./"), **{f"data.{dataset}.path": path})


@pytest.mark.parametrize("dataset", ["corpus", "comparisons"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.jsonl", ""), ("blank.jsonl", "\n"), ("list.json", "[]"), ("head.csv", "text,chosen\n")],
)
def test_data_without_rows(refused_config, tmp_path, dataset, name, content):
    (tmp_path / name).write_text(content)
    refused_config(name, "is empty", **{f"data.{dataset}.path": name})


def test_data_with_unknown_columns(refused, write_config, write_rows, tmp_path):
    config = write_config(tmp_path)
    write_rows(tmp_path / "comparisons.jsonl", [{"better": "a", "worse": "b"}] * 3)
    message = refused("run", config)
    for word in ("comparisons.jsonl", "columns better, worse", "chosen + rejected", "`columns:`"):
        assert word in message


def test_data_of_the_wrong_shape(refused_config):
    words = ("stages.reward", "demos.jsonl", "columns prompt, completion", "expected comparisons")
    refused_config(*words, **{"stages.reward.data": "demos"})


def test_data_columns_that_are_not_there(refused_config):
    refused_config("'choosen'", "did you mean 'chosen'?", **{"data.comparisons.columns": {"choosen": "chosen"}})


GOOD = {
    "demos": {"prompt": "Is a lamp good?", "completion": "Yes."},
    "comparisons": {"prompt": "Is a lamp good?", "chosen": "Yes.", "rejected": "No."},
    "prompts": {"prompt": "Is a lamp good?"},
}


@pytest.mark.parametrize(
    ("dataset", "fault", "field"),
    [
        ("demos", {"completion": "  "}, "completion"),
        ("demos", {"completion": None}, "completion"),
        ("demos", {"prompt": ""}, "prompt"),
        ("comparisons", {"chosen": ""}, "chosen"),
        ("comparisons", {"rejected": None}, "rejected"),
        ("comparisons", {"prompt": ""}, "prompt"),
        ("comparisons", {"chosen": 7}, "chosen"),
        ("comparisons", {"chosen": {"text": "Yes."}}, "chosen"),
        ("prompts", {"prompt": None}, "prompt"),
    ],
)
def test_malformed_row(refused, write_config, write_rows, tmp_path, dataset, fault, field):
    config = write_config(tmp_path)
    write_rows(tmp_path / f"{dataset}.jsonl", [GOOD[dataset]] * 3 + [GOOD[dataset] | fault] + [GOOD[dataset]])
    message = refused("run", config)
    for word in (f"{dataset}.jsonl", "row 3", f"{field}: "):
        assert word in message


@pytest.mark.parametrize("role", ["robot", None])
def test_malformed_message(refused, write_config, write_rows, tmp_path, role):
    def row(who):
        return {"messages": [{"role": "user", "content": "Hello?"}, {"role": who, "content": "Hello."}]}

    config = write_config(tmp_path)
    write_rows(tmp_path / "demos.jsonl", [row("assistant"), row(role), row("assistant")])
    message = refused("run", config)
    for word in ("demos.jsonl", "row 1", "messages: "):
        assert word in message


def test_line_that_is_no_json(refused, write_config, tmp_path):
    config = write_config(tmp_path)
    lines = (tmp_path / "comparisons.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (tmp_path / "comparisons.jsonl").write_text("\n".join(lines) + "\n")
    message = refused("run", config)
    for word in ("comparisons.jsonl", "cannot be read", "row 3"):
        assert word in message


def test_rows_that_are_all_too_long(refused_config):
    refused_config("comparisons.jsonl", "max_length = 4", **{"stages.dpo.training.max_length": 4})


# Tokenizer, model, functions, files


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.chat_template": "chatlm"}, ["tokenizer.chat_template", "chatml"]),
        ({"tokenizer.pad_token": "<nothing>"}, ["tokenizer.pad_token", "vocabulary"]),
        ({"tokenizer.pad_token": "<eos>"}, ["tokenizer.pad_token", "same as eos"]),
        ({"model.scratch.architecture.model_type": "lama"}, ["model.scratch.architecture", "lama"]),
        ({"lora.target_modules": ["nothing"]}, ["lora", "nothing"]),
        ({"stages.evaluate.judge": "nowhere:score"}, ["stages.evaluate", "no module 'nowhere'"]),
        ({"stages.evaluate.judge": "json:score"}, ["stages.evaluate.judge", "score"]),
        ({"stages.evaluate.judge": "score"}, ["stages.evaluate", "module:function"]),
        ({"run_dir": "corpus.jsonl"}, ["corpus.jsonl"]),
    ],
    ids=" ".join,
)
def test_what_cannot_be_made(refused_config, changes, words):
    refused_config(*words, **changes)


def test_pad_equal_to_eos_without_alternative(refused_config, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(tmp_path / "base")
    LlamaConfig(vocab_size=len(vocabulary), hidden_size=32).save_pretrained(tmp_path / "base")
    changes = {"model": {"path": "base"}, "stages.pretrain": tiny.REMOVED}
    refused_config("tokenizer.pad_token", "never learn to stop", "'</s>'", **changes)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_no_accelerate_config_of_a_stage(refused, write_config, tmp_path, command):
    message = refused(command, write_config(tmp_path, **{"stages.sft.accelerate_config": "no.yaml"}))
    for word in ("stages.sft.accelerate_config", "no such file", "no.yaml"):
        assert word in message


def test_no_accelerate_config(refused, write_config, tmp_path):
    message = refused("run", write_config(tmp_path), "--accelerate-config", "no.yaml")
    assert "--accelerate-config" in message
    assert "no such file" in message


# Command line


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("stages.sft.training.learning_rate", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
        ("stages..data=1", "KEY=VALUE"),
        ("seed=[1", "not a valid YAML value"),
        ("stages.sft.data.path=x", "'data' holds a value"),
        ("model.scratch.tokenizer.data.0=x", "'data' holds a value"),
        ("stages.sft.training.learning_rat=1", "did you mean 'learning_rate'?"),
        ("stages.sft.training.learning_rate=fast", "expected float"),
        ("trainin.max_steps=1", "did you mean 'training'?"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_override(refused, write_config, tmp_path, command, override, word):
    message = refused(command, write_config(tmp_path), override)
    assert f"override '{override}'" in message
    assert word in message


@pytest.mark.parametrize("option", ["--until", "--only", "--redo"])
def test_unknown_stage_option(refused, write_config, tmp_path, option):
    message = refused("run", write_config(tmp_path), option, "rewrd")
    assert f"{option}: there is no stage 'rewrd'; did you mean 'reward'?" in message


def test_only_without_what_it_needs(refused, write_config, tmp_path):
    message = refused("run", write_config(tmp_path), "--only", "sft")
    assert "needs 'pretrain' first" in message
    assert "--until sft" in message


def test_status_without_a_run(refused, tmp_path):
    assert "manifest.json" in refused("status", tmp_path)
    assert "manifest.json" in refused("status", tmp_path / "nowhere")


def test_status_of_a_file(refused, write_config, tmp_path):
    assert "config.yaml" in refused("status", write_config(tmp_path))


# A run folder with finished stages


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def in_json(change):
    """Damage to a JSON file: `change` is given its content."""

    def damage(path):
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return damage


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (cut, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "damaged"),
        (lambda path: path.write_text("[]"), "damaged"),
        (in_json(lambda raw: raw.update(schema_version=99)), "schema version 99"),
        (in_json(lambda raw: raw.update(stages=[])), "damaged at stages"),
        (in_json(lambda raw: raw["stages"]["sft"].update(seed="x")), "damaged at stages.sft.seed"),
        (in_json(lambda raw: raw["stages"]["sft"].pop("output")), "damaged at stages.sft.output"),
    ],
    ids=["cut", "empty", "binary", "list", "version", "stages", "seed", "output"],
)
def test_damaged_manifest(refused, finished, damage, word):
    damage(finished.run_dir / "manifest.json")
    for command in (("run", finished.config), ("plan", finished.config), ("status", finished.run_dir)):
        message = refused(*command)
        assert "manifest.json" in message
        assert word in message


def test_manifest_without_tokenizer(refused, finished):
    in_json(lambda raw: raw.update(tokenizer=None))(finished.run_dir / "manifest.json")
    assert "tokenizer" in refused("run", finished.config)


def test_changed_and_missing_output(refused, finished):
    weights = finished.run_dir / "sft" / "output" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert f"{weights} has changed" in refused("run", finished.config)
    weights.unlink()
    message = refused("plan", finished.config)
    assert f"{weights} is missing" in message
    assert "--redo sft" in message


def test_run_folder_of_another_run(refused, finished, write_config):
    config = write_config(finished.config.parent, name="other", run_dir="runs/tiny")
    message = refused("run", config)
    assert "'tiny'" in message
    assert "'other'" in message


def test_another_tokenizer_than_finished_stages_have(refused, finished, write_config):
    config = write_config(finished.config.parent, **{"tokenizer.chat_template": "chatml"})
    message = refused("run", config)
    for word in ("pretrain, sft, reward", "another tokenizer", "chat template changed"):
        assert word in message


def test_damaged_tokenizer(refused, finished):
    cut(finished.run_dir / "tokenizer" / "tokenizer.json")
    assert str(finished.run_dir / "tokenizer") in refused("run", finished.config)


def test_real_command(rlhf, write_config, write_rows, tmp_path):
    """In a process of its own nothing else may come before the message, such as progress bars or warnings."""
    config = write_config(tmp_path)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": ""}])
    before = snapshot(tmp_path)
    done = rlhf("run", config)
    check_message(done.returncode, done.stderr)
    assert "prompts.jsonl: row 0: prompt: is empty" in done.stderr
    assert snapshot(tmp_path) == before
