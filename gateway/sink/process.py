"""Starts and stops the embedded upstream for the gateway: one child process, one private unix socket.

The child holds one end of a socket pair and ends when ours is closed, however we end. It is a new session, so that
Ctrl-C at a terminal reaches the gateway only, which stops the child after its last session.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

START_TIMEOUT: Final = 20.0
STOP_TIMEOUT: Final = 5.0
_LONGEST_PATH: Final = 100  # a unix socket's path ends at 107 octets

_PACKAGE_ROOT: Final = str(Path(__file__).resolve().parents[2])


class EmbeddedServer:
    """One embedded upstream; needs no event loop.

    `account`: user id, group id and supplementary groups that it runs as where we are root; the Maildir, if it is new,
    and the socket's folder are given to it. `environment` is what it has instead of ours.
    """

    def __init__(
        self,
        hostname: str = "sink.localhost",
        *,
        account: tuple[int, int, tuple[int, ...]] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._hostname = hostname
        self._environment = environment
        self._account = account if os.geteuid() == 0 else None
        self.address = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: socket.socket | None = None
        self._folder = ""
        self._made: tuple[int, int] | None = None  # the folder's device and inode

    @property
    def pid(self) -> int | None:
        """Process id, None while it is not started."""
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self, maildir: str | os.PathLike[str], timeout: float = START_TIMEOUT) -> str:
        """Start it and wait until it listens: its address, `unix:/path`; one that has ended has it again.

        Raises RuntimeError if it ends instead, with its reason, TimeoutError if it is not ready in time; nothing of
        it is left then but the address of one that had started before.
        """
        if self.running:
            raise RuntimeError("the embedded server is started already")
        self._end()
        self._make_folder()
        if self._account is not None:
            _give(self._folder, self._account)
            if not Path(maildir).exists():
                Path(maildir).mkdir(parents=True, mode=0o700)
                _give(maildir, self._account)
        self._lifeline, theirs = socket.socketpair()
        command = [
            sys.executable, "-P", "-m", "gateway.sink", "--maildir", os.path.abspath(maildir),
            "--listen", f"unix:{self._folder}/smtp", "--hostname", self._hostname, "--ready-fd", str(theirs.fileno()),
        ]  # fmt: skip
        path = os.pathsep.join(filter(None, (_PACKAGE_ROOT, os.environ.get("PYTHONPATH"))))
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    env={**(os.environ if self._environment is None else self._environment), "PYTHONPATH": path},
                    user=self._account[0] if self._account is not None else None,
                    group=self._account[1] if self._account is not None else None,
                    extra_groups=self._account[2] if self._account is not None else None,
                )
            self.address = self._announced(self._lifeline, timeout)
            return self.address
        except BaseException:
            self._end()
            if not self.address:
                self._remove_folder()
            raise

    def stop(self) -> None:
        """End it, by its own process id. Idempotent."""
        self._end()
        self._remove_folder()
        self.address = ""

    def _end(self) -> None:
        process, self._process = self._process, None
        lifeline, self._lifeline = self._lifeline, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if lifeline is not None:
            lifeline.close()

    def _make_folder(self) -> None:
        """Of our own for the socket; the same name again for one that was ours, and is gone with its server."""
        if self._folder:
            if self._is_ours():
                return
            os.mkdir(self._folder, 0o700)  # raises FileExistsError if somebody else has it now
        else:
            self._folder = tempfile.mkdtemp(prefix="gateway-sink-")
            if len(self._folder) > _LONGEST_PATH:
                os.rmdir(self._folder)
                self._folder = tempfile.mkdtemp(prefix="gateway-sink-", dir="/tmp")
        made = os.lstat(self._folder)
        self._made = (made.st_dev, made.st_ino)

    def _is_ours(self) -> bool:
        """Whether the folder of that name is the one that we made."""
        try:
            found = os.lstat(self._folder)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._made

    def _remove_folder(self) -> None:
        if self._folder and self._is_ours():
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = ""

    def _announced(self, lifeline: socket.socket, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the embedded server was not ready after {timeout:g} seconds")
            lifeline.settimeout(left)
            try:
                data = lifeline.recv(4096)
            except TimeoutError:
                continue
            if not data:
                raise RuntimeError("the embedded server ended; its standard error says why")
            line += data
        word, _, rest = line.decode("utf-8", "replace").strip().partition(" ")
        if word != "listening":
            raise RuntimeError(rest or "the embedded server ended; its standard error says why")
        return rest


def _give(folder: str | os.PathLike[str], account: tuple[int, int, tuple[int, ...]]) -> None:
    """Give a folder that we made to the account. Raises OSError.

    Through a descriptor, and only an empty one of ours: who may write to the folder above, as the account itself may,
    could have put a link to another in its place.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        owner = os.fstat(descriptor).st_uid
        if owner == account[0]:
            return
        if owner != os.geteuid() or os.listdir(descriptor):
            raise PermissionError(errno.EPERM, "another folder is in its place", os.fspath(folder))
        os.fchown(descriptor, *account[:2])
    finally:
        os.close(descriptor)
