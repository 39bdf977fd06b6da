"""Finds and loads ``libtorch2trt_adder.so`` and declares the C entry points of ``csrc/adder2d.h`` for ctypes."""

import ctypes
import functools
import importlib.metadata
import os
import pathlib
import struct
import sys
from collections.abc import Iterator

FILE_NAME = "libtorch2trt_adder.so"
ENVIRONMENT_VARIABLE = "TORCH2TRT_ADDER_LIBRARY"


class Adder2dEpilogue(ctypes.Structure):
    """``Adder2dEpilogue`` of adder2d.h, where every field is explained."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "residual")),
        ("residual_stride", ctypes.c_int64 * 4),
        ("residual_type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("lower", ctypes.c_float),
        ("upper", ctypes.c_float),
    ]


class Adder2dParams(ctypes.Structure):
    """``Adder2dParams`` of adder2d.h, where every field is explained."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("N", "C", "H", "W", "K", "R", "S", "P", "Q")),
        *((name, ctypes.c_int32) for name in ("stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w", "groups")),
        *((name, ctypes.c_int32) for name in ("x_type", "w_type", "y_type", "reserved")),
        ("x_stride", ctypes.c_int64 * 4),
        ("y_stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("x", "w", "b", "y", "workspace")),
        ("workspace_bytes", ctypes.c_size_t),
        ("epilogue", ctypes.c_void_p),
        ("packed_w", ctypes.c_void_p),
    ]


class Adder2dDgradParams(ctypes.Structure):
    """``Adder2dDgradParams`` of adder2d.h."""

    _fields_ = [
        ("layer", Adder2dParams),
        ("dx_type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("dx_stride", ctypes.c_int64 * 4),
        ("dx", ctypes.c_void_p),
    ]


class Adder2dWgradParams(ctypes.Structure):
    """``Adder2dWgradParams`` of adder2d.h."""

    _fields_ = [
        ("layer", Adder2dParams),
        ("channels_last", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("convolved_stride", ctypes.c_int64 * 4),
        ("eta", ctypes.c_double),
        ("convolved", ctypes.c_void_p),
        ("dw", ctypes.c_void_p),
    ]


# The same structs for `struct.pack`, which costs a fraction of filling a ctypes.Structure; in two pieces, because the
# first depends only on shapes, so that a call has only the pointers to pack.
PROBLEM = struct.Struct("@20i8q")
POINTERS = struct.Struct("@5PN2P")  # x, w, b, y, workspace, workspace_bytes, epilogue, packed_w
EPILOGUE = struct.Struct("@3P4q2i2f")
DGRAD = struct.Struct("@2i4qP")  # Adder2dDgradParams after its Adder2dParams
WGRAD = struct.Struct("@2i4qd2P")  # Adder2dWgradParams after its Adder2dParams


def path() -> pathlib.Path:
    """The library's file: ``$TORCH2TRT_ADDER_LIBRARY``, else the file beside this one, else an installed package's.

    The last is for Python that was started in a clone: it imports the clone's folder, which has no library unless one
    was built in place. Where no library exists, this is the first place that was looked at.
    """
    places = list(_places())
    return next((file for file, note in places if not note and file.is_file()), places[0][0])


def _places() -> Iterator[tuple[pathlib.Path, str]]:
    """Where the library may be, the best first, and why an existing file is not used ("": it is used)."""
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if override:
        yield pathlib.Path(override).resolve(), ""  # ctypes looks up a bare name elsewhere
        return
    here = pathlib.Path(__file__).resolve().parent
    yield here / FILE_NAME, ""
    ours = sys.modules[__package__].__version__
    # More than one can be found: a build leaves a *.egg-info in the clone, which is found first there.
    for distribution in importlib.metadata.distributions(name=__package__):
        file = pathlib.Path(str(distribution.locate_file(f"{__package__}/{FILE_NAME}"))).resolve()
        if file.parent != here:
            theirs = distribution.version
            yield file, "" if theirs == ours else f"of version {theirs}, while {here} is version {ours}"


@functools.cache
def load() -> ctypes.CDLL:
    """The loaded library, with the prototypes of adder2d.h. Params go in as packed bytes or as a pointer.

    Raises:
        RuntimeError: the file is missing, cannot be loaded, or was built from another version of adder2d.h.
    """
    file = path()
    remedy = (
        "build it with `pip install .` in the project's root, "
        f"or point the environment variable {ENVIRONMENT_VARIABLE} to a built {FILE_NAME}"
    )
    if not file.is_file():
        places = " and ".join(f"{place} ({note})" if note else str(place) for place, note in _places())
        raise RuntimeError(f"The library of torch2trt_adder was looked for at {places} and is not there: {remedy}.")
    try:
        library = ctypes.CDLL(str(file))
        prototypes = {
            "adder2d_params_size": (ctypes.c_size_t, []),
            "adder2d_check": (ctypes.c_char_p, [ctypes.c_void_p]),
            "adder2d_fprop_workspace": (ctypes.c_size_t, [ctypes.c_void_p]),
            "adder2d_fprop": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p]),
            "adder2d_packed_weight_bytes": (ctypes.c_size_t, [ctypes.c_void_p]),
            "adder2d_pack_weights_cpu": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p]),
            "adder2d_fprop_cpu": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32]),
            "adder2d_dgrad_params_size": (ctypes.c_size_t, []),
            "adder2d_dgrad_check": (ctypes.c_char_p, [ctypes.c_void_p]),
            "adder2d_dgrad_workspace": (ctypes.c_size_t, [ctypes.c_void_p]),
            "adder2d_dgrad": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p]),
            "adder2d_dgrad_cpu": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32]),
            "adder2d_wgrad_params_size": (ctypes.c_size_t, []),
            "adder2d_wgrad_check": (ctypes.c_char_p, [ctypes.c_void_p]),
            "adder2d_wgrad_takes": (ctypes.c_int32, [ctypes.c_void_p]),
            "adder2d_wgrad_workspace": (ctypes.c_size_t, [ctypes.c_void_p]),
            "adder2d_wgrad": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p]),
            "adder2d_cpu_error_string": (ctypes.c_char_p, [ctypes.c_int32]),
            "adder2d_error_string": (ctypes.c_char_p, [ctypes.c_int32]),
            **{
                f"adder2d_{name}_describe": (ctypes.c_char_p, [ctypes.c_void_p]) for name in ("fprop", "dgrad", "wgrad")
            },
            **{f"adder2d_{name}_force": (ctypes.c_char_p, [ctypes.c_char_p]) for name in ("fprop", "dgrad", "wgrad")},
        }
        for name, (result, arguments) in prototypes.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"The library {file} cannot be used ({error}): {remedy}.") from error
    sizes = {
        "Adder2dParams": (library.adder2d_params_size(), ctypes.sizeof(Adder2dParams)),
        "Adder2dDgradParams": (library.adder2d_dgrad_params_size(), ctypes.sizeof(Adder2dDgradParams)),
        "Adder2dWgradParams": (library.adder2d_wgrad_params_size(), ctypes.sizeof(Adder2dWgradParams)),
    }
    for name, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise RuntimeError(
                f"The library {file} was built from another version of adder2d.h "
                f"({name} has {theirs} bytes there, {ours} here): {remedy}."
            )
    return library
