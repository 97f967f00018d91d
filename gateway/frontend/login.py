"""A login: the SASL exchange with the client, the question to the stages, the upstream's word where it counts.

The same for SMTP, IMAP and POP3; how challenges and answers read is the protocol's (`Conversation`).
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from time import time
from typing import TYPE_CHECKING

import structlog

from gateway.frontend import routing
from gateway.frontend.closing import Closing
from gateway.frontend.offer import declared_mechanisms
from gateway.protocol import sasl
from gateway.protocol.errors import PeerError
from gateway.relay.wire import EndOfStream, LineTooLong, WireTimeout
from gateway.stage import Timed
from gateway.verdicts import Authenticated, Cause, Refuse

if TYPE_CHECKING:
    from gateway.frontend.conversation import Conversation
    from gateway.pipeline.chain import Result
    from gateway.stage import Peer

log = structlog.get_logger("gateway.auth")

MAX_DELAY = 15.0
_OUTAGES = (Cause.AUTH_UNAVAILABLE, Cause.STAGE_FAILED)


class ClientAttempt(Timed):
    """One login as the stages see it (`gateway.Attempt`)."""

    __slots__ = ("_conversation", "credentials", "ended", "number", "user")

    def __init__(self, conversation: Conversation, credentials: sasl.Credentials, number: int) -> None:
        super().__init__()
        self._conversation = conversation
        self.credentials = credentials
        self.number = number
        self.ended: Closing | EndOfStream | WireTimeout | None = None
        self.user: str = getattr(credentials, "user", "") or getattr(credentials, "authzid", "")

    async def challenge(self, data: bytes) -> bytes:
        """Send a challenge with these bytes; the client's decoded answer.

        Raises PeerError on cancel, bad base64, and when the session ends: that is no failure of the stage.
        """
        try:
            with self.client_s_turn(self._conversation.wire.loop.time):
                return await ask_client(self._conversation, data)
        except (Closing, EndOfStream, WireTimeout) as error:
            self.ended = error
            raise PeerError("the session ended in the exchange") from error

    async def open_upstream(self) -> Peer | Refuse:
        """The upstream of this session before anybody logged in there; it stays the session's if the login succeeds."""
        return await routing.open_for_relay(self._conversation)


async def exchange(conversation: Conversation, mechanism: str, initial: bytes | None) -> sasl.Credentials:
    """Challenges and responses until the mechanism has what it needs; `initial` is the decoded initial response.

    An exchange that a stage relays is not taken apart here. Raises PeerError for what is no such exchange.
    """
    stage = declared_mechanisms(conversation).get(mechanism)
    if stage is not None and stage.relays_logins:
        return sasl.Exchange(mechanism, initial)
    text = f"<{secrets.token_hex(8)}.{int(time())}@{conversation.served.hostname}>".encode()
    server = sasl.server(mechanism, challenge_text=text)
    try:
        step = server.step(initial)
        while isinstance(step, sasl.Challenge):
            step = server.step(await ask_client(conversation, step.data))
    except PeerError as error:
        result = "canceled" if isinstance(error, SaslCancelled) else "malformed"
        conversation.served.counts.login(mechanism, result)
        raise
    return step


async def ask_client(conversation: Conversation, challenge: bytes) -> bytes:
    """One challenge and the client's answer, decoded. Raises PeerError: `SaslCancelled` if the client gives up."""
    conversation.write(conversation.challenge_line(sasl.encode_base64(challenge)))
    conversation.flush()
    wire = conversation.wire
    conversation.set_command_deadline()
    try:
        line = await wire.line(conversation.limits.auth_line)
    except LineTooLong:
        raise PeerError("SASL response too long", b"500 5.5.6 authentication line too long") from None
    conversation.refuse_bare_lf()
    if conversation.transcript is not None:
        conversation.transcript.from_client_secret()
    if sasl.is_cancel(line):
        raise SaslCancelled("cancelled", b"501 5.7.0 authentication cancelled")
    return sasl.decode_base64(line)


class SaslCancelled(PeerError):
    """The client gave the exchange up."""


async def log_in(conversation: Conversation, credentials: sasl.Credentials) -> bool:
    """Ask the stages, and the upstream where the login is its to decide; True when the session is over.

    The client has its answer afterwards. Raises Closing.
    """
    number = conversation.session.auth_failures + 1
    attempt = ClientAttempt(conversation, credentials, number)
    result = await conversation.chain.ask(conversation.chain.auth, conversation.session, attempt)
    if attempt.ended is not None:
        raise attempt.ended
    if result.authenticated is None:
        await _failed(conversation, attempt, result)
        return False
    return await _succeeded(conversation, attempt, result.authenticated)


async def _succeeded(conversation: Conversation, attempt: ClientAttempt, verdict: Authenticated) -> bool:
    session, credentials = conversation.session, attempt.credentials
    session.typed_user = verdict.user
    session.user = verdict.user.lower()
    session.identity = verdict.identity
    session.password = verdict.password
    session.token = verdict.token
    session.auth_mechanism = credentials.mechanism
    session.upstream = verdict.upstream
    session.relayed = verdict.reply is not None
    if not session.relayed:
        await conversation.leave_upstream()  # it was opened before it could be told of the login
        if conversation.login_decides:
            refuse = await conversation.open_for_login()
            if refuse is not None:
                forget_login(conversation)
                if refuse.reply is None and refuse.cause not in (Cause.AUTH_FAILED, Cause.LOGIN_REFUSED):
                    # An outage, no verdict on the password, or clients would ask their users for another one.
                    refuse = Refuse(
                        Cause.AUTH_UNAVAILABLE, disconnect=refuse.disconnect or refuse.cause in _ends(conversation),
                        log=refuse.log or refuse.cause.value,
                    )  # fmt: skip
                await _answer_failure(conversation, attempt, refuse, "upstream")
                return False
    session.postponed = None
    conversation.login_deadline = 0.0
    conversation.served.counts.login(credentials.mechanism, "ok")
    log.info(
        "auth",
        session=session.id,
        pipeline=session.pipeline,
        client=session.client.address,
        user=session.typed_user,
        mechanism=credentials.mechanism,
    )
    return await conversation.logged_in(verdict)


def _ends(conversation: Conversation) -> frozenset[Cause]:
    return conversation.served.disconnect_on


def forget_login(conversation: Conversation) -> None:
    """As if there had been none."""
    session = conversation.session
    session.user = session.typed_user = session.identity = session.auth_mechanism = ""
    session.password = session.token = None
    session.relayed = False
    session.upstream = None


async def _failed(conversation: Conversation, attempt: ClientAttempt, result: Result) -> None:
    """535 only when a verifier said so; a verifier that could not answer makes it 454 (architecture, "Replies")."""
    if conversation.connection is not None and not routing.usable(conversation.connection):
        await conversation.leave_upstream()  # its place in the pool is not held while the client thinks
    if result.failed:
        refuse = Refuse(Cause.AUTH_UNAVAILABLE)
    elif result.refuse is not None:
        refuse = result.refuse
    else:
        refuse = Refuse(Cause.AUTH_FAILED)
    await _answer_failure(conversation, attempt, refuse, result.stage, result.until)


async def _answer_failure(
    conversation: Conversation, attempt: ClientAttempt, refuse: Refuse, stage: str, until: float = 0.0
) -> None:
    session, limits, credentials = conversation.session, conversation.limits, attempt.credentials
    session.auth_failures += 1
    result = "unavailable" if refuse.cause in _OUTAGES else "refused"
    conversation.served.counts.login(credentials.mechanism, result)
    conversation.served.counts.refused(refuse, "auth")
    log.info(
        "auth_failure",
        session=session.id,
        pipeline=session.pipeline,
        client=session.client.address,
        user=attempt.user,
        mechanism=credentials.mechanism,
        cause=refuse.cause.value,
        stage=stage,
        detail=refuse.log or None,
    )
    delay = min(MAX_DELAY, limits.auth_delay * 2 ** (session.auth_failures - 1))
    loop = conversation.wire.loop
    conversation.flush()
    pause = max(delay, until - loop.time(), 0.0)
    await asyncio.sleep(pause)
    if conversation.login_deadline:
        conversation.login_deadline += pause  # not the client's time
    if isinstance(credentials, sasl.Token) and refuse.cause in (Cause.AUTH_FAILED, Cause.LOGIN_REFUSED):
        try:
            await ask_client(conversation, sasl.oauth_error(credentials.mechanism))
        except PeerError:
            pass  # RFC 7628 3.2.3: whatever the client says now, the end is a refusal
    reply = conversation.reply_to(refuse)
    conversation.write(conversation.answer(refuse, reply))
    conversation.refusals += 1
    conversation.tell_refused(refuse, "auth", stage, reply)  # its record is `auth_failure`
    in_its_words = refuse.reply is not None and stage != "upstream"  # a verifier's verdict, whatever its code
    conversation.end_if_told(replace(refuse, cause=Cause.AUTH_FAILED) if in_its_words else refuse, reply)
    if session.auth_failures >= limits.auth_failures:
        await conversation.refuse_and_close(Refuse(Cause.AUTH_TOO_MANY, disconnect=True), "auth")
