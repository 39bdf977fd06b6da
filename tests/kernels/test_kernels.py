"""The operator on a GPU: the forward kernels and the gradients, against float64 on the same rounded inputs."""

import itertools
import math
import types

import pytest
import torch
from conftest import CASES, Case

from torch2trt_adder import Adder2d, adder2d, reference, set_eta
from torch2trt_adder.numerics.comparison import assert_within
from torch2trt_adder.numerics.definition import (
    assert_forward,
    assert_grad_bias,
    assert_grad_input,
    assert_grad_weight,
    grad_input_terms,
)
from torch2trt_adder.numerics.tolerance import bound
from torch2trt_adder.ops import fastpath, launch, launch_gradients, scaling

pytestmark = pytest.mark.gpu

# Several tiles on each axis, and none of them full.
LARGE = [
    Case("three_by_three_56", 3, 64, 29, 31, 130, 3, 3, padding=(1, 1)),
    Case("three_by_three_7", 9, 512, 7, 7, 257, 3, 3, padding=(1, 1)),
    Case("pointwise_wide", 2, 259, 14, 14, 515, 1, 1),
    Case("pointwise_strided", 2, 131, 15, 14, 67, 1, 1, stride=(2, 2)),
    Case("many_taps", 2, 19, 24, 23, 70, 8, 9),
    Case("lenet_second", 65, 20, 12, 12, 50, 5, 5),
    Case("stem", 2, 3, 63, 65, 70, 7, 7, stride=(2, 2), padding=(3, 3)),
    Case("long_reduction", 1, 2049, 3, 3, 66, 3, 3, padding=(1, 1)),
    Case("depthwise_wide", 3, 515, 15, 13, 515, 3, 3, padding=(1, 1), groups=515),
    Case("many_groups", 3, 96, 15, 13, 160, 3, 3, padding=(1, 1), groups=32),
    Case("image", 1, 3, 301, 299, 5, 3, 3),
    Case("large_kernel", 1, 2, 43, 41, 3, 17, 19),
    # The most taps whose place fprop_simt.cu keeps in bits, and one more.
    Case("high_kernel", 4, 5, 61, 37, 40, 15, 3, padding=(7, 1)),
    Case("higher_kernel", 4, 5, 61, 37, 40, 16, 3, padding=(7, 1)),
    Case("wide_kernel", 4, 5, 37, 61, 40, 2, 16, padding=(1, 9), dilation=(3, 2)),
    Case("wider_kernel", 4, 5, 37, 61, 40, 2, 17, padding=(1, 9)),
    Case("one_pixel", 1, 515, 1, 1, 131, 1, 1),
    # Runs of 8, 7, 4 and 2 pixels of fprop_window.cu, tiles that begin in the middle of a row or span images, few filters.
    Case("runs_of_eight", 3, 24, 17, 40, 70, 3, 3, padding=(1, 1)),
    Case("runs_of_seven", 5, 16, 9, 21, 37, 3, 3, padding=(1, 1)),
    Case("runs_of_four", 7, 48, 11, 28, 66, 3, 3, padding=(1, 1), groups=2),
    Case("runs_of_two", 9, 16, 14, 14, 130, 3, 3, padding=(1, 1)),
    Case("runs_of_rows", 70, 8, 7, 7, 16, 3, 3, padding=(1, 1)),
    Case("runs_of_narrow_rows", 131, 8, 3, 4, 12, 3, 3, padding=(0, 0)),
    Case("runs_of_wide_rows", 2, 8, 5, 222, 19, 3, 3, padding=(1, 2)),
    Case("runs_in_wide_padding", 3, 8, 4, 6, 33, 3, 3, padding=(3, 5)),
    Case("runs_and_few_filters", 6, 16, 32, 32, 16, 3, 3, padding=(1, 1)),
    # What an H200 takes with few splits: fprop_window.cu (with whole tiles beside, in halves too) and fprop_simt.cu. Every
    # family, tile and number of splits is forced, on any GPU, in test_forced_kernels.py.
    Case("joined_windows", 32, 32, 14, 14, 256, 3, 3, padding=(1, 1)),
    Case("joined_beside_whole", 24, 32, 28, 28, 256, 3, 3, padding=(1, 1)),
    Case("joined_tiles", 24, 96, 13, 13, 256, 3, 3, padding=(1, 1)),
    # What an H200 takes by fprop_pointwise.cu: blocks with one, two and different numbers of tiles, of one to four slices
    # that are not alike, with ends of filters and pixels inside.
    Case("pointwise_rows_of_tiles", 5, 40, 50, 52, 260, 1, 1),
    Case("pointwise_single_tiles", 33, 24, 14, 14, 333, 1, 1),
    Case("pointwise_narrow_tiles", 3, 16, 112, 110, 92, 1, 1),
    Case("pointwise_groups", 29, 80, 14, 22, 296, 1, 1, groups=2),
    Case("pointwise_slices", 7, 120, 28, 44, 252, 1, 1),
]
# Both kinds of strips of fprop_depthwise.cu (W, or C, even) with any rest, its neighbours that go elsewhere, and direct kernels.
DIRECT = [
    Case("depthwise_even", 3, 64, 28, 28, 64, 3, 3, padding=(1, 1), groups=64),
    Case("depthwise_narrow", 5, 40, 14, 14, 40, 3, 3, padding=(1, 1), groups=40),
    Case("depthwise_rest", 2, 70, 16, 22, 70, 3, 3, padding=(1, 1), groups=70),
    Case("depthwise_stride_two", 3, 48, 28, 14, 48, 3, 3, stride=(2, 2), padding=(1, 1), groups=48),
    Case("depthwise_odd_map", 3, 34, 13, 7, 34, 3, 3, stride=(2, 2), padding=(1, 1), groups=34),
    Case("depthwise_five", 2, 24, 15, 18, 24, 5, 5, padding=(2, 2), groups=24),
    Case("depthwise_five_stride_two", 40, 24, 15, 18, 24, 5, 5, stride=(2, 2), padding=(2, 2), groups=24),
    Case("depthwise_five_wide", 30, 24, 15, 18, 24, 5, 5, padding=(2, 2), groups=24),
    Case("depthwise_seven", 7, 36, 14, 14, 36, 7, 7, padding=(3, 3), groups=36),
    Case("depthwise_unpadded", 3, 33, 14, 16, 33, 3, 3, groups=33),
    Case("depthwise_wide_padding", 3, 18, 5, 4, 18, 3, 3, padding=(6, 7), groups=18),
    Case("depthwise_triple", 3, 17, 14, 14, 51, 3, 3, padding=(1, 1), groups=17),
    Case("depthwise_dilated", 3, 32, 14, 14, 32, 3, 3, padding=(2, 2), dilation=(2, 2), groups=32),
    Case("depthwise_one_column", 3, 32, 30, 2, 32, 3, 3, stride=(2, 2), padding=(1, 1), groups=32),
    Case("few_filters", 5, 12, 31, 29, 20, 3, 3, padding=(1, 1), groups=4),
    Case("mnist_first", 1, 1, 28, 28, 20, 5, 5),
    Case("mnist_second", 1, 20, 12, 12, 50, 5, 5),
    Case("long_and_few", 3, 40, 5, 5, 2, 3, 3, padding=(1, 1)),
    Case("linear", 1, 515, 1, 1, 131, 1, 1),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
PLAIN = LARGE[0]
POINTWISE = next(case for case in LARGE if case.name == "pointwise_rows_of_tiles")
JOINED = next(case for case in LARGE if case.name == "joined_windows")

cases = pytest.mark.parametrize("case", CASES + LARGE + DIRECT, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])


# ---- forward


@cases
@dtypes
@formats
def test_forward(case, dtype, memory_format):
    x, w, b = case.tensors(dtype, "cuda", memory_format)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    for bias in (None, b):
        y = adder2d(x, w, bias, *case.geometry)
        assert y.dtype is dtype and y.stride() == torch.empty(y.shape, memory_format=layout).stride()
        assert_forward(y, x, w, bias, case.geometry)


@cases
def test_float64(case):
    x, w, b = case.tensors(torch.float64, "cuda")
    assert_forward(adder2d(x, w, b, *case.geometry), x, w, b, case.geometry)


@dtypes
def test_strided_tensors(dtype):
    x, w, b = PLAIN.tensors(dtype, "cuda")
    base = torch.randn(2 * PLAIN.N, PLAIN.C + 3, 2 * PLAIN.H, 3 * PLAIN.W, device="cuda").to(dtype)
    views = [
        base[::2, 1 : 1 + PLAIN.C, ::2, 2::3],
        base[1::2, 3:, 1::2, ::3].transpose(2, 3),
        base.to(memory_format=torch.channels_last)[::2, 1 : 1 + PLAIN.C, ::2, 2::3],
        base[:, : PLAIN.C, :7, 1:8],  # rows that start off any vector's alignment
        x[:1].expand(3, -1, -1, -1),
        x[:, :1].expand(-1, PLAIN.C, -1, -1),
        x[:, :, :, :1].expand(-1, -1, -1, 7),
    ]
    for view in views:
        assert_forward(adder2d(view, w, b, 1, 1), view, w, b, PLAIN.geometry)
    bias = torch.randn(2 * PLAIN.K, device="cuda").to(dtype)[::2]
    weights = [
        w.to(memory_format=torch.channels_last),
        torch.randn(3, 3, PLAIN.C, PLAIN.K, device="cuda").to(dtype).permute(3, 2, 1, 0),
        torch.randn(w.numel() + 1, device="cuda").to(dtype)[1:].view_as(w),  # contiguous, yet off alignment
    ]
    for weight in weights:
        assert_forward(adder2d(x, weight, bias, 1, 1), x, weight, bias, PLAIN.geometry)


def test_strided_pointwise():
    """Planes that lie apart, and those off any vector's alignment, which other kernels take."""
    case = POINTWISE
    x, w, b = case.tensors(device="cuda")
    base = torch.randn(2 * case.N, case.C + 5, case.H, case.W, device="cuda")
    views = [
        base[::2, 3 : 3 + case.C],
        x[:1].expand(case.N, -1, -1, -1),
        x[:, :1].expand(-1, case.C, -1, -1),
        torch.randn(x.numel() + 1, device="cuda")[1:].view_as(x),
    ]
    for view in views:
        assert_forward(adder2d(view, w, b), view, w, b, case.geometry)


@dtypes
@formats
def test_empty_batch(dtype, memory_format):
    x, w, b = PLAIN.tensors(dtype, "cuda", memory_format)
    x = x[:0].requires_grad_()
    w.requires_grad_()
    y = adder2d(x, w, b, 2, 1)
    assert y.shape == (0, PLAIN.K, 15, 16) and y.dtype is dtype and y.device == x.device
    y.sum().backward()
    assert x.grad.shape == x.shape and w.grad.eq(0).all()


@pytest.mark.parametrize("case", [PLAIN, POINTWISE], ids=lambda case: case.name)
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite(case, dtype, value):
    """Exactly the windows that touch the value carry it; infinity minus infinity is NaN."""
    x, w, _ = case.tensors(dtype, "cuda")
    x[1, 3, 5, 4] = value
    y = adder2d(x, w, None, *case.geometry)
    assert_forward(y, x, w, None, case.geometry)
    assert int((~y.isfinite()).sum()) == case.R * case.S * case.K
    w[2, 3, case.R // 2, case.S // 2] = value
    y = adder2d(x, w, None, *case.geometry)
    assert_forward(y, x, w, None, case.geometry)
    assert not y[:, 2].isfinite().any() and y[1, 2, 5, 4].isnan()


def test_range_of_half():
    """Up to 65504 a float16 sum is right, beyond it is -inf, never a wrong finite number; denormals are kept."""
    x = torch.full((1, 64, 8, 8), 992.0, device="cuda").half()
    w = torch.full((2, 64, 3, 3), -1000.0, device="cuda").half()
    assert adder2d(x, w).eq(-float("inf")).all()
    w[0] = 992.0
    w[0, 5, 1, 1] = -60000.0
    y = adder2d(x, w)
    assert y[:, 0].eq(-60992.0).all() and y[:, 1].eq(-float("inf")).all()
    tiny = torch.full((1, 8, 5, 5), 2.0**-24, device="cuda").half()
    assert adder2d(tiny, torch.zeros(3, 8, 3, 3, device="cuda").half()).eq(-72 * 2.0**-24).all()


@dtypes
@pytest.mark.parametrize("case", LARGE + DIRECT, ids=lambda case: case.name)
def test_same_result_twice(case, dtype):
    x, w, b = case.tensors(dtype, "cuda")
    first = adder2d(x, w, b, *case.geometry)
    adder2d(-x, 2 * w, b, *case.geometry)  # leaves other numbers in the workspace
    assert torch.equal(adder2d(x, w, b, *case.geometry), first)


def limit_workspace(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType, name: str) -> types.SimpleNamespace:
    """Launches planned by `module.<name>` get `fraction` of the workspace that they want; `wanted` lists what that was."""
    plan, limit = getattr(module, name), types.SimpleNamespace(fraction=1, wanted=[])

    def limited(*args):
        whole = plan(*args)
        limit.wanted.append(whole.workspace_bytes)
        return whole._replace(workspace_bytes=int(whole.workspace_bytes * limit.fraction))

    monkeypatch.setattr(module, name, limited)
    return limit


@dtypes
@formats
@pytest.mark.parametrize("case", LARGE[:2], ids=lambda case: case.name)
def test_any_workspace(case, dtype, memory_format, monkeypatch):
    """With less of it weights and images are packed in pieces or not at all, and fewer tiles are split."""
    x, w, b = case.tensors(dtype, "cuda", memory_format)
    limit = limit_workspace(monkeypatch, launch, "launch_args")
    for limit.fraction in (1, 0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01, 0):
        assert_forward(adder2d(x, w, b, *case.geometry), x, w, b, case.geometry)
    assert len(limit.wanted) == 9 and limit.wanted[0] > 0


def test_channels_last_off_alignment():
    """Eight halves at a time can be copied from 16-byte addresses alone; that is seen at the call, not when it is planned."""
    case = LARGE[1]
    x, w, _ = case.tensors(torch.float16, "cuda", torch.channels_last)
    aligned = adder2d(x, w, None, *case.geometry)
    moved = (
        torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:]
        .view(x.permute(0, 2, 3, 1).shape)
        .permute(0, 3, 1, 2)
    )
    moved.copy_(x)
    assert moved.stride() == x.stride() and moved.data_ptr() % 16 != 0
    for _ in range(2):
        assert_forward(adder2d(moved, w, None, *case.geometry), moved, w, None, case.geometry)
        assert torch.equal(adder2d(x, w, None, *case.geometry), aligned)


def test_beyond_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GB of free GPU memory")
    x = torch.randn(33, 1, 8192, 8192, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    w = torch.tensor([0.375], device="cuda", dtype=torch.float16).view(1, 1, 1, 1)
    y = adder2d(x, w)
    for n in range(len(x)):
        assert torch.equal(y[n], -(x[n] - w[0]).abs()), n
    del y
    w = torch.randn(1, 1, 3, 3, device="cuda").half()
    y = adder2d(x, w, None, 1, 1)
    for n in (0, 15, 16, 32):
        crop = x[n : n + 1, :, -65:, -65:].double()
        expected = reference.adder2d(crop, w.double(), None, 1, 1)[:, :, 1:, 1:]  # the first row lacks its neighbours
        assert_within(y[n : n + 1, :, -64:, -64:], expected, bound(expected, expected.abs(), 9, torch.float16))


@pytest.mark.parametrize("kernel", [2, 3])
@formats
def test_depthwise_beyond_2_to_the_31_elements(kernel, memory_format):
    """3.2e9 elements on either side; threads that take single outputs, and pairs of them."""
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GB of free GPU memory")
    x = torch.empty(3, 16, 8192, 8192, device="cuda", dtype=torch.float16, memory_format=memory_format).normal_()
    assert x.numel() > 2**31
    w = torch.randn(16, 1, kernel, kernel, device="cuda").half()
    y = adder2d(x, w, None, 1, 1, 1, 16)
    for n in (0, 1, 2):
        crop = x[n : n + 1, :, -65:, -65:].double()
        expected = reference.adder2d(crop, w.double(), None, 1, 1, 1, 16)[
            :, :, 1:, 1:
        ]  # the first row lacks its neighbours
        actual = y[n : n + 1, :, -expected.shape[2] :, -expected.shape[3] :]
        assert_within(actual, expected, bound(expected, expected.abs(), kernel**2, torch.float16))


def test_direct_beyond_2_to_the_31_threads():
    """10.4e9 outputs, four a thread: more than a launch has."""
    if torch.cuda.mem_get_info()[0] < 26 << 30:
        pytest.skip("needs 26 GB of free GPU memory")
    x = torch.randn(1, 5, 8192, 8192, device="cuda", dtype=torch.float16)
    w = torch.randn(5, 1, 2, 2, device="cuda").half()
    y = adder2d(x.expand(31, -1, -1, -1), w, None, 1, 1, 1, 5)
    expected = reference.adder2d(x[:, :, -65:, -65:].double(), w.double(), None, 1, 1, 1, 5)[:, :, 1:, 1:]
    assert_within(y[:1, :, -65:, -65:], expected, bound(expected, expected.abs(), 4, torch.float16))
    for n in range(1, len(y)):
        assert torch.equal(y[n], y[0]), n


def test_memory_is_bounded():
    """The broadcast of this layer would take 14.8 GB."""
    x = torch.randn(32, 64, 56, 56, device="cuda", requires_grad=True)
    w = torch.randn(64, 64, 3, 3, device="cuda", requires_grad=True)
    adder2d(x[:1], w, None, 1, 1).sum().backward()  # cuDNN's and the library's start-up
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = adder2d(x, w, None, 1, 1)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * 4 + (64 << 20)
    y.backward(torch.ones_like(y))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2 << 30


# ---- streams, graphs, devices


def test_runs_on_the_current_stream():
    data, w, _ = PLAIN.tensors(device="cuda")
    x = torch.zeros_like(data)
    adder2d(x, w, None, 1, 1)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a launch on any other stream would read x before this copy
        x.copy_(data)
        y = adder2d(x, w, None, 1, 1)
    stream.synchronize()
    assert_forward(y, data, w, None, PLAIN.geometry)


def test_two_streams_at_once():
    problems = [case.tensors(device="cuda") for case in LARGE[:2]]
    expected = [adder2d(*tensors, *case.geometry) for tensors, case in zip(problems, LARGE, strict=False)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for tensors, case, stream in zip(problems, LARGE, streams, strict=False):
            with torch.cuda.stream(stream):
                results.append(adder2d(*tensors, *case.geometry))
    torch.cuda.synchronize()
    for i, y in enumerate(results):
        assert torch.equal(y, expected[i % 2])


@pytest.mark.parametrize("case", [PLAIN, LARGE[6], JOINED], ids=lambda case: case.name)
def test_cuda_graph(case):
    x, w, b = case.tensors(device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        adder2d(x, w, b, *case.geometry)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = adder2d(x, w, b, *case.geometry)
    for seed in (1, 2):
        x.copy_(case.tensors(seed=seed)[0])
        graph.replay()
        assert_forward(y, x, w, b, case.geometry)


def test_other_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, w, _ = PLAIN.tensors(device="cuda:1")
    assert torch.cuda.current_device() == 0
    y = adder2d(x, w, None, 1, 1)
    assert y.device == x.device and torch.cuda.current_device() == 0
    assert_forward(y, x, w, None, PLAIN.geometry)


def test_devices_differ():
    x, w, _ = CASES[0].tensors()
    with pytest.raises(RuntimeError, match="weight is on cpu and input on cuda:0; move"):
        adder2d(x.cuda(), w)
    with pytest.raises(RuntimeError, match="weight is on cuda:0 and input on cpu; move"):
        adder2d(x, w.cuda())


def test_errors():
    x, w, _ = CASES[0].tensors(device="cuda")
    with pytest.raises(ValueError, match="an input of 7 channels in 1 groups needs a weight"):
        adder2d(x, w[:, :3])
    with pytest.raises(TypeError, match="torch.int32 is not supported"):
        adder2d(x.int(), w.int())
    with pytest.raises(ValueError, match="does not fit the 5x9 input"):
        adder2d(x, w.repeat(1, 1, 7, 7))
    assert_forward(adder2d(x, w), x, w, None, CASES[0].geometry)  # the device is none the worse


# ---- gradients


@cases
@dtypes
@formats
def test_gradients(case, dtype, memory_format):
    x, w, b = (t.requires_grad_() for t in case.tensors(dtype, "cuda", memory_format))
    y = adder2d(x, w, b, *case.geometry)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad.dtype is w.grad.dtype is b.grad.dtype is dtype
    assert_grad_input(x.grad, dy, x, w, case.geometry)
    assert_grad_weight(w.grad, dy, x, w, case.geometry)
    assert_grad_bias(b.grad, dy)


# Strides part the input gradient into phases; sizes that are multiples of vectors, and sums long enough to be split.
PHASES = [
    Case("stride_two_wide", 3, 67, 29, 31, 131, 3, 3, stride=(2, 2), padding=(1, 1)),
    Case("stride_two_pointwise", 2, 72, 15, 14, 40, 1, 1, stride=(2, 2)),
    Case("common_factor", 2, 19, 23, 29, 37, 3, 4, stride=(4, 6), padding=(2, 3), dilation=(2, 3)),
    Case("patches", 2, 9, 35, 37, 70, 4, 5, stride=(4, 5)),
    Case("stride_beyond_input", 3, 8, 3, 5, 33, 2, 2, stride=(7, 9), padding=(3, 1)),
    Case("aligned", 3, 64, 28, 28, 72, 3, 3, padding=(1, 1)),
    Case("aligned_narrow", 5, 32, 16, 12, 16, 3, 3, padding=(1, 1)),
    Case("aligned_thin", 5, 16, 32, 32, 48, 3, 3, padding=(1, 1)),
    Case("aligned_groups", 5, 32, 8, 8, 64, 3, 3, padding=(1, 1), groups=2),
]


def grad_input(dy, x, w, geometry):
    return torch.ops.torch2trt_adder.adder2d_grad_input(dy, x, w, *geometry)


def grad_output(case, dtype, memory_format=torch.contiguous_format):
    size = adder2d(*case.tensors(device="meta")[:2], None, *case.geometry).shape
    dy = torch.randn(size, generator=torch.Generator().manual_seed(1))
    return dy.to("cuda", dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("case", PHASES, ids=lambda case: case.name)
@dtypes
@formats
def test_input_gradient_by_phases(case, dtype, memory_format):
    x, w, _ = case.tensors(dtype, "cuda", memory_format)
    for dy_format in FORMATS:
        dy = grad_output(case, dtype, dy_format)
        assert_grad_input(grad_input(dy, x, w, case.geometry), dy, x, w, case.geometry)


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "w", "dy"])
@pytest.mark.parametrize("case", [PLAIN, LARGE[1], CASES[4], *PHASES], ids=lambda case: case.name)
def test_input_gradient_of_non_finite(case, where, value, dtype):
    """Exactly the elements that the rule makes NaN or infinite are so: none that only padding lies between."""
    x, w, _ = case.tensors(dtype, "cuda")
    dy = grad_output(case, dtype)
    for at in (0, 0.5, 1):
        tensors = {"x": x.clone(), "w": w.clone(), "dy": dy.clone()}
        flat = tensors[where].view(-1)
        flat[int(at * (len(flat) - 1))] = value
        if where != "dy":  # infinity less infinity
            tensors["w" if where == "x" else "x"].view(-1)[0] = float("inf")
        dx = grad_input(tensors["dy"], tensors["x"], tensors["w"], case.geometry)
        assert_grad_input(dx, tensors["dy"], tensors["x"], tensors["w"], case.geometry)


@dtypes
@pytest.mark.parametrize("case", LARGE + PHASES, ids=lambda case: case.name)
def test_input_gradient_same_result_twice(case, dtype):
    x, w, _ = case.tensors(dtype, "cuda")
    dy = grad_output(case, dtype)
    first = grad_input(dy, x, w, case.geometry)
    grad_input(-2 * dy, -x, 2 * w, case.geometry)  # leaves other numbers in the workspace
    assert torch.equal(grad_input(dy, x, w, case.geometry), first)


@dtypes
def test_input_gradient_of_strided_tensors(dtype):
    x, w, _ = PLAIN.tensors(dtype, "cuda")
    dy = grad_output(PLAIN, dtype)
    base = torch.randn(2 * PLAIN.N, PLAIN.C + 3, 2 * PLAIN.H, 3 * PLAIN.W, device="cuda").to(dtype)
    inputs = [
        base[::2, 1 : 1 + PLAIN.C, ::2, 2::3],
        base.to(memory_format=torch.channels_last)[::2, 1 : 1 + PLAIN.C, ::2, 2::3],
        x[:1].expand(3, -1, -1, -1),
    ]
    for view in inputs:
        assert_grad_input(grad_input(dy, view, w, PLAIN.geometry), dy, view, w, PLAIN.geometry)
    size = (PLAIN.N, PLAIN.K, PLAIN.H, PLAIN.W)
    buffer = torch.randn(dy.numel() + 1, device="cuda").to(dtype)
    gradients = [
        torch.randn((), device="cuda").to(dtype).expand(size),  # what sum().backward() hands on
        torch.randn(PLAIN.H, PLAIN.K, PLAIN.W, PLAIN.N, device="cuda").to(dtype).permute(3, 1, 0, 2),
        buffer[1:].view(size),  # off alignment
        buffer[1:].view(PLAIN.N, PLAIN.H, PLAIN.W, PLAIN.K).permute(0, 3, 1, 2),
    ]
    for view in gradients:
        assert_grad_input(grad_input(view, x, w, PLAIN.geometry), view, x, w, PLAIN.geometry)
    weight = torch.randn(3, 3, PLAIN.C, PLAIN.K, device="cuda").to(dtype).permute(3, 2, 1, 0)
    assert_grad_input(grad_input(dy, x, weight, PLAIN.geometry), dy, x, weight, PLAIN.geometry)


def test_input_gradient_takes_other_dtypes_of_grad_output():
    for dtype, other in (
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ):
        x, w, _ = PLAIN.tensors(dtype, "cuda")
        dy = grad_output(PLAIN, other)
        dx = grad_input(dy, x, w, PLAIN.geometry)
        assert dx.dtype is dtype
        assert_grad_input(dx, dy, x, w, PLAIN.geometry)


@pytest.mark.parametrize("case", [PLAIN, LARGE[1], PHASES[0]], ids=lambda case: case.name)
def test_input_gradient_with_any_workspace(case, monkeypatch):
    """The launcher makes do with what it gets; it wants more for splits than for packed weights."""
    x, w, _ = case.tensors(device="cuda")
    dy = grad_output(case, torch.float32)
    limit = limit_workspace(monkeypatch, launch_gradients, "_grad_input_args")
    for limit.fraction in (1, 0.99, 0.5, 0):
        assert_grad_input(grad_input(dy, x, w, case.geometry), dy, x, w, case.geometry)
    assert len(limit.wanted) == 4 and limit.wanted[0] > 0


def test_input_gradient_beyond_2_to_the_31_elements():
    """33 equal images in two launches: 2.2e9 pixels, 17.7e9 elements."""
    if torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("needs 50 GB of free GPU memory")
    x = torch.randn(1, 8, 8192, 8192, device="cuda", dtype=torch.float16)
    dy = torch.randn(1, 9, 8192, 8192, device="cuda", dtype=torch.float16)
    w = torch.randn(9, 8, 3, 3, device="cuda").half()
    geometry = (1, 1), (1, 1), (1, 1), 1
    dx = grad_input(dy.expand(33, -1, -1, -1), x.expand(33, -1, -1, -1), w, geometry)
    corners = [t[..., -66:, -66:].double() for t in (dy, x)]
    expected = reference.grad_input(*corners, w.double(), *geometry)
    terms = reference.grad_input(
        corners[0].abs(), -torch.ones_like(corners[1]), torch.zeros_like(w).double(), *geometry
    )
    inner = (..., slice(2, None), slice(2, None))  # the first rows and columns lack neighbours
    limit = bound(expected, terms, grad_input_terms(w, 1), dx.dtype)
    assert_within(dx[:1, :, -64:, -64:], expected[inner], limit[inner])
    for n in range(1, 33):
        assert torch.equal(dx[n], dx[0]), n


def test_input_gradient_in_a_cuda_graph():
    case = LARGE[1]
    x, w, _ = case.tensors(device="cuda")
    dy = grad_output(case, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        grad_input(dy, x, w, case.geometry)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dx = grad_input(dy, x, w, case.geometry)
    for seed in (1, 2):
        x.copy_(case.tensors(seed=seed)[0])
        graph.replay()
        assert_grad_input(dx, dy, x, w, case.geometry)


# After a convolution: sums of dy by vectors of pixels and of filters, by single elements, and in many blocks a filter.
SUMS = [
    Case("pixel_vectors", 5, 16, 16, 16, 16, 3, 1, padding=(1, 0)),
    Case("filter_vectors", 33, 8, 7, 7, 264, 1, 1),
    Case("many_images", 515, 3, 9, 7, 5, 3, 3),
    Case("one_filter_many_pixels", 70, 2, 65, 64, 1, 3, 3, padding=(1, 1)),
    Case("long_filters", 2, 1030, 5, 5, 3, 3, 3),
    Case("vectors_over_rows", 4, 3, 6, 4, 48, 1, 1),
]
# Without one: all tiles and strides, chunks of rows, columns and images with any rest, channels and filters that fill no tile.
FEW = [
    Case("stage_one", 5, 16, 32, 32, 16, 3, 3, padding=(1, 1)),
    Case("to_stage_two", 7, 16, 32, 32, 32, 3, 3, stride=(2, 2), padding=(1, 1)),
    Case("stage_two", 67, 32, 16, 16, 32, 3, 3, padding=(1, 1)),
    Case("to_stage_three", 5, 32, 16, 16, 64, 3, 3, stride=(2, 2), padding=(1, 1)),
    Case("stage_three", 259, 64, 8, 8, 64, 3, 3, padding=(1, 1)),
    Case("one_image", 1, 64, 57, 55, 64, 3, 3, padding=(1, 1)),
    Case("seven", 131, 24, 7, 7, 40, 3, 3, padding=(1, 1)),
    Case("odd", 3, 19, 15, 14, 33, 3, 3, stride=(2, 2), padding=(1, 1)),
    Case("few_groups", 3, 96, 15, 13, 72, 3, 3, stride=(2, 1), groups=6),
    Case("rows_apart", 2, 12, 17, 12, 10, 3, 3, stride=(3, 2), padding=(0, 2), dilation=(2, 1)),
    Case("wide_rows", 2, 9, 5, 301, 8, 3, 3),
    Case("little_but_padding", 2, 8, 3, 3, 11, 3, 3, padding=(4, 5)),
    Case("one_output", 1, 8, 3, 3, 8, 3, 3),
]


both_ways = pytest.mark.parametrize("case", [SUMS[0], FEW[0]], ids=["convolution", "alone"])


def grad_weight(dy, x, w, geometry, eta=None):
    return torch.ops.torch2trt_adder.adder2d_grad_weight(dy, x, w, *geometry, eta)


def kernel_names(function):
    """What one call launches; the test is skipped where the profiler sees nothing."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if event.device_time_total > 0]
    if not names:
        pytest.skip("the profiler sees no kernels here")
    return names


@pytest.mark.parametrize("case", CASES + LARGE + SUMS + FEW, ids=lambda case: case.name)
@dtypes
@formats
def test_weight_gradient(case, dtype, memory_format):
    """Any layout of x, dy and w; the result has that of w."""
    x, w, _ = case.tensors(dtype, "cuda", memory_format)
    for dy_format in FORMATS:
        dy = grad_output(case, dtype, dy_format)
        for w_format, eta in ((torch.contiguous_format, None), (torch.channels_last, 0.3)):
            w = w.contiguous(memory_format=w_format)
            dw = grad_weight(dy, x, w, case.geometry, eta)
            layout = torch.contiguous_format if w.is_contiguous() else torch.channels_last  # 1x1: both
            assert dw.dtype is torch.float32 and dw.is_contiguous(memory_format=layout)
            assert_grad_weight(dw, dy, x, w, case.geometry, eta)


@dtypes
@both_ways
def test_weight_gradient_of_strided_tensors(case, dtype):
    x, w, _ = case.tensors(dtype, "cuda")
    size = grad_output(case, dtype).shape
    draws = torch.randn(2 * math.prod(size) + 1, device="cuda").to(dtype)
    views = [
        draws[:1].view(1, 1, 1, 1).expand(size),  # the gradient of a sum
        draws[: size[1]].view(1, -1, 1, 1).expand(size),
        draws[1 : 1 + math.prod(size)].view(size),  # not on a vector's address
        draws[1 : 1 + math.prod(size)].view(size[0], size[2], size[3], size[1]).permute(0, 3, 1, 2),
        draws[:-1].view(*size[:3], -1)[..., ::2],
        draws[:-1].view(size[0], -1, *size[2:])[:, 1::2],
        draws[: math.prod(size)].view(size[0], size[1], size[3], size[2]).transpose(2, 3),
        draws[: math.prod(size)].view(size[1], size[0], *size[2:]).transpose(0, 1),
    ]
    for dy in views:
        for weight in (w, w.mT.contiguous().mT, w.repeat(2, 1, 1, 1)[::2]):
            for eta in (None, 0.3):
                assert_grad_weight(grad_weight(dy, x, weight, case.geometry, eta), dy, x, weight, case.geometry, eta)
    dy = grad_output(case, dtype)
    draws = torch.randn(4 * x.numel() + 1, device="cuda").to(dtype)
    views = [
        x[:1].expand_as(x),
        draws[1 : 1 + x.numel()].view_as(x),  # not on a vector's address
        draws[1 : 1 + x.numel()].view(case.N, case.H, case.W, case.C).permute(0, 3, 1, 2),
        draws[:-1].view(2 * case.N, case.C, case.H, 2 * case.W)[::2, :, :, 1::2],
        draws[:-1].view(case.N, case.H, case.W, 4 * case.C)[..., 1 : 1 + case.C].permute(0, 3, 1, 2),
        draws[: x.numel()].view(case.N, case.C, case.W, case.H).transpose(2, 3),
    ]
    for view in views:
        assert_grad_weight(grad_weight(dy, view, w, case.geometry), dy, view, w, case.geometry, None)


@both_ways
def test_weight_gradient_takes_other_dtypes_of_grad_output(case):
    x, w, _ = case.tensors(torch.float16, "cuda")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        dy = grad_output(case, dtype)
        assert_grad_weight(grad_weight(dy, x, w, case.geometry, 0.3), dy, x, w, case.geometry, 0.3)


@pytest.mark.parametrize("case", LARGE + SUMS + FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_weight_gradient_same_result_twice(case, memory_format):
    x, w, _ = case.tensors(device="cuda", memory_format=memory_format)
    dy = grad_output(case, torch.float32, memory_format)
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        first = grad_weight(dy, x, w, case.geometry, 0.3)
        grad_weight(-2 * dy, x, w, case.geometry, 0.3)  # leaves other numbers in the workspace
        assert torch.equal(grad_weight(dy, x, w, case.geometry, 0.3), first)
    finally:
        torch.backends.cudnn.deterministic = before


@dtypes
@formats
@pytest.mark.parametrize("K", [1, 3, 16])
def test_weight_gradient_where_the_terms_cancel(dtype, memory_format, K):
    """x = w but in one pixel: of two sums of 10^6 terms a filter only this one's dy * (x - w) is left."""
    N, size = 16, 256
    dy = torch.rand(N, K, size, size, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    dy = (dy + 1).contiguous(memory_format=memory_format)
    x = torch.full((N, 1, size, size), 0.5, device="cuda", dtype=dtype)
    w = torch.full((K, 1, 1, 1), 0.5, device="cuda", dtype=dtype)
    x[3, 0, 100, 17] = 2.5
    dw = grad_weight(dy, x, w, ((1, 1), (0, 0), (1, 1), 1))
    expected = 2 * dy[3, :, 100, 17].double()
    terms = (dy.double() * (x.double() + 0.5)).sum((0, 2, 3))
    limit = bound(expected, terms, N * size * size, torch.float32)
    assert_within(dw.flatten(), expected, limit)
    # The sum of dy alone, against a zero convolution.
    ones = grad_weight(dy, torch.zeros_like(x), torch.ones_like(w), ((1, 1), (0, 0), (1, 1), 1)).flatten()
    total = -dy.double().sum((0, 2, 3))
    # Chains of at most 64 loads and some 20 levels of trees, each rounded by half an eps.
    assert_within(ones, total, (64 + 20) / 2 * torch.finfo(torch.float32).eps * total.abs())


@dtypes
@formats
def test_weight_gradient_alone_where_the_terms_cancel(dtype, memory_format):
    """The same for 3x3 filters and several channels."""
    N, size = 16, 258
    dy = torch.rand(N, 8, size - 2, size - 2, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    dy = (dy + 1).contiguous(memory_format=memory_format)
    x = torch.full((N, 9, size, size), 0.5, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
    w = torch.full((8, 9, 3, 3), 0.5, device="cuda", dtype=dtype)
    x[3, 5, 100, 17] = 2.5
    dw = grad_weight(dy, x, w, ((1, 1), (0, 0), (1, 1), 1))
    expected = torch.zeros(w.shape, device="cuda", dtype=torch.float64)
    for r, s in itertools.product(range(3), repeat=2):
        expected[:, 5, r, s] = 2 * dy[3, :, 100 - r, 17 - s].double()
    terms = dy.double().sum((0, 2, 3))[:, None, None, None] + expected.abs()
    assert_within(dw, expected, bound(expected, terms, N * (size - 2) ** 2, torch.float32))


@dtypes
@pytest.mark.parametrize("eta", [None, 0.3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", [PLAIN, FEW[0]], ids=["convolution", "alone"])
def test_weight_gradient_of_non_finite(case, value, eta, dtype):
    """A filter's dy spoils that filter, and by the norm everything: finite stays nothing that was not zero."""
    x, w, _ = case.tensors(dtype, "cuda")
    dy = grad_output(case, dtype)
    dy[1, 7, 3, 4] = value
    raw, dw = (grad_weight(dy, x, w, case.geometry, e) for e in (None, eta))
    assert not raw[7].isfinite().any() and raw[:7].isfinite().all() and raw[8:].isfinite().all()
    if eta is None:
        return
    expected = scaling.adaptive_scaling(raw, eta)
    assert torch.equal(dw.isnan(), expected.isnan()) and torch.equal(dw.isinf(), expected.isinf())


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", [FEW[0], FEW[2]], ids=lambda case: case.name)
def test_weight_gradient_of_non_finite_input(case, value, dtype):
    """The input's corner spoils the taps that read it, and no others."""
    x, w, _ = case.tensors(dtype, "cuda")
    dy = grad_output(case, dtype)
    x[1, 3, 0, 0] = value
    raw = grad_weight(dy, x, w, case.geometry)
    assert not raw[:, 3, :2, :2].isfinite().any() and int((~raw.isfinite()).sum()) == 4 * case.K
    assert_grad_weight(raw, dy, x, w, case.geometry, None)


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e17])
@both_ways
def test_weight_gradient_of_any_magnitude(case, magnitude):
    """Squares beyond float32 at both ends: no gradient is zero, one is below the norm's floor of 1e-12, one is large."""
    x, w, _ = case.tensors(device="cuda")
    dy = magnitude * grad_output(case, torch.float32)
    dw = grad_weight(dy, x, w, case.geometry, 0.3)
    assert_grad_weight(dw, dy, x, w, case.geometry, 0.3)
    assert dw.isfinite().all() and bool(dw.any()) == (magnitude > 0)


def test_weight_gradient_beyond_2_to_the_31_elements():
    """2.3e9 elements each, all zero but the last pixels of the last image."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    x, dy = (torch.zeros(9, 8, 5700, 5700, device="cuda", dtype=torch.float16) for _ in range(2))
    w = torch.randn(8, 8, 3, 3, device="cuda").half()
    corners = x[-1:, :, -66:, -66:], dy[-1:, :, -66:, -66:]
    corners[0].normal_()
    corners[1][..., 2:, 2:].normal_()
    geometry = (1, 1), (1, 1), (1, 1), 1
    assert_grad_weight(grad_weight(dy, x, w, geometry), corners[1], corners[0], w, geometry, None)


@both_ways
def test_weight_gradient_of_an_empty_batch(case):
    x, w, _ = case.tensors(device="cuda")
    dw = grad_weight(grad_output(case, torch.float32)[:0], x[:0], w, case.geometry, 0.3)
    assert dw.shape == w.shape and dw.dtype is torch.float32 and not dw.any()


def test_weight_gradient_in_float64():
    x, w, _ = SUMS[0].tensors(torch.float64, "cuda")
    dy = grad_output(SUMS[0], torch.float64)
    for eta in (None, 0.3):
        dw = grad_weight(dy, x, w, SUMS[0].geometry, eta)
        assert dw.dtype is torch.float64
        assert_grad_weight(dw, dy, x, w, SUMS[0].geometry, eta)


def test_weight_gradient_of_a_wrong_size():
    x, w, _ = SUMS[0].tensors(device="cuda")
    with pytest.raises((ValueError, RuntimeError)):
        grad_weight(grad_output(SUMS[0], torch.float32)[:, :, 1:], x, w, SUMS[0].geometry)


@both_ways
def test_weight_gradient_in_a_cuda_graph(case):
    x, w, _ = case.tensors(device="cuda")
    dy = grad_output(case, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        grad_weight(dy, x, w, case.geometry, 0.3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dw = grad_weight(dy, x, w, case.geometry, 0.3)
    for seed in (1, 2):
        x.copy_(case.tensors(seed=seed)[0])
        graph.replay()
        assert_grad_weight(dw, dy, x, w, case.geometry, 0.3)


@both_ways
def test_weight_gradient_on_another_device(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, w, _ = case.tensors(device="cuda:1")
    dy = grad_output(case, torch.float32).to("cuda:1")
    dw = grad_weight(dy, x, w, case.geometry, 0.3)
    assert dw.device == x.device and torch.cuda.current_device() == 0
    assert_grad_weight(dw, dy, x, w, case.geometry, 0.3)


def test_weight_gradient_of_tensors_that_do_not_match():
    x, w, _ = FEW[0].tensors(device="cuda")
    dy = grad_output(FEW[0], torch.float32)
    with pytest.raises(RuntimeError, match="adder2d_grad_weight: grad_output is on cpu and input on cuda:0"):
        launch_gradients.grad_weight_cuda(dy.cpu(), x, w, *FEW[0].geometry)
    with pytest.raises(TypeError, match="adder2d: weight is torch.float16 and input is torch.float32"):
        grad_weight(dy, x, w.half(), FEW[0].geometry)


@pytest.mark.parametrize("eta", [0.2, None])
def test_weight_gradient_in_few_launches(eta):
    """All of it but the convolution: three kernels, or two without the scaling."""
    x, w, _ = PLAIN.tensors(device="cuda")
    dy = grad_output(PLAIN, torch.float32)
    names = kernel_names(lambda: grad_weight(dy, x, w, PLAIN.geometry, eta))
    ours = [name for name in names if "adder2d_wgrad" in name]
    assert len(ours) == (2 if eta is None else 3), names
    assert not [name for name in names if "at::native" in name], names


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_weight_gradient_of_few_channels_without_a_convolution(case):
    for dtype, memory_format, eta in itertools.product(DTYPES, FORMATS, (0.2, None)):
        x, w, _ = case.tensors(dtype, "cuda", memory_format)
        dy = grad_output(case, dtype, memory_format)
        names = kernel_names(lambda: grad_weight(dy, x, w, case.geometry, eta))
        assert len(names) == (2 if eta is None else 3) and all("adder2d_wgrad" in name for name in names), names


@pytest.mark.skipif(
    not fastpath._can_read_keys, reason="torch 2.4 keeps dispatch keys to itself: all calls take the dispatcher"
)
def test_plain_calls_take_the_short_way():
    x, w, b = PLAIN.tensors(device="cuda")
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert fastpath.find_kernels(x, torch.nn.Parameter(w), b + 1) is fastpath._KERNELS["CUDA"]
    assert fastpath.find_kernels(x, w.cpu(), None) is None
    with torch.autocast("cuda"):
        assert fastpath.find_kernels(x, w, b) is None


@dtypes
def test_weight_gradient_without_tf32(dtype):
    """TF32 would read a float32 x = 1 + 2^-12 as 1, for every term; float16 and bfloat16 fit into it."""
    _, w, _ = PLAIN.tensors(dtype, device="cuda")
    x = torch.full((PLAIN.N, PLAIN.C, PLAIN.H, PLAIN.W), 1 + 2.0**-12, device="cuda").to(dtype)
    w.requires_grad_()

    def flag():
        cudnn = torch.backends.cudnn
        return cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else cudnn.allow_tf32

    before = flag()
    y = adder2d(x, w, None, 1, 1)
    y.backward(torch.ones_like(y))
    assert_grad_weight(w.grad, torch.ones_like(y), x, w, PLAIN.geometry)
    assert flag() == before


@pytest.mark.parametrize("option", ["benchmark", "deterministic"])
@pytest.mark.parametrize("case", [LARGE[0], LARGE[4]], ids=lambda case: case.name)
@dtypes
def test_weight_gradient_whichever_way_cudnn_goes(case, dtype, option):
    x, w, _ = case.tensors(dtype, "cuda")
    w.requires_grad_()
    before = getattr(torch.backends.cudnn, option)
    setattr(torch.backends.cudnn, option, True)
    try:
        y = adder2d(x, w, None, *case.geometry)
        dy = torch.randn_like(y)
        y.backward(dy)
    finally:
        setattr(torch.backends.cudnn, option, before)
    assert_grad_weight(w.grad, dy, x, w, case.geometry)


@pytest.mark.parametrize("eta", [None, 0.5])
def test_eta(eta):
    x, w, _ = PLAIN.tensors(device="cuda")
    w.requires_grad_()
    y = adder2d(x, w, None, *PLAIN.geometry, eta)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert_grad_weight(w.grad, dy, x, w, PLAIN.geometry, eta)


# ---- autocast, torch.library, torch.compile


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.2, 0.1])
def test_autocast(dtype, eta):
    x, w, b = PLAIN.tensors(device="cuda")
    w.requires_grad_()
    with torch.autocast("cuda", dtype=dtype):
        y = adder2d(x, w, b, 1, 1, eta=eta)
    assert y.dtype is dtype
    assert_forward(y, x.to(dtype), w.to(dtype), b.to(dtype), PLAIN.geometry)
    y.float().sum().backward()
    assert w.grad.dtype is torch.float32 and math.isclose(w.grad.norm(), eta * math.sqrt(w.numel()), rel_tol=0.01)


@formats
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(memory_format, requires_grad, dtype):
    case = next(case for case in CASES if case.name == "per_axis")
    x, w, b = (t.requires_grad_(requires_grad) for t in case.tensors(dtype, "cuda", memory_format))
    arguments = [list(v) if isinstance(v, tuple) else v for v in case.geometry]
    torch.library.opcheck(torch.ops.torch2trt_adder.adder2d.default, (x, w, b, *arguments))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("eta", [0.2, None])
@formats
def test_compile(backend, eta, memory_format):
    if backend == "inductor":
        pytest.importorskip("triton", reason="inductor needs triton on a GPU", exc_type=ImportError)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        Adder2d(16, 24, 3, padding=1, bias=True), torch.nn.BatchNorm2d(24), torch.nn.ReLU(), Adder2d(24, 8, 3, 2)
    ).cuda()
    set_eta(model, eta)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 16, 13, 11, device="cuda").to(memory_format=memory_format)
    results = []
    for call in (model, compiled):
        model.zero_grad()
        y = call(x)
        y.sum().backward()
        results.append((y.detach(), model[3].adder.grad, model[0].adder.grad))
    for ours, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4 * max(1, eager.abs().max().item()))
