"""`ssl_*` as the `tls` of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gateway.config.tls_settings import VERSIONS, conf_command
from gateway.nginx import values
from gateway.nginx.conf import Directive
from gateway.nginx.merge import Server
from gateway.nginx.write import Map, Scalar
from gateway.values import format_duration

VERIFY = {"off": "off", "on": "required", "optional": "optional", "optional_no_ca": "optional_no_ca"}
FILES = {
    "ssl_password_file": "password_file",
    "ssl_client_certificate": "client_ca",
    "ssl_trusted_certificate": "trusted_ca",
    "ssl_crl": "crl",
    "ssl_dhparam": "dhparam",
}


@dataclass
class _Overrides:
    """What `ssl_conf_command` says: nginx applies it last."""

    settings: dict[str, Scalar] = field(default_factory=dict)
    options: list[Scalar] = field(default_factory=list)
    chains: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    written: dict[str, Directive] = field(default_factory=dict)


def tls(server: Server, folder: Path) -> Map:
    """The `tls` mapping; relative files are in nginx's configuration folder."""
    over = _overrides(server)
    written = Map()
    written.put("certificates", _certificates(server, over, folder))
    for name, key in FILES.items():
        directive = server.one(name)
        if key == "dhparam" and key in over.settings:
            written.put(key, _path(str(over.settings[key]), folder), str(over.written[key]))
        elif directive is not None:
            written.put(key, _file(server, directive, directive.arguments[0], folder), str(directive))
    verify = server.word("ssl_verify_client")
    written.put("verify_client", VERIFY[verify], server.comment("ssl_verify_client"))
    if verify != "off":
        written.put("verify_depth", server.number("ssl_verify_depth"), server.comment("ssl_verify_depth"))
    ciphers = str(over.settings.get("ciphers", server.word("ssl_ciphers")))
    _versions(server, over, ciphers, written)
    written.put("ciphers", ciphers, _comment(server, over, "ciphers", "ssl_ciphers"))
    if "ciphersuites" in over.settings:
        written.put("ciphersuites", over.settings["ciphersuites"], str(over.written["ciphersuites"]))
    written.put("prefer_server_ciphers", server.flag("ssl_prefer_server_ciphers"))
    curves = over.settings.get("curves", server.word("ssl_ecdh_curve"))
    if curves != "auto":
        written.put("curves", curves, _comment(server, over, "curves", "ssl_ecdh_curve"))
    _sessions(server, written)
    if over.options:
        written.put("options", over.options, str(over.written["options"]))
    return written


def _comment(server: Server, over: _Overrides, key: str, name: str) -> str:
    return str(over.written[key]) if key in over.written else server.comment(name)


def _overrides(server: Server) -> _Overrides:
    over = _Overrides()
    for directive in server.written("ssl_conf_command"):
        try:
            meant = conf_command(*directive.arguments)
        except ValueError as error:
            server.findings.unequal(directive, f"ssl_conf_command: {error}")
            continue
        for key, value in meant.items():
            over.written[key] = directive
            if key == "certificates" and isinstance(value, list):
                for half in value:
                    over.chains += [half["chain"]] if "chain" in half else []
                    over.keys += [half["key"]] if "key" in half else []
            elif key == "options" and isinstance(value, list):
                over.options += value
            elif isinstance(value, (str, int, float)):
                over.settings[key] = value
    return over


def _certificates(server: Server, over: _Overrides, folder: Path) -> list[Map]:
    pairs = [
        (_file(server, chain, chain.arguments[0], folder), _file(server, key, key.arguments[0], folder), str(chain))
        for chain, key in zip(server.written("ssl_certificate"), server.written("ssl_certificate_key"), strict=False)
    ]
    if over.chains or over.keys:
        directive = over.written["certificates"]
        if len(over.chains) != len(over.keys):
            server.findings.unequal(directive, "ssl_conf_command: Certificate and PrivateKey go together")
        pairs += [
            (_path(chain, folder), _path(key, folder), str(directive))
            for chain, key in zip(over.chains, over.keys, strict=False)
        ]
    return [Map().put("chain", chain, comment).put("key", key) for chain, key, comment in pairs]


def _file(server: Server, directive: Directive, name: str, folder: Path) -> str:
    if re.match(r"(data|engine|store):", name) or "$" in name:
        server.findings.unequal(directive, f"{directive.name}: only files can be named, not {name.partition(':')[0]}")
    return _path(name, folder)


def _path(name: str, folder: Path) -> str:
    return str(folder / name)


def _versions(server: Server, over: _Overrides, ciphers: str, written: Map) -> None:
    """A list of versions as its ends; what is older than OpenSSL's security level speaks is left out."""
    directive = server.one("ssl_protocols") or server.block
    listed = [version for version in VERSIONS if version in server.words("ssl_protocols")]
    if not listed:
        server.findings.unequal(directive, "ssl_protocols: no version that OpenSSL speaks")
        return
    first, last = VERSIONS.index(listed[0]), VERSIONS.index(listed[-1])
    if len(listed) != last - first + 1:
        missing = ", ".join(set(VERSIONS[first:last]) - set(listed))
        server.findings.unequal(directive, f"ssl_protocols: {missing} cannot be left out between others")
    lowest = str(over.settings.get("minimum_version", VERSIONS[first]))
    highest = str(over.settings.get("maximum_version", VERSIONS[last]))
    comment = _comment(server, over, "minimum_version", "ssl_protocols")
    if lowest in ("TLSv1", "TLSv1.1") and "@SECLEVEL=0" not in ciphers.upper():
        text = f"{lowest} and what is older than TLSv1.2 is left out: OpenSSL speaks it with @SECLEVEL=0 in ssl_ciphers"
        if highest in ("TLSv1", "TLSv1.1"):
            server.findings.unequal(directive, text)
        else:
            server.findings.warning(directive, text)
        lowest = "TLSv1.2"
    written.put("minimum_version", lowest, comment)
    if highest != "TLSv1.3":
        written.put("maximum_version", highest, _comment(server, over, "maximum_version", "ssl_protocols"))


def _sessions(server: Server, written: Map) -> None:
    words = server.words("ssl_session_cache")
    comment = server.comment("ssl_session_cache")
    shared = next((word for word in words if word.startswith("shared:")), None)
    builtin = next((word for word in words if word.startswith("builtin")), None)
    if shared is not None:
        written.put("session_cache", Map().put("shared", values.size(shared.rpartition(":")[2])), comment)
    elif builtin is not None and ":" in builtin and int(builtin.partition(":")[2]) > 0:
        written.put("session_cache", Map().put("builtin", int(builtin.partition(":")[2])), comment)
    else:
        written.put("session_cache", "builtin" if builtin is not None else words[-1], comment)
    written.put("session_tickets", server.flag("ssl_session_tickets"))
    timeout = server.seconds("ssl_session_timeout")
    if timeout < 1:
        server.findings.unequal(server.one("ssl_session_timeout") or server.block, "ssl_session_timeout: at least 1s")
    written.put("session_timeout", format_duration(timeout), server.comment("ssl_session_timeout"))
    for directive in server.written("ssl_session_ticket_key"):
        server.findings.unequal(
            directive, "ssl_session_ticket_key: ticket keys are random, made new at each start; sessions do not "
            "resume at another gateway",
        )  # fmt: skip
    if server.flag("ssl_certificate_compression"):
        directive = server.one("ssl_certificate_compression") or server.block
        server.findings.unequal(directive, "ssl_certificate_compression: certificates are not compressed")


def ignored(settings: Mapping[str, tuple[Directive, ...]]) -> list[Directive]:
    """ssl_* directives of a server without TLS: nginx does not look at them either."""
    return [directive for name, found in settings.items() if name.startswith("ssl_") for directive in found]
