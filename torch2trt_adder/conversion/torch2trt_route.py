"""The route through torch2trt."""

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import frontends
from ..frontends.options import torch2trt_options
from ..trt.plans import fused_layers
from .shapes import COMMON_OPTIONS

Converted = tuple[nn.Module, Callable[[Any], list[Tensor]]]  # an engine, and how to flatten its outputs


def missing() -> str | None:
    """What this route lacks on a machine with a GPU and TensorRT, as one sentence."""
    if not importlib.util.find_spec("torch2trt"):
        return "torch2trt is not installed: pip install git+https://github.com/NVIDIA-AI-IOT/torch2trt."
    error = frontends.error("torch2trt")
    return None if error is None else f"torch2trt cannot be used ({type(error).__name__}: {error})."


def options() -> list[str] | None:
    """The options of `convert` on this route: torch2trt's own too; None where torch2trt is not there to be asked."""
    if not frontends.is_enabled("torch2trt"):
        return None
    import torch2trt

    return list(dict.fromkeys([*COMMON_OPTIONS, *torch2trt_options(torch2trt.torch2trt)]))


def refuses(inputs: Any, options: dict[str, Any]) -> str | None:
    """Nothing: torch2trt accepts data sets, and `convert` checks the names of the options."""
    return None


def through_torch2trt(model: nn.Module, inputs: Any, options: dict[str, Any]) -> Converted:
    """torch2trt's TRTModule for `model`, and how to flatten its outputs.

    Args:
        model: on a GPU, in eval mode.
        inputs: a list or tuple of arguments, or one of torch2trt's data sets.
        options: torch2trt's keyword arguments.

    Raises:
        RuntimeError: TensorRT could not build the engine, or a layer has no converter.
    """
    import torch2trt

    model_trt: Any = torch2trt.torch2trt(model, inputs, **options)
    if model_trt.engine is None:
        raise RuntimeError(
            "convert: TensorRT could not build an engine; its log above says why (log_level=tensorrt.Logger.INFO makes "
            "it say more)."
        )
    # TRTModule frees a contiguous copy of its input before the engine has read it; a hook's result lives on.
    model_trt.register_forward_pre_hook(lambda module, args: tree_map(_contiguous, args))
    model_trt.fused = fused_layers(model_trt.engine.name)
    return model_trt, model_trt.output_flattener.flatten


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value
