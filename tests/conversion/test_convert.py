"""convert() without a GPU: its errors, and the bounds by which it judges an engine. Engines are in frontends/test_torch2trt_engines.py."""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import sys
import types
from collections.abc import Callable

import pytest
import torch
from networks import adder2d, calibrated
from torch import Tensor, nn

import torch2trt_adder
from torch2trt_adder import Adder2d, frontends
from torch2trt_adder.conversion import (
    arguments,
    converter,
    onnx_route,
    routes,
    torch2trt_route,
)
from torch2trt_adder.models import addernet_mnist, resnet20
from torch2trt_adder.nn import adopt
from torch2trt_adder.numerics import comparison, rounding

# ---- errors: one sentence, before anything is converted


def small() -> nn.Module:
    return nn.Sequential(Adder2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(RuntimeError, match=r"^convert: torch .* finds no NVIDIA GPU here.*: use a machine with a GPU"):
        torch2trt_adder.convert(small(), [torch.randn(1, 3, 8, 8)])


@pytest.mark.parametrize(
    "route, absent, remedy",
    [
        ("auto", {"tensorrt"}, "TensorRT is not installed: pip install tensorrt"),
        ("torch2trt", {"torch2trt"}, r"torch2trt is not installed: pip install git\+"),
        ("onnx", {"onnx", "onnxscript"}, "onnx is not installed: pip install onnx onnxscript"),
        (
            "auto",
            {"torch2trt", "onnxscript"},
            "torch2trt is not installed.* Or go through ONNX: pip install onnxscript",
        ),
    ],
)
def test_package_missing(monkeypatch: pytest.MonkeyPatch, route: str, absent: set, remedy: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else object())
    with pytest.raises(RuntimeError, match=f"^convert: {remedy}"):
        torch2trt_adder.convert(small(), [torch.randn(1, 3, 8, 8)], route)


def test_either_route_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for absent in ({"torch2trt"}, {"onnx"}):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else object())
        monkeypatch.setattr(frontends, "error", lambda name: None)
        assert routes.missing() is None


def test_torch2trt_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    error = OSError("libnvinfer.so.8: cannot open shared object file")
    monkeypatch.setattr(frontends, "error", lambda name: error)
    with pytest.raises(RuntimeError, match="torch2trt cannot be used .OSError: libnvinfer"):
        torch2trt_adder.convert(small(), [torch.randn(1, 3, 8, 8)], route="torch2trt")


def test_no_such_route() -> None:
    with pytest.raises(ValueError, match="route must be one of auto, torch2trt, onnx, got 'tensorrt'"):
        torch2trt_adder.convert(small(), [torch.randn(1, 3, 8, 8)], "tensorrt")


def test_options_of_the_onnx_route() -> None:
    """torch2trt's shape options become names and ranges of axes; what ONNX has not is refused by name."""
    x, z = torch.zeros(2, 3, 8, 8), torch.zeros(2, 5)
    assert onnx_route._dynamic_axes([x, z], ["x", "z"], {}) == (None, {})
    axes, ranges = onnx_route._dynamic_axes([x, z], ["x", "z"], {"max_batch_size": 16})
    assert axes == [{0: "axis0_1_16"}, {0: "axis0_1_16"}] and ranges == {"x:0": (1, 2, 16), "z:0": (1, 2, 16)}
    shapes = {
        "min_shapes": [(1, 3, 4, 8), (1, 5)],
        "opt_shapes": [(2, 3, 8, 8), (2, 5)],
        "max_shapes": [(2, 3, 9, 8), (2, 5)],
    }
    axes, ranges = onnx_route._dynamic_axes([x, z], ["x", "z"], shapes)
    assert axes == [{0: "axis0_1_2", 2: "axis2_4_9"}, {0: "axis0_1_2"}]
    assert ranges == {"x:0": (1, 2, 2), "x:2": (4, 8, 9), "z:0": (1, 2, 2)}
    with pytest.raises(ValueError, match="max_shapes must hold one shape for each input"):
        onnx_route._dynamic_axes([x, z], ["x", "z"], {"max_shapes": [(2, 3, 8, 8)]})
    with pytest.raises(TypeError, match="route 'onnx' has no option 'int8_mode'.*route='torch2trt'"):
        onnx_route.through_onnx(small(), [x], {"int8_mode": True})


def test_training_mode() -> None:
    with pytest.raises(
        ValueError, match=r"the model is in training mode, where layer '1' \(BatchNorm2d\).*model\.eval\(\)"
    ):
        torch2trt_adder.convert(small().train(), [torch.randn(1, 3, 8, 8)])
    model = small()
    model[1].train()
    with pytest.raises(ValueError, match=r"layer '1' is in training mode, where layer '1' \(BatchNorm2d\)"):
        torch2trt_adder.convert(model, [torch.randn(1, 3, 8, 8)])


class Noisy(nn.Module):
    """Reads its mode in a method that its forward calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x)

    def noise(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class Quiet(nn.Module):
    """Sets its mode, but does not read it."""

    def __init__(self) -> None:
        super().__init__()
        self.training = True

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def instance_forward() -> nn.Module:
    layer = nn.Identity()
    layer.forward = lambda x: x * 2 if layer.training else x
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(),
        nn.AlphaDropout(),
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.RReLU(),
        nn.LSTM(3, 3, 2, dropout=0.1),
        nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)),
        Noisy(),
        instance_forward(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_differ_in_training_mode(layer: nn.Module) -> None:
    model = nn.Sequential(nn.ReLU(), layer).eval()
    arguments.check_model("convert", model)
    layer.train()
    with pytest.raises(ValueError, match="convert: layer '1.* is in training mode"):
        arguments.check_model("convert", model)


def test_layers_that_do_not_differ_in_training_mode() -> None:
    """A layer, container or parametrization that was added after eval() computes the same in either mode."""
    model = nn.Sequential(
        Adder2d(3, 4, 3),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Identity()),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.Dropout(0.0),
        Quiet(),
    ).train()
    x = torch.randn(2, 3, 12, 12)
    arguments.check_model("convert", model)
    trained = model(x)
    assert torch.equal(trained, model.eval()(x))


# ---- options: misspelt ones have no effect, so they raise


@pytest.mark.parametrize("route", ["auto", "torch2trt", "onnx"])
@pytest.mark.parametrize("given, meant", [("fp16", "fp16_mode"), ("max_batchsize", "max_batch_size")])
def test_unknown_option(route: str, given: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch2trt(monkeypatch)
    with pytest.raises(
        TypeError, match=f"^convert: route '{route}' has no option '{given}'; did you mean '{meant}'\\?"
    ):
        torch2trt_adder.convert(small(), [torch.randn(1, 3, 8, 8)], route, **{given: True})


def test_unknown_option_unlike_any(monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch2trt(monkeypatch)
    with pytest.raises(TypeError, match="has no option 'q'; its options are min_shapes, .*int8_mode, allow_constants"):
        torch2trt_adder.convert(small(), [torch.randn(1, 3, 8, 8)], q=1)
    for name in ("int8_mode", "allow_constants"):
        converter._check_options("torch2trt", {name: True})
        with pytest.raises(TypeError, match=f"route 'onnx' has no option '{name}'.*route='torch2trt'"):
            converter._check_options("onnx", {name: True})


def with_torch2trt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch2trt", types.SimpleNamespace(torch2trt=swallows_options))
    monkeypatch.setattr(frontends, "is_enabled", lambda name: True)


def swallows_options(
    module: object, inputs: object, fp16_mode: bool = False, int8_mode: bool = False, **kwargs: object
) -> None:
    """torch2trt's signature, cut short."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_unsupported_input_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"input 0 is {dtype}.*\\.float\\(\\) or \\.half\\(\\)"):
        torch2trt_adder.convert(small(), [torch.zeros(1, 3, 8, 8, dtype=dtype)])


def test_unsupported_parameter_dtype() -> None:
    with pytest.raises(TypeError, match="parameter '0.adder' is torch.bfloat16"):
        torch2trt_adder.convert(small().bfloat16(), [torch.randn(1, 3, 8, 8)])


@pytest.mark.parametrize("inputs", [{"x": torch.randn(1, 3, 8, 8)}, 3, None])
def test_inputs_that_are_no_list(inputs: object) -> None:
    with pytest.raises(TypeError, match=r"inputs must be a list or tuple.*write convert\(model, \[x\]\)"):
        torch2trt_adder.convert(small(), inputs)


def test_inputs_without_a_tensor() -> None:
    with pytest.raises(TypeError, match="inputs holds no tensor"):
        torch2trt_adder.convert(small(), [])


def test_inputs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "missing", lambda route: None)
    with pytest.raises(ValueError, match=r"input 0 is on cpu.*one GPU.*\.cuda\(\)"):
        torch2trt_adder.convert(small(), torch.randn(1, 3, 8, 8))


# ---- which route, and at which shapes, with stand-ins for the engines


class Routes:
    """Engines that compute the model itself, or what a test puts there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: dict[str, list[tuple]] = {"torch2trt": [], "onnx": []}
        self.wrong: dict[str, Callable] = {}
        monkeypatch.setattr(routes, "missing", lambda route="auto": None)
        monkeypatch.setattr(arguments, "check_devices", lambda model, example: None)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        for name, route in routes.TABLE.items():
            stand_in = dataclasses.replace(route, convert=functools.partial(self.through, name))
            monkeypatch.setitem(routes.TABLE, name, stand_in)

    def through(self, route: str, model: nn.Module, inputs: object, options: dict) -> torch2trt_route.Converted:
        routes = self

        class Engine(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                routes.shapes[route].append(tuple(x.shape))
                return routes.wrong.get(route, lambda y: y)(model(x))

        return Engine(), comparison.tensor_leaves


def no_engine(y: Tensor) -> Tensor:
    raise AttributeError("'INetworkDefinition' object has no attribute 'add_padding'\nand more")


@pytest.mark.parametrize("fault", [no_engine, lambda y: y + 1])
def test_auto_goes_through_onnx_where_torch2trt_fails(
    fault: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    routes, x = Routes(monkeypatch), torch.randn(2, 3, 8, 8)
    assert torch2trt_adder.convert(small(), [x]).route == "torch2trt"
    assert capsys.readouterr().err == "torch2trt_adder.convert: route torch2trt\n"
    routes.wrong["torch2trt"] = fault
    assert torch2trt_adder.convert(small(), [x], max_batch_size=4).route == "onnx"
    said = capsys.readouterr().err.splitlines()
    reason = "AttributeError: 'INetwork" if fault is no_engine else "RuntimeError: convert: output 0 differs"
    assert len(said) == 2 and said[1].startswith(
        f"torch2trt_adder.convert: route onnx, since torch2trt fails: {reason}"
    )
    with pytest.raises(AttributeError if fault is no_engine else RuntimeError):
        torch2trt_adder.convert(small(), [x], route="torch2trt")
    with pytest.raises(AttributeError if fault is no_engine else RuntimeError):  # an option that ONNX has not
        torch2trt_adder.convert(small(), [x], int8_mode=True)
    assert "route onnx cannot help: route 'onnx' has no option 'int8_mode'" in capsys.readouterr().err


def test_an_error_of_the_network_itself_is_no_route_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Routes(monkeypatch)
    with pytest.raises(ValueError, match="^adder2d: an input of 4 channels"):
        torch2trt_adder.convert(small(), [torch.randn(2, 4, 8, 8)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("route", ["torch2trt", "onnx"])
def test_engines_are_compared_at_the_smallest_and_largest_shapes(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    routes, x = Routes(monkeypatch), torch.randn(2, 3, 8, 8)
    convert = functools.partial(torch2trt_adder.convert, small(), [x], route=route)
    convert()
    assert routes.shapes[route] == [(2, 3, 8, 8)]
    convert(max_batch_size=5)
    assert routes.shapes[route][1:] == [(2, 3, 8, 8), (1, 3, 8, 8), (5, 3, 8, 8)]
    routes.shapes[route].clear()
    convert(min_shapes=[(2, 3, 4, 4)], max_shapes=[(2, 3, 8, 8)])
    assert routes.shapes[route] == [(2, 3, 8, 8), (2, 3, 4, 4)]
    routes.wrong[route] = lambda y: y if len(y) == 2 else y + 1
    convert()
    message = r"output 0 differs .* for inputs of \[1, 3, 8, 8\], beyond the .* that rounding explains"
    with pytest.raises(RuntimeError, match=message):
        convert(max_batch_size=5)


# ---- the comparison of engine and model


def test_compare_raises_for_lost_values() -> None:
    y0, bound = torch.tensor([1.0, -2.0]), torch.tensor(0.1)
    converter.compare_outputs([torch.tensor([1.05, -2.05])], [y0], [bound], fp16=False)
    with pytest.raises(
        RuntimeError, match="output 0 is infinite or NaN only in the engine at 1 of 2 .*try fp16_mode=False"
    ):
        converter.compare_outputs([torch.tensor([1.0, -torch.inf])], [y0], [bound], fp16=True)
    with pytest.raises(RuntimeError, match="at 1 of 2 places"):
        converter.compare_outputs([torch.tensor([torch.nan, -2.0])], [y0], [bound], fp16=False)
    with pytest.raises(
        RuntimeError, match=r"output 0 differs .* by up to 0\.2, beyond the 0\.1 that rounding explains"
    ):
        converter.compare_outputs([torch.tensor([1.2, -2.0])], [y0], [bound], fp16=False)
    with pytest.raises(RuntimeError, match=r"output 0 is \[1\] in the engine and \[2\] in PyTorch"):
        converter.compare_outputs([torch.tensor([1.0])], [y0], [bound], fp16=False)


NETWORKS = {
    "addernet_mnist": (addernet_mnist, (8, 1, 28, 28)),
    "resnet20": (resnet20, (8, 3, 32, 32)),
    "adders_only": (
        lambda: nn.Sequential(Adder2d(3, 8, 3, stride=2), Adder2d(8, 5, 3, bias=True, groups=1)),
        (2, 3, 20, 20),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_hold_float32_and_catch_a_wrong_tap(name: str) -> None:
    """float32 against float64 stays within the bound; one of a layer's taps off by one does not."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = calibrated(make(), *shape)
    x = torch.randn(shape)
    bound = rounding.rounding_bounds(model, [x])
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = exact(x.double())
        assert bound.dtype is torch.float64 and bound.shape == ()
        assert (model(x) - expected).abs().max() <= bound
        layer = next(layer for layer in exact.modules() if isinstance(layer, Adder2d))
        layer.adder[:, 0, 0, 0] += 1
        assert (exact(x.double()) - expected).abs().max() > bound


def test_bounds_hold_float16_rounding() -> None:
    """A network with activations rounded to float16 between its layers is within the fp16 bound, not the fp32 one."""
    torch.manual_seed(0)
    model = calibrated(resnet20(), 8, 3, 32, 32)
    x = torch.randn(8, 3, 32, 32)
    narrow, wide = (rounding.rounding_bounds(model, [x], fp16).item() for fp16 in (False, True))
    with torch.no_grad():
        expected = model(x)
        for layer in model.modules():
            if not isinstance(layer, Adder2d) and not list(layer.children()):
                layer.register_forward_hook(lambda layer, inputs, output: output.half().float())
        difference = (model(x.half().float()) - expected).abs().max().item()
    assert narrow < difference <= wide


def test_bounds_keep_the_output_structure() -> None:
    class Several(nn.Module):
        def forward(self, x: torch.Tensor) -> dict:
            return {"y": x * 2, "z": (x + 1, x.sum())}

    bounds = rounding.rounding_bounds(Several(), [torch.randn(3)])
    assert set(bounds) == {"y", "z"} and len(bounds["z"]) == 2
    assert all(0 < bound < 1e-5 for bound in (bounds["y"], *bounds["z"]))


def test_bounds_leave_no_trace() -> None:
    model, x = calibrated(resnet20(), 4, 3, 32, 32), torch.randn(2, 3, 32, 32)
    before = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    rounding.rounding_bounds(model, [x], fp16=True)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values()))
    assert torch.equal(before[1], x) and torch.equal(before[2], torch.get_rng_state())


# ---- foreign layers


def test_adopted_copy_shares_parameters_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(adder2d(), nn.BatchNorm2d(4)).eval()
    ours = adopt.adopted_copy(model)
    assert isinstance(ours[0], Adder2d) and isinstance(model[0], adder2d)
    assert ours[0].adder is model[0].adder and ours[1].running_var is model[1].running_var
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(ours(x), model(x))


class Halved(adder2d):
    """Looks like an adder layer and computes one, but for a factor that no field tells."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class OtherBias(adder2d):
    """Its bias has another name than `b`."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset[:, None, None]


class Turned(adder2d):
    """The two axes of its kernels are swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.adder = nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch2trt_adder.adder2d(x, self.adder.mT, None, self.stride, self.padding)


@pytest.mark.parametrize("layer", [Halved, OtherBias, Turned])
@pytest.mark.parametrize("route", ["torch2trt", "onnx"])
def test_look_alikes_do_not_become_engines(layer: type[nn.Module], route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of what the layer's fields tell would not be the network that the user gave."""
    Routes(monkeypatch)
    x = torch.randn(2, 3, 9, 9)
    torch2trt_adder.convert(nn.Sequential(adder2d()).eval(), [x], route=route)
    with pytest.raises(ValueError, match=rf"adopt: 0 \({layer.__name__}\) .*adder2d"):
        torch2trt_adder.convert(nn.Sequential(layer()).eval(), [x], route=route)


def test_a_model_of_ours_is_not_copied() -> None:
    model = small()
    assert adopt.adopted_copy(model) is model
