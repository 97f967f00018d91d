"""What was refused leaves nothing behind: refused by a stage, by the upstream or by us, at each phase (promise 5).

Each row is played in a session of its own, then a good message follows in the same session, by DATA and by BDAT. The
upstream gets that one with its own envelope and nothing else, and the stage sees a transaction that it knows nothing
of. What the rows send as content are commands, which would be answered if a byte of it were read as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from gateway import Cause, Kind, Recipient, Refuse, Session, Settings, Stage, Transaction
from gateway.testing.gateway import Gateway, running
from tests.dialogue.obliging import EHLO, Client
from tests.dialogue.stages import STAGES

COMMANDS = b"QUIT\r\nMAIL FROM:<evil@example.org>\r\nRCPT TO:<x@example.org>\r\n..\r\nDATA\r\n"
CHUNK = f"BDAT {len(COMMANDS)}\r\n".encode() + COMMANDS
LAST = f"BDAT {len(COMMANDS)} LAST\r\n".encode() + COMMANDS
BARE = COMMANDS + b"\n.\nQUIT\n"
CONTENT = COMMANDS + b".\r\n"

# Lines are sent with CRLF, bytes as they are; behind each the code of its reply, several for a group.
Step = tuple[str | bytes, str]
A: Step = ("MAIL FROM:<a@example.org>", "250")
B: Step = ("RCPT TO:<b@example.org>", "250")
NO_MAIL: list[Step] = [("RCPT TO:<b@example.org>", "503"), ("DATA", "503"), (CHUNK, "503"), (LAST, "503")]
NO_RCPT: list[Step] = [("DATA", "554"), (CHUNK, "554"), (LAST, "554"), ("RSET", "250")]
OVER: list[Step] = [("DATA", "503")]


def sender(name: str, code: str = "250") -> Step:
    """MAIL from this name."""
    return f"MAIL FROM:<{name}@example.org>", code


def rcpt(name: str, code: str = "250") -> Step:
    """RCPT to this name."""
    return f"RCPT TO:<{name}@example.org>", code


ROWS: dict[str, list[Step]] = {
    "MAIL, syntax": [("MAIL FROM:<a@>", "501"), *NO_MAIL],
    "MAIL, parameter": [("MAIL FROM:<a@example.org> FOO=1", "555"), *NO_MAIL],
    "MAIL, too big": [("MAIL FROM:<a@example.org> SIZE=999999", "552"), *NO_MAIL],
    "MAIL, stage": [sender("stage-mail", "550"), *NO_MAIL],
    "MAIL, upstream": [sender("mail", "550"), *NO_MAIL],
    "RCPT, syntax": [A, ("RCPT TO:<b@>", "501"), *NO_RCPT],
    "RCPT, stage": [A, rcpt("stage-rcpt", "550"), *NO_RCPT],
    "RCPT, upstream": [A, rcpt("nobody", "550"), *NO_RCPT],
    "RCPT, one of two": [A, B, rcpt("stage-rcpt", "550"), rcpt("nobody", "550"), ("RSET", "250"), *OVER],
    "DATA, stage": [sender("stage-data"), B, ("DATA", "554"), *OVER],
    "DATA, upstream": [sender("data"), B, ("DATA", "451"), *OVER],
    "end, upstream": [sender("spam"), B, ("DATA", "354"), (CONTENT, "554"), *OVER],
    "end, line ends": [A, B, ("DATA", "354"), (BARE + b"\r\n.\r\n", "550"), *OVER],
    "end, line ends at once": [A, B, ("DATA", "354"), (b"\n.\r\nQUIT\r\n" + CONTENT, "550"), *OVER],
    "end, too big": [A, B, ("DATA", "354"), (COMMANDS * 600 + b".\r\n", "552"), *OVER],
    "end, a loop": [A, B, ("DATA", "354"), (b"Received: x\r\n" * 3 + CONTENT, "554"), *OVER],
    "end, upstream left": [sender("lost"), B, ("DATA", "354"), (CONTENT, "451"), *OVER],
    "end, upstream spoke": [sender("early"), B, ("DATA", "354"), (CONTENT, "451"), *OVER],
    "chunks, stage": [sender("stage-data"), B, (CHUNK, "554"), (CHUNK, "503"), (LAST, "503")],
    "chunks, upstream": [sender("data"), B, (CHUNK + CHUNK + LAST, "451 503 503"), *OVER],
    "chunks, spam": [sender("spam"), B, (CHUNK + LAST, "250 554"), *OVER],
    "chunks, line ends": [A, B, (f"BDAT {len(BARE)}\r\n".encode() + BARE + LAST, "250 550"), *OVER],
    "chunks, too big": [A, B, (CHUNK * 600 + b"BDAT 0 LAST\r\n", " ".join(["250"] * 600 + ["552"])), *OVER],
    "chunks, nothing": [A, ("BDAT 0 LAST", "554"), ("RSET", "250"), ("BDAT 0 LAST", "503")],
    "chunks, nothing of spam": [sender("spam"), B, ("BDAT 0 LAST", "554"), ("BDAT 0 LAST", "503")],
    "chunks, RSET": [A, B, (CHUNK, "250"), ("RSET", "250"), (LAST, "503"), *OVER],
    "chunks, EHLO": [A, B, (CHUNK, "250"), ("EHLO client.test", "250"), (LAST, "503"), *OVER],
    "chunks, DATA and others": [
        A, B, (CHUNK, "250"), ("DATA", "503"), sender("a", "503"), rcpt("b", "503"), ("RSET", "250"),
    ],
    "chunks without an EHLO": [("HELO client.test", "250"), A, B, (CHUNK + LAST, "503 503"), ("EHLO client.test", "250")],
    "AUTH inside": [A, ("AUTH PLAIN AHRpbQB0YW5zdGFhZg==", "503"), B, ("AUTH LOGIN", "503"), ("RSET", "250")],
    "XCLIENT inside": [A, ("XCLIENT ADDR=192.0.2.1", "503"), B, ("XCLIENT LOGIN=tim", "503"), ("RSET", "250")],
}  # fmt: skip
GOOD = {
    "DATA": [sender("good"), rcpt("one"), rcpt("two"), ("DATA", "354"), (b"good\r\n.\r\n", "250")],
    "BDAT": [sender("good"), rcpt("one"), rcpt("two"), (b"BDAT 6 LAST\r\ngood\r\n", "250")],
}


class Remembers(Stage):
    """Refuses by name, and tells what it remembers of a transaction that came to DATA."""

    Settings = Settings
    kind = Kind.CHECK
    remembered: ClassVar[list[list[str]]] = []

    def mail(self, session: Session, transaction: Transaction) -> Refuse | None:
        transaction.state(self, list[str]).append(transaction.sender)
        return Refuse(Cause.SENDER_REJECTED) if transaction.sender.startswith("stage-mail@") else None

    def rcpt(self, session: Session, recipient: Recipient) -> Refuse | None:
        assert session.transaction is not None
        session.transaction.state(self, list[str]).append(recipient.address)
        return Refuse(Cause.RECIPIENT_REJECTED) if recipient.address.startswith("stage-rcpt@") else None

    def data(self, session: Session, transaction: Transaction) -> Refuse | None:
        self.remembered.append(transaction.state(self, list[str]))
        return Refuse(Cause.CONTENT) if transaction.sender.startswith("stage-data@") else None


@dataclass
class Upstream:
    """Refuses by name too; `mails` are sender, recipients and content of what it took."""

    mails: list[tuple[str, list[str], bytes]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        writer.write(b"220 upstream.test ESMTP\r\n")
        mail, recipients = "", list[str]()
        while line := (await reader.readline()).decode():
            verb, name = line[:4].upper(), line.partition("<")[2].partition("@")[0]
            reply = {"QUIT": "221 2.0.0 Bye", "DATA": "354 go"}.get(verb, "250 2.0.0 Ok")
            if verb == "EHLO":
                reply = "".join(f"250-{word}\r\n" for word in EHLO) + "250 8BITMIME"
            elif verb == "MAIL" and mail:
                reply = "503 5.5.1 nested MAIL command"
            elif verb in ("MAIL", "RSET"):
                mail, recipients = name, []
                if mail == "mail":
                    mail, reply = "", "550 5.7.1 no"
            elif verb == "RCPT" and name == "nobody":
                reply = "550 5.1.1 no"
            elif verb == "RCPT":
                recipients.append(name)
            elif verb == "DATA" and mail == "data":
                reply = "451 4.3.0 no"
            elif verb == "DATA":
                if (answer := await self._content(mail, recipients, reader, writer)) is None:
                    break
                mail, recipients, reply = "", [], answer
            writer.write(reply.encode() + b"\r\n")
        writer.close()

    async def _content(
        self, mail: str, recipients: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> str | None:
        """354, the content, and the reply to it; None for an end of the connection."""
        writer.write(b"354 go\r\n")
        content = b""
        while not (b"\r\n" + content).endswith(b"\r\n.\r\n"):
            if mail == "lost":
                return None
            if mail == "early":
                writer.write(b"552 5.3.4 too much\r\n")
            try:
                content += await reader.readuntil(b"\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
        if mail == "spam":
            return "554 5.7.1 spam"
        self.mails.append((mail, recipients, content[:-3]))
        return "250 2.0.0 queued"


GRADES: dict[str, list[object]] = {
    "envelope": [],
    "content": [{"reads": {"read": "body"}}],
    "content, held": [{"reads": {"read": "body", "edits": "any"}}],
}
# What is different where the upstream hears DATA after the verdicts.
HELD: dict[str, list[Step]] = {
    "DATA, upstream": [sender("data"), B, ("DATA", "354"), (CONTENT, "451"), *OVER],
    "chunks, upstream": [sender("data"), B, (CHUNK + CHUNK + LAST, "250 250 451"), *OVER],
}


@asynccontextmanager
async def between(upstream: Upstream, reading: Sequence[object]) -> AsyncIterator[Gateway]:
    """A gateway in front of it that also offers AUTH and XCLIENT, with stages that read the messages."""
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pipeline = {
        "relay": "open",
        "allow_plaintext_auth": True,
        "trust": {"xclient": ["127.0.0.1"]},
        "limits": {"message_size": 30_000},
        "upstreams": {"mta": {"servers": [f"smtp://127.0.0.1:{port}"], "capabilities": {"assume": [*EHLO]}}},
        "stages": [
            {"users": {"users": {"tim": "tanstaaf"}}}, "remembers", {"received": {"max_hops": 2}}, *reading,
            {"splice": {"handoff": "never"}},
        ],
    }  # fmt: skip
    try:
        async with running(pipeline, stages={**STAGES, "remembers": Remembers}) as gateway:
            yield gateway
            await gateway.idle()
    finally:
        server.close()


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """uvloop: the transcripts play on both loops."""
    return "asyncio", {"use_uvloop": True}


@pytest.mark.anyio
@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize("by", GOOD)
async def test_a_good_message_follows(by: str, grade: str) -> None:
    for name, steps in {**ROWS, **(HELD if grade == "content, held" else {})}.items():
        Remembers.remembered.clear()
        upstream = Upstream()
        async with between(upstream, GRADES[grade]) as gateway:
            client = await Client.connected(gateway.port)
            assert await client.code() == "220"
            for command, codes in [("EHLO client.test", "250"), *steps, ("NOOP", "250"), *GOOD[by], ("QUIT", "221")]:
                await client.send(command if isinstance(command, bytes) else command.encode() + b"\r\n")
                got = [await client.code() for _ in codes.split()]
                assert got == codes.split(), (name, command[:60], got[-1])
            assert await client.code() == "closed"
            client.leave()
        ((mail, recipients, content),) = upstream.mails
        assert (mail, recipients, content.endswith(b"\r\ngood\r\n")) == ("good", ["one", "two"], True), name
        assert b"evil" not in content, name
        expected = [f"{local}@example.org" for local in ("good", "one", "two")]
        assert Remembers.remembered[-1] == expected, (name, Remembers.remembered)
