"""The client's side of an SMTP session: from the PROXY header to QUIT or the hand-off (RFC 5321).

LMTP is the same conversation but for LHLO and the replies to the end of data (RFC 2033, `lmtp.py`).

One coroutine reads like the RFC: `run` greets, then takes command by command. AUTH is in `smtp_auth`, MAIL to
the end of data in `smtp_mail`. Replies are collected and go out in one write when no further command waits
(RFC 2920 3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from gateway.facts import Phase
from gateway.frontend import smtp_data, smtp_mail, smtp_upstream
from gateway.frontend.closing import Closing
from gateway.frontend.conversation import MAX_QUEUED, Conversation
from gateway.frontend.served import HandOff, Served
from gateway.frontend.smtp_verbs import LMTP_VERBS, VERBS
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import NON_SMTP_TLS, Reply, looks_like, parse_command
from gateway.relay.wire import LineTooLong, Wire, WireTimeout
from gateway.replies import ERRORS
from gateway.session import Listener
from gateway.upstream.smtp import Connection
from gateway.verdicts import Authenticated, Cause, Refuse

if TYPE_CHECKING:
    from gateway.pipeline.chain import Result
    from gateway.session import Recipient

log = structlog.get_logger("gateway.smtp")




class SmtpConversation(Conversation):
    """One SMTP or LMTP session."""

    __slots__ = ("bdat", "committed", "junk", "lmtp", "mail", "offer", "verbs")

    connection: Connection | None

    def __init__(self, wire: Wire, served: Served, listener: Listener) -> None:
        super().__init__(wire, served, listener, served.replies["smtp"])
        self.lmtp = listener.protocol == "lmtp"
        self.verbs = LMTP_VERBS if self.lmtp else VERBS
        self.offer: dict[str, str] = {}
        self.bdat: smtp_data.Bdat | None = None
        self.mail = smtp_mail.Mail()
        self.junk = 0
        self.committed = False  # the end of data went upstream: nothing may be cancelled now

    # -- what SMTP adds to a session

    def greeting(self) -> bytes:
        """220 with our name and instance (RFC 5321 4.2), or what the pipeline wrote."""
        served = self.served
        text = self.replies.written.get("greeting")
        if text is None:
            text = f"220 {served.hostname} {'LMTP' if self.lmtp else 'ESMTP'} {served.instance}"
        return f"{text}\r\n".encode()

    def answer(self, refuse: Refuse, reply: Reply) -> bytes:
        """The reply itself."""
        return reply.encode()

    def farewell(self, refuse: Refuse) -> bytes:
        """The reply itself; a 421 where it is temporary."""
        return self.reply_to(refuse).encode()

    def challenge_line(self, encoded: bytes) -> bytes:
        """RFC 4954 4."""
        return b"334 " + encoded + b"\r\n"

    async def logged_in(self, verdict: Authenticated) -> bool:
        """235, in the upstream's words if it took the login itself."""
        reply = verdict.reply or Reply.of(self.replies.fixed("authenticated"))
        self.write(reply.encode())
        self.tell_settled(Phase.AUTH, reply)
        joins = self.hand_off is HandOff.LOGIN or self.served.hand_off_at_login
        return joins and await smtp_upstream.hand_off_now(self)

    def bare_lf_reply(self) -> bytes:
        """RFC 5321 2.3.8."""
        return b"500 5.5.2 bare <LF> received\r\n"

    @property
    def critical(self) -> bool:
        """The end of data went upstream."""
        return self.committed

    @property
    def busy(self) -> bool:
        """A transaction is open."""
        return self.session.transaction is not None

    @property
    def asked_recipient(self) -> Recipient | None:
        """The recipient of the RCPT at hand."""
        return self.mail.asked

    async def leave(self) -> None:
        """The transaction and the upstream."""
        await smtp_mail.leave_chunks(self)
        self.end_transaction()
        smtp_upstream.part(self)

    async def hand_off_at_greeting(self, greeting: bytes) -> bool:
        """Nothing is needed after the greeting."""
        return await smtp_upstream.hand_off_now(self, greeting)

    async def commands(self) -> bool:
        """Take commands; what was asked before the last word is answered before it."""
        try:
            return await self._commands()
        except Closing:
            await smtp_mail.settle(self)
            raise

    # -- commands -------------------------------------------------------------------------------------------

    async def _commands(self) -> bool:
        """Take commands until the session ends (True) or XCLIENT starts it anew (False)."""
        while True:
            try:
                line = await self._next_line()
            except LineTooLong:
                self.error("500 5.5.2 line too long")
                continue
            if self.served.draining and self._had_its_turn(line):
                await self.refuse_and_close(Refuse(Cause.SHUTDOWN), "command")
            self.refuse_bare_lf()
            if self.transcript is not None:
                self.transcript.from_client(line)
            try:
                command = parse_command(line)
            except PeerError as error:
                await self._not_smtp(line)
                self.error((error.reply or b"500 5.5.2 syntax error").decode("ascii", "replace"))
                continue
            handler = self.verbs.get(command.verb)
            if handler is None:
                await self._not_smtp(line)
                await self._unknown(line)
                continue
            if self.mail.pending and command.verb != "RCPT":
                await smtp_mail.settle(self)
            try:
                if await handler(self, command):
                    return False
            except PeerError as error:
                self.error((error.reply or b"501 5.5.4 syntax error").decode("ascii", "replace"))
            self.said = True
            if self.reason == "handed off":
                return True

    def _had_its_turn(self, line: bytes) -> bool:
        """At a stop: the session has sent a message and begins something new. Who leaves gets the 221."""
        session = self.session
        return session.transactions > 0 and session.transaction is None and line[:4].upper() != b"QUIT"

    async def _next_line(self) -> bytes:
        """The next command line; what is queued is sent before the wait for it. Raises LineTooLong, Closing."""
        if self.killed:
            self.end_killed()
        wire, limits = self.wire, self.limits
        # AUTH may carry a whole token (RFC 4954 section 4); other commands keep their own limit.
        limit = max(limits.command_line, limits.auth_line) if self.chain.mechanisms else limits.command_line
        line = wire.next_line(limit)
        if line is None or len(self.out) > MAX_QUEUED:
            if self.mail.pending:
                await smtp_mail.settle(self)
            self.flush()
            if wire.write_paused:
                wire.set_deadline(limits.write_timeout)
                await wire.drain()
        if line is None:
            if self.late:
                raise WireTimeout
            self.set_command_deadline()
            self.waiting = True
            try:
                if self.errors == 0 and not self.session.helo and wire.tls is None:
                    await self._refuse_tls_hello()
                line = await wire.line(limit)
            finally:
                self.waiting = False
        if len(line) + 2 > limits.command_line and line[:5].upper() != b"AUTH ":
            raise LineTooLong
        return line

    async def _refuse_tls_hello(self) -> None:
        """A TLS handshake on a plain port never ends a line: look at the first byte."""
        wire = self.wire
        await wire.wait_readable()
        if wire.peek(2) == NON_SMTP_TLS:
            self.write(b"554 5.5.0 this port starts in clear text; use STARTTLS or the TLS port\r\n")
            raise Closing("TLS hello on a plain port")

    async def _unknown(self, line: bytes) -> None:
        """A command that nobody knows: 500, or what a stage says for now (`unknown`).

        Between chunks stages are at the message: another question would come in the middle of what they are asked.
        """
        refuse = None
        if self.chain.unknown and self.bdat is None:
            refuse = await self.chain.ask_unknown(self.session, line.decode("utf-8", "replace"))
        if refuse is None:
            self.error("500 5.5.2 command not recognized")
            return
        reply = self.refuse(refuse, "command")
        self.count_error()
        self.end_if_told(refuse, reply)

    async def _not_smtp(self, line: bytes) -> None:
        """HTTP and mail header lines come from programs that mean somebody else: answer once and close."""
        kind = looks_like(line)
        if kind is not None:
            text = f"this is an {self.session.protocol.upper()} server, not for {kind}"
            refuse = Refuse(Cause.PROTOCOL, text=text, disconnect=True, log=kind)
            await self.refuse_and_close(refuse, "command")

    def error(self, text: str, name: str = "") -> None:
        """An error reply that counts; `name` is that of `replies.FIXED` where the code does not tell."""
        self.write(smtp_mail.softened(self, Reply.of(self.replies.error(text, name))).encode())
        self.count_error(name or ERRORS.get(int(text[:3]), ""))

    def count_junk(self) -> None:
        """Commands that carry no mail (postconf(5) smtpd_junk_command_limit)."""
        self.junk += 1
        if self.junk > self.limits.junk_commands:
            self.refuse(
                Refuse(Cause.TOO_MANY_ERRORS, text="too many commands without mail", disconnect=True), "command"
            )
            raise Closing("too many junk commands")

    async def must_be_last(self) -> None:
        """The command must end its pipelined group (RFC 2920 3.1), and a HELO client may not pipeline at all."""
        if self.wire.buffered and not self.served.unauthorized_pipelining:
            self.session.early_talker = True
            await self.refuse_and_close(Refuse(Cause.PIPELINING, disconnect=True), "command")

    async def asked(self, result: Result, phase: str) -> Reply | None:
        """Wait out the holds of a phase and give its refusal, if it has one: the reply, or None to go on.

        A refusal that says so ends the session.
        """
        if result.until:
            # Octets of a chunk come right behind their command (RFC 3030 2).
            in_group = self.bdat is not None or (phase in ("mail", "rcpt") and "PIPELINING" in self.offer)
            early = await self.hold(result.until, result.early, in_group=in_group)
            if early is not None:
                await self.refuse_and_close(early, phase, result.stage)
        if result.refuse is None:
            return None
        reply = self.refuse(result.refuse, phase, result.stage)
        self.end_if_told(result.refuse, reply)
        return reply

    def end_transaction(self) -> None:
        """Forget the transaction; its stages hear of it once."""
        transaction = self.session.transaction
        if transaction is None:
            return
        if not self.splicing and (transaction.recipients or transaction.refused or transaction.reply is not None):
            smtp_data.record(self)
        if self.chain.reset:
            self.chain.tell_reset(self.session, transaction)
        self.session.transaction = None
