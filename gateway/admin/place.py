"""Where the admin API listens: a unix socket that only its file mode guards, or TCP.

This module is imported by `gateway ctl` too and imports next to nothing.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

BACKLOG = 64


def default_socket() -> Path:
    """The socket's place where none is configured: the service manager's folder, /run, or the user's own.

    systemd.exec(5) RuntimeDirectory= may name several folders; the first counts.
    """
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if runtime:
        return Path(runtime, "admin.sock")
    if os.getuid() == 0:
        return Path("/run/gateway/admin.sock")
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(session, "gateway", "admin.sock") if session else Path(f"/tmp/gateway-{os.getuid()}/admin.sock")


def bound(address: str, mode: int = 0o600) -> socket.socket:
    """A listening socket on `unix:/path` or `host:port`; nobody but who `mode` lets may open the former.

    A socket file that nobody listens on any more is replaced, and a missing folder is made, for its owner alone.
    Raises OSError: what listens there, or a folder in /tmp that is somebody else's.
    """
    if address.startswith("unix:"):
        return _bound_unix(Path(address.removeprefix("unix:")), mode)
    host, _, port = address.rpartition(":")
    host = host.strip("[]").replace("*", "")
    family = socket.AF_INET6 if ":" in host or (not host and socket.has_dualstack_ipv6()) else socket.AF_INET
    return socket.create_server(
        (host, int(port)), family=family, backlog=BACKLOG, dualstack_ipv6=family == socket.AF_INET6 and not host
    )


def _bound_unix(path: Path, mode: int) -> socket.socket:
    _folder(path.parent)
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        before = os.umask(0o777 & ~mode)  # not chmod: it must not be open for a moment
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        found = os.lstat(folder)
        if folder.parent == Path("/tmp") and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid()):
            raise PermissionError(errno.EPERM, "the folder belongs to another user", str(folder)) from None


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "a file that is no socket is in its place", str(path))
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a full backlog would hold us up: somebody listens then
        if probe.connect_ex(str(path)) in (0, errno.EAGAIN):
            raise OSError(errno.EADDRINUSE, "another process listens there", str(path))
    path.unlink()
