"""No shipped config repeats a default, but for a few keys that are listed with their reason.

Each config is loaded once without each of its keys, and must then be another config, or none.
"""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from ruamel.yaml import YAML

from pipeline.config import options
from pipeline.config.load import load
from pipeline.config.schema import RunConfig, TrainingStage
from pipeline.system.errors import UserError

Keys = tuple[str | int, ...]

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = "quickstart.yaml"
# Options of TRL and PEFT, by the last part of their key, that say what they would be without them, and why they stay.
_CITED = "a recipe gives the number, and a comment says which"
_SIZE = "memory, the batch or the number of steps is worked out from it"
REPEATED_OPTIONS = {
    "beta": _CITED,
    "kl_coef": _CITED,
    "lam": _CITED,
    "learning_rate": _CITED,
    "lr_scheduler_type": _CITED,
    "missing_eos_penalty": _CITED,
    "num_generations": _CITED,
    "num_iterations": _CITED,
    "num_ppo_epochs": _CITED,
    "temperature": _CITED,
    "max_length": _SIZE,
    "num_mini_batches": _SIZE,
    "per_device_train_batch_size": _SIZE,
}
# A finished run of the quickstart would train again without some of these.
REPEATED_BY_THE_QUICKSTART = {
    "beta",
    "gradient_accumulation_steps",
    "local_rollout_forward_batch_size",
    "logging_steps",
    "lora_dropout",
    "missing_eos_penalty",
    "num_sample_generations",
    "num_train_epochs",
    "packing",
    "packing_strategy",
    "per_device_train_batch_size",
    "save_strategy",
}


def leaves(node: Any, above: Keys = ()) -> Iterator[Keys]:
    """The keys that lead to each value of nested sections and lists of sections."""
    children: list[tuple[str | int, Any]] = []
    if isinstance(node, dict):
        children = list(node.items())
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        children = list(enumerate(node))
    if not children:
        yield above
    for key, child in children:
        yield from leaves(child, (*above, key))


def load_without(text: dict[str, Any], keys: Keys, path: Path) -> RunConfig | None:
    """The config without one key; None if it is not valid then."""
    changed = copy.deepcopy(text)
    section: Any = changed
    for key in keys[:-1]:
        section = section[key]
    del section[keys[-1]]
    YAML().dump(changed, path)
    try:
        return load(path)
    except UserError:
        return None


def resolved(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(exclude={"source"})


def with_library_defaults(config: RunConfig) -> dict[str, Any]:
    """The resolved stages, with the defaults of TRL and PEFT beneath their options."""
    adapter = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    stages = config.model_dump()["stages"]
    for name, stage in config.stages.items():
        if isinstance(stage, TrainingStage):
            stages[name]["training"] = options.effective(stage.kind, stage.training)
            stages[name]["lora"] = stage.lora and adapter | stage.lora
    return stages


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_no_shipped_config_repeats_a_default(tmp_path, name):
    """Without any one of its keys it is another config, or none."""
    text = YAML(typ="safe").load(CONFIGS / name)
    shipped = load(CONFIGS / name)
    own: set[str] = set()
    library: set[str] = set()
    num_valid = 0
    for keys in leaves(text):
        without = load_without(text, keys, tmp_path / name)
        if without is None:
            continue
        num_valid += 1
        dotted = ".".join(map(str, keys))
        if resolved(without) == resolved(shipped):
            own.add(dotted)
        elif {"training", "lora"} & set(keys) and with_library_defaults(without) == with_library_defaults(shipped):
            library.add(dotted.rpartition(".")[2])
    assert num_valid >= 20
    assert own == set()
    if name == QUICKSTART:
        assert library == REPEATED_BY_THE_QUICKSTART
    else:
        assert library <= REPEATED_OPTIONS.keys()
