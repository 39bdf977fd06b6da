"""Adder layers take over what follows them: on TensorRT networks, a convolution in the place of each adder layer."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import network_interpreter
import numpy as np
import pytest
import torch
from torch import Tensor

from torch2trt_adder.trt import fusion
from torch2trt_adder.trt.chains import Chain
from torch2trt_adder.trt.precision import batch_norm_magnitudes

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")

K = SIZE = 4  # channels everywhere, and the height and width of maps


class Network:
    """A network in the making; every array lives as long as it does."""

    def __init__(self, inputs: int = 1, dynamic: bool = True) -> None:
        self.builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        self.network = self.builder.create_network(0)
        shape = (-1 if dynamic else 2, K, SIZE, SIZE)
        self.inputs = [self.network.add_input(f"x{i}", trt.float32, shape) for i in range(inputs)]
        self.adders: dict[str, dict[str, Any]] = {}
        self.arrays: list[np.ndarray] = []
        self.random = np.random.default_rng(0)
        self.replaced: list[tuple[Chain, bool]] = []

    def array(self, *shape: int, low: float = -1, high: float = 1) -> np.ndarray:
        self.arrays.append(self.random.uniform(low, high, shape).astype(np.float32))
        return self.arrays[-1]

    def adder(self, x: Any) -> Any:
        layer = self.network.add_convolution_nd(x, K, (3, 3), self.array(K, K, 3, 3), self.array(K))
        layer.padding_nd = (1, 1)
        layer.name = f"adder_{len(self.adders)}"
        self.adders[layer.name] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        return layer.get_output(0)

    def batch_norm(self, x: Any, **options: Any) -> Any:
        mode = options.get("mode", trt.ScaleMode.CHANNEL)
        n = K if mode == trt.ScaleMode.CHANNEL else 1
        power = np.full(n, options.get("power", 1), np.float32)
        self.arrays.append(power)
        layer = self.network.add_scale_nd(
            x, mode, self.array(n), self.array(n, low=0.5, high=2), power, options.get("axis", 1)
        )
        return layer.get_output(0)

    def constant(self, *shape: int, low: float = -1, high: float = 1) -> Any:
        array = self.array(*shape, low=low, high=high)
        return self.network.add_constant(shape, array).get_output(0)

    def binary(self, a: Any, b: Any, operation: str) -> Any:
        return self.network.add_elementwise(a, b, getattr(trt.ElementWiseOperation, operation)).get_output(0)

    def activation(self, x: Any, kind: str = "RELU", alpha: float = 0, beta: float = 0) -> Any:
        layer = self.network.add_activation(x, getattr(trt.ActivationType, kind))
        layer.alpha, layer.beta = alpha, beta
        return layer.get_output(0)

    def output(self, itensor: Any, name: str = "y") -> None:
        itensor.name = name
        self.network.mark_output(itensor)

    def run(self, *inputs: Tensor) -> list[Tensor]:
        return network_interpreter.run(trt, self.network, *inputs)

    def replace(self, network: Any, old: Any, chain: Chain, inputs: Sequence[Any], half: bool) -> Any:
        """The convolution again, then the epilogue of the chain in plain layers."""
        x, residual = inputs
        old.__class__ = trt.IConvolutionLayer
        kernel, bias = (
            np.array(weights).reshape(shape) for weights, shape in ((old.kernel, (K, K, 3, 3)), (old.bias, (K,)))
        )
        self.arrays += [kernel, bias]
        layer = network.add_convolution_nd(x, K, (3, 3), kernel, bias)
        layer.padding_nd = (1, 1)
        if chain.scale is not None:
            arrays = [each.astype(np.float32) for each in (chain.shift, chain.scale, np.ones(K))]
            self.arrays += arrays
            layer = network.add_scale_nd(layer.get_output(0), trt.ScaleMode.CHANNEL, *arrays, 1)
        if residual is not None:
            layer = network.add_elementwise(layer.get_output(0), residual, trt.ElementWiseOperation.SUM)
        if chain.limited:
            layer = network.add_activation(layer.get_output(0), trt.ActivationType.CLIP)
            layer.alpha, layer.beta = max(chain.lower, -3e38), min(chain.upper, 3e38)
        self.replaced.append((chain, half))
        return layer

    def fuse(self, *, checked: bool = True, **options: Any) -> fusion.Report:
        """Fuses, and compares all outputs before and after, their names and their order."""
        inputs = [
            torch.randn(2, K, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) for i in range(len(self.inputs))
        ]
        before = self.run(*inputs) if checked else []
        names = [self.network.get_output(i).name for i in range(self.network.num_outputs)]
        report = fusion.fuse(self.network, self.adders, trt=trt, replace=self.replace, **options)
        assert [self.network.get_output(i).name for i in range(self.network.num_outputs)] == names
        for a, b in zip(self.run(*inputs) if checked else [], before, strict=True):
            # Convolutions of 36 terms and at most eight operations more a layer, a few layers deep.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        return report

    def live(self) -> list[str]:
        """The kinds of the layers that an output depends on, as TensorRT keeps them; constants left out."""
        layers = [self.network.get_layer(i) for i in range(self.network.num_layers)]
        made_by = {layer.get_output(j).name: layer for layer in layers for j in range(layer.num_outputs)}
        pending, found = [self.network.get_output(i).name for i in range(self.network.num_outputs)], {}
        while pending:
            layer = made_by.get(pending.pop())
            if layer is not None and layer.name not in found:
                found[layer.name] = layer.type.name if hasattr(layer.type, "name") else ""
                pending += [layer.get_input(j).name for j in range(layer.num_inputs)]
        return sorted(found)


def kinds(report: fusion.Report) -> list[tuple[str, str]]:
    return [
        (each.name, "".join(c for c, there in zip("srl", (each.scale, each.residual, each.limits)) if there))
        for each in report.fused
    ]


def test_batch_norm_residual_and_relu_of_one_block() -> None:
    net = Network()
    x = net.inputs[0]
    y = net.activation(net.batch_norm(net.adder(x)))
    y = net.batch_norm(net.adder(y))
    net.output(net.activation(net.binary(y, x, "SUM")))
    report = net.fuse()
    assert kinds(report) == [("adder_0", "sl"), ("adder_1", "srl")]
    assert str(report) == "2 of 2 fused: 2 BatchNorm, 1 residual, 2 ReLU or limits"
    assert not report.exposed or [layer.name for layer in report.exposed] == []
    live = net.live()
    assert not [name for name in live if "unfused" in name], live


def test_folded_numbers() -> None:
    """scale and shift of two layers in a row are composed in float64; the adder layer's own bias stays inside."""
    net = Network()
    y = net.adder(net.inputs[0])
    y = net.batch_norm(net.batch_norm(y), mode=trt.ScaleMode.UNIFORM)
    net.output(y)
    shift_0, scale_0, shift_1, scale_1 = (net.arrays[i].astype(np.float64) for i in (3, 4, 6, 7))
    net.fuse()
    (chain, _) = net.replaced[0]
    assert np.array_equal(chain.scale, scale_0 * scale_1) and np.array_equal(chain.shift, shift_0 * scale_1 + shift_1)


AFFINE: dict[str, Callable[[Network, Any], Any]] = {
    "product and sum with constants": lambda n, y: n.binary(
        n.binary(y, n.constant(1, K, 1, 1), "PROD"), n.constant(1, K, 1, 1), "SUM"
    ),
    "constants come first": lambda n, y: n.binary(
        n.constant(1, K, 1, 1), n.binary(n.constant(1, 1, 1, 1), y, "PROD"), "SUM"
    ),
    "difference and quotient": lambda n, y: n.binary(
        n.binary(y, n.constant(1, K, 1, 1), "SUB"), n.constant(1, K, 1, 1, low=1, high=2), "DIV"
    ),
    "from a constant": lambda n, y: n.binary(n.constant(1, K, 1, 1), y, "SUB"),
}


@pytest.mark.parametrize("add", AFFINE.values(), ids=AFFINE.keys())
def test_arithmetic_with_constants_is_a_batch_norm(add: Callable[[Network, Any], Any]) -> None:
    net = Network()
    net.output(net.activation(add(net, net.adder(net.inputs[0]))))
    assert kinds(net.fuse()) == [("adder_0", "sl")]


def test_reshaped_constants() -> None:
    net = Network()
    shuffle = net.network.add_shuffle(net.constant(K))
    shuffle.reshape_dims = (1, K, 1, 1)
    net.output(net.binary(net.adder(net.inputs[0]), shuffle.get_output(0), "PROD"))
    assert kinds(net.fuse()) == [("adder_0", "s")]


LIMITS: dict[str, tuple[Callable[[Network, Any], Any], tuple[float, float]]] = {
    "relu": (lambda n, y: n.activation(y), (0, np.inf)),
    "clip": (lambda n, y: n.activation(y, "CLIP", -0.5, 0.5), (-0.5, 0.5)),
    "relu, then a clip": (lambda n, y: n.activation(n.activation(y), "CLIP", -1, 2), (0, 2)),
    "a clip below zero, then relu": (lambda n, y: n.activation(n.activation(y, "CLIP", -2, -1)), (0, 0)),
    "relu6 in two layers": (
        lambda n, y: n.binary(n.activation(y), n.constant(1, 1, 1, 1, low=6, high=6), "MIN"),
        (0, 6),
    ),
}


@pytest.mark.parametrize("add, limits", LIMITS.values(), ids=LIMITS.keys())
def test_limits(add: Callable[[Network, Any], Any], limits: tuple[float, float]) -> None:
    net = Network()
    net.output(add(net, net.adder(net.inputs[0])))
    assert kinds(net.fuse()) == [("adder_0", "l")]
    assert (net.replaced[0][0].lower, net.replaced[0][0].upper) == limits


ENDS: dict[str, tuple[Callable[[Network, Any], Any], str]] = {
    "a power": (lambda n, y: n.batch_norm(n.activation(y), power=2), "l"),
    "another axis": (lambda n, y: n.batch_norm(y, axis=2), ""),
    "sigmoid": (lambda n, y: n.activation(n.batch_norm(y), "SIGMOID"), "s"),
    "leaky relu": (lambda n, y: n.activation(n.batch_norm(y), "LEAKY_RELU", 0.1), "s"),
    "batch norm after relu": (lambda n, y: n.batch_norm(n.activation(y)), "l"),
    "residual after relu": (lambda n, y: n.binary(n.activation(y), n.inputs[0], "SUM"), "l"),
    "product with a map": (lambda n, y: n.binary(n.batch_norm(y), n.inputs[0], "PROD"), "s"),
    "sum with itself": (lambda n, y: n.binary(y, y, "SUM"), ""),
    "constants of each place": (lambda n, y: n.binary(n.batch_norm(y), n.constant(1, 1, SIZE, SIZE), "PROD"), "s"),
}


@pytest.mark.parametrize("add, taken", ENDS.values(), ids=ENDS.keys())
def test_what_ends_a_chain(add: Callable[[Network, Any], Any], taken: str) -> None:
    net = Network()
    net.output(add(net, net.adder(net.inputs[0])))
    # The interpreter knows no powers and one axis.
    report = net.fuse(checked=add not in (ENDS["a power"][0], ENDS["another axis"][0]))
    assert kinds(report) == ([("adder_0", taken)] if taken else [])


def test_a_value_that_something_else_reads_ends_the_chain() -> None:
    net = Network()
    y = net.batch_norm(net.adder(net.inputs[0]))
    net.output(net.activation(y), "y0")
    net.output(net.activation(y, "TANH"), "y1")
    assert kinds(net.fuse()) == [("adder_0", "s")]


def test_an_output_of_the_network_ends_the_chain_and_keeps_name_and_order() -> None:
    net = Network()
    y = net.batch_norm(net.adder(net.inputs[0]))
    net.output(y, "middle")
    net.output(net.activation(y), "end")
    net.output(net.activation(net.batch_norm(net.adder(net.inputs[0]))), "other")
    assert kinds(net.fuse()) == [("adder_0", "s"), ("adder_1", "sl")]


def test_the_raw_sum_as_an_output_stays() -> None:
    net = Network()
    y = net.adder(net.inputs[0])
    net.output(y, "sum")
    net.output(net.activation(net.batch_norm(y)), "y")
    report = net.fuse()
    assert kinds(report) == [] and [layer.name for layer in report.exposed] == ["adder_0"]


def test_two_adder_layers_share_a_sum() -> None:
    """As in a block with an adder layer in its shortcut: one of them adds the other's result."""
    net = Network()
    a, b = net.batch_norm(net.adder(net.inputs[0])), net.batch_norm(net.adder(net.inputs[0]))
    net.output(net.activation(net.binary(a, b, "SUM")))
    assert sorted(taken for _, taken in kinds(net.fuse())) == ["s", "srl"]


def test_a_residual_of_the_chain_before() -> None:
    """The residual is the end of another chain, which another adder layer reads, too."""
    net = Network()
    a = net.activation(net.batch_norm(net.adder(net.inputs[0])))
    b = net.batch_norm(net.adder(a))
    net.output(net.activation(net.binary(b, a, "SUM")))
    assert kinds(net.fuse()) == [("adder_0", "sl"), ("adder_1", "srl")]


def test_broadcasting_is_no_residual() -> None:
    net = Network()
    average = net.network.add_reduce(net.inputs[0], trt.ReduceOperation.AVG, 0b1100, True).get_output(0)
    net.output(net.binary(net.batch_norm(net.adder(net.inputs[0])), average, "SUM"))
    assert kinds(net.fuse()) == [("adder_0", "s")]


@pytest.mark.parametrize("dynamic, taken", [(True, "s"), (False, "sr")])
def test_a_residual_of_another_dynamic_input(dynamic: bool, taken: str) -> None:
    """Its batch may be 1 at run time, which TensorRT broadcasts and the plugin does not."""
    net = Network(inputs=2, dynamic=dynamic)
    net.output(net.binary(net.batch_norm(net.adder(net.inputs[0])), net.inputs[1], "SUM"))
    assert kinds(net.fuse()) == [("adder_0", taken)]


def test_scales_that_float32_does_not_hold() -> None:
    net = Network()
    y = net.adder(net.inputs[0])
    for _ in range(2):
        y = net.binary(y, net.constant(1, K, 1, 1, low=1e30, high=2e30), "PROD")
    net.output(y)
    assert kinds(net.fuse(checked=False)) == [("adder_0", "s")]


@pytest.mark.parametrize("known", [False, True])
def test_fused_layers_read_each_other(known: bool) -> None:
    """Whether magnitudes are known or not: nothing of the old layers stays alive."""
    net = Network()
    a, b = block_of_two(net)
    net.output(net.activation(net.binary(net.batch_norm(net.adder(b)), a, "SUM")))
    layers = [net.network.get_layer(i) for i in range(net.network.num_layers)]
    largest = {layer.get_output(0).name: 1.0 for layer in layers} if known else None
    assert kinds(net.fuse(largest=largest)) == [("adder_0", "sl"), ("adder_1", "sl"), ("adder_2", "srl")]
    assert not any("unfused" in name for name in net.live())
    assert len(net.live()) == 3 * 2 + 3 + 1  # what stands in for three fused layers


# ---- float16


def halves(net: Network) -> list[bool]:
    return [half for _, half in net.replaced]


def block_of_two(net: Network) -> tuple[Any, Any]:
    a = net.activation(net.batch_norm(net.adder(net.inputs[0])))
    return a, net.activation(net.batch_norm(net.adder(a)))


@pytest.mark.parametrize("magnitude, half", [(5.0, True), (4094.0, True), (4095.0, False), (None, False)])
def test_float16_outputs_need_a_known_magnitude(magnitude: float | None, half: bool) -> None:
    """Only where an adder layer reads it: the last one stays in float32."""
    net = Network()
    a, b = block_of_two(net)
    net.output(b)
    report = net.fuse(half=True, largest={} if magnitude is None else {a.name: magnitude})
    assert halves(net) == [half, False]
    assert [layer.name for layer in report.exposed] == (["adder_0"] if magnitude == 4095 else [])


def test_no_float16_without_half_or_without_batch_norm() -> None:
    net = Network()
    a, b = block_of_two(net)
    net.output(b)
    net.fuse(half=False, largest={a.name: 1})
    assert halves(net) == [False, False]
    net = Network()
    a = net.activation(net.adder(net.inputs[0]))
    net.output(net.adder(a))
    report = net.fuse(half=True, largest={a.name: 1})
    assert halves(net) == [False] and [layer.name for layer in report.exposed] == ["adder_1"]


def test_a_layer_of_a_large_input_stays_in_float32() -> None:
    net = Network()
    a, b = block_of_two(net)
    net.output(net.adder(b))
    report = net.fuse(half=True, largest={a.name: 1e5, b.name: 1})
    assert halves(net) == [False, False]
    assert [layer.name for layer in report.exposed] == ["adder_0", "adder_2"]


def test_other_readers_of_a_float16_output_get_float32() -> None:
    net = Network()
    a, b = block_of_two(net)
    net.output(b, "y0")
    net.output(net.binary(a, net.inputs[0], "PROD"), "y1")
    net.fuse(half=True, largest={a.name: 5})
    assert halves(net) == [True, False]
    casts = [
        layer
        for layer in (net.network.get_layer(i) for i in range(net.network.num_layers))
        if "to_float32" in layer.name
    ]
    assert len(casts) == 1 and casts[0].get_output(0).dtype == trt.float32


def test_limits_bound_a_magnitude() -> None:
    net = Network()
    a = net.activation(net.batch_norm(net.adder(net.inputs[0])), "CLIP", 0, 6)
    net.output(net.adder(a))
    net.fuse(half=True)
    assert halves(net) == [True]


def test_magnitudes_through_layers_that_only_move_values() -> None:
    net = Network()
    a, _ = block_of_two(net)
    b = net.batch_norm(net.adder(a))
    pooled = net.network.add_pooling_nd(net.inputs[0], trt.PoolingType.MAX, (1, 1)).get_output(0)
    c = net.activation(net.binary(b, net.activation(pooled), "SUM"))
    net.output(net.adder(c))
    net.fuse(half=True, largest={a.name: 1, b.name: 7, net.inputs[0].name: 8})
    assert [half for chain, half in net.replaced if chain.end is not None and chain.residual is not None] == [True]


# ---- networks in float16


def cast(net: Network, x: Any, kind: Any) -> Any:
    return net.network.add_cast(x, kind).get_output(0)


def test_a_cast_to_float16_of_the_file_is_taken() -> None:
    """As files of float16 networks have it: float32 up to a cast. The next layer reads the float16 value itself."""
    net = Network()
    a = cast(net, net.activation(net.batch_norm(net.adder(net.inputs[0]))), trt.float16)
    b = net.activation(net.adder(cast(net, a, trt.float32)))
    net.output(b)
    made: list[Any] = []

    def replace(network: Any, old: Any, chain: Chain, inputs: Sequence[Any], half: bool) -> Any:
        made.append((inputs[0], half))
        layer = net.replace(network, old, chain, inputs if not made[1:] else [net.inputs[0], None], half)
        return network.add_cast(layer.get_output(0), trt.float16) if half else layer

    fusion.fuse(net.network, net.adders, trt=trt, replace=replace)
    assert [half for _, half in made] == [True, False]
    assert made[1][0].dtype == trt.float16 and made[1][0].name == a.name.removesuffix(".unfused")


def test_a_cast_in_float16_mode_is_read_around_where_values_are_large() -> None:
    net = Network()
    a = net.activation(net.batch_norm(net.adder(net.inputs[0])))
    b = net.activation(net.adder(cast(net, cast(net, a, trt.float16), trt.float32)))
    net.output(b)
    fusion.fuse(net.network, net.adders, trt=trt, replace=net.replace, half=True, largest={a.name: 1e5})
    assert halves(net) == [False, False] and not net.replaced[0][0].rounded


# ---- ONNX files


def onnx_network() -> Any:
    """Conv in the place of an adder layer, BatchNormalization, Add, Relu; again with Clip; one value is read by both."""
    onnx = pytest.importorskip("onnx")
    helper, random = onnx.helper, np.random.default_rng(0)
    tensors = {f"w{i}": random.uniform(-1, 1, (K, K, 3, 3)) for i in range(2)}
    tensors |= {f"bias{i}": random.uniform(-1, 1, K) for i in range(2)}
    for i in range(2):
        tensors |= {f"{name}{i}": random.uniform(0.5, 2, K) for name in ("gamma", "beta", "mean", "var")}
    tensors |= {"low": np.array(0.0), "high": np.array(6.0)}
    nodes = []
    for i, x in enumerate(("x", "z0")):
        statistics = [f"{name}{i}" for name in ("gamma", "beta", "mean", "var")]
        last = ("Relu", ["s0"]) if i == 0 else ("Clip", ["s1", "low", "high"])
        nodes += [
            helper.make_node("Conv", [x, f"w{i}", f"bias{i}"], [f"c{i}"], f"adder_{i}", pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", [f"c{i}", *statistics], [f"b{i}"], f"bn_{i}"),
            helper.make_node("Add", [f"b{i}", x], [f"s{i}"], f"add_{i}"),
            helper.make_node(*last[:1], last[1], [f"z{i}"], f"last_{i}"),
        ]
    shape = ["batch", K, SIZE, SIZE]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "z1")]
    initializers = [onnx.numpy_helper.from_array(a.astype(np.float32), name) for name, a in tensors.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_the_onnx_parser_makes() -> None:
    """BatchNormalization, Add, Relu and Clip of a file, as TensorRT's parser puts them into a network."""
    proto = onnx_network()
    net = Network(inputs=0)
    parser = trt.OnnxParser(net.network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(proto.SerializeToString())
    net.inputs = [net.network.get_input(0)]
    geometry = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    net.adders = {f"adder_{i}": geometry for i in range(2)}
    report = net.fuse(half=True, largest=batch_norm_magnitudes(proto, pathlib.Path()) | {"x": 3.0})
    assert kinds(report) == [("adder_0", "srl"), ("adder_1", "srl")]
    assert halves(net) == [True, False]
    assert [(chain.lower, chain.upper) for chain, _ in net.replaced] == [(0, np.inf), (0, 6)]


def test_magnitudes_of_batch_norm() -> None:
    proto = onnx_network()
    tensors = {t.name: pytest.importorskip("onnx").numpy_helper.to_array(t) for t in proto.graph.initializer}
    expected = {
        f"b{i}": float((np.abs(tensors[f"beta{i}"]) + 8 * np.abs(tensors[f"gamma{i}"]).astype(np.float64)).max())
        for i in range(2)
    }
    assert batch_norm_magnitudes(proto, pathlib.Path()) == pytest.approx(expected)
