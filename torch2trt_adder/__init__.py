"""Adder layers (AdderNet) as a PyTorch operator and module and as a TensorRT plugin with its torch2trt converter.

Importing this needs only torch. Where torch2trt or torch_tensorrt is installed, the import registers a converter with it.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

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
    "fuse",
    "load_checkpoint",
    "register_adder_class",
    "scale_gradients",
    "set_eta",
]

if TYPE_CHECKING:
    from ._api import (
        Adder2d as Adder2d,
        Engine as Engine,
        adder2d as adder2d,
        adderize as adderize,
        adopt as adopt,
        build_engine as build_engine,
        convert as convert,
        export_onnx as export_onnx,
        fuse as fuse,
        load_checkpoint as load_checkpoint,
        register_adder_class as register_adder_class,
        scale_gradients as scale_gradients,
        set_eta as set_eta,
        torch_tensorrt_error as torch_tensorrt_error,
    )


def load_public_names() -> None:
    """Makes the public names, and registers the converters."""
    from . import _api

    for name in (*__all__, "torch_tensorrt_error"):
        globals()[name] = getattr(_api, name)


def _is_command_line() -> bool:
    """Whether this is `torch2trt-adder` or `python -m torch2trt_adder`: these read their arguments before they load torch."""
    if sys.argv[:1] == ["-m"]:  # what Python makes of it while it looks for the module
        return ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:])
    return bool(sys.argv) and os.path.basename(sys.argv[0]) == "torch2trt-adder"


# Modules of 0.1.0 that have moved.
_MOVED = {"onnx_export": "export", "plugin": "trt.plugin"}


def __getattr__(name: str) -> Any:
    """Moved modules; and the public names in processes that the command line's code starts, which has not loaded them."""
    if name in _MOVED:
        return importlib.import_module(f".{_MOVED[name]}", __name__)
    if name not in (*__all__, "torch_tensorrt_error"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load_public_names()
    return globals()[name]


if not _is_command_line():
    load_public_names()
