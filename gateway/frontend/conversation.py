"""What a session is in every protocol: from the PROXY header over TLS and greeting to its last word.

`run` is the whole of it. A protocol adds its greeting, its commands and how its refusals read: `smtp.py`, `imap.py`,
`pop3.py`. Replies are collected and go out in one write when no further command waits.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import structlog

from gateway.facts import Phase
from gateway.frontend import proxy_in, routing
from gateway.frontend.closing import Closing
from gateway.frontend.counts import ENDS
from gateway.frontend.served import HandOff, Served
from gateway.observe import logs
from gateway.observe.traces import TracedSession
from gateway.observe.transcript import Transcript
from gateway.protocol.smtp import NON_SMTP_TLS, Reply
from gateway.relay.splice import Splice, SpliceResult
from gateway.relay.wire import EndOfStream, Wire, WireTimeout
from gateway.replies import PROTOCOL_ERRORS
from gateway.session import Listener, Session
from gateway.stage import Outcome
from gateway.upstream.prelude import give_back
from gateway.verdicts import Authenticated, Cause, Refuse

if TYPE_CHECKING:
    from gateway.pipeline.chain import Result
    from gateway.replies import Replies
    from gateway.session import Recipient
    from gateway.upstream.connection import UpstreamConnection

log = structlog.get_logger("gateway.session")

GOODBYE_QUIET = 2.0  # seconds
KILL_SECONDS = 5.0
KILLED = "session ended by the administrator"
LF = 10
MAX_QUEUED = 500  # replies to one pipelined group that wait for its end


class Conversation(ABC):
    """One session: the client's wire, what is known of the session, and the upstream once there is one."""

    __slots__ = (
        "carried", "chain", "connection", "drain_clock", "errors", "gone", "hand_off", "joined", "killed", "late",
        "limits", "login_deadline", "out", "reason", "refusals", "replies", "said", "served", "session", "spliced",
        "splicing", "task", "transcript", "trusted_lines", "upstream_pool", "waiting", "waiting_since", "wire",
    )  # fmt: skip

    connection: UpstreamConnection | None

    def __init__(self, wire: Wire, served: Served, listener: Listener, replies: Replies) -> None:
        self.wire = wire
        self.served = served
        self.chain = served.chain
        self.limits = served.limits
        self.replies = replies
        self.session = self._new_session(listener)
        wire.count(served.counts.received, served.counts.sent)
        self.out: list[bytes] = []
        self.connection = None
        self.upstream_pool: object = None
        self.hand_off = served.hand_off
        self.errors = 0
        self.refusals = 0
        self.gone = False
        self.late = False  # limits.session_timeout has passed
        self.killed = False  # an operator said so
        self.waiting = False
        self.said = False  # a command came since the greeting
        self.splicing = False
        self.spliced = ""
        self.joined: Splice | None = None
        self.carried: SpliceResult | None = None
        self.reason = "quit"
        self.task: asyncio.Task[None] | None = None
        self.transcript: Transcript | None = None
        self.trusted_lines = False
        self.login_deadline = 0.0
        self.waiting_since = 0.0
        self.drain_clock: asyncio.TimerHandle | None = None

    def _new_session(self, listener: Listener) -> Session:
        """The session; whether it is traced is decided here, once."""
        served = self.served
        kind: type[Session] = Session
        if served.traces is not None and served.traced_chain is not None and served.traces.sampled():
            kind, self.chain = TracedSession, served.traced_chain
        session = kind(
            served.new_id(), served.name, listener, self.wire.peername, self.wire.sockname, perf_counter()
        )
        session.hostname = served.hostname
        return session

    # -- what a protocol adds

    @abstractmethod
    def greeting(self) -> bytes:
        """The greeting with its end."""

    @abstractmethod
    async def commands(self) -> bool:
        """Take commands until the session ends (True) or begins anew on the same wire (False)."""

    @abstractmethod
    def answer(self, refuse: Refuse, reply: Reply) -> bytes:
        """How a refusal answers the command at hand; `reply` is its SMTP form."""

    @abstractmethod
    def farewell(self, refuse: Refuse) -> bytes:
        """How a refusal reads that ends the session and answers no command."""

    @abstractmethod
    def challenge_line(self, encoded: bytes) -> bytes:
        """A SASL challenge, already base64, as the protocol sends it."""

    @abstractmethod
    async def logged_in(self, verdict: Authenticated) -> bool:
        """Tell the client that it is logged in, and hand off where that is next; True when the session is over."""

    @property
    def login_decides(self) -> bool:
        """The upstream is opened before a login is answered."""
        return self.served.login_decides

    async def open_for_login(self) -> Refuse | None:
        """Open it."""
        return await routing.open_early(self)

    async def leave_upstream(self) -> None:
        """Leave it: what it was told of the client (login, TLS) is true no more."""
        connection, self.connection = self.connection, None
        if connection is not None:
            give_back(connection)

    @property
    def critical(self) -> bool:
        """Nothing may be cancelled now (promise 2)."""
        return False

    @property
    def busy(self) -> bool:
        """Something is under way that a stop waits for."""
        return False

    @property
    def asked_recipient(self) -> Recipient | None:
        """The recipient whom stages are asked about."""
        return None

    async def leave(self) -> None:
        """Give back what the session holds: its transaction, its upstream."""
        await self.leave_upstream()

    # -- the life of a session ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the session to its end; never raises but CancelledError of the worker's own making."""
        logs.pipeline.set(self.served.name)
        logs.listener.set(self.session.listener.name)
        self.task = asyncio.current_task()
        self.wire.on_gone = self._client_gone
        self.served.counts.began(self.session)
        self.login_deadline = self.wire.loop.time() + self.limits.login_timeout
        session_clock = self.wire.loop.call_later(self.limits.session_timeout, self._session_timeout)
        try:
            await self._serve()
        except Closing as closing:
            self.reason = str(closing)
        except EndOfStream:
            self.reason = "client closed"
        except WireTimeout:
            self.last_word("time-out", Cause.TIMEOUT)
        except ConnectionError as error:
            self.reason = f"client lost: {type(error).__name__}"
        except asyncio.CancelledError:
            if self.gone:
                self.reason = "client reset"
            elif self.late:
                self.last_word("time-out", Cause.TIMEOUT)
            elif self.killed:
                self.last_word("killed", Cause.SHUTDOWN, KILLED)
            elif self.served.draining:
                self.last_word("shutdown", Cause.SHUTDOWN)
            else:
                raise
        except Exception as error:
            self.reason = f"internal error: {type(error).__name__}: {error}"
            log.exception("internal_error", session=self.session.id, pipeline=self.session.pipeline)
            self.out.append(self.farewell(Refuse(Cause.STAGE_FAILED, disconnect=True)))
        finally:
            self.task = None  # nobody cancels it any more
            if self.killed and self.carried is not None:
                self.reason = "killed"
            session_clock.cancel()
            if self.drain_clock is not None:
                self.drain_clock.cancel()
            await self._finish()

    def turn_away(self, refuse: Refuse) -> None:
        """Instead of `run`: a last word and the end, at once. Who expects TLS first gets no word."""
        self.served.counts.refused(refuse, "connect")
        if not self.session.listener.implicit_tls:
            self.wire.write(self.farewell(refuse))
        self.wire.close(self.limits.linger)

    async def _serve(self) -> None:
        session = self.session
        if session.listener.proxy_protocol:
            await proxy_in.read_header(self)
        if session.client.address in self.served.debug_clients:
            self.start_transcript()
        first = True
        while True:  # again after an accepted XCLIENT: a new session on the same wire
            await self._begin(first)
            first = False
            if await self.commands():
                return

    async def _begin(self, first: bool) -> None:
        """From the client's address to the greeting."""
        served, chain, session = self.served, self.chain, self.session
        self.trusted_lines = session.trusted or session.client.address in served.trust_clients
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
        for pool in self.served.candidates(self.session.protocol):
            if pool.profile() is None and not await pool.learn():
                refuse = Refuse(Cause.UPSTREAM_DOWN, disconnect=True, log=f"pool {pool.name}: capabilities unknown")
                await self.refuse_and_close(refuse, "greeting")
        greeting = self.greeting()
        if first and self.hand_off is HandOff.GREETING and await self.hand_off_at_greeting(greeting):
            raise Closing("handed off")
        self.write(greeting)
        self.flush()

    async def hand_off_at_greeting(self, greeting: bytes) -> bool:
        """Join client and upstream at once where nothing else is needed; True when the session is over."""
        return False

    async def start_tls(self) -> None:
        """A handshake, then the `secure` phase. What was known of the client before is forgotten (RFC 3207 4.2)."""
        context = self.session.listener.tls
        assert context is not None
        self.wire.set_deadline(self.limits.tls_timeout)
        try:
            await self.wire.start_tls_server(context)
        except WireTimeout:
            raise Closing("TLS handshake failed: time-out") from None
        except (OSError, ValueError) as error:
            raise Closing(f"TLS handshake failed: {error}") from None
        session = self.session
        session.tls = self.wire.tls
        session.helo, session.esmtp = "", False
        session.client_id = None
        self.chain.again(session, Phase.SECURE)
        fault = context.refusal(session.tls) if session.tls is not None else ""
        if session.tls is not None and fault:
            cause = Cause.CERTIFICATE_REQUIRED if fault == "missing" else Cause.CERTIFICATE_FAILED
            await self.refuse_and_close(Refuse(cause, log=session.tls.verify_error), "secure")
        if self.chain.secure:
            result = await self.chain.ask(self.chain.secure, session)
            if result.refuse is not None:
                await self.refuse_and_close(result.refuse, "secure", result.stage)

    # -- lines ----------------------------------------------------------------------------------------------

    async def next_line(self, limit: int) -> bytes:
        """The next command line; what is queued is sent before the wait for it. Raises LineTooLong, Closing."""
        if self.killed:
            self.end_killed()
        wire = self.wire
        line = wire.next_line(limit)
        if line is None or len(self.out) > MAX_QUEUED:
            self.flush()
            if wire.write_paused:
                wire.set_deadline(self.limits.write_timeout)
                await wire.drain()
        if line is None:
            if self.late:
                raise WireTimeout
            self.set_command_deadline()
            self.waiting = True
            try:
                if not self.said and wire.tls is None:
                    await self._refuse_tls_hello()
                line = await wire.line(limit)
            finally:
                self.waiting = False
        return line

    async def _refuse_tls_hello(self) -> None:
        """A TLS handshake on a plain port never ends a line: look at the first byte."""
        await self.wire.wait_readable()
        if self.wire.peek(len(NON_SMTP_TLS)) == NON_SMTP_TLS:
            text = "this port starts in clear text; use STARTTLS or the TLS port"
            await self.refuse_and_close(Refuse(Cause.PROTOCOL, text=text, log="TLS hello on a plain port"), "command")

    def set_command_deadline(self) -> None:
        """The client's next line must come in time for a command, and for the login while there was none."""
        limits, now = self.limits, self.wire.loop.time()
        self.waiting_since = now
        seconds = limits.command_timeout
        if self.login_deadline:
            seconds = min(seconds, max(0.001, self.login_deadline - now))
        self.wire.set_deadline(seconds)

    def refuse_bare_lf(self) -> None:
        """A line that a bare LF ended: two sides may not agree where it ends (promise 5). Raises Closing."""
        if self.wire.bare_lf and not self.trusted_lines and not self.served.bare_lf:
            self.write(self.bare_lf_reply())
            if self.chain.settled:
                self.chain.tell_settled(self.session, Outcome("command", 5, Cause.PROTOCOL, "", None))
            raise Closing("bare LF in a command")

    @abstractmethod
    def bare_lf_reply(self) -> bytes:
        """The answer to a line that a bare LF ended."""

    def count_error(self, name: str = "") -> None:
        """One of the errors that a session may make; `name` is that of its fixed reply. Raises Closing after the last.

        Stages hear of it where it is an error of the client's whatever was said before.
        """
        self.errors += 1
        if name in PROTOCOL_ERRORS and self.chain.settled:
            self.chain.tell_settled(self.session, Outcome("command", 5, Cause.PROTOCOL, "", None))
        if self.errors >= self.limits.errors:
            self.write_farewell(Refuse(Cause.TOO_MANY_ERRORS, disconnect=True), "command")
            raise Closing("too many errors")

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
        """The SMTP form of a refusal, with our id, softened if the pipeline says so."""
        return self.served.replies["smtp"].smtp(refuse, self.shown_id, soft=self.served.soft_bounce)

    def refuse(self, refuse: Refuse, phase: str, stage: str = "") -> Reply:
        """Queue the refusal as the answer to the command at hand, log it, tell the stages."""
        reply = self.reply_to(refuse)
        answer = self.answer(refuse, reply)
        self.write(answer)
        self.record_refusal(refuse, phase, stage, reply, _shown(answer))
        return reply

    def write_farewell(self, refuse: Refuse, phase: str, stage: str = "") -> None:
        """The same for the last word of a session, which answers no command."""
        farewell = self.farewell(refuse)
        self.write(farewell)
        self.record_refusal(refuse, phase, stage, self.reply_to(refuse), _shown(farewell))

    def record_refusal(
        self, refuse: Refuse, phase: str, stage: str, reply: Reply | None, shown: str | None = None
    ) -> None:
        """One log record a refusal; `settled` for the stages."""
        session = self.session
        self.refusals += 1
        self.served.counts.refused(refuse, phase)
        transaction, recipient = session.transaction, self.asked_recipient if phase == "rcpt" else None
        log.info(
            "refusal",
            session=session.id,
            pipeline=session.pipeline,
            client=session.client.address,
            phase=phase,
            stage=stage,
            cause=refuse.cause.value,
            reply=shown if shown is not None else f"{reply.code} {reply.text}" if reply is not None else "",
            user=session.typed_user,
            helo=session.helo,
            sender=transaction.sender if transaction is not None else None,
            recipient=recipient.original if recipient is not None else None,
            detail=refuse.log or None,
        )
        self.tell_refused(refuse, phase, stage, reply)

    def tell_refused(self, refuse: Refuse, phase: str, stage: str, reply: Reply | None) -> None:
        """`settled` for a refusal of ours."""
        if self.chain.settled:
            code = reply.code // 100 if reply is not None else 5
            asked = self.asked_recipient if phase == "rcpt" else None
            recipient = asked.original if asked is not None else ""
            self.chain.tell_settled(self.session, Outcome(phase, code, refuse.cause, stage, reply, recipient))

    def tell_settled(self, phase: Phase, reply: Reply) -> None:
        """`settled` for an answer that was no refusal of ours."""
        if self.chain.settled:
            self.chain.tell_settled(self.session, Outcome(phase.name.lower(), reply.code // 100, None, "", reply))

    async def refuse_and_close(self, refuse: Refuse, phase: str, stage: str = "") -> None:
        """The last reply of the session: 421 for what is temporary, for we close (RFC 5321 3.8)."""
        self.write_farewell(replace(refuse, disconnect=True), phase, stage)
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

    def end_if_told(self, refuse: Refuse, reply: Reply) -> None:
        """After a refusal that disconnects, and after any 421 (RFC 5321 3.8), the session ends. Raises Closing."""
        answers_421 = reply.code == 421 and self.replies.family == "smtp"
        if refuse.disconnect or answers_421 or refuse.cause in self.served.disconnect_on:
            raise Closing(refuse.cause.value)

    async def join(self, connection: UpstreamConnection) -> None:
        """The hand-off: bytes both ways from now on, until an end closes or nothing moves."""
        self.flush()
        self.splicing = True
        self.spliced = connection.server.url
        self.wire.on_gone = None
        self.connection = connection
        try:
            self.joined = Splice(self.wire, connection.wire, idle=self.limits.idle(self.session.protocol))
            if self.served.draining:
                self._part_joined()
            self.carried = await self.joined.run()
            self.reason = "handed off"
        finally:
            self.connection = self.joined = None
            connection.abort()

    def _part_joined(self) -> None:
        """At a stop: a goodbye once the upstream had the last word, ended its line, and nothing moved for a while.

        Anywhere else it would stand in the middle of what the upstream says; the deadline of the stop ends that.
        """
        joined, loop = self.joined, self.wire.loop
        if joined is None:
            return
        left = joined.last_progress + GOODBYE_QUIET - loop.time()
        if left > 0 or not self.part_now():
            loop.call_later(max(left, GOODBYE_QUIET / 4), self._part_joined)

    def part_now(self) -> bool:
        """The goodbye of a joined session, if nothing would be torn apart by it; whether it was said."""
        joined = self.joined
        if joined is None or not (joined.last_from is None or (joined.last_from, joined.last_byte) == ("upstream", LF)):
            return False
        joined.goodbye(self.farewell(Refuse(Cause.SHUTDOWN, text=KILLED if self.killed else "")))
        return True

    # -- the end --------------------------------------------------------------------------------------------

    def _client_gone(self, error: BaseException | None) -> None:
        """A reset cancels the running phase; not after the end of data went upstream (promise 2)."""
        self.gone = True
        if not self.critical and not self.waiting and self.task is not None and not self.splicing:
            self.task.cancel()

    def drain(self, quiet: float) -> None:
        """The worker stops: a client that said nothing for `quiet` seconds is told so, and asked about again.

        Who is in the middle of something may end it: a session that was accepted gets its first transaction through.
        """
        loop, task = self.wire.loop, self.task
        if task is not None and task.done():
            return
        if self.splicing:
            self._part_joined()
            return
        left = quiet
        if self.waiting and not self.busy and task is not None:
            left = self.waiting_since + quiet - loop.time()
            if left <= 0:
                task.cancel()
                return
        self.drain_clock = loop.call_later(max(left, 0.01), self.drain, quiet)

    def kill(self) -> bool:
        """An operator ends the session; False if that has to wait for the answer to a message (promise 2).

        There is a goodbye unless the upstream is speaking: a joined session has KILL_SECONDS to come to a pause.
        """
        if self.task is None:
            return True  # it is about to end
        again, self.killed = self.killed, True
        if self.splicing:
            if not again:
                self._part_killed(self.wire.loop.time() + KILL_SECONDS)
        elif self.critical:
            return False
        elif not again:
            self.task.cancel()
        return True

    def _part_killed(self, until: float) -> None:
        joined, task, loop = self.joined, self.task, self.wire.loop
        if joined is None or task is None:
            return
        late = loop.time() >= until
        if (late or loop.time() >= joined.last_progress + GOODBYE_QUIET) and self.part_now():
            return
        if late:
            task.cancel()
        else:
            loop.call_later(GOODBYE_QUIET / 4, self._part_killed, until)

    def end_killed(self) -> None:
        """The end that had to wait. Raises Closing."""
        self.last_word("killed", Cause.SHUTDOWN, KILLED)
        raise Closing("killed")

    def _session_timeout(self) -> None:
        """`limits.session_timeout` passed: the session ends, once no message hangs in the balance (promise 2)."""
        self.late = True
        if not self.critical and self.task is not None:
            self.task.cancel()

    def last_word(self, reason: str, cause: Cause, text: str = "") -> None:
        """A farewell that is no refusal."""
        self.reason = reason
        self.out.append(self.farewell(Refuse(cause, text=text)))

    def start_transcript(self) -> None:
        """`debug_clients`: log the dialogue, secrets removed."""
        self.transcript = Transcript(self.session.id)

    async def end_session(self) -> None:
        """What a session leaves behind: its transaction, its upstream connection, its stages' holds."""
        await self.leave()
        if self.chain.close:
            await self.chain.tell_close(self.session)
        session, carried, mail = self.session, self.carried, self.replies.family == "smtp"
        reason = f"{self.reason}: {carried.reason}" if carried is not None else self.reason
        self.served.counts.ended(session, reason)
        if self.served.traces is not None:
            self.served.traces.ended(session, ENDS.get(reason) or ENDS.get(reason.partition(":")[0], "refused"))
        log.info(
            "session",
            session=session.id,
            pipeline=session.pipeline,
            client=session.client.address,
            port=session.client.port,
            helo=session.helo if mail else None,
            user=session.typed_user,
            name=session.client.name,
            tls=session.tls.version if session.tls is not None else "",
            transactions=session.transactions if mail else None,
            refusals=self.refusals,
            bytes_in=self.wire.bytes_in,
            bytes_out=self.wire.bytes_out,
            seconds=round(perf_counter() - session.started, 3),
            upstream=self.spliced or None,
            bytes_up=carried.bytes_up if carried is not None else None,
            bytes_down=carried.bytes_down if carried is not None else None,
            reason=reason,
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


def _shown(reply: bytes) -> str:
    """A reply as the log shows it: its lines joined, without codes in front of the later ones."""
    lines = reply.decode("utf-8", "replace").rstrip("\r\n").split("\r\n")
    return " ".join([lines[0], *(line[4:] for line in lines[1:])])
