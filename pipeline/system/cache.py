"""Name the folder where prepared data and digests of large files are kept from run to run."""

from pathlib import Path

from datasets import config


def cache_folder() -> Path:
    """Return our folder in the cache of the datasets library; HF_HOME moves it."""
    return Path(config.HF_DATASETS_CACHE) / "rlhf-pipeline"
