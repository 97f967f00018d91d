"""Wire: lines, bounds, deadlines, writing and closing, on a recorded transport and on real sockets."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from gateway.relay.wire import EndOfStream, LineTooLong, Wire, WireTimeout, connect


def open_streams() -> int:
    """Sockets and pipes of this process."""
    gc.collect()
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith(("socket:", "pipe:")) for link in links if os.path.lexists(link))


@pytest.fixture(scope="module")
def warmed() -> None:
    """libuv keeps one pair of descriptors for signals from the first loop on."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))


@pytest.fixture(autouse=True)
def descriptors(warmed: None) -> Iterator[None]:
    """No test may leave a socket open."""
    before = open_streams()
    yield
    assert open_streams() == before


class Recorder(asyncio.Transport):
    """A transport without a socket: says what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.calls: list[str] = []

    def pause_reading(self) -> None:
        self.paused = True
        self.calls.append("pause")

    def resume_reading(self) -> None:
        self.paused = False
        self.calls.append("resume")

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self.calls.append("abort")


def recorded() -> tuple[Wire, Recorder]:
    transport = Recorder()
    wire = Wire(asyncio.get_running_loop())
    wire.connection_made(transport)
    return wire, transport


@asynccontextmanager
async def joined() -> AsyncIterator[tuple[Wire, socket.socket]]:
    """An accepted Wire and the plain socket at its other end."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[Wire] = loop.create_future()
    server = await loop.create_server(lambda: Wire(loop, accepted.set_result), "127.0.0.1", 0)
    peer = socket.socket()
    peer.setblocking(False)
    try:
        await loop.sock_connect(peer, server.sockets[0].getsockname())
        wire = await accepted
        yield wire, peer
        wire.abort()
        await wire.aclose()
    finally:
        peer.close()
        server.close()
        await server.wait_closed()


async def turns(count: int = 5) -> None:
    """Let the loop run its ready callbacks."""
    for _ in range(count):
        await asyncio.sleep(0)


async def received(peer: socket.socket, size: int) -> bytes:
    """Exactly `size` octets, or what came until the end."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        block = await loop.sock_recv(peer, size - len(data))
        if not block:
            break
        data += block
    return data


async def all_lines(wire: Wire, limit: int) -> list[bytes | str]:
    """Every line to the end: "long" for a skipped one, "LF" behind one that ended so, the rest as "partial ..."."""
    seen: list[bytes | str] = []
    while True:
        try:
            seen.append(await wire.line(limit))
            if wire.bare_lf:
                seen.append("LF")
        except LineTooLong:
            seen.append("long")
        except EndOfStream as end:
            if end.partial:
                seen.append(f"partial {end.partial.decode()}")
            return seen


LINES: list[tuple[bytes, list[bytes | str]]] = [
    (b"", []),
    (b"EHLO a\r\nMAIL\r\n", [b"EHLO a", b"MAIL"]),
    (b"\r\n\r\n", [b"", b""]),
    (b"a\nb\r\n", [b"a", "LF", b"b"]),
    (b"\n", [b"", "LF"]),
    (b"a\rb\r\r\nc", [b"a\rb\r", "partial c"]),
    (b"12345678\r\n123456789\r\nok\r\n", [b"12345678", "long", b"ok"]),
    (b"123456789\n1234567890\nok\r\n", [b"123456789", "LF", "long", b"ok"]),
    (b"x" * 300 + b"\r\na\r\n" + b"y" * 90 + b"\n" + b"b\r\n", ["long", b"a", "long", b"b"]),
    (b"x" * 300, []),
    (b"\x00\xff\r\nshort", [b"\x00\xff", "partial short"]),
]


@pytest.mark.anyio
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("data", "expected"), LINES)
@pytest.mark.parametrize("waiting", [True, False])
async def test_lines_are_the_same_however_the_bytes_are_cut(
    data: bytes, expected: list[bytes | str], size: int, waiting: bool
) -> None:
    wire, _ = recorded()
    reader = asyncio.ensure_future(all_lines(wire, 10))
    for at in range(0, len(data), size):
        wire.data_received(data[at : at + size])
        if waiting:
            await turns(2)
    wire.eof_received()
    result = await reader
    # What was too long and never ended is dropped; how much of it is then left depends on the cuts.
    assert [item for item in result if not str(item).startswith("partial x")] == expected


@pytest.mark.anyio
async def test_pipelined_lines_come_without_waiting() -> None:
    wire, _ = recorded()
    assert wire.next_line() is None
    wire.data_received(b"a\r\nb")
    assert wire.has_line()
    assert wire.next_line() == b"a"
    assert not wire.has_line()
    assert wire.next_line() is None
    assert wire.buffered == 1
    wire.data_received(b"c\r")
    wire.data_received(b"\nlonger\r\n")
    assert wire.next_line() == b"bc"
    with pytest.raises(LineTooLong):
        wire.next_line(6)
    assert wire.buffered == 0
    assert wire.bytes_in == 15


@pytest.mark.anyio
async def test_blocks_pushed_back_and_waiting() -> None:
    wire, _ = recorded()
    wire.data_received(b"one\r\ntwo")
    wire.data_received(b"three")
    assert await wire.line(100) == b"one"
    wire.unread(b"zero ")
    assert await wire.read(7) == b"zero tw"
    assert wire.take() == b"othree"
    assert wire.take() == b""
    wire.unread(b"x")
    await wire.wait_readable()
    assert wire.buffered == 1
    assert await wire.read() == b"x"
    reader = asyncio.ensure_future(wire.read())
    await turns()
    wire.data_received(b"y")
    assert await reader == b"y"
    wire.eof_received()
    assert await wire.read() == b""
    await wire.wait_readable()


@pytest.mark.anyio
async def test_early_talk_is_told_only_while_nobody_waits() -> None:
    wire, _ = recorded()
    calls: list[int] = []
    wire.on_data = lambda: calls.append(wire.buffered)
    wire.data_received(b"EH")
    assert calls == [2]
    reader = asyncio.ensure_future(wire.line(100))
    await turns()
    wire.data_received(b"LO\r\n")
    assert await reader == b"EHLO"
    assert calls == [2]


@pytest.mark.anyio
async def test_unread_bytes_are_bounded() -> None:
    wire, transport = recorded()
    for _ in range(wire.high):
        wire.data_received(b"x")
    assert not transport.paused
    wire.data_received(b"\n")
    assert transport.paused
    assert wire.next_line(1 << 20) == b"x" * wire.high
    assert not transport.paused
    # Lines taken one by one resume reading when half is gone.
    wire.data_received(b"0123456789\r\n" * 6000)
    assert transport.paused
    for _ in range(4000):
        wire.next_line()
    assert not transport.paused


@pytest.mark.anyio
async def test_an_endless_line_is_dropped_as_it_comes() -> None:
    wire, transport = recorded()
    reader = asyncio.ensure_future(wire.line(1000))
    await turns()
    for _ in range(100):
        wire.data_received(b"x" * 10_000)
        await turns(2)
        assert wire.buffered < 1000
    assert not transport.paused
    wire.data_received(b"\r\nnext\r\n")
    wire.data_received(b"more\r\n")
    with pytest.raises(LineTooLong):
        await reader
    assert [await wire.line(10), await wire.line(10)] == [b"next", b"more"]


@pytest.mark.anyio
async def test_a_limit_above_the_mark_does_not_stall() -> None:
    wire, transport = recorded()
    wire.data_received(b"x" * 100_000)
    assert transport.paused
    reader = asyncio.ensure_future(wire.line(300_000))
    await turns()
    assert not transport.paused
    wire.data_received(b"x" * 100_000 + b"\n")
    assert len(await reader) == 200_000


@pytest.mark.anyio
async def test_deadline_covers_every_wait_until_it_is_moved() -> None:
    async with joined() as (wire, peer):
        wire.set_deadline(0.01)
        with pytest.raises(WireTimeout):
            await wire.line(100)
        with pytest.raises(TimeoutError):  # still expired
            await wire.read()
        wire.unread(b"kept\r\n")
        assert await wire.line(100) == b"kept"  # what is there needs no wait
        wire.set_deadline(30)
        await asyncio.get_running_loop().sock_sendall(peer, b"a\r\n")
        assert await wire.line(100) == b"a"
        wire.set_deadline(0.02)  # earlier than the armed timer
        with pytest.raises(WireTimeout):
            await wire.wait_readable()
        wire.set_deadline(0.01)
        wire.set_deadline(0.03)  # later: the timer fires early and re-arms
        with pytest.raises(WireTimeout):
            await wire.line(100)
        wire.set_deadline(None)
        await asyncio.get_running_loop().sock_sendall(peer, b"b\r\n")
        assert await wire.line(100) == b"b"


@pytest.mark.anyio
async def test_deadline_passing_while_nobody_waits_fails_the_next_wait() -> None:
    async with joined() as (wire, _):
        loop = asyncio.get_running_loop()
        passed = loop.create_future()
        wire.set_deadline(0.005)
        loop.call_later(0.02, passed.set_result, None)
        await passed
        with pytest.raises(WireTimeout):
            await wire.line(100)


@pytest.mark.anyio
async def test_drain_and_flush_wait_for_a_slow_reader() -> None:
    loop = asyncio.get_running_loop()
    async with joined() as (wire, peer):
        wire.write(b"")
        await wire.drain()
        total = 0
        while wire.write_buffered < 1 << 20:
            wire.writelines([b"x" * 65536, b"y" * 65536])
            total += 131072
        assert wire.bytes_out == total
        wire.set_deadline(0.02)
        with pytest.raises(WireTimeout):
            await wire.drain()
        with pytest.raises(WireTimeout):
            await wire.flush()
        wire.set_deadline(None)
        reader = asyncio.ensure_future(received(peer, total))
        await wire.drain()
        assert wire.write_buffered < 1 << 16
        await wire.flush()
        assert wire.write_buffered == 0
        assert len(await reader) == total
        wire.abort()
        await wire.aclose()
        with pytest.raises(EndOfStream):
            await wire.drain()
        with pytest.raises(EndOfStream):
            await wire.flush()
        wire.write(b"ignored")
        assert wire.write_buffered == 0
        assert loop.time() > 0


@pytest.mark.anyio
async def test_half_close_is_kept_open_both_ways() -> None:
    loop = asyncio.get_running_loop()
    async with joined() as (wire, peer):
        await loop.sock_sendall(peer, b"last\r\nrest")
        peer.shutdown(socket.SHUT_WR)
        assert await wire.line(100) == b"last"
        with pytest.raises(EndOfStream) as end:
            await wire.line(100)
        assert end.value.partial == b"rest"
        assert wire.eof and not wire.closed
        wire.write(b"221 bye\r\n")
        wire.write_eof()
        wire.write(b"too late")
        assert await received(peer, 100) == b"221 bye\r\n"


@pytest.mark.anyio
async def test_a_reset_is_told() -> None:
    async with joined() as (wire, peer):
        gone: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        wire.on_gone = gone.set_result
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        assert isinstance(await gone, ConnectionResetError)
        assert wire.closed and isinstance(wire.error, ConnectionResetError)
        assert await wire.read() == b""
        with pytest.raises(EndOfStream):
            await wire.line(100)


@pytest.mark.anyio
async def test_what_we_close_is_not_told() -> None:
    async with joined() as (wire, _):
        gone: list[BaseException | None] = []
        wire.on_gone = gone.append
        wire.set_deadline(300)
        wire.abort()
        await wire.aclose()
        assert wire.closed and gone == []


@pytest.mark.anyio
async def test_a_reply_survives_unread_input() -> None:
    """Closing with unread input would reset the connection under the reply."""
    loop = asyncio.get_running_loop()
    async with joined() as (wire, peer):
        await loop.sock_sendall(peer, b"junk\r\n" * 20_000)
        assert await wire.line(100) == b"junk"
        wire.write(b"421 4.7.0 bye\r\n")
        closing = asyncio.ensure_future(wire.aclose(linger=30))
        await loop.sock_sendall(peer, b"more junk\r\n")
        assert await received(peer, 100) == b"421 4.7.0 bye\r\n"
        assert not closing.done()
        peer.shutdown(socket.SHUT_WR)
        await closing
        assert wire.closed


@pytest.mark.anyio
@pytest.mark.parametrize("flood", [False, True])
async def test_lingering_is_bounded_in_time_and_bytes(flood: bool) -> None:
    loop = asyncio.get_running_loop()
    async with joined() as (wire, peer):
        closing = asyncio.ensure_future(wire.aclose(linger=30 if flood else 0.02))
        if flood:
            with pytest.raises(OSError):
                for _ in range(1000):
                    await loop.sock_sendall(peer, b"x" * 65536)
        await closing
        assert wire.closed


@pytest.mark.anyio
async def test_close_does_not_wait_for_ever_to_send() -> None:
    async with joined() as (wire, _):
        while wire.write_buffered < 1 << 20:
            wire.write(b"x" * 65536)
        wire.close(linger=0.02)
        await wire.aclose()
        assert wire.closed


@pytest.mark.anyio
async def test_a_cancelled_close_aborts() -> None:
    async with joined() as (wire, _):
        closing = asyncio.ensure_future(wire.aclose(linger=30))
        await turns()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await wire.aclose()
        assert wire.closed


@pytest.mark.anyio
async def test_connect_over_tcp_sets_the_socket_up() -> None:
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[Wire] = loop.create_future()
    server = await loop.create_server(lambda: Wire(loop, accepted.set_result), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    wire = await connect(("127.0.0.1", port), timeout=5, source="127.0.0.2")
    other = await accepted
    assert wire.peername == other.sockname == ("127.0.0.1", port)
    assert other.peername == wire.sockname
    assert other.peername[0] == "127.0.0.2"
    for end in (wire, other):
        sock = end.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert wire.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    wire.close()
    await other.aclose()
    await wire.aclose()
    server.close()
    await server.wait_closed()
    with pytest.raises(ConnectionRefusedError):
        await connect(("127.0.0.1", port), timeout=5)


@pytest.mark.anyio
async def test_mapped_addresses_are_ipv4() -> None:
    loop = asyncio.get_running_loop()
    try:
        listening = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    accepted: asyncio.Future[Wire] = loop.create_future()
    server = await loop.create_server(lambda: Wire(loop, accepted.set_result), sock=listening)
    wire = await connect(("127.0.0.1", listening.getsockname()[1]), timeout=5)
    other = await accepted
    assert other.peername == wire.sockname
    assert other.sockname[0] == "127.0.0.1"
    wire.close()
    await other.aclose()
    await wire.aclose()
    server.close()
    await server.wait_closed()


@pytest.mark.anyio
async def test_connect_over_a_unix_socket(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    path = str(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        await connect(path, timeout=5)
    accepted: asyncio.Future[Wire] = loop.create_future()
    server = await loop.create_unix_server(lambda: Wire(loop, accepted.set_result), path)
    wire = await connect(path, timeout=5)
    other = await accepted
    assert wire.peername == other.peername == other.sockname == ("unix:", 0)
    wire.write(b"hello\n")
    assert await other.line(100) == b"hello"
    wire.close()
    await other.aclose()
    await wire.aclose()
    server.close()
    await server.wait_closed()


@pytest.mark.anyio
async def test_connecting_has_a_limit() -> None:
    """A full listen queue leaves SYNs unanswered."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        opened: list[Wire] = []
        with pytest.raises(TimeoutError):
            for _ in range(10):
                opened.append(await connect(listening.getsockname(), timeout=0.05))
        for wire in opened:
            wire.abort()
            await wire.aclose()
