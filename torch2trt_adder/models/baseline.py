"""The convolutional baseline of an AdderNet."""

import copy

from torch import nn

from ..nn.adder2d import Adder2d
from ..nn.replace import replace_layers


def cnn_twin(model: nn.Module) -> nn.Module:
    """A copy of a network with a convolution of the same geometry in the place of each adder layer.

    The convolutions start with He's initialisation (normal, fan-out), as ResNet's do.
    """
    model = copy.deepcopy(model)
    convolutions: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, Adder2d):
            convolution = nn.Conv2d(
                layer.input_channel,
                layer.output_channel,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
                layer.bias,
                device=layer.adder.device,
                dtype=layer.adder.dtype,
            )
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            convolutions[layer] = convolution
    return replace_layers(model, convolutions)
