"""Engines made by torch2trt, on a GPU with real TensorRT: plain torch2trt(model, [x]) and convert() through it.

Tolerance. An engine is compared with the same network in float64. What rounding may do to the output depends on the
network: BatchNorm subtracts the large mean of an adder layer's sums and divides by their small spread, which magnifies
the relative error of the sums, 2 * eps * sqrt(CRS) at most (tolerance.sum_error), by mean / spread; and the errors of all
layers add up. numerics.rounding_bounds carries the bounds of the single operations through the very network;
conversion/test_convert.py shows that its result holds float32 (float16) arithmetic and still catches one wrong tap. Here the
engine must stay within it, and it must be small itself.
"""

import copy
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

# TF32's ten bits in convolutions would hide what is compared here; this switches it off in cuDNN and in TensorRT.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch2trt_adder
from torch2trt_adder import Adder2d, ops
from torch2trt_adder.models import addernet_mnist, resnet20
from torch2trt_adder.nn import recognise
from torch2trt_adder.numerics.rounding import rounding_bounds
from torch2trt_adder.ops import checks
from torch2trt_adder.trt import plugin

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt, pytest.mark.torch2trt]

# The largest bound that still says something, relative to the largest output: a layer with a wrong weight, tap or stride
# changes outputs by their own size. How far rounding moves the ten numbers of a single image differs from image to image.
_SHARP = {False: 1e-2, True: 0.5}


def torch2trt(*args, **kwargs) -> nn.Module:
    import torch2trt as package

    return package.torch2trt(*args, **kwargs)


def through_torch2trt(*args, **kwargs) -> nn.Module:
    return torch2trt_adder.convert(*args, route="torch2trt", **kwargs)


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` on the GPU in eval mode, with BatchNorm statistics of x: with untrained ones ReLU cuts everything off."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.cuda().train()(x)
    return model.eval()


@torch.no_grad()
def check(engine: nn.Module, model: nn.Module, x: Tensor, fp16: bool = False) -> None:
    """engine(x) is model(x) as far as rounding can tell."""
    bound = rounding_bounds(model, [x], fp16).item()
    exact = copy.deepcopy(model).double()(x.double())
    y = engine(x)
    assert y.dtype == model(x).dtype and y.shape == exact.shape
    assert y.isfinite().all()
    largest, difference = exact.abs().max().item(), (y.double() - exact).abs().max().item()
    print(
        f"{type(model).__name__} batch {len(x)}{' fp16' if fp16 else ''}: relative difference "
        f"{difference / largest:.2e}, allowed {bound / largest:.2e}"
    )
    assert bound < _SHARP[fp16 or x.dtype is torch.float16] * largest
    assert difference <= bound


def adder_layers(engine: nn.Module) -> int:
    """Those that the engine has; layers that were fused into others stay in the network, where nothing reads them."""
    layers = [engine.network.get_layer(i) for i in range(engine.network.num_layers)]
    return sum("PLUGIN" in layer.type.name and not layer.name.endswith(".unfused") for layer in layers)


def layer_names(engine: nn.Module) -> list[str]:
    import tensorrt as trt

    text = engine.engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return [layer if isinstance(layer, str) else layer["Name"] for layer in json.loads(text)["Layers"]]


# ---- networks


class Block(nn.Module):
    """A nested module with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Adder2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Sequential(Adder2d(channels, channels, (1, 3), padding=(0, 1), bias=True)),
        )
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.body(x)))


class Mixed(nn.Module):
    """Strides, paddings, dilations, kernels that differ per axis; groups, depth-wise, bias, one filter, a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            Adder2d(3, 24, (3, 5), stride=(1, 2), padding=(1, 3), bias=True), nn.BatchNorm2d(24), nn.ReLU()
        )
        self.dilated = nn.Sequential(Adder2d(24, 24, 3, padding=2, dilation=2, groups=4), nn.BatchNorm2d(24), nn.ReLU())
        self.depthwise = nn.Sequential(Adder2d(24, 24, 3, padding=(1, 0), groups=24), nn.BatchNorm2d(24), nn.ReLU())
        self.block = Block(24)
        self.weight = nn.Parameter(torch.randn(17, 24, 2, 3))
        self.bias = nn.Parameter(torch.randn(17))
        self.bn = nn.BatchNorm2d(17)
        self.last = Adder2d(17, 1, 1)
        self.last_bn = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.depthwise(self.dilated(self.stem(x))))
        x = self.bn(
            torch2trt_adder.adder2d(x, self.weight, bias=self.bias, stride=(2, 1), padding=(0, 1), dilation=(1, 2))
        )
        return self.last_bn(self.last(F.relu(x)))


MIXED_LAYERS = 7
NETWORKS = {
    "addernet_mnist": (addernet_mnist, (1, 28, 28), 2),
    "resnet20": (resnet20, (3, 32, 32), 20),
    "mixed": (Mixed, (3, 19, 26), MIXED_LAYERS),
}


def network(name: str, batch: int = 64) -> tuple[nn.Module, Tensor, int]:
    """Model, input and number of adder layers."""
    torch.manual_seed(0)
    make, shape, layers = NETWORKS[name]
    x = torch.randn(batch, *shape, device="cuda")
    return calibrated(make(), x), x, layers


# ---- plain torch2trt and convert


@pytest.mark.parametrize("name", ["addernet_mnist", "mixed"])
def test_torch2trt(name: str) -> None:
    """One call, for one batch size."""
    model, x, layers = network(name, 5)
    engine = torch2trt(model, [x])
    assert adder_layers(engine) == layers
    check(engine, model, x)
    check(engine, model, torch.randn_like(x))


def test_torch2trt_resnet20_batch_1() -> None:
    model, x, layers = network("resnet20")
    engine = torch2trt(model, [x[:1]])
    assert adder_layers(engine) == layers
    for i in range(3):
        check(engine, model, x[i : i + 1])


@pytest.mark.parametrize("name", NETWORKS)
def test_convert_for_batches_of_1_to_64(name: str) -> None:
    model, x, layers = network(name)
    engine = through_torch2trt(model, [x[:8]], max_batch_size=64)
    assert adder_layers(engine) == layers
    for batch in (1, 7, 64):
        check(engine, model, x[:batch])


@pytest.mark.parametrize("name", NETWORKS)
def test_convert_fp16(name: str) -> None:
    model, x, _ = network(name)
    engine = through_torch2trt(model, [x[:8]], max_batch_size=64, fp16_mode=True)
    for batch in (1, 64):
        check(engine, model, x[:batch], fp16=True)


def test_dynamic_image_size() -> None:
    model, x, _ = network("mixed", 2)
    engine = torch2trt(
        model, [x], min_shapes=[(1, 3, 12, 14)], opt_shapes=[(2, 3, 19, 26)], max_shapes=[(4, 3, 33, 40)]
    )
    for shape in ((1, 3, 12, 14), (2, 3, 19, 26), (3, 3, 33, 17), (4, 3, 33, 40)):
        check(engine, model, torch.randn(shape, device="cuda"))


def test_convert_takes_one_tensor_and_tuples() -> None:
    model, x, _ = network("addernet_mnist", 3)
    check(through_torch2trt(model, x), model, x)
    check(through_torch2trt(model, (x,)), model, x)


def test_strided_input() -> None:
    model, x, _ = network("mixed", 4)
    engine = through_torch2trt(model, [x])
    for strided in (x.contiguous(memory_format=torch.channels_last), x.repeat(2, 1, 1, 1)[::2], x.mT.contiguous().mT):
        check(engine, model, strided)


@pytest.mark.parametrize("convert", [torch2trt, through_torch2trt], ids=["torch2trt", "convert"])
def test_the_same_input_and_model_convert_twice(convert: Callable) -> None:
    model, x, layers = network("mixed", 2)
    for _ in range(2):
        engine = convert(model, [x])
        assert adder_layers(engine) == layers
        check(engine, model, x)
        assert not any(hasattr(t, "_trt") for t in (x, *model.parameters(), *model.buffers()))


def test_several_inputs_and_outputs() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Adder2d(3, 4, 3, padding=1), Adder2d(5, 4, 1, bias=True)

        def forward(self, x: Tensor, z: Tensor) -> dict:
            y = self.a(x)
            return {"first": y, "rest": (y + self.b(z), F.relu(z))}

    torch.manual_seed(0)
    model = Several().cuda().eval()
    x, z = torch.randn(2, 3, 7, 6, device="cuda"), torch.randn(2, 5, 7, 6, device="cuda")
    engine = through_torch2trt(model, [x, z])
    got, expected = engine(x, z), model(x, z)
    assert set(got) == {"first", "rest"} and isinstance(got["rest"], tuple)
    # Two sums of 27 terms, each within eps + 2 * eps * sqrt(27); y + b(z) adds another of 5 terms.
    for a, b in zip((got["first"], *got["rest"]), (expected["first"], *expected["rest"])):
        torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-6)


# ---- float16


def test_half_model() -> None:
    """A float16 network keeps float16 between its layers, as in PyTorch."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 13, 11, device="cuda")
    model = nn.Sequential(Adder2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Adder2d(16, 8, 3, bias=True))
    model = calibrated(model, x).half()
    engine = through_torch2trt(model, [x.half()], fp16_mode=True)
    assert adder_layers(engine) == 2
    check(engine, model, x.half())


class Sum(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) + self.layers[1](x)


def _wide(bias: bool = False) -> Adder2d:
    return Adder2d(128, 64, 3, padding=1, bias=bias)


WIDE = {  # the sums of every first layer pass float16's largest value, 65504
    "bn_relu": lambda: nn.Sequential(_wide(), nn.BatchNorm2d(64), nn.ReLU()),
    "bias_bn_relu": lambda: nn.Sequential(_wide(bias=True), nn.BatchNorm2d(64), nn.ReLU()),
    "pool_bn_relu": lambda: nn.Sequential(_wide(), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU()),
    "sum_bn_relu": lambda: nn.Sequential(Sum(_wide(), _wide()), nn.BatchNorm2d(64), nn.ReLU()),
    "bn_relu_adder_bn": lambda: nn.Sequential(
        _wide(), nn.BatchNorm2d(64), nn.ReLU(), Adder2d(64, 16, 3), nn.BatchNorm2d(16)
    ),
    "adder_bn": lambda: nn.Sequential(_wide(), Adder2d(64, 16, 1), nn.BatchNorm2d(16)),
    "output": _wide,
}


@pytest.mark.parametrize("convert", [torch2trt, through_torch2trt], ids=["torch2trt", "convert"])
@pytest.mark.parametrize("name", WIDE)
def test_fp16_with_sums_beyond_65504(name: str, convert: Callable) -> None:
    """TensorRT may not round an adder layer's sums to float16 before they are scaled down: ReLU would hide the -inf."""
    torch.manual_seed(0)
    x = 300 * torch.randn(2, 128, 14, 14, device="cuda")
    model = calibrated(WIDE[name](), x)
    with torch.no_grad():
        first = next(layer for layer in model.modules() if isinstance(layer, Adder2d))
        assert first(x).abs().min() > 65504
    check(convert(model, [x], fp16_mode=True), model, x, fp16=True)


# ---- foreign layers


class PublishedStyle(nn.Module):
    """An adder layer as published code has it: im2col with the batch as channels, then a broadcast difference."""

    def __init__(
        self,
        input_channel: int,
        output_channel: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.kernel_size, self.bias = stride, padding, kernel_size, bias
        self.adder = nn.Parameter(torch.randn(output_channel, input_channel, kernel_size, kernel_size))
        if bias:
            self.b = nn.Parameter(torch.rand(output_channel))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.size()
        k, r = self.adder.size(0), self.kernel_size
        p, q = ((size - r + 2 * self.padding) // self.stride + 1 for size in (h, w))
        columns = F.unfold(x.view(1, -1, h, w), r, dilation=1, padding=self.padding, stride=self.stride).view(
            n, -1, p * q
        )
        columns = columns.permute(1, 2, 0).contiguous().view(columns.size(1), -1)
        output = -(self.adder.view(k, -1).unsqueeze(2) - columns.unsqueeze(0)).abs().sum(1)
        output = output.view(k, p, q, n).permute(3, 0, 1, 2).contiguous()
        if self.bias:
            output += self.b.unsqueeze(0).unsqueeze(2).unsqueeze(3)
        return output


def foreign() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 12, device="cuda")
    model = nn.Sequential(
        PublishedStyle(3, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(PublishedStyle(8, 6, 3, stride=2, bias=True), nn.BatchNorm2d(6)),
    )
    return calibrated(model, x), x


@pytest.mark.parametrize("convert", [torch2trt, through_torch2trt], ids=["torch2trt", "convert"])
def test_foreign_layers(convert: Callable) -> None:
    model, x = foreign()
    engine = convert(model, [x], max_batch_size=4)
    assert adder_layers(engine) == 2
    assert [type(layer) for layer in (model[0], model[3][0])] == [PublishedStyle] * 2
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    ours = torch2trt_adder.adopt(model, inplace=False)
    for batch in (4, 1):
        check(engine, ours, x[:batch])
        with torch.no_grad():
            torch.testing.assert_close(ours(x[:batch]), model(x[:batch]), rtol=1e-4, atol=1e-4)


# ---- a wrong engine is impossible


class Unknown(nn.Module):
    """An adder layer that nobody can tell from its attributes, beside a path that torch2trt converts."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1)
        distances = -torch.cdist(self.filters.flatten(1), columns.mT, p=1)
        return F.relu(x) + self.bn(distances.view(x.shape))


class NoAdder(nn.Module):
    """Looks like an adder layer, computes a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stride, self.padding = 1, 1
        self.adder = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.adder, None, self.stride, self.padding)


class Halved(nn.Module):
    """Looks like an adder layer and computes one, but for a factor that no field tells."""

    def __init__(self) -> None:
        super().__init__()
        self.stride, self.padding = 1, 1
        self.adder = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch2trt_adder.adder2d(x, self.adder, None, self.stride, self.padding) / 2


class OtherBias(Halved):
    """Its bias has another name than `b`."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + self.offset[:, None, None]


class Turned(Halved):
    """The two axes of its kernels are swapped."""

    def forward(self, x: Tensor) -> Tensor:
        return torch2trt_adder.adder2d(x, self.adder.mT, None, self.stride, self.padding)


class NotANumber(Halved):
    """Finite, where adder2d is not."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.adder[0, 0, 0, 0] = torch.nan

    def forward(self, x: Tensor) -> Tensor:
        return torch2trt_adder.adder2d(x, self.adder.nan_to_num(), None, self.stride, self.padding)


class Direct(nn.Module):
    """Calls the operator past the names that torch2trt can hook."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.ops.torch2trt_adder.adder2d(x, self.weight, None, [1, 1], [1, 1], [1, 1], 1))


@pytest.mark.parametrize(
    "model, reason",
    [
        (Unknown, r"no converter for the result of the model \(Unknown\).*register_adder_class"),
        (lambda: nn.Sequential(Unknown(), nn.ReLU()), r"no converter for the result of layer '0' \(Unknown\)"),
        (
            lambda: nn.Sequential(NoAdder(), nn.ReLU()),
            r"0 \(NoAdder\) looks like an adder layer .*, but does not compute adder2d",
        ),
        *(
            (
                lambda cls=cls: nn.Sequential(cls(), nn.ReLU()),
                rf"0 \({cls.__name__}\) looks like an adder layer .*, but does not",
            )
            for cls in (Halved, OtherBias, Turned, NotANumber)
        ),
        (Direct, r"no converter for the result of the model \(Direct\)"),
    ],
    ids=["unknown", "unknown_nested", "no_adder", "halved", "other_bias", "turned", "not_a_number", "direct"],
)
@pytest.mark.parametrize("convert", [torch2trt, through_torch2trt], ids=["torch2trt", "convert"])
def test_what_cannot_be_converted_raises(model: Callable, reason: str, convert: Callable) -> None:
    torch.manual_seed(0)
    network, x = model().cuda().eval(), torch.randn(1, 3, 8, 8, device="cuda")
    original = ops.adder2d
    with pytest.raises(RuntimeError, match=reason):
        convert(network, [x])
    assert ops.adder2d is original and torch.Tensor.size is checks.tensor_size
    assert not any("forward" in layer.__dict__ for layer in network.modules())
    assert not any(hasattr(t, "_trt") for t in (x, *network.parameters(), *network.buffers()))


class Registered(nn.Module):
    """Known by `register_adder_class`, whose fields leave out its factor."""

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.factor = nn.Parameter(torch.randn(4, 3, 3, 3)), 0.5

    def forward(self, x: Tensor) -> Tensor:
        return torch2trt_adder.adder2d(x, self.filters) * self.factor


@pytest.mark.parametrize("convert", [torch2trt, through_torch2trt], ids=["torch2trt", "convert"])
def test_a_registered_class_whose_fields_do_not_tell_all(convert: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recognise.adder_classes, Registered, lambda layer: {"weight": layer.filters})
    network, x = nn.Sequential(Registered(), nn.ReLU()).cuda().eval(), torch.randn(1, 3, 8, 8, device="cuda")
    with pytest.raises(
        RuntimeError, match=r"0 \(Registered\) looks like an adder layer .*, but does not compute adder2d"
    ):
        convert(network, [x])
    network[0].factor = 1
    assert adder_layers(convert(network, [x])) == 1


def test_convert_notices_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tap of one filter is off."""

    def wrong(network, itensor, weight, *args, **kwargs):
        weight = weight.detach().clone()
        weight[0, 0, 0, 0] += 1
        return add(network, itensor, weight, *args, **kwargs)

    model, x, _ = network("addernet_mnist", 4)
    add = plugin.add_adder2d
    monkeypatch.setattr(plugin, "add_adder2d", wrong)
    with pytest.raises(RuntimeError, match="output 0 differs between the engine and PyTorch by up to .* beyond the"):
        through_torch2trt(model, [x])


def test_devices() -> None:
    model, x, _ = network("addernet_mnist", 2)
    with pytest.raises(ValueError, match="input 0 is on cpu|parameter .* is on cuda"):
        torch2trt_adder.convert(model, [x.cpu()])
    with pytest.raises(ValueError, match="parameter 'conv1.adder' is on cpu"):
        torch2trt_adder.convert(model.cpu(), [x])


# ---- the engine


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
def test_no_reformat_of_constant_weights(fp16: bool) -> None:
    """Weights go into the plugin as they are: no kernel per inference prepares them."""
    model, x, layers = network("mixed", 4)
    names = layer_names(torch2trt(model, [x], fp16_mode=fp16))
    print("\n".join(names))
    plugins = [name for name in names if re.search(r"adder2d_\d+$", name) and not name.startswith("Reformat")]
    assert len(plugins) == layers
    assert not [
        name
        for name in names
        if re.search(r"[Rr]eformat.*(Input Tensor [12] to .*adder2d|adder2d_\d+\.(weight|bias))", name)
    ]


_LOAD = """
import sys, torch, torch2trt_adder
from torch2trt import TRTModule
engine = TRTModule()
engine.load_state_dict(torch.load(sys.argv[1], weights_only=False))
torch.save(engine(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_save_and_load_in_a_new_process(tmp_path: pathlib.Path) -> None:
    model, x, _ = network("addernet_mnist", 8)
    engine = through_torch2trt(model, [x], max_batch_size=8)
    files = [str(tmp_path / name) for name in ("engine.pth", "x.pth", "y.pth")]
    torch.save(engine.state_dict(), files[0])
    torch.save(x[:3], files[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", _LOAD, *files], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    check(lambda _: torch.load(files[2]), model, x[:3])


def test_two_engines_on_two_streams() -> None:
    pairs = [network(name, 16)[:2] for name in ("addernet_mnist", "mixed")]
    engines = [torch2trt(model, [x]) for model, x in pairs]
    inputs = [[torch.randn_like(x) for _ in range(20)] for _, x in pairs]
    alone = [[engine(x) for x in xs] for engine, xs in zip(engines, inputs)]
    torch.cuda.synchronize()
    together = _interleaved(engines, inputs)
    for (model, x), ys, zs in zip(pairs, alone, together):
        bound = rounding_bounds(model, [x]).item()
        assert max((y - z).abs().max().item() for y, z in zip(ys, zs)) <= bound


def test_two_contexts_of_one_engine_on_two_streams() -> None:
    from torch2trt import TRTModule

    model, x, _ = network("addernet_mnist", 16)
    one = torch2trt(model, [x])
    two = TRTModule(one.engine, one.input_names, one.output_names, one.input_flattener, one.output_flattener)
    inputs = [[torch.randn_like(x) for _ in range(20)] for _ in range(2)]
    alone = [[one(x) for x in xs] for xs in inputs]
    torch.cuda.synchronize()
    bound = rounding_bounds(model, [x]).item()
    for ys, zs in zip(alone, _interleaved([one, two], inputs)):
        assert max((y - z).abs().max().item() for y, z in zip(ys, zs)) <= bound


def _interleaved(engines: list[nn.Module], inputs: list[list[Tensor]]) -> list[list[Tensor]]:
    """The outputs of each engine for its inputs, each engine on a stream of its own."""
    streams = [torch.cuda.Stream() for _ in engines]
    outputs: list[list[Tensor]] = [[] for _ in engines]
    for i in range(len(inputs[0])):
        for engine, stream, xs, ys in zip(engines, streams, inputs, outputs):
            with torch.cuda.stream(stream):
                ys.append(engine(xs[i]))
    torch.cuda.synchronize()
    return outputs
