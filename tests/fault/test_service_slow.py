"""Clients that are slow to write or to read, and half-open ones: the time-outs free them, and nothing of them stays.

In clear and over TLS, in each grade of SMTP, and for IMAP before and after the login.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import yaml

from tests.fault.halves import AWAY, HOST, Namespaces, connected
from tests.fault.load import CountingSink
from tests.fault.service import GATEWAY, Service, service
from tests.peers.process import free_port

UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])
pytestmark = [pytest.mark.anyio, pytest.mark.slow, UVLOOP]

LIMITS = {
    "command_timeout": "3s", "write_timeout": "3s", "data_timeout": "3s", "message_timeout": "4s", "tls_timeout": "3s",
    "login_timeout": "4s", "idle_timeout": "3s", "session_timeout": "7s", "linger": "300ms", "junk_commands": 1_000_000,
}  # fmt: skip
PATIENCE = dict.fromkeys(("connect_timeout", "greeting_timeout", "command_timeout", "data_done_timeout"), "3s")
EMBEDDED = {"upstreams": {"sink": {"servers": ["embedded://mail"]}}}
STAGES: dict[str, list[object]] = {
    "opaque": ["splice"],
    "envelope": [{"splice": {"handoff": "never"}}],
    "content": [{"headers": [{"delete": "X-Secret"}]}, "splice"],
    "imap": [{"upstream_auth": {"credentials": "client", "verify": "upstream"}}, "splice"],
}
CONTEXT = ssl.create_default_context()
CONTEXT.check_hostname = False
CONTEXT.verify_mode = ssl.CERT_NONE
BULK = 2_000_000  # more than all buffers on the way hold


class FloodingStore(asyncio.Protocol):
    """An IMAP server that logs everybody in, and says BULK octets to whoever asks to be flooded."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._unread = b""
        self._transport.write(b"* OK store.test\r\n")

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\r\n")
        for line in lines:
            tag, _, command = line.partition(b" ")
            if command == b"CAPABILITY":
                self._transport.write(b"* CAPABILITY IMAP4rev1\r\n")
            elif command == b"FLOOD":
                self._transport.write(b"* OK more\r\n" * (BULK // 11))
            self._transport.write(tag + b" OK done\r\n")


class Peer:
    """A client that blocks; the log knows it by its `port`. `tls`: over TLS, but for the handshake."""

    def __init__(self, sock: socket.socket, tls: bool, end: threading.Event) -> None:
        self.port: int = sock.getsockname()[1]
        self.tls = tls
        self.end = end
        self.sock = sock
        self._unread = b""

    def begin(self) -> None:
        """The handshake, if any, and the greeting."""
        if self.tls:
            self.sock = CONTEXT.wrap_socket(self.sock)
        self.reply(b"")

    def reply(self, tag: bytes) -> None:
        """Read up to the reply's last line: the one with the tag, or of a code and a blank."""
        while True:
            while b"\r\n" not in self._unread:
                data = self.sock.recv(4096)
                assert data, "closed"
                self._unread += data
            line, _, self._unread = self._unread.partition(b"\r\n")
            if line.startswith(tag) if tag else line[3:4] == b" " or line.startswith(b"* "):
                return

    def say(self, *lines: bytes, tag: bytes = b"") -> None:
        """Send each, and read its reply."""
        for line in lines:
            self.sock.sendall(line + b"\r\n")
            self.reply(tag)

    def drip(self, data: bytes) -> None:
        """This again and again, a little at a time, as long as somebody takes it."""
        with suppress(OSError):
            while not self.end.wait(0.2):
                self.sock.sendall(data)

    def pour(self, data: bytes) -> None:
        """All of this, or as much as is taken at once."""
        self.sock.settimeout(0.5)
        with suppress(OSError):
            self.sock.sendall(data)


def silent(peer: Peer) -> None:
    peer.begin()


def half_a_line(peer: Peer) -> None:
    peer.begin()
    peer.sock.sendall(b"NOO")


def dripped_line(peer: Peer) -> None:
    peer.begin()
    peer.drip(b"N")


def in_a_transaction(peer: Peer) -> None:
    peer.begin()
    peer.say(b"EHLO client.test", b"MAIL FROM:<a@x.test>", b"RCPT TO:<b@x.test>")


def half_a_message(peer: Peer) -> None:
    in_a_transaction(peer)
    peer.say(b"DATA")
    peer.sock.sendall(b"Subject: x\r\n\r\nhal")


def dripped_message(peer: Peer) -> None:
    half_a_message(peer)
    peer.drip(b"l\r\n")


def deaf(peer: Peer) -> None:
    """It asks a lot and reads nothing."""
    peer.begin()
    peer.say(b"EHLO client.test")
    peer.pour(b"NOOP\r\n" * 40_000)


def deaf_in_a_transaction(peer: Peer) -> None:
    """The same where the opaque grade has handed off."""
    in_a_transaction(peer)
    peer.pour(b"NOOP\r\n" * 40_000)


def no_handshake(peer: Peer) -> None:
    pass


def half_a_handshake(peer: Peer) -> None:
    peer.sock.sendall(bytes.fromhex("16030100c8010000"))


def logged_in(peer: Peer) -> None:
    peer.begin()
    peer.say(b'a LOGIN "tim" "secret"', tag=b"a ")


def half_a_command(peer: Peer) -> None:
    logged_in(peer)
    peer.sock.sendall(b"b NOO")


def dripped_command(peer: Peer) -> None:
    logged_in(peer)
    peer.drip(b"b")


def deaf_reader(peer: Peer) -> None:
    logged_in(peer)
    peer.sock.sendall(b"b FLOOD\r\n")


Behavior = Callable[[Peer], None]
HANDSHAKES: list[Behavior] = [no_handshake, half_a_handshake]
SMTP: list[Behavior] = [silent, half_a_line, dripped_line, half_a_message, dripped_message, deaf, deaf_in_a_transaction]
IMAP: list[Behavior] = [silent, half_a_line, dripped_line, logged_in, half_a_command, dripped_command, deaf_reader]
FOLLOWING: dict[Behavior, bytes] = {
    in_a_transaction: b"DATA\r\n",
    half_a_message: (b"x" * 70 + b"\r\n") * (BULK // 18),
    logged_in: b"b NOOP\r\n",
}
SMTP_CUT: list[Behavior] = [silent, half_a_message, deaf, deaf_in_a_transaction]
IMAP_CUT: list[Behavior] = [silent, logged_in, half_a_command, deaf_reader]
ENDS = ("time-out", "handed off: idle", "TLS handshake failed: time-out")


@dataclass
class Site:
    """A service with a pipeline of each kind, and what its one worker has open when nobody is there."""

    running: Service
    ports: dict[tuple[str, bool], int]
    sockets: int

    @property
    def worker(self) -> int:
        """Its process id."""
        return self.running.workers()[0]

    def ended(self, ports: Sequence[int]) -> dict[int, str]:
        """How the sessions of these clients ended, as far as they did."""
        ends = {int(str(record["port"])): str(record["reason"]) for record in self.running.all("session")}
        return {port: ends[port] for port in ports if port in ends}

    async def nothing_left(self) -> None:
        """No session and none that was never counted as ended; no socket but those from before, in the worker itself."""
        async with asyncio.timeout(20):
            while sockets_of(self.worker) != self.sockets:
                await self.running.ask("status")
        status = cast("dict[str, dict[str, object]]", await self.running.ask("status"))
        counters = cast("dict[str, int]", status["stats"]["counters"])
        assert status["stats"]["sessions"] == 0 and status["info"]["restarts"] == 0, status
        assert counters["gateway_sessions_started_total"] == counters["gateway_sessions_total"], counters


def sockets_of(pid: int) -> int:
    """How many sockets and files without a name a process has open (pipes for splicing are kept)."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(entry))
    return sum(link.startswith("socket:") or link.endswith("(deleted)") for link in links)


async def sockets_at_rest(running: Service) -> int:
    """Of the worker, once it has ended its first talk with the upstreams."""
    (worker, _), before = running.workers(), -1
    while (now := sockets_of(worker)) != before:
        before = now
        await running.ask("status")
    return now


@asynccontextmanager
async def site(
    folder: Path,
    tls_files: tuple[Path, Path],
    host: str,
    prefix: Sequence[str] = (),
    upstreams: Sequence[socket.socket] = (),
) -> AsyncIterator[Site]:
    """Every pipeline listens in clear and with TLS from the start; `upstreams` are SMTP's and IMAP's listener."""
    loop = asyncio.get_running_loop()
    ports = {(name, tls): free_port() for name in STAGES for tls in (False, True)}
    async with CountingSink(folder, upstreams[0] if upstreams else None) as sink:
        if upstreams:
            store = await loop.create_server(FloodingStore, sock=upstreams[1])
            url = "imap://{}:{}".format(*upstreams[1].getsockname())
        else:
            store = await loop.create_unix_server(FloodingStore, str(folder / "store.sock"))
            url = f"imap+unix:{folder}/store.sock"
        pools = {"store": {"servers": [url], "allow_plaintext_login": True, **PATIENCE}}
        files = []
        for name in STAGES:
            files.append(folder / f"{name}.yaml")
            urls = [
                f"{'imap' if name == 'imap' else 'smtp'}{'s' * tls}://{host}:{ports[name, tls]}"
                for tls in (False, True)
            ]
            document = {
                "name": name,
                "hostname": "gw.example.org",
                "listen": [{"url": url, "sndbuf": 8192} for url in urls],
                "tls": {"certificates": [{"chain": str(tls_files[0]), "key": str(tls_files[1])}]},
                "limits": LIMITS,
                "stages": STAGES[name],
                "upstreams": pools if name == "imap" else sink.pool(**PATIENCE),
                **({"allow_plaintext_auth": True} if name == "imap" else {"relay": "open"}),
            }
            files[-1].write_text(yaml.safe_dump(document))
        unused = {"name": "unused", "listen": [f"smtp://{host}:{free_port()}"], "stages": ["splice"], **EMBEDDED}
        async with service(folder, unused, *map(str, files), command=[*prefix, *GATEWAY]) as running:
            yield Site(running, ports, await sockets_at_rest(running))
        store.close()


def peers_of(place: Site, behaviors: Callable[[str, bool], list[Behavior]], host: str, end: threading.Event,
             inside: Callable[[Callable[[], socket.socket]], socket.socket]) -> list[tuple[Peer, Behavior]]:  # fmt: skip
    """A client for each pipeline, with TLS and without, and each of its behaviors."""
    return [
        (Peer(inside(lambda port=port: connected(host, port)), tls, end), behavior)  # type: ignore[misc]
        for (name, tls), port in place.ports.items()
        for behavior in behaviors(name, tls)
    ]


def slow(name: str, tls: bool) -> list[Behavior]:
    return (IMAP if name == "imap" else SMTP) + (HANDSHAKES if tls else [])


def cut_off(name: str, tls: bool) -> list[Behavior]:
    return IMAP_CUT if name == "imap" else SMTP_CUT


async def freed(place: Site, peers: list[tuple[Peer, Behavior]]) -> None:
    """All of them, by a time-out."""
    ports = [peer.port for peer, _ in peers]
    await place.running.until(lambda: len(place.ended(ports)) == len(ports))
    ends = place.ended(ports)
    wrong = [
        (behavior.__name__, peer.tls, ends[peer.port])
        for peer, behavior in peers
        if not ends[peer.port].startswith(ENDS)
    ]
    assert not wrong, wrong


def behave(threads: ThreadPoolExecutor, peers: list[tuple[Peer, Behavior]]) -> asyncio.Future[list[None]]:
    """All at once; the servers behind the gateway are in this loop, so nobody blocks it."""
    return asyncio.gather(*(asyncio.wrap_future(threads.submit(behavior, peer)) for peer, behavior in peers))


@pytest.mark.timeout(120)
async def test_the_slow_are_freed_by_the_time_outs(tmp_path: Path, tls_files: tuple[Path, Path]) -> None:
    end = threading.Event()
    async with site(tmp_path, tls_files, "127.0.0.1") as place:
        peers = peers_of(place, slow, "127.0.0.1", end, lambda make: make())
        with ThreadPoolExecutor(len(peers)) as threads:
            behaving = behave(threads, peers)
            try:
                await freed(place, peers)
            finally:
                end.set()
            await behaving
        await place.nothing_left()


@pytest.mark.timeout(120)
async def test_the_half_open_are_freed_by_the_time_outs(tmp_path: Path, tls_files: tuple[Path, Path]) -> None:
    """The link is cut when all are where they are to be; nothing tells the gateway."""
    end = threading.Event()
    with Namespaces() as net:
        async with site(tmp_path, tls_files, HOST, net.command) as place:
            peers = peers_of(place, cut_off, HOST, end, net.inside)
            with ThreadPoolExecutor(len(peers)) as threads:
                await behave(threads, peers)
            early = place.ended([peer.port for peer, _ in peers])
            net.cut()
            await freed(place, peers)
            assert not early
            await place.nothing_left()


def go_on(behavior: Behavior) -> Behavior:
    """What the client says next."""
    return lambda peer: peer.pour(FOLLOWING[behavior])


def following(name: str, tls: bool) -> list[Behavior]:
    return [logged_in] if name == "imap" else [in_a_transaction, half_a_message]


@pytest.mark.timeout(120)
async def test_half_open_upstreams_are_given_up_by_the_time_outs(tmp_path: Path, tls_files: tuple[Path, Path]) -> None:
    """The link to the upstreams is cut; the clients go on, read nothing, and are freed, too."""
    end = threading.Event()
    with Namespaces() as net:
        listeners = [net.inside(lambda: socket.create_server((AWAY, 0))) for _ in range(2)]
        async with site(tmp_path, tls_files, HOST, net.command, listeners) as place:
            peers = peers_of(place, following, HOST, end, lambda make: net.inside(make, "a"))
            with ThreadPoolExecutor(len(peers)) as threads:
                await behave(threads, peers)
                net.cut()
                await behave(threads, [(peer, go_on(behavior)) for peer, behavior in peers])
            await freed(place, peers)
            await place.nothing_left()
