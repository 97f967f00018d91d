"""Transcripts: what is shown, and that no secret is."""

from __future__ import annotations

import pytest

from gateway.observe.transcript import MAX_LINES, Transcript


@pytest.fixture
def seen() -> list[str]:
    return []


@pytest.fixture
def transcript(seen: list[str]) -> Transcript:
    return Transcript("7KQ2-M9X", seen.append)


def test_a_dialogue(transcript: Transcript, seen: list[str]) -> None:
    transcript.to_client(b"220 mx ESMTP\r\n")
    transcript.from_client(b"EHLO me\r\n")
    transcript.to_client(b"250-mx\r\n250 SI")
    transcript.to_client(b"ZE 1\r\n")
    transcript.to_upstream(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n")
    transcript.from_upstream(b"250 ok\r\n550 no\r\n")
    transcript.content(1234)
    transcript.from_client(b"QUIT")
    assert seen == [
        "S: 220 mx ESMTP", "C: EHLO me", "S: 250-mx", "S: 250 SIZE 1", "U> MAIL FROM:<a@b>", "U> RCPT TO:<c@d>",
        "U< 250 ok", "U< 550 no", "C: [1234 octets of content]", "C: QUIT",
    ]  # fmt: skip


SECRET = b"AGRlbW8Ac2VjcmV0"


@pytest.mark.parametrize(
    "feed",
    [
        [("c", b"AUTH PLAIN " + SECRET + b"\r\n"), ("s", b"235 ok\r\n")],
        [("c", b"auth  plain\t" + SECRET), ("s", b"535 no\r\n")],
        [("c", b"AUTH LOGIN"), ("s", b"334 " + SECRET + b"\r\n"), ("c", SECRET), ("s", b"334 x\r\n"), ("c", SECRET)],
        # a client that does not wait: its response comes before our challenge, or after our refusal
        [("c", b"AUTH PLAIN\r\n" + SECRET + b"\r\n"), ("s", b"334 \r\n235 ok\r\n")],
        [("c", b"AUTH PLAIN\r\n"), ("s", b"538 5.7.11 no\r\n"), ("c", SECRET), ("s", b"500 what\r\n")],
        [("c", b"AUTH LOGIN\r\n"), ("s", b"250-ehlo came late\r\n334 \r\n"), ("c", b"MAIL " + SECRET)],
        [("c", SECRET)],
        [("c", b"XCLIENT ADDR=192.0.2.1 LOGIN=" + SECRET + b" NAME=x")],
        [("c", b"XCLIENT login=" + SECRET)],
        [("c", b"MAIL FROM:<a@b> AUTH=" + SECRET + b" SIZE=1")],
        [("u", b"AUTH PLAIN " + SECRET), ("r", b"334 " + SECRET + b"\r\n"), ("u", SECRET)],
        [("u", b"XCLIENT LOGIN=" + SECRET + b"\r\n")],
    ],
)
def test_no_secret_is_shown(transcript: Transcript, seen: list[str], feed: list[tuple[str, bytes]]) -> None:
    methods = {"c": transcript.from_client, "s": transcript.to_client,
               "u": transcript.to_upstream, "r": transcript.from_upstream}  # fmt: skip
    for method, data in feed:
        methods[method](data)
    assert seen and not [line for line in seen if SECRET.decode() in line]


def test_around_secrets_the_rest_is_shown(transcript: Transcript, seen: list[str]) -> None:
    transcript.from_client(b"AUTH LOGIN eA==\r\n")
    transcript.to_client(b"334 eA==\r\n")
    transcript.from_client_secret()
    transcript.to_client(b"235 2.7.0 ok\r\n")
    transcript.from_client(b"MAIL FROM:<a@b> AUTH=x SIZE=1\r\n")
    transcript.from_client(b"GET / HTTP/1.0\r\n")
    transcript.to_upstream_secret()
    transcript.note("TLS")
    assert seen == [
        "C: AUTH LOGIN [removed]", "S: 334 [removed]", "C: [removed]", "S: 235 2.7.0 ok",
        "C: MAIL FROM:<a@b> AUTH=[removed] SIZE=1", "C: [14 octets that are no command]", "U> [removed]", "-- TLS",
    ]  # fmt: skip


def test_bounds(transcript: Transcript, seen: list[str]) -> None:
    transcript.from_client(b"NOOP " + b"x" * 5000)
    assert len(seen[0]) < 1100 and seen[0].endswith("...")
    transcript.to_client(b"y" * 100_000)  # a reply that never ends is not kept
    for _ in range(MAX_LINES + 10):
        transcript.from_client(b"NOOP")
    assert len(seen) == MAX_LINES and "left out" in seen[-1]
