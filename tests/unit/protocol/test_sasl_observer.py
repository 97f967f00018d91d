"""Who logs in, learned from messages that pass by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import sasl
from gateway.protocol.sasl import Observer

SCRAM_FINAL = b"c=biws,r=rOprNGfwEbeRWgbNEkqOsrvNonce1,p=Os+jE0yRnl4S0kB1PraKzDAwJBW4moonbgt8ukn+pYQ="
DIGEST = b"ebeee7a1fffe162f3678f2fdd14006cd"
SECRET = b"tanstaaf"


@pytest.mark.parametrize(
    ("mechanism", "messages", "user"),
    [
        ("PLAIN", [b"\0tim\0" + SECRET], "tim"),
        ("plain", [b"bob\0tim\0" + SECRET], "tim"),
        ("PLAIN", ["\0jürgen\0p".encode()], "jürgen"),
        ("PLAIN", [b"\0tim"], ""),
        ("PLAIN", [b"tim"], ""),
        ("PLAIN", [b"\0t\nm\0p"], ""),
        ("PLAIN", [b"\0\xff\0p"], ""),
        ("PLAIN", [b"\0a\0" + SECRET, b"\0b\0" + SECRET], "a"),
        ("LOGIN", [b"tim", SECRET], "tim"),
        ("LOGIN", [b"", SECRET], ""),
        ("LOGIN", [b"\xff", SECRET], ""),
        ("CRAM-MD5", [b"t i m " + DIGEST], "t i m"),
        ("CRAM-MD5", [b"tim"], ""),
        ("CRAM-MD5", [b"", b"tim " + DIGEST], "tim"),
        ("SCRAM-SHA-256", [b"n,,n=tim,r=rOprNGfwEbeRWgbNEkqO", SCRAM_FINAL, b""], "tim"),
        ("SCRAM-SHA-1", [b"y,a=bob,n=a=2Cb=3Dc,r=x", SCRAM_FINAL], "a,b=c"),
        ("scram-sha-256-plus", [b"p=tls-exporter,,n=tim,r=x,ext=1"], "tim"),
        ("SCRAM-SHA-256", ["n,,n=jürgen,r=x".encode()], "jürgen"),
        ("SCRAM-SHA-256", [b"n,,n=a=2cb,r=x"], ""),
        ("SCRAM-SHA-256", [b"n,,m=x,n=tim,r=x"], ""),
        ("SCRAM-SHA-256", [b"n=tim,r=x"], ""),
        ("SCRAM-SHA-256", [SCRAM_FINAL], ""),
        ("EXTERNAL", [b"tim@b.example"], "tim@b.example"),
        ("EXTERNAL", [b""], ""),
        ("XOAUTH2", [b"user=tim@b.example\x01auth=Bearer abc.def\x01\x01", b""], "tim@b.example"),
        ("XOAUTH2", [b"auth=Bearer abc.def\x01\x01"], ""),
        ("XOAUTH2", [b"user=tim"], ""),
        (
            "OAUTHBEARER",
            [b"n,a=tim=2C@b.example,\x01host=mx\x01auth=Bearer abc.def\x01\x01", b"\x01"],
            "tim,@b.example",
        ),
        ("OAUTHBEARER", [b"n,,\x01auth=Bearer abc.def\x01\x01"], ""),
        ("GSSAPI", [b"tim"], ""),
        ("", [b"tim"], ""),
    ],
)
def test_user(mechanism: str, messages: list[bytes], user: str) -> None:
    observer = Observer(mechanism)
    assert observer.user == ""
    for message in messages:
        observer.message(message)
    assert observer.user == user
    assert SECRET.decode() not in repr(observer)


MECHANISMS = st.sampled_from([*sasl.MECHANISMS, "SCRAM-SHA-256", "X"])


@given(MECHANISMS, st.lists(st.binary(max_size=40) | st.sampled_from([b"n,a=", b"n,,n=x,r=="]), max_size=3))
def test_it_never_raises(mechanism: str, messages: list[bytes]) -> None:
    observer = Observer(mechanism)
    for message in messages:
        observer.message(message)
    assert not set("\0\r\n\x7f") & set(observer.user)


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=20)


@given(NAMES, st.from_regex("[!-~]{1,20}", fullmatch=True))
def test_what_our_client_says_is_understood(user: str, secret: str) -> None:
    for mechanism, message in (
        ("PLAIN", sasl.client_plain(user, secret)),
        ("LOGIN", sasl.client_login(user, secret)[0]),
        ("XOAUTH2", sasl.client_xoauth2(user, secret)),
        ("OAUTHBEARER", sasl.client_oauthbearer(user, secret, "mx.example", 143)),
    ):
        observer = Observer(mechanism)
        observer.message(message)
        assert observer.user == user
