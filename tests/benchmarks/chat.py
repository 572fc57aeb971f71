"""Memory and time of `rlhf chat` with six adapters on one real base, in one run.

    python tests/benchmarks/chat.py --model DIR --data DIR --folder DIR

SFT, four DPO policies of different learning rates and a reward model are trained for one step each, all as adapters on
the base; then all of them are loaded as the command loads them. Memory is the bytes of all storages of parameters and
buffers, against those of the base alone. Times are those of loading, and of one answer of each policy with its figures.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
POLICIES = ["sft", "dpo1", "dpo2", "dpo3", "dpo4"]


def make_run(folder: Path, model: Path, data: Path) -> Path:
    """A config whose stages train one step each."""
    from ruamel.yaml import YAML

    training = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "learning_rate": 1e-3,
    }
    length = {"max_length": 192}
    stages = {
        "sft": {"data": "instructions", "init": "base", "training": length},
        "reward": {"data": "comparisons", "training": length},
    }
    for number, name in enumerate(POLICIES[1:], 1):
        own = length | {"learning_rate": number * 1e-3}
        stages[name] = {"type": "dpo", "data": "comparisons", "training": own}
    config = {
        "name": "chat",
        "gate": "off",
        "run_dir": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "training": training,
        "checks": {"too_long": None},
        "data": {
            "instructions": {"path": str(data / "alpaca_en_demo.json"), "limit": 20},
            "comparisons": {"path": str(data / "dpo_en_demo.json"), "limit": 20},
        },
        "stages": stages,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "chat.yaml"
    YAML().dump(config, path)
    return path


def storages(*models) -> int:
    """Bytes of the different storages of all parameters and buffers."""
    tensors = [tensor for model in models for tensor in [*model.parameters(), *model.buffers()]]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(run_dir: Path) -> None:
    """Load all, talk to all, and print the figures."""
    from pipeline.chat import command, selection
    from pipeline.chat.session import Settings
    from pipeline.models.loading import Loader
    from pipeline.show.screen import open_console

    run = selection.open_run(run_dir)
    started = time.time()
    session = command._opened(run, POLICIES, "reward", False, open_console())
    print(f"loading: {time.time() - started:.1f} s")
    shared = {id(one): one.model for one in (session.models.policy(name).shared for name in POLICIES)}
    assert len(shared) == 1
    base = storages(Loader(run.recorded.model["path"]).causal(run.recorded.model["path"]))
    whole = storages(*shared.values(), session.reward)
    ratio = whole / base
    print(
        f"memory: {whole / 2**20:.0f} MiB with {len(POLICIES) + 1} adapters, base {base / 2**20:.0f} MiB: {ratio:.3f}"
    )
    assert ratio <= 1.3
    last = time.time()

    def tell(name, answer, is_complete):
        nonlocal last
        if is_complete:
            print(f"{name}: {answer.figures}, {time.time() - last:.1f} s")
            last = time.time()

    session.ask("Why is the sea salty?", Settings(0.0, 32, 0), tell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a real chat model")
    parser.add_argument("--data", type=Path, required=True, help="folder with alpaca_en_demo.json, dpo_en_demo.json")
    parser.add_argument("--folder", type=Path, required=True, help="folder to work in")
    arguments = parser.parse_args()
    from pipeline import stage
    from pipeline.config.load import load

    config = load(make_run(arguments.folder, arguments.model.resolve(), arguments.data.resolve()))
    for name in config.stages:
        stage.run(config, name)
    measure(config.run_path)


if __name__ == "__main__":
    main()
