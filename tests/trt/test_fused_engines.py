"""Engines whose adder layers compute BatchNorm, residual sums and ReLU: on a GPU, through ONNX and through torch2trt."""

import os
import pathlib
import re

# TF32's ten bits in convolutions would hide what is compared here; this switches it off in cuDNN and in TensorRT.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import pytest
import torch
from networks import calibrated
from torch import Tensor, nn

import torch2trt_adder
from torch2trt_adder import Adder2d, Engine, build_engine, export_onnx
from torch2trt_adder.models import resnet20
from torch2trt_adder.numerics.rounding import rounding_bounds
from torch2trt_adder.trt import inspection, plans

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

ROUTES = ["onnx", pytest.param("torch2trt", marks=pytest.mark.torch2trt)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def through_onnx(model: nn.Module, x: Tensor, folder: pathlib.Path, **options: bool) -> Engine:
    path = export_onnx(model, x, folder / "model.onnx", {0: "batch"}, check=False)
    options = {"fuse": True, **options}
    return Engine(build_engine(path, folder / "model.plan", {"batch": (1, 8, 32)}, progress=False, **options))


def assert_close(y: Tensor, model: nn.Module, x: Tensor, fp16: bool) -> None:
    """Within what rounding explains, of the network in float32; in float16 the fused layers' outputs are rounded as well."""
    with torch.no_grad():
        expected, bound = model(x), rounding_bounds(model, (x,), fp16)
    assert bool(y.isfinite().all()), "the engine's output is infinite or NaN"
    difference = (y.float() - expected.float()).abs().max().item()
    assert difference <= bound.item(), f"the engine differs by {difference:.3g}, rounding explains {bound.item():.3g}"


def layers_between(layers: list[dict]) -> list[str]:
    """All layers from the first adder layer to the last one, but for these and their constants."""
    places = [i for i, layer in enumerate(layers) if layer["adder"]]
    others = [layer for layer in layers[places[0] : places[-1] + 1] if not layer["adder"]]
    constant = re.compile(r"constant|\.(weight|bias|scale|shift)$", re.IGNORECASE)
    return [
        layer["name"] for layer in others if not constant.search(layer["type"]) and not constant.search(layer["name"])
    ]


@pytest.mark.parametrize("fp16", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("route", ROUTES)
def test_resnet20(route: str, fp16: bool, tmp_path: pathlib.Path) -> None:
    """Nothing is left between the adder layers: no BatchNorm, ReLU, residual sum, reformat or cast."""
    model, x = calibrated(resnet20(), 32, 3, 32, 32).cuda(), torch.randn(8, 3, 32, 32, device="cuda")
    if route == "onnx":
        engine = through_onnx(model, x, tmp_path, fp16=fp16)
    else:
        made = torch2trt_adder.convert(
            model, [x], route, fuse=True, fp16_mode=fp16, min_shapes=[(1, 3, 32, 32)], max_shapes=[(32, 3, 32, 32)]
        )
        assert "20 BatchNorm" in made.fused, made.fused
        (tmp_path / "model.plan").write_bytes(bytes(made.engine.serialize()))
        engine = Engine(tmp_path / "model.plan")
    summary = plans.fused_layers(engine.engine.name)
    assert summary is not None and summary.startswith("20 of 20 fused: 20 BatchNorm, 9 residual"), summary
    for batch in (1, 8, 32):
        batch_x = torch.randn(batch, 3, 32, 32, device="cuda")
        assert_close(engine(batch_x), model, batch_x, fp16)
    layers = inspection.layers(engine)
    assert sum(layer["adder"] for layer in layers) == 20, [layer["name"] for layer in layers]
    others = layers_between(layers)
    # The shortcuts of stages two and three, which pad channels, are slices and concatenations.
    unwanted = [
        name
        for name in others
        if any(word in name.lower() for word in ("scale", "relu", "reformat", "unfused", "batch", "bn"))
    ]
    assert not unwanted, f"left between the adder layers: {unwanted}; all others there: {others}"
    precisions = [layer["precision"].lower() for layer in layers if layer["adder"]]
    if fp16 and any(precisions):  # engines of torch2trt tell only names
        # All but the last one, which average pooling reads.
        assert sum("half" in each or "fp16" in each for each in precisions) == 19, precisions


def test_without_fusion(tmp_path: pathlib.Path) -> None:
    model, x = calibrated(resnet20(), 32, 3, 32, 32).cuda(), torch.randn(4, 3, 32, 32, device="cuda")
    engine = through_onnx(model, x, tmp_path, fuse=False)
    assert not plans.fused_layers(engine.engine.name)
    assert len(layers_between(inspection.layers(engine))) >= 20
    assert_close(engine(x), model, x, False)


@pytest.mark.parametrize("fp16", [False, True], ids=["float32", "float16"])
def test_two_contexts_a_cuda_graph_and_a_saved_plan(fp16: bool, tmp_path: pathlib.Path) -> None:
    model, x = calibrated(resnet20(), 32, 3, 32, 32).cuda(), torch.randn(8, 3, 32, 32, device="cuda")
    first = through_onnx(model, x, tmp_path, fp16=fp16)
    second, graph = Engine(tmp_path / "model.plan"), Engine(tmp_path / "model.plan", cuda_graph=True)
    expected = first(x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    outputs = []
    for engine, stream in zip((first, second), streams):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs += [engine(x) for _ in range(5)]
    torch.cuda.synchronize()
    outputs += [graph(x).clone() for _ in range(3)]
    for y in outputs:
        assert torch.equal(y, expected), f"repeated calls differ by {(y - expected).abs().max().item():.3g}"
    assert_close(expected, model, x, fp16)


class Chained(nn.Module):
    """Two blocks; the second BatchNorm normalises whatever comes out of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = Adder2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.bn_b = Adder2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_b(self.b(self.bn_a(self.a(x)).relu())).relu()


@pytest.mark.parametrize("gamma", [1.0, 1e6])
@pytest.mark.parametrize("route", ROUTES)
def test_a_huge_batch_norm_in_float16(route: str, gamma: float, tmp_path: pathlib.Path) -> None:
    """Values beyond 65504 pass from one adder layer to the next in float32."""
    model = Chained()
    nn.init.constant_(model.bn_a.weight, gamma)
    model = calibrated(model, 32, 8, 12, 12).cuda()
    x = torch.randn(4, 8, 12, 12, device="cuda")
    with torch.no_grad():
        assert model.bn_a(model.a(x)).max().item() > 65504 or gamma == 1
        expected = model(x)
    if route == "onnx":
        y = through_onnx(model, x, tmp_path, fp16=True)(x)
    else:
        y = torch2trt_adder.convert(model, [x], route, fuse=True, fp16_mode=True)(x)
    assert bool(y.isfinite().all()), "values beyond float16's range were lost"
    # float16 rounds by 5e-4, and BatchNorm magnifies that; a lost or saturated value changes y by its own size.
    difference, largest = (y - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= 0.05 * largest, f"the engine differs by {difference:.3g}, of {largest:.3g}"


class Ends(nn.Module):
    """What a layer may take over ends at values that are read twice, at outputs, and at other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = Adder2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.bn_b = Adder2d(8, 8, 1, bias=True), nn.BatchNorm2d(8)
        self.c = Adder2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.bn_a(self.a(x))
        b = self.bn_b(self.b(a.relu()))
        return a, (b + a).clamp(-1, 2), self.c(torch.sigmoid(b))


@pytest.mark.parametrize("fp16", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("route", ROUTES)
def test_where_fusion_has_to_end(route: str, fp16: bool) -> None:
    model, x = calibrated(Ends(), 16, 8, 12, 12).cuda(), torch.randn(4, 8, 12, 12, device="cuda")
    made = torch2trt_adder.convert(model, [x], route, fuse=True, fp16_mode=fp16)  # compares every output with PyTorch
    assert made.fused is not None and made.fused.startswith("2 of 3 fused: 2 BatchNorm"), made.fused
    assert [tuple(y.shape) for y in made(x)] == [(4, 8, 12, 12)] * 3


class Residual(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.a, self.b = (Adder2d(channels, channels, 3, padding=1, groups=groups) for _ in range(2))
        self.bn_a, self.bn_b = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.bn_a(self.a(x)) + x).relu()
        return self.bn_b(self.b(y)) + y


@pytest.mark.parametrize("channels, groups", [(8, 1), (12, 1), (13, 1), (16, 16), (12, 3)])
@pytest.mark.parametrize("fp16", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("route", ROUTES)
def test_channels_that_fill_no_vector(route: str, fp16: bool, channels: int, groups: int) -> None:
    """kHWC8 fills channels up to multiples of 8; what is in the filling must not matter."""
    model = calibrated(Residual(channels, groups), 16, channels, 9, 7).cuda()
    x = torch.randn(4, channels, 9, 7, device="cuda")
    made = torch2trt_adder.convert(model, [x], route, fuse=True, fp16_mode=fp16)
    assert made.fused is not None and made.fused.startswith("2 of 2 fused: 2 BatchNorm, 2 residual, 1 ReLU"), made.fused
    assert_close(made(x), model, x, fp16)


def test_half_model(tmp_path: pathlib.Path) -> None:
    model = calibrated(Chained(), 16, 8, 12, 12).cuda().half()
    x = torch.randn(4, 8, 12, 12, device="cuda", dtype=torch.float16)
    engine = through_onnx(model, x, tmp_path)
    assert engine(x).dtype is torch.float16
    assert_close(engine(x), model, x, False)
