"""Find what labels take from a run folder: its config, its policies, and a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.load import load
from pipeline.config.schema import Evaluate, Reinforced, RunConfig, Sampled
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.type_row import POLICIES, REWARD_MODELS
from pipeline.export import source
from pipeline.export.source import Source
from pipeline.records import last_run
from pipeline.records.finished import last_evaluation
from pipeline.records.manifest import Manifest, Record
from pipeline.system.digests import digest
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

_SAMPLING = ("temperature", "max_new_tokens", "max_prompt_length", "batch_size")
_LAUNCH = "--accelerate-config"  # ends the overrides of a command


@dataclass(frozen=True)
class Parts:
    """The policies whose completions are compared, one or two, and the reward model that scores them, if any."""

    policies: tuple[Source, ...]
    reward: Source | None

    @property
    def all(self) -> list[Source]:
        return [*self.policies, *filter(None, [self.reward])]


def config_of(run_dir: Path, recorded: Manifest, given: Path | None) -> RunConfig:
    """Return the config of a run: the file that is given, or that of its last `rlhf run`, with its overrides.

    Raises:
        UserError: if there is none, it is wrong, or it is of another run.
    """
    overrides: tuple[str, ...] = ()
    path = given
    if path is None:
        last = last_run.read(run_dir)
        if last is None or len(last.command) < 3:
            raise UserError(f"{run_dir}: no `rlhf run` has left its config's name here; name the file with --config")
        words = last.command[2:]
        words = words[: words.index(_LAUNCH)] if _LAUNCH in words else words
        path = Path(words[0])
        overrides = tuple(words[1:])
        if not path.is_file():
            raise UserError(f"{path}: the config of {run_dir} is gone; name the file with --config")
    config = load(path, overrides)
    if config.name != recorded.name:
        raise UserError(f"{path}: is the config of {config.name!r}; {run_dir} holds the run {recorded.name!r}")
    return config


def parts_of(run_dir: Path, recorded: Manifest, config: RunConfig, names: Sequence[str]) -> Parts:
    """Find the policies with these names, or the last one of the chain, and the reward model that belongs to them.

    That is the one that a policy was trained against, or the last one of the chain.

    Raises:
        UserError: if a stage is not finished or is no policy, or more than two are named.
    """
    policies = _finished(recorded, config, POLICIES)
    rewards = _finished(recorded, config, REWARD_MODELS)
    if not names and not policies:
        raise UserError(f"{run_dir}: no stage of it has put out a policy yet; run it first")
    names = names or policies[-1:]
    if len(names) > 2 or len(set(names)) < len(names):
        raise UserError(f"--policy: expected one stage or two different ones, got {', '.join(names)}")
    found = []
    for name in names:
        found.append(source.find(run_dir, name))
        if found[-1].scores:
            hint = f"policies here: {', '.join(policies)}" if policies else "no stage has put out a policy"
            raise UserError(f"--policy: {name!r} is a reward model, which completes nothing; {hint}")
    trained_by = [_reward_of(config, name) for name in names]
    chosen = next((name for name in trained_by if name in rewards), rewards[-1] if rewards else None)
    return Parts(tuple(found), None if chosen is None else source.find(run_dir, chosen))


def _finished(recorded: Manifest, config: RunConfig, kinds: Sequence[str]) -> list[str]:
    """Return the finished stages that make one of these, in the order of the config; those it lacks come first."""
    names = [name for name, record in recorded.stages.items() if STAGE_TYPES[record.type].makes in kinds]
    places = {name: place for place, name in enumerate(config.stages)}
    return sorted(names, key=lambda name: places.get(name, -1))


def _reward_of(config: RunConfig, name: str) -> str | None:
    stage = config.stages.get(name)
    return stage.reward if isinstance(stage, Reinforced) else None


def sampling_of(recorded: Manifest, config: RunConfig) -> Sampled:
    """Return a section that says how the run samples.

    It is that of the last finished evaluation, as it is on record. Without one it is the config's last, or the default.
    """
    done = last_evaluation(recorded)
    if done is not None:
        options = {key: done.config[key] for key in _SAMPLING if key in done.config}
        return Evaluate(type="evaluate", data="none", **options)
    evaluations = [stage for stage in config.stages.values() if isinstance(stage, Evaluate)]
    return evaluations[-1] if evaluations else Evaluate(type="evaluate", data="none")


def about(found: Source) -> JsonObject:
    """Return what a stage was made from and what it has put out, as it is on record."""
    record = found.record
    return {
        "stage": found.stage,
        "type": record.type,
        "identity": identity_of(record),
        "config_digest": record.config_digest,
        "inputs": record.inputs,
        "files": record.output.files,
        "seed": record.seed,
        "started": record.started,
        "git_revision": record.git_revision,
    }


def identity_of(record: Record) -> str:
    """Return a digest that no other training of a stage has."""
    return digest([record.config_digest, record.inputs, record.output.files])


def check_same(run_dir: Path, recorded: Manifest, begun: JsonObject, place: Path) -> None:
    """Compare the policies of a run with those that labels were begun with.

    Raises:
        UserError: if one of them has been trained again, or it is another run.
    """
    for policy in begun["policies"]:
        record = recorded.stages.get(policy["stage"])
        if record is None or identity_of(record) != policy["identity"]:
            fault = f"are of another {policy['stage']!r} than {run_dir} has now"
            mend = "Begin new labels with another --to, or with another --by"
            raise UserError(f"the labels in {place} {fault}: it was trained again, or it is another run. {mend}")
