"""Exported programs (.pt2) from files that nobody has vouched for.

`torch.export.load` runs what a hostile file asks for, in five ways: it unpickles parts of the file; it loads compiled code;
it evaluates symbolic extents and guards as Python; it resolves the operators' names in any module of torch; and it writes
names into the source of a function. `load` gives it a copy of the file that holds only what has passed the checks here.
"""

import ast
import contextlib
import functools
import io
import json
import logging
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from ..utils import files


class UnsafeProgram(ValueError):
    """The file holds what only its author's word makes safe."""


def load(path: pathlib.Path, trust: bool = False) -> torch.export.ExportedProgram:
    """The program in a .pt2 file that `torch.export.save` wrote.

    Args:
        path: the file.
        trust: load whatever torch loads, including code that the file brings.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or (`UnsafeProgram`) it cannot be loaded without running code of its own.
    """
    data = files.read(path)
    try:
        if not trust:
            data = _checked(data)
        with _quiet(), contextlib.nullcontext() if trust else _weights_only():
            return torch.export.load(io.BytesIO(data))
    except UnsafeProgram as error:
        raise UnsafeProgram(
            f"{path} may run code when it is loaded: {error}; add --trust if you know where the file is from."
        ) from error
    except Exception as error:  # torch has no class of its own for a bad file
        if "Weights only load failed" in str(error) or "weights_only" in str(error):
            raise UnsafeProgram(
                f"{path} may run code when it is loaded: it holds pickled objects other than tensors; add --trust if you "
                "know where the file is from."
            ) from error
        raise ValueError(f"{path} cannot be loaded as an exported program: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load refuses pickles of other things than tensors, whatever its caller asks for."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's traceback of an error that it then raises as another."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---- the archive


def _checked(data: bytes) -> bytes:
    """A copy of the archive with the entries that were checked: torch's own reader may see others in a crafted file."""
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(copy, "w") as checked:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise UnsafeProgram("it holds two entries of one name")
        for name in names:
            parts = name.split("/")
            if "aotinductor" in parts:
                raise UnsafeProgram("it holds compiled code")
            if parts[-1].startswith(("custom_obj", "opaque_obj")):
                raise UnsafeProgram("it holds pickled objects other than tensors")
            contents = archive.read(name)
            if name.endswith(".json") and "extra" not in parts and "extra_files" not in parts:
                _check_json(json.loads(contents))
            checked.writestr(name, contents)
    return copy.getvalue()


_TEXT_ONLY = ("metadata", "as_string", "as_strings", "torch_version")  # torch never evaluates these
_NAME = re.compile(r"[\w.:/<>\- ]*")


def _check_json(value: Any, key: str = "") -> None:
    """Refuses text that torch would evaluate, import or write into source, unless it is of a known, harmless form."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if not _NAME.fullmatch(name):
                raise UnsafeProgram(f"it holds the name {name[:60]!r}")
            if name not in _TEXT_ONLY or not _is_text(entry):
                _check_json(entry, name)
    elif isinstance(value, list):
        for entry in value:
            _check_json(entry, key)
    elif isinstance(value, str):
        if key == "expr_str":
            _check_expression(value)
        elif key == "guards_code":
            _check_guard(value)
        elif key in ("target", "as_operator"):
            _check_operator(value)
        elif value.startswith("["):
            _check_tree(json.loads(value))
        elif not _NAME.fullmatch(value) or ("__" in value and not value.isidentifier()):
            raise UnsafeProgram(f"it holds the text {value[:60]!r}")


def _is_text(value: Any) -> bool:
    """A text, or texts by keys that torch chooses; a tensor may have any name, that of a key of _TEXT_ONLY too."""
    if isinstance(value, dict):
        return "expr_str" not in value and all(isinstance(entry, str) for entry in value.values())
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


def _check_tree(value: Any) -> None:
    """A structure of inputs or outputs, whose "context" may name any module to import."""
    if isinstance(value, dict):
        if "__enum__" in value or "default_factory_module" in value:
            raise UnsafeProgram("the structure of its inputs or outputs names a module")
        for entry in value.values():
            _check_tree(entry)
    elif isinstance(value, list):
        for entry in value:
            _check_tree(entry)
    elif isinstance(value, str) and ("__enum__" in value or "default_factory_module" in value or "\\u" in value):
        raise UnsafeProgram("the structure of its inputs or outputs names a module")


# ---- what torch evaluates


@functools.cache
def _sympy_functions() -> frozenset[str]:
    """Expressions of sympy and of torch, which a symbolic extent is made of."""
    import sympy
    import torch.utils._sympy.functions as functions

    return frozenset(
        name
        for module in (sympy, functions)
        for name, entry in vars(module).items()
        if isinstance(entry, type) and issubclass(entry, sympy.Basic)
    )


def _check_expression(text: str) -> None:
    for node in _nodes(text):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in _sympy_functions():
                raise UnsafeProgram(f"it evaluates {text[:60]!r}")
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            raise UnsafeProgram(f"it evaluates {text[:60]!r}")


_GUARD_ATTRIBUTES = {"size", "stride", "storage_offset", "shape", "ndim", "dim", "numel", "dtype", "device", "item"}
_MATH_ATTRIBUTES = {"inf", "nan", "isnan", "isinf", "floor", "ceil", "trunc", "sqrt", "pow"}
_GUARD_FUNCTIONS = {"len", "abs", "min", "max", "int", "float", "bool"}


def _check_guard(text: str) -> None:
    for node in _nodes(text):
        harmless = True
        if isinstance(node, ast.Attribute):
            of_math = isinstance(node.value, ast.Name) and node.value.id == "math"
            harmless = node.attr in (_MATH_ATTRIBUTES if of_math else _GUARD_ATTRIBUTES)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            harmless = node.func.id in _GUARD_FUNCTIONS | _sympy_functions()
        elif isinstance(node, ast.Call):
            harmless = isinstance(node.func, ast.Attribute)
        if not harmless:
            raise UnsafeProgram(f"it evaluates {text[:60]!r}")


_HARMLESS = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.keyword, ast.Tuple, ast.List),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)


def _nodes(text: str) -> Iterator[ast.AST]:
    """The parts of an expression without lambdas, comprehensions, formatted strings and names of Python's own."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise UnsafeProgram(f"it evaluates {text[:60]!r}") from error
    for node in ast.walk(tree):
        bad_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isidentifier()
        bad_name = isinstance(node, ast.Name) and "__" in node.id
        if bad_text or bad_name or not isinstance(node, _HARMLESS):
            raise UnsafeProgram(f"it evaluates {text[:60]!r}")
        yield node


_PYTHON_OPERATORS = {
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "lshift", "rshift"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "invert", "getitem", "truth"),
}


def _check_operator(name: str) -> None:
    """An operator that is registered with torch, or arithmetic on extents."""
    module, _, rest = name.partition(".")
    parts = rest.split(".")
    if module == "_operator" and rest in _PYTHON_OPERATORS:
        return
    if module == "math" and rest.isidentifier() and "__" not in rest:
        return
    if module == "torch" and re.fullmatch(r"_?sym_\w+", rest) and "__" not in rest:
        return
    if module == "torch" and parts[0] == "ops" and not any(part.startswith("__") or not part for part in parts):
        operator: Any = torch
        for part in parts:
            operator = getattr(operator, part, None)
        if operator is None:
            raise ValueError(f"its operator {name} is not known here: import the package that defines it")
        if isinstance(operator, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
            return
    raise UnsafeProgram(f"its graph calls {name[:60]!r}")
