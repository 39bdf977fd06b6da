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

import itertools
import numbers
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from .. import library
from ..export import format
from ..export.format import DOMAIN, OP_TYPE, adder_nodes, extents
from ..utils import files
from . import fusion, plugin
from .monitor import build_progress, logger
from .plans import network_name
from .precision import batch_norm_magnitudes, set_precision
from .typed import to_float16

Range = tuple[int, int, int]


# ---- build


def build_engine(
    onnx_path: str | pathlib.Path,
    engine_path: str | pathlib.Path,
    ranges: Mapping[str, Range] | None = None,
    *,
    fp16: bool = False,
    fuse: bool = True,
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
        fuse: let adder layers compute the BatchNorm, residual sum and ReLU or limits that follow them, see `fusion`.
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
    trt = plugin.import_tensorrt(trt)
    proto = load_onnx(onnx_path)
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
    largest, report = batch_norm_magnitudes(proto, onnx_path.parent), None
    if fuse:
        report = fusion.fuse(network, geometries(proto), trt=trt, half=fp16, largest=largest)
    set_precision(trt, network, config, proto, fp16, report and report.exposed, largest)
    _add_profile(builder, network, config, proto, ranges or {})
    if embed_plugin:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.plugins_to_serialize = [str(library.path())]
    network.name = network_name(onnx_path.name, len(adder_nodes(proto.graph)), str(report or ""))
    cache = _use_timing_cache(config, timing_cache)

    with build_progress(trt, config, f"Building {engine_path.name}", progress):
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
    weights = format.external_files(proto, onnx_path.parent)
    return {"the ONNX file": onnx_path, **{f"the file {path.name} of its weights": path for path in weights}}


def _lean_runtime(trt: ModuleType) -> str:
    """What to do where TensorRT cannot write version-compatible plans: it puts its lean runtime into them."""
    version = ".".join(trt.__version__.split(".")[:3])
    return (
        f" A plan that carries its plugin carries TensorRT's lean runtime, too, which is missing here: put "
        f"libnvinfer_lean.so.{version} of TensorRT's archive or system packages into a directory of LD_LIBRARY_PATH (pip "
        "install tensorrt does not bring it), or build without embed_plugin."
    )


def load_onnx(path: pathlib.Path) -> Any:
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
    _name_adders(proto)
    for function in [f for f in proto.functions if (f.domain, f.name) == (DOMAIN, OP_TYPE)]:
        proto.functions.remove(function)
    try:
        format.check_external_files(proto, path.parent)
        format.check_nodes(proto)
        extents(proto)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return proto


def _name_adders(proto: Any) -> None:
    """Gives every Adder2d node a name of its own, by which its layer is found again in the network."""
    taken = {node.name for _, node in format.nodes(proto.graph) if not format.is_adder(node)}
    for i, node in enumerate(adder_nodes(proto.graph)):
        if not node.name or node.name in taken:
            node.name = next(
                name for name in (f"{node.name or OP_TYPE}_{n}" for n in itertools.count(i)) if name not in taken
            )
        taken.add(node.name)


def geometries(proto: Any) -> dict[str, dict[str, Any]]:
    """By the name of each Adder2d node: its stride, padding, dilation and groups."""
    found = {}
    for node in adder_nodes(proto.graph):
        values = {a.name: list(a.ints) or a.i for a in node.attribute}
        geometry = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        for name in geometry:
            value = values.get(name, geometry[name])
            geometry[name] = value[0] if isinstance(value, list) and len(value) == 1 else value
        found[node.name] = geometry
    return found


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


def dynamic_axes(proto: Any) -> list[tuple[str, int, str]]:
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
        integers = (
            isinstance(given, Sequence) and len(given) == 3 and all(isinstance(n, numbers.Integral) for n in given)
        )
        if not integers or not 0 <= given[0] <= given[1] <= given[2] or given[2] < 1:
            raise ValueError(
                f"the range of {name!r} must be (smallest, most frequent, largest) in this order, got {given}."
            )
    axes = dynamic_axes(proto)
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
        if given[0] < least or (most is not None and given[2] > most):
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
