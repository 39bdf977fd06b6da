"""files.py: what is written is whole, and nothing is lost that was there."""

import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading

import pytest

from torch2trt_adder.utils import files

NEW = b"new contents"


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: pathlib.Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_links_are_followed_and_permissions_kept(tmp_path: pathlib.Path) -> None:
    target, link, second = tmp_path / "target", tmp_path / "link", tmp_path / "second"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to("target")
    second.symlink_to(link)
    files.check_writable(second)
    files.write(second, NEW)
    assert link.is_symlink() and second.is_symlink() and target.read_bytes() == NEW and mode(target) == 0o640
    files.write(target, NEW, executable=True)
    assert mode(target) == 0o750  # whoever may read it
    dangling = tmp_path / "dangling"
    dangling.symlink_to("out/new")
    files.write(dangling, NEW)
    assert dangling.is_symlink() and (tmp_path / "out" / "new").read_bytes() == NEW
    assert names(tmp_path) == ["dangling", "link", "out", "second", "target"]


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_permissions_of_the_umask(mask: int, expected: int, tmp_path: pathlib.Path) -> None:
    old = os.umask(mask)
    try:
        files.write(tmp_path / "x", NEW)
        files.write(tmp_path / "run", NEW, executable=True)
    finally:
        os.umask(old)
    assert mode(tmp_path / "x") == expected
    assert mode(tmp_path / "run") == expected | (expected & 0o444) >> 2


def bad_target(kind: str, folder: pathlib.Path) -> pathlib.Path:
    path = folder / "bad"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))  # a path of at most 107 bytes
    elif kind == "link to a device":
        path.symlink_to(os.devnull)
    elif kind == "circle":
        path.symlink_to("bad")
    elif kind == "below a file":
        path.touch()
        return path / "x"
    elif kind == "long name":
        return folder / ("x" * 300)
    return path


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("folder", "folder"),
        ("fifo", "pipe"),
        ("socket", "socket"),
        ("link to a device", "device"),
        ("circle", "circle"),
        ("below a file", "Not a directory"),
        ("long name", "too long"),
    ],
)
def test_what_cannot_be_replaced_is_refused(kind: str, reason: str, tmp_path: pathlib.Path) -> None:
    path = bad_target(kind, tmp_path)
    before = [(entry.name, entry.lstat().st_mode) for entry in tmp_path.iterdir()]
    for action in (lambda: files.check_writable(path), lambda: files.write(path, NEW)):
        with pytest.raises(
            OSError, match=rf"bad.* cannot be written \(.*{reason}.*\); name another file|x{{300}}.*{reason}"
        ):
            action()
    assert [(entry.name, entry.lstat().st_mode) for entry in tmp_path.iterdir()] == before


def test_read_only_files_and_folders(tmp_path: pathlib.Path) -> None:
    """As nobody where this is root, who may write everywhere."""
    if os.geteuid() != 0:
        return check_read_only(tmp_path)
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
        try:
            check_read_only(pathlib.Path(folder))
        finally:
            os.seteuid(0)


def check_read_only(folder: pathlib.Path) -> None:
    path, locked = folder / "read-only", folder / "locked"
    path.write_bytes(b"old")
    path.chmod(0o444)
    locked.mkdir(mode=0o555)
    for bad, reason in (
        (path, "read-only"),
        (locked / "x", "Permission denied"),
        (locked / "a" / "x", "Permission denied"),
    ):
        for action in (lambda bad=bad: files.check_writable(bad), lambda bad=bad: files.write(bad, NEW)):
            with pytest.raises(
                OSError, match=rf"{bad} cannot be written \({'it is ' if bad is path else ''}{reason}\)"
            ):
                action()
    assert path.read_bytes() == b"old" and names(folder) == ["locked", "read-only"] and names(locked) == []


def test_the_check_leaves_nothing(tmp_path: pathlib.Path) -> None:
    files.check_writable(tmp_path / "a" / "b" / "x")
    assert names(tmp_path) == []


def test_threads_that_write_one_path(tmp_path: pathlib.Path) -> None:
    """None fails, and a reader sees one of them whole at any time."""
    path, contents = tmp_path / "x", [bytes([i]) * 50_000 for i in range(4)]
    files.write(path, contents[0])
    failures: list[Exception] = []

    def work(data: bytes) -> None:
        try:
            for _ in range(25):
                files.check_writable(path)
                files.write(path, data)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert files.read(path) in contents
    assert not failures and names(tmp_path) == ["x"]


def test_nothing_is_left_by_a_failure(tmp_path: pathlib.Path) -> None:
    """A file that grows past the limit of the process, as on a full disk."""
    code = (
        "import pathlib, resource, signal, sys; from torch2trt_adder.utils import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: files.write(pathlib.Path(sys.argv[1]), bytes(5000))\n"
        "except OSError as error: print(error)"
    )
    (tmp_path / "x").write_bytes(b"old")
    root = pathlib.Path(files.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], cwd=root, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'x'} cannot be written (File too large); name another file.\n", done.stderr
    assert (tmp_path / "x").read_bytes() == b"old" and names(tmp_path) == ["x"]


@pytest.mark.usefixtures("ctrl_c")
def test_nothing_is_left_by_ctrl_c(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes once everything but the rename is done."""
    (tmp_path / "x").write_bytes(b"old")
    change = os.fchmod

    def interrupted(descriptor: int, mode: int) -> None:
        change(descriptor, mode)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fchmod", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "x", NEW)
    assert (tmp_path / "x").read_bytes() == b"old" and names(tmp_path) == ["x"]


def test_one_file_by_another_name_is_the_same(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, plan = pathlib.Path("model.onnx"), pathlib.Path("x.plan")
    model.write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    pathlib.Path("soft").symlink_to("model.onnx")
    os.link(model, "hard")
    pathlib.Path("here").symlink_to(".")
    for other in ("soft", "hard", "here/model.onnx", "folder/../model.onnx", tmp_path / "model.onnx", "./model.onnx"):
        with pytest.raises(ValueError, match="is the ONNX file itself; name another file for the engine"):
            files.check_apart({"the engine": pathlib.Path(other)}, {"the ONNX file": model})
    for other in ("x.plan", "here/x.plan"):  # neither is there yet
        with pytest.raises(ValueError, match="is the engine itself; name another file for the timing cache"):
            files.check_apart({"the engine": plan, "the timing cache": pathlib.Path(other)}, {"the ONNX file": model})
    files.check_apart({"the engine": plan, "the timing cache": pathlib.Path("t")}, {"the ONNX file": model})
