"""Give a stage's module what it needs of its run, and take what it returns."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from pipeline.config import precision
from pipeline.config.graph import datasets
from pipeline.config.lineage import Place, place_of, start_of
from pipeline.config.options import with_defaults
from pipeline.config.requests import request, run_data
from pipeline.config.schema import BASE, RunConfig, Stage, TrainingStage
from pipeline.config.stage_types import config_class, makes
from pipeline.data import fingerprints
from pipeline.data.audit import Audit
from pipeline.data.prepare import Datasets
from pipeline.models.loading import Loader, Weights, merge
from pipeline.records import manifest
from pipeline.records.manifest import Origin, Record
from pipeline.records.progress import Progress
from pipeline.records.stage_folder import CHECKPOINTS
from pipeline.system.device import Device, of_torch
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject
from pipeline.tracking.trackers import Trackers


@dataclass
class Result:
    """Hold what a stage's module returns: metrics, parameter counts, and rows used and dropped per dataset.

    `origin`: the stage of another run that it has taken.
    """

    metrics: JsonObject
    parameters: dict[str, int] = field(default_factory=dict)
    datasets: dict[str, JsonObject] = field(default_factory=dict)
    resumed_from_step: int | None = None
    origin: Origin | None = None


S = TypeVar("S", bound=Stage, covariant=True)


@dataclass(frozen=True)
class StageContext(Generic[S]):
    """Give a stage what it needs of its run; `S` is the class of the stage's own section.

    A stage writes below `folder`, and its output to `new_output`.
    """

    config: RunConfig
    name: str
    tokenizer: PreTrainedTokenizerFast
    tokenizer_key: str
    loader: Loader
    identity: str  # the digest of the stage's identity: what its checkpoints belong to
    trackers: Trackers = field(default_factory=Trackers)  # without any but in the main process, while the stage runs
    progress: Progress = field(default_factory=Progress)  # writes in the main process alone

    @property
    def stage(self) -> S:
        return cast(S, self.config.stages[self.name])

    @property
    def seed(self) -> int:
        return self.config.seed_of(self.name)

    @property
    def folder(self) -> Path:
        return self.config.run_path / self.name

    @property
    def cache(self) -> Path:
        """Say what stages of the run share and can make again."""
        return self.config.run_path / "cache"

    @property
    def new_output(self) -> Path:
        return self.folder / "output.new"

    def record_of(self, stage: str) -> Record:
        """Read the record of a finished stage."""
        recorded = manifest.read(self.config.run_path)
        assert recorded is not None, "this stage has parents that are finished"
        return recorded.stages[stage]

    def say(self, message: str, once: bool = False) -> None:
        """Print a message, in one process, and leave it to whoever watches; `once`: as in `Progress.say`."""
        if PartialState().is_main_process:
            self.progress.say(message, once)

    def weights(self, place: Place) -> Weights:
        """Return where weights lie, as absolute paths or a hub id."""
        run_dir = self.config.run_path
        full = self.loader.base if place.full is None else str(run_dir / place.full)
        return Weights(full, str(run_dir / place.adapter) if place.adapter else None)

    def weights_of(self, stage: str) -> Weights:
        return self.weights(place_of(self.config, stage))

    def start(self) -> Weights:
        """Return the weights this stage starts from; merged first where the parent's adapter cannot be continued."""
        start = start_of(self.config, self.name)
        weights = self.weights(start.place)
        if not start.merge:
            return weights
        merged = self.folder / "merged"
        if PartialState().is_main_process:
            self.say(f"{self.name}: merging the adapter of {start.parent} into its base, in {merged}")
            scores = start.parent != BASE and makes(self.config.stages[start.parent], "reward model")
            merge(self.loader, weights, merged, self.tokenizer, scores)
        PartialState().wait_for_everyone()
        return Weights(str(merged))

    def training_args(self, **ours: Any) -> Any:
        """Build TRL's config for this stage: the user's options over our defaults, and what only we can know.

        Its class depends on the type of the stage, hence `Any`.
        """
        assert isinstance(self.stage, TrainingStage), "other stages have no options of TRL"
        options = with_defaults(self.stage.kind, self.stage.training)
        # `trackers` report, and they alone: a trainer would log past them, to folders of its own.
        fixed: dict[str, Any] = {"report_to": "none", "output_dir": str(self.folder / CHECKPOINTS), "seed": self.seed}
        if self.device.kind == "cpu":  # or transformers would refuse bf16, which a CPU computes too
            fixed["use_cpu"] = True
        if precision.autocast(self.stage, self.device).given_up:
            fixed["bf16"] = False
        return config_class(self.stage.kind)(**(options | fixed | ours))

    @functools.cached_property
    def device(self) -> Device:
        """Return the device of this process, which has joined the others of its stage."""
        return precision.device_of(self.config, self.name, of_torch())

    @functools.cached_property
    def data(self) -> Datasets:
        return Datasets(run_data(self.config), self.tokenizer, self.tokenizer_key)

    def rows(self) -> tuple[Any, Any, dict[str, JsonObject]]:
        """Return the stage's tokenised rows, those of `eval_data` (or None), and what to record of each dataset.

        The rows of a streamed dataset are the stage's to read: None. Otherwise they are a `datasets.Dataset`. Each
        stage knows which of them it has, hence `Any`.

        Raises:
            UserError: if more rows cannot be used than the config's `checks` allow, or none is left.
        """
        return self._rows

    @functools.cached_property
    def _rows(self) -> tuple[Any, Any, dict[str, JsonObject]]:
        rows: dict[str, Dataset] = {}
        recorded: dict[str, JsonObject] = {}
        for role, name in datasets(self.stage).items():
            section = self.config.data[name]
            fingerprint = fingerprints.of_dataset(name, section, self.config.folder)
            recorded[role] = {"dataset": name, "fingerprint": fingerprint}
            if section.streaming:
                continue
            with PartialState().main_process_first():
                prepared = self.data.prepare(request(self.config, self.name, role))
            rows[role] = prepared.rows
            self._check_and_tell(name, prepared.audit)
            recorded[role] |= prepared.audit.record()
        return rows.get("data"), rows.get("eval_data"), recorded

    def _check_and_tell(self, dataset: str, audit: Audit) -> None:
        """Refuse a dataset of which too many rows cannot be used; say how many were left out, and why."""
        problems = audit.problems(self.config.checks.model_dump())
        if problems:
            raise UserError("\n  ".join(problems))
        for kind, finding in audit.dropped.items():
            if finding.count:
                what = f"{finding.count} of {audit.read} rows of {dataset} {audit.what(kind)}"
                self.say(f"{self.name}: {what}: left out", once=True)


def write_json(path: Path, value: object) -> None:
    """Write a value to a file for people to read; what JSON does not know is written as its text."""
    path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
