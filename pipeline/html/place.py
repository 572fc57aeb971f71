"""Where the report of a run is. An unchanged run asks this alone: what makes the page takes time to import."""

import contextlib
from pathlib import Path

from pipeline.records import manifest

FILE = "report.html"


def is_current(run_dir: Path) -> bool:
    """Tell whether the report is there and no stage has been recorded since it was made."""
    with contextlib.suppress(OSError):
        return (run_dir / FILE).stat().st_mtime_ns >= (run_dir / manifest.FILE).stat().st_mtime_ns
    return False
