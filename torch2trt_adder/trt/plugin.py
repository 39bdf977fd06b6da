"""The TensorRT plugin ``Adder2d`` from Python: registration, creation, insertion into a network.

The plugin has the inputs x [N, C, H, W] (float32 or float16), weight [K, C / groups, R, S] and bias [K] (float32), then
where its fields say so scale [K] and shift [K] (float32) and residual [N, K, P, Q] (float32 or float16). It returns

    y = clamp(scale[k] * (bias[k] - sum over c,r,s of |x - w[k,c,r,s]|) + shift[k] + residual, lower, upper)

[N, K, P, Q] of type ``output_type`` whatever the type of x; all of it is computed in float32. It is an IPluginV2DynamicExt
in TensorRT 8 and an IPluginV3 from TensorRT 10 on; both come from the one library of this package.

TensorRT is imported by the first call that needs it, never by importing this module. Every function takes the module as
``trt``, for processes that use another one than ``tensorrt`` (``tensorrt_rtx``, ``tensorrt_lean``).
"""

import ctypes
import math
import numbers
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from .. import library
from ..ops import checks
from ..utils import arguments
from . import api

NAME = "Adder2d"
VERSION = "1"
NAMESPACE = ""


def register(trt: ModuleType | None = None) -> None:
    """Makes the plugin known to TensorRT's global registry; without effect where it already is.

    Engines with adder layers can be deserialised afterwards. Call it again after `deregister_library`.

    Raises:
        RuntimeError: TensorRT is not installed, the library is missing, or the registry rejects it.
    """
    trt = api.import_tensorrt(trt)
    registry = trt.get_plugin_registry()
    if _find_creator(registry) is not None:
        return
    path = library.path()
    # Opening the library registers the plugin where TensorRT came first. Where the library came first, the registry has to
    # ask it: through load_library, or in TensorRT 8.5, which has none, through the library's own function.
    handle = library.load()
    if _find_creator(registry) is None:
        if api.can_load_libraries(registry):
            registry.load_library(str(path))  # its return value says the same for failed and already loaded
        else:
            handle.adder2d_register_plugin.restype = ctypes.c_int32
            handle.adder2d_register_plugin()
    if _find_creator(registry) is None:
        raise RuntimeError(
            f"The plugin registry of {api.describe(trt)} rejects {path}: TensorRT's log says why; "
            "the library serves TensorRT 8.5 to 11."
        )


def create(
    name: str,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_type: Any = 0,
    trt: ModuleType | None = None,
    *,
    scale: bool = False,
    residual: bool = False,
    lower: float | None = None,
    upper: float | None = None,
) -> Any:
    """A plugin object, an ``IPluginV2`` or ``IPluginV3`` by the running TensorRT.

    Args:
        name: of the plugin, for TensorRT's messages.
        stride, padding, dilation: one int, or a pair for height and width.
        groups: divides C and K.
        output_type: of y: ``trt.float32`` (0, the default: sums of wide layers pass float16's 65504) or ``trt.float16`` (1).
        trt: the TensorRT module; ``tensorrt`` where None.
        scale: whether the layer has the inputs scale and shift.
        residual: whether the layer has the input residual.
        lower, upper: limits of y; no limit where None.

    Raises:
        ValueError: an attribute that is not an int, a bool or a number, or out of range.
        RuntimeError: as `register`.
    """
    trt = api.import_tensorrt(trt)
    values = {
        "stride": arguments.pair_of("adder2d", "stride", stride, 1),
        "padding": arguments.pair_of("adder2d", "padding", padding, 0),
        "dilation": arguments.pair_of("adder2d", "dilation", dilation, 1),
        "groups": (arguments.count_of("adder2d", "groups", groups),),
        "output_type": (_output_type(output_type, trt),),
        "scale": (_switch("scale", scale),),
        "residual": (_switch("residual", residual),),
    }
    limits = {name: value for name, value in zip(("lower", "upper"), _limits(lower, upper)) if value is not None}
    register(trt)
    creator = _find_creator(trt.get_plugin_registry())
    data = {field: np.array(value, np.int32) for field, value in values.items()}  # PluginField does not own its data
    data |= {field: np.array([value], np.float32) for field, value in limits.items()}
    types = {field: trt.PluginFieldType.FLOAT32 if field in limits else trt.PluginFieldType.INT32 for field in data}
    fields = trt.PluginFieldCollection([trt.PluginField(field, data[field], types[field]) for field in data])
    plugin = api.create_plugin(trt, creator, name, fields)
    if plugin is None:
        raise RuntimeError(
            f"TensorRT could not create the plugin {name!r} with {values | limits}: the reason is on stderr."
        )
    return plugin


def add_adder2d(
    network: Any,
    itensor: Any,
    weight: np.ndarray | torch.Tensor,
    bias: np.ndarray | torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_type: Any = 0,
    name: str | None = None,
    trt: ModuleType | None = None,
    *,
    scale: np.ndarray | torch.Tensor | None = None,
    shift: np.ndarray | torch.Tensor | None = None,
    residual: Any = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Any:
    """Adds ``y[n,k,p,q] = bias[k] - sum over c,r,s of |x - w[k,c,r,s]|`` to a network of explicit batch.

    With any of the last five arguments, ``y = clamp(scale[k] * y + shift[k] + residual, lower, upper)`` in the same layer.

    Args:
        network: an ``INetworkDefinition``; extents of ``itensor`` may be dynamic.
        itensor: x [N, C, H, W], float32 or float16.
        weight: [K, C / groups, R, S], any floating type; becomes a float32 constant of the network.
        bias: [K] or None for zeros; likewise.
        stride, padding, dilation, groups, output_type: as in `create`.
        name: of the layer; TensorRT's own naming where None.
        trt: the TensorRT module; ``tensorrt`` where None.
        scale, shift: [K], any floating type, become float32 constants; ones and zeros where only the other one is given.
        residual: an ``ITensor`` [N, K, P, Q], float32 or float16, added after the shift.
        lower, upper: limits of y; no limit where None. A NaN stays a NaN.

    Returns:
        The plugin layer; ``layer.get_output(0)`` is y [N, K, P, Q] of type ``output_type``.

    Raises:
        ValueError: shapes, types or attributes that do not fit each other, named.
        RuntimeError: as `register`, or TensorRT refuses the layer.
    """
    trt = api.import_tensorrt(trt)
    weight = _float32_array(weight)
    bias = np.zeros(weight.shape[:1], np.float32) if bias is None else _float32_array(bias)
    stride, padding, dilation = (
        arguments.pair_of("adder2d", "stride", stride, 1),
        arguments.pair_of("adder2d", "padding", padding, 0),
        arguments.pair_of("adder2d", "dilation", dilation, 1),
    )
    groups, output_type = arguments.count_of("adder2d", "groups", groups), _output_type(output_type, trt)
    _check_shapes(tuple(itensor.shape), weight.shape, bias.shape, stride, padding, dilation, groups)
    if itensor.dtype not in (trt.float32, trt.float16):
        raise ValueError(f"adder2d: x must be float32 or float16, got {itensor.dtype}; add a cast before the layer.")
    constants = {"weight": weight, "bias": bias, **_scale_and_shift(scale, shift, weight.shape[0])}
    if residual is not None:
        _check_residual(residual, tuple(itensor.shape), weight.shape, stride, padding, dilation, trt)
    lower, upper = _limits(lower, upper)
    if not api.can_add_plugins(network):
        raise RuntimeError(f"Networks of {api.describe(trt)} offer no plugin layers: use TensorRT 8.5 to 11.")

    plugin = create(
        name or NAME,
        stride,
        padding,
        dilation,
        groups,
        output_type,
        trt,
        scale="scale" in constants,
        residual=residual is not None,
        lower=lower,
        upper=upper,
    )
    inputs = [itensor, *(add_constant(network, role, array, name, trt) for role, array in constants.items())]
    inputs += [] if residual is None else [residual]
    return add_layer(network, inputs, plugin, name)


def add_layer(network: Any, inputs: list[Any], plugin: Any, name: str | None) -> Any:
    """The layer of `plugin`, made by `create`, with these ITensors as its inputs.

    Raises:
        RuntimeError: TensorRT refuses the layer.
    """
    layer = api.add_plugin(network, inputs, plugin)
    if layer is None:
        raise RuntimeError(f"TensorRT rejects the plugin layer {name or NAME}: its log and stderr say why.")
    if name:
        layer.name = name
    return layer


def add_constant(network: Any, role: str, array: np.ndarray, name: str | None, trt: ModuleType) -> Any:
    """A constant of the network, whose array lives as long as the network."""
    # trt.Weights points into the array, which the network reads when the engine is built.
    constant = network.add_constant(tuple(array.shape), trt.Weights(array))
    _keep_alive(network, array)
    if constant is None:
        raise RuntimeError(
            f"TensorRT rejects the {role} {array.shape} of {name or NAME} as a constant: its log says why."
        )
    if name:
        constant.name = f"{name}.{role}"
    return constant.get_output(0)


def _find_creator(registry: Any) -> Any:
    return api.find_creator(registry, NAME, VERSION, NAMESPACE)


def _output_type(value: Any, trt: ModuleType) -> int:
    """0 or 1 from a number or from a ``trt.DataType``, which is not an integer to Python."""
    kind = int(value) if isinstance(value, trt.DataType) else arguments.as_integer(value)
    if kind not in (0, 1):
        raise ValueError(f"adder2d: output_type must be trt.float32 (0) or trt.float16 (1), got {value!r}.")
    return kind


def _switch(name: str, value: bool) -> int:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"adder2d: {name} must be True or False, got {value!r}.")
    return int(value)


def _limits(lower: float | None, upper: float | None) -> tuple[float | None, float | None]:
    """Both as float32 numbers; None where there is no limit."""
    limits: list[float | None] = []
    for name, value in (("lower", lower), ("upper", upper)):
        if value is None:
            limits.append(None)
            continue
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real) or math.isnan(value):
            raise ValueError(f"adder2d: {name} must be a number or None, got {value!r}.")
        limits.append(float(np.float32(value)))
    low, high = limits
    if (low if low is not None else -math.inf) > (high if high is not None else math.inf):
        raise ValueError(f"adder2d: lower must not be above upper, got {lower!r} and {upper!r}.")
    return low, high


def _scale_and_shift(scale: Any, shift: Any, filters: int) -> dict[str, np.ndarray]:
    """Both arrays [K] in float32, or none."""
    if scale is None and shift is None:
        return {}
    arrays = {
        "scale": np.ones(filters, np.float32) if scale is None else _float32_array(scale),
        "shift": np.zeros(filters, np.float32) if shift is None else _float32_array(shift),
    }
    for name, array in arrays.items():
        if array.shape != (filters,):
            raise ValueError(f"adder2d: {name} must be [{filters}], one number a filter, got {list(array.shape)}.")
    return arrays


def _check_residual(
    residual: Any,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    trt: ModuleType,
) -> None:
    """Extents that are known only at run time (-1) may be those of y."""
    size = [
        -1 if x[2 + i] < 0 else (x[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    y, shape = [x[0], weight[0], *size], list(residual.shape)
    if len(shape) != 4 or any(-1 not in (a, b) and a != b for a, b in zip(shape, y)):
        raise ValueError(f"adder2d: residual must have the shape {y} of y, got {shape}.")
    if residual.dtype not in (trt.float32, trt.float16):
        raise ValueError(f"adder2d: residual must be float32 or float16, got {residual.dtype}; add a cast before it.")


def _float32_array(tensor: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.detach().to("cpu", torch.float32).numpy()
    return np.array(tensor, np.float32, order="C")  # a copy: later changes of the source stay out of the engine


def _check_shapes(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    """The operator's own checks. An extent known only at run time (-1) counts as one that fits."""
    if len(x) == 4 and len(weight) == 4:
        fitting = (1, weight[1] * groups, *(dilation[i] * (weight[2 + i] - 1) + 1 for i in (0, 1)))
        x = tuple(fit if extent < 0 else extent for extent, fit in zip(x, fitting))
    checks.output_size(x, weight, bias, stride, padding, dilation, groups)


# Arrays that networks still point to, released with the Python object of their network.
def _keep_alive(network: Any, array: np.ndarray) -> None:
    weakref.finalize(network, _release, array).atexit = False


def _release(array: np.ndarray) -> None:
    """Called with the array that `weakref.finalize` held until now; dropping the reference is all."""
