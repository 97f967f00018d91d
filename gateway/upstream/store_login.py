"""The login at a mail store with what the client gave at its own: the password, or the OAuth token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.protocol import sasl
from gateway.protocol.errors import LocalError
from gateway.protocol.imap import check_login
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.protocol.smtp import Reply
    from gateway.session import Session
    from gateway.upstream.store import StoreConnection

NO_VERDICT = (b"[PRIVACYREQUIRED]", b"[SYS/PERM]", b"[CONTACTADMIN]")
"""Refusals for good that say nothing of the password (RFC 5530, RFC 3206)."""


async def log_in(session: Session, connection: StoreConnection) -> Refuse | None:
    """Log the session's client in; the refusal for it, which carries the store's own words, or None.

    Raises UpstreamError.
    """
    url = connection.url
    if not session.login and session.token is None:
        return Refuse(Cause.AUTH_UNAVAILABLE, log=f"{url}: nobody logged in whom the store could know")
    if session.token is None and session.password is None:
        return Refuse(Cause.AUTH_UNAVAILABLE, log=f"{url}: the auth stage did not send password")
    if not connection.takes_secrets:
        what = "is reached in clear text over the network; set tls: required on its pool"
        return Refuse(Cause.UPSTREAM_MISCONFIGURED, temporary=True, log=f"{url} {what}")
    connection.identified()
    try:
        if session.token is not None:
            reply = await _say_token(session, connection, session.token)
        else:
            assert session.password is not None
            reply = await connection.login(_octets(session.login), _octets(session.password))
    except LocalError as error:
        return Refuse(Cause.AUTH_FAILED, log=f"{url}: {error}")
    if reply.reply_class == 2:
        return None
    return _refusal(reply, url)


async def _say_token(session: Session, connection: StoreConnection, token: str) -> Reply:
    """The mechanism that the client used; an error challenge wants an empty answer first (RFC 7628 3.2.3)."""
    if session.auth_mechanism == "OAUTHBEARER":
        target, rest = connection.server.target, b"\x01"
        message = sasl.client_oauthbearer(session.login, token, target.host or "localhost", target.port or 1)
    else:
        message, rest = sasl.client_xoauth2(session.login, token), b""
    check_login(message)
    step = await connection.sasl(session.auth_mechanism or "XOAUTH2", message)
    if step.reply is None:
        step = await connection.sasl_answer(rest)
    return await connection.ended(step)


def _refusal(reply: Reply, url: str) -> Refuse:
    """A refusal is a verdict on the login only if the store says so: else clients ask their users for passwords."""
    words = f"{url} refused the login: {reply.code} {reply.text}"
    verdict = reply.code in (550, 535) and not reply.lines[0].upper().startswith(NO_VERDICT)
    passed = reply if reply.code != 504 else None
    cause = Cause.LOGIN_REFUSED if verdict else Cause.AUTH_UNAVAILABLE
    return Refuse(cause, reply=passed, log=words)


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
