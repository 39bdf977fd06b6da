"""Files that are never half there: written beside and renamed."""

import os
import pathlib


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


_COMPLAINT = "{path} cannot be written ({reason}); name another file."


def check_writable(path: pathlib.Path, complaint: str = _COMPLAINT) -> None:
    """Makes the folder and tries to write; before long work, so that nobody hears of it only afterwards.

    Raises:
        OSError: `complaint`, which names the file and the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise OSError(complaint.format(path=path, reason=error.strerror)) from error


def write(path: pathlib.Path, data: bytes) -> None:
    """Raises as `check_writable`."""
    check_writable(path)
    try:
        _partial(path).write_bytes(data)
        _partial(path).replace(path)
    except OSError as error:
        raise OSError(_COMPLAINT.format(path=path, reason=error.strerror)) from error
    finally:
        _partial(path).unlink(missing_ok=True)


def read(path: pathlib.Path) -> bytes:
    """
    Raises:
        OSError: naming the file and the reason.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}).") from error
