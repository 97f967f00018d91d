"""SASL: what a client proves itself with, and the few messages it takes to say it (RFC 4422).

An exchange is fed with the client's messages after base64 and gives challenges before base64, so SMTP, IMAP and POP3
share it. It ends in credentials, which somebody else verifies. Secrets never show in a `repr` or an error text.
"""

from __future__ import annotations

import binascii
import hmac
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from gateway.protocol.errors import LocalError, PeerError

MAX_BASE64: Final = 12288
"""Bytes of a base64 line (RFC 4954 section 4)."""

_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_DIGEST: Final = re.compile(rb"[0-9A-Fa-f]{32}")
_BEARER: Final = re.compile(rb"bearer +([!-~]+)", re.IGNORECASE)
_GS2: Final = re.compile(rb"[ny],(?:a=([^,\x00]+))?,")
_SASLNAME_ESCAPE: Final = re.compile(rb"=(2C|3D)?")


@dataclass(frozen=True, slots=True)
class Challenge:
    """What to send to the client, before base64; its decoded answer is the next step."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Password:
    """User and password as the client typed them (PLAIN, LOGIN); `authzid` is whom it wants to act for, mostly ""."""

    authzid: str
    user: str
    password: str = field(repr=False)
    mechanism: str


@dataclass(frozen=True, slots=True)
class Digest:
    """A CRAM-MD5 answer: `digest` is 32 lower-case hexadecimal digits over `challenge`, keyed by the password."""

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


Credentials: TypeAlias = Password | Digest | Token | Certificate


def _malformed(text: str) -> PeerError:
    return PeerError(f"SASL: {text}", b"501 5.5.2 Cannot decode response")


def _text(data: bytes, what: str, *, empty: bool = False) -> str:
    """Return a name as text: UTF-8 without control characters, which would end up in logs and headers."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise _malformed(f"{what} is not UTF-8") from None
    if _CONTROL.search(text) or not (text or empty):
        raise _malformed(f"{what} is empty or has control characters")
    return text


def _secret(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or "\0" in text:
        raise _malformed("password is empty, not UTF-8 or has a NUL")
    return text


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
            raise _malformed("PLAIN without exactly two NULs")
        authzid, user, password = parts
        return Password(_text(authzid, "authzid", empty=True), _text(user, "user name"), _secret(password), "PLAIN")


class _Login(ServerExchange):
    """LOGIN (draft-murchison-sasl-login); an initial response is the user name, as several clients send it."""

    __slots__ = ("_user",)

    def __init__(self) -> None:
        self._user: str | None = None

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if data is None:
            return Challenge(b"Username:")
        if self._user is None:
            self._user = _text(data, "user name")
            return Challenge(b"Password:")
        return Password("", self._user, _secret(data), "LOGIN")


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
        if not _DIGEST.fullmatch(digest):
            raise _malformed("CRAM-MD5 answer without digest")
        return Digest(_text(user, "user name"), self._challenge, digest.decode().lower())


class _External(ServerExchange):
    """RFC 4422 appendix A."""

    __slots__ = ()

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if data is None:
            return Challenge(b"")
        return Certificate(_text(data, "authzid", empty=True))


class _Xoauth2(ServerExchange):
    """Google's XOAUTH2: `user=NAME ^A auth=Bearer TOKEN ^A ^A`."""

    __slots__ = ()

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if data is None:
            return Challenge(b"")
        pairs = _oauth_pairs(data)
        return Token(_text(pairs.get(b"user", b""), "user name"), _bearer(pairs), "XOAUTH2")


class _OAuthBearer(ServerExchange):
    """RFC 7628: a GS2 header, then the same pairs. Channel binding (`p=`) cannot pass a gateway and is refused."""

    __slots__ = ()

    def step(self, data: bytes | None) -> Challenge | Credentials:
        if data is None:
            return Challenge(b"")
        header, _, rest = data.partition(b"\x01")
        match = _GS2.fullmatch(header)
        if match is None:
            raise _malformed("malformed GS2 header")
        user = _text(_SASLNAME_ESCAPE.sub(_saslname_character, match[1] or b""), "user name", empty=True)
        return Token(user, _bearer(_oauth_pairs(rest)), "OAUTHBEARER")


def _saslname_character(match: re.Match[bytes]) -> bytes:
    if match[1] is None:
        raise _malformed("lone = in user name")
    return b"," if match[1] == b"2C" else b"="


def _oauth_pairs(data: bytes) -> dict[bytes, bytes]:
    """Return the `key=value ^A` pairs of a message that a further ^A ends."""
    if not data.endswith(b"\x01\x01"):
        raise _malformed("OAuth message without its end")
    pairs: dict[bytes, bytes] = {}
    for pair in data[:-2].split(b"\x01"):
        key, equals, value = pair.partition(b"=")
        if not equals or not key.isalpha() or key in pairs:
            raise _malformed("malformed OAuth message")
        pairs[key] = value
    return pairs


def _bearer(pairs: dict[bytes, bytes]) -> str:
    match = _BEARER.fullmatch(pairs.get(b"auth", b""))
    if match is None:
        raise _malformed("OAuth message without bearer token")
    return match[1].decode()


MECHANISMS: Final = ("PLAIN", "LOGIN", "CRAM-MD5", "EXTERNAL", "XOAUTH2", "OAUTHBEARER")
"""The mechanisms that `server` knows."""

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
        raise _malformed("not base64") from None
    if binascii.b2a_base64(data, newline=False) != line:
        raise _malformed("not canonical base64")
    return data


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


def client_plain(user: str, password: str, authzid: str = "") -> bytes:
    """Return PLAIN's only message, before base64; raises `LocalError` for a NUL or an empty user name."""
    if not user or "\0" in user + password + authzid:
        raise LocalError("PLAIN cannot carry an empty user name or a NUL")
    return f"{authzid}\0{user}\0{password}".encode()


def client_login(user: str, password: str) -> tuple[bytes, bytes]:
    """Return LOGIN's two answers, before base64: to whatever the first and the second challenge say."""
    if not user:
        raise LocalError("LOGIN cannot carry an empty user name")
    return user.encode(), password.encode()


def verify_cram_md5(password: str, challenge: bytes, digest: str) -> bool:
    """Return whether `digest` (hexadecimal) was made with `password` over `challenge`, in constant time."""
    expected = hmac.digest(password.encode(), challenge, "md5").hex()
    return hmac.compare_digest(expected.encode(), digest.lower().encode())
