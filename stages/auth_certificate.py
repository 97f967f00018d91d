"""Take the user from a verified client certificate: AUTH EXTERNAL, without a password.

Offered only where the TLS handshake verified a certificate (`tls: {client_ca: ..., verify_client: optional}`);
asked in auth. Costs one parse of the certificate; it has no helper that could be down. The user is

- `email` (default): an e-mail address among the subject alternative names; several: the first, or the one the
  client names;
- `common_name`: the subject's common name;
- `fingerprint`: what `fingerprints` maps the SHA-256 of the certificate to.

The identity that a client may send along (RFC 4422 appendix A) must be empty or one of the certificate's own.

    stages:
      - auth_certificate
      - auth_certificate:
          user: fingerprint
          fingerprints: {"9f:86:d0:...:08": relay@example.org}
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gateway import Attempt, Authenticated, Cause, Certificate, Kind, Refuse, Session, Settings, Stage

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def _fingerprint(text: str) -> str:
    """Lower case without colons."""
    digits = text.replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(digits):
        raise ValueError("not the SHA-256 fingerprint of a certificate; write 64 hexadecimal digits")
    return digits


class AuthCertificateSettings(Settings):
    """Where the user stands in a certificate."""

    short_form: ClassVar[str | None] = "user"

    user: Literal["email", "common_name", "fingerprint"] = Field("email", description="Which part names the user.")
    fingerprints: Mapping[Annotated[str, AfterValidator(_fingerprint)], str] = Field(
        default_factory=dict, description="SHA-256 fingerprint of a certificate to user; for `user: fingerprint`."
    )
    required: bool = Field(True, description="MAIL before AUTH is 530.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.user == "fingerprint") != bool(self.fingerprints):
            raise ValueError("user: fingerprint and fingerprints go together")
        return self


class AuthCertificate(Stage):
    """Take the user from a verified client certificate."""

    Settings = AuthCertificateSettings
    kind = Kind.GUARD
    decides_identity = True
    never_pass = True
    settings: AuthCertificateSettings

    def __init__(self, settings: AuthCertificateSettings) -> None:
        super().__init__(settings)
        self.required = settings.required

    def mechanisms(self, session: Session) -> Sequence[str]:
        """EXTERNAL, where a certificate was verified."""
        return ("EXTERNAL",) if session.tls is not None and session.tls.verified else ()

    def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated | None:
        """The user of the certificate, if it has one and the client asks for no other."""
        given = attempt.credentials
        if not isinstance(given, Certificate):
            return None
        tls = session.tls
        if tls is None or not tls.verified or tls.certificate is None:
            return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: no verified client certificate")
        users = self._users(tls.certificate)
        if not users:
            return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: the certificate names no user ({self.settings.user})")
        if not given.authzid:
            return Authenticated(users[0])
        for user in users:
            if user.lower() == given.authzid.lower():
                return Authenticated(user)
        return Refuse(Cause.AUTH_FAILED, log=f"{self.id}: the certificate is not that user's")

    def _users(self, der: bytes) -> list[str]:
        if self.settings.user == "fingerprint":
            user = self.settings.fingerprints.get(hashlib.sha256(der).hexdigest())
            return [user] if user else []
        return _named(der, self.settings.user == "email")


def _named(der: bytes, email: bool) -> list[str]:
    """E-mail addresses or common names in a certificate, those without control characters; [] if it has none."""
    from cryptography import x509  # heavy: not for pipelines that only name this module

    try:
        certificate = x509.load_der_x509_certificate(der)
        if email:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            found = names.get_values_for_type(x509.RFC822Name)
        else:
            found = [
                value.value
                for value in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
                if isinstance(value.value, str)
            ]
    except (ValueError, x509.InvalidVersion, x509.ExtensionNotFound, x509.DuplicateExtension):
        return []
    return [name for name in found if name and name.isprintable()]
