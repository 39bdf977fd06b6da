"""From an ONNX file to a TensorRT engine, and the module that runs it. Neither needs torch2trt.

    build_engine("model.onnx", "model.plan", {"batch": (1, 8, 64)})
    model_trt = Engine("model.plan")
    y = model_trt(x)

One code for TensorRT 8.6 to 11; what differs between versions is asked for by name where it is used:

* Precision. Up to 10 a network is weakly typed: BuilderFlag.FP16 lets TensorRT choose, and the layers behind an adder
  layer are held in float32 (`hold_float32`). From 11 a network has the types of its file: `to_float16` puts them there.
* Local functions. 9.0 to 10.6 prefer the body of Adder2d to the plugin; so the body never reaches the parser, and a
  missing plugin is an error in every version.
* Progress. IProgressMonitor came with 9.0.
"""

import contextlib
import functools
import json
import numbers
import pathlib
import re
import struct
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import files, interrupts, library, onnx_nodes, plugin
from .onnx_nodes import DOMAIN, OP_TYPE, adder_nodes, extents
from .progress import elapsed

Range = tuple[int, int, int]

# ---- build


def build_engine(
    onnx_path: str | pathlib.Path,
    engine_path: str | pathlib.Path,
    ranges: Mapping[str, Range] | None = None,
    *,
    fp16: bool = False,
    workspace: int | None = None,
    timing_cache: str | pathlib.Path | None = None,
    embed_plugin: bool = False,
    progress: bool = True,
    verbose: bool = False,
    trt: ModuleType | None = None,
) -> pathlib.Path:
    """Builds a TensorRT engine (a plan) for the GPU of this machine and writes it to `engine_path`.

    Every Adder2d node of the file must have become a plugin layer; TensorRT itself would take a node's body without a
    word.

    Args:
        onnx_path: written by `export_onnx`, or any other ONNX file.
        engine_path: written beside and renamed.
        ranges: (smallest, most frequent, largest) extent of each dynamic axis, by its name in the file
            (``{"batch": (1, 8, 64)}``), or by input and axis (``{"x:0": (1, 8, 64)}``).
        fp16: float16 where TensorRT deems it faster, but never for the sums of adder layers. Inputs and outputs keep the
            types of the file. A file in float16 needs no such flag.
        workspace: bytes of scratch memory that the engine may take; TensorRT's default, all there is, where None.
        timing_cache: a file of measured kernels that makes the next build faster; read if it is there, then written.
        embed_plugin: put the plugin library into the plan (TensorRT's plugins_to_serialize, as a version-compatible
            plan, for which TensorRT needs its libnvinfer_lean): `Engine(..., host_code=True)`, trtexec or Triton run it
            without this package.
        progress: show it on stderr, from the second second on.
        verbose: TensorRT's whole log on stderr.
        trt: the TensorRT module; ``tensorrt`` where None.

    Returns:
        `engine_path`.

    Raises:
        RuntimeError: onnx or TensorRT is missing; TensorRT refuses the file or builds no engine, with its reasons.
        ValueError: a dynamic axis without a range, a range that is none or beyond what the file holds for, or one for an
            axis that is not there; an Adder2d node that cannot be computed; one path given twice.
        OSError: a file that cannot be read or written, or that holds weights of the ONNX file and is missing.
    """
    onnx_path, engine_path = pathlib.Path(onnx_path), pathlib.Path(engine_path)
    trt = plugin._tensorrt(trt)
    proto = _load_onnx(onnx_path)
    outputs = {"the engine": engine_path}
    if timing_cache is not None:
        outputs["the timing cache"] = pathlib.Path(timing_cache)
    files.check_apart(outputs, input_files(proto, onnx_path))
    for path in outputs.values():
        files.check_writable(path)
    if fp16 and not hasattr(trt.BuilderFlag, "FP16"):
        to_float16(proto, onnx_path.parent)
    log = logger(trt)
    log.verbose = verbose
    plugin.register(trt)
    builder, network, _parser = _parse(trt, proto, onnx_path)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what `inspect` shows
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    _set_precision(trt, network, config, proto, fp16)
    _add_profile(builder, network, config, proto, ranges or {})
    if embed_plugin:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.plugins_to_serialize = [str(library.path())]
    network.name = _signature(onnx_path.name, len(adder_nodes(proto.graph)))
    cache = _use_timing_cache(config, timing_cache)

    with _progress(trt, config, f"Building {engine_path.name}", progress):
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        remedy = _lean_runtime(trt) if embed_plugin and (not log.errors or "lean" in log.reasons()) else ""
        reasons = log.reasons().rstrip(".")
        raise RuntimeError(f"TensorRT {trt.__version__} builds no engine of {onnx_path}: {reasons}.{remedy}")
    files.write(engine_path, bytes(serialized))
    if cache is not None:
        files.write(pathlib.Path(timing_cache), bytes(config.get_timing_cache().serialize()))
    return engine_path


def input_files(proto: Any, onnx_path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The ONNX file and those that hold its weights, by what they are."""
    weights = onnx_nodes.external_files(proto, onnx_path.parent)
    return {"the ONNX file": onnx_path, **{f"the file {path.name} of its weights": path for path in weights}}


def _lean_runtime(trt: ModuleType) -> str:
    """What to do where TensorRT cannot write version-compatible plans: it puts its lean runtime into them."""
    version = ".".join(trt.__version__.split(".")[:3])
    return (
        f" A plan that carries its plugin carries TensorRT's lean runtime, too, which is missing here: put "
        f"libnvinfer_lean.so.{version} of TensorRT's archive or system packages into a directory of LD_LIBRARY_PATH (pip "
        "install tensorrt does not bring it), or build without embed_plugin."
    )


def _load_onnx(path: pathlib.Path) -> Any:
    """The onnx.ModelProto, checked, without the function Adder2d; tensors in other files stay there."""
    try:
        import onnx
    except ImportError as error:
        raise RuntimeError("onnx is not installed: pip install onnx.") from error
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise OSError(f"the ONNX file {path} cannot be read ({error.strerror}).") from error
    except Exception as error:  # protobuf's DecodeError has no public name in all versions
        raise RuntimeError(f"{path} is no ONNX file ({error}).") from error
    if not proto.graph.node:
        raise RuntimeError(f"{path} is no ONNX file: it holds no nodes.")
    for function in [f for f in proto.functions if (f.domain, f.name) == (DOMAIN, OP_TYPE)]:
        proto.functions.remove(function)
    try:
        onnx_nodes.check_external_files(proto, path.parent)
        onnx_nodes.check_nodes(proto)
        extents(proto)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return proto


def _parse(trt: ModuleType, proto: Any, path: pathlib.Path) -> tuple[Any, Any, Any]:
    """Builder, network and parser (whose memory the network's weights are in)."""
    log = logger(trt)
    log.clear()
    builder = trt.Builder(log)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # gone in 11, where it is the only way
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(proto.SerializeToString(), str(path)):
        reasons = "; ".join(_parser_error(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"TensorRT {trt.__version__} cannot read {path}: {reasons or log.reasons()}")
    plugins = sum("PLUGIN" in network.get_layer(i).type.name for i in range(network.num_layers))
    nodes = len(adder_nodes(proto.graph))
    if plugins < nodes:
        raise RuntimeError(
            f"TensorRT {trt.__version__} has made {plugins} plugin layers of the {nodes} Adder2d nodes in {path}: please "
            "report this file."
        )
    return builder, network, parser


def _parser_error(error: Any) -> str:
    if not hasattr(error, "node_operator"):  # TensorRT 8
        return f"{error.desc()} (node {error.node()})"
    return f"{error.desc()} (node {error.node_name()}, operator {error.node_operator()})"


def _axes(proto: Any) -> list[tuple[str, int, str]]:
    """The dynamic axes of the inputs: (input, axis, its name or "")."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    return [
        (entry.name, axis, dim.dim_param)
        for entry in proto.graph.input
        if entry.name not in initializers
        for axis, dim in enumerate(entry.type.tensor_type.shape.dim)
        if not dim.HasField("dim_value") or dim.dim_value < 0
    ]


def _add_profile(builder: Any, network: Any, config: Any, proto: Any, ranges: Mapping[str, Range]) -> None:
    for name, given in ranges.items():
        integers = isinstance(given, Sequence) and len(given) == 3 and all(isinstance(n, numbers.Integral) for n in given)
        if not integers or not 0 <= given[0] <= given[1] <= given[2] or given[2] < 1:
            raise ValueError(
                f"the range of {name!r} must be (smallest, most frequent, largest) in this order, got {given}."
            )
    axes = _axes(proto)
    unknown = set(ranges) - {name for *_, name in axes} - {f"{input}:{axis}" for input, axis, _ in axes}
    if unknown:
        known = ", ".join(sorted({name or f"{input}:{axis}" for input, axis, name in axes})) or "none"
        raise ValueError(f"ranges names {min(unknown)!r}, but the dynamic axes of the file are: {known}.")
    if not axes:
        return
    limits, ranges_of = extents(proto), defaultdict[str, dict[int, Range]](dict)
    for input, axis, name in axes:
        given = ranges.get(f"{input}:{axis}", ranges.get(name))
        if given is None:
            key = name or f"{input}:{axis}"
            raise ValueError(
                f"axis {axis} of input {input!r} is dynamic: give its range, as in ranges={{{key!r}: (1, 8, 64)}} (on "
                f"the command line --range {key}=1:8:64)."
            )
        least, most = limits.get(name, (0, None))
        if given[0] < least or most is not None and given[2] > most:
            raise ValueError(
                f"axis {axis} of input {input!r} ({name}) may be {least} to {most or 'any'}, got the range {tuple(given)}: the "
                "network's code does something else beyond, which the file does not hold; export it with an example there."
            )
        ranges_of[input][axis] = tuple(int(extent) for extent in given)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        itensor = network.get_input(i)
        if itensor.name in ranges_of:
            dynamic = ranges_of[itensor.name]
            fixed = tuple(itensor.shape)
            profile.set_shape(
                itensor.name,
                *(tuple(dynamic[a][j] if a in dynamic else fixed[a] for a in range(len(fixed))) for j in range(3)),
            )
    config.add_optimization_profile(profile)


def _use_timing_cache(config: Any, path: str | pathlib.Path | None) -> Any:
    if path is None:
        return None
    path = pathlib.Path(path)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        # Of another GPU or version, or none at all: the build starts anew and replaces it.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


# ---- precision, TensorRT 8 to 10


def _set_precision(trt: ModuleType, network: Any, config: Any, proto: Any, fp16: bool) -> None:
    if not hasattr(trt.BuilderFlag, "FP16"):
        return
    half = 10  # TensorProto.FLOAT16
    in_half = any(tensor.data_type == half for tensor in proto.graph.initializer) or any(
        entry.type.tensor_type.elem_type == half for entry in (*proto.graph.input, *proto.graph.output)
    )
    if fp16 or in_half:
        # A file in float16 needs it, too: without, a plugin is offered no float16 input or output.
        config.set_flag(trt.BuilderFlag.FP16)
    names = [node.name for node in adder_nodes(proto.graph)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = [layer for layer in layers if "PLUGIN" in layer.type.name]
    adders = [layer for layer in plugins if layer.name in names]
    if len(adders) != len(names):  # nodes without names of their own: hold the outputs of all plugins
        adders = plugins
    if fp16 and hold_float32(network, adders, trt=trt):
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)


def hold_float32(
    network: Any, adder_layers: Sequence[Any], largest: Mapping[str, float] | None = None, *, trt: ModuleType
) -> bool:
    """Holds every layer between an adder layer's float32 output and the next scaling layer in float32.

    In a weakly typed network TensorRT may round an adder layer's sums, which pass 65504 in wide layers, to float16 before
    BatchNorm scales them down. The scaling layer (BatchNorm) itself computes in float32, and its output is free, unless
    it is known to be still within a factor of 16 of float16's largest value.

    Args:
        network: of TensorRT 8 to 10.
        adder_layers: its plugin layers Adder2d.
        largest: magnitudes seen, by the name of the tensor.

    Returns:
        Whether any layer is held, so that BuilderFlag.OBEY_PRECISION_CONSTRAINTS is needed.
    """
    names = ("SCALE", "NORMALIZATION", "SOFTMAX")  # the second is newer than 8.5
    scaling = [getattr(trt.LayerType, name) for name in names if hasattr(trt.LayerType, name)]
    adders = {layer.name for layer in adder_layers}
    consumers = defaultdict(list)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for j in range(layer.num_inputs):
            itensor = layer.get_input(j)
            if itensor is not None:
                consumers[itensor.name].append(layer)
    pending = [layer.get_output(0) for layer in adder_layers]
    pending = [itensor for itensor in pending if itensor.dtype == trt.DataType.FLOAT]
    held: set[str] = set()
    while pending:
        for layer in consumers[pending.pop().name]:
            outputs = {j: layer.get_output(j) for j in range(layer.num_outputs)}
            outputs = {j: t for j, t in outputs.items() if t.dtype in (trt.DataType.FLOAT, trt.DataType.HALF)}
            if layer.name in held or not outputs:  # the shape of a tensor has no range
                continue
            held.add(layer.name)
            layer.precision = trt.DataType.FLOAT
            if layer.name in adders:
                continue
            # The magnitude is unknown for the network's outputs, which nothing reads.
            seen = max((largest or {}).get(t.name, 0) for t in outputs.values())
            if layer.type in scaling and seen <= torch.finfo(torch.float16).max / 16:
                continue
            for j, itensor in outputs.items():
                layer.set_output_type(j, trt.DataType.FLOAT)
                pending.append(itensor)
    return bool(held)


# ---- precision, TensorRT 11

_IN_HALF = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_EITHER = {"Relu", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}


def to_float16(proto: Any, folder: pathlib.Path) -> None:
    """Rewrites a float32 onnx.ModelProto so that convolutions and matrix products compute in float16.

    Adder layers read float16 and sum in float32, which is also the type of their output: it passes 65504. Layers that
    only move values stay in the type that they get; everything else, BatchNorm above all, computes in float32. Inputs,
    outputs and their names stay as they are. `folder` is where the file's external tensors are.
    """
    import onnx

    graph, FLOAT, FLOAT16 = proto.graph, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(proto).graph.value_info  # some exporters write no types
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT}
    floats |= {
        entry.name
        for entry in (*graph.input, *graph.output, *graph.value_info, *inferred)
        if entry.type.tensor_type.elem_type == FLOAT
    }
    nodes: list[Any] = []
    halves: dict[str, str] = {}  # of a float32 tensor: its float16 twin
    made = {entry.name for entry in graph.input} | set(initializers)  # in float32
    outputs = {entry.name for entry in graph.output}

    def half(name: str) -> str:
        if name not in halves:
            halves[name] = f"{name}.float16"
            if name in initializers:
                array = onnx.numpy_helper.to_array(initializers[name], str(folder)).astype(np.float16)
                graph.initializer.append(onnx.numpy_helper.from_array(array, halves[name]))
            else:
                nodes.append(onnx.helper.make_node("Cast", [name], [halves[name]], f"{name}:to_float16", to=FLOAT16))
        return halves[name]

    def single(name: str) -> None:
        if name in halves and name not in made:
            made.add(name)
            nodes.append(onnx.helper.make_node("Cast", [halves[name]], [name], f"{name}:to_float32", to=FLOAT))

    def captured(node: Any) -> Iterator[str]:
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                for inner in subgraph.node:
                    yield from inner.input
                    yield from captured(inner)
                yield from (entry.name for entry in subgraph.output)

    for original in graph.node:
        node = type(original)()
        node.CopyFrom(original)
        adder = (node.domain, node.op_type) == (DOMAIN, OP_TYPE)
        standard = node.domain in ("", "ai.onnx") and node.output[0] in floats
        in_half = standard and node.op_type in _IN_HALF and all(not name or name in floats for name in node.input)
        moves = standard and node.op_type in _EITHER and len(node.output) == 1 and node.input[0] in halves
        if in_half or (moves and node.input[0] not in made):
            for i, name in enumerate(node.input):
                if name in floats:
                    node.input[i] = half(name)
            name = node.output[0]
            halves[name] = node.output[0] = f"{name}.float16"
            nodes.append(node)
            if name in outputs:
                single(name)
            continue
        for i, name in enumerate(node.input):
            if adder and i == 0 and name in floats:
                node.input[i] = half(name)
            else:
                single(name)
        for name in captured(node):
            single(name)
        made.update(node.output)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in (*node.input, *captured(node))} | outputs
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]  # the types of what lies between have changed


# ---- TensorRT's log, and progress


@functools.cache
def logger(trt: ModuleType) -> Any:
    """The one logger of this process and TensorRT module: keeps errors for exceptions, shows all if `verbose`."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.verbose = False
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message.strip())
            if self.verbose:
                tqdm.write(f"[TensorRT {severity.name}] {message}", file=sys.stderr)

        def clear(self) -> None:
            self.errors.clear()

        def reasons(self) -> str:
            """The errors since `clear`, the last ones, as part of a sentence."""
            return "; ".join(dict.fromkeys(self.errors[-4:])) or "its log gives no reason."

    return Logger()


@contextlib.contextmanager
def _progress(trt: ModuleType, config: Any, title: str, enabled: bool) -> Iterator[None]:
    """A bar of TensorRT's outer phases where it reports them, and the time in any case."""
    if not enabled:
        yield
        return
    with elapsed(title) as bar:
        if not hasattr(trt, "IProgressMonitor"):
            yield
            return

        class Monitor(trt.IProgressMonitor):
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self.outer: str | None = None
                self.interrupted = False

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                if not parent:
                    self.outer = phase
                    bar.phase(phase, steps)

            def step_complete(self, phase: str, step: int) -> bool:
                if phase == self.outer:
                    bar.step()
                return not self.interrupted  # False cancels the build

            def phase_finish(self, phase: str) -> None:
                if phase == self.outer:
                    self.outer = None

        config.progress_monitor = monitor = Monitor()
        with interrupts.on_ctrl_c(lambda: setattr(monitor, "interrupted", True)):
            yield
        if monitor.interrupted:
            raise KeyboardInterrupt


# ---- what a plan says about itself

_SIGNATURE = re.compile(r"(?P<source>.*) \[torch2trt_adder, (?P<adders>\d+) Adder2d, (?P<gpu>.*)\]")
_PLAN_TAGS = (b"ftrt", b"vtrt")  # TensorRT, TensorRT for RTX


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _signature(source: str, adders: int) -> str:
    """The engine's name, which travels in the plan."""
    return f"{source} [torch2trt_adder, {adders} Adder2d, {_gpu()}]"


def plan_version(plan: bytes) -> tuple[int, int, int] | None:
    """The TensorRT version that wrote a plan, from its header (as `trtexec --getPlanVersionOnly` reads it).

    None where the header is of a kind that trtexec does not know either.

    Raises:
        ValueError: this is no plan.
    """
    if len(plan) < 28 or plan[:4] not in _PLAN_TAGS:
        raise ValueError("no TensorRT engine")
    if struct.unpack_from("<I", plan, 4)[0] != 0:
        return None
    return plan[24], plan[25], plan[26]


def _read_plan(path: pathlib.Path) -> bytes:
    """Raises an OSError of the class of the failure, FileNotFoundError above all."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise type(error)(f"the engine {path} cannot be read ({error.strerror}).") from error


def _not_a_plan(data: bytes) -> str:
    """What else than a plan some bytes are, and what to do, as the end of a sentence."""
    again = "build it again on this machine (torch2trt-adder build)"
    if not data:
        return f"empty: {again}"
    if data[:1] == b"\x08" and data[2:3] in (b"\x12", b"\x1a", b"\x3a"):  # a ModelProto's ir_version, then the next field
        return "an ONNX file: make an engine of it with build_engine (torch2trt-adder build)"
    return f"no TensorRT engine: {again}"


def _cut_off(plan: bytes) -> str | None:
    """How much of a plan is missing by the size in its header, as part of a sentence; None where nothing is."""
    size = struct.unpack_from("<Q", plan, 16)[0]
    if struct.unpack_from("<I", plan, 4)[0] != 0 or len(plan) >= size:
        return None
    return f"is cut off: it has {len(plan)} of {size} bytes; copy or build it again"


def _deserialize(trt: ModuleType, plan: bytes, source: str, host_code: bool) -> tuple[Any, Any]:
    """Runtime and engine, or the reason why not."""
    remedy = "build it again on this machine (torch2trt-adder build)"
    try:
        version = plan_version(plan)
    except ValueError as error:
        raise RuntimeError(f"{source} is {_not_a_plan(plan)}.") from error
    cut_off = _cut_off(plan)
    if cut_off and plan.startswith(b"vtrt"):
        raise RuntimeError(f"{source} {cut_off}.")
    here = tuple(int(n) for n in re.findall(r"\d+", trt.__version__)[:3])
    if version not in (None, here) and not host_code:
        raise RuntimeError(
            f"{source} was built by TensorRT {'.'.join(map(str, version))}, here is {trt.__version__}: an engine runs in "
            f"the version that built it alone; {remedy}, or pass host_code=True (--host-code) if it is version-compatible."
        )
    if not torch.cuda.is_available():
        raise RuntimeError(f"{source} needs an NVIDIA GPU, and torch {torch.__version__} finds none here.")
    log = logger(trt)
    log.clear()
    if not host_code:  # a plan that carries the plugin registers it itself
        plugin.register(trt)
    torch.cuda.init()
    runtime = trt.Runtime(log)
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None and cut_off:
        raise RuntimeError(f"{source} {cut_off}.")
    if engine is None:
        raise RuntimeError(
            f"TensorRT {trt.__version__} on {_gpu()} cannot load {source}: {log.reasons()}; {remedy}, or pass host_code=True "
            "(--host-code) if it is version-compatible."
        )
    signature = _SIGNATURE.fullmatch(engine.name)
    if signature and signature["gpu"] != _gpu():
        raise RuntimeError(
            f"{source} was built for {signature['gpu']}, here is {_gpu()}: an engine's kernels are chosen for one kind of "
            f"GPU; {remedy}."
        )
    return runtime, engine


# ---- run


class Engine(nn.Module):
    """A TensorRT engine as a PyTorch module, called like torch2trt's TRTModule; it needs TensorRT alone.

    ``engine(x)`` takes CUDA tensors in the order of `input_names` (or by name), of any batch and size within the first
    profile, contiguous or not, and returns new tensors: one, or a tuple in the order of `output_names`. It runs on
    torch's current stream and does not wait for the GPU; calls on several streams follow one another. ``state_dict()``
    has TRTModule's keys.

    Args:
        plan: a file, or its contents; None for an empty module that `load_state_dict` fills.
        cuda_graph: record the launches when shapes come a second time, and replay them as long as shapes stay the same.
        host_code: allow the plan to bring its own code: version-compatible plans, and plans with an embedded plugin.
            Only for plans from a source that you trust.
        trt: the TensorRT module; ``tensorrt`` where None.

    Raises:
        RuntimeError: no GPU or TensorRT; a plan of another TensorRT version or GPU, or none at all.
        FileNotFoundError: the file is not there.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        plan: str | pathlib.Path | bytes | None = None,
        cuda_graph: bool = False,
        host_code: bool = False,
        trt: ModuleType | None = None,
    ) -> None:
        super().__init__()
        self._trt, self._host_code, self.cuda_graph = trt, host_code, cuda_graph
        self.engine: Any = None
        self.context: Any = None
        self.input_names: list[str] = []
        self.output_names: list[str] = []
        if isinstance(plan, (bytes, bytearray, memoryview)):
            self._load(bytes(plan), "the engine")
        elif plan is not None:
            self._load(_read_plan(pathlib.Path(plan)), str(plan))

    def _load(self, plan: bytes, source: str) -> None:
        trt = self._trt = plugin._tensorrt(self._trt)
        self._runtime, self.engine = _deserialize(trt, plan, source, self._host_code)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.input_names, self.output_names = inputs, [n for n in names if n not in inputs]
        self._dtypes = {name: _torch_dtype(trt, self.engine.get_tensor_dtype(name), name) for name in names}
        for name in names:
            where, layout = self.engine.get_tensor_location(name), self.engine.get_tensor_format(name)
            if where != trt.TensorLocation.DEVICE:
                raise RuntimeError(f"{source}: tensor {name!r} is a shape on the CPU, which this module cannot pass.")
            if layout != trt.TensorFormat.LINEAR:
                raise RuntimeError(
                    f"{source}: tensor {name!r} has the layout {layout.name}, torch's tensors are LINEAR; build it with "
                    "linear inputs and outputs."
                )
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._profile = {name: self._range(name) for name in inputs}
        self._lock = threading.Lock()  # a context serves one call at a time, on one stream
        self._stream: torch.cuda.Stream | None = None
        self._renew_context()

    def _range(self, name: str) -> list[tuple[int, ...]]:
        """Smallest, most frequent and largest shape of an input."""
        fixed = tuple(self.engine.get_tensor_shape(name))
        return [fixed] * 3 if -1 not in fixed else [tuple(s) for s in self.engine.get_tensor_profile_shape(name, 0)]

    def _renew_context(self) -> None:
        # There is only ever one: before TensorRT 10 two contexts cannot have one profile, so the old one goes first.
        self._graph: _Graph | None = None
        self._shapes: tuple | None = None  # of the last run
        self.context = None
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise RuntimeError(f"TensorRT has no memory for this engine: {logger(self._trt).reasons()}")

    @property
    def adder_layers(self) -> int | None:
        """How many Adder2d layers the plan was built with, where `build_engine` built it."""
        signature = _SIGNATURE.fullmatch(self.engine.name)
        return int(signature["adders"]) if signature else None

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.engine is None:
            raise RuntimeError("this Engine is empty: give it a plan, or load_state_dict.")
        tensors = self._check(inputs, named)
        with torch.cuda.device(self._device), self._lock:
            self._follow()
            outputs = self._replay(tensors) if self.cuda_graph else self._run(tensors)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _check(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
        given = dict(zip(self.input_names, inputs))
        if len(inputs) > len(self.input_names) or set(given) & set(named) or {*given, *named} != set(self.input_names):
            got = [*(f"input {i}" for i in range(len(inputs))), *named]
            raise TypeError(f"the engine takes {', '.join(self.input_names)}, got {', '.join(got) or 'nothing'}.")
        given.update(named)
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor) or tensor.dtype is not self._dtypes[name]:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"input {name!r} of the engine is {self._dtypes[name]}, got {kind}; convert it.")
            if tensor.device != self._device:
                raise ValueError(f"input {name!r} is on {tensor.device}, the engine on {self._device}; move it there.")
            least, _, most = self._profile[name]
            fits = tensor.dim() == len(least) and all(a <= b <= c for a, b, c in zip(least, tensor.shape, most))
            if not fits:
                allowed = list(least) if least == most else f"{list(least)} to {list(most)}"
                raise ValueError(
                    f"input {name!r} is {list(tensor.shape)}, but the engine was built for {allowed}; build it with other "
                    "ranges."
                )
        return [given[name].detach().contiguous() for name in self.input_names]

    def _follow(self) -> None:
        """Makes torch's current stream wait for the last call where that was on another: both use the context's memory."""
        stream = torch.cuda.current_stream()
        if self._stream not in (None, stream) and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
        self._stream = stream

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self._graph = None  # a recorded graph ends with the next use of its context
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes != self._shapes:
            self._shapes = None
            for name, shape in zip(self.input_names, shapes):
                if not self.context.set_input_shape(name, shape):
                    raise RuntimeError(f"TensorRT refuses the shape {list(shape)} of {name!r}.")
        outputs = self._allocate()
        self._enqueue(tensors, outputs)
        self._shapes = shapes
        return outputs

    def _allocate(self) -> list[Tensor]:
        """New outputs for the shapes that the context has been told."""
        outputs = []
        for name in self.output_names:
            shape = tuple(self.context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise RuntimeError(
                    f"the size of output {name!r} depends on values, {list(shape)}, which is not supported."
                )
            outputs.append(torch.empty(shape, dtype=self._dtypes[name], device=self._device))
        return outputs

    def _enqueue(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        # The caller holds both until this has returned; later reuse of their memory is ordered by the stream.
        for name, tensor in zip((*self.input_names, *self.output_names), (*tensors, *outputs)):
            if tensor.numel() == 0:  # TensorRT wants an address all the same
                tensor = self._empty
            self.context.set_tensor_address(name, tensor.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"TensorRT could not run the engine: {logger(self._trt).reasons()}")

    @functools.cached_property
    def _empty(self) -> Tensor:
        return torch.empty(256, dtype=torch.uint8, device=self._device)

    def _replay(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        # TensorRT: a graph holds for the shapes and the state of its context alone; executing it after either has changed
        # is undefined. With one context that leaves one graph, which any other use of the context ends. The first call
        # of new shapes runs without a graph: it is the run outside a recording that TensorRT wants after a change, and
        # shapes that alternate cost no recording.
        if tuple(tuple(tensor.shape) for tensor in tensors) != self._shapes:
            return self._run(tensors)
        if self._graph is None:
            self._graph = _Graph(self, tensors)
        return self._graph.replay(tensors)

    # ---- saving, with TRTModule's keys

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.engine is not None:
            destination[f"{prefix}engine"] = bytearray(self.engine.serialize())
            destination[f"{prefix}input_names"] = self.input_names
            destination[f"{prefix}output_names"] = self.output_names

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing: list,
        unexpected: list,
        errors: list,
    ) -> None:
        key = f"{prefix}engine"
        if key not in state_dict:
            missing.append(key)
            return
        self._load(bytes(state_dict[key]), "the engine of the state_dict")
        for what in ("input_names", "output_names"):  # their order is that of the arguments and results
            names = list(state_dict.get(f"{prefix}{what}", ()))
            if sorted(names) == sorted(getattr(self, what)):
                setattr(self, what, names)

    def extra_repr(self) -> str:
        if self.engine is None:
            return "empty"
        inputs = (f"{n} {' to '.join(str(list(s)) for s in dict.fromkeys(p[::2]))}" for n, p in self._profile.items())
        return f"{', '.join(inputs)} -> {', '.join(self.output_names)}"


class _Graph:
    """The recorded launches for the shapes that the context has, with inputs and outputs of their own."""

    def __init__(self, owner: Engine, tensors: Sequence[Tensor]) -> None:
        self.inputs, self.outputs = [tensor.clone() for tensor in tensors], owner._allocate()
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                owner._enqueue(self.inputs, self.outputs)
        except RuntimeError as error:
            raise RuntimeError(f"the engine cannot be recorded ({error}); use it with cuda_graph=False.") from error

    def replay(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream()
        for tensor in (*self.inputs, *self.outputs):  # may be freed before this replay has ended
            tensor.record_stream(stream)
        for mine, theirs in zip(self.inputs, tensors):
            mine.copy_(theirs)
        self.graph.replay()
        return [output.clone() for output in self.outputs]


def _torch_dtype(trt: ModuleType, dtype: Any, name: str) -> torch.dtype:
    names = {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "INT64": torch.int64,
        "INT32": torch.int32,
        "INT8": torch.int8,
        "UINT8": torch.uint8,
        "BOOL": torch.bool,
    }
    if dtype.name not in names:
        raise RuntimeError(f"tensor {name!r} of the engine is {dtype.name}, for which torch has no type.")
    return names[dtype.name]


# ---- look inside


def layers(engine: Engine) -> list[dict[str, Any]]:
    """The layers of an engine: ``name``, ``type``, ``adder`` (whether it is an adder layer), ``precision`` of its outputs.

    Engines of `build_engine` tell everything, others perhaps names alone.
    """
    trt = engine._trt
    text = engine.engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    found = []
    for layer in json.loads(text, strict=False)["Layers"]:  # TensorRT 8.6 does not escape control characters
        if isinstance(layer, str):
            layer = {"Name": layer}
        name, kind = layer["Name"], layer.get("LayerType", "")
        outputs = [output.get("Format/Datatype", "") for output in layer.get("Outputs", [])]
        ours = layer.get("PluginType") == OP_TYPE or re.search(r":adder2d_\d+$", name) is not None
        found.append(
            {
                "name": name,
                "type": kind,
                # Layers that convert an adder layer's input end with its name, too.
                "adder": ours and ("plugin" in kind.lower() if kind else not name.startswith("Reformat")),
                "precision": ", ".join(dict.fromkeys(outputs)),
            }
        )
    return found


def profile(engine: Engine, tensors: Sequence[Tensor], runs: int = 20) -> dict[str, float]:
    """Milliseconds of each layer, the mean of `runs` calls after 3 others, by TensorRT's own profiler."""
    trt, times = engine._trt, defaultdict(float)

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer: str, milliseconds: float) -> None:
            times[layer] += milliseconds

    tensors, profiler = engine._check(tensors, {}), Profiler()
    with torch.cuda.device(engine._device), engine._lock:
        engine._follow()
        try:
            for i in range(3 + runs):
                if i == 3:
                    engine.context.profiler = profiler
                engine._run(tensors)
                torch.cuda.synchronize()
        finally:
            engine._renew_context()  # one with a profiler waits for every layer
    return {name: total / runs for name, total in times.items()}


def latencies(network: Callable[..., Any], inputs: Sequence[Tensor], runs: int = 200) -> list[float]:
    """Milliseconds on the GPU of `runs` calls after `runs` / 4 others, sorted."""
    times = []
    with torch.no_grad():
        for i in range(runs + runs // 4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            network(*inputs)
            end.record()
            end.synchronize()
            if i >= runs // 4:
                times.append(start.elapsed_time(end))
    return sorted(times)
