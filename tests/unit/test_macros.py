"""What filters are told beside the events: nothing a client wrote makes it fail, and no stranger's word is passed on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from gateway.macros import connect_macros, helo_macros, mail_macros
from gateway.testing.stages import TLS, make_session, make_transaction


def certificate() -> bytes:
    """A client's certificate, as it comes in the handshake."""
    leaf = trustme.CA(organization_name="Test").issue_cert("tim@example.org", common_name="Tim Tester")
    return x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes()).public_bytes(Encoding.DER)


def told(der: bytes | None) -> dict[str, str]:
    return helo_macros(make_session(tls=replace(TLS, certificate=der, verified=der is not None)))


def test_names_of_a_client_certificate() -> None:
    assert told(certificate())["cert_subject"] == "Tim Tester"
    assert told(certificate())["verify"] == "OK"
    assert (told(None)["cert_subject"], told(None)["verify"]) == ("", "NO")
    assert helo_macros(make_session()) == {}


def test_malformed_client_certificates_have_no_names() -> None:
    der = certificate()
    for broken in (b"", b"\0", b"no certificate", der[:-1], der[: len(der) // 2], der + b"\0", der[::-1]):
        assert (told(broken)["cert_subject"], told(broken)["cert_issuer"]) == ("", "")


def test_no_octet_of_a_client_certificate_makes_it_fail() -> None:
    der = bytearray(certificate())
    for place in range(len(der)):
        for flipped in (0x01, 0x80, 0xFF):
            der[place] ^= flipped
            assert set(told(bytes(der))) == set(told(None))
            der[place] ^= flipped


@pytest.mark.parametrize(
    ("user", "author", "shown"),
    [
        ("Tim@Example.org", "ann@example.org", "ann@example.org"),
        ("tim", "e+3Dmc2@example.com", "e+3Dmc2@example.com"),
        ("tim", "<>", ""),
        ("tim", None, ""),
        ("", "ann@example.org", ""),
        ("", "<>", ""),
    ],
)
def test_the_author_is_named_by_who_logged_in(user: str, author: str | None, shown: str) -> None:
    session = make_session(helo="client.example", user=user)
    macros = mail_macros(session, make_transaction(session, "a@example.org", (("SIZE", "1"), ("AUTH", author))))
    assert (macros["auth_author"], macros["auth_authen"]) == (shown, user)
    assert mail_macros(session, make_transaction(session, "a@example.org"))["auth_author"] == ""


def test_the_name_of_a_client_that_is_not_verified_is_no_name() -> None:
    macros = connect_macros(make_session(reverse_name="claims.example", name_status="unavailable"))
    assert (macros["client_name"], macros["client_ptr"]) == ("unknown", "claims.example")
    assert macros["_"] == "claims.example [192.0.2.1] (may be forged)"
