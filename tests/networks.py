"""Networks that tests of several rooms use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def calibrated(model: nn.Module, *shape: int) -> nn.Module:
    """`model` in eval mode, with BatchNorm statistics of a random batch: with untrained ones ReLU cuts all off."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(shape))
    return model.eval()


class adder2d(nn.Module):
    """A published layer: same name and attributes, plain torch for the arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.stride, self.padding, self.bias = 1, 1, False
        self.adder = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.adder.flatten(1), F.unfold(x, 3, 1, 1, 1).mT, p=1).view(len(x), 4, *x.shape[2:])


class SmallResNet(nn.Module):
    """Residual blocks as torchvision's, for adderize: torchvision itself is not needed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.a, self.bna = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.bnb = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = F.relu(x + self.bnb(self.b(F.relu(self.bna(self.a(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
