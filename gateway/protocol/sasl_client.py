"""The client's SASL messages, for when the gateway logs in to an upstream; all before base64."""

from __future__ import annotations

import re
from typing import Final

from gateway.protocol.errors import LocalError

_VISIBLE: Final = re.compile(r"[!-~]+")
_NOT_IN_NAME: Final = re.compile("[\x00-\x1f\x7f]")


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


def client_xoauth2(user: str, token: str) -> bytes:
    """Return XOAUTH2's only message (Google's form). Raises `LocalError` for what it cannot carry."""
    _check(user, token)
    if not user:
        raise LocalError("XOAUTH2 cannot carry an empty user name")
    return f"user={user}\x01auth=Bearer {token}\x01\x01".encode()


def client_oauthbearer(user: str, token: str, host: str, port: int) -> bytes:
    """Return OAUTHBEARER's only message (RFC 7628 section 3.1); "" as `user` leaves that to the token.

    `host` and `port` are the server's as the client sees it. Raises `LocalError` for what it cannot carry.
    """
    _check(user, token)
    if not _VISIBLE.fullmatch(host) or not 0 < port < 65536:
        raise LocalError("OAUTHBEARER cannot carry this host or port")
    name = user.replace("=", "=3D").replace(",", "=2C")
    authzid = f"a={name}" if user else ""
    return f"n,{authzid},\x01host={host}\x01port={port}\x01auth=Bearer {token}\x01\x01".encode()


def _check(user: str, token: str) -> None:
    if _NOT_IN_NAME.search(user) or not _VISIBLE.fullmatch(token):
        raise LocalError("control characters in a user name, or not a token")
