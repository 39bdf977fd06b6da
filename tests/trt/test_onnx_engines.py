"""From ONNX to engines without torch2trt: TensorRT-RTX's real parser and builder on a CPU, TensorRT on a GPU."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

# As in test_torch2trt_engines.py: what is compared here would drown in TF32's rounding.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxscript")

from networks import SmallResNet, calibrated
from processes import ROOT, run

from torch2trt_adder import Adder2d, adderize, convert, library
from torch2trt_adder.conversion import routes
from torch2trt_adder.export import format
from torch2trt_adder.export.exporter import export_onnx
from torch2trt_adder.export.format import adder_nodes
from torch2trt_adder.export.runtime import onnxruntime_session, run_onnxruntime
from torch2trt_adder.models import addernet_mnist, resnet20
from torch2trt_adder.numerics.rounding import rounding_bounds
from torch2trt_adder.trt import builder, engine, inspection, monitor, plans, profiles, typed
from torch2trt_adder.trt.builder import build_engine
from torch2trt_adder.trt.engine import Engine
from torch2trt_adder.utils import progress

CHECK = importlib.util.find_spec("onnxruntime") is not None  # the rest is tested without it, too
needs_runtime = pytest.mark.skipif(not CHECK, reason="needs onnxruntime: pip install onnxruntime")


def run_python(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return run(sys.executable, "-c", script, *arguments)


# ---- the real parser, which works without a GPU


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install tensorrt-rtx")


# tensorrt-rtx has the parser and the registry of TensorRT 11, but no plugin layers: the process ends where TensorRT 11
# would add one to the network. Its log tells what came before.
PARSE = """
import sys
import tensorrt_rtx as trt
from torch2trt_adder.trt import engine, plugin
import onnx
if sys.argv[2] == "registered":
    plugin.register(trt)
log = trt.Logger(trt.Logger.VERBOSE)
network = trt.Builder(log).create_network(0)
parser = trt.OnnxParser(network, log)
print("parsed:", parser.parse(open(sys.argv[1], "rb").read()), flush=True)
for i in range(parser.num_errors):
    print(parser.get_error(i).desc())
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("function", ["with body", "stripped"])
def test_parser_makes_the_plugin(dtype: torch.dtype, function: str, tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    """The node's attributes and its three inputs reach the plugin's creator, whether or not the file has the body."""
    model = Adder2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), groups=2).eval().to(dtype)
    path = export_onnx(model, torch.randn(1, 4, 9, 8).to(dtype), tmp_path / "model.onnx", {0: "batch"}, check=CHECK)
    if function == "stripped":
        onnx.save(builder.load_onnx(path), path)
    assert len(onnx.load(path).functions) == (function == "with body")
    log = run_python(PARSE, path, "registered").stdout
    assert "Found registered plugin: Adder2d. Importing this node as a plugin." in log
    assert "Successfully created plugin: Adder2d" in log
    assert "model:adder2d_0 [Adder2d] inputs: " in log and "(6, 2, 3, 2)[FLOAT]], [" in log and "(6)[FLOAT]]" in log


def test_parser_without_the_plugin_is_an_error(tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    path = export_onnx(Adder2d(4, 6, 3).eval(), torch.randn(1, 4, 9, 8), tmp_path / "model.onnx", check=CHECK)
    onnx.save(builder.load_onnx(path), path)
    done = run_python(PARSE, path, "none")
    assert done.returncode == 0 and "parsed: False" in done.stdout and "Plugin not found" in done.stdout


def test_parser_refuses_attributes_that_no_layer_can_have(tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    path = export_onnx(Adder2d(4, 6, 3).eval(), torch.randn(1, 4, 9, 8), tmp_path / "model.onnx", check=CHECK)
    proto = builder.load_onnx(path)
    next(a for a in proto.graph.node[0].attribute if a.name == "stride").ints[:] = [0, 1]
    onnx.save(proto, path)
    done = run_python(PARSE, path, "registered")
    assert done.returncode == 0 and "parsed: False" in done.stdout
    assert "torch2trt_adder: stride must be >= 1, got (0, 1)" in done.stderr


# ---- everything else about building, on a network without plugins


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 4, 1), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = F.max_pool2d(F.relu(self.bn(self.conv1(x))), 2)
        y = self.conv2(y)
        return self.fc(y.flatten(1)) * scale, y


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    names = {"input_names": ["x", "scale"], "output_names": ["y", "maps"]}
    args = (torch.randn(2, 3, 12, 12), torch.rand(1, 5))
    return export_onnx(Plain().eval(), args, folder / "plain.onnx", [{0: "batch"}, None], check=CHECK, **names)


def test_build(plain: pathlib.Path, tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    """Nothing but the plan and the cache is left, the second build reads the cache, and the plan says what it is."""
    plan, cache = tmp_path / "new" / "plain.plan", tmp_path / "timing.cache"
    for _ in range(2):
        assert build_engine(plain, plan, {"batch": (1, 4, 8)}, timing_cache=cache, workspace=1 << 28, trt=rtx) == plan
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["plain.plan", "timing.cache"]
    data = plan.read_bytes()
    assert plans.plan_version(data) == tuple(int(n) for n in rtx.__version__.split(".")[:3])
    assert b"plain.onnx [torch2trt_adder, 0 Adder2d, " in data
    cache.write_bytes(b"of another version")
    build_engine(plain, plan, {"x:0": (1, 4, 8)}, timing_cache=cache, trt=rtx)
    assert cache.read_bytes() != b"of another version"


def test_profile(plain: pathlib.Path, rtx: ModuleType) -> None:
    proto = builder.load_onnx(plain)
    assert profiles.dynamic_axes(proto) == [("x", 0, "batch")]
    rtx_builder, network, _parser = builder._parse(rtx, proto, plain)
    config = rtx_builder.create_builder_config()
    profiles.add_profile(rtx_builder, network, config, proto, {"batch": (1, 4, 8)})
    assert config.num_optimization_profiles == 1
    static = builder.load_onnx(plain)
    static.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    config = rtx_builder.create_builder_config()
    profiles.add_profile(rtx_builder, network, config, static, {})
    assert config.num_optimization_profiles == 0


@pytest.mark.parametrize(
    "ranges, message",
    [
        ({}, r"axis 0 of input 'x' is dynamic: give its range, as in ranges=\{'batch': .*--range batch=1:8:64"),
        ({"batch": (4, 2, 8)}, r"must be \(smallest, most frequent, largest\) in this order, got \(4, 2, 8\)"),
        ({"batch": (1, 2)}, r"got \(1, 2\)"),
        ({"batch": 8}, "in this order, got 8"),
        ({"batch": ("1", "2", "3")}, r"in this order, got \('1', '2', '3'\)"),
        (
            {"batch": (1, 2, 3), "height": (1, 2, 3)},
            "ranges names 'height', but the dynamic axes of the file are: batch",
        ),
    ],
)
def test_ranges_that_do_not_fit(
    ranges: dict, message: str, plain: pathlib.Path, tmp_path: pathlib.Path, rtx: ModuleType
) -> None:
    with pytest.raises(ValueError, match=message):
        build_engine(plain, tmp_path / "x.plan", ranges, trt=rtx)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [(1, 2, 4), (0, 1, 2), (4, 4, 5), (1, 1, 8)])
def test_range_beyond_what_the_file_holds(given: tuple, tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    """torch's exporter takes the example's branch, which here ends with a batch of 4."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.conv(x) if x.shape[0] > 4 else self.conv(x)

    path = export_onnx(Branch().eval(), torch.randn(2, 3, 8, 8), tmp_path / "x.onnx", {0: "batch"}, check=CHECK)
    if given[2] <= 4:
        assert build_engine(path, tmp_path / "x.plan", {"batch": given}, trt=rtx).is_file()
        return
    message = r"axis 0 of input 'x' \(batch\) may be 0 to 4, got the range .*: beyond these extents"
    with pytest.raises(ValueError, match=message):
        build_engine(path, tmp_path / "x.plan", {"batch": given}, trt=rtx)
    assert not (tmp_path / "x.plan").exists()


def test_the_onnx_file_is_not_overwritten(plain: pathlib.Path, rtx: ModuleType) -> None:
    content = plain.read_bytes()
    with pytest.raises(ValueError, match="is the ONNX file itself; name another file"):
        build_engine(plain, plain.parent / "." / plain.name, {"batch": (1, 2, 3)}, trt=rtx)
    assert plain.read_bytes() == content


def test_paths_that_are_one_file(plain: pathlib.Path, tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    """The engine, the timing cache, the ONNX file and the files of its weights are all others, or nothing is done."""
    path = tmp_path / "two.onnx"
    onnx.save(onnx.load(plain), path, save_as_external_data=True, location="two.data", size_threshold=0)
    (tmp_path / "hard").hardlink_to(path)
    (tmp_path / "soft").symlink_to("two.data")
    (tmp_path / "sub").mkdir()
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    plan, weights = tmp_path / "x.plan", "is the file .* of its weights itself; name another file for the"
    for engine_path, cache, message in (
        (tmp_path / "sub" / ".." / "two.onnx", None, "is the ONNX file itself; name another file for the engine"),
        (tmp_path / "hard", None, "is the ONNX file itself; name another file for the engine"),
        (tmp_path / "two.data", None, f"{weights} engine"),
        (tmp_path / "soft", None, f"{weights} engine"),
        (plan, path, "is the ONNX file itself; name another file for the timing cache"),
        (plan, str(tmp_path / "soft"), f"{weights} timing cache"),
        (plan, tmp_path / "sub" / ".." / "x.plan", "is the engine itself; name another file for the timing cache"),
    ):
        with pytest.raises(ValueError, match=message):
            build_engine(path, engine_path, {"batch": (1, 2, 3)}, timing_cache=cache, trt=rtx)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_weights_that_are_not_there(plain: pathlib.Path, tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    path, data = tmp_path / "two.onnx", tmp_path / "two.data"
    onnx.save(onnx.load(plain), path, save_as_external_data=True, location="two.data", size_threshold=0)
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(
        OSError, match=rf"two\.data has {len(content) - 1} bytes of the {len(content)} that the ONNX file needs"
    ):
        build_engine(path, tmp_path / "x.plan", {"batch": (1, 2, 3)}, trt=rtx)
    data.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"the weights of the ONNX file lie in .*two\.data, which is not there; put it"
    ):
        build_engine(path, tmp_path / "x.plan", {"batch": (1, 2, 3)}, trt=rtx)
    proto = onnx.load(path, load_external_data=False)
    next(e for e in proto.graph.initializer[0].external_data if e.key == "offset").value = "zero"
    onnx.save(proto, path)
    with pytest.raises(ValueError, match=r"two\.onnx cannot be used: tensor .* at 'zero' .*; export the network again"):
        build_engine(path, tmp_path / "x.plan", {"batch": (1, 2, 3)}, trt=rtx)
    assert [p.name for p in tmp_path.iterdir()] == ["two.onnx"]


# ---- Adder2d nodes of another's making


def adder_model(shapes: dict[str, list] | None = None, types: dict[str, int] | None = None, **changed: Any) -> Any:
    """x [N, 8, H, W], weight [6, 4, 3, 3], bias [6] in groups of 2; attributes (None: left out), shapes or types changed."""
    helper = onnx.helper
    attributes = {"stride": [1, 2], "padding": [0, 1], "dilation": [1, 1], "groups": 2, "output_type": 0}
    attributes |= {"plugin_namespace": "", **changed}
    node = helper.make_node("Adder2d", ["x", "w", "b"], ["y"], "layer", domain="torch2trt_adder")
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)
    sizes = {"x": ["n", 8, 9, "w"], "w": [6, 4, 3, 3], "b": [6], **(shapes or {})}
    inputs = [helper.make_tensor_value_info(k, (types or {}).get(k, 1), size) for k, size in sizes.items()]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, [None] * 4)])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("torch2trt_adder", 1)]
    )


def in_a_branch(model: Any) -> Any:
    """The same node in a subgraph, which sees the inputs of the graph around it."""
    helper, outer = onnx.helper, onnx.ModelProto()
    outer.CopyFrom(model)
    branch = helper.make_graph(list(model.graph.node), "branch", [], list(model.graph.output))
    condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("", onnx.TensorProto.BOOL, [], [True]))
    choice = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    del outer.graph.node[:]
    outer.graph.node.extend([condition, choice])
    outer.graph.output[0].name = "z"
    return outer


@pytest.mark.parametrize(
    "changed, message",
    [
        *(
            ({name: None}, f"has no attribute {name}")
            for name in ("stride", "padding", "dilation", "groups", "output_type")
        ),
        ({"stride": [1, 2**32 + 1]}, r"must have two integers from 1 to 2147483647 as stride, got \[1, 4294967297\]"),
        ({"groups": 2**32 + 2}, "must have an integer from 1 to 2147483647 as groups, got 4294967298"),
        ({"padding": [-1, 0]}, r"two integers from 0 to 2147483647 as padding, got \[-1, 0\]"),
        ({"dilation": [1]}, r"two integers from 1 to 2147483647 as dilation, got \[1\]"),
        ({"dilation": [1, 1, 1]}, r"two integers from 1 .* as dilation, got \[1, 1, 1\]"),
        ({"stride": [1.0, 1.0]}, "must have two integers as stride, got another type"),
        ({"stride": 1}, "must have two integers as stride, got another type"),
        ({"groups": "2"}, "must have an integer as groups, got another type"),
        ({"output_type": 2}, "must have an integer from 0 to 1 as output_type, got 2"),
        ({"plugin_namespace": "other"}, 'must have "" as plugin_namespace'),
        ({"shapes": {"x": ["n", 9, 9, 9]}}, "has an input of 9 channels, its weight and groups want 4 x 2"),
        ({"shapes": {"x": [8, 9, 9]}}, r"must have a tensor of 4 axes as x, got the shape \[8, 9, 9\]"),
        ({"shapes": {"w": [6, 4, 3]}}, "must have a tensor of 4 axes as weight"),
        ({"shapes": {"w": [7, 4, 3, 3], "b": [7]}}, "has 7 filters, which 2 groups do not divide"),
        ({"shapes": {"w": [6, 4, 0, 3]}}, "must have a weight without empty axes"),
        ({"shapes": {"b": [5]}}, "has 6 filters and a bias of 5 values"),
        ({"dilation": [5, 1]}, "has a kernel that reaches over 11 values of H, the padded input has 9"),
        ({"types": {"x": 11}}, r"must have float32 or float16 as x \('x'\), got the type 11 of ONNX"),
        ({"types": {"w": 10}}, r"must have float32 as weight \('w'\), got the type 10"),
    ],
)
def test_adder_nodes_that_cannot_be_computed(
    changed: dict, message: str, tmp_path: pathlib.Path, rtx: ModuleType
) -> None:
    """TensorRT's parser fills in what is missing and cuts integers to 32 bits: 2**32 + 1 would be 1."""
    for number, model in enumerate((adder_model(**changed), in_a_branch(adder_model(**changed)))):
        path = tmp_path / f"{number}.onnx"
        onnx.save(model, path)
        with pytest.raises(
            ValueError, match=rf"{number}\.onnx cannot be used: the Adder2d node 'layer' .*{message}.*export"
        ):
            build_engine(path, tmp_path / "x.plan", trt=rtx)
        assert not (tmp_path / "x.plan").exists()


def test_adder_nodes_that_can_be_computed() -> None:
    for model in (adder_model(), adder_model(plugin_namespace=None), adder_model({"x": ["n", "c", "h", "w"]})):
        for each in (model, in_a_branch(model)):
            format.check_nodes(each)
    model = adder_model()
    del model.graph.node[0].input[2]
    with pytest.raises(
        ValueError, match="'layer' must have the inputs x, weight and bias and one output, got 2 inputs and 1"
    ):
        format.check_nodes(model)


@pytest.mark.parametrize("text", ["[]", "5", '{"batch": 5}', "not json"])
def test_limits_that_no_export_writes(text: str, plain: pathlib.Path, tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    proto = onnx.load(plain)
    onnx.helper.set_model_props(proto, {format.EXTENTS: text})
    onnx.save(proto, tmp_path / "x.onnx")
    with pytest.raises(
        ValueError, match=r"x\.onnx cannot be used: the metadata torch2trt_adder\.extents of the file must map"
    ):
        build_engine(tmp_path / "x.onnx", tmp_path / "x.plan", {"batch": (1, 2, 3)}, trt=rtx)
    assert not (tmp_path / "x.plan").exists()


def test_files_that_are_none(tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    with pytest.raises(OSError, match=r"the ONNX file .*none\.onnx cannot be read \(No such file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "x.plan", trt=rtx)
    for content in (b"", b"hello, this is no protobuf"):
        (tmp_path / "text.onnx").write_bytes(content)
        with pytest.raises(RuntimeError, match=r"text\.onnx is not an ONNX file"):
            build_engine(tmp_path / "text.onnx", tmp_path / "x.plan", trt=rtx)


def test_a_plan_that_cannot_be_written(plain: pathlib.Path, tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written .*name another file"):
        build_engine(plain, tmp_path / "file" / "x.plan", {"batch": (1, 2, 3)}, trt=rtx)


def test_reasons_of_a_failed_parse(tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    helper = onnx.helper
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], "stranger")
    entries = [helper.make_tensor_value_info(name, 1, [1, 2]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", entries[:1], entries[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    onnx.save(model, tmp_path / "stranger.onnx")
    with pytest.raises(RuntimeError, match=r"TensorRT .* cannot read .*stranger\.onnx: .*NoSuchOperator"):
        build_engine(tmp_path / "stranger.onnx", tmp_path / "x.plan", trt=rtx)


@pytest.mark.parametrize(
    "errors, message",
    [
        (
            ["Unable to load library: libnvinfer_lean.so.8.6.0: no such file"],
            r"so\.8\.6\.0: no such file\. A plan with an embedded",
        ),
        ([], r"its log gives no reason\. A plan with an embedded"),
        (["out of memory."], r"out of memory\.$"),
    ],
)
def test_reasons_of_a_failed_build(
    errors: list,
    message: str,
    plain: pathlib.Path,
    tmp_path: pathlib.Path,
    rtx: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The builder's own errors, and the remedy where the lean runtime is what TensorRT misses."""

    class Builder(rtx.Builder):
        def build_serialized_network(self, network: object, config: object) -> None:
            monitor.logger(rtx).errors.extend(errors)

    monkeypatch.setattr(rtx, "Builder", Builder)
    with pytest.raises(RuntimeError, match=f"could not build an engine of .*plain.onnx: .*{message}"):
        build_engine(plain, tmp_path / "x.plan", {"batch": (1, 2, 3)}, embed_plugin=True, trt=rtx)
    assert not list(tmp_path.iterdir())


def test_weights_in_other_files(tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    path = export_onnx(model, torch.randn(1, 3, 9, 9), tmp_path / "one.onnx", check=CHECK)
    other = tmp_path / "other" / "two.onnx"
    other.parent.mkdir()
    onnx.save(onnx.load(path), other, save_as_external_data=True, location="two.data", size_threshold=0)
    assert other.with_name("two.data").is_file()
    for fp16 in (False, True):
        assert build_engine(other, tmp_path / "x.plan", fp16=fp16, trt=rtx).stat().st_size > 10_000


def test_monitor_is_called(
    plain: pathlib.Path, tmp_path: pathlib.Path, rtx: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(progress.Progress, "phase", lambda self, name, steps: seen.append((name, steps)))
    monkeypatch.setattr(progress.Progress, "step", lambda self: seen.append("step"))
    build_engine(plain, tmp_path / "x.plan", {"batch": (1, 2, 3)}, trt=rtx)
    assert seen and any(s == "step" for s in seen)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_cancels_the_build(
    plain: pathlib.Path, tmp_path: pathlib.Path, rtx: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.Progress, "step", lambda self: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        build_engine(plain, tmp_path / "x.plan", {"batch": (1, 2, 3)}, trt=rtx)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "BuildCanceled" in monitor.logger(rtx).reasons() and not list(tmp_path.iterdir())


# ---- float16 in strongly typed networks


def test_to_float16_types(plain: pathlib.Path, rtx: ModuleType) -> None:
    """TensorRT's own view of the network: convolutions in HALF, inputs and outputs as they were."""
    proto = builder.load_onnx(plain)
    del proto.graph.value_info[:]  # as other exporters leave it
    typed.to_float16(proto, plain.parent)
    onnx.checker.check_model(proto, full_check=True)
    _builder, network, _parser = builder._parse(rtx, proto, plain)
    assert (
        {network.get_input(i).dtype for i in range(2)}
        == {network.get_output(i).dtype for i in range(2)}
        == {rtx.float32}
    )
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    convolutions = [layer for layer in layers if layer.type == rtx.LayerType.CONVOLUTION]
    assert len(convolutions) == 2 and {layer.get_output(0).dtype for layer in convolutions} == {rtx.float16}


@needs_runtime
@pytest.mark.parametrize("make, shape", [(addernet_mnist, (1, 28, 28)), (resnet20, (3, 32, 32))])
def test_to_float16_computes_the_same(make: Callable, shape: tuple, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model, x = calibrated(make(), 8, *shape), torch.randn(2, *shape)
    proto = onnx.load(export_onnx(model, x, tmp_path / "model.onnx", {0: "batch"}))
    typed.to_float16(proto, tmp_path)
    # The body gives the type of x; the plugin gives float32, as output_type says.
    for function in proto.functions:
        function.node[-1].CopyFrom(onnx.helper.make_node("Cast", [function.node[-1].input[0]], ["y"], to=1))
    onnx.checker.check_model(proto, full_check=True)
    halves = {t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    casts = {o for n in proto.graph.node if n.op_type == "Cast" for o in n.output if o.endswith(".float16")}
    products = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert products and all(node.input[1] in halves for node in products)
    for node in adder_nodes(proto.graph):
        assert node.input[0] in casts or node.input[0].endswith(".float16")
        assert node.input[1] not in halves and node.input[2] not in halves
    (y,) = run_onnxruntime(onnxruntime_session(proto.SerializeToString()), [x])
    with torch.no_grad():
        assert 0 < (y - model(x)).abs().max() <= rounding_bounds(model, [x], fp16=True)


# ---- plans that may not run here


@pytest.fixture(scope="module")
def plan(plain: pathlib.Path, rtx: ModuleType) -> bytes:
    return build_engine(plain, plain.with_suffix(".plan"), {"batch": (1, 4, 8)}, trt=rtx).read_bytes()


def test_plan_of_another_version(plan: bytes, tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    other = bytearray(plan)
    other[24:28] = bytes([8, 6, 1, 6])
    (tmp_path / "old.plan").write_bytes(other)
    with pytest.raises(
        RuntimeError,
        match=r"old\.plan was built by TensorRT 8\.6\.1, here is 1\..*the TensorRT version that built it; build it again",
    ):
        Engine(tmp_path / "old.plan", trt=rtx)


def test_an_onnx_file_is_no_plan(plain: pathlib.Path, rtx: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"plain\.onnx is an ONNX file: make an engine of it with build_engine"):
        Engine(plain, trt=rtx)


def test_a_plan_that_is_cut_off(plan: bytes, tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    (tmp_path / "short.plan").write_bytes(plan[:-1])
    with pytest.raises(
        RuntimeError, match=rf"short\.plan is cut off: it has {len(plan) - 1} of {len(plan)} bytes; copy or"
    ):
        Engine(tmp_path / "short.plan", trt=rtx)
    with pytest.raises(RuntimeError, match="short.plan is no TensorRT engine"):
        (tmp_path / "short.plan").write_bytes(plan[:20])
        Engine(tmp_path / "short.plan", trt=rtx)


def test_no_plan(tmp_path: pathlib.Path, rtx: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="the engine is no TensorRT engine: build it again"):
        Engine(b"PK\x03\x04" + bytes(100), trt=rtx)
    with pytest.raises(FileNotFoundError, match=r"the engine .*none\.plan cannot be read \(No such file"):
        Engine(str(tmp_path / "none.plan"), trt=rtx)
    with pytest.raises(IsADirectoryError, match=r"the engine .* cannot be read \(Is a directory"):
        Engine(tmp_path, trt=rtx)
    (tmp_path / "empty.plan").touch()
    with pytest.raises(RuntimeError, match=r"empty\.plan is empty: build it again"):
        Engine(tmp_path / "empty.plan", trt=rtx)
    with pytest.raises(RuntimeError, match="this Engine is empty"):
        Engine(trt=rtx)(torch.zeros(1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_plan_without_a_gpu(plan: bytes, rtx: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, and torch .* finds none here"):
        Engine(plan, trt=rtx)


# ---- the one context


class Context:
    def set_input_shape(self, name: str, shape: tuple) -> bool:
        return True

    def get_tensor_shape(self, name: str) -> tuple:
        return (1,)


class OneContext:
    """As TensorRT 8.6: an engine that has a second context while the first lives is of no use."""

    def __init__(self) -> None:
        self.made: list[weakref.ref] = []

    def create_execution_context(self) -> Context:
        assert all(context() is None for context in self.made)
        context = Context()
        self.made.append(weakref.ref(context))
        return context


def test_graphs_end_with_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """New shapes run without a graph, the second call records, and nothing touches a context that has a graph."""
    calls: list[str] = []

    class Recorded:
        def __init__(self, owner: Engine, tensors: list[Tensor]) -> None:
            assert tuple(tuple(tensor.shape) for tensor in tensors) == owner._shapes
            calls.append("record")

        def replay(self, tensors: list[Tensor]) -> list[Tensor]:
            calls.append("replay")
            return list(tensors)

    monkeypatch.setattr(engine, "_Graph", Recorded)
    monkeypatch.setattr(Engine, "_enqueue", lambda self, tensors, outputs: calls.append("run"))
    runner = Engine()
    runner.engine, runner.input_names, runner.output_names = OneContext(), ["x"], ["y"]
    runner._device, runner._dtypes = torch.device("cpu"), {"y": torch.float32}
    runner._renew_context()

    def seen(call: Callable, *batches: int) -> list[str]:
        calls.clear()
        for batch in batches:
            call([torch.zeros(batch, 3)])
        return calls.copy()

    assert seen(runner._replay, 1, 1, 1) == ["run", "record", "replay", "replay"]
    assert seen(runner._replay, 2, 1, 2, 2, 2) == ["run", "run", "run", "record", "replay", "replay"]
    assert seen(runner._run, 2) == ["run"] and runner._graph is None
    assert seen(runner._replay, 2) == ["record", "replay"]
    runner._renew_context()
    assert seen(runner._replay, 2, 2) == ["run", "record", "replay"]
    assert len(runner.engine.made) == 2


def test_a_state_dict_brings_the_order_of_inputs_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Engine, plan: bytes, source: str) -> None:
        self.input_names, self.output_names = ["a", "b"], ["y", "z"]

    monkeypatch.setattr(Engine, "_load", load)
    runner = Engine()
    runner.load_state_dict({"engine": b"", "input_names": ["b", "a"], "output_names": ["z", "y"]})
    assert runner.input_names == ["b", "a"] and runner.output_names == ["z", "y"]
    runner.load_state_dict({"engine": b""})
    assert runner.input_names == ["a", "b"]


# ---- what the inspector says


def described(text: str, rtx: ModuleType) -> list[dict]:
    runner = Engine(trt=rtx)
    inspector = SimpleNamespace(get_engine_information=lambda form: text)
    runner.engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    return inspection.layers(runner)


def test_layers_of_a_detailed_engine(rtx: ModuleType) -> None:
    """TensorRT 8.6 writes the characters between the names of fused ONNX nodes as they are."""
    text = """{"Layers": [{
  "Name": "Reformatting CopyNode for Input Tensor 0 to a:adder2d_0", "LayerType": "Reformat", "Inputs": [],
  "Outputs": [{"Name": "x", "Dimensions": [1,3,8,8], "Format/Datatype": "Row major linear FP16 format"}], "TacticValue": "0x0"
},{
  "Name": "a:adder2d_0", "LayerType": "PluginV2", "PluginType": "Adder2d", "Metadata": "[ONNX Layer: a:adder2d_0]\x1e[b\tc]",
  "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32"}]
},{
  "Name": "b:adder2d_1\x1eRelu_2", "LayerType": "PointWise", "Outputs": [{"Name":"z", "Format/Datatype": "Row major linear FP32"}]
}], "Bindings": ["x", "z"]}"""
    assert "\x1e" in text and "\t" in text
    found = described(text, rtx)
    assert [layer["adder"] for layer in found] == [False, True, False]
    assert [layer["precision"] for layer in found] == ["Row major linear FP16 format"] + ["Row major linear FP32"] * 2
    assert found[2]["name"] == "b:adder2d_1\x1eRelu_2"


def test_layers_by_their_names(rtx: ModuleType) -> None:
    """Engines of other builders tell no more."""
    names = ["Reformatting CopyNode for Input Tensor 0 to a:adder2d_0", "a:adder2d_0", "Relu_1"]
    found = described(json.dumps({"Layers": names, "Bindings": ["x"]}), rtx)
    assert [layer["name"] for layer in found] == names and [layer["adder"] for layer in found] == [False, True, False]


# ---- engines on a GPU: what test_torch2trt_engines.py does through torch2trt, through ONNX

gpu = [pytest.mark.gpu, pytest.mark.tensorrt]


def on_gpu(function: Callable) -> Callable:
    for mark in gpu:
        function = mark(function)
    return function


def calibrated_on_gpu(model: nn.Module, *shape: int) -> nn.Module:
    return calibrated(model, *shape).cuda()


def build(
    model: nn.Module,
    x: Tensor,
    folder: pathlib.Path,
    ranges: dict | None = None,
    dynamic: dict | None = None,
    **options,
) -> pathlib.Path:
    dynamic = {0: "batch"} if dynamic is None else dynamic
    path = export_onnx(model, x, folder / "model.onnx", dynamic, check=CHECK)
    return build_engine(path, folder / "model.plan", {"batch": (1, 8, 64)} if ranges is None else ranges, **options)


@torch.no_grad()
def check(runner: nn.Module, model: nn.Module, x: Tensor, fp16: bool = False) -> None:
    """runner(x) is model(x) as far as rounding can tell."""
    y, y0 = runner(x), model(x)
    bound = rounding_bounds(model, [x], fp16).item()
    assert y.dtype is y0.dtype and y.shape == y0.shape and y.isfinite().all()
    difference, largest = (y.double() - y0.double()).abs().max().item(), y0.abs().max().item()
    print(
        f"{type(model).__name__} batch {len(x)}{' fp16' if fp16 else ''}: relative difference {difference / largest:.2e}, "
        f"allowed {bound / largest:.2e}"
    )
    assert bound < (0.5 if fp16 or x.dtype is torch.float16 else 4e-3) * largest
    assert difference <= bound


NETWORKS = {
    "addernet_mnist": (addernet_mnist, (1, 28, 28), 2),
    "resnet20": (resnet20, (3, 32, 32), 20),
    "adderized": (lambda: adderize(SmallResNet()), (3, 64, 64), None),
}


@on_gpu
@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_route(name: str, fp16: bool, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    make, shape, adders = NETWORKS[name]
    model = calibrated_on_gpu(make(), 32, *shape)
    adders = adders or sum(isinstance(layer, Adder2d) for layer in model.modules())
    x = torch.randn(64, *shape, device="cuda")
    runner = Engine(build(model, x[:2], tmp_path, fp16=fp16))
    assert runner.adder_layers == adders > 0
    found = inspection.layers(runner)
    assert sum(layer["adder"] for layer in found) == adders, found
    for batch in (1, 7, 64):
        check(runner, model, x[:batch], fp16)


@on_gpu
def test_every_route_on_1000_inputs() -> None:
    """Largest differences and equal predictions of three networks, torchvision's among them where it is installed."""
    possible = [route for route in ("torch2trt", "onnx") if routes.missing(route) is None]
    command = [sys.executable, str(ROOT / "benchmarks" / "check_routes.py"), "--route", *possible]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert possible and done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" of 1000") >= 2 * len(possible)


@on_gpu
def test_dynamic_image_several_inputs_and_outputs(tmp_path: pathlib.Path) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Adder2d(3, 4, 3, padding=1), Adder2d(5, 4, 1, bias=True)

        def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.a(x)
            return y, y + self.b(z), F.relu(z)

    torch.manual_seed(0)
    model, axes = Several().cuda().eval(), {0: "batch", 2: "height", 3: "width"}
    args = tuple(torch.randn(2, c, 9, 8, device="cuda") for c in (3, 5))
    path = export_onnx(model, args, tmp_path / "model.onnx", axes, input_names=["x", "z"], check=CHECK)
    ranges = {"batch": (1, 2, 5), "height": (4, 9, 20), "width": (3, 8, 30)}
    runner = Engine(build_engine(path, tmp_path / "model.plan", ranges))
    assert runner.input_names == ["x", "z"] and len(runner.output_names) == 3
    for batch, height, width in ((1, 4, 3), (5, 20, 30), (2, 9, 8)):
        x, z = (torch.randn(batch, c, height, width, device="cuda") for c in (3, 5))
        for strided in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            for outputs in (runner(strided, z), runner(z=z, x=strided)):
                for a, b in zip(outputs, model(x, z), strict=True):
                    torch.testing.assert_close(a, b.detach(), rtol=4e-6, atol=4e-6)  # as in test_torch2trt_engines.py
    for call, message in (
        (lambda: runner(x), "the engine takes x, z, got input 0"),
        (lambda: runner(x, z, z), "got input 0, input 1, input 2"),
        (lambda: runner(x, y=z), "got input 0, y"),
        (lambda: runner(x.half(), z), r"input 'x' of the engine is torch\.float32, got torch\.float16"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for call, message in (
        (lambda: runner(x.cpu(), z), "input 'x' is on cpu, the engine on cuda:0"),
        (lambda: runner(x[:, :2], z), r"input 'x' is \[2, 2, 9, 8\], but the engine was built for \[1, 3, 4, 3\] to"),
        (lambda: runner(x[..., :2], z), "build it with other ranges"),
        (lambda: runner(x[0], z), r"input 'x' is \[3, 9, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@on_gpu
def test_inputs_live_until_they_are_read(tmp_path: pathlib.Path) -> None:
    """A contiguous copy of a strided input may not become the output's memory."""
    torch.manual_seed(0)
    model = nn.Sequential(Adder2d(8, 8, 3, padding=1), nn.ReLU(), Adder2d(8, 8, 3, padding=1)).cuda().eval()
    runner = Engine(build(model, torch.randn(2, 8, 32, 32, device="cuda"), tmp_path))
    inputs = [torch.randn(16, 32, 32, 8, device="cuda").permute(0, 3, 1, 2) for _ in range(30)]
    outputs = [runner(x) for x in inputs]  # nothing waits
    for x, y in zip(inputs, outputs):
        torch.testing.assert_close(y, model(x).detach(), rtol=1e-5, atol=1e-4)


@on_gpu
def test_cuda_graph(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = calibrated_on_gpu(resnet20(), 32, 3, 32, 32)
    plan = build(model, torch.randn(2, 3, 32, 32, device="cuda"), tmp_path)
    recorded, plain = Engine(plan, cuda_graph=True), Engine(plan)
    kept = []
    for batch in (1, 1, 1, 3, 1, 64, 64, 3, 3, 3, 1):
        x = torch.randn(batch, 3, 32, 32, device="cuda")
        kept.append((recorded(x), plain(x)))
        check(recorded, model, x)
        assert recorded._graph is not None  # check has called it with the same shape
    for a, b in kept:  # results of earlier replays stay as they were
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    recorded.cuda_graph = False
    check(recorded, model, x)
    assert recorded._graph is None


@on_gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_calls_on_several_streams(cuda_graph: bool, tmp_path: pathlib.Path) -> None:
    """One context's memory serves all of them."""
    torch.manual_seed(0)
    model = calibrated_on_gpu(resnet20(), 32, 3, 32, 32)
    runner = Engine(build(model, torch.randn(2, 3, 32, 32, device="cuda"), tmp_path), cuda_graph=cuda_graph)
    inputs = [torch.randn(64 if i % 7 else 16, 3, 32, 32, device="cuda") for i in range(40)]
    streams, outputs = [torch.cuda.Stream() for _ in range(3)], []
    torch.cuda.synchronize()
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 3]):
            outputs.append(runner(x))
    torch.cuda.synchronize()
    for x, y in zip(inputs[:8], outputs):
        check(lambda _, y=y: y, model, x)


@on_gpu
def test_half_file(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adder2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Adder2d(16, 8, 3, bias=True))
    model = calibrated_on_gpu(model, 4, 8, 13, 11).half()
    x = torch.randn(4, 8, 13, 11, device="cuda").half()
    check(Engine(build(model, x, tmp_path)), model, x, fp16=True)


@on_gpu
def test_fp16_with_sums_beyond_65504(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adder2d(128, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()).eval()
    x = 300 * torch.randn(2, 128, 14, 14)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()(x)
    model, x = model.eval().cuda(), x.cuda()
    with torch.no_grad():
        assert model[0](x).abs().min() > 65504
    check(Engine(build(model, x, tmp_path, fp16=True)), model, x, fp16=True)


@on_gpu
def test_save_and_load(tmp_path: pathlib.Path) -> None:
    """As a plan in a new process, and as a state_dict with TRTModule's keys."""
    torch.manual_seed(0)
    model, x = calibrated_on_gpu(addernet_mnist(), 32, 1, 28, 28), torch.randn(5, 1, 28, 28, device="cuda")
    plan = build(model, x, tmp_path)
    runner = Engine(plan)
    state = runner.state_dict()
    assert {"engine", "input_names", "output_names"} == set(state)
    other = Engine()
    other.load_state_dict(state)
    assert torch.equal(other(x), runner(x))
    torch.save(x, tmp_path / "x.pt")
    script = """
import sys, torch
from torch2trt_adder.trt.engine import Engine
torch.save(Engine(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])
"""
    done = run_python(script, plan, tmp_path / "x.pt", tmp_path / "y.pt")
    assert done.returncode == 0, done.stderr
    check(lambda _: torch.load(tmp_path / "y.pt"), model, x)


@on_gpu
@pytest.mark.torch2trt
def test_state_dict_goes_into_trtmodule(tmp_path: pathlib.Path) -> None:
    from torch2trt import TRTModule

    torch.manual_seed(0)
    model, x = calibrated_on_gpu(addernet_mnist(), 32, 1, 28, 28), torch.randn(5, 1, 28, 28, device="cuda")
    runner = Engine(build(model, x, tmp_path))
    module = TRTModule()
    module.load_state_dict(runner.state_dict())
    check(module, model, x)
    converted = convert(model, [x], route="torch2trt")
    back = Engine()
    back.load_state_dict(converted.state_dict())
    check(back, model, x)


@on_gpu
@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
def test_convert_through_onnx(fp16: bool) -> None:
    torch.manual_seed(0)
    model, x = calibrated_on_gpu(resnet20(), 32, 3, 32, 32), torch.randn(64, 3, 32, 32, device="cuda")
    runner = convert(model, [x[:8]], route="onnx", max_batch_size=64, fp16_mode=fp16)
    assert runner.route == "onnx" and isinstance(runner, Engine)
    for batch in (1, 64):
        check(runner, model, x[:batch], fp16)


@on_gpu
def test_convert_through_onnx_keeps_the_structure() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Adder2d(3, 4, 3, padding=1), Adder2d(5, 4, 1, bias=True)

        def forward(self, x: Tensor, rest: list[Tensor]) -> dict:
            y = self.a(x)
            return {"first": y, "rest": (y + self.b(rest[0]), F.relu(rest[0]))}

    torch.manual_seed(0)
    model = Several().cuda().eval()
    x, z = torch.randn(2, 3, 7, 6, device="cuda"), torch.randn(2, 5, 7, 6, device="cuda")
    shapes = {"min_shapes": [(1, 3, 7, 6), [(1, 5, 7, 6)]], "max_shapes": [(4, 3, 7, 6), [(4, 5, 7, 6)]]}
    runner = convert(model, [x, [z]], route="onnx", **shapes)
    got, expected = runner(x[:1], [z[:1]]), model(x[:1], [z[:1]])
    assert set(got) == {"first", "rest"} and isinstance(got["rest"], tuple)
    for a, b in zip((got["first"], *got["rest"]), (expected["first"], *expected["rest"])):
        torch.testing.assert_close(a, b.detach(), rtol=4e-6, atol=4e-6)


@on_gpu
def test_auto_says_which_route(capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = calibrated_on_gpu(addernet_mnist(), 8, 1, 28, 28), torch.randn(2, 1, 28, 28, device="cuda")
    runner = convert(model, x)
    obstacle = routes.missing("torch2trt")
    assert runner.route == ("torch2trt" if obstacle is None else "onnx")
    assert f"convert: route {runner.route}" in capsys.readouterr().err


@on_gpu
def test_plan_of_this_machine_only(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt as trt

    torch.manual_seed(0)
    model, x = calibrated_on_gpu(addernet_mnist(), 8, 1, 28, 28), torch.randn(2, 1, 28, 28, device="cuda")
    data = build(model, x, tmp_path).read_bytes()
    assert plans.plan_version(data) == tuple(int(n) for n in trt.__version__.split(".")[:3])
    other = bytearray(data)
    other[25] += 1
    with pytest.raises(RuntimeError, match=r"the engine was built by TensorRT .*the version that built it alone"):
        Engine(bytes(other))
    with pytest.raises(RuntimeError, match="TensorRT .* cannot load the engine: .*build it again"):
        Engine(data[: len(data) // 2])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA T4")
    with pytest.raises(RuntimeError, match="the engine was built for .*here is NVIDIA T4.*build it again"):
        Engine(data)


@on_gpu
def test_timing_cache(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model, x = calibrated_on_gpu(addernet_mnist(), 8, 1, 28, 28), torch.randn(2, 1, 28, 28, device="cuda")
    cache = tmp_path / "timing.cache"
    for _ in range(2):
        check(Engine(build(model, x, tmp_path, timing_cache=cache)), model, x)
        assert cache.stat().st_size > 0


@on_gpu
def test_layers_and_times(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model, x = calibrated_on_gpu(resnet20(), 8, 3, 32, 32), torch.randn(2, 3, 32, 32, device="cuda")
    runner = Engine(build(model, x, tmp_path))
    adders = [layer["name"] for layer in inspection.layers(runner) if layer["adder"]]
    times = inspection.profile(runner, [x])
    assert len(adders) == 20 and "layer1.0.conv1:adder2d_0" in adders
    assert set(adders) <= set(times) and all(time >= 0 for time in times.values())
    assert len(inspection.latencies(runner, [x], runs=8)) == 8
    check(runner, model, x)


def lean_runtime() -> str | None:
    """Why TensorRT here cannot write version-compatible plans; None where it can."""
    import tensorrt as trt

    version = trt.__version__.split(".")
    names = [f"libnvinfer_lean.so.{'.'.join(version[:3])}", f"libnvinfer_lean.so.{version[0]}"]
    # In another process: a lean runtime is not to be in one with the full one.
    missing = [name for name in names if run_python("import ctypes, sys; ctypes.CDLL(sys.argv[1])", name).returncode]
    return f"needs TensorRT's lean runtime, {names[0]}, which is not installed" if missing == names else None


@on_gpu
def test_embedded_plugin(tmp_path: pathlib.Path) -> None:
    """A plan that carries the plugin runs in a process that knows TensorRT alone."""
    torch.manual_seed(0)
    model, x = calibrated_on_gpu(addernet_mnist(), 8, 1, 28, 28), torch.randn(2, 1, 28, 28, device="cuda")
    absent = lean_runtime()
    if absent:
        with pytest.raises(RuntimeError, match=r"lean runtime, too, which is missing here: put libnvinfer_lean\.so\."):
            build(model, x, tmp_path, embed_plugin=True)
        pytest.skip(absent)
    plan = build(model, x, tmp_path, embed_plugin=True)
    assert plan.stat().st_size > library.path().stat().st_size
    torch.save(x, tmp_path / "x.pt")
    script = """
import sys, torch
import tensorrt as trt
x = torch.load(sys.argv[2])
runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
runtime.engine_host_code_allowed = True
engine = runtime.deserialize_cuda_engine(open(sys.argv[1], "rb").read())
context = engine.create_execution_context()
names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
context.set_input_shape(names[0], tuple(x.shape))
y = torch.empty(tuple(context.get_tensor_shape(names[1])), device="cuda")
context.set_tensor_address(names[0], x.data_ptr())
context.set_tensor_address(names[1], y.data_ptr())
assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
torch.cuda.synchronize()
assert "torch2trt_adder" not in sys.modules
torch.save(y, sys.argv[3])
"""
    done = run_python(script, plan, tmp_path / "x.pt", tmp_path / "y.pt")
    assert done.returncode == 0, done.stderr
    check(lambda _: torch.load(tmp_path / "y.pt"), model, x)
    script = """
import sys, torch
from torch2trt_adder.trt.engine import Engine
torch.save(Engine(sys.argv[1], host_code=True)(torch.load(sys.argv[2])), sys.argv[3])
"""
    done = run_python(script, plan, tmp_path / "x.pt", tmp_path / "y.pt")
    assert done.returncode == 0, done.stderr
    check(lambda _: torch.load(tmp_path / "y.pt"), model, x)
