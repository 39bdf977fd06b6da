"""Files are written whole or not at all: a temporary file in the same folder, then a rename."""

import contextlib
import errno
import os
import pathlib
import secrets
import stat
from collections.abc import Mapping

_COMPLAINT = "{path} cannot be written ({reason}); name another file."


def check_writable(path: pathlib.Path, complaint: str = _COMPLAINT) -> None:
    """Checks that `write` can write `path`, and leaves nothing; call it before long work.

    Raises:
        OSError: `complaint`, which names the file and the reason.
    """
    try:
        target, _ = _target(path)
        folder = target.parent
        while not folder.exists():  # `write` makes the missing ones
            folder = folder.parent
        file, partial = _create(folder)
        os.close(file)
        partial.unlink()
    except OSError as error:
        raise OSError(complaint.format(path=path, reason=error.strerror)) from error


def write(path: pathlib.Path, data: bytes, executable: bool = False) -> None:
    """Writes `data` to `path`: readers see the old contents or the new ones, never a part.

    Follows links, makes missing folders, keeps the permissions and the owner of a file that is there, and gives a new file
    those of the umask. Threads and processes may write one path at a time: the last one wins. Leaves nothing after a failure.

    Args:
        path: of a regular file or of none; a device, pipe or folder is refused.
        data: the whole contents.
        executable: whoever may read the file may also run it.

    Raises:
        OSError: a sentence with the file and the reason.
    """
    partial: pathlib.Path | None = None
    try:
        target, old = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = _create(target.parent)
        with open(descriptor, "wb") as file:
            file.write(data)
            mode = stat.S_IMODE((old or os.fstat(descriptor)).st_mode)
            if old is not None:
                _keep_owner(descriptor, old)
            os.fchmod(descriptor, mode | (mode & 0o444) >> 2 if executable else mode)
        partial.replace(target)
    except OSError as error:
        raise OSError(_COMPLAINT.format(path=path, reason=error.strerror)) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def read(path: pathlib.Path) -> bytes:
    """The contents of a file.

    Raises:
        OSError: a sentence with the file and the reason.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}).") from error


def check_readable(path: pathlib.Path) -> None:
    """Checks that `path` is a file that can be read; call it before long work.

    Raises:
        OSError: a sentence with the file and the reason.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.stat()
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}).") from error


def check_apart(outputs: Mapping[str, pathlib.Path], inputs: Mapping[str, pathlib.Path]) -> None:
    """Refuses an output that would replace an input or another output; call it before any work.

    Args:
        outputs: the files to write, by what they are, as "the engine".
        inputs: the files to read, likewise.

    Raises:
        ValueError: two of them are one file, by whatever name or link.
    """
    taken = dict(inputs)
    for what, path in outputs.items():
        for other, there in taken.items():
            if is_same(path, there):
                raise ValueError(f"{path} is {other} itself; name another file for {what}.")
        taken[what] = path


def is_same(path: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two paths lead to one file, through symbolic and hard links too; neither has to exist."""
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return False


def _target(path: pathlib.Path) -> tuple[pathlib.Path, os.stat_result | None]:
    """The file that `path` leads to, and its state if it is there.

    Raises:
        OSError: it is there and must not be replaced.
    """
    target = pathlib.Path(os.path.realpath(path))
    try:
        state = target.lstat()
    except FileNotFoundError:
        return target, None
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if stat.S_ISLNK(state.st_mode):
        raise OSError(errno.ELOOP, "its links go in a circle")
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "it is a device, pipe or socket")
    if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, "it is read-only")
    return target, state


def _create(folder: pathlib.Path) -> tuple[int, pathlib.Path]:
    """A new file in `folder` with the permissions of the umask (tempfile's are 0600), and a name that no one else has."""
    path = folder / f".{secrets.token_hex(8)}.partial"
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), path


def _keep_owner(descriptor: int, old: os.stat_result) -> None:
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with contextlib.suppress(PermissionError):  # only root may give files away
            os.fchown(descriptor, old.st_uid, old.st_gid)
