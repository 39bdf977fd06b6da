"""export_onnx(): one ONNX file for TensorRT and ONNX Runtime, and what such a file says about its adder layers."""

from .format import EXTENTS as EXTENTS
from .format import adder_nodes as adder_nodes
from .format import extents as extents
