"""A small AdderNet for handwritten digits: LeNet with adder layers in the place of its convolutions."""

import torch
from torch import Tensor, nn

from ..nn.adder2d import Adder2d


class AdderNetMnist(nn.Module):
    """Input [N, 1, 28, 28], output [N, 10]: the scores of the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Adder2d(1, 20, 5)
        self.bn1 = nn.BatchNorm2d(20)
        self.conv2 = Adder2d(20, 50, 5)
        self.bn2 = nn.BatchNorm2d(50)
        self.maxpool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)))  # [N, 20, 12, 12]
        x = self.maxpool(self.bn2(self.conv2(x)))  # [N, 50, 4, 4]
        scores: Tensor = self.fc2(self.relu(self.fc1(torch.flatten(x, 1))))
        return scores


def addernet_mnist() -> AdderNetMnist:
    """Adder 1->20 (5x5), BatchNorm, pool, adder 20->50 (5x5), BatchNorm, pool, 800->500->10; for 28x28 images."""
    return AdderNetMnist()
