"""Let the processes of one stage agree on a value, share out work, and bring the results together."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from pipeline.system.errors import UserError

Item = TypeVar("Item")
Value = TypeVar("Value")


def same_everywhere(look: Callable[[], Value]) -> Value:
    """Return in all processes what `look` returns in the main one: between two looks, files may change.

    Raises:
        UserError: in all processes, if `look` raises it in the main one. The other processes would wait for ever.
    """
    outcome: list[Value | UserError | None] = [None]
    if PartialState().is_main_process:
        try:
            outcome[0] = look()
        except UserError as error:
            outcome[0] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return cast("Value", outcome[0])


def share_of(items: Sequence[Item]) -> Sequence[Item]:
    """Return this process's share of the items, which must be the same in all processes.

    It is every n-th item of n processes, not a contiguous block: neighbours are often alike in length, and so each
    process gets some of the long ones. `PartialState.split_between_processes` gives blocks.
    """
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def gather_in_order(results: Sequence[Value]) -> list[Value]:
    """Return the results of all processes in the order of the items; all processes must call it.

    `results` has one result for each item of this process's share.
    """
    shares = gather_object([results])
    ordered: list[Value] = [None] * sum(map(len, shares))  # type: ignore
    for index, share in enumerate(shares):
        ordered[index :: len(shares)] = share
    return ordered
