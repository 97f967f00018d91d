"""What a service manager and its service tell each other: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

Spoken directly, since each of them is a few environment variables and datagrams. Without a service manager nothing
happens: a notifier with nobody to tell says nothing, and no sockets are inherited. Only the process that the manager
started may speak; `child_environment` is what it hands to those that it starts itself.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Final

import structlog

log = structlog.get_logger("gateway.systemd")

FIRST_DESCRIPTOR: Final = 3
"""Inherited sockets begin there: SD_LISTEN_FDS_START of sd_listen_fds(3)."""

PATIENCE: Final = 1.0
"""Seconds that a notification may wait for room in the manager's queue; it reads at once, unless it is in trouble."""

OWN_VARIABLES: Final = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)
"""Meant for the process that the manager started, and for no child of it."""


class ActivationError(Exception):
    """What the service manager handed over cannot be used; the text says what, and what to do."""


class Notifier:
    """Tells the service manager how the service is.

    Made of `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`; without the first every call does nothing. A message
    that cannot be sent is logged once and never raises: mail goes on without a manager that listens.
    `watchdog_seconds` is how often `watchdog` is to be called, half of what the manager waits; None if it does not.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Raises ActivationError if NOTIFY_SOCKET has a form that is not known."""
        self._address = _notify_address(environ.get("NOTIFY_SOCKET", ""))
        self._failed = False
        self.watchdog_seconds = _watchdog_seconds(environ) if self._address else None

    def __bool__(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

    def ready(self, status: str = "") -> None:
        """The service serves: after the start, and after each reload, whether it failed or not."""
        self._send("READY=1", *_status(status))

    def reloading(self, status: str = "") -> None:
        """A reload began; `ready` ends it. The time tells Type=notify-reload that this one is the one it asked for."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}", *_status(status))

    def stopping(self, status: str = "", seconds: float = 0.0) -> None:
        """The service drains, which takes `seconds` at most: the manager waits for it even beyond TimeoutStopSec."""
        extend = (f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}",) if seconds > 0 else ()
        self._send("STOPPING=1", *_status(status), *extend)

    def status(self, text: str) -> None:
        """A line for `systemctl status`."""
        self._send(*_status(text))

    def watchdog(self) -> None:
        """The service lives; the manager restarts one that does not say so in time."""
        if self.watchdog_seconds is not None:
            self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> None:
        if not self._address or not assignments:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(PATIENCE)
                sock.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            if not self._failed:
                self._failed = True
                text = f"the service manager does not take notifications: {error.strerror or error}"
                log.warning("warning", text=text)
        else:
            self._failed = False


def child_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without what is only for the process that the service manager started."""
    return {name: value for name, value in environ.items() if name not in OWN_VARIABLES}


def inherited_sockets(environ: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening sockets that the service manager opened for this process, as sd_listen_fds(3) has it.

    They are not inherited further by exec and do not block; their other options, such as the backlog, are the
    manager's. To be called once: the descriptors belong to the sockets it returns. Raises ActivationError if one of
    them is no listening stream socket, or the numbers make no sense.
    """
    count = environ.get("LISTEN_FDS", "")
    if not count or environ.get("LISTEN_PID", "") != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit()):
        raise ActivationError(f"LISTEN_FDS={count[:20]}: not a number")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    sockets: list[socket.socket] = []
    try:
        for index in range(int(count)):
            name = names[index] if index < len(names) and names[index] else "unnamed"
            sockets.append(_listening(FIRST_DESCRIPTOR + index, name))
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def match(
    sockets: Iterable[socket.socket],
    host: str = "",
    port: int = 0,
    path: str = "",
    family: int = socket.AF_UNSPEC,
) -> socket.socket | None:
    """The socket that listens at this address: a unix socket's `path`, else a numeric `host` and `port`.

    An empty host is the wildcard of the family; without a family, that of either, IPv6 first. Only addresses are
    compared: a wildcard socket does not stand for one of its addresses.
    """
    found = [sock for sock in sockets if _same_address(sock, host, port, path, family)]
    found.sort(key=lambda sock: sock.family != socket.AF_INET6)
    return found[0] if found else None


def address_text(sock: socket.socket) -> str:
    """`host:port`, `[host]:port` or `unix:/path`, for messages about inherited sockets."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{_unix_path(name)}"
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def _notify_address(text: str) -> str:
    if text.startswith("@"):
        return "\0" + text[1:]
    if text and not text.startswith("/"):
        raise ActivationError(f"NOTIFY_SOCKET={text[:100]}: neither a path nor @name")
    return text


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (microseconds.isascii() and microseconds.isdigit()) or (pid and pid != str(os.getpid())):
        return None
    return int(microseconds) / 2_000_000 or None


def _status(text: str) -> tuple[str, ...]:
    """One assignment of one line; a line more would be an assignment more."""
    return (f"STATUS={' '.join(text.split())}",) if text else ()


def _listening(descriptor: int, name: str) -> socket.socket:
    where = f"inherited descriptor {descriptor} ({name})"
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFD)
        fcntl.fcntl(descriptor, fcntl.F_SETFD, flags | fcntl.FD_CLOEXEC)
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ActivationError(f"{where}: no socket: {error.strerror or error}") from None
    stream = sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    if not stream or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise ActivationError(f"{where}: not a listening stream socket; write ListenStream= and Accept=no")
    sock.setblocking(False)
    return sock


def _same_address(sock: socket.socket, host: str, port: int, path: str, family: int) -> bool:
    if family not in (socket.AF_UNSPEC, sock.family) or bool(path) != (sock.family == socket.AF_UNIX):
        return False
    name = sock.getsockname()
    if path:
        return os.path.realpath(_unix_path(name)) == os.path.realpath(path)
    wildcard = "::" if sock.family == socket.AF_INET6 else "0.0.0.0"
    return name[1] == port and _numeric(name[0]) == _numeric(host or wildcard)


def _unix_path(name: str | bytes) -> str:
    """An abstract name, which Python gives as octets, as `@name`."""
    return name if isinstance(name, str) else "@" + name[1:].decode(errors="replace")


def _numeric(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None, which equals no address of a socket, for a host name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
