"""Ctrl-C where a library between the key and the caller would lose it."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_ctrl_c(note: Callable[[], None]) -> Iterator[None]:
    """Calls `note` instead of raising KeyboardInterrupt; only in the main thread, and where Python's own handler is set."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: note())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Raises KeyboardInterrupt in the end if the key came, whatever a library made of the exception.

    torch's exporter may raise another exception while it cleans up, and callbacks of weak references drop theirs.
    """
    came, earlier = False, sys.exc_info()[1]  # the caller may handle a KeyboardInterrupt already

    def note() -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    try:
        with on_ctrl_c(note):
            yield
    except Exception as error:
        if came or _interrupted(error, earlier):
            raise KeyboardInterrupt from None
        raise
    if came:
        raise KeyboardInterrupt


def _interrupted(error: BaseException, earlier: BaseException | None) -> bool:
    """Whether an exception came of a KeyboardInterrupt after `earlier`, as far as it tells."""
    seen: list[BaseException | None] = [None, earlier]
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or any(current is one for one in seen):
            continue
        if isinstance(current, KeyboardInterrupt):
            return True
        seen.append(current)
        pending += [current.__cause__, current.__context__]
    return False
