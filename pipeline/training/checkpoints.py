"""Mid-stage checkpoints: which are complete, and which one to resume from.

A checkpoint counts as complete when its marker is there and every file is as the marker says. The marker is written
after everything else, so `kill -9` in the middle of a save leaves a checkpoint without one.
"""

import json
import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.system.digests import checksums
from pipeline.system.errors import UserError

MARKER = "complete.json"
IDENTITY = "identity.txt"
PROCESSES = "num_processes.txt"


class MarkComplete(TrainerCallback):
    """Write the marker once every process has saved its part."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        assert args.output_dir is not None, "every stage has one"
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        PartialState().wait_for_everyone()
        if PartialState().is_main_process and folder.is_dir():
            (folder / MARKER).write_text(json.dumps(checksums(folder, [folder])))
        PartialState().wait_for_everyone()


def _fault(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None: it is complete."""
    try:
        expected = json.loads((folder / MARKER).read_text())
    except FileNotFoundError:
        return "was not completed"
    except ValueError:
        return "has a damaged marker"
    actual = checksums(folder, [folder])
    damaged = [name for name, checksum in expected.items() if actual.get(name) != checksum]
    return f"is damaged ({damaged[0]})" if damaged else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_last(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was made after the last step of its training."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["global_step"] >= state["max_steps"]


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that can be resumed from; return with it a message for each newer one that cannot."""
    messages = []
    saves = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(saves, key=step_of, reverse=True):
        fault = _fault(path)
        if fault is None:
            return path, messages
        messages.append(f"{path.name} {fault}: falling back to the one before it")
    return None, messages


def check_processes(folder: Path, stage: str, identity: str, num_processes: int) -> None:
    """Check that a stage can go on from its checkpoints with so many processes.

    The trainer finds its place in the data by the number of steps, and a step is one batch of every process.

    Raises:
        UserError: if they were made with another number.
    """
    stamp = folder / IDENTITY
    if not stamp.exists() or stamp.read_text() != identity or not any(folder.glob(f"checkpoint-*/{MARKER}")):
        return
    made_by = folder / PROCESSES
    before = made_by.read_text() if made_by.exists() else "an unknown number"
    if before != str(num_processes):
        raise UserError(
            f"the checkpoints of stage {stage!r} are of a training with {before} process(es), and now there are "
            f"{num_processes}: some rows would be trained on again, or never. Go on with {before}, or start from the "
            f"beginning: remove {folder}, or give `rlhf run CONFIG --redo {stage}`"
        )


def open_folder(folder: Path, identity: str, num_processes: int) -> bool:
    """Make the checkpoint folder ready for a stage with this identity and number of processes.

    Checkpoints of another config or other inputs are removed; returns whether there were any.
    """
    stamp = folder / IDENTITY
    foreign = folder.exists() and (not stamp.exists() or stamp.read_text() != identity)
    removed = foreign and any(folder.glob("checkpoint-*"))
    if foreign:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in ((folder / PROCESSES, str(num_processes)), (stamp, identity)):
        # Not written anew at every start: half written, they would cost the checkpoints beside them.
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
    return removed
