"""SASL from the client's side, APOP, and names for what comes without an exchange."""

from __future__ import annotations

from base64 import b64decode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import sasl
from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.sasl import Digest, Exchange, Password, Token

TIMESTAMP = b"<1896.697170952@dbc.mtview.ca.us>"
DIGEST = "c4c9334bac560ecc979e58001b3e22fb"


def test_oauth_messages() -> None:
    xoauth2 = b64decode("dXNlcj10aW1AYi5leGFtcGxlAWF1dGg9QmVhcmVyIGFiYy5kZWYBAQ==")
    assert sasl.client_xoauth2("tim@b.example", "abc.def") == xoauth2
    bearer = b"n,a=tim@b.example,\x01host=mx.example\x01port=587\x01auth=Bearer abc.def\x01\x01"
    assert sasl.client_oauthbearer("tim@b.example", "abc.def", "mx.example", 587) == bearer
    nobody = b"n,,\x01host=::1\x01port=143\x01auth=Bearer t\x01\x01"
    assert sasl.client_oauthbearer("", "t", "::1", 143) == nobody


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=20)
TOKENS = st.from_regex("[!-~]{1,20}", fullmatch=True)


@given(NAMES, TOKENS)
def test_what_our_client_says_our_server_reads(user: str, token: str) -> None:
    for mechanism, message in (
        ("XOAUTH2", sasl.client_xoauth2(user, token)),
        ("OAUTHBEARER", sasl.client_oauthbearer(user, token, "mx.example", 993)),
    ):
        assert sasl.server(mechanism, challenge_text=b"").step(message) == Token(user, token, mechanism)


@pytest.mark.parametrize(
    ("user", "token"), [("tim", ""), ("tim", "a b"), ("tim", "a\x01"), ("tim", "a\n"), ("tim", "ä"), ("t\x01m", "a"),
                        ("t\nm", "a"), ("t\0", "a")],
)  # fmt: skip
def test_what_oauth_cannot_carry(user: str, token: str) -> None:
    with pytest.raises(LocalError):
        sasl.client_xoauth2(user, token)
    with pytest.raises(LocalError):
        sasl.client_oauthbearer(user, token, "mx.example", 143)


@pytest.mark.parametrize(("host", "port"), [("", 143), ("a\x01b", 143), ("a b", 143), ("a", 0), ("a", 65536)])
def test_where_oauthbearer_goes(host: str, port: int) -> None:
    with pytest.raises(LocalError):
        sasl.client_oauthbearer("tim", "t", host, port)


def test_xoauth2_needs_a_name() -> None:
    with pytest.raises(LocalError):
        sasl.client_xoauth2("", "t")


def test_apop() -> None:
    """The example of RFC 1939 section 7."""
    credentials = sasl.apop_credentials(b"mrose " + DIGEST.upper().encode(), TIMESTAMP)
    assert credentials == Digest("mrose", TIMESTAMP, DIGEST, "APOP")
    assert sasl.verify_apop("tanstaaf", credentials.challenge, credentials.digest)
    assert sasl.verify_apop("tanstaaf", TIMESTAMP, DIGEST.upper())
    assert not sasl.verify_apop("tanstaafl", TIMESTAMP, DIGEST)
    assert not sasl.verify_apop("tanstaaf", TIMESTAMP[:-1], DIGEST)
    assert not sasl.verify_apop("tanstaaf", TIMESTAMP, "ä")
    assert not sasl.verify_cram_md5("tanstaaf", TIMESTAMP, DIGEST)


@pytest.mark.parametrize(
    "argument",
    [b"", b"mrose", DIGEST.encode(), b" " + DIGEST.encode(), b"mrose  " + DIGEST.encode(), b"m rose " + DIGEST.encode(),
     b"mrose " + DIGEST.encode() + b" ", b"mrose " + DIGEST[1:].encode(), b"mrose g" + DIGEST[1:].encode(),
     b"m\0rose " + DIGEST.encode(), b"\xff " + DIGEST.encode()],
)  # fmt: skip
def test_malformed_apop(argument: bytes) -> None:
    with pytest.raises(PeerError):
        sasl.apop_credentials(argument, TIMESTAMP)


def test_password_of_a_login_command() -> None:
    assert sasl.password("jürgen".encode(), b"p w ", "LOGIN") == Password("", "jürgen", "p w ", "LOGIN")
    for user, password in (
        (b"", b"pw"),
        (b"t\nm", b"pw"),
        (b"\xff", b"pw"),
        (b"tim", b""),
        (b"tim", b"\0"),
        (b"tim", b"\xff"),
    ):
        with pytest.raises(PeerError):
            sasl.password(user, password, "PLAIN")


def test_secrets_are_not_in_repr() -> None:
    assert "hunter2" not in repr(Exchange("PLAIN", b"\0tim\0hunter2"))
    assert "PLAIN" in repr(Exchange("PLAIN", None))
    assert Exchange("PLAIN", None) != Exchange("PLAIN", b"")
