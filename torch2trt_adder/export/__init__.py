"""export_onnx(): one ONNX file for TensorRT and ONNX Runtime, and what such a file says about its adder layers."""

from .format import EXTENTS as EXTENTS, adder_nodes as adder_nodes, extents as extents
