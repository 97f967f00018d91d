"""Sockets that listen: their options, and what accepted connections inherit; ports that several share."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gateway.config.listen import Keepalive
from gateway.pipeline.plan import ListenerPlan
from gateway.service import listening
from gateway.service.listening import StartError, bound, listen

SIX = socket.has_dualstack_ipv6()
needs_six = pytest.mark.skipif(not SIX, reason="this machine has no IPv6")


def plan(host: str = "127.0.0.1", port: int = 0, *, path: str = "", **options: object) -> ListenerPlan:
    url = f"smtp+unix:{path}" if path else f"smtp://{host}:{port}"
    return ListenerPlan(url, url, host, port, path, False, False, **options)  # type: ignore[arg-type]


@contextmanager
def opened(*plans: ListenerPlan) -> Iterator[list[socket.socket]]:
    """Bound, then listening."""
    with ExitStack() as stack:
        pairs = [(one, stack.enter_context(sock)) for one in plans for sock in bound(one)]
        listen(pairs)
        yield [sock for _, sock in pairs]


async def accepted_socket(sock: socket.socket, backlog: int) -> socket.socket:
    """A connection as the loop hands it to a session."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[asyncio.BaseTransport] = loop.create_future()

    class Accepted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.set_result(transport)

    server = await loop.create_server(Accepted, sock=sock, backlog=backlog)
    with socket.create_connection(("127.0.0.1", sock.getsockname()[1]), 5):
        transport = await made
        copy: socket.socket = transport.get_extra_info("socket").dup()
        transport.close()
    server.close()
    await server.wait_closed()
    return copy


def keepalive(sock: socket.socket) -> tuple[int, ...]:
    return (
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    )


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("wanted", "set_"),
    [
        (Keepalive(idle=61, interval=7, count=3), (1, 61, 7, 3)),
        (Keepalive(count=4), (1, None, None, 4)),
        (Keepalive(), (1, None, None, None)),
        (None, (0, None, None, None)),
    ],
)
async def test_accepted_connections_keep_alive(wanted: Keepalive | None, set_: tuple[int | None, ...]) -> None:
    with socket.socket() as fresh:
        default = keepalive(fresh)
    with opened(plan(keepalive=wanted)) as (sock,), await accepted_socket(sock, 5) as accepted:
        expected = tuple(system if own is None else own for own, system in zip(set_, default, strict=True))
        assert keepalive(accepted) == expected


@pytest.mark.anyio
async def test_accepted_connections_have_the_buffers() -> None:
    with opened(plan(rcvbuf=20_000, sndbuf=30_000)) as (sock,), await accepted_socket(sock, 5) as accepted:
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 40_000  # doubled (socket(7))
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 60_000


def test_buffers_of_a_unix_socket(tmp_path: Path) -> None:
    with opened(plan(path=str(tmp_path / "s"), rcvbuf=20_000, sndbuf=30_000)) as (sock,):
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 60_000


@pytest.mark.anyio
@pytest.mark.parametrize("backlog", [1, 700])
async def test_backlog(backlog: int) -> None:
    """What the kernel was told stays true when the loop takes the socket (its own default is another)."""
    loop = asyncio.get_running_loop()
    with opened(plan(backlog=backlog)) as (sock,):
        assert _backlog(sock) == min(backlog, _somaxconn())
        server = await loop.create_server(asyncio.Protocol, sock=sock, backlog=backlog)
        assert _backlog(sock) == min(backlog, _somaxconn())
        server.close()
        await server.wait_closed()


def _somaxconn() -> int:
    return int(Path("/proc/sys/net/core/somaxconn").read_text())


def _backlog(sock: socket.socket) -> int:
    """tcpi_sacked of a listening socket (tcp_info in linux/tcp.h: eight octets, then 32-bit fields)."""
    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64)
    return int.from_bytes(information[28:32], "little")


@needs_six
@pytest.mark.parametrize(("host", "only", "expected"), [("::", True, 1), ("::", False, 0), ("", True, 0)])
def test_ipv6_only(host: str, only: bool, expected: int) -> None:
    with opened(plan(host, ipv6only=only)) as (sock,):
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == expected


def test_a_host_name_is_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*arguments: object, **options: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, 1, 6, "", (address, 0)) for address in ("127.0.0.1", "127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with opened(plan("mail.test")) as sockets:
        assert [sock.getsockname()[0] for sock in sockets] == ["127.0.0.1", "127.0.0.2"]


def test_a_host_name_that_is_none() -> None:
    with pytest.raises(StartError, match=r"^smtp://nowhere\.invalid:25: cannot listen: "):
        bound(plan("nowhere.invalid", 25))


def test_multipath() -> None:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP).close()
    except OSError:
        pytest.skip("this kernel has no multipath TCP")
    with opened(plan(multipath=True)) as (sock,):
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == socket.IPPROTO_MPTCP
        with socket.create_connection(sock.getsockname(), 5) as client:
            sock.setblocking(True)
            with sock.accept()[0] as accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"


@pytest.mark.parametrize("number", listening.NO_MULTIPATH)
def test_no_multipath(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(socket, "socket", refused)
    with pytest.raises(StartError, match="this system has no multipath TCP; remove the option"):
        bound(plan(multipath=True))


# -- ports that several share --------------------------------------------------------------------------------


@pytest.mark.parametrize("everywhere", ["0.0.0.0", pytest.param("", marks=needs_six)])
@pytest.mark.parametrize("wildcard_first", [True, False])
def test_a_wildcard_and_its_addresses_on_one_port(everywhere: str, wildcard_first: bool) -> None:
    port = _free_port()
    plans = [plan(everywhere, port), plan("127.0.0.1", port), plan("127.0.0.2", port)]
    with opened(*(plans if wildcard_first else plans[::-1])) as sockets:
        for sock in sockets:
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        own = {sock.getsockname()[0]: sock for sock in sockets}
        for address, meant in (("127.0.0.1", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("127.0.0.3", None)):
            expected = own[meant] if meant else next(sock for name, sock in own.items() if not name.startswith("127"))
            with socket.create_connection((address, port), 5):
                expected.accept()[0].close()  # it does not block: nobody else may have taken it
        with pytest.raises(StartError, match="Address already in use"), opened(plan("127.0.0.1", port)):
            pass


@needs_six
def test_both_wildcards_on_one_port() -> None:
    port = _free_port()
    with opened(plan("0.0.0.0", port), plan("::", port)) as sockets:
        assert [sock.getsockname()[1] for sock in sockets] == [port, port]


@pytest.mark.parametrize(
    "hosts", [("127.0.0.1", "127.0.0.1"), pytest.param(("0.0.0.0", ""), marks=needs_six),
              pytest.param(("", "0.0.0.0"), marks=needs_six)],
)  # fmt: skip
def test_one_address_twice(hosts: tuple[str, str]) -> None:
    port = _free_port()
    with pytest.raises(StartError) as caught, opened(*(plan(host, port) for host in hosts)):
        pass
    assert str(caught.value).startswith(f"smtp://{hosts[1]}:{port}: cannot listen: ")


def test_all_are_closed_where_one_cannot_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        port = other.getsockname()[1]

        def found(*arguments: object, **options: object) -> list[tuple[object, ...]]:
            return [(socket.AF_INET, 1, 6, "", (address, port)) for address in ("127.0.0.1", "127.0.0.2")]

        monkeypatch.setattr(socket, "getaddrinfo", found)
        with pytest.raises(StartError, match="Address already in use"):
            bound(plan("mail.test", port))
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # somebody may be connected from that port
            again.bind(("127.0.0.1", port))


# -- unix sockets --------------------------------------------------------------------------------------------


def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    with opened(plan(path=str(path))):
        with pytest.raises(StartError, match="Address already in use"):
            bound(plan(path=str(path)))
        with socket.socket(socket.AF_UNIX) as client:
            assert client.connect_ex(str(path)) == 0
    path.unlink()
    path.write_text("a file")
    with pytest.raises(StartError, match="Address already in use"):
        bound(plan(path=str(path)))
    assert path.read_text() == "a file"


def _free_port() -> int:
    """A port that is free at every address."""
    for _ in range(100):
        with socket.socket() as sock:
            sock.bind(("0.0.0.0", 0))
            port = int(sock.getsockname()[1])
        if not SIX:
            return port
        with socket.socket(socket.AF_INET6) as sock:
            try:
                sock.bind(("::", port))
            except OSError as error:
                assert error.errno == errno.EADDRINUSE
                continue
            return port
    raise AssertionError("no port is free")
