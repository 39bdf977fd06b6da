"""Adder2d, checkpoints of the published code, and adopt."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from conftest import Case
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from torch2trt_adder import (
    Adder2d,
    adderize,
    adopt,
    reference,
    register_adder_class,
    scale_gradients,
    set_eta,
)
from torch2trt_adder.nn import adopt as adoption, proof, recognise
from torch2trt_adder.numerics.definition import assert_forward, assert_grad_input, assert_grad_weight


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
        ({"eta": 0}, "eta must be None or a finite number above 0, got 0"),
        ({"stride": True}, "stride must be an int or a pair of ints, each >= 1, got True"),
        ({"output_channel": True}, "output_channel must be an int >= 1, got True"),
        ({"output_channel": 8.0}, "output_channel must be an int >= 1, got 8.0"),
        ({"kernel_size": {"h": 3, "w": 3}}, "kernel_size must be an int or a pair of ints, each >= 1, got {'h': 3"),
        ({"kernel_size": "33"}, "kernel_size must be an int or a pair of ints, each >= 1, got '33'"),
        ({"stride": 2**31}, "stride must be below 2.31, got 2147483648"),
        ({"dilation": (1, 2**31)}, "dilation must be below 2.31"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"Adder2d: {message}"):
        Adder2d(**{"input_channel": 4, "output_channel": 8, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("bias", [2, 1, 0, "no", None, (1, 1)], ids=repr)
def test_bias_is_a_bool(bias):
    """Conv2d's sixth argument is dilation, the published layer's is bias."""
    with pytest.raises(
        TypeError, match="Adder2d: bias must be True or False, got .*; pass dilation and groups by name"
    ):
        Adder2d(3, 8, 3, 1, 1, bias)


@pytest.mark.parametrize("eta", ["0.2", True, torch.tensor(0.2)], ids=repr)
def test_eta_is_a_number(eta):
    with pytest.raises(TypeError, match="Adder2d: eta must be None or a finite number above 0, got"):
        Adder2d(3, 8, 3, eta=eta)


def test_numpy_integers_are_integers():
    layer = Adder2d(
        np.int32(4), np.int64(8), np.int64(3), np.array([2, 1]), (np.uint8(1), 1), np.True_, np.int16(1), np.int64(2)
    )
    assert repr(layer) == repr(Adder2d(4, 8, 3, (2, 1), 1, True, 1, 2)) and layer.bias is True
    assert all(type(v) is int for v in (layer.input_channel, layer.groups, *layer.stride, *layer.padding))
    assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 8, 3, 5)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, np.int64(8), np.int64(3)), nn.BatchNorm2d(8), nn.Linear(2, 2)
    )
    assert type(adderize(model)[1]) is Adder2d


def test_repr():
    assert repr(Adder2d(4, 8, 3)) == "Adder2d(4, 8, kernel_size=(3, 3), stride=(1, 1))"
    assert repr(Adder2d(4, 8, (3, 1), 2, (1, 0), True, 2, 4)) == (
        "Adder2d(4, 8, kernel_size=(3, 1), stride=(2, 2), padding=(1, 0), dilation=(2, 2), groups=4, bias=True)"
    )
    assert repr(Adder2d(4, 8, 3, eta=None)) == "Adder2d(4, 8, kernel_size=(3, 3), stride=(1, 1), eta=None)"


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


# ---- eta


@pytest.mark.parametrize("eta", [0.2, 0.05, None])
def test_eta(eta):
    layer = Adder2d(3, 5, 3, eta=eta)
    y = layer(X)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert_grad_weight(layer.adder.grad, dy, X, layer.adder, ((1, 1), (0, 0), (1, 1), 1), eta)


def test_set_eta():
    model = nn.Sequential(Adder2d(3, 5, 3), nn.ReLU(), Adder2d(5, 5, 3, eta=None))
    assert set_eta(model, 0.1) is model and [layer.eta for layer in model[::2]] == [0.1, 0.1]
    set_eta(model, None)
    assert [layer.eta for layer in model[::2]] == [None, None]
    with pytest.raises(ValueError, match="set_eta: eta must be None or a finite number above 0, got -1"):
        set_eta(model, -1)
    with pytest.raises(ValueError, match="set_eta: Linear has no Adder2d layer; adopt"):
        set_eta(nn.Linear(2, 2), None)


def test_scale_gradients():
    model = nn.Sequential(*(Adder2d(3, 5, 3, bias=True, eta=None) for _ in range(3)))
    model[2].adder.requires_grad_(False)
    (model[0](X) * 1e-5 + model[1](X)).sum().backward()
    before = [layer.adder.grad for layer in model[:2]]
    before = [gradient.clone() for gradient in before]
    bias = model[0].b.grad.clone()
    scale_gradients(model, 0.3)
    for layer, gradient in zip(model[:2], before, strict=True):
        expected = reference.adaptive_scaling(gradient.double(), 0.3)
        torch.testing.assert_close(layer.adder.grad.double(), expected, rtol=1e-6, atol=1e-6)
    assert model[2].adder.grad is None and torch.equal(model[0].b.grad, bias)
    model[0].adder.grad.zero_()
    scale_gradients(model)
    assert model[0].adder.grad.eq(0).all()


def test_scale_gradients_of_half_weights_and_shared_layers():
    layer = Adder2d(3, 5, 3, eta=None).half()
    model = nn.ModuleList([layer, layer, Adder2d(3, 5, 3, eta=None).half()])
    model[2].adder = layer.adder
    layer.adder.grad = torch.full_like(layer.adder, 60000.0)  # its norm is beyond float16
    scale_gradients(model)
    torch.testing.assert_close(layer.adder.grad, torch.full_like(layer.adder, 0.2))


def test_scale_gradients_errors():
    model = nn.Sequential(nn.Sequential(Adder2d(3, 5, 3, eta=None), Adder2d(5, 5, 3)))
    model(X).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"layer 0\.1 has scaled its gradient in backward\(\) already .*set_eta"):
        scale_gradients(model)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="scale_gradients: Linear has no Adder2d layer"):
        scale_gradients(nn.Linear(2, 2))
    for eta in (None, 0.0):
        with pytest.raises(ValueError, match=f"scale_gradients: eta must be .*got {eta}"):
            scale_gradients(model, eta)


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

    model = nn.Sequential(nn.Conv2d(3, 4, 3), NoLayer(), Adder2d(4, 4, 3), nn.Identity())
    before = list(model.modules())
    assert list(adopt(model).modules()) == before
    with pytest.raises(
        ValueError, match=r"Sequential has no adder layer, .*`stride` and `padding`; name the class of its"
    ):
        adopt(nn.Sequential(nn.Conv2d(3, 4, 3)))
    model[2] = nn.Module()
    model[2].adder = nn.Parameter(torch.randn(4, 4, 3, 3))
    with pytest.raises(ValueError, match=r"has no adder layer, .*\(1 has an `adder`, but not the rest\)"):
        adopt(model)


def test_adopt_refuses_what_it_cannot_stand_for(net):
    net.blocks[1].stride = (1, 2, 3)
    with pytest.raises(
        ValueError, match=r"adopt: Adder2d cannot stand for blocks\.1 \(adder2d\): .* stride must .* got \(1, 2, 3\)"
    ):
        adopt(net)
    assert len(adder_layers(net, adder2d)) == 4  # refused before anything was replaced
    net.blocks[1].stride = 2
    net.head.quantize = True
    with pytest.raises(ValueError, match=r"adopt: head quantizes its weights"):
        adopt(net)


# ---- layers that look like adder layers


class Biased(adder2d):
    """The bias is a parameter of that name."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        del self.bias
        self.bias = nn.Parameter(torch.randn(self.output_channel))

    def forward(self, x):
        return pixels(self, x) + self.bias[:, None, None]


def pixels(layer, x):
    """-sum |x - w|, for inputs of any height and width."""
    groups = x.shape[1] // layer.adder.shape[1]
    return reference.adder2d(x, layer.adder, None, layer.stride, layer.padding, 1, groups)


def test_adopt_takes_a_parameter_named_bias():
    model = nn.Sequential(Biased(3, 5, 3, 2, 1))
    expected = model(X)
    torch.testing.assert_close(adopt(model)(X), expected, rtol=1e-5, atol=1e-4)
    assert model[0].b is not None and model[0].bias is True


class Transposed(adder2d):
    def forward(self, x):
        side = self.stride * (x.shape[2] - 1) + 1, self.stride * (x.shape[3] - 1) + 1
        spread = x.new_zeros(*x.shape[:2], *side)
        spread[:, :, :: self.stride, :: self.stride] = x
        return reference.adder2d(spread, self.adder, None, 1, self.padding)


def variant(forward, **attributes):
    """A look-alike with another forward."""
    layer = type("Variant", (adder2d,), {"forward": forward})(3, 5, 3, 2, 1)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def nudged(layer, x):
    y = pixels(layer, x)
    y[-1, -1, -1, -1] *= 1 + 2e-4
    return y


WRONG = {
    "transposed": lambda: Transposed(3, 5, 3, 2, 1),
    "flipped": lambda: variant(lambda layer, x: reference.adder2d(x, layer.adder.flip(2), None, 2, 1)),
    "convolution": lambda: variant(lambda layer, x: nn.functional.conv2d(x, layer.adder, None, 2, 1)),
    "squares": lambda: variant(lambda layer, x: -(pixels(layer, x) ** 2)),
    "scaled": lambda: variant(lambda layer, x: pixels(layer, x) * 1.001),
    "one value": lambda: variant(nudged),
    "one column less": lambda: variant(lambda layer, x: pixels(layer, x)[..., :-1]),
    "rows and columns swapped": lambda: variant(lambda layer, x: pixels(layer, x.transpose(2, 3))),
    "reflecting": lambda: variant(
        lambda layer, x: reference.adder2d(nn.functional.pad(x, (1, 1, 1, 1), "reflect"), layer.adder, None, 2, 0)
    ),
    "clamped input": lambda: variant(lambda layer, x: pixels(layer, x.clamp(-6, 6))),
    "NaN": lambda: variant(lambda layer, x: pixels(layer, x) * float("nan")),
    "integers": lambda: variant(lambda layer, x: pixels(layer, x).int()),
    "a pair": lambda: variant(lambda layer, x: (pixels(layer, x), x)),
    "noise in training": lambda: variant(
        lambda layer, x: nn.functional.dropout(pixels(layer, x), 0.5, training=layer.training)
    ),
    "transposed, in double": lambda: Transposed(3, 5, 3, 2, 1).double(),
    "scaled, in half": lambda: variant(lambda layer, x: pixels(layer, x) * 1.001).half(),
}


@pytest.mark.parametrize("name", WRONG)
def test_adopt_refuses_what_computes_something_else(name):
    model = nn.Sequential(adder2d(3, 3, 1), WRONG[name]())
    before, state = list(model.modules()), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"adopt: 1 \(\w+\) does not compute adder2d in (training|evaluation) mode: "):
        adopt(model)
    assert list(model.modules()) == before and torch.equal(torch.get_rng_state(), state)


def oblong():
    layer = variant(pixels)
    layer.adder, layer.stride, layer.padding = nn.Parameter(torch.randn(5, 3, 1, 4)), (2, 3), (1, 0)
    return layer


def only_square():
    def forward(layer, x):
        assert x.shape[2] == x.shape[3]
        return pixels(layer, x)

    return variant(forward)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: adder2d(3, 5, 3, 2, 1, True),
        lambda: adder2d(130, 7, 3, 1, 1),
        lambda: adder2d(4, 4, 5, 3, 2),
        lambda: adder2d(9, 5, 1, 2),
        lambda: adder2d(2, 5, 2, 1, 4),
        oblong,
        only_square,
    ],
    ids=["bias", "wide", "large_stride", "pointwise", "mostly_padding", "oblong", "only_square"],
)
def test_adopt_proves_layers(make, dtype):
    assert type(adopt(make().to(dtype))) is Adder2d


def test_adopt_proves_layers_without_values():
    model = nn.Sequential(adder2d(3, 5, 3, 2, 1).to("meta"))
    assert adopt(model)[0].adder.is_meta
    with pytest.raises(ValueError, match="0 .Transposed. does not compute adder2d"):
        adopt(nn.Sequential(Transposed(3, 5, 3, 2, 1).to("meta")))


def test_adopt_proves_the_function_whatever_the_weights():
    """Filters of one value are their own mirror image, and a bias of zeros changes nothing."""
    model = nn.Sequential(WRONG["flipped"]())
    nn.init.ones_(model[0].adder)
    with pytest.raises(ValueError, match="does not compute adder2d"):
        adopt(model)
    layer = adder2d(3, 5, 3, 2, 1, True)
    nn.init.zeros_(layer.b)
    layer.bias = False  # so forward() leaves the parameter out
    with pytest.raises(ValueError, match="does not compute adder2d"):
        adopt(nn.Sequential(layer))


def test_adopt_runs_no_hook_and_changes_no_layer():
    class Counting(adder2d):
        def forward(self, x):
            self.calls.append(self)
            return super().forward(x)

    layer, seen = Counting(3, 5, 3), []
    layer.calls = []
    layer.register_forward_pre_hook(lambda *arguments: seen.append(1))
    layer.register_forward_hook(lambda *arguments: seen.append(1))
    adder = layer.adder.clone()
    ours = adopt(layer)
    assert not layer.calls and not seen and torch.equal(ours.adder, adder)
    ours(X)
    assert seen == [1, 1]


def with_attribute(name, value):
    layer = adder2d(3, 5, 3, 2, 1)
    setattr(layer, name, value)
    return layer


def with_buffer():
    layer = adder2d(3, 5, 3, 2, 1)
    layer.register_buffer("mask", torch.ones(5, 3, 3, 3), persistent=False)
    return layer


def with_state_hook():
    layer = adder2d(3, 5, 3, 2, 1)
    layer._register_state_dict_hook(lambda *arguments: None)
    return layer


LOSSES = {
    "its parameter `scale`": lambda: with_attribute("scale", nn.Parameter(torch.ones(5))),
    "its buffer `mask`": with_buffer,
    "its buffer `norm.running_mean`": lambda: with_attribute("norm", nn.BatchNorm2d(5, affine=False)),
    "its attribute `mask`, a tensor": lambda: with_attribute("mask", torch.ones(5, 3, 3, 3)),
    "its attribute `masks`, a tensor": lambda: with_attribute("masks", [torch.ones(5)]),
    "its attribute `temperature` = 0.5": lambda: with_attribute("temperature", 0.5),
    "its attribute `sparsity` = 1": lambda: with_attribute("sparsity", 1),
    "the `forward` that was set on it": lambda: with_attribute("forward", lambda x: x),
    "its hooks on state_dict": with_state_hook,
}


@pytest.mark.parametrize("lost", LOSSES)
def test_adopt_refuses_to_lose(lost):
    model = nn.Sequential(adder2d(3, 3, 1), LOSSES[lost]())
    with pytest.raises(ValueError, match=rf"adopt: 1 \(adder2d\) would lose {lost}, which Adder2d does not have"):
        adopt(model)
    assert type(model[0]) is adder2d
    register_adder_class(
        adder2d, lambda layer: {"weight": layer.adder, "stride": layer.stride, "padding": layer.padding}
    )
    try:
        if "`temperature`" in lost or "`sparsity`" in lost:  # who registers a class knows its numbers
            assert type(adopt(model)[1]) is Adder2d
        else:
            with pytest.raises(ValueError, match=f"would lose {lost}"):
                adopt(model)
    finally:
        recognise.adder_classes.clear()


@pytest.mark.parametrize("eta", [0.05, None, 1])
def test_adopt_keeps_eta(eta):
    assert adopt(with_attribute("eta", eta)).eta == eta
    assert adopt(adder2d(3, 5, 3)).eta == 0.2
    for wrong in (-1.0, "0.2"):
        with pytest.raises(
            ValueError, match=f"adopt: Adder2d cannot stand for adder2d .adder2d.: .*eta must be .*got {wrong!r}"
        ):
            adopt(with_attribute("eta", wrong))


REPARAMETRIZED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "adder", 0.5),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "adder"),
    "old weight_norm": lambda layer: weight_norm(layer, "adder"),
    "spectral_norm": lambda layer: spectral_norm(layer, "adder"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_adopt_names_reparametrized_layers(name, inplace):
    model = nn.Sequential(adder2d(3, 3, 1), nn.Sequential(REPARAMETRIZED[name](adder2d(3, 5, 3, 2, 1))))
    model(X)
    with pytest.raises(
        ValueError, match=r"adopt: the weight of 1\.0 is not a plain parameter: pruning, weight_norm or"
    ):
        adopt(model, inplace)
    assert type(model[0]) is adder2d
    if name == "pruned":
        prune.remove(model[1][0], "adder")
        expected = model(X)
        torch.testing.assert_close(adopt(model, inplace)(X), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_our_layer_reparametrized(name):
    """It trains as any module does, but its `adder` has no gradient for scale_gradients."""
    layer = REPARAMETRIZED[name](Adder2d(3, 5, 3, eta=None))
    model = adopt(nn.Sequential(layer)).to(memory_format=torch.channels_last)
    y = model(X)
    assert_forward(y, X, layer.adder, None, ((1, 1), (0, 0), (1, 1), 1))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="scale_gradients: the `adder` of layer 0 is computed from other parameters"):
        scale_gradients(model)


class DepthWise(nn.Module):
    """A filter [C, 1, R, S] and no `groups`."""

    def __init__(self, channels, **attributes):
        super().__init__()
        self.stride = self.padding = 1
        self.adder = nn.Parameter(torch.randn(channels, 1, 3, 3))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return pixels(self, x)


@pytest.mark.parametrize(
    "attributes",
    [{"depth_wise": True}, {"depth_wise": True, "groups": 1}, {"input_channel": 6}, {}, {"groups": 6}],
    ids=str,
)
def test_adopt_understands_depthwise_layers(attributes):
    model = nn.Sequential(DepthWise(6, **attributes))
    x = torch.randn(1, 6, 7, 7)
    expected = model(x)
    assert adopt(model)[0].groups == 6
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=0)


def test_adopt_understands_a_first_layer_of_one_channel():
    assert adopt(adder2d(1, 6, 3)).groups == 1
    layer = adder2d(1, 6, 3)
    del layer.input_channel
    assert adopt(layer).groups == 1


class Pickier(adder2d):
    """Its forward cannot run on its own."""

    def forward(self, x, scale):
        return super().forward(x) * scale


def test_adopt_refuses_what_cannot_run():
    with pytest.raises(
        ValueError, match=r"adopt: 0 \(Pickier\) cannot be tried on an input \[2, 3, 3, 4\] on cpu \(TypeError: "
    ):
        adopt(nn.Sequential(Pickier(3, 5, 3, 2, 1)))

    class Locked(adder2d):
        def __deepcopy__(self, memo):
            raise RuntimeError("not me")

    with pytest.raises(ValueError, match=r"0 \(Locked\) cannot be copied to be tried \(RuntimeError: not me\)"):
        adopt(nn.Sequential(Locked(3, 5, 3)))


def test_adopted_copy_for_inference():
    """What a layer would lose does not matter there, as long as its output now is the same."""
    for lost in ("its parameter `scale`", "its buffer `mask`", "its attribute `temperature` = 0.5"):
        model = nn.Sequential(spectral_norm(nn.Conv2d(3, 3, 1)), nn.Sequential(LOSSES[lost]())).eval()
        expected = model(X)  # from here on the convolution has a weight that deepcopy refuses
        twin = adoption.adopted_copy(model)
        assert type(twin[1][0]) is Adder2d and twin[1][0].adder is model[1][0].adder and type(model[1][0]) is adder2d
        torch.testing.assert_close(twin(X), expected, rtol=1e-5, atol=0)
    assert type(adoption.adopted_copy(nn.Sequential(WRONG["noise in training"]()))[0]) is Adder2d
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), Adder2d(3, 3, 1))
    assert adoption.adopted_copy(plain) is plain

    masked = variant(lambda layer, x: reference.adder2d(x, layer.adder * layer.mask, None, 2, 1))
    masked.register_buffer("mask", torch.ones(5, 3, 3, 3))
    assert type(adoption.adopted_copy(nn.Sequential(masked.half()))[0]) is Adder2d
    masked.mask[1, 1, 1, 1] = 0
    for name, wrong in (("Variant", masked), ("Transposed", WRONG["transposed"]())):
        with pytest.raises(ValueError, match=rf"adopt: 1 \({name}\) does not compute adder2d in evaluation mode"):
            adoption.adopted_copy(nn.Sequential(nn.Identity(), wrong))


def test_adopt_proves_equal_layers_once(monkeypatch):
    class Odd(adder2d):  # the same attributes, another function
        def forward(self, x):
            return -super().forward(x)

    proofs, prove = [], proof.why_it_differs
    monkeypatch.setattr(adoption, "why_it_differs", lambda *args: proofs.append(args) or prove(*args))
    model = nn.Sequential(*(adder2d(3, 3, 3) for _ in range(4)), adder2d(3, 3, 3, 2), adder2d(3, 3, 3, bias=True))
    adopt(model, inplace=False)
    assert [layer.stride for layer, *_ in proofs] == [1, 2, 1]
    model[3].flag = True
    adopt(model, inplace=False)
    assert len(proofs) == 7
    model[3] = Odd(3, 3, 3)
    with pytest.raises(ValueError, match=r"adopt: 3 \(Odd\) does not compute adder2d"):
        adopt(model)


def test_adopt_of_a_large_network():
    """Published code holds [K, CRS, NPQ] at once: 57 MB for one pixel of ResNet-50's widest 3x3 layer and 6 outputs."""
    layer = adder2d(512, 512, 3, 1, 1).to("meta")
    shapes = list(proof._probe_shapes(recognise.make_layer(layer, recognise.layer_fields(layer), "x")))
    assert shapes[0] == (1, 512, 3, 4)


class OtherShape(nn.Module):
    """An adder layer that shares no name with the published one."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3))
        self.step = 2

    def forward(self, x):
        return reference.adder2d(x, self.kernel, None, self.step, groups=2)


@pytest.fixture
def registered():
    yield register_adder_class
    recognise.adder_classes.clear()


def test_register_adder_class(registered):
    model = nn.Sequential(OtherShape())
    with pytest.raises(ValueError, match="Sequential has no adder layer.*register_adder_class"):
        adopt(model)
    registered(OtherShape, lambda layer: {"weight": layer.kernel, "stride": layer.step, "groups": 2, "eta": 0.1})
    kernel = model[0].kernel
    twin = adopt(model, inplace=False)
    assert type(model[0]) is OtherShape and torch.equal(twin[0].adder, kernel) and twin[0].adder is not kernel
    adopt(model)
    assert type(model[0]) is Adder2d and model[0].adder is kernel and model[0].eta == 0.1
    x = torch.randn(1, 2, 7, 7)
    assert_forward(model[0](x), x, kernel, None, ((2, 2), (0, 0), (1, 1), 2))
    with pytest.raises(TypeError, match="cls must be a subclass of torch.nn.Module, got 'OtherShape'"):
        registered("OtherShape", dict)
    registered(OtherShape, lambda layer: {"weight": layer.kernel, "strides": layer.step})
    with pytest.raises(ValueError, match="needs a 4-D parameter `weight` and fields of adder2d, got .*'strides'"):
        adopt(nn.Sequential(OtherShape()))


def test_registered_fields_that_do_not_tell_all(registered):
    registered(OtherShape, lambda layer: {"weight": layer.kernel, "groups": 2})  # no stride
    with pytest.raises(
        ValueError, match=r"adopt: 0 \(OtherShape\) does not compute adder2d in evaluation mode: its output"
    ):
        adopt(nn.Sequential(OtherShape()))


def test_registered_class_that_cannot_run_here(registered):
    """As code that has nothing but a CUDA kernel, on a machine without a GPU: its registration is trusted, and said so."""

    class OnlyThere(OtherShape):
        def forward(self, x):
            raise NotImplementedError("needs a GPU")

    registered(OtherShape, lambda layer: {"weight": layer.kernel, "stride": layer.step, "groups": 2})
    with pytest.warns(
        UserWarning, match=r"adopt: 0 \(OnlyThere\) cannot be tried .* \(NotImplementedError: needs a GPU\); its"
    ):
        model = adopt(nn.Sequential(OnlyThere()))
    assert type(model[0]) is Adder2d


# ---- adderize


class Bottleneck(nn.Module):
    """Written as torchvision's, with its names."""

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inplanes = 8
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(4, 2, 1)
        self.layer2 = self._make_layer(8, 2, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, 5)

    def _make_layer(self, planes, blocks, stride):
        downsample = nn.Sequential(
            nn.Conv2d(self.inplanes, planes * 4, 1, stride, bias=False), nn.BatchNorm2d(planes * 4)
        )
        layers = [Bottleneck(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * 4
        layers += [Bottleneck(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


def convolutions(model):
    return [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return ResNet()


def test_adderize(resnet):
    assert adderize(resnet) is resnet
    assert convolutions(resnet) == ["conv1"] and len(adder_layers(resnet, Adder2d)) == 14
    layer = resnet.layer2[0].conv2
    assert (layer.input_channel, layer.output_channel, layer.kernel_size) == (8, 8, (3, 3))
    assert (layer.stride, layer.padding, layer.groups, layer.bias, layer.eta) == ((2, 2), (1, 1), 2, False, 0.2)
    x, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    optimizer = torch.optim.SGD(resnet.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(resnet(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_adderize_options(resnet):
    shortcuts = ["layer1.0.downsample.0", "layer2.0.downsample.0"]
    assert convolutions(adderize(resnet, keep_shortcuts=True, inplace=False)) == ["conv1", *shortcuts]
    assert convolutions(adderize(resnet, keep_first=False, inplace=False)) == []
    kept = convolutions(adderize(resnet, exclude=["layer1", "layer2.1.conv3"], inplace=False))
    assert len(kept) == 9 and "layer2.1.conv3" in kept and "layer2.1.conv2" not in kept
    assert len(convolutions(resnet)) == 15  # the model itself is as it was
    twin = adderize(resnet, eta=None, inplace=False)
    assert twin.layer1[0].conv1.eta is None
    head = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    assert convolutions(adderize(head, inplace=False)) == ["0", "4"]
    assert convolutions(adderize(head, keep_last=False, inplace=False)) == ["0"]


def test_adderize_geometry():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 2, (2, 1), padding="valid", groups=3, bias=False),
        nn.Linear(3, 3),
    ).double()
    model[2].requires_grad_(False)
    model[4].eval()
    seen = []
    model[4].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    x = torch.randn(2, 3, 12, 6, dtype=torch.float64)
    shapes = [model[:i](x).shape for i in range(6)]
    seen.clear()
    adderize(model)
    assert [type(module) for module in model[::2]] == [nn.Conv2d, Adder2d, Adder2d]
    assert [model[:i](x).shape for i in range(6)] == shapes and seen == [Adder2d]
    assert model[2].padding == (2, 2) and model[2].b is not None and model[4].b is None
    assert not model[2].adder.requires_grad and not model[2].b.requires_grad and model[4].adder.requires_grad
    assert model[2].adder.dtype is torch.float64 and not model[4].training and model[2].training


class OwnConv2d(nn.Conv2d):
    pass


def changed(change):
    layer = nn.Conv2d(4, 4, 3)
    return change(layer) or layer


@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "1 pads with 'reflect', and adder layers with"),
        (lambda: nn.Conv2d(4, 4, 2, padding="same"), r"1 has padding 'same' and kernel \(2, 2\), which needs more"),
        (lambda: OwnConv2d(4, 4, 3), "1 is a OwnConv2d, not plainly torch.nn.Conv2d; change it, or name it in"),
        (lambda: changed(spectral_norm), "the weight of 1 is computed by hooks or parametrizations"),
        (lambda: changed(weight_norm), "the weight of 1 is computed by hooks or parametrizations"),
        (lambda: changed(parametrizations.weight_norm), "the weight of 1 is computed by hooks or parametrizations"),
        (
            lambda: changed(lambda layer: prune.random_unstructured(layer, "bias", 0.5)),
            "the bias of 1 is computed by hooks or parametrizations",
        ),
        (
            lambda: changed(lambda layer: layer.register_parameter("gain", nn.Parameter(torch.ones(1)))),
            "1 would lose its parameter `gain`; change it, or name it in",
        ),
        (
            lambda: changed(lambda layer: layer.add_module("observer", nn.BatchNorm2d(4, affine=False))),
            r"1 would lose its buffer `observer\.running_mean`",
        ),
        (
            lambda: changed(lambda layer: setattr(layer, "forward", abs)),
            "1 would lose the `forward` that was set on it",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_adderize_refuses_what_no_adder_layer_can_stand_for(layer, message):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), layer(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"adderize: {message}"):
        adderize(model)
    with pytest.raises(ValueError, match=f"adderize: {message}"):
        adderize(model, inplace=False)
    assert len(convolutions(model)) == 3  # refused before anything was replaced
    assert convolutions(adderize(model, exclude=["1"])) == ["0", "1"]


def test_adderize_keeps_shared_weights():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(4)), nn.BatchNorm2d(4), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    twin = adderize(model, inplace=False)
    assert twin[1].adder is twin[2].adder and twin[3].adder is not twin[1].adder
    assert len(convolutions(model)) == 4


def test_adderize_errors(resnet):
    with pytest.raises(ValueError, match="exclude names 'layer9', but ResNet has no such module"):
        adderize(resnet, exclude=["layer9"])
    with pytest.raises(ValueError, match="Linear has no convolution to replace; 0 of its layers are Conv2d"):
        adderize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Conv2d has no convolution to replace; 1 of its layers are Conv2d"):
        adderize(nn.Conv2d(3, 3, 3))
    with pytest.warns(UserWarning, match="Sequential has no BatchNorm"):
        adderize(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(3, 3)))


def test_channels_last_networks_keep_contiguous_filters():
    """Kernels read contiguous filters; the images and outputs are in channels_last all the same."""
    layer = Adder2d(5, 7, 3, padding=1).to(memory_format=torch.channels_last)
    assert layer.adder.is_contiguous()
    x = torch.randn(2, 5, 6, 6).contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert layer.adder.grad.is_contiguous()
    assert torch.equal(y, layer(x.contiguous()))
