"""The client's side of an SMTP session: from the PROXY header to QUIT or the hand-off (RFC 5321).

LMTP is the same conversation but for LHLO and the replies to the end of data (RFC 2033, `lmtp.py`).

One coroutine reads like the RFC: `run` greets, then takes command by command. AUTH is in `smtp_auth`, MAIL to
the end of data in `smtp_mail`. Replies are collected and go out in one write when no further command waits
(RFC 2920 3.2).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import structlog

from gateway.facts import Phase
from gateway.frontend import smtp_data, smtp_mail, smtp_upstream, smtp_xclient
from gateway.frontend.closing import Closing
from gateway.frontend.served import HandOff, Served
from gateway.frontend.smtp_verbs import LMTP_VERBS, VERBS
from gateway.observe.transcript import Transcript
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import NON_SMTP_TLS, Reply, looks_like, parse_command
from gateway.relay.splice import SpliceResult
from gateway.relay.wire import EndOfStream, LineTooLong, Wire, WireTimeout
from gateway.replies import smtp_reply
from gateway.session import Listener, Session
from gateway.stage import Outcome
from gateway.upstream.smtp import Connection
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.pipeline.chain import Result

log = structlog.get_logger("gateway.smtp")

MAX_QUEUED = 500  # replies to one pipelined group that wait for its end


class SmtpConversation:
    """One SMTP session: the client's wire, what is known of the session, and the upstream once there is one."""

    __slots__ = (
        "bdat", "carried", "chain", "committed", "connection", "errors", "gone", "hand_off", "junk", "late",
        "limits", "lmtp",
        "login_deadline", "mail", "offer", "out", "reason", "refusals", "said", "served", "session", "spliced",
        "splicing", "task", "transcript", "trusted_lines", "upstream_pool", "verbs", "waiting",
        "wire",
    )  # fmt: skip

    def __init__(self, wire: Wire, served: Served, listener: Listener) -> None:
        self.wire = wire
        self.served = served
        self.chain = served.chain
        self.limits = served.limits
        self.session = self._new_session(listener)
        self.lmtp = listener.protocol == "lmtp"
        self.verbs = LMTP_VERBS if self.lmtp else VERBS
        self.out: list[bytes] = []
        self.offer: dict[str, str] = {}
        self.connection: Connection | None = None
        self.upstream_pool: object = None
        self.bdat: smtp_data.Bdat | None = None
        self.mail = smtp_mail.Mail()
        self.hand_off = served.hand_off
        self.errors = 0
        self.junk = 0
        self.refusals = 0
        self.committed = False  # the end of data went upstream: nothing may be cancelled now
        self.gone = False
        self.late = False  # limits.session_timeout has passed
        self.waiting = False
        self.said = False  # a command came since the greeting
        self.splicing = False
        self.spliced = ""
        self.carried: SpliceResult | None = None
        self.reason = "quit"
        self.task: asyncio.Task[None] | None = None
        self.transcript: Transcript | None = None
        self.trusted_lines = False
        self.login_deadline = 0.0

    def _new_session(self, listener: Listener) -> Session:
        served = self.served
        session = Session(
            served.new_id(), served.name, listener, self.wire.peername, self.wire.sockname, perf_counter()
        )
        session.hostname = served.hostname
        return session

    # -- the life of a session ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the session to its end; never raises but CancelledError of the worker's own making."""
        self.task = asyncio.current_task()
        self.wire.on_gone = self._client_gone
        self.login_deadline = self.wire.loop.time() + self.limits.login_timeout
        session_clock = self.wire.loop.call_later(self.limits.session_timeout, self._session_timeout)
        try:
            await self._serve()
        except Closing as closing:
            self.reason = str(closing)
        except EndOfStream:
            self.reason = "client closed"
        except WireTimeout:
            self._last_word("time-out", Cause.TIMEOUT)
        except ConnectionError as error:
            self.reason = f"client lost: {type(error).__name__}"
        except asyncio.CancelledError:
            if self.gone:
                self.reason = "client reset"
            elif self.late:
                self._last_word("time-out", Cause.TIMEOUT)
            elif self.served.draining:
                self._last_word("shutdown", Cause.SHUTDOWN)
            else:
                raise
        except Exception as error:
            self.reason = f"internal error: {type(error).__name__}: {error}"
            log.exception("internal_error", session=self.session.id, pipeline=self.session.pipeline)
            self.out.append(smtp_reply(Refuse(Cause.STAGE_FAILED, disconnect=True), self.shown_id).encode())
        finally:
            session_clock.cancel()
            await self._finish()

    async def _serve(self) -> None:
        session = self.session
        if session.listener.proxy_protocol:
            await smtp_xclient.read_proxy_header(self)
        if session.client.address in self.served.debug_clients:
            self.start_transcript()
        first = True
        while True:  # again after an accepted XCLIENT: a new session on the same wire
            await self._begin(first)
            first = False
            try:
                if await self._commands():
                    return
            except Closing:
                await smtp_mail.settle(self)  # what was asked before the last word is answered before it
                raise

    async def _begin(self, first: bool) -> None:
        """From the client's address to the greeting."""
        served, chain, session = self.served, self.chain, self.session
        self.trusted_lines = session.trusted or session.client.address in served.trust_clients
        if served.draining:
            await self.refuse_and_close(Refuse(Cause.SHUTDOWN), "greeting")
        if served.sessions > self.limits.sessions:
            await self.refuse_and_close(Refuse(Cause.TOO_MANY_CONNECTIONS, log="limits.sessions"), "greeting")
        until, early, stage = 0.0, None, ""
        if chain.connect:
            result = await chain.ask(chain.connect, session)
            await self._refuse_early(result, silent=session.listener.implicit_tls and self.wire.tls is None)
            until, early, stage = result.until, result.early, result.stage
        if session.listener.implicit_tls and self.wire.tls is None:
            await self.start_tls()
        if chain.greeting:
            result = await chain.ask(chain.greeting, session)
            await self._refuse_early(result)
            if result.until > until:
                until, early, stage = result.until, result.early, result.stage
        if until and first:
            refuse = await self.hold(until, early)
            if refuse is not None:
                await self.refuse_and_close(refuse, "greeting", stage)
        elif until:
            # Who sends XCLIENT may send the next commands with it (Dovecot): nothing came early.
            await asyncio.sleep(max(0.0, until - self.wire.loop.time()))
        self.said = False
        await self._greet(first)

    async def _refuse_early(self, result: Result, *, silent: bool = False) -> None:
        """A refusal before the greeting closes; before an implicit TLS handshake without a byte."""
        if result.refuse is None:
            return
        if silent:
            self.record_refusal(result.refuse, "connect", result.stage, None)
            raise Closing("refused before TLS")
        await self.refuse_and_close(result.refuse, "greeting", result.stage)

    async def _greet(self, first: bool) -> None:
        served = self.served
        for pool in served.candidates():
            if pool.profile() is None and not await pool.learn():
                refuse = Refuse(Cause.UPSTREAM_DOWN, disconnect=True, log=f"pool {pool.name}: capabilities unknown")
                await self.refuse_and_close(refuse, "greeting")
        greeting = f"220 {served.hostname} {'LMTP' if self.lmtp else 'ESMTP'} {served.instance}\r\n".encode()
        if first and self.hand_off is HandOff.GREETING and await smtp_upstream.hand_off_now(self, greeting):
            raise Closing("handed off")
        self.write(greeting)
        self.flush()

    async def start_tls(self) -> None:
        """A handshake, then the `secure` phase. What was known of the client before is forgotten (RFC 3207 4.2)."""
        context = self.session.listener.tls
        assert context is not None
        self.wire.set_deadline(self.limits.tls_timeout)
        try:
            await self.wire.start_tls_server(context)
        except (OSError, ValueError) as error:
            raise Closing(f"TLS handshake failed: {error}") from None
        session = self.session
        session.tls = self.wire.tls
        session.helo, session.esmtp = "", False
        self.chain.again(session, Phase.SECURE)
        if context.verify == "required" and session.tls is not None and not session.tls.verified:
            refuse = Refuse(Cause.CERTIFICATE_REQUIRED, disconnect=True, log=session.tls.verify_error)
            await self.refuse_and_close(refuse, "secure")
        if self.chain.secure:
            result = await self.chain.ask(self.chain.secure, session)
            if result.refuse is not None:
                await self.refuse_and_close(result.refuse, "secure", result.stage)

    # -- commands -------------------------------------------------------------------------------------------

    async def _commands(self) -> bool:
        """Take commands until the session ends (True) or XCLIENT starts it anew (False)."""
        while True:
            try:
                line = await self._next_line()
            except LineTooLong:
                self.error("500 5.5.2 line too long")
                continue
            if self.served.draining and self.session.transaction is None:
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

    async def _next_line(self) -> bytes:
        """The next command line; what is queued is sent before the wait for it. Raises LineTooLong."""
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
            if self.served.draining and self.session.transaction is None:
                self._last_word("shutdown", Cause.SHUTDOWN)
                raise Closing("shutdown")
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

    def set_command_deadline(self) -> None:
        """The client's next line must come in time for a command, and for the login while there was none."""
        limits, now = self.limits, self.wire.loop.time()
        seconds = limits.command_timeout
        if self.login_deadline:
            seconds = min(seconds, max(0.001, self.login_deadline - now))
        self.wire.set_deadline(seconds)

    async def _refuse_tls_hello(self) -> None:
        """A TLS handshake on a plain port never ends a line: look at the first byte."""
        wire = self.wire
        await wire.wait_readable()
        if wire.peek(2) == NON_SMTP_TLS:
            self.write(b"554 5.5.0 this port starts in clear text; use STARTTLS or the TLS port\r\n")
            raise Closing("TLS hello on a plain port")

    def refuse_bare_lf(self) -> None:
        """A line that a bare LF ended: two sides may not agree where it ends (promise 5). Raises Closing."""
        if self.wire.bare_lf and not self.trusted_lines:
            self.write(b"500 5.5.2 bare <LF> received\r\n")
            raise Closing("bare LF in a command")

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

    def error(self, text: str) -> None:
        """An error reply that counts."""
        self.write(smtp_mail.softened(self, Reply.of(text)).encode())
        self.count_error()

    def count_error(self) -> None:
        """One error more; too many without mail end the session. Raises Closing."""
        self.errors += 1
        if self.errors >= self.limits.errors:
            self.refuse(Refuse(Cause.TOO_MANY_ERRORS, disconnect=True), "command")
            raise Closing("too many errors")

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
        if self.wire.buffered:
            self.session.early_talker = True
            await self.refuse_and_close(Refuse(Cause.PIPELINING, disconnect=True), "command")

    # -- replies --------------------------------------------------------------------------------------------

    @property
    def shown_id(self) -> str:
        """The session id that refusals show, or nothing."""
        return self.session.id if self.served.reply_id else ""

    def write(self, reply: bytes) -> None:
        """Queue a reply."""
        self.out.append(reply)

    def flush(self) -> None:
        """Send what is queued in one write."""
        if self.out:
            data = b"".join(self.out)
            self.out.clear()
            if self.transcript is not None:
                self.transcript.to_client(data)
            self.wire.write(data)

    def reply_to(self, refuse: Refuse) -> Reply:
        """The reply of a refusal, with our id, softened if the pipeline says so."""
        return smtp_reply(refuse, self.shown_id, soft=self.served.soft_bounce)

    def refuse(self, refuse: Refuse, phase: str, stage: str = "") -> Reply:
        """Queue the refusal's reply, log it, tell the stages."""
        reply = self.reply_to(refuse)
        self.write(reply.encode())
        self.record_refusal(refuse, phase, stage, reply)
        return reply

    def record_refusal(self, refuse: Refuse, phase: str, stage: str, reply: Reply | None) -> None:
        """One log record a refusal; `settled` for the stages."""
        session = self.session
        self.refusals += 1
        transaction = session.transaction
        log.info(
            "refusal",
            session=session.id,
            pipeline=session.pipeline,
            client=session.client.address,
            phase=phase,
            stage=stage,
            cause=refuse.cause.value,
            reply="" if reply is None else f"{reply.code} {reply.text}",
            user=session.typed_user,
            helo=session.helo,
            sender=transaction.sender if transaction is not None else None,
            recipient=self.mail.asked.original if phase == "rcpt" and self.mail.asked is not None else None,
            detail=refuse.log or None,
        )
        self.tell_refused(refuse, phase, stage, reply)

    def tell_refused(self, refuse: Refuse, phase: str, stage: str, reply: Reply | None) -> None:
        """`settled` for a refusal of ours."""
        if self.chain.settled:
            code = reply.code // 100 if reply is not None else 5
            recipient = self.mail.asked.original if phase == "rcpt" and self.mail.asked is not None else ""
            self.chain.tell_settled(self.session, Outcome(phase, code, refuse.cause, stage, reply, recipient))

    def tell_settled(self, phase: Phase, reply: Reply) -> None:
        """`settled` for an answer that was no refusal of ours."""
        if self.chain.settled:
            self.chain.tell_settled(self.session, Outcome(phase.name.lower(), reply.code // 100, None, "", reply))

    async def refuse_and_close(self, refuse: Refuse, phase: str, stage: str = "") -> None:
        """The last reply of the session: 421 for what is temporary, for we close (RFC 5321 3.8)."""
        self.refuse(replace(refuse, disconnect=True), phase, stage)
        raise Closing(refuse.cause.value)

    async def hold(self, until: float, early: Refuse | None, *, in_group: bool = False) -> Refuse | None:
        """Wait until the loop's time `until` and watch the client; what it earns by talking, or None.

        `in_group`: what comes meanwhile may belong to a pipelined group and is not early (RFC 2920 3.1).
        Raises EndOfStream when the client leaves.
        """
        wire = self.wire
        self.flush()
        if not wire.buffered:
            remaining = until - wire.loop.time()
            if remaining <= 0:
                return None
            wire.set_deadline(remaining)
            try:
                await wire.wait_readable()
            except WireTimeout:
                return None
            if wire.eof and not wire.buffered:
                raise EndOfStream(b"")
        if not in_group:
            if early is not None:
                return early
            self.session.early_talker = True
        await asyncio.sleep(max(0.0, until - wire.loop.time()))
        return None

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

    def end_if_told(self, refuse: Refuse, reply: Reply) -> None:
        """After a refusal that disconnects, and after any 421 (RFC 5321 3.8), the session ends. Raises Closing."""
        if refuse.disconnect or reply.code == 421:
            raise Closing(refuse.cause.value)

    # -- the end --------------------------------------------------------------------------------------------

    def _client_gone(self, error: BaseException | None) -> None:
        """A reset cancels the running phase; not after the end of data went upstream (promise 2)."""
        self.gone = True
        if not self.committed and not self.waiting and self.task is not None and not self.splicing:
            self.task.cancel()

    def drain(self) -> None:
        """The worker stops: an idle client is told so now, a busy one at its next command."""
        if self.waiting and self.session.transaction is None and not self.splicing:
            if self.task is not None:
                self.task.cancel()

    def _session_timeout(self) -> None:
        """`limits.session_timeout` passed: the session ends, once no message hangs in the balance (promise 2)."""
        self.late = True
        if not self.committed and self.task is not None:
            self.task.cancel()

    def _last_word(self, reason: str, cause: Cause) -> None:
        self.reason = reason
        self.out.append(smtp_reply(Refuse(cause), self.shown_id).encode())

    def start_transcript(self) -> None:
        """`debug_clients`: log the dialogue, secrets removed."""
        self.transcript = Transcript(self.session.id)

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

    async def end_session(self) -> None:
        """What a session leaves behind: its transaction, its upstream connection, its stages' holds."""
        await smtp_mail.leave_chunks(self)
        self.end_transaction()
        smtp_upstream.part(self)
        if self.chain.close:
            await self.chain.tell_close(self.session)
        session, carried = self.session, self.carried
        log.info(
            "session",
            session=session.id,
            pipeline=session.pipeline,
            client=session.client.address,
            port=session.client.port,
            helo=session.helo,
            user=session.typed_user,
            name=session.client.name,
            tls=session.tls.version if session.tls is not None else "",
            transactions=session.transactions,
            refusals=self.refusals,
            bytes_in=self.wire.bytes_in,
            bytes_out=self.wire.bytes_out,
            seconds=round(perf_counter() - session.started, 3),
            upstream=self.spliced or None,
            bytes_up=carried.bytes_up if carried is not None else None,
            bytes_down=carried.bytes_down if carried is not None else None,
            reason=f"{self.reason}: {carried.reason}" if carried is not None else self.reason,
        )

    async def _finish(self) -> None:
        self.wire.on_gone = None
        if self.session.listener.implicit_tls and self.wire.tls is None:
            self.out.clear()  # the client expects TLS: not a byte in clear
        try:
            if not self.gone and not self.splicing:
                self.flush()
                self.wire.set_deadline(self.limits.linger)
                await self.wire.aclose(self.limits.linger)
            else:
                self.wire.abort()
        except (OSError, EndOfStream):
            self.wire.abort()
        finally:
            await self.end_session()
