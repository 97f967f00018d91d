"""`auth_http` and what stands at its other end: a server elsewhere, or a location in the same file's `http {}`.

A location that only adds Auth-* header fields and returns decides nothing: it names one upstream for everybody. It is
looked for only where nginx's choice of `server {}` and `location {}` needs no regular expressions and no variables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gateway.nginx import values
from gateway.nginx.conf import Directive
from gateway.nginx.values import Invalid

_HARMLESS = frozenset({"add_header", "return", "access_log", "error_log", "log_not_found", "default_type", "root"})
_SERVER_HARMLESS = _HARMLESS - {"return"} | {
    "listen", "server_name", "location", "index", "charset", "keepalive_timeout", "server_tokens", "log_subrequest",
}  # fmt: skip
# Codes with which add_header works without `always`.
_WITH_HEADERS = frozenset({"200", "201", "204", "206", "301", "302", "303", "304", "307", "308"})
_AUTH = frozenset({"auth-status", "auth-server", "auth-port"})


@dataclass(frozen=True, slots=True)
class Url:
    """Where the auth server is: `host` (no brackets) and `port`, or the unix socket `path`; `uri` begins with /."""

    host: str
    port: int
    path: str
    uri: str

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}:{self.uri}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}{'' if self.port == 80 else f':{self.port}'}{self.uri}"


@dataclass
class Local:
    """The `server {}` of `http {}` that answers. `location`: the one that does, if that can be told; `fields`: what
    it always answers, by lower-case name, if it only does that."""

    server: Directive
    location: Directive | None = None
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def upstream(self) -> tuple[str, int] | None:
        """Address and port if this location sends everybody there and decides nothing."""
        fields = self.fields
        if self.location is None or set(fields) - _AUTH or fields.get("auth-status", "OK") != "OK":
            return None
        host, port = fields.get("auth-server", ""), fields.get("auth-port", "")
        try:
            return (host, values.port_number(port)) if values.is_address(host) else None
        except Invalid:
            return None


def parse(text: str) -> Url:
    """The argument of `auth_http`. Raises Invalid."""
    if text[:8].lower() == "https://":
        raise Invalid(f'auth_http "{text}": nginx speaks only HTTP there; write http://, and https:// in the pipeline')
    rest = text[7:] if text[:7].lower() == "http://" else text
    if rest.startswith("unix:"):
        path, _, uri = rest.removeprefix("unix:").partition(":")
        if not path.startswith("/"):
            raise Invalid(f'no path in the unix domain socket "{text}"')
        return Url("", 0, path, uri or "/")
    authority, slash, uri = rest.partition("/")
    try:
        host, port = values.host_port(authority)
        number = values.port_number(port) if port else 80
    except Invalid:
        raise Invalid(f'invalid port in auth_http "{text}"') from None
    if "$" in host:
        raise Invalid(f'auth_http "{text}": nginx knows no variables there; write the host itself')
    if not host:
        raise Invalid(f'no host in auth_http "{text}"')
    return Url(host, number, "", slash + uri if slash else "/")


def local(url: Url, directives: tuple[Directive, ...]) -> Local | None:
    """The server of the same file's `http {}` that this URL asks, or None if none is found."""
    for http in (directive for directive in directives if directive.name == "http"):
        fitting = [server for server in http.inside("server") if _listens(server, url)]
        if fitting:
            server = _chosen(fitting, url)
            return _answer(Local(server), http, url)
    return None


def _listens(server: Directive, url: Url) -> bool:
    """Whether one of its `listen` is this URL's address; a wildcard is, if the host is this machine for certain."""
    names = {name.lower() for directive in server.inside("server_name") for name in directive.arguments}
    for directive in server.inside("listen") or [Directive("listen", ("80",), server.file, server.line)]:
        where = directive.arguments[0] if directive.arguments else ""
        if where.startswith("unix:"):
            if url.path and where == f"unix:{url.path}":
                return True
            continue
        if url.path:
            continue
        try:
            host, port = ("*", where) if where.isdigit() else values.host_port(where)
        except Invalid:
            continue
        if int(port or 80) != url.port:
            continue
        if host in ("", "*", "0.0.0.0", "::"):
            if _loopback(url.host) or url.host.lower() in names:
                return True
        elif host == url.host or (_loopback(host) and url.host == "localhost"):
            return True
    return False


def _loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _chosen(servers: list[Directive], url: Url) -> Directive:
    """By server_name, else the default server, else the first."""
    for server in servers:
        if any((url.host or "localhost") in directive.arguments for directive in server.inside("server_name")):
            return server
    for server in servers:
        if any("default_server" in directive.arguments for directive in server.inside("listen")):
            return server
    return servers[0]


def _answer(found: Local, http: Directive, url: Url) -> Local:
    """Fill in the location and its fields where they are certain."""
    locations = found.server.inside("location")
    if any(place.arguments[:1] in (("~",), ("~*",)) or not place.arguments for place in locations):
        return found
    if any(directive.name not in _SERVER_HARMLESS for directive in found.server.block or ()):
        return found
    path = url.uri.partition("?")[0]
    exact = [place for place in locations if place.arguments == ("=", path)]
    prefixes = [place for place in locations if place.arguments[0] != "=" and path.startswith(place.arguments[-1])]
    prefixes.sort(key=lambda place: len(place.arguments[-1]))
    if not exact and not prefixes:
        return found
    location = exact[0] if exact else prefixes[-1]
    if any(directive.name not in _HARMLESS for directive in location.block or ()):
        return found
    fields = _fields(location, found.server, http)
    if fields is not None:
        found.location, found.fields = location, fields
    return found


def _fields(location: Directive, server: Directive, http: Directive) -> dict[str, str] | None:
    """The Auth-* fields of the answer; None if they depend on the request or none are sent."""
    returns = location.inside("return")
    if not returns or "$" in "".join(returns[0].arguments):
        return None
    added = location.inside("add_header") or server.inside("add_header") or http.inside("add_header")
    fields: dict[str, str] = {}
    for directive in added:
        name, value, *rest = (*directive.arguments, "", "")[:3]
        if not name.lower().startswith("auth-"):
            continue
        if "$" in value or not re.fullmatch(r"[A-Za-z0-9-]+", name):
            return None
        if returns[0].arguments[0] in _WITH_HEADERS or rest == ["always"]:
            fields[name.lower()] = value
    return fields or None
