"""The server's side of an SMTP or LMTP conversation: commands out, replies in, and never out of step.

What keeps the two sides in step: every command that was sent is owed one reply, replies are taken in order, and a
server that speaks when nothing is owed is not believed again. A connection ends through `quit`, `end_quietly`,
`abort` or the prelude's `give_back`; each gives its place in the pool back, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from gateway.observe.transcript import secrets_of, without
from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.smtp import Ehlo, Reply, ReplyReader, parse_ehlo
from gateway.relay.wire import Wire, WireTimeout

if TYPE_CHECKING:
    from gateway.observe.transcript import Transcript
    from gateway.upstream.pool import Pool
    from gateway.upstream.server import Server

Kind = Literal["down", "lost", "busy", "garbage", "tls", "timeout"]
Expect = Callable[[Reply], None]

QUIT_SECONDS = 2.0
_ending: set[asyncio.Task[None]] = set()


class UpstreamError(Exception):
    """An upstream server failed us; `kind` says how, `server` is its URL. The text is for logs only."""

    def __init__(self, kind: Kind, server: str, text: str) -> None:
        super().__init__(f"{server}: {text}" if server else text)
        self.kind: Kind = kind
        self.server = server
        self.text = text


class Connection:
    """A connection to an upstream server; what stages see of it is `gateway.stage.Peer`.

    `tls`: encrypted as the pool demands it (required, and verified unless `verify: false`), so that credentials may
    pass; `encrypted`: encrypted somehow. `extensions` is the last EHLO, `greeted` whether there was one. `reusable`:
    no later session is hindered by what was said; `speaks_for_client`: the server was told who the client is.
    `closing`: of no further use (421, out of step, lost). `needs_reset`: RSET goes before the next MAIL.
    `transactions` counts MAIL commands. `on_end` is called once when the connection ends or is put aside.
    """

    __slots__ = (
        "_before", "_content", "_due", "_fault", "_open", "_reader", "_replies", "_secrets", "closing",
        "command_timeout", "ehlo", "encrypted", "extensions", "greeted", "greeting", "hostname", "idle_timer",
        "needs_reset", "on_end", "pipelining", "pool", "reusable", "server", "speaks_for_client", "tls", "transactions",
        "transcript", "wire",
    )  # fmt: skip

    def __init__(
        self,
        wire: Wire,
        server: Server,
        *,
        hostname: str,
        command_timeout: float = 300.0,
        transcript: Transcript | None = None,
    ) -> None:
        self.wire = wire
        self.server = server
        self.hostname = hostname
        self.command_timeout = command_timeout
        self.transcript = transcript
        self.pool: Pool | None = None
        self.on_end: Callable[[], None] | None = None
        self.idle_timer: asyncio.TimerHandle | None = None
        self.greeting: Reply | None = None
        self.ehlo: Ehlo | None = None
        self.extensions: dict[str, str] = {}
        self.pipelining = False
        self.greeted = False
        self.encrypted = False
        self.tls = False
        self.reusable = True
        self.speaks_for_client = False
        self.closing = False
        self.needs_reset = False
        self.transactions = 0
        self._reader = ReplyReader()
        self._replies: deque[Reply] = deque()
        self._due = 1  # the greeting
        self._fault: UpstreamError | None = None
        self._secrets: list[bytes] = []
        self._before: list[tuple[bytes, Expect | None]] = []
        self._open = False  # MAIL was accepted and its transaction has not ended
        self._content = False  # between 354 and the reply to the end of data

    # -- what stages ask

    @property
    def url(self) -> str:
        """The server's URL."""
        return self.server.url

    @property
    def local(self) -> bool:
        """Nothing leaves this machine: a unix socket, or the peer's address is loopback."""
        if self.server.local:
            return True
        try:
            return ipaddress.ip_address(self.wire.peername[0]).is_loopback
        except ValueError:
            return False

    @property
    def address(self) -> tuple[str, int]:
        """The server's address and port; `("unix:", 0)` for a unix socket."""
        return self.wire.peername

    @property
    def local_address(self) -> tuple[str, int]:
        """Our address and port on this connection."""
        return self.wire.sockname

    @property
    def idle(self) -> bool:
        """No reply is owed, none came unasked, no content is under way and the peer is still there."""
        return not (self.closing or self._due or self._content or self.wire.eof or self._out_of_turn())

    @property
    def spoke_early(self) -> bool:
        """Whether the server closed, or said something that nothing asked for, while no reply is owed."""
        return self.wire.eof or (not self._due and self._out_of_turn())

    # -- talking

    def write(self, data: bytes) -> None:
        """Bytes in front of the conversation: the PROXY header."""
        self.identified()
        self.wire.write(data)

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
        _check_line(line)
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

    async def _read(self, timeout: float) -> None:
        """Read until there is a whole reply."""
        wire, replies = self.wire, self._replies
        wire.set_deadline(timeout)
        try:
            while not replies:
                data = await wire.read()
                if not data:
                    raise self.failed("lost", str(wire.error or "closed the connection"))
                if self.transcript is not None:
                    self.transcript.from_upstream(data)
                replies.extend(self._reader.feed(data))
        except WireTimeout:
            raise self.failed("timeout", f"no reply within {timeout:g}s") from None
        except PeerError as error:
            raise self.failed("garbage", str(error)) from None
        wire.set_deadline(None)

    def failed(self, kind: Kind, text: str) -> UpstreamError:
        """Give the connection up: the error that ends this connection; every later wait gets it too."""
        self.closing = True
        self.reusable = False
        self._fault = UpstreamError(kind, self.server.url, text)
        return self._fault

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

    async def hello(self, name: str = "", *, timeout: float | None = None) -> Reply:
        """EHLO with our host name or `name`, HELO if the server knows no EHLO; with LMTP, LHLO. The last reply.

        `extensions` is what it announced; nothing after HELO or a refusal. Raises UpstreamError, LocalError.
        """
        argument = (name or self.hostname).encode("ascii", "replace")
        self.forget_hello()
        reusable = self.reusable
        lmtp = self.server.lmtp
        reply = await self.command((b"LHLO " if lmtp else b"EHLO ") + argument, timeout=timeout)
        if reply.code == 250:
            self.ehlo = _announced(reply)
        elif reply.code >= 500 and not self.closing and not lmtp:
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

    async def start_tls(self, handshake: Callable[[Wire], Awaitable[None]]) -> None:
        """Give the wire to the handshake, unless the server sent anything that would be trusted as coming from it.

        Raises UpstreamError of kind `tls` for such bytes (RFC 3207 and the response injection it does not name).
        """
        owed = 1 if self.greeting is None else 0
        if self._due != owed or self._out_of_turn():
            raise self.failed("tls", "sent bytes between STARTTLS and the handshake")
        await handshake(self.wire)
        self.encrypted = True
        self.forget_hello()

    def before_mail(self, line: bytes, expect: Expect | None = None) -> None:
        """A command to go with the next MAIL, in one write where the server takes it; `expect` gets its reply."""
        _check_line(line)
        self._before.append((line, expect))

    async def mail(self, line: bytes, rcpt: bytes | None = None) -> Reply:
        """MAIL with what goes before it: RSET if a transaction was left open, then `before_mail`'s commands.

        The reply to MAIL. With `rcpt`, for servers that take pipelined commands only, that RCPT goes in the same
        write, and its reply is the next one if MAIL was accepted. Raises UpstreamError, also for a 421 to one of
        the others.
        """
        _check_line(line)
        if rcpt is not None:
            _check_line(rcpt)
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
                self._answered(before, expect, await self.reply())
            reply = await self.reply()
            if rcpt is not None and reply.code // 100 != 2 and not self.closing:
                with contextlib.suppress(UpstreamError):  # MAIL's refusal counts, also of a server that leaves then
                    await self.reply()
        else:
            for before, expect in ahead:
                self._answered(before, expect, await self.command(before))
            reply = await self.command(line)
        self.needs_reset = False
        self._open = reply.code // 100 == 2
        return reply

    def _answered(self, line: bytes, expect: Expect | None, reply: Reply) -> None:
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

    def identified(self) -> None:
        """The connection speaks for this client now (XCLIENT, AUTH, PROXY): no other session may have it."""
        self.reusable = False
        self.speaks_for_client = True

    def stop_waiting(self) -> None:
        """No longer kept for reuse: its clock and what watched the server meanwhile."""
        if self.idle_timer is not None:
            self.idle_timer.cancel()
            self.idle_timer = None
        self.wire.on_gone = self.wire.on_data = None

    # -- the end

    async def quit(self) -> None:
        """QUIT and close, within seconds; a connection that is out of step, gone or inside content is just closed.

        Never raises but for cancellation.
        """
        if self.closing or self._content or self.wire.eof:
            self.abort()
            return
        self.closing = True
        try:
            if self.transcript is not None:
                self.transcript.to_upstream(b"QUIT\r\n")
            self.wire.write(b"QUIT\r\n")
            await self.wire.aclose(QUIT_SECONDS)
        finally:
            self.abort()

    def end_quietly(self) -> None:
        """`quit` without waiting for it."""
        if self.closing or self._content or self.wire.eof:
            self.abort()
            return
        task = asyncio.get_running_loop().create_task(self.quit())
        _ending.add(task)
        task.add_done_callback(_ending.discard)

    def abort(self) -> None:
        """Close at once, without a word."""
        self.closing = True
        self.wire.abort()
        self.put_aside()

    def put_aside(self) -> None:
        """Give the place in the pool back; what was to go with a MAIL of this session goes with none."""
        self._before.clear()
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    def __repr__(self) -> str:
        return f"<Connection {self.server.url} transactions={self.transactions} closing={self.closing}>"


@lru_cache(maxsize=32)
def _announced(reply: Reply) -> Ehlo:
    """Servers say the same to every session; nobody changes what comes of it."""
    return parse_ehlo(reply)


def _check_line(line: bytes) -> None:
    if b"\n" in line or b"\r" in line or b"\0" in line:
        raise LocalError("a command line with a line end or NUL inside")


async def quits_done() -> None:
    """Wait for what `end_quietly` began (at a stop)."""
    while _ending:
        await asyncio.wait(tuple(_ending))
