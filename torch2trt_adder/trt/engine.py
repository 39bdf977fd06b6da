"""The module that runs an engine."""

import functools
import pathlib
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import api
from .monitor import logger
from .plans import SIGNATURE, deserialize, read_plan

# ---- run


class Engine(nn.Module):
    """A TensorRT engine as a PyTorch module, called like torch2trt's TRTModule; it needs only TensorRT.

    ``engine(x)`` takes CUDA tensors in the order of `input_names` (or by name), of any batch and size within the first
    profile, contiguous or not, and returns new tensors: one, or a tuple in the order of `output_names`. It runs on
    torch's current stream and does not wait for the GPU; calls on several streams follow one another. ``state_dict()``
    has TRTModule's keys.

    Args:
        plan: a file, or its contents; None for an empty module that `load_state_dict` fills.
        cuda_graph: record the launches when shapes come a second time, and replay them as long as shapes stay the same.
        host_code: allow the plan to bring its own code: version-compatible plans, and plans with an embedded plugin.
            Only for plans from a source that you trust.
        trt: the TensorRT module; ``tensorrt`` where None.

    Raises:
        RuntimeError: no GPU or TensorRT; a plan of another TensorRT version or GPU; data that is not a plan.
        FileNotFoundError: the file is not there.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        plan: str | pathlib.Path | bytes | None = None,
        cuda_graph: bool = False,
        host_code: bool = False,
        trt: ModuleType | None = None,
    ) -> None:
        super().__init__()
        self._trt, self._host_code, self.cuda_graph = trt, host_code, cuda_graph
        self.engine: Any = None
        self.context: Any = None
        self.input_names: list[str] = []
        self.output_names: list[str] = []
        if isinstance(plan, (bytes, bytearray, memoryview)):
            self._load(bytes(plan), "the engine")
        elif plan is not None:
            self._load(read_plan(pathlib.Path(plan)), str(plan))

    @property
    def trt(self) -> ModuleType:
        """The TensorRT module that runs this engine."""
        return api.import_tensorrt(self._trt)

    def profile_shapes(self, name: str) -> list[tuple[int, ...]]:
        """Smallest, most frequent and largest shape of an input, in the engine's first profile."""
        return self._profile[name]

    def dtype_of(self, name: str) -> torch.dtype:
        """The type of an input or output."""
        return self._dtypes[name]

    def run_with_profiler(self, profiler: Any, inputs: Sequence[Tensor], runs: int, others: int) -> None:
        """Calls the engine `runs` times with an ``IProfiler``, after `others` calls without it."""
        tensors = self._check(inputs, {})
        with torch.cuda.device(self._device), self._lock:
            self._follow()
            try:
                for i in range(others + runs):
                    if i == others:
                        self.context.profiler = profiler
                    self._run(tensors)
                    torch.cuda.synchronize()
            finally:
                self._renew_context()  # one with a profiler waits for every layer

    def _load(self, plan: bytes, source: str) -> None:
        trt = self._trt = api.import_tensorrt(self._trt)
        self._runtime, self.engine = deserialize(trt, plan, source, self._host_code)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.input_names, self.output_names = inputs, [n for n in names if n not in inputs]
        self._dtypes = {name: _torch_dtype(trt, self.engine.get_tensor_dtype(name), name) for name in names}
        for name in names:
            where, layout = self.engine.get_tensor_location(name), self.engine.get_tensor_format(name)
            if where != trt.TensorLocation.DEVICE:
                raise RuntimeError(f"{source}: tensor {name!r} is a shape on the CPU, which this module cannot pass.")
            if layout != trt.TensorFormat.LINEAR:
                raise RuntimeError(
                    f"{source}: tensor {name!r} has the layout {layout.name}, torch's tensors are LINEAR; build it with "
                    "linear inputs and outputs."
                )
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._profile = {name: self._range(name) for name in inputs}
        self._lock = threading.Lock()  # a context serves one call at a time, on one stream
        self._stream: torch.cuda.Stream | None = None
        self._renew_context()

    def _range(self, name: str) -> list[tuple[int, ...]]:
        """Smallest, most frequent and largest shape of an input."""
        fixed = tuple(self.engine.get_tensor_shape(name))
        return [fixed] * 3 if -1 not in fixed else [tuple(s) for s in self.engine.get_tensor_profile_shape(name, 0)]

    def _renew_context(self) -> None:
        # There is only ever one: before TensorRT 10 two contexts cannot have one profile, so the old one goes first.
        self._graph: _Graph | None = None
        self._shapes: tuple[tuple[int, ...], ...] | None = None  # of the last run
        self.context = None
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise RuntimeError(f"TensorRT has no memory for this engine: {logger(self._trt).reasons()}")

    @property
    def adder_layers(self) -> int | None:
        """How many Adder2d layers the plan was built with, where `build_engine` built it."""
        signature = SIGNATURE.fullmatch(self.engine.name)
        return int(signature["adders"]) if signature else None

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.engine is None:
            raise RuntimeError("this Engine is empty: give it a plan, or load_state_dict.")
        tensors = self._check(inputs, named)
        with torch.cuda.device(self._device), self._lock:
            self._follow()
            outputs = self._replay(tensors) if self.cuda_graph else self._run(tensors)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _check(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
        given = dict(zip(self.input_names, inputs))
        if len(inputs) > len(self.input_names) or set(given) & set(named) or {*given, *named} != set(self.input_names):
            got = [*(f"input {i}" for i in range(len(inputs))), *named]
            raise TypeError(f"the engine takes {', '.join(self.input_names)}, got {', '.join(got) or 'nothing'}.")
        given.update(named)
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor) or tensor.dtype is not self._dtypes[name]:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"input {name!r} of the engine is {self._dtypes[name]}, got {kind}; convert it.")
            if tensor.device != self._device:
                raise ValueError(f"input {name!r} is on {tensor.device}, the engine on {self._device}; move it there.")
            low, _, high = self._profile[name]
            fits = tensor.dim() == len(low) and all(a <= b <= c for a, b, c in zip(low, tensor.shape, high))
            if not fits:
                allowed = list(low) if low == high else f"{list(low)} to {list(high)}"
                raise ValueError(
                    f"input {name!r} is {list(tensor.shape)}, but the engine was built for {allowed}; build it with other "
                    "ranges."
                )
        return [given[name].detach().contiguous() for name in self.input_names]

    def _follow(self) -> None:
        """Makes torch's current stream wait for the last call where that was on another: both use the context's memory."""
        stream = torch.cuda.current_stream()
        if self._stream not in (None, stream) and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
        self._stream = stream

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self._graph = None  # a recorded graph ends with the next use of its context
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes != self._shapes:
            self._shapes = None
            for name, shape in zip(self.input_names, shapes):
                if not self.context.set_input_shape(name, shape):
                    raise RuntimeError(f"TensorRT refuses the shape {list(shape)} of {name!r}.")
        outputs = self._allocate()
        self._enqueue(tensors, outputs)
        self._shapes = shapes
        return outputs

    def _allocate(self) -> list[Tensor]:
        """New outputs for the shapes that the context has been told."""
        outputs = []
        for name in self.output_names:
            shape = tuple(self.context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise RuntimeError(
                    f"the size of output {name!r} depends on values, {list(shape)}, which is not supported."
                )
            outputs.append(torch.empty(shape, dtype=self._dtypes[name], device=self._device))
        return outputs

    def _enqueue(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        # The caller holds both until this has returned; later reuse of their memory is ordered by the stream.
        for name, tensor in zip((*self.input_names, *self.output_names), (*tensors, *outputs)):
            if tensor.numel() == 0:  # TensorRT wants an address all the same
                tensor = self._empty
            self.context.set_tensor_address(name, tensor.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"TensorRT could not run the engine: {logger(self._trt).reasons()}")

    @functools.cached_property
    def _empty(self) -> Tensor:
        return torch.empty(256, dtype=torch.uint8, device=self._device)

    def _replay(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        # TensorRT: a graph is valid only for the shapes and the state of its context; executing it after either has changed
        # is undefined. With one context that leaves one graph, which any other use of the context ends. The first call
        # of new shapes runs without a graph: it is the run outside a recording that TensorRT wants after a change, and
        # shapes that alternate cost no recording.
        if tuple(tuple(tensor.shape) for tensor in tensors) != self._shapes:
            return self._run(tensors)
        if self._graph is None:
            self._graph = _Graph(self, tensors)
        return self._graph.replay(tensors)

    # ---- saving, with TRTModule's keys

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.engine is not None:
            destination[f"{prefix}engine"] = bytearray(self.engine.serialize())
            destination[f"{prefix}input_names"] = self.input_names
            destination[f"{prefix}output_names"] = self.output_names

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        key = f"{prefix}engine"
        if key not in state_dict:
            missing.append(key)
            return
        self._load(bytes(state_dict[key]), "the engine of the state_dict")
        for what in ("input_names", "output_names"):  # their order is that of the arguments and results
            names = list(state_dict.get(f"{prefix}{what}", ()))
            if sorted(names) == sorted(getattr(self, what)):
                setattr(self, what, names)

    def extra_repr(self) -> str:
        if self.engine is None:
            return "empty"
        inputs = (f"{n} {' to '.join(str(list(s)) for s in dict.fromkeys(p[::2]))}" for n, p in self._profile.items())
        return f"{', '.join(inputs)} -> {', '.join(self.output_names)}"


class _Graph:
    """The recorded launches for the shapes that the context has, with inputs and outputs of their own."""

    def __init__(self, owner: Engine, tensors: Sequence[Tensor]) -> None:
        self.inputs, self.outputs = [tensor.clone() for tensor in tensors], owner._allocate()
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                owner._enqueue(self.inputs, self.outputs)
        except RuntimeError as error:
            raise RuntimeError(f"the engine cannot be recorded ({error}); use it with cuda_graph=False.") from error

    def replay(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream()
        for tensor in (*self.inputs, *self.outputs):  # may be freed before this replay has ended
            tensor.record_stream(stream)
        for mine, theirs in zip(self.inputs, tensors):
            mine.copy_(theirs)
        self.graph.replay()
        return [output.clone() for output in self.outputs]


def _torch_dtype(trt: ModuleType, dtype: Any, name: str) -> torch.dtype:
    names = {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "INT64": torch.int64,
        "INT32": torch.int32,
        "INT8": torch.int8,
        "UINT8": torch.uint8,
        "BOOL": torch.bool,
    }
    if dtype.name not in names:
        raise RuntimeError(f"tensor {name!r} of the engine is {dtype.name}, for which torch has no type.")
    return names[dtype.name]
