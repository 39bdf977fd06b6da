"""The command `torch2trt-adder`. Each verb is one call into another file."""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import __version__, commands, converter, library, plugin, torch_tensorrt_error, triton

_DESCRIPTION = """\
Adder networks (AdderNet) on PyTorch and TensorRT. In Python:

    import torch2trt_adder                         # also registers the TensorRT plugin and the torch2trt converter
    from torch2trt import torch2trt
    model_trt = torch2trt(model, [x])              # any network with adder layers
    model_trt = torch2trt_adder.convert(model, [x])    # the same, compared with PyTorch; where torch2trt cannot, through ONNX

    path = torch2trt_adder.export_onnx(model, x, "model.onnx", {0: "batch"})
    torch2trt_adder.build_engine(path, "model.plan", {"batch": (1, 8, 64)})
    model_trt = torch2trt_adder.Engine("model.plan")   # needs TensorRT alone

In the shell:

    torch2trt-adder convert mypackage.models:make model.plan --shape 1x3x224x224 --dynamic 0=1:8:64
    torch2trt-adder bench model.plan
"""
_EPILOG = "exit codes: 0 passed, 1 failed (the reason is on stderr), 2 wrong usage"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; 0 for success, 1 for a failure that was told on stderr. argparse exits with 2 on wrong usage."""
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `... | head`: nobody reads any more, nor may the interpreter's last flush fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    command = shlex.join(["torch2trt-adder", *arguments])
    # With --json stdout carries one JSON object; what people read goes to stderr.
    report: dict[str, Any] = {"command": command, "versions": _versions(), "passed": False, "result": None}
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        versions = " | ".join(f"{name} {version}".strip() for name, version in report["versions"].items())
        print(versions, flush=True)
        try:
            report["result"] = options.verb(options)
            report["passed"] = True
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            sys.stdout.flush()
            print("error: interrupted", file=sys.stderr)
            report["error"] = "interrupted"
        except (RuntimeError, ValueError, TypeError, OSError, ImportError) as error:
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr)
            report["error"], report["result"] = str(error), getattr(error, "result", None)
        except Exception as error:  # nobody's fault that has a sentence yet
            sys.stdout.flush()
            traceback.print_exc()
            report["error"] = f"{type(error).__name__}: {error}"
        print(f"{'PASSED' if report['passed'] else 'FAILED'} | {command}")
    if options.json:
        print(json.dumps(report))
    return 0 if report["passed"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "torch2trt-adder",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torch2trt-adder {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], Any], about: str, more: str = ""
    ) -> argparse.ArgumentParser:
        description = f"{about[0].upper()}{about[1:]}.{more}"
        added = verbs.add_parser(name, help=about, description=description, epilog=_EPILOG)
        added.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
        added.set_defaults(verb=run)
        return added

    def model(added: argparse.ArgumentParser, what: str) -> None:
        added.add_argument("model", metavar="MODEL", help=what)
        added.add_argument(
            "--checkpoint", type=pathlib.Path, metavar="FILE", help="a state_dict for the function's network"
        )
        added.add_argument("--half", action="store_true", help="the function's network in float16")

    def shape(added: argparse.ArgumentParser, which: str) -> None:
        text = f"of one input, repeated for each, as 1x3x224x224{which}"
        added.add_argument("--shape", type=_shape, action="append", default=[], metavar="NxCxHxW", help=text)

    def fp16(added: argparse.ArgumentParser) -> None:
        added.add_argument("--fp16", action="store_true", help="allow float16, except for the sums of adder layers")

    def host_code(added: argparse.ArgumentParser) -> None:
        text = "allow the plan to bring its own code (build --embed-plugin); only for plans that you trust"
        added.add_argument("--host-code", action="store_true", help=text)

    plan = {"type": pathlib.Path, "metavar": "PLAN"}
    function = "package.module:function, called without arguments"

    about = "train a small AdderNet on handwritten digits; with a GPU and TensorRT, convert it and compare"
    demo = verb("demo", _demo, about, " Under a minute on two CPU cores.")
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

    convert = verb("convert", _convert, "make a TensorRT engine of a network, and compare it with PyTorch")
    model(convert, f"{function}, or a .pt2 or .onnx file")
    convert.add_argument("plan", help="the engine to write", **plan)
    shape(convert, "")
    text = "let an axis of every input vary: its number and its smallest, most frequent and largest extent"
    convert.add_argument("--dynamic", type=_axis_range, action="append", default=[], metavar="0=1:8:64", help=text)
    fp16(convert)
    convert.add_argument("--route", choices=converter.ROUTES, default="auto", help="default: torch2trt where it can, else ONNX")

    export = verb("export", _export, "write a network to one ONNX file that TensorRT and ONNX Runtime read")
    model(export, f"{function}, or a .pt2 file")
    export.add_argument("file", type=pathlib.Path, metavar="ONNX", help="the file to write")
    shape(export, "")
    text = "let an axis of every input vary: its number and its name"
    export.add_argument("--dynamic", type=_axis_name, action="append", default=[], metavar="0=batch", help=text)
    export.add_argument("--opset", type=_positive, help="default: 17, which TensorRT 8.6 reads, or 18 if need be")
    export.add_argument("--no-check", action="store_true", help="do not compare ONNX Runtime with PyTorch")

    build = verb("build", _build, "build a TensorRT engine of an ONNX file")
    build.add_argument("file", type=pathlib.Path, metavar="ONNX", help="written by export, or any other")
    build.add_argument("plan", help="the engine to write", **plan)
    text = "of a dynamic axis by its name (or input:axis): its smallest, most frequent and largest extent"
    build.add_argument("--range", type=_named_range, action="append", default=[], metavar="batch=1:8:64", help=text)
    fp16(build)
    build.add_argument("--workspace", type=_positive, metavar="MIB", help="scratch memory that the engine may take")
    build.add_argument("--timing-cache", type=pathlib.Path, metavar="FILE", help="makes the next build faster")
    build.add_argument("--embed-plugin", action="store_true", help="put the plugin library into the plan")
    build.add_argument("--verbose", action="store_true", help="TensorRT's whole log on stderr")

    check = verb("check", _check, "compare an engine with PyTorch or ONNX Runtime on random inputs")
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

    bench = verb("bench", _bench, "time an engine: percentiles of its latency, and its throughput")
    bench.add_argument("plan", **plan)
    shape(bench, "; default: what the engine is tuned for")
    bench.add_argument("--runs", type=_positive, default=200, help="default: %(default)s")
    bench.add_argument("--cuda-graph", action="store_true", help="record the launches and replay them")
    host_code(bench)

    inspect = verb("inspect", _inspect, "list an engine's layers: which are adder layers, their precision and time")
    inspect.add_argument("plan", **plan)
    shape(inspect, "; default: what the engine is tuned for")
    host_code(inspect)

    triton = verb("triton", _triton, "write a model repository for NVIDIA's Triton Inference Server")
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
    return name, tuple(map(int, numbers))


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


# ---- verbs


def _export(o: argparse.Namespace) -> dict[str, Any]:
    return commands.export(o.model, o.file, o.shape, dict(o.dynamic), o.checkpoint, o.half, o.opset, not o.no_check)


def _build(o: argparse.Namespace) -> dict[str, Any]:
    ranges = dict(o.range)
    return commands.build(o.file, o.plan, ranges, o.fp16, o.workspace, o.timing_cache, o.embed_plugin, o.verbose)


def _convert(o: argparse.Namespace) -> dict[str, Any]:
    return commands.convert(o.model, o.plan, o.shape, dict(o.dynamic), o.checkpoint, o.half, o.fp16, o.route)


def _check(o: argparse.Namespace) -> dict[str, Any]:
    return commands.check(
        o.model, o.plan, o.shape, o.samples, o.rtol, o.checkpoint, o.half, o.fp16 or o.half, o.host_code
    )


def _bench(o: argparse.Namespace) -> dict[str, Any]:
    return commands.bench(o.plan, o.shape, o.runs, o.cuda_graph, o.host_code)


def _inspect(o: argparse.Namespace) -> dict[str, Any]:
    return commands.inspect(o.plan, o.shape, o.host_code)


def _triton(o: argparse.Namespace) -> dict[str, Any]:
    return triton.write_repository(o.folder, o.plan, o.plan.stem if o.name is None else o.name, o.embedded)


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    from . import demo

    return demo.run(options.epochs, options.checkpoint, options.seed)


# ---- info


def _info(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """What there is, its version or state, and what it allows."""
    shown: dict[str, dict[str, str]] = {}

    def show(name: str, state: str, allows: str) -> None:
        shown[name] = {"state": state, "allows": allows}
        print(f"{name:<16}{state}\n{'':<16}{allows}")

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    where = "on the CPU and on the GPU." if gpus else "on the CPU; a GPU needs a CUDA build and an NVIDIA driver."
    show("torch", torch.__version__, f"adder2d and Adder2d, forward and AdderNet's gradients, {where}")
    for i in range(gpus):
        major, minor = torch.cuda.get_device_capability(i)
        state = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
        show(f"GPU {i}", state, "CUDA kernels and TensorRT engines; an engine runs on the kind of GPU that built it.")
    if not gpus:
        show("GPU", "none", "Without one, everything runs on the CPU except TensorRT engines.")

    problems = []
    allows = "Kernels and TensorRT plugin in one file, for trtexec, Triton and C++ too."
    try:
        library.load()
    except RuntimeError as error:
        problems.append(str(error))
        allows = "It cannot be used: no adder layer runs here."
    show("library", str(library.path()), allows)

    module, version = _tensorrt()
    if module is None:
        show("TensorRT", version, "pip install tensorrt; the plugin serves 8.5 to 11.")
    else:
        kind = "IPluginV3" if hasattr(module, "TensorRTPhase") else "IPluginV2DynamicExt"
        allows = f"The plugin {plugin.NAME}, version {plugin.VERSION}, is registered ({kind}): engines with adder layers load."
        try:
            plugin.register()
        except RuntimeError as error:
            problems += [] if problems else [str(error)]
            allows = f"The plugin {plugin.NAME} is not registered: no engine with adder layers loads."
        show("TensorRT", version, allows)

    reason = converter.missing("torch2trt")
    allows = "torch2trt(model, [x]) and convert(model, [x], route='torch2trt')."
    if reason is not None:
        through = " convert(model, [x]) goes through ONNX." if converter.missing("onnx") is None else ""
        allows = f"Not used. {reason}{through}"
    show("torch2trt", _distribution("torch2trt"), allows)
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    allows = "export_onnx with its check; build_engine and convert(model, [x], route='onnx') with a GPU and TensorRT."
    show("onnx", _distribution("onnx"), f"pip install {' '.join(absent)}." if absent else allows)
    allows = "The converter for torch.ops.torch2trt_adder.adder2d is registered."
    if not importlib.util.find_spec("torch_tensorrt"):
        allows = "Not needed; pip install torch_tensorrt for torch_tensorrt.compile(model, ir='dynamo', ...)."
    elif torch_tensorrt_error() is not None:
        allows = f"It cannot be imported: {torch_tensorrt_error()}."
    show("torch_tensorrt", _distribution("torch_tensorrt"), allows)
    if problems:
        raise commands.Failed(problems[0], shown)
    return shown


def _tensorrt() -> tuple[object | None, str]:
    """TensorRT's module and version, or None and why there is none."""
    if not importlib.util.find_spec("tensorrt"):
        return None, "not installed"
    try:
        module = importlib.import_module("tensorrt")
    except Exception as error:  # installed, but its libraries do not load, or are none for this machine
        return None, f"cannot be imported ({error})"
    return module, module.__version__


def _distribution(name: str) -> str:
    if not importlib.util.find_spec(name):
        return "not installed"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # on the path, but not through pip
        return "installed"


def _versions() -> dict[str, str]:
    return {
        "torch2trt-adder": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "TensorRT": _tensorrt()[1],
        "torch2trt": _distribution("torch2trt"),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
