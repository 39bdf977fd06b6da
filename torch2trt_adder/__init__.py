"""Adder layers (AdderNet) as a PyTorch operator and module and as a TensorRT plugin with its torch2trt converter.

Importing this needs torch alone. Where torch2trt or torch_tensorrt is installed, the import registers a converter with it.
"""

import importlib.util
from collections.abc import Sequence

from torch import Tensor

from . import ops
from .converter import convert
from .convolutions import adderize
from .engine import Engine, build_engine
from .lookalikes import adopt, register_adder_class
from .module import Adder2d, scale_gradients, set_eta
from .onnx_export import export_onnx

__version__ = "0.1.0"
__all__ = [
    "Adder2d",
    "Engine",
    "adder2d",
    "adderize",
    "adopt",
    "build_engine",
    "convert",
    "export_onnx",
    "register_adder_class",
    "scale_gradients",
    "set_eta",
]


def adder2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eta: float | None = ops.ETA,
) -> Tensor:
    # Through the module: torch2trt hooks ops.adder2d by its qualified name.
    return ops.adder2d(input, weight, bias, stride, padding, dilation, groups, eta)


adder2d.__doc__ = ops.adder2d.__doc__

_torch_tensorrt_error: Exception | None = None
if importlib.util.find_spec("torch_tensorrt"):
    try:
        from . import torch_tensorrt_converter  # noqa: F401
    except Exception as error:  # a torch_tensorrt of another torch or TensorRT; all else works without it
        _torch_tensorrt_error = error


def torch_tensorrt_error() -> Exception | None:
    """Why the converter for Torch-TensorRT could not be registered where torch_tensorrt is installed."""
    return _torch_tensorrt_error
