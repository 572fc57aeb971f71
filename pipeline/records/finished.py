"""A finished stage of a run folder with all files that its model needs, also those of the stage below its adapter."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.records import manifest
from pipeline.records.manifest import Manifest, Record
from pipeline.system.errors import UserError


def last_evaluation(recorded: Manifest) -> Record | None:
    """Return the record of the run's last finished evaluation."""
    records = [one for one in recorded.stages.values() if STAGE_TYPES[one.type].makes == "evaluation"]
    return records[-1] if records else None


@dataclass(frozen=True)
class Finished:
    """A finished stage of a run."""

    run_dir: Path
    recorded: Manifest
    stage: str

    @property
    def record(self) -> Record:
        return self.recorded.stages[self.stage]

    @property
    def below(self) -> str | None:
        """Name the stage that has put out the full weights below an adapter; None: they are its own or the base."""
        full = self.record.output.full
        owner = None if full is None else full.split("/")[0]
        return None if owner == self.stage else owner

    def files(self) -> dict[str, str]:
        """Return the checksums of the stage's files, and of the full weights below its adapter, by relative path.

        Raises:
            UserError: if the stage below has no record.
        """
        output = self.record.output
        files = dict(output.files)
        if self.below is not None:
            if self.below not in self.recorded.stages:
                fault = f"is an adapter on the weights of {self.below!r}, which has no record"
                raise UserError(f"{self.run_dir}: {self.stage!r} {fault}. Run both again there")
            files |= self.recorded.stages[self.below].output.files
        folders = [PurePosixPath(path) for path in (output.path, output.full) if path is not None]
        return {
            path: checksum
            for path, checksum in files.items()
            if any(PurePosixPath(path).is_relative_to(folder) for folder in folders)
        }

    def verify(self) -> None:
        """Compare all these files with their checksums.

        Raises:
            UserError: naming the first file that is gone or changed, and the stage that makes it again.
        """
        for path, expected in self.files().items():
            again = f"run {PurePosixPath(path).parts[0]!r} again in that run"
            manifest.verify_file(self.run_dir / path, expected, again)
