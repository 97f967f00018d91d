"""A scripted server (SMTP, IMAP, POP3) in the test's own loop, and the sessions that talk to it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trustme

from gateway.session import Listener, Session


class Peer:
    """Plays one dialogue a connection, the last one again and again.

    Lines of a dialogue: `S: ...` is sent with CRLF, consecutive ones in one write; `C: ...` must come; `raw ...` is
    sent as it is (with \\r and \\n escapes); `tls` shakes hands; `hang` waits for the client to close; `close` closes,
    which the end of the dialogue does too once the client has.
    """

    def __init__(self, dialogues: tuple[str, ...], context: ssl.SSLContext) -> None:
        self.dialogues = list(dialogues)
        self.context = context
        self.problems: list[str] = []
        self.connections = 0
        self.arrived = asyncio.Event()
        self.gone = asyncio.Event()
        self.go_on = asyncio.Event()
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        dialogue = self.dialogues[min(self.connections, len(self.dialogues) - 1)]
        self.connections += 1
        self.arrived.set()
        try:
            await self._play(dialogue.split("\n"), reader, writer)
        except (OSError, ssl.SSLError, asyncio.CancelledError):
            pass
        except AssertionError as error:
            self.problems.append(str(error))
        finally:
            writer.close()
            self._tasks.discard(task)
            self.gone.set()

    async def _play(self, lines: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = b""
        for line in lines:
            kind, _, text = line.partition(" ")
            if kind == "S:":
                said += text.encode() + b"\r\n"
                continue
            if said:
                writer.write(said)
                said = b""
            match kind:
                case "C:":
                    got = await reader.readline()
                    assert got == text.encode() + b"\r\n", f"expected {text!r}, got {got!r}"
                case "read":
                    got = await reader.readexactly(int(text))
                case "raw":
                    writer.write(text.encode().decode("unicode_escape").encode("latin-1"))
                case "tls":
                    await writer.start_tls(self.context)
                case "wait":
                    await self.go_on.wait()
                case "hang":
                    await reader.read()
                case "close":
                    return
                case _:
                    raise AssertionError(f"unknown step {line!r}")
        writer.write(said)
        rest = await reader.read()
        assert rest == b"", f"more than the dialogue has: {rest!r}"

    async def stop(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """The authority that signed the peers' certificate."""
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    """The authority's certificate."""
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture
async def peers(authority: trustme.CA) -> AsyncIterator[Callable[..., object]]:
    """Start a scripted peer: `peer = await peers("dialogue", ...)`; what went wrong there fails the test."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("mx.example", "127.0.0.1").configure_cert(context)
    started: list[tuple[Peer, asyncio.Server]] = []

    async def start(*dialogues: str, implicit_tls: bool = False, path: str = "", scheme: str = "smtp") -> Peer:
        peer = Peer(dialogues, context)
        tls = context if implicit_tls else None
        if path:
            server = await asyncio.start_unix_server(peer.connected, path)
            peer.url = f"{scheme}+unix:{path}"
        else:
            server = await asyncio.start_server(peer.connected, "127.0.0.1", 0, ssl=tls)
            port = server.sockets[0].getsockname()[1]
            peer.url = f"{scheme}{'s' if implicit_tls else ''}://127.0.0.1:{port}"
        started.append((peer, server))
        return peer

    yield start
    for peer, server in started:
        server.close()
        await peer.stop()
    assert [problem for peer, _ in started for problem in peer.problems] == []


@pytest.fixture
def closed_port() -> str:
    """The URL of a port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"smtp://127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def new_session() -> Callable[..., Session]:
    """Make a session of a client."""

    def make(address: str = "192.0.2.7", user: str = "") -> Session:
        session = Session("7KQ2-M9", "test", Listener("smtp://127.0.0.1:25"), (address, 52001), ("127.0.0.1", 25), 0.0)
        session.user = user
        return session

    return make
