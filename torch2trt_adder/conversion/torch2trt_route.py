"""The route through torch2trt."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

Converted = tuple[nn.Module, Callable[[Any], list[Tensor]]]  # and how to take its outputs apart


def through_torch2trt(model: nn.Module, inputs: Sequence[Any], options: dict[str, Any]) -> Converted:
    import torch2trt

    model_trt = torch2trt.torch2trt(model, inputs, **options)
    if model_trt.engine is None:
        raise RuntimeError(
            "convert: TensorRT could not build an engine; its log above says why (log_level=tensorrt.Logger.INFO makes "
            "it say more)."
        )
    # TRTModule frees a contiguous copy of its input before the engine has read it; a hook's result lives on.
    model_trt.register_forward_pre_hook(lambda module, args: tree_map(_contiguous, args))
    return model_trt, model_trt.output_flattener.flatten


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value
