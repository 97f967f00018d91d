"""xtext and the cuts used by every codec's tests."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import xtext
from gateway.protocol.errors import PeerError
from gateway.testing.splits import splits


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", b""),
        (b"tim@b.example", b"tim@b.example"),
        (b"tim+x=y@b.example", b"tim+2Bx+3Dy@b.example"),
        (b"a b", b"a+20b"),
        (b"\x00\n\x7f\xc3\xbf", b"+00+0A+7F+C3+BF"),
        (b"[UNAVAILABLE]", b"[UNAVAILABLE]"),
    ],
)
def test_known_values(raw: bytes, text: bytes) -> None:
    assert xtext.encode(raw) == text
    assert xtext.decode(text) == raw


def test_lower_case_digits_are_taken() -> None:
    assert xtext.decode(b"+2b+c3") == b"+\xc3"


@pytest.mark.parametrize("text", [b"+", b"+2", b"+2G", b"a=b", b"a b", b"a\r\n", b"\xc3", b"\x7f", b"++2B", b"+\n2"])
def test_malformed(text: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        xtext.decode(text)
    assert caught.value.reply == b"501 5.5.4 Malformed xtext"


@given(st.binary())
def test_round_trip(raw: bytes) -> None:
    text = xtext.encode(raw)
    assert re.fullmatch(rb"[!-*,-<>-~+]*", text)
    assert xtext.decode(text) == raw


@given(st.binary())
def test_any_bytes_decode_or_are_refused(text: bytes) -> None:
    try:
        raw = xtext.decode(text)
    except PeerError:
        return
    assert xtext.decode(xtext.encode(raw)) == raw


@given(st.binary(max_size=200), st.integers())
def test_splits_join_to_the_data(data: bytes, seed: int) -> None:
    cuts = list(splits(data, seed))
    assert len(cuts) == 10
    assert all(b"".join(pieces) == data and all(pieces) for pieces in cuts)
    assert cuts == list(splits(data, seed))
    assert max(map(len, cuts)) == len(data)
