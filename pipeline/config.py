"""The run's config: one strict YAML file, all errors of all stages at once, before anything heavy happens.

Our own schema is small and lives here; the sections of TRL, PEFT and transformers are checked in `options`.
"""

import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.errors import UserError, nearest

BASE = "base"  # what `init:` says for the run's base model; no stage may have this name
Options = dict[str, Any]
Dtype = Literal["float32", "bfloat16", "float16"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScratchTokenizer(Strict):
    """A byte-level BPE tokenizer trained on datasets of this run."""

    vocab_size: PositiveInt = 1000
    data: list[str] = Field(min_length=1)


class Scratch(Strict):
    """A model that does not exist yet: transformers config fields (`model_type` among them) and its tokenizer."""

    architecture: Options
    tokenizer: ScratchTokenizer


class Model(Strict):
    """The base model of the run: a hub id or folder (`path`), or a new one (`scratch`)."""

    path: str | None = None
    scratch: Scratch | None = None
    revision: str | None = None
    dtype: Dtype = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


class Tokenizer(Strict):
    """What to change in the base model's tokenizer: a built-in chat template or a file, and two special tokens."""

    chat_template: str | None = None
    pad_token: str | None = None
    eos_token: str | None = None


class Data(Strict):
    """One dataset: a local file, glob or hub id; `columns` maps their names to ours, `limit` takes the first rows."""

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Literal["auto", "text", "prompt", "prompt_completion", "messages", "alpaca", "comparison", "sharegpt"] = (
        "auto"
    )
    columns: dict[str, str] = {}
    limit: PositiveInt | None = None


class Stage(Strict):
    """What all stages have. A stage's name is its key in the file; its type defaults to its name."""

    data: str
    seed: int | None = None
    accelerate_config: str | None = None


class TrainingStage(Stage):
    """A stage that trains from the output of another (`init`) by the rows of `data`."""

    init: str | None = None
    eval_data: str | None = None
    lora: Options | None = None
    training: Options = {}


class Pretrain(TrainingStage):
    type: Literal["pretrain"]


class Sft(TrainingStage):
    type: Literal["sft"]


class Reward(TrainingStage):
    type: Literal["reward"]


class Dpo(TrainingStage):
    type: Literal["dpo"]


class Ppo(TrainingStage):
    type: Literal["ppo"]
    reward: str | None = None
    max_prompt_length: PositiveInt = 512


class Online(TrainingStage):
    """RLOO or GRPO, scored by the run's reward model and/or functions named `module:function`."""

    type: Literal["rloo", "grpo"]
    reward: str | None = None
    reward_functions: list[str] = []
    max_prompt_length: PositiveInt = 512


class Evaluate(Stage):
    """Sample base, baseline and policies on held-out prompts; score with the reward model and a judge."""

    type: Literal["evaluate"]
    policies: list[str] | None = None
    baseline: str | None = None
    reward: str | None = None
    judge: str | None = None
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: PositiveInt = 128
    max_prompt_length: PositiveInt = 512
    num_prompts: PositiveInt | None = None
    batch_size: PositiveInt = 16


STAGE_CLASSES: dict[str, type[Stage]] = {
    "pretrain": Pretrain,
    "sft": Sft,
    "reward": Reward,
    "ppo": Ppo,
    "rloo": Online,
    "grpo": Online,
    "dpo": Dpo,
    "evaluate": Evaluate,
}
FINAL_TYPES = ("ppo", "rloo", "grpo", "dpo")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class RunConfig(Strict):
    """A whole run, resolved: every reference names a stage, every section has its defaults from the top level.

    `stages` is in an order in which they can run. `source` is the file it came from; relative paths start there.
    """

    name: Name
    run_dir: str | None = None
    seed: int = 0
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    quantization: Options | None = None
    lora: Options | None = None
    training: Options = {}
    data: dict[Name, Data]
    stages: dict[Name, Any]
    source: Path

    def resolve(self, path: str) -> str:
        """A local path of the config as an absolute one; anything else (a hub id) as it is."""
        candidate = self.source.parent / Path(path).expanduser()
        return str(candidate.resolve()) if candidate.exists() else path

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}").expanduser().resolve()

    def seed_of(self, stage: str) -> int:
        own = self.stages[stage].seed
        return self.seed if own is None else own


@dataclass(frozen=True)
class Problem:
    loc: tuple[str | int, ...]
    message: str


class Document:
    """The raw file, with the line of every key, and the overrides of the command line laid over it."""

    def __init__(self, path: Path, overrides: tuple[str, ...] = ()):
        self.path = path
        self.overridden: dict[tuple[str, ...], str] = {}
        try:
            self.raw = YAML().load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected a run's config in YAML") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        except MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
        except YAMLError as error:
            raise UserError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(self.raw, dict):
            raise UserError(
                f"{path}: expected a mapping with name, model, data and stages, got {type(self.raw).__name__}"
            )
        for override in overrides:
            self._override(override)

    def _override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"override {override!r}: expected KEY=VALUE, e.g. stages.sft.training.learning_rate=1e-4")
        keys = tuple(key.split("."))
        # A stage's name may hold a dot: take the longest existing key first, as users see it in the file.
        node = self.raw
        for part in keys[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(f"override {override!r}: {part!r} holds a value, not a section")
        try:
            node[keys[-1]] = YAML(typ="safe").load(text)
        except YAMLError:
            raise UserError(f"override {override!r}: {text!r} is not a valid YAML value") from None
        self.overridden[keys] = override

    def where(self, loc: tuple[str | int, ...]) -> str:
        """`FILE:LINE` of the key at `loc`, or of the nearest key above it; the override where that set it."""
        for keys, override in self.overridden.items():
            if loc[: len(keys)] == keys:
                return f"override {override!r}"
        node, line = self.raw, None
        for key in loc:
            try:
                line = (node.lc.key(key) if isinstance(node, dict) else node.lc.item(key))[0] + 1
                node = node[key]
            except (AttributeError, KeyError, IndexError, TypeError):
                break
        return f"{self.path}:{line}" if line else str(self.path)

    def describe(self, problem: Problem) -> str:
        dotted = ".".join(str(part) for part in problem.loc)
        return (
            f"{self.where(problem.loc)}: {dotted}: {problem.message}" if dotted else f"{self.path}: {problem.message}"
        )


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read, check and resolve a run's config.

    Raises:
        UserError: with one line for every problem in the file and in the overrides.
    """
    document = Document(Path(path), overrides)
    raw = _plain(document.raw)
    problems: list[Problem] = []
    config = _parse(raw, document.path.resolve(), problems)
    problems += _check_options(raw)
    if config is not None and not problems:
        config, wiring = _wire(config)
        problems += wiring
    if problems or config is None:
        lines = sorted({document.describe(problem) for problem in problems}, key=_by_line)
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError(f"{document.path}: {count} in the config\n" + "\n".join(f"  {line}" for line in lines))
    return config


def _by_line(text: str) -> tuple[int, str]:
    line = text.split(": ")[0].rpartition(":")[2]
    return (int(line) if line.isdigit() else 0, text)


def _plain(node: Any) -> Any:
    """ruamel's node types as plain dicts and lists."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node if node is None else str(node)


def _messages(error: ValidationError, model: type[BaseModel], loc: tuple[str, ...]) -> Iterator[Problem]:
    """pydantic's errors in our words; an unknown key gets the nearest name of the level it stands at."""
    for item in error.errors():
        at = loc + item["loc"]
        if item["type"] == "extra_forbidden":
            level = model
            for part in item["loc"][:-1]:
                level = _model_at(level, part)
            names = [name for name in level.model_fields if name != "source"]
            yield Problem(at, f"unknown key; {nearest(str(item['loc'][-1]), names)}")
        elif item["type"] == "missing":
            yield Problem(at, "is required")
        else:
            got = f", got {item['input']!r}" if not isinstance(item["input"], (dict, list)) else ""
            yield Problem(at, f"{item['msg'][0].lower()}{item['msg'][1:]}{got}")


def _model_at(model: type[BaseModel], part: str | int) -> type[BaseModel]:
    """The model behind a field, looked up through `X | None`, `dict[str, X]` and the name of a dict's entry."""
    field = model.model_fields.get(str(part))
    if field is None:
        return model
    found = [
        kind
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]
    return found[0] if found else model


def _parse(raw: dict[str, Any], source: Path, problems: list[Problem]) -> RunConfig | None:
    """Our own schema. Stages are checked one by one, so that every stage's errors are found."""
    raw = dict(raw)
    stages = raw.get("stages")
    if not isinstance(stages, dict) or not stages:
        problems.append(Problem(("stages",), "is required: a mapping of stage names, e.g. `sft: {data: demos}`"))
        stages = {}
    parsed = {}
    for name, section in stages.items():
        loc = ("stages", name)
        if not isinstance(section, dict):
            problems.append(Problem(loc, f"expected a section, got {section!r}"))
            continue
        stage_type = section.get("type", name)
        if stage_type not in STAGE_CLASSES:
            hint = nearest(str(stage_type), STAGE_CLASSES)
            problems.append(
                Problem(loc, f"its type is its name unless `type:` is given, and {stage_type!r} is none; {hint}")
            )
            continue
        inherited = {}
        if stage_type != "evaluate":
            inherited = {"lora": raw.get("lora")} if "lora" not in section else {}
        model = STAGE_CLASSES[stage_type]
        try:
            parsed[name] = model.model_validate({"type": stage_type} | section | inherited)
        except ValidationError as error:
            problems += _messages(error, model, loc)
    try:
        config = RunConfig.model_validate(raw | {"stages": parsed, "source": source})
    except ValidationError as error:
        problems += _messages(error, RunConfig, ())
        return None
    if (config.model.path is None) == (config.model.scratch is None):
        problems.append(
            Problem(("model",), "give either `path` (a hub id or folder) or `scratch` (a new architecture)")
        )
    if BASE in config.stages:
        problems.append(Problem(("stages", BASE), f"{BASE!r} stands for the base model; choose another name"))
    return config


def _sections(raw: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str, Options]]:
    """Every section that belongs to a library: (location, kind, options)."""
    for key in ("training", "lora", "quantization"):
        if isinstance(raw.get(key), dict):
            yield (key,), key, raw[key]
    for name, stage in (raw.get("stages") or {}).items() if isinstance(raw.get("stages"), dict) else ():
        if not isinstance(stage, dict) or stage.get("type", name) not in STAGE_CLASSES:
            continue
        if isinstance(stage.get("lora"), dict):
            yield ("stages", name, "lora"), "lora", stage["lora"]
        if isinstance(stage.get("training"), dict) and stage.get("type", name) != "evaluate":
            yield ("stages", name, "training"), stage.get("type", name), stage["training"]


def _check_options(raw: dict[str, Any]) -> list[Problem]:
    from pipeline import options

    problems = []
    for loc, kind, section in _sections(raw):
        coerced, found = options.check_section(kind, section)
        problems += [Problem((*loc, key), message) for key, message in found]
        if not found and kind != "training" and (message := options.rehearse(kind, coerced)):
            problems.append(Problem(loc, message))
    return problems


def _wire(config: RunConfig) -> tuple[RunConfig, list[Problem]]:
    """Fill in every reference between stages and datasets, coerce the options, and put the stages in order."""
    from pipeline import options

    problems: list[Problem] = []
    shared, _ = options.check_section("training", config.training)
    quantization = config.quantization and options.check_section("quantization", config.quantization)[0]
    stages = {}
    for name, stage in config.stages.items():
        changes = _references(config, name, stage, problems)
        if isinstance(stage, TrainingStage):
            # What is shared by all stages goes to those that may set it (PPO takes neither bf16 nor save_steps).
            kept = {key: value for key, value in shared.items() if key not in options.owned_by(stage.type)}
            own, _ = options.check_section(stage.type, stage.training)
            changes["training"] = kept | own
            changes["lora"] = None if stage.lora is None else options.check_section("lora", stage.lora)[0]
        stages[name] = stage.model_copy(update=changes)
    if problems:
        return config, problems
    try:
        order = _order(stages)
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        return config, [Problem(("stages",), f"these stages start from one another in a circle: {circle}")]
    resolved = config.model_copy(
        update={"stages": {name: stages[name] for name in order}, "quantization": quantization}
    )
    return resolved, _check_weights(resolved)


def _references(config: RunConfig, name: str, stage: Stage, problems: list[Problem]) -> dict[str, Any]:
    """The stage's references, given or found, as updates of its fields."""
    loc, changes = ("stages", name), {}

    def of_type(*types: str) -> list[str]:
        return [other for other, s in config.stages.items() if s.type in types and other != name]

    def refer(field: str, types: tuple[str, ...], required: str | None) -> None:
        given = getattr(stage, field)
        if given == BASE and field == "init":
            return
        if given is not None:
            if given not in config.stages:
                names = [*config.stages, BASE] if field == "init" else config.stages
                problems.append(Problem((*loc, field), f"there is no stage {given!r}; {nearest(given, names)}"))
            elif config.stages[given].type not in types:
                kind = config.stages[given].type
                problems.append(
                    Problem((*loc, field), f"stage {given!r} is of type {kind}; expected one of {', '.join(types)}")
                )
            return
        found = of_type(*types) if field != "init" or stage.type == "sft" else of_type("sft")
        if len(found) == 1:
            changes[field] = found[0]
        elif len(found) > 1:
            problems.append(Problem((*loc, field), f"is required: choose one of {', '.join(found)}"))
        elif required:
            problems.append(Problem((*loc, field), required))

    for field in ("data", "eval_data"):
        dataset = getattr(stage, field, None)
        if dataset is not None and dataset not in config.data:
            problems.append(Problem((*loc, field), f"there is no dataset {dataset!r}; {nearest(dataset, config.data)}"))
    policies = ("pretrain", "sft", *FINAL_TYPES)
    if stage.type == "pretrain":
        if stage.init is None:
            changes["init"] = BASE
        else:
            refer("init", ("pretrain",), None)
    elif stage.type == "sft":
        refer("init", policies if stage.init else ("pretrain",), None)
        if stage.init is None:
            changes.setdefault("init", BASE)
    elif isinstance(stage, TrainingStage):
        refer("init", policies, "there is no sft stage to start from; add one, or say `init: base`")
    if stage.type == "ppo":
        refer("reward", ("reward",), "PPO needs a reward model: add a stage of type reward")
    if isinstance(stage, Online):
        missing = f"{stage.type} needs a reward: add a stage of type reward or `reward_functions`"
        refer("reward", ("reward",), None if stage.reward_functions else missing)
    if isinstance(stage, Evaluate):
        refer("baseline", policies, "there is no sft stage to compare with; add one or name the `baseline`")
        refer("reward", ("reward",), None)
        changes["policies"] = stage.policies if stage.policies is not None else of_type(*FINAL_TYPES)
        for policy in changes["policies"]:
            if policy not in config.stages or config.stages[policy].type not in policies:
                problems.append(
                    Problem((*loc, "policies"), f"there is no policy {policy!r}; {nearest(policy, of_type(*policies))}")
                )
    return changes


def parents(stage: Stage) -> dict[str, str]:
    """The stages a stage takes its inputs from, by role."""
    roles = {"init": getattr(stage, "init", None), "reward": getattr(stage, "reward", None)}
    if isinstance(stage, Evaluate):
        roles |= {"baseline": stage.baseline} | {f"policies.{policy}": policy for policy in stage.policies or ()}
    return {role: name for role, name in roles.items() if name not in (None, BASE)}


def _order(stages: dict[str, Stage]) -> list[str]:
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


def same_shape(a: Options, b: Options) -> bool:
    """Whether an adapter made with options `a` can be continued under options `b`.

    Dropout and initialisation do not belong to an adapter's shape; `lora_alpha` does, since it scales the weights.
    """
    free = ("lora_dropout", "init_lora_weights")
    return {k: v for k, v in a.items() if k not in free} == {k: v for k, v in b.items() if k not in free}


def _check_weights(config: RunConfig) -> list[Problem]:
    """Refuse what the weights cannot do: training 4-bit weights, adapters on a model that does not exist yet."""
    problems = []
    for name, stage in config.stages.items():
        if not isinstance(stage, TrainingStage):
            continue
        loc = ("stages", name, "lora")
        if config.quantization and stage.lora is None:
            problems.append(
                Problem(loc, "a quantised base cannot be trained in full; give LoRA options or drop `quantization`")
            )
        if config.model.scratch and stage.init == BASE and (stage.type != "pretrain" or stage.lora is not None):
            problems.append(
                Problem(
                    loc[:2],
                    "a model from scratch has no weights yet: its first stage must be a pretrain stage with `lora: null`",
                )
            )
        parent = config.stages.get(stage.init)
        if (
            config.quantization
            and parent is not None
            and parent.lora
            and stage.lora
            and not same_shape(parent.lora, stage.lora)
        ):
            problems.append(
                Problem(
                    loc,
                    f"differs in shape from the adapter of {stage.init!r}, which would have to be merged into quantised weights; "
                    "use the same LoRA options in both stages",
                )
            )
    if config.model.scratch:
        for dataset in config.model.scratch.tokenizer.data:
            if dataset not in config.data:
                where = ("model", "scratch", "tokenizer", "data")
                problems.append(Problem(where, f"there is no dataset {dataset!r}; {nearest(dataset, config.data)}"))
        if config.quantization:
            problems.append(Problem(("quantization",), "a model from scratch cannot be quantised"))
    return problems
