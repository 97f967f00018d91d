"""A scripted name server on UDP and TCP of one loopback port, in the test's own loop (written with dnspython).

The zone says what becomes of each name, for all its types:

    async with DnsServer({"ok.test": {"A": ["192.0.2.1"]}, "down.test": {"do": "servfail"}}) as server:
        resolver = Resolver([server.address])

`do` is one of: `answer` (the default: the records, or none of that type), `nxdomain` (also for names that are not in
the zone), `servfail`, `refused`, `silent`, `garbage` (bytes that are no message), `half` (a message cut short),
`wrongid`, `wrongname`, `truncate` (whole over TCP only), `torn` (truncated, and TCP closes early), `spoof` (all of
the wrong ones before the right one), `hold` (no answer before `release`). `ttl` is 300 unless said. An alias of a
name in the zone is answered with its target's records behind it unless `bare` is true. `negative` puts a SOA behind
an answer without records, which stays true for that many seconds.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

Entry = Mapping[str, Any]
RCODES = {"servfail": dns.rcode.SERVFAIL, "refused": dns.rcode.REFUSED, "nxdomain": dns.rcode.NXDOMAIN}
MAX_LINKS = 16


class DnsServer:
    """The server; `zone` may be changed while it runs. `asked` holds every question as (name, type, "udp" | "tcp").

    `listen` is where: port 0 takes any free one.
    """

    def __init__(self, zone: Mapping[str, Entry] | None = None, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self._listen = listen
        self.zone: dict[str, Entry] = dict(zone or {})
        self.asked: list[tuple[str, str, str]] = []
        self.ports: list[int] = []
        self.arrived = asyncio.Event()
        self._released = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> DnsServer:
        loop = asyncio.get_running_loop()
        while True:
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            udp.bind(self._listen)
            udp.setblocking(False)
            self.address = (self._listen[0], int(udp.getsockname()[1]))
            try:
                self._tcp = await asyncio.start_server(self._stream, *self.address)
                break
            except OSError:  # that port is taken for TCP: try another
                udp.close()
                if self._listen[1]:
                    raise
        self._udp, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=udp)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._udp.close()
        self._tcp.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def release(self) -> None:
        """Let the held answers go."""
        self._released.set()

    async def wait_asked(self, count: int) -> None:
        """Wait until `count` questions came."""
        while len(self.asked) < count:
            self.arrived.clear()
            await self.arrived.wait()

    def datagram(self, wire: bytes, address: tuple[str, int], transport: asyncio.DatagramTransport) -> None:
        """A question by UDP."""
        self.ports.append(address[1])
        self._start(self._send_answers(wire, address, transport))

    async def _send_answers(self, wire: bytes, address: tuple[str, int], transport: asyncio.DatagramTransport) -> None:
        async for answer in self._answers(wire, "udp"):
            if not transport.is_closing():
                transport.sendto(answer, address)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(2), "big")
                async for answer in self._answers(await reader.readexactly(length), "tcp"):
                    framed = len(answer).to_bytes(2, "big") + answer
                    if self._entry_of(answer).get("do") == "torn":
                        writer.write(framed[:-3])
                        return
                    writer.write(framed[:1])  # in pieces, as a stream may be
                    await writer.drain()
                    writer.write(framed[1:])
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def _entry_of(self, wire: bytes) -> Entry:
        return self.zone.get(_name(dns.message.from_wire(wire, ignore_trailing=True)), {})

    async def _answers(self, wire: bytes, transport: str) -> Any:
        question = dns.message.from_wire(wire)
        name, qtype = _name(question), dns.rdatatype.to_text(question.question[0].rdtype)
        self.asked.append((name, qtype, transport))
        self.arrived.set()
        entry = self.zone.get(name, {"do": "nxdomain"})
        what = entry.get("do", "answer")
        if what == "silent":
            return
        if what == "hold":
            await self._released.wait()
        for answer in self._scripted(question, name, qtype, what, transport):
            yield answer

    def _scripted(
        self, question: dns.message.Message, name: str, qtype: str, what: str, transport: str
    ) -> Iterator[bytes]:
        if what == "spoof":
            for wrong in ("garbage", "wrongid", "wrongname", "half"):
                yield from self._scripted(question, name, qtype, wrong, transport)
        if what == "garbage":
            yield os.urandom(40)
            return
        answer = dns.message.make_response(question, recursion_available=True)
        if what in RCODES:
            answer.set_rcode(RCODES[what])
        elif what in ("truncate", "torn") and transport == "udp":
            answer.flags |= dns.flags.TC
        else:
            self._fill(answer, name, qtype)
        negative = self.zone.get(name, {}).get("negative")
        if negative is not None and not answer.answer:
            soa = f"ns.test. root.test. 1 3600 600 86400 {negative}"
            answer.authority.append(dns.rrset.from_text("test.", 100_000, "IN", "SOA", soa))
        if what == "wrongid":
            answer.id = (question.id + 1) & 0xFFFF
        if what == "wrongname":
            answer.question = [dns.rrset.from_text("other.test.", 0, "IN", qtype)]
        encoded = answer.to_wire()
        yield encoded[:15] if what == "half" else encoded

    def _fill(self, answer: dns.message.Message, name: str, qtype: str) -> None:
        for _ in range(MAX_LINKS):
            entry = self.zone.get(name)
            if entry is None:
                answer.set_rcode(dns.rcode.NXDOMAIN)
                return
            ttl = entry.get("ttl", 300)
            if qtype in entry:
                answer.answer.append(dns.rrset.from_text(f"{name}.", ttl, "IN", qtype, *entry[qtype]))
            if qtype in entry or "CNAME" not in entry:
                return
            answer.answer.append(dns.rrset.from_text(f"{name}.", ttl, "IN", "CNAME", *entry["CNAME"]))
            name = entry["CNAME"][0].rstrip(".").lower()
            if entry.get("bare"):
                return


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        self._server.datagram(data, addr, self._transport)


def _name(message: dns.message.Message) -> str:
    return message.question[0].name.to_text().rstrip(".").lower()
