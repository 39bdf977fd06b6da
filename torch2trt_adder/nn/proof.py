"""The proof that a layer computes adder2d.

A transposed layer has the same attributes as an adder layer. So a copy of each layer runs on a small random input, and
its output is compared with the definition.
"""

import collections
import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..numerics import tolerance
from ..numerics.comparison import Mismatch, compare, compare_form
from .adder2d import Adder2d
from .replace import HOOKS


class CannotRun(Exception):
    """The forward of a layer failed; the text says how, as the end of a sentence about it."""


def why_it_differs(module: nn.Module, layer: Adder2d, training: bool) -> str | None:
    """What tells `module` from `layer`, as the end of a sentence about it, or None where both compute the same.

    A copy of the module runs, without its hooks and with random weights: those that it has may hide a difference (a
    bias of zeros, filters that are symmetric). It is float32 where the module is float16: the function is proved,
    and its rounding is its own.
    """
    device, dtype = layer.adder.device, layer.adder.dtype
    devices = [torch.device("cpu") if device.type == "meta" else device]
    if device.type == "cpu" and torch.cuda.is_available():
        devices.append(torch.device("cuda"))  # for code that has nothing but a CUDA kernel
    dtype = dtype if dtype is torch.float64 else torch.float32
    failures = []
    for device, shape in itertools.product(devices, _probe_shapes(layer)):
        try:
            return _compare(module, layer, shape, device, dtype, (False, True) if training else (False,))
        except CannotRun as error:
            failures.append(error)
    raise failures[0]


def _probe_shapes(layer: Adder2d) -> Iterator[tuple[int, int, int, int]]:
    """Small inputs that reach all taps, the padding and two steps of the stride; at last a square one."""
    kernel = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    height, width = (
        max(k, k + stride - 2 * pad) for k, stride, pad in zip(kernel, layer.stride, layer.padding, strict=True)
    )
    width += 1 + (width + 1 == height)
    samples = 2 if layer.adder.numel() < 2**20 else 1  # published code holds [K, CRS, NPQ] at once
    yield samples, layer.input_channel, height, width
    yield samples, layer.input_channel, max(height, width), max(height, width)


def _compare(
    module: nn.Module,
    layer: Adder2d,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    modes: Sequence[bool],
) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def draw(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu", dtype=dtype)

    weight, bias = draw(layer.adder.shape), None if layer.b is None else draw(layer.b.shape)
    x = draw(shape)
    x[-1] *= 100  # beyond the range of what clamps its input
    with (
        torch.no_grad(),
        torch.random.fork_rng([] if device.type != "cuda" else [device]),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            trial = _bare_copy(module, [(layer.adder, weight), (layer.b, bias)]).to(device, dtype)
        except Exception as error:
            raise CannotRun(f"cannot be copied to be tried ({_first_line(error)})") from error
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        exact = None if bias is None else bias.double()
        expected = reference.adder2d(x.double(), weight.double(), exact, *geometry)
        for training in modes:
            trial.train(training)
            try:
                output = trial.forward(x.to(device, copy=True))
            except Exception as error:
                raise CannotRun(
                    f"cannot be tried on an input {list(shape)} on {device} ({_first_line(error)})"
                ) from error
            reason = _why_not_comparable(output)
            if reason is None:
                mismatch = difference(output.cpu(), expected, bias, layer.adder[0].numel())
                reason = None if mismatch is None else mismatch.text("its output", "the layer", "the definition")
            if reason is not None:
                return f"does not compute adder2d {'in training mode' if training else 'in evaluation mode'}: {reason}"
    return None


def _bare_copy(module: nn.Module, tensors: Sequence[tuple[nn.Parameter | None, Tensor | None]]) -> nn.Module:
    """A deep copy of a layer without its hooks, with other tensors in the place of its parameters."""
    bare = copy.copy(module)
    for name in HOOKS:
        vars(bare)[name] = None if name == "_is_full_backward_hook" else collections.OrderedDict()
    others = {id(old): nn.Parameter(new, requires_grad=False) for old, new in tensors if new is not None}
    return copy.deepcopy(bare, others)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _why_not_comparable(output: Any) -> str | None:
    if not isinstance(output, Tensor):
        return f"it returns a {type(output).__name__}, not a tensor"
    if not output.is_floating_point():
        return f"its output is {output.dtype}, not floating point"
    return None


def difference(
    output: Tensor, expected: Tensor, bias: Tensor | None, length: int, same_dtype: bool = False
) -> Mismatch | None:
    """How an output of adder2d differs from another one beyond rounding, or None where it does not.

    Both may err, each by the tolerance rule. Where `expected` is not finite, anything is right.

    Args:
        output: [N, K, P, Q].
        expected: [N, K, P, Q], on the same device.
        bias: [K], on any device; it may cancel the sum, so it counts as one more term.
        length: the number of terms of one output value, C / groups * R * S.
        same_dtype: outputs of different dtypes differ.
    """
    mismatch = compare_form(output, expected, same_dtype)
    if mismatch is not None:
        return mismatch
    y0 = expected.detach().double()
    offset = y0.new_zeros(()) if bias is None else bias.detach().to(y0)[:, None, None]
    error = max(tolerance.relative_error(length, t.dtype) for t in (output, expected))
    return compare(output, expected, 2 * error * ((y0 - offset).abs() + offset.abs()), nonfinite="ignore")
