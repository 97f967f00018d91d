"""Log in at the upstream (SMTP, IMAP, POP3): as the client, as the client through a master user, or as a fixed user.

Asked once an upstream connection, at upstream_login; costs one round trip (LOGIN three, POP3 two). Passwords and tokens
go out in clear only over unix sockets and loopback, or where the pool says `allow_plaintext_login`; elsewhere the pool
must use TLS, or the client is refused for now.

- `client`: the login and password of the client, as an auth stage gave them on (`Auth-User` and `Auth-Pass`
  included), or the OAuth token with which it came, by the same mechanism. The client's own AUTH is answered only after
  the upstream's answer: 535 where the upstream says 535 (NO, -ERR), 454 for everything else. A session without login
  stays without one here.
- `client` with `verify: upstream`: the same without any other auth stage: the upstream alone verifies.
- `master`: the client, whom an auth stage verified, with the password of a master user: PLAIN that names both, or where
  there is none a login as `user<separator>master`, which is how Dovecot has it. No password of the client's is needed.
- `user` and `password`: a fixed account. A refusal then is no word about the client: 451 4.3.5, with a log record.

Passwords go as the upstream announces: AUTH PLAIN, else LOGIN; IMAP's LOGIN, or AUTHENTICATE PLAIN where that is
disabled; USER and PASS, or AUTH PLAIN where there is no USER. Mail stores do not need this stage for the client's own
login: where no stage logs in, the gateway does.

    stages:
      - upstream_auth: client
      - upstream_auth: {credentials: client, verify: upstream}
      - upstream_auth: {master: {user: proxy, password: "${MASTER_PASSWORD}"}}
      - upstream_auth: {user: gateway, password: "${UPSTREAM_PASSWORD}"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    SaslStep,
    Secret,
    Session,
    Settings,
    Stage,
    Token,
)
from gateway.protocol import sasl
from gateway.protocol.errors import LocalError

OAUTH = ("XOAUTH2", "OAUTHBEARER")
PASSWORDS = ("PLAIN", "LOGIN")
NO_VERDICT = (b"[PRIVACYREQUIRED]", b"[SYS/PERM]", b"[CONTACTADMIN]")  # RFC 5530, RFC 3206


class MasterUser(Settings):
    """A user who may log in as everybody."""

    user: str = Field(min_length=1, description="The master user.")
    password: Secret = Field(min_length=1, description="The master user's password.")
    separator: str = Field(
        "*", min_length=1, max_length=1, description="Between user and master where PLAIN is not to be had."
    )


class UpstreamAuthSettings(Settings):
    """Whose credentials are used, and who verifies them."""

    short_form: ClassVar[str | None] = "credentials"

    credentials: Literal["client"] | None = Field(None, description="Log in with the client's own credentials.")
    user: str | None = Field(None, min_length=1, description="The fixed user.")
    password: Secret | None = Field(None, min_length=1, description="The fixed user's password.")
    master: MasterUser | None = Field(None, description="Log in as the client, with a master user's password.")
    verify: Literal["stage", "upstream"] = Field(
        "stage", description="Who verifies the client's login: a stage above, or the upstream alone."
    )
    mechanisms: tuple[Literal["PLAIN", "LOGIN", "XOAUTH2", "OAUTHBEARER"], ...] | None = Field(
        None,
        min_length=1,
        description="With `verify: upstream`: what clients may use. By default PLAIN and LOGIN, and the OAuth "
        "mechanisms that the upstream announces.",
    )
    required: bool = Field(True, description="With `verify: upstream`: MAIL before AUTH is 530.")
    if_missing: Literal["tempfail", "send"] = Field(
        "tempfail", description="When the upstream does not announce what is needed: refuse for now, or try anyway."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        fixed = self.user is not None and self.password is not None
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password go together")
        if fixed == (self.credentials is not None or self.master is not None):
            raise ValueError("write one of credentials: client, master, or user and password")
        if self.verify == "upstream" and fixed:
            raise ValueError("verify: upstream needs credentials: client")
        if self.verify == "upstream" and self.master is not None:
            raise ValueError("with master the upstream does not verify clients: an auth stage has to")
        if self.mechanisms is not None and self.verify == "stage":
            raise ValueError("mechanisms are for verify: upstream; otherwise the auth stage has them")
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
        self.login_decides = settings.user is None
        self.own_credentials = not self.login_decides
        self._verifies = settings.verify == "upstream"
        self.required = self._verifies and settings.required

    def phases(self) -> Sequence[str]:
        """AUTH only where nobody else verifies."""
        return ("auth",) if self._verifies else ()

    def mechanisms(self, session: Session) -> Sequence[str]:
        """Those that give us the password or the token."""
        if not self._verifies:
            return ()
        if self.settings.mechanisms is not None:
            return self.settings.mechanisms
        announced = _announced(session.protocol, session.upstream_offer)
        return (*PASSWORDS, *(name for name in OAUTH if name in announced))

    def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated | None:
        """Take the credentials as they are: the client's answer waits for the upstream's."""
        given = attempt.credentials
        if isinstance(given, Token):
            # Whoever leaves the user to the token (OAUTHBEARER) has no name that could be shown.
            return Authenticated(given.user, token=given.token) if given.user else Refuse(Cause.AUTH_FAILED)
        if not isinstance(given, Password):
            return None
        if not given.user or not given.password or given.authzid not in ("", given.user):
            return Refuse(Cause.AUTH_FAILED)
        return Authenticated(given.user, password=given.password)

    async def upstream_login(self, session: Session, peer: Peer) -> Refuse | None:
        """Say the credentials as the upstream announces it."""
        settings = self.settings
        if settings.user is None:
            if not session.login:
                return None
            if settings.master is None and session.password is None and session.token is None:
                return self._unavailable(peer, "the login came without a password")
        if not peer.takes_secrets:
            return self._unavailable(peer, "is reached in clear text over the network; set tls: required on its pool")
        try:
            reply = await self._log_in(session, peer)
        except LocalError as error:
            # A NUL or line end would make it another login, or another command, than was verified.
            return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: {error}")
        if reply is None:
            return self._unavailable(peer, "does not announce a mechanism that would do")
        return self._judged(peer, reply)

    async def _log_in(self, session: Session, peer: Peer) -> Reply | None:
        """The upstream's word; None where it announces nothing that would do. Raises LocalError."""
        settings = self.settings
        if settings.master is not None:
            return await self._as_master(session.login, settings.master, peer)
        if settings.user is not None and settings.password is not None:
            return await self._with_password(settings.user, settings.password.reveal(), peer)
        if session.token is not None:
            return await self._with_token(session, session.token, peer)
        assert session.password is not None
        return await self._with_password(session.login, session.password, peer)

    async def _with_password(self, user: str, password: str, peer: Peer) -> Reply | None:
        name, word = _bytes(user), _bytes(password)
        _check(name, word)
        peer.identified()
        reply = await peer.login(name, word)
        if reply.code != 504 or peer.logged_in:
            return reply
        if self.settings.if_missing != "send":
            return None
        return await _ended(peer, await peer.sasl("PLAIN", b"\0" + name + b"\0" + word))

    async def _with_token(self, session: Session, token: str, peer: Peer) -> Reply | None:
        """The client's own mechanism; an error challenge wants an answer before the refusal (RFC 7628 3.2.3)."""
        mechanism = session.auth_mechanism if session.auth_mechanism in OAUTH else "XOAUTH2"
        if mechanism not in _announced(peer.protocol, peer.extensions) and self.settings.if_missing != "send":
            return None
        if mechanism == "OAUTHBEARER":
            host, port = peer.address if peer.address[1] else ("localhost", 1)  # a unix socket has neither
            message = sasl.client_oauthbearer(session.login, token, host, port)
        else:
            message = sasl.client_xoauth2(session.login, token)
        peer.identified()
        step = await peer.sasl(mechanism, message)
        if step.reply is None:
            step = await peer.sasl_answer(b"\x01" if mechanism == "OAUTHBEARER" else b"")
        return await _ended(peer, step)

    async def _as_master(self, user: str, master: MasterUser, peer: Peer) -> Reply | None:
        """PLAIN with the client as authzid (RFC 4616), else the two names in one."""
        name, secret = _bytes(master.user), _bytes(master.password.reveal())
        _check(_bytes(user), name, secret)
        if "PLAIN" in _announced(peer.protocol, peer.extensions):
            peer.identified()
            return await _ended(peer, await peer.sasl("PLAIN", _bytes(user) + b"\0" + name + b"\0" + secret))
        if master.separator in user:
            # The part behind it would be taken for a master user.
            raise LocalError("the user name holds the separator of master users")
        return await self._with_password(user + master.separator + master.user, master.password.reveal(), peer)

    def _judged(self, peer: Peer, reply: Reply) -> Refuse | None:
        """What the upstream's last reply means for the client."""
        if reply.reply_class == 2 and peer.logged_in:
            return None
        verdict = reply.code == 535 or (reply.code == 550 and peer.protocol in ("imap", "pop3"))  # NO, -ERR
        if reply.lines[0].upper().startswith(NO_VERDICT) or self.settings.master is not None:
            verdict = False
        if verdict and not self.own_credentials:
            return Refuse(Cause.AUTH_FAILED, reply=reply, log=f"{self.id}: {peer.url}: {reply.code} {reply.text}")
        return self._unavailable(peer, f"refused the login: {reply.code} {reply.text}", reply)

    def _unavailable(self, peer: Peer, what: str, reply: Reply | None = None) -> Refuse:
        log = f"{self.id}: {peer.url} {what}"
        if self.own_credentials:
            return Refuse(Cause.UPSTREAM_MISCONFIGURED, temporary=True, log=log)
        return Refuse(Cause.AUTH_UNAVAILABLE, temporary=True, reply=reply, log=log)


def _announced(protocol: str, extensions: Mapping[str, str]) -> list[str]:
    return extensions.get("SASL" if protocol == "pop3" else "AUTH", "").upper().split()


async def _ended(peer: Peer, step: SaslStep) -> Reply:
    """The reply that ends an exchange which has nothing more to say."""
    if step.reply is None:
        step = await peer.sasl_cancel()
    return step.reply or Reply.of("454 4.7.0 the exchange does not end")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _check(*values: bytes) -> None:
    """Raises LocalError, whose text holds nothing of them."""
    if any(octet in value for value in values for octet in (b"\r", b"\n", b"\0")):
        raise LocalError("CR, LF or NUL in the credentials")
