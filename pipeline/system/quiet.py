"""Turn off what libraries print about themselves; import this before them."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # TRL imports wandb where it is installed
# Deprecations inside TRL's and transformers' own calls; a user of this tool cannot act on them.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")
# bitsandbytes announces optional CPU kernels it did not find.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Of transformers' warnings, those that TRL's own calls cause.
EXPECTED = ("mtime may not be reliable", "Passing `generation_config` together with", "Caching is incompatible with")


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in EXPECTED)


def quieten_transformers() -> None:
    """Drop expected warnings and the bars of loading and saving; call this once transformers can be imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_is_unexpected)


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Silence what libraries log and warn of in a command that trains nothing.

    Its own message says what is wrong; a library's line above it would say the same in other words, twice. Stages run
    in processes of their own and are not concerned. Python's `-W` and PYTHONWARNINGS go before this.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
