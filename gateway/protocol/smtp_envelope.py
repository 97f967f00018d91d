"""The arguments of MAIL and RCPT: addresses and ESMTP parameters (RFC 5321 4.1.2, RFC 6531 3.3).

An address is kept as the client wrote it, a quoted local part with its quotes, so that what one server said
yes to is what the next one is asked; only a source route is dropped (RFC 5321 appendix C).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NoReturn

from gateway.protocol.errors import LocalError, PeerError

MAX_LOCAL: Final = 64
MAX_DOMAIN: Final = 255
MAX_PATH: Final = 256
"""Octets (RFC 5321 4.5.3.1); a path counts its angle brackets."""

Parameters = tuple[tuple[str, str | None], ...]

PARAMETER_EXTENSION: Final[Mapping[str, str]] = MappingProxyType(
    {
        "SIZE": "SIZE",
        "BODY": "8BITMIME",
        "SMTPUTF8": "SMTPUTF8",
        "AUTH": "AUTH",
        "RET": "DSN",
        "ENVID": "DSN",
        "NOTIFY": "DSN",
        "ORCPT": "DSN",
        "REQUIRETLS": "REQUIRETLS",
        "BY": "DELIVERBY",
        "MT-PRIORITY": "MT-PRIORITY",
        "HOLDFOR": "FUTURERELEASE",
        "HOLDUNTIL": "FUTURERELEASE",
        "RRVS": "RRVS",
        "XVERP": "XVERP",
    }
)
"""Parameter of MAIL or RCPT to the EHLO keyword that allows it. BODY=BINARYMIME needs BINARYMIME as well."""

_XTEXT: Final = r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})"
_MAIL_VALUES: Final[Mapping[str, re.Pattern[str] | None]] = {
    "SIZE": re.compile(r"[0-9]{1,20}"),
    "BODY": re.compile(r"7BIT|8BITMIME|BINARYMIME", re.IGNORECASE),
    "SMTPUTF8": None,
    "REQUIRETLS": None,
    "AUTH": re.compile(rf"<>|{_XTEXT}{{1,500}}", re.IGNORECASE),
    "RET": re.compile(r"FULL|HDRS", re.IGNORECASE),
    "ENVID": re.compile(rf"(?=.{{1,100}}$){_XTEXT}+", re.IGNORECASE),
}
_RCPT_VALUES: Final[Mapping[str, re.Pattern[str] | None]] = {
    "NOTIFY": re.compile(r"NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY)){0,2}", re.IGNORECASE),
    "ORCPT": re.compile(r"(?=.{1,500}$)[A-Za-z0-9-]+;[!-<>-~\x80-\U0010ffff]+"),
}

# Anything from 0x80 on may stand where a letter may (RFC 6531 3.3); what of it is refused, _FORBIDDEN says.
_ATOM: Final = r'[^\x00-\x20\x7f"(),:;<>@\[\\\]]'
_LOCAL: Final = rf'{_ATOM}+|"(?:[^"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*"'
_DOMAIN: Final = rf"\[[^\[\]\\<>@\x00-\x20\x7f]+\]|{_ATOM}+"
_ADDRESS: Final = re.compile(rf"({_LOCAL})(?:@({_DOMAIN}))?")
_ROUTE: Final = re.compile(rf"@{_ATOM}+(?:,@{_ATOM}+)*:")
_PATH: Final = re.compile(rf"<(?:{_ROUTE.pattern})?({_ADDRESS.pattern})?>")
_LETTER: Final = r"A-Za-z0-9_\x80-\U0010ffff"
_LABEL: Final = rf"[{_LETTER}](?:[{_LETTER}-]{{0,61}}[{_LETTER}])?"
_HOST: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_FORBIDDEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_KEYWORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
_VALUE: Final = re.compile(r"[!-<>-~\x80-\U0010ffff]+")


@dataclass(frozen=True, slots=True)
class Mail:
    """MAIL FROM: `address` is "" for the null sender; keywords of `parameters` are upper case, values as sent.

    `line` is the argument of the command as it came.
    """

    address: str
    parameters: Parameters
    line: bytes


@dataclass(frozen=True, slots=True)
class Rcpt:
    """RCPT TO: as `Mail`, but the address is never empty and has no domain only for postmaster."""

    address: str
    parameters: Parameters
    line: bytes


def parse_mail(argument: bytes, smtputf8_known: bool = True, *, strict: bool = False) -> Mail:
    """Read the argument of MAIL (`FROM:<address> parameters`).

    `strict` wants the grammar of RFC 5321 to the letter; without it a path may lack its angle brackets, blanks
    may follow the colon and dots may stand anywhere in the local part, as Postfix takes them. Without
    `smtputf8_known` the parameter SMTPUTF8 does not permit an address beyond ASCII.
    Raises `PeerError`: 501 5.1.7 bad address, 501 5.5.4 bad parameter, 555 5.5.4 one of RCPT's, 550 5.6.7
    non-ASCII address.
    """
    text = _decode(argument)
    if text[:5].upper() != "FROM:":
        raise PeerError("malformed MAIL", b"501 5.5.4 Syntax: MAIL FROM:<address>")
    path, rest = _split_path(text[5:], "5.1.7", strict)
    parameters = _parse_parameters(rest, _MAIL_VALUES, _RCPT_VALUES)
    address = _check_address(path, "5.1.7", strict) if path else ""
    if not argument.isascii() and not (smtputf8_known and ("SMTPUTF8", None) in parameters):
        raise PeerError("non-ASCII MAIL without SMTPUTF8", b"550 5.6.7 Non-ASCII address needs SMTPUTF8")
    if path and "@" not in address:
        raise PeerError("sender without domain", b"501 5.1.7 Sender address needs a domain")
    return Mail(address, parameters, argument)


def parse_rcpt(argument: bytes, utf8: bool = False, *, strict: bool = False) -> Rcpt:
    """Read the argument of RCPT (`TO:<address> parameters`).

    `utf8` says whether MAIL had SMTPUTF8; `strict` as in `parse_mail`. Raises `PeerError`: 501 5.1.3 bad
    address, 501 5.5.4 bad parameter, 555 5.5.4 one of MAIL's, 553 5.6.7 non-ASCII address.
    """
    text = _decode(argument)
    if text[:3].upper() != "TO:":
        raise PeerError("malformed RCPT", b"501 5.5.4 Syntax: RCPT TO:<address>")
    path, rest = _split_path(text[3:], "5.1.3", strict)
    if not path:
        raise PeerError("empty recipient", b"501 5.1.3 Recipient address is empty")
    address = _check_address(path, "5.1.3", strict)
    parameters = _parse_parameters(rest, _RCPT_VALUES, _MAIL_VALUES)
    if not utf8 and not argument.isascii():
        raise PeerError("non-ASCII RCPT without SMTPUTF8", b"553 5.6.7 Non-ASCII address needs SMTPUTF8")
    if not domain_of(address) and address.lower() != "postmaster":
        raise PeerError("recipient without domain", b"501 5.1.3 Recipient address needs a domain")
    return Rcpt(address, parameters, argument)


def format_mail(address: str, parameters: Iterable[tuple[str, str | None]] = ()) -> bytes:
    """The MAIL command without CRLF. Raises `LocalError` for an address or parameter that has no form in SMTP."""
    return _format("MAIL FROM:<", address, parameters)


def format_rcpt(address: str, parameters: Iterable[tuple[str, str | None]] = ()) -> bytes:
    """The RCPT command without CRLF. Raises `LocalError` as `format_mail`, and for an empty address."""
    if not address:
        raise LocalError("a recipient is never empty")
    return _format("RCPT TO:<", address, parameters)


def domain_of(address: str) -> str:
    """The domain in lower case, an address literal with its brackets; "" if there is none."""
    _, at, domain = address.rpartition("@")
    # The @ of a quoted local part without a domain is not the one that counts.
    return domain.lower() if at and domain[-1:] != '"' else ""


def local_of(address: str) -> str:
    """The local part as written; it may be quoted and its case may matter (RFC 5321 2.4)."""
    local, at, domain = address.rpartition("@")
    return local if at and domain[-1:] != '"' else address


def _decode(argument: bytes) -> str:
    try:
        text = argument.decode("utf-8")
    except UnicodeDecodeError:
        raise PeerError("argument is not UTF-8", b"501 5.5.2 Invalid UTF-8") from None
    if not text.isprintable() and _FORBIDDEN.search(text):
        raise PeerError("control character in a command", b"501 5.5.2 Control characters not allowed")
    return text


def _split_path(text: str, status: str, strict: bool) -> tuple[str, str]:
    """Cut off the path: its address without route and brackets ("" for `<>`), and the parameters behind it."""
    if not strict:
        text = text.lstrip(" ")
    match = _PATH.match(text)
    if match is not None:
        end, address = match.end(), match[1] or ""
    elif not strict and (match := _ADDRESS.match(text)) is not None:
        end, address = match.end(), match[0]
    else:
        _refuse(status, "Bad address syntax")
    rest = text[end:]
    if rest and rest[0] != " ":
        _refuse(status, "Bad address syntax")
    if len(text[:end].encode()) > MAX_PATH:
        _refuse(status, "Path too long")
    if text[0] == "<" and not address and end > 2:
        _refuse(status, "Bad address syntax")  # a route to nobody
    return address, rest


def _check_address(address: str, status: str, strict: bool) -> str:
    """Check lengths and domain of an address that has the right shape."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        _refuse(status, "Bad address syntax")
    local, domain = match[1], match[2]
    if len(local) > MAX_LOCAL or len(local.encode()) > MAX_LOCAL:
        _refuse(status, "Local part too long")
    if strict and local[0] != '"' and (local[0] == "." or local[-1] == "." or ".." in local):
        _refuse(status, "Bad address syntax")
    if domain is not None and not _valid_domain(domain):
        _refuse(status, "Bad domain syntax")
    return address


def _valid_domain(domain: str) -> bool:
    """Whether it is a host name (underscores are taken, as the DNS does) or an address literal."""
    if domain[0] != "[":
        return len(domain.encode()) <= MAX_DOMAIN and _HOST.fullmatch(domain) is not None
    literal = domain[1:-1]
    try:
        if literal[:5].upper() == "IPV6:":
            return ipaddress.IPv6Address(literal[5:]).scope_id is None
        ipaddress.IPv4Address(literal)
    except ValueError:
        return False
    return True


def _parse_parameters(
    text: str, known: Mapping[str, re.Pattern[str] | None], elsewhere: Mapping[str, re.Pattern[str] | None]
) -> Parameters:
    if not text:
        return ()
    parameters: dict[str, str | None] = {}
    for word in text.split(" "):
        if not word:
            continue
        name, equals, rest = word.partition("=")
        keyword, value = name.upper(), rest if equals else None
        if not _KEYWORD.fullmatch(name) or (value is not None and not _VALUE.fullmatch(value)):
            raise PeerError("malformed parameter", b"501 5.5.4 Malformed parameter")
        if keyword in parameters:
            raise PeerError("duplicate parameter", b"501 5.5.4 Duplicate parameter")
        if keyword in elsewhere:
            raise PeerError(f"misplaced parameter {keyword}", b"555 5.5.4 Parameter belongs to the other command")
        if keyword in known:
            pattern = known[keyword]
            if not (value is None if pattern is None else value is not None and pattern.fullmatch(value)):
                raise PeerError(f"bad value of {keyword}", b"501 5.5.4 Bad value of " + keyword.encode())
        parameters[keyword] = value
    return tuple(parameters.items())


def _format(head: str, address: str, parameters: Iterable[tuple[str, str | None]]) -> bytes:
    if address and (not _ADDRESS.fullmatch(address) or _FORBIDDEN.search(address)):
        raise LocalError("address has no form in SMTP")
    words = [f"{head}{address}>"]
    for keyword, value in parameters:
        if not _KEYWORD.fullmatch(keyword) or (value is not None and not _VALUE.fullmatch(value)):
            raise LocalError(f"parameter {keyword!r} has no form in SMTP")
        words.append(keyword if value is None else f"{keyword}={value}")
    line = " ".join(words)
    if _FORBIDDEN.search(line):
        raise LocalError("control character in a parameter")
    return line.encode()


def _refuse(status: str, text: str) -> NoReturn:
    raise PeerError(text.lower(), f"501 {status} {text}".encode())
