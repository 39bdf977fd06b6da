"""Small networks in the manner of VGG, DenseNet, MobileNet, ShuffleNet, U-Net, YOLO and SSD, with adder layers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch2trt_adder import Adder2d

Layer = Callable[..., nn.Module]  # Adder2d, or another class with its arguments


def unit(layer: Layer, c: int, k: int, r: int, act: nn.Module | None = None, **geometry: int) -> nn.Sequential:
    padding = geometry.pop("padding", r // 2)
    return nn.Sequential(
        layer(c, k, r, padding=padding, bias=False, **geometry),
        nn.BatchNorm2d(k),
        nn.ReLU(True) if act is None else act,
    )


class Vgg(nn.Module):
    """As torchvision's: adaptive pooling to 7 x 7 of maps of another size, dropout, flatten, linear layers."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.features = nn.Sequential(
            unit(nn.Conv2d, 3, 8, 3), unit(layer, 8, 12, 3), nn.MaxPool2d(2, 2), unit(layer, 12, 16, 3), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10), nn.LogSoftmax(dim=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), (7, 7))
        return self.classifier(torch.flatten(x, 1))


class DenseNet(nn.Module):
    """Layers that see all before them; a transition that halves the map without naming a stride."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.stem = unit(nn.Conv2d, 3, 8, 3)
        self.first = nn.ModuleList(unit(layer, 8 + 4 * i, 4, 3) for i in range(3))
        self.squeeze = unit(layer, 20, 10, 1)
        self.second = nn.ModuleList(unit(layer, 10 + 4 * i, 4, 3) for i in range(2))
        self.norm, self.fc = nn.BatchNorm2d(18), nn.Linear(18, 5)

    def _dense(self, x: Tensor, layers: nn.ModuleList) -> Tensor:
        features = [x]
        for dense in layers:
            features.append(dense(torch.cat(features, 1)))
        return torch.cat(features, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.squeeze(self._dense(self.stem(x), self.first)), 2)
        x = F.relu(self.norm(self._dense(x, self.second)), inplace=True)
        return self.fc(F.avg_pool2d(x, kernel_size=x.shape[-1]).view(x.size(0), -1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)), inplace=True))
        return F.hardsigmoid(gate, inplace=True) * x


class MobileNet(nn.Module):
    """Inverted residuals of versions 2 and 3: depth-wise adder layers, ReLU6, hard-swish, squeeze and excitation."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.stem = unit(nn.Conv2d, 3, 8, 3, nn.Hardswish(inplace=True), stride=2)
        self.two = nn.Sequential(
            unit(layer, 8, 16, 1, nn.ReLU6(True)),
            unit(layer, 16, 16, 3, nn.ReLU6(True), groups=16),
            unit(layer, 16, 8, 1, nn.Identity()),
        )
        self.three = nn.Sequential(
            unit(layer, 8, 16, 1, nn.Hardswish(True)),
            unit(layer, 16, 16, 5, nn.Hardswish(True), groups=16),
            SqueezeExcite(16),
            unit(layer, 16, 8, 1, nn.Identity()),
        )
        self.head = nn.Sequential(nn.Linear(8, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.two(x)
        x = x.add(self.three(x))
        return self.head(x.mean([-2, -1]))


class ShuffleNet(nn.Module):
    """Version 2: chunk, cat and the channel shuffle."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.stem = nn.Sequential(unit(nn.Conv2d, 3, 8, 3), nn.MaxPool2d(3, 2, 1))
        self.branch = nn.Sequential(
            unit(layer, 4, 4, 1), unit(layer, 4, 4, 3, nn.Identity(), groups=4), unit(layer, 4, 4, 1)
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.stem(x).chunk(2, dim=1)
        x = torch.cat((kept, self.branch(changed)), dim=1)
        n, c, h, w = x.size()
        x = torch.transpose(x.view(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, c, h, w)
        return self.fc(x.mean([2, 3]))


class UNet(nn.Module):
    """Both ways up, transposed convolution and interpolation, with maps padded to the size of the skipped ones."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.down = nn.ModuleList([unit(nn.Conv2d, 3, 8, 3), unit(layer, 8, 12, 3), unit(layer, 12, 16, 3)])
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.join = nn.ModuleList([unit(layer, 24, 8, 3), unit(layer, 16, 8, 3)])
        self.last = nn.Conv2d(8, 2, 1)

    def _fit(self, x: Tensor, like: Tensor) -> Tensor:
        dy, dx = like.size()[2] - x.size()[2], like.size()[3] - x.size()[3]
        return F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])

    def forward(self, x: Tensor) -> Tensor:
        a = self.down[0](x)
        b = self.down[1](F.max_pool2d(a, 2))
        c = self.down[2](F.max_pool2d(b, 2))
        b = self.join[0](torch.cat([b, self._fit(self.up(c), b)], dim=1))
        up = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=True)
        return self.last(self.join[1](torch.cat([a, self._fit(up, a)], dim=1)))


class Yolo(nn.Module):
    """Focus, SiLU, split, spatial pyramid pooling, upsampling to the size of a skipped map, heads for two scales."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.stem = unit(nn.Conv2d, 12, 8, 3, nn.SiLU(True))
        self.down = unit(layer, 8, 16, 3, nn.SiLU(), stride=2)
        self.part = unit(layer, 8, 8, 3, nn.Mish())
        self.pyramid = unit(layer, 64, 16, 1, nn.SiLU())
        self.up = nn.Upsample(None, 2, "nearest")
        self.heads = nn.ModuleList([nn.Conv2d(24, 14, 1), nn.Conv2d(16, 14, 1)])

    def _decode(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = x.view(n, 2, 7, h, w).permute(0, 1, 3, 4, 2).contiguous()
        xy, wh, rest = x.sigmoid().split((2, 2, 3), 4)
        return torch.cat((xy * 2 - 0.5, (wh * 2) ** 2, rest), 4).view(n, -1, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        fine = self.stem(x)
        a, b = self.down(fine).split(8, dim=1)
        x = torch.cat([a, self.part(b)], 1)
        x = self.pyramid(torch.cat([x, *(F.max_pool2d(x, r, stride=1, padding=r // 2) for r in (3, 5, 7))], 1))
        return torch.cat(
            [self._decode(self.heads[0](torch.cat([self.up(x), fine], 1))), self._decode(self.heads[1](x))], 1
        )


class Ssd(nn.Module):
    """Pooling in ceil mode, a dilated layer, the L2 norm, heads that end in permute and view(-1)."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.first = unit(nn.Conv2d, 3, 8, 3)
        self.second = unit(layer, 8, 12, 3)
        self.third = unit(layer, 12, 16, 3, padding=6, dilation=6)
        self.scale = nn.Parameter(torch.full((12,), 20.0))
        self.heads = nn.ModuleList([nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)])

    def _norm(self, x: Tensor) -> Tensor:
        norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
        return self.scale.unsqueeze(0).unsqueeze(2).unsqueeze(3).expand_as(x) * torch.div(x, norm)

    def forward(self, x: Tensor) -> Tensor:
        a = self.second(F.max_pool2d(self.first(x), kernel_size=2, stride=2, ceil_mode=True))
        b = self.third(F.max_pool2d(a, 3, 1, 1))
        maps = [head(y).permute(0, 2, 3, 1).contiguous() for head, y in zip(self.heads, (self._norm(a), b))]
        boxes = torch.cat([y.view(y.size(0), -1) for y in maps], 1)
        return F.softmax(boxes.view(boxes.size(0), -1, 4), dim=-1)


NETWORKS: dict[str, tuple[Callable[[Layer], nn.Module], tuple[int, int, int]]] = {
    "vgg": (Vgg, (3, 24, 20)),
    "densenet": (DenseNet, (3, 16, 16)),
    "mobilenet": (MobileNet, (3, 20, 18)),
    "shufflenet": (ShuffleNet, (3, 17, 19)),
    "unet": (UNet, (3, 21, 26)),
    "yolo": (Yolo, (3, 32, 48)),
    "ssd": (Ssd, (3, 23, 19)),
}


def network(name: str, layer: Layer = Adder2d) -> nn.Module:
    return NETWORKS[name][0](layer)
