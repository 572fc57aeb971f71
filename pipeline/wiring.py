"""References between stages: given or found, put in order, and checked for what weights cannot do."""

import graphlib
from typing import Any

from pipeline import options
from pipeline.document import Problems
from pipeline.errors import unknown
from pipeline.schema import BASE, FINAL_TYPES, POLICY_TYPES, RunConfig, TrainingStage, datasets, parents, same_shape


def wire(config: RunConfig, problems: Problems) -> RunConfig:
    """Fill in every reference, coerce the options, and put the stages in an order in which they can run."""
    shared, _ = options.check_section("training", config.training)
    stages = {}
    for name, stage in config.stages.items():
        changes = _References(config, name, problems).found()
        if isinstance(stage, TrainingStage):
            # What is shared by all stages goes to those that may set it (PPO takes neither bf16 nor save_steps).
            kept = {key: value for key, value in shared.items() if key not in options.owned_by(stage.type)}
            changes["training"] = training = kept | options.check_section(stage.type, stage.training)[0]
            if message := options.rehearse(stage.type, training):
                problems.add(message, "stages", name, "training")
            if training.get("eval_strategy", "no") != "no" and not getattr(stage, "eval_data", None):
                problems.add("`eval_strategy` needs `eval_data`", "stages", name, "training")
            changes["lora"] = stage.lora and options.check_section("lora", stage.lora)[0]
        stages[name] = stage.model_copy(update=changes)
    try:
        order = _order(stages) if not problems else ()
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        problems.add(f"these stages start from one another in a circle: {circle}", "stages")
    if problems:
        return config
    quantization = config.quantization and options.check_section("quantization", config.quantization)[0]
    resolved = {"stages": {name: stages[name] for name in order}, "quantization": quantization}
    config = config.model_copy(update=resolved)
    _check_weights(config, problems)
    return config


class _References:
    """Finds and checks what one stage refers to; problems go to the list it is given."""

    def __init__(self, config: RunConfig, name: str, problems: Problems):
        self.config, self.name, self.stage = config, name, config.stages[name]
        self.problems = problems
        self.changes: dict[str, Any] = {}

    def _refuse(self, field: str, message: str) -> None:
        self.problems.add(message, "stages", self.name, field)

    def _of_type(self, *types: str) -> list[str]:
        return [name for name, stage in self.config.stages.items() if stage.type in types and name != self.name]

    def _one(self, field: str, types: tuple[str, ...], default_type: str, missing: str | None) -> None:
        """A field that names a stage of certain types; by default the only stage of `default_type`, if needed."""
        given, stages = getattr(self.stage, field), self.config.stages
        if given is None:
            found = self._of_type(default_type)
            if len(found) == 1:
                self.changes[field] = found[0]
            elif found or missing:
                self._refuse(field, f"is required: choose one of {', '.join(found)}" if found else missing)
        elif given == BASE and field == "init":
            return
        elif given not in stages:
            self._refuse(field, unknown("stage", given, [*stages, BASE]))
        elif (kind := stages[given].type) not in types:
            self._refuse(field, f"stage {given!r} is of type {kind}; expected one of {', '.join(types)}")

    def found(self) -> dict[str, Any]:
        """Updates of the stage's fields."""
        stage, kind = self.stage, self.stage.type
        for role, dataset in datasets(stage).items():
            if dataset not in self.config.data:
                self._refuse(role, unknown("dataset", dataset, self.config.data))
        if isinstance(stage, TrainingStage):
            self._init()
        if kind == "ppo" or (kind in ("rloo", "grpo") and (stage.reward or not stage.reward_functions)):
            functions = " or `reward_functions`" if kind != "ppo" else ""
            self._one("reward", ("reward",), "reward", f"{kind} needs a reward: add a stage of type reward{functions}")
        if kind == "evaluate":
            self._one("baseline", POLICY_TYPES, "sft", "there is no sft stage to compare with; name the `baseline`")
            self._one("reward", ("reward",), "reward", None)
            self.changes["policies"] = self._of_type(*FINAL_TYPES) if stage.policies is None else stage.policies
            known = self._of_type(*POLICY_TYPES)
            for policy in set(self.changes["policies"]) - set(known):
                self._refuse("policies", unknown("policy", policy, known))
        return self.changes

    def _init(self) -> None:
        """Pretraining starts from the base model, SFT from the pretrain stage if there is one, all others from SFT."""
        kind = self.stage.type
        if kind == "sft":
            self._one("init", POLICY_TYPES, "pretrain", None)
        elif kind != "pretrain" or self.stage.init is not None:
            missing = "there is no sft stage to start from; add one, or say `init: base`"
            self._one("init", POLICY_TYPES, "sft", missing)
        if kind in ("pretrain", "sft") and self.stage.init is None:
            self.changes.setdefault("init", BASE)


def _order(stages: dict[str, Any]) -> list[str]:
    """The stages in an order in which they can run, as near to the file's as that allows."""
    sorter = graphlib.TopologicalSorter({name: set(parents(stage).values()) for name, stage in stages.items()})
    sorter.prepare()
    order: list[str] = []
    ready: set[str] = set()
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        first = next(name for name in stages if name in ready)
        ready.remove(first)
        order.append(first)
        sorter.done(first)
    return order


def _check_weights(config: RunConfig, problems: Problems) -> None:
    """Refuse what the weights cannot do: training 4-bit weights, adapters on a model that does not exist yet."""
    scratch = config.model.scratch
    for name, stage in config.stages.items():
        if not isinstance(stage, TrainingStage):
            continue
        parent = config.stages.get(stage.init)
        if config.quantization and stage.lora is None:
            message = "a quantised base cannot be trained in full; give LoRA options or drop `quantization`"
            problems.add(message, "stages", name, "lora")
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
