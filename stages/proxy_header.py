"""Tell the upstream who the client is with a PROXY header, the first bytes of the upstream connection.

Asked once a connection, at upstream_connect, before TLS and greeting; it costs a few microseconds and waits for
nothing. The upstream must expect the header (Postfix: `smtpd_upstream_proxy_protocol`), or it will take it for
garbage. The addresses are the client's and the one it connected to, both as a PROXY header or XCLIENT towards
the gateway gave them; with `destination: local` the second is the gateway's own end of the connection. A client
without an IP address (a unix listener) is refused for now with 451: the upstream would take the gateway's own address
for the client's.

Version 2 carries the client's TLS name and state too, and on request the session's id. The header never exceeds
the 536 octets that Postfix reads; the additions are left out first.

    stages:
      - proxy_header: 2
      - proxy_header: {version: 2, session_id: true}
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from gateway import Cause, Kind, Peer, Refuse, Session, Settings, Stage
from gateway.protocol.errors import LocalError
from gateway.protocol.proxy_header import Ssl, Tlv, encode_v1, encode_v2

MAX_HEADER = 536  # what Postfix peeks at


class ProxyHeaderSettings(Settings):
    """Which version, and what goes with the addresses."""

    short_form: ClassVar[str | None] = "version"

    version: Literal[1, 2] = Field(2, description="Version of the PROXY protocol.")
    destination: Literal["received", "local"] = Field(
        "received", description="Where the client connected to: as PROXY or XCLIENT said, or the gateway's own address."
    )
    tls: bool = Field(True, description="Version 2: say which TLS name, version and cipher the client used.")
    session_id: bool = Field(False, description="Version 2: send the session's id as UNIQUE_ID.")


class ProxyHeader(Stage):
    """Send a PROXY header to the upstream."""

    Settings = ProxyHeaderSettings
    kind = Kind.PLUMBING
    identifies_client = True
    sends_proxy_header = True
    never_pass = True
    decides_identity = True
    settings: ProxyHeaderSettings

    def upstream_connect(self, session: Session, peer: Peer) -> Refuse | None:
        """Write the header."""
        client = session.client
        source = client.address, client.port
        destination = session.accepted_at if self.settings.destination == "local" else session.local
        tlvs = self._tlvs(session) if self.settings.version == 2 else []
        try:
            if self.settings.version == 1:
                header = encode_v1(source, destination)
            else:
                header = encode_v2(source, destination, tlvs)
                if len(header) > MAX_HEADER:
                    header = encode_v2(source, destination)
        except LocalError:
            return Refuse(
                Cause.UPSTREAM_MISCONFIGURED,
                temporary=True,
                log=f"{self.id}: the client has no IP address that a PROXY header could carry",
            )
        peer.identified()
        peer.write(header)
        return None

    def _tlvs(self, session: Session) -> list[tuple[int, bytes]]:
        tlvs: list[tuple[int, bytes]] = []
        if self.settings.session_id:
            tlvs.append((Tlv.UNIQUE_ID, session.id.encode()))
        tls = session.tls
        if tls is not None and self.settings.tls:
            if tls.sni:
                tlvs.append((Tlv.AUTHORITY, tls.sni.encode()))
            shown = tls.certificate is not None
            ssl = Ssl(
                tls=True,
                certificate_on_connection=shown,
                certificate_in_session=shown,
                # Without a certificate there was nothing to find wrong: receivers look at the bits above first.
                verify=1 if shown and not tls.verified else 0,
                version=tls.version,
                cipher=tls.cipher,
            )
            tlvs.append((Tlv.SSL, ssl.encode()))
        return tlvs
