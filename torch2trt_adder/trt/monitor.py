"""TensorRT's log and the progress of a build."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tqdm import tqdm

from ..utils import interrupts
from ..utils.progress import elapsed
from . import api

# ---- TensorRT's log, and progress


@functools.cache
def logger(trt: ModuleType) -> Any:
    """The one logger of this process and TensorRT module: keeps errors for exceptions, shows all if `verbose`."""

    base: Any = trt.ILogger

    class Logger(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.verbose = False
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message.strip())
            if self.verbose:
                tqdm.write(f"[TensorRT {severity.name}] {message}", file=sys.stderr)

        def clear(self) -> None:
            self.errors.clear()

        def reasons(self) -> str:
            """The errors since `clear`, the last ones, as part of a sentence."""
            return "; ".join(dict.fromkeys(self.errors[-4:])) or "its log gives no reason."

    return Logger()


@contextlib.contextmanager
def build_progress(trt: ModuleType, config: Any, title: str, enabled: bool) -> Iterator[None]:
    """A bar of TensorRT's outer phases where it reports them, and the time in any case."""
    if not enabled:
        yield
        return
    with elapsed(title) as bar:
        if not api.reports_progress(trt):
            yield
            return

        base: Any = trt.IProgressMonitor

        class Monitor(base):
            def __init__(self) -> None:
                base.__init__(self)
                self.outer: str | None = None
                self.interrupted = False

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                if not parent:
                    self.outer = phase
                    bar.phase(phase, steps)

            def step_complete(self, phase: str, step: int) -> bool:
                if phase == self.outer:
                    bar.step()
                return not self.interrupted  # False cancels the build

            def phase_finish(self, phase: str) -> None:
                if phase == self.outer:
                    self.outer = None

        config.progress_monitor = monitor = Monitor()
        with interrupts.on_ctrl_c(lambda: setattr(monitor, "interrupted", True)):
            yield
        if monitor.interrupted:
            raise KeyboardInterrupt
