"""Each `server {}` of `mail {}` made whole: its own directives, else those of `mail {}`, else nginx's defaults.

Lists are inherited as a whole: a server with one `auth_http_header` of its own has none of the outer ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gateway.nginx import listen, values
from gateway.nginx.conf import Directive, Findings
from gateway.nginx.directives import RULES, check_level
from gateway.nginx.listen import Listen
from gateway.nginx.values import Invalid


@dataclass
class Server:
    """A server with what holds for it. `findings` are its own, those of what it inherits among them."""

    block: Directive
    settings: Mapping[str, tuple[Directive, ...]]
    listens: list[Listen]
    protocol: str
    findings: Findings = field(default_factory=Findings)

    def written(self, name: str) -> tuple[Directive, ...]:
        """The directives of this name that hold here; none where nginx's default does."""
        return self.settings.get(name, ())

    def one(self, name: str) -> Directive | None:
        """The one directive of this name that holds here, if any."""
        found = self.written(name)
        return found[-1] if found else None

    def words(self, name: str) -> tuple[str, ...]:
        """All arguments, those of repeated directives one behind the other; or the default."""
        found = self.written(name)
        return tuple(word for directive in found for word in directive.arguments) if found else RULES[name].default

    def word(self, name: str) -> str:
        """The first argument, or the default, or ""."""
        found = self.words(name)
        return found[0] if found else ""

    def flag(self, name: str) -> bool:
        """The value of on|off."""
        return values.flag(self.word(name))

    def seconds(self, name: str) -> float:
        """The value of a time."""
        return values.seconds(self.word(name))

    def size(self, name: str) -> int:
        """The value of a size, octets."""
        return values.size(self.word(name))

    def number(self, name: str) -> int:
        """The value of a number."""
        return values.number(self.word(name))

    def comment(self, name: str) -> str:
        """The directive as it is written, or that it is nginx's default."""
        found = self.written(name)
        if found:
            return " ".join(map(str, found))
        default = RULES[name].default
        return f"by default {name} {' '.join(default)};" if default else ""

    @property
    def relays_auth(self) -> bool:
        """Nobody but the `proxy_pass` upstream could say who may log in; nginx has no such thing to be like."""
        asked = self.written("auth_http") or ("none" in self.words("smtp_auth") and self.protocol == "smtp")
        return bool(self.written("proxy_pass")) and not asked

    @property
    def tls(self) -> bool:
        """nginx makes a TLS context: something listens with TLS, or STARTTLS is offered."""
        return any(entry.ssl for entry in self.listens) or self.word("starttls") != "off"


@dataclass
class Main:
    """What stands outside of `mail {}`."""

    settings: Mapping[str, list[Directive]]
    directives: tuple[Directive, ...]

    def one(self, name: str) -> Directive | None:
        """The directive of this name, if any."""
        found = self.settings.get(name)
        return found[-1] if found else None


def merge(directives: tuple[Directive, ...], path: str, findings: Findings) -> tuple[Main, list[Server]]:
    """The servers of a configuration, complete. What nginx would refuse goes to `findings`."""
    main = check_level(directives, "main", findings)
    blocks = main.get("mail", [])
    if not blocks:
        if not findings.all("fatal"):  # else it may stand in what could not be read
            findings.unreadable(path, None, "there is no mail {} in this file or in what it includes")
        return Main(main, directives), []
    level = check_level(blocks[0].block or (), "mail", findings)
    servers: list[Server] = []
    for block in level.pop("server", []):
        server = _server(block, {"error_log": main.get("error_log", [])}, level, findings)
        if server is not None:
            servers.append(server)
    if not servers and not findings.all("fatal"):
        findings.fatal(blocks[0], "there is no server {} in mail {}")
    _check_addresses(servers, findings)
    return Main(main, directives), servers


def _server(
    block: Directive, main: Mapping[str, list[Directive]], mail: Mapping[str, list[Directive]], findings: Findings
) -> Server | None:
    own = check_level(block.block or (), "server", findings)
    listens: list[Listen] = []
    for directive in own.pop("listen", []):
        try:
            listens.append(listen.parse(directive))
        except Invalid as error:
            findings.fatal(directive, f'"listen" directive: {error}')
            return None
    settings = {name: tuple(found) for name, found in {**main, **mail, **own}.items()}
    if not listens:
        findings.fatal(block, 'no "listen" is defined for server')
        return None
    protocol = settings["protocol"][-1].arguments[0] if "protocol" in settings else ""
    protocol = protocol or next((entry.protocol for entry in listens if entry.protocol), "")
    if not protocol:
        findings.fatal(block, "unknown mail protocol for server")
        return None
    server = Server(block, settings, listens, protocol)
    if server.flag("ssl"):
        server.listens = [replace(entry, ssl=True) for entry in listens]
    _check_server(server, findings)
    return server


def _check_server(server: Server, findings: Findings) -> None:
    """What nginx refuses once a server is complete."""
    if not server.written("auth_http") and not server.written("proxy_pass"):
        findings.fatal(server.block, 'no "auth_http" is defined for server')
    if server.tls:
        why = server.one("starttls") or next((entry.directive for entry in server.listens if entry.ssl), server.block)
        certificates, keys = server.written("ssl_certificate"), server.written("ssl_certificate_key")
        if not certificates:
            findings.fatal(why, 'no "ssl_certificate" is defined for TLS')
        elif len(keys) < len(certificates):
            missing = certificates[len(keys)].arguments[0]
            findings.fatal(why, f'no "ssl_certificate_key" is defined for certificate "{missing}"')
        verify = server.word("ssl_verify_client")
        if verify in ("on", "optional") and not (
            server.written("ssl_client_certificate") or server.written("ssl_trusted_certificate")
        ):
            directive = server.one("ssl_verify_client") or server.block
            findings.fatal(directive, "no ssl_client_certificate or ssl_trusted_certificate for ssl_verify_client")


def _check_addresses(servers: list[Server], findings: Findings) -> None:
    """An address is listened on once in all of `mail {}`."""
    seen: set[str] = set()
    for server in servers:
        for entry in server.listens:
            for address in entry.addresses:
                if address in seen:
                    findings.fatal(entry.directive, f'duplicate "{address}" address and port pair')
                seen.add(address)
