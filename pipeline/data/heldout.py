"""Split prompts once for a whole run: those that are evaluated on are trained on by no stage.

A prompt is known by its first user message, whatever the spacing and case; a dialogue and its continuations are thus
on one side. The split depends on the prompt alone: not on the order of rows, nor on machine, seed or processes.
"""

import unicodedata

import numpy as np

from pipeline.data.faults import Row
from pipeline.system.digests import hash64


def key(row: Row) -> int:
    """Return the 64-bit key of a canonical row's prompt; of raw text, the text's."""
    text = row.get("text") or next((m["content"] for m in row["prompt"] if m["role"] == "user"), "")
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return hash64(" ".join(plain.split()))


def is_below(keys: np.ndarray, share: float) -> np.ndarray:
    """Tell of each key (uint64) whether it belongs to the held-out `share` of all possible keys."""
    return keys < np.uint64(int(share * 2**64))
