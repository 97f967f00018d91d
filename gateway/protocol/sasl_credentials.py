"""What a SASL exchange ends in, and the proof of digests. Secrets never show in a `repr`."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Password:
    """User and password as the client typed them (PLAIN, LOGIN); `authzid` is whom it wants to act for, mostly ""."""

    authzid: str
    user: str
    password: str = field(repr=False)
    mechanism: str


@dataclass(frozen=True, slots=True)
class Digest:
    """An answer to a challenge, 32 lower-case hexadecimal digits, of CRAM-MD5 or of POP3's APOP.

    CRAM-MD5: over `challenge`, keyed by the password (RFC 2195). APOP: over `challenge` and password (RFC 1939).
    """

    user: str
    challenge: bytes
    digest: str = field(repr=False)
    mechanism: str = "CRAM-MD5"


@dataclass(frozen=True, slots=True)
class Token:
    """An OAuth 2.0 bearer token; `user` is "" where OAUTHBEARER leaves it to the token."""

    user: str
    token: str = field(repr=False)
    mechanism: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """EXTERNAL: the proof is the TLS client certificate; `authzid` is "" for "who the certificate says"."""

    authzid: str
    mechanism: str = "EXTERNAL"


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange that has only begun, for somebody else to lead: no one here has read what the client proves.

    `initial` is the decoded initial response, None without one.
    """

    mechanism: str
    initial: bytes | None = field(repr=False)


Credentials: TypeAlias = Password | Digest | Token | Certificate | Exchange


def verify_cram_md5(password: str, challenge: bytes, digest: str) -> bool:
    """Return whether `digest` (hexadecimal) was made with `password` over `challenge`, in constant time."""
    expected = hmac.digest(password.encode(), challenge, "md5").hex()
    return hmac.compare_digest(expected.encode(), digest.lower().encode())


def verify_apop(password: str, challenge: bytes, digest: str) -> bool:
    """Return whether `digest` (hexadecimal) is APOP's for `password` and `challenge`, in constant time (RFC 1939)."""
    expected = hashlib.md5(challenge + password.encode(), usedforsecurity=False).hexdigest()
    return hmac.compare_digest(expected.encode(), digest.lower().encode())
