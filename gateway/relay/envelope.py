"""Carrying one message's content to the upstream in the envelope grade: raw blocks, never held back.

Content goes upstream as it comes, already checked for its end and its line ends. What must be refused (too
big, illegal line ends, a loop, an upstream that left) stops the flow at once, but the client's content is
read to its true end before it is answered, so that no byte of it is ever taken for a command (promise 5).
The upstream never gets the end of a refused message: its connection is closed instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.protocol.content import DataScanner, DotStuffer
from gateway.protocol.headers import HeaderField
from gateway.protocol.smtp import PARAMETER_EXTENSION, Reply
from gateway.relay.checks import ContentChecks, ContentClock
from gateway.relay.outgoing import Answer, Outgoing
from gateway.relay.wire import EndOfStream, Wire
from gateway.verdicts import AddHeader, Cause, Refuse

BLOCK = 1 << 18

Parameters = tuple[tuple[str, str | None], ...]


def adapted(parameters: Parameters, extensions: dict[str, str], *, trusted: bool) -> Parameters | Refuse:
    """The parameters of MAIL or RCPT for this server: what it lacks is refused, never dropped.

    SIZE and BODY=7BIT say nothing that a server without the extension would not assume. AUTH= is ours to
    vouch for (RFC 4954 5): `<>` unless the client is trusted, nothing for a server without AUTH.
    """
    result: list[tuple[str, str | None]] = []
    for keyword, value in parameters:
        extension = PARAMETER_EXTENSION.get(keyword, keyword)
        if keyword == "AUTH":
            if "AUTH" in extensions:
                result.append(("AUTH", value if trusted else "<>"))
        elif extension in extensions:
            result.append((keyword, value))
        elif keyword == "SIZE" or (keyword == "BODY" and value is not None and value.upper() == "7BIT"):
            continue
        elif keyword == "BODY":
            return Refuse(Cause.NOT_CARRIED, reply=Reply.of("554 5.6.3 next server does not take 8-bit content"))
        elif keyword == "SMTPUTF8":
            return Refuse(Cause.NOT_CARRIED, reply=Reply.of("550 5.6.7 next server does not take SMTPUTF8"))
        else:
            return Refuse(Cause.NOT_CARRIED, text=f"parameter {keyword} not supported by the next server")
    return tuple(result)


def head_bytes(fields: Sequence[AddHeader]) -> bytes:
    """Header fields to put in front, in the form that DATA has."""
    made = (HeaderField.of(one.name, one.value, leading_space=one.leading_space) for one in fields)
    return b"".join(b"." * field.raw.startswith(b".") + field.raw + b"\r\n" for field in made)


class ContentRelay:
    """One message on its way upstream, unread. `size` counts its octets, dots unstuffed, as the client sent them."""

    __slots__ = ("_headed", "checks", "client", "clock", "out", "size")

    def __init__(self, client: Wire, out: Outgoing, checks: ContentChecks, clock: ContentClock) -> None:
        self.client = client
        self.out = out
        self.checks = checks
        self.clock = clock
        self.size = 0
        self._headed = False  # fields stand right before the next octet

    def head(self, fields: Sequence[AddHeader]) -> None:
        """Put fields in front of the message."""
        if fields:
            self.out.write(head_bytes(fields))
            self._headed = True

    async def leave(self) -> None:
        """Give the message up (`abandon`)."""
        self.abandon()

    async def data(self, scanner: DataScanner) -> None:
        """From 354 to the client's end of data. Raises EndOfStream or WireTimeout of the client's wire."""
        client = self.client
        try:
            while True:
                self.clock.start()
                block = await client.read(BLOCK)
                if not block:
                    raise EndOfStream(b"")
                scan = scanner.feed(block)
                self.size = scanner.size
                self._forward(scan.content, scanner, last=scan.end)
                if scan.end:
                    if scan.rest:
                        client.unread(scan.rest)
                    return
                await self.out.drained()
        except BaseException:
            self.abandon()
            raise

    async def chunk(self, stuffer: DotStuffer, size: int) -> None:
        """One BDAT chunk of `size` octets, whatever becomes of it."""
        client = self.client
        try:
            while size:
                self.clock.start()
                block = await client.read(min(size, BLOCK))
                if not block:
                    raise EndOfStream(b"")
                size -= len(block)
                self.size += len(block)
                self._forward(stuffer.feed(block), stuffer)
                await self.out.drained()
        except BaseException:
            self.abandon()
            raise

    def finish_chunks(self, stuffer: DotStuffer) -> None:
        """After BDAT LAST: what the last line still needs."""
        self._forward(stuffer.finish(), stuffer, last=True)

    async def end(self, recipients: int = 1) -> list[Answer]:
        """The end of data upstream and the answers to it (`Outgoing.end`), or what stopped the message before."""
        if self.out.refused is not None:
            return [self.out.refused]
        return await self.out.end(recipients)

    @property
    def abandoned(self) -> bool:
        """Whether the upstream connection is closed."""
        return self.out.abandoned

    def abandon(self) -> None:
        """Close the upstream connection without an end of data: what it got is no message."""
        self.out.abandon()

    def _forward(self, content: bytes, scanned: DataScanner | DotStuffer, *, last: bool = False) -> None:
        if self.out.refused is not None:
            return
        refuse = self.checks.refused(content, self.size, scanned)
        if refuse is not None:
            self.out.stop(refuse)
        elif content:
            if self._headed:
                self._headed = False
                if content[:1] in (b" ", b"\t"):  # of no field, and not to be read as more of ours
                    content = b"\r\n" + content
            self.out.write(content, last=last)
