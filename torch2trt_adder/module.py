"""The adder layer as a module, the options of its training, and what puts it in the place of other layers.

lookalikes.py replaces third-party adder layers (``adopt``), convolutions.py replaces convolutions (``adderize``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import arguments, ops


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
        eta: float | None = ops.ETA,
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
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "bias": False, "eta": ops.ETA}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


# ---- the adaptive scaling, outside of backward()


def set_eta(model: nn.Module, eta: float | None) -> nn.Module:
    """Sets `eta` of all adder layers of a network and returns the network."""
    arguments.check_eta("set_eta", eta)
    for layer in _adder_layers("set_eta", model).values():
        layer.eta = eta
    return model


@torch.no_grad()
def scale_gradients(model: nn.Module, eta: float = ops.ETA) -> None:
    """Scales the gradient of every `adder` to the norm ``eta * sqrt(numel)``: AdderNet's rule, just before the step.

    By default a layer does this inside backward(), as the published code does. Whatever multiplies gradients afterwards
    is then lost or wrong: GradScaler divides the scaled gradient by its loss scale (65536 at first), so that the adder
    layers hardly learn; accumulating n batches adds n scaled gradients, whatever their norms were; several GPUs average
    gradients of which each was scaled by itself. Scaling once, when the gradient is complete, is right for all of them
    and equals the published rule on the whole batch::

        set_eta(model, None)                    # once: backward() leaves the gradient as it is
        ...
        scaler.scale(loss).backward()           # as often as there are batches to accumulate
        scaler.unscale_(optimizer)              # where there is a GradScaler
        scale_gradients(model)
        scaler.step(optimizer)

    A layer that is used several times in one pass has its sum scaled once. Gradients that are None, zero or not finite
    stay None, zero or not finite (GradScaler skips the step).

    Raises:
        ValueError: a layer that has scaled its gradient inside backward() already, or whose `adder` is computed from
            other parameters (pruning, weight_norm); a network without adder layers.
    """
    if eta is None:
        raise ValueError("scale_gradients: eta must be a finite number above 0, got None.")
    arguments.check_eta("scale_gradients", eta)
    layers = _adder_layers("scale_gradients", model)
    for path, layer in layers.items():
        if layer.eta is not None:
            raise ValueError(
                f"scale_gradients: layer {path} has scaled its gradient in backward() already (its eta is "
                f"{layer.eta}); call set_eta(model, None) before training."
            )
        if "adder" not in layer._parameters:
            raise ValueError(
                f"scale_gradients: the `adder` of layer {path} is computed from other parameters (pruning, "
                "weight_norm), so it has no gradient to scale; make it a plain parameter, or give all layers an eta, "
                "which scales inside backward()."
            )
    ops.adaptive_scaling_([a.grad for a in {layer.adder for layer in layers.values()} if a.grad is not None], eta)


def _adder_layers(caller: str, model: nn.Module) -> dict[str, Adder2d]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Adder2d)}
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no Adder2d layer; adopt() makes them from other adder layers, "
            "adderize() from convolutions."
        )
    return layers


# ---- putting layers in the place of others

# What a caller may have hung on a layer. The dicts themselves move, so that a handle's remove() still works.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
# What changes a layer's checkpoints by the names of its own parameters.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def replace_layers(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts new layers in the place of old ones, with their training mode and hooks; returns the network."""
    for old, new in layers.items():
        new.training = old.training
        for name in HOOKS:
            setattr(new, name, getattr(old, name))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in layers:
                parent._modules[name] = layers[child]
    return layers.get(model, model)


def lost_state(module: nn.Module, kept: Sequence[Tensor | None]) -> Iterator[str]:
    """What a layer in the place of `module` would lose, in words, when it has its hooks and the tensors `kept`."""
    known = {id(tensor) for tensor in kept}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in known:
            yield f"its parameter `{name}`"
    for name, _ in module.named_buffers(remove_duplicate=False):
        yield f"its buffer `{name}`"
    if "forward" in vars(module):
        yield "the `forward` that was set on it"
    if any(getattr(module, name, None) for name in _STATE_HOOKS):
        yield "its hooks on state_dict"
