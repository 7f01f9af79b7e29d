"""How does a file appear whole or not at all, whatever happens while it is written?"""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from effnet.value import UsageError


class FileError(UsageError):
    """A file that cannot be read or written; the message names it and says why."""


def write_atomically(path: Path, write: Callable[[Path], object], *, previous: Path | None = None) -> None:
    """Has `write` make a file beside `path`, flushes it to the disk and renames it to `path`, all or nothing.

    `previous`: the name that the file which was there gets. Raises `FileError` if any of it fails; no temporary
    file stays behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        if previous is not None:
            _keep(path, previous)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        untouched = "; the file that was there is untouched" if path.exists() else ""
        raise FileError(f"cannot write {path}: {reason(error)}{untouched}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def reason(error: OSError) -> str:
    """The system's words for `error`, without Python's error numbers and quotes."""
    return error.strerror or str(error)


def _flush(path: Path) -> None:
    """Returns when the disk has the file's bytes (or the folder's entries)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _keep(path: Path, previous: Path) -> None:
    """Gives the file a second name, in one step: at no time is there no file called `path`."""
    link = previous.with_name(f".{previous.name}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links: for a moment only the previous name exists, which `load` takes
        link = path
    os.replace(link, previous)
