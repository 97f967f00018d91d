"""Log in at the upstream with AUTH PLAIN or LOGIN: as the client, or as a fixed user.

Asked once an upstream connection, at upstream_login; costs one round trip (LOGIN three). Passwords go out in clear
only over unix sockets and loopback; elsewhere the pool must use TLS, or the client is refused for now.

- `client`: the login and password of the client, as an auth stage gave them on (`Auth-User` and `Auth-Pass`
  included). The client's own AUTH is answered only after the upstream's answer: 535 where the upstream says 535,
  454 for everything else. A session without login stays without one here.
- `client` with `verify: upstream`: the same without any other auth stage: the upstream alone verifies.
- `user` and `password`: a fixed account. A refusal then is no word about the client: 451 4.3.5, with a log record.

    stages:
      - upstream_auth: client
      - upstream_auth: {credentials: client, verify: upstream}
      - upstream_auth: {user: gateway, password: "${UPSTREAM_PASSWORD}"}
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from gateway import (
    Attempt,
    Authenticated,
    Cause,
    Kind,
    Password,
    Peer,
    Refuse,
    Reply,
    Secret,
    Session,
    Settings,
    Stage,
)

MAX_LINE = 512  # RFC 4954 section 4: a longer initial response waits for the challenge


class UpstreamAuthSettings(Settings):
    """Whose credentials are used, and who verifies them."""

    short_form: ClassVar[str | None] = "credentials"

    credentials: Literal["client"] | None = Field(None, description="Log in with the client's own credentials.")
    user: str | None = Field(None, min_length=1, description="The fixed user.")
    password: Secret | None = Field(None, min_length=1, description="The fixed user's password.")
    verify: Literal["stage", "upstream"] = Field(
        "stage", description="Who verifies the client's login: a stage above, or the upstream alone."
    )
    required: bool = Field(True, description="With `verify: upstream`: MAIL before AUTH is 530.")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        fixed = self.user is not None and self.password is not None
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password go together")
        if fixed == (self.credentials is not None):
            raise ValueError("write either credentials: client, or user and password")
        if self.verify == "upstream" and fixed:
            raise ValueError("verify: upstream needs credentials: client")
        return self


class UpstreamAuth(Stage):
    """Log in at the upstream."""

    Settings = UpstreamAuthSettings
    kind = Kind.GUARD
    decides_identity = True
    never_pass = True
    timeout = 15.0
    settings: UpstreamAuthSettings

    def __init__(self, settings: UpstreamAuthSettings) -> None:
        super().__init__(settings)
        self.login_decides = settings.credentials == "client"
        self.own_credentials = not self.login_decides
        self._verifies = settings.verify == "upstream"
        self.required = self._verifies and settings.required

    def phases(self) -> Sequence[str]:
        """AUTH only where nobody else verifies."""
        return ("auth",) if self._verifies else ()

    def mechanisms(self, session: Session) -> Sequence[str]:
        """Those that give us the password."""
        return ("PLAIN", "LOGIN") if self._verifies else ()

    def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated | None:
        """Take the credentials as they are: the client's answer waits for the upstream's."""
        given = attempt.credentials
        if not isinstance(given, Password):
            return None
        if not given.user or not given.password or given.authzid not in ("", given.user):
            return Refuse(Cause.AUTH_FAILED)
        return Authenticated(given.user, password=given.password)

    async def upstream_login(self, session: Session, peer: Peer) -> Refuse | None:
        """AUTH PLAIN, or LOGIN where that is all there is."""
        if self.settings.credentials == "client":
            if not session.login:
                return None
            user, password = session.login, session.password
            if password is None:
                return self._unavailable(peer, "the login came without a password")
        else:
            assert self.settings.user is not None and self.settings.password is not None
            user, password = self.settings.user, self.settings.password.reveal()
        if "\0" in user or "\0" in password:
            # A NUL would end the field early in PLAIN: the upstream would read another user than was verified.
            return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: NUL in the credentials")
        if not (peer.tls or peer.local):
            return self._unavailable(peer, "is reached in clear text over the network; set tls: required on its pool")
        offered = peer.extensions.get("AUTH", "").upper().split()
        name, word = _bytes(user), _bytes(password)
        peer.identified()
        if "PLAIN" in offered:
            reply = await _plain(peer, name, word)
        elif "LOGIN" in offered:
            reply = await _login(peer, name, word)
        else:
            return self._unavailable(peer, "offers neither AUTH PLAIN nor LOGIN")
        return self._judged(peer, reply)

    def _judged(self, peer: Peer, reply: Reply) -> Refuse | None:
        """What the upstream's last reply means for the client."""
        if reply.code == 235:
            return None
        if reply.code == 535 and self.settings.credentials == "client":
            return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: {peer.url}: {reply.code} {reply.text}")
        return self._unavailable(peer, f"refused AUTH: {reply.code} {reply.text}")

    def _unavailable(self, peer: Peer, what: str) -> Refuse:
        cause = Cause.AUTH_UNAVAILABLE if self.login_decides else Cause.UPSTREAM_MISCONFIGURED
        return Refuse(cause, temporary=True, log=f"{self.id}: {peer.url} {what}")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


async def _plain(peer: Peer, user: bytes, password: bytes) -> Reply:
    """RFC 4616; the initial response goes along if it fits."""
    response = b64encode(b"\0" + user + b"\0" + password)
    line = b"AUTH PLAIN " + response
    if len(line) + 2 <= MAX_LINE:
        return await peer.command(line, secret=True)
    reply = await peer.command(b"AUTH PLAIN")
    return await peer.command(response, secret=True) if reply.code == 334 else reply


async def _login(peer: Peer, user: bytes, password: bytes) -> Reply:
    reply = await peer.command(b"AUTH LOGIN")
    for answer in (user, password):
        if reply.code != 334:
            break
        reply = await peer.command(b64encode(answer), secret=True)
    return reply
