"""Choose the stages of a run that are talked to, and those that measure their answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import BASE, Evaluate
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.type_row import POLICIES, REWARD_MODELS
from pipeline.export import source
from pipeline.export.source import Source
from pipeline.records.finished import last_evaluation
from pipeline.records.manifest import Manifest, Record
from pipeline.show.results import recorded_in
from pipeline.system.errors import UserError, unknown


@dataclass(frozen=True)
class Run:
    """A run folder, as its manifest was when the command began."""

    run_dir: Path
    recorded: Manifest

    @property
    def has_base(self) -> bool:
        """Tell whether there is a base model: a run from scratch has none."""
        return bool(self.recorded.model.get("path"))

    @property
    def policies(self) -> list[str]:
        """Name all that can be talked to: the base model, if there is one, and the finished policies."""
        names = [name for name, record in self.recorded.stages.items() if STAGE_TYPES[record.type].makes in POLICIES]
        return [BASE, *names] if self.has_base else names

    @property
    def evaluation(self) -> Record | None:
        """Return the record of the last finished evaluation."""
        return last_evaluation(self.recorded)

    @property
    def baseline(self) -> str | None:
        """Name the policy that the KL is measured to: the evaluation's baseline, or else the first SFT stage."""
        if self.evaluation is not None and self.evaluation.metrics["baseline"] in self.policies:
            return self.evaluation.metrics["baseline"]
        stages = self.recorded.stages.items()
        return next((name for name, record in stages if STAGE_TYPES[record.type].rows == "demonstrations"), None)

    @property
    def max_new_tokens(self) -> int:
        """Return how long an answer may be in the run's evaluation, in tokens, or else by default."""
        default = Evaluate.model_fields["max_new_tokens"].default
        return default if self.evaluation is None else self.evaluation.config.get("max_new_tokens", default)

    def source(self, stage: str) -> Source:
        return Source(self.run_dir, self.recorded, stage)

    def compared(self) -> list[str]:
        """Name the policies that an evaluation compares: the baseline, and those on record or all aligned ones."""
        if self.evaluation is not None:
            names = [self.baseline, *self.evaluation.metrics["policies"]]
        else:
            stages = self.recorded.stages.items()
            aligned = [name for name, record in stages if STAGE_TYPES[record.type].makes == "aligned policy"]
            names = [self.baseline, *aligned]
        finished = [name for name in dict.fromkeys(names) if name in self.policies and name != BASE]
        return finished or self.policies[-1:]

    def checked(self, names: Sequence[str]) -> list[str]:
        """Return the stages that were asked for, each once.

        Raises:
            UserError: if one is not there, not finished, or no policy.
        """
        for name in names:
            if name in self.policies:
                continue
            if name == BASE:
                fault = f"was made from scratch and has no base model; its policies are {', '.join(self.policies)}"
                raise UserError(f"{self.run_dir}: this run {fault}")
            if name not in self.recorded.stages:
                raise UserError(f"{self.run_dir}: {unknown('finished policy', name, self.policies)}")
            makes = STAGE_TYPES[self.recorded.stages[name].type].makes
            mend = "a reward model scores the answers: name it with --reward" if makes in REWARD_MODELS else ""
            hint = mend or f"its policies are {', '.join(self.policies)}"
            raise UserError(f"{self.run_dir}: stage {name!r} makes no answers (it makes: {makes}); {hint}")
        return list(dict.fromkeys(names))

    def reward(self, asked: str | None) -> str | None:
        """Name the reward stage: the one that was asked for, the evaluation's, or the first; None if there is none.

        Raises:
            UserError: if the stage that was asked for is no finished reward stage.
        """
        stages = self.recorded.stages.items()
        finished = [name for name, record in stages if STAGE_TYPES[record.type].makes in REWARD_MODELS]
        if asked is not None:
            if not finished:
                raise UserError(f"--reward {asked}: the run has no finished reward stage")
            if asked not in finished:
                raise UserError(f"--reward: {unknown('finished reward stage', asked, finished)}")
            return asked
        evaluated = None if self.evaluation is None else self.evaluation.parents.get("reward")
        return evaluated if evaluated in finished else next(iter(finished), None)


def open_run(run_dir: Path) -> Run:
    """Read what a run folder has on record.

    Raises:
        UserError: if it is no run folder, or no policy is finished.
    """
    run_dir = run_dir.expanduser().resolve()
    run = Run(run_dir, recorded_in(run_dir))
    if not [name for name in run.policies if name != BASE]:
        raise UserError(f"{run_dir}: no policy is finished here yet; `rlhf status {run_dir}` shows how far the run is")
    return run


def same_weights(run: Run, names: Sequence[str]) -> list[list[str]]:
    """Return groups of stages whose weights are the same, by the checksums of their files."""
    groups: dict[object, list[str]] = {}
    for name in names:
        if name == BASE:
            continue
        found = run.source(name)
        folder = f"{found.record.output.path}/"
        files = found.record.output.files.items()
        sums = [(file, digest) for file, digest in files if file.startswith(folder) and file.endswith(".safetensors")]
        key = (found.full if found.adapter else None, *sorted((Path(file).name, digest) for file, digest in sums))
        groups.setdefault(key, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def verify_base(run: Run) -> None:
    """Compare the base model with the one that the run's stages were trained on, where it is a folder.

    Raises:
        UserError: if it is gone, or another one.
    """
    folder = Path(run.recorded.model["path"])
    records = [record for record in run.recorded.stages.values() if "base model" in record.inputs]
    if folder.is_absolute() and records:
        source.verify_base(folder, records[0])
