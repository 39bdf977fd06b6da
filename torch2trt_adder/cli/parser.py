"""The arguments of the command line."""

import argparse
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .. import __version__
from . import streams
from .subcommands import (
    run_bench,
    run_build,
    run_check,
    run_convert,
    run_demo,
    run_export,
    run_info,
    run_inspect,
    run_triton,
)

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


class WrongUsage(SystemExit):
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
        raise WrongUsage(message)


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "torch2trt-adder",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torch2trt-adder {__version__}")
    subcommands = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)

    def subcommand(
        name: str,
        run: Callable[[argparse.Namespace], Any],
        about: str,
        more: str = "",
        reads: Mapping[str, str] | None = None,
        writes: Mapping[str, str] | None = None,
    ) -> argparse.ArgumentParser:
        description = f"{about[0].upper()}{about[1:]}.{more}"
        added = subcommands.add_parser(name, help=about, description=description, epilog=_EPILOG)
        added.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
        added.add_argument("--debug", action="store_true", help="after a failure, its traceback on stderr")
        added.set_defaults(subcommand=run, reads=reads or {}, writes=writes or {})
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

    def fusion(added: argparse.ArgumentParser) -> None:
        text = "let adder layers compute the BatchNorm, residual sum and ReLU that follow them"
        added.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=False, help=text)

    def fp16(added: argparse.ArgumentParser) -> None:
        added.add_argument("--fp16", action="store_true", help="allow float16, except for the sums of adder layers")

    def host_code(added: argparse.ArgumentParser) -> None:
        text = "allow the plan to bring its own code (build --embed-plugin); only for plans that you trust"
        added.add_argument("--host-code", action="store_true", help=text)

    plan: dict[str, Any] = {"type": pathlib.Path, "metavar": "PLAN"}
    network, engine = {"model": "the model", "checkpoint": "the checkpoint"}, {"plan": "the engine"}
    function = "package.module:function, called without arguments"

    about = "train a small AdderNet on handwritten digits; with a GPU and TensorRT, convert it and compare"
    demo = subcommand(
        "demo", run_demo, about, " Under a minute on two CPU cores.", writes={"checkpoint": "the checkpoint"}
    )
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

    subcommand(
        "info", run_info, "show torch, GPU, TensorRT, plugin library and torch2trt, and what each of them allows"
    )

    convert = subcommand(
        "convert",
        run_convert,
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
    fusion(convert)
    convert.add_argument("--route", choices=_ROUTES, default="auto", help="default: torch2trt where it can, else ONNX")

    export = subcommand(
        "export",
        run_export,
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

    build = subcommand(
        "build",
        run_build,
        "build a TensorRT engine of an ONNX file",
        reads={"file": "the ONNX file"},
        writes={**engine, "timing_cache": "the timing cache"},
    )
    build.add_argument("file", type=pathlib.Path, metavar="ONNX", help="written by export, or any other")
    build.add_argument("plan", help="the engine to write", **plan)
    text = "of a dynamic axis by its name (or input:axis): its smallest, most frequent and largest extent"
    build.add_argument("--range", type=_named_range, action="append", default=[], metavar="batch=1:8:64", help=text)
    fp16(build)
    fusion(build)
    build.add_argument("--workspace", type=_positive, metavar="MIB", help="scratch memory that the engine may take")
    build.add_argument("--timing-cache", type=pathlib.Path, metavar="FILE", help="makes the next build faster")
    build.add_argument("--embed-plugin", action="store_true", help="put the plugin library into the plan")
    build.add_argument("--verbose", action="store_true", help="TensorRT's whole log on stderr")

    check = subcommand(
        "check",
        run_check,
        "compare an engine with PyTorch or ONNX Runtime on random inputs",
        reads={**network, **engine},
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

    bench = subcommand(
        "bench", run_bench, "time an engine: percentiles of its latency, and its throughput", reads=engine
    )
    bench.add_argument("plan", **plan)
    shape(bench, "; default: what the engine is tuned for")
    bench.add_argument("--runs", type=_positive, default=200, help="default: %(default)s")
    bench.add_argument("--cuda-graph", action="store_true", help="record the launches and replay them")
    host_code(bench)

    inspect = subcommand(
        "inspect",
        run_inspect,
        "list an engine's layers: which are adder layers, their precision and time",
        reads=engine,
    )
    inspect.add_argument("plan", **plan)
    shape(inspect, "; default: what the engine is tuned for")
    host_code(inspect)

    triton = subcommand(
        "triton", run_triton, "write a model repository for NVIDIA's Triton Inference Server", reads=engine
    )
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
    low, opt, high = map(int, numbers)
    return name, (low, opt, high)


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
