"""Stored passwords in the common htpasswd, crypt(5) and Dovecot forms: read, verified, made.

Verifying is slow by intention (60 to 350 ms): call it in a thread.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, field

PLAIN = "plain"

# How a stored hash begins, and the verifier (a name of passlib.hash) that takes it.
_FORMS = {
    "$2a$": "bcrypt",
    "$2b$": "bcrypt",
    "$2y$": "bcrypt",
    "$argon2id$": "argon2",
    "$argon2i$": "argon2",
    "$6$": "sha512_crypt",
    "$5$": "sha256_crypt",
    "$1$": "md5_crypt",
    "$apr1$": "apr_md5_crypt",
    "{SSHA}": "ldap_salted_sha1",
    "{SSHA256}": "ldap_salted_sha256",
    "{SSHA512}": "ldap_salted_sha512",
    "{SHA}": "ldap_sha1",
}
# Dovecot's names for what the hash says of itself.
_SCHEME = re.compile(r"\{(?:CRYPT|BLF-CRYPT|SHA512-CRYPT|SHA256-CRYPT|MD5-CRYPT|ARGON2ID|ARGON2I)\}", re.IGNORECASE)
_IN_CLEAR = re.compile(r"\{(?:PLAIN|CLEARTEXT)\}", re.IGNORECASE)
_MADE = {"bcrypt": "bcrypt", "argon2": "argon2", "sha512-crypt": "sha512_crypt", "sha256-crypt": "sha256_crypt"}


@dataclass(frozen=True, slots=True)
class StoredPassword:
    """A stored password: the verifier's name, and the hash in its form (with PLAIN: the password)."""

    verifier: str
    hash: str = field(repr=False)


def hash_password(password: str, scheme: str = "bcrypt") -> str:
    """A hash for a users file. `scheme`: bcrypt, argon2, sha512-crypt or sha256-crypt.

    Raises ValueError for another scheme, and for a password that the scheme cannot take (bcrypt: over 72 octets).
    """
    if scheme not in _MADE:
        raise ValueError(f"unknown scheme {scheme!r}; known are {', '.join(_MADE)}")
    if scheme == "bcrypt" and len(password.encode()) > 72:
        raise ValueError("bcrypt looks at 72 octets only; choose argon2 for longer passwords")
    from passlib import hash as verifiers

    return str(getattr(verifiers, _MADE[scheme]).hash(password))


def verify_password(entry: StoredPassword, password: str) -> bool:
    """Whether the password is right. Slow: call it in a thread."""
    secret = password.encode("utf-8", "surrogateescape")
    if entry.verifier == PLAIN:
        return hmac.compare_digest(secret, entry.hash.encode("utf-8", "surrogateescape"))
    from passlib import hash as verifiers

    if entry.verifier == "bcrypt":
        secret = secret[:72]  # as htpasswd did when it made the hash
    try:
        return bool(getattr(verifiers, entry.verifier).verify(secret, entry.hash))
    except ValueError:  # a NUL, or more than the scheme takes: no hash was made of that
        return False


def parse_stored(stored: str) -> StoredPassword | None:
    """What stands behind the colon in a users file (htpasswd, crypt(5) and Dovecot's forms); None for no known form."""
    in_clear = _IN_CLEAR.match(stored)
    if in_clear is not None:
        password = stored[in_clear.end() :]
        return StoredPassword(PLAIN, password) if password else None
    hashed = _SCHEME.sub("", stored, count=1).partition(":")[0].strip()
    if hashed.startswith("{"):
        scheme, brace, rest = hashed.partition("}")
        hashed = scheme.upper() + brace + rest
    for prefix, verifier in _FORMS.items():
        if hashed.startswith(prefix):
            return StoredPassword(verifier, hashed)
    return None
