"""Adder2d, checkpoints of the published code, and adopt."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from conftest import Case, assert_forward, assert_grad_input, assert_grad_weight
from torch2trt_adder import Adder2d, adopt, register_adder_class


class adder2d(nn.Module):
    """Written as the published layer is: same constructor, attributes, parameters; plain torch for the arithmetic."""

    def __init__(self, input_channel, output_channel, kernel_size, stride=1, padding=0, bias=False):
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.input_channel = input_channel
        self.output_channel = output_channel
        self.kernel_size = kernel_size
        self.adder = nn.Parameter(torch.randn(output_channel, input_channel, kernel_size, kernel_size))
        self.bias = bias
        if bias:
            self.b = nn.Parameter(torch.rand(output_channel))

    def forward(self, x):
        columns = nn.functional.unfold(x, self.kernel_size, 1, self.padding, self.stride).unsqueeze(1)
        y = -(columns - self.adder.flatten(1)[:, :, None]).abs().sum(2)
        side = (x.shape[2] + 2 * self.padding - self.kernel_size) // self.stride + 1
        y = y.unflatten(2, (side, -1))
        return y + self.b[:, None, None] if self.bias else y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = adder2d(6, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = adder2d(6, 6, 3, padding=1, bias=True)

    def forward(self, x):
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class Net(nn.Module):
    """Adder layers at the top, in a Sequential and in a block that is used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, bias=False)
        block = Block()
        self.blocks = nn.Sequential(block, adder2d(6, 6, 3, 2, 1), nn.ReLU(), block)
        self.head = adder2d(6, 4, 3, bias=True)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def adder_layers(model, cls):
    return [module for module in model.modules() if type(module) is cls]


# ---- the module


def test_published_signature():
    layer = Adder2d(3, 5, 3, 2, 1, True)
    assert (layer.input_channel, layer.output_channel, layer.bias) == (3, 5, True)
    assert (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (2, 2), (1, 1))
    assert {name: p.shape for name, p in layer.named_parameters()} == {"adder": (5, 3, 3, 3), "b": (5,)}
    layer = Adder2d(input_channel=3, output_channel=5, kernel_size=1, stride=1, padding=0, bias=False)
    assert list(layer.state_dict()) == ["adder"] and layer.b is None and layer.bias is False


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", 2, 4, 7, 6, 6, 3, 3),
        Case("all", 2, 4, 9, 8, 6, 3, 2, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("bias", [False, True])
def test_forward(case, bias):
    torch.manual_seed(0)
    layer = Adder2d(
        case.C, case.K, (case.R, case.S), case.stride, case.padding, bias, dilation=case.dilation, groups=case.groups
    )
    x = case.tensors()[0]
    assert_forward(layer(x), x, layer.adder, layer.b, case.geometry)
    half = copy.deepcopy(layer).to(torch.float16)
    assert half(x.half()).dtype is torch.float16


def test_initialisation():
    torch.manual_seed(0)
    layer = Adder2d(64, 64, 3, bias=True)
    assert abs(layer.adder.mean()) < 0.02 and abs(layer.adder.std() - 1) < 0.02
    assert 0 <= layer.b.min() < 0.1 and 0.9 < layer.b.max() <= 1
    before = layer.adder.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.adder, before)
    assert Adder2d(2, 3, 1, device="meta", dtype=torch.float16).adder.dtype is torch.float16


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stride": 0}, "stride must be an int or a pair of ints, each >= 1, got 0"),
        ({"padding": (0, -1)}, r"padding must .* each >= 0, got \(0, -1\)"),
        ({"padding": "same"}, "padding must be an int or a pair of ints, each >= 0, got 'same'"),
        ({"dilation": 1.5}, "dilation must .* got 1.5"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must .* got \(3, 3, 3\)"),
        ({"groups": 3}, "groups must divide input_channel 4 and output_channel 8, got 3"),
        ({"output_channel": 0}, "output_channel must be an int >= 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"Adder2d: {message}"):
        Adder2d(**{"input_channel": 4, "output_channel": 8, "kernel_size": 3, **arguments})


def test_repr():
    assert repr(Adder2d(4, 8, 3)) == "Adder2d(4, 8, kernel_size=(3, 3), stride=(1, 1))"
    assert repr(Adder2d(4, 8, (3, 1), 2, (1, 0), True, 2, 4)) == (
        "Adder2d(4, 8, kernel_size=(3, 1), stride=(2, 2), padding=(1, 0), dilation=(2, 2), groups=4, bias=True)"
    )


@pytest.mark.parametrize("bias", [False, True])
def test_copies(bias):
    layer = Adder2d(3, 5, 3, padding=1, bias=bias).eval()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(X), layer(X)) and twin.adder is not layer.adder and not twin.training


@pytest.mark.parametrize("bias", [False, True])
def test_published_checkpoint_loads(bias):
    theirs = adder2d(3, 5, 3, 2, 1, bias)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours = Adder2d(3, 5, 3, 2, 1, bias)
    ours.load_state_dict(torch.load(file, weights_only=True), strict=True)
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
        Adder2d(3, 5, 3, 2, 1, not bias).load_state_dict(theirs.state_dict(), strict=True)


def test_training_step():
    torch.manual_seed(0)
    model = nn.Sequential(Adder2d(3, 5, 3, bias=True), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(500, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    target = torch.tensor([0, 1])
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(X), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- adopt


def test_adopt_in_place(net):
    expected = net(X)
    parameters, names = list(net.parameters()), list(net.state_dict())
    assert adopt(net) is net
    assert not adder_layers(net, adder2d) and len(adder_layers(net, Adder2d)) == 4
    assert net.blocks[0] is net.blocks[3]
    assert all(ours is theirs for ours, theirs in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == names
    assert not any(module.training for module in net.modules())
    torch.testing.assert_close(net(X), expected, rtol=1e-4, atol=1e-4)
    adopt(net)  # nothing left to do
    assert len(adder_layers(net, Adder2d)) == 4


def test_adopt_a_copy(net):
    expected = net(X)
    twin = adopt(net, inplace=False)
    assert len(adder_layers(net, adder2d)) == 4 and not adder_layers(net, Adder2d)
    assert len(adder_layers(twin, Adder2d)) == 4
    torch.testing.assert_close(twin(X), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        twin.head.adder.zero_()
    assert torch.equal(net(X), expected)


def test_adopt_a_layer():
    layer = adder2d(3, 5, 3, 2, 1, True)
    ours = adopt(layer)
    assert type(ours) is Adder2d and ours.adder is layer.adder and ours.b is layer.b and ours.bias is True
    torch.testing.assert_close(ours(X), layer(X), rtol=1e-5, atol=0)


def test_adopt_keeps_mode_dtype_and_frozen_parameters(net):
    net.train().double()
    net.head.adder.requires_grad_(False)
    net.blocks[1].eval()
    adopt(net)
    assert net.head.training and not net.blocks[1].training
    assert net.head.adder.dtype is torch.float64 and not net.head.adder.requires_grad


def test_adopt_keeps_hooks(net):
    seen = []
    handle = net.head.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    net.head.register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre"), with_kwargs=True)
    net.head.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    adopt(net)(X).sum().backward()
    assert seen == ["pre", Adder2d, "backward"]
    handle.remove()
    net(X)
    assert seen == ["pre", Adder2d, "backward", "pre"]


def test_adopted_layer_has_the_gradient_rule():
    layer = adopt(adder2d(3, 5, 3, 2, 1))
    x = X.clone().requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    geometry = ((2, 2), (1, 1), (1, 1), 1)
    assert_grad_input(x.grad, dy, x, layer.adder, geometry)
    assert_grad_weight(layer.adder.grad, dy, x, layer.adder, geometry)


def test_adopt_leaves_others_alone():
    class NoLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.adder = nn.Parameter(torch.randn(3, 3))
            self.stride = self.padding = 1

    model = nn.Sequential(nn.Conv2d(3, 4, 3), NoLayer(), nn.Identity())
    before = list(model.modules())
    assert list(adopt(model).modules()) == before


def test_adopt_refuses_what_it_cannot_stand_for(net):
    net.blocks[1].stride = (1, 2, 3)
    with pytest.raises(ValueError, match=r"adopt: blocks\.1 \(adder2d\) is no layer .* stride must .* got \(1, 2, 3\)"):
        adopt(net)
    assert len(adder_layers(net, adder2d)) == 4  # refused before anything was replaced
    net.blocks[1].stride = 2
    net.head.quantize = True
    with pytest.raises(ValueError, match=r"adopt: head quantizes its weights"):
        adopt(net)


class OtherShape(nn.Module):
    """An adder layer that shares no name with the published one."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3))
        self.step = 2

    def forward(self, x):
        raise NotImplementedError


def test_register_adder_class():
    model = nn.Sequential(OtherShape())
    assert type(adopt(model)[0]) is OtherShape
    register_adder_class(OtherShape, lambda layer: {"weight": layer.kernel, "stride": layer.step, "groups": 2})
    kernel = model[0].kernel
    adopt(model)
    assert type(model[0]) is Adder2d and model[0].adder is kernel
    x = torch.randn(1, 2, 7, 7)
    assert_forward(model[0](x), x, kernel, None, ((2, 2), (0, 0), (1, 1), 2))
    with pytest.raises(TypeError, match="cls must be a subclass of torch.nn.Module, got 'OtherShape'"):
        register_adder_class("OtherShape", dict)
    register_adder_class(OtherShape, lambda layer: {"weight": layer.kernel, "strides": layer.step})
    with pytest.raises(ValueError, match="needs a 4-D parameter `weight` and fields of adder2d, got .*'strides'"):
        adopt(nn.Sequential(OtherShape()))
