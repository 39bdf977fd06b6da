"""torch2trt 0.5 on TensorRT 11: three patches of torch2trt.

torch2trt was written for TensorRT up to 10. In 11 the int8 calibrators, weak typing and the flag EXPLICIT_BATCH are gone,
so that torch2trt cannot even be imported. `prepare` is called before its import, `repair` after it; where TensorRT still has what
torch2trt needs, both do nothing. The module ``tensorrt`` is never touched.

With them, networks in float32 convert as before, and float16 ones as the types of their tensors say: ``model.half()``
with half inputs instead of ``fp16_mode=True``, which TensorRT 11 no longer has.
"""

import importlib
import sys
from types import ModuleType
from typing import Any, ClassVar

from ..trt import api

_CALIBRATOR = "torch2trt.dataset_calibrator"


def needed(trt: ModuleType) -> bool:
    """Whether this TensorRT lacks something that torch2trt 0.5 takes for granted."""
    return not (api.has_int8_calibration(trt) and api.has_batch_flag(trt))


def prepare(trt: ModuleType) -> None:
    """Before torch2trt is imported: a calibrator module that raises when it is used instead of when it is loaded."""
    if not needed(trt) or _CALIBRATOR in sys.modules:
        return

    class DatasetCalibrator:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError(_gone(trt, "int8_mode"))

    module: Any = ModuleType(_CALIBRATOR)
    module.DEFAULT_CALIBRATION_ALGORITHM = None
    module.DatasetCalibrator = DatasetCalibrator
    module.__all__ = ["DEFAULT_CALIBRATION_ALGORITHM", "DatasetCalibrator"]
    sys.modules[_CALIBRATOR] = module


def repair(trt: ModuleType) -> None:
    """After it: the network flag, and outputs whose type can no longer be set."""
    if not needed(trt):
        return
    host: Any = sys.modules["torch2trt.torch2trt"]  # the attribute torch2trt.torch2trt is the function
    if isinstance(host.trt, _TensorRT):
        return
    to_trt_type, to_trt_location = host.torch_dtype_to_trt, host.torch_device_to_trt

    def mark_outputs(self: Any, torch_outputs: Any, names: Any = None) -> None:
        self.output_names = host.default_output_names(len(torch_outputs)) if names is None else names
        for name, output in zip(self.output_names, torch_outputs):
            itensor = output._trt
            dtype = to_trt_type(output.dtype)
            if itensor.dtype != dtype:  # ITensor.dtype is read-only
                itensor = self.network.add_cast(itensor, dtype).get_output(0)
            itensor.name = name
            itensor.location = to_trt_location(output.device)
            self.network.mark_output(itensor)

    host.trt = _TensorRT(trt)
    host.ConversionContext.mark_outputs = mark_outputs


def _gone(trt: ModuleType, what: str) -> str:
    return (
        f"TensorRT {trt.__version__} has no {what}: its networks have the types of their tensors. Convert model.half() with "
        "half inputs, or use torch2trt_adder.convert(model, inputs, route='onnx', fp16_mode=True)."
    )


class _TensorRT:
    """The module `trt` as torch2trt.torch2trt shall see it."""

    def __init__(self, trt: ModuleType) -> None:
        self._trt = trt
        self.NetworkDefinitionCreationFlag = _Names(trt.NetworkDefinitionCreationFlag, {"EXPLICIT_BATCH": 0}, trt)
        self.BuilderFlag = _Names(trt.BuilderFlag, {}, trt)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trt, name)


class _Names:
    """An enumeration with further members, and a sentence for those that TensorRT 11 has dropped."""

    _DROPPED: ClassVar = {"FP16": "fp16_mode", "INT8": "int8_mode", "STRICT_TYPES": "strict_type_constraints"}

    def __init__(self, enumeration: Any, more: dict[str, Any], trt: ModuleType) -> None:
        self._enumeration, self._more, self._trt = enumeration, more, trt

    def __getattr__(self, name: str) -> Any:
        if name in self._more:
            return self._more[name]
        if name in self._DROPPED and not hasattr(self._enumeration, name):
            raise RuntimeError(_gone(self._trt, self._DROPPED[name]))
        return getattr(self._enumeration, name)


def import_torch2trt() -> ModuleType:
    """torch2trt, with the patches where they are needed.

    Raises:
        Exception: whatever its import raises.
    """
    trt = importlib.import_module("tensorrt")
    prepare(trt)
    module = importlib.import_module("torch2trt")
    repair(trt)
    return module
