"""Two network namespaces with a link between them that can be cut (ip-netns(8), veth(4)); needs root.

`with Namespaces() as net:` the service runs in one (`net.command`), clients or upstreams are in the other
(`net.inside`). A cut link tells neither side anything: what was open is half open from then on.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, TypeVar

from tests.peers.require import missing, require, require_root

CLONE_NEWNET: Final = 0x40000000
HOST: Final = "10.99.0.1"
AWAY: Final = "10.99.0.2"

T = TypeVar("T")


class Namespaces:
    """The service's has HOST and is `a`, the other one AWAY and is `b`."""

    def __init__(self) -> None:
        require_root()
        self._ip = require("ip")
        self._tag = f"g{os.getpid()}"

    def __enter__(self) -> Namespaces:
        ours, theirs = f"{self._tag}-a", f"{self._tag}-b"
        try:
            self._run("netns", "add", ours)
            self._run("netns", "add", theirs)
            self._run("link", "add", f"{ours}v", "netns", ours, "type", "veth", "peer", f"{theirs}v", "netns", theirs)
            for name, address in ((ours, HOST), (theirs, AWAY)):
                self._run("-n", name, "addr", "add", f"{address}/30", "dev", f"{name}v")
                self._run("-n", name, "link", "set", "lo", "up")
                self._run("-n", name, "link", "set", f"{name}v", "up")
        except subprocess.CalledProcessError as error:
            self._remove()
            missing(f"no network namespaces here: {error.stderr.decode()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in (f"{self._tag}-a", f"{self._tag}-b"):
            subprocess.run([self._ip, "netns", "del", name], capture_output=True, check=False)

    def _run(self, *words: str) -> None:
        subprocess.run([self._ip, *words], capture_output=True, check=True)

    @property
    def command(self) -> list[str]:
        """In front of a command, it runs in the service's namespace."""
        return [self._ip, "netns", "exec", f"{self._tag}-a"]

    def cut(self) -> None:
        """Take the other one's end of the link down."""
        self._run("-n", f"{self._tag}-b", "link", "set", f"{self._tag}-bv", "down")

    def inside(self, make: Callable[[], T], side: Literal["a", "b"] = "b") -> T:
        """What `make` gives, called in that namespace: sockets stay in the one they were made in.

        A thread of its own enters the namespace (setns(2) is about the thread), and ends.
        """
        made: list[T] = []
        failed: list[BaseException] = []

        def enter() -> None:
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                with open(f"/run/netns/{self._tag}-{side}") as place:
                    if libc.setns(place.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                made.append(make())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return made[0]


def connected(host: str, port: int) -> socket.socket:
    """A connection that takes little before it is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(30)
    sock.connect((host, port))
    return sock
