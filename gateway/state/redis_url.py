"""Where Redis is: the URL of the setting taken apart, and connections made from it.

    redis://[user:password@]host[:port][/db]          one server; rediss:// with TLS
    unix://[user:password@]/path[?db=n]               one server of this host
    redis+sentinel://host[:port],.../service[/db]     the master that the sentinels know; rediss+sentinel:// with TLS
    redis+cluster://host[:port],...                   a cluster, by some of its nodes; rediss+cluster:// with TLS

The parameter `db` may stand behind any of them, `sentinel_user` and `sentinel_password` are for sentinels that ask
for one (user and password before the hosts are for the Redis servers).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection

Kind = Literal["one", "sentinel", "cluster"]
Address = tuple[str, int]

_KINDS: Final[dict[str, tuple[Kind, bool]]] = {
    "redis": ("one", False),
    "rediss": ("one", True),
    "unix": ("one", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_PORTS: Final[dict[Kind, int]] = {"one": 6379, "sentinel": 26379, "cluster": 6379}
_PARAMETERS: Final = frozenset({"db", "sentinel_user", "sentinel_password"})


@dataclass(frozen=True)
class Place:
    """Servers and what they ask for. `path` is a socket's, "" for TCP; `service` the sentinels' name of the master."""

    kind: Kind
    addresses: tuple[Address, ...]
    path: str = ""
    service: str = ""
    db: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    sentinel_user: str = ""
    sentinel_password: str = field(default="", repr=False)
    tls: bool = False
    ca_file: Path | None = None
    verify: bool = True

    @property
    def name(self) -> str:
        """What error texts call it; holds no password."""
        if self.path:
            return f"redis at {self.path}"
        if self.kind == "sentinel":
            return f"redis service {self.service}"
        return f"redis at {shown(self.addresses[0])}"

    def connection(self, address: Address = ("", 0)) -> AbstractConnection:
        """A connection to the Redis server at `address` (of no matter for a socket), not yet opened."""
        if self.path:
            return UnixDomainSocketConnection(path=self.path, **self._settings(self.user, self.password, self.db))
        return self._tcp(address, self._settings(self.user, self.password, self.db))

    def sentinel(self, address: Address) -> AbstractConnection:
        """A connection to the sentinel at `address`, not yet opened."""
        return self._tcp(address, self._settings(self.sentinel_user, self.sentinel_password, 0))

    def _settings(self, user: str, password: str, db: int) -> dict[str, Any]:
        """Of redis-py, for any connection: the time-outs are ours, and nothing comes unasked in this protocol."""
        login = {"username": user or None, "password": password or None, "db": db}
        return {**login, "protocol": 2, "socket_timeout": None, "socket_connect_timeout": None}

    def _tcp(self, address: Address, settings: dict[str, Any]) -> AbstractConnection:
        host, port = address
        if not self.tls:
            return Connection(host=host, port=port, **settings)
        connection = SSLConnection(host=host, port=port, **settings)
        connection.ssl_context.context = _tls(self.ca_file, self.verify)
        return connection


@lru_cache(maxsize=8)
def _tls(ca_file: Path | None, verify: bool) -> ssl.SSLContext:
    """What a server's certificate must be; redis-py's own would believe the system's authorities beside `ca_file`."""
    context = ssl.create_default_context(cafile=ca_file)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def shown(address: Address) -> str:
    """`host:port`, the host in brackets if it has colons."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_url(url: str, *, password: str = "", ca_file: Path | None = None, verify: bool = True) -> Place:
    """The place that `url` names; `password` is used if the URL has none.

    Raises ValueError, with a text that never shows the URL, if it is none of the forms above.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _KINDS:
        raise ValueError(f"a Redis URL begins with one of {', '.join(sorted(_KINDS))}, and ://")
    kind, tls = _KINDS[scheme]
    parts = urlsplit("//" + rest)
    parameters = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
    if unknown := parameters.keys() - _PARAMETERS:
        raise ValueError(f"a Redis URL has no parameter {min(unknown)}; there are {', '.join(sorted(_PARAMETERS))}")
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, own_password = credentials.partition(":")
    path, service, db = _path(scheme, kind, hosts, parts)
    if kind == "one" and "," in hosts:
        raise ValueError("several hosts of a Redis URL are sentinels or a cluster: redis+sentinel://, redis+cluster://")
    return Place(
        kind,
        () if path else _addresses(hosts, _PORTS[kind]),
        path,
        service,
        _db(parameters.get("db") or db, kind),
        unquote(user),
        unquote(own_password) or password,
        parameters.get("sentinel_user", ""),
        parameters.get("sentinel_password", ""),
        tls,
        ca_file,
        verify,
    )


def _path(scheme: str, kind: Kind, hosts: str, parts: SplitResult) -> tuple[str, str, str]:
    """Socket path, service and database of the URL's path."""
    if scheme == "unix":
        if hosts or not parts.path.strip("/"):
            raise ValueError("a unix:// URL of Redis needs three slashes and a path: unix:///run/redis.sock")
        return unquote(parts.path), "", ""
    if kind != "sentinel":
        return "", "", parts.path.strip("/")
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("a Redis URL with sentinels needs the service's name: redis+sentinel://host/name")
    return "", unquote(service), db


def _db(text: str, kind: Kind) -> int:
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError("the database of a Redis URL is a number")
    if kind == "cluster" and int(text or 0):
        raise ValueError("a Redis cluster has no database but 0")
    return int(text or 0)


def _addresses(hosts: str, default_port: int) -> tuple[Address, ...]:
    addresses = []
    for host in hosts.split(","):
        try:
            parts = urlsplit("//" + host)
            name, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError("a host of the Redis URL is not host or host:port") from None
        if not name:
            raise ValueError("a Redis URL names no host")
        addresses.append((unquote(name), port or default_port))
    return tuple(addresses)
