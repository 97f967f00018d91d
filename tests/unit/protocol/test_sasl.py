"""SASL exchanges: worked examples, what is refused and with which reply, and that secrets stay out."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import sasl
from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.sasl import Certificate, Challenge, Credentials, Digest, Password, Token

CHALLENGE = b"<42.1700000000@mx.example>"
DIGEST = "ebeee7a1fffe162f3678f2fdd14006cd"


def converse(mechanism: str, *messages: bytes | None) -> tuple[list[bytes], Credentials | None]:
    """Feed the messages; give the challenges, and the credentials if it came so far."""
    exchange = sasl.server(mechanism, challenge_text=CHALLENGE)
    challenges: list[bytes] = []
    for message in messages:
        step = exchange.step(message)
        if not isinstance(step, Challenge):
            return challenges, step
        challenges.append(step.data)
    return challenges, None


TIM = Password("", "tim", "tanstaaf", "PLAIN")
EXCHANGES: list[tuple[str, list[bytes | None], list[bytes], Credentials]] = [
    ("PLAIN", [b64decode("AHRpbQB0YW5zdGFhZg==")], [], TIM),
    ("plain", [None, b"\0tim\0tanstaaf"], [b""], TIM),
    ("PLAIN", [b64decode("Ym9iAHRpbQBwdw==")], [], Password("bob", "tim", "pw", "PLAIN")),
    ("PLAIN", ["\0jürgen\0pä\tß ".encode()], [], Password("", "jürgen", "pä\tß ", "PLAIN")),
    ("LOGIN", [None, b"tim", b"tanstaaf"], [b"Username:", b"Password:"], Password("", "tim", "tanstaaf", "LOGIN")),
    ("LOGIN", [b"tim", b"tanstaaf"], [b"Password:"], Password("", "tim", "tanstaaf", "LOGIN")),
    ("CRAM-MD5", [None, b"tim " + DIGEST.encode()], [CHALLENGE], Digest("tim", CHALLENGE, DIGEST)),
    ("CRAM-MD5", [None, b"a tim " + DIGEST.upper().encode()], [CHALLENGE], Digest("a tim", CHALLENGE, DIGEST)),
    ("EXTERNAL", [None, b""], [b""], Certificate("")),
    ("EXTERNAL", [b"tim@b.example"], [], Certificate("tim@b.example")),
    ("XOAUTH2", [b64decode("dXNlcj10aW1AYi5leGFtcGxlAWF1dGg9QmVhcmVyIGFiYy5kZWYBAQ==")], [],
     Token("tim@b.example", "abc.def", "XOAUTH2")),
    ("XOAUTH2", [None, b"user=tim\x01auth=bearer  t\x01\x01"], [b""], Token("tim", "t", "XOAUTH2")),
    ("OAUTHBEARER", [b64decode("bixhPXRpbUBiLmV4YW1wbGUsAWhvc3Q9bXguZXhhbXBsZQFwb3J0PTU4NwFhdXRoPUJlYXJlciBhYmMuZGVm"
                               "AQE=")], [], Token("tim@b.example", "abc.def", "OAUTHBEARER")),
    ("OAUTHBEARER", [None, b"y,,\x01auth=Bearer t\x01\x01"], [b""], Token("", "t", "OAUTHBEARER")),
    ("OAUTHBEARER", [b"n,a=a=2Cb=3Dc,\x01auth=Bearer t\x01\x01"], [], Token("a,b=c", "t", "OAUTHBEARER")),
]  # fmt: skip


@pytest.mark.parametrize(("mechanism", "messages", "challenges", "credentials"), EXCHANGES)
def test_exchange(
    mechanism: str, messages: list[bytes | None], challenges: list[bytes], credentials: Credentials
) -> None:
    assert converse(mechanism, *messages) == (challenges, credentials)


@pytest.mark.parametrize(
    ("mechanism", "messages"),
    [
        ("PLAIN", [b""]), ("PLAIN", [b"\0tim"]), ("PLAIN", [b"\0tim\0a\0b"]), ("PLAIN", [b"\0\0pw"]),
        ("PLAIN", [b"\0tim\0"]), ("PLAIN", [b"\0tim\xff\0pw"]), ("PLAIN", [b"\0tim\0\xff"]),
        ("PLAIN", [b"\0ti\nm\0pw"]), ("PLAIN", ["\0ti\x85m\0pw".encode()]), ("PLAIN", ["\0ti\u2028m\0pw".encode()]),
        ("PLAIN", [b"a\x7f\0tim\0pw"]),
        ("LOGIN", [b""]), ("LOGIN", [None, b"a\rb"]), ("LOGIN", [b"tim", b""]), ("LOGIN", [b"tim", b"a\0b"]),
        ("LOGIN", [b"tim", b"\xff"]), ("LOGIN", [b"a\0b"]),
        ("CRAM-MD5", [None, b""]), ("CRAM-MD5", [None, DIGEST.encode()]), ("CRAM-MD5", [None, b" " + DIGEST.encode()]),
        ("CRAM-MD5", [None, b"tim " + DIGEST[1:].encode()]), ("CRAM-MD5", [None, b"tim g" + DIGEST[1:].encode()]),
        ("CRAM-MD5", [None, b"t\0m " + DIGEST.encode()]),
        ("EXTERNAL", [b"a\0"]), ("EXTERNAL", [b"\xff"]),
        ("XOAUTH2", [b""]), ("XOAUTH2", [b"user=tim\x01auth=Bearer t\x01"]), ("XOAUTH2", [b"auth=Bearer t\x01\x01"]),
        ("XOAUTH2", [b"user=tim\x01auth=Basic t\x01\x01"]), ("XOAUTH2", [b"user=tim\x01auth=Bearer a b\x01\x01"]),
        ("XOAUTH2", [b"user=tim\x01user=tom\x01auth=Bearer t\x01\x01"]), ("XOAUTH2", [b"user=tim\x01\x01"]),
        ("XOAUTH2", [b"user=t\nm\x01auth=Bearer t\x01\x01"]), ("XOAUTH2", [b"user=tim\x01auth=Bearer t\n\x01\x01"]),
        ("OAUTHBEARER", [b""]), ("OAUTHBEARER", [b"auth=Bearer t\x01\x01"]),
        ("OAUTHBEARER", [b"p=tls-unique,,\x01auth=Bearer t\x01\x01"]), ("OAUTHBEARER", [b"n,,\x01auth=\x01\x01"]),
        ("OAUTHBEARER", [b"n,a=x=2c,\x01auth=Bearer t\x01\x01"]), ("OAUTHBEARER", [b"n,a=,\x01auth=Bearer t\x01\x01"]),
        ("OAUTHBEARER", [b"n,,\x01\x01"]),
    ],
)  # fmt: skip
def test_malformed(mechanism: str, messages: list[bytes | None]) -> None:
    with pytest.raises(PeerError) as caught:
        converse(mechanism, *messages)
    assert caught.value.reply == b"501 5.5.2 Cannot decode response"


def test_cram_md5_refuses_an_initial_response() -> None:
    with pytest.raises(PeerError) as caught:
        converse("CRAM-MD5", b"")
    assert caught.value.reply == b"501 5.7.0 No initial response allowed"


@pytest.mark.parametrize("mechanism", ["", "SCRAM-SHA-256", "PLAIN "])
def test_unknown_mechanism(mechanism: str) -> None:
    with pytest.raises(PeerError) as caught:
        sasl.server(mechanism, challenge_text=CHALLENGE)
    assert caught.value.reply == b"504 5.5.4 Unknown authentication mechanism"


@given(st.sampled_from(sasl.MECHANISMS), st.lists(st.binary() | st.sampled_from([b"tim", b"n,,\x01\x01"]), max_size=3))
def test_any_messages_end_or_are_refused(mechanism: str, messages: list[bytes]) -> None:
    for first in ([], [None]):
        try:
            converse(mechanism, *first, *messages)
        except PeerError as error:
            assert error.reply is not None and error.reply.startswith(b"501 ")


SECRET = "correct-horse"


@pytest.mark.parametrize(
    "credentials",
    [
        Password("", "tim", SECRET, "PLAIN"),
        Digest("tim", CHALLENGE, SECRET),
        Token("tim", SECRET, "XOAUTH2"),
    ],
)
def test_secrets_are_not_in_repr(credentials: Credentials) -> None:
    assert SECRET not in repr(credentials)
    assert "tim" in repr(credentials) and credentials.mechanism in repr(credentials)


def test_secrets_are_not_in_errors_or_exchanges() -> None:
    exchange = sasl.server("LOGIN", challenge_text=CHALLENGE)
    exchange.step(b"tim")
    with pytest.raises(PeerError) as caught:
        exchange.step(SECRET.encode() + b"\0")
    assert SECRET not in repr(caught.value) + repr(exchange) + str(caught.value.reply)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("line", "data"),
    [(b"", b""), (b"AA==", b"\0"), (b"AHRpbQB0YW5zdGFhZg==", b"\0tim\0tanstaaf"), (b"+/+/", b"\xfb\xff\xbf")],
)
def test_base64(line: bytes, data: bytes) -> None:
    assert sasl.decode_base64(line) == sasl.decode_initial(line) == data
    assert sasl.encode_base64(data) == line


def test_initial_response() -> None:
    assert sasl.decode_initial(b"=") == b""


@pytest.mark.parametrize(
    "line",
    [b"*", b"=", b"A", b"AA", b"AA=", b"AA===", b"AB==", b"AA==AAAA", b"A A==", b"AA==\r", b"AA==\n", b"-_-_", b"\xff",
     b"=AAA"],
)  # fmt: skip
def test_not_base64(line: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        sasl.decode_base64(line)
    assert caught.value.reply == b"501 5.5.2 Cannot decode response"


def test_base64_limit() -> None:
    assert len(sasl.decode_base64(b"A" * 12288)) == 9216
    with pytest.raises(PeerError) as caught:
        sasl.decode_base64(b"A" * 12292)
    assert caught.value.reply is not None and caught.value.reply.startswith(b"500 5.5.6 ")


@given(st.binary())
def test_base64_takes_exactly_what_it_writes(data: bytes) -> None:
    assert sasl.decode_base64(b64encode(data)) == data
    try:
        decoded = sasl.decode_base64(data)
    except PeerError:
        return
    assert b64encode(decoded) == data


def test_cancel() -> None:
    assert sasl.is_cancel(b"*")
    assert not any(map(sasl.is_cancel, (b"", b"**", b"* ", b"=")))


def test_oauth_error() -> None:
    assert b64encode(sasl.oauth_error("OAUTHBEARER")) == b"eyJzdGF0dXMiOiJpbnZhbGlkX3Rva2VuIiwic2NvcGUiOiJtYWlsIn0="
    assert json.loads(sasl.oauth_error("xoauth2")) == {"status": "401", "schemes": "bearer", "scope": "mail"}
    with pytest.raises(LocalError):
        sasl.oauth_error("PLAIN")


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=20)
SECRETS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@given(NAMES, SECRETS, st.just("") | NAMES)
def test_what_our_client_says_our_server_reads(user: str, password: str, authzid: str) -> None:
    message = sasl.client_plain(user, password, authzid)
    assert converse("PLAIN", message) == ([], Password(authzid, user, password, "PLAIN"))
    assert converse("LOGIN", None, *sasl.client_login(user, password))[1] == Password("", user, password, "LOGIN")


@pytest.mark.parametrize("arguments", [("", "pw"), ("a\0", "pw"), ("a", "p\0"), ("a", "pw", "\0")])
def test_what_plain_cannot_carry(arguments: tuple[str, ...]) -> None:
    with pytest.raises(LocalError):
        sasl.client_plain(*arguments)
    if not arguments[0]:
        with pytest.raises(LocalError):
            sasl.client_login(*arguments)


def test_verify_cram_md5() -> None:
    assert sasl.verify_cram_md5("tanstaaf", CHALLENGE, DIGEST)
    assert sasl.verify_cram_md5("tanstaaf", CHALLENGE, DIGEST.upper())
    assert not sasl.verify_cram_md5("tanstaaf", CHALLENGE[:-1], DIGEST)
    assert not sasl.verify_cram_md5("tanstaafl", CHALLENGE, DIGEST)
    assert not sasl.verify_cram_md5("tanstaaf", CHALLENGE, "ä")
