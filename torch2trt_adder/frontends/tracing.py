"""What happens to adder layers inside a plain ``torch2trt(model, [x])``. Importing it needs torch2trt.

torch2trt runs the model while Python hooks turn each call that has a converter into layers of a TensorRT network. Some
of its habits would silently make wrong engines, so its ConversionContext is replaced by a stricter one:

* A result without a converter becomes a constant of the engine. Here that raises, for any layer, as soon as the
  constant was computed from the network's inputs.
* In fp16_mode TensorRT may round an adder layer's sums, which pass 65504 in wide layers, to float16 before BatchNorm
  scales them down; a ReLU then hides the -inf. Here the layers up to that point are held in float32.
* An operation in place that has no converter leaves the TensorRT tensor of the old value attached, and so does one with a
  converter at every other view of the same memory. Here these lose it, so that the next use raises as above.
* A converter may give its result another shape than PyTorch's. Here that raises.
* The tensors of a finished conversion stay attached to inputs and parameters, where the next conversion trips over
  them. Here they are removed.

Third-party adder layers (nn/adopt.py) are traced as ours.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorrt as trt
import torch
import torch2trt
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch2trt import get_arg, tensorrt_converter

from ..nn.adder2d import Adder2d
from ..nn.proof import difference
from ..nn.recognise import layer_fields, make_layer
from ..trt import api, fusion, plugin
from ..trt.plans import network_name
from ..trt.precision import hold_float32
from .dependencies import DependencyTracker, Origin
from .host import detach_trt, host, tensor_size
from .options import did_you_mean, nearest, torch2trt_options

# ---- the converter


@tensorrt_converter("torch2trt_adder.ops.adder2d")
def convert_adder2d(ctx: "ConversionContext") -> None:
    """One plugin layer for one call of adder2d, from a module or from a function."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = (None, None, None, 1, 0, 1, 1)
    input, weight, bias, stride, padding, dilation, groups = (
        get_arg(ctx, names[i], i, defaults[i]) for i in range(len(names))
    )
    output = ctx.method_return
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and ctx.tracker.origin(tensor):
            raise RuntimeError(
                f"adder2d in {ctx.place()}: the {name} is computed from the network's inputs, but an engine has "
                f"constant weights; compute the {name} from parameters only."
            )
    input_trt = getattr(input, "_trt", None)
    if input_trt is None:  # the same for every inference, or the network refuses it
        input_trt = ctx.network.add_constant(tuple(input.shape), input.detach().cpu().numpy()).get_output(0)

    half = output.dtype is torch.float16
    if half:
        api.allow_float16(trt, ctx.builder_config)
    output_type = trt.DataType.HALF if half else trt.DataType.FLOAT
    layer = plugin.add_adder2d(
        ctx.network,
        input_trt,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        output_type=output_type,
        name=f"{ctx.current_module_name() or 'model'}:adder2d_{len(ctx.adder_layers)}",
    )
    output._trt = layer.get_output(0)
    ctx.adder_layers[layer.name] = layer
    ctx.geometries[layer.name] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


class _Network(host.NetworkWrapper):
    """torch2trt's network, which takes no constant that was computed from the network's inputs."""

    def __getattr__(self, name: str) -> Any:
        attribute = super().__getattr__(name)
        if not name.startswith("add_"):
            return attribute

        def add(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, np.ndarray):
                    self._ctx.refuse(self._ctx.tracker.origin_of_array(value))
            return attribute(*args, **kwargs)

        return add


# ---- the conversion context


class ConversionContext(host.ConversionContext):
    """torch2trt's context with the differences that this file's first lines list."""

    lock: bool  # torch2trt's: a converter runs, or nothing is to be converted

    def __init__(self, network: Any, *args: Any, **kwargs: Any) -> None:
        self.tracker = DependencyTracker(self)
        super().__init__(network, *args, **kwargs)
        self._warn_of_unknown_options()
        self.network = _Network(self, network)
        for hook in self.hooks:
            hook.converter = {**hook.converter, "converter": _checked_converter(hook.converter["converter"])}
        self.adder_layers: dict[str, Any] = {}
        self.geometries: dict[str, dict[str, Any]] = {}  # of each adder layer, by its name
        self.module: nn.Module = self.torch2trt_kwargs["module"]
        self._stack = contextlib.ExitStack()

    def _warn_of_unknown_options(self) -> None:
        """torch2trt passes unknown options on, for converters to read, so that a misspelt one has no effect."""
        known = ["module", "inputs", *torch2trt_options(host.torch2trt)]
        for name in self.torch2trt_kwargs:
            if name not in known and nearest(name, known) is not None:
                warnings.warn(f"torch2trt ignores the option {name!r}{did_you_mean(name, known)}", stacklevel=4)

    @property
    def method_return(self) -> Any:
        """What the call that is being converted has returned."""
        return self._method_return

    @method_return.setter
    def method_return(self, value: Any) -> None:
        self._method_return = value
        self.tracker.see(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))

    def __enter__(self) -> "ConversionContext":
        detach_trt([*self.module.parameters(), *self.module.buffers()])
        with contextlib.ExitStack() as stack:
            for name, layer in self.module.named_modules():
                fields = layer_fields(layer)
                if fields is not None:
                    ours = make_layer(layer, fields, name or type(layer).__name__)
                    stack.enter_context(_replaced_forward(layer, self._checked_forward(name, layer, ours)))
            super().__enter__()
            stack.callback(super().__exit__, None, None, None)
            stack.enter_context(self.tracker)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()
        seen = [ref() for ref in self.tracker.seen]
        detach_trt([*(t for t in seen if t is not None), *self.module.parameters(), *self.module.buffers()])

    def add_inputs(self, torch_inputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        inputs = self.torch2trt_kwargs["inputs"]
        leaves = [] if isinstance(inputs, host.Dataset) else tree_leaves(inputs)  # with those that torch2trt ignores
        with self.unhooked():
            tensors = [leaf for leaf in (*torch_inputs, *leaves) if isinstance(leaf, Tensor)]
            detach_trt(tensors)
            for tensor in tensors:
                self.tracker.mark(tensor, f"an input of type {tensor.dtype}")
            self.tracker.see(tensors)
        super().add_inputs(torch_inputs, *args, **kwargs)

    def mark_outputs(self, torch_outputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        with self.unhooked():
            for output in torch_outputs:
                if not hasattr(output, "_trt"):
                    self.refuse(self.tracker.origin(output))
        super().mark_outputs(self._outputs_of_their_own(torch_outputs), *args, **kwargs)
        if len(self.adder_layers) != self.tracker.adder_calls:
            raise RuntimeError(
                f"The model calls adder2d {self.tracker.adder_calls} times, but the network has "
                f"{len(self.adder_layers)} Adder2d layers: call torch2trt_adder.adder2d or "
                "torch2trt_adder.ops.adder2d by that name, or use the Adder2d module."
            )
        network = self.network._network  # the wrapper takes every layer that it returns for a new one
        half, largest = bool(self.torch2trt_kwargs.get("fp16_mode")), self.tracker.largest
        exposed: Sequence[Any] = list(self.adder_layers.values())
        fused = ""
        if self.torch2trt_kwargs.get("fuse", False):
            report = fusion.fuse(network, self.geometries, trt=trt, half=half, largest=largest)
            exposed, fused = report.exposed, str(report)
        network.name = network_name(type(self.module).__name__, len(self.adder_layers), fused)
        if half:
            held = hold_float32(network, exposed, largest, trt=trt, adders=self.adder_layers.keys())
            # strict_type_constraints asks for the same, and excludes this flag.
            if held and not self.torch2trt_kwargs.get("strict_type_constraints"):
                self.builder_config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)

    def _outputs_of_their_own(self, outputs: Sequence[Any]) -> list[Any]:
        """`outputs`, those that are an input or another output under a new name as copies: a tensor has one name."""
        taken, own = set(), []
        for output in outputs:
            itensor = output._trt
            if itensor.is_network_input or itensor.name in taken:
                with self.unhooked():
                    output = output.detach()
                itensor = self.network._network.add_identity(itensor).get_output(0)
                output._trt = itensor
            taken.add(itensor.name)
            own.append(output)
        return own

    @contextlib.contextmanager
    def unhooked(self) -> Iterator[None]:
        """Inside, torch works as always: no converter runs, and shapes add no layers."""
        tensor_class: Any = Tensor
        locked, hooked = self.lock, tensor_class.size
        self.lock, tensor_class.size = True, tensor_size
        try:
            with host.use_shape_wrapping(False):
                yield
        finally:
            self.lock, tensor_class.size = locked, hooked

    def place(self) -> str:
        """The module that runs, in words."""
        if not self.module_stack:
            return "the model"
        module = self.current_module()
        name = self.module_name_map.get(module)
        return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"

    def refuse(self, origin: Origin | None) -> None:
        """Raises where a value that depends on the inputs is about to become a constant."""
        if origin is not None and not self.torch2trt_kwargs.get("allow_constants", False):
            raise RuntimeError(
                f"torch2trt has no converter for {origin.place} and would put its value for the example input into "
                "the engine as a constant. If that is an adder layer, use torch2trt_adder.Adder2d or name its class "
                "with torch2trt_adder.register_adder_class; else give torch2trt a converter for it. "
                "(allow_constants=True, given to torch2trt, makes it a constant after all.)"
            )

    def _checked_forward(self, name: str, layer: nn.Module, ours: Adder2d) -> Callable[[Tensor], Tensor]:
        """The forward of `ours`, compared with that of `layer`: a parameter named adder makes no adder layer."""
        theirs = layer.forward

        def forward(input: Tensor) -> Tensor:
            output = ours.forward(input)
            with self.unhooked(), torch.no_grad():
                self.tracker.paused = True
                try:
                    _check_close(f"{name or 'model'} ({type(layer).__name__})", output, theirs(input.detach()), ours)
                finally:
                    self.tracker.paused = False
            return output

        return forward


def _checked_converter(converter: Callable[[Any], None]) -> Callable[[Any], None]:
    """`converter`, which does not run where Python goes on to the other operand, and must keep PyTorch's shapes."""

    def convert(ctx: ConversionContext) -> None:
        if ctx.method_return is NotImplemented:
            return
        converter(ctx)
        with host.use_shape_wrapping(False):
            for output in tree_leaves(ctx.method_return):
                itensor = getattr(output, "_trt", None) if isinstance(output, Tensor) else None
                if not isinstance(itensor, trt.ITensor):
                    continue
                try:
                    shape = list(itensor.shape)
                except (RuntimeError, ValueError):  # TensorRT has refused a layer, and its log says why
                    shape = None
                expected = list(output.shape)
                if (
                    shape is None
                    or len(shape) != len(expected)
                    or any(a not in (-1, b) for a, b in zip(shape, expected))
                ):
                    raise RuntimeError(
                        f"The converter of {ctx.method_str} in {ctx.place()} gives "
                        f"{'a layer that TensorRT refuses' if shape is None else f'a result of shape {shape}'}, PyTorch one of "
                        f"shape {expected}; give torch2trt a converter that follows these arguments, or use "
                        "torch2trt_adder.convert with route='onnx'."
                    )

    return convert


def _check_close(name: str, output: Tensor, expected: Tensor, ours: Adder2d) -> None:
    """Raises where a third-party layer, whose output is `expected`, does not compute adder2d."""
    mismatch = difference(output, expected, ours.b, ours.adder[0].numel(), same_dtype=True)
    if mismatch is not None:
        raise RuntimeError(
            f"{name} looks like an adder layer (it holds a parameter `adder`, or its class was registered), but does not "
            f"compute adder2d: {mismatch.text('its output', 'adder2d', 'the layer')}; give torch2trt a converter for it."
        )


@contextlib.contextmanager
def _replaced_forward(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    had = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if had is None:
            del layer.forward
        else:
            layer.forward = had


def enable() -> None:
    """Puts our context in the place of torch2trt's, and registers the plugin."""
    host.ConversionContext = torch2trt.ConversionContext = ConversionContext
    plugin.register()
