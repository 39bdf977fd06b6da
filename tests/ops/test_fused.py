"""The operator adder2d_fused: adder layer, scale, shift, residual and limits in one pass."""

import copy
import pickle

import pytest
import torch
from conftest import CASES
from torch import Tensor
from torch.autograd import forward_ad

from torch2trt_adder import ops, reference
from torch2trt_adder.nn.adder2d import Adder2d
from torch2trt_adder.nn.fused import FusedAdder2d
from torch2trt_adder.numerics import tolerance
from torch2trt_adder.numerics.comparison import assert_within

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
SMALL = next(case for case in CASES if case.name == "three_by_three")
PER_AXIS = next(case for case in CASES if case.name == "per_axis")
OP = torch.ops.torch2trt_adder.adder2d_fused.default

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])


def epilogue(y: Tensor, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """scale, shift and residual for the layer's output y, so that results lie around 0: about half are cut by ReLU."""
    generator = torch.Generator().manual_seed(seed)
    spread = y.double().std() + 1
    scale = (0.5 + torch.rand(y.shape[1], generator=generator, dtype=torch.float64)) / spread.cpu()
    shift = -y.double().mean((0, 2, 3)).cpu() * scale + torch.randn(y.shape[1], generator=generator)
    residual = torch.randn(y.shape, generator=generator)
    return scale.float().to(y.device), shift.float().to(y.device), residual.to(y.device, dtype)


def exact(x, w, b, scale, shift, residual, geometry, lower, upper) -> tuple[Tensor, Tensor]:
    """The definition in float64, and how far a correct result may be from it.

    The sum errs as that of adder2d does, and scale multiplies the error. Scale, shift and residual then take one
    rounding in float32 each; the result is rounded to its dtype once. Limits bring no value further from another.
    """
    dtype, halves = x.dtype, x.dtype in (torch.float16, torch.bfloat16)
    x, w, b, scale, shift, residual = (None if t is None else t.double() for t in (x, w, b, scale, shift, residual))
    y = reference.adder2d(x, w, None, *geometry)
    terms = y.abs()
    error = tolerance.half_error(terms) if halves and x.is_cuda else torch.zeros_like(y)
    if b is not None:
        y, terms = y + b[:, None, None], terms + b[:, None, None].abs()
    error = error + tolerance.sum_error(w[0].numel(), dtype) * terms
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    if scale is not None:
        y, error = y * scale[:, None, None], error * scale[:, None, None].abs()
        error = error + eps * y.abs()
    for addend in (None if shift is None else shift[:, None, None], residual):
        if addend is not None:
            y = y + addend
            error = error + eps * y.abs()
    kind = torch.finfo(dtype)
    error = error + kind.eps * (y.abs() + kind.tiny)
    return (y if lower is None and upper is None else y.clamp(lower, upper)), error


def check(x, w, b, scale, shift, residual, geometry, lower=None, upper=None) -> Tensor:
    y = ops.adder2d_fused(x, w, b, scale, shift, residual, *geometry, lower, upper)
    expected, limit = exact(x, w, b, scale, shift, residual, geometry, lower, upper)
    assert y.dtype is x.dtype
    assert_within(y, expected, limit)
    return y


# ---- values


def test_all_cases(case, device):
    x, w, b = case.tensors(device=device)
    scale, shift, residual = epilogue(ops.adder2d(x, w, b, *case.geometry), x.dtype)
    y = check(x, w, b, scale, shift, residual, case.geometry, 0.0, 6.0)
    assert 0 < (y == 0).sum() < y.numel()  # limits cut something, and not everything


@dtypes
@formats
def test_dtypes_and_layouts(dtype, memory_format, device):
    x, w, b = PER_AXIS.tensors(dtype, device, memory_format)
    scale, shift, residual = epilogue(ops.adder2d(x.float(), w.float(), b.float(), *PER_AXIS.geometry), dtype)
    y = check(x, w, b, scale, shift, residual, PER_AXIS.geometry, 0.0)
    assert y.is_contiguous(memory_format=memory_format)
    channels_last = residual.contiguous(memory_format=torch.channels_last)
    assert torch.equal(check(x, w, b, scale, shift, channels_last, PER_AXIS.geometry, 0.0), y)
    strided = torch.stack([residual, residual], -1)[..., 0]
    assert torch.equal(check(x, w, b, scale, shift, strided, PER_AXIS.geometry, 0.0), y)


@dtypes
@pytest.mark.parametrize("there", range(16))
def test_each_part_may_be_left_out(there, dtype, device):
    x, w, b = SMALL.tensors(dtype, device)
    scale, shift, residual = epilogue(ops.adder2d(x.float(), w.float(), None, *SMALL.geometry), dtype)
    b, scale, shift, residual = (t if there >> i & 1 else None for i, t in enumerate((b, scale, shift, residual)))
    lower, upper = [(None, None), (0.0, None), (None, 0.25), (-0.5, 0.5)][there % 4]
    check(x, w, b, scale, shift, residual, SMALL.geometry, lower, upper)


def test_without_an_epilogue_it_is_adder2d(case, device):
    x, w, b = case.tensors(device=device)
    y = ops.adder2d_fused(x, w, b, None, None, None, *case.geometry)
    assert_within(
        y, ops.adder2d(x, w, b, *case.geometry), exact(x, w, b, None, None, None, case.geometry, None, None)[1]
    )


def test_sums_beyond_float16_stay_finite(device):
    """At 65504 float16 ends; the sum is float32 until it was scaled."""
    x, w = torch.full((1, 64, 5, 5), 60.0, device=device), torch.full((3, 64, 3, 3), -60.0, device=device)
    assert ops.adder2d(x.half(), w.half(), None, 1, 1).isinf().any()
    scale, shift = torch.full((3,), 1e-3, device=device), torch.full((3,), 70.0, device=device)
    y = check(x.half(), w.half(), None, scale, shift, None, ((1, 1), (1, 1), (1, 1), 1))
    assert y.isfinite().all()


@dtypes
def test_nan_and_infinity(dtype, device):
    """torch.relu and torch.clamp keep a NaN; so do the limits."""
    x, w, b = SMALL.tensors(dtype, device)
    scale, shift, residual = epilogue(ops.adder2d(x.float(), w.float(), b.float(), *SMALL.geometry), dtype)
    x[0, 3, 5, 4] = torch.nan
    residual[1, 2, 3, 4] = torch.nan
    residual[1, 0, 0, 0], residual[1, 1, 0, 0] = torch.inf, -torch.inf
    y = ops.adder2d_fused(x, w, b, scale, shift, residual, *SMALL.geometry, 0.0, 6.0)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[0, :, 4:7, 3:6] = True
    expected[1, 2, 3, 4] = True
    assert torch.equal(y.isnan(), expected)
    assert y[1, 0, 0, 0] == 6 and y[1, 1, 0, 0] == 0
    y = ops.adder2d_fused(x, w, b, scale, shift, residual, *SMALL.geometry)
    assert y[1, 0, 0, 0] == torch.inf and y[1, 1, 0, 0] == -torch.inf


def test_limits_beyond_float32():
    x, w, _ = SMALL.tensors()
    plain = ops.adder2d_fused(x, w, padding=1)
    assert torch.equal(ops.adder2d_fused(x, w, padding=1, lower=-1e300, upper=1e300), plain)
    assert torch.equal(ops.adder2d_fused(x, w, padding=1, lower=-torch.inf, upper=torch.inf), plain)
    assert (ops.adder2d_fused(x, w, padding=1, lower=2, upper=2) == 2).all()


@dtypes
@pytest.mark.parametrize("shape", [(17, 1, 1), (1, 17, 11, 9), (2, 17, 1, 1), (2, 1, 11, 9), ()])
def test_a_residual_broadcasts(shape, dtype, device):
    x, w, b = SMALL.tensors(dtype, device)
    scale, shift, _ = epilogue(ops.adder2d(x.float(), w.float(), b.float(), *SMALL.geometry), dtype)
    residual = torch.randn(shape).to(device, dtype)
    y = check(x, w, b, scale, shift, residual, SMALL.geometry, 0.0)
    full = residual.expand(2, 17, 11, 9).contiguous()
    assert torch.equal(ops.adder2d_fused(x, w, b, scale, shift, full, *SMALL.geometry, 0.0), y)


def test_inputs_of_any_strides(device):
    x, w, b = SMALL.tensors(device=device)
    scale, shift, residual = epilogue(ops.adder2d(x, w, b, *SMALL.geometry), x.dtype)
    expected = ops.adder2d_fused(x, w, b, scale, shift, residual, *SMALL.geometry, 0.0)
    twice = [torch.stack([t, t], -1)[..., 0] for t in (x, w, b, scale, shift, residual)]
    assert not any(t.is_contiguous() for t in twice)
    assert torch.equal(ops.adder2d_fused(*twice, *SMALL.geometry, 0.0), expected)


def test_empty_batch(device):
    x, w, _ = SMALL.tensors(device=device)
    y = ops.adder2d_fused(x[:0], w, None, torch.ones(17, device=device), None, x.new_empty(0, 17, 11, 9), 1, 1)
    assert y.shape == (0, 17, 11, 9)


def test_inputs_stay_as_they_are(device):
    for dtype in (torch.float32, torch.float64):
        x, w, b = SMALL.tensors(dtype, device)
        scale, shift, residual = epilogue(ops.adder2d(x, w, b, *SMALL.geometry), dtype)
        tensors = x, w, b, scale, shift, residual
        before = [t.clone() for t in tensors]
        ops.adder2d_fused(*tensors, *SMALL.geometry, 0.0)
        assert all(map(torch.equal, tensors, before))


# ---- errors


@pytest.mark.parametrize("where", ["cpu", "meta", "float64"])
def test_bad_arguments(where):
    x, w, b = (t.double() if where == "float64" else t.to(where) for t in SMALL.tensors())
    device = x.device

    def call(**named):
        return ops.adder2d_fused(x, w, b, padding=1, **named)

    with pytest.raises(TypeError, match=r"scale must be torch.float32, got torch.float16; convert it with .float\(\)"):
        call(scale=torch.ones(17, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match=r"shift must be \[17\], one value per filter, got \[16\]"):
        call(shift=torch.ones(16, device=device))
    with pytest.raises(ValueError, match=r"scale must be \[17\], one value per filter, got \[17, 1, 1\]"):
        call(scale=torch.ones(17, 1, 1, device=device))
    with pytest.raises(ValueError, match=r"residual must be \[2, 17, 11, 9\].* got \[2, 17, 11, 8\]"):
        call(residual=x.new_ones(2, 17, 11, 8))
    with pytest.raises(ValueError, match="residual must be"):
        call(residual=x.new_ones(1, 2, 17, 11, 9))
    with pytest.raises(TypeError, match=r"residual is torch\.bfloat16 and input is"):
        call(residual=torch.ones(2, 17, 11, 9, dtype=torch.bfloat16, device=device))
    with pytest.raises(ValueError, match=r"lower must not be above upper, got 1\.0 and 0\.5"):
        call(lower=1, upper=0.5)
    with pytest.raises(ValueError, match="upper must be a number or None, got nan"):
        call(upper=float("nan"))
    other = "meta" if where != "meta" else "cpu"
    for name in ("scale", "residual"):
        size = (17,) if name == "scale" else (2, 17, 11, 9)
        tensor = torch.ones(size, dtype=torch.float32 if name == "scale" else x.dtype, device=other)
        with pytest.raises(RuntimeError, match=f"{name} is on|Unhandled FakeTensor Device|on the same device"):
            call(**{name: tensor})


def test_arguments_of_the_wrong_type():
    x, w, b = SMALL.tensors()
    for name in ("scale", "shift", "residual"):
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor or None, got a list"):
            ops.adder2d_fused(x, w, b, **{name: [1.0]})
    for value in (True, "6", torch.tensor(6.0)):
        with pytest.raises(TypeError, match="upper must be a number or None"):
            ops.adder2d_fused(x, w, b, upper=value)
    with pytest.raises(TypeError, match="stride must be an int"):
        ops.adder2d_fused(x, w, b, stride=1.5)


def test_freed_memory_is_noticed():
    x, w, b = SMALL.tensors()
    for name, size in (("scale", (17,)), ("shift", (17,)), ("residual", (2, 17, 11, 9))):
        tensor = torch.ones(size)
        tensor.untyped_storage().resize_(4)
        with pytest.raises(RuntimeError, match=f"storage of {name} .* holds 4 of the"):
            ops.adder2d_fused(x, w, b, padding=1, **{name: tensor})


# ---- autograd, transforms, autocast


def test_gradients_are_refused():
    x, w, b = SMALL.tensors()
    tensors = [x, w, b, *epilogue(ops.adder2d(x, w, b, 1, 1), x.dtype)]
    for i in range(6):
        given = [t.clone().requires_grad_() if i == j else t for j, t in enumerate(tensors)]
        for call in (ops.adder2d_fused, OP):
            options = ([1, 1], [1, 1], [1, 1], 1, 0.0, None)
            with pytest.raises(RuntimeError, match=r"computes no gradients.* torch.no_grad\(\)"):
                call(*given, *options)
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    y = call(*given, *options)
                assert not y.requires_grad
    assert ops.adder2d_fused(*tensors, 1, 1).shape == (2, 17, 11, 9)


def test_transforms():
    x, w, b = SMALL.tensors()
    with pytest.raises(RuntimeError, match=r"does not work inside torch\.func\.grad"):
        torch.func.grad(lambda t: ops.adder2d_fused(t, w, padding=1).sum())(x)
    with forward_ad.dual_level():
        assert ops.adder2d_fused(x, w, b, padding=1).shape == (2, 17, 11, 9)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            ops.adder2d_fused(forward_ad.make_dual(x, torch.ones_like(x)), w, b, padding=1)
    batch = torch.stack([x, -x])
    mapped = torch.vmap(lambda t: ops.adder2d_fused(t, w, b, padding=1, lower=-200.0))(batch)
    assert torch.equal(mapped, torch.stack([ops.adder2d_fused(t, w, b, padding=1, lower=-200.0) for t in batch]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, w, b = SMALL.tensors()
    scale, shift, residual = epilogue(ops.adder2d(x, w, b, 1, 1), x.dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = ops.adder2d_fused(x, w, b, scale, shift, residual, 1, 1, lower=0)
    halves = [t.to(dtype) for t in (x, w, b, residual)]
    assert y.dtype is dtype
    assert torch.equal(y, ops.adder2d_fused(*halves[:3], scale, shift, halves[3], 1, 1, lower=0))


# ---- torch.library, torch.compile, torch.export


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(memory_format, dtype):
    x, w, b = PER_AXIS.tensors(dtype, memory_format=memory_format)
    scale, shift, residual = epilogue(ops.adder2d(x.float(), w.float(), b.float(), *PER_AXIS.geometry), dtype)
    geometry = [list(v) if isinstance(v, tuple) else v for v in PER_AXIS.geometry]
    torch.library.opcheck(OP, (x, w, b, scale, shift, residual, *geometry, 0.0, 6.0))
    torch.library.opcheck(OP, (x, w, None, None, None, residual[:, :1], *geometry, None, None))


@pytest.mark.parametrize("dynamic", [False, True])
@formats
def test_compile(dynamic, memory_format):
    _, w, b = SMALL.tensors()
    scale, shift, _ = epilogue(ops.adder2d(*SMALL.tensors(), 1, 1), w.dtype)

    def step(x):
        return ops.adder2d_fused(
            x.relu(), w, b, scale, shift, x.new_ones(len(x), 17, *x.shape[2:]), 1, 1, lower=0
        ).neg()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N in (2, 5):
        x = torch.randn(N, 16, 11, 9).to(memory_format=memory_format)
        expected, y = step(x), compiled(x)
        assert torch.equal(y, expected) and y.stride() == expected.stride()


# ---- the module


def layer(bias: bool = True) -> FusedAdder2d:
    torch.manual_seed(0)
    adder = Adder2d(16, 17, 3, padding=1, bias=bias)
    scale, shift, _ = epilogue(adder(SMALL.tensors()[0]).detach(), torch.float32)
    return FusedAdder2d(adder, scale, shift, 0.0, 6.0)


def test_module_state():
    fused, x = layer(), SMALL.tensors()[0]
    assert list(fused.state_dict()) == ["adder", "b", "scale", "shift"]
    assert (
        repr(fused) == "FusedAdder2d(16, 17, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), lower=0.0, upper=6.0)"
    )
    expected = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), expected)
    other = layer()
    other.scale.zero_()
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scale_and_shift_stay_float32(dtype):
    fused, x = layer(), SMALL.tensors()[0]
    scale, shift = fused.scale.clone(), fused.shift.clone()
    converted = layer().to(dtype)
    assert converted.adder.dtype is dtype and converted.scale.dtype is converted.shift.dtype is torch.float32
    assert torch.equal(converted.scale, scale) and torch.equal(converted.shift, shift)
    assert converted(x.to(dtype)).dtype is dtype
    assert fused.to("meta").scale.device.type == "meta"
    assert layer().to(memory_format=torch.channels_last).adder.is_contiguous()


def test_sums_that_the_operator_cannot_add():
    """Promotion and broadcasting as PyTorch has them: y + residual, then the limits."""
    fused, x = layer(), SMALL.tensors()[0]
    plain = layer()
    plain.lower = plain.upper = None
    y = plain(x)
    for residual in (torch.randn(17, 1, 1), torch.randn(2, 17, 11, 9).double(), torch.randn(3, 1, 17, 1, 1), 0.5):
        expected = (y + residual).clamp(0, 6)
        assert torch.equal(fused(x, residual), expected) and fused(x, residual).dtype is expected.dtype
