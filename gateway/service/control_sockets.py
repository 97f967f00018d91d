"""The sockets of the admin API and of the metrics: held by the supervisor like listeners, so that reloads keep them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from gateway.admin import place
from gateway.service.privileges import socket_file

Owner = tuple[int, int] | None


class Access(NamedTuple):
    """Who may open a unix socket: its mode, and whose it is (uid, gid; None: our own)."""

    mode: int
    owner: Owner


class ControlSockets:
    """By address: `unix:/path` or `host:port`."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}
        self._access: dict[str, Access] = {}
        self._files: dict[str, tuple[int, int]] = {}  # device and inode

    def get(self, address: str, access: Access) -> socket.socket:
        """Listening; one that is there already changes its access with `keep`. Raises OSError."""
        if address not in self._held:
            self._held[address] = place.bound(address, access.mode)
            self._access[address] = access
            if address.startswith("unix:"):
                path = address.removeprefix("unix:")
                try:
                    found = os.lstat(path)
                    self._files[address] = (found.st_dev, found.st_ino)
                    socket_file(path, owner=access.owner)
                except OSError:
                    self._close(address)
                    raise
        return self._held[address]

    def keep(self, wanted: Mapping[str, Access]) -> None:
        """Close all others; these are to have this access."""
        for address in [address for address in self._held if address not in wanted]:
            self._close(address)
        for address, access in wanted.items():
            if address in self._held and self._access[address] != access and self._is_ours(address):
                path = address.removeprefix("unix:")
                with contextlib.suppress(OSError):
                    socket_file(path, mode=access.mode, owner=access.owner or (os.geteuid(), os.getegid()))
                self._access[address] = access

    def close(self) -> None:
        """Close all."""
        self.keep({})

    def _close(self, address: str) -> None:
        self._held.pop(address).close()
        if self._is_ours(address):
            with contextlib.suppress(OSError):
                os.unlink(address.removeprefix("unix:"))
        self._files.pop(address, None)
        self._access.pop(address, None)

    def _is_ours(self, address: str) -> bool:
        """Whether the file there is our socket: another service may have put its own in its place."""
        if not address.startswith("unix:"):
            return False
        try:
            found = os.lstat(address.removeprefix("unix:"))
        except OSError:
            return False
        return self._files.get(address) == (found.st_dev, found.st_ino)
