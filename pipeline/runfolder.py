"""Whether a folder may be a run's folder: what somebody else keeps there is never written over."""

from pathlib import Path

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.schema import RunConfig

LOCK = ".lock"  # in every stage folder that a run has made, as long as dotfiles are copied with it
_SIGNS = (LOCK, "checkpoints/identity.txt", "log_history.json")
LOG = "log.txt"  # the launcher's; it only ever grows


def check(config: RunConfig, recorded: Manifest | None) -> None:
    """Look at the run folder before anything is written to it; `recorded` is its manifest.

    A stage begins by removing what is left of an earlier try, so its folder must be one that a run has made.

    Raises:
        UserError: if the folder lies within another run, or holds files where this run would put its own.
    """
    folder = config.run_path
    for above in folder.parents if recorded is None else ():
        if (above / manifest.FILE).is_file() and _is_manifest(above):
            raise UserError(f"run_dir: {folder} lies within the run folder {above}; give another `run_dir`")
    finished = {} if recorded is None else recorded.stages
    names = [name for name in config.stages if name not in finished]
    foreign = [folder / name for name in names if _is_foreign(folder / name)]
    if recorded is None and _holds_files(folder / "tokenizer"):
        foreign.append(folder / "tokenizer")
    if foreign:
        seen = f"{foreign[0]} holds files that no run has put there, and this run would write over them"
        mend = "give another `run_dir`, or move those files away"
        raise UserError(f"run_dir: {seen}; {mend}")


def _is_manifest(folder: Path) -> bool:
    """Whether a run wrote the file; other programs have files of that name."""
    try:
        return manifest.read(folder) is not None
    except UserError:
        return False


def _is_foreign(folder: Path) -> bool:
    if folder.is_dir():
        return _holds_files(folder) and not any((folder / sign).exists() for sign in _SIGNS)
    return folder.exists() or folder.is_symlink()


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.name not in (LOCK, LOG) for path in folder.iterdir())
