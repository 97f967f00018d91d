"""Tell the upstream who the client is, so that it judges and logs the client, not the gateway: XCLIENT, or IMAP's ID.

Asked once an upstream connection, at upstream_ready; costs one round trip, and with SMTP one more for the EHLO (or
HELO) in the client's name.

SMTP: everything goes in one command, because a second one resets what the first set; only attributes that the
upstream's EHLO lists are sent, and NAME always goes with ADDR, or Postfix would keep the gateway's own name for the
client. Names (from `reverse_dns`, which has to stand before it to have any):

- verified: NAME;
- a PTR record that does not point back: NAME=[UNAVAILABLE], REVERSE_NAME;
- no such name, or nobody asked: [UNAVAILABLE]; the look-up failed: [TEMPUNAVAIL].

IMAP and POP3, as Dovecot has them: ID with `x-originating-ip` and the like, together with what the client's own ID said
(but for its `x-` names, which would forge an identity); XCLIENT where the greeting has `[XCLIENT]`. IMAP servers answer
ID with OK whether they believe it or not: only their log tells whether `login_trusted_networks` has the gateway.

An upstream that does not offer it, or refuses or ignores ours, has not authorized the gateway (Postfix:
`smtpd_authorized_xclient_hosts`, Dovecot: `login_trusted_networks`): the client gets 451 4.3.5 and the log one record
that names what to mend. `if_missing: continue` goes on without where it is not offered; the relay guard then does not
count the stage. `send` says it without being offered, and no EHLO for a client that said none. A refusal that upstream
gives in place of its new greeting (421, 450, 521, 554) is its verdict on the client and reaches the client as it is.

    stages:
      - reverse_dns
      - xclient
      - splice: postfix
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from gateway import Cause, Client, Kind, Peer, Refuse, Reply, Session, Settings, Stage
from gateway.protocol import imap, pop3
from gateway.protocol import xclient as codec
from gateway.protocol.errors import LocalError

# What Postfix takes as a host name; anything else would be 501 and the session lost for a client's bad DNS.
_HOST_NAME = re.compile(r"(?=.{1,255}\Z)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")
# Replies in place of the new greeting; all others judge the command, not the client (RFC 5321 3.1, RFC 7504).
_GREETING_REFUSALS = (521, 554)
STORES = ("imap", "pop3")
MAX_PAIRS = 30  # of ID (RFC 2971 section 3.3)


_NOT_TRUSTED = b"not from trusted"  # Dovecot's POP3: +OK to whom it does not believe

Attribute = Literal["NAME", "REVERSE_NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT"]
# What is sent where nothing is announced: any server that knows XCLIENT takes these.
_UNANNOUNCED: tuple[Attribute, ...] = ("ADDR", "LOGIN", "NAME")


class XclientSettings(Settings):
    """What is told, and what happens where it cannot be."""

    short_form: ClassVar[str | None] = "if_missing"

    if_missing: Literal["tempfail", "continue", "send"] = Field(
        "tempfail", description="When the upstream does not offer it: 451 4.3.5, go on without, or say it all the same."
    )
    attributes: tuple[Attribute, ...] | None = Field(
        None, min_length=1, description="SMTP: only these, in this order. By default all that the upstream takes; "
        "`send` where nothing is offered: ADDR, LOGIN, NAME.",
    )  # fmt: skip
    login: bool = Field(True, description="SMTP: send the authenticated user as LOGIN where the upstream takes it.")

    @field_validator("attributes")
    @classmethod
    def _whole(cls, value: tuple[Attribute, ...] | None) -> tuple[Attribute, ...] | None:
        if value is not None and (len(set(value)) < len(value) or not {"ADDR", "NAME"} <= set(value)):
            raise ValueError("ADDR and NAME always go together, each attribute once")
        return value


class Xclient(Stage):
    """Tell the upstream who the client is with XCLIENT, or IMAP's ID."""

    Settings = XclientSettings
    kind = Kind.PLUMBING
    timeout = 30.0  # two round trips, and the server may look the client's name up in between
    never_pass = True
    identifies_client = True
    decides_identity = True
    settings: XclientSettings

    def __init__(self, settings: XclientSettings) -> None:
        super().__init__(settings)
        if settings.if_missing == "continue":
            self.identifies_client = False

    async def upstream_ready(self, session: Session, peer: Peer) -> Refuse | None:
        """Say who the client is; with SMTP then EHLO in the client's name."""
        offered = _offered(peer)
        if not offered:
            if self.settings.if_missing == "continue":
                return None
            if self.settings.if_missing == "tempfail":
                what = "ID" if peer.protocol == "imap" else "XCLIENT"
                return self._misconfigured(peer, f"does not offer {what} to the gateway")
        try:
            line = self._line(session, peer, offered)
        except LocalError as error:
            return self._misconfigured(peer, f"cannot be told of this client: {error}")
        peer.identified()
        reply = await peer.command(line, secret=bool(session.identity))  # Auth-User may be a password
        if reply.code >= 300:
            if peer.protocol in STORES:
                if reply.code == 421:
                    return _verdict(reply)
            elif reply.code < 500 or reply.code in _GREETING_REFUSALS:
                return _verdict(reply)
            what = f"refused {line.split()[0].decode()}: {reply.code} {reply.text}"
            return replace(self._misconfigured(peer, what), reply=reply)
        if peer.protocol in STORES:
            if self.settings.if_missing == "tempfail" and _NOT_TRUSTED in reply.lines[0].lower():
                return self._misconfigured(peer, f"does not believe the gateway: {reply.text}")
            return None
        if self.settings.if_missing == "send" and not session.helo:
            return None
        # Whoever was told PROTO says EHLO for a HELO client, too: its extensions are needed.
        as_client = self.settings.if_missing == "send" and not session.esmtp
        reply = await peer.hello(session.helo, esmtp=not as_client)
        # In the client's own name this too judges the client.
        return _verdict(reply) if reply.code >= 300 else None

    def _line(self, session: Session, peer: Peer, offered: frozenset[str]) -> bytes:
        """The whole command. Raises LocalError for a client of whom it cannot tell."""
        if peer.protocol == "imap":
            return _id(session)
        if peer.protocol == "pop3":
            return pop3.xclient_command(_pop3_attributes(session))
        attributes, chosen = self._attributes(session), self.settings.attributes
        if not offered:
            chosen = chosen or _UNANNOUNCED
        if chosen is None:
            return codec.format_command(b"XCLIENT", attributes, offered)
        attributes = {name: attributes[name] for name in chosen if name in attributes}
        return codec.format_command(
            b"XCLIENT", attributes, frozenset(attributes) if self.settings.if_missing == "send" else offered
        )

    def _attributes(self, session: Session) -> dict[str, bytes]:
        """Everything known of the client, in the order in which it is sent."""
        client = session.client
        attributes = {"ADDR": _address(client.address), **_names(client)}
        if client.port:
            attributes["PORT"] = b"%d" % client.port
        if session.helo:
            attributes["PROTO"] = b"ESMTP" if session.esmtp else b"SMTP"
            attributes["HELO"] = session.helo.encode("utf-8", "surrogateescape")
        if self.settings.login and session.login:
            attributes["LOGIN"] = session.login.encode("utf-8", "surrogateescape")
        destination = _address(session.local[0])
        if destination != codec.UNAVAILABLE:
            attributes["DESTADDR"] = destination
            attributes["DESTPORT"] = b"%d" % session.local[1]
        return attributes

    def _misconfigured(self, peer: Peer, what: str) -> Refuse:
        where = "its authorized hosts (Postfix: smtpd_authorized_xclient_hosts)"
        if peer.protocol in STORES:
            where = "the networks that it trusts (Dovecot: login_trusted_networks)"
        log = f"{self.id}: {peer.url} {what}; add the gateway's address to {where}"
        return Refuse(Cause.UPSTREAM_MISCONFIGURED, temporary=True, log=log)


def _offered(peer: Peer) -> frozenset[str]:
    """The attributes that the upstream takes; of a store whether it takes any. Empty: it does not offer it."""
    if peer.protocol == "imap":
        return frozenset(("ID",)) if "ID" in peer.extensions else frozenset()
    if peer.protocol == "pop3":
        marked = peer.greeting is not None and b"[XCLIENT]" in peer.greeting.lines[0].upper()
        return frozenset(("XCLIENT",)) if marked else frozenset()
    offered = frozenset(peer.extensions.get("XCLIENT", "").upper().split())
    return offered if "ADDR" in offered else frozenset()


def _id(session: Session) -> bytes:
    """ID without its tag; of the client's own what can be said beside ours."""
    address, transport = _plain_address(session.client.address), "TLS" if session.tls is not None else "insecure"
    values: dict[str, str | None] = {"x-originating-ip": address, "x-originating-port": str(session.client.port)}
    try:
        values |= {"x-connected-ip": _plain_address(session.local[0]), "x-connected-port": str(session.local[1])}
    except LocalError:
        pass  # a unix socket has neither
    values |= {"x-session-id": session.id, "x-client-transport": transport}
    for name, value in (session.client_id or {}).items():
        if name.lower().startswith("x-") or len(values) >= MAX_PAIRS:
            continue
        try:
            imap.id_command(b"x", {name: value})
        except LocalError:
            continue
        values[name] = value
    return imap.id_command(b"x", values)[2:-2]


def _pop3_attributes(session: Session) -> dict[str, str]:
    attributes = {"ADDR": _plain_address(session.client.address), "PORT": str(session.client.port)}
    try:
        attributes |= {"DESTADDR": _plain_address(session.local[0]), "DESTPORT": str(session.local[1])}
    except LocalError:
        pass  # a unix socket has neither
    transport = "TLS" if session.tls is not None else "insecure"
    return {**attributes, "SESSION": session.id, "CLIENT-TRANSPORT": transport}


def _plain_address(ip: str) -> str:
    """As stores want it: no prefix, no zone. Raises LocalError for a client on a unix socket, who has none."""
    return codec.address_value(ip).removeprefix(b"IPV6:").decode("ascii")


def _verdict(reply: Reply) -> Refuse:
    """The upstream's own words about the client; after 421 it is gone (RFC 5321 3.8)."""
    return Refuse(Cause.POLICY, temporary=reply.code < 500, reply=reply, disconnect=reply.code == 421)


def _address(ip: str) -> bytes:
    try:
        return codec.address_value(ip)
    except LocalError:
        return codec.UNAVAILABLE  # a client on a unix socket has none


def _names(client: Client) -> dict[str, bytes]:
    if client.name_status == "ok" and _HOST_NAME.fullmatch(client.name):
        name = client.name.encode()
        return {"NAME": name, "REVERSE_NAME": name}
    # Both are always said: what is left out keeps the gateway's own value at Postfix.
    unknown = codec.TEMPUNAVAIL if client.name_status == "tempunavail" else codec.UNAVAILABLE
    reverse = client.reverse_name.encode() if _HOST_NAME.fullmatch(client.reverse_name) else unknown
    return {"NAME": unknown, "REVERSE_NAME": reverse}
