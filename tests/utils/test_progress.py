"""progress.py: a bar on a terminal, plain lines elsewhere."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from torch2trt_adder.utils import progress

CODE = """
import time
from torch2trt_adder.utils import progress
progress._PATIENCE, progress._NEXT_LINE = 0, 0.2
with progress.elapsed("Building x") as shown:
    shown.phase("timing", 7)
    shown.step()
    time.sleep(0.5)
"""


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.elapsed("Building x"):
        pass
    assert capsys.readouterr().err == ""


def test_a_log_has_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0)
    with progress.elapsed("Training", total=3, unit="batches") as shown:
        for _ in range(3):
            shown.step("loss 0.25")
        time.sleep(0.3)
    text = capsys.readouterr().err
    assert re.fullmatch(
        r"(Training: \d+ s, batches [0-3]/3(, loss 0.25)?\n){2}", text
    )  # one every ten seconds, and the last
    assert text.endswith(" s, batches 3/3, loss 0.25\n")
    with pytest.raises(KeyError), progress.elapsed("Training", total=3):
        raise KeyError
    assert "3/3" not in capsys.readouterr().err


def test_a_terminal_has_a_bar() -> None:
    """On a real one, whose line is empty in the end."""
    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen([sys.executable, "-c", CODE], stderr=theirs) as process:
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    assert process.returncode == 0
    assert re.search(rb"\rBuilding x: \d+ s, timing 1/7 \[##\.+\]", shown) and b"\n" not in shown


@pytest.mark.parametrize("stderr", ["closed", "full"])
def test_a_stderr_that_takes_nothing(stderr: str) -> None:
    redirect = {"closed": "2>&-", "full": "2>/dev/full"}[stderr]
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, CODE], stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout == b""
