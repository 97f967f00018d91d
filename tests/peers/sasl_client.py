"""SASL mechanisms as clients speak them, for the `authenticate` and `auth` of Python's imaplib and smtplib, and for POP3.

    connection.authenticate("SCRAM-SHA-256", client("SCRAM-SHA-256", user))

A client is called with each decoded challenge (the first is empty where it begins itself) and returns its response.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import poplib
import secrets
from collections.abc import Callable

from tests.peers.dovecot_store import User

Client = Callable[[bytes], bytes]
MECHANISMS = ("PLAIN", "LOGIN", "CRAM-MD5", "SCRAM-SHA-256", "XOAUTH2", "OAUTHBEARER")


class Scram:
    """SCRAM-SHA-256 without channel binding (RFC 5802, RFC 7677); verifies that the server knows the password too."""

    def __init__(self, user: User) -> None:
        self._user = user
        self._nonce = secrets.token_hex(16)
        self._name = user.name.replace("=", "=3D").replace(",", "=2C")
        self._server_signature = b""

    def __call__(self, challenge: bytes) -> bytes:
        """The next message. Raises AssertionError for a server that is none of ours."""
        first = f"n={self._name},r={self._nonce}"
        if not challenge:
            return f"n,,{first}".encode()
        values = dict(part.split("=", 1) for part in challenge.decode().split(","))
        if "v" in values:
            assert base64.b64decode(values["v"]) == self._server_signature
            return b""
        assert values["r"].startswith(self._nonce)
        return self._proof(first, challenge.decode(), values)

    def _proof(self, first: str, server_first: str, values: dict[str, str]) -> bytes:
        salt, count = base64.b64decode(values["s"]), int(values["i"])
        salted = hashlib.pbkdf2_hmac("sha256", self._user.password.encode(), salt, count)
        without_proof = f"c=biws,r={values['r']}"
        message = ",".join((first, server_first, without_proof)).encode()
        key = _mac(salted, b"Client Key")
        signature = _mac(hashlib.sha256(key).digest(), message)
        self._server_signature = _mac(_mac(salted, b"Server Key"), message)
        proof = base64.b64encode(bytes(a ^ b for a, b in zip(key, signature, strict=True)))
        return f"{without_proof},p={proof.decode()}".encode()


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, "sha256").digest()


def client(mechanism: str, user: User, *, authzid: str = "") -> Client:
    """A client of one exchange."""
    match mechanism:
        case "PLAIN":
            return lambda challenge: f"{authzid}\0{user.name}\0{user.password}".encode()
        case "LOGIN":
            answers = iter((user.name, user.password))
            return lambda challenge: next(answers).encode()
        case "CRAM-MD5":
            return lambda challenge: (
                f"{user.name} {hmac.new(user.password.encode(), challenge, 'md5').hexdigest()}".encode()
            )
        case "SCRAM-SHA-256":
            return Scram(user)
        case "XOAUTH2":
            first = f"user={user.name}\1auth=Bearer {user.token}\1\1"
        case "OAUTHBEARER":
            first = f"n,a={user.name},\1host=localhost\1port=1\1auth=Bearer {user.token}\1\1"
        case _:
            raise ValueError(mechanism)
    # A second challenge is an error's description; an empty answer (for OAUTHBEARER: ^A) asks for the failure.
    again = b"" if mechanism == "XOAUTH2" else b"\1"
    return lambda challenge: again if challenge else first.encode()


def pop3_auth(connection: poplib.POP3, mechanism: str, say: Client) -> bytes:
    """AUTH (RFC 5034): the last reply. Raises poplib.error_proto for -ERR."""
    reply: bytes = connection._shortcmd(f"AUTH {mechanism}")  # type: ignore[attr-defined]
    while reply.startswith(b"+ "):
        response = say(base64.b64decode(reply[2:]))
        reply = connection._shortcmd(base64.b64encode(response).decode())  # type: ignore[attr-defined]
    return reply
