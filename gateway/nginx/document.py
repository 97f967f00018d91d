"""A server of `mail {}` as a pipeline document.

Every setting in which the gateway's default is not nginx's is written out, with the directive that it comes from. The
stages stand in the order in which nginx does their work: reverse DNS, greeting delay, auth server, and towards the
upstream PROXY header, XCLIENT, AUTH.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gateway.config.addresses import parse_hostname
from gateway.nginx import auth_http, limits, logs, texts, tls, values
from gateway.nginx.conf import Directive
from gateway.nginx.listen import Keepalive, Listen
from gateway.nginx.merge import Main, Server
from gateway.nginx.stages import Stages
from gateway.nginx.values import Lookup
from gateway.nginx.write import Map, document
from gateway.values import NotA, format_duration

ALL_METHODS = {
    "smtp": ("plain", "login", "cram-md5", "external"),
    "imap": ("plain", "login", "cram-md5", "external"),
    "pop3": ("plain", "login", "apop", "cram-md5", "external"),
}


@dataclass
class Setting:
    """What an import needs besides the server: where nginx's files are, and this machine's names."""

    folder: Path
    prefix: Path
    main: Main
    lookup: Lookup = values.addresses
    own_name: Callable[[], str] = socket.gethostname
    names: set[str] = field(default_factory=set)

    def unique(self, name: str) -> str:
        """A name that no other document has."""
        number, found = 1, name
        while found in self.names:
            number += 1
            found = f"{name}-{number}"
        self.names.add(found)
        return found


@dataclass
class Document:
    """One pipeline: its name, and its text without `---`."""

    name: str
    text: str


def pipeline(server: Server, setting: Setting) -> Document:
    """The document of one server. What has no equal goes to the server's findings."""
    name = setting.unique(_name(server))
    hostname = _hostname(server, setting)
    written = Map().put("name", name)
    written.put("listen", [_listener(server, entry) for entry in server.listens])
    comment = server.comment("server_name") or "no server_name: the name of the machine that this was imported on"
    written.put("hostname", hostname, comment)
    if server.tls:
        written.put("tls", tls.tls(server, setting.folder))
    _trust(server, setting, written)
    stages = Stages(server, _target(server, setting), setting.lookup)
    chain = stages.chain()
    if stages.open_relay:
        above = "smtp_auth none: nobody has to log in. What keeps strangers from sending anywhere is the auth server "
        above += "or the upstream, which must not trust this machine's address."
        written.put("relay", "open", server.comment("smtp_auth"), [above])
    written.put("allow_plaintext_auth", server.word("starttls") != "only", server.comment("starttls"))
    if server.protocol == "smtp":
        written.put("helo_required", False).put("unauthorized_pipelining", "accept")
    written.put("bare_lf", "accept").put("reply_id", False)
    _replies(server, hostname, written)
    written.put("limits", limits.limits(server, setting.main))
    log = logs.log(server, setting.prefix)
    if log is not None:
        written.put("log", log)
    stages.resolvers(written)
    if not stages.static:
        written.put("dynamic_servers", limits.servers(server))
    written.put("stages", chain)
    if stages.upstreams:
        written.put("upstreams", stages.upstreams)
    return Document(name, document(written, _head(server)))


def _name(server: Server) -> str:
    first = server.listens[0]
    secure = "s" if first.ssl else ""
    where = str(first.port) if first.port else re.sub(r"\W+", "-", Path(first.path).stem).strip("-")
    return f"{server.protocol}{secure}-{where}"


def _head(server: Server) -> list[str]:
    """Where it comes from, then what should be looked at."""
    lines = [f"{server.block.place}: server {{}}"]
    for finding in server.findings.all():
        label = "NOT IMPORTED" if finding.kind == "unequal" else "WARNING"
        lines.append(f"{label}: {finding}")
    return lines


def _hostname(server: Server, setting: Setting) -> str:
    name = server.word("server_name") or setting.own_name().lower()
    try:
        return parse_hostname(name)
    except NotA:
        directive = server.one("server_name") or server.block
        server.findings.unequal(directive, f"server_name: {name!r} is no host name, which SMTP needs")
        return "localhost"


def _listener(server: Server, entry: Listen) -> Map:
    scheme = server.protocol + ("s" if entry.ssl else "")
    if entry.path:
        url = f"{scheme}+unix:{entry.path}"
    else:
        last = f"-{entry.last}" if entry.last != entry.port else ""
        url = f"{scheme}://{entry.written_host}:{entry.port}{last}"
    written = Map().put("url", url, str(entry.directive))
    if not entry.ssl:
        written.put("starttls", server.word("starttls") != "off")
    if entry.proxy_protocol:
        written.put("proxy_protocol", "required")
    if entry.backlog is not None:
        written.put("backlog", min(entry.backlog, 65535))
    for key, octets in (("rcvbuf", entry.rcvbuf), ("sndbuf", entry.sndbuf)):
        if octets:
            written.put(key, octets)
    if not entry.path:
        if entry.ipv6only is not None:
            written.put("ipv6only", entry.ipv6only)
        if entry.keepalive is not None:
            written.put("keepalive", _keepalive(server, entry, entry.keepalive))
        if entry.multipath:
            written.put("multipath", True)
    if server.relays_auth:
        return written
    return written.put("capabilities", capabilities(server), _capabilities_comment(server))


def _keepalive(server: Server, entry: Listen, keepalive: bool | Keepalive) -> bool | Map:
    if isinstance(keepalive, bool):
        return keepalive
    written = Map()
    for key, seconds in (("idle", keepalive.idle), ("interval", keepalive.interval)):
        if seconds is not None:
            if not 1 <= seconds <= 32767:
                server.findings.unequal(entry.directive, f"so_keepalive: {key} is from 1 to 32767 seconds")
            written.put(key, format_duration(seconds))
    if keepalive.count is not None:
        if not 1 <= keepalive.count <= 127:
            server.findings.unequal(entry.directive, "so_keepalive: the count is from 1 to 127")
        written.put("count", keepalive.count)
    return written


def capabilities(server: Server) -> list[str]:
    """The lines of EHLO, CAPABILITY or CAPA in nginx's order; what depends on TLS is left out at the time."""
    protocol = server.protocol
    lines = list(server.words(f"{protocol}_capabilities"))
    listed = set(server.words(f"{protocol}_auth"))
    if protocol == "pop3" and "plain" in listed:
        listed.add("login")
    methods = [method.upper() for method in ALL_METHODS[protocol] if method in listed and method != "apop"]
    offered = server.word("starttls") != "off"
    if protocol == "smtp":
        return lines + ([" ".join(("AUTH", *methods))] if methods else []) + (["STARTTLS"] if offered else [])
    if protocol == "pop3":
        return [*lines, " ".join(("SASL", *methods)), *(["STLS"] if offered else [])]
    lines += [f"AUTH={method}" for method in methods]
    lines += ["STARTTLS"] if offered else []
    return lines + (["LOGINDISABLED"] if server.word("starttls") == "only" else [])


def _capabilities_comment(server: Server) -> str:
    names = (f"{server.protocol}_capabilities", f"{server.protocol}_auth", "starttls")
    return " ".join(str(directive) for name in names for directive in server.written(name))


def _trust(server: Server, setting: Setting, written: Map) -> None:
    """Who is believed about the client's address: those of set_real_ip_from."""
    expecting = [entry for entry in server.listens if entry.proxy_protocol]
    if not expecting:
        return
    networks: list[str] = []
    comments: list[str] = []
    for directive in server.written("set_real_ip_from"):
        comments.append(str(directive))
        networks += _networks(server, directive, setting)
    tcp = [entry for entry in expecting if not entry.path]
    if tcp and not networks and not comments:
        server.findings.unequal(
            tcp[0].directive,
            "listen: proxy_protocol without set_real_ip_from: nginx takes PROXY headers from everybody and only tells "
            "the auth server; the gateway takes them from networks that it believes",
        )
        networks, comments = ["127.0.0.0/8", "::1"], ["this machine only"]
    if networks:
        written.put("trust", Map().put("proxy", list(dict.fromkeys(networks)), " ".join(comments)))


def _networks(server: Server, directive: Directive, setting: Setting) -> list[str]:
    text = directive.arguments[0]
    if text == "unix:":
        return []  # on unix sockets a header is always believed
    try:
        return [str(ipaddress.ip_network(text, strict=False))]
    except ValueError:
        pass
    try:
        return [str(ipaddress.ip_network(address)) for address in setting.lookup(text)]
    except OSError:
        server.findings.fatal(directive, f'host not found in set_real_ip_from "{text}"')
        return []


def _target(server: Server, setting: Setting) -> auth_http.Local | None:
    """The location of the same file that answers, if there is one."""
    directive = server.one("auth_http")
    if directive is None:
        return None
    try:
        return auth_http.local(auth_http.parse(directive.arguments[0]), setting.main.directives)
    except values.Invalid:
        return None  # reported where the stage is written


def _replies(server: Server, hostname: str, written: Map) -> None:
    said = Map()
    for name, text in texts.replies(server.protocol, hostname).items():
        said.put(name, text)
    written.put("replies", Map().put(server.protocol, said))
    written.put("disconnect_on", list(texts.INTERNAL), "nginx closes after each")
