"""AUTH: the SASL exchange with the client, the question to the stages, the answer (RFC 4954)."""

from __future__ import annotations

import asyncio
import base64
import secrets
from time import time
from typing import TYPE_CHECKING

import structlog

from gateway.facts import Phase
from gateway.frontend import smtp_upstream
from gateway.frontend.closing import Closing
from gateway.frontend.offer import offered_mechanisms, tls_would_help
from gateway.frontend.served import HandOff
from gateway.protocol import sasl
from gateway.protocol.errors import PeerError
from gateway.protocol.smtp import Command, Reply
from gateway.relay.wire import LineTooLong
from gateway.verdicts import Authenticated, Cause, Refuse

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation
    from gateway.pipeline.chain import Result

log = structlog.get_logger("gateway.auth")

AUTHENTICATED = Reply.of("235 2.7.0 Authentication successful")
MAX_DELAY = 15.0


class ClientAttempt:
    """One AUTH as the stages see it (`gateway.Attempt`)."""

    __slots__ = ("_conversation", "credentials", "number")

    def __init__(self, conversation: SmtpConversation, credentials: sasl.Credentials, number: int) -> None:
        self._conversation = conversation
        self.credentials = credentials
        self.number = number

    async def challenge(self, data: bytes) -> bytes:
        """Send a 334 with these bytes; the client's decoded answer. Raises PeerError on cancel or bad base64."""
        return await _ask(self._conversation, data)


async def auth(conversation: SmtpConversation, command: Command) -> bool:
    """The AUTH command; always goes on with the session or raises Closing."""
    session = conversation.session
    refusal = await _out_of_place(conversation, command)
    if refusal:
        conversation.error(refusal)
        return False
    mechanism, _, initial = command.argument.partition(b" ")
    name = mechanism.decode("ascii", "replace").upper()
    offered = offered_mechanisms(conversation)
    if not offered and tls_would_help(conversation):
        conversation.refuse(Refuse(Cause.TLS_REQUIRED), "auth")
        return False
    if name not in offered:
        conversation.error("504 5.5.4 mechanism not available")
        return False
    try:
        credentials = await _exchange(conversation, name, initial.strip())
    except PeerError as error:
        # 501 for a cancel or what is no SASL: not a guess at a password, but one of the errors that count.
        conversation.error((error.reply or b"501 5.5.2 cannot decode").decode("ascii", "replace"))
        return False
    number = session.auth_failures + 1
    result = await conversation.chain.ask(
        conversation.chain.auth, session, ClientAttempt(conversation, credentials, number)
    )
    if result.authenticated is not None:
        return await _succeeded(conversation, credentials, result.authenticated)
    await _failed(conversation, credentials, result)
    return False


async def _out_of_place(conversation: SmtpConversation, command: Command) -> str:
    session = conversation.session
    if not command.argument:
        return "501 5.5.4 needs a mechanism"
    if not conversation.chain.mechanisms:
        return "502 5.5.1 AUTH not available"
    if not session.esmtp:
        return "503 5.5.1 send EHLO first"
    if session.user:
        return "503 5.5.1 already authenticated"
    if session.transaction is not None:
        return "503 5.5.1 not during a mail transaction"
    await conversation.must_be_last()
    return ""


async def _exchange(conversation: SmtpConversation, mechanism: str, initial: bytes) -> sasl.Credentials:
    """Challenges and responses until the mechanism has what it needs."""
    text = f"<{secrets.token_hex(8)}.{int(time())}@{conversation.served.hostname}>".encode()
    exchange = sasl.server(mechanism, challenge_text=text)
    data: bytes | None = None
    if initial:
        data = b"" if initial == b"=" else sasl.decode_base64(initial)
    step = exchange.step(data)
    while isinstance(step, sasl.Challenge):
        step = exchange.step(await _ask(conversation, step.data))
    return step


async def _ask(conversation: SmtpConversation, challenge: bytes) -> bytes:
    conversation.write(b"334 " + base64.b64encode(challenge) + b"\r\n")
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
        raise PeerError("cancelled", b"501 5.7.0 authentication cancelled")
    return sasl.decode_base64(line)


async def _succeeded(conversation: SmtpConversation, credentials: sasl.Credentials, verdict: Authenticated) -> bool:
    session = conversation.session
    session.typed_user = verdict.user
    session.user = verdict.user.lower()
    session.identity = verdict.identity
    session.password = verdict.password
    session.auth_mechanism = credentials.mechanism
    session.upstream = verdict.upstream
    smtp_upstream.part(conversation)  # it was opened before it could be told of the login
    if conversation.served.login_decides:
        refuse = await smtp_upstream.open_for_login(conversation)
        if refuse is not None:
            forget_login(conversation)
            if refuse.reply is None and refuse.cause is not Cause.AUTH_FAILED:
                # An outage, no verdict on the password: 454, or clients would ask their users for another one.
                refuse = Refuse(Cause.AUTH_UNAVAILABLE, log=refuse.log or refuse.cause.value)
            await _answer_failure(conversation, credentials, refuse, "upstream")
            return False
    session.postponed = None
    conversation.login_deadline = 0.0
    log.info(
        "auth",
        session=session.id,
        pipeline=session.pipeline,
        client=session.client.address,
        user=session.typed_user,
        mechanism=credentials.mechanism,
    )
    conversation.write(AUTHENTICATED.encode())
    conversation.tell_settled(Phase.AUTH, AUTHENTICATED)
    if conversation.hand_off is HandOff.LOGIN:
        await smtp_upstream.hand_off_now(conversation)
    return False


def forget_login(conversation: SmtpConversation) -> None:
    """As if AUTH had never been."""
    session = conversation.session
    session.user = session.typed_user = session.identity = session.auth_mechanism = ""
    session.password = None
    session.upstream = None


async def _failed(conversation: SmtpConversation, credentials: sasl.Credentials, result: Result) -> None:
    """535 only when a verifier said so; a verifier that could not answer makes it 454 (architecture, "Replies")."""
    if result.failed:
        refuse = Refuse(Cause.AUTH_UNAVAILABLE)
    elif result.refuse is not None:
        refuse = result.refuse
    else:
        refuse = Refuse(Cause.AUTH_FAILED)
    await _answer_failure(conversation, credentials, refuse, result.stage, result.until)


async def _answer_failure(
    conversation: SmtpConversation, credentials: sasl.Credentials, refuse: Refuse, stage: str, until: float = 0.0
) -> None:
    session, limits = conversation.session, conversation.limits
    session.auth_failures += 1
    user = getattr(credentials, "user", "") or getattr(credentials, "authzid", "")
    log.info(
        "auth_failure",
        session=session.id,
        pipeline=session.pipeline,
        client=session.client.address,
        user=user,
        mechanism=credentials.mechanism,
        cause=refuse.cause.value,
        stage=stage,
        detail=refuse.log or None,
    )
    delay = min(MAX_DELAY, limits.auth_delay * 2 ** (session.auth_failures - 1))
    loop = conversation.wire.loop
    conversation.flush()
    await asyncio.sleep(max(delay, until - loop.time()))
    if isinstance(credentials, sasl.Token) and refuse.cause is Cause.AUTH_FAILED:
        try:
            await _ask(conversation, sasl.oauth_error(credentials.mechanism))
        except PeerError:
            pass  # RFC 7628 3.2.3: whatever the client says now, the end is 535
    reply = conversation.reply_to(refuse)
    conversation.write(reply.encode())
    conversation.refusals += 1
    conversation.tell_refused(refuse, "auth", stage, reply)  # its record is `auth_failure`
    if refuse.disconnect or reply.code == 421:
        raise Closing(refuse.cause.value)
    if session.auth_failures >= limits.auth_failures:
        await conversation.refuse_and_close(Refuse(Cause.AUTH_TOO_MANY, disconnect=True), "auth")
