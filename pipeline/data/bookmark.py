"""Keep the place in a stream of text: which piece is trained on next, also after a checkpoint."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from datasets import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.config import graph
from pipeline.data.stream import Block, TextStream
from pipeline.system.json_object import JsonObject

STATE = "stream.json"


class Bookmark(TrainerCallback):
    """Hand out the pieces of a stream, save with every checkpoint which piece comes next, and go on there.

    `first_piece` is the piece that this process started with, at the step `first_step`.
    """

    def __init__(self, stream: TextStream):
        self.stream = stream
        self.first_piece = 0
        self.first_step = 0
        self.is_finished = False
        self._blocks = [Block()]  # that hold the pieces not trained on yet, and those read after them
        self._last = Block()

    def dataset(self) -> IterableDataset:
        """Return the pieces in the form that TRL takes: rows of `input_ids`."""
        return IterableDataset.from_generator(self.pieces)

    def pieces(self) -> Iterator[dict[str, list[int]]]:
        """Yield the pieces from the first one on; no piece once the last step is done."""
        if self.is_finished:
            return
        first = self._block_of(self.first_piece)
        self._blocks = []
        for block, pieces in self.stream.blocks(first):
            self._last = block
            if pieces:
                self._blocks.append(block)
            start = max(0, self.first_piece - block.piece)
            yield from ({"input_ids": ids} for ids in pieces[start:])

    def _block_of(self, piece: int) -> Block:
        """Return the block that a piece is in, or the last one before it."""
        return max((block for block in self._blocks if block.piece <= piece), key=lambda block: block.piece)

    def state(self, piece: int) -> JsonObject:
        """Return what `resume` needs to go on with a piece."""
        return {"piece": piece, "block": dataclasses.asdict(self._block_of(piece))}

    def resume(self, state: JsonObject) -> None:
        """Go on with the piece of a `state`."""
        self.first_piece = state["piece"]
        self._blocks = [Block(**state["block"])]

    def record(self) -> JsonObject:
        """Return what the manifest keeps of it: the documents read up to the last block, and those left out."""
        last = self._last
        return {"split": graph.TRAIN, "streamed": True, "read": last.documents, "dropped": last.dropped}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.first_step = state.global_step
        if state.global_step:
            self.resume(json.loads(_file(args, state).read_text(encoding="utf-8")))
        self.is_finished = state.global_step >= args.max_steps  # or the trainer would make one step more

    def _next_piece(self, args: TrainingArguments, state: TrainerState) -> int:
        """Return the piece that is trained on next. Every process passes over those of the others."""
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self.first_piece + (state.global_step - self.first_step) * per_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Forget the blocks before the next piece, which nothing will ask for again."""
        first = self._blocks.index(self._block_of(self._next_piece(args, state)))
        del self._blocks[:first]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if PartialState().is_main_process:
            place = self.state(self._next_piece(args, state))
            _file(args, state).write_text(json.dumps(place), encoding="utf-8")


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    """Return where the checkpoint of a step keeps its place in the stream."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
