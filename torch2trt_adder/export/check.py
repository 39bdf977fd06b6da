"""The exported file compared with the network, in ONNX Runtime and in PyTorch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..numerics import comparison, rounding
from .runtime import onnxruntime_session, run_onnxruntime


def call_model(model: Callable[..., Any], *args: Any) -> Any:
    """The model's outputs; `args` stay as they are, even where the model writes into its inputs."""
    with torch.no_grad():
        return model(*tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, args))


def _run(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    return [leaf.cpu() for leaf in tree_leaves(call_model(model, *args)) if isinstance(leaf, Tensor)]


def _bounds(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    try:
        bounds = rounding.rounding_bounds(functools.partial(call_model, model), args)
    except NotImplementedError as error:  # of a dispatch mode, for torch.cond and the like
        raise RuntimeError(
            f"export_onnx: the check cannot follow this network ({str(error).splitlines()[0][:100]}); leave it out with "
            "check=False (on the command line --no-check)."
        ) from error
    return [leaf.cpu() for leaf in tree_leaves(bounds) if isinstance(leaf, Tensor)]


def compare_with_adopted(own: nn.Module, adopted: nn.Module, args: tuple[Any, ...]) -> None:
    """Raises unless the network that was given computes what it does with its adder layers adopted, which is exported."""
    try:
        expected = _run(own, args)
    except Exception as error:
        raise RuntimeError(
            f"export_onnx: the network itself fails on args: {type(error).__name__}: {error}; its own adder layers must run, "
            "since the file is compared with them (or replace them yourself, by adopt())."
        ) from error
    try:
        got, bounds = _run(adopted, args), _bounds(adopted, args)
    except Exception as error:
        raise RuntimeError(
            f"export_onnx: the network fails on args once its adder layers are replaced by Adder2d: {type(error).__name__}: "
            f"{error}; {_NOT_AN_ADDER}."
        ) from error
    sides = "the network with Adder2d in place of its adder layers", "the network as it is"
    _compare(got, expected, bounds, sides, "", _NOT_AN_ADDER)


_NOT_AN_ADDER = (
    "a layer that looks like an adder layer computes something else: rename its parameter `adder`, or replace the layer "
    "yourself"
)


def compare_with_onnxruntime(
    data: bytes, own: nn.Module, module: nn.Module, args: tuple[Any, ...], limits: Mapping[str, tuple[int, int | None]]
) -> None:
    """Raises unless the file computes what `own` does; `module` is the same network with `Adder2d`, of known rounding."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    session = onnxruntime_session(data)
    inputs = session.get_inputs()

    def compare(
        args: tuple[Any, ...], expected: list[Tensor], where: str = "", remedy: str = "please report this network"
    ) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        try:
            got = run_onnxruntime(session, tensors)
        except RuntimeError as error:
            if all(tensor.numel() for tensor in tensors):
                raise
            raise RuntimeError(
                f"export_onnx: args holds an empty tensor; give an example with values ({error})."
            ) from error
        _compare(got, expected, _bounds(module, args), ("ONNX Runtime", "PyTorch"), where, remedy)

    compare(args, _run(own, args))
    dims = [[dim if isinstance(dim, str) else None for dim in entry.shape] for entry in inputs]
    extent_of = {dim: n for names, t in zip(dims, tensors) for dim, n in zip(names, t.shape) if dim is not None}
    for change in (_another, _double) if extent_of else ():  # the first that the network takes
        other_of = {dim: change(extent, *limits.get(dim, (0, None))) for dim, extent in extent_of.items()}
        other = comparison.resized(
            args,
            [
                [extent if dim is None else other_of[dim] for dim, extent in zip(names, t.shape)]
                for names, t in zip(dims, tensors)
            ],
        )
        try:
            expected = _run(own, other)
        except Exception:  # in its own code: nothing to compare with
            continue
        where = f" for {', '.join(f'{dim} = {extent}' for dim, extent in other_of.items())}"
        return compare(
            other,
            expected,
            where,
            "the file is only valid for the extents of args, so make other axes dynamic, or none",
        )


def _another(extent: int, least: int, most: int | None) -> int:
    return extent - 1 if extent > max(least, 1) else min(extent + 1, most or extent + 1)


def _double(extent: int, least: int, most: int | None) -> int:
    return min(2 * extent, most or 2 * extent)


def _compare(
    got: list[Tensor], expected: list[Tensor], bounds: list[Tensor], sides: tuple[str, str], where: str, remedy: str
) -> None:
    """Raises RuntimeError where an output of the first side is further from the second's than its bound."""
    first, second = sides
    if len(got) != len(expected):
        raise RuntimeError(
            f"export_onnx: there are {len(got)} outputs in {first} and {len(expected)} in {second}{where}; {remedy}."
        )
    for i, (y, y0, bound) in enumerate(zip(got, expected, bounds, strict=True)):
        # Where the second is infinite, a number that is nearly too large is as good.
        mismatch = comparison.compare(y, y0, bound, nonfinite="saturate", same_dtype=True)
        if mismatch is not None:
            raise RuntimeError(f"export_onnx: {mismatch.text(f'output {i}', first, second, where)}; {remedy}.")
