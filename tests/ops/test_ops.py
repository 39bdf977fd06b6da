"""The operator on the CPU, and everything about it that does not depend on the device."""

import contextlib
import functools
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import CASES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torch2trt_adder import adder2d
from torch2trt_adder.numerics.definition import assert_forward, assert_grad_bias, assert_grad_input, assert_grad_weight
from torch2trt_adder.ops import fastpath

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
SMALL = next(case for case in CASES if case.name == "three_by_three")
PER_AXIS = next(case for case in CASES if case.name == "per_axis")
OP = torch.ops.torch2trt_adder.adder2d.default

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])


# ---- forward


@dtypes
def test_forward(case, dtype):
    x, w, b = case.tensors(dtype)
    for bias in (None, b):
        y = adder2d(x, w, bias, *case.geometry)
        assert y.dtype is dtype and y.is_contiguous()
        assert_forward(y, x, w, bias, case.geometry)


@dtypes
def test_channels_last(case, dtype):
    x, w, b = case.tensors(dtype, memory_format=torch.channels_last)
    y = adder2d(x, w, b, *case.geometry)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last  # one channel or pixel: both
    assert y.stride() == torch.empty(y.shape, memory_format=layout).stride()
    assert_forward(y, x, w, b, case.geometry)


@dtypes
def test_strided_tensors(dtype):
    """Views are read where they lie; only the input's strides travel, the weight is made contiguous."""
    x, w, b = SMALL.tensors(dtype)
    base = torch.randn(2 * SMALL.N, SMALL.C + 3, 2 * SMALL.H, 3 * SMALL.W).to(dtype)
    views = [
        base[::2, 1 : 1 + SMALL.C, ::2, 2::3],
        base[1::2, 3:, 1::2, ::3].transpose(2, 3),
        x[:1].expand(3, -1, -1, -1),
        x[:, :1].expand(-1, SMALL.C, -1, -1),
        x[:, :, :, :1].expand(-1, -1, -1, 7),
    ]
    for view in views:
        assert_forward(adder2d(view, w, b, 1, 1), view, w, b, SMALL.geometry)
    weights = [
        w.to(memory_format=torch.channels_last),
        torch.randn(3, 3, SMALL.C, SMALL.K).to(dtype).permute(3, 2, 1, 0),
    ]
    for weight in weights:
        y = adder2d(x, weight, torch.randn(2 * SMALL.K).to(dtype)[::2], 1, 1)
        assert y.is_contiguous()
        assert_forward(adder2d(x, weight, None, 1, 1), x, weight, None, SMALL.geometry)


@dtypes
@formats
def test_empty_batch(dtype, memory_format):
    x, w, b = SMALL.tensors(dtype, memory_format=memory_format)
    x = x[:0].requires_grad_()
    w.requires_grad_()
    y = adder2d(x, w, b, 2, 1)
    assert y.shape == (0, SMALL.K, 6, 5) and y.dtype is dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert w.grad.eq(0).all()


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite(dtype, value):
    """Exactly the windows that touch the value carry it; infinity minus infinity is NaN."""
    x, w, _ = SMALL.tensors(dtype)
    x[1, 3, 5, 4] = value
    assert_forward(adder2d(x, w, None, 1, 1), x, w, None, SMALL.geometry)
    assert int((~adder2d(x, w, None, 1, 1).isfinite()).sum()) == 9 * SMALL.K
    w[2, 3, 1, 1] = value
    y = adder2d(x, w, None, 1, 1)
    assert_forward(y, x, w, None, SMALL.geometry)
    assert not y[:, 2].isfinite().any() and y[1, 2, 5, 4].isnan()


def test_half_sums_beyond_half():
    """A sum that passes float16's 65504 is -inf there, never a wrong finite number."""
    x, w = torch.full((1, 64, 8, 8), 1000.0).half(), torch.full((2, 64, 3, 3), -1000.0).half()
    assert adder2d(x, w).eq(-float("inf")).all()
    assert adder2d(x.bfloat16(), w.bfloat16()).isfinite().all()


def test_reads_no_shape_of_a_traced_tensor(monkeypatch):
    """torch2trt replaces Tensor.size and Tensor.shape while it traces; touching them adds layers to the network."""

    def size(self, dim=None):
        raise AssertionError("Tensor.size of a traced tensor")

    def getattribute(self, name, read=torch.Tensor.__getattribute__):
        assert name != "shape", "Tensor.shape of a traced tensor"
        return read(self, name)

    x, w, b = SMALL.tensors()
    expected = adder2d(x, w, b, 1, 1)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.Tensor, "size", size)
        patch.setattr(torch.Tensor, "__getattribute__", getattribute)
        y = adder2d(x, w, b, 1, 1)
        z = adder2d(x, w.requires_grad_(), b, 1, 1)
    assert torch.equal(y, expected) and torch.equal(z, expected)


# ---- errors: the same sentence from real and from fake tensors


def _ones(*size, dtype=torch.float32, device="cpu"):
    return torch.ones(size, dtype=dtype, device=device)


ERRORS = {
    "unbatched": (ValueError, r"input must be \[N, C, H, W\], got \[3, 6, 6\]", lambda x, w: (x[0], w)),
    "weight_rank": (ValueError, r"weight must be \[K, C / groups, R, S\], got \[3, 3, 3\]", lambda x, w: (x, w[0])),
    "channels": (
        ValueError,
        r"an input of 2 channels in 1 groups needs a weight \[K, 2, R, S\]",
        lambda x, w: (x[:, :2], w),
    ),
    "stride": (
        ValueError,
        r"stride must be an int or a pair, each >= 1, got \[1, 0\]",
        lambda x, w: (x, w, None, (1, 0)),
    ),
    "stride_triple": (ValueError, r"stride must .* got \[1, 1, 1\]", lambda x, w: (x, w, None, (1, 1, 1))),
    "padding": (ValueError, r"padding must .* each >= 0, got \[-1, -1\]", lambda x, w: (x, w, None, 1, -1)),
    "dilation": (ValueError, r"dilation must .* got \[0, 0\]", lambda x, w: (x, w, None, 1, 0, 0)),
    "groups": (
        ValueError,
        r"groups must divide the 3 input channels and the 4 filters, got 2",
        lambda x, w: (x, w, None, 1, 0, 1, 2),
    ),
    "no_groups": (ValueError, r"groups must divide .* got 0", lambda x, w: (x, w, None, 1, 0, 1, 0)),
    "kernel_too_large": (
        ValueError,
        r"the 3x3 kernel with dilation \[3, 3\] does not fit the 6x6 input with padding \[0, 0\]; enlarge",
        lambda x, w: (x, w, None, 1, 0, 3),
    ),
    "no_rows": (ValueError, r"only the batch may be empty", lambda x, w: (x[:, :, :0], w, None, 1, 3)),
    "bias": (ValueError, r"bias must be \[4\], one value per filter, got \[3\]", lambda x, w: (x, w, x[0, 0, 0, :3])),
    "dtype": (TypeError, r"torch.int64 is not supported; convert", lambda x, w: (x.long(), w.long())),
    "dtypes_differ": (
        TypeError,
        r"weight is torch.float32 and input is torch.float16; convert",
        lambda x, w: (x.half(), w),
    ),
    "bias_dtype": (
        TypeError,
        r"bias is torch.float64 and input is torch.float32",
        lambda x, w: (x, w, w[:, 0, 0, 0].double()),
    ),
}


@pytest.mark.parametrize("where", ["cpu", "meta", "compiled"])
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, where):
    kind, pattern, arguments = ERRORS[name]
    device = "meta" if where == "meta" else "cpu"
    arguments = arguments(_ones(2, 3, 6, 6, device=device), _ones(4, 3, 3, 3, device=device))
    call = adder2d
    if where == "compiled":
        torch._dynamo.reset()
        call, kind = (
            torch.compile(adder2d, backend="eager", fullgraph=True),
            Exception,
        )  # dynamo wraps what the fake raises
    with pytest.raises(kind, match=pattern):
        call(*arguments)


def test_devices_differ():
    with pytest.raises(RuntimeError, match="weight is on cpu and input on meta; move"):
        adder2d(_ones(2, 3, 6, 6, device="meta"), _ones(4, 3, 3, 3))


def test_axis_beyond_int32():
    x = _ones(1, 1, 1, 1).expand(2**31, 1, 1, 1)
    with pytest.raises(ValueError, match=f"every axis must be below 2\\^31, got {2**31}; split"):
        adder2d(x, _ones(1, 1, 1, 1))


# ---- gradients


@pytest.mark.parametrize(
    "case, dtype, memory_format",
    [
        pytest.param(case, dtype, memory_format, id=f"{case.name}-{dtype}-{memory_format}".replace("torch.", ""))
        for case, dtype, memory_format in itertools.product(CASES, DTYPES, FORMATS)
        if case.name != "wide" or (dtype, memory_format) == (torch.float32, torch.contiguous_format)  # slow on a CPU
    ],
)
def test_gradients(case, dtype, memory_format):
    x, w, b = (t.requires_grad_() for t in case.tensors(dtype, memory_format=memory_format))
    y = adder2d(x, w, b, *case.geometry)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad.dtype is w.grad.dtype is b.grad.dtype is dtype
    assert_grad_input(x.grad, dy, x, w, case.geometry)
    assert_grad_weight(w.grad, dy, x, w, case.geometry)
    assert_grad_bias(b.grad, dy)


def test_gradients_of_strided_tensors():
    x, w, _ = PER_AXIS.tensors()
    x = torch.randn(2, 6, 24, 34)[:, :, ::2, ::2].transpose(2, 3).requires_grad_()
    w = w.to(memory_format=torch.channels_last).requires_grad_()
    y = adder2d(x, w, None, *PER_AXIS.geometry)
    dy = torch.randn(1, 1, 1, 1).expand_as(y)
    y.backward(dy)
    assert_grad_input(x.grad, dy, x, w, PER_AXIS.geometry)
    assert_grad_weight(w.grad, dy, x, w, PER_AXIS.geometry)


def test_raw_weight_gradient_in_float32():
    """The op's own gradient is unscaled, and float32 for half inputs: sums over a batch leave float16's range."""
    x, w, _ = SMALL.tensors(torch.float16)
    y = adder2d(x, w, None, *SMALL.geometry)
    dy = torch.full_like(y, 500.0)
    raw = torch.ops.torch2trt_adder.adder2d_grad_weight(dy, x, w, *SMALL.geometry)
    assert raw.dtype is torch.float32 and raw.abs().max() > 65504
    assert_grad_weight(raw, dy, x, w, SMALL.geometry, eta=None)


@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eta(eta, dtype):
    x, w, _ = SMALL.tensors(dtype)
    x.requires_grad_(), w.requires_grad_()
    y = adder2d(x, w, None, *SMALL.geometry, eta)
    assert torch.equal(y, adder2d(x, w, None, *SMALL.geometry))
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert_grad_input(dx, dy, x, w, SMALL.geometry)
    assert_grad_weight(dw, dy, x, w, SMALL.geometry, eta)


@dtypes
@pytest.mark.parametrize("eta", [None, 0.3])
def test_weight_gradient_has_the_layout_of_the_weight(eta, dtype):
    """As a model in channels_last wants it, whose parameters are; the operator scales too."""
    x, w, _ = SMALL.tensors(dtype)
    dy = torch.randn_like(adder2d(x, w, None, *SMALL.geometry))
    for x_format, w_format in itertools.product(FORMATS, repeat=2):
        x, w = x.contiguous(memory_format=x_format), w.contiguous(memory_format=w_format)
        dw = torch.ops.torch2trt_adder.adder2d_grad_weight(dy, x, w, *SMALL.geometry, eta)
        assert dw.stride() == w.stride() and dw.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert_grad_weight(dw, dy, x, w, SMALL.geometry, eta)


@pytest.mark.parametrize("eta", [0, -0.2, float("inf"), float("nan")])
def test_eta_errors(eta):
    x, w, _ = SMALL.tensors()
    with pytest.raises(ValueError, match=f"adder2d: eta must be None or a finite number above 0, got {eta}"):
        adder2d(x, w.requires_grad_(), None, *SMALL.geometry, eta)


def test_eta_leaves_the_operator_alone():
    """Below autograd there is one operator, whatever the options of training."""
    x, w, _ = SMALL.tensors()
    w.requires_grad_()
    for context in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        with context(), _Record() as record:
            adder2d(x, w, None, *SMALL.geometry, None)
        assert record.names == ["adder2d"]
    with torch.inference_mode():
        expected = adder2d(x, w, None, *SMALL.geometry)
        assert torch.equal(torch.ops.torch2trt_adder.adder2d_eta(x, w, None, *SMALL.geometry, None), expected)


class _Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", ["x", "w", "b"])
def test_only_wanted_gradients_are_computed(wanted):
    tensors = dict(zip("xwb", SMALL.tensors(), strict=True))
    tensors[wanted].requires_grad_()
    y = adder2d(*tensors.values(), 1, 1)
    with _Record() as record:
        y.backward(torch.ones_like(y))
    expected = {"x": {"adder2d_grad_input"}, "w": {"adder2d_grad_weight"}, "b": set()}[wanted]
    assert {name for name in record.names if name.startswith("adder2d")} == expected


def test_no_graph_without_a_wanted_gradient():
    x, w, b = SMALL.tensors()
    assert not adder2d(x, w, b, 1, 1).requires_grad
    with torch.no_grad():
        assert not adder2d(x, w.requires_grad_(), b, 1, 1).requires_grad


def test_gradients_accumulate():
    x, w, _ = SMALL.tensors()
    w.requires_grad_()
    adder2d(x, w, None, 1, 1).sum().backward()
    once = w.grad.clone()
    adder2d(x, w, None, 1, 1).sum().backward()
    assert torch.equal(w.grad, 2 * once)


@pytest.mark.parametrize("eta", [0.2, None])
@pytest.mark.parametrize("wanted", ["x", "w"])
def test_second_derivative_is_refused(wanted, eta):
    x, w, _ = SMALL.tensors()
    tensor = {"x": x, "w": w}[wanted].requires_grad_()
    (gradient,) = torch.autograd.grad(adder2d(x, w, None, 1, 1, eta=eta).sum(), tensor, create_graph=True)
    with pytest.raises(RuntimeError, match="adder2d has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("eta", [0.2, None])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(requires_grad, eta):
    x, w, b = SMALL.tensors()
    w.requires_grad_(requires_grad)
    with forward_ad.dual_level():
        assert adder2d(x, w, None, 1, 1, eta=eta).shape == (2, 17, 11, 9)  # no tangent, nothing to lose
        for tangent in range(3):
            arguments = [x, w, b]
            arguments[tangent] = forward_ad.make_dual(arguments[tangent], torch.ones_like(arguments[tangent]))
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                adder2d(*arguments, 1, 1, eta=eta)


def test_function_transforms():
    x, w, _ = SMALL.tensors()
    call = functools.partial(adder2d, weight=w, padding=1)
    with pytest.raises(RuntimeError, match="does not work inside torch.func.grad"):
        torch.func.grad(lambda t: call(t).sum())(x)
    with pytest.raises(RuntimeError, match="does not work inside torch.func.grad"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="does not work inside torch.func.grad"):
        torch.func.grad(lambda t: adder2d(x, t, None, 1, 1, eta=None).sum())(w)
    batch = torch.stack([x, -x, 2 * x])
    assert torch.equal(torch.vmap(call)(batch), torch.stack([call(t) for t in batch]))


@pytest.mark.parametrize("eta", [0.2, None])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(eta, use_reentrant):
    x, w, _ = SMALL.tensors()
    x.requires_grad_(), w.requires_grad_()
    adder2d(x, w, None, 1, 1, 1, 1, eta).sum().backward()
    expected = x.grad, w.grad
    x.grad = w.grad = None
    checkpoint(adder2d, x, w, None, 1, 1, 1, 1, eta, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(w.grad, expected[1])


# ---- calls without the dispatcher


class _Subclass(torch.Tensor):
    pass


class _Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _implementation(*tensors):
    return fastpath.find_kernels(*tensors, *[None] * (3 - len(tensors)))


@pytest.mark.skipif(
    not fastpath._can_read_keys, reason="torch 2.4 keeps dispatch keys to itself: all calls take the dispatcher"
)
def test_plain_calls_take_the_short_way():
    x, w, b = SMALL.tensors()
    expected = fastpath._KERNELS["CPU"]
    parameter = torch.nn.Parameter(w)
    for context in (contextlib.nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert _implementation(x, w) is _implementation(x, parameter, b) is expected
            assert _implementation(x + 1, w + 1, b + 1) is expected  # made in inference mode
    found = []

    class Both(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, dy):
            found.append(_implementation(dy, x, w))
            return dy

    Both.apply(x.clone().requires_grad_()).sum().backward()
    assert found == [expected]


@pytest.mark.skipif(
    not fastpath._can_read_keys, reason="torch 2.4 keeps dispatch keys to itself: all calls take the dispatcher"
)
def test_all_others_take_the_dispatcher():
    x, w, b = SMALL.tensors()
    contexts = {
        "dispatch mode": _Record,
        "function mode": _Function,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "below autograd": torch._C._AutoDispatchBelowAutograd,
        "default device": lambda: torch.device("cpu"),
        "fake tensors": FakeTensorMode,
        "profiler": torch.profiler.profile,
        "forward mode": forward_ad.dual_level,
    }
    for name, context in contexts.items():
        with context():
            assert _implementation(x, w, b) is None, name
        assert _implementation(x, w, b) is not None, name
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    others = {
        "subclass": x.as_subclass(_Subclass),
        "fake": fake,
        "meta": x.to("meta"),
        "negative view": torch.view_as_complex(torch.randn(*x.shape, 2)).conj().imag,
        "sparse": x.to_sparse(),
        "list": x.tolist(),
    }
    for name, other in others.items():
        for i in range(3):
            tensors = [x, w, b]
            tensors[i] = other
            assert _implementation(*tensors) is None, name
    seen = []

    def transformed(t):
        seen.append(_implementation(t, w))
        return adder2d(t, w, None, 1, 1)

    torch.vmap(transformed)(x[None])
    torch.jit.trace(transformed, (x,), check_trace=False)  # the check also runs it untraced
    assert seen and set(seen) == {None}
    with pytest.raises(RuntimeError, match="does not work inside torch.func.grad"):
        torch.func.grad(lambda t: transformed(t).sum())(x)
    assert set(seen) == {None}


def test_profiler_shows_the_operators():
    x, w, _ = SMALL.tensors()
    w.requires_grad_()
    with torch.profiler.profile() as profile:
        adder2d(x, w, None, 1, 1).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"torch2trt_adder::adder2d", "torch2trt_adder::adder2d_grad_weight"} <= names


def test_negative_view():
    """Its memory holds the numbers before the sign changed."""
    x = torch.view_as_complex(torch.randn(2, 16, 11, 9, 2)).conj().imag
    _, w, _ = SMALL.tensors()
    assert x.is_neg()
    assert_forward(adder2d(x, w, None, 1, 1), x.resolve_neg(), w, None, SMALL.geometry)


@pytest.mark.parametrize("stride", [2, (2, 2), [2, 2], torch.Size([2, 2])])
def test_spellings_of_a_pair(stride):
    x, w, _ = SMALL.tensors()
    assert torch.equal(adder2d(x, w, None, stride), OP(x, w, None, [2, 2], [0, 0], [1, 1], 1))


@pytest.mark.parametrize("stride", [1.0, (1.0, 1.0), "11", None])
def test_geometry_of_other_types_is_refused(stride):
    x, w, _ = SMALL.tensors()
    adder2d(x, w, None, 1)  # 1.0 equals it, as a key too
    with pytest.raises((RuntimeError, TypeError)):
        adder2d(x, w, None, stride)
    with pytest.raises((RuntimeError, TypeError)):
        adder2d(x, w, None, 1, 0, 1, 1.0)


# ---- autocast


@pytest.mark.parametrize("eta", [0.2, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, eta):
    x, w, b = SMALL.tensors()
    w.requires_grad_(), b.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = adder2d(x, w, b, 1, 1, eta=eta)
        assert adder2d(x.double(), w.double(), None, 1, 1).dtype is torch.float64
    assert y.dtype is dtype
    assert_forward(y, x.to(dtype), w.to(dtype), b.to(dtype), SMALL.geometry)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert w.grad.dtype is b.grad.dtype is torch.float32
    # The gradient passed through the autocast dtype on its way.
    half_w = w.detach().to(dtype).requires_grad_()
    adder2d(x.to(dtype), half_w, None, 1, 1, eta=eta).backward(dy)
    assert torch.equal(w.grad, half_w.grad.float())


# ---- torch.library, torch.compile, torch.export


@formats
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(memory_format, requires_grad, dtype):
    for case in (SMALL, PER_AXIS):
        x, w, b = (t.requires_grad_(requires_grad) for t in case.tensors(dtype, memory_format=memory_format))
        arguments = [list(v) if isinstance(v, tuple) else v for v in case.geometry]
        torch.library.opcheck(OP, (x, w, b, *arguments))
        torch.library.opcheck(OP, (x, w, None, *arguments))
        torch.library.opcheck(torch.ops.torch2trt_adder.adder2d_eta.default, (x, w, b, *arguments, None))


@formats
def test_opcheck_of_gradients(memory_format):
    x, w, _ = PER_AXIS.tensors(memory_format=memory_format)
    dy = torch.randn_like(adder2d(x, w, None, *PER_AXIS.geometry))
    arguments = [list(v) if isinstance(v, tuple) else v for v in PER_AXIS.geometry]
    torch.library.opcheck(torch.ops.torch2trt_adder.adder2d_grad_input.default, (dy, x, w, *arguments))
    for eta in (None, 0.3):
        torch.library.opcheck(torch.ops.torch2trt_adder.adder2d_grad_weight.default, (dy, x, w, *arguments, eta))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic, eta", [(False, 0.2), (True, 0.2), (False, None)])
@formats
def test_compile(backend, dynamic, memory_format, eta):
    def step(x, w, b):
        return adder2d(x.relu(), w, b, 1, 1, eta=eta).tanh()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    for N in (2, 5):
        x = torch.randn(N, 16, 11, 9).to(memory_format=memory_format)
        results = []
        for f in (step, compiled):
            _, w, b = (t.requires_grad_() for t in SMALL.tensors())
            y = f(x, w, b)
            y.sum().backward()
            results.append((y.detach(), w.grad, b.grad))
        assert results[0][0].stride() == results[1][0].stride()
        scale = results[0][1].abs().max().item()  # the raw gradient is large
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6 * max(scale, 1))


def test_compile_under_autocast():
    def forward(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return adder2d(x, w, None, 1, 1)

    torch._dynamo.reset()
    x, w, _ = SMALL.tensors()
    w.requires_grad_()
    y = torch.compile(forward, backend="aot_eager", fullgraph=True)(x, w)
    assert y.dtype is torch.bfloat16 and torch.equal(y, forward(x, w))
    y.sum().backward()
    assert w.grad.dtype is torch.float32


class _Net(torch.nn.Module):
    def __init__(self, eta=0.2):
        super().__init__()
        _, w, b = SMALL.tensors()
        self.w, self.b, self.eta = torch.nn.Parameter(w), torch.nn.Parameter(b), eta

    def forward(self, x):
        return adder2d(x, self.w, self.b, 2, 1, eta=self.eta)


@pytest.mark.parametrize("eta", [0.2, None])
def test_export_with_dynamic_sizes(tmp_path, eta):
    Dim = torch.export.Dim
    net, x = _Net(eta), SMALL.tensors()[0]
    sizes = {0: Dim("batch"), 2: Dim("height", min=8), 3: Dim("width", min=8)}
    program = torch.export.export(net, (x,), dynamic_shapes=(sizes,))
    if hasattr(torch.compiler, "is_exporting"):
        assert OP in [node.target for node in program.graph.nodes]
    torch.export.save(program, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").run_decompositions()
    calls = [node for node in program.graph.nodes if node.target is OP]
    assert len(calls) == 1 and len([node for node in program.graph.nodes if node.op == "call_function"]) == 1
    other = torch.randn(5, 16, 20, 13)
    assert torch.equal(program.module()(other), net(other))


@pytest.mark.parametrize("eta", [0.2, None])
def test_jit_trace(eta):
    net, x = _Net(eta), SMALL.tensors()[0]
    other = torch.randn(5, 16, 20, 13)
    assert torch.equal(torch.jit.trace(net, (x,))(other), net(other))


# ---- memory


def test_memory_is_bounded():
    """A layer of 2.4 MB whose unfolded input takes 42 MB in float64 and whose broadcast takes 1.4 GB in float32."""
    program = r"""
        import pathlib, re, torch
        from torch2trt_adder import adder2d, ops

        def peak():  # MB; ru_maxrss would start at the parent's
            return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

        torch.set_num_threads(2)

        def step(size, dtype):
            x = torch.randn(1, 64, size, size).to(dtype).requires_grad_(dtype is not torch.float64)
            w = torch.randn(64, 64, 3, 3).to(dtype).requires_grad_(dtype is not torch.float64)
            y = adder2d(x, w, None, 1, 1)
            if y.requires_grad:  # in float64 torch's own weight gradient of a convolution unfolds the input
                y.backward(torch.ones_like(y))

        for dtype in (torch.float64, torch.float32, torch.float16):
            step(4, dtype)
            before = peak()
            step(96, dtype)
            print(peak() - before)
        before = peak()
        w, x = torch.randn(64, 576, 1), torch.randn(1, 576, 4096)
        (w - x).abs_()
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *ours, broadcast = (float(line) for line in result.stdout.split())
    assert broadcast > 400
    assert max(ours) < 65, ours


# ---- arguments


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpy_integers_are_integers(kind):
    x, w, _ = SMALL.tensors()
    expected = adder2d(x, w, None, 2, 1, 1, 1)
    assert torch.equal(adder2d(x, w, None, kind(2), kind(1), kind(1), kind(1)), expected)
    assert torch.equal(adder2d(x, w, None, (kind(2), 2), [kind(1), 1], np.array([1, 1], kind), kind(1)), expected)


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("bad", [True, 1.0, "1", (1.0, 1), (True, 1), None, np.float32(1), np.bool_(True)], ids=repr)
def test_what_is_not_an_integer_is_refused(bad, where):
    x, w, _ = (t.to(where) for t in SMALL.tensors())
    for name in ("stride", "padding", "dilation", "groups"):
        with pytest.raises(TypeError, match=f"adder2d: {name} must be an int"):
            adder2d(x, w, **{name: bad})


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_geometry_beyond_int32(name, where):
    x, w = _ones(1, 1, 4, 4, device=where), _ones(1, 1, 1, 1, device=where)
    for value in (2**31, (1, 2**40)):
        with pytest.raises(ValueError, match=f"adder2d: {name} must be below 2\\^31, got "):
            adder2d(x, w, **{name: value})
    if name != "padding":
        assert adder2d(x, w, **{name: 2**30}).shape == ((1, 1, 1, 1) if name == "stride" else (1, 1, 4, 4))


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_lists_and_arrays_are_no_tensors(convert):
    tensors = SMALL.tensors()
    for i, name in enumerate(("input", "weight", "bias")):
        arguments = list(tensors)
        arguments[i] = convert(arguments[i])
        with pytest.raises(TypeError, match=rf"adder2d: {name} must be a torch.Tensor.*, got a \w+; convert") as info:
            adder2d(*arguments)
        assert len(str(info.value)) < 120  # without the values


def _shrink(tensor, size):
    tensor.untyped_storage().resize_(size)
    return tensor


@dtypes
@pytest.mark.parametrize("freed", range(3))
@pytest.mark.parametrize("rest", [0.0, 0.99])
def test_freed_memory_is_refused(device, dtype, freed, rest):
    """Reading it would end the process."""
    for memory_format in FORMATS:
        tensors = SMALL.tensors(dtype, device, memory_format)
        _shrink(tensors[freed], int(rest * tensors[freed].nbytes))
        name = ("input", "weight", "bias")[freed]
        with pytest.raises(RuntimeError, match=rf"adder2d: the storage of {name} \[.*\] holds \d+ of the \d+ bytes"):
            adder2d(*tensors, 1, 1)


def test_freed_memory_of_views():
    x, w, _ = SMALL.tensors()
    view = torch.randn(4, 32, 22, 9)[1:3, ::2, ::2]
    expanded = w[:, :1].clone().expand_as(w)
    last = 4 * (1 + view.storage_offset() + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)))
    assert_forward(adder2d(_shrink(view, last), expanded, None, 1, 1), view, expanded, None, SMALL.geometry)
    with pytest.raises(RuntimeError, match=rf"storage of input .* holds {last - 4} of the {last} bytes"):
        adder2d(_shrink(view, last - 4), expanded, None, 1, 1)
    with pytest.raises(RuntimeError, match="storage of weight"):
        adder2d(x, _shrink(expanded, 0), None, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_freed_memory_in_backward(device, dtype):
    for freed in range(2):
        x, w, _ = SMALL.tensors(dtype, device)
        y = adder2d(x.requires_grad_(), w.requires_grad_(), None, 1, 1)
        _shrink((x, w)[freed], 0)
        with pytest.raises(RuntimeError, match=f"the storage of {('input', 'weight')[freed]} "):
            y.backward(torch.ones_like(y))
    for name in ("adder2d_grad_input", "adder2d_grad_weight"):
        x, w, _ = SMALL.tensors(dtype, device)
        dy = _shrink(adder2d(x, w, None, 1, 1), 0)
        with pytest.raises(RuntimeError, match="the storage of grad_output "):
            getattr(torch.ops.torch2trt_adder, name)(dy, x, w, *SMALL.geometry)


@pytest.mark.parametrize("where", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_direct_calls_check_eta_and_gradients(where, dtype):
    op = torch.ops.torch2trt_adder
    x, w, b = (t.to(where) for t in SMALL.tensors(dtype))
    dy = adder2d(x, w, None, *SMALL.geometry)
    for eta in (0.0, -1.0, float("nan"), float("inf")):
        for context in (torch.inference_mode, contextlib.nullcontext):
            with context(), pytest.raises(ValueError, match=f"adder2d_eta: eta must be None or .* got {eta}"):
                op.adder2d_eta(x, w, b, *SMALL.geometry, eta)
        with pytest.raises(ValueError, match=f"adder2d_grad_weight: eta must be None or .* got {eta}"):
            op.adder2d_grad_weight(dy, x, w, *SMALL.geometry, eta)
    for name in ("adder2d_grad_input", "adder2d_grad_weight"):
        for bad in (dy[:1], dy[:, :, 1:], dy[0], dy[:, 1:]):
            with pytest.raises(ValueError, match=rf"{name}: grad_output must be \[2, 17, 11, 9\], .* got \[.*\]"):
                getattr(op, name)(bad, x, w, *SMALL.geometry)
        with pytest.raises(TypeError, match=f"{name}: grad_output must have a floating-point dtype, got torch.int64"):
            getattr(op, name)(dy.long(), x, w, *SMALL.geometry)


@pytest.mark.parametrize("eta", [-1, 0.0, "0.2", True, torch.tensor(0.3)], ids=repr)
def test_eta_is_checked_without_gradients(eta):
    x, w, _ = SMALL.tensors()
    with pytest.raises((TypeError, ValueError), match="adder2d: eta must be None or a finite number above 0, got "):
        adder2d(x, w, eta=eta)


@pytest.mark.parametrize("eta", [0.2, 0.1, None])
def test_fx_traces_at_every_eta(eta):
    net = _Net(eta)
    traced = torch.fx.symbolic_trace(net)
    x = SMALL.tensors()[0]
    y, z = net(x), traced(x)
    assert torch.equal(y, z)
    dy = torch.randn_like(y)
    expected, actual = (torch.autograd.grad(out, (net.w, net.b), dy) for out in (y, z))  # traced shares the parameters
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    with torch.no_grad(), _Record() as record:
        traced(x)
    assert record.names[-1] == "adder2d"
