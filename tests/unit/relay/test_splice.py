"""Splice: every octet both ways, in user space and in the kernel, whatever way it ends; nothing left open."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import hashlib
import os
import random
import socket
import struct
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
import uvloop

from gateway.relay import splice as module
from gateway.relay.splice import PipePool, Splice, SpliceResult, pipes, splice
from gateway.relay.tls import Certificate, ServerContext, client_context
from gateway.relay.wire import Wire, connect

MIB = 1 << 20
BLOCK = random.Random(2).randbytes(MIB)


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
    """No test may leave a socket or a pipe open, nor a pipe unreturned."""
    before = open_streams()
    yield
    pipes.close()
    assert pipes._made == 0
    assert open_streams() == before


class Ends:
    """A client and an upstream as plain sockets, the gateway's two wires between them, and their splice."""

    def __init__(self, client: socket.socket, upstream: socket.socket, wires: tuple[Wire, Wire]) -> None:
        self.client, self.upstream, self.wires = client, upstream, wires
        self.splice: Splice
        self.running: asyncio.Task[SpliceResult]

    def start(self, *, idle: float = 60, kernel: bool = True) -> None:
        self.splice = Splice(*self.wires, idle=idle, kernel=kernel)
        self.running = asyncio.get_running_loop().create_task(self.splice.run())

    def said(self) -> tuple[str | None, int]:
        """Who spoke last, and the last octet."""
        return self.splice.last_from, self.splice.last_byte

    async def flowing(self, *, up: bool = True) -> None:
        """Until one octet has passed, so that everything before it has."""
        near, far = (self.client, self.upstream) if up else (self.upstream, self.client)
        await asyncio.get_running_loop().sock_sendall(near, b"!")
        assert await received(far, 1) == b"!"


async def accepted(family: str, path: Path) -> tuple[Wire, socket.socket]:
    """A wire accepted from a plain socket."""
    loop = asyncio.get_running_loop()
    coming: asyncio.Future[Wire] = loop.create_future()
    if family == "unix":
        server = await loop.create_unix_server(lambda: Wire(loop, coming.set_result), str(path))
        peer = socket.socket(socket.AF_UNIX)
    else:
        server = await loop.create_server(lambda: Wire(loop, coming.set_result), "127.0.0.1", 0)
        peer = socket.socket()
    peer.setblocking(False)
    await loop.sock_connect(peer, server.sockets[0].getsockname())
    wire = await coming
    server.close()
    await server.wait_closed()
    return wire, peer


@asynccontextmanager
async def ends(tmp_path: Path, family: str = "tcp") -> AsyncIterator[Ends]:
    """Both pairs; at the end nothing may be left running."""
    tasks = asyncio.all_tasks()
    near, client = await accepted("tcp", tmp_path / "c")
    far, upstream = await accepted(family, tmp_path / "u")
    pair = Ends(client, upstream, (near, far))
    try:
        yield pair
    finally:
        client.close()
        upstream.close()
        for wire in (near, far):
            wire.abort()
            await wire.aclose()
    assert asyncio.all_tasks() <= tasks


async def received(peer: socket.socket, size: int) -> bytes:
    """Exactly `size` octets, or what came until the end."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < size:
        block = await loop.sock_recv(peer, min(size - len(data), MIB))
        if not block:
            break
        data += block
    return bytes(data)


async def send(peer: socket.socket, blocks: int, *, end: bool = True) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(blocks):
        await loop.sock_sendall(peer, BLOCK)
    if end:
        peer.shutdown(socket.SHUT_WR)


async def digest(peer: socket.socket, *, slow: bool = False) -> tuple[int, str]:
    """Length and hash of all that comes; slowly: in small reads with other work between them."""
    loop = asyncio.get_running_loop()
    total, seen = 0, hashlib.blake2b()
    while block := await loop.sock_recv(peer, 20_011 if slow else MIB):
        total += len(block)
        seen.update(block)
        if slow:
            await asyncio.sleep(0)
    return total, seen.hexdigest()


def expected(blocks: int) -> tuple[int, str]:
    return blocks * MIB, hashlib.blake2b(BLOCK * blocks).hexdigest()


@pytest.mark.anyio
@pytest.mark.parametrize("family", ["tcp", "unix"])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("slow", ["nobody", "client", "upstream"])
async def test_large_streams_both_ways(tmp_path: Path, family: str, kernel: bool, slow: str) -> None:
    async with ends(tmp_path, family) as pair:
        pair.start(kernel=kernel)
        await asyncio.gather(send(pair.client, 4, end=False), received(pair.upstream, 4 * MIB))
        await asyncio.gather(send(pair.upstream, 4, end=False), received(pair.client, 4 * MIB))
        assert pair.splice._up.in_kernel is pair.splice._down.in_kernel is kernel
        _, up, _, down = await asyncio.gather(
            send(pair.client, 32),
            digest(pair.upstream, slow=slow == "upstream"),
            send(pair.upstream, 32),
            digest(pair.client, slow=slow == "client"),
        )
        assert up == down == expected(32)
        result = await pair.running
        assert result.bytes_up == result.bytes_down == 36 * MIB
        assert result.reason in ("client closed", "upstream closed")
        for wire in pair.wires:
            assert wire.closed and wire.bytes_in == wire.bytes_out == 36 * MIB


@pytest.mark.anyio
async def test_memory_is_bounded_by_back_pressure(tmp_path: Path) -> None:
    """A client that never reads must stop the upstream, not fill the gateway."""
    loop = asyncio.get_running_loop()
    async with ends(tmp_path) as pair:
        pair.start(kernel=False)
        sending = asyncio.ensure_future(send(pair.upstream, 64))
        stalled = 0
        while stalled < 200:
            before = pair.splice.bytes_down
            await asyncio.sleep(0)
            stalled = stalled + 1 if pair.splice.bytes_down == before and before else 0
            assert pair.wires[0].write_buffered < MIB
        assert not sending.done()
        assert await digest(pair.client) == expected(64)
        pair.client.shutdown(socket.SHUT_WR)
        await sending
        assert (await pair.running).reason == "upstream closed"
        assert loop.time() > 0


@pytest.mark.anyio
async def test_leftovers_go_first(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with ends(tmp_path) as pair:
        await loop.sock_sendall(pair.client, b"DATA\r\nbody\r\n")
        await loop.sock_sendall(pair.upstream, b"354 go\r\n")
        for wire in pair.wires:
            await wire.wait_readable()
        assert await pair.wires[0].line(100) == b"DATA"
        pair.start()
        await loop.sock_sendall(pair.client, b".\r\n")
        assert await received(pair.upstream, 9) == b"body\r\n.\r\n"
        assert await received(pair.client, 8) == b"354 go\r\n"
        assert (pair.splice.bytes_up, pair.splice.bytes_down) == (9, 8)
        pair.client.shutdown(socket.SHUT_WR)
        assert await received(pair.upstream, 1) == b""
        pair.upstream.close()
        assert (await pair.running).reason == "client closed"


@pytest.mark.anyio
@pytest.mark.parametrize("bulk", [0, 3])
async def test_half_close_lets_the_answer_through(tmp_path: Path, bulk: int) -> None:
    loop = asyncio.get_running_loop()
    async with ends(tmp_path) as pair:
        pair.start()
        await asyncio.gather(send(pair.client, bulk), received(pair.upstream, bulk * MIB))
        assert await received(pair.upstream, 1) == b""
        await loop.sock_sendall(pair.upstream, b"250 queued\r\n")
        assert await received(pair.client, 12) == b"250 queued\r\n"
        pair.upstream.shutdown(socket.SHUT_WR)
        assert await received(pair.client, 1) == b""
        result = await pair.running
        assert (result.bytes_up, result.bytes_down, result.reason) == (bulk * MIB, 12, "client closed")


@pytest.mark.anyio
async def test_wires_that_ended_before_the_splice(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with ends(tmp_path) as pair:
        await loop.sock_sendall(pair.upstream, b"421 bye\r\n")
        pair.upstream.shutdown(socket.SHUT_WR)
        assert await pair.wires[1].line(100) == b"421 bye"
        await pair.wires[1].wait_readable()
        assert pair.wires[1].eof
        pair.wires[1].unread(b"421 bye\r\n")
        pair.start()
        assert await received(pair.client, 100) == b"421 bye\r\n"
        pair.client.close()
        assert (await pair.running).reason == "upstream closed"
    async with ends(tmp_path / "..") as pair:
        pair.wires[1].abort()
        await pair.wires[1].aclose()
        running = asyncio.ensure_future(splice(*pair.wires, idle=60))
        assert await received(pair.client, 1) == b""
        pair.client.close()
        assert (await running).reason == "aborted"


@pytest.mark.anyio
@pytest.mark.parametrize("who", ["client", "upstream"])
@pytest.mark.parametrize("bulk", [0, 4])
async def test_a_reset_in_the_middle(tmp_path: Path, who: str, bulk: int) -> None:
    loop = asyncio.get_running_loop()
    async with ends(tmp_path) as pair:
        gone: list[object] = []
        pair.wires[0].on_gone = gone.append
        pair.start()
        one, other = (pair.client, pair.upstream) if who == "client" else (pair.upstream, pair.client)
        await asyncio.gather(send(one, bulk, end=False), received(other, bulk * MIB))
        await loop.sock_sendall(one, b"last words\r\n")
        assert await received(other, 12) == b"last words\r\n"
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
        assert await received(other, 1) == b""
        other.close()
        assert (await pair.running).reason == f"{who} reset"
        assert gone == []  # from the hand-off on, the splice says how it ended


@pytest.mark.anyio
async def test_an_upstream_that_stops_reading_is_still_heard(tmp_path: Path) -> None:
    """A refusal sent before an early close must reach the client though the upload cannot be written any more."""
    loop = asyncio.get_running_loop()
    async with ends(tmp_path) as pair:
        pair.start()
        sending = asyncio.ensure_future(send(pair.client, 64))
        await received(pair.upstream, 8 * MIB)
        await loop.sock_sendall(pair.upstream, b"552 5.3.4 too big\r\n")
        assert await received(pair.client, 19) == b"552 5.3.4 too big\r\n"
        pair.upstream.close()
        result = await pair.running
        assert result.reason in ("upstream reset", "upstream closed")
        pair.client.close()
        with pytest.raises(OSError):
            await sending


@pytest.mark.anyio
async def test_idle_counts_both_directions(tmp_path: Path) -> None:
    async with ends(tmp_path) as pair:
        pair.start(idle=0.05)
        result = await pair.running
        assert result.reason == "idle"
    async with ends(tmp_path / "..") as pair:
        loop = asyncio.get_running_loop()
        pair.start(idle=0.2)
        begun = loop.time()
        while loop.time() < begun + 0.4:  # only the upstream talks
            await pair.flowing(up=False)
        assert not pair.running.done()
        assert (await pair.running).reason == "idle"


@pytest.mark.anyio
async def test_a_client_is_not_waited_for_after_the_upstream_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINGER", 0.02)
    async with ends(tmp_path) as pair:
        pair.start(idle=600)
        pair.upstream.shutdown(socket.SHUT_WR)
        assert await received(pair.client, 1) == b""
        pair.client.shutdown(socket.SHUT_WR)
        assert (await pair.running).reason == "upstream closed"
    async with ends(tmp_path / "..") as pair:
        pair.start(idle=600)
        pair.upstream.shutdown(socket.SHUT_WR)
        assert (await pair.running).reason == "upstream closed"


@pytest.mark.anyio
async def test_a_supervisor_sees_who_spoke_last(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with ends(tmp_path) as pair:
        pair.start()
        assert pair.said() == (None, -1)
        await loop.sock_sendall(pair.client, b"NOOP\r\n")
        await received(pair.upstream, 6)
        assert pair.said() == ("client", 10)
        await loop.sock_sendall(pair.upstream, b"250 ok\r\n")
        await received(pair.client, 8)
        assert pair.said() == ("upstream", 10)
        assert loop.time() - pair.splice.last_progress < 5
        await loop.sock_sendall(pair.upstream, b"250-")
        await received(pair.client, 4)
        assert pair.splice.last_byte == ord("-")
        pair.splice.goodbye(b"\r\n421 4.3.2 going down\r\n")
        pair.splice.goodbye(b"once only")
        assert await received(pair.client, 100) == b"\r\n421 4.3.2 going down\r\n"
        assert await received(pair.upstream, 1) == b""
        pair.client.close()
        pair.upstream.close()
        result = await pair.running
        assert result.reason == "goodbye"


@pytest.mark.anyio
@pytest.mark.parametrize("stuck", [False, True])
async def test_goodbye_in_the_kernel_keeps_the_order(tmp_path: Path, stuck: bool) -> None:
    """Also while the pipe still holds bytes that the client has not taken."""
    async with ends(tmp_path) as pair:
        pair.start()
        down = pair.splice._down
        sending = asyncio.ensure_future(send(pair.upstream, 64, end=False))
        got = 0
        while not down.in_kernel or (down._held == 0) == stuck:
            if not stuck or not down.in_kernel:
                got += len(await asyncio.get_running_loop().sock_recv(pair.client, 65536))
            await asyncio.sleep(0)
        pair.splice.goodbye(b"* BYE\r\n")
        assert not down.in_kernel
        rest = await received(pair.client, 1 << 30)
        total = got + len(rest) - 7
        assert total == pair.splice.bytes_down
        assert rest[:-7] == (BLOCK * 65)[got : got + len(rest) - 7]
        assert rest[-7:] == b"* BYE\r\n"
        pair.client.close()
        pair.upstream.close()
        assert (await pair.running).reason == "goodbye"
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


@pytest.mark.anyio
async def test_quiet_directions_leave_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET", 0.01)
    async with ends(tmp_path) as pair:
        pair.start()
        for turn in range(1, 4):
            entered = False
            sending = asyncio.ensure_future(send(pair.client, 4, end=False))
            for _ in range(64):
                assert len(await received(pair.upstream, 65536)) == 65536
                entered = entered or pair.splice._up.in_kernel
            await sending
            assert entered
            while pair.splice._up.in_kernel:
                await pair.flowing(up=False)
            assert pipes._made == len(pipes._free) == 1  # given back, and taken again the next time
            await pair.flowing()
            assert (pair.splice.last_byte, pair.splice.bytes_up) == (ord("!"), turn * (4 * MIB + 1))
        pair.client.close()
        pair.upstream.close()
        await pair.running


@pytest.mark.anyio
async def test_without_pipes_all_stays_in_user_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pipes", PipePool(0))
    async with ends(tmp_path) as pair:
        pair.start()
        _, got = await asyncio.gather(send(pair.client, 16), digest(pair.upstream))
        assert got == expected(16)
        assert not pair.splice._up.in_kernel
        pair.upstream.close()
        await pair.running


@pytest.mark.anyio
async def test_a_cancelled_splice_leaves_nothing(tmp_path: Path) -> None:
    async with ends(tmp_path) as pair:
        pair.start()
        sending = asyncio.ensure_future(send(pair.client, 64))
        await received(pair.upstream, 8 * MIB)
        pair.running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pair.running
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


@pytest.mark.anyio
async def test_what_ended_is_freed_without_the_collector(tmp_path: Path) -> None:
    async with ends(tmp_path) as pair:
        pair.start()
        await pair.flowing()
        pair.client.close()
        pair.upstream.close()
        await pair.running
        gc.collect()
        gc.disable()
        try:
            watched = weakref.ref(pair.running)
            del pair.splice, pair.running
            await asyncio.sleep(0)
            assert watched() is None
            assert not any(isinstance(thing, Splice) for thing in gc.get_objects())
        finally:
            gc.enable()


@pytest.mark.anyio
async def test_an_abort_from_outside_ends_it(tmp_path: Path) -> None:
    async with ends(tmp_path) as pair:
        pair.start()
        await pair.flowing()
        pair.wires[0].abort()
        assert await received(pair.upstream, 1) == b""
        pair.upstream.close()
        assert (await pair.running).reason == "aborted"


@pytest.mark.anyio
@pytest.mark.parametrize("upstream_tls", [False, True])
async def test_tls_towards_the_client(tmp_path: Path, upstream_tls: bool) -> None:
    ca = trustme.CA()
    issued = ca.issue_cert("mx.example.org")
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "mx.pem"))
    context = ServerContext([Certificate(str(tmp_path / "mx.pem"), str(tmp_path / "mx.pem"))])
    ours = client_context(str(tmp_path / "ca.pem"), True)
    loop = asyncio.get_running_loop()
    coming: asyncio.Queue[Wire] = asyncio.Queue()
    server = await loop.create_server(lambda: Wire(loop, coming.put_nowait), "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    # client -> near | far -> upstream; TLS on the first pair, perhaps on the second
    client, near = await connect(address, timeout=5), await coming.get()
    far, upstream = await connect(address, timeout=5), await coming.get()
    for wire, peer in ((near, client), (upstream, far))[: 2 if upstream_tls else 1]:
        await asyncio.gather(wire.start_tls_server(context), peer.start_tls_client(ours, "mx.example.org"))

    async def pour(wire: Wire) -> None:
        for _ in range(8):
            wire.write(BLOCK)
            await wire.drain()
        wire.write_eof()

    async def drink(wire: Wire) -> tuple[int, str]:
        total, seen = 0, hashlib.blake2b()
        while block := await wire.read():
            total += len(block)
            seen.update(block)
        return total, seen.hexdigest()

    client.write(b"left over\r\n")
    await near.wait_readable()
    joined = Splice(near, far, idle=60)
    running = loop.create_task(joined.run())
    assert await upstream.line(100) == b"left over"
    # The client's close_notify ends its direction only; the answer comes after it.
    _, up = await asyncio.gather(pour(client), drink(upstream))
    _, down = await asyncio.gather(pour(upstream), drink(client))
    assert up == down == expected(8)
    result = await running
    assert (result.bytes_up, result.bytes_down) == (8 * MIB + 11, 8 * MIB)
    assert result.reason == "client closed"
    for wire in (client, upstream):
        await wire.aclose()
    server.close()
    await server.wait_closed()


def test_the_pool_is_bounded_and_closes() -> None:
    pool = PipePool(2)
    first, second = pool.take(), pool.take()
    assert first is not None and second is not None and pool.take() is None
    assert fcntl.fcntl(first.into, fcntl.F_GETPIPE_SZ) >= 1 << 16
    pool.give(first)
    assert pool.take() is first
    pool.give(first)
    pool.give(second)
    pool.close()
    with pytest.raises(OSError):
        os.fstat(first.into)
