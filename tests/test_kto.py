"""KTO: equal to bare TRL, its rows, its reference, what it refuses, and the chain through the real command."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import trl.trainer.kto_trainer
import warm
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from test_equalities import QUANTISED, Killed, bare_args, bare_losses, causal, losses, run
from transformers import AutoTokenizer, set_seed
from trl import KTOConfig, KTOTrainer

from pipeline.chain import gate
from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.data.prepare import Prepared
from pipeline.launch import sharding
from pipeline.models import loading
from pipeline.records import manifest
from pipeline.show.plan import describe_reference
from pipeline.stages import kto
from pipeline.system.errors import UserError
from pipeline.training import beside_parent, checkpoints
from pipeline.training.assertions import CheckFailed

SIZE = tiny.TRAINING["per_device_train_batch_size"]
KTO = {"data": "unpaired", "training": {"max_length": 64, "max_steps": 6}}
FROM_BASE = KTO | {"init": "base"}
TWO_PROCESSES = Path(__file__).parents[1] / "accelerate_configs" / "cpu_2_processes.yaml"


def unpaired() -> list[dict[str, Any]]:
    """All good answers first, then bad ones to every second prompt: 18 rows, 4 batches of 4 and one of 2."""
    rows = tiny.comparisons()
    good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    return good + [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in rows[::2]]


def held_out() -> list[dict[str, Any]]:
    return [row | {"prompt": row["prompt"].replace("Tell me", "What is there to say")} for row in unpaired()[5:16]]


def make_run(folder: Path, stages: dict[str, Any], rows: list[dict[str, Any]] | None = None, **top: Any) -> Path:
    """A run with the datasets `unpaired`, `held_out` (unpaired too) and `demonstrations`."""
    path = tiny.make_run(folder, stages, **top)
    tiny.write_rows(folder / "unpaired.jsonl", unpaired() if rows is None else rows)
    tiny.write_rows(folder / "held_out.jsonl", held_out())
    names = ("unpaired", "held_out", "demonstrations", "comparisons")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    return path


def with_training(**training: Any) -> dict[str, Any]:
    return FROM_BASE | {"training": FROM_BASE["training"] | training}


def conversational(rows: list[dict[str, Any]]) -> Dataset:
    """Rows as TRL takes them; it is TRL that tokenises them then."""
    texts = tiny.conversational([{key: row[key] for key in ("prompt", "completion")} for row in rows])
    return Dataset.from_list([text | {"label": row["label"]} for text, row in zip(texts, rows, strict=True)])


def bare_trainer(folder: Path, lora: dict[str, Any] | None, **options: Any) -> KTOTrainer:
    """TRL's trainer as its documentation has it, on the rows in the order that the stage draws by its seed."""
    set_seed(0)
    return KTOTrainer(
        model=causal(folder),
        ref_model=None if lora else causal(folder),
        args=bare_args(KTOConfig, folder, **(KTO["training"] | options)),
        train_dataset=conversational(unpaired()).shuffle(seed=0),
        eval_dataset=conversational(held_out()),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(**lora, task_type="CAUSAL_LM") if lora else None,
    )


@pytest.mark.parametrize(
    ("lora", "options"),
    [
        (tiny.LORA, {}),
        (None, {}),
        (
            tiny.LORA,
            {"desirable_weight": 0.5, "undesirable_weight": 1.5, "beta": 0.3, "gradient_accumulation_steps": 2},
        ),
        (None, {"loss_type": "apo_zero_unpaired"}),
    ],
    ids=["lora", "full", "weights", "apo"],
)
def test_kto_is_bare_trl(tmp_path, lora, options):
    """Losses, held-out figures before and after, and weights; batches of evaluation have another size."""
    stage = with_training(**options) | {"eval_data": "held_out"}
    recorded = run(make_run(tmp_path, {"kto": stage}, lora=lora), "kto")
    trainer = bare_trainer(tmp_path, lora, **options)
    before = trainer.evaluate()
    expected = bare_losses(trainer)
    after = trainer.evaluate()
    assert len(expected) == 6 and expected[0] != expected[-1]
    np.testing.assert_allclose(losses(tmp_path, "kto"), expected, rtol=0, atol=1e-6)
    metrics = recorded.stages["kto"].metrics
    assert metrics["initial_eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)
    for figure in ("eval_loss", "eval_kl", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins"):
        assert metrics[figure] == pytest.approx(after[figure], abs=1e-6), figure
    output = tmp_path / "run" / "kto" / "output"
    if lora:
        saved, weights = load_file(output / "adapter_model.safetensors"), get_peft_model_state_dict(trainer.model)
    else:
        saved, weights = load_file(output / "model.safetensors"), trainer.model.state_dict()
    assert saved.keys() <= weights.keys() and len(saved) >= 20
    for name, weight in saved.items():
        torch.testing.assert_close(weight, weights[name], atol=1e-6, rtol=0)


def test_with_the_defaults_of_trl_too(tmp_path):
    """In bf16, with gradient checkpointing; ours computes logits in float32, so that losses differ by rounding."""
    options = {"bf16": True, "gradient_checkpointing": True}
    recorded = run(make_run(tmp_path, {"kto": with_training(**options)}), "kto")
    assert recorded.stages["kto"].metrics["initial_loss"] == 0.5
    expected = bare_losses(bare_trainer(tmp_path, tiny.LORA, **options))
    assert expected[-1] < 0.49
    np.testing.assert_allclose(losses(tmp_path, "kto"), expected, rtol=0, atol=5e-3)


def prepared(path: Path, role: str = "data") -> Prepared:
    config = load(path)
    return tiny.StageRows(config, run_tokenizer.build(config)).prepare("kto", role)


def test_rows_and_the_completions_for_the_kl_are_those_of_trl(tmp_path):
    rows = prepared(make_run(tmp_path, {"kto": FROM_BASE})).rows
    ours = kto.with_kl_completions(rows.shuffle(seed=0), SIZE)
    theirs = bare_trainer(tmp_path, tiny.LORA).train_dataset
    for column in ("prompt_ids", "completion_ids", "label", "KL_completion_ids"):
        assert ours[column][:] == theirs[column][:], column
    assert ours["label"][:] != sorted(ours["label"][:], reverse=True)


@pytest.mark.parametrize(("number", "size"), [(7, 2), (5, 8), (451, 4), (1, 2)])
def test_every_block_is_rotated_by_itself(number, size):
    """Also where blocks are cut off at the end, and where there are more than are rotated at a time."""
    rows = kto.with_kl_completions(Dataset.from_dict({"completion_ids": [[i] for i in range(number)]}), size)
    for i, (other,) in enumerate(rows["KL_completion_ids"]):
        block = range(i - i % size, min(i - i % size + size, number))
        assert other == (i - 1 if i > block[0] else block[-1])


def test_a_label_in_every_form_and_turns_before_the_answer(tmp_path):
    dialogue = [
        {"role": "user", "content": "Tea?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Milk?"},
        {"role": "assistant", "content": "No."},
    ]
    rows = [{"messages": dialogue, "kto_tag": label} for label in (True, "false", 1)]
    rows += [{"messages": dialogue, "kto_tag": "maybe"}, {"messages": dialogue, "kto_tag": None}]
    path = make_run(tmp_path, {"kto": FROM_BASE}, rows, checks={"malformed": None})
    found = prepared(path)
    assert found.rows["label"][:] == [True, False, True]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt, completion = found.rows[0]["prompt_ids"], found.rows[0]["completion_ids"]
    assert tokenizer.decode(prompt) == "<user>Tea?<assistant>Yes.<eos><user>Milk?<assistant>"
    assert tokenizer.decode(completion) == "No.<eos>"
    assert (found.audit.dropped["malformed"].count, found.audit.noticed["undesirable"].count) == (2, 1)
    assert found.audit.noticed["duplicate"].rows == (2,)  # and not the second, which has another label
    assert found.audit.noticed["contradictory"].count == 3


def test_prompts_are_cut_and_answers_are_not(tmp_path):
    rows = unpaired()
    rows[0] |= {"prompt": "Tell me about " + "tea, " * 20}
    stage = with_training(max_length=40)
    found = prepared(make_run(tmp_path, {"kto": stage}, rows, too_long="truncate"))
    assert found.audit.noticed["truncated"].rows == (0,) and len(found.rows) == len(rows)
    row = found.rows[0]
    assert len(row["prompt_ids"]) + len(row["completion_ids"]) == 40
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(row["completion_ids"]) == "I like tea because it is good.<eos>"


@pytest.mark.parametrize("label", [True, False])
def test_rows_of_one_label_are_refused_but_to_evaluate_on(tmp_path, cli, label):
    rows = [row for row in unpaired() if row["label"] is label]
    path = make_run(tmp_path, {"kto": FROM_BASE}, rows)
    exit_code, _, message = cli("plan", path)
    words = f"all {len(rows)} rows are labelled {str(label).lower()}; expected rows of both labels"
    assert exit_code == 2 and f"stages.kto: `data`: {tmp_path / 'unpaired.jsonl'}: {words}" in message
    with pytest.raises(UserError, match=words):
        run(path, "kto")
    tiny.write_rows(tmp_path / "unpaired.jsonl", unpaired())
    tiny.write_rows(tmp_path / "held_out.jsonl", [row for row in held_out() if row["label"] is label])
    path = make_run_again(path, FROM_BASE | {"eval_data": "held_out"})
    metrics = run(path, "kto").stages["kto"].metrics
    assert metrics["eval_loss"] != metrics["initial_eval_loss"]


def make_run_again(path: Path, stage: dict[str, Any]) -> Path:
    tiny.edit(path, {"stages": {"kto": stage}})
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size must be at least 2"),
        ({"desirable_weight": 0, "undesirable_weight": 0}, "nothing would be learned"),
        ({"train_sampling_strategy": "random"}, "is set by the pipeline: KTO compares rows"),
        ({"disable_dropout": False}, "is set by the pipeline: policy and reference"),
        ({"sync_ref_model": True}, "is set by the pipeline: the reference of a stage is its parent"),
        ({"loss_type": "apo_zero"}, "expected one of apo_zero_unpaired, kto"),
        ({"beta": 0}, "must be above 0"),
        ({"undesirable_weight": -1}, "must be at least 0"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_runs(tmp_path, options, words):
    path = make_run(tmp_path, {"kto": with_training(**options)})
    with pytest.raises(UserError, match=words):
        load(path)


def test_apo_takes_batches_of_one_and_any_row_alone(tmp_path):
    stage = with_training(loss_type="apo_zero_unpaired", per_device_train_batch_size=1)
    metrics = run(make_run(tmp_path, {"kto": stage}), "kto").stages["kto"].metrics
    assert metrics["initial_loss"] == 0.5 and metrics["kl"] == 0 and metrics["loss"] < 0.5


def test_joined_prompts_and_completions_must_fit_the_positions(tmp_path, cli):
    rows = unpaired()
    rows[0] |= {"prompt": "Tell me about " + "tea, " * 30}
    rows[1] |= {"completion": "I like " + "rain, " * 30}
    path = make_run(tmp_path, {"kto": with_training(max_length=None)}, rows)
    exit_code, _, message = cli("plan", path)
    assert exit_code == 2
    assert "its longest prompt and its longest completion, which KTO may join, have " in message
    assert "but the model has 128 positions" in message and "lower `training.max_length`" in message
    assert cli("plan", path, "stages.kto.training.max_length=128")[0] == 0


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["float32", "defaults"])
def test_four_bit_from_an_sft_adapter(tmp_path, options):
    precision = {"model": {"path": "model", "dtype": "bfloat16"}} if options else {}
    base = QUANTISED | ({"bnb_4bit_compute_dtype": "bfloat16"} if options else {})
    stage = KTO | {"training": KTO["training"] | options}
    path = make_run(tmp_path, {"sft": tiny.SFT, "kto": stage}, quantization=base, **precision)
    record = run(path, "sft", "kto").stages["kto"]
    assert (record.output.kind, record.output.full) == ("adapter", None)
    assert record.metrics["initial_loss"] == record.metrics["first_loss"] == 0.5
    assert record.metrics["rewards/margins"] > record.metrics["first_rewards/margins"] == 0
    parent, saved = (
        load_file(tmp_path / "run" / name / "output" / "adapter_model.safetensors") for name in ("sft", "kto")
    )
    assert saved.keys() == parent.keys()  # the reference's copy is not handed on
    assert all(saved[key].dtype == torch.float32 and (saved[key] != parent[key]).any() for key in saved)


@pytest.mark.parametrize("lora", [tiny.LORA, None], ids=["lora", "full"])
def test_resumed_is_uninterrupted(tmp_path, monkeypatch, lora):
    """To the last bit: nothing is drawn while KTO trains. It is killed in its second epoch."""
    stages = {"kto": with_training(max_steps=9, save_steps=3, save_strategy="steps") | {"eval_data": "held_out"}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = run(make_run(whole, stages, lora=lora), "kto").stages["kto"].metrics
    path = make_run(parts, stages, lora=lora)
    mark = checkpoints.MarkComplete.on_save

    def mark_then_die(self, args, state, control, **kwargs):
        mark(self, args, state, control, **kwargs)
        if state.global_step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.MarkComplete, "on_save", mark_then_die)
        with pytest.raises(Killed):
            run(path, "kto")
    record = run(path, "kto").stages["kto"]
    assert record.resumed_from_step == 6
    del expected["eval_num_tokens"], record.metrics["eval_num_tokens"]  # TRL counts from where a process began
    assert record.metrics == expected
    assert losses(whole, "kto") == losses(parts, "kto")
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    outputs = [(folder / "run" / "kto" / "output" / file).read_bytes() for folder in (whole, parts)]
    assert outputs[0] == outputs[1]


def test_two_processes_that_were_killed_go_on(tmp_path):
    """With TRL's defaults, bf16 autocast and gradient checkpointing, and by the real command."""
    files = {}
    for name in ("whole", "parts"):
        folder = tmp_path / name
        folder.mkdir()
        own = {key: tiny.SMALL[key] for key in ("use_cpu", "per_device_train_batch_size")}
        own |= {"max_steps": 60, "save_steps": 20, "save_strategy": "steps", "learning_rate": 1e-3}
        path = make_run(folder, {"kto": FROM_BASE | {"training": {"max_length": 64} | own}}, training={})
        command = ["run", str(path), "--accelerate-config", str(TWO_PROCESSES)]
        checkpoint = folder / "run" / "kto" / "checkpoints" / "checkpoint-20"
        if name == "parts":
            process = warm.Started(*command)
            while not (checkpoint / checkpoints.MARKER).exists():
                assert process.is_alive(), "it ended before it could be killed"
                time.sleep(0.01)
            process.kill_all()
        done = warm.rlhf(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        record = manifest.read(folder / "run").stages["kto"]
        assert record.world_size == 2 and record.metrics["steps"] == 60
        assert record.resumed_from_step in ((20, 40) if name == "parts" else (None,))
        files[name] = (folder / "run" / "kto" / "output" / "adapter_model.safetensors").read_bytes()
    assert files["whole"] == files["parts"]


@pytest.mark.parametrize("lora", [tiny.LORA, None], ids=["lora", "full"])
def test_the_reference_is_the_parent_or_the_stage_stops(tmp_path, monkeypatch, lora):
    path = make_run(tmp_path, {"sft": tiny.SFT, "kto": KTO}, lora=lora)
    run(path, "sft")
    with monkeypatch.context() as patch:
        if lora:  # the base, with adapters off
            original = trl.trainer.kto_trainer.use_adapter
            patch.setattr(trl.trainer.kto_trainer, "use_adapter", lambda model, adapter_name: original(model, None))
        else:
            base = loading.Weights(str(tmp_path / "model"))
            patch.setattr(beside_parent, "load_policy", lambda loader, _: loading.load_policy(loader, base))
        with pytest.raises(CheckFailed, match="the reference is not the parent: rewards of "):
            run(path, "kto")
    assert run(path, "kto").stages["kto"].metrics["initial_loss"] == 0.5


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_log_probs_of_a_reference_computed_before_training(tmp_path, monkeypatch, bf16):
    """They are those of the parent, of completions and for the KL alike; wrong ones are noticed."""
    options = {"precompute_ref_log_probs": True, "bf16": bf16}
    stages = {"sft": tiny.SFT, "usual": KTO | {"type": "kto"}, "early": KTO | {"type": "kto"}}
    stages["usual"] = stages["usual"] | {"training": KTO["training"] | {"bf16": bf16}}
    stages["early"] = stages["early"] | {"training": KTO["training"] | options}
    stages["wrong"] = stages["early"] | {"seed": 1}
    path = make_run(tmp_path, stages)
    run(path, "sft", "usual", "early")
    tolerance = 2e-2 if bf16 else 1e-6
    np.testing.assert_allclose(losses(tmp_path, "early"), losses(tmp_path, "usual"), rtol=0, atol=tolerance)
    original = KTOTrainer.compute_ref_log_probs

    def of_base(self, model, inputs):
        with model.disable_adapter():
            return original(self, model, inputs)

    monkeypatch.setattr(KTOTrainer, "compute_ref_log_probs", of_base)
    with pytest.raises(CheckFailed, match="the reference is not the parent: rewards of "):
        run(path, "wrong")


def test_what_the_labels_weigh_is_said(tmp_path, capfd):
    path = make_run(tmp_path, {"kto": FROM_BASE})
    run(path, "kto")
    said = "kto: 12 of 18 rows are labelled true. Weighted, those are 12 against 6; "
    assert said in capfd.readouterr().out
    run(make_run_again(path, with_training(undesirable_weight=2)), "kto")
    assert "are labelled true" not in capfd.readouterr().out


def test_rows_without_a_label_are_refused(tmp_path, cli):
    path = make_run(tmp_path, {"kto": FROM_BASE | {"data": "comparisons"}})
    exit_code, _, message = cli("plan", path)
    assert exit_code == 2
    assert "holds comparison rows (columns prompt, chosen, rejected), expected unpaired" in message


def test_the_gate_judges_the_parent_and_sharded_launches_are_refused(tmp_path, make_record):
    config = load(make_run(tmp_path, {"sft": tiny.SFT, "kto": KTO}, gate="stop"))
    assert describe_reference(config, "kto") == "frozen copy of sft"
    record = make_record(metrics={"eval_loss": 2.0, "initial_eval_loss": 1.0})
    recorded = manifest.Manifest(name="tiny", stages={"sft": record})
    assert [verdict.passed for verdict in gate.verdicts(config, "kto", recorded)] == [False]
    with pytest.raises(UserError, match="kto does not start, the gate failed"):
        gate.check(config, "kto", recorded)
    for kind in (sharding.FSDP, sharding.ZERO_2, sharding.ZERO_3):
        assert f"kto does not run under {kind}" in sharding.refusal(config, "kto", kind)


def test_the_chain_through_the_command(tmp_path, rlhf, cli):
    """From SFT to KTO to the evaluation, as `rlhf` plans, checks, runs and shows it; KTO in two processes."""
    evaluate = {"data": "prompts", "judge": "judge:score", "max_new_tokens": 8}
    in_two = KTO | {"eval_data": "held_out", "accelerate_config": str(TWO_PROCESSES)}
    stages = {"sft": tiny.SFT | {"eval_data": "prompts"}, "kto": in_two, "evaluate": evaluate}
    path = make_run(tmp_path, stages, gate="stop")
    (tmp_path / "judge.py").write_text("def score(prompt, completion):\n    return -len(completion)\n")
    rows = [{"prompt": f"Say more of {topic}.", "completion": f"I like {topic}."} for topic in tiny.TOPICS]
    tiny.write_rows(tmp_path / "prompts.jsonl", rows)
    names = ("unpaired", "held_out", "demonstrations", "prompts")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})

    exit_code, shown, _ = cli("plan", path)
    assert exit_code == 0
    row = [cell.strip() for cell in next(line for line in shown.splitlines() if "│ kto" in line).split("│")[1:-1]]
    assert row[:4] == ["kto", "kto", "adapter of sft, continued", "frozen copy of sft"]
    assert row[4].startswith("unpaired: 18, ") and row[5] == "6"

    exit_code, shown, _ = cli("check-data", path, "--stage", "kto", "--sample", "18")
    assert exit_code == 0 and "are labelled false" in shown
    assert "prompt: <user>Tell me about tea.<assistant>\ncompletion: ⟦No tea.<eos>⟧\nlabel: false\n" in shown
    assert "completion: ⟦I like tea because it is good.<eos>⟧\nlabel: true\n" in shown

    done = rlhf("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "run" / "kto" / "log.txt").read_text()
    assert "kto: gate: sft: held-out loss: passed" in log and "kto: gate: sft: first token: passed" in log
    table = [line for line in done.stdout.splitlines() if line.startswith("│ ")]
    assert [line.split("│")[1].strip() for line in table[-3:]] == ["base", "sft", "kto"]
    metrics = manifest.read(tmp_path / "run").stages["kto"].metrics
    assert metrics["eval_loss"] < metrics["initial_eval_loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["first_token"]["prompts"] == 18
    samples = (tmp_path / "run" / "evaluate" / "output" / "samples.jsonl").read_text().splitlines()
    assert set(json.loads(samples[0])) == {"prompt", "base", "sft", "kto"}

    exit_code, shown, _ = cli("status", tmp_path / "run")
    assert exit_code == 0
    assert "initial loss 0.500, loss" in shown and "margin" in shown
