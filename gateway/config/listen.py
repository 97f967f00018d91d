"""Listeners in pipeline files: an address, what is spoken there, and the options of its socket."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gateway.config.addresses import ListenUrl
from gateway.config.base import Findings, Model
from gateway.config.log_settings import LogSinks
from gateway.config.tls_settings import Tls
from gateway.values import Duration, NotA, Size, shown


class Keepalive(Model):
    """Probes of silent connections (tcp(7)): a client that vanished is noticed. What is not set is the system's."""

    idle: Duration | None = Field(None, ge=1, le=32767, description="Silence before the first probe; whole seconds.")
    interval: Duration | None = Field(None, ge=1, le=32767, description="Between two probes; whole seconds.")
    count: int | None = Field(None, ge=1, le=127, description="Probes without an answer until the connection ends.")


def _keepalive(value: object) -> object:
    if value in (False, "off"):
        return None
    if isinstance(value, (str, int)) and value not in (True, "on"):
        kind, example = "a keepalive", "on, off or {idle: 60s, interval: 10s, count: 5}"
        raise NotA(kind, example, f"{shown(value)} is not {kind}")
    return {} if value in (True, "on") else value


class Listener(Model):
    """An address to listen on. Its `tls` replaces the pipeline's."""

    url: ListenUrl = Field(
        description="scheme://host:port, scheme://host:first-last or scheme+unix:/path; the scheme is smtp, lmtp, imap "
        "or pop3, or for implicit TLS smtps, imaps or pop3s. `*` is every address; of a host name all addresses."
    )
    name: str | None = Field(None, min_length=1, description="For logs and `listener.name`; the URL by default.")
    proxy_protocol: Literal["required", "off"] = Field("off", description="PROXY header before anything else.")
    capabilities: tuple[str, ...] | None = Field(None, description="Announce exactly these, not what is computed.")
    tls: Tls | None = Field(None, description="Replaces the pipeline's.")
    log: LogSinks | None = Field(None, description="For its sessions, instead of the pipeline's.")
    starttls: bool = Field(True, description="Offer STARTTLS (POP3: STLS) where there is a certificate.")
    backlog: int = Field(511, ge=1, le=65535, description="Connections that may wait to be accepted.")
    ipv6only: bool = Field(True, description="[::] takes no IPv4 clients. `*` always takes both.")
    keepalive: Annotated[Keepalive | None, BeforeValidator(_keepalive)] = Field(
        Keepalive(), description="Probe silent connections: on, off, or `{idle, interval, count}`."
    )
    rcvbuf: Size | None = Field(None, ge=1, description="Octets of the receive buffer (SO_RCVBUF); the system's.")
    sndbuf: Size | None = Field(None, ge=1, description="Octets of the send buffer (SO_SNDBUF); the system's.")
    multipath: bool = Field(False, description="Multipath TCP for clients that speak it (RFC 8684).")

    def tls_possible(self, tls: Tls) -> bool:
        """Whether clients can encrypt here; `tls` is the pipeline's."""
        return bool((self.tls or tls).certificates) and (self.url.implicit_tls or self.starttls)

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        """An option that could change nothing is a mistake."""
        findings, written = Findings(), self.model_fields_set
        if self.url.path:
            for name in sorted(written & {"ipv6only", "keepalive", "multipath"}):
                findings.add((name,), None, "a unix socket has no such option", f"remove {name}")
        elif "ipv6only" in written and not self.url.host and self.ipv6only:
            findings.add(("ipv6only",), None, "`*` is every address, of IPv4 too", "write [::] instead of *")
        elif "ipv6only" in written and _is_ipv4(self.url.host):
            findings.add(("ipv6only",), None, f"{self.url.host} is an IPv4 address", "remove ipv6only")
        findings.report(self)
        return self


def _is_ipv4(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 4
    except ValueError:
        return False
