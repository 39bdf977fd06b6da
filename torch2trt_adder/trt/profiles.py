"""Optimization profiles: the range of each dynamic axis of a network."""

import numbers
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..export.format import extents

Range = tuple[int, int, int]  # min, opt, max


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


def add_profile(builder: Any, network: Any, config: Any, proto: Any, ranges: Mapping[str, Range]) -> None:
    """Gives the config one profile with the range of each dynamic axis.

    Raises:
        ValueError: a dynamic axis without a range, or a range that is wrong or for no axis.
    """
    _check_ranges(proto, ranges)
    ranges_of = _ranges_of_inputs(proto, ranges)
    if not ranges_of:
        return
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


def _check_ranges(proto: Any, ranges: Mapping[str, Range]) -> None:
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


def _ranges_of_inputs(proto: Any, ranges: Mapping[str, Range]) -> dict[str, dict[int, Range]]:
    """The range of each dynamic axis, by input and axis."""
    limits, ranges_of = extents(proto), defaultdict[str, dict[int, Range]](dict)
    for input, axis, name in dynamic_axes(proto):
        key = f"{input}:{axis}"
        given = ranges[key] if key in ranges else ranges.get(name)
        if given is None:
            raise ValueError(
                f"axis {axis} of input {input!r} is dynamic: give its range, as in ranges={{{name or key!r}: (1, 8, 64)}} "
                f"(on the command line --range {name or key}=1:8:64)."
            )
        min_extent, max_extent = limits.get(name, (0, None))
        if given[0] < min_extent or (max_extent is not None and given[2] > max_extent):
            raise ValueError(
                f"axis {axis} of input {input!r} ({name}) may be {min_extent} to {max_extent or 'any'}, got the range "
                f"{tuple(given)}: beyond these extents the network's code takes a branch that the file does not hold; "
                "export it with an example there."
            )
        ranges_of[input][axis] = int(given[0]), int(given[1]), int(given[2])
    return ranges_of
