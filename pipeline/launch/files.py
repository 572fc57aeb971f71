"""Find the accelerate config that each stage is launched with."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.launch import sharding
from pipeline.system.digests import digest, file_digest
from pipeline.system.errors import UserError, all_of


def of_stages(config: RunConfig, names: list[str], common: str | None) -> dict[str, str | None]:
    """Return the accelerate config of each stage: its own (relative to the config), or the command line's.

    Raises:
        UserError: with a line for each stage whose file is not there or that cannot run under it.
    """
    files: dict[str, str | None] = {}
    problems = []
    for name in names:
        own = config.stages[name].accelerate_config
        path = config.resolve(own) if own else common
        files[name] = path
        if path is None:
            continue
        where = f"stages.{name}.accelerate_config" if own else "--accelerate-config"
        if not Path(path).is_file():
            raise UserError(f"{where}: no such file: {path}")
        fault = sharding.refusal(config, name, sharding.of_file(path, where))
        if fault is not None:
            problems.append(f"stages.{name}: {where} is {path}: {fault}")
    if problems:
        raise all_of(config.source, "stage", "cannot run", problems)
    return files


def processes(files: Mapping[str, str | None]) -> dict[str, int]:
    """Return the number of processes of each stage, by the accelerate config that it is launched with (None: none)."""
    return {name: sharding.processes_of(file) for name, file in files.items()}


def digests(files: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the digest of how each stage is launched, with how its model is split over processes; None: by itself."""
    return {name: None if file is None else _digest_of(file) for name, file in files.items()}


def _digest_of(file: str) -> str:
    return digest([file_digest(Path(file)), sharding.of_file(file, "--accelerate-config")])
