"""`torch2trt-adder info`: what is installed, what each part allows, and what each road to an engine still needs."""

import importlib.util
import platform
import shutil
from types import ModuleType
from typing import Any

import torch

from .. import __version__, library, torch_tensorrt_error
from ..conversion import routes
from ..trt import api, plugin
from .commands import Failed

_TORCH2TRT = "pip install git+https://github.com/NVIDIA-AI-IOT/torch2trt"
_GPU = "an NVIDIA GPU with its driver, and a CUDA build of torch"


def show() -> dict[str, Any]:
    """Prints what there is, its version or state, and what it allows; then the roads.

    Returns:
        The same: ``state`` and ``allows`` of each part, and under ``roads`` what each lacks.

    Raises:
        Failed: the plugin library does not load, or TensorRT does not accept it. It has been printed like the rest.
    """
    shown: dict[str, Any] = {}
    problems: list[str] = []

    def part(name: str, state: str, allows: str) -> None:
        shown[name] = {"state": state, "allows": allows}
        print(f"{name:<16}{state}\n{'':<16}{allows}")

    _show_torch(part)
    allows = "Kernels and TensorRT plugin in one file, for trtexec, Triton and C++ as well."
    try:
        library.load()
    except RuntimeError as error:
        problems.append(str(error))
        allows = "It cannot be used: no adder layer runs here."
    part("library", str(library.path()), allows)

    module, version = _tensorrt()
    allows = "pip install tensorrt; the plugin serves 8.5 to 11."
    if module is not None:
        kind = api.plugin_interface(module)
        allows = f"The plugin {plugin.NAME}, version {plugin.VERSION}, is registered ({kind}): engines with adder layers load."
        try:
            plugin.register()
        except RuntimeError as error:
            problems += [] if problems else [str(error)]
            allows = f"The plugin {plugin.NAME} is not registered: no engine with adder layers loads."
    part("TensorRT", version, allows)
    _show_converters(part)

    shown["roads"] = _roads(module is not None, not problems)
    print("\nRoads, and what to install for each:")
    for name, needs in shown["roads"].items():
        print(f"  {name:<42}{'; '.join(needs) or 'ready'}")
    if problems:
        raise Failed(problems[0], shown)
    return shown


def _show_torch(part: Any) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    where = "on the CPU and on the GPU." if gpus else "on the CPU; a GPU needs a CUDA build and an NVIDIA driver."
    part("torch", torch.__version__, f"adder2d and Adder2d, forward and AdderNet's gradients, {where}")
    for i in range(gpus):
        major, minor = torch.cuda.get_device_capability(i)
        state = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
        part(f"GPU {i}", state, "CUDA kernels and TensorRT engines; an engine runs on the kind of GPU that built it.")
    if not gpus:
        part("GPU", "none", "Without one, everything runs on the CPU except TensorRT engines.")


def _show_converters(part: Any) -> None:
    reason = routes.missing("torch2trt")
    allows = "torch2trt(model, [x]) and convert(model, [x], route='torch2trt')."
    if reason is not None:
        through = " convert(model, [x]) goes through ONNX." if routes.missing("onnx") is None else ""
        allows = f"Not used. {reason}{through}"
    part("torch2trt", _distribution("torch2trt"), allows)
    absent = _absent("onnx", "onnxscript", "onnxruntime")
    allows = "export_onnx with its check; build_engine and convert(model, [x], route='onnx') with a GPU and TensorRT."
    part("onnx", _distribution("onnx"), f"{absent}." if absent else allows)
    allows = "The converter for torch.ops.torch2trt_adder.adder2d is registered."
    if not importlib.util.find_spec("torch_tensorrt"):
        allows = "Not needed; pip install torch_tensorrt for torch_tensorrt.compile(model, ir='dynamo', ...)."
    elif torch_tensorrt_error() is not None:
        allows = f"It cannot be imported: {torch_tensorrt_error()}."
    part("torch_tensorrt", _distribution("torch_tensorrt"), allows)


def _roads(tensorrt: bool, works: bool) -> dict[str, list[str]]:
    """What each road lacks on this machine; nothing where it is ready."""
    base = [] if works else ["a plugin library that loads (see above)"]
    gpu = [] if torch.cuda.is_available() else [_GPU]
    engine = [*base, *gpu, *([] if tensorrt else ["pip install tensorrt"])]
    server = shutil.which("tritonserver")
    return {
        "PyTorch, training and inference": base,
        "torch2trt(model, [x])": [*engine, *([] if importlib.util.find_spec("torch2trt") else [_TORCH2TRT])],
        "TensorRT through ONNX, without torch2trt": [*engine, *_needs("onnx", "onnxscript")],
        "ONNX Runtime": [*base, *_needs("onnx", "onnxscript", "onnxruntime")],
        "Torch-TensorRT": [*engine[: len(base) + len(gpu)], *_needs("torch_tensorrt")],
        "Triton Inference Server": [
            *engine,
            *([] if server else ["a Triton container with the same TensorRT, to serve"]),
        ],
    }


def _needs(*packages: str) -> list[str]:
    absent = _absent(*packages)
    return [absent] if absent else []


def _absent(*packages: str) -> str:
    """The command that installs those of the packages that are missing; empty where none is."""
    absent = [name for name in packages if not importlib.util.find_spec(name)]
    return f"pip install {' '.join(absent)}" if absent else ""


def _tensorrt() -> tuple[ModuleType | None, str]:
    """TensorRT's module and version, or None and why there is none."""
    if not importlib.util.find_spec("tensorrt"):
        return None, "not installed"
    try:
        module = importlib.import_module("tensorrt")
    except Exception as error:  # installed, but its libraries do not load, or are for another machine
        return None, f"cannot be imported ({error})"
    return module, module.__version__


def _distribution(name: str) -> str:
    if not importlib.util.find_spec(name):
        return "not installed"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # on the path, but not through pip
        return "installed"


def versions() -> dict[str, str]:
    """What the first line of every subcommand says."""
    return {
        "torch2trt-adder": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "TensorRT": _tensorrt()[1],
        "torch2trt": _distribution("torch2trt"),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
