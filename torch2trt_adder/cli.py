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
    parser = argparse.ArgumentParser("torch2trt-adder", description=_DESCRIPTION, epilog=_EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"torch2trt-adder {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    about = "train a small AdderNet on handwritten digits; with a GPU and TensorRT, convert it and compare"
    demo = verbs.add_parser("demo", help=about, description=f"{about[0].upper()}{about[1:]}. Under a minute on two CPU cores.",
                            epilog=_EPILOG)
    demo.add_argument("--epochs", type=_positive, default=6, help="passes over the training digits (default: %(default)s)")
    demo.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path("addernet_mnist.pth"), metavar="FILE",
                      help="where to write the trained parameters (default: %(default)s)")
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
    for name, state, allows in _facts():
        print(f"{name:<11}{state}\n{'':<11}{allows}")


def _facts() -> list[tuple[str, str, str]]:
    """What there is: name, version or state, what it allows."""
    facts = [("torch", torch.__version__, "adder2d and Adder2d, forward and AdderNet's gradients, on the CPU"
              + (" and on the GPU." if torch.cuda.is_available() else "; a GPU needs a CUDA build and an NVIDIA driver."))]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            facts.append((f"GPU {i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}",
                          "CUDA kernels and TensorRT engines; an engine runs only on the kind of GPU it was built on."))
    else:
        facts.append(("GPU", "none", "Without one, everything runs on the CPU except TensorRT engines."))

    library.load()
    facts.append(("library", str(library.path()), "Kernels and TensorRT plugin Adder2d in one file, for trtexec, Triton and C++ too."))

    module, version = _tensorrt()
    if module is None:
        facts.append(("TensorRT", version, "pip install 'tensorrt>=8.6,<11' for torch2trt; the plugin itself serves 8.5 to 11."))
    else:
        plugin.register()
        kind = "IPluginV3" if int(version.partition(".")[0]) >= 10 else "IPluginV2DynamicExt"
        facts.append(("TensorRT", version, f"The plugin Adder2d is registered as {kind}: engines with adder layers can be loaded."))

    state = _distribution("torch2trt")
    reason = converter.missing()
    facts.append(("torch2trt", state, "torch2trt(model, [x]) and torch2trt_adder.convert(model, [x])." if reason is None
                  else f"No conversion here. {reason}"))
    return facts


def _tensorrt() -> tuple[object | None, str]:
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
    return " | ".join([f"torch2trt-adder {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}",
                       f"TensorRT {_tensorrt()[1]}", f"torch2trt {_distribution('torch2trt')}", gpu])
