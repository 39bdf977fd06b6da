"""The command `torch2trt-adder`. Each verb is one call into another file.

Arguments and files are checked before torch is loaded, which takes seconds: `--help` and wrong usage answer at once.
"""

import argparse
import contextlib
import errno
import json
import math
import pathlib
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from . import __version__, _load, streams
from .files import check_apart, check_readable, check_writable
from .sources import check_exportable, check_source

_DESCRIPTION = """\
Adder networks (AdderNet) on PyTorch and TensorRT. In Python:

    import torch2trt_adder                         # also registers the TensorRT plugin and the torch2trt converter
    from torch2trt import torch2trt
    model_trt = torch2trt(model, [x])              # any network with adder layers
    model_trt = torch2trt_adder.convert(model, [x])    # the same, compared with PyTorch; where torch2trt cannot, through ONNX

    path = torch2trt_adder.export_onnx(model, x, "model.onnx", {0: "batch"})
    torch2trt_adder.build_engine(path, "model.plan", {"batch": (1, 8, 64)})
    model_trt = torch2trt_adder.Engine("model.plan")   # needs only TensorRT

In the shell:

    torch2trt-adder convert mypackage.models:make model.plan --shape 1x3x224x224 --dynamic 0=1:8:64
    torch2trt-adder bench model.plan
"""
_EPILOG = """\
exit codes: 0 passed; 1 failed, the reason is on stderr; 2 wrong usage; 130 interrupted (Ctrl-C)
"""
_ROUTES = ("auto", "torch2trt", "onnx")  # those of converter.ROUTES, which torch comes with
_FAILED, _INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

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
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    command = shlex.join(["torch2trt-adder", *arguments])
    report: dict[str, Any] = {"command": command, "versions": {}, "passed": False, "result": None}
    try:
        options = parser.parse_args(arguments)
    except _WrongUsage as error:
        if "--json" in arguments:
            print(json.dumps({**report, "error": str(error)}), flush=True)
        raise
    # With --json stdout carries one JSON object; what people read goes to stderr.
    status = _FAILED
    with streams.stdout_to_stderr() if options.json else contextlib.nullcontext():
        try:
            _check_files(options)
            _load()
            report["versions"] = _versions()
            streams.write_line(" | ".join(f"{name} {version}".strip() for name, version in report["versions"].items()))
            report["result"] = options.verb(options)
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
        if options.verb is _export:
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
        if isinstance(value, pathlib.Path) or isinstance(value, str) and value.endswith((".pt2", ".onnx"))
    }


class _WrongUsage(SystemExit):
    """argparse's exit, with its message."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        """Unlike argparse's, does not hide that stdout is full."""
        if file is sys.stdout:
            file.write(message)
        else:
            streams.tell(message.rstrip("\n"))

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        streams.tell(f"{self.prog}: error: {message}")
        raise _WrongUsage(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "torch2trt-adder",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torch2trt-adder {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(
        name: str,
        run: Callable[[argparse.Namespace], Any],
        about: str,
        more: str = "",
        reads: Mapping[str, str] | None = None,
        writes: Mapping[str, str] | None = None,
    ) -> argparse.ArgumentParser:
        description = f"{about[0].upper()}{about[1:]}.{more}"
        added = verbs.add_parser(name, help=about, description=description, epilog=_EPILOG)
        added.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
        added.add_argument("--debug", action="store_true", help="after a failure, its traceback on stderr")
        added.set_defaults(verb=run, reads=reads or {}, writes=writes or {})
        return added

    def model(added: argparse.ArgumentParser, what: str) -> None:
        added.add_argument("model", metavar="MODEL", help=what)
        added.add_argument(
            "--checkpoint", type=pathlib.Path, metavar="FILE", help="a state_dict for the function's network"
        )
        added.add_argument("--half", action="store_true", help="the function's network in float16")
        text = "let a .pt2 file run code of its own while it is loaded; only for files that you trust"
        added.add_argument("--trust", action="store_true", help=text)

    def shape(added: argparse.ArgumentParser, which: str) -> None:
        text = f"of one input, repeated for each, as 1x3x224x224{which}"
        added.add_argument("--shape", type=_shape, action="append", default=[], metavar="NxCxHxW", help=text)

    def fp16(added: argparse.ArgumentParser) -> None:
        added.add_argument("--fp16", action="store_true", help="allow float16, except for the sums of adder layers")

    def host_code(added: argparse.ArgumentParser) -> None:
        text = "allow the plan to bring its own code (build --embed-plugin); only for plans that you trust"
        added.add_argument("--host-code", action="store_true", help=text)

    plan: dict[str, Any] = {"type": pathlib.Path, "metavar": "PLAN"}
    network, engine = {"model": "the model", "checkpoint": "the checkpoint"}, {"plan": "the engine"}
    function = "package.module:function, called without arguments"

    about = "train a small AdderNet on handwritten digits; with a GPU and TensorRT, convert it and compare"
    demo = verb("demo", _demo, about, " Under a minute on two CPU cores.", writes={"checkpoint": "the checkpoint"})
    demo.add_argument(
        "--epochs", type=_positive, default=10, help="passes over the training digits (default: %(default)s)"
    )
    demo.add_argument("--seed", type=_seed, default=0, help="of the random numbers (default: %(default)s)")
    demo.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        default=pathlib.Path("addernet_mnist.pth"),
        metavar="FILE",
        help="where to write the trained parameters (default: %(default)s)",
    )

    verb("info", _info, "show torch, GPU, TensorRT, plugin library and torch2trt, and what each of them allows")

    convert = verb(
        "convert",
        _convert,
        "make a TensorRT engine of a network, and compare it with PyTorch",
        reads=network,
        writes=engine,
    )
    model(convert, f"{function}, or a .pt2 or .onnx file")
    convert.add_argument("plan", help="the engine to write", **plan)
    shape(convert, "")
    text = "let an axis of every input vary: its number and its smallest, most frequent and largest extent"
    convert.add_argument("--dynamic", type=_axis_range, action="append", default=[], metavar="0=1:8:64", help=text)
    fp16(convert)
    convert.add_argument("--route", choices=_ROUTES, default="auto", help="default: torch2trt where it can, else ONNX")

    export = verb(
        "export",
        _export,
        "write a network to one ONNX file that TensorRT and ONNX Runtime read",
        reads=network,
        writes={"file": "the ONNX file"},
    )
    model(export, f"{function}, or a .pt2 file")
    export.add_argument("file", type=pathlib.Path, metavar="ONNX", help="the file to write")
    shape(export, "")
    text = "let an axis of every input vary: its number and its name"
    export.add_argument("--dynamic", type=_axis_name, action="append", default=[], metavar="0=batch", help=text)
    export.add_argument("--opset", type=_positive, help="default: 17, which TensorRT 8.6 reads, or 18 if need be")
    export.add_argument("--no-check", action="store_true", help="do not compare ONNX Runtime with PyTorch")

    build = verb(
        "build",
        _build,
        "build a TensorRT engine of an ONNX file",
        reads={"file": "the ONNX file"},
        writes={**engine, "timing_cache": "the timing cache"},
    )
    build.add_argument("file", type=pathlib.Path, metavar="ONNX", help="written by export, or any other")
    build.add_argument("plan", help="the engine to write", **plan)
    text = "of a dynamic axis by its name (or input:axis): its smallest, most frequent and largest extent"
    build.add_argument("--range", type=_named_range, action="append", default=[], metavar="batch=1:8:64", help=text)
    fp16(build)
    build.add_argument("--workspace", type=_positive, metavar="MIB", help="scratch memory that the engine may take")
    build.add_argument("--timing-cache", type=pathlib.Path, metavar="FILE", help="makes the next build faster")
    build.add_argument("--embed-plugin", action="store_true", help="put the plugin library into the plan")
    build.add_argument("--verbose", action="store_true", help="TensorRT's whole log on stderr")

    check = verb(
        "check", _check, "compare an engine with PyTorch or ONNX Runtime on random inputs", reads={**network, **engine}
    )
    model(check, f"{function}, or a .pt2 or .onnx file")
    check.add_argument("plan", **plan)
    shape(check, "; default: what the engine is tuned for")
    check.add_argument("--samples", type=_positive, default=64, help="how many inputs (default: %(default)s)")
    text = (
        "the largest difference allowed, relative to the largest value; default: what rounding explains, for an ONNX "
        "file 1e-3, with --fp16 5e-2"
    )
    check.add_argument("--rtol", type=_tolerance, help=text)
    check.add_argument("--fp16", action="store_true", help="the engine was built with --fp16")
    host_code(check)

    bench = verb("bench", _bench, "time an engine: percentiles of its latency, and its throughput", reads=engine)
    bench.add_argument("plan", **plan)
    shape(bench, "; default: what the engine is tuned for")
    bench.add_argument("--runs", type=_positive, default=200, help="default: %(default)s")
    bench.add_argument("--cuda-graph", action="store_true", help="record the launches and replay them")
    host_code(bench)

    inspect = verb(
        "inspect", _inspect, "list an engine's layers: which are adder layers, their precision and time", reads=engine
    )
    inspect.add_argument("plan", **plan)
    shape(inspect, "; default: what the engine is tuned for")
    host_code(inspect)

    triton = verb("triton", _triton, "write a model repository for NVIDIA's Triton Inference Server", reads=engine)
    triton.add_argument("folder", type=pathlib.Path, metavar="DIR", help="the repository; other models in it stay")
    triton.add_argument("plan", help="built by the TensorRT of the Triton container", **plan)
    triton.add_argument("--name", help="of the model (default: the plan's)")
    triton.add_argument("--embedded", action="store_true", help="the plan carries its plugin (build --embed-plugin)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be 0 or more and below 2^63, got {value}")
    return value


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    extents = text.split("x")
    if not all(extent.isdigit() and int(extent) > 0 for extent in extents):
        raise argparse.ArgumentTypeError(f"must be extents with an x between them, as 1x3x224x224, got {text!r}")
    return tuple(map(int, extents))


def _named_range(text: str) -> tuple[str, tuple[int, int, int]]:
    name, _, extents = text.rpartition("=")
    numbers = extents.split(":")
    if not name or len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"must be an axis and three extents, as batch=1:8:64, got {text!r}")
    least, usual, most = map(int, numbers)
    return name, (least, usual, most)


def _axis_range(text: str) -> tuple[int, tuple[int, int, int]]:
    axis, extents = _named_range(text)
    if not axis.isdigit():
        raise argparse.ArgumentTypeError(f"must begin with the number of an axis, as 0=1:8:64, got {text!r}")
    return int(axis), extents


def _axis_name(text: str) -> tuple[int, str]:
    axis, _, name = text.partition("=")
    if not axis.isdigit() or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be the number of an axis and a name, as 0=batch, got {text!r}")
    return int(axis), name


# ---- verbs: each imports what it needs once the arguments are known to be right


def _export(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    dynamic = dict(o.dynamic)
    return commands.export(o.model, o.file, o.shape, dynamic, o.checkpoint, o.half, o.opset, not o.no_check, o.trust)


def _build(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    ranges = dict(o.range)
    return commands.build(o.file, o.plan, ranges, o.fp16, o.workspace, o.timing_cache, o.embed_plugin, o.verbose)


def _convert(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    dynamic = dict(o.dynamic)
    return commands.convert(o.model, o.plan, o.shape, dynamic, o.checkpoint, o.half, o.fp16, o.route, o.trust)


def _check(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    fp16 = o.fp16 or o.half
    return commands.check(o.model, o.plan, o.shape, o.samples, o.rtol, o.checkpoint, o.half, fp16, o.host_code, o.trust)


def _bench(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    return commands.bench(o.plan, o.shape, o.runs, o.cuda_graph, o.host_code)


def _inspect(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    return commands.inspect(o.plan, o.shape, o.host_code)


def _triton(o: argparse.Namespace) -> dict[str, Any]:
    from . import triton

    return triton.write_repository(o.folder, o.plan, o.plan.stem if o.name is None else o.name, o.embedded)


def _demo(o: argparse.Namespace) -> dict[str, Any]:
    from . import demo

    return demo.run(o.epochs, o.checkpoint, o.seed)


def _info(o: argparse.Namespace) -> dict[str, Any]:
    from . import info

    return info.show()


def _versions() -> dict[str, str]:
    from . import info

    return info.versions()
