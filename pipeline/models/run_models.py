"""Load the models of a run folder as its stages load them: its tokenizer, the device, precision and attention."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerFast

from pipeline.base import base_model
from pipeline.data import run_tokenizer
from pipeline.data.joints import eos_id, pad_id
from pipeline.models.loading import Loader
from pipeline.records.manifest import Manifest, Record
from pipeline.system import device
from pipeline.system.device import Device
from pipeline.system.errors import UserError, reason_of


def tokenizer(run_dir: Path, recorded: Manifest) -> PreTrainedTokenizerFast:
    """Load the run's tokenizer.

    Raises:
        UserError: if it cannot be read, or is not the one on record.
    """
    folder = run_dir / "tokenizer"
    opened = run_tokenizer.open_saved(folder, recorded.model.get("trust_remote_code", False))
    expected = recorded.tokenizer
    if expected is not None and run_tokenizer.fingerprint(opened) != expected.fingerprint:
        raise UserError(f"{folder} is not the tokenizer that this run was started with; restore it")
    return opened


def loader(recorded: Manifest, opened: PreTrainedTokenizerFast) -> Loader:
    """Return what loads the run's weights. `opened` is its tokenizer.

    The attention is the run's, but for flash attention on a CPU, which has none: there it is left to transformers.
    """
    attention = recorded.model.get("attn_implementation")
    place = PartialState().device
    assert place is not None, "accelerate names a device"
    if attention is not None and attention.startswith("flash_attention") and place.type == "cpu":
        attention = None
    return Loader(
        **base_model.options_on_record(recorded),
        attn_implementation=attention,
        pad_token_id=pad_id(opened),
        eos_token_id=eos_id(opened),
    )


def choose_device(recorded: Manifest, stages: Sequence[str]) -> Device:
    """Take the device that these stages ran on by their options, before anything is loaded."""
    records = [_trained(recorded.stages[stage]) for stage in stages]
    asks_for_cpu = any(record.config.get("training.use_cpu") for record in records)
    chosen = device.cpu("`use_cpu: true` in the run") if asks_for_cpu else device.of_torch()
    PartialState(cpu=chosen.kind == "cpu")
    return chosen


def _trained(record: Record) -> Record:
    """Return the record of the training: of a stage that was taken, the one in the other run."""
    while record.origin is not None:
        record = record.origin.stages[record.origin.stage]
    return record


@contextlib.contextmanager
def readable(full: str) -> Iterator[None]:
    """Turn what transformers raises at full weights that are not there into one message.

    Those of a base model on the hub may have gone from the cache.

    Raises:
        UserError: with the place and the reason.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{full}: cannot be loaded: {reason_of(error)}") from None
