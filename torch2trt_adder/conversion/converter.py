"""convert(): a network with adder layers to a checked TensorRT engine, through torch2trt or ONNX."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..frontends.options import did_you_mean
from ..nn.adopt import adopted_copy
from ..numerics.comparison import compare, resized, tensor_leaves
from ..numerics.rounding import rounding_bounds
from . import arguments, routes
from .shapes import shapes_of


def convert(
    model: nn.Module, inputs: Tensor | Sequence[Any], route: str = "auto", **torch2trt_kwargs: Any
) -> nn.Module:
    """Converts `model` to a TensorRT engine and checks it against PyTorch.

    Third-party adder layers (see `adopt`) are converted as well; `model` stays as it is. The engine's outputs on
    `inputs`, and on the same values cut or repeated to the smallest and largest shapes, must agree with PyTorch's as far
    as rounding in this network can explain (see `rounding_bounds`), and be finite where PyTorch's are.

    Args:
        model: a network on a GPU; float32 or float16; in eval mode where that makes a difference.
        inputs: its positional arguments as a list or tuple, or one tensor; the example that is traced.
        route: "torch2trt"; "onnx" (`export_onnx`, `build_engine`), which does not need torch2trt and supports more
            operators; "auto" uses torch2trt where it can convert this network, else ONNX, and reports on stderr which
            and why.
        torch2trt_kwargs: fp16_mode, max_batch_size, min_shapes, opt_shapes, max_shapes, input_names, output_names and
            max_workspace_size on both routes, and fuse (False by default; with True, adder layers compute the BatchNorm,
            residual sum and ReLU or limits that follow them); through torch2trt also its other options, and
            allow_constants.

    Returns:
        A module called like `model`; its attribute ``route`` names the route, ``fused`` what adder layers
        compute besides their sums. From torch2trt a TRTModule, saved with
        state_dict(); through ONNX an `Engine`, wrapped where the model's inputs or outputs are nested.

    Raises:
        RuntimeError: no GPU, no TensorRT, or neither torch2trt nor onnx; no engine; an engine that differs from PyTorch.
        TypeError: `inputs` is not a list, a dtype that TensorRT does not support here, or an option that the route does
            not know.
        ValueError: a layer in training mode that computes something else there (dropout, BatchNorm), or model and inputs
            are not on one GPU; an unknown route.
    """
    if route not in routes.ROUTES:
        raise ValueError(f"convert: route must be one of {', '.join(routes.ROUTES)}, got {route!r}.")
    _check_options(route, torch2trt_kwargs)
    if isinstance(inputs, Tensor):
        inputs = [inputs]
    example = arguments.check_arguments(model, inputs)
    reason = routes.missing(route)
    if reason is not None:
        raise RuntimeError(f"convert: {reason}")
    arguments.check_devices(model, example)
    with torch.no_grad():
        expected = model(*example)  # if this fails, no route is to blame
    convert_through = functools.partial(_convert_through, model, inputs, example, expected, torch2trt_kwargs)
    if route != "auto":
        return convert_through(route)
    first, second = routes.TABLE
    obstacle = routes.missing(first)
    if obstacle is None:
        _say(f"route {first}")
        try:
            return convert_through(first)
        except Exception as error:  # torch2trt's own are of any class
            barred = routes.missing(second) or routes.TABLE[second].refuses(inputs, torch2trt_kwargs)
            if barred is not None:
                _say(f"{first} fails, and route {second} cannot help: {barred}")
                raise
            obstacle = f"{first} fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    _say(f"route {second}, since {obstacle}")
    return convert_through(second)


def _say(text: str) -> None:
    print(f"torch2trt_adder.convert: {text}", file=sys.stderr)


def _convert_through(
    model: nn.Module, inputs: Any, example: Sequence[Any], expected: Any, options: dict[str, Any], route: str
) -> nn.Module:
    """One route's engine, compared with PyTorch on the example and at the smallest and largest shapes."""
    fp16 = bool(options.get("fp16_mode", False))
    with torch.no_grad(), torch.cuda.device(tensor_leaves(example)[0].device):
        model_trt, flatten = routes.TABLE[route].convert(model, inputs, options)
        network = adopted_copy(model)
        bounds = flatten(rounding_bounds(network, example, fp16))
        compare_outputs(flatten(model_trt(*example)), flatten(expected), bounds, fp16)
        for args in _at_the_ends(inputs, example, options):
            try:
                expected, others = model(*args), flatten(rounding_bounds(network, args, fp16))
            except RuntimeError:  # the network does not support this shape, or PyTorch has no memory for it
                continue
            limits = [torch.maximum(a, b) for a, b in zip(bounds, others, strict=True)]
            where = f" for inputs of {', '.join(str(list(t.shape)) for t in tensor_leaves(args))}"
            compare_outputs(flatten(model_trt(*args)), flatten(expected), limits, fp16, where)
    model_trt.route = route  # type: ignore[assignment]  # an attribute of the caller's module
    if getattr(model_trt, "fused", None):
        _say(f"adder layers: {model_trt.fused}")
    return model_trt


def _at_the_ends(inputs: Any, example: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """The example's values at the smallest and largest shapes, where these are others."""
    if not isinstance(inputs, (list, tuple)):  # a data set; torch2trt uses its shapes where no others are given
        given = {key: value for key, value in options.items() if value is not None}
        options = {"min_shapes": inputs.min_shapes(), "max_shapes": inputs.max_shapes(), **given}
    tensors = tensor_leaves(example)
    least, _, most = shapes_of(tensors, options)
    ends = []
    for shapes in (least, most):
        if shapes != [tuple(tensor.shape) for tensor in tensors] and all(map(all, shapes)):
            ends.append(resized(example, shapes))
    return ends


def compare_outputs(
    outputs: Sequence[Tensor],
    expected: Sequence[Tensor],
    bounds: Sequence[Tensor],
    fp16: bool,
    where: str = "",
) -> None:
    """Compares an engine's outputs with PyTorch's; where PyTorch's are not finite, anything is right.

    Args:
        outputs: of the engine.
        expected: PyTorch's, of the same number.
        bounds: of each output, the largest difference that rounding explains, 0-d.
        fp16: the engine computes in float16, which the error then names as the remedy.
        where: words about the inputs for the error; they begin with a space.

    Raises:
        RuntimeError: an output has another shape, is further from PyTorch's than its bound, or is infinite or NaN where
            PyTorch's is finite.
    """
    remedy = "try fp16_mode=False" if fp16 else "please report this network"
    for i, (y, y0, bound) in enumerate(zip(outputs, expected, bounds, strict=True)):
        mismatch = compare(y, y0, bound, nonfinite="ignore")
        if mismatch is not None:
            raise RuntimeError(f"convert: {mismatch.text(f'output {i}', 'the engine', 'PyTorch', where)}; {remedy}.")


def _check_options(route: str, options: dict[str, Any]) -> None:
    """Raises for an option that no engine of this route can have: torch2trt ignores those that it does not know."""
    names = routes.TABLE if route == "auto" else (route,)
    known: list[str] = []
    for name in names:
        supported = routes.TABLE[name].options()
        if supported is None:
            return
        known += [option for option in supported if option not in known]
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known) or f"; its options are {', '.join(known)}."
            also = "" if route != "onnx" else " (route='torch2trt' supports all of torch2trt's options.)"
            raise TypeError(f"convert: route {route!r} has no option {name!r}{hint}{also}")
