"""The adder layer of fused networks: BatchNorm folded into it, and the residual sum and limits that follow."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks
from .adder2d import Adder2d


class FusedAdder2d(nn.Module):
    """``clamp(scale[k] * adder2d(input, adder, b) + shift[k] + residual, lower, upper)``, for inference.

    `fuse` puts it in the place of an `Adder2d` and of what follows it. It computes no gradients.

    Args:
        layer: whose parameters, dtype and device it has.
        scale, shift: [K], any floating-point dtype; kept in float32, whatever dtype the layer is converted to later.
        lower, upper: limits of the output, or None.

    Attributes:
        adder: parameter [K, C / groups, R, S], which requires no gradient.
        b: parameter [K], or None; likewise.
        scale, shift: buffers [K], float32.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, layer: Adder2d, scale: Tensor, shift: Tensor, lower: float | None = None, upper: float | None = None
    ) -> None:
        super().__init__()
        self.input_channel, self.output_channel = layer.input_channel, layer.output_channel
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups
        self.lower, self.upper = lower, upper
        self.adder = nn.Parameter(layer.adder.detach(), requires_grad=False)
        self.b = None if layer.b is None else nn.Parameter(layer.b.detach(), requires_grad=False)
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, values.detach().to(layer.adder.device, torch.float32))
        self.eval()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W], and what is added to the output before its limits -> [N, K, P, Q]."""
        geometry = self.stride, self.padding, self.dilation, self.groups
        layer = input, self.adder, self.b, self.scale, self.shift
        # Through the module: torch2trt hooks the function by its qualified name.
        if residual is None or self._fits(residual, input):
            return ops.adder2d_fused(*layer, residual, *geometry, self.lower, self.upper)
        y = ops.adder2d_fused(*layer, None, *geometry) + residual
        return y if self.lower is None and self.upper is None else y.clamp(self.lower, self.upper)

    def _fits(self, residual: Tensor, input: Tensor) -> bool:
        """Whether the operator can add it. Other sums, which broadcast or promote, are left to PyTorch."""
        return (
            isinstance(residual, Tensor)
            and residual.dtype == input.dtype
            and residual.dim() == 4
            and checks.tensor_size(residual)[1] == self.output_channel
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedAdder2d":
        exact = {"scale": self.scale, "shift": self.shift}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype is not torch.float32:  # .half() and .double(): float32 is what the operator reads
                setattr(self, name, before.to(after.device))
        for parameter in self._parameters.values():  # as Adder2d: kernels read contiguous filters
            if parameter is not None and not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        return self

    def extra_repr(self) -> str:
        text = f"{self.input_channel}, {self.output_channel}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "lower": None, "upper": None}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text
