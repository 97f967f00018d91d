"""The sockets that listen: bound with their options, and several on one port where their addresses differ.

First everything is bound, then everything listens. Linux lets a wildcard and one of its addresses (`*:25` and
`192.0.2.1:25`) share a port only while neither listens, or if both ask for it with SO_REUSEPORT. Bound without that
option, a port that another process has is refused; the option is on just for the moment of listen(2), so that no
other process can join afterwards. A connection goes to the socket whose address fits best.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections import Counter
from collections.abc import Iterable, Mapping

from gateway.config.listen import Keepalive
from gateway.pipeline.plan import ListenerPlan
from gateway.service.privileges import socket_file

SPEC = ("url", "host", "port", "path", "backlog", "ipv6only", "rcvbuf", "sndbuf", "multipath")
Address = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]  # as getaddrinfo has it
Addresses = Mapping[tuple[str, int], list[tuple[socket.AddressFamily, Address]]]
"""Of hosts and ports."""
KEEPALIVE_DEFAULTS = (
    (socket.TCP_KEEPIDLE, "/proc/sys/net/ipv4/tcp_keepalive_time"),
    (socket.TCP_KEEPINTVL, "/proc/sys/net/ipv4/tcp_keepalive_intvl"),
    (socket.TCP_KEEPCNT, "/proc/sys/net/ipv4/tcp_keepalive_probes"),
)
LARGEST_BUFFER = 0x7FFFFFFF  # an int of C; the kernel gives less (net.core.rmem_max, wmem_max)
NO_MULTIPATH = (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL)


class StartError(Exception):
    """The worker cannot start; the text says which listener, upstream or stage, and why."""


def bound(
    listener: ListenerPlan, *, share_port: bool = False, addresses: Addresses | None = None
) -> list[socket.socket]:
    """A socket for each address of the listener, bound and not listening; a host name may have several.

    `share_port`: others of this process listen on the port already, and ask for it now, too. `addresses`: those that
    were looked up already. Raises StartError.
    """
    sockets: list[socket.socket] = []
    try:
        if listener.path:
            return [_bound_unix(listener)]
        known = (addresses or {}).get((listener.host, listener.port))
        for family, address in known if known is not None else _addresses(listener):
            sock = _tcp_socket(listener, family)
            sockets.append(sock)
            _set_options(sock, listener)
            if share_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
    except BaseException as error:
        for sock in sockets:
            sock.close()
        if isinstance(error, OSError):
            raise StartError(f"{listener.url}: cannot listen: {error.strerror or error}") from None
        raise
    return sockets


def listen(sockets: Iterable[tuple[ListenerPlan, socket.socket]]) -> None:
    """Listen on all that are bound, of all pipelines. Raises StartError."""
    sockets = list(sockets)
    refuse_same(sockets)
    tcp = [(plan, sock, sock.getsockname()[:2]) for plan, sock in sockets if sock.family != socket.AF_UNIX]
    ports = Counter(address[1] for _, _, address in tcp)
    shared = [sock for _, sock, address in tcp if ports[address[1]] > 1]
    for sock in shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for plan, sock in sockets:
        try:
            sock.listen(plan.backlog)
        except OSError as error:
            raise StartError(f"{plan.url}: cannot listen: {error.strerror or error}") from None
    for sock in shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


def refuse_same(sockets: Iterable[tuple[ListenerPlan, socket.socket]]) -> None:
    """Two of one address would share its connections between them. Raises StartError."""
    seen: set[tuple[str, int]] = set()
    for plan, sock in sockets:
        if sock.family == socket.AF_UNIX:
            continue
        address = sock.getsockname()[:2]
        covered = {address}
        if address[0] == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            covered.add(("0.0.0.0", address[1]))
        if covered & seen:
            raise StartError(f"{plan.url}: cannot listen: another listener has that address")
        seen |= covered


def look_up(listeners: Iterable[ListenerPlan]) -> Addresses:
    """The addresses of their host names, which may take the name servers a while. Raises StartError."""
    found: dict[tuple[str, int], list[tuple[socket.AddressFamily, Address]]] = {}
    for listener in listeners:
        if not listener.path:
            try:
                found[listener.host, listener.port] = _addresses(listener)
            except OSError as error:
                raise StartError(f"{listener.url}: cannot listen: {error.strerror or error}") from None
    return found


def change_options(sock: socket.socket, old: ListenerPlan, new: ListenerPlan) -> None:
    """Give a socket that listens the options of another reading of the configuration.

    They hold for the connections to come. Buffers that are not set any more stay as they are: socket(7) has no way
    back to sizes that the kernel chooses.
    """
    if new.backlog != old.backlog:
        sock.listen(new.backlog)
    _set_buffers(sock, new)
    if sock.family != socket.AF_UNIX and new.keepalive != old.keepalive:
        if new.keepalive is None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
        else:
            for option, path in KEEPALIVE_DEFAULTS:
                sock.setsockopt(socket.IPPROTO_TCP, option, _default(path))
            _set_keepalive(sock, new.keepalive)


def _default(path: str) -> int:
    """A number of tcp(7) that the system has where none is set."""
    with open(path) as file:
        return int(file.read())


def _bound_unix(listener: ListenerPlan) -> socket.socket:
    if os.path.exists(listener.path) and stat.S_ISSOCK(os.stat(listener.path).st_mode):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # a full backlog would hold us up: somebody listens then
            if probe.connect_ex(listener.path) == errno.ECONNREFUSED:
                os.unlink(listener.path)  # left behind by a process that is gone
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        _set_buffers(sock, listener)
        sock.bind(listener.path)
        socket_file(listener.path, mode=0o666)  # as nginx does: the folder decides who comes to it
    except BaseException:
        sock.close()
        raise
    return sock


def _addresses(listener: ListenerPlan) -> list[tuple[socket.AddressFamily, Address]]:
    """Socket addresses of the host, each once; all addresses are one of IPv6 that takes IPv4 where there is such."""
    if not listener.host:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        return [(family, ("", listener.port))]
    flags = socket.AI_PASSIVE | socket.AI_ADDRCONFIG
    found = socket.getaddrinfo(listener.host, listener.port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _tcp_socket(listener: ListenerPlan, family: socket.AddressFamily) -> socket.socket:
    if not listener.multipath:
        return socket.socket(family)
    protocol = getattr(socket, "IPPROTO_MPTCP", None)
    if protocol is not None:
        try:
            return socket.socket(family, socket.SOCK_STREAM, protocol)
        except OSError as error:
            if error.errno not in NO_MULTIPATH:
                raise
    raise StartError(f"{listener.url}: multipath: this system has no multipath TCP; remove the option")


def _set_options(sock: socket.socket, listener: ListenerPlan) -> None:
    """Options that hold for the socket, and those that accepted connections inherit from it (tcp(7))."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        only = listener.ipv6only and bool(listener.host)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only))
    _set_buffers(sock, listener)
    _set_keepalive(sock, listener.keepalive)
    if listener.multipath:  # the loops set it for plain TCP only
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _set_buffers(sock: socket.socket, listener: ListenerPlan) -> None:
    """Before listen(2): the window that a handshake announces depends on it."""
    if listener.rcvbuf is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, min(listener.rcvbuf, LARGEST_BUFFER))
    if listener.sndbuf is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, min(listener.sndbuf, LARGEST_BUFFER))


def _set_keepalive(sock: socket.socket, keepalive: Keepalive | None) -> None:
    if keepalive is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, keepalive.idle),
        (socket.TCP_KEEPINTVL, keepalive.interval),
        (socket.TCP_KEEPCNT, keepalive.count),
    ):
        if value is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, int(value))


def spec(plan: ListenerPlan) -> dict[str, str | int | bool | float | list[float | int | None] | None]:
    """What the process that binds has to know, as JSON can say it."""
    alive = plan.keepalive
    keepalive = None if alive is None else [alive.idle, alive.interval, alive.count]
    return {name: getattr(plan, name) for name in SPEC} | {"keepalive": keepalive}


def plan_of(written: Mapping[str, object]) -> ListenerPlan:
    """The listener that `spec` wrote, as far as its socket goes."""
    keepalive = None
    if isinstance(alive := written["keepalive"], list):
        keepalive = Keepalive(idle=alive[0], interval=alive[1], count=alive[2])
    options = {name: written[name] for name in SPEC}
    return ListenerPlan(name="", implicit_tls=False, proxy_protocol=False, keepalive=keepalive, **options)  # type: ignore[arg-type]
