"""Name the folder where prepared data and digests of large files are kept from run to run."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return our folder in the cache of the datasets library; HF_HOME moves it.

    The library's own rule is repeated here, since importing it takes a second.
    """
    above = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = Path(os.environ.get("HF_HOME", above / "huggingface")).expanduser()
    return Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")) / "rlhf-pipeline"
