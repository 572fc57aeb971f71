"""Build the class that takes a section of the config, or see that it is missing, before any compute."""

import contextlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Iterator

from pipeline.config.options import LIBRARY_SECTIONS, target_of, with_defaults
from pipeline.config.schema import Options
from pipeline.config.stage_types import config_class, row_of

# Variables by which a process knows that it is one of several.
_LAUNCHED = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_", "OMPI_", "MV2_")


@contextlib.contextmanager
def _without_a_trace() -> Iterator[None]:
    """Undo the side effects of creating TrainingArguments when the context ends.

    There are three: it joins torch.distributed if the environment says so, it sets ACCELERATE_* variables that every
    stage's process would inherit, and it fixes the device of this whole process.
    """
    from accelerate.state import AcceleratorState, PartialState

    environment = dict(os.environ)
    # upstream: accelerate has no public way to forget its state and take it back.
    states = (PartialState._shared_state, AcceleratorState._shared_state)
    before = [dict(state) for state in states]
    try:
        for name in environment:
            if name.startswith(_LAUNCHED):
                del os.environ[name]
        for state in states:
            state.clear()
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for state, content in zip(states, before, strict=True):
            state.clear()
            state.update(content)


def rehearse(kind: str, values: Options) -> str | None:
    """Build the class that takes the section, to let its own cross-field checks speak before any compute.

    Devices are left out of it (`use_cpu`), so that a plan can be made on another machine than the training.

    Returns the error's message, or None.
    """
    try:
        if kind in LIBRARY_SECTIONS:
            target_of(kind)(**values)
            return None
        device = {"use_cpu": True, "tf32": None, "output_dir": tempfile.gettempdir()}
        with _without_a_trace():
            args = config_class(kind)(**with_defaults(kind, values) | device)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        return " ".join(str(error).split())
    check = row_of(kind).check_options
    return None if check is None else check(args)


def missing_trainer(kind: str) -> str | None:
    """Say what a type, or variant, lacks in the version of TRL that is installed, and what to do; None: nothing."""
    row = row_of(kind)
    if row.trl_config is None or row.last_trl is None:
        return None
    module, _, name = row.trl_config.partition(":")
    with contextlib.suppress(ModuleNotFoundError):  # of the package that it was in
        if importlib.util.find_spec(module) is not None:
            return None
    trainer = name.replace("Config", "Trainer")
    fault = f"needs {trainer}, which TRL {importlib.metadata.version('trl')} does not have; {row.last_trl} was the last"
    return f"{fault}. Install that one (`pip install 'trl=={row.last_trl}.*'`), or {row.instead}"
