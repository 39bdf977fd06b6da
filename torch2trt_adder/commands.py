"""What the verbs of the command line do with models and engines. Each prints for people and returns the same as a dict."""

import importlib
import importlib.util
import io
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import converter, engine, files, onnx_export
from .engine import Engine, Range

Shape = tuple[int, ...]

# ---- models


def load_model(source: str, checkpoint: pathlib.Path | None = None, half: bool = False) -> Any:
    """A network in eval mode from ``package.module:function`` (called without arguments), or a program from a .pt2 file.

    Raises:
        RuntimeError: the function, file or checkpoint cannot be found, or gives no network.
    """
    if source.endswith(".onnx"):
        raise RuntimeError(f"{source} is an ONNX file already; name a function or a .pt2 file.")
    if source.endswith(".pt2"):
        _check_options(source, checkpoint, half)
        try:
            return torch.export.load(io.BytesIO(files.read(pathlib.Path(source))))
        except OSError:
            raise
        except Exception as error:  # torch has no class of its own for a bad file
            raise RuntimeError(f"{source} cannot be loaded: {error}") from error
    module_name, _, function = source.partition(":")
    if not module_name or not function:
        raise RuntimeError(
            f"{source!r} is no model: name a function as package.module:function, or a file that ends in .pt2 or .onnx."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"the function {source} cannot be found ({error}).") from error
    try:
        model = make()
    except Exception as error:  # the user's code
        raise RuntimeError(f"{source}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise RuntimeError(f"{source}() must return a torch.nn.Module, got {type(model).__name__}.")
    if checkpoint is not None:
        try:
            model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
        except OSError as error:
            raise OSError(f"the checkpoint {checkpoint} cannot be read ({error.strerror}).") from error
        except Exception as error:
            raise RuntimeError(f"the checkpoint {checkpoint} does not fit {source}: {error}") from error
    return model.eval().half() if half else model.eval()


def random_inputs(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], device: torch.device | str, seed: int = 0
) -> list[Tensor]:
    """Normal draws, or 0 and 1 where the type is no floating one."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(shape, generator=generator)
            if dtype.is_floating_point
            else torch.randint(2, shape, generator=generator)
        )
        .to(dtype)
        .to(device)
        for shape, dtype in zip(shapes, dtypes)
    ]


def _example(model: Any, shapes: Sequence[Shape], half: bool) -> list[Any]:
    if shapes:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        return random_inputs(shapes, [torch.float16 if half else torch.float32] * len(shapes), device)
    if isinstance(model, torch.export.ExportedProgram) and model.example_inputs is not None:
        return list(model.example_inputs[0])
    raise RuntimeError("the model's input shapes are unknown: give one --shape for each input, as --shape 1x3x224x224.")


# ---- verbs


def export(
    source: str,
    path: pathlib.Path,
    shapes: Sequence[Shape],
    dynamic: dict[int, str],
    checkpoint: pathlib.Path | None,
    half: bool,
    opset: int | None,
    check: bool,
) -> dict[str, Any]:
    files.check_writable(path)
    with engine.elapsed(f"Loading {source}"):
        model = load_model(source, checkpoint, half)
    args = _example(model, shapes, half)
    with engine.elapsed(f"Exporting {source}"):
        onnx_export.export_onnx(model, args, path, dynamic or None, opset=opset, check=check)
    import onnx

    proto = onnx.load(path)
    version = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    nodes = len(onnx_export.adder_nodes(proto.graph))
    checked = "compared with PyTorch in ONNX Runtime" if check else "not checked"
    print(f"{path}: {nodes} Adder2d nodes among {len(proto.graph.node)}, opset {version}, {checked}.")
    inputs, outputs = (
        {entry.name: [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in entries}
        for entries in (proto.graph.input, proto.graph.output)
    )
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
) -> dict[str, Any]:
    engine.build_engine(
        source,
        path,
        ranges,
        fp16=fp16,
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
) -> dict[str, Any]:
    files.check_writable(path)
    reason = converter.missing(route)
    if reason is not None:
        raise RuntimeError(reason)
    if source.endswith((".pt2", ".onnx")):
        if route == "torch2trt":
            raise RuntimeError(f"torch2trt traces Python code, which {source} is not; leave --route out.")
        _check_options(source, checkpoint, half)
        return _convert_file(source, path, shapes, dynamic, fp16)
    with engine.elapsed(f"Loading {source}"):
        model = load_model(source, checkpoint, half).cuda()
        args = [tensor.cuda() for tensor in _example(model, shapes, half)]
    options: dict[str, Any] = {}
    _check_axes(dynamic, {axis for tensor in args for axis in range(tensor.dim())}, f"the axes of the inputs of {source}")
    if dynamic:
        for i, key in enumerate(("min_shapes", "opt_shapes", "max_shapes")):
            options[key] = [
                tuple(dynamic[axis][i] if axis in dynamic else extent for axis, extent in enumerate(tensor.shape))
                for tensor in args
            ]
    with engine.elapsed(f"Converting {source}"):
        model_trt = converter.convert(model, args, route, fp16_mode=fp16, **options)
    runner = model_trt.engine if isinstance(model_trt.engine, Engine) else model_trt  # nested outputs are wrapped
    files.write(path, bytes(runner.engine.serialize()))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, through {model_trt.route}, compared with PyTorch.")
    return {"file": str(path), "route": model_trt.route, "bytes": path.stat().st_size}


def _convert_file(
    source: str, path: pathlib.Path, shapes: Sequence[Shape], dynamic: dict[int, Range], fp16: bool
) -> dict[str, Any]:
    """An exported program or an ONNX file: built, and compared with PyTorch or ONNX Runtime where that is installed."""
    with tempfile.TemporaryDirectory(prefix="torch2trt_adder") as folder:
        exported, program = pathlib.Path(source), None
        if source.endswith(".pt2"):
            program = load_model(source)
            example = _example(program, shapes, half=False)
            exported = pathlib.Path(folder) / "program.onnx"
            with engine.elapsed(f"Exporting {source}"):
                onnx_export.export_onnx(program, example, exported, check=False)
        axes = engine._axes(engine._load_onnx(exported))
        _check_axes(dynamic, {axis for _, axis, _ in axes}, f"the dynamic axes of {source}")
        for name, axis, _ in axes:
            if axis not in dynamic:
                raise RuntimeError(f"axis {axis} of input {name!r} is dynamic in {source}: give --dynamic {axis}=1:8:64.")
        ranges = {f"{name}:{axis}": dynamic[axis] for name, axis, _ in axes}
        plan = pathlib.Path(folder) / path.name
        engine.build_engine(exported, plan, ranges, fp16=fp16)
        compared = None
        if program is None and importlib.util.find_spec("onnxruntime") is None:
            print("Not compared: onnxruntime is not installed.")
        else:
            compared = check(source, plan, shapes, 1, None, None, False, fp16, False)
        files.write(path, plan.read_bytes())
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, through ONNX.")
    return {"file": str(path), "route": "onnx", "bytes": path.stat().st_size, **(compared or {})}


def _check_options(source: str, checkpoint: pathlib.Path | None, half: bool) -> None:
    if checkpoint is not None or half:
        raise RuntimeError(f"{source} has its parameters and types already; --checkpoint and --half are for functions.")


def _check_axes(dynamic: dict[int, Range], there: set[int], what: str) -> None:
    absent = sorted(set(dynamic) - there)
    if absent:
        known = ", ".join(map(str, sorted(there))) or "none"
        raise RuntimeError(f"--dynamic names axis {absent[0]}, but {what} are: {known}.")


def _load(
    plan: pathlib.Path, shapes: Sequence[Shape], host_code: bool
) -> tuple[Engine, list[Shape], list[torch.dtype]]:
    """The engine, and what to feed it: the shapes given, or those that it was tuned for."""
    with engine.elapsed(f"Loading {plan}"):
        runner = Engine(plan, host_code=host_code)
    usual = [runner._profile[name][1] for name in runner.input_names]
    if shapes and len(shapes) != len(usual):
        raise RuntimeError(
            f"{plan} has {len(usual)} inputs ({', '.join(runner.input_names)}), got {len(shapes)} shapes."
        )
    return runner, list(shapes or usual), [runner._dtypes[name] for name in runner.input_names]


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
) -> dict[str, Any]:
    """PyTorch (or, for an ONNX file, ONNX Runtime) against the engine, on random inputs."""
    if source.endswith(".onnx"):
        _check_options(source, checkpoint, half)
    runner, usual, dtypes = _load(plan, shapes, host_code)
    bound: Callable[[list[Tensor]], list[float]] | None = None
    with engine.elapsed(f"Loading {source}"):
        if source.endswith(".onnx"):
            reference = _onnx_reference(source, plan, runner)
            rtol = (5e-2 if fp16 else 1e-3) if rtol is None else rtol
        else:
            model = load_model(source, checkpoint, half)
            model = (model.module() if isinstance(model, torch.export.ExportedProgram) else model).cuda()
            reference = lambda inputs: converter._tensors(model(*inputs))  # noqa: E731
            if rtol is None:
                bound = lambda inputs: [  # noqa: E731
                    t.item() for t in converter._tensors(converter.rounding_bounds(model, inputs, fp16))
                ]
    batches = [usual] * -(-samples // max(1, usual[0][0] if usual[0] else 1))
    if not shapes:  # what holds for the usual shapes alone is wrong at the ends of the ranges
        ends = ([runner._profile[name][i] for name in runner.input_names] for i in (0, 2))
        batches += [end for end in ends if end != usual and all(map(all, end))]
    worst, allowed, beyond, same, total, infinite, compared = 0.0, 0.0, False, 0, 0, 0, 0
    first: dict[int, Tensor] = {}  # of each output, for the first sample
    changes: set[int] = set()  # outputs that are another for another input
    with torch.no_grad(), engine.elapsed(f"Comparing {len(batches)} batches"):
        for step, batch in enumerate(batches):
            inputs = random_inputs(batch, dtypes, "cuda", seed=step)
            try:
                expected = reference(inputs)
            except Exception as error:
                if batch == usual:
                    raise
                print(f"Not compared for inputs of {', '.join(map(str, map(list, batch)))}: {type(error).__name__}: {error}")
                continue
            outputs = runner(*inputs)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            if len(expected) != len(outputs):
                raise RuntimeError(f"{source} has {len(expected)} outputs, {plan} {len(outputs)}.")
            limits = bound(inputs) if bound is not None else None
            for i, (y, y0) in enumerate(zip(outputs, expected)):
                if y.shape != y0.shape:
                    raise RuntimeError(f"output {i} is {list(y0.shape)} in {source} and {list(y.shape)} in {plan}.")
                y, y0 = y.double().cpu(), y0.double().cpu()
                if y0.dim() > 0 and y0.numel() > 0:
                    start = first.setdefault(i, y0[:1])
                    if start.shape[1:] != y0.shape[1:] or not (start == y0).all():
                        changes.add(i)
                finite = y0.isfinite()
                compared += int(finite.sum())
                infinite += int((finite & ~y.isfinite()).sum())
                largest = y0[finite].abs().max().item() if finite.any() else 0.0
                both = finite & y.isfinite()
                difference = (y - y0)[both].abs().max().item() if both.any() else 0.0
                limit = rtol * largest if limits is None else limits[i]
                beyond |= not difference <= limit
                worst = max(worst, difference / max(largest, 1e-30))
                allowed = max(allowed, limit / max(largest, 1e-30))
                if i == 0 and y.dim() > 1 and y.shape[1] > 1:
                    same += int((y.argmax(1) == y0.argmax(1)).sum())
                    total += y.argmax(1).numel()
    if not compared:
        raise RuntimeError(f"nothing to compare: every output of {source} is empty, infinite or NaN on random inputs.")
    print(f"Largest difference, relative to the largest value: {worst:.2e}, allowed {allowed:.2e}.")
    if total:
        print(f"Predictions agree on {same} of {total}.")
    constant = sorted(first.keys() - changes) if len(batches) > 1 or batches[0][0][:1] > (1,) else []
    for i in constant:
        print(
            f"Output {i} is the same for every input, and an engine of other weights might give it too: are BatchNorm's "
            "statistics trained?"
        )
    result = {"relative_difference": worst, "allowed": allowed, "agree": same, "predictions": total}
    result["constant_outputs"] = constant
    if infinite or beyond:
        lost = f"; {infinite} values are infinite or NaN in the engine alone" if infinite else ""
        raise Failed(f"the engine differs from {source} by {worst:.2e}, more than the {allowed:.2e} allowed{lost}.", result)
    return result


def _onnx_reference(source: str, plan: pathlib.Path, runner: Engine) -> Callable[[list[Tensor]], list[Tensor]]:
    """ONNX Runtime with the engine's order of inputs and outputs, which may be another than the file's."""
    session = onnx_export.onnxruntime_session(source)
    inputs, outputs = ([entry.name for entry in entries] for entries in (session.get_inputs(), session.get_outputs()))
    for theirs, ours in ((inputs, runner.input_names), (outputs, runner.output_names)):
        if sorted(theirs) != sorted(ours):
            raise RuntimeError(f"{plan} is no engine of {source}: it has {', '.join(ours)}, the file {', '.join(theirs)}.")

    def reference(tensors: list[Tensor]) -> list[Tensor]:
        given = dict(zip(runner.input_names, tensors))
        results = dict(zip(outputs, onnx_export.run_onnxruntime(session, [given[name] for name in inputs])))
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
    with engine.elapsed(f"Timing {plan.name}"):
        times = engine.latencies(runner, inputs, runs)
    percentiles = {f"p{p}": times[min(len(times) - 1, round(p / 100 * (len(times) - 1)))] for p in (50, 90, 95, 99)}
    batch = shapes[0][0] if shapes and shapes[0] else 1
    result = {
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
    found = engine.layers(runner)
    times = engine.profile(runner, random_inputs(shapes, dtypes, "cuda"))
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
    return {"layers": found, "adder_layers": len(adders), "milliseconds": total, "adder_milliseconds": spent}
