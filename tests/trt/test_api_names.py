"""Every name of TensorRT's Python API that the package uses exists in TensorRT 8.6, 10.3, 10.16, 11.1 and 11.4.

The real bindings of each version come from the package index, a few MB each. They need TensorRT's libraries, which take
gigabytes and a GPU; a stub with the same symbols lets them be imported and asked for names, and nothing more.
"""

import ast
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import torch2trt_adder

PACKAGE = pathlib.Path(torch2trt_adder.__file__).parent
BINDINGS = {
    "8.6": "tensorrt-bindings==8.6.1",
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",
    "11.1": "tensorrt-cu13-bindings==11.1.0.106",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}

# What the package uses of TensorRT's objects, by class. Names of the module itself are found in the source.
MEMBERS = {
    "Builder": ["create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"],
    "IBuilderConfig": [
        "add_optimization_profile", "create_timing_cache", "get_timing_cache", "plugins_to_serialize", "profiling_verbosity",
        "progress_monitor", "set_flag", "set_memory_pool_limit", "set_timing_cache",
    ],
    "IOptimizationProfile": ["set_shape"],
    "ITimingCache": ["serialize"],
    "INetworkDefinition": [
        "add_cast", "add_constant", "add_plugin_v2", "add_plugin_v3", "get_input", "get_layer", "mark_output", "name",
        "num_inputs", "num_layers",
    ],
    "ILayer": ["get_input", "get_output", "name", "num_inputs", "num_outputs", "precision", "set_output_type", "type"],
    "ITensor": ["dtype", "location", "name", "shape"],
    "OnnxParser": ["get_error", "num_errors", "parse"],
    "ParserError": ["desc", "node", "node_name", "node_operator"],
    "ILogger": ["log"],
    "IPluginRegistry": ["get_creator", "get_plugin_creator", "load_library"],
    "Runtime": ["deserialize_cuda_engine", "engine_host_code_allowed"],
    "ICudaEngine": [
        "create_engine_inspector", "create_execution_context", "get_tensor_dtype", "get_tensor_format",
        "get_tensor_location", "get_tensor_mode", "get_tensor_name", "get_tensor_profile_shape", "get_tensor_shape", "name",
        "num_io_tensors", "serialize",
    ],
    "IExecutionContext": ["execute_async_v3", "get_tensor_shape", "profiler", "set_input_shape", "set_tensor_address"],
    "EngineInspector": ["get_engine_information"],
    "IProfiler": ["report_layer_time"],
    "IProgressMonitor": ["phase_finish", "phase_start", "step_complete"],
}  # fmt: skip

# Names that some version lacks; the package asks for each with hasattr or getattr, or stands behind such a question.
UP_TO_10 = {
    "BuilderFlag.FP16", "BuilderFlag.INT8", "BuilderFlag.OBEY_PRECISION_CONSTRAINTS", "CalibrationAlgoType",
    "ILayer.precision", "ILayer.set_output_type", "IPluginRegistry.get_plugin_creator",
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
}  # fmt: skip
UP_TO_8 = {"ResizeMode", "SliceMode"}  # other names of InterpolationMode and SampleMode
SINCE_10 = {
    "INetworkDefinition.add_plugin_v3", "IPluginRegistry.get_creator", "IBuilderConfig.progress_monitor", "IProgressMonitor",
    "IProgressMonitor.phase_finish", "IProgressMonitor.phase_start", "IProgressMonitor.step_complete",
    "LayerType.PLUGIN_V3", "ParserError.node_name", "ParserError.node_operator", "TensorRTPhase", "TensorRTPhase.BUILD",
}  # fmt: skip
NOT_OF_TENSORRT = {"__name__", "__version__"}


def names_in_source() -> set[str]:
    """``X`` and ``X.Y`` of every ``trt.X.Y``, and of hasattr(trt.X, "Y") and getattr(trt.X, "Y")."""
    found = set()

    def path(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name) and node.id == "trt":
            return ""
        if isinstance(node, ast.Attribute):
            owner = path(node.value)
            if owner is not None:
                return f"{owner}.{node.attr}".strip(".")
            return (
                "" if node.attr == "_trt" and isinstance(node.value, ast.Name) and node.value.id == "engine" else None
            )
        return None

    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = path(node)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                owner = path(node.args[0])
                if owner is not None and isinstance(node.args[1], ast.Constant):
                    name = f"{owner}.{node.args[1].value}".strip(".")
            if name:
                found.add(name)
    return {name for name in found if not name.endswith("__init__") and name.partition(".")[0] not in NOT_OF_TENSORRT}


def test_the_table_is_about_this_source() -> None:
    """Every member of the table is used, and the scan of the source finds what it should."""
    source = "\n".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    idle = [f"{owner}.{name}" for owner, names in MEMBERS.items() for name in names if name not in source]
    assert not idle
    found = names_in_source()
    assert {
        "BuilderFlag.FP16",
        "OnnxParser",
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
        "TensorIOMode.INPUT",
    } <= found
    assert "LayerInformationFormat.JSON" in found and "IProgressMonitor" in found


# Runs in a process of its own: one process takes one set of bindings.
PROBE = """
import ctypes, importlib.util, json, pathlib, subprocess, sys
folder, names = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
bindings = folder / "tensorrt_bindings" / "tensorrt.so"

def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

needed = [line.split("[")[1].rstrip("]") for line in output("readelf", "-d", bindings).splitlines() if "(NEEDED)" in line]
needed = [name for name in needed if name.startswith("libnv")]
undefined = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", bindings).splitlines()]
undefined = [name for name in undefined if "@" not in name and not name.startswith(("Py", "_Py", "__", "_ITM"))]
ours = [name for name in undefined if not name.startswith("_Z") or name.startswith("_ZN") and "nv" in name[:8]]
(folder / "stub.c").write_text("".join(f"void* {name}(void) {{ return 0; }}\\n" for name in ours))
for i, name in enumerate(needed):
    source = [folder / "stub.c"] if i == 0 else ["-x", "c", "/dev/null"]
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", *source, "-o", folder / name], check=True)
    ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("tensorrt", bindings)
trt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trt)

def exists(name):
    value = trt
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True

print(json.dumps({name: exists(name) for name in names}))
"""


@pytest.fixture(scope="module", params=BINDINGS)
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    for tool in ("gcc", "nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}, to make the stub")
    folder = tmp_path_factory.mktemp("bindings")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--target",
        str(folder),
    ]
    done = subprocess.run([*command, BINDINGS[request.param]], check=False, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"pip has no {BINDINGS[request.param]} for this Python here: {last}")
    return request.param, folder


def test_names(version: tuple[str, pathlib.Path]) -> None:
    number, folder = version
    names = names_in_source() | {f"{owner}.{name}" for owner, names in MEMBERS.items() for name in names}
    names |= UP_TO_8 | UP_TO_10 | SINCE_10 | {owner for owner in MEMBERS if owner not in ("IProgressMonitor",)}
    command = [sys.executable, "-c", PROBE, folder, json.dumps(sorted(names))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    exists = json.loads(done.stdout)
    major = int(number.partition(".")[0])
    absent = {name for name, there in exists.items() if not there}
    expected = (
        (UP_TO_8 if major >= 10 else set()) | (UP_TO_10 if major >= 11 else set()) | (SINCE_10 if major < 10 else set())
    )
    assert absent == expected, f"unexpected: {sorted(absent - expected)}, back again: {sorted(expected - absent)}"
