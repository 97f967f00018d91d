"""Who the client is, by the word of trusted peers: XCLIENT.

Believed only from networks named in `trust.xclient`, judged by the TCP peer, never by what was claimed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.protocol import xclient as codec
from gateway.protocol.smtp import Command, Reply
from gateway.session import Client, Session

if TYPE_CHECKING:
    from gateway.frontend.smtp import SmtpConversation


def may_xclient(conversation: SmtpConversation) -> bool:
    """Whether the TCP peer is trusted, and so is the client if the peer only carries its connection (PROXY)."""
    session, trusted = conversation.session, conversation.served.trust_xclient
    if session.peer[0] not in trusted:
        return False
    header = session.proxy_header
    return header is None or header.source is None or header.source[0] in trusted


async def xclient(conversation: SmtpConversation, command: Command) -> bool:
    """XCLIENT: an accepted one ends the session and starts one at `connect` on the same wire (True)."""
    session = conversation.session
    if not may_xclient(conversation):
        conversation.error("550 5.7.0 insufficient authorization")
        return False
    if session.transaction is not None:
        conversation.error("503 5.5.1 mail transaction in progress")
        return False
    attributes = codec.parse(command.argument)
    fresh = type(session)(  # traced if the connection is
        conversation.served.new_id(), session.pipeline, session.listener, session.peer, session.local, session.started
    )
    fresh.hostname = session.hostname
    fresh.tls = session.tls
    fresh.proxy_header = session.proxy_header
    fresh.client = _client(session.client, attributes)
    fresh.local = _destination(session, attributes)
    fresh.accepted_at = session.accepted_at
    if not conversation.said:
        # A long XCLIENT comes in parts (Dovecot): they add up while nothing else is said.
        fresh.helo, fresh.esmtp = session.helo, session.esmtp
        fresh.user, fresh.typed_user, fresh.auth_mechanism = session.user, session.typed_user, session.auth_mechanism
    helo, login = attributes.get("HELO"), attributes.get("LOGIN")
    if helo:
        fresh.helo = helo.decode("ascii", "replace")
    if attributes.get("PROTO"):
        fresh.esmtp = attributes["PROTO"] != b"SMTP"
    if login:
        fresh.typed_user = login.decode("utf-8", "replace")
        fresh.user = fresh.typed_user.lower()
        fresh.auth_mechanism = "XCLIENT"
    fresh.trusted = bool(fresh.user)  # the peer is trusted; the client only where the peer gave its login
    conversation.reason = "XCLIENT"
    await conversation.end_session()
    conversation.reason = "quit"
    conversation.session = fresh
    conversation.served.counts.began(fresh)
    conversation.offer = {}
    return True


async def not_available(conversation: SmtpConversation, command: Command) -> bool:
    """Verbs of upstreams that a client must never reach through us (architecture, "Three grades")."""
    conversation.write(Reply.of("502 5.5.1 command not available").encode())
    return False


def _client(before: Client, attributes: dict[str, bytes | None]) -> Client:
    address, port = attributes.get("ADDR"), attributes.get("PORT")
    client = Client(
        before.address if address is None else address.decode("ascii"), before.port if port is None else int(port)
    )
    if address is None:
        client.name, client.reverse_name, client.name_status = before.name, before.reverse_name, before.name_status
    if "NAME" in attributes:
        name = attributes["NAME"]
        if name is codec.TEMPUNAVAIL:
            client.name_status = "tempunavail"
        elif name is None:
            client.name_status = "unavailable"
        else:
            client.name = client.reverse_name = name.decode("ascii", "replace")
            client.name_status = "ok"
    reverse = attributes.get("REVERSE_NAME")
    if reverse and reverse is not codec.TEMPUNAVAIL:
        client.reverse_name = reverse.decode("ascii", "replace")
    return client


def _destination(session: Session, attributes: dict[str, bytes | None]) -> tuple[str, int]:
    address, port = attributes.get("DESTADDR"), attributes.get("DESTPORT")
    return (
        session.local[0] if address is None else address.decode("ascii"),
        session.local[1] if port is None else int(port),
    )
