"""Every mix of CR, LF, NUL and dot that some server takes for an end of data (the table of SMTP smuggling).

What follows each of them would be commands to such a server. Whatever the policy, whether the message comes by DATA
or BDAT, in one piece or octet by octet: the upstream reads one message or none, and what it gets has no line end but
CRLF and no lone dot (promise 5).
"""

from __future__ import annotations

import re

import pytest

from tests.dialogue.obliging import Client, ObligingUpstream, between

EVIL = b"MAIL FROM:<evil@example.org>\r\nRCPT TO:<x@example.org>\r\nDATA\r\nforged"

# Sequence, whether a line end in it is illegal, whether it is the true end of DATA.
ROWS: dict[str, tuple[bytes, bool, bool]] = {
    "LF.LF": (b"\n.\n", True, False),
    "LF.CRLF": (b"\n.\r\n", True, False),
    "CRLF.LF": (b"\r\n.\n", True, False),
    "CR.CR": (b"\r.\r", True, False),
    "CR.CRLF": (b"\r.\r\n", True, False),
    "CRLF.CR": (b"\r\n.\rx", True, False),
    "CR.LF": (b"\r.\n", True, False),
    "LF.CR": (b"\n.\r", True, False),
    "CRLF.CRCRLF": (b"\r\n.\r\r\n", True, False),
    "LFCR.LFCR": (b"\n\r.\n\r", True, False),
    "CRLFLF.CRLF": (b"\r\n\n.\r\n", True, False),
    "CRCRLF.CRLF": (b"\r\r\n.\r\n", True, True),
    "CRLF NUL.CRLF": (b"\r\n\0.\r\n", False, False),
    "CRLF.NUL CRLF": (b"\r\n.\0\r\n", False, False),
    "dot and blank": (b"\r\n. \r\n", False, False),
    "dot and tab": (b"\r\n.\t\r\n", False, False),
    "two dots": (b"\r\n..\r\n", False, False),
    "VT": (b"\x0b.\x0b", False, False),
    "FF": (b"\x0c.\x0c", False, False),
    "NEL": (b"\x85.\x85", False, False),
    "U+2028": ("\u2028.\u2028".encode(), False, False),
    "CRLF.CRLF": (b"\r\n.\r\n", False, True),
}
POLICIES = ("reject", "normalize")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """uvloop is enough: what is tested is what is done with octets."""
    return "asyncio", {"use_uvloop": True}


def normalized(content: bytes) -> bytes:
    """Content without dots to its own rule: a lone CR is a blank, a lone LF is CRLF."""
    return re.sub(rb"(?<!\r)\n", b"\r\n", re.sub(rb"\r(?!\n)", b" ", content))


def unstuffed(content: bytes) -> bytes:
    """Wire form, a CRLF in front, to content."""
    return content.replace(b"\r\n.", b"\r\n")[2:]


def assert_safe(content: bytes) -> None:
    """No server, however it reads line ends, finds an end of data in this."""
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", content), content
    assert b"\r\n.\r\n" not in content, content


@pytest.mark.anyio
@pytest.mark.parametrize("octet_by_octet", [False, True], ids=["whole", "octets"])
@pytest.mark.parametrize("policy", POLICIES)
async def test_data(policy: str, octet_by_octet: bool) -> None:
    for name, (sequence, illegal, ends) in ROWS.items():
        wire = b"one" + sequence + EVIL + b"\r\n.\r\n"
        refused = illegal and policy == "reject"
        async with ObligingUpstream().listening() as upstream, between(upstream, {"line_endings": policy}) as gateway:
            client = await opened(gateway.port)
            assert await client.say("DATA") == "354"
            await client.send(wire, octet_by_octet=octet_by_octet)
            assert await client.code() == ("550" if refused else "250"), name
            if ends:
                # What follows was a command to everybody: our answers to MAIL, RCPT and DATA.
                assert [await client.code() for _ in range(3)] in (["250", "250", "354"], ["250", "250", "554"]), name
                client.leave()
            else:
                assert await client.say("NOOP") == "250", name
                assert await client.say("QUIT") == "221"
                client.leave()
        for content in (*upstream.contents, *upstream.cut):
            assert_safe(content)
        mails = [line for line in upstream.commands if line.startswith(b"MAIL")]
        assert len(mails) == (2 if ends else 1), (name, upstream.commands)
        if refused:
            assert not any(b"one" in content for content in upstream.contents), name
        elif not ends:
            assert unstuffed(upstream.contents[0]) == normalized(unstuffed(b"\r\n" + wire[:-3])), name


@pytest.mark.anyio
@pytest.mark.parametrize("octet_by_octet", [False, True], ids=["whole", "octets"])
@pytest.mark.parametrize("policy", POLICIES)
async def test_bdat(policy: str, octet_by_octet: bool) -> None:
    """In chunks a dot has no meaning: each row is content, cut into two chunks in the middle of the sequence."""
    for name, (sequence, illegal, _) in ROWS.items():
        content = b"one" + sequence + EVIL + b"\r\n"
        cut = 3 + len(sequence) // 2
        refused = illegal and policy == "reject"
        async with ObligingUpstream().listening() as upstream, between(upstream, {"line_endings": policy}) as gateway:
            client = await opened(gateway.port)
            for command, chunk in ((f"BDAT {cut}", content[:cut]), (f"BDAT {len(content) - cut} LAST", content[cut:])):
                await client.send(command.encode() + b"\r\n" + chunk, octet_by_octet=octet_by_octet)
            assert await client.code() == "250", name
            assert await client.code() == ("550" if refused else "250"), name
            assert await client.say("NOOP") == "250", name
            assert await client.say("QUIT") == "221"
            client.leave()
        assert sum(line.startswith(b"MAIL") for line in upstream.commands) == 1, (name, upstream.commands)
        for sent in upstream.contents:
            assert_safe(sent)
            assert unstuffed(sent) == normalized(content), name
        assert len(upstream.contents) == (0 if refused else 1), name


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("pipeline", "login", "code"),
    [
        ({}, False, "550"),
        ({"trust": {"clients": ["127.0.0.0/8"]}}, False, "250"),
        ({"line_endings": "normalise"}, False, "250"),
        ({}, True, "250"),
        ({"line_endings": "reject", "trust": {"clients": ["127.0.0.0/8"]}}, True, "550"),
    ],
    ids=["stranger", "own network", "normalise", "login", "reject"],
)
async def test_by_trust(pipeline: dict[str, object], login: bool, code: str) -> None:
    """`by_trust` mends the line ends of clients that are known and refuses those of others."""
    known = {"users": {"users": {"tim": "tanstaaf"}}}
    whole = {"allow_plaintext_auth": True, "stages": [known, {"splice": {"handoff": "never"}}], **pipeline}
    async with ObligingUpstream().listening() as upstream, between(upstream, whole) as gateway:
        client = await opened(gateway.port, login=login)
        assert await client.say("DATA") == "354"
        await client.send(b"one\ntwo\r\n.\r\n")
        assert await client.code() == code
        client.leave()
    assert upstream.contents == ([b"\r\none\r\ntwo\r\n"] if code == "250" else [])


async def opened(port: int, *, login: bool = False) -> Client:
    """A session with one accepted recipient."""
    client = await Client.connected(port)
    assert await client.code() == "220"
    assert await client.say("EHLO client.test") == "250"
    if login:
        assert await client.say("AUTH PLAIN AHRpbQB0YW5zdGFhZg==") == "235"
    assert await client.say("MAIL FROM:<a@example.org>") == "250"
    assert await client.say("RCPT TO:<b@example.org>") == "250"
    return client
