"""TensorRT's Python module, and every question about its version: what a version has is asked here, by the names in it.

One code serves TensorRT 8.5 to 11. No function compares version numbers: TensorRT for RTX counts its own.
"""

import importlib
import re
from types import ModuleType
from typing import Any


def import_tensorrt(trt: ModuleType | None = None) -> ModuleType:
    """`trt`, or the module ``tensorrt`` where that is None.

    Raises:
        RuntimeError: TensorRT is missing or cannot be imported.
    """
    if trt is not None:
        return trt
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise RuntimeError(
            f"TensorRT's Python module is missing or cannot be imported ({error}): install it with `pip install tensorrt`, "
            "or pass another module as `trt`."
        ) from error


def describe(trt: ModuleType) -> str:
    """The module and its version, as "tensorrt 10.13.3.9"."""
    return f"{trt.__name__} {getattr(trt, '__version__', '(unknown version)')}"


def version(trt: ModuleType) -> tuple[int, ...]:
    """The first three numbers of the version, as a plan's header has them."""
    return tuple(int(number) for number in re.findall(r"\d+", trt.__version__)[:3])


# ---- plugins


def plugin_interface(trt: ModuleType) -> str:
    """Which interface plugins have: IPluginV3 since 10, IPluginV2DynamicExt before."""
    return "IPluginV3" if hasattr(trt, "TensorRTPhase") else "IPluginV2DynamicExt"


def find_creator(registry: Any, name: str, version: str, namespace: str) -> Any:
    """The creator of a plugin, or None. get_creator came with 10, and get_plugin_creator went with 11."""
    find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
    return find(name, version, namespace)


def can_load_libraries(registry: Any) -> bool:
    """Whether the registry can ask a library for its plugins; 8.5 cannot."""
    return hasattr(registry, "load_library")


def create_plugin(trt: ModuleType, creator: Any, name: str, fields: Any) -> Any:
    """A plugin for a network that is built, or None where the creator refuses. V3 creators want the phase as well."""
    phase = [trt.TensorRTPhase.BUILD] if hasattr(trt, "TensorRTPhase") else []
    return creator.create_plugin(name, fields, *phase)


def can_add_plugins(network: Any) -> bool:
    return hasattr(network, "add_plugin_v3") or hasattr(network, "add_plugin_v2")


def add_plugin(network: Any, inputs: list[Any], plugin: Any) -> Any:
    """A plugin layer, or None where TensorRT refuses it."""
    if hasattr(network, "add_plugin_v3"):
        return network.add_plugin_v3(inputs, [], plugin)
    return network.add_plugin_v2(inputs, plugin)


# ---- networks and builds


def is_strongly_typed(trt: ModuleType) -> bool:
    """Whether networks have the types of their tensors. That is so from 11; before, BuilderFlag.FP16 lets TensorRT choose."""
    return not hasattr(trt.BuilderFlag, "FP16")


def allow_float16(trt: ModuleType, config: Any) -> None:
    """Without this flag, weakly typed networks offer a plugin no float16 input and output."""
    if not is_strongly_typed(trt):
        config.set_flag(trt.BuilderFlag.FP16)


def explicit_batch(trt: ModuleType) -> int:
    """The flags of `Builder.create_network`: from 11 a network has no other kind of batch and no such flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    return 0 if flag is None else 1 << int(flag)


def scaling_layers(trt: ModuleType) -> list[Any]:
    """The types of layers that bring values back to the order of 1. NORMALIZATION is newer than 8.5."""
    names = ("SCALE", "NORMALIZATION", "SOFTMAX")
    return [getattr(trt.LayerType, name) for name in names if hasattr(trt.LayerType, name)]


def reports_progress(trt: ModuleType) -> bool:
    """IProgressMonitor came with 9.0."""
    return hasattr(trt, "IProgressMonitor")


def parser_error(error: Any) -> str:
    """What the ONNX parser complains of, and where. 8 names no operator."""
    if not hasattr(error, "node_operator"):
        return f"{error.desc()} (node {error.node()})"
    return f"{error.desc()} (node {error.node_name()}, operator {error.node_operator()})"


# ---- what torch2trt needs


def has_int8_calibration(trt: ModuleType) -> bool:
    """Whether int8 calibrators exist; 11 dropped them."""
    return hasattr(trt, "CalibrationAlgoType")


def has_batch_flag(trt: ModuleType) -> bool:
    """Whether networks are created with the flag EXPLICIT_BATCH; 11 dropped it."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")


def slice_modes(trt: ModuleType) -> Any:
    """The enumeration of ISliceLayer.mode: SampleMode, which was SliceMode before 8.5."""
    return _first(trt, "SampleMode", "SliceMode")


def resize_modes(trt: ModuleType) -> Any:
    """The enumeration of IResizeLayer.resize_mode: InterpolationMode, which was ResizeMode before 8.5."""
    return _first(trt, "InterpolationMode", "ResizeMode")


def _first(trt: ModuleType, *names: str) -> Any:
    return next(getattr(trt, name) for name in names if hasattr(trt, name))
