"""Where records go: standard error and files here, syslog in `syslog.py`.

A sink never raises into the session that logs and never makes it wait for a disk or a peer that is away: what cannot
be written is counted, and said once writing works again.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from typing import Final, Literal

from gateway.observe import metrics
from gateway.observe.lines import Format, Render, as_json, as_text, rfc3339

Level = Literal["debug", "info", "notice", "warning", "error", "critical"]

LEVELS: Final[dict[str, int]] = {
    "debug": 10, "info": 20, "notice": 25, "warning": 30, "error": 40, "exception": 40, "critical": 50,
}  # fmt: skip
"""Levels of records and of sinks; no record is a notice."""


class Sink(ABC):
    """Takes lines of records of `level` and above, each made by `render`."""

    __slots__ = ("error", "lost", "render", "threshold")

    def __init__(self, level: Level, render: Render) -> None:
        self.threshold = LEVELS[level]
        self.render = render
        self.lost = 0
        self.error = ""

    @abstractmethod
    def write(self, line: bytes, level: int, now: float) -> None:
        """Write a line at once; `level` is one of LEVELS, `now` seconds since 1970. Does not raise."""

    def reopen(self) -> None:
        """Follow a file that was moved away. Raises OSError; the sink then stays what it was."""
        return  # what is no file stays where it is

    @abstractmethod
    def close(self) -> None:
        """Say what was lost if that works by now, and give everything back."""

    def lose(self, lines: int) -> None:
        """So many could not be written."""
        self.lost += lines
        metrics.counter("gateway_log_lines_lost_total").add(lines)

    def notice(self) -> bytes:
        """The line that says what was lost."""
        now = time.time()
        return self.render(
            {"time": rfc3339(now), "level": "error", "logger": "gateway.log", "record": "lost_records",
             "count": self.lost, "error": self.error},
            now,
        )  # fmt: skip


class Stream(Sink):
    """A file, opened to append, or a descriptor of somebody else's (standard error).

    A line is one `write`, so that lines of several processes do not mix.
    """

    __slots__ = ("_descriptor", "_file", "_torn")

    def __init__(
        self, format: Format = "json", level: Level = "info", *, file: str | None = None, descriptor: int = 2
    ) -> None:
        """Raises OSError if the file cannot be opened."""
        super().__init__(level, as_json if format == "json" else as_text)
        self._file = file
        self._descriptor = descriptor if file is None else _opened(file)
        self._torn = False  # the last write ended inside a line

    def reopen(self) -> None:
        """Open the file again, after it was moved away (logrotate)."""
        if self._file is not None:
            fresh = _opened(self._file)
            os.close(self._descriptor)
            self._descriptor, self._torn = fresh, False

    def write(self, line: bytes, level: int, now: float) -> None:
        """One line and its end."""
        data = line + b"\n"
        if self.lost:
            data = b"%b%b\n%b" % (b"\n" if self._torn else b"", self.notice(), data)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:] if written else data)
        except OSError as error:
            self.lose(1)
            self.error = error.strerror or str(error)
            self._torn = self._torn or written > 0
        else:
            self.lost, self._torn = 0, False

    def close(self) -> None:
        """Nothing waits to be written; only what was lost is still to be said. Files are closed."""
        if self._file is None:
            return
        if self.lost:
            notice = self.notice()
            self.lost = 0
            self.write(b"\n" + notice if self._torn else notice, LEVELS["error"], 0.0)
        os.close(self._descriptor)


def _opened(file: str) -> int:
    return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
