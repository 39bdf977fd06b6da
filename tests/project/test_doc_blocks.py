"""Every command and example of README and docs/ runs as it is written, from the folder of a clone, where this machine can.

The folder is a clone after README's install: the sources without a library, and a virtual environment with the package.
What cannot run here (no GPU, no such program, the network) is left out line by line, each with its reason in the output;
a page may mark a block that no machine of a test can run: ``<!-- not tested: the reason -->`` in the line before it.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import site
import subprocess
import sys
import textwrap

import pytest
import torch
from processes import ROOT

import torch2trt_adder
from torch2trt_adder import __version__, library
from torch2trt_adder.conversion import routes

PACKAGE = pathlib.Path(torch2trt_adder.__file__).resolve().parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```" in page.read_text()]
ENGINE = routes.missing()  # why no engine can be built here, or None
VERBS = ("convert", "build", "check", "bench", "inspect", "triton")  # those that need a GPU, or a plan that needed one


@dataclasses.dataclass
class Block:
    line: int
    language: str
    text: str
    untested: str | None


def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    pattern = r"^(?: *<!-- not tested: (.*?) -->\n)?( *)```(bash|python)\n(.*?)^\2```"
    return [
        Block(text[: found.start(4)].count("\n") + 1, found[3], textwrap.dedent(found[4]), found[1])
        for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The sources, and .venv with the installed package, its program, and the packages of this process."""
    folder = tmp_path_factory.mktemp("clone")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for part in ("torch2trt_adder", "benchmarks", "examples", "tests", "csrc", "docs"):
        shutil.copytree(PACKAGE if part == "torch2trt_adder" else ROOT / part, folder / part, ignore=ignore)
    venv = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    shutil.copytree(PACKAGE, packages / "torch2trt_adder", ignore=ignore)
    shutil.copy(library.path(), packages / "torch2trt_adder")
    info = packages / f"torch2trt_adder-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch2trt_adder\nVersion: {__version__}\n")
    # This process may have the package from a .pth file of its own, which must not come before that of .venv.
    others = [
        path for path in [*sys.path, *site.getsitepackages()] if path.endswith(("site-packages", "dist-packages"))
    ]
    (packages / "others.pth").write_text("\n".join(others))
    program = venv / "bin" / "torch2trt-adder"
    program.write_text(f"#!{venv}/bin/python\nimport sys\nfrom torch2trt_adder.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "models.py").write_text("from torch2trt_adder.models import resnet20 as make\n")
    return folder


def run(clone: pathlib.Path, *command: str) -> subprocess.CompletedProcess[str]:
    """In the clone, with .venv activated."""
    environment = {**os.environ, "PATH": f"{clone}/.venv/bin{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for name in ("PYTHONPATH", library.ENVIRONMENT_VARIABLE):
        environment.pop(name, None)
    return subprocess.run(command, check=False, cwd=clone, env=environment, capture_output=True, text=True, timeout=900)


# ---- Python: statement by statement, in the page's order, in one process

# What the pages' examples start from.
START = """
import torch, torch.nn.functional as F
from torch import nn
import torch2trt_adder
from torch2trt_adder import Adder2d
from torch2trt_adder.models import resnet20

torch.manual_seed(0)
x, weight, R, S, dilation, padding, stride = torch.randn(2, 3, 32, 32), torch.randn(4, 3, 3, 3), 3, 3, 1, 0, 1
input_channel, output_channel, kernel_size = 3, 4, 3
ranges = {"batch": (1, 8, 64)}
model = nn.Sequential(Adder2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8192, 10))
torch.save(resnet20(num_classes=10).state_dict(), "resnet20.pth")
device = "cuda" if torch.cuda.is_available() else "cpu"
x, weight, model = x.to(device), weight.to(device), model.to(device)
scaler = torch.amp.GradScaler(device)
"""
BEFORE_EACH_BLOCK = """
if isinstance(model, nn.Module):
    model.eval()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
loss = model(x.to(next(model.parameters()).device)).square().mean() if isinstance(model, nn.Module) else None
"""
NEEDS = {
    r"\.cuda\(|[\"']cuda": None if torch.cuda.is_available() else "no NVIDIA GPU",
    r"\b(build_engine|Engine|convert)\(": ENGINE,
    **{
        rf"\b{name}\b": None if importlib.util.find_spec(name) else f"{name} is not installed"
        for name in ("torch2trt", "tensorrt", "torch_tensorrt", "onnx")
    },
    r"\bTRTModule\b": None if importlib.util.find_spec("torch2trt") else "torch2trt is not installed",
    r"\bexport_onnx\(": None if importlib.util.find_spec("onnxscript") else "onnxscript is not installed",
}


def program(page: pathlib.Path) -> tuple[str, list[str]]:
    """The page's Python as one program, and what was left out of it."""
    lines, left_out, unbound = [START], [], set()
    for block in blocks(page):
        if block.language != "python":
            continue
        if block.untested is not None:
            left_out.append(f"line {block.line}: {block.untested}")
            continue
        lines.append(BEFORE_EACH_BLOCK)
        for statement in ast.parse(block.text).body:
            code, at = ast.unparse(statement), f"line {block.line + statement.lineno - 1}"
            names = {node.id: type(node.ctx) for node in ast.walk(statement) if isinstance(node, ast.Name)}
            reason = next((why for what, why in NEEDS.items() if why is not None and re.search(what, code)), None)
            used = sorted(unbound & {name for name, how in names.items() if how is not ast.Store})
            if reason is None and used:
                reason = f"{used[0]} was made by a line that is left out"
            bound = {name for name, how in names.items() if how is ast.Store}
            unbound = unbound - bound if reason is None else unbound | (bound - {"model", "x"})
            if reason is None:
                lines.append(f"# {at}\n{code}")
            else:
                left_out.append(f"{at}: {reason}: {code.splitlines()[0]}")
    return "\n".join(lines), left_out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python(page: pathlib.Path, clone: pathlib.Path) -> None:
    code, left_out = program(page)
    print("\n".join(["Left out:", *left_out]))
    if "\n# line " not in code:
        pytest.skip(f"no Python that this machine can run ({len(left_out)} statements left out)")
    result = run(clone, "python", "-c", code)
    assert result.returncode == 0, f"{page.name}: {result.stderr}\n{code}"


# ---- bash: command by command, in one shell a block

ELSEWHERE = r"\b(pip (install|download)|git clone|pre-commit|-m venv|docker)\b"


def script(block: Block) -> tuple[list[str], list[str]]:
    """The commands of a block that run here, and the others, with the reason."""
    commands, left_out = [], []
    text = block.text.replace("\\\n", " ")
    for line in [text] if re.search(r"^for ", text, re.MULTILINE) else text.splitlines():
        command = re.sub(r"(^|\s)#.*", "", line) if "\n" not in line else line
        if not command.strip():
            continue
        words = re.sub(r"^(\w+=\S*\s+)+", "", command.strip()).split()
        adder = re.search(r"(?:torch2trt-adder|-m torch2trt_adder) (\w+)", command)
        reason = None
        if left_out and left_out[-1].startswith("installs"):
            reason = left_out[-1]
        elif re.search(ELSEWHERE, command):
            reason = "installs packages or needs the network"
        elif "pytest" in command or ".ci/run" in command:
            reason = "runs these tests"
        elif adder and adder[1] in VERBS and ENGINE is not None:
            reason = ENGINE
        elif "$(" not in command and not re.match(r"export|\w+=", command) and shutil.which(words[0]) is None:
            reason = None if words[0].startswith(".venv/") else f"{words[0]} is not installed"
        if reason is not None:
            left_out.append(f"{reason}: {command.strip()}")
        elif re.search(r"\b(benchmarks|examples)/\w+\.py", command):
            commands.append(f"{command} --help >/dev/null")  # minutes of work; its options are read
        else:
            commands.append(command)
    if any(command.startswith("LIB=") for command in commands):
        commands.append('test -f "$LIB"')
    return commands, left_out


BASH = [(page, block) for page in PAGES for block in blocks(page) if block.language == "bash"]


@pytest.mark.parametrize("page, block", BASH, ids=[f"{page.name}-{block.line}" for page, block in BASH])
def test_bash(page: pathlib.Path, block: Block, clone: pathlib.Path) -> None:
    if block.untested is not None:
        pytest.skip(block.untested)
    commands, left_out = script(block)
    if not commands:
        pytest.skip("; ".join(left_out))
    result = run(clone, "bash", "-euo", "pipefail", "-c", "\n".join(commands))
    assert result.returncode == 0, f"{page.name}, line {block.line}: {commands}\n{result.stdout}{result.stderr}"


def test_blocks_are_found() -> None:
    """Against a pattern that finds nothing: README's first command and the examples of two pages."""
    assert any("torch2trt-adder demo" in block.text for page, block in BASH if page.name == "README.md")
    ran = [program(page)[0].count("\n# line ") for page in PAGES]
    assert sum(ran) >= 8 and sum(count > 0 for count in ran) >= 2, ran


# ---- what people type in a clone


@pytest.mark.parametrize(
    "command",
    [
        "python -c 'import torch, torch2trt_adder as t; t.Adder2d(1, 2, 3)(torch.ones(1, 1, 5, 5))'",
        "python -m torch2trt_adder info --json",
        ".venv/bin/torch2trt-adder info --json",
        "python examples/train_cifar.py --data digits --model addernet_mnist --samples 16 --batch 16 --epochs 1",
        "python benchmarks/bench_training.py --help",
        "python benchmarks/check_routes.py --help",
    ],
)
def test_in_the_clone(clone: pathlib.Path, command: str) -> None:
    result = run(clone, "bash", "-c", command)
    assert result.returncode == 0, result.stderr
    if "--json" in command:
        assert json.loads(result.stdout)["result"]["library"]["state"].startswith(f"{clone}/.venv/")
