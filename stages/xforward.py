"""Tell the upstream with XFORWARD who sent each message: for its logs, not for its decisions or trace fields.

Asked before each MAIL, with which it travels in one write, so it costs no round trip and suits pools that reuse
connections. Only attributes that the upstream's EHLO lists are sent: NAME ADDR PORT PROTO HELO IDENT SOURCE.
IDENT is the transaction's id in the gateway's log.

An upstream that offers no XFORWARD is sent none; `if_missing: tempfail` refuses for now instead (451 4.3.5). One
that offers it but refuses the command has not authorized the gateway (Postfix: `smtpd_authorized_xforward_hosts`):
that is logged, and the mail goes on. XFORWARD does not make the upstream treat the client as a stranger, so the
relay guard does not count it; use `xclient` for that.

    stages:
      - xforward
      - xforward: {if_missing: tempfail}
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from gateway import Cause, Kind, Peer, Refuse, Reply, Session, Settings, Stage, Worker
from gateway.protocol import xclient as codec
from gateway.protocol.errors import LocalError


class XforwardSettings(Settings):
    """What happens where XFORWARD is not offered."""

    short_form: ClassVar[str | None] = "if_missing"

    if_missing: Literal["continue", "tempfail"] = Field(
        "continue", description="When the upstream offers no XFORWARD: go on without, or 451 4.3.5."
    )


class Xforward(Stage):
    """Tell the upstream with XFORWARD who sent each message."""

    Settings = XforwardSettings
    kind = Kind.PLUMBING
    never_pass = True
    settings: XforwardSettings

    async def start(self, worker: Worker) -> None:
        """Keep the log."""
        self._log = worker.log

    async def upstream_ready(self, session: Session, peer: Peer) -> Refuse | None:
        """Refuse where it must be offered and is not."""
        if self.settings.if_missing == "continue" or "ADDR" in _offered(peer):
            return None
        return Refuse(
            Cause.UPSTREAM_MISCONFIGURED,
            temporary=True,
            log=f"{self.id}: {peer.url} does not offer XFORWARD to the gateway; add its address to "
            "smtpd_authorized_xforward_hosts",
        )

    def upstream_mail(self, session: Session, peer: Peer) -> None:
        """Put XFORWARD in front of MAIL."""
        offered = _offered(peer)
        if not offered:
            return

        def answered(reply: Reply) -> None:
            if reply.code >= 300:
                self._log.warning("xforward_refused", session=session.id, stage=self.id, server=peer.url,
                                  reply=f"{reply.code} {reply.text}")  # fmt: skip

        for line in codec.format_xforward(_attributes(session), offered):
            peer.before_mail(line, answered)


def _offered(peer: Peer) -> frozenset[str]:
    return frozenset(peer.extensions.get("XFORWARD", "").upper().split())


def _attributes(session: Session) -> dict[str, bytes]:
    """Everything known of the client; the first command of a message presets the rest to unavailable."""
    client = session.client
    attributes = {"NAME": client.name.encode("ascii", "replace") if client.name_status == "ok" else codec.UNAVAILABLE}
    try:
        attributes["ADDR"] = codec.address_value(client.address)
    except LocalError:  # a unix socket
        attributes["ADDR"] = codec.UNAVAILABLE
    attributes["SOURCE"] = b"LOCAL" if attributes["ADDR"] == codec.UNAVAILABLE else b"REMOTE"
    if client.port:
        attributes["PORT"] = b"%d" % client.port
    attributes["PROTO"] = b"ESMTP" if session.esmtp else b"SMTP"
    if session.helo:
        attributes["HELO"] = session.helo.encode("utf-8", "surrogateescape")
    if session.transaction is not None:
        attributes["IDENT"] = session.transaction.id.encode()
    return attributes
