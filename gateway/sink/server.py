"""aiosmtpd's server, taught XCLIENT and a Maildir.

After an accepted XCLIENT it starts over at the greeting, as Postfix does: the client says EHLO again, and HELO,
PROTO and LOGIN last only if they were in that command. Messages are stored as they came, line ends included.
"""

from __future__ import annotations

import asyncio
import collections
import email.utils
import re
import secrets
import sys
from collections.abc import Callable
from typing import ClassVar, Final

from aiosmtpd.smtp import SMTP, Envelope, Session, syntax

from gateway.protocol import xclient
from gateway.protocol.errors import PeerError
from gateway.sink.maildir import Maildir

SIZE: Final = 64 << 20
"""Octets of a message: more than the gateway's default limit, so that the gateway is the one to refuse."""

LINE: Final = 64 << 10
COMMAND: Final = 4096

_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")
_FIELDS: Final = {
    "X-Client-Addr": "ADDR",
    "X-Client-Port": "PORT",
    "X-Client-Name": "NAME",
    "X-Client-Reverse-Name": "REVERSE_NAME",
    "X-Client-Helo": "HELO",
    "X-Client-Proto": "PROTO",
    "X-Client-Login": "LOGIN",
    "X-Client-Dest-Addr": "DESTADDR",
    "X-Client-Dest-Port": "DESTPORT",
}


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class XclientServer(SMTP):
    """One connection. `client` holds what XCLIENT said; None stands for [UNAVAILABLE]."""

    line_length_limit = LINE
    command_size_limit = COMMAND
    command_size_limits: ClassVar[dict[str, int]] = collections.defaultdict(lambda: COMMAND)  # type: ignore[misc]

    def __init__(self, handler: Deliver, hostname: str) -> None:
        self.client: dict[str, bytes | None] = {}
        super().__init__(
            handler,
            hostname=hostname,
            ident="ESMTP",
            data_size_limit=SIZE,
            enable_SMTPUTF8=True,
            loop=asyncio.get_running_loop(),
        )

    @syntax("XCLIENT attribute=value...")
    async def smtp_XCLIENT(self, arg: str | None) -> None:
        """Take over the client's identity and start over."""
        assert self.session is not None and self.envelope is not None
        if self.envelope.mail_from is not None:
            await self.push("503 5.5.1 Error: MAIL transaction in progress")
            return
        try:
            attributes = xclient.parse(_raw(arg or ""))
        except PeerError as error:
            await self.push(error.reply or b"501 5.5.4 Bad XCLIENT")
            return
        for name in ("HELO", "PROTO", "LOGIN"):
            self.client.pop(name, None)
        self.client.update(attributes)
        self._set_rset_state()  # type: ignore[no-untyped-call]
        self.session.host_name = None
        self.session.extended_smtp = False
        await self.push(f"220 {self.hostname} ESMTP")


class Deliver:
    """The handler behind all connections: stores each message."""

    def __init__(self, maildir: Maildir) -> None:
        self._maildir = maildir

    async def handle_EHLO(
        self, server: XclientServer, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        """Announce XCLIENT and PIPELINING besides what aiosmtpd offers."""
        session.host_name = hostname
        return [*responses[:-1], f"250-XCLIENT {' '.join(xclient.ATTRIBUTES)}", "250-PIPELINING", responses[-1]]

    async def handle_DATA(self, server: XclientServer, session: Session, envelope: Envelope) -> str:
        """Store the message; the 250 follows when it is on disk."""
        queue_id = secrets.token_hex(6).upper()
        content = envelope.original_content or b""
        try:
            await asyncio.to_thread(self._maildir.store, head(server, session, envelope, queue_id), content)
        except OSError as error:
            print(f"gateway.sink: {self._maildir.path}: {error}", file=sys.stderr, flush=True)
            return "452 4.3.1 Error: the message could not be stored"
        return f"250 2.0.0 Ok: queued as {queue_id}"

    async def handle_exception(self, error: Exception) -> str:
        """aiosmtpd asks what to reply to an unforeseen error."""
        print(f"gateway.sink: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return "451 4.3.0 Error: local error"


def head(server: XclientServer, session: Session, envelope: Envelope, queue_id: str) -> bytes:
    """The header fields that are put in front of a message: envelope, client, trace."""
    client = dict(server.client)
    client.setdefault("HELO", _raw(session.host_name or ""))
    client.setdefault("PROTO", b"ESMTP" if session.extended_smtp else b"SMTP")
    if isinstance(session.peer, tuple):
        client.setdefault("ADDR", session.peer[0].encode())
    sender = (envelope.mail_from or "").strip("<>")
    fields: list[tuple[str, bytes]] = [("Return-Path", b"<" + _raw(sender) + b">")]
    fields += [("Delivered-To", _raw(recipient)) for recipient in envelope.rcpt_tos]
    for field, attribute in _FIELDS.items():
        if attribute in client:
            value = client[attribute]
            fields.append((field, xclient.UNAVAILABLE if value is None else value))
    helo, name, address = (client.get(attribute) or b"unknown" for attribute in ("HELO", "NAME", "ADDR"))
    trace = b"from %b (%b [%b])\r\n\tby %b with %b id %b;\r\n\t%b" % (
        _clean(helo), _clean(name), _clean(address), _raw(server.hostname), client["PROTO"] or b"SMTP",
        queue_id.encode(), email.utils.formatdate(localtime=True).encode(),
    )  # fmt: skip
    lines = [b"%b: %b" % (field.encode(), _clean(value)) for field, value in fields]
    return b"\r\n".join([*lines, b"Received: " + trace, b""])


def _clean(value: bytes) -> bytes:
    return _CONTROL.sub(b"?", value)


def server_factory(maildir: Maildir, hostname: str) -> Callable[[], XclientServer]:
    """The protocol factory for `loop.create_server` and `loop.create_unix_server`."""
    handler = Deliver(maildir)
    return lambda: XclientServer(handler, hostname)
