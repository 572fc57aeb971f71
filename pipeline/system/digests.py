"""Compute digests of values and files, and a 64-bit hash of texts.

Four words, each for one thing:

- digest: the SHA-256 of any value or file, as 64 hexadecimal digits. It is how the other two are computed.
- fingerprint: the digest of what decides the content of a dataset, a tokenizer or a base model. Paths do not count.
  Two of them are the same if their fingerprints are.
- checksum: the digest of one file of a finished output, kept in the manifest. It shows damage.
- hash: a number for splits and random seeds, from `hash64`.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON-like value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(run_dir: Path, folders: Iterable[Path]) -> dict[str, str]:
    """Return the digest of every file below the folders, by path relative to the run folder."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(run_dir).as_posix(): file_digest(path) for path in files}


def hash64(*texts: str) -> int:
    """Return a number of 64 bits for texts, the same on every machine and in every process."""
    content = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
