"""The server's side of an SMTP or LMTP conversation: commands out, replies in, and never out of step.

What keeps the two sides in step: every command that was sent is owed one reply, replies are taken in order, and a
server that speaks when nothing is owed is not believed again.
"""

from __future__ import annotations

import contextlib
from base64 import b64encode
from collections import deque
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from gateway.observe.transcript import secrets_of, without
from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.sasl import shows_secret
from gateway.protocol.smtp import Ehlo, Reply, ReplyReader, parse_ehlo
from gateway.stage import SaslStep
from gateway.upstream.connection import (
    NO_MECHANISM,
    Expect,
    Kind,
    UpstreamConnection,
    UpstreamError,
    check_line,
    mechanism_name,
    quits_done,
)

if TYPE_CHECKING:
    from gateway.observe.transcript import Transcript
    from gateway.relay.wire import Wire
    from gateway.upstream.server import Server

__all__ = ["Connection", "Expect", "Kind", "UpstreamError", "quits_done"]

MAX_COMMAND = 512  # octets of AUTH with its initial response (RFC 4954 section 4)


class Connection(UpstreamConnection):
    """A connection to an SMTP or LMTP server.

    `needs_reset`: RSET goes before the next MAIL. `transactions` counts MAIL commands. `pipelining`: announced.
    """

    __slots__ = (
        "_before", "_content", "_due", "_open", "_reader", "_replies", "needs_reset", "pipelining", "transactions",
    )  # fmt: skip

    starttls_code: ClassVar[int] = 220

    def __init__(
        self,
        wire: Wire,
        server: Server,
        *,
        hostname: str,
        command_timeout: float = 300.0,
        transcript: Transcript | None = None,
    ) -> None:
        super().__init__(wire, server, hostname=hostname, command_timeout=command_timeout, transcript=transcript)
        self.pipelining = False
        self.needs_reset = False
        self.transactions = 0
        self._reader = ReplyReader()
        self._replies: deque[Reply] = deque()
        self._due = 1  # the greeting
        self._before: list[tuple[bytes, Expect | None]] = []
        self._open = False  # MAIL was accepted and its transaction has not ended
        self._content = False  # between 354 and the reply to the end of data

    # -- what is owed

    @property
    def between_commands(self) -> bool:
        """No reply is owed, none came unasked, no content is under way."""
        return not (self._due or self._content or self._out_of_turn())

    @property
    def spoke_early(self) -> bool:
        """Whether the server closed, or said something that nothing asked for, while no reply is owed."""
        return self.wire.eof or (not self._due and self._out_of_turn())

    @property
    def in_transaction(self) -> bool:
        """MAIL was accepted, and RSET goes out with the next one only."""
        return self.needs_reset or self._open

    @property
    def farewell(self) -> bytes:
        """QUIT."""
        return b"QUIT\r\n"

    @property
    def _beyond_words(self) -> bool:
        return self._content or super()._beyond_words

    @property
    def _answered(self) -> bool:
        return bool(self._replies)

    def _take(self, data: bytes) -> None:
        if self.transcript is not None:
            self.transcript.from_upstream(data)
        self._replies.extend(self._reader.feed(data))

    # -- talking

    async def read_greeting(self, timeout: float) -> Reply:
        """The greeting. Raises UpstreamError."""
        self.greeting = await self.reply(timeout)
        return self.greeting

    def send(self, data: bytes, replies: int = 1) -> None:
        """Whole commands with their line ends, which are owed `replies` replies; one a command.

        Never raises: what is wrong with the connection, the next `reply` tells.
        """
        if not self._due and self._out_of_turn():
            self._fault = self._fault or self.unasked()
        if self.transcript is not None:
            self.transcript.to_upstream(data)
        self._due += replies
        self.wire.write(data)

    async def command(self, line: bytes, *, secret: bool = False, timeout: float | None = None) -> Reply:
        """One command line (without its end) and its reply. `secret` keeps what is secret of the line (all of it, but
        for AUTH and XCLIENT) out of the transcript and, should the server repeat it, out of the reply.

        Raises UpstreamError; LocalError for CR, LF or NUL in the line, or while replies are owed.
        """
        check_line(line)
        if self._due:
            raise LocalError("a command while replies to earlier ones are owed")
        transcript = self.transcript
        if secret and transcript is not None:
            if line[:5].upper() in (b"AUTH ", b"XCLIE"):
                transcript.to_upstream(line)  # shows what is no secret
            else:
                transcript.to_upstream_secret(line)
            self.transcript = None
        try:
            self.send(line + b"\r\n")
        finally:
            self.transcript = transcript
        reply = await self.reply(timeout)
        if secret:
            self._secrets += secrets_of(line)
            reply = replace(reply, lines=tuple(without(text, self._secrets) for text in reply.lines))
        if reply.code == 354 and line[:4].upper() == b"DATA":
            self._content = True
        return reply

    async def reply(self, timeout: float | None = None) -> Reply:
        """The next reply that is owed, at most `timeout` seconds from now (default: the pool's command_timeout).

        Without one owed, it is the reply to what was just written straight to the wire. Raises UpstreamError.
        """
        if self._fault is None and not self._due and self._out_of_turn():
            self._fault = self.unasked()
        if self._fault is not None:
            raise self._fault
        if not self._replies:
            await self._read(self.command_timeout if timeout is None else timeout)
        reply = self._replies.popleft()
        self._due = max(0, self._due - 1)
        if self._content:
            self._content = self._open = False
        if reply.code >= 400:
            self.reusable = False
            if reply.code == 421:
                self.closing = True
        if not self._due and self._out_of_turn():
            self.closing = True  # it said more than it was asked: what it says next answers nothing
        return reply

    def _out_of_turn(self) -> bool:
        """Whether there are bytes of the server that no command asked for (while no reply is owed)."""
        return bool(self._replies or self.wire.buffered or self._reader.pending)

    def unasked(self) -> UpstreamError:
        """What a server said out of turn: mostly the 421 with which it leaves."""
        try:
            self._replies.extend(self._reader.feed(self.wire.take()))
        except PeerError:
            return self.failed("garbage", "sent what is no reply, unasked")
        if self._replies and self._replies[0].code == 421:
            return self.failed("lost", f"421 {self._replies[0].text}")
        return self.failed("garbage", "sent a reply to nothing")

    def end_of_data(self, data: bytes, replies: int = 1) -> None:
        """The last octets of content and the line that ends it, which are owed one reply, or with LMTP one a recipient.

        Never raises: what is wrong with the connection, the next `reply` tells.
        """
        self._due += replies
        self.wire.write(data)

    def chunk(self, data: bytes, *, last: bool = False, replies: int = 1) -> None:
        """A BDAT command with its octets (RFC 3030), the last one owed as many replies as an end of data.

        Never raises, as `end_of_data`.
        """
        self._content = last
        self.end_of_data(data, replies)

    # -- EHLO and MAIL

    async def hello(self, name: str = "", *, esmtp: bool = True, timeout: float | None = None) -> Reply:
        """EHLO with our host name or `name`, HELO if the server knows no EHLO; with LMTP, LHLO. The last reply.

        `extensions` is what it announced; nothing after HELO or a refusal. `esmtp=False` says HELO at once. Raises
        UpstreamError, LocalError.
        """
        argument = (name or self.hostname).encode("ascii", "replace")
        self.forget_hello()
        reusable = self.reusable
        lmtp = self.server.lmtp
        verb = b"LHLO " if lmtp else b"EHLO " if esmtp else b"HELO "
        reply = await self.command(verb + argument, timeout=timeout)
        if reply.code == 250:
            self.ehlo = _announced(reply) if esmtp or lmtp else Ehlo(reply.text.partition(" ")[0], {})
        elif reply.code >= 500 and not self.closing and esmtp and not lmtp:
            reply = await self.command(b"HELO " + argument, timeout=timeout)
            if reply.code == 250:
                self.ehlo = Ehlo(reply.text.partition(" ")[0], {})
                self.reusable = reusable  # no EHLO is no verdict on anybody
        if self.ehlo is not None:
            self.greeted = True
            self.extensions = dict(self.ehlo.keywords)
            self.pipelining = "PIPELINING" in self.extensions
        return reply

    def forget_hello(self) -> None:
        """What an EHLO said counts no more: a new one is due (RFC 3207 4.2, XCLIENT)."""
        self.ehlo = None
        self.extensions = {}
        self.pipelining = self.greeted = False

    # -- AUTH (RFC 4954)

    async def sasl(self, mechanism: str, initial: bytes | None) -> SaslStep:
        """AUTH; an initial response that does not fit the line waits for the first challenge."""
        line = b"AUTH " + mechanism_name(mechanism)
        if initial is None:
            return self._auth_step(await self.command(line, secret=True))
        if shows_secret(mechanism):
            self._hide(initial)
        response = b64encode(initial) or b"="
        if len(line) + 1 + len(response) + 2 <= MAX_COMMAND:
            return self._auth_step(await self.command(line + b" " + response, secret=True))
        step = self._auth_step(await self.command(line, secret=True))
        return step if step.reply is not None else await self.sasl_answer(initial)

    async def sasl_answer(self, data: bytes) -> SaslStep:
        """One line of base64."""
        return self._auth_step(await self.command(b64encode(data), secret=True))

    async def sasl_cancel(self) -> SaslStep:
        """`*`, which is answered with 501."""
        return self._auth_step(await self.command(b"*", secret=True))

    def _auth_step(self, reply: Reply) -> SaslStep:
        self.identified()
        if reply.code == 235:
            self.logged_in = True
        return self._step(reply)

    async def login(self, user: bytes, password: bytes) -> Reply:
        """AUTH PLAIN, or LOGIN where that is all there is."""
        check_line(user)
        check_line(password)
        offered = self.extensions.get("AUTH", "").upper().split()
        if "PLAIN" in offered:
            step = await self.sasl("PLAIN", b"\0" + user + b"\0" + password)
        elif "LOGIN" in offered:
            self._hide(b"\0\0" + password)
            step = await self.sasl("LOGIN", None)
            for answer in (user, password):
                if step.reply is None:
                    step = await self.sasl_answer(answer)
        else:
            return NO_MECHANISM
        return await self.ended(step)

    def before_mail(self, line: bytes, expect: Expect | None = None) -> None:
        """A command to go with the next MAIL, in one write where the server takes it; `expect` gets its reply."""
        check_line(line)
        self._before.append((line, expect))

    async def mail(self, line: bytes, rcpt: bytes | None = None) -> Reply:
        """MAIL with what goes before it: RSET if a transaction was left open, then `before_mail`'s commands.

        The reply to MAIL. With `rcpt`, for servers that take pipelined commands only, that RCPT goes in the same
        write, and its reply is the next one if MAIL was accepted. Raises UpstreamError, also for a 421 to one of
        the others.
        """
        check_line(line)
        if rcpt is not None:
            check_line(rcpt)
        ahead, self._before = self._before, []
        if self.needs_reset or self._open:
            ahead.insert(0, (b"RSET", self._was_reset))
        self.transactions += 1
        if rcpt is not None or (ahead and self.pipelining):
            lines = [*(before for before, _ in ahead), line]
            if rcpt is not None:
                lines.append(rcpt)
            self.send(b"\r\n".join(lines) + b"\r\n", len(lines))
            for before, expect in ahead:
                self._follow(before, expect, await self.reply())
            reply = await self.reply()
            if rcpt is not None and reply.code // 100 != 2 and not self.closing:
                with contextlib.suppress(UpstreamError):  # MAIL's refusal counts, also of a server that leaves then
                    await self.reply()
        else:
            for before, expect in ahead:
                self._follow(before, expect, await self.command(before))
            reply = await self.command(line)
        self.needs_reset = False
        self._open = reply.code // 100 == 2
        return reply

    def _follow(self, line: bytes, expect: Expect | None, reply: Reply) -> None:
        if reply.code == 421:
            raise self.failed("lost", f"421 {reply.text}")
        if expect is None:
            return
        try:
            expect(reply)
        except UpstreamError:
            self.closing = True
            raise
        except Exception as error:
            # The identity this command carries did not arrive: the mail must not go without it.
            verb = line.split(b" ", 1)[0].decode("ascii", "replace")
            raise self.failed("garbage", f"reply to {verb} not taken: {type(error).__name__}: {error}") from error

    def _was_reset(self, reply: Reply) -> None:
        if reply.code // 100 != 2:
            raise UpstreamError("garbage", self.server.url, f"RSET refused: {reply.code} {reply.text}")

    def put_aside(self) -> None:
        """Give the place in the pool back; what was to go with a MAIL of this session goes with none."""
        self._before.clear()
        super().put_aside()

    def __repr__(self) -> str:
        return f"<Connection {self.server.url} transactions={self.transactions} closing={self.closing}>"


@lru_cache(maxsize=32)
def _announced(reply: Reply) -> Ehlo:
    """Servers say the same to every session; nobody changes what comes of it."""
    return parse_ehlo(reply)
