"""Plans: what TensorRT writes and reads again."""

import pathlib
import re
import struct
from types import ModuleType
from typing import Any

import torch

from . import api, plugin
from .monitor import logger

# ---- what a plan says about itself

SIGNATURE = re.compile(
    r"(?P<source>.*) \[torch2trt_adder, (?P<adders>\d+) Adder2d(?: \((?P<fused>[^()]*)\))?, (?P<gpu>.*)\]"
)
_PLAN_TAGS = (b"ftrt", b"vtrt")  # TensorRT, TensorRT for RTX


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def network_name(source: str, adders: int, fused: str = "") -> str:
    """The engine's name, which travels in the plan; `fused` says what the adder layers have taken over."""
    return f"{source} [torch2trt_adder, {adders} Adder2d{fused and f' ({fused})'}, {_gpu()}]"


def fused_layers(name: str) -> str | None:
    """What the adder layers of an engine of this name have taken over; None where the name does not say it."""
    signature = SIGNATURE.fullmatch(name)
    return signature["fused"] if signature else None


def plan_version(plan: bytes) -> tuple[int, int, int] | None:
    """The TensorRT version that wrote a plan, from its header (as `trtexec --getPlanVersionOnly` reads it).

    None where the header is of a kind that trtexec does not know either.

    Raises:
        ValueError: this is not a plan.
    """
    if len(plan) < 28 or plan[:4] not in _PLAN_TAGS:
        raise ValueError("no TensorRT engine")
    if struct.unpack_from("<I", plan, 4)[0] != 0:
        return None
    return plan[24], plan[25], plan[26]


def read_plan(path: pathlib.Path) -> bytes:
    """Raises an OSError of the class of the failure, FileNotFoundError above all."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise type(error)(f"the engine {path} cannot be read ({error.strerror}).") from error


def _not_a_plan(data: bytes) -> str:
    """What else than a plan some bytes are, and what to do, as the end of a sentence."""
    again = "build it again on this machine (torch2trt-adder build)"
    if not data:
        return f"empty: {again}"
    if data[:1] == b"\x08" and data[2:3] in (
        b"\x12",
        b"\x1a",
        b"\x3a",
    ):  # a ModelProto's ir_version, then the next field
        return "an ONNX file: make an engine of it with build_engine (torch2trt-adder build)"
    return f"no TensorRT engine: {again}"


def _cut_off(plan: bytes) -> str | None:
    """How much of a plan is missing by the size in its header, as part of a sentence; None where nothing is."""
    size = struct.unpack_from("<Q", plan, 16)[0]
    if struct.unpack_from("<I", plan, 4)[0] != 0 or len(plan) >= size:
        return None
    return f"is cut off: it has {len(plan)} of {size} bytes; copy or build it again"


def deserialize(trt: ModuleType, plan: bytes, source: str, host_code: bool) -> tuple[Any, Any]:
    """Runtime and engine, or the reason why not."""
    remedy = "build it again on this machine (torch2trt-adder build)"
    try:
        version = plan_version(plan)
    except ValueError as error:
        raise RuntimeError(f"{source} is {_not_a_plan(plan)}.") from error
    cut_off = _cut_off(plan)
    if cut_off and plan.startswith(b"vtrt"):
        raise RuntimeError(f"{source} {cut_off}.")
    if version not in (None, api.version(trt)) and not host_code:
        raise RuntimeError(
            f"{source} was built by TensorRT {'.'.join(map(str, version))}, here is {trt.__version__}: an engine only "
            f"runs on the TensorRT version that built it; {remedy}, or pass host_code=True (--host-code) if it is version-compatible."
        )
    if not torch.cuda.is_available():
        raise RuntimeError(f"{source} needs an NVIDIA GPU, and torch {torch.__version__} finds none here.")
    log = logger(trt)
    log.clear()
    if not host_code:  # a plan that carries the plugin registers it itself
        plugin.register(trt)
    torch.cuda.init()
    runtime = trt.Runtime(log)
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None and cut_off:
        raise RuntimeError(f"{source} {cut_off}.")
    if engine is None:
        raise RuntimeError(
            f"TensorRT {trt.__version__} on {_gpu()} cannot load {source}: {log.reasons()}; {remedy}, or pass host_code=True "
            "(--host-code) if it is version-compatible."
        )
    signature = SIGNATURE.fullmatch(engine.name)
    if signature and signature["gpu"] != _gpu():
        raise RuntimeError(
            f"{source} was built for {signature['gpu']}, here is {_gpu()}: an engine's kernels are chosen for one kind of "
            f"GPU; {remedy}."
        )
    return runtime, engine
