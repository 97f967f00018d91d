"""Every directive of nginx's mail modules: where it may stand, its arguments, its default, what a second one means.

From the documentation of nginx 1.31; older versions accept a part of it. The defaults are nginx's, as it would be
written: what a server leaves out is imported as if it stood there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gateway.nginx import values
from gateway.nginx.conf import Directive, Findings
from gateway.nginx.values import Invalid

Context = Literal["main", "mail", "server"]
Check = Callable[[tuple[str, ...]], object]

MAIL: frozenset[Context] = frozenset({"mail", "server"})
LEVELS = ("debug", "info", "notice", "warn", "error", "crit", "alert", "emerg")
SSL_VERSIONS = ("SSLv2", "SSLv3", "TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")


@dataclass(frozen=True, slots=True)
class Rule:
    """What nginx accepts. `repeat`: a second one at the same level is fatal, adds to the first, or replaces it."""

    contexts: frozenset[Context]
    least: int
    most: int | None
    check: Check
    default: tuple[str, ...] = ()
    repeat: Literal["duplicate", "adds", "last"] = "duplicate"


def _one(parse: Callable[[str], object]) -> Check:
    return lambda arguments: parse(arguments[0])


def _any(arguments: tuple[str, ...]) -> None:
    """Any words."""


def _of(*words: str) -> Check:
    def check(arguments: tuple[str, ...]) -> None:
        for argument in arguments:
            if argument not in words:
                raise Invalid(f'invalid value "{argument}", it must be {" or ".join(words)}')

    return check


def _levels(arguments: tuple[str, ...]) -> None:
    for level in arguments[1:]:
        if level not in LEVELS and not level.startswith("debug_"):
            raise Invalid(f'invalid log level "{level}"')


def _session_cache(arguments: tuple[str, ...]) -> None:
    for argument in arguments:
        shared = re.fullmatch(r"shared:[^:]+:(\d+[kKmM]?)", argument)
        if shared is not None and values.size(shared[1]) < 8 * 4096:
            raise Invalid(f'session cache "{argument}" is too small')
        if shared is None and not re.fullmatch(r"off|none|builtin(:\d+)?", argument):
            raise Invalid(f'invalid session cache "{argument}"')


def _rule(default: str, check: Check, *, most: int | None = 1, least: int = 1, adds: bool = False) -> Rule:
    words = tuple(default.split()) if default else ()
    return Rule(MAIL, least, most, check, words, "adds" if adds else "duplicate")


_FLAG, _SECONDS, _SIZE, _NUMBER = _one(values.flag), _one(values.seconds), _one(values.size), _one(values.number)
_SERVER: frozenset[Context] = frozenset({"server"})
_MAIN: frozenset[Context] = frozenset({"main"})

RULES: dict[str, Rule] = {
    # core
    "server": Rule(frozenset({"mail"}), 0, 0, _any, repeat="adds"),
    "listen": Rule(_SERVER, 1, None, _any, repeat="adds"),
    "protocol": Rule(_SERVER, 1, 1, _of("smtp", "imap", "pop3"), repeat="last"),
    "timeout": _rule("60s", _SECONDS),
    "server_name": _rule("", _any),
    "error_log": Rule(MAIL | _MAIN, 1, None, _levels, repeat="adds"),
    "resolver": _rule("", _any, most=None),
    "resolver_timeout": _rule("30s", _SECONDS),
    "max_errors": _rule("5", _NUMBER),
    # ssl
    "ssl": _rule("off", _FLAG),
    "starttls": _rule("off", _of("off", "on", "only")),
    "ssl_certificate": _rule("", _any, adds=True),
    "ssl_certificate_key": _rule("", _any, adds=True),
    "ssl_certificate_compression": _rule("off", _FLAG),
    "ssl_password_file": _rule("", _any),
    "ssl_protocols": _rule("TLSv1.2 TLSv1.3", _of(*SSL_VERSIONS), most=None, adds=True),
    "ssl_ciphers": _rule("HIGH:!aNULL:!MD5", _any),
    "ssl_prefer_server_ciphers": _rule("off", _FLAG),
    "ssl_ecdh_curve": _rule("auto", _any),
    "ssl_dhparam": _rule("", _any),
    "ssl_session_cache": Rule(MAIL, 1, 2, _session_cache, ("none",), "last"),
    "ssl_session_tickets": _rule("on", _FLAG),
    "ssl_session_ticket_key": _rule("", _any, adds=True),
    "ssl_session_timeout": _rule("5m", _SECONDS),
    "ssl_verify_client": _rule("off", _of("off", "on", "optional", "optional_no_ca")),
    "ssl_verify_depth": _rule("1", _NUMBER),
    "ssl_client_certificate": _rule("", _any),
    "ssl_trusted_certificate": _rule("", _any),
    "ssl_crl": _rule("", _any),
    "ssl_conf_command": _rule("", _any, least=2, most=2, adds=True),
    # auth_http
    "auth_http": Rule(MAIL, 1, 1, _any, repeat="last"),
    "auth_http_timeout": _rule("60s", _SECONDS),
    "auth_http_header": _rule("", _any, least=2, most=2, adds=True),
    "auth_http_pass_client_cert": _rule("off", _FLAG),
    # proxy
    "proxy": _rule("off", _FLAG),
    "proxy_buffer": _rule("4k", _SIZE),
    "proxy_timeout": _rule("24h", _SECONDS),
    "proxy_pass_error_message": _rule("off", _FLAG),
    "xclient": _rule("on", _FLAG),
    "proxy_smtp_auth": _rule("off", _FLAG),
    "proxy_protocol": _rule("off", _of("off", "on", "v2")),
    "proxy_pass": Rule(_SERVER, 1, 1, _any),  # unknown to nginx, but tutorials have it
    # smtp, imap, pop3
    "smtp_auth": _rule("plain login", _of("plain", "login", "cram-md5", "external", "none"), most=None, adds=True),
    "smtp_capabilities": _rule("", _any, most=None, adds=True),
    "smtp_client_buffer": _rule("4k", _SIZE),
    "smtp_greeting_delay": _rule("0", _SECONDS),
    "imap_auth": _rule("plain", _of("plain", "login", "cram-md5", "external"), most=None, adds=True),
    "imap_capabilities": _rule("IMAP4 IMAP4rev1 UIDPLUS", _any, most=None, adds=True),
    "imap_client_buffer": _rule("4k", _SIZE),
    "pop3_auth": _rule("plain", _of("plain", "apop", "cram-md5", "external"), most=None, adds=True),
    "pop3_capabilities": _rule("TOP USER UIDL", _any, most=None, adds=True),
    # realip
    "set_real_ip_from": _rule("", _any, adds=True),
    # main level
    "mail": Rule(_MAIN, 0, 0, _any),
    "worker_shutdown_timeout": Rule(_MAIN, 1, 1, _SECONDS),
    "worker_processes": Rule(_MAIN, 1, 2, _any),
    "user": Rule(_MAIN, 1, 2, _any),
    "pid": Rule(_MAIN, 1, 1, _any),
    "load_module": Rule(_MAIN, 1, 1, _any, repeat="adds"),
}


def check_level(block: tuple[Directive, ...], context: Context, findings: Findings) -> dict[str, list[Directive]]:
    """The directives of one level by name, those that are wrong left out and reported.

    At main level what the table does not have is another module's, and none of ours.
    """
    found: dict[str, list[Directive]] = {}
    for directive in block:
        rule = RULES.get(directive.name)
        if rule is None:
            if context != "main":
                # Only what is very near: it may also be a directive of a newer nginx.
                here = [name for name in RULES if context in RULES[name].contexts]
                near = [f'; did you mean "{name}"?' for name in difflib.get_close_matches(directive.name, here, 1, 0.8)]
                findings.unequal(directive, f'unknown directive "{directive.name}"{"".join(near)}')
            continue
        wrong = _wrong(directive, rule, context)
        if wrong:
            findings.fatal(directive, wrong)
            continue
        same = found.setdefault(directive.name, [])
        if same and rule.repeat == "duplicate":
            findings.fatal(directive, f'"{directive.name}" directive is duplicate')
        elif same and rule.repeat == "last":
            same[:] = [directive]
        else:
            same.append(directive)
    return found


def _wrong(directive: Directive, rule: Rule, context: Context) -> str:
    """What nginx would say, or ""."""
    name, count = directive.name, len(directive.arguments)
    if context not in rule.contexts:
        return f'"{name}" directive is not allowed here'
    if (directive.block is not None) != (name in ("mail", "server")):
        ending = 'has no opening "{"' if directive.block is None else 'is not terminated by ";"'
        return f'directive "{name}" {ending}'
    if count < rule.least or (rule.most is not None and count > rule.most):
        return f'invalid number of arguments in "{name}" directive'
    try:
        rule.check(directive.arguments)
    except Invalid as error:
        return f'"{name}" directive: {error}'
    return ""
