"""Tell the upstream who the client is with XCLIENT, so that it judges and logs the client, not the gateway.

Asked once an upstream connection, at upstream_ready; costs one round trip, and one more for the EHLO in the
client's name. Everything goes in one command, because a second one resets what the first set; only attributes
that the upstream's EHLO lists are sent, and NAME always goes with ADDR, or Postfix would keep the gateway's own
name for the client. Names (from `reverse_dns`, which has to stand before it to have any):

- verified: NAME;
- a PTR record that does not point back: NAME=[UNAVAILABLE], REVERSE_NAME;
- no such name, or nobody asked: [UNAVAILABLE]; the look-up failed: [TEMPUNAVAIL].

An upstream that offers no XCLIENT, or refuses ours, has not authorized the gateway (Postfix:
`smtpd_authorized_xclient_hosts`): the client gets 451 4.3.5 and the log one record that names what to mend.
`if_missing: continue` goes on without where it is not offered; the relay guard then does not count the stage.
A refusal that upstream gives in place of its new greeting (421, 450, 521, 554) is its verdict on the client and
reaches the client as it is.

    stages:
      - reverse_dns
      - xclient
      - splice: postfix
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field

from gateway import Cause, Client, Kind, Peer, Refuse, Reply, Session, Settings, Stage
from gateway.protocol import xclient as codec
from gateway.protocol.errors import LocalError

# What Postfix takes as a host name; anything else would be 501 and the session lost for a client's bad DNS.
_HOST_NAME = re.compile(r"(?=.{1,255}\Z)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")
# Replies in place of the new greeting; all others judge the command, not the client (RFC 5321 3.1, RFC 7504).
_GREETING_REFUSALS = (521, 554)


class XclientSettings(Settings):
    """What is told, and what happens where it cannot be."""

    short_form: ClassVar[str | None] = "if_missing"

    if_missing: Literal["tempfail", "continue"] = Field(
        "tempfail", description="When the upstream offers no XCLIENT: 451 4.3.5, or go on without."
    )
    login: bool = Field(True, description="Send the authenticated user as LOGIN where the upstream takes it.")


class Xclient(Stage):
    """Tell the upstream who the client is with XCLIENT."""

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
        """Say XCLIENT, then EHLO in the client's name."""
        offered = frozenset(peer.extensions.get("XCLIENT", "").upper().split())
        if "ADDR" not in offered:
            if self.settings.if_missing == "continue":
                return None
            return self._misconfigured(peer, "does not offer XCLIENT to the gateway")
        try:
            line = codec.format_command(b"XCLIENT", self._attributes(session), offered)
        except LocalError as error:
            return self._misconfigured(peer, f"cannot be told of this client: {error}")
        peer.identified()
        reply = await peer.command(line, secret=bool(session.identity))  # Auth-User may be a password
        if reply.code >= 300:
            if reply.code < 500 or reply.code in _GREETING_REFUSALS:
                return _verdict(reply)
            return self._misconfigured(peer, f"refused XCLIENT: {reply.code} {reply.text}")
        reply = await peer.hello(session.helo)
        # In the client's own name this too judges the client.
        return _verdict(reply) if reply.code >= 300 else None

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
        return Refuse(
            Cause.UPSTREAM_MISCONFIGURED,
            temporary=True,
            log=f"{self.id}: {peer.url} {what}; add the gateway's address to its authorized hosts "
            "(Postfix: smtpd_authorized_xclient_hosts)",
        )


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
