"""Weights packed once for the half kernels (adder2d_pack_weights_cpu), and float16 layers on a float32 copy."""

import ctypes

import pytest
import torch
from conftest import Case
from test_forced_kernels import FORMATS, SPLIT, TILES, TYPES, check_fprop, entry, forced, launch, layer_params, output
from torch import Tensor

from torch2trt_adder import library
from torch2trt_adder.numerics.definition import assert_forward

# Filters and channels that fill neither the tile's 64 nor the vectors' 8, and taps that do not fill the slices' four.
ODD = Case("odd", 2, 15, 9, 8, 70, 3, 3, padding=(1, 1), groups=5)
VECTORS = Case("vectors", 3, 48, 9, 14, 100, 3, 3, padding=(1, 1), groups=2)
PLANE = Case("plane", 3, 40, 9, 11, 33, 1, 1)
STEM = Case("stem", 4, 3, 57, 51, 64, 7, 7, stride=(2, 2), padding=(3, 3))
LAYERS = [ODD, VECTORS, PLANE, STEM]

layers = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
weight_dtypes = pytest.mark.parametrize("weight_dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def packed_by_hand(w: Tensor, groups: int) -> Tensor:
    """[groups][slices][filters, up to 64s][32] halves: vectors of 8 channels of a tap, then those of the next tap."""
    K, Cg, R, S = w.shape
    terms = torch.nn.functional.pad(w.half().permute(0, 2, 3, 1).reshape(K, R * S, Cg), (0, -Cg % 8)).reshape(K, -1)
    terms = torch.nn.functional.pad(terms, (0, -terms.shape[1] % 32)).reshape(groups, K // groups, -1, 32)
    return torch.nn.functional.pad(terms, (0, 0, 0, 0, 0, -(K // groups) % 64)).transpose(1, 2).contiguous()


def pack(params: library.Adder2dParams) -> Tensor:
    """What the library packs of the weight, which is on the host; between guards that it may not touch."""
    size = entry("packed_weight_bytes")(ctypes.byref(params))
    memory = torch.full((size + 64,), 0x5A, dtype=torch.uint8)
    assert entry("pack_weights_cpu")(ctypes.byref(params), memory.data_ptr() + 32) == 0
    assert (memory[:32] == 0x5A).all() and (memory[-32:] == 0x5A).all()
    return memory[32:-32].view(torch.float16)


@layers
@weight_dtypes
def test_layout(case, weight_dtype):
    x, w, _ = case.tensors(torch.float16)
    w = (3e4 * w).to(weight_dtype)  # some are infinities as halves
    w[0, 0, 0, 0] = torch.nan
    params = layer_params(case, x, w, output(case, x, w))
    expected = packed_by_hand(w, case.groups)
    got = pack(params)
    assert got.numel() == expected.numel()
    assert torch.equal(got.nan_to_num(7), expected.flatten().nan_to_num(7)) and bool(got.isinf().any())
    assert torch.equal(got.isnan(), expected.flatten().isnan())


def test_nothing_to_pack():
    """Layers that the half kernels do not support, and pointers that are missing."""
    for case, dtype in ((PLANE, torch.float32), (Case("two channels", 1, 2, 8, 8, 16, 3, 3), torch.float16)):
        x, w, _ = case.tensors(dtype)
        params = layer_params(case, x, w, output(case, x, w))
        assert entry("packed_weight_bytes")(ctypes.byref(params)) == 0
        assert entry("pack_weights_cpu")(ctypes.byref(params), w.data_ptr()) == 1
    x, w, _ = PLANE.tensors(torch.float16)
    params = layer_params(PLANE, x, w, output(PLANE, x, w))
    assert entry("pack_weights_cpu")(ctypes.byref(params), None) == 1
    params.w = None
    assert entry("pack_weights_cpu")(ctypes.byref(params), x.data_ptr()) == 1
    params.K = 0
    assert entry("packed_weight_bytes")(ctypes.byref(params)) == 0


# ---- on a GPU


def run(case: Case, x: Tensor, w: Tensor, b: Tensor, packed: Tensor | None) -> Tensor:
    y = output(case, x, w)
    params = layer_params(case, x, w, y, b)
    params.packed_w = None if packed is None else packed.data_ptr()
    assert launch("fprop", params, params).startswith("half:")
    return y


def packed_on_gpu(case: Case, x: Tensor, w: Tensor) -> Tensor:
    on_host = w.cpu()
    return pack(layer_params(case, x, on_host, output(case, x, w))).cuda()


def require_half_kernels() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("half pairs need compute capability 8.0")


@pytest.mark.gpu
@layers
@formats
@pytest.mark.parametrize("tile", TILES["fprop"]["half"])
def test_same_results(case, memory_format, tile):
    """Bit for bit what it is without, for all types, whatever the tile."""
    require_half_kernels()
    for dtype in (torch.float16, torch.bfloat16):
        for weight_dtype in (dtype, torch.float32):
            x = case.tensors(dtype, "cuda", memory_format)[0]
            w, b = (t.to(weight_dtype) for t in case.tensors(torch.float32, "cuda")[1:])
            with forced("fprop", f"half:{tile}"):
                y = run(case, x, w, b, packed_on_gpu(case, x, w))
                assert torch.equal(y, run(case, x, w, b, None))
            assert_forward(y, x, w, b, case.geometry)


@pytest.mark.gpu
@formats
@pytest.mark.parametrize("splits", ["2:0", "3:1", "9:0"])
def test_splits(memory_format, splits):
    require_half_kernels()
    x, w, b = SPLIT.tensors(torch.float16, "cuda", memory_format)
    with forced("fprop", f"half:32x64:{splits}"):
        assert torch.equal(run(SPLIT, x, w, b, packed_on_gpu(SPLIT, x, w)), run(SPLIT, x, w, b, None))


@pytest.mark.gpu
def test_one_kernel():
    """float16 in channels_last with packed weights: no kernel runs before the main one."""
    require_half_kernels()
    x, w, b = VECTORS.tensors(torch.float16, "cuda", torch.channels_last)
    packed = packed_on_gpu(VECTORS, x, w)
    with forced("fprop", "half:64x128:1"):
        counts = []
        for weights in (packed, None):
            run(VECTORS, x, w, b, weights)
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                run(VECTORS, x, w, b, weights)
                torch.cuda.synchronize()
            counts.append(sorted(event.name for event in profile.events() if "adder2d" in event.name))
    assert [len(names) for names in counts] == [1, 2], counts


@pytest.mark.gpu
def test_sums_beyond_float16():
    """They are summed again from the weight itself."""
    require_half_kernels()
    x, w, b = VECTORS.tensors(torch.float16, "cuda", torch.channels_last)
    x = x * 10000
    y = output(VECTORS, x, w).float()
    params = layer_params(VECTORS, x, w, y, b)
    packed = packed_on_gpu(VECTORS, x, w)
    params.packed_w = packed.data_ptr()
    with forced("fprop", "half"):
        launch("fprop", params, params)
    assert y.isfinite().all()
    assert_forward(y, x, w, b, VECTORS.geometry)


CONVERTED = [name for name in TILES["fprop"]["converted"] if "r7" not in name and "r2" not in name]


@pytest.mark.gpu
@formats
@pytest.mark.parametrize("tile", CONVERTED)
def test_converted(tile, memory_format):
    """float16 and bfloat16 on a float32 copy, with weights of either type."""
    family = tile.split("-")[0]
    case = {"simt": STEM, "window": SPLIT, "pointwise": Case("pointwise", 7, 72, 14, 18, 100, 1, 1)}[family]
    for dtype in (torch.float16, torch.bfloat16):
        for weight_dtype in (dtype, torch.float32):
            check_fprop(case, dtype, memory_format, f"converted:{tile}", weight_dtype)


@pytest.mark.gpu
def test_converted_input_of_any_strides():
    x, w, b = STEM.tensors(torch.float16, "cuda")
    layouts = [
        torch.cat([x, x], 3)[..., : x.shape[3]],  # rows with gaps
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.cat([x.flatten()[:1], x.flatten()])[1:].reshape(x.shape),  # contiguous, not at a multiple of 16 bytes
        x[:1, :, :1].expand_as(x),
    ]
    for strided in layouts:
        y = output(STEM, x, w)
        params = layer_params(STEM, strided, w, y, b)
        with forced("fprop", "converted"):
            launch("fprop", params, params)
        assert_forward(y, strided, w, b, STEM.geometry)


@pytest.mark.gpu
def test_converted_batch_in_parts():
    """A batch whose copy is larger than the largest workspace goes through it part by part."""
    case = Case("large batch", 90, 3, 240, 242, 16, 7, 7, stride=(8, 8), padding=(3, 3))
    x, w, b = case.tensors(torch.float16, "cuda")
    y = output(case, x, w)
    params = layer_params(case, x, w, y, b)
    with forced("fprop", "converted"):
        assert entry("fprop_workspace")(ctypes.byref(params)) <= 64 << 20
        launch("fprop", params, params)
    assert_forward(y, x, w, b, case.geometry)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case, family",
    [
        (Case("stem of ResNet-50", 32, 3, 224, 224, 64, 7, 7, stride=(2, 2), padding=(3, 3)), "converted"),
        (Case("3x3 of ResNet-50", 32, 64, 56, 56, 64, 3, 3, padding=(1, 1)), "half"),
        (Case("last 3x3 of ResNet-50", 32, 512, 7, 7, 512, 3, 3, padding=(1, 1)), "half"),
    ],
    ids=lambda v: getattr(v, "name", v),
)
@formats
def test_choice_for_float16(case, family, memory_format):
    require_half_kernels()
    x = torch.empty(case.N, case.C, case.H, case.W, dtype=torch.float16, device="cuda", memory_format=memory_format)
    w = torch.empty(case.K, case.C, case.R, case.S, dtype=torch.float16, device="cuda")
    params = layer_params(case, x, w, output(case, x, w))
    params.workspace_bytes = entry("fprop_workspace")(ctypes.byref(params))
    text = entry("fprop_describe")(ctypes.byref(params)).decode()
    assert text.split(":")[0] == family, text


@pytest.mark.parametrize("images", [1, 32, 90, 300])
def test_parts_do_not_depend_on_the_workspace(images):
    """With what adder2d_fprop_workspace asks for, a batch is cut into the same parts as with the largest workspace."""
    case = Case("stem", images, 3, 224, 224, 64, 7, 7, stride=(2, 2), padding=(3, 3))
    x = torch.empty(images, 3, 224, 224, dtype=torch.float16, device="meta")
    w = torch.empty(64, 3, 7, 7, dtype=torch.float16, device="meta")
    params = layer_params(case, x, w, torch.empty(images, 64, 112, 112, dtype=torch.float16, device="meta"))
    with forced("fprop", "converted:simt-64x128"):
        texts = set()
        for size in (entry("fprop_workspace")(ctypes.byref(params)), 64 << 20):
            params.workspace_bytes = size
            texts.add(entry("fprop_describe")(ctypes.byref(params)))
    assert len(texts) == 1 and None not in texts
