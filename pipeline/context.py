"""What a stage's module is given, and what it returns."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pipeline import data
from pipeline.lineage import Place, place_of, start_of
from pipeline.models import Loader, Weights, merge
from pipeline.options import length_limit, with_defaults
from pipeline.schema import RunConfig, datasets
from pipeline.trainers import config_class


@dataclass
class Result:
    """What a stage's module returns: metrics, parameter counts, and rows used and dropped per dataset."""

    metrics: dict[str, Any]
    parameters: dict[str, int] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    resumed_from_step: int | None = None


@dataclass(frozen=True)
class StageContext:
    """What a stage needs of its run. A stage writes below `folder`, and its output to `new_output`."""

    config: RunConfig
    name: str
    tokenizer: Any
    tokenizer_key: str
    loader: Loader
    identity: str

    @property
    def stage(self) -> Any:
        return self.config.stages[self.name]

    @property
    def seed(self) -> int:
        return self.config.seed_of(self.name)

    @property
    def folder(self) -> Path:
        return self.config.run_path / self.name

    @property
    def new_output(self) -> Path:
        return self.folder / "output.new"

    def say(self, message: str) -> None:
        if PartialState().is_main_process:
            print(message, flush=True)

    def weights(self, place: Place) -> Weights:
        run_dir = self.config.run_path
        full = self.loader.base if place.full is None else str(run_dir / place.full)
        return Weights(full, str(run_dir / place.adapter) if place.adapter else None)

    def weights_of(self, stage: str) -> Weights:
        return self.weights(place_of(self.config, stage))

    def start(self) -> Weights:
        """The weights this stage starts from; merged first where the parent's adapter cannot be continued."""
        start = start_of(self.config, self.name)
        weights = self.weights(start.place)
        if not start.merge:
            return weights
        merged = self.folder / "merged"
        if PartialState().is_main_process:
            self.say(f"{self.name}: merging the adapter of {start.parent} into its base, in {merged}")
            merge(self.loader, weights, merged, self.tokenizer)
        PartialState().wait_for_everyone()
        return Weights(str(merged))

    def training_args(self, **ours: Any) -> Any:
        """TRL's config for this stage: the user's options, ours where they are silent, and what only we can know."""
        options = with_defaults(self.stage.type, self.stage.training)
        fixed = {"output_dir": str(self.folder / "checkpoints"), "seed": self.seed}
        return config_class(self.stage.type)(**(options | fixed | ours))

    def rows(self) -> tuple[Any, Any, dict[str, dict[str, Any]]]:
        """The stage's tokenised rows, those of `eval_data` (or None), and what to record about each dataset."""
        rows, recorded = {}, {}
        for role, name in datasets(self.stage).items():
            with PartialState().main_process_first():
                kept, dropped = data.prepare(self.config, self.name, name, self.tokenizer, self.tokenizer_key)
            if dropped:
                limit = " = ".join(map(str, length_limit(self.stage)))
                self.say(f"{self.name}: dropped {dropped} rows of {name} longer than {limit}, {len(kept)} are left")
            digest = data.fingerprint(data.find(self.config, name))
            rows[role], recorded[name] = kept, {"rows": len(kept), "dropped": dropped, "fingerprint": digest}
        return rows["data"], rows.get("eval_data"), recorded


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
