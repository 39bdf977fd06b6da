"""The operators in plain torch: in float64, and the weight gradient on the CPU."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_grad_size,
    check_memory,
    memory_format,
    output_size,
    sum_dtype,
    tensor_size,
)
from .scaling import adaptive_scaling

# Plain torch code below works in pieces whose temporaries stay within this many bytes (or within one sample's input,
# where that is larger). Pieces on the CPU fit its caches.
_TEMPORARY_BYTES = {"cpu": 4 << 20}
_TEMPORARY_BYTES_DEFAULT = 64 << 20


# ---- forward on float64, which the kernels do not support: users' own reference, on any device


def adder2d_torch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    N, K, P, Q = output_size(
        tensor_size(input),
        tensor_size(weight),
        None if bias is None else tensor_size(bias),
        stride,
        padding,
        dilation,
        groups,
    )
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        check_memory(name, tensor)
    output = torch.empty((N, K, P, Q), dtype=input.dtype, device=input.device, memory_format=memory_format(input))
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    kernel = tensor_size(weight)[2:]
    filters = weight.reshape(groups, K // groups, -1)
    # One output pixel takes its taps, twice, and its sums.
    pixel_bytes = (2 * groups * filters.shape[2] + K) * input.element_size()
    for n, p, q in _tiles(N, P, Q, pixel_bytes, _budget(input)):
        rows, columns = (
            slice(o.start * stride[i], (o.stop - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1)
            for i, o in enumerate((p, q))
        )
        taps = F.unfold(padded[n, :, rows, columns], kernel, tuple(dilation), 0, tuple(stride)).unflatten(
            1, (groups, -1)
        )
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


def grad_input_torch(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dx in float64, which the kernels do not support: tap by tap and filter by filter, for some samples at a time."""
    size = output_size(tensor_size(input), tensor_size(weight), None, stride, padding, dilation, groups)
    check_grad_size("adder2d_grad_input", tensor_size(grad_output), size)
    (N, C, H, W), (K, _, R, S), (P, Q) = input.shape, weight.shape, grad_output.shape[2:]
    dtype = sum_dtype(input.dtype)
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))
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


def convolved_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The weight gradient of a convolution, in float32 at least; N is not 0."""
    dtype = sum_dtype(weight.dtype)
    N, size = len(input), list(weight.shape)
    # cuDNN has a Winograd kernel (13x13 tiles) only for this size, which torch does not exclude with TF32 and which is
    # as inaccurate. One more column, of zeros and dropped again, keeps it out.
    widen = int(input.is_cuda and size[2:] == [5, 5] and tuple(stride) == tuple(dilation) == (1, 1))
    samples = N
    if input.dtype is not dtype:  # converted copies, so in pieces
        samples = max(1, _budget(input) // ((input[0].numel() + grad_output[0].numel()) * dtype.itemsize))
    convolved: Tensor | None = None
    for n in range(0, N, samples):
        x, dy = input, grad_output
        if samples < N:
            x, dy = x[n : n + samples], dy[n : n + samples]
        x, dy = x.to(dtype), dy.to(dtype)
        if widen:
            x = F.pad(x, (0, widen))
        # Only its size and layout are read.
        filters = weight
        if widen or weight.dtype is not dtype or not weight.is_contiguous():
            filters = x.new_empty(1).expand(*size[:3], size[3] + widen)
        exact = input.dtype.itemsize == grad_output.dtype.itemsize == 2
        part = _convolution_backward(x, dy, filters, stride, padding, dilation, groups, exact)
        part = part[..., : size[3]] if widen else part
        convolved = part if convolved is None else convolved.add_(part)
    assert convolved is not None  # the batch is not empty
    return convolved


def _convolution_backward(
    x: Tensor,
    dy: Tensor,
    filters: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    exact: bool,
) -> Tensor:
    """A convolution's weight gradient; with TF32 where that is `exact` (float16 and bfloat16 numbers fit into it).

    The two terms of a weight gradient cancel, for which TF32's ten bits of a float32 are not enough. The flag is the
    process's, as all of cuDNN's are, and autograd has a thread for each GPU.
    """
    wanted = False, True, False  # of the gradients of input, weight and bias
    arguments = dy, x, filters, None, stride, padding, dilation, False, (0, 0), groups, wanted
    if not x.is_cuda:
        return _convolution_weight_gradient(*arguments)
    # torch 2.9 gave each operator its own flag, and reading the old one fails where a user has set the new ones apart.
    cudnn = torch.backends.cudnn
    owner: Any
    value: str | bool
    if hasattr(cudnn, "conv"):
        owner, name, value = cudnn.conv, "fp32_precision", "tf32" if exact else "ieee"
    else:
        owner, name, value = cudnn, "allow_tf32", exact
    with _cudnn_precision_lock:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            return _convolution_weight_gradient(*arguments)
        finally:
            setattr(owner, name, before)


def _convolution_weight_gradient(*arguments: Any) -> Tensor:
    gradient: Tensor = torch.ops.aten.convolution_backward.default(*arguments)[1]
    return gradient


def grad_weight_torch(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eta: float | None = None,
) -> Tensor:
    """The same in plain torch: on the CPU, and in float64."""
    size = output_size(tensor_size(input), tensor_size(weight), None, stride, padding, dilation, groups)
    check_grad_size("adder2d_grad_weight", tensor_size(grad_output), size)
    dtype, layout = sum_dtype(weight.dtype), memory_format(weight)
    if len(input) == 0:
        return torch.zeros(weight.shape, dtype=dtype, device=weight.device).contiguous(memory_format=layout)
    convolved = convolved_gradient(grad_output, input, weight, stride, padding, dilation, groups)
    total = grad_output.sum((0, 2, 3), dtype=dtype)
    # The conversion of the weight matters to float16: its product with the sum could pass 65504.
    dw = torch.addcmul(convolved, weight.to(dtype), total[:, None, None, None], value=-1)
    return (dw if eta is None else adaptive_scaling(dw, eta)).contiguous(memory_format=layout)
