"""Training: the adaptive scaling outside of backward(), and guards against divergence."""

import math

import torch
from torch import Tensor, nn

from ..ops import checks, scaling
from ..utils import arguments
from .adder2d import Adder2d

# ---- the adaptive scaling, outside of backward()


def set_eta(model: nn.Module, eta: float | None) -> nn.Module:
    """Sets `eta` of all adder layers of a network and returns the network."""
    arguments.check_eta("set_eta", eta)
    for layer in _adder_layers("set_eta", model).values():
        layer.eta = eta
    return model


@torch.no_grad()
def scale_gradients(model: nn.Module, eta: float = checks.ETA) -> None:
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
    scaling.adaptive_scaling_([a.grad for a in {layer.adder for layer in layers.values()} if a.grad is not None], eta)


def _adder_layers(caller: str, model: nn.Module) -> dict[str, Adder2d]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Adder2d)}
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no Adder2d layer; adopt() makes them from other adder layers, "
            "adderize() from convolutions."
        )
    return layers


class DivergedError(RuntimeError):
    """Training cannot recover: the loss or the parameters are not finite."""


def check_loss(loss: Tensor | float, epoch: int, batch: int) -> float:
    """The loss of one batch as a number; before ``optimizer.step()``, which would spread NaN to all parameters.

    Args:
        loss: a number or a tensor of one element. A CUDA tensor is waited for; to wait less often, keep the losses of
            some batches and check them together.
        epoch: counted from 1, for the message.
        batch: within the epoch, counted from 1, for the message.

    Raises:
        DivergedError: the loss is infinite or NaN.
    """
    value = float(loss)
    if not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "infinite"
        raise DivergedError(
            f"the loss became {name} in epoch {epoch}, batch {batch}: training diverged; lower the learning rate."
        )
    return value


def check_parameters(model: nn.Module) -> None:
    """For just before a checkpoint is written: the last step of an epoch shows in no loss of that epoch.

    Raises:
        DivergedError: a parameter or buffer of the network holds NaN, or a parameter an infinite value.
    """
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            bad = tensor.isnan() if kind == "buffer" else ~tensor.isfinite()  # a buffer may be infinite by design
            if bad.any():
                raise DivergedError(
                    f"{kind} {name} is not finite ({int(bad.sum())} of {tensor.numel()} values): training diverged; "
                    "lower the learning rate."
                )
