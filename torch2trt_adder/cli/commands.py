"""What the subcommands do with models and engines. Each prints for people and returns the same as a dict."""

import importlib.util
import pathlib
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import converter, routes
from ..export import exporter, format, runtime
from ..numerics import comparison, rounding
from ..trt import builder, inspection, profiles
from ..trt.engine import Engine
from ..trt.plans import fused_layers
from ..trt.profiles import Range
from ..utils import files
from ..utils.progress import elapsed
from .checking import Comparison
from .loading import (
    Shape,
    adder_layers,
    example,
    load_model,
    random_inputs,
    source_file,
)
from .sources import check_source

# ---- subcommands


def export(
    source: str,
    path: pathlib.Path,
    shapes: Sequence[Shape],
    dynamic: dict[int, str],
    checkpoint: pathlib.Path | None,
    half: bool,
    opset: int | None,
    check: bool,
    trust: bool,
) -> dict[str, Any]:
    """A network to an ONNX file."""
    files.check_writable(path)
    with elapsed(f"Loading {source}"):
        model = load_model(source, checkpoint, half, trust)
    _check_source(source, {"the ONNX file": path})
    args = example(source, model, shapes, half)
    with elapsed(f"Exporting {source}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "export_onnx: .* has no adder layer")  # said below
        exporter.export_onnx(model, args, path, dynamic or None, opset=opset, check=check)
    import onnx

    proto = onnx.load(path)
    version = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    nodes = len(format.adder_nodes(proto.graph))
    checked = "compared with PyTorch in ONNX Runtime" if check else "not checked"
    print(f"{path}: {nodes} Adder2d nodes among {len(proto.graph.node)}, opset {version}, {checked}.")
    inputs, outputs = (
        {entry.name: [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in entries}
        for entries in (proto.graph.input, proto.graph.output)
    )
    _say_if_no_adders(nodes, source)
    for what, entries in (("Inputs", inputs), ("Outputs", outputs)):
        print(f"{what}: {'; '.join(name + ' [' + ', '.join(map(str, dims)) + ']' for name, dims in entries.items())}.")
    return {
        "file": str(path),
        "adder_nodes": nodes,
        "nodes": len(proto.graph.node),
        "opset": version,
        "inputs": inputs,
        "outputs": outputs,
        "checked": check,
    }


def build(
    source: pathlib.Path,
    path: pathlib.Path,
    ranges: dict[str, Range],
    fp16: bool,
    workspace: int | None,
    timing_cache: pathlib.Path | None,
    embed_plugin: bool,
    verbose: bool,
    fuse: bool = False,
) -> dict[str, Any]:
    """An ONNX file to an engine."""
    outputs = {"the engine": path} if timing_cache is None else {"the engine": path, "the timing cache": timing_cache}
    _check_onnx_files(source, outputs)
    builder.build_engine(
        source,
        path,
        ranges,
        fp16=fp16,
        fuse=fuse,
        workspace=None if workspace is None else workspace << 20,
        timing_cache=timing_cache,
        embed_plugin=embed_plugin,
        verbose=verbose,
    )
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB.")
    return {"file": str(path), "bytes": path.stat().st_size}


def convert(
    source: str,
    path: pathlib.Path,
    shapes: Sequence[Shape],
    dynamic: dict[int, Range],
    checkpoint: pathlib.Path | None,
    half: bool,
    fp16: bool,
    route: str,
    trust: bool,
    fuse: bool = False,
) -> dict[str, Any]:
    """A network to an engine that was compared with it."""
    files.check_writable(path)
    if source.endswith(".onnx"):
        _check_onnx_files(pathlib.Path(source), {"the engine": path})
    reason = routes.missing(route)
    if reason is not None:
        raise RuntimeError(reason)
    if source.endswith((".pt2", ".onnx")):
        if route == "torch2trt":
            raise ValueError(f"torch2trt traces Python code, which {source} is not; leave --route out.")
        check_source(source, checkpoint, half)
        return _convert_file(source, path, shapes, dynamic, fp16, trust, fuse)
    with elapsed(f"Loading {source}"):
        model = load_model(source, checkpoint, half)
        _check_source(source, {"the engine": path})
        assert isinstance(model, nn.Module)  # a function gives nothing else
        model.cuda()
        args = [tensor.cuda() for tensor in example(source, model, shapes, half)]
    adders = adder_layers(model, args)
    _say_if_no_adders(adders, source)
    options: dict[str, Any] = {}
    _check_axes(
        dynamic, {axis for tensor in args for axis in range(tensor.dim())}, f"the axes of the inputs of {source}"
    )
    if dynamic:
        for i, key in enumerate(("min_shapes", "opt_shapes", "max_shapes")):
            options[key] = [
                tuple(dynamic[axis][i] if axis in dynamic else extent for axis, extent in enumerate(tensor.shape))
                for tensor in args
            ]
    with elapsed(f"Converting {source}"):
        model_trt = converter.convert(model, args, route, fp16_mode=fp16, fuse=fuse, **options)
    runner: Any = model_trt.engine if isinstance(model_trt.engine, Engine) else model_trt  # nested outputs are wrapped
    files.write(path, bytes(runner.engine.serialize()))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, through {model_trt.route}, compared with PyTorch.")
    return {"file": str(path), "route": model_trt.route, "bytes": path.stat().st_size, "adder_layers": adders}


def _convert_file(
    source: str,
    path: pathlib.Path,
    shapes: Sequence[Shape],
    dynamic: dict[int, Range],
    fp16: bool,
    trust: bool,
    fuse: bool,
) -> dict[str, Any]:
    """An exported program or an ONNX file: built, and compared with PyTorch or ONNX Runtime where that is installed."""
    with tempfile.TemporaryDirectory(prefix="torch2trt_adder") as folder:
        exported, program = pathlib.Path(source), None
        if source.endswith(".pt2"):
            program = load_model(source, trust=trust)
            args = example(source, program, shapes, half=False)
            exported = pathlib.Path(folder) / "program.onnx"
            with elapsed(f"Exporting {source}"):
                exporter.export_onnx(program, args, exported, check=False)
        proto = builder.load_onnx(exported)
        adders = len(format.adder_nodes(proto.graph))
        _say_if_no_adders(adders, source)
        axes = profiles.dynamic_axes(proto)
        _check_axes(dynamic, {axis for _, axis, _ in axes}, f"the dynamic axes of {source}")
        for name, axis, _ in axes:
            if axis not in dynamic:
                raise ValueError(f"axis {axis} of input {name!r} is dynamic in {source}: give --dynamic {axis}=1:8:64.")
        ranges = {f"{name}:{axis}": dynamic[axis] for name, axis, _ in axes}
        plan = pathlib.Path(folder) / path.name
        builder.build_engine(exported, plan, ranges, fp16=fp16, fuse=fuse)
        compared = None
        if program is None and importlib.util.find_spec("onnxruntime") is None:
            print("Not compared: onnxruntime is not installed.")
        else:
            compared = check(source, plan, shapes, 1, None, None, False, fp16, False, trust)
        files.write(path, plan.read_bytes())
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, through ONNX.")
    result = {"file": str(path), "route": "onnx", "bytes": path.stat().st_size, "adder_layers": adders}
    return {**result, **(compared or {})}


def _say_if_no_adders(adders: int, source: str) -> None:
    if not adders:
        print(f"{source} has no adder layer: is it the network that you mean?")


def _check_source(source: str, outputs: dict[str, pathlib.Path]) -> None:
    """Refuses to write over the Python file that a function is in."""
    file = source_file(source)
    if file is not None:
        files.check_apart(outputs, {f"the file of {source}": file})


def _check_onnx_files(path: pathlib.Path, outputs: dict[str, pathlib.Path]) -> None:
    """Refuses outputs that are the ONNX file or one that its weights are in, and a file whose weights are missing."""
    files.check_apart(outputs, {"the ONNX file": path})
    if importlib.util.find_spec("onnx") is not None:  # else what needs it says so
        files.check_apart(outputs, builder.input_files(builder.load_onnx(path), path))


def _check_axes(dynamic: dict[int, Range], there: set[int], what: str) -> None:
    absent = sorted(set(dynamic) - there)
    if absent:
        known = ", ".join(map(str, sorted(there))) or "none"
        raise ValueError(f"--dynamic names axis {absent[0]}, but {what} are: {known}.")


def _load(
    plan: pathlib.Path, shapes: Sequence[Shape], host_code: bool
) -> tuple[Engine, list[Shape], list[torch.dtype]]:
    """The engine, and what to feed it: the shapes given, or those that it was tuned for."""
    with elapsed(f"Loading {plan}"):
        runner = Engine(plan, host_code=host_code)
    usual = [runner.profile_shapes(name)[1] for name in runner.input_names]
    if shapes and len(shapes) != len(usual):
        raise RuntimeError(
            f"{plan} has {len(usual)} inputs ({', '.join(runner.input_names)}), got {len(shapes)} shapes."
        )
    return runner, list(shapes or usual), [runner.dtype_of(name) for name in runner.input_names]


def check(
    source: str,
    plan: pathlib.Path,
    shapes: Sequence[Shape],
    samples: int,
    rtol: float | None,
    checkpoint: pathlib.Path | None,
    half: bool,
    fp16: bool,
    host_code: bool,
    trust: bool,
) -> dict[str, Any]:
    """PyTorch (or, for an ONNX file, ONNX Runtime) against the engine, on random inputs."""
    if source.endswith(".onnx"):
        check_source(source, checkpoint, half)
        _check_onnx_files(pathlib.Path(source), {})
    runner, usual, dtypes = _load(plan, shapes, host_code)
    bound: Callable[[list[Tensor]], list[float]] | None = None
    with elapsed(f"Loading {source}"):
        if source.endswith(".onnx"):
            reference = _onnx_reference(source, plan, runner)
            if importlib.util.find_spec("onnx") is not None:
                _say_if_no_adders(len(format.adder_nodes(builder.load_onnx(pathlib.Path(source)).graph)), source)
            rtol = (5e-2 if fp16 or torch.float16 in dtypes else 1e-3) if rtol is None else rtol
        else:
            model = load_model(source, checkpoint, half, trust)
            network = (model.module() if isinstance(model, torch.export.ExportedProgram) else model).cuda()
            _say_if_no_adders(adder_layers(network, random_inputs(usual, dtypes, "cuda")), source)

            def reference(inputs: list[Tensor]) -> list[Tensor]:
                return comparison.tensor_leaves(network(*inputs))

            def network_bounds(inputs: list[Tensor]) -> list[float]:
                return [t.item() for t in comparison.tensor_leaves(rounding.rounding_bounds(network, inputs, fp16))]

            if rtol is None:
                bound = network_bounds
    batches = [usual] * -(-samples // max(1, usual[0][0] if usual[0] else 1))
    if not shapes:  # what holds only for the usual shapes is wrong at the ends of the ranges
        ends = ([runner.profile_shapes(name)[i] for name in runner.input_names] for i in (0, 2))
        batches += [end for end in ends if end != usual and all(map(all, end))]
    outcome = Comparison(source, str(plan))
    with torch.no_grad(), elapsed(f"Comparing {len(batches)} batches"):
        for step, batch in enumerate(batches):
            inputs = random_inputs(batch, dtypes, "cuda", seed=step)
            try:
                expected = reference(inputs)
            except Exception as error:
                if batch == usual:
                    raise
                print(
                    f"Not compared for inputs of {', '.join(map(str, map(list, batch)))}: {type(error).__name__}: {error}"
                )
                continue
            outputs = runner(*inputs)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            outcome.add(outputs, expected, rtol or 0.0, None if bound is None else bound(inputs))
    result, reason = outcome.report(several=len(batches) > 1 or batches[0][0][:1] > (1,))
    if reason is not None:
        raise Failed(reason, result)
    return result


def _onnx_reference(source: str, plan: pathlib.Path, runner: Engine) -> Callable[[list[Tensor]], list[Tensor]]:
    """ONNX Runtime with the engine's order of inputs and outputs, which may be another than the file's."""
    session = runtime.onnxruntime_session(source)
    inputs, outputs = ([entry.name for entry in entries] for entries in (session.get_inputs(), session.get_outputs()))
    for theirs, ours in ((inputs, runner.input_names), (outputs, runner.output_names)):
        if sorted(theirs) != sorted(ours):
            raise RuntimeError(
                f"{plan} is not an engine of {source}: it has {', '.join(ours)}, the file {', '.join(theirs)}."
            )

    def reference(tensors: list[Tensor]) -> list[Tensor]:
        given = dict(zip(runner.input_names, tensors))
        results = dict(zip(outputs, runtime.run_onnxruntime(session, [given[name] for name in inputs])))
        return [results[name] for name in runner.output_names]

    return reference


class Failed(RuntimeError):
    """A failure that has a result all the same."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def bench(plan: pathlib.Path, shapes: Sequence[Shape], runs: int, cuda_graph: bool, host_code: bool) -> dict[str, Any]:
    runner, shapes, dtypes = _load(plan, shapes, host_code)
    runner.cuda_graph = cuda_graph
    inputs = random_inputs(shapes, dtypes, "cuda")
    with elapsed(f"Timing {plan.name}"):
        times = inspection.latencies(runner, inputs, runs)
    percentiles = {f"p{p}": times[min(len(times) - 1, round(p / 100 * (len(times) - 1)))] for p in (50, 90, 95, 99)}
    batch = shapes[0][0] if shapes and shapes[0] else 1
    result: dict[str, Any] = {
        "shapes": dict(zip(runner.input_names, map(list, shapes))),
        "runs": runs,
        "cuda_graph": cuda_graph,
        "milliseconds": {"min": times[0], "mean": statistics.fmean(times), **percentiles, "max": times[-1]},
        "per_second": batch * 1000 / percentiles["p50"],
    }
    print("Inputs: " + ", ".join(f"{name} {list(shape)}" for name, shape in zip(runner.input_names, shapes)) + ".")
    print("Latency in ms: " + ", ".join(f"{name} {value:.3f}" for name, value in result["milliseconds"].items()) + ".")
    print(f"Throughput: {result['per_second']:.0f} samples per second, at the median latency.")
    return result


def inspect(plan: pathlib.Path, shapes: Sequence[Shape], host_code: bool) -> dict[str, Any]:
    runner, shapes, dtypes = _load(plan, shapes, host_code)
    found = inspection.layers(runner)
    times = inspection.profile(runner, random_inputs(shapes, dtypes, "cuda"))
    total = sum(times.values())
    for layer in found:
        layer["milliseconds"] = times.get(layer["name"])
    print(f"{runner.extra_repr()}")
    print(f"{'ms':>9} {'%':>5}  {'':5} layer, precision of its outputs")
    for layer in found:
        time = layer["milliseconds"]
        share = f"{time:9.4f} {100 * time / total:5.1f}" if time is not None and total else f"{'':15}"
        precision = f", {layer['precision']}" if layer["precision"] else ""
        print(f"{share}  {'adder' if layer['adder'] else '':5} {layer['name']}{precision}")
    adders = [layer for layer in found if layer["adder"]]
    spent = sum(layer["milliseconds"] or 0 for layer in adders)
    print(f"{len(adders)} adder layers of {len(found)}: {spent:.4f} of {total:.4f} ms.")
    fused = fused_layers(runner.engine.name)
    if fused is not None:
        print(f"Adder layers: {fused}.")
    return {
        "layers": found,
        "adder_layers": len(adders),
        "fused": fused,
        "milliseconds": total,
        "adder_milliseconds": spent,
    }
