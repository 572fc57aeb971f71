"""Take the digest of the code that prepares rows: another version of it may prepare them otherwise."""

import importlib.metadata
from pathlib import Path

from pipeline.system import digests
from pipeline.system.digests import digest, file_digest

_LIBRARIES = [importlib.metadata.version(name) for name in ("datasets", "jinja2", "tokenizers", "transformers")]
_FILES = [*sorted(Path(__file__).parent.glob("*.py")), Path(digests.__file__)]  # all that decides what rows become
CODE = digest([_LIBRARIES, *map(file_digest, _FILES)])
