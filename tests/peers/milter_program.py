"""Filters that are programs, on a Unix socket or a loopback port; and the one that records (recording_milter.py).

    with scratch() as folder, RecordingMilter(folder, "noreply:header") as milter:
        ...                                  # milter.address: for Postfix's smtpd_milters and for a `milter` stage
        milter.wait_events("eom")
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.peers.process import LIMIT, Process, free_port, port_open, wait_for
from tests.peers.require import missing

PROGRAM = Path(__file__).with_name("recording_milter.py")
Event = dict[str, object]


def socket_open(path: Path) -> Callable[[], bool]:
    """An event: somebody listens on the Unix socket."""

    def connect() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            probe.connect(str(path))
            return True

    return connect


class MilterProgram(Process):
    """A filter on libmilter.

    `address` is how an MTA names its socket, `place` how libmilter does. With `inet` it is a port, else a Unix socket
    in `folder`.
    """

    def __init__(self, folder: Path, *, inet: bool = False, name: str = "milter") -> None:
        super().__init__(folder)
        self.path = folder / f"{name}.sock"
        self.port = free_port() if inet else 0
        self.address = f"inet:127.0.0.1:{self.port}" if inet else f"unix:{self.path}"
        self.place = f"inet:{self.port}@127.0.0.1" if inet else f"unix:{self.path}"
        self._listens = port_open(self.port) if inet else socket_open(self.path)

    def run(self, command: Sequence[str]) -> None:
        """Start it and wait until it listens; the connection that finds out causes no event."""
        self.path.unlink(missing_ok=True)
        self.launch(command, self._listens)

    def stop(self, number: int = signal.SIGTERM, limit: float = LIMIT) -> int | None:
        """As for every process. libmilter notices SIGTERM when a connection comes, or within five seconds."""
        process = self._process
        if process is not None and process.poll() is None and number == signal.SIGTERM:
            os.killpg(process.pid, number)

            def ended() -> bool:
                if process.poll() is None:
                    with contextlib.suppress(OSError):
                        self._listens()
                return process.poll() is not None

            with contextlib.suppress(TimeoutError):
                wait_for(ended, "the filter's end", limit)
        return super().stop(number, limit)


class RecordingMilter(MilterProgram):
    """The filter of recording_milter.py with its options; skips the test where pymilter is not installed."""

    def __init__(self, folder: Path, *options: str, inet: bool = False, name: str = "recorder") -> None:
        super().__init__(folder, inet=inet, name=name)
        if importlib.util.find_spec("Milter") is None:
            missing("pymilter is not installed")
        self._options = options
        self._journal = folder / f"{name}.jsonl"

    def start(self) -> RecordingMilter:
        """Start it; after this it accepts connections."""
        self.run([sys.executable, str(PROGRAM), self.place, str(self._journal), *self._options])
        return self

    def events(self, *names: str) -> list[Event]:
        """What it recorded so far, or only the events of these names."""
        lines = self._journal.read_text("ascii").splitlines(keepends=True) if self._journal.exists() else []
        whole: list[Event] = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in whole if not names or event["event"] in names]

    def sessions(self, *names: str) -> list[list[Event]]:
        """The same, a list for each of the MTA's connections."""
        sessions: dict[object, list[Event]] = {}
        for event in self.events():
            if event["session"]:
                sessions.setdefault(event["session"], []).append(event)
        return [[event for event in session if not names or event["event"] in names] for session in sessions.values()]

    def wait_events(self, name: str, count: int = 1) -> list[Event]:
        """Wait until it recorded `count` events of this name."""
        wait_for(lambda: len(self.events(name)) >= count, f"{count} events {name}")
        return self.events(name)
