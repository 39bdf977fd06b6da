"""The adder layer as a module."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks
from ..utils import arguments


class Adder2d(nn.Module):
    """``y[n,k,p,q] = b[k] - sum over c,r,s of |x - adder[k,c,r,s]|`` on [N, C, H, W], with the gradients of AdderNet.

    Constructor and parameter names are those of the published AdderNet code, whose checkpoints load with
    ``strict=True``; dilation, groups and pairs for height and width come on top.

    Args:
        input_channel, output_channel: C and K.
        kernel_size, stride, padding, dilation: one int, or a pair for height and width.
        bias: whether the layer has a bias ``b`` (the attribute ``bias`` is this flag, as in the published code).
        groups: divides C and K; groups == C makes the layer depth-wise.
        eta: of the adaptive scaling of the weight gradient inside backward(); None leaves that gradient as it is, for
            `scale_gradients` to scale it later. May be changed at any time.

    Attributes:
        adder: parameter [K, C / groups, R, S].
        b: parameter [K], or None without a bias.

    Raises:
        TypeError: a bias that is not a bool (the sixth argument of `torch.nn.Conv2d` is the dilation); an eta that is
            not a number.
        ValueError: a size, stride, padding, dilation or groups that is not an int or out of range; an eta out of range.
    """

    def __init__(
        self,
        input_channel: int,
        output_channel: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        bias: bool = False,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        eta: float | None = checks.ETA,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        input_channel = arguments.count_of("Adder2d", "input_channel", input_channel)
        output_channel = arguments.count_of("Adder2d", "output_channel", output_channel)
        groups = arguments.count_of("Adder2d", "groups", groups)
        if not isinstance(bias, bool | np.bool_):
            raise TypeError(
                f"Adder2d: bias must be True or False, got {bias!r}; pass dilation and groups by name, whose places "
                "differ from those of torch.nn.Conv2d."
            )
        if input_channel % groups != 0 or output_channel % groups != 0:
            raise ValueError(
                f"Adder2d: groups must divide input_channel {input_channel} and output_channel {output_channel}, "
                f"got {groups}."
            )
        self.input_channel = input_channel
        self.output_channel = output_channel
        self.kernel_size = arguments.pair_of("Adder2d", "kernel_size", kernel_size, 1)
        self.stride = arguments.pair_of("Adder2d", "stride", stride, 1)
        self.padding = arguments.pair_of("Adder2d", "padding", padding, 0)
        self.dilation = arguments.pair_of("Adder2d", "dilation", dilation, 1)
        self.groups = groups
        arguments.check_eta("Adder2d", eta)
        self.eta = eta
        self.bias = bool(bias)
        size = (output_channel, input_channel // groups, *self.kernel_size)
        self.adder = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(output_channel, device=device, dtype=dtype)) if self.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: adder ~ N(0, 1), b ~ U(0, 1)."""
        nn.init.normal_(self.adder)
        if self.b is not None:
            nn.init.uniform_(self.b)

    def forward(self, input: Tensor) -> Tensor:
        # Through the module: torch2trt hooks the function by its qualified name.
        return ops.adder2d(input, self.adder, self.b, self.stride, self.padding, self.dilation, self.groups, self.eta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adder2d":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # model.to(memory_format=torch.channels_last) turns every 4-D parameter, but the kernels read filters as they are
        # in a contiguous one: each call would copy them. (`adder` itself is not a parameter while it is pruned.)
        for parameter in self._parameters.values():
            if parameter is not None and not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        return self

    def extra_repr(self) -> str:
        text = f"{self.input_channel}, {self.output_channel}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "bias": False, "eta": checks.ETA}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text
