"""Remember, in a stage's folder, which curve the stage is at."""

import contextlib
import json
import secrets
from pathlib import Path
from typing import Any

from pipeline.records.stage_folder import TRACKING


class Attempt:
    """One attempt at a stage, over all processes that go on with it: one curve, with one id.

    Another config, other inputs (`identity`), and a stage that had finished begin a new one. So does a stage that
    `resumes` nothing: what it has logged before it was ended, it will log again.
    """

    def __init__(self, folder: Path, identity: str, resumes: bool):
        self._file = folder / TRACKING
        before = self._read()
        self.is_new = not resumes or before.get("identity") != identity or before.get("finished") is not False
        self.id = secrets.token_hex(8) if self.is_new else str(before["id"])
        self._identity = identity
        self._write(finished=False)

    def finish(self) -> None:
        """Say that nothing will be added to the curve."""
        self._write(finished=True)

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(self._file.read_text(encoding="utf-8"))
            if isinstance(state, dict) and "id" in state:
                return state
        return {}

    def _write(self, finished: bool) -> None:
        """Replace the file in one step, or a kill would cost the curve."""
        state = {"id": self.id, "identity": self._identity, "finished": finished}
        partial = self._file.with_suffix(".tmp")
        partial.write_text(json.dumps(state) + "\n", encoding="utf-8")
        partial.replace(self._file)
