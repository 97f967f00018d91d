"""What a pool's servers announce in common, and a file that remembers it while a server is down.

A client is told only what every server carries: it may end up on any of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import structlog

log = structlog.get_logger("gateway.upstream")

INDIVISIBLE = ("EXPIRE", "LOGIN-DELAY", "IMPLEMENTATION")


def parse_keywords(lines: Iterable[str]) -> dict[str, str]:
    """`SIZE 10000000` and the like to keyword (upper case) and parameters.

    `AUTH=PLAIN`, as IMAP writes it, is one more word of AUTH.
    """
    keywords: dict[str, str] = {}
    for line in lines:
        keyword, _, parameters = line.strip().partition(" ")
        name, equals, word = keyword.upper().partition("=")
        if equals and name == "AUTH":
            keywords["AUTH"] = f"{keywords.get('AUTH', '')} {word} {parameters.upper()}".strip()
        elif keyword:
            keywords[keyword.upper()] = parameters.strip()
    return keywords


def shared_keywords(profiles: Sequence[Mapping[str, str]]) -> dict[str, str] | None:
    """The keywords all profiles have, with parameters that hold for each; None of none.

    SIZE is the smallest (0 and none mean no limit, RFC 1870 4), LIMITS the smallest of any server that has some
    (RFC 9422: a limit not announced is no limit), others (AUTH, POP3's SASL) the words that all have. What POP3 says
    in one piece (EXPIRE, LOGIN-DELAY, IMPLEMENTATION) holds only if all say the same.
    """
    if not profiles:
        return None
    first, *others = profiles
    shared = {
        keyword: _shared_parameters(keyword, [profile[keyword] for profile in profiles])
        for keyword in first
        if keyword != "LIMITS"
        and all(keyword in other for other in others)
        and (keyword not in INDIVISIBLE or all(first[keyword] == other[keyword] for other in others))
    }
    # AUTH without a mechanism is no AUTH; other keywords may stand alone.
    for keyword in ("AUTH", "SASL"):
        if shared.get(keyword) == "":
            del shared[keyword]
    limits = _smallest_limits(profile.get("LIMITS", "") for profile in profiles)
    if limits:
        shared["LIMITS"] = limits
    return shared


def _shared_parameters(keyword: str, parameters: Sequence[str]) -> str:
    if keyword == "SIZE":
        sizes = [int(text) for text in parameters if text.isascii() and text.isdigit() and int(text)]
        return str(min(sizes)) if sizes else ""
    words = parameters[0].split()
    for other in parameters[1:]:
        theirs = {word.upper() for word in other.split()}
        words = [word for word in words if word.upper() in theirs]
    return " ".join(words)


def _smallest_limits(texts: Iterable[str]) -> str:
    limits: dict[str, int] = {}
    for text in texts:
        for word in text.split():
            name, equals, digits = word.upper().partition("=")
            if equals and digits.isascii() and digits.isdigit():
                limits[name] = min(int(digits), limits.get(name, int(digits)))
    return " ".join(f"{name}={value}" for name, value in limits.items())


class ProfileStore:
    """A JSON file of server URL to EHLO keywords, read at the start, written whole when something changed.

    `path=None` remembers nothing over a restart. A file that cannot be read or written costs a log line, not the
    service: it is only a memory of what the servers say anyway.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._profiles = {} if self._path is None else _read(self._path)

    def get(self, url: str) -> dict[str, str] | None:
        """The keywords last stored for the server."""
        return self._profiles.get(url)

    def put(self, url: str, keywords: Mapping[str, str]) -> None:
        """Remember a server's keywords."""
        if self._profiles.get(url) == keywords:
            return
        self._profiles[url] = dict(keywords)
        if self._path is not None:
            written = _read(self._path)  # other workers write it too
            if written.get(url) == keywords:
                return
            try:
                _replace(self._path, json.dumps({**written, url: dict(keywords)}, indent=1, sort_keys=True))
            except OSError as error:
                log.warning("profiles_not_written", file=str(self._path), error=str(error))


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("profiles_not_read", file=str(path), error=str(error))
        return {}
    if not isinstance(found, dict):
        log.warning("profiles_not_read", file=str(path), error="not an object of servers")
        return {}
    return {
        url: {str(keyword): str(parameters) for keyword, parameters in keywords.items()}
        for url, keywords in found.items()
        if isinstance(keywords, dict)
    }


def _replace(path: Path, text: str) -> None:
    """Write beside the file and rename over it, so that a reader or a crash meets the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
