"""The command `torch2trt-adder`. Each verb is one call into another file."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence

import torch

from . import __version__, converter, library, plugin

_DESCRIPTION = """\
Adder networks (AdderNet) on PyTorch and TensorRT. In Python:

    import torch2trt_adder                         # also registers the TensorRT plugin and the torch2trt converter
    from torch2trt import torch2trt
    model_trt = torch2trt(model, [x])              # any network with adder layers
    model_trt = torch2trt_adder.convert(model, [x])    # the same, checked against PyTorch
"""
_EPILOG = "exit codes: 0 passed, 1 failed (the reason is on stderr), 2 wrong usage"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; 0 for success, 1 for a failure that was told on stderr. argparse exits with 2 on wrong usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    command = shlex.join(["torch2trt-adder", *arguments])
    print(_versions(), flush=True)
    try:
        options.verb(options)
    except (RuntimeError, ValueError, TypeError, OSError, ImportError) as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        print(f"FAILED | {command}")
        return 1
    print(f"PASSED | {command}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "torch2trt-adder",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torch2trt-adder {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    about = "train a small AdderNet on handwritten digits; with a GPU and TensorRT, convert it and compare"
    demo = verbs.add_parser(
        "demo",
        help=about,
        description=f"{about[0].upper()}{about[1:]}. Under a minute on two CPU cores.",
        epilog=_EPILOG,
    )
    demo.add_argument(
        "--epochs", type=_positive, default=8, help="passes over the training digits (default: %(default)s)"
    )
    demo.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        default=pathlib.Path("addernet_mnist.pth"),
        metavar="FILE",
        help="where to write the trained parameters (default: %(default)s)",
    )
    demo.set_defaults(verb=_demo)

    about = "show torch, GPU, TensorRT, plugin library and torch2trt, and what each of them allows"
    info = verbs.add_parser("info", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=_EPILOG)
    info.set_defaults(verb=_info)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    demo.run(options.epochs, options.checkpoint)


# ---- info


def _info(options: argparse.Namespace) -> None:
    """What there is, its version or state, and what it allows."""

    def show(name: str, state: str, allows: str) -> None:
        print(f"{name:<11}{state}\n{'':<11}{allows}")

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    where = "on the CPU and on the GPU." if gpus else "on the CPU; a GPU needs a CUDA build and an NVIDIA driver."
    show("torch", torch.__version__, f"adder2d and Adder2d, forward and AdderNet's gradients, {where}")
    for i in range(gpus):
        major, minor = torch.cuda.get_device_capability(i)
        state = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
        show(f"GPU {i}", state, "CUDA kernels and TensorRT engines; an engine runs on the kind of GPU that built it.")
    if not gpus:
        show("GPU", "none", "Without one, everything runs on the CPU except TensorRT engines.")

    library.load()
    show("library", str(library.path()), "Kernels and TensorRT plugin in one file, for trtexec, Triton and C++ too.")

    module, version = _tensorrt()
    if module is None:
        show("TensorRT", version, "pip install 'tensorrt>=8.6,<11' for torch2trt; the plugin itself serves 8.5 to 11.")
    else:
        plugin.register()
        kind = "IPluginV3" if int(version.partition(".")[0]) >= 10 else "IPluginV2DynamicExt"
        show("TensorRT", version, f"The plugin Adder2d is registered ({kind}): engines with adder layers load.")

    reason = converter.missing()
    allows = "torch2trt(model, [x]) and torch2trt_adder.convert(model, [x])."
    show("torch2trt", _distribution("torch2trt"), allows if reason is None else f"No conversion here. {reason}")


def _tensorrt() -> tuple[object | None, str]:
    """TensorRT's module and version, or None and why there is none."""
    if not importlib.util.find_spec("tensorrt"):
        return None, "not installed"
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # installed, but its libraries do not load
        return None, f"cannot be imported ({error})"
    return module, module.__version__


def _distribution(name: str) -> str:
    if not importlib.util.find_spec(name):
        return "not installed"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # on the path, but not through pip
        return "installed"


def _versions() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    python, torch2trt = platform.python_version(), _distribution("torch2trt")
    return (
        f"torch2trt-adder {__version__} | Python {python} | torch {torch.__version__} | TensorRT {_tensorrt()[1]} | "
        f"torch2trt {torch2trt} | {gpu}"
    )
