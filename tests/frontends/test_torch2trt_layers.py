"""Plain torch2trt(model, [x]) on the layers that networks with adder layers are made of, on a GPU with real TensorRT.

Each case is one network of an adder layer and one of layer_cases.py's functions; so one converter's fault shows in its own
test. Then whole networks. Engines are compared as in test_torch2trt_engines.py, within the bounds of numerics.rounding_bounds.
"""

import copy
import os
from collections.abc import Callable

# TF32's ten bits in convolutions would hide what is compared here; this switches it off in cuDNN and in TensorRT.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import layer_cases
import layer_networks
import pytest
import torch
from torch import Tensor, nn

import torch2trt_adder
from torch2trt_adder import Adder2d
from torch2trt_adder.numerics.rounding import rounding_bounds

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt, pytest.mark.torch2trt]


@pytest.fixture(autouse=True)
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tactic of each layer that works, instead of the fastest: these tests are about layers, not kernels."""
    import tensorrt as trt

    create = trt.Builder.create_builder_config

    def create_quick(builder: trt.Builder) -> trt.IBuilderConfig:
        config = create(builder)
        if hasattr(config, "builder_optimization_level"):  # newer than TensorRT 8.5
            config.builder_optimization_level = 0
        return config

    monkeypatch.setattr(trt.Builder, "create_builder_config", create_quick)


def torch2trt(*args, **kwargs) -> nn.Module:
    import torch2trt as package

    engine = package.torch2trt(*args, **kwargs)
    assert engine.engine is not None, "TensorRT could not build an engine; its log above says why"
    return engine


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` on the GPU in eval mode, with BatchNorm statistics of x."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    with torch.no_grad():
        model.cuda().train()(x)
    return model.eval()


@torch.no_grad()
def check(engine: nn.Module, model: nn.Module, x: Tensor, sharp: float = 1e-2) -> None:
    """engine(x) is model(x) as far as rounding can tell."""
    bound = rounding_bounds(model, [x]).item()
    exact = copy.deepcopy(model).double()(x.double())
    y = engine(x)
    where = f"input {list(x.shape)}"
    assert list(y.shape) == list(exact.shape), f"{where}: engine {list(y.shape)}, PyTorch {list(exact.shape)}"
    assert y.isfinite().all(), f"{where}: {int((~y.isfinite()).sum())} values are not finite"
    largest, difference = exact.abs().max().item(), (y.double() - exact).abs().max().item()
    assert bound < sharp * largest, f"{where}: the bound {bound:.3g} says nothing, largest value {largest:.3g}"
    assert difference <= bound, (
        f"{where}: differs by {difference:.3g}, allowed {bound:.3g}, largest value {largest:.3g}"
    )


# ---- one layer each


def one_layer(name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    torch.manual_seed(0)
    channels = layer_cases.CHANNELS
    model = nn.Sequential(
        Adder2d(3, channels, 3, padding=1, bias=True), nn.BatchNorm2d(channels), layer_cases.call(name)
    )

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    return calibrated(model, draw(4, 3, 12, 10)), draw


@pytest.mark.parametrize("name", [*layer_cases.FUNCTIONS, *layer_cases.FIXED])
def test_static(name: str) -> None:
    model, draw = one_layer(name)
    engine = torch2trt(model, [draw(2, 3, 12, 10)])
    check(engine, model, draw(2, 3, 12, 10))


@pytest.mark.parametrize("name", [*layer_cases.FUNCTIONS, *layer_cases.FIXED])
def test_batches(name: str) -> None:
    model, draw = one_layer(name)
    engine = torch2trt(model, [draw(2, 3, 12, 10)], max_batch_size=5)
    for batch in (2, 1, 5):
        check(engine, model, draw(batch, 3, 12, 10))


@pytest.mark.parametrize("name", layer_cases.FUNCTIONS)
def test_sizes(name: str) -> None:
    model, draw = one_layer(name)
    engine = torch2trt(
        model, [draw(2, 3, 12, 10)], min_shapes=[(1, 3, 9, 7)], opt_shapes=[(2, 3, 12, 10)], max_shapes=[(5, 3, 20, 20)]
    )
    for shape in ((2, 3, 12, 10), (1, 3, 9, 7), (4, 3, 15, 16)):
        check(engine, model, draw(*shape))


# ---- whole networks


@pytest.mark.parametrize("name", layer_networks.NETWORKS)
@pytest.mark.parametrize("convert", ["plain", "convert"])
@pytest.mark.parametrize("batches", [False, True], ids=["static", "batches"])
def test_network(name: str, convert: str, batches: bool) -> None:
    torch.manual_seed(0)
    shape = layer_networks.NETWORKS[name][1]
    x = torch.randn(4, *shape, device="cuda")
    model = calibrated(layer_networks.network(name), x)
    options = {"max_batch_size": 6} if batches else {}
    if convert == "plain":
        engine = torch2trt(model, [x], **options)
    else:
        engine = torch2trt_adder.convert(model, [x], route="torch2trt", **options)
    for batch in (4, 1, 6) if batches else (4,):
        check(engine, model, torch.randn(batch, *shape, device="cuda"), sharp=0.1)


def test_network_fp16() -> None:
    """Layers of our converters between adder layers keep sums that pass float16's range."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 21, 26, device="cuda")
    model = calibrated(layer_networks.network("unet"), x)
    engine = torch2trt_adder.convert(model, [x], route="torch2trt", fp16_mode=True)
    assert engine(x).isfinite().all()


def _torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    if name == "vgg":
        return models.vgg.VGG(models.vgg.make_layers([8, "M", 16, "M", 16, 16, "M"], batch_norm=True), 10)
    if name == "densenet":
        return models.DenseNet(8, (2, 3, 2), 16, num_classes=10)
    if name == "googlenet":
        return models.googlenet(weights=None, aux_logits=False, init_weights=False, num_classes=10)
    return getattr(models, name)(weights=None, num_classes=10)


@pytest.mark.parametrize(
    "name", ["vgg", "densenet", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18", "googlenet"]
)
def test_torchvision(name: str) -> None:
    """torchvision's classes with adder layers in the place of their convolutions."""
    torch.manual_seed(0)
    model = _torchvision(name)
    if name == "vgg":  # its make_layers ends in 512 channels
        model.classifier[0] = nn.Linear(16 * 49, 4096)
    # The gates of squeeze and excitation have no BatchNorm, and adder layers there would close all of them.
    gates = [path for path, _ in model.named_modules() if path.endswith((".fc1", ".fc2"))]
    model = torch2trt_adder.adderize(model, exclude=gates)
    x = torch.randn(4, 3, 64, 64, device="cuda")
    model = calibrated(model, x)
    engine = torch2trt(model, [x], max_batch_size=4)
    for batch in (4, 2):
        check(engine, model, torch.randn(batch, 3, 64, 64, device="cuda"), sharp=torch.inf)
