"""The file in which a report keeps its completions, side by side."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_samples(folder: Path, prompts: Iterable[Mapping[str, object]]) -> None:
    """Write samples.jsonl: for each prompt one line of JSON, as UTF-8."""
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for prompt in prompts:
            file.write(json.dumps(prompt, ensure_ascii=False) + "\n")
