"""The TensorRT plugin: its C interface played by plugin_driver.cpp, real plugin registries, and engines on a GPU."""

import concurrent.futures
import functools
import gc
import importlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, Case
from processes import ROOT, run, run_python
from torch import Tensor

from torch2trt_adder import library
from torch2trt_adder.numerics.definition import assert_forward
from torch2trt_adder.trt import plugin

CPP = ROOT / "tests" / "csrc"
EXPORTS = ("getCreators", "getPluginCreators", "setLoggerFinder", "adder2d_register_plugin")


# ---- the driver


def compiler() -> str:
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))), None)
    if found is None:
        pytest.skip("needs a C++ compiler")
    library.load()  # says how to build it where it is missing
    return found


def compile_cpp(*arguments: object) -> None:
    flags = ["-std=c++17", "-Wall", "-Wno-unknown-warning-option", f"-I{ROOT / 'csrc'}", f"-I{CPP}"]
    built = run(compiler(), *flags, *arguments)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs plugin_driver on the library with the given arguments and returns its last line."""
    program = tmp_path_factory.mktemp("driver") / "plugin_driver"
    compile_cpp("-O1", "-rdynamic", CPP / "plugin_driver.cpp", "-ldl", "-o", program)

    def play(*arguments: object) -> str:
        done = run(program, library.path(), *arguments)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip().splitlines()[-1 if arguments[0] != "offers" else 0]

    return play


def assert_checked(summary: str, at_least: int) -> None:
    count, failed = summary.replace(" checks,", "").removesuffix(" failed").split()
    assert int(failed) == 0 and int(count) >= at_least, summary


def test_exported_symbols() -> None:
    for name in EXPORTS:
        assert hasattr(library.load(), name)


def test_contract_of_both_generations(driver: Callable[..., str]) -> None:
    assert_checked(driver("contract"), 10000)


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_random_cases_under_sanitizers(tmp_path: pathlib.Path) -> None:
    """Whatever TensorRT, an engine's bytes or a caller of the C functions hands over: no crash, no overflow, no wrong answer."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    if run(compiler(), *SANITIZERS, probe, "-o", tmp_path / "probe").returncode != 0:
        pytest.skip("needs a C++ compiler with address and undefined-behaviour sanitizers: apt install g++")
    csrc = ROOT / "csrc"
    plugin_sources = [csrc / "tensorrt" / f"{name}.cpp" for name in ("attributes", "plugin_v2", "plugin_v3")]
    tests = [CPP / "plugin_fuzz.cpp", CPP / "fuzz_functions.cpp"]
    sources = [*tests, csrc / "cpu" / "adder2d_cpu.cpp", csrc / "api" / "check.cpp", *plugin_sources]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(
            pool.map(lambda pair: compile_cpp(*SANITIZERS, "-g1", "-c", pair[0], "-o", pair[1]), zip(sources, objects))
        )
    program, built = tmp_path / "plugin_fuzz", library.path()
    compile_cpp(
        *SANITIZERS, "-rdynamic", *objects, built, f"-Wl,-rpath,{built.parent}", "-ldl", "-pthread", "-o", program
    )
    options = {"ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        [program, "0", "5000"], capture_output=True, text=True, timeout=300, env={**os.environ, **options}
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("torch2trt_adder: ")]  # its refusals
    assert done.returncode == 0 and not errors, "\n".join([done.stdout[-2000:], *errors[:40]])
    assert_checked(done.stdout.strip().splitlines()[-1], 500_000)


@pytest.mark.gpu
def test_enqueue_of_both_generations(driver: Callable[..., str]) -> None:
    assert_checked(driver("gpu"), 500)


# ---- real registries


def _host_libraries() -> dict[str, pathlib.Path]:
    """The TensorRT libraries that pip packages brought, by package."""
    found = {}
    for package in ("tensorrt_rtx_libs", "tensorrt_lean_libs", "tensorrt_libs", "tensorrt"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            for pattern in ("libtensorrt_rtx.so.*", "libnvinfer.so.*", "libnvinfer_lean.so.*"):
                for path in pathlib.Path(folder).glob(pattern):
                    found[package] = path
    return found


HOSTS = _host_libraries()
MODULES = [name for name in ("tensorrt_rtx", "tensorrt_lean", "tensorrt") if importlib.util.find_spec(name)]
NO_REGISTRY = "needs a plugin registry: pip install tensorrt-rtx"


@pytest.fixture(params=HOSTS or [pytest.param("none", marks=pytest.mark.skip(reason=NO_REGISTRY))])
def host(request: pytest.FixtureRequest) -> pathlib.Path:
    return HOSTS[request.param]


@pytest.fixture(params=MODULES or [pytest.param("none", marks=pytest.mark.skip(reason=NO_REGISTRY))])
def trt_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    "steps",
    ["load", "dlopen", "load,dlopen", "dlopen,load", "register", "load,unload,load", "dlopen,load,unload,register"],
)
def test_real_registry_from_cpp(driver: Callable[..., str], host: pathlib.Path, steps: str) -> None:
    """Every way of loading gives a creator whose plugins return the fields they were made from."""
    assert_checked(driver("registry", host, steps), 10000)


@pytest.mark.parametrize(
    "version, count", [(8503, 1), (8600, 1), (9300, 1), (10701, 0), (100000, 0), (110400, 0), (0, 1)]
)
def test_only_tensorrt_8_gets_v2_creators(driver: Callable[..., str], version: int, count: int) -> None:
    assert driver("offers", version) == f"{count} creators"


def test_unknown_caller_beside_newer_tensorrt_gets_no_v2_creators(
    driver: Callable[..., str], host: pathlib.Path
) -> None:
    old = host.name in ("libnvinfer.so.8", "libnvinfer.so.9")
    assert driver("offers", 0, host) == f"{int(old)} creators"


ORDERS = {
    "load": "load",
    "dlopen": "dlopen",
    "load, dlopen": "load dlopen",
    "dlopen, load": "dlopen load",
    "library first": "dlopen-first",
    "library first, load": "dlopen-first load",
}


@pytest.mark.parametrize("steps", ORDERS.values(), ids=ORDERS.keys())
def test_register_after_any_loading(trt_name: str, steps: str) -> None:
    """Whatever loaded the library before, register() ends with a creator, twice in a row."""
    script = """
import ctypes, importlib, sys
from torch2trt_adder import library, plugin
name, *steps = sys.argv[1:]
path = str(library.path())
if steps[0] == "dlopen-first":
    ctypes.CDLL(path)
trt = importlib.import_module(name)
registry = trt.get_plugin_registry()
for step in steps:
    if step == "dlopen":
        ctypes.CDLL(path)
    elif step == "load" and hasattr(registry, "load_library"):
        assert registry.load_library(path) is not None
    assert steps == ["dlopen-first"] or step == "dlopen-first" or plugin._find_creator(registry) is not None, step
plugin.register(trt)
plugin.register(trt)
print(type(plugin.create("layer", 2, (1, 0), 1, 4, trt.float16, trt=trt)).__name__)
"""
    assert run_python(script, trt_name, *steps.split()).strip().splitlines()[-1] in ("IPluginV2", "IPluginV3")


def test_attributes_that_no_layer_can_have(trt_name: str) -> None:
    trt = importlib.import_module(trt_name)
    bad = {"stride": 0, "padding": (0, -1), "dilation": (1, 1, 1), "groups": 0, "output_type": 3}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name) as raised:
            plugin.create("layer", **{name: value}, trt=trt)
        assert str(value) in str(raised.value)


@pytest.mark.parametrize(
    "value", [1.9, "23", "1", True, None, (1.0, 1), 2**31, np.float32(1), np.bool_(True)], ids=repr
)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups", "output_type"])
def test_attributes_that_are_no_integers(trt_name: str, name: str, value: Any) -> None:
    trt = importlib.import_module(trt_name)
    with pytest.raises(ValueError, match=f"adder2d: {name} must be ") as raised:
        plugin.create("layer", trt=trt, **{name: value})
    assert repr(value) in str(raised.value)


def test_numpy_integers_as_attributes(trt_name: str) -> None:
    trt = importlib.import_module(trt_name)
    assert plugin.create("layer", np.int64(2), np.array([1, 0]), [np.int32(1), 1], np.uint8(2), trt.float16, trt=trt)


def test_creator_reports_bad_fields(trt_name: str, capfd: pytest.CaptureFixture) -> None:
    """Other users of the plugin, such as the ONNX parser, pass their fields straight to the creator."""
    trt = importlib.import_module(trt_name)
    plugin.register(trt)
    creator = plugin._find_creator(trt.get_plugin_registry())
    value = np.array([0, 1], np.int32)
    fields = trt.PluginFieldCollection([trt.PluginField("stride", value, trt.PluginFieldType.INT32)])
    phase = [trt.TensorRTPhase.BUILD] if hasattr(trt, "TensorRTPhase") else []
    assert creator.create_plugin("layer", fields, *phase) is None
    assert "torch2trt_adder: stride must be >= 1, got (0, 1)" in capfd.readouterr().err


def test_network_without_plugin_layers() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (-1, 4, -1, 9))
    half_integer = network.add_input("i", trt.int32, (1, 4, 9, 9))
    weight = torch.zeros(8, 4, 3, 3)
    with pytest.raises(ValueError, match=r"needs a weight \[K, 2, R, S\]"):
        plugin.add_adder2d(network, x, weight, groups=2, trt=trt)
    for bad in ({"stride": 1.9}, {"padding": "11"}, {"dilation": 2**31}, {"groups": 1.0}, {"output_type": 0.5}):
        (name,) = bad
        with pytest.raises(ValueError, match=f"adder2d: {name} must be "):
            plugin.add_adder2d(network, x, weight, **bad, trt=trt)
    assert network.num_layers == 0
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        plugin.add_adder2d(network, x, weight, torch.zeros(7), trt=trt)
    with pytest.raises(ValueError, match="does not fit"):
        plugin.add_adder2d(network, x, torch.zeros(8, 4, 1, 11), trt=trt)
    with pytest.raises(ValueError, match="must be float32 or float16"):
        plugin.add_adder2d(network, half_integer, weight, trt=trt)
    with pytest.raises(RuntimeError, match="offer no plugin layers"):
        plugin.add_adder2d(network, x, weight, trt=trt)


BAD_FIELDS = {
    "twice": ({"dilation": [1, 1]}, 2, "field dilation was given twice"),
    "unknown": (
        {"strides": [2, 2]},
        1,
        'the fields stride, padding, dilation, groups, output_type, scale, residual, lower and upper, got "strides"',
    ),
    "too many values": ({"groups": [1, 1]}, 1, "field groups must hold 1 value, got 2"),
}


@pytest.mark.parametrize("values, times, reason", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_creator_reports_malformed_fields(
    trt_name: str, values: dict[str, list[int]], times: int, reason: str, capfd: pytest.CaptureFixture
) -> None:
    """A field that were passed over would give a layer of wrong results."""
    trt = importlib.import_module(trt_name)
    plugin.register(trt)
    creator = plugin._find_creator(trt.get_plugin_registry())
    arrays = {name: np.array(value, np.int32) for name, value in values.items()}  # a PluginField does not own its data
    fields = [trt.PluginField(name, array, trt.PluginFieldType.INT32) for name, array in arrays.items()] * times
    phase = [trt.TensorRTPhase.BUILD] if hasattr(trt, "TensorRTPhase") else []
    assert creator.create_plugin("layer", trt.PluginFieldCollection(fields), *phase) is None
    assert f"torch2trt_adder: {reason}" in capfd.readouterr().err.replace("an Adder2d layer has ", "")


def test_import_without_tensorrt() -> None:
    script = """
import sys
sys.modules["tensorrt"] = None
from torch2trt_adder.trt import plugin
try:
    plugin.register()
except RuntimeError as error:
    print(error)
"""
    assert "pip install tensorrt" in run_python(script)


# ---- engines


@functools.cache
def _logger() -> Any:
    import tensorrt as trt

    return trt.Logger(trt.Logger.WARNING)


def build_engine(
    case: Case,
    weight: Tensor,
    bias: Tensor | None,
    largest_image: tuple[int, int],
    x_dtype: torch.dtype = torch.float32,
    y_dtype: torch.dtype = torch.float32,
) -> bytes:
    """A serialised engine of one adder layer "adder": x [1..8, C, H.., W..] -> y."""
    import tensorrt as trt

    types = {torch.float32: trt.float32, torch.float16: trt.float16}
    builder = trt.Builder(_logger())
    explicit_batch = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit_batch is None else 1 << int(explicit_batch))
    x = network.add_input("x", types[x_dtype], (-1, case.C, -1, -1))
    layer = plugin.add_adder2d(network, x, weight, bias, *case.geometry, types[y_dtype], "adder")
    y = layer.get_output(0)
    y.name = "y"
    network.mark_output(y)
    if hasattr(trt.BuilderFlag, "FP16"):
        y.dtype = types[y_dtype]  # weakly typed networks give float32 outputs unless told; strongly typed ones know
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if torch.float16 in (x_dtype, y_dtype) and hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    image = (case.H, case.W)
    profile.set_shape("x", (1, case.C, *image), (4, case.C, *image), (8, case.C, *largest_image))
    config.add_optimization_profile(profile)
    del weight, bias
    gc.collect()  # the network must have kept its own weights
    serialized = builder.build_serialized_network(network, config)
    assert serialized is not None, "TensorRT built no engine"
    return bytes(serialized)


class Engine:
    """A deserialised engine with one context; run() only enqueues."""

    def __init__(self, serialized: bytes) -> None:
        import tensorrt as trt

        plugin.register()
        self.runtime = trt.Runtime(_logger())
        self.engine = self.runtime.deserialize_cuda_engine(serialized)
        assert self.engine is not None, "TensorRT could not read the engine"
        self.dtype = {trt.float32: torch.float32, trt.float16: torch.float16}[self.engine.get_tensor_dtype("y")]
        self.context = self.engine.create_execution_context()

    def run(self, x: Tensor, stream: torch.cuda.Stream) -> Tensor:
        assert self.context.set_input_shape("x", tuple(x.shape))
        y = torch.full(tuple(self.context.get_tensor_shape("y")), torch.nan, dtype=self.dtype, device=x.device)
        stream.wait_stream(torch.cuda.current_stream())
        assert self.context.set_tensor_address("x", x.data_ptr())
        assert self.context.set_tensor_address("y", y.data_ptr())
        assert self.context.execute_async_v3(stream.cuda_stream)
        return y

    def layers(self) -> list[str]:
        import tensorrt as trt

        text = self.engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)
        return [line for line in text.splitlines() if line.strip()]


ENGINE_CASES = [
    c
    for c in CASES
    if c.name in ("first_layer", "stride_two", "per_axis", "depthwise_multiplier", "one_filter", "wide")
]
TYPES = [(x, y) for x in (torch.float32, torch.float16) for y in (torch.float32, torch.float16)]


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("x_dtype, y_dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", ENGINE_CASES, ids=lambda case: case.name)
def test_engine(case: Case, x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    """Any batch and image of the profile, against float64; y has the type asked for, and the weights no reformat."""
    _, weight, bias = case.tensors()
    largest = (case.H + 6, case.W + 11)
    engine = Engine(build_engine(case, weight, bias, largest, x_dtype, y_dtype))
    assert engine.dtype is y_dtype
    reformats = [line for line in engine.layers() if "reformat" in line.lower()]
    if (x_dtype, y_dtype) == (torch.float32, torch.float32):
        assert not reformats, reformats
    assert not [line for line in reformats if "weight" in line or "bias" in line], reformats

    stream = torch.cuda.Stream()
    for N, H, W in ((1, case.H, case.W), (8, *largest), (3, case.H + 5, case.W + 2), (1, *largest)):
        x = torch.randn(N, case.C, H, W, generator=torch.Generator().manual_seed(N)).to("cuda", x_dtype)
        y = engine.run(x, stream)
        stream.synchronize()
        assert y.dtype is y_dtype
        assert_forward(y.cpu(), x.cpu(), weight, bias, case.geometry)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_engine_without_bias_keeps_sums_beyond_float16() -> None:
    """A wide float16 layer with its default output: sums of about 92 000 come out as they are."""
    case = next(c for c in CASES if c.name == "wide")
    _, weight, _ = case.tensors()
    weight -= 20
    engine = Engine(build_engine(case, weight, None, (case.H, case.W), torch.float16))
    x = torch.randn(2, case.C, case.H, case.W).to("cuda", torch.float16)
    stream = torch.cuda.Stream()
    y = engine.run(x, stream)
    stream.synchronize()
    assert y.dtype is torch.float32 and y.min() < -65504
    assert_forward(y.cpu(), x.cpu(), weight, None, case.geometry)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_two_engines_on_two_streams_at_once() -> None:
    cases = [c for c in CASES if c.name in ("three_by_three", "stride_two")]
    engines, weights, streams = [], [], [torch.cuda.Stream() for _ in cases]
    for case in cases:
        _, weight, bias = case.tensors()
        weights.append((weight, bias))
        engines.append(Engine(build_engine(case, weight, bias, (case.H + 40, case.W + 40))))
    inputs = [
        [torch.randn(1 + i % 8, c.C, c.H + 5 * (i % 8), c.W + 4 * (i % 9), device="cuda") for i in range(24)]
        for c in cases
    ]
    torch.cuda.synchronize()
    outputs = [[], []]
    for pair in zip(*inputs):  # nothing waits: both streams fill up
        for which, x in enumerate(pair):
            outputs[which].append(engines[which].run(x, streams[which]))
    torch.cuda.synchronize()
    for which, case in enumerate(cases):
        for x, y in zip(inputs[which], outputs[which]):
            assert_forward(y.cpu(), x.cpu(), *weights[which], case.geometry)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_engine_in_a_new_process(tmp_path: pathlib.Path) -> None:
    """A saved engine runs after register() alone, and repeats its result to the bit."""
    case = next(c for c in CASES if c.name == "per_axis")
    x, weight, bias = case.tensors()
    serialized = build_engine(case, weight, bias, (case.H, case.W))
    stream = torch.cuda.Stream()
    y = Engine(serialized).run(x.cuda(), stream)
    stream.synchronize()
    (tmp_path / "engine.plan").write_bytes(serialized)
    torch.save((x, y.cpu()), tmp_path / "tensors.pt")
    script = """
import pathlib, sys
import torch
folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from test_plugin import Engine
x, expected = torch.load(folder / "tensors.pt")
engine = Engine((folder / "engine.plan").read_bytes())
stream = torch.cuda.Stream()
y = engine.run(x.cuda(), stream)
stream.synchronize()
print(torch.equal(y.cpu(), expected))
"""
    assert run_python(script, tmp_path, pathlib.Path(__file__).parent).strip().splitlines()[-1] == "True"


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_builder_refuses_tensors_that_do_not_fit() -> None:
    """Past the checks of add_adder2d, as from an ONNX file: no engine, a reason on stderr, and the process lives on."""
    script = """
import numpy as np, torch
import tensorrt as trt
from torch2trt_adder.trt import plugin
torch.cuda.init()
builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
explicit_batch = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
network = builder.create_network(0 if explicit_batch is None else 1 << int(explicit_batch))
x = network.add_input("x", trt.float32, (2, 4, 8, 8))
arrays = [np.zeros((5, 3, 3, 3), np.float32), np.zeros(5, np.float32)]
tensors = [x] + [network.add_constant(a.shape, trt.Weights(a)).get_output(0) for a in arrays]
made = plugin.create("layer")
layer = network.add_plugin_v3(tensors, [], made) if hasattr(network, "add_plugin_v3") else network.add_plugin_v2(tensors, made)
if layer is not None:
    network.mark_output(layer.get_output(0))
print("engine:", layer and builder.build_serialized_network(network, builder.create_builder_config()))
"""
    done = run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "engine: None"
    assert "torch2trt_adder: x has 4 channels, but weight wants 3 in each of 1 groups" in done.stderr
