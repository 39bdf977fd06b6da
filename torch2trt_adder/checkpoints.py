"""Loads a checkpoint file into a network: weights only, whoever wrote the file, and never by half."""

import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

# Under which key training scripts keep the parameters, beside the optimizer and the epoch; in this order.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_LISTED = 5  # so many keys in an error; the rest are counted


def load_checkpoint(model: Model, path: str | os.PathLike[str]) -> Model:
    """Loads the parameters and buffers of a file that ``torch.save`` or safetensors wrote into `model`.

    The file may hold a ``state_dict``, or a dict with one under ``state_dict``, ``model_state_dict``, ``model`` or
    ``net``. The prefixes of DataParallel (``module.``) and ``torch.compile`` (``_orig_mod.``) may be on either side.
    Only tensors and plain values are read: no code of the file runs. Every key and shape must fit.

    Args:
        model: of any dtype and on any device; values are cast and moved to what it has.
        path: of the file.

    Returns:
        `model` itself. It is unchanged if this raises.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        OSError: the file cannot be read; FileNotFoundError where there is none.
        RuntimeError: it holds something else than parameters, does not fit the model, or holds NaN.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model must be a torch.nn.Module, got {type(model).__name__}.")
    state = _adapt(_state_dict(read(path), path), model)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
            raise RuntimeError(
                f"the checkpoint {path} holds NaN in {key} ({int(value.isnan().sum())} of {value.numel()} values): "
                "the training that wrote it had diverged; use an earlier checkpoint."
            )
    # torch copies what fits before it raises, and only it knows what the network's own hooks accept or fill in.
    live = model.state_dict()
    before = {key: value.clone() for key, value in live.items() if _is_plain(value)}
    try:
        model.load_state_dict(state)
    except Exception as error:
        with torch.no_grad():
            for key, value in before.items():
                live[key].copy_(value)
        reason = _misfits(state, live) or " ".join(str(error).split())
        raise RuntimeError(f"the checkpoint {path} does not fit {type(model).__name__}: {reason}") from error
    return model


def read(path: str | os.PathLike[str]) -> Any:
    """What the file holds, its tensors on the CPU: anything made of tensors, numbers, strings, lists and dicts.

    Raises:
        OSError: the file cannot be read; FileNotFoundError where there is none.
        RuntimeError: it is not a checkpoint, damaged, or holds objects that would need code to run.
    """
    try:
        with open(path, "rb") as file:
            kind = _kind(file)
            if kind == "safetensors":
                return _read_safetensors(file, path)
            if kind is not None:
                raise RuntimeError(f"the checkpoint {path} {kind}.")
            file.seek(0)
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except OSError:
                raise
            except Exception as error:  # torch has many classes for a bad file
                raise RuntimeError(f"the checkpoint {path} {_why_not_loaded(file, error)}.") from error
    except OSError as error:
        raise type(error)(f"the checkpoint {path} cannot be read ({error.strerror or error}).") from error


# ---- the file


def _kind(file: BinaryIO) -> str | None:
    """None for what torch.load may read, "safetensors", or what else the file is and what to do about it."""
    head = file.read(512)
    size = file.seek(0, os.SEEK_END)
    again = "copy or download it again"
    if size == 0:
        return f"is empty; {again}"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is a web page (HTML or XML), not a checkpoint; download the file itself, by its raw or download link"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return "safetensors"
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(file):
            return f"is cut off after {size} bytes; {again}"
        with zipfile.ZipFile(file) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            return (
                "is a TorchScript archive; load it with torch.jit.load(...) and save its state_dict() with torch.save"
            )
        if "data.pkl" not in names:
            return (
                "is a zip archive that torch.save did not write; give a file of torch.save(model.state_dict(), ...)"
                ", or what torch.export.load(...).state_dict gives for a .pt2 file"
            )
    return None


def _read_safetensors(file: BinaryIO, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise RuntimeError(
            f"the checkpoint {path} is in the safetensors format, which needs a package: pip install safetensors."
        ) from error
    file.seek(0)
    try:
        return dict(safetensors.torch.load(file.read()))
    except Exception as error:  # its own class, and more
        raise RuntimeError(
            f"the checkpoint {path} is a damaged safetensors file ({error}); copy or download it again."
        ) from error


def _why_not_loaded(file: BinaryIO, error: Exception) -> str:
    """What torch.load refused, and what to do; torch's own text advises to let the file run code."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    is_dict = _is_dict(file)
    if isinstance(error, pickle.UnpicklingError) and found and is_dict is not None:
        save = "torch.save(torch.load(FILE, weights_only=False){}, NEW_FILE)"
        where = "in the project that wrote it, and only if you trust the file, run"
        if not is_dict:
            return (
                f"is a whole pickled object ({found[1]}), which only loads by running its code; {where} "
                f"{save.format('.state_dict()')}"
            )
        return (
            f"holds objects besides tensors ({found[1]}), which only load by running code; {where} "
            f"{save.format('[KEY]')} with the key of the state_dict"
        )
    if isinstance(error, pickle.UnpicklingError) and not _is_zip(file):
        return "is not a file that torch.save wrote; give one of torch.save(model.state_dict(), ...)"
    return f"is damaged or cut off ({_first_sentence(error)}); copy or download it again"


def _is_dict(file: BinaryIO) -> bool | None:
    """Whether the pickled object is a dict, whatever is in it; None if this is not a file of torch.save."""
    try:
        if _is_zip(file):
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                operations = pickletools.genops(archive.read(name))
        else:  # as before torch 1.6: a magic number, a version and the byte order come first
            file.seek(0)
            for _ in range(3):
                for _ in pickletools.genops(file):
                    pass
            operations = pickletools.genops(file)
        first, argument = next((op.name, value) for op, value, _ in operations if op.name not in ("PROTO", "FRAME"))
    except (ValueError, StopIteration, EOFError, zipfile.BadZipFile):
        return None
    return first == "EMPTY_DICT" or argument == "collections OrderedDict"


def _is_zip(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(2) == b"PK"


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


# ---- the state_dict


def _state_dict(found: Any, path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The parameters in what the file holds."""
    while isinstance(found, Mapping):
        inner = next((key for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
    if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
        return found
    if isinstance(found, Mapping):
        keys = ", ".join(map(str, list(found)[:_LISTED])) or "none"
        what = f"a dict without tensors (its keys: {keys})"
    else:
        what = f"a {type(found).__name__}"
    raise RuntimeError(
        f"the checkpoint {path} holds {what}, not a state_dict; write it with torch.save(model.state_dict(), ...)."
    )


def _canonical(key: str) -> str:
    """A key or a module's path without what DataParallel and torch.compile put into it."""
    parts = [part for part in key.split(".") if part != "_orig_mod"]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts)


def _renamed(names: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """From the file's names to the model's; each to itself where that would be ambiguous."""
    names, wanted = list(names), list(wanted)
    ours = {_canonical(name): name for name in wanted}
    if len(ours) < len(wanted) or len({_canonical(name) for name in names}) < len(names):
        return {name: name for name in names}
    return {name: ours.get(_canonical(name), name) for name in names}


def _adapt(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state_dict with the model's keys, and with torch's versions of the modules, by which old files are mended."""
    names = _renamed(state, model.state_dict())
    adapted = OrderedDict((names[key], value) for key, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):
        # A wrapper has a path of its own beside its content's: the longest path is the content's.
        paths = {_canonical(path): path for path, _ in model.named_modules()}
        versions = {paths.get(_canonical(path), path): metadata[path] for path in sorted(metadata, key=len)}
        adapted._metadata = versions  # type: ignore[attr-defined]
    return adapted


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and not nn.parameter.is_lazy(value)


def _misfits(state: Mapping[str, Any], live: Mapping[str, Any]) -> str:
    """The keys that do not fit, the first few by name; "" if all do."""
    misfits = [
        f"{key} has shape {list(state[key].shape)} in the file and {list(value.shape)} in the model"
        for key, value in live.items()
        if _is_plain(value) and isinstance(state.get(key), Tensor) and state[key].shape != value.shape
    ]
    misfits += [
        f"{key} has type {type(state[key]).__name__} in the file and is a tensor in the model"
        for key, value in live.items()
        if isinstance(value, Tensor) and key in state and not isinstance(state[key], Tensor)
    ]
    misfits += [f"{key} is missing in the file" for key in live if key not in state]
    misfits += [f"{key} is not in the model" for key in state if key not in live]
    more = f"; and {len(misfits) - _LISTED} more" if len(misfits) > _LISTED else ""
    return "; ".join(misfits[:_LISTED]) + more + "." if misfits else ""
