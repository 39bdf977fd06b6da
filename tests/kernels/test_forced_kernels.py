"""Every kernel family, tile and way to split, on any GPU: forced by adder2d_*_force and told by adder2d_*_describe."""

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Case
from torch import Tensor

from torch2trt_adder import library, reference
from torch2trt_adder.numerics.definition import assert_forward, assert_grad_input, assert_grad_weight

# Tiles by pass and family; test_tables compares them with the library's.
TILES = {
    "fprop": {
        "shared": ["128x2x4", "128x4x1", "8x1x2", "8x1x1"],
        "depthwise": ["7x2"],
        "direct": ["2x4", "4x1"],
        "half": ["64x128", "32x256", "16x256", "32x64"],
        "simt": ["64x128", "128x64", "32x256", "16x256", "32x64"],
        "window": [f"{tile}r{run}" for run, tiles in {
            4: ["64x128", "32x128", "32x64", "16x512"],
            7: ["64x112", "32x112", "32x56", "16x448"],
            2: ["64x128", "32x128", "32x64", "16x512"],
        }.items() for tile in tiles],
        "pointwise": ["64x128", "32x256"],
    },
    "dgrad": {"direct": ["1x1"], "simt": ["64x64", "128x32", "32x128", "16x256"]},
    "wgrad": {"convolved": [], "simt": ["16x16", "32x16", "32x32"]},
}  # fmt: skip
# On a float32 copy of float16 and bfloat16 input: every tile of the families that then have the problem.
TILES["fprop"]["converted"] = [
    f"{family}-{tile}" for family in ("simt", "window", "pointwise") for tile in TILES["fprop"][family]
]
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMATS = [torch.contiguous_format, torch.channels_last]
NOT_SUPPORTED = 801  # cudaErrorNotSupported

# Filters and pixels that fill no tile, several tiles on both axes, and slices enough for nine splits of every tile.
SPLIT = Case("split", 5, 96, 9, 28, 150, 3, 3, padding=(1, 1))
PLANE = Case("plane", 5, 320, 14, 14, 150, 1, 1)
POINTWISE = Case("pointwise", 7, 72, 14, 18, 100, 1, 1)
DEPTHWISE = Case("depthwise", 3, 40, 16, 22, 40, 3, 3, padding=(1, 1), groups=40)
DEPTHWISES = [
    Case(f"depthwise_{size}_{step}", 3, 40, 16, 22, 40, size, size, (step, step), (size // 2, size // 2), groups=40)
    for size in (3, 5)
    for step in (1, 2)
]
SMALL = Case("small", 2, 21, 7, 6, 11, 3, 3, padding=(1, 1))
STRIDED = Case("strided", 3, 70, 15, 14, 41, 3, 3, stride=(2, 2), padding=(1, 1))
# A number of splits, and of tiles that are whole: few splits meet in the last block, more in a kernel of either kind.
SPLITS = ["1:", "2:0", "3:1", "5:0", "5:1", "9:0"]

formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
gpu = pytest.mark.gpu


def tiles(name: str, family: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("tile", TILES[name][family])


def entry(name: str) -> Any:
    return getattr(library.load(), f"adder2d_{name}")


@contextlib.contextmanager
def forced(name: str, choice: str) -> Iterator[None]:
    assert entry(f"{name}_force")(choice.encode()) is None
    try:
        yield
    finally:
        assert entry(f"{name}_force")(None) is None


def layer_params(case: Case, x: Tensor, w: Tensor, y: Tensor, b: Tensor | None = None) -> library.Adder2dParams:
    """The problem of the tensors, which may be meta tensors."""
    (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w), groups = case.geometry
    params = library.Adder2dParams(
        *x.shape, *(w.shape[i] for i in (0, 2, 3)), *y.shape[2:], stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups,
        TYPES[x.dtype], TYPES[w.dtype], TYPES[y.dtype], 0, tuple(x.stride()), tuple(y.stride()),
    )  # fmt: skip
    if not x.is_meta:
        params.x, params.w, params.y = x.data_ptr(), w.data_ptr(), y.data_ptr()
        params.b = None if b is None else b.data_ptr()
    return params


def output(case: Case, x: Tensor, w: Tensor) -> Tensor:
    size = reference.adder2d(x[:1].to("meta"), w.to("meta"), None, *case.geometry).shape[1:]
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty(len(x), *size, dtype=x.dtype, device=x.device, memory_format=layout)


def problem(case: Case, dtype: torch.dtype = torch.float32) -> library.Adder2dParams:
    """A problem without data."""
    x, w, _ = (t.to("meta") for t in case.tensors(dtype))
    return layer_params(case, x, w, output(case, x, w))


def launch(name: str, params: ctypes.Structure, layer: library.Adder2dParams) -> str:
    """Enqueues the pass with the workspace that it asks for; returns what it is said to be."""
    workspace = torch.empty(entry(f"{name}_workspace")(ctypes.byref(params)), dtype=torch.uint8, device="cuda")
    layer.workspace, layer.workspace_bytes = workspace.data_ptr(), workspace.numel()
    text = entry(f"{name}_describe")(ctypes.byref(params))
    error = entry(name)(ctypes.byref(params), torch.cuda.current_stream().cuda_stream)
    assert error == 0, (text, entry("error_string")(error))
    return text.decode()


def is_choice(text: str, choice: str) -> bool:
    """Whether `text` describes what `choice` asks for; what is empty there may be anything."""
    return all(wanted in ("", told) for wanted, told in zip(choice.split(":"), text.split(":"), strict=False))


def fprop(case: Case, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, str]:
    y = output(case, x, w)
    params = layer_params(case, x, w, y, b)
    return y, launch("fprop", params, params)


def check_fprop(
    case: Case,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    choice: str,
    weight_dtype: torch.dtype | None = None,
) -> None:
    """Weight and bias are of `weight_dtype`, as TensorRT hands float32 weights to a float16 layer; None for `dtype`."""
    x = case.tensors(dtype, "cuda", memory_format)[0]
    w, b = (t.to(weight_dtype or dtype) for t in case.tensors(torch.float32, "cuda")[1:])
    with forced("fprop", choice):
        for bias in (None, b):
            y, text = fprop(case, x, w, bias)
            assert is_choice(text, choice), text
            assert_forward(y, x, w, bias, case.geometry)
        fprop(case, -x, 2 * w, b)  # leaves other numbers in the workspace
        assert torch.equal(fprop(case, x, w, b)[0], y)


# ---- without a GPU: the choice as text


@pytest.mark.parametrize("name", TILES)
def test_tables(name):
    """The library's families and tiles, which it names where it is given others, are those that are tested here."""
    force = entry(f"{name}_force")
    assert force(b"?").decode() == f"'?' is not a kernel family: choose one of {', '.join(TILES[name])}"
    for family, names in TILES[name].items():
        message = force(f"{family}:?".encode()).decode()
        if names:
            assert message == f"'?' is not a tile of {family}: choose one of {', '.join(names)}"
        else:
            assert message == f"{family} has no tiles, got '?'"


@pytest.mark.parametrize(
    "choice, reason",
    [
        ("simt:64x128:0", "splits must be a number of 1 to 64, got '0'"),
        ("simt:64x128:65", "splits must be a number of 1 to 64, got '65'"),
        ("simt:64x128:-1", "splits must be a number of 1 to 64, got '-1'"),
        ("simt:64x128:2:x", "full_tiles must be a number of 0 to 2147483647, got 'x'"),
        ("simt:64x128:2:2147483648", "full_tiles must be a number of 0 to 2147483647, got '2147483648'"),
        ("simt:64x128:2:0:half", "the last field must be packed or unpacked, got 'half'"),
        ("simt:64x128:2:0:packed:1", "'simt:64x128:2:0:packed:1' has more than family:tile:splits:full_tiles:packed"),
        ("SIMT", "'SIMT' is not a kernel family"),
    ],
)
def test_a_wrong_choice_changes_nothing(choice, reason):
    params = problem(SPLIT)
    params.workspace_bytes = 64 << 20
    with forced("fprop", "simt:128x64:2:1:unpacked"):
        assert entry("fprop_force")(choice.encode()).decode().startswith(reason)
        assert entry("fprop_describe")(ctypes.byref(params)) == b"simt:128x64:2:1:unpacked"


@pytest.mark.parametrize("case", [SPLIT, PLANE, POINTWISE, DEPTHWISE, SMALL, STRIDED], ids=lambda case: case.name)
@dtypes
def test_a_description_can_be_forced(case, dtype):
    """Whatever was chosen here, it is a choice, and forcing it changes nothing."""
    params = problem(case, dtype)
    params.workspace_bytes = wanted = entry("fprop_workspace")(ctypes.byref(params))
    text = entry("fprop_describe")(ctypes.byref(params))
    with forced("fprop", text.decode()):
        assert entry("fprop_describe")(ctypes.byref(params)) == text
        assert entry("fprop_workspace")(ctypes.byref(params)) == wanted
    dgrad = library.Adder2dDgradParams(params, TYPES[dtype], 0, params.x_stride)
    dgrad.layer.workspace_bytes = wanted = entry("dgrad_workspace")(ctypes.byref(dgrad))
    text = entry("dgrad_describe")(ctypes.byref(dgrad))
    with forced("dgrad", text.decode()):
        assert entry("dgrad_describe")(ctypes.byref(dgrad)) == text
        assert entry("dgrad_workspace")(ctypes.byref(dgrad)) == wanted
    wgrad = library.Adder2dWgradParams(params)
    text = entry("wgrad_describe")(ctypes.byref(wgrad))
    with forced("wgrad", text.decode()):
        assert entry("wgrad_describe")(ctypes.byref(wgrad)) == text


@pytest.mark.parametrize(
    "choice", ["window", "pointwise", "depthwise", "half", "simt:64x128:9", "direct::2", "simt::::packed"]
)
def test_kernels_that_cannot_implement_a_problem(choice):
    """It is refused before anything is launched, and no other kernel takes its place."""
    params = problem(SMALL)  # float32, 3x3, 21 channels: 189 terms are six slices of 32
    params.workspace_bytes = 64 << 20
    with forced("fprop", choice):
        assert entry("fprop_describe")(ctypes.byref(params)) is None
        assert entry("fprop_workspace")(ctypes.byref(params)) == 0
        assert entry("fprop")(ctypes.byref(params), None) == NOT_SUPPORTED
    assert entry("fprop_describe")(ctypes.byref(params)) is not None


def test_splits_without_a_workspace():
    params = problem(SPLIT)
    with forced("fprop", "simt:64x128:2"):
        assert entry("fprop_describe")(ctypes.byref(params)) is None
        assert entry("fprop_workspace")(ctypes.byref(params)) > 0


def test_nothing_to_describe():
    params = problem(SPLIT)
    params.N = 0
    assert entry("fprop_describe")(ctypes.byref(params)) is None
    params.N = -1
    assert entry("fprop_describe")(ctypes.byref(params)) is None
    assert entry("fprop_describe")(None) is None


# ---- forward


@gpu
@tiles("fprop", "simt")
@formats
@pytest.mark.parametrize("case", [SPLIT, PLANE], ids=lambda case: case.name)
def test_simt(case, tile, memory_format):
    for split, packed in itertools.product(SPLITS, ("packed", "unpacked")):
        check_fprop(case, torch.float32, memory_format, f"simt:{tile}:{split}:{packed}")


@gpu
@tiles("fprop", "simt")
@formats
def test_simt_that_converts(tile, memory_format):
    for split, dtype in zip(SPLITS, itertools.cycle((torch.float16, torch.bfloat16)), strict=False):
        check_fprop(SPLIT, dtype, memory_format, f"simt:{tile}:{split}")


@gpu
@tiles("fprop", "window")
@formats
def test_window(tile, memory_format):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("these tiles need more shared memory")
    for split in SPLITS:
        check_fprop(SPLIT, torch.float32, memory_format, f"window:{tile}:{split}")


@gpu
@tiles("fprop", "half")
@formats
@pytest.mark.parametrize("case", [SPLIT, PLANE], ids=lambda case: case.name)
def test_half(case, tile, memory_format):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("half pairs need compute capability 8.0")
    for split, dtype in itertools.product(SPLITS, (torch.float16, torch.bfloat16)):
        check_fprop(case, dtype, memory_format, f"half:{tile}:{split}")
    check_fprop(case, torch.float16, memory_format, f"half:{tile}", torch.float32)


@gpu
@tiles("fprop", "pointwise")
@formats
def test_pointwise(tile, memory_format):
    check_fprop(POINTWISE, torch.float32, memory_format, f"pointwise:{tile}")


@gpu
@formats
@dtypes
def test_depthwise(memory_format, dtype):
    for case, weight_dtype in itertools.product(DEPTHWISES, TYPES):
        check_fprop(case, dtype, memory_format, "depthwise:7x2", weight_dtype)


@gpu
@pytest.mark.parametrize(
    "choice", [f"{family}:{tile}" for family in ("direct", "shared") for tile in TILES["fprop"][family]]
)
@formats
@dtypes
def test_direct(choice, memory_format, dtype):
    for case, weight_dtype in itertools.product((SMALL, DEPTHWISE, STRIDED), TYPES):
        check_fprop(case, dtype, memory_format, choice, weight_dtype)


@gpu
@pytest.mark.parametrize("choice", ["simt:64x128:2:1", "window:32x64r4:3:0", "window:64x112r7:9:0"])
def test_splits_in_a_cuda_graph(choice):
    """Counts of the blocks that have come are the same in every replay."""
    x, w, b = SPLIT.tensors(device="cuda")
    y = output(SPLIT, x, w)
    params = layer_params(SPLIT, x, w, y, b)
    with forced("fprop", choice):
        workspace = torch.empty(entry("fprop_workspace")(ctypes.byref(params)), dtype=torch.uint8, device="cuda")
        params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.numel()
        assert entry("fprop")(ctypes.byref(params), torch.cuda.current_stream().cuda_stream) == 0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert entry("fprop")(ctypes.byref(params), torch.cuda.current_stream().cuda_stream) == 0
    for seed in (1, 2):
        x.copy_(SPLIT.tensors(seed=seed)[0])
        graph.replay()
        assert_forward(y, x, w, b, SPLIT.geometry)


# ---- gradients


def dgrad(case: Case, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, str]:
    dx = torch.empty_like(x)
    params = library.Adder2dDgradParams(
        layer_params(case, x, w, dy), TYPES[x.dtype], 0, tuple(dx.stride()), dx.data_ptr()
    )
    return dx, launch("dgrad", params, params.layer)


@gpu
@tiles("dgrad", "simt")
@formats
@dtypes
@pytest.mark.parametrize("case", [SPLIT, STRIDED, POINTWISE], ids=lambda case: case.name)
def test_dgrad(case, tile, memory_format, dtype):
    x, w, _ = case.tensors(dtype, "cuda", memory_format)
    dy = torch.randn_like(output(case, x, w))
    for splits in (1, 2, 5):
        if splits > 1 and case is not SPLIT:
            continue  # too few slices
        with forced("dgrad", f"simt:{tile}:{splits}"):
            dx, text = dgrad(case, dy, x, w)
            assert text.startswith(f"simt:{tile}:{splits}:")
            assert_grad_input(dx, dy, x, w, case.geometry)


@gpu
@formats
@dtypes
def test_dgrad_direct(memory_format, dtype):
    x, w, _ = STRIDED.tensors(dtype, "cuda", memory_format)
    dy = torch.randn_like(output(STRIDED, x, w))
    with forced("dgrad", "direct"):
        dx, text = dgrad(STRIDED, dy, x, w)
    assert text == "direct:1x1"
    assert_grad_input(dx, dy, x, w, STRIDED.geometry)


@gpu
@tiles("wgrad", "simt")
@formats
@dtypes
@pytest.mark.parametrize("case", [SPLIT, STRIDED], ids=lambda case: case.name)
def test_wgrad(case, tile, memory_format, dtype):
    """With more channels and filters than those for which this kernel is chosen."""
    x, w, _ = case.tensors(dtype, "cuda", memory_format)
    dy = torch.randn_like(output(case, x, w))
    dw = torch.empty_like(w, dtype=torch.float32)
    params = library.Adder2dWgradParams(layer_params(case, x, w, dy), eta=0.3, dw=dw.data_ptr())
    with forced("wgrad", "convolved"):
        assert entry("wgrad_takes")(ctypes.byref(params)) == 0
    with forced("wgrad", f"simt:{tile}"):
        assert entry("wgrad_takes")(ctypes.byref(params)) == 1
        assert launch("wgrad", params, params.layer) == f"simt:{tile}"
    assert_grad_weight(dw, dy, x, w, case.geometry, 0.3)
