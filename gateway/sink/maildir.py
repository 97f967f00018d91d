"""Writes messages to a Maildir: whole and on disk, or not at all."""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path

_counter = itertools.count(1)


class Maildir:
    """One Maildir; its folders are made with mode 0700, its files with 0600. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._host = socket.gethostname().replace("/", "\\057").replace(":", "\\072")
        for folder in (path, path / "tmp", path / "new", path / "cur"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def store(self, head: bytes, content: bytes) -> Path:
        """Write a message; when this returns it is in `new` and on disk. Raises OSError, leaving nothing behind."""
        now = time.time_ns()
        name = f"{now // 10**9}.M{now % 10**9 // 1000}P{os.getpid()}Q{next(_counter)}.{self._host}"
        temporary, final = self.path / "tmp" / name, self.path / "new" / name
        try:
            with open(temporary, "xb", opener=_private) as file:
                file.write(head)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, final)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(self.path / "new", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return final


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
