"""ResNet-20 and ResNet-50 of the AdderNet paper (CVPR 2020, arXiv 1912.13200).

As there, the first and the last layer are convolutions and every layer between them, downsampling included, is an adder
layer. Parameters carry the names of the published code, so that its checkpoints load with strict=True.
"""

import torch
from torch import Tensor, nn

from ..nn.adder2d import Adder2d


def _adder_bn(in_planes: int, planes: int, kernel_size: int, stride: int = 1) -> tuple[Adder2d, nn.BatchNorm2d]:
    return Adder2d(in_planes, planes, kernel_size, stride=stride, padding=kernel_size // 2), nn.BatchNorm2d(planes)


class BasicBlock(nn.Module):
    """Two 3x3 adder layers; the block of ResNet-20."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = _adder_bn(in_planes, planes, 3, stride)
        self.conv2, self.bn2 = _adder_bn(planes, planes, 3)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.relu(out + residual)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 adder layers; the block of ResNet-50. The 3x3 layer has the stride."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = _adder_bn(in_planes, planes, 1)
        self.conv2, self.bn2 = _adder_bn(planes, planes, 3, stride)
        self.conv3, self.bn3 = _adder_bn(planes, planes * self.expansion, 1)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = self.relu(out + residual)
        return out


class ResNet(nn.Module):
    """Stem, stages of residual adder blocks, global pooling, 1x1 convolution and BatchNorm.

    `planes[i]` filters and `blocks[i]` blocks in stage i; every stage but the first halves the image.
    Input [N, 3, H, W], output [N, num_classes].
    """

    def __init__(
        self,
        stem: dict[str, nn.Module],
        block: type[BasicBlock] | type[Bottleneck],
        planes: list[int],
        blocks: list[int],
        pool: nn.Module,
        num_classes: int,
        fc_bias: bool,
    ) -> None:
        super().__init__()
        for name, layer in stem.items():
            self.add_module(name, layer)
        self.stem = list(stem)
        self.stages = [f"layer{i + 1}" for i in range(len(planes))]
        in_planes = planes[0]
        for i, name in enumerate(self.stages):
            layers = []
            for j in range(blocks[i]):
                stride = 2 if i > 0 and j == 0 else 1
                out_planes = planes[i] * block.expansion
                downsample = None
                if stride != 1 or in_planes != out_planes:
                    downsample = nn.Sequential(*_adder_bn(in_planes, out_planes, 1, stride))
                layers.append(block(in_planes, planes[i], stride, downsample))
                in_planes = out_planes
            self.add_module(name, nn.Sequential(*layers))
        self.avgpool = pool
        self.fc = nn.Conv2d(in_planes, num_classes, 1, bias=fc_bias)
        self.bn2 = nn.BatchNorm2d(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for name in (*self.stem, *self.stages):
            x = getattr(self, name)(x)
        x = self.bn2(self.fc(self.avgpool(x)))
        return torch.flatten(x, 1)


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20 for 32x32 images (CIFAR): 3 stages of 3 basic blocks with 16, 32 and 64 filters."""
    stem = {"conv1": nn.Conv2d(3, 16, 3, padding=1, bias=False), "bn1": nn.BatchNorm2d(16), "relu": nn.ReLU()}
    return ResNet(stem, BasicBlock, [16, 32, 64], [3, 3, 3], nn.AvgPool2d(8, stride=1), num_classes, fc_bias=False)


def resnet50(num_classes: int = 1000) -> ResNet:
    """ResNet-50 for 224x224 images (ImageNet): 3, 4, 6 and 3 bottleneck blocks with 64, 128, 256 and 512 filters."""
    stem = {
        "conv1": nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        "bn1": nn.BatchNorm2d(64),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }
    model = ResNet(
        stem, Bottleneck, [64, 128, 256, 512], [3, 4, 6, 3], nn.AdaptiveAvgPool2d((1, 1)), num_classes, fc_bias=True
    )
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return model
