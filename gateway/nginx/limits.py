"""nginx's clocks and counts as the `limits` of a pipeline and the settings of upstream servers."""

from __future__ import annotations

from gateway.nginx.conf import Directive
from gateway.nginx.merge import Main, Server
from gateway.nginx.write import Map
from gateway.values import format_duration

UNLIMITED = 1_000_000
SESSIONS = 10_000  # the gateway's default
CLOCKS = ("command_timeout", "login_timeout", "write_timeout", "tls_timeout", "proxy_timeout")


def limits(server: Server, main: Main) -> Map:
    """The `limits` mapping: nginx's where it has one, else more than anybody needs."""
    written = Map()
    if server.protocol != "pop3":  # whose 128 octets are nobody's wish
        name = f"{server.protocol}_client_buffer"
        size = positive_size(server, name)
        written.put("command_line", size, server.comment(name)).put("auth_line", size)
    written.put("errors", max(1, server.number("max_errors")), server.comment("max_errors"))
    timeout = format_duration(positive(server, "timeout"))
    for index, key in enumerate(CLOCKS):
        written.put(key, timeout, "" if index else server.comment("timeout"))
    written.put("idle_timeout", format_duration(positive(server, "proxy_timeout")), server.comment("proxy_timeout"))
    written.put("session_timeout", "365d", "nginx has none")
    written.put("auth_delay", 0)
    written.put("auth_failures", UNLIMITED, "nginx counts no failed logins, nor any of these")
    for key in ("junk_commands", "transactions", "recipients"):
        written.put(key, UNLIMITED)
    written.put("message_size", "1024G")
    sessions, comment = _sessions(main)
    return written.put("sessions", sessions, comment)


def servers(server: Server) -> Map:
    """How upstream servers are spoken to: in clear text, without a question before there is a client."""
    timeout = format_duration(positive(server, "timeout"))
    written = Map().put("tls", "off", "nginx has none towards upstreams; `required` is better where they have it")
    written.put("allow_plaintext_login", True)
    written.put("health", "off").put("capabilities", Map().put("assume", []), "they are not asked")
    written.put("max_connections", UNLIMITED)
    for key in ("connect_timeout", "greeting_timeout", "command_timeout"):
        written.put(key, timeout, server.comment("timeout") if key == "connect_timeout" else "")
    if server.protocol == "smtp" and not server.flag("xclient"):
        written.put("hello", "as_client", server.comment("xclient"))
    return written


def computed_servers(server: Server) -> Map:
    """The same for a server whose own capabilities are relayed: it is asked for them, and for TLS."""
    asked = ("tls", "health", "capabilities", "hello")
    return Map([entry for entry in servers(server).entries if entry.key not in asked])


def positive(server: Server, name: str) -> float:
    """A time above 0: nginx ends every session at once with 0."""
    seconds = server.seconds(name)
    if seconds <= 0:
        server.findings.unequal(server.one(name) or server.block, f"{name}: 0 ends every session at once")
        return 60.0
    return seconds


def positive_size(server: Server, name: str) -> int:
    octets = server.size(name)
    if octets < 32:
        server.findings.unequal(server.one(name) or server.block, f"{name}: no command fits into {octets} octets")
        return 4096
    return octets


def _sessions(main: Main) -> tuple[int, str]:
    """What one of nginx's workers could hold, two connections a session; never less than the gateway's own default."""
    found = [
        directive
        for events in main.directives
        if events.name == "events"
        for directive in events.inside("worker_connections")
    ]
    connections = _number(found[-1] if found else None, 512)
    allowed = connections // 2
    if allowed <= SESSIONS:
        return SESSIONS, f"{found[-1]} allows fewer" if found else ""
    return allowed, f"{found[-1]} two a session" if found else ""


def _number(directive: Directive | None, default: int) -> int:
    """The first argument, if it is a number."""
    words = directive.arguments if directive is not None else ()
    return int(words[0]) if words and words[0].isdecimal() else default
