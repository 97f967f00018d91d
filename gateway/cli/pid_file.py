"""The file that says which process serves, for whoever sends it signals (`gateway run --pid-file`)."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from types import TracebackType


class PidFile:
    """Written beside its place first and renamed when the process serves: it is whole or not there.

    A context manager: entering finds out whether it can be written at all (raises OSError), leaving removes it, if
    it still is this process's own.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.{os.getpid()}")
        self._text = f"{os.getpid()}\n"

    def __enter__(self) -> PidFile:
        if self._path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._draft)  # of a process that had our number
        with open(self._draft, "x") as file:  # never through a link that somebody put there
            file.write(self._text)
        return self

    def publish(self) -> None:
        """The process serves. Raises OSError."""
        os.replace(self._draft, self._path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._draft)
        with contextlib.suppress(OSError):
            if self._path.read_text() == self._text:
                os.unlink(self._path)
