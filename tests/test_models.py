"""The networks: shapes, parameter names of the published checkpoints, layers."""

import pytest
import torch

from torch2trt_adder import Adder2d
from torch2trt_adder.models import addernet_mnist, resnet20, resnet50

_BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _bn(name: str) -> list[str]:
    return [f"{name}.{field}" for field in _BN]


def _published_names(blocks: list[int], layers_in_block: int, downsampled: set[int]) -> list[str]:
    """state_dict keys of the published resnet20.py and resnet50.py, in their order."""
    names = ["conv1.weight", *_bn("bn1")]
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            for i in range(1, layers_in_block + 1):
                names += [f"{at}.conv{i}.adder", *_bn(f"{at}.bn{i}")]
            if block == 0 and stage in downsampled:
                names += [f"{at}.downsample.0.adder", *_bn(f"{at}.downsample.1")]
    return names


def test_resnet20_has_the_published_names() -> None:
    expected = [*_published_names([3, 3, 3], 2, {2, 3}), "fc.weight", *_bn("bn2")]
    assert list(resnet20().state_dict()) == expected


def test_resnet50_has_the_published_names() -> None:
    expected = [*_published_names([3, 4, 6, 3], 3, {1, 2, 3, 4}), "fc.weight", "fc.bias", *_bn("bn2")]
    with torch.device("meta"):
        assert list(resnet50().state_dict()) == expected


@pytest.mark.parametrize(
    "name, shape, stride, padding",
    [
        ("layer1.0.conv1", (16, 16, 3, 3), 1, 1),
        ("layer2.0.conv1", (32, 16, 3, 3), 2, 1),
        ("layer2.0.conv2", (32, 32, 3, 3), 1, 1),
        ("layer3.0.downsample.0", (64, 32, 1, 1), 2, 0),
        ("layer3.2.conv2", (64, 64, 3, 3), 1, 1),
    ],
)
def test_resnet20_layers(name: str, shape: tuple[int, ...], stride: int, padding: int) -> None:
    layer = resnet20().get_submodule(name)
    assert isinstance(layer, Adder2d)
    assert (tuple(layer.adder.shape), layer.stride, layer.padding) == (shape, (stride, stride), (padding, padding))


@pytest.mark.parametrize(
    "name, shape, stride, padding",
    [
        ("layer1.0.conv1", (64, 64, 1, 1), 1, 0),
        ("layer1.0.downsample.0", (256, 64, 1, 1), 1, 0),
        ("layer2.0.conv1", (128, 256, 1, 1), 1, 0),
        ("layer2.0.conv2", (128, 128, 3, 3), 2, 1),
        ("layer4.2.conv3", (2048, 512, 1, 1), 1, 0),
    ],
)
def test_resnet50_layers(name: str, shape: tuple[int, ...], stride: int, padding: int) -> None:
    with torch.device("meta"):
        layer = resnet50().get_submodule(name)
    assert isinstance(layer, Adder2d)
    assert (tuple(layer.adder.shape), layer.stride, layer.padding) == (shape, (stride, stride), (padding, padding))


def test_number_of_adder_layers() -> None:
    def count(model: torch.nn.Module) -> int:
        return sum(isinstance(layer, Adder2d) for layer in model.modules())

    with torch.device("meta"):
        assert [count(addernet_mnist()), count(resnet20()), count(resnet50())] == [2, 20, 52]


@pytest.mark.parametrize(
    "model, shape, classes",
    [
        (addernet_mnist, (2, 1, 28, 28), 10),
        (lambda: resnet20(num_classes=100), (2, 3, 32, 32), 100),
        (lambda: resnet50(num_classes=7), (1, 3, 64, 64), 7),
    ],
    ids=["addernet_mnist", "resnet20", "resnet50"],
)
def test_forward(model, shape: tuple[int, ...], classes: int) -> None:
    torch.manual_seed(0)
    network = model().train(shape[0] > 1)
    output = network(torch.randn(shape))
    assert output.shape == (shape[0], classes) and output.isfinite().all()


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = resnet20()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
