"""export_onnx: the node, its body in ONNX Runtime, and the file's way into TensorRT's parser (trt/test_onnx_engines.py)."""

import concurrent.futures
import importlib.util
import inspect
import pathlib
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxscript")

from conftest import CASES, Case
from networks import SmallResNet, adder2d as PublishedStyle, calibrated

import torch2trt_adder
from torch2trt_adder import Adder2d, adderize
from torch2trt_adder.export import body, check as checking, exporter, format, opset17, postprocess
from torch2trt_adder.export.dynamic import make_dynamic_shapes
from torch2trt_adder.export.exporter import export_onnx
from torch2trt_adder.export.format import adder_nodes
from torch2trt_adder.export.runtime import onnxruntime_session, run_onnxruntime
from torch2trt_adder.models import addernet_mnist, resnet20, resnet50
from torch2trt_adder.nn import recognise
from torch2trt_adder.numerics.definition import assert_forward
from torch2trt_adder.numerics.rounding import rounding_bounds
from torch2trt_adder.ops import export_hook

try:
    import onnxruntime
except ImportError:
    onnxruntime = None

needs_runtime = pytest.mark.skipif(onnxruntime is None, reason="needs onnxruntime: pip install onnxruntime")
CHECK = onnxruntime is not None  # the rest of export_onnx is tested without it, too


def small(**geometry: Any) -> nn.Module:
    return nn.Sequential(Adder2d(4, 6, 3, bias=True, **geometry), nn.BatchNorm2d(6), nn.ReLU()).eval()


def attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def value(model: Any, name: str) -> np.ndarray:
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    return onnx.numpy_helper.to_array(tensor)


# ---- the body


def single_node(case: Case, dtype: torch.dtype, opset: int = 17) -> bytes:
    """A model of one Adder2d node with its body: x [N, C, H, W], w, b -> y."""
    helper, kind = onnx.helper, {torch.float32: 1, torch.float16: 10}[dtype]
    sizes = {
        "x": (1, ["N", case.C, "H", "W"]),
        "w": (1, [case.K, case.C // case.groups, case.R, case.S]),
        "b": (1, [case.K]),
    }
    inputs = [
        helper.make_tensor_value_info(name, kind if name == "x" else type_, size)
        for name, (type_, size) in sizes.items()
    ]
    output = helper.make_tensor_value_info("y", kind, [None] * 4)
    named = format.node_attributes(*case.geometry, dtype)
    node = helper.make_node("Adder2d", list("xwb"), ["y"], domain="torch2trt_adder", **named)
    model = helper.make_model(
        helper.make_graph([node], "single", inputs, [output]),
        functions=[onnx.parser.parse_function(body.BODY % opset)],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("torch2trt_adder", 1)],
    )
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@needs_runtime
@pytest.mark.parametrize("dtype, opset", [(torch.float32, 17), (torch.float32, 21), (torch.float16, 15)])
def test_body(case: Case, dtype: torch.dtype, opset: int) -> None:
    x, w, b = case.tensors()
    x = x.to(dtype)
    (y,) = run_onnxruntime(onnxruntime_session(single_node(case, dtype, opset)), [x, w, b])
    assert y.dtype is dtype
    assert_forward(y, x, w, b, case.geometry)


@needs_runtime
def test_body_keeps_infinities_and_nan_where_they_are() -> None:
    case = next(c for c in CASES if c.name == "three_by_three")
    x, w, b = case.tensors()
    x[0, 1, 3, 4], x[1, 2, 5, 5], x[1, 0, 9, 8] = torch.inf, torch.nan, -torch.inf
    (y,) = run_onnxruntime(onnxruntime_session(single_node(case, torch.float32)), [x, w, b])
    assert y.isnan().any() and y.isinf().any() and y.isfinite().any()
    assert_forward(y, x, w, b, case.geometry)


@needs_runtime
def test_body_takes_bounded_memory(tmp_path: pathlib.Path) -> None:
    """A broadcast over filters and taps would take 4.8 GB here, the taps of the whole batch 19 MB, those of a sample 2."""
    case = Case("broadcast", 8, 64, 32, 32, 64, 3, 3, padding=(1, 1))
    (tmp_path / "single.onnx").write_bytes(single_node(case, torch.float32))
    script = """
import resource, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
feeds = {"x": np.ones((8, 64, 32, 32), "f"), "w": np.ones((64, 64, 3, 3), "f"), "b": np.ones(64, "f")}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
session.run(None, feeds)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "single.onnx"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 10  # KiB


# ---- the file


def test_one_file_one_node_per_layer(tmp_path: pathlib.Path) -> None:
    model = nn.Sequential(
        Adder2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), bias=True, groups=2),
        nn.ReLU(),
        nn.Sequential(Adder2d(6, 5, 3, dilation=(1, 2))),
    ).eval()
    path = export_onnx(model, torch.randn(1, 4, 15, 16), tmp_path / "new" / "model.onnx", check=CHECK)
    assert path == tmp_path / "new" / "model.onnx" and [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {(e.domain, e.version) for e in proto.opset_import} == {
        ("", 17),
        ("torch2trt_adder", 1),
    } and proto.ir_version == 8
    assert [(f.domain, f.name) for f in proto.functions] == [("torch2trt_adder", "Adder2d")]
    assert [node.op_type for node in proto.graph.node] == ["Adder2d", "Relu", "Adder2d"]
    first, second = adder_nodes(proto.graph)
    common = {"plugin_namespace": b"", "output_type": 0}
    assert attributes(first) == {"stride": [2, 1], "padding": [0, 1], "dilation": [1, 1], "groups": 2, **common}
    assert attributes(second) == {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 2], "groups": 1, **common}
    assert [first.name, second.name] == ["0:adder2d_0", "2.0:adder2d_1"]
    with torch.no_grad():
        np.testing.assert_array_equal(value(proto, first.input[1]), model[0].adder)
        np.testing.assert_array_equal(value(proto, first.input[2]), model[0].b)
        np.testing.assert_array_equal(value(proto, second.input[1]), model[2][0].adder)
        np.testing.assert_array_equal(value(proto, second.input[2]), np.zeros(5, np.float32))


NETWORKS = {
    "addernet_mnist": (addernet_mnist, (1, 28, 28)),
    "resnet20": (resnet20, (3, 32, 32)),
}


@needs_runtime
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_a_dynamic_batch(name: str, tmp_path: pathlib.Path) -> None:
    """export_onnx has compared the example's batch of 1; here are others."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = calibrated(make(), 8, *shape)
    path = export_onnx(model, torch.randn(1, *shape), tmp_path / "model.onnx", {0: "batch"})
    proto = onnx.load(path)
    for entry in (*proto.graph.input, *proto.graph.output):
        assert entry.type.tensor_type.shape.dim[0].dim_param == "batch"
    session = onnxruntime_session(path)
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        bound = rounding_bounds(model, [x])
        (y,) = run_onnxruntime(session, [x])
        with torch.no_grad():
            assert (y - model(x)).abs().max() <= bound


@needs_runtime
def test_dynamic_image_and_several_inputs_and_outputs(tmp_path: pathlib.Path) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Adder2d(3, 4, 3, padding=1), Adder2d(5, 4, 1, bias=True)

        def forward(self, x: Tensor, rest: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            y = self.a(x)
            return y + self.b(rest[0]), {"first": y, "second": nn.functional.relu(rest[0])}

    model, axes = Several().eval(), {0: "batch", 2: "height", 3: "width"}
    args = (torch.randn(2, 3, 7, 6), [torch.randn(2, 5, 7, 6)])
    path = export_onnx(
        model, args, tmp_path / "model.onnx", [axes, axes], input_names=["x", "z"], output_names=["a", "b", "c"]
    )
    session = onnxruntime_session(path)
    assert [entry.name for entry in session.get_inputs()] == ["x", "z"]
    assert [entry.shape for entry in session.get_outputs()] == [["batch", 4, "height", "width"]] * 2 + [
        ["batch", 5, "height", "width"]
    ]
    x, z = torch.randn(3, 3, 11, 4), torch.randn(3, 5, 11, 4)
    got = run_onnxruntime(session, [x, z])
    y, others = model(x, [z])
    for a, b in zip(got, (y, others["first"], others["second"])):
        torch.testing.assert_close(a, b.detach(), rtol=4e-6, atol=4e-6)  # as in test_torch2trt_engines.py


def test_half_model(tmp_path: pathlib.Path) -> None:
    """float16 in and out as in PyTorch; the plugin's weights stay float32, rounded as the model's are."""
    model = nn.Sequential(Adder2d(4, 6, 3, bias=True), nn.ReLU(), Adder2d(6, 5, 3)).eval().half()
    path = export_onnx(model, torch.randn(2, 4, 9, 8).half(), tmp_path / "model.onnx", {0: "batch"}, check=CHECK)
    proto = onnx.load(path)
    assert [node.op_type for node in proto.graph.node] == ["Adder2d", "Relu", "Adder2d"]
    assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    for node, layer in zip(adder_nodes(proto.graph), (model[0], model[2])):
        assert attributes(node)["output_type"] == 1
        weight, bias = (value(proto, name) for name in node.input[1:])
        assert weight.dtype == bias.dtype == np.float32
        np.testing.assert_array_equal(weight, layer.adder.detach().float())
    assert {tensor.name for tensor in proto.graph.initializer} == {
        name for node in adder_nodes(proto.graph) for name in node.input[1:]
    }


@needs_runtime
def test_half_sums_beyond_65504_are_infinite_as_in_pytorch(tmp_path: pathlib.Path) -> None:
    model = Adder2d(64, 2, 3).eval().half()
    x = torch.full((1, 64, 3, 3), 120.0).half()
    path = export_onnx(model, x, tmp_path / "model.onnx")
    (y,) = run_onnxruntime(onnxruntime_session(path), [x])
    assert (y == -torch.inf).all() and (model(x) == -torch.inf).all()


def test_foreign_layers_and_a_shared_layer(tmp_path: pathlib.Path) -> None:
    layer = Adder2d(4, 4, 1)
    model = nn.Sequential(PublishedStyle(), layer, layer).eval()
    path = export_onnx(model, [torch.randn(2, 3, 9, 9)], tmp_path / "model.onnx", check=CHECK)
    nodes = adder_nodes(onnx.load(path).graph)
    assert len(nodes) == 3 and nodes[1].input[1] == nodes[2].input[1]
    assert isinstance(model[0], PublishedStyle)


class Direct(nn.Module):
    """Calls the operator past this package's function, with a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(5, 4, 3, 3)), nn.Parameter(torch.rand(5, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        return torch.ops.torch2trt_adder.adder2d(x, weight, None, [1, 1], [1, 1], [1, 1], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operator_with_a_computed_weight(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    x = torch.randn(2, 4, 6, 6).to(dtype)
    proto = onnx.load(export_onnx(Direct().eval().to(dtype), x, tmp_path / "model.onnx", check=CHECK))
    assert len(adder_nodes(proto.graph)) == 1


def test_exported_program(tmp_path: pathlib.Path) -> None:
    """A .pt2 file, as another process would load it."""
    model, x = small(), torch.randn(2, 4, 9, 8)
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    proto = onnx.load(export_onnx(program, x, tmp_path / "model.onnx", check=CHECK))
    assert len(adder_nodes(proto.graph)) == 1
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    with pytest.raises(ValueError, match="an exported program has its dynamic axes already"):
        export_onnx(program, x, tmp_path / "model.onnx", {0: "batch"}, check=CHECK)


@pytest.mark.parametrize("dim", [torch.export.Dim("batch"), torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO])
def test_exported_program_of_any_batch(dim: Any, tmp_path: pathlib.Path) -> None:
    """torch.export gives the extents of some dynamic axes as 2 and more, which is no limit of the file."""
    x = torch.randn(2, 4, 9, 8)
    program = torch.export.export(small(), (x,), dynamic_shapes=({0: dim},))
    assert format.extents(onnx.load(export_onnx(program, x, tmp_path / "model.onnx", check=CHECK))) == {}


def test_opset(tmp_path: pathlib.Path) -> None:
    x = torch.randn(1, 4, 9, 8)
    for opset in (15, 18, 20):
        proto = onnx.load(export_onnx(small(), x, tmp_path / "model.onnx", opset=opset, check=CHECK))
        assert {(e.domain, e.version) for e in proto.opset_import} == {("", opset), ("torch2trt_adder", 1)}
        assert [e.version for e in proto.functions[0].opset_import] == [opset]
    for opset in (12, 99):
        with pytest.raises(ValueError, match=rf"opset must be from 15 to \d+ \(.*\), got {opset}"):
            export_onnx(small(), x, tmp_path / "none.onnx", opset=opset)
    assert not (tmp_path / "none.onnx").exists()


def against_schemas(model: Any) -> int:
    """How many nodes there are, all of which have the attributes and the number of inputs that their opset allows."""
    version = next(entry.version for entry in model.opset_import if entry.domain == "")
    (own,) = model.functions
    assert [(entry.domain, entry.version) for entry in own.opset_import] == [("", version)]

    def nodes(container: Any) -> Any:
        for node in container.node:
            yield node
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    yield from nodes(graph)

    count = 0
    for node in (*nodes(model.graph), *nodes(own)):
        if node.domain == own.domain:
            continue
        schema = onnx.defs.get_schema(node.op_type, version, "")
        names = {attribute.name for attribute in node.attribute}
        assert names <= set(schema.attributes), (node.op_type, names)
        assert {name for name, attribute in schema.attributes.items() if attribute.required} <= names, node.op_type
        assert schema.min_input <= len(node.input) <= schema.max_input, (node.op_type, len(node.input))
        assert schema.min_output <= len(node.output) <= schema.max_output, (node.op_type, len(node.output))
        count += 1
    return count


SCHEMAS = {
    "addernet_mnist": (addernet_mnist, (1, 28, 28)),
    "resnet20": (resnet20, (3, 32, 32)),
    "resnet50": (resnet50, (3, 64, 64)),
    "adderized": (lambda: adderize(SmallResNet()), (3, 64, 64)),
}


@pytest.mark.parametrize(
    "name, opset", [(name, opset) for name in SCHEMAS for opset in (15, 17, 18) if name != "resnet50" or opset == 17]
)
def test_every_node_is_one_of_its_opset(name: str, opset: int, tmp_path: pathlib.Path) -> None:
    """The exporter writes opset 18; nothing of it may be left in a file that says 17, on which TensorRT 8.6 relies."""
    make, shape = SCHEMAS[name]
    x = torch.randn(2, *shape)
    proto = onnx.load(export_onnx(make().eval(), x, tmp_path / "x.onnx", {0: "batch"}, opset=opset, check=False))
    assert {(e.domain, e.version) for e in proto.opset_import} == {("", opset), ("torch2trt_adder", 1)}
    assert against_schemas(proto) > 60  # the body alone has more


# Operators that changed with opset 18.
CHANGED = {
    "mean": lambda x: x.mean((2, 3)),
    "mean_of_all": lambda x: x.mean(),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "sum": lambda x: x.sum(1),
    "max": lambda x: x.amax((2, 3), keepdim=True),
    "var": lambda x: x.var(1),
    "norm": lambda x: x.norm(dim=1),
    "logsumexp": lambda x: x.logsumexp(1),
    "split": lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1),
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "uneven_chunk": lambda x: torch.cat(x.chunk(3, 2)[::-1], 2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "unfold": lambda x: F.unfold(x, 3),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
}


class Then(nn.Module):
    def __init__(self, function: Any, channels: int = 4) -> None:
        super().__init__()
        self.layer, self.function = Adder2d(channels, channels, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize("name", CHANGED)
def test_operators_that_changed_with_opset_18(name: str, tmp_path: pathlib.Path) -> None:
    x = torch.randn(2, 4, 7, 6)
    model = Then(CHANGED[name]).eval()
    proto = onnx.load(export_onnx(model, x, tmp_path / "x.onnx", {0: "batch"}, opset=17, check=CHECK))
    against_schemas(proto)


def largest_of_channels(x: Tensor) -> Tensor:
    index = torch.zeros(1, 4, 1, 1, dtype=torch.int64).expand(len(x), -1, x.shape[2], x.shape[3])
    return torch.zeros_like(x).scatter_reduce(1, index, x, "amax")


NOT_IN_17 = {
    "fold": (lambda x: F.fold(x.flatten(2), (7, 6), 1), "Col2Im came with opset 18"),
    "mish": (F.mish, "Mish came with opset 18"),
    "scatter": (largest_of_channels, "ScatterElements has no max before opset 18"),
}


@pytest.mark.parametrize("name", NOT_IN_17)
def test_network_that_opset_17_cannot_express(name: str, tmp_path: pathlib.Path) -> None:
    function, reason = NOT_IN_17[name]
    model, x = Then(function).eval(), torch.randn(2, 4, 7, 6)
    proto = onnx.load(export_onnx(model, x, tmp_path / "model.onnx", check=CHECK))
    assert {(e.domain, e.version) for e in proto.opset_import} == {("", 18), ("torch2trt_adder", 1)}
    message = rf"cannot be written in opset 17 \({reason}.*\); leave opset out, which gives 18"
    with pytest.raises(RuntimeError, match=message):
        export_onnx(model, x, tmp_path / "other.onnx", opset=17, check=CHECK)
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize(
    "node, message",
    [
        ("y, z = Split <axis = 1, num_outputs = 2> (x)", None),
        ("y, z = Split <axis = -1, num_outputs = 2> (x)", None),
        ("y, z = Split <num_outputs = 2> (x)", "Split has no num_outputs before opset 18"),
        ("y = ReduceMean <noop_with_empty_axes = 0> (x)", None),
        ("y = ReduceMean <noop_with_empty_axes = 1> (x)", "ReduceMean has no noop_with_empty_axes before opset 18"),
        ("a = Shape (x)  y = ReduceMax (x, a)", "the axes of ReduceMax must be constant before opset 18"),
        ("p = Constant <value_ints = [1, 1]> ()  y = Pad (x, p, , p)", "Pad has at most 3 inputs before opset 18"),
        ("a = Constant <value = int64[1] {1}> ()  y = ReduceMax (x, a)", None),
    ],
)
def test_opset_17_by_hand(node: str, message: str | None) -> None:
    text = f'<ir_version: 8, opset_import: ["": 18]> g (float[N, 5] x) => (float[A, B] y) {{ {node} }}'
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    if message is not None:
        with pytest.raises(RuntimeError, match=message):
            opset17.in_opset_17(model)
        return
    older = opset17.in_opset_17(model)
    assert older.opset_import[0].version == 17 and model.opset_import[0].version == 18
    onnx.checker.check_model(older, full_check=True)
    if CHECK:
        x = torch.randn(4, 5)
        new, old = (run_onnxruntime(onnxruntime_session(m.SerializeToString()), [x])[0] for m in (model, older))
        torch.testing.assert_close(old, new, rtol=0, atol=0)


# ---- what torch's exporter does not get right by itself


class Near(nn.Module):
    """What amplifies a number near 0 or 1, on the sums of one adder layer."""

    def __init__(self, *functions: Any) -> None:
        super().__init__()
        self.layer, self.functions = Adder2d(3, 4, 1), functions

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.layer(x)
        return [function(y) for function in self.functions]


NEAR = {
    "add": lambda y: (0 * y + 1e-10) * 1e10,
    "add_left": lambda y: (1e-10 + 0 * y) * 1e10,
    "sub": lambda y: (0 * y - 1e-10) * 1e10,
    "mul": lambda y: (y.double() * (1 + 1e-9) - y.double()) * 1e9,
    "mul_left": lambda y: ((1 - 1e-9) * y.double() - y.double()) * 1e9,
    "mul_float32": lambda y: (y * (1 + 2**-18) - y) * 2**18,
    "div": lambda y: (y.double() / (1 + 1e-9) - y.double()) * 1e9,
    "div_by_a_norm": lambda y: (0 * y) / ((0 * y).norm(dim=1, keepdim=True) + 1e-10),
    "pow": lambda y: (y.double().abs() ** (1 + 1e-9) / y.double().abs() - 1) * 1e9,
    "tensor": lambda y: (0 * y + torch.tensor(1e-10)) * 1e10,
}


@needs_runtime
@pytest.mark.parametrize("opset", [17, 18])
def test_numbers_near_0_and_1_stay(opset: int, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model, x = Near(*NEAR.values()).eval(), torch.randn(1, 3, 2, 2)
    path = export_onnx(model, x, tmp_path / "model.onnx", opset=opset, check=False)
    # ONNX Runtime 1.32 itself takes float64 factors for 1 that float32 cannot tell from it.
    session = onnxruntime.InferenceSession(str(path), disabled_optimizers=["NoopElimination"])
    for name, y, expected in zip(NEAR, run_onnxruntime(session, [x]), model(x), strict=True):
        # Without the number: off by 1 and more, or NaN.
        torch.testing.assert_close(
            y, expected.detach(), rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@needs_runtime
def test_successive_limits(tmp_path: pathlib.Path) -> None:
    """The exporter's optimiser merges them into a graph that is not sorted."""
    model = Near(lambda y: (y + 9).clamp(0.0, 6.0).clamp(1.0, 3.0) * (y + 9).clamp(0.0, 6.0).clamp(2.0, 3.0)).eval()
    export_onnx(model, torch.randn(1, 3, 4, 4), tmp_path / "model.onnx")


class Named(nn.Module):
    """A parameter of any name in a network whose values have the exporter's names."""

    def __init__(self, name: str, make: Any = nn.Parameter) -> None:
        super().__init__()
        self.layer, self.name = Adder2d(3, 4, 3, padding=1), name
        value = torch.full((1, 3, 1, 1), 2.0)
        if make is nn.Parameter:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value, persistent=make)

    def forward(self, v: Tensor) -> Tensor:
        return self.layer((v - 1) * getattr(self, self.name) + 0.5) * 2


@needs_runtime
@pytest.mark.parametrize("make", [nn.Parameter, True, False], ids=["parameter", "buffer", "not_persistent"])
@pytest.mark.parametrize("name", ["sub", "v", "x/y z"])
def test_parameters_named_like_values(name: str, make: Any, tmp_path: pathlib.Path) -> None:
    model, x = Named(name, make).eval(), torch.randn(2, 3, 5, 5)
    path = export_onnx(model, x, tmp_path / "model.onnx", {0: "batch"})
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    names = [t.name for t in proto.graph.initializer] + [o for n in proto.graph.node for o in n.output]
    assert len({*names, *(e.name for e in proto.graph.input)}) == len(names) + 1
    shapes = {
        e.name: [d.dim_param or d.dim_value for d in e.type.tensor_type.shape.dim] for e in proto.graph.value_info
    }
    (layer,) = adder_nodes(proto.graph)
    assert shapes[layer.input[0]] == ["batch", 3, 5, 5]


@needs_runtime
@pytest.mark.parametrize("name", ["layer.adder", "val_0", "sub", "model.onnx", "layer.adder.float32"])
def test_inputs_and_outputs_named_like_values(name: str, tmp_path: pathlib.Path) -> None:
    model, x = Named("mul").eval().half(), torch.randn(2, 3, 5, 5).half()
    for names in ({"input_names": [name]}, {"output_names": [name]}):
        proto = onnx.load(export_onnx(model, x, tmp_path / "model.onnx", **names))
        (entry,) = proto.graph.input if "input_names" in names else proto.graph.output
        assert entry.name == name


class Returning(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = Adder2d(3, 3, 3, padding=1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.layer(x))


@needs_runtime
@pytest.mark.parametrize(
    "function, count",
    [
        (lambda x, y: (x, y), 2),
        (lambda x, y: (y, y, x, x), 4),
        (lambda x, y: {"b": y, "a": (None, x + 1)}, 2),
        (lambda x, y: (torch.ones(2), y), 2),
    ],
    ids=["input", "twice", "nested", "constant"],
)
def test_outputs_of_any_kind(function: Any, count: int, tmp_path: pathlib.Path) -> None:
    """export_onnx compares them; each has a name of its own."""
    path = export_onnx(Returning(function).eval(), torch.randn(1, 3, 4, 4), tmp_path / "model.onnx")
    assert len({entry.name for entry in onnx.load(path).graph.output}) == count


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x, y: None, "the network returns no tensor"),
        (lambda x, y: (y, 3), "the network returns int '3'"),
    ],
)
def test_outputs_that_no_file_has(function: Any, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        export_onnx(Returning(function).eval(), torch.randn(1, 3, 4, 4), tmp_path / "model.onnx", check=CHECK)
    assert not list(tmp_path.iterdir())


@needs_runtime
def test_arguments_of_any_kind(tmp_path: pathlib.Path) -> None:
    class Rest(Returning):
        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            return self.layer(x) + sum(rest)

    class Mapped(Returning):
        def forward(self, named: dict[str, Tensor]) -> Tensor:
            return self.layer(named["image"]) + named["other"]

    class Writing(Returning):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.add_(1).relu_())

    x = torch.randn(2, 3, 4, 4)
    for model, args in ((Rest, [x, x + 1]), (Rest, [x]), (Mapped, [{"image": x, "other": x + 1}]), (Writing, [x])):
        before = x.clone()
        proto = onnx.load(export_onnx(model(None).eval(), args, tmp_path / "model.onnx", {0: "batch"}))
        assert len(proto.graph.input) == (1 if args == [x] else 2)
        assert all(e.type.tensor_type.shape.dim[0].dim_param == "batch" for e in proto.graph.input)
        torch.testing.assert_close(x, before, rtol=0, atol=0)


@needs_runtime
def test_an_empty_example(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match="args holds an empty tensor; give an example with values"):
        export_onnx(small(), torch.randn(0, 4, 5, 5), tmp_path / "model.onnx")


@needs_runtime
def test_threads_export_one_after_the_other(tmp_path: pathlib.Path) -> None:
    def export(i: int) -> Any:
        return onnx.load(export_onnx(small(), torch.randn(1, 4, 6, 6), tmp_path / f"{i}.onnx"))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for proto in pool.map(export, range(3)):
            assert len(adder_nodes(proto.graph)) == 1 and len(proto.functions) == 1
    assert export_hook.symbol is not None


# ---- Ctrl-C


def interrupt(*args: Any, **kwargs: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("aftermath", ["another exception", "swallowed", "as it is"])
def test_ctrl_c_is_no_fault_of_the_network(
    aftermath: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """torch's modes may fail while they clean up, and a callback of a weak reference drops its exception."""
    real = torch.onnx.export

    def export(*args: Any, **kwargs: Any) -> Any:
        if aftermath == "as it is":
            interrupt()
        try:
            interrupt()
        except KeyboardInterrupt:
            if aftermath == "another exception":
                raise RuntimeError("Attempted to unset ProxyTorchDispatchMode") from None
        return real(*args, **kwargs)

    export.__signature__ = inspect.signature(real)
    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(small(), torch.randn(1, 4, 6, 6), tmp_path / "model.onnx", check=False)
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_a_fault_after_an_earlier_ctrl_c_stays_one(tmp_path: pathlib.Path) -> None:
    """As in: try: train() except KeyboardInterrupt: export_onnx(...)."""
    try:
        interrupt()
    except KeyboardInterrupt:
        with pytest.raises(RuntimeError, match="the network itself fails on args"):
            export_onnx(small(), torch.zeros(1, 3, 8, 8), tmp_path / "model.onnx", check=CHECK)


# ---- layers that only look like adder layers


class Biased(nn.Module):
    """The parameter `bias` is part of the layer, and not where the published layers have theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.stride, self.padding = 1, 1
        self.adder, self.bias = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.full((8,), 5.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch2trt_adder.adder2d(x, self.adder, self.bias, 1, 1)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stride, self.padding, self.kernel_size = 2, 1, 3
        self.adder = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1)
        spread[:, :, ::2, ::2] = x
        return torch2trt_adder.adder2d(spread, self.adder, None, 1, 1)


class Scaling(nn.Module):
    """Registered with fields that do not tell all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch2trt_adder.adder2d(x, self.weight) * 1.01


def test_a_bias_that_is_part_of_the_layer(tmp_path: pathlib.Path) -> None:
    x = torch.randn(2, 4, 8, 8)
    proto = onnx.load(export_onnx(nn.Sequential(Biased()).eval(), x, tmp_path / "model.onnx", check=CHECK))
    (node,) = adder_nodes(proto.graph)
    (bias,) = (onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name == node.input[2])
    assert (bias == 5).all()


@pytest.mark.parametrize("layer", [Transposed, Scaling])
def test_layers_that_compute_something_else(
    layer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Whether `adopt` refuses them or not, no file comes of it, checked in ONNX Runtime or not."""
    monkeypatch.setitem(recognise.adder_classes, Scaling, lambda module: {"weight": module.weight})
    x = torch.randn(2, 4, 8, 8)
    for check in {False, CHECK}:
        with pytest.raises((RuntimeError, ValueError)):
            export_onnx(nn.Sequential(layer()).eval(), x, tmp_path / "model.onnx", check=check)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda layer: layer.b.data.add_(1),
            "output 0 differs between the network with Adder2d in place .* and the network as it is by",
        ),
        (
            lambda layer: setattr(layer, "stride", (2, 2)),
            r"output 0 is .*\[2, 5, 4, 4\] in the network with Adder2d in place",
        ),
        (lambda layer: setattr(layer, "groups", 2), "the network fails on args once its adder layers are replaced"),
    ],
)
def test_the_network_that_was_given_is_what_counts(
    wrong: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Adopted layers stand for the network's own only as long as they compute the same."""

    def adopted(model: nn.Module) -> nn.Module:
        layer = Adder2d(4, 5, 3, padding=1, bias=True)
        layer.adder.data, layer.b.data = model[0].weight.data, model[0].bias.data.clone()
        wrong(layer)
        return nn.Sequential(layer).eval()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 4, 3, 3)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch2trt_adder.adder2d(x, self.weight, self.bias, 1, 1)

    monkeypatch.setattr(exporter.adopt, "adopted_copy", adopted)
    with pytest.raises(RuntimeError, match=f"export_onnx: .*{message}.*looks like an adder layer"):
        export_onnx(nn.Sequential(Own()).eval(), torch.randn(2, 4, 8, 8), tmp_path / "model.onnx", check=False)


@needs_runtime
def test_other_extents_are_compared_with_the_network_that_was_given(tmp_path: pathlib.Path) -> None:
    """It branches where its adopted copy does not."""

    class Branching(PublishedStyle):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if x.shape[0] == 3 else 2)

    with pytest.raises((RuntimeError, ValueError), match="for batch = 2|adopt"):
        export_onnx(nn.Sequential(Branching()).eval(), torch.randn(3, 3, 9, 9), tmp_path / "model.onnx", {0: "batch"})
    assert not list(tmp_path.iterdir())


def test_a_network_without_adder_layers_says_so(tmp_path: pathlib.Path) -> None:
    x = torch.randn(1, 3, 4, 4)
    with pytest.warns(
        UserWarning, match="export_onnx: Conv2d has no adder layer, so .*model.onnx holds none; adopt"
    ) as seen:
        export_onnx(nn.Conv2d(3, 4, 3).eval(), x, tmp_path / "model.onnx", check=CHECK)
    assert seen[0].filename == __file__ and (tmp_path / "model.onnx").is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_onnx(Adder2d(3, 4, 3).eval(), x, tmp_path / "model.onnx", check=CHECK)


# ---- the limits in the file


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        "null",
        '"x"',
        "[" * 5000,
        '{"n": 5}',
        '{"n": [1]}',
        '{"n": [1, 2, 3]}',
        '{"n": [-1, 2]}',
        '{"n": [3, 2]}',
        '{"n": ["1", 2]}',
        '{"n": [null, 2]}',
        '{"n": [true, 2]}',
        '{"n": [0, 2.5]}',
        '{"n": [0, NaN]}',
        '{"n": [0, true]}',
    ],
)
def test_extents_that_no_export_writes(text: str) -> None:
    proto = onnx.ModelProto()
    assert format.extents(proto) == {}
    entry = proto.metadata_props.add()
    entry.key, entry.value = format.EXTENTS, '{"n": [0, null], "m": [3, 4]}'
    assert format.extents(proto) == {"n": (0, None), "m": (3, 4)}
    entry.value = text
    with pytest.raises(ValueError, match=r"the metadata torch2trt_adder\.extents of the file must map axes to limits"):
        format.extents(proto)


# ---- torch.onnx.export itself

PLAIN = [pytest.param({"dynamo": True}, id="dynamo"), pytest.param({"dynamo": False}, id="torchscript")]


@pytest.mark.parametrize("how", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain_torch_onnx_export_of_addernet_mnist(how: dict, dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    """The call that people have tried on AdderNetMnist, and that failed on the layer's autograd function."""
    model, x = addernet_mnist().eval().to(dtype), torch.randn(1, 1, 28, 28).to(dtype)
    torch.onnx.export(model, x, str(tmp_path / "addernet_mnist.onnx"), verbose=False, opset_version=12, **how)
    proto = onnx.load(tmp_path / "addernet_mnist.onnx")
    onnx.checker.check_model(proto)
    nodes = adder_nodes(proto.graph)
    assert [attributes(node)["stride"] for node in nodes] == [[1, 1], [1, 1]]
    assert all(attributes(node)["output_type"] == (dtype is torch.float16) for node in nodes)
    assert all(len(node.input) == 3 and attributes(node)["plugin_namespace"] == b"" for node in nodes)
    if dtype is torch.float32:
        np.testing.assert_array_equal(value(proto, nodes[0].input[1]), model.conv1.adder.detach())


# ---- errors


def test_training_mode(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"the model is in training mode.*model\.eval\(\)"):
        export_onnx(small().train(), torch.randn(1, 4, 8, 8), tmp_path / "model.onnx", check=CHECK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    with pytest.raises(TypeError, match=r"cannot be exported.*\.float\(\) or \.half\(\)"):
        export_onnx(small().to(dtype), torch.randn(1, 4, 8, 8, dtype=dtype), tmp_path / "model.onnx", check=CHECK)
    assert not list(tmp_path.iterdir())


def test_network_that_torch_cannot_export(tmp_path: pathlib.Path) -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.lu_factor(x)[0]

    with pytest.raises(RuntimeError, match="torch's exporter cannot express the network: .*lu_factor"):
        export_onnx(Unknown().eval(), torch.randn(1, 4, 8, 8), tmp_path / "model.onnx", check=CHECK)


@pytest.mark.parametrize(
    "dynamic, message",
    [
        ([{0: "batch"}, {}], "dynamic holds 2 mappings, but args 1 tensors"),
        ([{4: "depth"}], r"input 0 has 4 axes and no axis 4 \('depth'\)"),
        ({-1: "width"}, r'must map axes, counted from 0, to names, as \{0: "batch"\}'),
        ({0: ""}, r'must map axes, counted from 0, to names, as \{0: "batch"\}'),
        ({0: "batch", 4: "depth"}, r"no input has an axis 4 \('depth'\)"),
    ],
)
def test_dynamic_that_does_not_fit(dynamic: Any, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_onnx(small(), torch.randn(1, 4, 8, 8), tmp_path / "model.onnx", dynamic, check=CHECK)


@pytest.mark.parametrize(
    "dynamic",
    [
        True,
        0,
        "batch",
        {0},
        {"batch": 0},
        {0: 1},
        {True: "batch"},
        {0.0: "batch"},
        {0: None},
        ["batch"],
        [0],
        [[0]],
        {(0, 1): "n"},
    ],
)
def test_dynamic_of_another_type(dynamic: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        TypeError, match=r'export_onnx: dynamic must map axes to names, as \{0: "batch"\}, or be a list'
    ):
        export_onnx(small(), torch.randn(1, 4, 8, 8), tmp_path / "model.onnx", dynamic, check=CHECK)


def test_dynamic_of_numpy_and_of_one_name(tmp_path: pathlib.Path) -> None:
    args = [torch.randn(2, 4, 5, 5), torch.randn(2, 3)]
    for axes in ({np.int64(0): "n"}, ({0: "n"}, None), [{np.int32(0): "n"}, {0: "n"}]):
        assert make_dynamic_shapes(tuple(args), axes)[0] == {0: "n"}
    args[1] = torch.randn(3, 3)
    with pytest.raises(
        ValueError, match="axis 0 of input 0 and axis 0 of input 1 one name, 'n', but their extents are 2 and 3"
    ):
        export_onnx(small(), args, tmp_path / "model.onnx", {0: "n"}, check=CHECK)


@pytest.mark.parametrize(
    "names, message",
    [
        ({"input_names": ["x", "z"]}, r"input_names must hold 1 different names, one for each input, got \['x', 'z'\]"),
        ({"output_names": ["y", "z"]}, "output_names must hold 1 different names"),
        ({"output_names": []}, "output_names must hold 1 different names"),
        ({"output_names": [""]}, "output_names must hold 1 different names"),
        ({"input_names": ["x"], "output_names": ["x"]}, "output_names holds 'x', which is the name of an input"),
    ],
)
def test_names_that_do_not_fit(names: Any, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_onnx(small(), torch.randn(1, 4, 8, 8), tmp_path / "model.onnx", check=CHECK, **names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model, args, error, message",
    [
        (lambda x: x, torch.zeros(1, 4, 8, 8), TypeError, r"model must be a torch\.nn\.Module, got function"),
        (small(), {"x": 0}, TypeError, "args must be a list or tuple of the model's arguments, or a tensor, got dict"),
        (
            small(),
            torch.zeros(1, 3, 8, 8),
            RuntimeError,
            "the network itself fails on args: ValueError: adder2d: an input",
        ),
        (small(), [torch.zeros(1, 4, 8, 8)] * 2, RuntimeError, "the network itself fails on args: TypeError"),
    ],
)
def test_arguments_that_do_not_fit(model: Any, args: Any, error: type, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(error, match=message):
        export_onnx(model, args, tmp_path / "model.onnx", check=CHECK)


def test_torchscript_is_refused(tmp_path: pathlib.Path) -> None:
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(TypeError, match="got TopLevelTracedModule; give the module that it was made of"):
        export_onnx(torch.jit.trace(small(), x), x, tmp_path / "model.onnx", check=CHECK)


# ---- dynamic axes: what holds for the example alone


class Sized(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = Adder2d(3, 4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x), x.shape)


@pytest.mark.parametrize(
    "function, limits",
    [
        (lambda y, shape: 2 * y if shape[0] > 4 else y, {"batch": (0, 4)}),
        (lambda y, shape: 2 * y if shape[0] < 4 else y, {"batch": (4, None)}),
        (lambda y, shape: y * shape[0], {}),
    ],
)
@pytest.mark.parametrize("opset", [16, 17, 18])
def test_the_file_knows_the_branch_that_it_holds(
    function: Any, limits: dict, opset: int, tmp_path: pathlib.Path
) -> None:
    """A branch on an extent is exported as the example took it, and build_engine must not go beyond."""
    x = torch.randn(4, 3, 8, 8)
    path = export_onnx(Sized(function).eval(), x, tmp_path / "model.onnx", {0: "batch"}, opset=opset, check=CHECK)
    assert format.extents(onnx.load(path)) == limits


class Scaled(nn.Module):
    """An argument that is no tensor lies between two that are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Adder2d(3, 4, 3)

    def forward(self, x: Tensor, factor: int, rows: Tensor) -> Tensor:
        y = factor * self.layer(x)
        return y + rows.sum() if rows.shape[0] <= 7 else y


def test_axes_beside_an_argument_that_is_no_tensor(tmp_path: pathlib.Path, recwarn: pytest.WarningsRecorder) -> None:
    args, dynamic = (torch.randn(2, 3, 8, 8), 2, torch.randn(4, 5)), [{0: "batch"}, {0: "rows"}]
    proto = onnx.load(export_onnx(Scaled().eval(), args, tmp_path / "model.onnx", dynamic, check=CHECK))
    first = [entry.type.tensor_type.shape.dim[0].dim_param for entry in (*proto.graph.input, *proto.graph.output)]
    assert first == ["batch", "rows", "batch"] and format.extents(proto) == {"rows": (0, 7)}
    assert not [str(w.message) for w in recwarn if "renamed" in str(w.message)]


@needs_runtime
@pytest.mark.parametrize(
    "function, dynamic, where",
    [
        (lambda y, shape: 2 * y if shape[0] % 2 else y, {0: "batch"}, "for batch = 1"),
        (lambda y, shape: 2 * y if shape[0] == 1 else y, {0: "batch"}, "for batch = 1"),
        # torch's exporter writes the pooling window of the example.
        (lambda y, shape: F.adaptive_avg_pool2d(y, 3), {0: "batch", 2: "height", 3: "width"}, "height = 7, width = 7"),
    ],
)
def test_the_check_sees_what_was_taken_from_the_example(
    function: Any, dynamic: dict, where: str, tmp_path: pathlib.Path
) -> None:
    model, x = Sized(function).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(
        RuntimeError, match=f"output 0 .* in PyTorch.*{where}.*make other axes dynamic|{where}.*other axes"
    ):
        export_onnx(model, x, tmp_path / "model.onnx", dynamic)
    assert not list(tmp_path.iterdir())
    export_onnx(model, x, tmp_path / "model.onnx")


@needs_runtime
def test_the_check_takes_other_extents_that_the_network_takes(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    """One less, or twice as many where the network cannot have that; values are the example's."""
    seen = []
    run = run_onnxruntime

    def spy(session: Any, tensors: list[Tensor]) -> list[Tensor]:
        seen.append([tuple(t.shape) for t in tensors])
        assert all(t.unique().numel() <= 3 for t in tensors)
        return run(session, tensors)

    monkeypatch.setattr(checking, "run_onnxruntime", spy)
    x = torch.randint(3, (2, 3, 8, 8)).float()
    for function, other in ((lambda y, shape: y, (1, 3, 7, 8)), (lambda y, shape: y.view(-1, 8, 6, 6), (4, 3, 8, 8))):
        seen.clear()
        dynamic = {0: "batch", 2: "height"} if other[2] == 7 else {0: "batch"}
        export_onnx(Sized(function).eval(), x, tmp_path / "model.onnx", dynamic)
        assert seen == [[(2, 3, 8, 8)], [other]]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_package_missing(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(RuntimeError, match=f"{package} is not installed: pip install {package}"):
        export_onnx(small(), torch.randn(1, 4, 8, 8), tmp_path / "model.onnx")


def test_torch_with_an_older_exporter(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f: None)
    with pytest.raises(RuntimeError, match=r"export_onnx: torch .* has an older exporter: use torch 2\.6 or newer"):
        export_onnx(small(), torch.randn(1, 4, 8, 8), tmp_path / "model.onnx", check=CHECK)


def test_a_file_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written .*name another file"):
        export_onnx(small(), torch.randn(1, 4, 8, 8), tmp_path / "file" / "model.onnx", check=CHECK)


APPROXIMATED = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "softmax": lambda x: x.softmax(1),
    "sum": lambda x: x.sum((1, 2, 3)),
    "sum_near_0": lambda x: (x - x.mean()).sum((2, 3)),
    "mean": lambda x: x.mean((1, 2, 3)),
    "std": lambda x: x.std((1, 2, 3)),
    "group_norm": lambda x: F.group_norm(x, 2),
}


@needs_runtime
@pytest.mark.parametrize("shift", [0, 11])  # the layer's sums lie around -11
@pytest.mark.parametrize("name", APPROXIMATED)
def test_the_check_knows_what_runtimes_approximate(name: str, shift: int, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = Then(lambda x: APPROXIMATED[name](x + shift), channels=16).eval()
    export_onnx(model, torch.randn(2, 16, 33, 31), tmp_path / "model.onnx")


@needs_runtime
@pytest.mark.parametrize("wrong", ["distance = Neg (difference)", "distance = Identity (difference)"])
def test_the_check_sees_a_wrong_body(wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(postprocess, "BODY", body.BODY.replace("distance = Abs (difference)", wrong))
    with pytest.raises(RuntimeError, match="output 0 differs between ONNX Runtime and PyTorch by up to"):
        export_onnx(small()[0], torch.randn(1, 4, 8, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    export_onnx(small()[0], torch.randn(1, 4, 8, 8), tmp_path / "model.onnx", check=False)


# ---- shape arithmetic that TensorRT 8.6 reads


class Shaped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = torch2trt_adder.Adder2d(3, 8, 3, 1, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize(
    "function, shape_nodes",
    [
        (lambda x: x.flatten(1), 0),
        (lambda x: x.view(x.shape[0], -1), 0),
        (lambda x: x.view(x.shape[0] * 2, 4, 8, 8), 0),
        (lambda x: x.view(x.shape[0], 2, 4, x.shape[2], 8).transpose(1, 2).reshape(x.shape[0], 8, x.shape[2], 8), 2),
    ],
    ids=["flatten", "view", "doubled", "shuffle of a dynamic height"],
)
def test_shape_arithmetic(function: Callable, shape_nodes: int, tmp_path: pathlib.Path) -> None:
    """One extent that is only known at run time is -1 in a constant; Shape has no start and end."""
    x = torch.randn(2, 3, 8, 8)
    path = export_onnx(
        Shaped(function).eval(),
        x,
        tmp_path / "model.onnx",
        {0: "batch", 2: "height"} if shape_nodes else {0: "batch"},
        check=CHECK,
    )
    graph = onnx.load(path).graph
    found = [node for node in graph.node if node.op_type == "Shape"]
    assert len(found) <= shape_nodes and bool(found) == bool(shape_nodes)
    assert not any(attribute.name in ("start", "end") for node in found for attribute in node.attribute)
