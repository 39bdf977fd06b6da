"""The CPU kernels, beyond the cases that test_ops.py runs: instruction sets, threads, fork, memory, rounding."""

import ctypes
import math
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import CASES, Case
from torch import Tensor

from torch2trt_adder import adder2d, library
from torch2trt_adder.numerics.definition import assert_forward, assert_grad_input

# What the kernel cuts in pieces: rows, columns, filters, sums; and what it treats apart: 1x1 maps, large dilation.
LARGE = [
    Case("many_rows", 1, 3, 301, 17, 5, 3, 3, padding=(1, 1)),
    Case("wide_rows", 1, 130, 3, 1501, 2, 3, 3, padding=(1, 1)),
    Case("many_filters", 1, 33, 5, 5, 203, 3, 3, padding=(1, 1)),
    Case("one_pixel_maps", 71, 130, 1, 1, 67, 1, 1),
    Case("large_dilation", 1, 3, 203, 205, 6, 3, 3, padding=(1, 1), dilation=(97, 101)),
    Case("large_dilation_and_stride", 1, 2, 203, 205, 6, 3, 3, stride=(2, 3), dilation=(30, 31)),
]
# Strides part the input gradient into phases: with taps, without, and with rows that no window reaches.
STRIDES = [
    Case("patches", 2, 5, 35, 37, 7, 4, 5, stride=(4, 5)),
    Case("common_factor", 1, 7, 23, 29, 5, 3, 4, stride=(4, 6), padding=(2, 3), dilation=(2, 3)),
    Case("stride_of_dilation", 2, 6, 19, 20, 9, 3, 2, stride=(2, 3), padding=(1, 0), dilation=(4, 3)),
    Case("stride_beyond_input", 3, 4, 3, 5, 6, 2, 2, stride=(7, 9), padding=(3, 1)),
    Case("groups_and_stride", 2, 12, 17, 15, 21, 3, 3, stride=(2, 1), padding=(2, 0), groups=3),
]


@pytest.fixture
def one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_large(case, memory_format):
    x, w, b = case.tensors(memory_format=memory_format)
    assert_forward(adder2d(x, w, b, *case.geometry), x, w, b, case.geometry)


def grad_input(dy: Tensor, x: Tensor, w: Tensor, geometry: tuple) -> Tensor:
    return torch.ops.torch2trt_adder.adder2d_grad_input(dy, x, w, *geometry)


def grad_output(case: Case, x: Tensor, w: Tensor) -> Tensor:
    y = adder2d(x, w, None, *case.geometry)
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last
    )


@pytest.mark.parametrize("case", LARGE + STRIDES, ids=lambda case: case.name)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_input_gradient(case, memory_format):
    x, w, _ = case.tensors(memory_format=memory_format)
    dy = grad_output(case, x, w)
    dx = grad_input(dy, x, w, case.geometry)
    assert dx.stride() == torch.empty_like(x).stride()
    assert_grad_input(dx, dy, x, w, case.geometry)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "w", "dy"])
@pytest.mark.parametrize("case", [CASES[2], CASES[4], *STRIDES], ids=lambda case: case.name)
def test_input_gradient_of_non_finite(case, where, value):
    """Exactly the elements that the rule makes NaN or infinite are so: none that only padding lies between."""
    x, w, _ = case.tensors()
    dy = grad_output(case, x, w)
    for at in (0, 0.5, 1):
        tensors = {"x": x.clone(), "w": w.clone(), "dy": dy.clone()}
        flat = tensors[where].view(-1)
        flat[int(at * (len(flat) - 1))] = value
        if where != "dy":  # infinity less infinity
            tensors["w" if where == "x" else "x"].view(-1)[0] = math.inf
        dx = grad_input(tensors["dy"], tensors["x"], tensors["w"], case.geometry)
        assert_grad_input(dx, tensors["dy"], tensors["x"], tensors["w"], case.geometry)


def test_input_gradient_of_strided_tensors():
    case = CASES[2]
    base = torch.randn(2 * case.N, case.C + 3, 2 * case.H, 3 * case.W)
    x, w = base[::2, 1 : 1 + case.C, ::2, 2::3], torch.randn(3, 3, case.C, case.K).permute(3, 2, 1, 0)
    one = torch.randn(())
    for dy in (one.expand(case.N, case.K, 11, 9), torch.randn(11, case.K, 9, case.N).permute(3, 1, 0, 2)):
        assert_grad_input(grad_input(dy, x, w, case.geometry), dy, x, w, case.geometry)


def test_input_gradient_refuses_other_shapes():
    x, w, _ = CASES[2].tensors()
    with pytest.raises(ValueError, match=r"grad_output must be \[2, 17, 11, 9\].*, got \[2, 17, 11, 8\]"):
        grad_input(torch.zeros(2, 17, 11, 8), x, w, CASES[2].geometry)
    with pytest.raises(ValueError, match="needs a weight"):
        grad_input(torch.zeros(2, 17, 11, 9), x, w[:, 1:], CASES[2].geometry)
    with pytest.raises(TypeError, match="weight is torch.float16"):
        grad_input(torch.zeros(2, 17, 11, 9), x, w.half(), CASES[2].geometry)


def test_input_gradient_takes_other_dtypes_of_grad_output():
    for dtype in (torch.float64, torch.bfloat16):
        x, w, _ = CASES[2].tensors()
        dy = grad_output(CASES[2], x, w).to(dtype)
        dx = grad_input(dy, x, w, CASES[2].geometry)
        assert dx.dtype is torch.float32
        assert_grad_input(dx, dy, x, w, CASES[2].geometry)


def test_equal_terms_do_not_drift():
    """Equal terms round the same way each time: the worst case for a plain running sum."""
    x, w = torch.full((1, 1024, 5, 5), 0.1), torch.full((4, 1024, 3, 3), -0.2)
    assert_forward(adder2d(x, w), x, w, None, ((1, 1), (0, 0), (1, 1), 1))


def test_no_input_is_copied_as_a_whole():
    """Extra memory is bounded by tiles: 9 taps of a 100 MB input would be 900 MB as columns."""
    script = """
import resource, torch, torch2trt_adder
x, w = torch.zeros(1, 25, 1024, 1024), torch.zeros(1, 25, 3, 3)
torch2trt_adder.adder2d(x[:, :, :8, :8], w)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = torch2trt_adder.adder2d(x, w, None, 1, 1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - y.numel() * 4)
"""
    assert int(run(script)) < 16 << 20


# ---- instruction sets

COMPUTE = f"""
import hashlib, sys, torch
sys.path[:0] = {[str(folder) for folder in pathlib.Path(__file__).resolve().parents[:2]]!r}
from conftest import CASES
from torch2trt_adder import adder2d
digest = hashlib.sha256()
for case in CASES:
    x, w, b = case.tensors()
    digest.update(adder2d(x, w, b, *case.geometry).numpy().tobytes())
print(digest.hexdigest())
"""


def run(script: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def supports(isa: str) -> bool:
    flag = {"baseline": "", "avx2": " avx2 ", "avx512": " avx512f "}[isa]
    return flag in pathlib.Path("/proc/cpuinfo").read_text().replace("\n", " ")


@pytest.fixture(scope="module")
def digest_of_default() -> str:
    return run(COMPUTE, TORCH2TRT_ADDER_CPU_ISA="")  # as if it were not set


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa, digest_of_default):
    if not supports(isa):
        pytest.skip(f"this CPU has no {isa}")
    assert run(COMPUTE, TORCH2TRT_ADDER_CPU_ISA=isa) == digest_of_default


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_input_gradient_of_every_instruction_set(isa):
    """Only some have a fused multiplication and addition, so bits may differ."""
    if not supports(isa):
        pytest.skip(f"this CPU has no {isa}")
    script = f"""
import sys
sys.path[:0] = {[str(folder) for folder in pathlib.Path(__file__).resolve().parents[:2]]!r}
from torch2trt_adder.numerics.definition import assert_grad_input
from test_cpu import CASES, STRIDES, grad_input, grad_output
for case in CASES + STRIDES:
    x, w, _ = case.tensors()
    dy = grad_output(case, x, w)
    x.view(-1)[3] = w.view(-1)[-1] = float("nan")
    assert_grad_input(grad_input(dy, x, w, case.geometry), dy, x, w, case.geometry)
"""
    run(script, TORCH2TRT_ADDER_CPU_ISA=isa)


def test_unknown_instruction_set_is_refused():
    script = "import torch, torch2trt_adder\ntorch2trt_adder.adder2d(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))"
    with pytest.raises(AssertionError, match="RuntimeError") as raised:
        run(script, TORCH2TRT_ADDER_CPU_ISA="sse9")
    message = str(raised.value)
    assert 'TORCH2TRT_ADDER_CPU_ISA is "sse9", but must be one of' in message
    assert (
        "RuntimeError: adder2d: TORCH2TRT_ADDER_CPU_ISA names an instruction set that this CPU does not have" in message
    )


# ---- threads


def test_result_does_not_depend_on_threads(one_torch_thread):
    x, w, b = LARGE[0].tensors()
    alone = adder2d(x, w, b, *LARGE[0].geometry)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(adder2d(x, w, b, *LARGE[0].geometry), alone)


@pytest.mark.parametrize("case", [LARGE[0], STRIDES[4]], ids=lambda case: case.name)
def test_input_gradient_does_not_depend_on_threads(case, one_torch_thread):
    x, w, _ = case.tensors()
    dy = grad_output(case, x, w)
    alone = grad_input(dy, x, w, case.geometry)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(grad_input(dy, x, w, case.geometry), alone)


def test_callers_at_once():
    x, w, b = Case("", 4, 16, 32, 32, 16, 3, 3).tensors()
    expected = adder2d(x, w, b)
    wrong = []

    def call() -> None:
        torch.set_num_threads(3)
        for _ in range(30):
            if not torch.equal(adder2d(x, w, b), expected):
                wrong.append(threading.current_thread().name)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_fork():
    """A child (a DataLoader's worker, say) has none of the threads that its parent, or torch in it, has started."""
    script = """
import os, torch, torch2trt_adder
from torch2trt_adder import library
torch.set_num_threads(2)
x, w = torch.randn(4, 16, 32, 32), torch.randn(16, 16, 3, 3)
torch.randn(1 << 22).exp().sum()  # starts the threads of torch's OpenMP
assert len(os.listdir("/proc/self/task")) > 1
columns = torch.nn.functional.unfold(x[:1].double(), 3)[0].T
reference = (columns[None] - w.double().flatten(1)[:, None]).abs().sum(2)

def check():
    y = torch2trt_adder.adder2d(x, w)[0].flatten(1)
    return 0 if ((y + reference).abs() <= 2**-23 * (1 + 2 * 144**0.5) * reference).all() else 1

def in_child(function):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

print("before the library is loaded:", in_child(check), in_child(lambda: check() or in_child(check)), flush=True)
library.load()
print("before the first call:", in_child(check), in_child(lambda: check() or in_child(check)), flush=True)
torch2trt_adder.adder2d(x, w)
print("after a call:", in_child(check), in_child(lambda: check() or in_child(check)), "and here:", check(), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the children too
            pytest.fail(f"a child hangs; up to there: {process.communicate()[0]}")
    assert output.splitlines() == [
        "before the library is loaded: 0 0",
        "before the first call: 0 0",
        "after a call: 0 0 and here: 0",
    ]


def _multiply_in_child(connection, x: Tensor, w: Tensor) -> None:
    torch.set_num_threads(2)
    connection.send(adder2d(x, w).sum().item())


def test_multiprocessing_fork():
    context = multiprocessing.get_context("fork")
    x, w = torch.randn(2, 8, 24, 24), torch.randn(8, 8, 3, 3)
    torch.randn(1 << 22).exp().sum()
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_multiply_in_child, args=(send, x, w))
    child.start()
    try:
        assert receive.poll(60), "the child hangs"
        assert receive.recv() == adder2d(x, w).sum().item()
    finally:
        child.kill()
        child.join()


def test_data_loader_workers():
    class Layer(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return adder2d(x, w)

    x, w, _ = CASES[2].tensors()
    expected = adder2d(x, w)
    for y in torch.utils.data.DataLoader(Layer(), batch_size=1, num_workers=2, timeout=60):
        assert torch.equal(y[0], expected)


# ---- the C functions, called as no Python caller would


def _params(case: Case, x: Tensor, w: Tensor, y: Tensor) -> library.Adder2dParams:
    params = library.Adder2dParams.from_buffer_copy(
        library.PROBLEM.pack(
            *x.shape, case.K, case.R, case.S, *y.shape[2:], *case.stride, *case.padding, *case.dilation, case.groups, 0, 0, 0, 0,
            *x.stride(), *y.stride(),
        )
        + library.POINTERS.pack(x.data_ptr(), w.data_ptr(), 0, y.data_ptr(), 0, 0, 0, 0)
    )  # fmt: skip
    return params


@pytest.mark.parametrize("threads", [0, -1, -(2**31), 10**9, 2**31 - 1])
def test_hostile_thread_counts(threads):
    """OpenMP would end the process where the system grants it fewer threads than it was asked for."""
    case = Case("work for 500 threads", 1, 64, 64, 64, 64, 3, 3, padding=(1, 1))
    x, w, _ = case.tensors()
    expected = adder2d(x, w, None, *case.geometry)
    y = torch.full_like(expected, math.nan)
    before = len(os.listdir("/proc/self/task"))
    assert library.load().adder2d_fprop_cpu(ctypes.byref(_params(case, x, w, y)), threads) == 0
    assert torch.equal(y, expected)
    assert len(os.listdir("/proc/self/task")) - before <= 4 * os.cpu_count()


@pytest.mark.parametrize("pointer", ["x", "w", "y"])
def test_null_pointers(pointer):
    loaded = library.load()
    x, w, _ = CASES[2].tensors()
    y = torch.zeros(adder2d(x, w, None, *CASES[2].geometry).shape)
    params = _params(CASES[2], x, w, y)
    setattr(params, pointer, None)
    error = loaded.adder2d_fprop_cpu(ctypes.byref(params), 1)
    assert error == 1
    assert b"null pointer" in loaded.adder2d_cpu_error_string(error)
    dgrad = library.Adder2dDgradParams(layer=params, dx_stride=params.x_stride, dx=y.data_ptr())
    assert loaded.adder2d_dgrad_cpu(ctypes.byref(dgrad), 1) == 1
    params.N = 0  # an empty tensor may lie at null
    assert loaded.adder2d_fprop_cpu(ctypes.byref(params), 1) == 0
    assert loaded.adder2d_fprop_cpu(None, 1) == 1 and loaded.adder2d_dgrad_cpu(None, 1) == 1


HUGE = 2**31 - 1


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"N": HUGE, "C": HUGE, "K": 1}, "the input must have fewer than 2^58 elements"),
        ({"N": HUGE, "K": HUGE}, "the output must have fewer than 2^58 elements"),
        ({"K": HUGE, "C": HUGE}, "weight must have fewer than 2^58 elements"),
        ({"N": HUGE, "K": 2**16, "C": 2**16}, "fewer than 2^62 terms"),
        ({"x_stride": (2**62, 1, 1, 1)}, "the strides of x must reach"),
        ({"x_stride": (0, 0, 0, -(2**63))}, "the strides of x must reach"),
        ({"y_stride": (0, 2**58 + 1, 0, 0)}, "the strides of y must reach"),
        ({"dil_h": HUGE, "x_stride": (0, 0, 2**40, 0)}, "the strides of x must reach"),
        ({"pad_h": HUGE}, "the padded input must be below 2^31"),
        ({"stride_h": HUGE}, "must sum to less than 2^31"),
        ({"dil_h": HUGE, "R": HUGE}, "does not fit"),
        ({"groups": -1}, "groups must divide"),
        ({"stride_h": -HUGE - 1}, "stride must be >= 1"),
        ({"x_type": 3}, "types must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_check_refuses_extents_that_overflow(changes, reason):
    values = dict.fromkeys(("N", "C", "H", "W", "K", "R", "S", "P", "Q"), 1)
    values |= dict.fromkeys(("stride_h", "stride_w", "dil_h", "dil_w", "groups"), 1)
    params = library.Adder2dParams(**values)
    loaded = library.load()
    assert loaded.adder2d_check(ctypes.byref(params)) is None
    for name, value in changes.items():
        setattr(params, name, (ctypes.c_int64 * 4)(*value) if isinstance(value, tuple) else value)
    for check, block in (
        (loaded.adder2d_check, params),
        (loaded.adder2d_dgrad_check, library.Adder2dDgradParams(layer=params)),
        (loaded.adder2d_wgrad_check, library.Adder2dWgradParams(layer=params)),
    ):
        assert reason in check(ctypes.byref(block)).decode()
    assert loaded.adder2d_fprop_cpu(ctypes.byref(params), 1) == 1
    assert loaded.adder2d_fprop(ctypes.byref(params), None) == 1
    assert loaded.adder2d_fprop_workspace(ctypes.byref(params)) == 0


def test_check_refuses_strides_of_the_gradients():
    values = dict.fromkeys(("N", "C", "H", "W", "K", "R", "S", "P", "Q"), 1)
    values |= dict.fromkeys(("stride_h", "stride_w", "dil_h", "dil_w", "groups"), 1)
    layer, far = library.Adder2dParams(**values), (ctypes.c_int64 * 4)(0, 2**63 - 1, 0, 0)
    loaded = library.load()
    assert b"the strides of dx" in loaded.adder2d_dgrad_check(
        ctypes.byref(library.Adder2dDgradParams(layer=layer, dx_stride=far))
    )
    wgrad = library.Adder2dWgradParams(layer=layer, convolved_stride=far)
    assert b"the strides of convolved" in loaded.adder2d_wgrad_check(ctypes.byref(wgrad))


# ---- long kernels


@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 2), (40_000, 1), (3, 7)])
def test_set_up_of_a_long_kernel_is_linear(stride, dilation):
    """Every tap has a segment of its own where the stride is long: looking through all of them took 9 s."""
    case = Case("long", 1, 1, 1, 40_000 * dilation + 9, 1, 1, 40_000, stride=(1, stride), dilation=(1, dilation))
    x, w, _ = case.tensors()
    began = time.thread_time()
    y = adder2d(x, w, None, *case.geometry)
    assert time.thread_time() - began < 2  # of this thread, whatever else the machine does
    assert_forward(y, x, w, None, case.geometry)
