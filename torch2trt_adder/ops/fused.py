"""``adder2d_fused``: the adder layer with BatchNorm, a residual sum and limits in the same pass, for inference."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..utils import arguments
from . import export_hook
from .checks import check_tensors, memory_format, output_size
from .fastpath import find_kernels, plain_pairs
from .launch import adder2d_cpu, adder2d_cuda
from .launch_fused import Extents, adder2d_fused_cpu, adder2d_fused_cuda, check_epilogue, expanded
from .schema import adder2d_op, library


def adder2d_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    lower: float | None = None,
    upper: float | None = None,
) -> Tensor:
    """The adder layer and what follows it in a network, in one pass over the output; for inference, without gradients.

    ``y[n,k,p,q] = clamp(scale[k] * adder2d(input, weight, bias)[n,k,p,q] + shift[k] + residual[n,k,p,q], lower, upper)``

    All of it is computed in float32 (float64 for float64 inputs) and rounded once, so float16 outputs are finite where
    the sums of the layer pass 65504. A NaN stays a NaN. `torch2trt_adder.fuse` makes networks that call this.

    Args:
        input: [N, C, H, W] of any strides; float32, float16, bfloat16 or float64 (slow).
        weight: [K, C / groups, R, S], dtype and device of the input.
        bias: [K] or None, dtype and device of the input; inside the scale.
        scale: [K] or None for 1; float32 whatever the input's dtype.
        shift: [K] or None for 0; float32 whatever the input's dtype.
        residual: [N, K, P, Q] of any strides, or a tensor that broadcasts to it, or None for 0; dtype of the input.
        stride, padding, dilation: one int, or a pair for height and width.
        groups: divides C and K.
        lower, upper: limits of the result, or None; ``lower=0`` is ReLU, ``lower=0, upper=6`` is ReLU6.

    Returns:
        [N, K, P, Q] with the input's dtype, channels_last where the input is, else contiguous.

    Raises:
        TypeError: an argument of the wrong type; dtypes that are not supported or differ.
        ValueError: shapes, stride, padding, dilation, groups or limits that do not fit each other.
        RuntimeError: tensors on different devices, or whose memory was freed; a gradient is wanted: one of the tensors
            requires it, and gradients are enabled.
    """
    pairs = plain_pairs(stride, padding, dilation)
    if pairs is None:
        names = "stride", "padding", "dilation"
        stride, padding, dilation = map(arguments.schema_pair, names, (stride, padding, dilation))
    if type(groups) is not int:
        groups = arguments.schema_integer("groups", groups)
    lower, upper = _limit("lower", lower), _limit("upper", upper)
    compiling, tracing = torch.compiler.is_compiling(), torch._C._get_tracing_state() is not None
    if (compiling or tracing) and torch.onnx.is_in_onnx_export() and export_hook.symbol is not None:
        plain = export_hook.symbol if compiling else adder2d_op
        geometry = stride, padding, dilation, groups
        return _decomposed(plain, input, weight, bias, scale, shift, residual, geometry, lower, upper)
    kernels = find_kernels(input, weight, bias)
    epilogue = scale, shift, residual
    if (
        kernels is not None
        and pairs is not None
        and find_kernels(*(t if t is not None else input for t in epilogue)) is kernels
    ):
        tensors = input, weight, bias, *epilogue
        _refuse_gradients(tensors)
        return _IMPLEMENTATIONS[kernels.forward](*tensors, *pairs, groups, lower, upper)
    if kernels is None:
        arguments.check_are_tensors(input, weight, bias)
    for name, value in zip(("scale", "shift", "residual"), epilogue, strict=True):
        if value is not None and not isinstance(value, Tensor) and not hasattr(type(value), "__torch_function__"):
            raise TypeError(
                f"adder2d_fused: {name} must be a torch.Tensor or None, got a {type(value).__name__}; convert it with "
                "torch.as_tensor."
            )
    result: Tensor = adder2d_fused_op(input, weight, bias, *epilogue, stride, padding, dilation, groups, lower, upper)
    return result


def _limit(name: str, value: Any) -> Any:
    """`value` as the schema accepts a float?; whether the limits fit each other is checked with the shapes."""
    if value is None or type(value) is float or isinstance(value, torch.SymFloat | torch.fx.Proxy):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"adder2d_fused: {name} must be a number or None, got {value!r}.")
    return float(value)


def _decomposed(
    plain: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: tuple[Any, ...],
    lower: float | None,
    upper: float | None,
) -> Tensor:
    """The same in operators that torch's ONNX exporters know. In float32: sums of float16 layers pass 65504."""
    dtype = input.dtype
    y = plain(input.float(), weight.float(), None if bias is None else bias.float(), *geometry)
    if scale is not None:
        y = y * scale[:, None, None]
    if shift is not None:
        y = y + shift[:, None, None]
    if residual is not None:
        y = y + residual.float()
    if lower is not None or upper is not None:
        y = torch.relu(y) if lower == 0 and upper is None else torch.clamp(y, lower, upper)
    return y.to(dtype)


# ---- schema and checks

library.define(
    "adder2d_fused(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, float? lower, float? upper) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
adder2d_fused_op = torch.ops.torch2trt_adder.adder2d_fused.default


def _fused_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Extents,
    padding: Extents,
    dilation: Extents,
    groups: int,
    lower: float | None,
    upper: float | None,
) -> Tensor:
    check_tensors(input, weight, bias)
    size = output_size(
        input.shape, weight.shape, None if bias is None else bias.shape, stride, padding, dilation, groups
    )
    check_epilogue(input, size[1], scale, shift, lower, upper)
    expanded(residual, input, size)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


torch.library.register_fake("torch2trt_adder::adder2d_fused", _fused_fake, lib=library)


# ---- implementations

_IMPLEMENTATIONS = {adder2d_cpu: adder2d_fused_cpu, adder2d_cuda: adder2d_fused_cuda}
library.impl("adder2d_fused", adder2d_fused_cpu, "CPU")
library.impl("adder2d_fused", adder2d_fused_cuda, "CUDA")


# ---- autograd: none


def _refuse_gradients(tensors: Sequence[Tensor | None]) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "adder2d_fused is for inference and computes no gradients, but one of its tensors requires one; call it under "
            "torch.no_grad() or torch.inference_mode(), and train the network as it was before fuse()."
        )


def _fused_autograd(*options: Any) -> Tensor:
    tensors = options[:6]
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "adder2d_fused does not work inside torch.func.grad, vjp, jvp and similar transforms: it is for inference and "
            "computes no gradients."
        )
    _refuse_gradients(tensors)
    if torch.autograd.forward_ad._current_level >= 0 and any(
        t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(
            "adder2d_fused is for inference and has no forward-mode derivative; pass tensors without one."
        )
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = adder2d_fused_op(*options)
    return result


library.impl("adder2d_fused", _fused_autograd, "Autograd")


# ---- autocast: as adder2d; scale and shift stay float32


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    keys = torch._C.DispatchKeySet(key)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def adder2d_fused_autocast(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        *options: Any,
    ) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            result: Tensor = adder2d_fused_op(
                cast(input), cast(weight), cast(bias), scale, shift, cast(residual), *options
            )
        return result

    return adder2d_fused_autocast


for _type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    library.impl("adder2d_fused", _autocast_kernel(_type, getattr(torch._C.DispatchKey, _key)), _key)
