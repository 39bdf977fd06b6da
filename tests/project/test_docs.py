"""The documentation against the project: links lead somewhere, and names in examples exist."""

import ast
import importlib
import pathlib
import re
import textwrap

import pytest
from processes import ROOT

import torch2trt_adder

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _anchors(page: pathlib.Path) -> set[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {_anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}


def _python_blocks(page: pathlib.Path) -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


@pages
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in _anchors(linked), f"{page.name} links to {target}, which has no such heading"


@pages
def test_examples_are_python_with_names_that_exist(page: pathlib.Path) -> None:
    for block in _python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch2trt_adder":
                module = importlib.import_module(node.module)
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch2trt_adder":
                module, names = torch2trt_adder, [node.attr]
            else:
                continue
            for name in names:
                assert hasattr(module, name), f"{page.name} uses {module.__name__}.{name}, which does not exist"


def test_readme_and_docs_have_examples() -> None:
    assert sum(len(_python_blocks(page)) for page in PAGES) >= 10


@pages
def test_paths_exist(page: pathlib.Path) -> None:
    """Every path in backticks is one of the project's."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    roots = "csrc|torch2trt_adder|tests|benchmarks|examples|docs|\\.ci"
    for path in re.findall(rf"`((?:{roots})/[\w./-]*)`", prose):
        if "NAME" not in path:
            assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"
