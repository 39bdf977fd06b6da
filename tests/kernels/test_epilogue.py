"""The fused epilogue: y = clamp(scale * (b - sum) + shift + residual, lower, upper), on the CPU and in every kernel family."""

import ctypes
import dataclasses
import itertools
import math

import pytest
import torch
from conftest import Case
from test_forced_kernels import (
    DEPTHWISE,
    DEPTHWISES,
    FORMATS,
    POINTWISE,
    SMALL,
    SPLIT,
    SPLITS,
    STRIDED,
    TILES,
    TYPES,
    forced,
    is_choice,
    launch,
    layer_params,
    output,
)
from torch import Tensor

from torch2trt_adder import library, reference
from torch2trt_adder.numerics.comparison import assert_within
from torch2trt_adder.numerics.tolerance import half_error, sum_error

INFINITY = math.inf
HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Which parts an epilogue has; `lower` and `upper` as they are."""

    name: str
    scale: bool = False
    shift: bool = False
    residual: bool = False
    lower: float = -INFINITY
    upper: float = INFINITY


PARTS = [
    Parts("nothing"),
    Parts("scale", scale=True),
    Parts("shift", shift=True),
    Parts("residual", residual=True),
    Parts("relu", scale=True, shift=True, lower=0.0),
    Parts("clip", scale=True, shift=True, lower=-1.5, upper=1.0),
    Parts("all", scale=True, shift=True, residual=True, lower=0.0, upper=2.5),
]
ALL = PARTS[-1]
WITHOUT_LIMITS = Parts("no limits", scale=True, shift=True, residual=True)

formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclasses.dataclass
class Epilogue:
    """The tensors of an epilogue, and its limits."""

    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    lower: float
    upper: float

    def struct(self) -> library.Adder2dEpilogue:
        r = self.residual
        return library.Adder2dEpilogue(
            *(None if t is None else t.data_ptr() for t in (self.scale, self.shift, r)),
            (0, 0, 0, 0) if r is None else tuple(r.stride()),
            0 if r is None else TYPES[r.dtype],
            0,
            self.lower,
            self.upper,
        )


def make_epilogue(case: Case, parts: Parts, y: Tensor, residual_dtype: torch.dtype | None = None) -> Epilogue:
    """Values that bring outputs near the limits: sums have a mean of about 1.13 a term and a deviation of its root."""
    generator = torch.Generator().manual_seed(7)
    terms = case.C // case.groups * case.R * case.S

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(y.device)

    scale = draw(case.K) / math.sqrt(terms)
    scale[0] = 0.0
    mean = 1.13 * terms * (scale if parts.scale else torch.ones_like(scale))
    shift = mean + draw(case.K)
    layout = torch.contiguous_format if y.is_contiguous() else torch.channels_last
    residual = draw(*y.shape).to(residual_dtype or y.dtype).contiguous(memory_format=layout)
    return Epilogue(
        scale if parts.scale else None,
        shift if parts.shift else None,
        residual if parts.residual else None,
        parts.lower,
        parts.upper,
    )


def exact_distances(case: Case, x: Tensor, w: Tensor) -> Tensor:
    return reference.adder2d(x.double(), w.double(), None, *case.geometry)


def assert_fused(
    y: Tensor, x: Tensor, w: Tensor, b: Tensor | None, e: Epilogue, case: Case, distances: Tensor | None = None
) -> None:
    """y within the bound: |scale| times that of the sum (numerics/tolerance.py), and the roundings of what follows in float32.

    The product, and the two sums after it, round by at most half an eps of what they round, which is at most the sum of
    the parts' magnitudes; the limits move no two values apart; at the end comes one rounding to y's type.
    `distances` are exact_distances where the caller has them.
    """
    halves, rounded_weight = x.dtype in HALVES, w.dtype is torch.float32
    x, w = x.double(), w.double()

    def of_filter(t: Tensor | None, missing: float) -> Tensor:
        missing_everywhere = torch.full((case.K, 1, 1), missing, dtype=torch.float64, device=y.device)
        return missing_everywhere if t is None else t.double()[:, None, None]

    scale, shift, bias = of_filter(e.scale, 1.0), of_filter(e.shift, 0.0), of_filter(b, 0.0)
    residual = torch.zeros_like(scale) if e.residual is None else e.residual.double()
    distances = exact_distances(case, x, w) if distances is None else distances
    v = distances + bias
    expected = (scale * v + shift + residual).clamp(e.lower, e.upper)
    terms = distances.abs() + bias.abs()
    eps = torch.finfo(torch.float32).eps
    of_sum = sum_error(w[0].numel()) * terms + eps * v.abs()
    if halves:
        of_weight = rounded_weight * w.abs().sum((1, 2, 3))[:, None, None]
        of_sum = of_sum + half_error(terms, of_weight)
    parts = (scale * v).abs() + shift.abs() + residual.abs()
    kind = torch.finfo(y.dtype)
    limit = scale.abs() * of_sum + 1.5 * eps * parts
    assert_within(y, expected, (1 + kind.eps) * limit + kind.eps * (expected.abs() + kind.tiny))


def fused_params(
    case: Case, x: Tensor, w: Tensor, y: Tensor, b: Tensor | None, struct: library.Adder2dEpilogue
) -> library.Adder2dParams:
    params = layer_params(case, x, w, y, b)
    params.epilogue = ctypes.addressof(struct)
    return params


# ---- the description


def test_struct_matches_header():
    """Packed bytes are the struct, and the library reads it: a limit that is not a number is found where it lies."""
    packed = library.EPILOGUE.pack(1, 2, 3, 4, 5, 6, 7, 8, 9, 10.0, 11.0)
    assert len(packed) == ctypes.sizeof(library.Adder2dEpilogue)
    struct = library.Adder2dEpilogue.from_buffer_copy(packed)
    assert (struct.scale, struct.shift, struct.residual, *struct.residual_stride) == tuple(range(1, 8))
    assert (struct.residual_type, struct.reserved, struct.lower, struct.upper) == (8, 9, 10.0, 11.0)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"reserved": 1}, "the epilogue's reserved must be 0, got 1"),
        ({"residual_type": 3}, "residual_type must be float32 (0), float16 (1) or bfloat16 (2), got 3"),
        ({"lower": 2.0, "upper": 1.0}, "limits must be numbers with lower <= upper, got lower 2 and upper 1"),
        ({"lower": math.nan}, "limits must be numbers with lower <= upper, got lower nan and upper inf"),
        ({"upper": math.nan}, "limits must be numbers with lower <= upper, got lower -inf and upper nan"),
        (
            {"residual": 16, "residual_stride": (0, 2**62, 0, 0)},
            "the strides of the residual must reach fewer than 2^58",
        ),
    ],
)
def test_check(change, reason):
    x, w, b = SMALL.tensors()
    struct = Epilogue(None, None, None, -INFINITY, INFINITY).struct()
    params = fused_params(SMALL, x, w, output(SMALL, x, w), b, struct)
    check = library.load().adder2d_check
    assert check(ctypes.byref(params)) is None
    for name, value in change.items():
        setattr(struct, name, value)
    assert reason in check(ctypes.byref(params)).decode()
    assert library.load().adder2d_fprop(ctypes.byref(params), None) == 1
    assert library.load().adder2d_fprop_cpu(ctypes.byref(params), 1) == 1


@pytest.mark.parametrize(
    "pass_name, type_", [("dgrad", library.Adder2dDgradParams), ("wgrad", library.Adder2dWgradParams)]
)
def test_gradients_refuse_one(pass_name, type_):
    x, w, b = SMALL.tensors()
    struct = Epilogue(None, None, None, -INFINITY, INFINITY).struct()
    gradient = type_(layer=fused_params(SMALL, x, w, output(SMALL, x, w), b, struct))
    reason = getattr(library.load(), f"adder2d_{pass_name}_check")(ctypes.byref(gradient))
    assert reason == b"epilogue must be null: the gradients do not support one"
    gradient.layer.epilogue = None
    assert getattr(library.load(), f"adder2d_{pass_name}_check")(ctypes.byref(gradient)) is None


# ---- CPU


def cpu(case: Case, x: Tensor, w: Tensor, b: Tensor | None, e: Epilogue, y: Tensor | None = None) -> Tensor:
    y = output(case, x, w) if y is None else y
    struct = e.struct()
    params = fused_params(case, x, w, y, b, struct)
    assert library.load().adder2d_fprop_cpu(ctypes.byref(params), 2) == 0
    return y


def test_cpu(case):
    distances = exact_distances(case, *case.tensors()[:2])
    for memory_format, parts in itertools.product(FORMATS, PARTS):
        x, w, b = case.tensors(memory_format=memory_format)
        e = make_epilogue(case, parts, output(case, x, w))
        for bias in (None, b):
            assert_fused(cpu(case, x, w, bias, e), x, w, bias, e, case, distances)


def other_layouts(residual: Tensor) -> dict[str, Tensor]:
    """The same or other values as the layouts that callers may have."""
    shifted = torch.empty(residual.numel() + 1, dtype=residual.dtype, device=residual.device)[1:]
    shifted = shifted.as_strided(residual.shape, residual.stride())
    shifted.copy_(residual)
    turned = torch.channels_last if residual.is_contiguous() else torch.contiguous_format
    return {
        "misaligned": shifted,
        "other format": residual.contiguous(memory_format=turned),
        "one value a filter": residual[:1, :, :1, :1].expand_as(residual),
        "reversed axes": residual.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "of a wider tensor": torch.cat([residual, residual], 3)[..., : residual.shape[3]],
    }


@formats
@pytest.mark.parametrize(
    "layout", ["misaligned", "other format", "one value a filter", "reversed axes", "of a wider tensor"]
)
@pytest.mark.parametrize("case", [SMALL, Case("linear", 37, 20, 1, 1, 9, 1, 1)], ids=lambda case: case.name)
def test_cpu_residual_of_any_strides(case, layout, memory_format):
    x, w, b = case.tensors(memory_format=memory_format)
    e = make_epilogue(case, ALL, output(case, x, w))
    e.residual = other_layouts(e.residual)[layout]
    assert_fused(cpu(case, x, w, b, e), x, w, b, e, case)


@formats
@pytest.mark.parametrize("case", [SMALL, DEPTHWISE, STRIDED], ids=lambda case: case.name)
def test_cpu_residual_is_output(case, memory_format):
    x, w, b = case.tensors(memory_format=memory_format)
    e = make_epilogue(case, ALL, output(case, x, w))
    y = e.residual
    e.residual = y.clone(memory_format=torch.preserve_format)
    in_place = dataclasses.replace(e, residual=y)
    assert_fused(cpu(case, x, w, b, in_place, y), x, w, b, e, case)


def special_tensors(
    case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """NaN and infinities in some images, filters and biases; one image stays finite."""
    x, w, b = case.tensors(dtype, device)
    x[0, 0, 0, 0], x[0, -1, -1, -1] = math.nan, INFINITY
    w[-1, 0, 0, 0] = INFINITY
    b[1], b[2] = math.nan, INFINITY
    return x, w, b


def special_residual(e: Epilogue) -> None:
    """NaN, and an infinity that meets the opposite one."""
    e.residual[0, 3, 0, 0], e.residual[:, -1] = math.nan, INFINITY
    e.residual[-1, 0] = -INFINITY


@pytest.mark.parametrize("parts", [ALL, PARTS[4], PARTS[5], WITHOUT_LIMITS], ids=lambda parts: parts.name)
def test_cpu_keeps_nan(parts):
    x, w, b = special_tensors(SMALL)
    e = make_epilogue(SMALL, parts, output(SMALL, x, w))
    if e.residual is not None:
        special_residual(e)
    y = cpu(SMALL, x, w, b, e)
    assert y[:, 1].isnan().all() and y.isfinite().any()
    assert_fused(y, x, w, b, e, SMALL)


def test_cpu_refuses_residual_of_another_type():
    x, w, b = SMALL.tensors()
    y = output(SMALL, x, w)
    e = make_epilogue(SMALL, ALL, y, torch.float16)
    struct = e.struct()
    params = fused_params(SMALL, x, w, y, b, struct)
    assert library.load().adder2d_fprop_cpu(ctypes.byref(params), 1) == 1


# ---- GPU

ODD_PLANE = Case("odd plane", 3, 40, 13, 11, 70, 1, 1)
WINDOWS = {4: Case("r4", 5, 16, 9, 28, 72, 3, 3, padding=(1, 1)), 7: Case("r7", 5, 16, 9, 21, 70, 3, 3, padding=(1, 1)),
           2: Case("r2", 5, 16, 10, 14, 37, 3, 3, padding=(1, 1))}  # fmt: skip


def forced_cases() -> list[tuple[str, Case, torch.dtype]]:
    """Every family and tile, with problems of odd sizes that it supports, and types of x."""
    found = [(f"shared:{tile}", SMALL, dtype) for tile in TILES["fprop"]["shared"] for dtype in TYPES]
    found += [(f"direct:{tile}", SMALL, dtype) for tile in TILES["fprop"]["direct"] for dtype in TYPES]
    found += [("depthwise:7x2", case, dtype) for case in DEPTHWISES for dtype in TYPES]
    found += [
        (f"half:{tile}", case, dtype)
        for tile in TILES["fprop"]["half"]
        for case in (STRIDED, ODD_PLANE, POINTWISE)
        for dtype in HALVES
    ]
    found += [
        (f"simt:{tile}", case, dtype)
        for tile in TILES["fprop"]["simt"]
        for case in (STRIDED, POINTWISE)
        for dtype in TYPES
    ]
    found += [(f"window:{tile}", WINDOWS[int(tile.split("r")[1])], torch.float32) for tile in TILES["fprop"]["window"]]
    found += [(f"pointwise:{tile}", POINTWISE, torch.float32) for tile in TILES["fprop"]["pointwise"]]
    for family, case in (("simt-64x128", STRIDED), ("window-32x64r4", WINDOWS[4]), ("pointwise-64x128", POINTWISE)):
        found += [(f"converted:{family}", case, dtype) for dtype in HALVES]
    return found


def gpu(
    case: Case, choice: str, x: Tensor, w: Tensor, b: Tensor | None, e: Epilogue, y: Tensor | None = None
) -> Tensor:
    """The output of the kernel that is forced ("": of the one that is chosen)."""
    if "half" in choice and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("half pairs need compute capability 8.0")
    if "window" in choice and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("these tiles need more shared memory")
    y = output(case, x, w) if y is None else y
    struct = e.struct()
    params = fused_params(case, x, w, y, b, struct)
    with forced("fprop", choice):
        text = launch("fprop", params, params)
    assert is_choice(text, choice), f"{choice} was forced, {text} ran"
    return y


every_kernel = pytest.mark.parametrize(
    "choice, case, dtype", forced_cases(), ids=lambda v: getattr(v, "name", str(v).removeprefix("torch."))
)


@pytest.mark.gpu
@every_kernel
@formats
def test_kernel(choice, case, dtype, memory_format):
    x, w, b = case.tensors(dtype, "cuda", memory_format)
    distances = exact_distances(case, x, w)
    for parts in PARTS:
        e = make_epilogue(case, parts, output(case, x, w))
        for bias in (None, b):
            assert_fused(gpu(case, choice, x, w, bias, e), x, w, bias, e, case, distances)


@pytest.mark.gpu
@every_kernel
@formats
def test_residual_is_output(choice, case, dtype, memory_format):
    x, w, b = case.tensors(dtype, "cuda", memory_format)
    e = make_epilogue(case, ALL, output(case, x, w))
    y = e.residual
    e.residual = y.clone(memory_format=torch.preserve_format)
    assert_fused(gpu(case, choice, x, w, b, dataclasses.replace(e, residual=y), y), x, w, b, e, case)


FAMILIES = [("shared", SMALL), ("direct", SMALL), ("half", ODD_PLANE), ("simt", POINTWISE), ("window", WINDOWS[4])]
ANY_KERNEL = [
    *FAMILIES,
    ("", DEPTHWISE),
    ("", POINTWISE),
]  # the depth-wise and pointwise families leave these to others


@pytest.mark.gpu
@pytest.mark.parametrize("choice, case", ANY_KERNEL, ids=lambda v: getattr(v, "name", v))
@formats
@pytest.mark.parametrize(
    "layout", ["misaligned", "other format", "one value a filter", "reversed axes", "of a wider tensor"]
)
def test_residual_of_any_strides(choice, case, memory_format, layout):
    dtype = torch.float16 if choice in ("half", "direct") else torch.float32
    x, w, b = case.tensors(dtype, "cuda", memory_format)
    e = make_epilogue(case, ALL, output(case, x, w))
    e.residual = other_layouts(e.residual)[layout]
    assert_fused(gpu(case, choice, x, w, b, e), x, w, b, e, case)


@pytest.mark.gpu
@pytest.mark.parametrize("choice, case", [*FAMILIES, ("depthwise", DEPTHWISE), ("pointwise", POINTWISE)], ids=lambda v: getattr(v, "name", v))  # fmt: skip
@formats
@pytest.mark.parametrize("residual_dtype", TYPES, ids=str)
@pytest.mark.parametrize("y_dtype", TYPES, ids=str)
def test_types(choice, case, memory_format, y_dtype, residual_dtype):
    """Types of output and residual are free of the input's (of the input's and each other's where a family allows it)."""
    dtype = {"half": torch.bfloat16, "direct": torch.float16, "depthwise": y_dtype}.get(choice, torch.float32)
    x, w, b = case.tensors(dtype, "cuda", memory_format)
    y = output(case, x, w).to(y_dtype)
    e = make_epilogue(case, ALL, y, residual_dtype)
    assert_fused(gpu(case, choice, x, w, b, e, y), x, w, b, e, case)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("choice", ["half:64x128", "half:32x64", "simt:64x128", "simt:32x64", "window:64x128r4", "window:32x56r7"])  # fmt: skip
@formats
def test_split_reduction(choice, splits, memory_format):
    """The epilogue is applied once, by the block or the kernel that adds the splits."""
    dtype = torch.float16 if choice.startswith("half") else torch.float32
    x, w, b = SPLIT.tensors(dtype, "cuda", memory_format)
    y = output(SPLIT, x, w)
    e = make_epilogue(SPLIT, ALL, y)
    got = gpu(SPLIT, f"{choice}:{splits}", x, w, b, e, y)
    assert_fused(got, x, w, b, e, SPLIT)
    for _ in range(3):
        assert torch.equal(gpu(SPLIT, f"{choice}:{splits}", x, w, b, e), got)


@pytest.mark.gpu
@pytest.mark.parametrize("choice, case", [*FAMILIES, ("pointwise", POINTWISE)], ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("parts", [ALL, PARTS[4], PARTS[5], WITHOUT_LIMITS], ids=lambda parts: parts.name)
def test_keeps_nan(choice, case, parts):
    dtype = torch.float16 if choice == "half" else torch.float32
    x, w, b = special_tensors(case, "cuda", dtype)
    e = make_epilogue(case, parts, output(case, x, w))
    if e.residual is not None:
        special_residual(e)
    y = gpu(case, choice, x, w, b, e)
    assert y[:, 1].isnan().all() and y.isfinite().any()
    assert_fused(y, x, w, b, e, case)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["half", "direct", "simt", "shared"])
def test_overflows_to_infinity_only_at_the_end(choice):
    """Sums beyond float16's range are scaled back into it; what is still beyond becomes an infinity, or the limit."""
    x, w, _ = SMALL.tensors(torch.float16, "cuda")
    x = x * 2000
    y = output(SMALL, x, w)
    terms = w[0].numel()
    small = Epilogue(torch.full((SMALL.K,), 1 / terms, device="cuda"), None, None, -INFINITY, INFINITY)
    got = gpu(SMALL, choice, x, w, None, small, y)
    assert got.isfinite().all()
    assert_fused(got, x, w, None, small, SMALL)
    unscaled = Epilogue(None, None, None, -INFINITY, INFINITY)
    assert (gpu(SMALL, choice, x, w, None, unscaled) == -INFINITY).all()
    clipped = Epilogue(None, None, None, -6.0, INFINITY)
    assert (gpu(SMALL, choice, x, w, None, clipped) == -6).all()


@pytest.mark.gpu
@dtypes
@formats
def test_chosen_kernel(case, dtype, memory_format):
    x, w, b = case.tensors(dtype, "cuda", memory_format)
    e = make_epilogue(case, ALL, output(case, x, w))
    assert_fused(gpu(case, "", x, w, b, e), x, w, b, e, case)
