"""The operators ``torch.ops.torch2trt_adder.adder2d`` and ``adder2d_fused``, and functions of these names; importing this
registers them.

torch2trt patches ``torch2trt_adder.ops.adder2d`` and ``adder2d_fused`` while it traces: callers look them up here at each
call.
"""

from .checks import ETA as ETA
from .functional import adder2d as adder2d
from .fused import adder2d_fused as adder2d_fused
