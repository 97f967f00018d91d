"""Starting a real program as a peer: in its own session, ready by an event, ended by its own process id.

Waiting here means polling for an event under a deadline, and blocks: in an async test whose loop must go on, call
it by `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from gateway.testing.gateway import free_port as free_port

LIMIT = 15.0
"""Seconds for a program to start, stop, or write what a test waits for."""

_PAUSE = 0.005

P = TypeVar("P", bound="Process")


@contextlib.contextmanager
def scratch(prefix: str = "peer-") -> Iterator[Path]:
    """A folder that unprivileged programs can reach (pytest's own are closed to other users)."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(event: Callable[[], object], what: str, limit: float = LIMIT) -> None:
    """Poll until `event()` is true; an OSError means not yet. Raises TimeoutError with `what`."""
    end = time.monotonic() + limit
    while True:
        with contextlib.suppress(OSError):
            if event():
                return
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen in {limit:g} seconds")
        time.sleep(_PAUSE)


def port_open(port: int, host: str = "127.0.0.1") -> Callable[[], bool]:
    """An event: somebody listens on the port."""

    def connect() -> bool:
        with socket.create_connection((host, port), 1):
            return True

    return connect


def group_members(group: int) -> list[int]:
    """Living members of a process group; a slow init may keep dead ones as zombies for seconds."""
    members = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            state, _, process_group = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if state != "Z" and int(process_group) == group:
            members.append(int(name))
    return members


class Process(ABC):
    """A program that runs until `stop`; use it as a context manager. Its output goes to `output`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / f"{type(self).__name__.lower()}.out"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id, and id of its session and process group."""
        assert self._process is not None, "not started"
        return self._process.pid

    def launch(
        self, command: Sequence[str], ready: Callable[[], object], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it and wait until it is ready. Raises RuntimeError with its output if it ends instead."""
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env=environment,
            )  # fmt: skip

        def ready_or_dead() -> object:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with status {self._process.returncode}: {self.said()}")
            return ready()

        try:
            wait_for(ready_or_dead, f"readiness of {command[0]}")
        except BaseException as error:
            self.stop(signal.SIGKILL)
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"{error}: {self.said()}") from None
            raise

    def said(self) -> str:
        """The end of its output, for error messages."""
        return self.output.read_text(errors="replace")[-3000:] if self.output.exists() else ""

    def stop(self, number: int = signal.SIGTERM, limit: float = LIMIT) -> int | None:
        """End it and everything in its process group; its exit status, None if it was not running. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.poll() is None:
            os.killpg(process.pid, number)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait(limit)
        if group_members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            wait_for(lambda: not group_members(process.pid), f"the end of process group {process.pid}", limit)
        return status

    @abstractmethod
    def start(self: P) -> P:
        """Start it and wait until it is ready; each kind of program says how."""

    def __enter__(self: P) -> P:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
