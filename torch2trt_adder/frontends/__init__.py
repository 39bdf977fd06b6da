"""Programs that convert whole networks, torch2trt and Torch-TensorRT, and what makes them convert adder layers.

`enable` is the only place of the package where an import has side effects on other packages.
"""

import importlib.util
import sys
import warnings

_errors: dict[str, Exception] = {}
_enabled: set[str] = set()


def enable() -> None:
    """Registers the converters with torch2trt and torch_tensorrt, where they are installed; once for each.

    A failure is kept (`error`) instead of raised: everything else works without them.

    Warns:
        UserWarning: torch2trt works, but without what makes adder layers safe.
    """
    for name, needed in (("torch2trt", ("torch2trt", "tensorrt")), ("torch_tensorrt", ("torch_tensorrt",))):
        if name in _enabled or not all(importlib.util.find_spec(package) for package in needed):
            continue
        try:
            if name == "torch2trt":
                _enable_torch2trt()
            else:
                from . import torch_tensorrt as torch_tensorrt
        except Exception as error:  # whatever it is, this program is not used then
            _errors[name] = error
            if name == "torch2trt" and hasattr(sys.modules.get("torch2trt"), "torch2trt"):
                warnings.warn(
                    f"torch2trt_adder cannot serve this torch2trt ({type(error).__name__}: {error}): torch2trt(model, [x]) "
                    "would make constants of adder layers; use torch2trt 0.5, or torch2trt_adder.convert, which goes "
                    "through ONNX.",
                    stacklevel=2,
                )
        else:
            _errors.pop(name, None)
            _enabled.add(name)


def is_enabled(name: str) -> bool:
    """Whether `enable` has registered the converters with "torch2trt" or "torch_tensorrt"."""
    return name in _enabled


def error(name: str) -> Exception | None:
    """Why the converters could not be registered with an installed "torch2trt" or "torch_tensorrt"."""
    return _errors.get(name)


def _enable_torch2trt() -> None:
    from . import torch2trt_compat

    torch2trt_compat.import_torch2trt()
    from . import (
        torch2trt_converters as torch2trt_converters,  # its import registers them
        torch2trt_fused as torch2trt_fused,
        torch2trt_layers,
        torch2trt_shapes as torch2trt_shapes,
        tracing,
    )

    torch2trt_layers.make_extents_exact()
    tracing.enable()
