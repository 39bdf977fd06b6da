"""fuse(): the same outputs with fewer operations, and what must not be fused."""

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import calibrated
from torch import Tensor, nn

import torch2trt_adder
from torch2trt_adder import Adder2d, adder2d, fuse, ops
from torch2trt_adder.models import addernet_mnist, resnet20
from torch2trt_adder.models.resnet import Bottleneck, ResNet
from torch2trt_adder.nn.fused import FusedAdder2d
from torch2trt_adder.numerics.rounding import rounding_bounds

X = (2, 4, 9, 8)


def network(forward, *, seed: int = 0, channels: int = 4, **layers: nn.Module) -> nn.Module:
    """A network of two adder layers and BatchNorms (a, na, b, nb), further `layers`, and a forward(self, x)."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (Adder2d(4, channels, 3, padding=1, bias=i > 0) for i in range(2))
            self.na, self.nb = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
            for name, layer in layers.items():
                self.add_module(name, layer)

    Network.forward = forward
    torch.manual_seed(seed)
    model = Network()
    randomize(model)
    return calibrated(model, *X)


def randomize(model: nn.Module) -> nn.Module:
    """Weights and biases of BatchNorm as training leaves them: not 1 and 0; some negative."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.affine:
            nn.init.uniform_(layer.weight, -1, 1.5)
            nn.init.normal_(layer.bias)
    return model


@torch.no_grad()
def assert_same(model: nn.Module, fused: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Two inputs, since hooks and in-place operations could leave something behind; bounds are those of rounding."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(shape, dtype=dtype)
        before = x.clone()
        limit, expected, y = rounding_bounds(model, [x]), model(x.clone()), fused(x)
        assert y.dtype is expected.dtype and y.shape == expected.shape
        assert limit < 0.05 * expected.abs().max(), "the bound says too little"
        assert (y.double() - expected.double()).abs().max() <= limit
        assert torch.equal(x, before)


def counts(fused: nn.Module) -> tuple[int, int]:
    """How many fused layers run, and how many BatchNorms are left."""
    kinds = [type(layer) for layer in fused.modules()]
    return kinds.count(FusedAdder2d), sum(issubclass(kind, nn.BatchNorm2d) for kind in kinds)


# ---- whole networks


def test_resnet20():
    torch.manual_seed(0)
    model = calibrated(randomize(resnet20()), 4, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse(model)
    assert counts(fused) == (20, 2)  # the first and the last BatchNorm follow convolutions
    assert_same(model, fused, 2, 3, 32, 32)
    assert counts(model) == (0, 22)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = fused.fusion_report
    assert report.left == {} and len(report.fused) == 20
    assert report.fused["layer1.0.conv1"] == "BatchNorm, ReLU"
    assert report.fused["layer2.0.conv2"] == "BatchNorm, residual, ReLU"
    assert report.fused["layer2.0.downsample.0"] == "BatchNorm"
    assert str(report).startswith("20 adder layers fused, 0 left\n  layer1.0.conv1: with BatchNorm, ReLU\n")
    calls = [node for node in fused.graph.nodes if node.op.startswith("call_")]
    assert len(calls) == 3 + 20 + 4  # conv, bn, relu; adder layers; pool, conv, bn, flatten


def test_bottlenecks():
    torch.manual_seed(0)
    stem = {"conv1": nn.Conv2d(3, 8, 3, padding=1), "bn1": nn.BatchNorm2d(8), "relu": nn.ReLU()}
    model = ResNet(stem, Bottleneck, [8, 16], [2, 2], nn.AdaptiveAvgPool2d(1), 10, fc_bias=True)
    model = calibrated(randomize(model), 4, 3, 16, 16)
    fused = fuse(model)
    assert counts(fused) == (14, 2)
    assert_same(model, fused, 2, 3, 16, 16)


def test_mnist():
    torch.manual_seed(0)
    model = calibrated(randomize(addernet_mnist()), 8, 1, 28, 28)
    fused = fuse(model)
    assert counts(fused) == (2, 0)
    assert set(fused.fusion_report.fused.values()) == {"BatchNorm"}  # a pool comes next
    assert_same(model, fused, 3, 1, 28, 28)


def test_depthwise():
    """As MobileNet: depth-wise and 1x1 layers in turn, in nn.Sequential, with ReLU6."""

    def pair(channels: int, filters: int, stride: int) -> list[nn.Module]:
        return [
            *(Adder2d(channels, channels, 3, stride, 1, groups=channels), nn.BatchNorm2d(channels), nn.ReLU6()),
            *(Adder2d(channels, filters, 1), nn.BatchNorm2d(filters), nn.ReLU6(inplace=True)),
        ]

    torch.manual_seed(0)
    model = nn.Sequential(*pair(6, 12, 1), *pair(12, 20, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = calibrated(randomize(model), 8, 6, 12, 12)
    fused = fuse(model)
    assert counts(fused) == (4, 0) and type(fused) is nn.Sequential
    assert set(fused.fusion_report.fused.values()) == {"BatchNorm, ReLU6"}
    assert_same(model, fused, 2, 6, 12, 12)


class _DenseLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), Adder2d(channels, 8, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), Adder2d(8, 4, 3, padding=1)

    def forward(self, features) -> Tensor:
        if isinstance(features, Tensor):
            features = [features]
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x), inplace=True))


class _DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DenseLayer(4 + 4 * i) for i in range(3))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return F.relu(self.norm(torch.cat(features, 1))).mean((2, 3))


def test_pre_activation():
    """As DenseNet: the layer in the middle is followed by its BatchNorm, the last by a concatenation."""
    torch.manual_seed(0)
    model = calibrated(randomize(_DenseNet()), *X)
    fused = fuse(model)
    assert counts(fused) == (3, 4)
    assert set(fused.fusion_report.fused) == {f"layers.{i}.conv1" for i in range(3)}
    assert set(fused.fusion_report.left) == {f"layers.{i}.conv2" for i in range(3)}
    assert_same(model, fused, *X)


def test_float16_keeps_what_float16_cannot_hold():
    """Sums pass 65504: the network returns nothing of use before it is fused, and right values afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(Adder2d(64, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    nn.init.normal_(model[0].adder, -150, 10)
    model[0].adder.data = model[0].adder.data.half().float()
    x = torch.randn(2, 64, 6, 6).half().float()
    model = calibrated(model, *x.shape)
    with torch.no_grad():
        expected = model(x)
        half = copy.deepcopy(model).half()(x.half())
        y = fuse(model).half()(x.half())
    assert not half.isfinite().all() or (half == 0).all()
    assert y.dtype is torch.float16 and expected.max() > 0.5
    limit = rounding_bounds(model, [x]).item() + 2**-11 * expected.max()
    assert limit < 0.1 * expected.max() and (y - expected).abs().max() <= limit


# ---- forms of one chain

CHAINS = {
    "functions": lambda self, x: F.relu(self.na(self.a(x))),
    "torch.relu": lambda self, x: torch.relu(self.na(self.a(x))),
    "method": lambda self, x: self.na(self.a(x)).relu(),
    "method in place": lambda self, x: self.na(self.a(x)).relu_(),
    "in place": lambda self, x: F.relu(self.na(self.a(x)), inplace=True),
    "relu6": lambda self, x: F.relu6(self.na(self.a(x))),
    "hardtanh": lambda self, x: F.hardtanh(self.na(self.a(x)), -0.5, 0.75),
    "clamp": lambda self, x: torch.clamp(self.na(self.a(x)), -0.5, max=0.75),
    "clamp method": lambda self, x: self.na(self.a(x)).clamp(min=0.25),
    "clamp_max": lambda self, x: torch.clamp_max(self.na(self.a(x)), 0.25),
    "clip": lambda self, x: self.na(self.a(x)).clip_(-1, 1),
    "sum": lambda self, x: self.na(self.a(x)) + x,
    "sum from the left": lambda self, x: x + self.na(self.a(x)),
    "sum in place": lambda self, x: F.relu(operator.iadd(self.na(self.a(x)), x)),
    "torch.add": lambda self, x: torch.add(self.na(self.a(x)), x).relu(),
    "add method": lambda self, x: self.na(self.a(x)).add(x).relu(),
    "add_ method": lambda self, x: self.na(self.a(x)).add_(x).relu_(),
    "keyword": lambda self, x: torch.add(self.na(self.a(x)), other=x, alpha=1),
    "functional layer": lambda self, x: F.relu(self.na(adder2d(x, self.a.adder, self.a.b, 1, 1, eta=None))),
    "functional norm": lambda self, x: F.relu(
        F.batch_norm(
            self.a(x), self.na.running_mean, self.na.running_var, self.na.weight, self.na.bias, False, 0.1, self.na.eps
        )
    ),
    "identities": lambda self, x: F.relu(self.same(self.na(self.drop(self.a(x)))) + x),
}


@pytest.mark.parametrize("form", CHAINS)
def test_forms(form):
    model = network(CHAINS[form], same=nn.Identity(), drop=nn.Dropout(0.5))
    fused = fuse(model)
    assert counts(fused) == (1, 0)
    calls = [node for node in fused.graph.nodes if node.op.startswith("call_")]
    assert len(calls) == 1, fused.code
    assert_same(model, fused, *X)


def test_two_layers_into_one_sum():
    model = network(lambda self, x: F.relu(self.na(self.a(x)) + self.nb(self.b(x))))
    fused = fuse(model)
    assert counts(fused) == (2, 0)
    assert fused.fusion_report.fused == {"a": "BatchNorm", "b": "BatchNorm, residual, ReLU"}
    assert_same(model, fused, *X)


@pytest.mark.parametrize("size", [(4, 1, 1), (1, 1, 9, 8), (1,), (2, 4, 1, 1)])
def test_a_residual_that_broadcasts(size):
    model = network(
        lambda self, x: F.relu(self.na(self.a(x)) + self.more.r), more=nn.ParameterDict({"r": torch.randn(size)})
    )
    fused = fuse(model)
    assert counts(fused) == (1, 0)
    assert_same(model, fused, *X)


def test_a_norm_without_affine_parameters():
    model = network(lambda self, x: self.n(self.a(x)), n=nn.BatchNorm2d(4, affine=False, eps=0.3))
    fused = fuse(model)
    assert counts(fused) == (1, 0)
    assert_same(model, fused, *X)


# ---- what must not be fused


def _used_twice(self, x):
    y = self.na(self.a(x))
    return F.relu(y) + y


def _sum_used_twice(self, x):
    y = self.na(self.a(x)) + x
    return F.relu(y) - y


def _layer_twice(self, x):
    return self.nb(self.a(self.na(self.a(x))))


def _norm_twice(self, x):
    return self.na(self.b(F.relu(self.na(self.a(x)))))


def _relu_of_both(self, x):
    y = self.a(x)
    return self.na(y) + y


PARTLY = {  # forward, fused layers, left BatchNorms, what is left
    "read twice": (_used_twice, 1, 0, {}),
    "sum read twice": (_sum_used_twice, 1, 0, {}),
    "a layer called twice": (_layer_twice, 0, 2, {"a": "a is used in 2 places"}),
    "a norm called twice": (_norm_twice, 0, 1, {"a": "na is used in 2 places", "b": "na is used in 2 places"}),
    "sums read twice": (_relu_of_both, 0, 1, {"a": "its output is used in 2 places"}),
    "relu first": (lambda self, x: self.na(F.relu(self.a(x) + 400)), 0, 1, {"a": "add follows it"}),
    "added to itself": (lambda self, x: (lambda y: y + y)(self.na(self.a(x))), 1, 0, {}),
    "a number added": (lambda self, x: F.relu(self.na(self.a(x)) + 0.5), 1, 0, {}),
    "alpha": (lambda self, x: torch.add(self.na(self.a(x)), x, alpha=2), 1, 0, {}),
    "computed limits": (lambda self, x: self.na(self.a(x)).clamp(min=x), 1, 0, {}),
    "limits crossed": (lambda self, x: self.na(self.a(x)).clamp(1, -1), 1, 0, {}),
    "returned": (lambda self, x: self.a(x), 0, 0, {"a": "no BatchNorm follows it"}),
    "computed weight": (
        lambda self, x: self.na(adder2d(x, self.a.adder * 2, None, 1, 1)),
        0,
        1,
        {"adder2d_default": "computed"},
    ),
}


@pytest.mark.filterwarnings("ignore:fuse")
@pytest.mark.parametrize("form", PARTLY)
def test_left_as_it_is(form):
    forward, layers, norms, left = PARTLY[form]
    model = network(forward)
    fused = fuse(model)
    assert counts(fused) == (layers, norms)
    report = fused.fusion_report.left
    for path, reason in left.items():
        assert reason in report[path]
    assert_same(model, fused, *X)


@pytest.mark.filterwarnings("ignore:fuse")
def test_norms_that_cannot_be_folded():
    for norm, reason in (
        (nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
        (nn.InstanceNorm2d(4), "a InstanceNorm2d follows it"),
        (type("Frozen", (nn.BatchNorm2d,), {})(4), "a Frozen follows it"),
    ):
        model = network(lambda self, x: self.n(self.a(x)), n=norm)
        fused = fuse(model)
        assert counts(fused)[0] == 0 and reason in fused.fusion_report.left["a"]
        assert_same(model, fused, *X)


@pytest.mark.filterwarnings("ignore:fuse")
@pytest.mark.parametrize("where", ["a", "na"])
@pytest.mark.parametrize("sequential", [False, True])
def test_hooks_keep_a_layer(where, sequential):
    model = network(lambda self, x: self.act(self.na(self.a(x))), act=nn.ReLU())
    if sequential:
        model = nn.Sequential(*(getattr(model, name) for name in ("a", "na", "act")))
        where = str(("a", "na").index(where))
    seen = []
    model.get_submodule(where).register_forward_hook(lambda module, args, output: seen.append(output.sum()))
    fused = fuse(model, inplace=True)
    assert counts(fused) == (0, 1)
    assert "hooks" in next(iter(fused.fusion_report.left.values()))
    fused(torch.randn(X))
    assert len(seen) == 1


def test_hooks_on_an_activation_end_the_chain():
    model = network(lambda self, x: self.act(self.na(self.a(x))), act=nn.ReLU())
    seen = []
    model.act.register_forward_hook(lambda module, args, output: seen.append(args[0].min()))
    fused = fuse(model, inplace=True)
    assert fused.fusion_report.fused == {"a": "BatchNorm"}
    fused(torch.randn(X))
    assert len(seen) == 1 and seen[0] < 0


def test_hooks_on_a_block_see_its_output():
    torch.manual_seed(0)
    model = calibrated(resnet20(), 4, 3, 32, 32)
    seen = []
    handle = model.layer2[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    fused = fuse(model, inplace=True)
    assert counts(fused) == (20, 2)
    x = torch.randn(1, 3, 32, 32)
    y = fused(x)
    assert len(seen) == 1 and seen[0].shape == (1, 32, 16, 16)
    handle.remove()
    assert torch.equal(fused(x), y) and len(seen) == 1
    assert not torch.equal(fused.forward(x), y)  # the network's own hook doubles x


def test_pruned_and_parametrized_layers_stay():
    from torch.nn.utils import parametrize, prune

    class Halve(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = network(lambda self, x: self.nb(self.b(F.relu(self.na(self.a(x))))))
    prune.random_unstructured(model.a, "adder", 0.5)
    parametrize.register_parametrization(model.b, "adder", Halve())
    with pytest.warns(UserWarning, match="nothing in Network could be fused; print the attribute fusion_report"):
        fused = fuse(model)
    assert counts(fused) == (0, 2)
    assert fused.fusion_report.left.keys() == {"a", "b"}
    assert_same(model, fused, *X)


@pytest.mark.filterwarnings("ignore:fuse")
def test_float64_stays():
    model = network(lambda self, x: self.na(self.a(x))).double()
    fused = fuse(model)
    assert "float64" in fused.fusion_report.left["a"]
    assert_same(model, fused, *X, dtype=torch.float64)


# ---- values that change in place


def _input_overwritten(self, x):
    x = x * 1
    y = self.a(x)
    F.relu_(x)
    return F.relu(self.na(y) + self.nb(self.b(x)))


def _view_overwritten(self, x):
    x = x * 1
    y = self.a(x)
    x.view(-1).mul_(2)
    return F.relu(self.na(y) + self.nb(self.b(x)))


def _activation_overwrites(self, x):
    x = x * 1
    y = self.a(x)
    z = self.act(x)
    return F.relu(self.na(y) + z)


def _written_over_the_shortcut(self, x):
    x = x * 1
    x += self.na(self.a(x))
    return F.relu(x)


@pytest.mark.parametrize(
    "forward", [_input_overwritten, _view_overwritten, _activation_overwrites, _written_over_the_shortcut]
)
def test_inputs_that_are_overwritten(forward):
    model = network(forward, act=nn.ReLU(inplace=True))
    fused = fuse(model)
    assert fused.fusion_report.fused["a"] == "BatchNorm"
    assert_same(model, fused, *X)


def test_other_writes_do_not_matter():
    def forward(self, x):
        y = self.a(x)
        z = self.b(x).mul_(0.01)
        return F.relu(self.na(y) + z)

    model = network(forward)
    fused = fuse(model)
    assert fused.fusion_report.fused == {"a": "BatchNorm, residual, ReLU"}
    assert_same(model, fused, *X)


# ---- networks that torch.fx cannot trace, or would trace wrongly


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Adder2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.mean() > -100 else x


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.gate = Adder2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), _Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(F.relu(self.norm(self.first(x)) + x))


def test_a_branch_on_values():
    torch.manual_seed(0)
    model = calibrated(randomize(_Gated()), *X)
    fused = fuse(model)
    assert counts(fused) == (2, 0)
    assert fused.fusion_report.fused == {"first": "BatchNorm, residual, ReLU", "gate.body.0": "BatchNorm, ReLU"}
    assert [type(layer) for layer in fused.gate.body] == [FusedAdder2d, nn.Identity, nn.Identity]
    assert_same(model, fused, *X)


def test_the_whole_network_branches():
    def forward(self, x):
        if x.mean() > 100:
            return x
        return self.block(self.na(self.a(x)))

    torch.manual_seed(0)
    model = network(forward, block=_Gated())
    fused = fuse(model)
    assert counts(fused) == (2, 2)
    assert "cannot trace Network" in fused.fusion_report.left["a"]
    assert "does not call it" in fused.fusion_report.left["b"] or "cannot trace" in fused.fusion_report.left["b"]
    assert_same(model, fused, *X)


def test_questions_about_types():
    """torch.fx's values are no tensors: it would silently trace the other branch."""

    def forward(self, x):
        y = self.block(x)
        return y if isinstance(y, Tensor) else y.nothing

    torch.manual_seed(0)
    model = network(forward, block=_Gated())
    fused = fuse(model)
    assert counts(fused)[0] == 2
    assert "isinstance" in fused.fusion_report.left["a"]
    assert_same(model, fused, *X)


def test_optional_arguments():
    def forward(self, x, mask=None):
        y = self.block(x)
        return y if mask is None else y * mask

    torch.manual_seed(0)
    model = network(forward, block=_Gated())
    fused = fuse(model)
    assert counts(fused)[0] == 2
    assert "optional argument 'mask'" in fused.fusion_report.left["a"]
    assert_same(model, fused, *X)
    x = torch.randn(X)
    mask = torch.rand(X).round()
    assert torch.equal(fused(x, mask), fused(x) * mask)


def test_a_shared_block():
    """One block in two places: fused once, called twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = _Gate()
            self.two = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    torch.manual_seed(0)
    model = calibrated(randomize(Twice()), *X)
    with pytest.warns(UserWarning, match="nothing in Twice"):
        fused = fuse(model)
    assert "is used in 2 places" in fused.fusion_report.left["one.body.0"]
    assert_same(model, fused, *X)


# ---- the result


@pytest.mark.parametrize("fp16", [False, True])
def test_rounding_bounds(fp16):
    """The bound of a fused network allows what float16 intermediates move, and hardly more than that of the network."""
    model = network(lambda self, x: F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + x))
    fused, x = fuse(model), torch.randn(X)
    plain, bound = (rounding_bounds(m, [x], fp16).item() for m in (model, fused))
    assert plain / 4 < bound < 2 * plain
    if fp16:
        halves = fused(x.half().float()) - fused(x)
        assert 0 < halves.abs().max() < bound
    wrong = copy.deepcopy(fused)
    wrong.b.adder[1, 2, 0, 0] += 1
    assert (wrong(x) - fused(x)).abs().max() > bound


def test_no_gradients_and_no_training():
    model = network(lambda self, x: F.relu(self.na(self.a(x)) + x))
    fused = fuse(model)
    y = fused(torch.randn(X))  # without torch.no_grad()
    assert not y.requires_grad and not any(p.requires_grad for p in fused.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"computes no gradients.* fuse\(\)"):
        fused(torch.randn(X).requires_grad_())
    assert torch.equal(fused.train()(x := torch.randn(X)), fused.eval()(x))


def test_in_place_takes_the_tensors_over():
    model = network(lambda self, x: F.relu(self.na(self.a(x)) + x))
    pointer, expected = model.a.adder.data_ptr(), copy.deepcopy(model)
    fused = fuse(model, inplace=True)
    assert fused.a.adder.data_ptr() == pointer != fuse(expected).a.adder.data_ptr()
    assert_same(expected, fused, *X)


def test_state_copies_and_files(tmp_path):
    fused, x = fuse(calibrated(addernet_mnist(), 8, 1, 28, 28)), torch.randn(2, 1, 28, 28)
    expected = fused(x)
    assert {"conv1.adder", "conv1.scale", "conv1.shift", "conv2.scale", "fc2.bias"} <= fused.state_dict().keys()
    assert not any("bn" in name for name in fused.state_dict())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), expected)
    other = fuse(calibrated(addernet_mnist(), 8, 1, 28, 28))
    assert not torch.equal(other(x), expected)
    torch.save(fused.state_dict(), tmp_path / "fused.pt")
    other.load_state_dict(torch.load(tmp_path / "fused.pt"))
    assert torch.equal(other(x), expected)


def test_scale_and_shift_are_exact():
    """Scale and shift come from float64, the shift from the rounded scale: a value at the mean gives the bias."""
    torch.manual_seed(0)
    layer, norm = Adder2d(3, 5, 3), nn.BatchNorm2d(5)
    norm.running_mean.uniform_(-9000, -3000), norm.running_var.uniform_(1, 1e4)
    randomize(norm)
    fused = fuse(nn.Sequential(layer, norm).eval())[0]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert (fused.scale - scale).abs().max() <= 2**-24 * scale.abs().max()
    at_mean = fused.scale.double() * norm.running_mean.double() + fused.shift.double()
    assert ((at_mean - norm.bias.double()).abs() <= 2**-24 * fused.shift.double().abs()).all()


def test_twice_changes_nothing():
    model = network(lambda self, x: F.relu(self.na(self.a(x)) + x))
    once, x = fuse(model), torch.randn(X)
    with pytest.warns(UserWarning, match="could be fused"):
        twice = fuse(once)
    assert torch.equal(once(x), twice(x))


def test_third_party_layers(recwarn):
    from networks import adder2d as published

    torch.manual_seed(0)
    model = calibrated(nn.Sequential(published(), nn.BatchNorm2d(4), nn.ReLU()), 2, 3, 8, 8)
    fused = fuse(model)
    assert counts(fused) == (1, 0) and type(model[0]) is published
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)

    class Wrong(published):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = calibrated(nn.Sequential(Wrong(), nn.BatchNorm2d(4)), 2, 3, 8, 8)
    fused = fuse(model)
    assert counts(fused) == (0, 1) and "does not compute adder2d" in fused.fusion_report.left["third-party layers"]


def test_attributes_stay():
    model = network(lambda self, x: self.na(self.a(x)))
    model.classes = ["cat", "dog"]
    assert fuse(model).classes == ["cat", "dog"]
    assert type(fuse(model)).__name__ == "Network"


def test_public_name():
    assert torch2trt_adder.fuse is fuse and ops.adder2d_fused.__doc__


def test_compile_and_export():
    torch._dynamo.reset()
    fused = fuse(network(lambda self, x: F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + x)))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    program = torch.export.export(fused, (torch.randn(X),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.torch2trt_adder.adder2d_fused.default] * 2
    for N in (2, 5):
        x = torch.randn(N, *X[1:])
        assert torch.equal(compiled(x), fused(x)) and torch.equal(program.module()(x), fused(x))


# ---- errors


def test_training_mode_names_the_layer():
    model = network(lambda self, x: self.na(self.a(x)))
    model.na.train()
    with pytest.raises(ValueError, match=r"fuse: layer 'na' is in training mode.* call model.eval\(\) first"):
        fuse(model)
    with pytest.raises(ValueError, match="fuse: the model is in training mode"):
        fuse(model.train())
    assert counts(model) == (0, 2)


def test_no_module():
    with pytest.raises(TypeError, match=r"fuse: model must be a torch\.nn\.Module, got function"):
        fuse(lambda x: x)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_resnet20_on_a_gpu(dtype, channels_last):
    """Against the same fused network in float64, whose parameters are those that were rounded."""
    torch.manual_seed(0)
    fused = fuse(calibrated(randomize(resnet20()), 16, 3, 32, 32)).to(dtype)
    x = torch.randn(8, 3, 32, 32).to(dtype)
    wide = copy.deepcopy(fused).float()
    limit = rounding_bounds(wide, [x.float()], fp16=dtype is not torch.float32).item()
    expected = wide.double()(x.double())
    fused, x = fused.cuda(), x.cuda()
    if channels_last:
        fused, x = fused.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(allow_tf32=False):
        y = fused(x).double().cpu()
    assert (y - expected).abs().max() <= limit, "the fused network on the GPU is further off than rounding explains"


@pytest.mark.gpu
def test_cuda_graph():
    torch.manual_seed(0)
    fused = fuse(calibrated(randomize(resnet20()), 16, 3, 32, 32)).cuda()
    x = torch.randn(8, 3, 32, 32, device="cuda")
    expected = fused(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected), "the CUDA graph of the fused network gives other values than the network"
