"""The TensorRT plugin ``Adder2d`` from Python: registration, creation, insertion into a network.

The plugin takes three inputs, x [N, C, H, W] (float32 or float16), weight [K, C / groups, R, S] and bias [K] (float32), and
returns y [N, K, P, Q] of type ``output_type`` whatever the type of x. It is an IPluginV2DynamicExt in TensorRT 8 and an
IPluginV3 from TensorRT 10 on; both come from the one library of this package.

TensorRT is imported by the first call that needs it, never by importing this module. Every function takes the module as
``trt``, for processes that use another one than ``tensorrt`` (``tensorrt_rtx``, ``tensorrt_lean``).
"""

import ctypes
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
) -> Any:
    """A plugin object, an ``IPluginV2`` or ``IPluginV3`` by the running TensorRT.

    Args:
        name: of the plugin, for TensorRT's messages.
        stride, padding, dilation: one int, or a pair for height and width.
        groups: divides C and K.
        output_type: of y: ``trt.float32`` (0, the default: sums of wide layers pass float16's 65504) or ``trt.float16`` (1).
        trt: the TensorRT module; ``tensorrt`` where None.

    Raises:
        ValueError: an attribute that is not an int, or out of range.
        RuntimeError: as `register`.
    """
    trt = api.import_tensorrt(trt)
    values = {
        "stride": arguments.pair_of("adder2d", "stride", stride, 1),
        "padding": arguments.pair_of("adder2d", "padding", padding, 0),
        "dilation": arguments.pair_of("adder2d", "dilation", dilation, 1),
        "groups": (arguments.count_of("adder2d", "groups", groups),),
        "output_type": (_output_type(output_type, trt),),
    }
    register(trt)
    creator = _find_creator(trt.get_plugin_registry())
    data = {field: np.array(value, np.int32) for field, value in values.items()}  # PluginField does not own its data
    fields = trt.PluginFieldCollection(
        [trt.PluginField(field, value, trt.PluginFieldType.INT32) for field, value in data.items()]
    )
    plugin = api.create_plugin(trt, creator, name, fields)
    if plugin is None:
        raise RuntimeError(f"TensorRT could not create the plugin {name!r} with {values}: the reason is on stderr.")
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
) -> Any:
    """Adds ``y[n,k,p,q] = bias[k] - sum over c,r,s of |x - w[k,c,r,s]|`` to a network of explicit batch.

    Args:
        network: an ``INetworkDefinition``; extents of ``itensor`` may be dynamic.
        itensor: x [N, C, H, W], float32 or float16.
        weight: [K, C / groups, R, S], any floating type; becomes a float32 constant of the network.
        bias: [K] or None for zeros; likewise.
        stride, padding, dilation, groups, output_type: as in `create`.
        name: of the layer; TensorRT's own naming where None.
        trt: the TensorRT module; ``tensorrt`` where None.

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
    if not api.can_add_plugins(network):
        raise RuntimeError(f"Networks of {api.describe(trt)} offer no plugin layers: use TensorRT 8.5 to 11.")

    plugin = create(name or NAME, stride, padding, dilation, groups, output_type, trt)
    inputs = [itensor]
    for role, array in (("weight", weight), ("bias", bias)):
        # trt.Weights points into the array, which the network reads when the engine is built.
        constant = network.add_constant(tuple(array.shape), trt.Weights(array))
        _keep_alive(network, array)
        if constant is None:
            raise RuntimeError(
                f"TensorRT rejects the {role} {array.shape} of {name or NAME} as a constant: its log says why."
            )
        if name:
            constant.name = f"{name}.{role}"
        inputs.append(constant.get_output(0))
    layer = api.add_plugin(network, inputs, plugin)
    if layer is None:
        raise RuntimeError(f"TensorRT rejects the plugin layer {name or NAME}: its log and stderr say why.")
    if name:
        layer.name = name
    return layer


def _find_creator(registry: Any) -> Any:
    return api.find_creator(registry, NAME, VERSION, NAMESPACE)


def _output_type(value: Any, trt: ModuleType) -> int:
    """0 or 1 from a number or from a ``trt.DataType``, which is not an integer to Python."""
    kind = int(value) if isinstance(value, trt.DataType) else arguments.as_integer(value)
    if kind not in (0, 1):
        raise ValueError(f"adder2d: output_type must be trt.float32 (0) or trt.float16 (1), got {value!r}.")
    return kind


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
