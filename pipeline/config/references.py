"""References between stages: given or found, put in order, and checked for what weights cannot do."""

import graphlib
from typing import Any

from pipeline.config import options
from pipeline.config.document import Problems
from pipeline.config.graph import datasets, waits_for
from pipeline.config.lineage import same_shape
from pipeline.config.schema import BASE, REPORT, Reinforced, RunConfig, Shift, Source, TrainingStage
from pipeline.config.stage_types import FINAL_TYPES, POLICY_TYPES
from pipeline.system.errors import unknown

# What a stream fixes of a stage's options.
_STREAMED = dict.fromkeys(("dataloader_num_workers", "shuffle_dataset", "padding_free", "auto_find_batch_size"), False)
_STREAMED |= {"packing": True, "packing_strategy": "wrapped", "accelerator_config": None}


def wire(config: RunConfig, problems: Problems) -> RunConfig:
    """Fill in every reference and shared option, and put the stages in an order in which they can run."""
    _check_data(config, problems)
    stages = {}
    for name, stage in config.stages.items():
        changes = _references(config, name, problems)
        if isinstance(stage, TrainingStage):
            # What is shared by all stages goes to those that may set it (PPO takes neither bf16 nor save_steps).
            owned = options.owned_by(stage.type)
            training = {key: value for key, value in config.training.items() if key not in owned} | stage.training
            if message := options.rehearse(stage.type, training):
                problems.add(message, "stages", name, "training")
            if training.get("eval_strategy", "no") != "no" and not getattr(stage, "eval_data", None):
                problems.add("`eval_strategy` needs `eval_data`", "stages", name, "training")
            changes["training"] = training
            if stage.data in config.data and config.data[stage.data].streaming and stage.type == "pretrain":
                _check_stream(name, training, problems)
            elif stage.type == "pretrain" and not message:
                _check_packing(name, training, problems)
        stages[name] = stage.model_copy(update=changes)
    if config.gate != "off":
        stages = _with_reports(stages)
    for name, stage in stages.items():
        if isinstance(stage, Reinforced):
            stages[name] = _with_report(name, stage, stages, problems)
    _fit_temperatures(config, stages, problems)
    try:
        order = _order(stages) if not problems else ()
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        mend = "let one of them start from another stage"
        problems.add(f"these stages start from one another in a circle: {circle}; {mend}", "stages")
    if problems:
        return config
    config = config.model_copy(update={"stages": {name: stages[name] for name in order}})
    _check_weights(config, problems)
    return config


def _check_data(config: RunConfig, problems: Problems) -> None:
    """A dataset has one source or a list of them; weights mix several, and all or none."""
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


def _check_stream(name: str, training: dict[str, Any], problems: Problems) -> None:
    """What pretraining on a stream asks of its options."""
    given, where = options.effective("pretrain", training), ("stages", name, "training")
    for key in ("max_steps", "max_length"):
        if given[key] is None or given[key] <= 0:
            problems.add("is required with a streamed dataset, whose length is not known", *where, key)
    for key, only in _STREAMED.items():
        if key in training and training[key] != only:
            problems.add(
                f"a streamed dataset is shuffled by its `shuffle_buffer` and packed: only {only} fits", *where, key
            )


def _check_packing(name: str, training: dict[str, Any], problems: Problems) -> None:
    """Packed pieces have a length."""
    given = options.effective("pretrain", training)
    if given["packing"] and given["max_length"] is None:
        problems.add("is the length of packed pieces; give a number", "stages", name, "training", "max_length")


def _references(config: RunConfig, name: str, problems: Problems) -> dict[str, Any]:
    """Updates of a stage's fields: what it refers to, checked, and found where it is not given."""
    stage, kind, changes = config.stages[name], config.stages[name].type, {}

    def of_type(*types: str) -> list[str]:
        return [other for other, its in config.stages.items() if its.type in types and other != name]

    def find(field: str, default_type: str, missing: str | None, types: tuple[str, ...] = POLICY_TYPES) -> None:
        """A field that names a stage of certain types; by default the only stage of `default_type`, if needed."""
        given, stages = getattr(stage, field), config.stages
        if given is None:
            found = of_type(default_type)
            if len(found) == 1:
                changes[field] = found[0]
            elif found or missing:
                wrong = f"is required: choose one of {', '.join(found)}" if found else missing
                problems.add(wrong, "stages", name, field)
        elif given not in stages and (given, field) != (BASE, "init"):
            problems.add(unknown("stage", given, [*stages, BASE]), "stages", name, field)
        elif given in stages and stages[given].type not in types:
            wrong = f"is of type {stages[given].type}; expected one of {', '.join(types)}"
            problems.add(f"stage {given!r} {wrong}", "stages", name, field)

    for role, dataset in datasets(stage).items():
        if dataset not in config.data:
            problems.add(unknown("dataset", dataset, config.data), "stages", name, role)
        elif config.data[dataset].streaming and (kind, role) != ("pretrain", "data"):
            wrong = f"dataset {dataset!r} has `streaming: true`, which only pretraining can read, and not evaluate on"
            problems.add(wrong, "stages", name, role)
    if isinstance(stage, TrainingStage):
        if kind in ("pretrain", "sft") and stage.init is None:
            changes["init"] = BASE
        if kind == "sft":
            find("init", "pretrain", None)
        elif kind != "pretrain" or stage.init is not None:
            find("init", "sft", "there is no sft stage to start from; add one, or say `init: base`")
    if kind == "ppo" or (kind in ("rloo", "grpo") and (stage.reward or not stage.reward_functions)):
        functions = " or `reward_functions`" if kind != "ppo" else ""
        find("reward", "reward", f"{kind} needs a reward: add a stage of type reward{functions}", ("reward",))
    if kind == "shift":
        find("reward", "reward", "there is no reward model to measure: add a stage of type reward", ("reward",))
        policies, reward = of_type(*POLICY_TYPES), config.stages.get(changes.get("reward", stage.reward))
        if stage.policy is None and reward is not None:
            changes["policy"] = reward.init or next(iter(of_type("sft")), BASE)
        elif stage.policy not in (None, BASE, *policies):
            problems.add(unknown("policy", stage.policy, policies), "stages", name, "policy")
        if reward is not None:
            changes |= _held_out(stage, reward, config.stages)
            if changes.get("data", stage.data) is None:
                missing = "is required where there is no evaluate stage and the reward model has no `eval_data`"
                problems.add(missing, "stages", name, "data")
    if kind == "evaluate":
        find("baseline", "sft", "there is no sft stage to compare with; name the `baseline`")
        find("reward", "reward", None, ("reward",))
        changes["policies"] = of_type(*FINAL_TYPES) if stage.policies is None else stage.policies
        known = of_type(*POLICY_TYPES)
        for policy in set(changes["policies"]) - set(known):
            problems.add(unknown("policy", policy, known), "stages", name, "policies")
    return changes


def _with_reports(stages: dict[str, Any]) -> dict[str, Any]:
    """The stages, each reward stage followed by one of type shift unless it has one or nothing is held out."""
    measured = {stages[name].reward for name in stages if _comes_before_rl(name, stages)}
    found: dict[str, Any] = {}
    for name, stage in stages.items():
        found[name] = stage
        if stage.type != "reward" or name in measured or name + REPORT in stages:
            continue
        own = Shift(type="shift", reward=name, policy=stage.init)
        own = own.model_copy(update=_held_out(own, stage, stages))
        if own.data is not None:
            found[name + REPORT] = own
    return found


def _comes_before_rl(name: str, stages: dict[str, Any]) -> bool:
    """Whether a stage is a report that says what RL will meet, and not one on the completions of what RL has made."""
    report = stages[name]
    return report.type == "shift" and (report.policy not in stages or stages[report.policy].type not in FINAL_TYPES)


def _held_out(report: Shift, reward: Any, stages: dict[str, Any]) -> dict[str, Any]:
    """What a report does not say: how the first evaluate stage samples, so that it is sampled once for both."""
    for stage in stages.values():
        if stage.type == "evaluate":
            shared = ("data", "seed", "temperature", "max_new_tokens", "max_prompt_length", "batch_size")
            return {key: getattr(stage, key) for key in shared if key not in report.model_fields_set}
    return {} if report.data is not None else {"data": getattr(reward, "eval_data", None)}


def _with_report(name: str, stage: Reinforced, stages: dict[str, Any], problems: Problems) -> Reinforced:
    """An RL stage with the report on its reward model, and what it needs a report or held-out prompts for."""
    reports = [key for key, other in stages.items() if other.type == "shift" and other.reward == stage.reward]
    earlier = [key for key in reports if _comes_before_rl(key, stages)]
    if stage.shift is None and earlier and stage.reward is not None:
        stage = stage.model_copy(update={"shift": earlier[0]})
    elif stage.shift is not None and stage.shift not in reports:
        problems.add(unknown("report on its reward model", stage.shift, reports), "stages", name, "shift")
    if stage.on_alarm == "stop" and stage.eval_data is None:
        problems.add("`on_alarm: stop` needs `eval_data`: held-out prompts that tell the best policy", "stages", name)
    if stage.eval_data is not None and stage.reward is None and stage.type != "ppo":
        mend = "name one as `reward`, or leave it out"
        problems.add(f"held-out prompts are scored by a reward model; {mend}", "stages", name, "eval_data")
    if stage.type != "ppo":
        return stage
    if stage.baseline_shrinkage and (stage.shift is None or stage.prompt_baseline == "none"):
        wrong = "needs a `prompt_baseline`, and a stage of type shift that measured the ICC of its reward model"
        problems.add(wrong, "stages", name, "baseline_shrinkage")
    if stage.prompt_baseline == "leave_one_out":
        _check_groups(name, stage, problems)
    return stage


def _fit_temperatures(config: RunConfig, stages: dict[str, Any], problems: Problems) -> None:
    """Let a report measure the ICC that shrinkage uses on completions as PPO draws them, unless it says otherwise."""
    given = {name for name, stage in config.stages.items() if "temperature" in stage.model_fields_set}
    for name, stage in stages.items():
        if stage.type != "ppo" or not stage.baseline_shrinkage or stage.shift not in stages:
            continue
        report = stages[stage.shift]
        temperature = options.effective("ppo", stage.training)["temperature"]
        if stage.shift not in given:
            stages[stage.shift] = report.model_copy(update={"temperature": temperature})
            given.add(stage.shift)  # another PPO stage must agree
        elif report.temperature != temperature:
            seen = f"{stage.shift!r} measures the ICC at temperature {report.temperature:g}"
            mend = f"give stages.{stage.shift} `temperature: {temperature:g}`, or PPO's training that of the report"
            wrong = f"{seen}, PPO samples at {temperature:g}; {mend}"
            problems.add(wrong, "stages", name, "baseline_shrinkage")


def _check_groups(name: str, stage: Reinforced, problems: Problems) -> None:
    """Every batch that is scored at once holds whole groups of completions of one prompt."""
    given, number = options.effective("ppo", stage.training), stage.baseline_completions
    sizes = {"local_rollout_forward_batch_size": given["local_rollout_forward_batch_size"]}
    sizes["per_device_train_batch_size"] = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    for key, size in sizes.items():
        if size % number:
            wrong = f"{size} completions do not make whole groups of {number} (`baseline_completions`)"
            problems.add(wrong, "stages", name, "training", key)


def _order(stages: dict[str, Any]) -> list[str]:
    """The stages in an order in which they can run, as near to the file's as that allows."""
    needs = {name: waits_for(stage) for name, stage in stages.items()}
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError
    order: list[str] = []
    while len(order) < len(stages):
        order.append(next(name for name in stages if name not in order and needs[name] <= set(order)))
    return order


def _check_weights(config: RunConfig, problems: Problems) -> None:
    """Refuse what the weights cannot do: training 4-bit weights, adapters on a model that does not exist yet."""
    scratch = config.model.scratch
    attention = config.model.attn_implementation or ""
    if attention.startswith("flash_attention") and config.model.dtype == "float32":
        message = "flash attention does not compute in float32, as PPO and evaluate would; set model.dtype to bfloat16"
        problems.add(f"{message}, or attn_implementation to sdpa", "model", "attn_implementation")
    for name, stage in config.stages.items():
        if not isinstance(stage, TrainingStage):
            continue
        parent = config.stages.get(stage.init)
        if config.quantization and stage.lora is None:
            message = "a quantised base cannot be trained in full; give LoRA options or drop `quantization`"
            problems.add(message, "stages", name, "lora")
        elif stage.lora is None and config.model.dtype != "float32":
            problems.add(
                f"all weights would train in {config.model.dtype}, which rounds most steps of an optimizer to nothing; "
                "set model.dtype to float32 (with `bf16: true`, TRL's default, it computes in bf16), or give LoRA",
                *("stages", name, "lora"),
            )
        elif config.quantization and parent is not None and not same_shape(parent.lora or {}, stage.lora):
            merged = "which would have to be merged into quantised weights; use the same LoRA options in both stages"
            message = f"differs in shape from the adapter of {stage.init!r}, {merged}"
            problems.add(message, "stages", name, "lora")
        if scratch and stage.init == BASE and (stage.type != "pretrain" or stage.lora is not None):
            message = "a model from scratch has no weights yet: start with a pretrain stage that has `lora: null`"
            problems.add(message, "stages", name)
    for dataset in scratch.tokenizer.data if scratch else ():
        if dataset not in config.data:
            problems.add(unknown("dataset", dataset, config.data), "model", "scratch", "tokenizer", "data")
    if scratch and config.quantization:
        problems.add("a model from scratch cannot be quantised", "quantization")
