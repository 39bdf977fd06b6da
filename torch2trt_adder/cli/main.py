"""The command `torch2trt-adder`. Each subcommand is one call into another file.

Arguments and files are checked before torch is loaded, which takes seconds: `--help` and wrong usage answer at once.
"""

import argparse
import contextlib
import errno
import json
import pathlib
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from .. import load_public_names
from ..utils.files import check_apart, check_readable, check_writable
from . import streams
from .parser import WrongUsage, make_parser
from .sources import check_exportable, check_source
from .subcommands import run_export

_FAILED, _INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
        The exit code: 0 for success, 1 for a failure reported on stderr, 130 after Ctrl-C. Wrong usage raises SystemExit(2),
        and ``--help`` and ``--version`` SystemExit(0), as argparse does.
    """
    try:
        streams.open_all()
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: nobody reads any more
        streams.give_up_stdout()
        return _FAILED
    except OSError as error:  # `_run` has reported all others
        streams.give_up_stdout()
        streams.tell(f"error: standard output cannot be written ({error.strerror}).")
        return _FAILED
    except KeyboardInterrupt:
        streams.tell("error: interrupted")
        return _INTERRUPTED


def _run(arguments: list[str]) -> int:
    parser = make_parser()
    if not arguments:
        parser.print_help()
        return 0
    command = shlex.join(["torch2trt-adder", *arguments])
    report: dict[str, Any] = {"command": command, "versions": {}, "passed": False, "result": None}
    try:
        options = parser.parse_args(arguments)
    except WrongUsage as error:
        if "--json" in arguments:
            print(json.dumps({**report, "error": str(error)}), flush=True)
        raise
    # With --json stdout carries one JSON object; what people read goes to stderr.
    status = _FAILED
    with streams.stdout_to_stderr() if options.json else contextlib.nullcontext():
        try:
            _check_files(options)
            load_public_names()
            report["versions"] = _versions()
            streams.write_line(" | ".join(f"{name} {version}".strip() for name, version in report["versions"].items()))
            report["result"] = options.subcommand(options)
            report["passed"], status = True, 0
        except (BrokenPipeError, streams.StdoutError):
            raise
        except KeyboardInterrupt:
            report["error"], status = "interrupted", _INTERRUPTED
        except (Exception, SystemExit) as error:
            report["error"], report["result"] = _sentence(error), getattr(error, "result", None)
            if options.debug:
                traceback.print_exc()
        if "error" in report:
            streams.write_line()  # what was printed before comes first, where both go to one place
            streams.tell(f"error: {report['error']}")
        streams.write_line(f"{'PASSED' if report['passed'] else 'FAILED'} | {command}")
    if options.json:
        streams.write_line(json.dumps(report))
    return status


def _sentence(error: BaseException) -> str:
    """What went wrong, and where it is in the user's code, if it is there."""
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return "no space left where standard output, error or temporary files go."
    loading = sys.modules.get(f"{__package__}.loading")
    where = None if loading is None else loading.place(error)
    expected = isinstance(error, (RuntimeError, ValueError, TypeError, OSError, ImportError)) and str(error).strip()
    if loading is not None and (where is not None or not expected):
        text = f"the model's code raised {loading.describe(error)}" if where is not None else loading.describe(error)
        return f"{text}; --debug shows the traceback."
    return str(error) if expected else f"{type(error).__name__}: {error}"


def _check_files(options: argparse.Namespace) -> None:
    """What is to be read is there, and what is to be written can be, and replaces nothing that is read.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: two of them are one file, or the model is not one.
    """
    if "model" in options.reads:
        check_source(options.model, options.checkpoint, options.half)
        if options.subcommand is run_export:
            check_exportable(options.model)
    inputs, outputs = _paths(options, options.reads), _paths(options, options.writes)
    for path in inputs.values():
        check_readable(path)
    for path in outputs.values():
        check_writable(path)
    check_apart(outputs, inputs)


def _paths(options: argparse.Namespace, names: Mapping[str, str]) -> dict[str, pathlib.Path]:
    """The files among the options, by what they are."""
    values = {what: getattr(options, name) for name, what in names.items()}
    return {
        what: pathlib.Path(value)
        for what, value in values.items()
        if isinstance(value, pathlib.Path) or (isinstance(value, str) and value.endswith((".pt2", ".onnx")))
    }


def _versions() -> dict[str, str]:
    from . import info

    return info.versions()
