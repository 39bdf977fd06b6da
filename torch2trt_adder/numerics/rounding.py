"""How far rounding alone may move a network's outputs."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import tolerance

_TRIALS, _FACTOR = 3, 2


# ---- how far two correct implementations may differ


def rounding_bounds(model: Callable[..., Any], inputs: Sequence[Any], fp16: bool = False) -> Any:
    """How far rounding alone may move each output of `model`: a 0-d float64 tensor in the place of each tensor.

    A network's own condition decides that: BatchNorm subtracts a large mean from an adder layer's sums, which magnifies
    their rounding. So the bound is measured, not guessed: the model runs with the result of every operation moved by as
    much as rounding may move it there, up or down at random, `_TRIALS` times; the bound is `_FACTOR` times the largest
    change seen, the factor standing for the trials not made, plus one rounding of the output.

    How much an operation's result may move, with u = eps / 2 of its type, one rounding (of float16 for `fp16`):
    * adder2d: `tolerance.relative_error` of |y| + |bias|, what sequential float32 sums of one sign stay within; its
      result stays float32 for `fp16`, its input is rounded where it is computed.
    * adder2d_fused: the same for its sum, times |scale|, and one rounding of each value on the way to the limits.
    * convolutions and matrix products over L terms: u * (1 + sqrt(L) / 4) of |y| + rms(y), for rounded factors and for
      partial sums of both signs, whose roundings add up like a random walk; in float32 on a GPU plus 2^-10 of it, since
      both PyTorch and TensorRT may use TF32 (NVIDIA_TF32_OVERRIDE=0 disables it in both).
    * sums and means over L terms: u of |y| + sqrt(L) * the sum (mean) of |x|, since the terms may have one sign;
      variances and deviations u * (1 + sqrt(L)) of |y|.
    * curves that runtimes approximate: 4 * u of |y| + 1, or of |y| + |x| where they are factors of x (measured: ONNX
      Runtime's sigmoid is off by 2.8 * u, its tanh by 5.5 * u).
    * everything else: u of |y|.
    """
    with torch.no_grad():
        expected = model(*inputs)
        bounds = tree_map(
            lambda t: torch.zeros((), dtype=torch.float64, device=t.device) if isinstance(t, Tensor) else t, expected
        )
        for trial in range(_TRIALS):
            rounding = _Rounding(fp16, seed=trial)
            with rounding:
                moved = model(*(rounding.move(t) if fp16 and isinstance(t, Tensor) else t for t in inputs))
            for bound, y, y0 in zip(tree_leaves(bounds), tree_leaves(moved), tree_leaves(expected), strict=True):
                if isinstance(y0, Tensor) and y0.numel() > 0:
                    change = (y.double() - y0.double()).abs().nan_to_num(0, 0, 0).max()
                    last = _unit(y0, fp16) * y0.double().abs().nan_to_num(0, 0, 0).max()
                    torch.maximum(bound, _FACTOR * change + last, out=bound)
    return bounds


def _unit(tensor: Tensor, fp16: bool) -> float:
    """The largest relative error of one rounding."""
    if not tensor.is_floating_point():
        return 0.0
    eps = torch.finfo(tensor.dtype).eps
    return max(eps, torch.finfo(torch.float16).eps) / 2 if fp16 else eps / 2


_aten = torch.ops.aten
_TERMS = {  # of a product: the length of its sums, from the arguments
    _aten.convolution: lambda args: args[1][0].numel(),
    _aten.mm: lambda args: args[0].shape[-1],
    _aten.bmm: lambda args: args[0].shape[-1],
    _aten.addmm: lambda args: args[1].shape[-1],
    _aten.baddbmm: lambda args: args[1].shape[-1],
}
_SUMS, _SPREADS = (_aten.sum, _aten.mean), (_aten.var, _aten.std)
_CURVES, _GATES = (_aten.sigmoid, _aten.tanh, _aten.elu), (_aten.silu, _aten.gelu, _aten.mish)


class _Rounding(TorchDispatchMode):
    """Moves every result by as much as rounding may, up or down at random."""

    def __init__(self, fp16: bool, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fp16, self.seed = fp16, seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def move(self, y: Any, bound: Tensor | float | None = None) -> Any:
        """y + or - bound (default: one rounding of y), the sign at random for each element."""
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        if y.device not in self.generators:
            self.generators[y.device] = torch.Generator(y.device).manual_seed(self.seed)
        wide = y.double() if y.dtype is torch.float64 else y.float()
        if bound is None:
            bound = _unit(y, self.fp16) * wide.abs()
        sign = torch.empty_like(wide).bernoulli_(0.5, generator=self.generators[y.device]).mul_(2).sub_(1)
        return (wide + sign * bound).to(y.dtype)

    def move_fused(self, func: Any, args: Sequence[Any]) -> Tensor:
        """adder2d_fused with its values moved before the limits, which cut what was moved beyond them."""
        dtype = args[0].dtype
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        input, weight = args[0].to(wide), args[1].to(wide)
        bias, residual = (None if t is None else t.to(wide) for t in (args[2], args[5]))
        scale, shift = (None if t is None else t.to(wide)[:, None, None] for t in args[3:5])
        lower, upper = args[10:]
        y = func(input, weight, bias, None, None, None, *args[6:10], None, None)
        size = y.abs() if bias is None else y.abs() + bias.abs()[:, None, None]
        bound = tolerance.sum_error(weight[0].numel(), dtype) * size
        if scale is not None:
            y, bound = y * scale, bound * scale.abs()
        normalized = y if shift is None else y + shift
        # Two roundings in float32 before it, and three to the type of the result in a network that is not fused.
        bound += torch.finfo(wide).eps * (y.abs() + normalized.abs())
        y = normalized if residual is None else normalized + residual
        bound += _unit(args[0], self.fp16) * (normalized.abs() + 2 * y.abs())
        y = self.move(y, bound)
        assert isinstance(y, Tensor)
        return y if lower is None and upper is None else y.clamp(lower, upper)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is torch.ops.torch2trt_adder.adder2d:
            weight, bias = args[1:3]
            size = result.float().abs() + (0 if bias is None else bias.abs()[:, None, None])
            return self.move(result, tolerance.relative_error(weight[0].numel(), result.dtype) * size)
        if packet is torch.ops.torch2trt_adder.adder2d_fused:
            return self.move_fused(func, args).to(result.dtype)
        if packet in _TERMS:
            relative = _unit(result, self.fp16) * (1 + math.sqrt(_TERMS[packet](args)) / 4)
            if result.dtype is torch.float32 and result.is_cuda and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
                relative += 2**-10
            size = result.float().abs()
            return self.move(result, relative * (size + size.square().mean().sqrt()))
        if packet in (*_SUMS, *_SPREADS) and result.is_floating_point() and result.numel() > 0:
            root = math.sqrt(args[0].numel() / result.numel())
            terms = func(args[0].abs(), *args[1:], **(kwargs or {})) if packet in _SUMS else result
            return self.move(result, _unit(result, self.fp16) * (result.float().abs() + root * terms.float().abs()))
        if packet in (*_CURVES, *_GATES):
            size = result.float().abs() + (args[0].float().abs() if packet in _GATES else 1)
            return self.move(result, 4 * _unit(result, self.fp16) * size)
        writes = any(argument.alias_info is not None for argument in func._schema.arguments)
        computes = any(isinstance(leaf, Tensor) for leaf in tree_leaves(args))
        if writes or not computes:  # a view, in place, or a new constant
            return result
        return tree_map(self.move, result)
