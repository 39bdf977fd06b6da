"""The package's layout: files and functions that a reader takes in at once, and no use of another module's private names."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

import torch2trt_adder

PACKAGE = pathlib.Path(torch2trt_adder.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 450, 60  # lines

# Longer functions, each with its reason.
LONG = {
    "make_parser": "one list of the subcommands' arguments",
}


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(PACKAGE))


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring, which has one line for each argument and error."""
    body = function.body
    documented = ast.get_docstring(function) is not None
    docstring = body[0].end_lineno - body[0].lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def private_uses(path: pathlib.Path) -> Iterator[str]:
    """Private names of the package's other modules: imported by name, or read from an imported module."""
    tree, modules = parse(path), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("torch2trt_adder")):
            yield from (a.name for a in node.names if a.name.startswith("_") and a.name not in ("_api", "__version__"))
            modules |= {a.asname or a.name for a in node.names}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules):
            continue
        ours = node.value.id.islower() and node.value.id != "host"  # host is torch2trt's module
        if ours and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file(path: pathlib.Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if code_lines(f) > MAX_FUNCTION and f.name not in LONG] == []
    assert list(private_uses(path)) == []


def test_the_checks_see(tmp_path: pathlib.Path) -> None:
    """The checks of this file find what they look for."""
    path = tmp_path / "module.py"
    path.write_text(
        'from . import other\nfrom .third import _a\n\n\ndef f():\n    """Two\n    lines."""\n    other._b()\n'
    )
    assert list(private_uses(path)) == ["_a", "other._b"]
    (function,) = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]
    assert code_lines(function) == 2
