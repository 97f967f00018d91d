"""Clients: swaks, and a plain socket for what a well-behaved client would not do. Both block: see process.py."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from tests.peers.require import require

LIMIT = 15.0


class Swaks(NamedTuple):
    """How a run ended: its exit status (0: all went well; 24 no recipient taken; 28 login failed) and transcript."""

    status: int
    transcript: str

    @property
    def replies(self) -> list[str]:
        """The server's lines, without swaks' marks."""
        marks = ("<-", "<~", "<**", "<~*")
        lines = (line.split(None, 1) for line in self.transcript.splitlines())
        return [words[1] for words in lines if len(words) == 2 and words[0] in marks]

    @property
    def last(self) -> str:
        """The last reply before the one to QUIT."""
        replies = [reply for reply in self.replies if not reply.startswith("221")]
        return replies[-1] if replies else ""


def swaks(port: int, *options: str, to: str = "user@local.test", limit: float = LIMIT) -> Swaks:
    """Run swaks against a loopback port; a test message from a@x.test unless `options` say otherwise.

    Of use: `--tls`, `--tlsc`, `--auth PLAIN --auth-user U --auth-password P`, `--xclient-addr A`, `--pipeline`,
    `--quit-after RCPT`, `--drop-after DATA`, `--data TEXT`.
    """
    command = [
        require("swaks"), "--server", f"127.0.0.1:{port}", "--helo", "client.test", "--from", "a@x.test", "--to", to,
        "--timeout", str(int(limit)), *options,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, timeout=limit + 5, check=False, stdin=subprocess.DEVNULL)
    return Swaks(run.returncode, (run.stdout + run.stderr).decode("utf-8", "replace"))


def read_reply(connection: socket.socket) -> bytes:
    """One reply, all its lines; what there was if the server closed."""
    reply = b""
    while True:
        byte = connection.recv(1)  # byte by byte, so that nothing of the next reply is taken
        reply += byte
        if not byte or (byte == b"\n" and reply.rpartition(b"\n")[0].rpartition(b"\n")[2][3:4] != b"-"):
            return reply


def talk(port: int, *lines: bytes | str, first: bytes = b"", limit: float = LIMIT) -> list[str]:
    """Say each line after the reply to the one before it: the greeting and all replies.

    `first` is sent before the greeting (a PROXY header, early talk). An empty reply is the server's closing, and
    ends the conversation.
    """
    with socket.create_connection(("127.0.0.1", port), limit) as connection:
        if first:
            connection.sendall(first)
        replies = [read_reply(connection)]
        for line in lines:
            if not replies[-1]:
                break
            connection.sendall(line if isinstance(line, bytes) else line.encode() + b"\r\n")
            replies.append(read_reply(connection))
    return [reply.decode("utf-8", "replace") for reply in replies]


def burst(port: int, data: bytes, *, limit: float = LIMIT) -> bytes:
    """Send everything at once, then read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), limit) as connection:
        connection.sendall(data)
        received: list[bytes] = []
        try:
            while block := connection.recv(65536):
                received.append(block)
        except ConnectionResetError:
            pass
        return b"".join(received)


def dialogue(sender: str = "a@x.test", recipients: Sequence[str] = ("user@local.test",), text: str = "hi") -> list[str]:
    """The lines of a whole session for `talk`, the content as one of them."""
    content = f"Subject: test\r\n\r\n{text}\r\n."
    envelope = [f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{recipient}>" for recipient in recipients)]
    return ["EHLO client.test", *envelope, "DATA", content, "QUIT"]
