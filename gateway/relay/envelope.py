"""Carrying one message's content to the upstream in the envelope grade: raw blocks, never held back.

Content goes upstream as it comes, already checked for its end and its line ends. What must be refused (too
big, illegal line ends, a loop, an upstream that left) stops the flow at once, but the client's content is
read to its true end before it is answered, so that no byte of it is ever taken for a command (promise 5).
The upstream never gets the end of a refused message: its connection is closed instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.protocol.content import DataScanner, DotStuffer
from gateway.protocol.smtp import PARAMETER_EXTENSION, Reply
from gateway.relay.wire import EndOfStream, Wire, WireTimeout
from gateway.upstream.smtp import Connection, UpstreamError
from gateway.verdicts import AddHeader, Cause, Refuse

BLOCK = 1 << 18
HIGH = 1 << 18

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
    """Header fields to put in front, as content octets (folds are CRLF and a blank)."""
    return b"".join(f"{field.name}: {field.value}\r\n".encode("utf-8", "surrogateescape") for field in fields)


class ContentRelay:
    """One message on its way upstream.

    `commit(True)` is called just before the end of data is written upstream and `commit(False)` once its reply
    was read: in between nothing may be cancelled (promise 2). `size` counts the message's octets, dots
    unstuffed, without what we put in front.
    """

    __slots__ = (
        "_header_tail", "_last", "_received", "_refuse", "abandoned", "client", "commit", "connection", "data_timeout",
        "end_timeout", "max_received", "size", "size_limit",
    )  # fmt: skip

    def __init__(
        self,
        client: Wire,
        connection: Connection,
        *,
        size_limit: int,
        data_timeout: float,
        end_timeout: float,
        commit: Callable[[bool], None],
        max_received: int = 0,
    ) -> None:
        self.client = client
        self.connection = connection
        self.size_limit = size_limit
        self.data_timeout = data_timeout
        self.end_timeout = end_timeout
        self.commit = commit
        self.max_received = max_received
        self.size = 0
        self.abandoned = False
        self._refuse: Refuse | None = None
        self._last = b""  # the last block, which goes with the end of data in one write
        self._received = 0
        self._header_tail: bytes | None = b"\r\n" if max_received else None

    def head(self, fields: Sequence[AddHeader]) -> None:
        """Put fields in front of the message."""
        if fields:
            self.connection.wire.write(head_bytes(fields))

    async def data(self, scanner: DataScanner) -> None:
        """From 354 to the client's end of data. Raises EndOfStream or WireTimeout of the client's wire."""
        client, upstream = self.client, self.connection.wire
        reject = scanner.policy == "reject"
        try:
            while True:
                client.set_deadline(self.data_timeout)
                block = await client.read(BLOCK)
                if not block:
                    raise EndOfStream(b"")
                scan = scanner.feed(block)
                if reject and scanner.bare is not None:
                    self._stop(Refuse(Cause.LINE_ENDINGS, log=f"bare {scanner.bare}"))
                self.size = scanner.size
                if self._refuse is None and scan.content:
                    self._forward(scan.content, last=scan.end)
                if scan.end:
                    if scan.rest:
                        client.unread(scan.rest)
                    return
                if upstream.write_buffered > HIGH:
                    await self._drain(self.data_timeout)
        except BaseException:
            self.abandon()
            raise

    async def chunk(self, stuffer: DotStuffer, size: int) -> None:
        """One BDAT chunk of `size` octets, whatever becomes of it."""
        client, upstream = self.client, self.connection.wire
        try:
            while size:
                client.set_deadline(self.data_timeout)
                block = await client.read(min(size, BLOCK))
                if not block:
                    raise EndOfStream(b"")
                size -= len(block)
                self.size += len(block)
                content = stuffer.feed(block)
                self._check_chunk(stuffer)
                if self._refuse is None and content:
                    self._forward(content)
                if upstream.write_buffered > HIGH:
                    await self._drain(self.data_timeout)
        except BaseException:
            self.abandon()
            raise

    def finish_chunks(self, stuffer: DotStuffer) -> None:
        """After BDAT LAST: what the last line still needs."""
        content = stuffer.finish()
        self._check_chunk(stuffer)
        if self._refuse is None and content:
            self._forward(content, last=True)

    def refused(self) -> Refuse | None:
        """What stopped the message on its way, if anything did."""
        return self._refuse

    async def end(self) -> Reply | Refuse:
        """Write the end of data upstream and read the answer; it is final either way."""
        connection = self.connection
        if connection.wire.write_buffered > HIGH:
            await self._drain(self.end_timeout)
        if self._spoke_early():
            assert self._refuse is not None
            return self._refuse
        self.commit(True)
        try:
            connection.wire.write(self._last + b".\r\n")
            pool = connection.pool
            reply = await connection.reply(timeout=pool.settings.data_done_timeout if pool is not None else None)
            if reply.reply_class == 3:
                raise connection.failed("garbage", f"{reply.code} out of place")
            return reply
        except UpstreamError as error:
            self.abandon()
            return Refuse(Cause.UPSTREAM_LOST, log=f"after the end of data: {error}")
        finally:
            self.commit(False)

    def abandon(self) -> None:
        """Close the upstream connection without an end of data: what it got is no message."""
        if not self.abandoned:
            self.abandoned = True
            self.connection.abort()

    def _spoke_early(self) -> bool:
        """Whether the upstream answered or closed before our end: only bad news, and the two are out of step."""
        if self._refuse is None and (self.connection.wire.eof or self.connection.wire.buffered):
            self._stop(Refuse(Cause.UPSTREAM_LOST, log="the upstream answered or closed during content"))
        return self._refuse is not None

    def _stop(self, refuse: Refuse) -> None:
        if self._refuse is None:
            self._refuse = refuse
            self.abandon()

    def _check_chunk(self, stuffer: DotStuffer) -> None:
        if stuffer.policy == "reject" and stuffer.bare is not None:
            self._stop(Refuse(Cause.LINE_ENDINGS, log=f"bare {stuffer.bare}"))

    def _forward(self, content: bytes, *, last: bool = False) -> None:
        upstream = self.connection.wire
        if self._spoke_early():
            return
        if self.size_limit and self.size > self.size_limit:
            self._stop(Refuse(Cause.MESSAGE_TOO_BIG))
            return
        if self._header_tail is not None and self._loops(content):
            self._stop(Refuse(Cause.LOOP, log=f"more than {self.max_received} Received fields"))
            return
        if last:
            self._last = content
        else:
            upstream.write(content)

    def _loops(self, content: bytes) -> bool:
        """Count Received fields while the header passes (RFC 5321 6.3)."""
        text = (self._header_tail or b"") + content
        end = text.find(b"\r\n\r\n")
        header = text if end < 0 else text[:end]
        self._received += header.lower().count(b"\r\nreceived:")
        # Keep what may be the start of a field name cut in two, without counting it twice.
        self._header_tail = None if end >= 0 else text[-10:]
        return self._received > self.max_received

    async def _drain(self, seconds: float) -> None:
        """Wait for the upstream to take what it was sent."""
        upstream = self.connection.wire
        upstream.set_deadline(seconds)
        try:
            await upstream.drain()
        except (WireTimeout, EndOfStream, OSError) as error:
            self._stop(Refuse(Cause.UPSTREAM_LOST, log=f"during content: {type(error).__name__}"))
        finally:
            upstream.set_deadline(None)
