"""What the processes of one stage agree on."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def same_everywhere(look: Callable[[], Any]) -> Any:
    """What the main process finds, in all of them: files may change between two processes' looks."""
    found = [look() if PartialState().is_main_process else None]
    broadcast_object_list(found)
    return found[0]
