"""`listen`: an address with its parameters, as nginx reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gateway.nginx import values
from gateway.nginx.conf import Directive
from gateway.nginx.values import Invalid

PROTOCOL_OF_PORT = {25: "smtp", 465: "smtp", 587: "smtp", 143: "imap", 993: "imap", 110: "pop3", 995: "pop3"}


@dataclass(frozen=True, slots=True)
class Keepalive:
    """`so_keepalive=idle:interval:count`; seconds, None where left out."""

    idle: float | None
    interval: float | None
    count: int | None


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a server listens: `host` (IPv6 without brackets) and `port` up to `last`, or the unix socket `path`."""

    directive: Directive
    host: str = ""
    port: int = 0
    last: int = 0
    path: str = ""
    ssl: bool = False
    proxy_protocol: bool = False
    backlog: int | None = None
    rcvbuf: int | None = None
    sndbuf: int | None = None
    ipv6only: bool | None = None
    keepalive: bool | Keepalive | None = None
    multipath: bool = False

    @property
    def wildcard(self) -> bool:
        """Every address of its family."""
        return self.host in ("0.0.0.0", "::")

    @property
    def addresses(self) -> list[str]:
        """Each host:port or the path, to find what is listened on twice."""
        if self.path:
            return [self.path]
        return [f"{self.written_host}:{port}" for port in range(self.port, self.last + 1)]

    @property
    def written_host(self) -> str:
        """With brackets for IPv6."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def protocol(self) -> str:
        """The protocol whose standard port this is, or ""."""
        return PROTOCOL_OF_PORT.get(self.port, "") if self.port == self.last else ""


def parse(directive: Directive) -> Listen:
    """A `listen` directive. Raises Invalid."""
    host, port, last, path = _address(directive.arguments[0])
    given: dict[str, str] = {}
    for parameter in directive.arguments[1:]:
        name, equals, value = parameter.partition("=")
        if name not in _PARAMETERS or bool(equals) != _PARAMETERS[name]:
            raise Invalid(f'the invalid "{parameter}" parameter')
        given[name] = value
    if "ipv6only" in given and not (":" in host and not path):
        given.pop("ipv6only")  # nginx has no use for it on other addresses
    return Listen(
        directive,
        host,
        port,
        last,
        path,
        ssl="ssl" in given,
        proxy_protocol="proxy_protocol" in given,
        backlog=_backlog(given.get("backlog")),
        rcvbuf=values.size(given["rcvbuf"]) if "rcvbuf" in given else None,
        sndbuf=values.size(given["sndbuf"]) if "sndbuf" in given else None,
        ipv6only=values.flag(given["ipv6only"]) if "ipv6only" in given else None,
        keepalive=_keepalive(given.get("so_keepalive")),
        multipath="multipath" in given,
    )


_PARAMETERS = {
    "ssl": False, "proxy_protocol": False, "bind": False, "multipath": False,
    "backlog": True, "rcvbuf": True, "sndbuf": True, "ipv6only": True, "so_keepalive": True,
}  # fmt: skip
"""Whether a parameter has a value."""


def _address(text: str) -> tuple[str, int, int, str]:
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/"):
            raise Invalid(f'no absolute path in "{text}"')
        return "", 0, 0, path
    if re.fullmatch(r"\d+(-\d+)?", text):
        host, ports = "0.0.0.0", text
    else:
        host, ports = values.host_port(text)
        host = "0.0.0.0" if host in ("", "*") else host
    if not ports:
        raise Invalid(f'no port in "{text}": nginx would listen on port 0')
    first, dash, last = ports.partition("-")
    try:
        start = values.port_number(first)
        end = values.port_number(last) if dash else start
    except Invalid:
        raise Invalid(f'invalid port in "{text}"') from None
    if end < start:
        raise Invalid(f'invalid port range in "{text}"')
    return host.lower(), start, end, ""


def _backlog(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"-?\d{1,9}", text) or int(text) == 0:
        raise Invalid(f'invalid backlog "{text}"')
    return int(text) if int(text) > 0 else None


def _keepalive(text: str | None) -> bool | Keepalive | None:
    if text is None:
        return None
    if text in ("on", "off"):
        return text == "on"
    parts = text.split(":")
    if len(parts) != 3 or not any(parts):
        raise Invalid(f'invalid so_keepalive value: "{text}"')
    try:
        idle, interval = (values.seconds(part) if part else None for part in parts[:2])
        return Keepalive(idle, interval, values.number(parts[2]) if parts[2] else None)
    except Invalid:
        raise Invalid(f'invalid so_keepalive value: "{text}"') from None
