"""Digests: SHA-256 of values and files, and a 64-bit hash of texts."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(run_dir: Path, folders: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of every file below the folders, by path relative to the run folder."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(run_dir).as_posix(): file_digest(path) for path in files}


def hash64(*texts: str) -> int:
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
