"""The clients of a bench run: smtp-source in clear text, a small one of our own under TLS, and idle ones.

`python -m bench.clients tls|together PORT MESSAGES OCTETS` runs in a process of its own: its CPU is nobody's.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median


def source(port: int, messages: int, octets: int, sessions: int, *, kept: bool = False) -> None:
    """smtp-source: one message a connection, or all of them over `sessions` connections (`kept`)."""
    options = ["-d"] if kept else []
    subprocess.run(
        ["/usr/sbin/smtp-source", *options, "-s", str(sessions), "-m", str(messages), "-l", str(octets),
         "-f", "a@example.org", "-t", "b@example.net", "-M", "source.test", f"127.0.0.1:{port}"],
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
        raw = socket.create_connection(("127.0.0.1", port), 120)
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


def end_latency(ports: Sequence[int], octets: int, rounds: int) -> list[tuple[float, float]]:
    """For each port the median milliseconds from content and dot to the answer, and from MAIL to that answer.

    One session each, message by message, the ports in turn; the first tenth does not count.
    """
    line = b"x" * 78 + b"\r\n"
    content = b"From: <a@example.org>\r\nSubject: bench\r\n\r\n" + line * (octets // len(line)) + b".\r\n"
    sessions = [Client(port) for port in ports]
    for client in sessions:
        client.reply()
        client.say(b"EHLO source.test\r\n", b"250")
    ends: list[list[float]] = [[] for _ in ports]
    wholes: list[list[float]] = [[] for _ in ports]
    for turn in range(rounds + rounds // 10):
        for client, end, whole in zip(sessions, ends, wholes, strict=True):
            begun = time.perf_counter()
            client.say(b"MAIL FROM:<a@example.org>\r\n", b"250")
            client.say(b"RCPT TO:<b@example.net>\r\n", b"250")
            client.say(b"DATA\r\n", b"354")
            dot = time.perf_counter()
            client.say(content, b"250")
            if turn >= rounds // 10:
                end.append((time.perf_counter() - dot) * 1000)
                whole.append((time.perf_counter() - begun) * 1000)
    for client in sessions:
        client.say(b"QUIT\r\n", b"221")
        client.close()
    return [(median(end), median(whole)) for end, whole in zip(ends, wholes, strict=True)]


def idle(port: int, count: int, tls: bool) -> list[Client]:
    """Clients that read their greeting and then do nothing."""
    made = context() if tls else None
    clients = []
    for _ in range(count):
        client = Client(port, made)
        client.reply()
        clients.append(client)
    return clients


def together(port: int, senders: int, octets: int) -> None:
    """Senders that are all in the middle of their content at the same time, in one process of their own.

    smtp-source would write one message after the other, however many sessions it has.
    """
    subprocess.run(
        [sys.executable, "-m", "bench.clients", "together", str(port), str(senders), str(octets)],
        check=True, timeout=300,
    )  # fmt: skip


def _together(port: int, senders: int, octets: int) -> None:
    """A thread each; nobody sends content before all may, and nobody its end before all have sent theirs."""
    line = b"x" * 78 + b"\r\n"
    head, block = b"Subject: bench\r\n\r\n", line * 800
    everybody = threading.Barrier(senders)

    def send(_: int) -> None:
        client = Client(port)
        try:
            client.reply()
            client.say(b"EHLO source.test\r\n", b"250")
            client.say(b"MAIL FROM:<a@example.org>\r\n", b"250")
            client.say(b"RCPT TO:<b@example.net>\r\n", b"250")
            client.say(b"DATA\r\n", b"354")
            everybody.wait()
            client.sock.sendall(head)
            for _ in range(octets // len(block)):
                client.sock.sendall(block)
            everybody.wait()
            client.say(b".\r\n", b"250")
            client.say(b"QUIT\r\n", b"221")
        except BaseException:
            everybody.abort()
            raise
        finally:
            client.close()

    with ThreadPoolExecutor(senders) as pool:
        list(pool.map(send, range(senders)))


def main() -> None:
    """The clients with a process of their own."""
    port, messages, octets = (int(word) for word in sys.argv[2:5])
    if sys.argv[1] == "together":
        _together(port, messages, octets)
    else:
        _tls_messages(port, messages, octets)


def _tls_messages(port: int, messages: int, octets: int) -> None:
    line = b"x" * 78 + b"\r\n"
    body = b"Subject: bench\r\n\r\n" + line * (octets // len(line) + 1)
    made = context()
    for _ in range(messages):
        client = Client(port, made)
        client.message(body)
        client.close()


if __name__ == "__main__":
    main()
