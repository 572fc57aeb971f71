"""Turn off what libraries print about themselves; import this before them."""

import logging
import os
import warnings

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
# Deprecations inside TRL's and transformers' own calls; a user of this tool cannot act on them.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")
# bitsandbytes announces optional CPU kernels it did not find.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Of transformers' warnings, those that TRL's own calls cause.
EXPECTED = ("mtime may not be reliable", "Passing `generation_config` together with", "Caching is incompatible with")


def _unexpected(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in EXPECTED)


def quieten_transformers() -> None:
    """Drop expected warnings and the bars of loading and saving; call this once transformers can be imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_unexpected)
