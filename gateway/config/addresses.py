"""Addresses in pipeline files: where a listener listens, where a server is, a name server.

A form that this version does not serve yet says so by name, so that nobody looks for a spelling error.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from gateway.values import KIND, NotA, json_schema, plain_schema, shown

SCHEMES = ("smtp", "smtps", "lmtp", "imap", "imaps", "pop3", "pop3s")
IMPLICIT_TLS = ("smtps", "imaps", "pop3s")
LATER_SCHEMES = ("milter", "auth-http", "policy", "tcp-table", "socketmap", "sasl")
DEFAULT_PORTS = {"smtp": 25, "smtps": 465, "lmtp": 24, "imap": 143, "imaps": 993, "pop3": 110, "pop3s": 995}
_BY_PORT = {str(port): scheme for scheme, port in DEFAULT_PORTS.items()}

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,254}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
_HOST_PORT = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]/@]*))(?::(\d{1,5}))?")
_RANGE = re.compile(r"(.*:)(\d{1,5})-(\d{1,5})/?", re.DOTALL)
_PATTERN = r"(smtps?|lmtp|imaps?|pop3s?)(://\S+|\+unix:/\S+)|unix:/\S+"
_LIKE_UNIX = re.compile(r"([a-z0-9]+):(?://)?unix:(/.*)", re.DOTALL)
_LIKE_INET = re.compile(r"([a-z0-9]+):(?:inet:)?([^/].*:\d+)", re.DOTALL)


def _protocol(scheme: str) -> str:
    """smtp, lmtp, imap or pop3: what is spoken there, whatever it is wrapped in."""
    if scheme in IMPLICIT_TLS:
        return scheme.removesuffix("s")
    return scheme if scheme in SCHEMES else "smtp"  # the embedded server


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Resolver:
    """The address and port of a name server; IPv6 without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return _joined(self.host, self.port)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return plain_schema(parse_resolver)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return json_schema(r"\S+", "A name server: 127.0.0.1:53, [::1]:53; the port is 53 unless written.")


@dataclass(frozen=True, slots=True)
class ListenUrl:
    """Where a listener listens: `host` and `port` (an empty host is every address), or the unix socket `path`.

    Of a range of ports `port` is the first one and `last_port` the last one, else 0; `urls` takes it apart.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    last_port: int = 0

    @property
    def protocol(self) -> str:
        """smtp, lmtp, imap or pop3: what is spoken there, whatever it is wrapped in."""
        return _protocol(self.scheme)

    @property
    def implicit_tls(self) -> bool:
        """TLS begins with the connection, before the greeting."""
        return self.scheme in IMPLICIT_TLS

    @property
    def address(self) -> str:
        """host:port, host:first-last or the socket's path, without the scheme."""
        last = f"-{self.last_port}" if self.last_port else ""
        return self.path or _joined(self.host, self.port) + last

    @property
    def fixed(self) -> bool:
        """The address is known before it is bound; port 0 is a free one that the system picks."""
        return bool(self.path or self.port)

    def urls(self) -> list[ListenUrl]:
        """One for each port of a range; of any other address just this one."""
        if not self.last_port:
            return [self]
        return [replace(self, port=port, last_port=0) for port in range(self.port, self.last_port + 1)]

    def __str__(self) -> str:
        return f"{self.scheme}+unix:{self.path}" if self.path else f"{self.scheme}://{self.address}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return plain_schema(parse_listen_url)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        where = "Where to listen: smtp://127.0.0.1:25, imaps://[::1]:993, pop3://*:110, lmtp+unix:/path, imap://*:2000-2003."
        return json_schema(_PATTERN, where, kind="URL")


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """An upstream server: `host` and `port`, or the unix socket `path`; of the embedded server, its folder `path`.

    The embedded server's folder is relative to the working directory: it is output, not part of the configuration.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def protocol(self) -> str:
        """smtp, lmtp, imap or pop3: what is spoken there, whatever it is wrapped in."""
        return _protocol(self.scheme)

    @property
    def implicit_tls(self) -> bool:
        """TLS begins with the connection, before the greeting."""
        return self.scheme in IMPLICIT_TLS

    @property
    def embedded(self) -> bool:
        """The gateway starts this server itself."""
        return self.scheme == "embedded"

    @property
    def local(self) -> bool:
        """Nothing leaves this machine: a unix socket, a loopback address, the embedded server."""
        if self.path or self.host == "localhost":
            return True
        return _is_address(self.host) and ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        if self.embedded:
            return f"embedded://{self.path}"
        return f"{self.scheme}+unix:{self.path}" if self.path else f"{self.scheme}://{_joined(self.host, self.port)}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return plain_schema(parse_server_url)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return json_schema(
            rf"{_PATTERN}|embedded://\S+|[\w.-]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?",
            "A server: smtp://mail.example.org:25, host:port, imap://host, lmtp+unix:/path, embedded://folder.",
        )


@dataclass(frozen=True, slots=True)
class _Form:
    """How one kind of address is written: what it is called, its examples, its default ports."""

    kind: str
    example: str
    server: bool

    def refuse(self, value: object, text: str, suggestion: str | None = None) -> NotA:
        return NotA(self.kind, self.example, f"{shown(value)} {text}", suggestion)


_LISTEN = _Form("a listen address", "smtp://127.0.0.1:25, smtps://[::1]:465 or smtp+unix:/path", False)
_SERVER = _Form("a server", "smtp://mail.example.org:25, smtp+unix:/path or embedded://folder", True)


def _parse_address(value: object, form: _Form) -> tuple[str, str, int, str]:
    """Scheme, host, port, path of a listener's or a server's address."""
    if not isinstance(value, str) or not value:
        raise form.refuse(value, f"is not {form.kind}")
    unix = re.fullmatch(r"(?:([a-z0-9-]+)\+)?unix:(.*)", value, re.DOTALL)
    if unix is not None:
        scheme = _check_scheme(unix[1] or "smtp", value, form)
        return scheme, "", 0, _unix_path(scheme, unix[2], value, form)
    _check_spelling(value, form)
    scheme, separator, rest = value.partition("://")
    if not separator:
        if not form.server:
            begun = re.fullmatch(r"([a-z0-9]+):/?([^/].*)", value)
            if begun is not None and begun[1] in SCHEMES:
                raise form.refuse(value, f"is not how {form.kind} is written", f"write {begun[1]}://{begun[2]}")
            scheme = _BY_PORT.get(value.rpartition(":")[2], "smtp")
            raise form.refuse(value, "has no scheme", f"write {scheme}://{value}")
        scheme, rest = "smtp", value
    elif form.server and scheme == "embedded":
        if not rest:
            raise form.refuse(value, "names no folder", "write embedded://var/mail")
        return scheme, "", 0, rest
    scheme = _check_scheme(scheme, value, form)
    host, port = _host_port(rest, value, form)
    if port is None:
        if not form.server:
            raise form.refuse(value, "has no port", f"write {scheme}://{rest.rstrip('/:')}:{DEFAULT_PORTS[scheme]}")
        port = DEFAULT_PORTS[scheme]
    return scheme, host, port, ""


def _check_spelling(value: str, form: _Form) -> None:
    """Other programs' ways to write an address: lmtp:unix:/path, lmtp:inet:host:24, smtp://unix:/path."""
    if "@" in value and not value.startswith("embedded://"):  # perhaps with a password: not quoted
        raise NotA(form.kind, form.example, f"{form.kind} holds no user", "write host and port only")
    for like, join in ((_LIKE_UNIX, "+unix:"), (_LIKE_INET, "://")):
        match = like.fullmatch(value)
        if match is not None and match[1] in SCHEMES:
            raise form.refuse(value, f"is not how {form.kind} is written", f"write {match[1]}{join}{match[2]}")


def _check_scheme(scheme: str, value: str, form: _Form) -> str:
    if scheme in SCHEMES:
        return scheme
    named = ", ".join(SCHEMES) + " or embedded" if form.server else " or ".join((", ".join(SCHEMES[:-1]), SCHEMES[-1]))
    if scheme in LATER_SCHEMES:
        raise NotA(form.kind, form.example, f"scheme {scheme!r} is not available in this version", f"write {named}")
    if scheme == "lmtps":
        raise NotA(form.kind, form.example, "LMTP has no TLS from the start", "write lmtp")
    raise NotA(form.kind, form.example, f"{shown(value)} has the unknown scheme {scheme!r}", f"write {named}")


def _unix_path(scheme: str, path: str, value: str, form: _Form) -> str:
    path = "/" + path.lstrip("/") if path.startswith("//") else path
    if not path.startswith("/"):
        raise form.refuse(value, "has no absolute path", f"write {scheme}+unix:/path")
    if len(os.fsencode(path)) > 107:
        raise form.refuse(value, "is longer than the 107 octets of a unix socket's path", "write a shorter path")
    return path


def _host_port(rest: str, value: str, form: _Form) -> tuple[str, int | None]:
    match = _HOST_PORT.fullmatch(rest.removesuffix("/"))
    if match is None:
        if rest.count(":") > 1 and "[" not in rest:
            raise form.refuse(value, "is not clear about its port", "write IPv6 addresses in brackets: [::1]:25")
        raise form.refuse(value, f"is not {form.kind}")
    six, name, digits = match.groups()
    if six is not None:
        try:
            ipaddress.IPv6Address(six)
        except ValueError:
            raise form.refuse(value, "has no IPv6 address in its brackets") from None
    elif name == "*" and not form.server:
        name = ""
    elif name and not _NAME.fullmatch(name):
        raise form.refuse(value, "has no valid host name")
    elif name and re.fullmatch(r"[\d.]+", name):
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            raise form.refuse(value, "has no valid IPv4 address") from None
    elif not name and form.server:
        raise form.refuse(value, "names no host")
    if digits is not None and not (1 if form.server else 0) <= int(digits) <= 65535:
        raise form.refuse(value, "has a port that does not exist", "write a port from 1 to 65535")
    return six if six is not None else name, None if digits is None else int(digits)


def _without_range(value: object) -> tuple[object, int]:
    """`scheme://host:first-last` as scheme://host:first, and the last port; 0 where there is no range."""
    match = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if match is None or "unix:" in match[1] or "@" in match[1]:
        return value, 0
    first, last = int(match[2]), int(match[3])
    if not 1 <= first <= last <= 65535:
        raise _LISTEN.refuse(value, "is not a range of ports", f"write the first and the last: {match[1]}2000-2003")
    return match[1] + match[2], last


def parse_listen_url(value: object) -> ListenUrl:
    """smtp://host:port, imaps://[v6]:port, pop3://host:first-last, lmtp+unix:/path. Raises NotA.

    `*` or no host is every address.
    """
    if isinstance(value, ListenUrl):
        return value
    one, last = _without_range(value)
    url = replace(ListenUrl(*_parse_address(one, _LISTEN)), last_port=last)
    if url.scheme == "lmtp" and url.port <= 25 <= max(url.port, last):
        raise _LISTEN.refuse(value, "is SMTP's port, where LMTP must not be spoken (RFC 2033 5)", "write port 24")
    return url


def parse_server_url(value: object) -> ServerUrl:
    """smtp://host, imaps://host:port, host:port, lmtp://host, pop3+unix:/path, embedded://folder. Raises NotA."""
    return value if isinstance(value, ServerUrl) else ServerUrl(*_parse_address(value, _SERVER))


def parse_resolver(value: object) -> Resolver:
    """The address of a name server, with port 53 unless written. Raises NotA."""
    kind, example = "a name server", "127.0.0.1:53, [::1]:53 or an address"
    if isinstance(value, Resolver):
        return value
    text = value if isinstance(value, str) else ""
    match = _HOST_PORT.fullmatch(text)
    host, port = (match[1] or match[2], int(match[3] or 53)) if match is not None else (text, 53)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise NotA(kind, example, f"{shown(value)} is not {kind}") from None
    if not 1 <= port <= 65535:
        raise NotA(kind, example, f"{shown(value)} has a port that does not exist", "write a port from 1 to 65535")
    return Resolver(str(address), port)


_HOSTNAME_KIND, _HOSTNAME_EXAMPLE = "a host name", "a full name such as mail.example.org"


def parse_hostname(value: object) -> str:
    """A host name as SMTP says it: a domain name or an address in brackets (RFC 5321 4.1.2, 4.1.3). Raises NotA."""
    if isinstance(value, str):
        literal = re.fullmatch(r"\[(?:IPv6:)?([0-9A-Fa-f.:]+)\]", value)
        if _NAME.fullmatch(value) or (literal is not None and _is_address(literal[1])):
            return value
    raise NotA(_HOSTNAME_KIND, _HOSTNAME_EXAMPLE, f"{shown(value)} is not {_HOSTNAME_KIND}")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


Hostname = Annotated[
    str,
    PlainValidator(parse_hostname),
    WithJsonSchema({"type": "string", "description": "A host name: mail.example.org, [192.0.2.1].", KIND: "host name"}),
]
