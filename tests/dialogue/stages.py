"""Stages for transcripts: each says what its settings say, so that a transcript shows the frontend's part alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from gateway import (
    AddHeader,
    Allow,
    Attempt,
    Authenticated,
    Cause,
    Digest,
    Edit,
    Hold,
    Kind,
    Password,
    Phase,
    Recipient,
    Refuse,
    Reply,
    Rewrite,
    Session,
    Settings,
    Stage,
    Token,
    Transaction,
    Upstream,
)
from gateway.protocol.sasl import verify_apop, verify_cram_md5
from tests.dialogue.content_stages import Reads

EarlyPhase = Literal["connect", "secure", "greeting", "helo", "mail", "rcpt", "data"]
Said = Hold | Refuse | Allow | Rewrite | Edit | None


class SaysSettings(Settings):
    """In which phase, about whom, and what."""

    at: EarlyPhase
    only: str = ""  # a part of the address or name that is asked about
    refuse: str = ""  # the name of a cause
    text: str = ""
    temporary: bool | None = None
    disconnect: bool = False
    reply: str = ""  # a foreign reply
    hold: float = 0.0
    early: str = ""  # the cause for who talks during the hold
    allow: bool = False
    rewrite: str = ""
    header: str = ""
    fail: bool = False


class Says(Stage):
    """Gives one verdict in one phase."""

    Settings = SaysSettings
    kind = Kind.CHECK
    settings: SaysSettings

    def phases(self) -> Sequence[str]:
        return (self.settings.at,)

    def _say(self, about: str = "") -> Said:
        said = self.settings
        if said.only not in about:
            return None
        if said.fail:
            raise RuntimeError("as the transcript wants it")
        if said.hold:
            return Hold(said.hold, Refuse(Cause[said.early], disconnect=True) if said.early else None)
        if said.allow:
            return Allow("transcript")
        if said.rewrite:
            return Rewrite(said.rewrite)
        if said.header:
            name, _, value = said.header.partition(": ")
            return Edit([AddHeader(name, value)])
        reply = Reply.of(said.reply) if said.reply else None
        cause = Cause[said.refuse or "POLICY"]
        return Refuse(cause, said.text, said.temporary, reply=reply, disconnect=said.disconnect)

    def connect(self, session: Session) -> Hold | Refuse | Allow | None:
        return self._say(session.client.address)  # type: ignore[return-value]

    def secure(self, session: Session) -> Refuse | Allow | None:
        return self._say(session.client.address)  # type: ignore[return-value]

    def greeting(self, session: Session) -> Hold | Refuse | Allow | None:
        return self._say(session.client.address)  # type: ignore[return-value]

    def helo(self, session: Session, name: str) -> Hold | Refuse | Allow | None:
        return self._say(name)  # type: ignore[return-value]

    def mail(self, session: Session, transaction: Transaction) -> Said:
        return self._say(transaction.sender)

    def rcpt(self, session: Session, recipient: Recipient) -> Said:
        return self._say(recipient.address)

    def data(self, session: Session, transaction: Transaction) -> Hold | Refuse | Edit | None:
        return self._say(transaction.sender)  # type: ignore[return-value]


class GuardSays(Says):
    """The same as a guard: `Allow` does not skip it, and its refusals are never postponed."""

    kind = Kind.GUARD


class UsersSettings(Settings):
    """Who is known by which password or token."""

    short_form: ClassVar[str | None] = "users"

    users: Mapping[str, str]
    mechanisms: tuple[str, ...] = ("PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2", "OAUTHBEARER")
    required: bool = False
    unavailable: bool = False


class Users(Stage):
    """Knows users by their passwords and tokens, or cannot say."""

    Settings = UsersSettings
    kind = Kind.GUARD
    decides_identity = True
    never_pass = True
    settings: UsersSettings

    def __init__(self, settings: UsersSettings) -> None:
        super().__init__(settings)
        self.required = settings.required

    def mechanisms(self, session: Session) -> Sequence[str]:
        return self.settings.mechanisms

    def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated | None:
        if self.settings.unavailable:
            raise ConnectionRefusedError("the verifier is gone")
        given = attempt.credentials
        known = self.settings.users.get(getattr(given, "user", ""))
        match given:
            case Password():
                good = given.password == known
            case Digest():
                verify = verify_apop if given.mechanism == "APOP" else verify_cram_md5
                good = known is not None and verify(known, given.challenge, given.digest)
            case Token():
                good = given.token == known
            case _:
                return None
        if not good:
            return Refuse(Cause.AUTH_FAILED)
        password = known if isinstance(given, Digest) else getattr(given, "password", None)
        return Authenticated(given.user, password=password, token=getattr(given, "token", None))


class ByDomainSettings(Settings):
    """Pools, or URLs of servers, by the recipient's domain."""

    short_form: ClassVar[str | None] = "pools"

    pools: Mapping[str, str]


class ByDomain(Stage):
    """Routes by the recipient's domain."""

    Settings = ByDomainSettings
    kind = Kind.PLUMBING
    decides_identity = True
    settings: ByDomainSettings
    route_phase = Phase.RCPT

    def route(self, session: Session, recipient: Recipient | None) -> Upstream | None:
        pool = self.settings.pools.get(recipient.domain) if recipient is not None else None
        if pool is None:
            return None
        return Upstream(server=pool) if "://" in pool else Upstream(pool)


class LessSettings(Settings):
    """EHLO keywords to leave out."""

    short_form: ClassVar[str | None] = "keywords"

    keywords: tuple[str, ...]


class Less(Stage):
    """Removes keywords from the offer, and tries to add one."""

    Settings = LessSettings
    kind = Kind.PLUMBING
    settings: LessSettings

    def capabilities(self, session: Session, offer: dict[str, str]) -> None:
        for keyword in self.settings.keywords:
            offer.pop(keyword, None)
        offer["XNEW"] = ""


STAGES: dict[str, type[Stage]] = {
    "says": Says, "guard_says": GuardSays, "users": Users, "by_domain": ByDomain, "less": Less, "reads": Reads,
}  # fmt: skip
