from __future__ import annotations

import datetime
import hashlib
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from gateway import Authenticated, Cause, Certificate, Listener, Password, Refuse, Session
from gateway.relay.tls import TlsInfo
from stages.auth_certificate import AuthCertificate, AuthCertificateSettings


def make_certificate(emails: tuple[str, ...] = (), name: str = "") -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=3650))
    )
    if emails:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.RFC822Name(e) for e in emails]), False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


ALICE = make_certificate(("Alice@example.org", "sales@example.org"), "alice")
NOBODY = make_certificate()
NO_VERSION = ALICE.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x09", 1)  # there are 0 to 2


def make_session(certificate: bytes | None, verified: bool = True) -> Session:
    session = Session("ID", "p", Listener("smtps://198.51.100.25:465"), ("192.0.2.7", 1), ("198.51.100.25", 465), 0.0)
    error = "" if verified else "self-signed certificate"
    session.tls = TlsInfo("TLSv1.3", "x", 256, None, None, verified, error, certificate, False)
    return session


def make_stage(**settings: object) -> AuthCertificate:
    stage = AuthCertificate(AuthCertificateSettings.model_validate(settings))
    stage.id = "auth_certificate"
    return stage


def external(authzid: str = "") -> SimpleNamespace:
    return SimpleNamespace(credentials=Certificate(authzid), number=1)


FINGERPRINT = hashlib.sha256(ALICE).hexdigest()
COLONS = hashlib.sha256(ALICE).digest().hex(":").upper()


@pytest.mark.parametrize(
    ("settings", "authzid", "user"),
    [
        ({}, "", "Alice@example.org"),
        ({}, "alice@EXAMPLE.org", "Alice@example.org"),
        ({}, "sales@example.org", "sales@example.org"),
        ({}, "root@example.org", None),
        ({"user": "common_name"}, "", "alice"),
        ({"user": "common_name"}, "bob", None),
        ({"user": "fingerprint", "fingerprints": {FINGERPRINT: "relay"}}, "", "relay"),
        ({"user": "fingerprint", "fingerprints": {COLONS: "r"}}, "r", "r"),
        ({"user": "fingerprint", "fingerprints": {"0" * 64: "relay"}}, "", None),
    ],
)
def test_users(settings: dict[str, object], authzid: str, user: str | None) -> None:
    verdict = make_stage(**settings).auth(make_session(ALICE), external(authzid))
    if user is None:
        assert isinstance(verdict, Refuse) and verdict.cause is Cause.AUTH_FAILED
    else:
        assert verdict == Authenticated(user)


@pytest.mark.parametrize(
    ("certificate", "verified"),
    [(ALICE, False), (None, False), (NOBODY, True), (b"\x30garbage", True), (NO_VERSION, True)],
)
def test_what_is_no_proof(certificate: bytes | None, verified: bool) -> None:
    assert isinstance(make_stage().auth(make_session(certificate, verified), external()), Refuse)
    assert isinstance(make_stage(user="common_name").auth(make_session(certificate, verified), external()), Refuse)


def test_offered_only_with_a_verified_certificate() -> None:
    stage = make_stage()
    assert stage.mechanisms(make_session(ALICE)) == ("EXTERNAL",)
    assert stage.mechanisms(make_session(ALICE, verified=False)) == ()
    clear = make_session(ALICE)
    clear.tls = None
    assert stage.mechanisms(clear) == ()
    assert isinstance(stage.auth(clear, external()), Refuse)
    assert stage.required


def test_passwords_are_for_others() -> None:
    attempt = SimpleNamespace(credentials=Password("", "a", "b", "PLAIN"), number=1)
    assert make_stage().auth(make_session(ALICE), attempt) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"user": "fingerprint"},
        {"fingerprints": {"0" * 64: "x"}},
        {"user": "fingerprint", "fingerprints": {"a": "x"}},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AuthCertificateSettings.model_validate(settings)
