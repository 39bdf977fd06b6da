"""Standard input, output and error where they are closed, full, left by their reader, or reserved for JSON."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator


class StdoutError(OSError):
    """Standard output is closed or full."""


def open_all() -> None:
    """Puts /dev/null into the place of closed standard streams, which the next file opened would take.

    Raises:
        StdoutError: standard output is closed, so nobody could see a result.
    """
    closed = sys.stdout is None
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  (it stays open)
    if closed:
        raise StdoutError(errno.EBADF, os.strerror(errno.EBADF))


def give_up_stdout() -> None:
    """What is left to write goes nowhere, so that the interpreter's last flush does not fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(text: str) -> None:
    """Prints a line to stderr, if it goes there at all."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def write_line(*text: str) -> None:
    """Prints a line, if any, and flushes.

    Raises:
        StdoutError: standard output is full.
    """
    try:
        if text:
            print(*text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if sys.stdout is sys.stderr:  # see `stdout_to_stderr`: the result comes elsewhere
            return
        raise StdoutError(error.errno, error.strerror) from error


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What Python code prints goes to stderr, and so does what libraries and other programs write to stdout."""
    real = sys.stdout is sys.__stdout__  # pytest's are not
    saved = os.dup(1) if real else -1
    if real:
        os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if real:
            os.dup2(saved, 1)
            os.close(saved)
