"""The public names of the package, which `__init__` hands on. To import this is to load torch and register the converters."""

from collections.abc import Sequence

from torch import Tensor

from . import frontends, ops
from .conversion.converter import convert as convert
from .export.exporter import export_onnx as export_onnx
from .nn.adder2d import Adder2d as Adder2d
from .nn.adderize import adderize as adderize
from .nn.adopt import adopt as adopt
from .nn.checkpoints import load_checkpoint as load_checkpoint
from .nn.fuse import fuse as fuse
from .nn.recognise import register_adder_class as register_adder_class
from .nn.training import scale_gradients as scale_gradients, set_eta as set_eta
from .trt.builder import build_engine as build_engine
from .trt.engine import Engine as Engine


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

frontends.enable()


def torch_tensorrt_error() -> Exception | None:
    """Why the converter for Torch-TensorRT could not be registered where torch_tensorrt is installed."""
    return frontends.error("torch_tensorrt")
