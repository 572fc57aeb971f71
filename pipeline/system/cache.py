"""Where prepared data and digests of large files are kept from run to run."""

from pathlib import Path

import datasets


def cache_folder() -> Path:
    """Where prepared data is kept from run to run."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "rlhf-pipeline"
