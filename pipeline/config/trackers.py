"""Know the trackers that `report_to` names, and which of them a stage reports to."""

import importlib.metadata

from packaging.requirements import Requirement

from pipeline.config.schema import RunConfig, Taken, TrainingStage

KEY = "report_to"
NONE = "none"
TRACKERS = ("tensorboard", "wandb", "trackio")  # each is also the name of its package
_INSTALL = "pip install 'rlhf-pipeline[trackers]'"


def trackers_of(config: RunConfig, stage: str) -> list[str]:
    """Return the trackers that a stage reports to; one that trains nothing takes what the run says for all stages."""
    section = config.stages[stage]
    if isinstance(section, Taken):  # there is nothing to log
        return []
    training = section.training if isinstance(section, TrainingStage) else config.training
    return [word for word in dict.fromkeys(_words(training.get(KEY))) if word != NONE]


def fault_of(value: object) -> str | None:
    """Say why a `report_to` of known words cannot work here, or return None."""
    words = _words(value)
    if NONE in words and len(set(words)) > 1:
        return f"`{NONE}` stands alone: name the trackers, or give `{NONE}`"
    missing = [word for word in words if word != NONE and not _is_installed(word)]
    if missing:
        return f"{' and '.join(missing)}: not installed, or in a version that does not work here; {_INSTALL}"
    return None


def _words(value: object) -> list[str]:
    """Return the words of a `report_to`: one, several or none."""
    if isinstance(value, str):
        return [value]
    return [str(word) for word in value] if isinstance(value, list) else []


def _is_installed(package: str) -> bool:
    """Tell whether a package is installed, in a version that is known to work.

    It is not imported for that: a folder of its name, as wandb makes one, can be imported as well.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    try:
        asked_for = importlib.metadata.requires("rlhf-pipeline") or []
    except importlib.metadata.PackageNotFoundError:  # this package runs from its sources alone
        return True
    bounds = [one.specifier for one in map(Requirement, asked_for) if one.name == package]
    return all(bound.contains(version, prereleases=True) for bound in bounds)
