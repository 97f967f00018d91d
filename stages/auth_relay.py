"""Leave AUTH to the upstream: announce its mechanisms, relay the exchange line by line, pass on what it decides.

For the commonest first set-up: Postfix or Dovecot does AUTH, and limits stand in front. Asked at each login; the
upstream is opened then, told who the client is (`xclient`, `proxy_header`), and kept: whoever is logged in there goes
on with this connection. It cannot be replaced by another one, so that an upstream that leaves ends the session.

Announced are the upstream's mechanisms without

- those that are bound to a connection or prove something of the gateway instead of the client: `*-PLUS` (channel
  binding), GSSAPI, GSS-SPNEGO, KERBEROS_V4, NTLM, EXTERNAL, ANONYMOUS;
- in clear text, those that carry passwords or tokens (all but SCRAM-*, CRAM-MD5 and DIGEST-MD5), unless the pipeline
  says `allow_plaintext_auth`.

Success and failure pass as they are. `auth.user` is known where the mechanism shows it (PLAIN, LOGIN, CRAM-MD5,
SCRAM-*, XOAUTH2, OAUTHBEARER with a=), else it is `[unknown]`. When the upstream is away the client gets 454,
`NO [UNAVAILABLE]` or `-ERR [SYS/TEMP]`. Passwords and tokens are relayed in clear text only over unix sockets,
loopback, or where the pool says `allow_plaintext_login`.

    stages:
      - rate_limit: {count: auth_failures, per: client.network, limit: 10/minute}
      - auth_relay
      - xclient
      - splice: postfix
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from gateway import (
    Attempt,
    Authenticated,
    Cause,
    Exchange,
    Kind,
    Password,
    Peer,
    Refuse,
    Reply,
    SaslStep,
    Session,
    Settings,
    Stage,
)
from gateway.protocol import sasl
from gateway.protocol.errors import LocalError, PeerError

UNKNOWN = "[unknown]"
PASSWORDS = frozenset(("PLAIN", "LOGIN"))
RELAYED = frozenset(
    ("PLAIN", "LOGIN", "CRAM-MD5", "DIGEST-MD5", "SCRAM-SHA-1", "SCRAM-SHA-256", "SCRAM-SHA-512", "XOAUTH2",
     "OAUTHBEARER", "OTP")
)  # fmt: skip
NEVER = frozenset(("GSSAPI", "GSS-SPNEGO", "KERBEROS_V4", "NTLM", "EXTERNAL", "ANONYMOUS"))


def _known(name: str) -> str:
    if name.upper() not in RELAYED:
        raise ValueError(f"not a mechanism that can be relayed; write {', '.join(sorted(RELAYED))}")
    return name.upper()


class AuthRelaySettings(Settings):
    """Which of the upstream's mechanisms are for clients."""

    short_form: ClassVar[str | None] = "mechanisms"

    mechanisms: tuple[Annotated[str, AfterValidator(_known)], ...] | None = Field(
        None, min_length=1, description="Only these of the upstream's mechanisms; all that can be relayed by default."
    )
    required: bool = Field(True, description="MAIL before AUTH is 530.")


class AuthRelay(Stage):
    """Leave AUTH to the upstream."""

    Settings = AuthRelaySettings
    kind = Kind.GUARD
    decides_identity = True
    never_pass = True
    relays_logins = True
    timeout = 30.0  # the upstream's part; the client's own time does not count
    settings: AuthRelaySettings

    def __init__(self, settings: AuthRelaySettings) -> None:
        super().__init__(settings)
        self.required = settings.required
        self._only = None if settings.mechanisms is None else frozenset(settings.mechanisms)

    def mechanisms(self, session: Session) -> Sequence[str]:
        """The upstream's, as far as they can be relayed; a store that names none has LOGIN or USER."""
        offer = session.upstream_offer
        announced = offer.get("SASL" if session.protocol == "pop3" else "AUTH", "").upper().split()
        if not announced and session.protocol in ("imap", "pop3") and "LOGINDISABLED" not in offer:
            announced = ["PLAIN"]
        return tuple(
            name
            for name in announced
            if name not in NEVER and not name.endswith("-PLUS") and (self._only is None or name in self._only)
        )

    async def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated | None:
        """Relay the exchange to the upstream."""
        given = attempt.credentials
        if not isinstance(given, (Exchange, Password)):
            return None
        if isinstance(given, Password) and PASSWORDS.isdisjoint(self.mechanisms(session)):
            return None  # another stage's mechanism
        peer = await attempt.open_upstream()
        if isinstance(peer, Refuse):
            if peer.reply is not None:
                return peer
            log = peer.log or peer.cause.value
            return Refuse(Cause.AUTH_UNAVAILABLE, temporary=True, disconnect=peer.disconnect, log=log)
        if sasl.shows_secret(given.mechanism) and not peer.takes_secrets:
            what = "is reached in clear text over the network; set tls: required on its pool"
            return Refuse(Cause.UPSTREAM_MISCONFIGURED, temporary=True, log=f"{self.id}: {peer.url} {what}")
        if isinstance(given, Password):
            if given.authzid not in ("", given.user):
                return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: no user may act for another")
            try:
                reply = await _log_in(peer, given)
            except LocalError as error:  # CR, LF, NUL: nobody's password, and another command if it were sent
                return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: {error}")
            return self._judged(peer, given.user, reply)
        observer = sasl.Observer(given.mechanism)
        reply = await _relayed(peer, given, attempt, observer)
        attempt.user = observer.user
        return self._judged(peer, observer.user, reply)

    def _judged(self, peer: Peer, user: str, reply: Reply) -> Refuse | Authenticated:
        if reply.reply_class == 2 and peer.logged_in:
            return Authenticated(user or UNKNOWN, reply=reply)
        if reply.code < 400:  # no answer to AUTH, but the client would go on
            log = f"{self.id}: {peer.url} answered {reply.code}"
            return Refuse(Cause.AUTH_UNAVAILABLE, temporary=True, log=log)
        cause = Cause.AUTH_FAILED if reply.code >= 500 else Cause.AUTH_UNAVAILABLE
        return Refuse(cause, temporary=reply.code < 500, reply=reply, log=f"{self.id}: {peer.url} said so")


async def _log_in(peer: Peer, given: Password) -> Reply:
    """LOGIN or USER and PASS of a store's client."""
    return await peer.login(given.user.encode(), given.password.encode())


async def _relayed(peer: Peer, given: Exchange, attempt: Attempt, observer: sasl.Observer) -> Reply:
    """The exchange, message by message, to its end; the client's cancel is the upstream's to answer."""
    if given.initial is not None:
        observer.message(given.initial)
    step: SaslStep = await peer.sasl(given.mechanism, given.initial)
    while step.reply is None:
        assert step.challenge is not None
        try:
            answer = await attempt.challenge(step.challenge)
        except PeerError:
            step = await peer.sasl_cancel()
            continue
        observer.message(answer)
        step = await peer.sasl_answer(answer)
    return step.reply
