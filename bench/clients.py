"""The clients of a bench run: smtp-source in clear text, a small one of our own under TLS, and idle ones.

`python -m bench.clients tls PORT MESSAGES OCTETS` runs in a process of its own: its CPU is nobody's.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import time


def source(port: int, messages: int, octets: int, sessions: int) -> None:
    """smtp-source: one message a connection, `sessions` at a time."""
    subprocess.run(
        ["/usr/sbin/smtp-source", "-s", str(sessions), "-m", str(messages), "-l", str(octets), "-f", "a@example.org",
         "-t", "b@example.net", "-M", "source.test", f"127.0.0.1:{port}"],
        check=True, timeout=300,
    )  # fmt: skip


def tls_messages(port: int, messages: int, octets: int) -> None:
    """The TLS client in its own process."""
    subprocess.run(
        [sys.executable, "-m", "bench.clients", "tls", str(port), str(messages), str(octets)], check=True, timeout=300
    )


class Client:
    """A plain SMTP client on a blocking socket."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        raw = socket.create_connection(("127.0.0.1", port), 60)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = context.wrap_socket(raw) if context is not None else raw
        self.file = self.sock.makefile("rb")

    def reply(self) -> bytes:
        """One reply, all of its lines."""
        lines = b""
        while True:
            line = self.file.readline()
            lines += line
            if line[3:4] != b"-":
                return lines

    def say(self, data: bytes, code: bytes) -> None:
        """Send, and expect a reply with this code."""
        self.sock.sendall(data)
        reply = self.reply()
        if not reply.startswith(code):
            raise RuntimeError(f"{data[:40]!r}: {reply!r}")

    def message(self, body: bytes) -> None:
        """A session with one message."""
        self.reply()
        self.say(b"EHLO source.test\r\n", b"250")
        self.say(b"MAIL FROM:<a@example.org>\r\n", b"250")
        self.say(b"RCPT TO:<b@example.net>\r\n", b"250")
        self.say(b"DATA\r\n", b"354")
        self.say(body + b".\r\n", b"250")
        self.say(b"QUIT\r\n", b"221")

    def close(self) -> None:
        """Close."""
        self.file.close()
        self.sock.close()


def context() -> ssl.SSLContext:
    """TLS without verification, no session reuse: each handshake is a full one."""
    made = ssl.create_default_context()
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    return made


def pipelined_latency(port: int, rounds: int = 21) -> float:
    """Median milliseconds from sending MAIL and RCPT in one write to both replies."""
    taken = []
    for _ in range(rounds):
        client = Client(port)
        client.reply()
        client.say(b"EHLO source.test\r\n", b"250")
        begun = time.perf_counter()
        client.sock.sendall(b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\n")
        client.reply()
        client.reply()
        taken.append((time.perf_counter() - begun) * 1000)
        client.say(b"QUIT\r\n", b"221")
        client.close()
    return sorted(taken)[len(taken) // 2]


def idle(port: int, count: int, tls: bool) -> list[Client]:
    """Clients that read their greeting and then do nothing."""
    made = context() if tls else None
    clients = []
    for _ in range(count):
        client = Client(port, made)
        client.reply()
        clients.append(client)
    return clients


def main() -> None:
    """The TLS client process."""
    port, messages, octets = (int(word) for word in sys.argv[2:5])
    line = b"x" * 78 + b"\r\n"
    body = b"Subject: bench\r\n\r\n" + line * (octets // len(line) + 1)
    made = context()
    for _ in range(messages):
        client = Client(port, made)
        client.message(body)
        client.close()


if __name__ == "__main__":
    main()
