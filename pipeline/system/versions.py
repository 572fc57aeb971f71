"""Find the versions that a stage runs with: of packages, and of the user's own files."""

import contextlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

PACKAGES = ("rlhf-pipeline", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def of_packages() -> dict[str, str]:
    """Return the versions of Python and of those of `PACKAGES` that are installed."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def git_revision(folder: Path) -> str | None:
    """Return the commit of the repository that a folder lies in, or None."""
    command = ["git", "-C", folder, "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return None
