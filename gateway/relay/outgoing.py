"""One message's content on its way to one upstream server, as DATA or in BDAT chunks; its end, and the answers.

`commit(True)` is called just before the end goes upstream and `commit(False)` once its answers were read: in
between nothing may be cancelled (promise 2). A message without an end is none: `abandon` closes the connection.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.protocol.content import DotUnstuffer
from gateway.protocol.smtp import Reply
from gateway.relay.wire import EndOfStream, WireTimeout
from gateway.upstream.smtp import Connection, UpstreamError
from gateway.verdicts import Cause, Refuse

HIGH = 1 << 18  # octets the upstream has not taken, above which we wait for it
CHUNK = 1 << 18  # octets of a BDAT chunk
LEAVING_SECONDS = 5.0  # for what an LMTP server still says after a 421

Answer = Reply | Refuse
"""What becomes of a message for a recipient: the upstream's word, or a refusal of ours."""


class Outgoing:
    """Content behind 354 (`bdat=False`), or instead of DATA.

    `write` and `send` take content in the form that DATA has: dots stuffed, CRLF line ends. `refused` is what
    stopped it on the way; what is written after that is dropped. `abandoned`: the connection is closed.
    """

    __slots__ = (
        "_last", "_unstuffer", "abandoned", "commit", "connection", "data_timeout", "end_timeout", "refused",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        *,
        data_timeout: float,
        end_timeout: float,
        commit: Callable[[bool], None],
        bdat: bool = False,
    ) -> None:
        self.connection = connection
        self.data_timeout = data_timeout
        self.end_timeout = end_timeout
        self.commit = commit
        self.refused: Refuse | None = None
        self.abandoned = False
        self._last = b""  # what goes with the end in one write
        self._unstuffer = DotUnstuffer() if bdat else None

    def write(self, content: bytes, *, last: bool = False) -> None:
        """The next block, of DATA only; `last` keeps it for the end, to go in one write with it."""
        if self.spoke_early():
            return
        if last:
            self._last = content
        else:
            self.connection.wire.write(content)

    async def send(self, content: bytes) -> None:
        """The next block, as fast as the upstream takes it."""
        if self._unstuffer is not None:
            self._last += self._unstuffer.feed(content)
            while len(self._last) >= CHUNK and self.refused is None:
                await self._send_chunk()
            return
        if self._last:
            self.write(self._last)
        self._last = content
        await self.drained()

    async def drained(self) -> None:
        """Wait until the upstream has taken enough of what was written."""
        if self.connection.wire.write_buffered > HIGH:
            await self._drain(self.data_timeout)

    async def end(self, recipients: int = 1) -> list[Answer]:
        """The end of the message, and the answers to it; they are final, whatever they are.

        One answer from an SMTP server; from an LMTP server one for each of the `recipients` that it accepted, in their
        order (RFC 2033 4.2), all of them within the pool's data_done_timeout. A server that is lost on the way leaves
        a Refuse, the same object for each recipient it did not answer. One Refuse if it never got the end.
        """
        connection = self.connection
        if connection.wire.write_buffered > HIGH:
            await self._drain(self.end_timeout)
        if self.spoke_early():
            assert self.refused is not None
            return [self.refused]
        due = recipients if connection.server.lmtp else 1
        answers: list[Answer] = []
        self.commit(True)
        try:
            if self._unstuffer is None:
                connection.end_of_data(self._last + b".\r\n", due)
            else:
                connection.chunk(b"BDAT %d LAST\r\n" % len(self._last) + self._last, last=True, replies=due)
            pool, clock = connection.pool, connection.wire.loop.time
            until = clock() + (pool.settings.data_done_timeout if pool is not None else connection.command_timeout)
            while len(answers) < due:
                reply = await connection.reply(max(0.001, until - clock()))
                if reply.reply_class == 3:
                    raise connection.failed("garbage", f"{reply.code} out of place")
                answers.append(reply)
                if reply.code == 421:
                    until = min(until, clock() + LEAVING_SECONDS)
        except UpstreamError as error:
            self.abandon()
            lost = Refuse(Cause.UPSTREAM_LOST, log=f"after the end of data: {error}")
            answers += [lost] * (due - len(answers))
        finally:
            self.commit(False)
        return answers

    def abandon(self) -> None:
        """Close the upstream connection without an end of data: what it got is no message."""
        if not self.abandoned:
            self.abandoned = True
            self.connection.abort()

    def stop(self, refuse: Refuse) -> None:
        """The message is refused: nothing more of it goes upstream. The first refusal counts."""
        if self.refused is None:
            self.refused = refuse
            self.abandon()

    def spoke_early(self) -> bool:
        """Whether the upstream answered or closed before our end: only bad news, and the two are out of step."""
        if self.refused is None and self.connection.spoke_early:
            self.stop(Refuse(Cause.UPSTREAM_LOST, log="the upstream answered or closed during content"))
        return self.refused is not None

    async def _send_chunk(self) -> None:
        """One BDAT chunk and its reply (RFC 3030 2): any other than 2xx ends the message."""
        chunk, self._last = self._last[:CHUNK], self._last[CHUNK:]
        connection = self.connection
        if self.spoke_early():
            return
        connection.chunk(b"BDAT %d\r\n" % len(chunk) + chunk)
        try:
            reply = await connection.reply(self.data_timeout)
        except UpstreamError as error:
            self.stop(Refuse(Cause.UPSTREAM_LOST, log=f"during content: {error}"))
            return
        if reply.code == 421 or reply.reply_class == 3:
            self.stop(Refuse(Cause.UPSTREAM_LOST, log=f"{reply.code} {reply.text} to BDAT"))
        elif reply.reply_class != 2:
            self.stop(Refuse(Cause.CONTENT, reply=reply))

    async def _drain(self, seconds: float) -> None:
        """Wait for the upstream to take what it was sent."""
        upstream = self.connection.wire
        upstream.set_deadline(seconds)
        try:
            await upstream.drain()
        except (WireTimeout, EndOfStream, OSError) as error:
            self.stop(Refuse(Cause.UPSTREAM_LOST, log=f"during content: {type(error).__name__}"))
        finally:
            upstream.set_deadline(None)
