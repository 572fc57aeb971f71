"""End `rlhf run` at a `kill` (SIGTERM) and a closed terminal (SIGHUP) as at Ctrl-C, each with its exit code."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """Report that a signal other than that of Ctrl-C asked the process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stopped(Exception):
    """Report that a signal ended the run; the exit code is 128 plus the signal's number, as in a shell."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for each signal that ends a run, and Stopped when it leaves the block.

    A signal that is ignored, as SIGHUP is under `nohup`, stays ignored.
    """
    owner = os.getpid()

    def interrupt(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker that was forked in the block: let it end as others do
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Interrupted(number)

    handlers = {number: signal.getsignal(number) for number in ENDING}
    replaced = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield
    except Interrupted as error:
        raise Stopped(error.number) from None
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
