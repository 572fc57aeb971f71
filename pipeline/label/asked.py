"""Say what a command asks for, and compare it with what the labels were begun with."""

import getpass
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.values import NAME
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

Order = Literal["unsure", "random"]
NUM_PAIRS = 100
TWICE = 0.1  # of the pairs
_OPTIONS = {
    "policies": "--policy",
    "pairs": "--pairs",
    "order": "--order",
    "twice": "--twice",
    "temperature": "--temperature",
    "max_new_tokens": "--max-new-tokens",
    "seed": "--seed",
    "by": "--by",
    "judge": "--judge",
}


@dataclass(frozen=True)
class Asked:
    """The options of a command. None, or no policy, stands for a default, or for what the labels were begun with."""

    run_dir: Path
    policies: tuple[str, ...] = ()
    prompts: str | None = None
    to: Path | None = None
    pairs: int | None = None
    by: str | None = None
    order: Order | None = None
    twice: float | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    judge: str | None = None
    config_file: Path | None = None

    def __post_init__(self) -> None:
        for option, value in (("--twice", self.twice), ("--temperature", self.temperature)):
            if value is not None and not math.isfinite(value):
                raise UserError(f"{option}: expected a finite number, got {value}")

    def name(self) -> str:
        """Return who answers: the name that is given, or that of the judge or of this machine's user.

        Raises:
            UserError: if a name that is given cannot be that of a folder.
        """
        if self.by is not None and re.fullmatch(NAME, self.by) is None:
            raise UserError(f"--by: expected a name of letters, digits, `_`, `.` and `-`, got {self.by!r}")
        if self.by is not None or self.judge is not None:
            return self.by or str(self.judge).replace(":", ".")
        try:
            user = getpass.getuser()
        except (OSError, KeyError, ImportError):  # a machine may have no name for its user
            user = ""
        return user if re.fullmatch(NAME, user) else "me"

    def check_same(self, begun: JsonObject, folder: Path) -> None:
        """Compare the options that are given with those that the labels were begun with.

        Raises:
            UserError: naming the first that differs.
        """
        for key, option in _OPTIONS.items():
            value = getattr(self, key)
            given = list(value) if isinstance(value, tuple) else value
            if given not in (None, []) and given != begun[key]:
                raise _differs(option, begun[key], given, folder)
        if self.judge is None and begun["judge"] is not None:
            raise _differs("--judge", begun["judge"], None, folder)
        if self.prompts not in (None, begun["prompts"]):
            path = Path(str(self.prompts)).expanduser().absolute()
            if str(path) != begun["prompts"]:
                raise _differs("--prompts", begun["prompts"], self.prompts, folder)


def _differs(option: str, before: object, now: object, folder: Path) -> UserError:
    words = [_words(value) for value in (before, now)]
    mend = "Leave the option out to go on, or begin new labels with another --to"
    if now is None:
        mend = f"Give `{option} {before}` to go on, or begin new labels with another --to"
    return UserError(f"{option}: the labels in {folder} were begun with {words[0]}, now it is {words[1]}. {mend}")


def _words(value: object) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return "none" if value is None else str(value)
