"""One split for a whole run: which prompts are evaluated on, so that no stage trains on them.

A prompt is known by its first user message, whatever the spacing and case; a dialogue and its continuations are thus
on one side. The split depends on the prompt alone: not on the order of rows, nor on machine, seed or processes.
"""

import hashlib
import unicodedata

import numpy as np

from pipeline.data.faults import Row
from pipeline.schema import RunConfig, TrainingStage, datasets

TRAIN, HELD_OUT = "train", "held-out"


def key(row: Row) -> int:
    """The 64-bit key of a canonical row's prompt; of raw text, the text's."""
    text = row.get("text") or next((m["content"] for m in row["prompt"] if m["role"] == "user"), "")
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return hash64(" ".join(plain.split()))


def hash64(*texts: str) -> int:
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def is_below(keys: np.ndarray, share: float) -> np.ndarray:
    """Whether each key (uint64) belongs to the held-out `share` of all possible keys."""
    return keys < np.uint64(int(share * 2**64))


def role_split(role: str, trains: bool) -> str:
    """The side of the split that a stage's dataset gives by its role: `data` of a stage that trains is trained on."""
    return TRAIN if trains and role == "data" else HELD_OUT


def uses(config: RunConfig, split: str) -> list[str]:
    """The datasets of a run that are read on one side of the split, in order."""
    found = [
        dataset
        for stage in config.stages.values()
        for role, dataset in datasets(stage).items()
        if role_split(role, isinstance(stage, TrainingStage)) == split
    ]
    return list(dict.fromkeys(found))


def is_shared(config: RunConfig, dataset: str) -> bool:
    """Whether a dataset is split: some stage trains on it and some stage evaluates on it."""
    return dataset in uses(config, TRAIN) and dataset in uses(config, HELD_OUT)


def evaluated_beside(config: RunConfig, dataset: str) -> list[str]:
    """The other datasets that some stage evaluates on: for raw text those of raw text, for prompts those of prompts."""
    texts = {name for s in config.stages.values() if s.type == "pretrain" for name in datasets(s).values()}
    others = [other for other in uses(config, HELD_OUT) if other != dataset]
    return [other for other in others if (other in texts) == (dataset in texts)]
