"""Refuse what is asked for in clear text: AUTH, MAIL, or both; on request also clients without a certificate.

- `for: [mail]`: MAIL before STARTTLS is 530 5.7.0 (RFC 3207 4);
- `for: [auth]`: AUTH before STARTTLS is 530 5.7.0, and EHLO does not offer it;
- `client_certificate: required`: after the handshake a client whose certificate is missing or was not verified
  (`tls.client_ca`, `tls.verify_client` of the pipeline) gets 421 4.7.0 and is closed.

TLS does not go away once it is there, so that only the first MAIL is asked about and a session can be handed off after
it. Costs nothing; has no helper that could be down; cannot be told to fail open.

    stages:
      - require_tls                              # both
      - require_tls: {for: [auth]}
      - require_tls: {client_certificate: required}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from gateway import Cause, Kind, Refuse, Session, Settings, Stage


class RequireTlsSettings(Settings):
    """What needs TLS."""

    short_form: ClassVar[str | None] = "for"

    for_: frozenset[Literal["auth", "mail"]] = Field(
        frozenset({"auth", "mail"}), alias="for", min_length=1, description="Commands that need TLS: auth, mail."
    )
    client_certificate: Literal["ignored", "required"] = Field(
        "ignored", description="Whether the client must show a certificate that verifies."
    )


class RequireTls(Stage):
    """Refuse what is asked for in clear text: AUTH, MAIL, or both."""

    Settings = RequireTlsSettings
    kind = Kind.GUARD
    never_pass = True
    first_only: ClassVar[bool] = True  # what the first MAIL passed, no later one fails
    settings: RequireTlsSettings

    def phases(self) -> Sequence[str]:
        """Only what the settings name."""
        certificate = ["secure"] if self.settings.client_certificate == "required" else []
        return [*certificate, *(name for name in ("auth", "mail") if name in self.settings.for_)]

    def secure(self, session: Session) -> Refuse | None:
        """Refuse a client that did not prove who it is."""
        tls = session.tls
        if tls is None or tls.verified:
            return None
        return Refuse(
            Cause.CERTIFICATE_REQUIRED, disconnect=True, log=tls.verify_error or "the client showed no certificate"
        )

    def capabilities(self, session: Session, offer: dict[str, str]) -> None:
        """AUTH is not offered where it would be refused, nor are POP3's ways to log in."""
        if session.tls is None and "auth" in self.settings.for_:
            for keyword in ("AUTH", "SASL", "USER"):
                offer.pop(keyword, None)

    def auth(self, session: Session) -> Refuse | None:
        """Refuse AUTH in clear text, whoever it is."""
        return Refuse(Cause.TLS_REQUIRED) if session.tls is None else None

    def mail(self, session: Session) -> Refuse | None:
        """Refuse MAIL in clear text."""
        return Refuse(Cause.TLS_REQUIRED) if session.tls is None else None
