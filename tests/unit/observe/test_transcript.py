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


GREETINGS = {"imap": b"* OK ready\r\n", "pop3": b"+OK ready\r\n"}
METHODS = {
    "c": Transcript.from_client,
    "s": Transcript.to_client,
    "u": Transcript.to_upstream,
    "r": Transcript.from_upstream,
}


def fed(transcript: Transcript, seen: list[str], protocol: str, feed: list[tuple[str, bytes]]) -> list[str]:
    """What is shown behind the greetings."""
    transcript.to_client(GREETINGS[protocol])
    transcript.from_upstream(GREETINGS[protocol])
    for method, data in feed:
        METHODS[method](transcript, data)
    return seen[2:]


@pytest.mark.parametrize(
    ("protocol", "command", "shown"),
    [
        ("imap", b"a1 capability", "a1 capability"),
        ("imap", b'a ID ("name" "Mail 1.0")', 'a ID ("name" "Mail 1.0")'),
        ("imap", b"a SELECT INBOX", "a SELECT INBOX"),
        ("imap", b"a login joe secret", "a LOGIN [removed]"),
        ("imap", b"a AUTHENTICATE SCRAM-SHA-256", "a AUTHENTICATE SCRAM-SHA-256 [removed]"),
        ("imap", b"a authenticate plain " + SECRET, "a AUTHENTICATE PLAIN [removed]"),
        ("imap", b"a AUTHENTICATE " + SECRET, "a AUTHENTICATE [removed]"),
        ("imap", b"a WHAT EVER", "[11 octets that are no command]"),
        ("imap", b"NOOP", "[4 octets that are no command]"),
        ("imap", b"(a NOOP", "[7 octets that are no command]"),
        ("imap", b"", "[0 octets that are no command]"),
        ("pop3", b"CAPA", "CAPA"),
        ("pop3", b"user joe", "user joe"),
        ("pop3", b"PASS a secret word", "PASS [removed]"),
        ("pop3", b"PASS", "PASS [removed]"),
        ("pop3", b"APOP joe 0123456789abcdef", "APOP joe [removed]"),
        ("pop3", b"APOP " + SECRET, "APOP [removed]"),
        ("pop3", b"AUTH", "AUTH [removed]"),
        ("pop3", b"auth plain " + SECRET, "AUTH PLAIN [removed]"),
        ("pop3", b"XCLIENT ADDR=192.0.2.1 LOGIN=joe", "XCLIENT ADDR=192.0.2.1 LOGIN=[removed]"),
        ("pop3", SECRET, "[16 octets that are no command]"),
    ],
)
def test_store_commands(transcript: Transcript, seen: list[str], protocol: str, command: bytes, shown: str) -> None:
    assert fed(transcript, seen, protocol, [("c", command), ("u", command + b"\r\n")]) == [f"C: {shown}", f"U> {shown}"]


@pytest.mark.parametrize(
    ("protocol", "feed"),
    [
        # a password behind a literal, or in several lines; a client that does not wait
        ("imap", [("c", b"a LOGIN {3}"), ("s", b"+ go on\r\n"), ("c", b' "' + SECRET + b'"')]),
        ("imap", [("c", b"a LOGIN {3+}"), ("c", b" {3}"), ("s", b"+ go on\r\n"), ("c", SECRET)]),
        ("imap", [("c", b"a LOGIN joe {16}"), ("s", b"* 1 EXISTS\r\n+ go on\r\n"), ("c", b"x NOOP " + SECRET)]),
        ("imap", [("c", b"a AUTHENTICATE LOGIN"), ("s", b"+ " + SECRET + b"\r\n"), ("c", b"x NOOP " + SECRET)]),
        ("imap", [("c", b'a ID ("x" {3+}'), ("c", b' "y" "' + SECRET + b'")')]),
        # servers that repeat what they heard
        ("imap", [("c", b'a LOGIN "joe x" "' + SECRET + b'"'), ("s", b"a NO not " + SECRET + b"\r\n")]),
        ("imap", [("c", b"a LOGIN joe " + SECRET), ("s", b"a BAD " + SECRET + b"?\r\n")]),
        ("pop3", [("c", b"PASS " + SECRET), ("s", b"-ERR what is " + SECRET + b"\r\n")]),
        ("pop3", [("u", b"APOP joe " + SECRET), ("r", b"-ERR what is " + SECRET + b"\r\n")]),
        ("pop3", [("u", b"AUTH LOGIN"), ("r", b"+ " + SECRET + b"\r\n"), ("u", b"USER " + SECRET)]),
    ],
)
def test_no_secret_of_a_login_is_shown(
    transcript: Transcript, seen: list[str], protocol: str, feed: list[tuple[str, bytes]]
) -> None:
    shown = fed(transcript, seen, protocol, feed)
    assert len(shown) >= len(feed) and not [line for line in shown if SECRET.decode() in line]


def test_a_store_s_dialogue(transcript: Transcript, seen: list[str]) -> None:
    feed = [
        ("c", b"a LOGIN joe {6}"), ("s", b"+ OK\r\n"), ("c", b""), ("r", b"* CAPABILITY ID\r\ng1 OK done\r\n"),
        ("s", b"a NO [AUTHENTICATIONFAILED] no\r\n"), ("c", b"b NOOP"), ("s", b"b OK\r\n* BYE\r\n"),
    ]  # fmt: skip
    assert fed(transcript, seen, "imap", feed) == [
        "C: a LOGIN [removed]", "S: + [removed]", "C: [removed]", "U< * CAPABILITY ID", "U< g1 OK done",
        "S: a NO [AUTHENTICATIONFAILED] no", "C: b NOOP", "S: b OK", "S: * BYE",
    ]  # fmt: skip


def test_bounds(transcript: Transcript, seen: list[str]) -> None:
    transcript.from_client(b"NOOP " + b"x" * 5000)
    assert len(seen[0]) < 1100 and seen[0].endswith("...")
    transcript.to_client(b"y" * 100_000)  # a reply that never ends is not kept
    for _ in range(MAX_LINES + 10):
        transcript.from_client(b"NOOP")
    assert len(seen) == MAX_LINES and "left out" in seen[-1]
