"""convert(): a network with adder layers to a checked TensorRT engine, through torch2trt or ONNX.

Importing this file needs torch alone. Where torch2trt is installed, it also imports tracing.py, which makes a plain
``torch2trt(model, [x])`` work on adder layers.
"""

import functools
import importlib.util
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from . import compat
from .eval_mode import training_layer
from .lookalikes import adopted_copy as _adopted_copy
from .options import did_you_mean, torch2trt_options

_DTYPES = (torch.float32, torch.float16)
_TRIALS, _FACTOR = 3, 2

# ---- what is installed

_import_error: Exception | None = None
if importlib.util.find_spec("torch2trt") and importlib.util.find_spec("tensorrt"):
    try:
        torch2trt = compat.import_torch2trt()
        from . import tracing  # noqa: F401
    except Exception as error:  # whatever it is, torch2trt is not used then, and `missing` tells why
        _import_error = error
        if hasattr(sys.modules.get("torch2trt"), "torch2trt"):  # it works, but without what makes adder layers safe
            warnings.warn(
                f"torch2trt_adder cannot serve this torch2trt ({type(error).__name__}: {error}): torch2trt(model, [x]) would "
                "make constants of adder layers; use torch2trt 0.5, or torch2trt_adder.convert, which goes through ONNX.",
                stacklevel=2,
            )


ROUTES = ("auto", "torch2trt", "onnx")


def missing(route: str = "auto") -> str | None:
    """What `convert` lacks on this machine and how to get it, as one sentence; None where everything is there."""
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no NVIDIA GPU here, on which TensorRT builds its engines: use a "
            "machine with a GPU and a CUDA build of torch."
        )
    if not importlib.util.find_spec("tensorrt"):
        return "TensorRT is not installed: pip install tensorrt."
    if route == "torch2trt":
        if not importlib.util.find_spec("torch2trt"):
            return "torch2trt is not installed: pip install git+https://github.com/NVIDIA-AI-IOT/torch2trt."
        if _import_error is not None:
            return f"torch2trt cannot be used ({type(_import_error).__name__}: {_import_error})."
        return None
    absent = [package for package in ("onnx", "onnxscript") if not importlib.util.find_spec(package)]
    if route == "auto":
        if missing("torch2trt") is None or not absent:
            return None
        return f"{missing('torch2trt')} Or go through ONNX: pip install {' '.join(absent)}."
    return f"{absent[0]} is not installed: pip install {' '.join(absent)}." if absent else None


# ---- convert


def convert(
    model: nn.Module, inputs: Tensor | Sequence[Any], route: str = "auto", **torch2trt_kwargs: Any
) -> nn.Module:
    """Converts `model` to a TensorRT engine and checks it against PyTorch.

    Foreign adder layers (see `adopt`) are converted too; `model` stays as it is. The engine's outputs on `inputs`, and on
    the same values cut or repeated to the smallest and largest shapes, must agree with PyTorch's as far as rounding in this
    network can explain (see `rounding_bounds`), and be finite where PyTorch's are.

    Args:
        model: a network on a GPU; float32 or float16; in eval mode where that makes a difference.
        inputs: its positional arguments as a list or tuple, or one tensor; the example that is traced.
        route: "torch2trt"; "onnx" (`export_onnx`, `build_engine`), which needs no torch2trt and knows more operators;
            "auto" takes torch2trt where it can convert this network, else ONNX, and says on stderr which and why.
        torch2trt_kwargs: fp16_mode, max_batch_size, min_shapes, opt_shapes, max_shapes, input_names, output_names and
            max_workspace_size on both routes; through torch2trt also its other options, and allow_constants.

    Returns:
        A module called like `model`; its attribute ``route`` tells the way. From torch2trt a TRTModule, saved with
        state_dict(); through ONNX an `Engine`, wrapped where the model's inputs or outputs are nested.

    Raises:
        RuntimeError: no GPU, no TensorRT, or neither torch2trt nor onnx; no engine; an engine that differs from PyTorch.
        TypeError: `inputs` is no list, a dtype that TensorRT does not take here, or an option that the route does not know.
        ValueError: a layer in training mode that computes something else there (dropout, BatchNorm), or model and inputs are not on one GPU; no such route.
    """
    if route not in ROUTES:
        raise ValueError(f"convert: route must be one of {', '.join(ROUTES)}, got {route!r}.")
    _check_options(route, torch2trt_kwargs)
    if isinstance(inputs, Tensor):
        inputs = [inputs]
    example = _check_arguments(model, inputs)
    reason = missing(route)
    if reason is not None:
        raise RuntimeError(f"convert: {reason}")
    _check_devices(model, example)
    with torch.no_grad():
        expected = model(*example)  # if this fails, no route is to blame
    convert_through = functools.partial(_convert_through, model, inputs, example, expected, torch2trt_kwargs)
    if route != "auto":
        return convert_through(route)
    obstacle = missing("torch2trt")
    if obstacle is None:
        _say("route torch2trt")
        try:
            return convert_through("torch2trt")
        except Exception as error:  # torch2trt's own are of any class
            barred = missing("onnx") or _not_for_onnx(inputs, torch2trt_kwargs)
            if barred is not None:
                _say(f"torch2trt fails, and route onnx cannot help: {barred}")
                raise
            obstacle = f"torch2trt fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    _say(f"route onnx, since {obstacle}")
    return convert_through("onnx")


def _say(text: str) -> None:
    print(f"torch2trt_adder.convert: {text}", file=sys.stderr)


def _convert_through(
    model: nn.Module, inputs: Any, example: Sequence[Any], expected: Any, options: dict[str, Any], route: str
) -> nn.Module:
    """One route's engine, compared with PyTorch on the example and at the smallest and largest shapes."""
    fp16 = bool(options.get("fp16_mode", False))
    with torch.no_grad(), torch.cuda.device(_tensors(example)[0].device):
        through = _through_torch2trt if route == "torch2trt" else _through_onnx
        model_trt, flatten = through(model, inputs, options)
        network = _adopted_copy(model)
        bounds = flatten(rounding_bounds(network, example, fp16))
        _compare(flatten(model_trt(*example)), flatten(expected), bounds, fp16)
        for args in _at_the_ends(inputs, example, options):
            try:
                expected, others = model(*args), flatten(rounding_bounds(network, args, fp16))
            except RuntimeError:  # the network takes no such shape, or PyTorch has no memory for it
                continue
            limits = [torch.maximum(a, b) for a, b in zip(bounds, others, strict=True)]
            where = f" for inputs of {', '.join(str(list(t.shape)) for t in _tensors(args))}"
            _compare(flatten(model_trt(*args)), flatten(expected), limits, fp16, where)
    model_trt.route = route
    return model_trt


def _at_the_ends(inputs: Any, example: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """The example's values at the smallest and largest shapes, where these are others."""
    if not isinstance(inputs, (list, tuple)):  # a data set, whose shapes torch2trt takes where no others are given
        given = {key: value for key, value in options.items() if value is not None}
        options = {"min_shapes": inputs.min_shapes(), "max_shapes": inputs.max_shapes(), **given}
    tensors = _tensors(example)
    least, _, most = _shapes(tensors, options)
    ends = []
    for shapes in (least, most):
        if shapes != [tuple(tensor.shape) for tensor in tensors] and all(map(all, shapes)):
            others = iter([resized(tensor, shape) for tensor, shape in zip(tensors, shapes)])
            ends.append(tree_map(lambda leaf: next(others) if isinstance(leaf, Tensor) else leaf, example))
    return ends


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


Converted = tuple[nn.Module, Callable[[Any], list[Tensor]]]  # and how to take its outputs apart


def _through_torch2trt(model: nn.Module, inputs: Sequence[Any], options: dict[str, Any]) -> Converted:
    model_trt = torch2trt.torch2trt(model, inputs, **options)
    if model_trt.engine is None:
        raise RuntimeError(
            "convert: TensorRT could not build an engine; its log above says why (log_level=tensorrt.Logger.INFO makes "
            "it say more)."
        )
    # TRTModule frees a contiguous copy of its input before the engine has read it; a hook's result lives on.
    model_trt.register_forward_pre_hook(lambda module, args: tree_map(_contiguous, args))
    return model_trt, model_trt.output_flattener.flatten


_SHAPES = ("min_shapes", "opt_shapes", "max_shapes")
_ONNX_OPTIONS = (*_SHAPES, "fp16_mode", "max_batch_size", "input_names", "output_names", "max_workspace_size")


def _check_options(route: str, options: dict[str, Any]) -> None:
    """Raises for an option that no engine of this route can have: torch2trt itself ignores those that it does not know."""
    known = list(_ONNX_OPTIONS)
    if route != "onnx":
        if "torch2trt" not in globals():  # not installed: what it would take is not known here
            return
        known += [name for name in torch2trt_options(torch2trt.torch2trt) if name not in known]
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known) or f"; its options are {', '.join(known)}."
            also = "" if route != "onnx" else " (route='torch2trt' takes all of torch2trt's options.)"
            raise TypeError(f"convert: route {route!r} has no option {name!r}{hint}{also}")


def _not_for_onnx(inputs: Any, options: dict[str, Any]) -> str | None:
    """What the ONNX route cannot take of what was given to `convert`, as one sentence."""
    unknown = sorted(set(options) - set(_ONNX_OPTIONS))
    if unknown:
        return (
            f"route 'onnx' has no option {unknown[0]!r}, its options are {', '.join(_ONNX_OPTIONS)}; "
            "route='torch2trt' takes all of torch2trt's."
        )
    if not isinstance(inputs, (list, tuple)):
        return "route 'onnx' takes the model's arguments, not a data set; give min_shapes and max_shapes."
    return None


def _through_onnx(model: nn.Module, inputs: Sequence[Any], options: dict[str, Any]) -> Converted:
    from . import engine, onnx_export

    barred = _not_for_onnx(inputs, options)
    if barred is not None:
        raise TypeError(f"convert: {barred}")
    args, tensors = tuple(inputs), _tensors(inputs)
    names = list(options.get("input_names") or (f"input_{i}" for i in range(len(tensors))))
    axes, ranges = _dynamic_axes(tensors, names, options)
    # What ONNX Runtime makes of the file does not matter here: the engine itself is compared.
    with tempfile.TemporaryDirectory(prefix="torch2trt_adder") as folder:
        path = onnx_export.export_onnx(
            model,
            args,
            os.path.join(folder, f"{type(model).__name__}.onnx"),
            axes,
            input_names=names,
            output_names=options.get("output_names"),
            check=False,
        )
        plan = engine.build_engine(
            path,
            path.with_suffix(".plan"),
            ranges,
            fp16=bool(options.get("fp16_mode")),
            workspace=options.get("max_workspace_size"),
        )
        runner = engine.Engine(plan)
    output = model(*args)
    flat = all(isinstance(leaf, Tensor) for leaf in args) and isinstance(output, Tensor)
    return (runner if flat else _Structured(runner, tree_flatten(output)[1])), _tensors


def _dynamic_axes(
    tensors: Sequence[Tensor], names: Sequence[str], options: dict[str, Any]
) -> tuple[list[dict[int, str]] | None, dict[str, tuple[int, int, int]]]:
    """torch2trt's shape options as `export_onnx` and `build_engine` take them: names of axes, and their ranges."""
    least, usual, most = _shapes(tensors, options)
    axes: list[dict[int, str]] = [{} for _ in tensors]
    ranges = {}
    extent_of: dict[str, int] = {}
    for i, (a, b, c) in enumerate(zip(least, usual, most)):
        for axis, extents in enumerate(zip(a, b, c)):
            if extents[0] != extents[2]:
                # Axes of one range and one extent are taken for one and the same, which the exporter then finds out.
                name, extent = f"axis{axis}_{extents[0]}_{extents[2]}", tensors[i].shape[axis]
                axes[i][axis] = name if extent_of.setdefault(name, extent) == extent else f"{name}_{extent}"
                ranges[f"{names[i]}:{axis}"] = (extents[0], min(max(extents[1], extents[0]), extents[2]), extents[2])
    return (axes if ranges else None), ranges


def _shapes(tensors: Sequence[Tensor], options: dict[str, Any]) -> list[list[tuple[int, ...]]]:
    """The smallest, most frequent and largest shape of each tensor, by torch2trt's shape options."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    least, usual, most = (
        shapes if options.get(key) is None else [tuple(shape) for shape in _shape_leaves(options[key])]
        for key in _SHAPES
    )
    if options.get("max_batch_size") is not None:
        least, most = (
            [(extent, *shape[1:]) for shape in each] for extent, each in ((1, least), (options["max_batch_size"], most))
        )
    for key, each in zip(_SHAPES, (least, usual, most)):
        if [len(shape) for shape in each] != [len(shape) for shape in shapes]:
            raise ValueError(f"convert: {key} must hold one shape for each input, got {each} for inputs {shapes}.")
    return [least, usual, most]


def _shape_leaves(value: Any) -> list[Any]:
    """The shapes in a nested structure of shapes, which are sequences of ints themselves."""
    if isinstance(value, (list, tuple)) and all(isinstance(extent, int) for extent in value):
        return [value]
    return [shape for child in (value.values() if isinstance(value, dict) else value) for shape in _shape_leaves(child)]


class _Structured(nn.Module):
    """An engine with the nested inputs and outputs of the model that it was made of."""

    def __init__(self, engine: nn.Module, structure: Any) -> None:
        super().__init__()
        self.engine, self._structure = engine, structure

    def forward(self, *inputs: Any) -> Any:
        outputs = self.engine(*_tensors(inputs))
        return tree_unflatten([outputs] if isinstance(outputs, Tensor) else list(outputs), self._structure)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def check_model(caller: str, model: nn.Module) -> None:
    """Raises unless `model` is a network written in Python of which no part computes something else in eval mode."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}"
            + ("; give the module that it was made of." if isinstance(model, torch.jit.ScriptModule) else ".")
        )
    found = training_layer(model)
    if found is not None:
        path, layer = found
        name = f"layer {path!r}" if path else "the model"
        raise ValueError(
            f"{caller}: {name if path and not model.training else 'the model'} is in training mode, where {name} "
            f"({type(layer).__name__}) does not compute what it does in an engine; call model.eval() first."
        )


def resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` cut or repeated in each axis: values as they are, for comparisons at another size."""
    for axis, extent in enumerate(shape):
        tensor = tensor.index_select(axis, torch.arange(extent, device=tensor.device) % tensor.shape[axis])
    return tensor


def _check_arguments(model: nn.Module, inputs: Any) -> Sequence[Any]:
    """The model's positional arguments, once they are known to be sound apart from their device."""
    if not isinstance(inputs, (list, tuple)):
        if type(inputs).__module__.partition(".")[0] == "torch2trt" and len(inputs) > 0:  # one of torch2trt's datasets
            return _check_arguments(model, inputs[0])
        raise TypeError(
            f"convert: inputs must be a list or tuple of the model's arguments, or a tensor, got "
            f"{type(inputs).__name__}; write convert(model, [x])."
        )
    check_model("convert", model)
    named = [
        *((f"input {i}", t) for i, t in enumerate(tree_leaves(inputs)) if isinstance(t, Tensor)),
        *((f"parameter {name!r}", t) for name, t in model.named_parameters()),
    ]
    for name, tensor in named:
        if tensor.dtype not in _DTYPES and not (tensor.dtype is torch.bool and name.startswith("input")):
            raise TypeError(
                f"convert: {name} is {tensor.dtype}; an engine here takes torch.float32 and torch.float16, so convert "
                "model and inputs with .float() or .half()."
            )
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise TypeError("convert: inputs holds no tensor; write convert(model, [x]) with an example input x.")
    return inputs


def _check_devices(model: nn.Module, example: Sequence[Any]) -> None:
    named = [
        *((f"input {i}", t) for i, t in enumerate(tree_leaves(example)) if isinstance(t, Tensor)),
        *((f"parameter {name!r}", t) for name, t in model.named_parameters()),
        *((f"buffer {name!r}", t) for name, t in model.named_buffers()),
    ]
    device = named[0][1].device
    for name, tensor in named:
        if not tensor.is_cuda or tensor.device != device:
            raise ValueError(
                f"convert: {name} is on {tensor.device}, but model and inputs must be on one GPU; move both with "
                ".cuda()."
            )


def _compare(
    got: list[Tensor], expected: list[Tensor], bounds: list[Tensor], fp16: bool, where: str = ""
) -> None:
    """Raises RuntimeError where an output of the engine is further from PyTorch's than its bound."""
    remedy = "try fp16_mode=False" if fp16 else "please report this network"
    for i, (y, y0, bound) in enumerate(zip(got, expected, bounds, strict=True)):
        if y.shape != y0.shape:
            raise RuntimeError(
                f"convert: output {i} of the engine is {list(y.shape)}, PyTorch's is {list(y0.shape)}{where}; {remedy}."
            )
        y, y0 = y.double(), y0.double()
        finite = y0.isfinite()
        lost = int((finite & ~y.isfinite()).sum())
        if lost > 0:
            raise RuntimeError(
                f"convert: {lost} of {y.numel()} values in output {i} of the engine are infinite or NaN, where "
                f"PyTorch's are finite{where}; {remedy}."
            )
        y, y0 = y[finite], y0[finite]
        if y.numel() == 0:
            continue
        difference, largest, limit = (y - y0).abs().max().item(), y0.abs().max().item(), bound.item()
        if difference > limit:
            raise RuntimeError(
                f"convert: output {i} of the engine differs from PyTorch's by up to {difference:.3g}{where}, beyond the "
                f"{limit:.3g} that rounding explains (largest value {largest:.3g}); {remedy}."
            )


# ---- how far two correct implementations may differ


def rounding_bounds(model: nn.Module, inputs: Sequence[Any], fp16: bool = False) -> Any:
    """How far rounding alone may move each output of `model`: a 0-d float64 tensor in the place of each tensor.

    A network's own condition decides that: BatchNorm subtracts a large mean from an adder layer's sums, which magnifies
    their rounding. So the bound is measured, not guessed: the model runs with the result of every operation moved by as
    much as rounding may move it there, up or down at random, `_TRIALS` times; the bound is `_FACTOR` times the largest
    change seen, the factor standing for the trials not made, plus one rounding of the output.

    How much an operation's result may move, with u = eps / 2 of its type, one rounding (of float16 for `fp16`):
    * adder2d: 2 * u + 2 * eps32 * sqrt(CRS) of |y| + |bias|, what sequential float32 sums of one sign stay within;
      its result stays float32 for `fp16`, its input is rounded where it is computed.
    * convolutions and matrix products over L terms: u * (1 + sqrt(L) / 4) of |y| + rms(y), for rounded factors and for
      partial sums of both signs, whose roundings add up like a random walk; in float32 on a GPU plus 2^-10 of it, since
      both PyTorch and TensorRT may take TF32 (NVIDIA_TF32_OVERRIDE=0 forbids it to both).
    * sums and means over L terms: u of |y| + sqrt(L) * the sum (mean) of |x|, since the terms may have one sign; variances and
      deviations u * (1 + sqrt(L)) of |y|.
    * curves that runtimes approximate: 4 * u of |y| + 1, or of |y| + |x| where they are factors of x (measured: ONNX
      Runtime's sigmoid is off by 2.8 * u, its tanh by 5.5 * u).
    * everything else: u of |y|.
    """
    with torch.no_grad():
        expected = model(*inputs)
        bounds = tree_map(
            lambda t: torch.zeros((), dtype=torch.float64, device=t.device) if isinstance(t, Tensor) else t, expected
        )
        for trial in range(_TRIALS):
            rounding = _Rounding(fp16, seed=trial)
            with rounding:
                moved = model(*(rounding.move(t) if fp16 and isinstance(t, Tensor) else t for t in inputs))
            for bound, y, y0 in zip(tree_leaves(bounds), tree_leaves(moved), tree_leaves(expected), strict=True):
                if isinstance(y0, Tensor) and y0.numel() > 0:
                    change = (y.double() - y0.double()).abs().nan_to_num(0, 0, 0).max()
                    last = _unit(y0, fp16) * y0.double().abs().nan_to_num(0, 0, 0).max()
                    torch.maximum(bound, _FACTOR * change + last, out=bound)
    return bounds


def _unit(tensor: Tensor, fp16: bool) -> float:
    """The largest relative error of one rounding."""
    if not tensor.is_floating_point():
        return 0.0
    eps = torch.finfo(tensor.dtype).eps
    return max(eps, torch.finfo(torch.float16).eps) / 2 if fp16 else eps / 2


_aten = torch.ops.aten
_TERMS = {  # of a product: the length of its sums, from the arguments
    _aten.convolution: lambda args: args[1][0].numel(),
    _aten.mm: lambda args: args[0].shape[-1],
    _aten.bmm: lambda args: args[0].shape[-1],
    _aten.addmm: lambda args: args[1].shape[-1],
    _aten.baddbmm: lambda args: args[1].shape[-1],
}


_SUMS, _SPREADS = (_aten.sum, _aten.mean), (_aten.var, _aten.std)
_CURVES, _GATES = (_aten.sigmoid, _aten.tanh, _aten.elu), (_aten.silu, _aten.gelu, _aten.mish)


class _Rounding(TorchDispatchMode):
    """Moves every result by as much as rounding may, up or down at random."""

    def __init__(self, fp16: bool, seed: int) -> None:
        super().__init__()
        self.fp16, self.seed, self.generators = fp16, seed, {}

    def move(self, y: Any, bound: Tensor | float | None = None) -> Any:
        """y + or - bound (default: one rounding of y), the sign at random for each element."""
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        if y.device not in self.generators:
            self.generators[y.device] = torch.Generator(y.device).manual_seed(self.seed)
        wide = y.double() if y.dtype is torch.float64 else y.float()
        if bound is None:
            bound = _unit(y, self.fp16) * wide.abs()
        sign = torch.empty_like(wide).bernoulli_(0.5, generator=self.generators[y.device]).mul_(2).sub_(1)
        return (wide + sign * bound).to(y.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is torch.ops.torch2trt_adder.adder2d:
            weight, bias = args[1:3]
            size = result.float().abs() + (0 if bias is None else bias.abs()[:, None, None])
            sums = 2 * torch.finfo(torch.float32).eps * math.sqrt(weight[0].numel())
            return self.move(result, (torch.finfo(result.dtype).eps + sums) * size)
        if packet in _TERMS:
            relative = _unit(result, self.fp16) * (1 + math.sqrt(_TERMS[packet](args)) / 4)
            if result.dtype is torch.float32 and result.is_cuda and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
                relative += 2**-10
            size = result.float().abs()
            return self.move(result, relative * (size + size.square().mean().sqrt()))
        if packet in (*_SUMS, *_SPREADS) and result.is_floating_point() and result.numel() > 0:
            root = math.sqrt(args[0].numel() / result.numel())
            terms = func(args[0].abs(), *args[1:], **(kwargs or {})) if packet in _SUMS else result
            return self.move(result, _unit(result, self.fp16) * (result.float().abs() + root * terms.float().abs()))
        if packet in (*_CURVES, *_GATES):
            size = result.float().abs() + (args[0].float().abs() if packet in _GATES else 1)
            return self.move(result, 4 * _unit(result, self.fp16) * size)
        writes = any(argument.alias_info is not None for argument in func._schema.arguments)
        computes = any(isinstance(leaf, Tensor) for leaf in tree_leaves(args))
        if writes or not computes:  # a view, in place, or a new constant
            return result
        return tree_map(self.move, result)
