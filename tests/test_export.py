"""`rlhf export`: what is exported is the stage's model, whatever its form, and nothing else is ever left behind.

The steps of an export run in this process, except where a test says so: each process of its own takes seconds to start.
"""

import contextlib
import errno
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from pipeline import stage
from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.export import card, command, folder, gguf_file, limits, rows, snippets, source, worker, write
from pipeline.export.job import Job
from pipeline.records import manifest
from pipeline.show import results
from pipeline.system import quiet
from pipeline.system.errors import UserError

QUANTISED = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
OTHER_SHAPE = tiny.LORA | {"r": 2}
STAGES = {
    "sft": tiny.SFT,
    "reward": tiny.REWARD | {"init": "sft"},
    "dpo": tiny.DPO | {"init": "sft"},
    "whole": tiny.SFT | {"type": "sft", "init": "base", "lora": None},
    "above": tiny.DPO | {"type": "dpo", "init": "whole"},  # an adapter on another stage's weights
    "reshaped": tiny.DPO | {"type": "dpo", "init": "sft", "lora": OTHER_SHAPE},  # on the merged weights of its parent
    "evaluate": {
        "data": "prompts",
        "policies": ["dpo"],
        "baseline": "sft",
        "max_new_tokens": 8,
        "reward": "reward",
    },
}
DATA = {name: {"path": f"{name}.jsonl"} for name in ("comparisons", "demonstrations", "prompts")}
TEXT = "<user>Tell me about tea.<assistant>I like tea because"


def train(folder: Path, stages: dict, *names: str, **top) -> Path:
    config = load(tiny.make_run(folder, stages, **top))
    for name in names or stages:
        stage.run(config, name)
    return config.run_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tiny.write_rows(folder / "prompts.jsonl", tiny.chain_rows()["prompts"])
    return train(folder, STAGES, data=DATA)


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of the run, whose base model stays where it is."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """Do the steps in this process, with the messages that they leave for the command. What they print is dropped."""

    def process(step: str, job: Job) -> None:
        try:
            with quiet.libraries(), contextlib.redirect_stderr(io.StringIO()):
                worker.STEPS[step](Job.read(job.work))
        except UserError as error:
            raise UserError(f"the export of {job.stage!r} stopped: {error}. Nothing is left of it") from None

    monkeypatch.setattr(command, "_process", process)


@pytest.fixture
def export(cli, tmp_path):
    """`export(run_dir, stage, *options)`: the export's folder and what was printed; it must succeed."""

    def call(run_dir, name, *options):
        target = tmp_path / "exports" / name
        before = set(target.parent.iterdir()) if target.parent.exists() else set()
        exit_code, shown, message = cli("export", run_dir, name, "--to", target, *options)
        assert (exit_code, message) == (0, ""), message
        assert set(target.parent.iterdir()) <= before | {target}, "nothing else is left beside it"
        return target, shown

    return call


def logits_of(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits.float()


def stage_logits(run_dir: Path, name: str) -> torch.Tensor:
    """By the code that `rlhf status` prints: the base with the adapter on it."""
    recorded = manifest.read(run_dir)
    shown: dict = {}
    exec(results.snippet(run_dir, recorded, recorded.stages[name]), shown)
    return logits_of(shown["model"], shown["tokenizer"])


def run_card(target: Path, monkeypatch) -> dict:
    """Execute the code on the card, word for word, beside the export's folder."""
    tokens = MarkdownIt().parse((target / "README.md").read_text())
    (code,) = [token.content for token in tokens if token.type == "fence" and token.info == "python"]
    monkeypatch.chdir(target.parent)
    defined: dict = {}
    exec(code, defined)
    return defined


# What is exported is the stage's model


@pytest.mark.parametrize(
    ("name", "options", "within"),
    [
        ("sft", (), 1e-6),
        ("sft", ("--as", "merged"), 1e-4),
        ("sft", ("--as", "gguf"), 1e-4),
        ("sft", ("--as", "merged", "--dtype", "bfloat16"), 0.1),
        ("dpo", ("--as", "merged"), 1e-4),
        ("reward", (), 1e-6),
        ("reward", ("--as", "merged"), 1e-4),
        ("reward", ("--as", "merged", "--dtype", "bfloat16"), 0.2),
        ("whole", (), 1e-6),
        ("whole", ("--as", "gguf", "--dtype", "float16"), 0.02),
        ("above", ("--as", "merged"), 1e-4),
        ("above", (), 1e-6),
        ("reshaped", ("--as", "merged"), 1e-4),
    ],
)
def test_an_export_loaded_as_its_card_says_is_the_stage(trained, export, monkeypatch, name, options, within):
    target, shown = export(trained, name, *options)
    defined = run_card(target, monkeypatch)
    expected = stage_logits(trained, name)
    np.testing.assert_allclose(logits_of(defined["model"], defined["tokenizer"]), expected, rtol=0, atol=within)
    assert f"{name}: exported to {target}" in shown
    about = json.loads((target / "rlhf_export.json").read_text())
    assert set(about["files"]) == {path.name for path in target.iterdir()} - {"rlhf_export.json"}
    exact = about["figures"]["exact"]
    assert ("score" in exact) == (name == "reward")
    assert exact.get("positions", 100) >= 50
    if name != "reward":
        model, tokenizer = defined["model"], defined["tokenizer"]
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert isinstance(defined["completion"], str)
    else:
        assert isinstance(defined["score"], float)


@pytest.mark.parametrize("name", ["sft", "reward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_4_bit_base_is_dequantised(tmp_path, export, name, dtype):
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD}
    run_dir = train(tmp_path, stages, model={"path": "model", "dtype": dtype}, quantization=QUANTISED)
    target, shown = export(run_dir, name, "--as", "merged", "--dtype", "float32")
    stored = load_file(target / "model.safetensors")
    assert {str(weight.dtype) for weight in stored.values()} == {"torch.float32"}
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    figures = json.loads((target / "rlhf_export.json").read_text())["figures"]
    assert figures["exact"]["mean_score" if name == "reward" else "mean_log_prob"] < 1e-5
    assert "as used" in shown  # beside the run's own kernels


def test_an_adapter_is_copied_as_it_is(trained, export):
    target, _ = export(trained, "sft")
    name = "adapter_model.safetensors"
    assert (target / name).read_bytes() == (trained / "sft" / "output" / name).read_bytes()
    above = json.loads((export(trained, "above")[0] / "adapter_config.json").read_text())
    assert above["base_model_name_or_path"] == str(trained / "whole" / "output")


def test_a_score_head_is_never_rounded(trained, export):
    target, _ = export(trained, "reward", "--as", "merged", "--dtype", "bfloat16")
    merged = load_file(target / "model.safetensors")
    adapter = load_file(trained / "reward" / "output" / "adapter_model.safetensors")
    (head,) = [weight for key, weight in adapter.items() if "score" in key]
    assert merged["score.weight"].dtype == torch.float32
    assert torch.equal(merged["score.weight"], head)
    others = {str(weight.dtype) for key, weight in merged.items() if key != "score.weight"}
    assert others == {"torch.bfloat16"}


def test_generation_ends_at_the_runs_eos_and_not_at_the_bases(tmp_path, export, monkeypatch):
    """The base's own settings end at another token and forbid repetition; neither is part of the policy."""
    path = tiny.make_run(tmp_path, {"sft": tiny.SFT})
    own = {"eos_token_id": 3, "repetition_penalty": 2.0, "pad_token_id": 3}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own))
    config = load(path)
    stage.run(config, "sft")
    recorded = manifest.read(config.run_path)
    eos = run_tokenizer.open_saved(config.run_path / "tokenizer").eos_token_id
    assert eos != 3
    shown: dict = {}
    exec(results.snippet(config.run_path, recorded, recorded.stages["sft"]), shown)
    models = [shown["model"]]
    for form in ("adapter", "merged", "gguf"):
        models.append(run_card(export(config.run_path, "sft", "--as", form, "--force")[0], monkeypatch)["model"])
    for model in models:
        settings = model.generation_config
        assert (settings.eos_token_id, settings.repetition_penalty) in ((eos, None), (eos, 1.0))


def test_sampling_is_that_of_the_evaluation(trained, export):
    settings = json.loads((export(trained, "dpo", "--as", "merged")[0] / "generation_config.json").read_text())
    assert {key: settings[key] for key in ("do_sample", "temperature", "top_k")} == {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
    }


def test_rows_are_those_that_the_run_has_held_out(trained, export):
    target, shown = export(trained, "sft")
    assert (
        "held-out prompts of the run, with the completions that evaluate has kept" in (target / "README.md").read_text()
    )
    assert "evaluate has kept" in shown


def test_a_run_without_held_out_completions_is_compared_on_texts_of_the_package(tmp_path, export):
    _, shown = export(train(tmp_path, {"sft": tiny.SFT}), "sft", "--as", "merged")
    assert "texts of the package: the run has kept no held-out completions" in shown


def test_rows_are_prompts_with_completions_of_all_policies_cut_to_the_models_length(trained):
    tokenizer = run_tokenizer.open_saved(trained / "tokenizer")
    recorded = manifest.read(trained)
    found = rows.held_out(trained, recorded, tokenizer, 256).rows
    assert len(found) == rows.NUM_ROWS
    lines = map(json.loads, (trained / "evaluate" / "output" / "samples.jsonl").read_text().splitlines())
    said = {
        f"<user>{line['prompt'][-1]['content']}<assistant>{line[p]['completion']}"
        for line in lines
        for p in line
        if p != "prompt"
    }
    assert {row.text.removesuffix("<eos>") for row in found} <= said
    assert len({row.text for row in found}) > 20
    for row in found:
        assert tokenizer.decode(row.ids) == row.text
        assert tokenizer.decode(row.ids[: row.start]).endswith("<assistant>")
    short = rows.held_out(trained, recorded, tokenizer, 12).rows
    assert {len(row.ids) <= 12 for row in short} == {True}
    assert all(0 < row.start < len(row.ids) for row in short)


# What is not the stage's model is refused, and deleted


def broken(monkeypatch, damage):
    """Damage the files between the two steps."""
    process = command._process

    def damaging(step, job):
        process(step, job)
        if step == "write":
            damage(job)

    monkeypatch.setattr(command, "_process", damaging)


def change(job: Job, name: str, key: str, how) -> None:
    file = job.output / name
    weights = load_file(file)
    weights[key] = how(weights[key])
    save_file(weights, file, metadata={"format": "pt"})


def not_merged(job: Job) -> None:
    """One layer as it was in the base, as if its adapter had been forgotten."""
    key = "model.layers.1.mlp.down_proj.weight"
    base = load_file(Path(job.full) / "model.safetensors")[key]
    change(job, "model.safetensors", key, lambda weight: base.to(weight.dtype))


def no_adapter(job: Job) -> None:
    """All of the base, rounded as the export is: nothing of the adapter is left."""
    merged = load_file(job.output / "model.safetensors")
    base = load_file(Path(job.full) / "model.safetensors")
    same = {key: base[key].to(weight.dtype) for key, weight in merged.items()}
    save_file(same, job.output / "model.safetensors", metadata={"format": "pt"})


def another_scale(job: Job) -> None:
    config = json.loads((job.output / "adapter_config.json").read_text())
    (job.output / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))


def another_head(job: Job) -> None:
    change(job, "model.safetensors", "score.weight", lambda weight: weight * 1.1)


def a_missing_layer(job: Job) -> None:
    weights = load_file(job.output / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, job.output / "model.safetensors", metadata={"format": "pt"})


def another_eos(job: Job) -> None:
    settings = json.loads((job.output / "generation_config.json").read_text())
    (job.output / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 3}))


def another_template(job: Job) -> None:
    (job.output / "chat_template.jinja").write_text("{{ messages[0].content }}")


def no_numbers(job: Job) -> None:
    change(job, "model.safetensors", "model.norm.weight", lambda weight: weight * float("nan"))


@pytest.mark.parametrize(
    ("name", "options", "damage", "words"),
    [
        ("sft", ("--as", "merged"), not_merged, "mean difference of log-probabilities (nats) is "),
        ("sft", ("--as", "merged", "--dtype", "bfloat16"), no_adapter, "of what the adapter changes, expected 0.5"),
        ("sft", (), another_scale, "largest difference of a log-probability (nats) is "),
        ("reward", ("--as", "merged"), another_head, "difference of scores (log-odds) is "),
        ("sft", ("--as", "merged"), a_missing_layer, "model.layers.1.mlp.down_proj.weight are missing"),
        ("sft", ("--as", "merged"), another_eos, "generation settings end at 3, the run's eos is 1"),
        ("sft", (), another_template, "another chat template than the run's"),
        ("sft", ("--as", "merged"), no_numbers, "largest difference of a log-probability (nats) is 1e+09"),
    ],
)
def test_a_broken_export_is_refused_and_deleted(trained, cli, tmp_path, monkeypatch, name, options, damage, words):
    broken(monkeypatch, damage)
    exit_code, _, message = cli("export", trained, name, "--to", tmp_path / "exports" / "it", *options)
    assert exit_code == 2
    assert words in message
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_broken_export_leaves_the_older_one(trained, export, cli, monkeypatch):
    target, _ = export(trained, "sft", "--as", "merged")
    before = (target / "model.safetensors").read_bytes()
    broken(monkeypatch, not_merged)
    exit_code, _, _ = cli("export", trained, "sft", "--to", target, "--as", "merged", "--force")
    assert exit_code == 2
    assert (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["sft"]


def test_limits_hold_on_both_sides():
    limit = limits.Limit(log_prob=1, mean_log_prob=0.5, same_token=0.9, score=1, mean_score=0.5)
    within = {"positions": 3, "logit": 9.0, "log_prob": 1.0, "mean_log_prob": 0.5, "same_token": 0.9}
    assert limits.faults(within, limit) == []
    beyond = limits.faults(within | {"log_prob": 1.1, "mean_log_prob": 0.6, "same_token": 0.8}, limit)
    assert len(beyond) == 3
    assert limits.faults({"rows": 3, "score": 1.0, "mean_score": float("nan"), "sd": 1.0}, limit) != []
    assert limits.lost_share({"mean_log_prob": 0.3}, 0.5) == pytest.approx(0.6)
    assert limits.lost_share({"mean_log_prob": 1e-5}, 1e-6) == 0  # a stage that has hardly learnt is no broken merge


# What can be known before is said before


def refused(cli, *arguments) -> str:
    exit_code, _, message = cli("export", *arguments)
    assert exit_code == 2
    return message


def test_damaged_outputs_are_refused_before_any_work(run_dir, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_process", lambda step, job: pytest.fail("it has started"))
    for name, below in (("sft", "sft/output"), ("above", "whole/output"), ("reshaped", "reshaped/merged")):
        file = next((run_dir / below).glob("*.safetensors"))
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "has changed since the stage finished" in refused(cli, run_dir, name, "--to", tmp_path / "out")
        file.write_bytes(content)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path, cli):
    run_dir = train(tmp_path, {"sft": tiny.SFT})
    tiny.make_model(tmp_path / "model", seed=1)
    assert "the base model has changed since" in refused(cli, run_dir, "sft", "--to", tmp_path / "out")
    shutil.rmtree(tmp_path / "model")
    assert "the base model is gone" in refused(cli, run_dir, "sft", "--to", tmp_path / "out")


def test_targets_that_must_stay(trained, cli, export, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert "holds files that are no export" in refused(cli, trained, "sft", "--to", mine, "--force")
    assert "is a file; give a folder" in refused(cli, trained, "sft", "--to", mine / "notes.txt")
    assert "lies within the run folder" in refused(cli, trained, "sft", "--to", trained / "sft" / "export")
    target, _ = export(trained, "sft")
    assert "holds an export already; give `--force`" in refused(cli, trained, "sft", "--to", target)
    (target / "notes.txt").write_text("mine")
    assert "holds notes.txt, which belongs to no export" in refused(cli, trained, "sft", "--to", target, "--force")
    (target / "notes.txt").unlink()
    exit_code, _, _ = cli("export", trained, "dpo", "--to", target, "--force")
    assert exit_code == 0
    assert json.loads((target / "rlhf_export.json").read_text())["stage"] == "dpo"


def test_what_came_meanwhile_stays(tmp_path):
    """The export takes minutes, and its target was looked at before."""
    target = tmp_path / "out"
    with folder.beside(target) as work:
        (work / "output").mkdir()
        target.mkdir()
        (target / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="holds files that are no export"):
            folder.put(work / "output", target, work, force=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_an_export_that_is_interrupted_while_it_replaces_another_leaves_it(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    folder.seal(target, {})
    rename = Path.rename

    def interrupted(self, other):
        if self.name == "output":
            raise KeyboardInterrupt
        return rename(self, other)

    with folder.beside(target) as work, monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        (work / "output").mkdir()
        patch.setattr(Path, "rename", interrupted)
        folder.put(work / "output", target, work, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", folder.FILE]


@pytest.mark.parametrize("is_replaced", [True, False])
def test_what_a_killed_process_had_put_aside_goes_back(tmp_path, is_replaced):
    """In a container the number of the process may come again."""
    target = tmp_path / "out"
    with folder.beside(target) as work:
        pass
    old = work / folder.REPLACED
    old.mkdir(parents=True)
    (old / "weights").write_text("old")
    if is_replaced:
        target.mkdir()
        (target / "weights").write_text("new")
    with folder.beside(target) as again:
        assert again == work and not any(again.iterdir())
        assert (target / "weights").read_text() == ("new" if is_replaced else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_has_no_model_or_no_such_form(trained, cli, tmp_path):
    out = ("--to", tmp_path / "out")
    assert "there is no finished stage 'sftt'; did you mean 'sft'?" in refused(cli, trained, "sftt", *out)
    assert "stage 'evaluate' puts out no model" in refused(cli, trained, "evaluate", *out)
    assert "has put out whole weights; say `--as merged`" in refused(cli, trained, "whole", "--as", "adapter", *out)
    assert "a reward model's score head has no place in it" in refused(cli, trained, "reward", "--as", "gguf", *out)
    assert "an adapter is exported as it is" in refused(cli, trained, "sft", "--dtype", "float16", *out)
    assert "no manifest.json here" in refused(cli, tmp_path, "sft", *out)
    assert not (tmp_path / "out").exists()


def test_a_stage_at_work_is_not_exported(run_dir, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "WAIT", 0.1)
    with FileLock(run_dir / "whole" / ".lock"):
        assert "stage 'whole' is held by another process" in refused(cli, run_dir, "above", "--to", tmp_path / "out")


def test_a_full_disk_is_one_message_and_leaves_nothing(trained, cli, tmp_path, monkeypatch):
    def full(_model, _dtype, folder):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(folder / "model.safetensors"))

    monkeypatch.setattr(write, "_write_whole", full)
    message = refused(cli, trained, "sft", "--as", "merged", "--to", tmp_path / "exports" / "it")
    assert "the quota of the disk is used up" in message
    assert "Traceback" not in message
    assert list((tmp_path / "exports").iterdir()) == []


def test_what_a_killed_export_has_left_is_removed(trained, export, tmp_path):
    host = command.folder.socket.gethostname()
    dead = tmp_path / "exports" / f".sft.{host}-{2**22 + 1}.part"  # beyond any process id
    dead.mkdir(parents=True)
    export(trained, "sft")
    assert not dead.exists()


# GGUF


def test_architectures_and_options_that_gguf_does_not_cover():
    assert gguf_file._fault_of_config(LlamaConfig()) is None
    assert gguf_file._fault_of_config(Qwen2Config()) is None
    assert "the architecture 'gpt2' is not covered" in gguf_file._fault_of_config(GPT2Config())
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert "type 'llama3'" in gguf_file._fault_of_config(LlamaConfig(rope_parameters=scaled))
    assert "`attention_bias`" in gguf_file._fault_of_config(LlamaConfig(attention_bias=True))
    assert "sliding window" in gguf_file._fault_of_config(Qwen2Config(use_sliding_window=True))


def test_a_tokenizer_that_gguf_does_not_cover(trained, tmp_path):
    from tokenizers import pre_tokenizers

    tokenizer = run_tokenizer.open_saved(trained / "tokenizer")
    assert gguf_file._pre_tokenizer(tokenizer) == "gpt-2"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert gguf_file._pre_tokenizer(tokenizer) is None
    with pytest.raises(UserError, match="its tokenizer is none of the byte-level BPE tokenizers"):
        gguf_file.check(LlamaConfig(), tokenizer)


def test_qwen2_and_unused_rows_of_an_embedding(tmp_path, export, monkeypatch):
    """Qwen2 has biases, and its heads are not permuted; an embedding often has more rows than there are tokens."""
    architecture = tiny.ARCHITECTURE | {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": False}
    changes = {"model.scratch.architecture": architecture, "stages": {"pretrain": tiny.CHAIN["stages"]["pretrain"]}}
    config = load(tiny.write_config(tmp_path, run_dir=str(tmp_path / "run"), **changes))
    stage.run(config, "pretrain")
    target, _ = export(config.run_path, "pretrain", "--as", "gguf")
    defined = run_card(target, monkeypatch)
    expected = stage_logits(config.run_path, "pretrain")
    np.testing.assert_allclose(logits_of(defined["model"], defined["tokenizer"]), expected, rtol=0, atol=1e-4)


# The card


def test_the_card_tells_what_the_manifest_holds(trained, export):
    target, _ = export(trained, "dpo", "--as", "merged")
    text = (target / "README.md").read_text()
    data = ModelCard.load(target / "README.md").data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data  # a folder of this machine is no model of the hub
    for file in target.glob("*.*"):  # no path of this machine is handed on
        assert str(trained.parent).encode() not in file.read_bytes(), file
    record = manifest.read(trained).stages["dpo"]
    for words in (
        record.datasets["data"]["fingerprint"][:16],
        "win rates against sft with 95 % intervals",
        "Eos is &lt;eos&gt;",
        f"trl {record.versions['trl']}",
        "training.learning\\_rate",
    ):
        assert words in text, words
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == [
        "tiny: dpo",
        "Use",
        "Compared with the trained model",
        "Lineage",
        "Results",
        "Limits",
        "Settings",
    ]
    assert sum(token.type == "table_open" for token in tokens) == 5
    assert not any(token.type.startswith("html") for token in tokens)


@pytest.mark.parametrize("value", ["<script>alert(1)</script>", "a|b\n# c", "[x](http://y)", "`x` *y* ~z~ \\"])
def test_values_on_the_card_stay_text(value):
    table = card._table(("a", "b"), [(value, 1)])
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(table)
    cells = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "td_open"]
    (first, _) = cells
    assert {child.type for child in first.children} <= {"text", "text_special"}
    assert "".join(child.content for child in first.children) == " ".join(value.split())


# By the command, in processes of their own


@pytest.mark.slow
def test_the_command(trained, rlhf, tmp_path):
    done = rlhf("export", trained, "sft", "--to", "policy", "--as", "merged", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "share of equal likeliest tokens" in done.stdout
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "rlhf_export.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert snippets.QUESTION in (tmp_path / "policy" / "README.md").read_text()
