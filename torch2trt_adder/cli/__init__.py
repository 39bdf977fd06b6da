"""The command `torch2trt-adder`."""

from .main import main as main
