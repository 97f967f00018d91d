"""Who logs in, seen from beside: an exchange that the gateway passes on between a client and a server."""

from __future__ import annotations

import re
from typing import Final

from gateway.protocol.errors import PeerError
from gateway.protocol.sasl_messages import DIGEST, read_oauth_pairs, read_saslname, read_text

_SCRAM_FIRST: Final = re.compile(rb"(?:[ny]|p=[A-Za-z0-9.-]+),(?:a=[^,]*)?,n=([^,]+),r=[^,]+(?:,.*)?", re.DOTALL)
_GS2_AUTHZID: Final = re.compile(rb"(?:[ny]|p=[A-Za-z0-9.-]+),a=([^,]+),\x01", re.DOTALL)


class Observer:
    """Learns the user name from the client's messages. Give it each; it judges none and never raises.

    `user` is the name that the proof belongs to (the authcid), "" while it is unknown, malformed or the mechanism does
    not tell. EXTERNAL and OAUTHBEARER only name whom the client wants to be. It is what the client claims, and
    true only if the server accepts.
    """

    __slots__ = ("_messages", "mechanism", "user")

    def __init__(self, mechanism: str) -> None:
        self.mechanism = mechanism.upper()
        self.user = ""
        self._messages = 0

    def message(self, data: bytes) -> None:
        """Take the client's next message, decoded from base64; the initial response is the first."""
        self._messages += 1
        if self.user:
            return
        try:
            self.user = read_text(self._name(data), "user name", empty=True)
        except PeerError:
            self.user = ""

    def _name(self, data: bytes) -> bytes:
        match self.mechanism:
            case "PLAIN":
                parts = data.split(b"\0")
                return parts[1] if len(parts) == 3 else b""
            case "LOGIN" | "EXTERNAL":
                # LOGIN's second message is the password, whatever the first one was
                return data if self._messages == 1 else b""
            case "CRAM-MD5":
                user, _, digest = data.rpartition(b" ")
                return user if DIGEST.fullmatch(digest) else b""
            case "XOAUTH2":
                return read_oauth_pairs(data).get(b"user", b"")
            case "OAUTHBEARER":
                match = _GS2_AUTHZID.match(data)
            case name if name.startswith("SCRAM-"):
                match = _SCRAM_FIRST.fullmatch(data)
            case _:
                match = None
        return read_saslname(match[1]) if match else b""
