"""``adder2d``, the function that users and modules call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..utils import arguments
from . import export_hook
from .autograd import with_autograd
from .checks import ETA
from .fastpath import find_kernels, plain_pairs
from .schema import adder2d_eta_op, adder2d_op

# Newer than torch 2.4, whose exported graphs lose adder2d_eta in run_decompositions() only.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def adder2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eta: float | None = ETA,
) -> Tensor:
    """The adder layer: ``y[n,k,p,q] = bias[k] - sum over c,r,s of |x - w[k,c,r,s]|``, where padding reads x = 0.

    Shapes, strides and padding are those of ``torch.nn.functional.conv2d``. Gradients follow the published code:
    ``dx = sum dy * clamp(w - x, -1, 1)``, and ``dw = sum dy * (x - w)`` rescaled to the norm ``eta * sqrt(numel)``.

    Args:
        input: [N, C, H, W] of any strides; float32, float16 or bfloat16 (sums are float32), or float64 (slow).
        weight: [K, C / groups, R, S], dtype and device of the input.
        bias: [K] or None, dtype and device of the input.
        stride, padding, dilation: one int, or a pair for height and width.
        groups: divides C and K.
        eta: of the adaptive scaling; None for the raw sum, which mixed precision, gradient accumulation and several
            GPUs need (`scale_gradients` says why).

    Returns:
        [N, K, P, Q] with the input's dtype, channels_last where the input is, else contiguous.

    Raises:
        TypeError: an argument that is not a tensor or not an int; dtypes that are not supported or differ.
        ValueError: shapes, stride, padding, dilation or groups that do not fit each other; eta not above 0.
        RuntimeError: tensors on different devices, or whose memory was freed; second derivatives and forward-mode AD,
            which are not supported.
    """
    pairs = plain_pairs(stride, padding, dilation)
    if pairs is None:
        names = "stride", "padding", "dilation"
        stride, padding, dilation = map(arguments.schema_pair, names, (stride, padding, dilation))
    if type(groups) is not int:
        groups = arguments.schema_integer("groups", groups)
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export() and export_hook.symbol is not None:
        return export_hook.symbol(input, weight, bias, stride, padding, dilation, groups)
    kernels = find_kernels(input, weight, bias)
    if kernels is None:
        arguments.check_are_tensors(input, weight, bias)
    if eta != ETA:
        arguments.check_eta("adder2d", eta)
        # Whether a symbol of torch.fx will need a gradient is not known.
        if not isinstance(weight, torch.fx.Proxy) and not (weight.requires_grad and torch.is_grad_enabled()):
            eta = ETA
    if kernels is not None and pairs is not None:
        return with_autograd(kernels.forward, input, weight, bias, pairs[0], pairs[1], pairs[2], groups, eta)
    if eta == ETA:
        return adder2d_op(input, weight, bias, stride, padding, dilation, groups)
    # Graphs for inference. Dynamo of some torch versions takes is_exporting() for true in any compilation; what it traces
    # itself for an export keeps adder2d_eta until run_decompositions().
    # Through the public name, which Dynamo knows.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch.jit does not list it
    if tracing or (_is_exporting() and not torch.compiler.is_dynamo_compiling()):
        return adder2d_op(input, weight, bias, stride, padding, dilation, groups)
    return adder2d_eta_op(input, weight, bias, stride, padding, dilation, groups, eta)
