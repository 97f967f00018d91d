"""The reply to EHLO: a server's name and its service extensions (RFC 5321 section 4.1.1.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gateway.protocol.errors import LocalError
from gateway.protocol.smtp_replies import Reply

_LINE: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:[ =](.*))?")
_LIMIT: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)=(\d{1,20})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Ehlo:
    """What a server announced: `keywords` maps each keyword (upper case) to its parameters as one string."""

    name: str
    keywords: dict[str, str]

    @property
    def size(self) -> int | None:
        """Octets a message may have; 0 where there is no fixed limit, None without SIZE (RFC 1870 section 4)."""
        text = self.keywords.get("SIZE")
        if text is None:
            return None
        return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else 0

    @property
    def auth_mechanisms(self) -> frozenset[str]:
        """SASL mechanisms, upper case (RFC 4954 section 3)."""
        return frozenset(self.keywords.get("AUTH", "").upper().split())

    @property
    def xclient(self) -> frozenset[str]:
        """The attributes that the server takes in XCLIENT, upper case; empty where it takes none from us."""
        return frozenset(self.keywords.get("XCLIENT", "").upper().split())

    @property
    def limits(self) -> dict[str, int]:
        """LIMITS by name (RFC 9422 section 4), without what is not a number."""
        matches = map(_LIMIT.fullmatch, self.keywords.get("LIMITS", "").split())
        return {match[1].upper(): int(match[2]) for match in matches if match}


def parse_ehlo(reply: Reply) -> Ehlo:
    """Read the 250 reply to EHLO.

    Lines that are empty or no keyword are passed over (smtp-sink ends its reply with one). A keyword that
    comes twice keeps its first parameters, except that AUTH and the old form `AUTH=` are joined.
    """
    first, *rest = reply.lines
    name, _, _ = first.decode("utf-8", "replace").partition(" ")
    keywords: dict[str, str] = {}
    for line in rest:
        text = line.decode("utf-8", "replace").rstrip()
        match = _LINE.fullmatch(text)
        if match is None or not text.isprintable():
            continue
        keyword, parameters = match[1].upper(), (match[2] or "").strip()
        if keyword == "AUTH" and "AUTH" in keywords:
            mechanisms = f"{keywords['AUTH']} {parameters}".split()
            keywords["AUTH"] = " ".join(dict.fromkeys(mechanisms))
        elif keyword == "AUTH" or "=" not in text[: len(keyword) + 1]:
            keywords.setdefault(keyword, parameters)
    return Ehlo(name, keywords)


def format_ehlo(name: str, keywords: Mapping[str, str]) -> bytes:
    """The whole 250 reply to EHLO. Raises `LocalError` for text that would break a line."""
    lines = [name, *(f"{keyword} {parameters}" if parameters else keyword for keyword, parameters in keywords.items())]
    if not all(line and line.isprintable() for line in lines):
        raise LocalError("an EHLO line is empty or not printable")
    return Reply(250, tuple(line.encode() for line in lines)).encode()
