"""Progress of long work on stderr: a bar that is redrawn on a terminal, and now and then a plain line in a log."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

_PATIENCE = 2.0  # seconds that need no line
_REDRAW, _NEXT_LINE = 0.2, 10.0  # seconds: on a terminal, and in a log, which is not to fill up


class Progress:
    """What `elapsed` shows. Any thread may report to it."""

    def __init__(self, title: str, total: int = 0, unit: str = "steps") -> None:
        self._title, self._unit, self._start = title, unit, time.monotonic()
        self._phase, self._done, self._total, self._note = "", 0, total, ""

    def phase(self, name: str, steps: int) -> None:
        """The next part of the work begins, of so many steps."""
        self._phase, self._done, self._total = name, 0, steps

    def step(self, note: str = "") -> None:
        """One step is done; `note` is shown until the next, as "loss 0.25"."""
        self._done, self._note = self._done + 1, note

    def __str__(self) -> str:
        name = self._phase or self._unit
        steps = f", {name} {self._done}/{self._total}" if self._total else ""
        return f"{self._title}: {time.monotonic() - self._start:.0f} s{steps}{self._note and f', {self._note}'}"


@contextlib.contextmanager
def elapsed(title: str, total: int = 0, unit: str = "steps") -> Iterator[Progress]:
    """Shows `title`, the seconds that have passed, and the steps that are reported, once two seconds have passed.

    Args:
        title: of the work, as "Building x.plan".
        total: how many steps it has, if that is known beforehand; a log then also has a last line.
        unit: what a step is, in the plural.

    Yields:
        The object to report steps to.
    """
    progress, end = Progress(title, total, unit), threading.Event()
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    thread = threading.Thread(target=_draw if on_terminal else _log, args=(progress, end), daemon=True)
    thread.start()
    try:
        yield progress
        if total and not on_terminal:
            _line(progress)
    finally:
        end.set()
        thread.join()


def _draw(progress: Progress, end: threading.Event) -> None:
    if end.wait(_PATIENCE):
        return
    from tqdm import tqdm  # keeps its line apart from what `tqdm.write` and other bars show

    # Terminals of containers may have no size, for which tqdm would show nothing.
    size = {} if all(os.get_terminal_size(sys.stderr.fileno())) else {"ncols": 80, "nrows": 24}
    with tqdm(bar_format="{desc}", leave=False, **size) as bar:
        while True:
            bar.set_description_str(f"{progress}{_bar(progress)}")
            if end.wait(_REDRAW):
                return


def _bar(progress: Progress, width: int = 20) -> str:
    if not progress._total:
        return ""
    filled = min(width, width * progress._done // progress._total)
    return f" [{'#' * filled}{'.' * (width - filled)}]"


def _log(progress: Progress, end: threading.Event) -> None:
    interval = _PATIENCE
    while not end.wait(interval):
        _line(progress)
        interval = _NEXT_LINE


def _line(progress: Progress) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr is full or closed, which must not end the work
        if sys.stderr is not None:
            print(progress, file=sys.stderr, flush=True)
