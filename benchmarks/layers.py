"""The layers that everything is timed on, by name."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """x [N, C, H, H], w [K, C / groups, R, R]; one stride and one padding for both axes, no dilation."""

    N: int
    C: int
    H: int
    K: int
    R: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @property
    def P(self) -> int:
        """Height and width of the output."""
        return (self.H + 2 * self.padding - self.R) // self.stride + 1

    @property
    def CRS(self) -> int:
        """Terms of one output."""
        return self.C // self.groups * self.R**2

    @property
    def macs(self) -> int:
        """Accumulated |x - w| of the layer."""
        return self.N * self.K * self.P**2 * self.CRS

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """Stride, padding, dilation, groups, as adder2d and conv2d take them."""
        return self.stride, self.padding, 1, self.groups

    def __str__(self) -> str:
        more = f" s{self.stride}" if self.stride > 1 else ""
        more += f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.N},{self.C},{self.H}x{self.H},{self.K},{self.R}x{self.R}{more}"

    def tensors(self, dtype: torch.dtype, device: str, channels_last: bool = False) -> tuple[Tensor, Tensor]:
        """x and w: normal draws, the same ones whatever dtype, device and layout, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.N, self.C, self.H, self.H, generator=generator)
        w = torch.randn(self.K, self.C // self.groups, self.R, self.R, generator=generator)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return x.to(device, dtype).contiguous(memory_format=layout), w.to(device, dtype)


GPU_LAYERS = {
    # ResNet-50's 3x3 layers, then two of its 1x1 layers
    "r50-c64": Layer(32, 64, 56, 64, 3, padding=1),
    "r50-c128": Layer(32, 128, 28, 128, 3, padding=1),
    "r50-c256": Layer(32, 256, 14, 256, 3, padding=1),
    "r50-c512": Layer(32, 512, 7, 512, 3, padding=1),
    "r50-1x1-expand": Layer(32, 64, 56, 256, 1),
    "r50-1x1-reduce": Layer(32, 1024, 14, 256, 1),
    # the three stages of the CIFAR ResNet-20
    "r20-stage1": Layer(256, 16, 32, 16, 3, padding=1),
    "r20-stage2": Layer(256, 32, 16, 32, 3, padding=1),
    "r20-stage3": Layer(256, 64, 8, 64, 3, padding=1),
    # latency
    "r50-c64-b1": Layer(1, 64, 56, 64, 3, padding=1),
    "r50-c128-b1": Layer(1, 128, 28, 128, 3, padding=1),
    "r50-c256-b1": Layer(1, 256, 14, 256, 3, padding=1),
    "r50-c512-b1": Layer(1, 512, 7, 512, 3, padding=1),
    "mnist1-b1": Layer(1, 1, 28, 20, 5),
    "mnist2-b1": Layer(1, 20, 12, 50, 5),
    # AdderNetMnist's two layers in larger batches
    "mnist1-b64": Layer(64, 1, 28, 20, 5),
    "mnist2-b64": Layer(64, 20, 12, 50, 5),
    "mnist1-b128": Layer(128, 1, 28, 20, 5),
    "mnist2-b128": Layer(128, 20, 12, 50, 5),
    # other shapes: strides, few channels, depth-wise
    "r50-c128-s2": Layer(32, 128, 56, 128, 3, stride=2, padding=1),
    "r50-1x1-s2": Layer(32, 256, 56, 512, 1, stride=2),
    "r20-s2": Layer(256, 16, 32, 32, 3, stride=2, padding=1),
    "r50-first": Layer(32, 3, 224, 64, 7, stride=2, padding=3),
    "depthwise-c128": Layer(32, 128, 28, 128, 3, padding=1, groups=128),
    "depthwise-c512": Layer(32, 512, 14, 512, 3, padding=1, groups=512),
}

CPU_LAYERS = {
    "cpu-r20-stage1": Layer(8, 16, 32, 16, 3, padding=1),
    "cpu-r20-stage3": Layer(8, 64, 8, 64, 3, padding=1),
    "cpu-r50-c64": Layer(1, 64, 56, 64, 3, padding=1),
    "cpu-r50-c128": Layer(1, 128, 28, 128, 3, padding=1),
    "cpu-r50-c256": Layer(1, 256, 14, 256, 3, padding=1),
    "cpu-r50-c512": Layer(1, 512, 7, 512, 3, padding=1),
    "cpu-r50-1x1-expand": Layer(1, 64, 56, 256, 1),
    "cpu-r20-s2": Layer(8, 32, 32, 64, 3, stride=2, padding=1),
    "cpu-depthwise": Layer(8, 64, 32, 64, 3, padding=1, groups=64),
    "cpu-mnist1": Layer(64, 1, 28, 20, 5),
    "cpu-mnist2": Layer(64, 20, 12, 50, 5),
}
