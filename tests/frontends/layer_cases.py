"""Calls of PyTorch functions that networks with adder layers make, as one table for the tests of torch2trt's converters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]
CHANNELS = 8  # each function gets [N, 8, H, W], of both signs


class Call(nn.Module):
    """A function of one tensor, with parameters where it needs them."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def _shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """ShuffleNet's channel shuffle, as torchvision writes it."""
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def _squeeze_excite(x: Tensor, weight: Tensor) -> Tensor:
    n, c, _, _ = x.size()
    gate = torch.sigmoid(F.linear(F.adaptive_avg_pool2d(x, 1).view(n, c), weight)).view(n, c, 1, 1)
    return x * gate.expand_as(x)


def _l2_norm(x: Tensor, weight: Tensor) -> Tensor:
    """SSD's, as it was published."""
    norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
    return weight.unsqueeze(0).unsqueeze(2).unsqueeze(3).expand_as(x) * torch.div(x, norm)


def _focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def _boxes(x: Tensor) -> Tensor:
    """YOLO's head, without its arithmetic on grids."""
    n, _, h, w = x.shape
    x = x.view(n, 2, 4, h, w).permute(0, 1, 3, 4, 2).contiguous()
    return torch.cat([x[..., :2].sigmoid() * 2 - 0.5, (x[..., 2:4].sigmoid() * 2) ** 2], -1).view(n, -1, 4)


def _crop_and_join(x: Tensor) -> Tensor:
    """U-Net's: the smaller map is padded to the larger one's size."""
    small = F.max_pool2d(x, 3, 2)
    up = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=True)
    dy, dx = x.size()[2] - up.size()[2], x.size()[3] - up.size()[3]
    return torch.cat([x, F.pad(up, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])], dim=1)


def _option_a(x: Tensor) -> Tensor:
    """The shortcut of the ResNets for CIFAR."""
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, CHANNELS // 4, CHANNELS // 4), "constant", 0)


def _in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.add_(x).mul_(0.5).sub_(1).relu_()
    y += x
    return y.clamp_(-1, 2)


# Any batch and any size of the maps.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "avg_pool_stride": lambda x: F.avg_pool2d(x, kernel_size=3, stride=2, padding=1),
    "avg_pool_exclude": lambda x: F.avg_pool2d(x, [3, 2], [2, 1], [1, 1], count_include_pad=False),
    "avg_pool_ceil": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "avg_pool_divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=4),
    "avg_pool_1d": lambda x: F.avg_pool1d(x.flatten(2), 3, padding=1),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool_negative": lambda x: F.max_pool2d(-x.abs() - 1, 3, 2, 1),
    "max_pool_spp": lambda x: F.max_pool2d(x, 5, stride=1, padding=2),
    "max_pool_ceil": lambda x: F.max_pool2d(x - 9, 2, 2, ceil_mode=True),
    "max_pool_1d": lambda x: F.max_pool1d(x.flatten(2), 2),
    "adaptive_avg_1": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "adaptive_avg_1_none": lambda x: F.adaptive_avg_pool2d(x, (1, None)),
    "adaptive_max_1": lambda x: F.adaptive_max_pool2d(x, (1, 1)),
    "add_alpha": lambda x: torch.add(x, x.abs(), alpha=2) + x.add(1, alpha=-3),
    "sub_alpha": lambda x: torch.sub(x, x.abs(), alpha=0.5) - x.sub(other=2),
    "mul_div": lambda x: x.mul(3).div(x.abs() + 1) * torch.mul(2, x),
    "in_place": _in_place,
    "square": lambda x: x**2 + x.pow(2) + torch.square(x) + x.abs().pow(0.5),
    "relu6": nn.ReLU6(),
    "relu6_in_place": lambda x: nn.ReLU6(inplace=True)(x + 1),
    "hardswish": nn.Hardswish(),
    "hardswish_in_place": lambda x: nn.Hardswish(inplace=True)(x * 2),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardtanh": nn.Hardtanh(-0.5, 1.5),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(beta=2),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "leaky_relu": nn.LeakyReLU(0.1, inplace=False),
    "prelu": lambda x, w: F.prelu(x, w.abs()),
    "tanh_sigmoid": lambda x: x.tanh() * x.sigmoid() + torch.tanh(x) * torch.sigmoid(x),
    "softmax": lambda x: torch.softmax(x, -1) + F.softmax(x, dim=1) + x.softmax(2),
    "log_softmax": lambda x: F.log_softmax(100 * x.flatten(1), dim=1),
    "log_softmax_module": lambda x: nn.LogSoftmax(-1)(x),
    "mean": lambda x: (
        x.mean([2, 3], keepdim=True) + x.mean((-1, -2)).unsqueeze(-1).unsqueeze(-1) + torch.mean(x, -1, True)
    ),
    "sum_negative": lambda x: x.sum(-1) + torch.sum(x, [3]) + x.sum(dim=-1, keepdim=False),
    "max_min": lambda x: torch.max(x, -1, keepdim=True)[0] - x.min(dim=-1, keepdim=True).values + torch.max(x, -x),
    "amax": lambda x: x.amax((2, 3)) - torch.amin(x, dim=(-1, -2)),
    "normalize": lambda x: F.normalize(x, dim=1) + F.normalize(x, p=1.0, dim=-1),
    "l2_norm": _l2_norm,
    "squeeze_excite": _squeeze_excite,
    "shuffle": _shuffle,
    "shuffle_module": lambda x: F.channel_shuffle(x, 4),
    "chunk": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], 1) * torch.cat(torch.chunk(x, 3, -3)[::-1], -3),
    "split": lambda x: torch.cat((x.split(3, dim=1)[1], torch.split(x, [3, 5], 1)[1]), dim=1),
    "narrow": lambda x: x.narrow(1, 2, 3) + torch.narrow(x, dim=-3, start=-3, length=3),
    "stack": lambda x: torch.stack([x, -x], -1) + torch.stack((x, x), dim=4),
    "unbind": lambda x: x.unbind(1)[3] + torch.unbind(x, dim=1)[0],
    "flatten": lambda x: x.mean((2, 3)).flatten(1) + torch.flatten(x, 2).sum(-1),
    "flatten_middle": lambda x: x.flatten(1, 2) + torch.flatten(x, start_dim=1, end_dim=-2),
    "squeeze": lambda x: x.mean(3, True).squeeze(-1) + x.mean((2, 3), True).squeeze(3),
    "unsqueeze": lambda x: x.unsqueeze(-1) + torch.unsqueeze(x, dim=4),
    "view_flat": lambda x: x.view(x.size(0), -1) + x.reshape(x.shape[0], -1) + torch.reshape(x, (x.size(0), -1)),
    "permute": lambda x: x.permute(0, 2, 3, 1) + torch.permute(x, (0, -2, -1, 1)) + x.permute(dims=[0, 2, 3, 1]),
    "transpose": lambda x: x.transpose(1, -1) + torch.transpose(x, dim0=-1, dim1=1),
    "expand": lambda x: x.mean((2, 3), True).expand(-1, -1, x.size(2), 3) + x[:, :1, :, :1].expand(-1, 8, -1, 3),
    "getitem": lambda x: x[:, 1:-1, 2:, :-2] + x[:, -7:7, 2:, :-2],
    "getitem_int": lambda x: x[:, 0] + x[:, -1] + x[..., 2:3, :].mean(1),
    "getitem_none": lambda x: x[:, None, 2] * x[:, 1:3],
    "getitem_list": lambda x: x[:, [3, 1, -1, 0]] + x[:, torch.tensor([0, 1, 2, 3])],
    "getitem_past_the_end": lambda x: x[:, :100] + x[:, -100:],
    "getitem_batch": lambda x: x[:1] + x,
    "option_a": _option_a,
    "boxes": _boxes,
    "pad": lambda x: F.pad(x, (1, 2)) + F.pad(x, (2, 1, 0, 0)),
    "pad_value": lambda x: F.pad(x, (1, 0, 2, 1), value=-3.5),
    "pad_negative": lambda x: F.pad(x, (-1, 2, 1, -2)),
    "pad_reflect": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
    "pad_replicate": lambda x: nn.ReplicationPad2d((2, 1, 0, 3))(x),
    "pad_circular": lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest_size": lambda x: F.interpolate(x, size=(17, 13), mode="nearest"),
    "nearest_exact": lambda x: F.interpolate(x, size=(17, 13), mode="nearest-exact"),
    "nearest_fraction": lambda x: F.interpolate(x, scale_factor=1.5),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "bilinear_corners": lambda x: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)(x),
    "bilinear_like": lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear"),
    "crop_and_join": _crop_and_join,
    "batch_norm_plain": lambda x: F.batch_norm(x, x.new_full((8,), 0.5), x.new_full((8,), 2.0)),
    "batch_norm_1d": lambda x, w: (
        F.batch_norm(x.flatten(2), w, w.abs() + 0.1, w, -w)
        + F.batch_norm(x[:, :, 0, 0], w, w.abs() + 1, bias=w)[..., None]
    ),
    "group_norm": lambda x, w: F.group_norm(x, 4, w, bias=-w) + F.group_norm(x.flatten(2), 2).view(x.shape),
    "instance_norm": lambda x, w: F.instance_norm(x, weight=w, bias=-w),
    "instance_norm_1d": lambda x, w: (
        nn.InstanceNorm1d(8)(x.flatten(2)) * F.instance_norm(x.flatten(2), None, None, w, -w)
    ),
    "instance_norm_tracked": lambda x, w: F.instance_norm(x, w, w.abs() + 0.1, w, -w, use_input_stats=False),
    "conv_transpose": lambda x, w: F.conv_transpose2d(x, w, None, 2),
    "conv_transpose_output_padding": lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1),
    "conv_transpose_beyond": lambda x, w: F.conv_transpose2d(x, w, stride=3, output_padding=(2, 1)),
    "conv_transpose_dilated": lambda x, w: F.conv_transpose2d(x, w, padding=1, dilation=2),
    "conv_transpose_groups": lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=4),
    "conv_transpose_1d": lambda x, w: F.conv_transpose1d(x.flatten(2), w, stride=2, padding=1, output_padding=1),
}
# What each needs besides x.
WEIGHTS: dict[str, tuple[int, ...]] = {
    "prelu": (CHANNELS,),
    "l2_norm": (CHANNELS,),
    "batch_norm_1d": (CHANNELS,),
    "group_norm": (CHANNELS,),
    "instance_norm": (CHANNELS,),
    "instance_norm_1d": (CHANNELS,),
    "instance_norm_tracked": (CHANNELS,),
    "squeeze_excite": (CHANNELS, CHANNELS),
    "conv_transpose_1d": (CHANNELS, 5, 3),
    "conv_transpose_groups": (CHANNELS, 3, 3, 2),
    "conv_transpose": (CHANNELS, 5, 3, 3),
    "conv_transpose_output_padding": (CHANNELS, 5, 3, 3),
    "conv_transpose_beyond": (CHANNELS, 5, 3, 3),
    "conv_transpose_dilated": (CHANNELS, 5, 3, 3),
}
# Maps of one size only: the engine's shapes follow from it.
FIXED: dict[str, Callable[..., Tensor]] = {
    "focus": _focus,
    "bilinear_times": lambda x: F.interpolate(x, size=int(x.size(2) * 1.5), mode="bilinear"),
    "avg_pool_ceil_padding": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg_pool_ceil_exclude": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "max_pool_ceil_padding": lambda x: F.max_pool2d(x - 9, 2, 2, 1, ceil_mode=True),
    "max_pool_ceil_gap": lambda x: F.max_pool2d(x - 9, 1, 3, ceil_mode=True),
    "adaptive_avg_even": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "adaptive_avg_uneven": lambda x: F.adaptive_avg_pool2d(x, [5, 3]),
    "adaptive_avg_up": lambda x: F.adaptive_avg_pool2d(x, (14, None)),
    "adaptive_max_uneven": lambda x: F.adaptive_max_pool2d(x, 7),
    "recompute_scale": lambda x: F.interpolate(x, scale_factor=1.3, mode="bilinear", recompute_scale_factor=True),
    "squeeze_all": lambda x: x.mean((1, 3), True).squeeze((1, 3)),
    "sum_all": lambda x: x.sum() + torch.sum(x) + x.mean(),
    "view_fixed": lambda x: x.view(-1, 4, 60) + x.reshape([x.size(0) * 4, 4, 60]),
}


def call(name: str) -> Call:
    """The module of that name, its parameters drawn."""
    function = FUNCTIONS.get(name) or FIXED[name]
    return Call(function, *([WEIGHTS[name]] if name in WEIGHTS else []))
