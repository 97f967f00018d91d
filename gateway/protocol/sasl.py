"""SASL: what a client proves itself with, and the few messages it takes to say it (RFC 4422).

An exchange is fed with the client's messages after base64 and gives challenges before base64, so SMTP, IMAP and POP3
share it. It ends in credentials, which somebody else verifies. Secrets never show in a `repr` or an error text.
"""

from __future__ import annotations

import binascii
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.sasl_client import client_login, client_oauthbearer, client_plain, client_xoauth2
from gateway.protocol.sasl_credentials import (
    Certificate,
    Credentials,
    Digest,
    Exchange,
    Password,
    Token,
    verify_apop,
    verify_cram_md5,
)
from gateway.protocol.sasl_messages import (
    DIGEST,
    apop_credentials,
    malformed,
    password,
    read_bearer,
    read_oauth_pairs,
    read_saslname,
    read_secret,
    read_text,
)
from gateway.protocol.sasl_observer import Observer

__all__ = [
    "MAX_BASE64",
    "MECHANISMS",
    "Certificate",
    "Challenge",
    "Credentials",
    "Digest",
    "Exchange",
    "Observer",
    "Password",
    "ServerExchange",
    "Token",
    "apop_credentials",
    "client_login",
    "client_oauthbearer",
    "client_plain",
    "client_xoauth2",
    "decode_base64",
    "decode_initial",
    "encode_base64",
    "is_cancel",
    "oauth_error",
    "password",
    "server",
    "shows_secret",
    "verify_apop",
    "verify_cram_md5",
]

MAX_BASE64: Final = 12288
"""Bytes of a base64 line (RFC 4954 section 4)."""

_GS2: Final = re.compile(rb"[ny],(?:a=([^,\x00]+))?,")


@dataclass(frozen=True, slots=True)
class Challenge:
    """What to send to the client, before base64; its decoded answer is the next step."""

    data: bytes


class ServerExchange(ABC):
    """The server's side of one exchange. Feed `step` until it gives credentials, then drop it."""

    __slots__ = ()

    @abstractmethod
    def step(self, data: bytes | None) -> Challenge | Credentials:
        """Take the client's message, None only at the start and without initial response; give what follows.

        Raises `PeerError` with a 501 reply if the message is malformed.
        """


class _Plain(ServerExchange):
    """RFC 4616."""

    __slots__ = ()

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if data is None:
            return Challenge(b"")
        parts = data.split(b"\0")
        if len(parts) != 3:
            raise malformed("PLAIN without exactly two NULs")
        authzid, user, password = parts
        return Password(
            read_text(authzid, "authzid", empty=True), read_text(user, "user name"), read_secret(password), "PLAIN"
        )


class _Login(ServerExchange):
    """LOGIN (draft-murchison-sasl-login); an initial response is the user name, as several clients send it."""

    __slots__ = ("_user",)

    def __init__(self) -> None:
        self._user: str | None = None

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if data is None:
            return Challenge(b"Username:")
        if self._user is None:
            self._user = read_text(data, "user name")
            return Challenge(b"Password:")
        return Password("", self._user, read_secret(data), "LOGIN")


class _CramMd5(ServerExchange):
    """RFC 2195. The user name may hold spaces, so the digest is what stands behind the last one."""

    __slots__ = ("_asked", "_challenge")

    def __init__(self, challenge: bytes) -> None:
        self._challenge = challenge
        self._asked = False

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if not self._asked:
            if data is not None:
                # RFC 4954 section 4: the server speaks first
                raise PeerError("SASL: CRAM-MD5 with initial response", b"501 5.7.0 No initial response allowed")
            self._asked = True
            return Challenge(self._challenge)
        user, _, digest = (data or b"").rpartition(b" ")
        if not DIGEST.fullmatch(digest):
            raise malformed("CRAM-MD5 answer without digest")
        return Digest(read_text(user, "user name"), self._challenge, digest.decode().lower())


class _External(ServerExchange):
    """RFC 4422 appendix A."""

    __slots__ = ()

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if data is None:
            return Challenge(b"")
        return Certificate(read_text(data, "authzid", empty=True))


class _Xoauth2(ServerExchange):
    """Google's XOAUTH2: `user=NAME ^A auth=Bearer TOKEN ^A ^A`."""

    __slots__ = ()

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if data is None:
            return Challenge(b"")
        pairs = read_oauth_pairs(data)
        return Token(read_text(pairs.get(b"user", b""), "user name"), read_bearer(pairs), "XOAUTH2")


class _OAuthBearer(ServerExchange):
    """RFC 7628: a GS2 header, then the same pairs. Channel binding (`p=`) cannot pass a gateway and is refused."""

    __slots__ = ()

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if data is None:
            return Challenge(b"")
        header, _, rest = data.partition(b"\x01")
        match = _GS2.fullmatch(header)
        if match is None:
            raise malformed("malformed GS2 header")
        user = read_text(read_saslname(match[1] or b""), "user name", empty=True)
        return Token(user, read_bearer(read_oauth_pairs(rest)), "OAUTHBEARER")


MECHANISMS: Final = ("PLAIN", "LOGIN", "CRAM-MD5", "EXTERNAL", "XOAUTH2", "OAUTHBEARER")
"""The mechanisms that `server` knows."""

_PROVE: Final = ("SCRAM-", "CRAM-MD5", "DIGEST-MD5")

_CLIENT_ONLY: Final[dict[str, type[ServerExchange]]] = {
    "PLAIN": _Plain,
    "LOGIN": _Login,
    "EXTERNAL": _External,
    "XOAUTH2": _Xoauth2,
    "OAUTHBEARER": _OAuthBearer,
}


def server(mechanism: str, *, challenge_text: bytes) -> ServerExchange:
    """Return a fresh exchange for a mechanism, any case; raises `PeerError` (504 5.5.4) for one that is not known.

    `challenge_text` is CRAM-MD5's challenge, `<unique@host>`, and must differ in each exchange.
    """
    name = mechanism.upper()
    if name == "CRAM-MD5":
        return _CramMd5(challenge_text)
    if name not in _CLIENT_ONLY:
        raise PeerError("SASL: unknown mechanism", b"504 5.5.4 Unknown authentication mechanism")
    return _CLIENT_ONLY[name]()


def is_cancel(line: bytes) -> bool:
    """Return whether the client gives the exchange up (RFC 4954 section 4); the answer is 501 5.7.0."""
    return line == b"*"


def decode_base64(line: bytes, limit: int = MAX_BASE64) -> bytes:
    """Return the bytes behind a client's base64 line without CRLF, b"" for an empty one.

    Strict (RFC 4648 sections 3.1 to 3.5): no foreign character, full padding, no stray bits. Raises `PeerError`:
    500 5.5.6 for more than `limit` bytes, else 501 5.5.2.
    """
    if len(line) > limit:
        raise PeerError("SASL: line too long", b"500 5.5.6 Authentication exchange line is too long")
    try:
        data = binascii.a2b_base64(line, strict_mode=True)
    except ValueError:
        raise malformed("not base64") from None
    if binascii.b2a_base64(data, newline=False) != line:
        raise malformed("not canonical base64")
    return data


def shows_secret(mechanism: str) -> bool:
    """Whether the secret itself is, or may be, sent: all but the mechanisms known to prove that one has it."""
    return not mechanism.startswith(_PROVE)


def decode_initial(argument: bytes, limit: int = MAX_BASE64) -> bytes:
    """Return the initial response of an AUTH command, in which `=` stands for an empty one (RFC 4954 section 4)."""
    return b"" if argument == b"=" else decode_base64(argument, limit)


def encode_base64(data: bytes) -> bytes:
    """Return `data` as one base64 line without CRLF."""
    return binascii.b2a_base64(data, newline=False)


def oauth_error(mechanism: str) -> bytes:
    """Return the challenge that tells an OAuth client, before base64, why its token failed.

    Whatever line the client sends next, the exchange then fails (535). RFC 7628 section 3.2.2; XOAUTH2 has a form of
    its own. Raises `LocalError` for other mechanisms.
    """
    match mechanism.upper():
        case "XOAUTH2":
            return b'{"status":"401","schemes":"bearer","scope":"mail"}'
        case "OAUTHBEARER":
            return b'{"status":"invalid_token","scope":"mail"}'
        case _:
            raise LocalError("only OAuth mechanisms have an error challenge")
