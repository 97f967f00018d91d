"""Who the client is, by the word of a trusted proxy: the PROXY header in front of everything.

Believed only from networks named in `trust.proxy`, judged by the TCP peer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from gateway.frontend.closing import Closing
from gateway.protocol import proxy_header
from gateway.protocol.errors import PeerError
from gateway.session import Client

if TYPE_CHECKING:
    from gateway.frontend.conversation import Conversation

log = structlog.get_logger("gateway.session")


async def read_header(conversation: Conversation) -> None:
    """Take the PROXY header off the wire, before TLS and greeting. Raises Closing, silently for the client."""
    wire, session = conversation.wire, conversation.session
    if session.peer[0] not in conversation.served.trust_proxy and session.peer[0] != "unix:":
        log.warning("proxy_header", session=session.id, client=session.peer[0], error="peer is not in trust.proxy")
        raise Closing("PROXY peer not trusted")
    wire.set_deadline(conversation.limits.proxy_timeout)
    data = b""
    while True:
        block = await wire.read()
        if not block:
            raise Closing("no PROXY header")
        data += block
        try:
            parsed = proxy_header.parse(data)
        except PeerError as error:
            log.warning("proxy_header", session=session.id, client=session.peer[0], error=str(error))
            raise Closing("broken PROXY header") from None
        if parsed is not None:
            break
    header, consumed = parsed
    wire.unread(data[consumed:])
    session.proxy_header = header
    if header.source is not None and header.destination is not None:
        session.client = Client(*header.source)
        session.local = header.destination
