"""The operator ``torch.ops.torch2trt_adder.adder2d``: schema, fake, autocast, autograd, CPU and CUDA implementations.

The gradients are AdderNet's rule and deliberately not the derivative; reference.py spells both passes out.
"""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, library

# Plain torch code below works in pieces whose temporaries stay within this many bytes (or within one sample's input,
# where that is larger). Pieces on the CPU fit its caches.
_TEMPORARY_BYTES = {"cpu": 4 << 20}
_TEMPORARY_BYTES_DEFAULT = 64 << 20

ETA = 0.2  # of the adaptive scaling in the published code

_KERNEL_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # Adder2dType
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Newer than torch 2.4, whose exported graphs lose adder2d_eta in run_decompositions() only.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)

# torch2trt replaces Tensor.shape and Tensor.size while it traces: on a traced tensor both add layers to the network.
_size = torch.Tensor.size


def adder2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eta: float | None = ETA,
) -> Tensor:
    """The adder layer: ``y[n,k,p,q] = bias[k] - sum over c,r,s of |x - w[k,c,r,s]|``, where padding reads x = 0.

    Shapes, strides and padding are those of ``torch.nn.functional.conv2d``. Gradients follow the published code:
    ``dx = sum dy * clamp(w - x, -1, 1)``, and ``dw = sum dy * (x - w)`` rescaled to the norm ``eta * sqrt(numel)``.

    Args:
        input: [N, C, H, W] of any strides; float32, float16 or bfloat16 (sums are float32), or float64 (slow).
        weight: [K, C / groups, R, S], dtype and device of the input.
        bias: [K] or None, dtype and device of the input.
        stride, padding, dilation: one int, or a pair for height and width.
        groups: divides C and K.
        eta: of the adaptive scaling; None for the raw sum, which mixed precision, gradient accumulation and several
            GPUs need (`scale_gradients` says why).

    Returns:
        [N, K, P, Q] with the input's dtype, channels_last where the input is, else contiguous.

    Raises:
        TypeError: an argument that is not a tensor or not an int; dtypes that are not supported or differ.
        ValueError: shapes, stride, padding, dilation or groups that do not fit each other; eta not above 0.
        RuntimeError: tensors on different devices, or whose memory was freed; second derivatives and forward-mode AD,
            which are not supported.
    """
    pairs = _plain_pairs(stride, padding, dilation)
    if pairs is None:
        names = "stride", "padding", "dilation"
        stride, padding, dilation = map(arguments.schema_pair, names, (stride, padding, dilation))
    if type(groups) is not int:
        groups = arguments.schema_integer("groups", groups)
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        from . import onnx_export

        if not onnx_export.translating:
            return onnx_export.symbol(input, weight, bias, stride, padding, dilation, groups)
    kernels = _kernels(input, weight, bias)
    if kernels is None:
        arguments.check_are_tensors(input, weight, bias)
    if eta != ETA:
        arguments.check_eta("adder2d", eta)
        # Whether a symbol of torch.fx will need a gradient is not known.
        if not isinstance(weight, torch.fx.Proxy) and not (weight.requires_grad and torch.is_grad_enabled()):
            eta = ETA
    if kernels is not None and pairs is not None:
        return _with_autograd(kernels.forward, input, weight, bias, *pairs, groups, eta)
    if eta == ETA:
        return _adder2d(input, weight, bias, stride, padding, dilation, groups)
    # Graphs for inference. Dynamo of some torch versions takes is_exporting() for true in any compilation; what it traces
    # itself for an export keeps adder2d_eta until run_decompositions().
    if torch.jit.is_tracing() or (_is_exporting() and not torch.compiler.is_dynamo_compiling()):
        return _adder2d(input, weight, bias, stride, padding, dilation, groups)
    return _adder2d_eta(input, weight, bias, stride, padding, dilation, groups, eta)


# ---- schemas
# No defaults but of the last eta: the dispatcher strips arguments equal to a default, and each Python kernel has to repeat
# them.

_library = torch.library.Library("torch2trt_adder", "DEF")
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(f"adder2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor", tags=_TAGS)
# The same operator with another scaling of its weight gradient. Autograd turns it into adder2d, so that what leaves
# training (exported graphs, engines) knows one operator without training's options.
_library.define(
    f"adder2d_eta(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, float? eta) -> Tensor", tags=_TAGS
)
_library.define(
    f"adder2d_grad_input(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}) -> Tensor", tags=_TAGS
)
_library.define(
    f"adder2d_grad_weight(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}, float? eta=None) -> Tensor",
    tags=_TAGS,
)

_adder2d = torch.ops.torch2trt_adder.adder2d.default
_adder2d_eta = torch.ops.torch2trt_adder.adder2d_eta.default
_grad_input = torch.ops.torch2trt_adder.adder2d_grad_input.default
_grad_weight = torch.ops.torch2trt_adder.adder2d_grad_weight.default


# ---- checks, shared by all implementations


def _output_size(
    input: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """[N, K, P, Q] from the sizes of the tensors, or a ValueError that says what does not fit."""
    if len(input) != 4:
        raise ValueError(
            f"adder2d: input must be [N, C, H, W], got {list(input)}; add the missing axis with unsqueeze."
        )
    if len(weight) != 4:
        raise ValueError(f"adder2d: weight must be [K, C / groups, R, S], got {list(weight)}; reshape it to four axes.")
    (N, C, *image), (K, per_group, *kernel) = input, weight
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or values[0] < least or values[1] < least:
            raise ValueError(f"adder2d: {name} must be an int or a pair, each >= {least}, got {list(values)}.")
        if values[0] >= 2**31 or values[1] >= 2**31:
            raise ValueError(f"adder2d: {name} must be below 2^31, got {list(values)}.")
    if groups < 1 or C % groups != 0 or K % groups != 0:
        raise ValueError(f"adder2d: groups must divide the {C} input channels and the {K} filters, got {groups}.")
    if C != per_group * groups:
        raise ValueError(
            f"adder2d: an input of {C} channels in {groups} groups needs a weight [K, {C // groups}, R, S], got "
            f"{list(weight)}; give the layer {per_group * groups} channels or another weight."
        )
    if C < 1 or K < 1 or image[0] < 1 or image[1] < 1 or kernel[0] < 1 or kernel[1] < 1:
        raise ValueError(f"adder2d: only the batch may be empty, got input {list(input)} and weight {list(weight)}.")
    if bias is not None and (len(bias) != 1 or bias[0] != K):
        raise ValueError(f"adder2d: bias must be [{K}], one value per filter, got {list(bias)}.")
    room = [image[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
    if room[0] < 0 or room[1] < 0:
        raise ValueError(
            f"adder2d: the {kernel[0]}x{kernel[1]} kernel with dilation {list(dilation)} does not fit the "
            f"{image[0]}x{image[1]} input with padding {list(padding)}; enlarge the input or the padding."
        )
    return N, K, room[0] // stride[0] + 1, room[1] // stride[1] + 1


def _kernel_size(
    caller: str, input: Sequence[int], weight: Sequence[int], bias: Sequence[int] | None, *geometry: Sequence[int] | int
) -> tuple[int, int, int, int]:
    """The same for the kernels, whose sizes are int32."""
    size = _output_size(input, weight, bias, *geometry)
    for extent in (*input, *weight, *size):
        if extent >= 2**31:
            raise ValueError(f"{caller}: every axis must be below 2^31, got {extent}; split the call along that axis.")
    return size


def _check_grad_size(caller: str, grad: Sequence[int], size: tuple[int, int, int, int]) -> None:
    if tuple(grad) != size:
        raise ValueError(f"{caller}: grad_output must be {list(size)}, the shape of the output, got {list(grad)}.")


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtype = input.dtype
    if dtype not in _DTYPES:
        raise TypeError(
            f"adder2d: dtype {dtype} is not supported; convert input and weight to torch.float32, torch.float16 or "
            "torch.bfloat16."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype is not dtype:
            raise TypeError(
                f"adder2d: {name} is {tensor.dtype} and input is {dtype}; convert one of them, or call under "
                "torch.autocast."
            )
        if tensor.device != input.device:
            raise RuntimeError(f"adder2d: {name} is on {tensor.device} and input on {input.device}; move one of them.")


def _check_grad_tensors(caller: str, grad_output: Tensor, input: Tensor, weight: Tensor) -> None:
    _check_tensors(input, weight, None)
    if not grad_output.is_floating_point():
        raise TypeError(f"{caller}: grad_output must have a floating-point dtype, got {grad_output.dtype}; convert it.")
    if grad_output.device != input.device:
        raise RuntimeError(
            f"{caller}: grad_output is on {grad_output.device} and input on {input.device}; move one of them."
        )


def _check_memory(name: str, tensor: Tensor | None) -> None:
    """Raises a RuntimeError where a tensor's storage is too small for it: kernels would read beyond it."""
    if tensor is None or tensor.numel() == 0:
        return
    size = tensor.element_size()
    start, held = size * tensor.storage_offset(), tensor.untyped_storage().nbytes()
    if tensor.is_contiguous() and held >= start + size * tensor.numel():
        return
    needed = start + size + size * sum((n - 1) * step for n, step in zip(_size(tensor), tensor.stride(), strict=True))
    if held < needed:
        raise RuntimeError(
            f"adder2d: the storage of {name} {list(_size(tensor))} holds {held} of the {needed} bytes that it needs; "
            "its memory was freed or resized, so restore it or pass another tensor."
        )


def _check_forward_memory(plan: "_Plan", input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`_check_memory` of all three, in a third of its time: the weight and the bias are contiguous, the sizes known."""
    size = plan.element_bytes
    if (
        input.untyped_storage().nbytes() < plan.input_bytes + size * input.storage_offset()
        or weight.untyped_storage().nbytes() < plan.weight_bytes + size * weight.storage_offset()
        or (bias is not None and bias.untyped_storage().nbytes() < size * (plan.size[1] + bias.storage_offset()))
    ):
        for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
            _check_memory(name, tensor)


def _contiguous(name: str, tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.is_contiguous():
        return tensor
    _check_memory(name, tensor)
    return tensor.contiguous()


def _is_channels_last(input: Tensor) -> bool:
    return not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout of an output or gradient, from that of the input or of what the gradient is of."""
    return torch.channels_last if _is_channels_last(tensor) else torch.contiguous_format


# ---- fake (shapes only): meta tensors, torch.compile, torch.export


def _adder2d_fake(input, weight, bias, stride, padding, dilation, groups):
    _check_tensors(input, weight, bias)
    size = _output_size(
        input.shape, weight.shape, None if bias is None else bias.shape, stride, padding, dilation, groups
    )
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


def _adder2d_eta_fake(*options):
    *options, eta = options
    arguments.check_eta("adder2d_eta", eta)
    return _adder2d_fake(*options)


def _grad_fake(caller, grad_output, input, weight, *geometry):
    _check_grad_tensors(caller, grad_output, input, weight)
    _check_grad_size(caller, grad_output.shape, _output_size(input.shape, weight.shape, None, *geometry))


def _grad_input_fake(grad_output, input, weight, stride, padding, dilation, groups):
    _grad_fake("adder2d_grad_input", grad_output, input, weight, stride, padding, dilation, groups)
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


def _grad_weight_fake(grad_output, input, weight, stride, padding, dilation, groups, eta=None):
    arguments.check_eta("adder2d_grad_weight", eta)
    _grad_fake("adder2d_grad_weight", grad_output, input, weight, stride, padding, dilation, groups)
    dtype = _sum_dtype(weight.dtype)
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=_memory_format(weight))


torch.library.register_fake("torch2trt_adder::adder2d", _adder2d_fake, lib=_library)
torch.library.register_fake("torch2trt_adder::adder2d_eta", _adder2d_eta_fake, lib=_library)
torch.library.register_fake("torch2trt_adder::adder2d_grad_input", _grad_input_fake, lib=_library)
torch.library.register_fake("torch2trt_adder::adder2d_grad_weight", _grad_weight_fake, lib=_library)


# ---- forward on float32, float16, bfloat16: the launchers of adder2d.h


def _launch_error(name: str, device: int, error: int) -> RuntimeError:
    return RuntimeError(
        f"{name}: the launch on cuda:{device} failed with error {error}, "
        f"{library.load().adder2d_error_string(error).decode()}; if the GPU is newer or older than the build of "
        f"{library.path()}, build that again on this machine."
    )


def _cpu_error(name: str, error: int) -> RuntimeError:
    return RuntimeError(f"{name}: {library.load().adder2d_cpu_error_string(error).decode()}.")


class _Plan(NamedTuple):
    """What a launch needs beyond pointers."""

    size: tuple[int, int, int, int]
    stride: tuple[int, int, int, int]
    problem: bytes  # Adder2dParams up to the pointers
    workspace_bytes: int
    element_bytes: int
    input_bytes: int  # from its first element to the end of its last
    weight_bytes: int


@functools.lru_cache(maxsize=4096)
def _plan(
    input_size: tuple[int, ...],
    input_stride: tuple[int, ...],
    channels_last: bool,
    weight_size: tuple[int, ...],
    bias_size: tuple[int, ...] | None,
    dtype: torch.dtype,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    device: int,
) -> _Plan:
    """Checks the problem and packs it. `device` is the current CUDA device, or -1 for the CPU."""
    size = N, K, P, Q = _kernel_size("adder2d", input_size, weight_size, bias_size, stride, padding, dilation, groups)
    output_stride = (K * P * Q, 1, K * Q, K) if channels_last else (K * P * Q, P * Q, Q, 1)
    kind = _KERNEL_TYPES[dtype]
    problem = library.PROBLEM.pack(
        *input_size, K, *weight_size[2:], P, Q, *stride, *padding, *dilation, groups, kind, kind, kind, 0,
        *input_stride, *output_stride,
    )  # fmt: skip
    params = problem + library.POINTERS.pack(0, 0, 0, 0, 0, 0)
    loaded = library.load()
    reason = loaded.adder2d_check(params)
    if reason:
        raise ValueError(f"adder2d: {reason.decode()}.")
    workspace_bytes = loaded.adder2d_fprop_workspace(params) if device >= 0 else 0
    reach = 1 + sum((n - 1) * step for n, step in zip(input_size, input_stride, strict=True)) if N else 0
    input_bytes, weight_bytes = reach * dtype.itemsize, math.prod(weight_size) * dtype.itemsize
    return _Plan(size, output_stride, problem, workspace_bytes, dtype.itemsize, input_bytes, weight_bytes)


def _adder2d_cuda(input, weight, bias, stride, padding, dilation, groups):
    _check_tensors(input, weight, bias)
    device = input.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return _adder2d_cuda(input, weight, bias, stride, padding, dilation, groups)
    if input.dtype is torch.float64:
        return _adder2d_torch(input, weight, bias, stride, padding, dilation, groups)
    plan = _plan(
        _size(input), input.stride(), _is_channels_last(input), _size(weight), None if bias is None else _size(bias),
        input.dtype, tuple(stride), tuple(padding), tuple(dilation), groups, device,
    )  # fmt: skip
    output = input.new_empty_strided(plan.size, plan.stride)
    if plan.size[0] == 0:
        return output
    weight, bias = _contiguous("weight", weight), _contiguous("bias", bias)
    _check_forward_memory(plan, input, weight, bias)
    workspace = None
    if plan.workspace_bytes:
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=input.device)
    params = plan.problem + library.POINTERS.pack(
        input.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        plan.workspace_bytes,
    )
    loaded = library.load()
    error = loaded.adder2d_fprop(params, torch._C._cuda_getCurrentRawStream(device))
    if error:
        raise _launch_error("adder2d", device, error)
    return output


def _adder2d_cpu(input, weight, bias, stride, padding, dilation, groups):
    _check_tensors(input, weight, bias)
    dtype = input.dtype
    if dtype is torch.float64:
        return _adder2d_torch(input, weight, bias, stride, padding, dilation, groups)
    channels_last = _is_channels_last(input)  # of what came in, not of its float32 copy
    if dtype is not torch.float32:
        for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
            _check_memory(name, tensor)
        input, weight, bias = (None if t is None else t.float() for t in (input, weight, bias))
    plan = _plan(
        _size(input), input.stride(), channels_last, _size(weight), None if bias is None else _size(bias),
        torch.float32, tuple(stride), tuple(padding), tuple(dilation), groups, -1,
    )  # fmt: skip
    output = input.new_empty_strided(plan.size, plan.stride)
    if plan.size[0] == 0:
        return output.to(dtype)
    weight, bias = _contiguous("weight", weight), _contiguous("bias", bias)
    _check_forward_memory(plan, input, weight, bias)
    params = plan.problem + library.POINTERS.pack(
        input.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), output.data_ptr(), 0, 0
    )
    error = library.load().adder2d_fprop_cpu(params, torch.get_num_threads())
    if error:
        raise _cpu_error("adder2d", error)
    return output.to(dtype)


# ---- forward on float64, which the kernels do not support: users' own reference, on any device


def _adder2d_torch(input, weight, bias, stride, padding, dilation, groups):
    N, K, P, Q = _output_size(
        _size(input), _size(weight), None if bias is None else _size(bias), stride, padding, dilation, groups
    )
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        _check_memory(name, tensor)
    output = torch.empty((N, K, P, Q), dtype=input.dtype, device=input.device, memory_format=_memory_format(input))
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    kernel = _size(weight)[2:]
    filters = weight.reshape(groups, K // groups, -1)
    # One output pixel takes its taps, twice, and its sums.
    pixel_bytes = (2 * groups * filters.shape[2] + K) * input.element_size()
    for n, p, q in _tiles(N, P, Q, pixel_bytes, _budget(input)):
        rows, columns = (
            slice(o.start * stride[i], (o.stop - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1)
            for i, o in enumerate((p, q))
        )
        taps = F.unfold(padded[n, :, rows, columns], kernel, dilation, 0, stride).unflatten(1, (groups, -1))
        taps = taps.permute(1, 0, 3, 2).flatten(1, 2)  # [groups, npq, CRS]
        distances = torch.cdist(filters, taps, p=1).view(K, n.stop - n.start, p.stop - p.start, q.stop - q.start)
        output[n, :, p, q] = distances.neg_().transpose(0, 1)
    if bias is not None:
        output += bias[:, None, None]
    return output


def _budget(tensor: Tensor) -> int:
    return _TEMPORARY_BYTES.get(tensor.device.type, _TEMPORARY_BYTES_DEFAULT)


def _tiles(N: int, P: int, Q: int, bytes_per_pixel: int, budget: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts [N, P, Q] into boxes of at most `budget` bytes: whole samples if one fits, else whole rows, else pixels."""
    pixels = max(1, budget // bytes_per_pixel)
    box = [max(1, min(N, pixels // (P * Q))), max(1, min(P, pixels // Q)), min(Q, pixels)]
    for n in range(0, N, box[0]):
        for p in range(0, P, box[1]):
            for q in range(0, Q, box[2]):
                yield slice(n, min(n + box[0], N)), slice(p, min(p + box[1], P)), slice(q, min(q + box[2], Q))


# ---- the gradient rule


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


class _GradInputPlan(NamedTuple):
    """What a launch needs beyond pointers."""

    stride: tuple[int, int, int, int]  # of the input gradient
    problem: bytes  # Adder2dParams up to the pointers
    kind: int  # Adder2dType of the input gradient
    workspace_bytes: int


@functools.lru_cache(maxsize=4096)
def _grad_input_plan(
    grad_size: tuple[int, ...],
    grad_stride: tuple[int, ...],
    grad_dtype: torch.dtype,
    input_size: tuple[int, ...],
    input_stride: tuple[int, ...],
    channels_last: bool,
    weight_size: tuple[int, ...],
    dtype: torch.dtype,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    device: int,
) -> _GradInputPlan:
    """Checks the problem and packs it. `device` is the current CUDA device, or -1 for the CPU."""
    size = _kernel_size("adder2d_grad_input", input_size, weight_size, None, stride, padding, dilation, groups)
    _check_grad_size("adder2d_grad_input", grad_size, size)
    _, C, H, W = input_size
    output_stride = (C * H * W, 1, C * W, C) if channels_last else (C * H * W, H * W, W, 1)
    kind = _KERNEL_TYPES[dtype]
    problem = library.PROBLEM.pack(
        *input_size, size[1], *weight_size[2:], *size[2:], *stride, *padding, *dilation, groups,
        kind, kind, _KERNEL_TYPES[grad_dtype], 0, *input_stride, *grad_stride,
    )  # fmt: skip
    params = problem + library.POINTERS.pack(0, 0, 0, 0, 0, 0) + library.DGRAD.pack(kind, 0, *output_stride, 0)
    loaded = library.load()
    reason = loaded.adder2d_dgrad_check(params)
    if reason:
        raise ValueError(f"adder2d_grad_input: {reason.decode()}.")
    workspace_bytes = loaded.adder2d_dgrad_workspace(params) if device >= 0 else 0
    return _GradInputPlan(output_stride, problem, kind, workspace_bytes)


def _grad_input_kernel(grad_output, input, weight, channels_last, stride, padding, dilation, groups, device):
    """dx by adder2d_dgrad on the current CUDA device `device`, or by adder2d_dgrad_cpu where that is -1."""
    plan = _grad_input_plan(
        _size(grad_output), grad_output.stride(), grad_output.dtype, _size(input), input.stride(), channels_last,
        _size(weight), input.dtype, tuple(stride), tuple(padding), tuple(dilation), groups, device,
    )  # fmt: skip
    grad_input = input.new_empty_strided(_size(input), plan.stride)
    if _size(input)[0] == 0:
        return grad_input
    weight = weight.contiguous()
    workspace = None
    if plan.workspace_bytes:
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=input.device)
    params = (
        plan.problem
        + library.POINTERS.pack(
            input.data_ptr(),
            weight.data_ptr(),
            0,
            grad_output.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
            plan.workspace_bytes,
        )
        + library.DGRAD.pack(plan.kind, 0, *plan.stride, grad_input.data_ptr())
    )
    loaded = library.load()
    if device < 0:
        error = loaded.adder2d_dgrad_cpu(params, torch.get_num_threads())
        if error:
            raise _cpu_error("adder2d_grad_input", error)
        return grad_input
    error = loaded.adder2d_dgrad(params, torch._C._cuda_getCurrentRawStream(device))
    if error:
        raise _launch_error("adder2d_grad_input", device, error)
    return grad_input


def _check_grad_arguments(caller: str, grad_output: Tensor, input: Tensor, weight: Tensor) -> None:
    _check_grad_tensors(caller, grad_output, input, weight)
    for name, tensor in (("grad_output", grad_output), ("input", input), ("weight", weight)):
        _check_memory(name, tensor)


def _grad_input_cuda(grad_output, input, weight, stride, padding, dilation, groups):
    _check_grad_arguments("adder2d_grad_input", grad_output, input, weight)
    device = input.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return _grad_input_cuda(grad_output, input, weight, stride, padding, dilation, groups)
    if input.dtype is torch.float64:
        return _grad_input_torch(grad_output, input, weight, stride, padding, dilation, groups)
    if grad_output.dtype not in _KERNEL_TYPES:
        grad_output = grad_output.float()
    return _grad_input_kernel(
        grad_output, input, weight, _is_channels_last(input), stride, padding, dilation, groups, device
    )


def _grad_input_cpu(grad_output, input, weight, stride, padding, dilation, groups):
    _check_grad_arguments("adder2d_grad_input", grad_output, input, weight)
    if input.dtype is torch.float64:
        return _grad_input_torch(grad_output, input, weight, stride, padding, dilation, groups)
    channels_last = _is_channels_last(input)  # of what came in, not of its float32 copy
    dx = _grad_input_kernel(
        grad_output.float(), input.float(), weight.float(), channels_last, stride, padding, dilation, groups, -1
    )
    return dx.to(input.dtype)


def _grad_input_torch(grad_output, input, weight, stride, padding, dilation, groups):
    """dx in float64, which the kernels do not support: tap by tap and filter by filter, for some samples at a time."""
    size = _output_size(_size(input), _size(weight), None, stride, padding, dilation, groups)
    _check_grad_size("adder2d_grad_input", _size(grad_output), size)
    (N, C, H, W), (K, _, R, S), (P, Q) = input.shape, weight.shape, grad_output.shape[2:]
    dtype = _sum_dtype(input.dtype)
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))
    filters = weight.to(dtype).reshape(groups, K // groups, C // groups, 1, R, S)
    samples = max(1, _budget(input) // (4 * C * P * Q * dtype.itemsize))  # x, the terms, their sum, and some of dy
    for n in range(0, N, samples):
        x = F.pad(input[n : n + samples].to(dtype), (padding[1], padding[1], padding[0], padding[0])).transpose(0, 1)
        dy = (
            grad_output[n : n + samples].to(dtype).transpose(0, 1).reshape(groups, K // groups, 1, -1)
        )  # [g, k, 1, npq]
        dx = torch.zeros(x.shape, dtype=dtype, device=x.device)  # [c, n, h, w]
        for r, s in itertools.product(range(R), range(S)):
            rows, columns = (
                slice(o * dilation[i], o * dilation[i] + (extent - 1) * stride[i] + 1, stride[i])
                for i, (o, extent) in enumerate(((r, P), (s, Q)))
            )
            tap = x[:, :, rows, columns]
            taps = tap.reshape(groups, C // groups, -1)  # [g, c, npq]
            terms, total = torch.empty_like(taps), torch.zeros_like(taps)
            for k in range(K // groups):
                torch.sub(filters[:, k, :, :, r, s], taps, out=terms).clamp_(-1, 1)
                total.addcmul_(terms, dy[:, k])
            dx[:, :, rows, columns] += total.view(tap.shape)
        dx = dx[:, :, padding[0] : padding[0] + H, padding[1] : padding[1] + W]
        grad_input[n : n + samples] = dx.transpose(0, 1)
    return grad_input


_cudnn_precision_lock = threading.Lock()


def _convolved(grad_output, input, weight, stride, padding, dilation, groups):
    """The weight gradient of a convolution, in float32 at least; N is not 0."""
    dtype = _sum_dtype(weight.dtype)
    N, size = len(input), list(weight.shape)
    # cuDNN has a Winograd kernel (13x13 tiles) for this size alone, which torch does not exclude with TF32 and which is
    # as inaccurate. One more column, of zeros and dropped again, keeps it out.
    widen = int(input.is_cuda and size[2:] == [5, 5] and tuple(stride) == tuple(dilation) == (1, 1))
    samples = N
    if input.dtype is not dtype:  # converted copies, so in pieces
        samples = max(1, _budget(input) // ((input[0].numel() + grad_output[0].numel()) * dtype.itemsize))
    convolved = None
    for n in range(0, N, samples):
        x, dy = input, grad_output
        if samples < N:
            x, dy = x[n : n + samples], dy[n : n + samples]
        x, dy = x.to(dtype), dy.to(dtype)
        if widen:
            x = F.pad(x, (0, widen))
        # Read for its size and layout alone.
        filters = weight
        if widen or weight.dtype is not dtype or not weight.is_contiguous():
            filters = x.new_empty(1).expand(*size[:3], size[3] + widen)
        exact = input.dtype.itemsize == grad_output.dtype.itemsize == 2
        part = _convolution_backward(x, dy, filters, stride, padding, dilation, groups, exact)
        part = part[..., : size[3]] if widen else part
        convolved = part if convolved is None else convolved.add_(part)
    return convolved


def _convolution_backward(x, dy, filters, stride, padding, dilation, groups, exact):
    """A convolution's weight gradient; with TF32 where that is `exact` (float16 and bfloat16 numbers fit into it).

    The two terms of a weight gradient cancel, for which TF32's ten bits of a float32 are not enough. The flag is the
    process's, as all of cuDNN's are, and autograd has a thread for each GPU.
    """
    wanted = False, True, False  # of the gradients of input, weight and bias
    arguments = dy, x, filters, None, stride, padding, dilation, False, (0, 0), groups, wanted
    if not x.is_cuda:
        return torch.ops.aten.convolution_backward.default(*arguments)[1]
    # torch 2.9 gave each operator its own flag, and reading the old one fails where a user has set the new ones apart.
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        owner, name, value = cudnn.conv, "fp32_precision", "tf32" if exact else "ieee"
    else:
        owner, name, value = cudnn, "allow_tf32", exact
    with _cudnn_precision_lock:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            return torch.ops.aten.convolution_backward.default(*arguments)[1]
        finally:
            setattr(owner, name, before)


class _GradWeightPlan(NamedTuple):
    """What a launch needs beyond pointers."""

    stride: tuple[int, int, int, int]  # of the gradient, which is that of the weight
    problem: bytes  # Adder2dParams up to the pointers
    alone: bool  # adder2d_wgrad needs no convolution beforehand
    workspace_bytes: int


@functools.lru_cache(maxsize=4096)
def _grad_weight_plan(
    grad_size: tuple[int, ...],
    grad_stride: tuple[int, ...],
    grad_dtype: torch.dtype,
    input_size: tuple[int, ...],
    input_stride: tuple[int, ...],
    channels_last: bool,
    weight_size: tuple[int, ...],
    dtype: torch.dtype,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    eta: float,
    device: int,
) -> _GradWeightPlan:
    """Checks the problem and packs it. `channels_last` is about the weight, `device` the current CUDA device."""
    size = _kernel_size("adder2d_grad_weight", input_size, weight_size, None, stride, padding, dilation, groups)
    _check_grad_size("adder2d_grad_weight", grad_size, size)
    K, C, R, S = weight_size
    kind = _KERNEL_TYPES[dtype]
    problem = library.PROBLEM.pack(
        *input_size, K, R, S, *size[2:], *stride, *padding, *dilation, groups, kind, kind, _KERNEL_TYPES[grad_dtype], 0,
        *input_stride, *grad_stride,
    )  # fmt: skip
    params = problem + library.POINTERS.pack(0, 0, 0, 0, 0, 0)
    params += library.WGRAD.pack(channels_last, 0, 0, 0, 0, 0, eta, 0, 0)
    loaded = library.load()
    reason = loaded.adder2d_wgrad_check(params)
    if reason:
        raise ValueError(f"adder2d_grad_weight: {reason.decode()}.")
    return _GradWeightPlan(
        (C * R * S, 1, C * S, C) if channels_last else (C * R * S, R * S, S, 1),
        problem,
        bool(loaded.adder2d_wgrad_takes(params)),
        loaded.adder2d_wgrad_workspace(params),
    )


def _grad_weight_cuda(grad_output, input, weight, stride, padding, dilation, groups, eta=None):
    """dw = sum over n,p,q of dy * (x - w) by adder2d_wgrad, often after the weight gradient of a convolution."""
    _check_grad_arguments("adder2d_grad_weight", grad_output, input, weight)
    arguments.check_eta("adder2d_grad_weight", eta)
    device = input.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return _grad_weight_cuda(grad_output, input, weight, stride, padding, dilation, groups, eta)
    if weight.dtype not in _KERNEL_TYPES or len(input) == 0:
        return _grad_weight_torch(grad_output, input, weight, stride, padding, dilation, groups, eta)
    if grad_output.dtype not in _KERNEL_TYPES:
        grad_output = grad_output.float()
    channels_last = _is_channels_last(weight)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = weight.contiguous(memory_format=layout)
    eta = 0.0 if eta is None else eta
    plan = _grad_weight_plan(
        grad_output.shape, grad_output.stride(), grad_output.dtype, input.shape, input.stride(), channels_last,
        weight.shape, input.dtype, tuple(stride), tuple(padding), tuple(dilation), groups, eta, device,
    )  # fmt: skip
    dw = convolved = None
    if not plan.alone:
        convolved = _convolved(grad_output, input, weight, stride, padding, dilation, groups)
        if convolved.is_contiguous(memory_format=layout):
            dw = convolved
    if dw is None:
        dw = weight.new_empty_strided(weight.shape, plan.stride, dtype=torch.float32)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=input.device)
    params = (
        plan.problem
        + library.POINTERS.pack(
            input.data_ptr(), weight.data_ptr(), 0, grad_output.data_ptr(), workspace.data_ptr(), plan.workspace_bytes
        )
        + library.WGRAD.pack(
            channels_last,
            0,
            *(plan.stride if convolved is None else convolved.stride()),
            eta,
            0 if convolved is None else convolved.data_ptr(),
            dw.data_ptr(),
        )
    )
    loaded = library.load()
    error = loaded.adder2d_wgrad(params, torch._C._cuda_getCurrentRawStream(device))
    if error:
        raise _launch_error("adder2d_grad_weight", device, error)
    return dw


def _grad_weight_cpu(grad_output, input, weight, stride, padding, dilation, groups, eta=None):
    _check_grad_arguments("adder2d_grad_weight", grad_output, input, weight)
    arguments.check_eta("adder2d_grad_weight", eta)
    return _grad_weight_torch(grad_output, input, weight, stride, padding, dilation, groups, eta)


def _grad_weight_torch(grad_output, input, weight, stride, padding, dilation, groups, eta=None):
    """The same in plain torch: on the CPU, and in float64."""
    size = _output_size(_size(input), _size(weight), None, stride, padding, dilation, groups)
    _check_grad_size("adder2d_grad_weight", _size(grad_output), size)
    dtype, layout = _sum_dtype(weight.dtype), _memory_format(weight)
    if len(input) == 0:
        return torch.zeros(weight.shape, dtype=dtype, device=weight.device).contiguous(memory_format=layout)
    convolved = _convolved(grad_output, input, weight, stride, padding, dilation, groups)
    total = grad_output.sum((0, 2, 3), dtype=dtype)
    # The conversion of the weight matters to float16: its product with the sum could pass 65504.
    dw = torch.addcmul(convolved, weight.to(dtype), total[:, None, None, None], value=-1)
    return (dw if eta is None else adaptive_scaling(dw, eta)).contiguous(memory_format=layout)


def adaptive_scaling(grad_weight: Tensor, eta: float) -> Tensor:
    """eta * sqrt(numel) * dw / |dw|, the published code's learning rate per layer; in float32 at least."""
    scaled = grad_weight.to(_sum_dtype(grad_weight.dtype), copy=True)
    adaptive_scaling_([scaled], eta)
    return scaled


def adaptive_scaling_(gradients: Sequence[Tensor], eta: float) -> None:
    """`adaptive_scaling` of each, in place: one launch a gradient, and three for all of a device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (_, dtype), group in groups.items():
        sums = [t.to(_sum_dtype(dtype)) for t in group]
        divisors = torch._foreach_norm(sums)
        torch._foreach_clamp_min_(divisors, 1e-12)
        torch._foreach_div_(divisors, [eta * math.sqrt(t.numel()) for t in group])
        torch._foreach_div_(sums, divisors)
        for gradient, scaled in zip(group, sums, strict=True):
            if scaled is not gradient:
                gradient.copy_(scaled)


class _Kernels(NamedTuple):
    """The operators' implementations on one device."""

    forward: Callable[..., Tensor]
    grad_input: Callable[..., Tensor]
    grad_weight: Callable[..., Tensor]


_KERNELS = {
    "CPU": _Kernels(_adder2d_cpu, _grad_input_cpu, _grad_weight_cpu),
    "CUDA": _Kernels(_adder2d_cuda, _grad_input_cuda, _grad_weight_cuda),
}
for _device, _implementations in _KERNELS.items():
    for _name, _function in zip(("adder2d", "adder2d_grad_input", "adder2d_grad_weight"), _implementations, strict=True):
        _library.impl(_name, _function, _device)
# Reached in inference mode only: elsewhere Autograd is there to turn it into adder2d.
def _adder2d_eta_inference(*options):
    *options, eta = options
    arguments.check_eta("adder2d_eta", eta)
    return _adder2d(*options)


_library.impl("adder2d_eta", _adder2d_eta_inference, "CompositeExplicitAutograd")


# ---- calls without the dispatcher
# A Python kernel costs some 5 us on its way through the dispatcher, and a call has two, as much as all the rest of it.
# What the dispatcher decides by is the keys of the thread and of the tensors (torch._ops.key_extractor reads them in the
# same way): where those are of an idle thread and of plain tensors, its choice is known.

_Keys = torch._C.DispatchKeySet
_Key = torch._C.DispatchKey
_can_read_keys = hasattr(_Keys, "raw_repr")  # newer than torch 2.4, where all calls take the dispatcher
_tensor_keys = torch._C._dispatch_keys
_included_keys = torch._C._dispatch_tls_local_include_set
_excluded_keys = torch._C._dispatch_tls_local_exclude_set


def _thread_keys() -> tuple[int, int]:
    return _included_keys().raw_repr(), _excluded_keys().raw_repr()


def _idle_thread_keys() -> set[tuple[int, int]]:
    """Those of a thread where no mode, tracer, transform or autocast is active, as is and in inference mode."""
    found = set()

    def read() -> None:
        found.add(_thread_keys())
        with torch.inference_mode():
            found.add(_thread_keys())

    thread = threading.Thread(target=read)  # in this one, something may be active
    thread.start()
    thread.join()
    return found


def _plain_tensor_keys(device: str) -> list[int]:
    """Those of a tensor on "CPU" or "CUDA" that is nothing else besides, as is and made in inference mode."""
    keys = _Keys(getattr(_Key, device)) | _Keys(getattr(_Key, f"Autocast{device}"))
    return [keys.raw_repr(), (keys | _Keys(getattr(_Key, f"Autograd{device}")) | _Keys(_Key.ADInplaceOrView)).raw_repr()]


_IDLE = _idle_thread_keys() if _can_read_keys else set()
_PLAIN = {}
if _can_read_keys:
    _PLAIN = {keys: kernels for device, kernels in _KERNELS.items() for keys in _plain_tensor_keys(device)}
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # subclasses may have a __torch_function__


def _kernels(first: Tensor, second: Tensor, third: Tensor | None) -> _Kernels | None:
    """What the dispatcher would come to for these tensors, but for autograd; None where anything else has a say."""
    if (
        not _can_read_keys
        or torch.compiler.is_compiling()
        or _thread_keys() not in _IDLE
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()  # which shows the operators
        or torch.autograd.forward_ad._current_level >= 0
        or type(first) not in _PLAIN_TYPES
        or type(second) not in _PLAIN_TYPES
    ):
        return None
    kernels = _PLAIN.get(_tensor_keys(first).raw_repr())
    if kernels is None or _PLAIN.get(_tensor_keys(second).raw_repr()) is not kernels:
        return None
    if third is not None and (
        type(third) not in _PLAIN_TYPES or _PLAIN.get(_tensor_keys(third).raw_repr()) is not kernels
    ):
        return None
    return kernels


def _plain_pairs(*values: int | Sequence[int]) -> list[tuple[int, int]] | None:
    """As pairs what the schema takes for int[2], or None for what is left to it."""
    pairs = []
    for value in values:
        if type(value) is int:
            value = (value, value)
        elif type(value) is not tuple or len(value) != 2 or type(value[0]) is not int or type(value[1]) is not int:
            return None
        pairs.append(value)
    return pairs


# ---- autograd


class _Adder2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, input, weight, bias, stride, padding, dilation, groups, eta):
        ctx.save_for_backward(input, weight)
        ctx.geometry = stride, padding, dilation, groups
        ctx.eta = eta
        ctx.bias_dtype = None if bias is None else bias.dtype
        return kernel(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        # With create_graph the operators refuse a second derivative.
        kernels = None if torch.is_grad_enabled() else _kernels(grad_output, input, weight)
        _, compute_grad_input, compute_grad_weight = _OPERATORS if kernels is None else kernels
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_input = compute_grad_input(grad_output, input, weight, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            grad_weight = compute_grad_weight(grad_output, input, weight, *ctx.geometry, ctx.eta).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.sum((0, 2, 3), dtype=_sum_dtype(ctx.bias_dtype)).to(ctx.bias_dtype)
        return None, grad_input, grad_weight, grad_bias, None, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(
            "adder2d has AdderNet's backward rule and no forward-mode derivative; use backward() or "
            "torch.autograd.grad."
        )


_OPERATORS = _Kernels(_adder2d, _grad_input, _grad_weight)

# Function.apply without inspecting the signature of `forward` at each call, which takes longer than the rest of it
# (torch.library.register_autograd as well), and without function transforms, which are refused below.
_apply = super(torch.autograd.Function, _Adder2d).apply


def _with_autograd(kernel, input, weight, bias, stride, padding, dilation, groups, eta):
    needs_grad = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    # Inside a dual level the Function is taken as well: it refuses tangents, where the plain call would drop them.
    if (needs_grad and torch.is_grad_enabled()) or torch.autograd.forward_ad._current_level >= 0:
        return _apply(kernel, input, weight, bias, stride, padding, dilation, groups, eta)
    return kernel(input, weight, bias, stride, padding, dilation, groups)


def _below_autograd(*arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return _adder2d(*arguments)


def _adder2d_autograd(input, weight, bias, stride, padding, dilation, groups, eta=ETA):
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "adder2d does not work inside torch.func.grad, vjp, jvp and similar transforms: its backward is AdderNet's "
            "rule, not the derivative; use backward() or torch.autograd.grad."
        )
    arguments.check_eta("adder2d_eta", eta)
    return _with_autograd(_below_autograd, input, weight, bias, stride, padding, dilation, groups, eta)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "adder2d has no second derivative: its backward is AdderNet's rule, not the derivative; call backward() "
        "without create_graph, or detach() the gradient."
    )


_library.impl("adder2d", _adder2d_autograd, "Autograd")
_library.impl("adder2d_eta", _adder2d_autograd, "Autograd")
torch.library.register_autograd("torch2trt_adder::adder2d_grad_input", _no_second_derivative, lib=_library)
torch.library.register_autograd("torch2trt_adder::adder2d_grad_weight", _no_second_derivative, lib=_library)


# ---- autocast: as for a convolution, all tensors take the autocast dtype
# torch.library.register_autocast is newer than torch 2.4, and it fixes the dtype when it is called.


def _autocast_kernel(op: torch._ops.OpOverload, device_type: str, key: torch._C.DispatchKey):
    keys = torch._C.DispatchKeySet(key)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def adder2d_autocast(input, weight, bias, *options):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(cast(input), cast(weight), cast(bias), *options)

    return adder2d_autocast


for _op in (_adder2d, _adder2d_eta):
    for _type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(
            _op._schema.name.split("::")[1], _autocast_kernel(_op, _type, getattr(torch._C.DispatchKey, _key)), _key
        )
