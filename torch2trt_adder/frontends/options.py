"""What keyword options a function has, and which of them a misspelt one may stand for."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

# Read from torch2trt's **kwargs: the first two in tracing.py, the third by torch2trt itself.
_FROM_KWARGS = ("allow_constants", "fuse", "qat_mode")


def torch2trt_options(torch2trt: Callable[..., Any]) -> list[str]:
    """The options of the function torch2trt(module, inputs, ...), which swallows any other."""
    parameters = inspect.signature(torch2trt).parameters.values()
    named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return [name for name in named if name not in ("module", "inputs")] + list(_FROM_KWARGS)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The option that `name` may have been meant to be; None where none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, 0.6)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near!r}?"
