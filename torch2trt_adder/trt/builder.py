"""From an ONNX file to a TensorRT engine, and the module that runs it. Neither needs torch2trt.

    build_engine("model.onnx", "model.plan", {"batch": (1, 8, 64)})
    model_trt = Engine("model.plan")
    y = model_trt(x)

One code for TensorRT 8.6 to 11; api.py asks what a version has:

* Precision. Up to 10 a network is weakly typed: BuilderFlag.FP16 lets TensorRT choose, and the layers after an adder
  layer are held in float32 (`hold_float32`). From 11 a network has the types of its file: `to_float16` puts them there.
* Local functions. 9.0 to 10.6 prefer the body of Adder2d to the plugin; so the body never reaches the parser, and a
  missing plugin is an error in every version.
"""

import itertools
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from .. import library
from ..export import format
from ..export.format import DOMAIN, OP_TYPE, adder_nodes, extents
from ..utils import files
from . import api, fusion, plugin
from .monitor import build_progress, logger
from .plans import network_name
from .precision import batch_norm_magnitudes, set_precision
from .profiles import Range, add_profile
from .typed import to_float16

# ---- build


def build_engine(
    onnx_path: str | pathlib.Path,
    engine_path: str | pathlib.Path,
    ranges: Mapping[str, Range] | None = None,
    *,
    fp16: bool = False,
    fuse: bool = False,
    workspace: int | None = None,
    timing_cache: str | pathlib.Path | None = None,
    embed_plugin: bool = False,
    progress: bool = True,
    verbose: bool = False,
    trt: ModuleType | None = None,
) -> pathlib.Path:
    """Builds a TensorRT engine (a plan) for the GPU of this machine and writes it to `engine_path`.

    Every Adder2d node of the file must have become a plugin layer; TensorRT itself would use a node's body silently.

    Args:
        onnx_path: written by `export_onnx`, or any other ONNX file.
        engine_path: written atomically (temporary file, then rename).
        ranges: (smallest, most frequent, largest) extent of each dynamic axis, by its name in the file
            (``{"batch": (1, 8, 64)}``), or by input and axis (``{"x:0": (1, 8, 64)}``).
        fp16: float16 where TensorRT deems it faster, but never for the sums of adder layers. Inputs and outputs keep the
            types of the file. A file in float16 needs no such flag.
        fuse: let adder layers compute the BatchNorm, residual sum and ReLU or limits that follow them, see `fusion`. Off by
            default while few networks have been tried.
        workspace: bytes of scratch memory that the engine may use; None for TensorRT's default, all of the GPU's.
        timing_cache: a file of measured kernels that makes the next build faster; read if it is there, then written.
        embed_plugin: put the plugin library into the plan (TensorRT's plugins_to_serialize, as a version-compatible
            plan, for which TensorRT needs its libnvinfer_lean): `Engine(..., host_code=True)`, trtexec or Triton run it
            without this package.
        progress: show it on stderr once the build has run for two seconds.
        verbose: TensorRT's whole log on stderr.
        trt: the TensorRT module; ``tensorrt`` where None.

    Returns:
        `engine_path`.

    Raises:
        RuntimeError: onnx or TensorRT is missing; TensorRT refuses the file or builds no engine, with its reasons.
        ValueError: a dynamic axis without a range, a range that is invalid or beyond the limits in the file, or one for
            an axis that does not exist; an Adder2d node that cannot be computed; one path given twice.
        OSError: a file that cannot be read or written, or that holds weights of the ONNX file and is missing.
    """
    onnx_path, engine_path = pathlib.Path(onnx_path), pathlib.Path(engine_path)
    trt = api.import_tensorrt(trt)
    proto = load_onnx(onnx_path)
    outputs = {"the engine": engine_path}
    if timing_cache is not None:
        outputs["the timing cache"] = pathlib.Path(timing_cache)
    files.check_apart(outputs, input_files(proto, onnx_path))
    for path in outputs.values():
        files.check_writable(path)
    if fp16 and api.is_strongly_typed(trt):
        to_float16(proto, onnx_path.parent)
    log = logger(trt)
    log.verbose = verbose
    plugin.register(trt)
    builder, network, _parser = _parse(trt, proto, onnx_path)
    config = _configure(trt, builder, workspace, embed_plugin)
    largest, report = batch_norm_magnitudes(proto, onnx_path.parent), None
    if fuse:
        report = fusion.fuse(network, geometries(proto), trt=trt, half=fp16, largest=largest)
    set_precision(trt, network, config, proto, fp16, None if report is None else report.exposed, largest)
    add_profile(builder, network, config, proto, ranges or {})
    network.name = network_name(onnx_path.name, len(adder_nodes(proto.graph)), str(report or ""))
    if timing_cache is not None:
        _use_timing_cache(config, pathlib.Path(timing_cache))

    with build_progress(trt, config, f"Building {engine_path.name}", progress):
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        remedy = _lean_runtime(trt) if embed_plugin and (not log.errors or "lean" in log.reasons()) else ""
        reasons = log.reasons().rstrip(".")
        raise RuntimeError(f"TensorRT {trt.__version__} could not build an engine of {onnx_path}: {reasons}.{remedy}")
    files.write(engine_path, bytes(serialized))
    if timing_cache is not None:
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
        f" A plan with an embedded plugin also contains TensorRT's lean runtime, which is missing here: put "
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
        raise RuntimeError(f"{path} is not an ONNX file ({error}).") from error
    if not proto.graph.node:
        raise RuntimeError(f"{path} is not an ONNX file: it holds no nodes.")
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
        geometry: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
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
    network = builder.create_network(api.explicit_batch(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(proto.SerializeToString(), str(path)):
        reasons = "; ".join(api.parser_error(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"TensorRT {trt.__version__} cannot read {path}: {reasons or log.reasons()}")
    plugins = sum("PLUGIN" in network.get_layer(i).type.name for i in range(network.num_layers))
    nodes = len(adder_nodes(proto.graph))
    if plugins < nodes:
        raise RuntimeError(
            f"TensorRT {trt.__version__} has made {plugins} plugin layers of the {nodes} Adder2d nodes in {path}: please "
            "report this file."
        )
    return builder, network, parser


def _configure(trt: ModuleType, builder: Any, workspace: int | None, embed_plugin: bool) -> Any:
    """The builder's configuration, but for what depends on the network."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what `inspect` shows
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if embed_plugin:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.plugins_to_serialize = [str(library.path())]
    return config


def _use_timing_cache(config: Any, path: pathlib.Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        # Of another GPU or version, or not a timing cache: the build starts with an empty one and replaces the file.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
