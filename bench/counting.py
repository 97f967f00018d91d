"""A sink that counts numbered mail, and a small mail store: `python -m bench.counting PORT PORT IMAP-PORT FILE`.

It prints ready and runs until SIGTERM, when it writes an octet for each number to the file: how often that message came
(bench/numbered.py compares). It does as little as it can: its CPU is taken from what the gateway could use.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import uvloop

from bench.numbered import LINE
from bench.store_server import Imap

FETCHED = b"* 1 FETCH (BODY[] {%d}\r\n" % 65_520 + LINE * 819 + b")\r\n"


class Sink(asyncio.Protocol):
    """A mail server that takes everything and counts numbers."""

    def __init__(self, counts: bytearray) -> None:
        self.counts = counts

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self.begun, self.content = b"", False
        self.transport.write(b"220 sink.test ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        """Commands, or content up to its dot; nobody says more before the answer to it."""
        if self.content:
            self.begun = (self.begun + data)[-64:] if len(data) < 64 else data[-64:]
            if self.begun.endswith(b"\r\n.\r\n"):
                number = int(self.begun[-14:-5])
                if number >= len(self.counts):
                    self.counts.extend(bytes(number - len(self.counts) + 4096))
                self.counts[number] = min(255, self.counts[number] + 1)
                self.begun, self.content = b"", False
                self.transport.write(b"250 2.0.0 taken\r\n")
            return
        lines = (self.begun + data).split(b"\r\n")
        self.begun = lines.pop()
        self.transport.write(b"".join(self.answer(line[:4].upper()) for line in lines))

    def answer(self, verb: bytes) -> bytes:
        """One command's."""
        match verb:
            case b"EHLO":
                return b"250-sink.test\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 100000000\r\n"
            case b"DATA":
                self.content = True
                return b"354 go on\r\n"
            case b"QUIT":
                self.transport.write(b"221 2.0.0 bye\r\n")
                self.transport.close()
                return b""
            case _:
                return b"250 2.0.0 fine\r\n"


class SmallImap(Imap):
    """64 KiB for FETCH, and IDLE."""

    def line(self, line: bytes) -> None:
        """One line."""
        tag, _, verb = line.partition(b" ")
        if verb[:5].upper() == b"FETCH":
            self.transport.write(FETCHED + tag + b" OK done\r\n")
        elif verb[:4].upper() == b"IDLE":
            self.idling = tag
            self.transport.write(b"+ idling\r\n")
        elif line == b"DONE":
            self.transport.write(self.idling + b" OK done\r\n")
        else:
            super().line(line)


async def sink(ports: Sequence[int], imap: int) -> bytes:
    """The counts, at SIGTERM."""
    loop = asyncio.get_running_loop()
    counts, end = bytearray(4096), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, end.set)
    for port in ports:
        await loop.create_server(lambda: Sink(counts), "127.0.0.1", port, backlog=512)
    await loop.create_server(SmallImap, "127.0.0.1", imap, backlog=512)
    print("ready", flush=True)
    await end.wait()
    return bytes(counts)


if __name__ == "__main__":
    *listen, store = (int(word) for word in sys.argv[1:4])
    Path(sys.argv[4]).write_bytes(uvloop.run(sink(listen, store)))
