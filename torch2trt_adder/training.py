"""What a training loop asks for: an end with a reason as soon as it diverges, and before it replaces a checkpoint."""

import math

from torch import Tensor, nn


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
