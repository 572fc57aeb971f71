"""Refuse what cannot work: combinations of keys that are each valid alone."""

from pipeline.config import options, rehearsal
from pipeline.config.document import Problems
from pipeline.config.graph import datasets
from pipeline.config.lineage import continues, needs_float32, parent_of, shares_backbone
from pipeline.config.schema import BASE, Online, Options, Ppo, Reinforced, RunConfig, Source, Taken, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.system.errors import unknown

FLASH_IN_FLOAT32 = (
    "flash attention does not compute in float32, as PPO and evaluate would; set model.dtype to bfloat16, or "
    "attn_implementation to sdpa"
)
# The only values that these options of pretraining may have with a streamed dataset.
_STREAMED: Options = {
    "dataloader_num_workers": False,
    "shuffle_dataset": False,
    "padding_free": False,
    "auto_find_batch_size": False,
    "packing": True,
    "packing_strategy": "wrapped",
    "accelerator_config": None,
}


def check_sources(config: RunConfig, problems: Problems) -> None:
    """Check that a dataset has one source or a list of them, and that all or none of several have weights."""
    for name, data in config.data.items():
        if (data.path is None) != bool(data.sources):
            problems.add(
                "give either `path` (a file, folder, glob or hub id) or `sources` (a list of them)", "data", name
            )
        if data.sources:
            for key in sorted((data.model_fields_set & Source.model_fields.keys()) - {"path"}):
                problems.add("with `sources`, each of them has its own", "data", name, key)
        elif data.weight is not None:
            problems.add("only the entries of `sources` have weights", "data", name, "weight")
        if len({source.weight is None for source in data.sources}) > 1:
            problems.add("give all of them a `weight`, or none", "data", name, "sources")


def check_training(config: RunConfig, name: str, training: Options, problems: Problems) -> None:
    """Check that TRL accepts the options of a stage together, and that they fit the stage's datasets."""
    stage = config.section(name, TrainingStage)
    message = rehearsal.rehearse(stage.kind, training)
    if message:
        problems.add(message, "stages", name, "training")
    if training.get("eval_strategy", "no") != "no" and "eval_data" not in datasets(stage):
        problems.add("`eval_strategy` needs `eval_data`", "stages", name, "training")
    if not type_of(stage).reads_raw_text:
        return
    if stage.data in config.data and config.data[stage.data].streaming:
        _check_stream(stage.kind, name, training, problems)
    elif not message:
        _check_packing(stage.kind, name, training, problems)


def _check_stream(kind: str, name: str, training: Options, problems: Problems) -> None:
    """Check what pretraining on a stream asks of its options."""
    values = options.effective(kind, training)
    where = ("stages", name, "training")
    for key in ("max_steps", "max_length"):
        if values[key] is None or values[key] <= 0:
            problems.add("is required with a streamed dataset, whose length is not known", *where, key)
    for key, only in _STREAMED.items():
        if key in training and training[key] != only:
            problems.add(
                f"a streamed dataset is shuffled by its `shuffle_buffer` and packed: only {only} fits", *where, key
            )


def _check_packing(kind: str, name: str, training: Options, problems: Problems) -> None:
    """Check that packed pieces have a length."""
    values = options.effective(kind, training)
    if values["packing"] and values["max_length"] is None:
        problems.add("is the length of packed pieces; give a number", "stages", name, "training", "max_length")


def check_reinforced(name: str, stage: Reinforced, problems: Problems) -> None:
    """Check that an RL stage has what its watchdog, its held-out score and its baseline need."""
    if stage.on_alarm == "stop" and stage.eval_data is None:
        problems.add("`on_alarm: stop` needs `eval_data`: held-out prompts that tell the best policy", "stages", name)
    if isinstance(stage, Online) and stage.eval_data is not None and stage.reward is None:
        mend = "name one as `reward`, or leave it out"
        problems.add(f"held-out prompts are scored by a reward model; {mend}", "stages", name, "eval_data")
    if not isinstance(stage, Ppo):
        return
    if stage.baseline_shrinkage and (stage.shift is None or stage.prompt_baseline == "none"):
        wrong = "needs a `prompt_baseline`, and a stage of type shift that measured the ICC of its reward model"
        problems.add(wrong, "stages", name, "baseline_shrinkage")
    if stage.prompt_baseline == "leave_one_out":
        _check_groups(name, stage, problems)


def _check_groups(name: str, stage: Ppo, problems: Problems) -> None:
    """Check that every batch that is scored at once holds whole groups of completions of one prompt."""
    values = options.effective(stage.kind, stage.training)
    number = stage.baseline_completions
    sizes = {
        "local_rollout_forward_batch_size": values["local_rollout_forward_batch_size"],
        "per_device_train_batch_size": values["per_device_train_batch_size"] * values["gradient_accumulation_steps"],
    }
    for key, size in sizes.items():
        if size % number:
            wrong = f"{size} completions do not make whole groups of {number} (`baseline_completions`)"
            problems.add(wrong, "stages", name, "training", key)


def check_weights(config: RunConfig, problems: Problems) -> None:
    """Refuse what the weights cannot do: training 4-bit weights, adapters on a model that does not exist yet."""
    scratch = config.model.scratch
    is_float32 = config.model.dtype == "float32" or (config.model.dtype == "auto" and needs_float32(config) is not None)
    if is_float32 and uses_flash_attention(config):
        problems.add(FLASH_IN_FLOAT32, "model", "attn_implementation")
    for name, stage in config.stages.items():
        if isinstance(stage, TrainingStage):
            _check_start(config, name, stage, problems)
        if isinstance(stage, Taken) and config.quantization and stage.weights != "on base":
            mend = "set `model.path` to the folder of these weights, which is quantised then, or drop `quantization`"
            problems.add(f"brings full weights, beside a base that is quantised; {mend}", "stages", name, "run")
        if isinstance(stage, Ppo) and stage.trainer == "grpo" and not shares_backbone(config, name):
            wrong = "needs adapters: policy and reward model as LoRA adapters on the same weights"
            problems.add(
                f"`trainer: grpo` {wrong}; give both the same `init` and LoRA, or use `trainer: ppo`", "stages", name
            )
    if scratch is None:
        return
    for dataset in scratch.tokenizer.data:
        if dataset not in config.data:
            problems.add(unknown("dataset", dataset, config.data), "model", "scratch", "tokenizer", "data")
    if config.quantization:
        problems.add("a model from scratch cannot be quantised", "quantization")
    is_taken = any(isinstance(stage, Taken) for stage in config.stages.values())
    if is_taken and not any(type_of(stage).reads_raw_text for stage in config.stages.values()):
        mend = "take the other run's pretrain stage too, or set `model.path` to its output instead of `scratch`"
        problems.add(f"no stage makes the weights of this model; {mend}", "model", "scratch")


def uses_flash_attention(config: RunConfig) -> bool:
    """Tell whether the models compute attention in a way that float32 does not have."""
    return (config.model.attn_implementation or "").startswith("flash_attention")


def _check_start(config: RunConfig, name: str, stage: TrainingStage, problems: Problems) -> None:
    """Check that a stage can train what its parent hands on, as its `lora` asks."""
    where = ("stages", name, "lora")
    parent = parent_of(config, stage)
    if config.quantization and stage.lora is None:
        problems.add("a quantised base cannot be trained in full; give LoRA options or drop `quantization`", *where)
    elif stage.lora is None and config.model.dtype not in ("float32", "auto"):
        problems.add(
            f"all weights would train in {config.model.dtype}, which rounds most steps of an optimizer to nothing; "
            "set model.dtype to auto or float32 (with `bf16: true`, TRL's default, it computes in bf16), or give LoRA",
            *where,
        )
    elif config.quantization and parent is not None and not continues(parent, stage):
        merged = "which would have to be merged into quantised weights; use the same LoRA options in both stages"
        problems.add(f"differs in shape from the adapter of {stage.init!r}, {merged}", *where)
    trains_text_in_full = type_of(stage).reads_raw_text and stage.lora is None
    if config.model.scratch and stage.init == BASE and not trains_text_in_full:
        message = "a model from scratch has no weights yet: start with a pretrain stage that has `lora: null`"
        problems.add(message, "stages", name)
