"""What becomes of a message, recipient by recipient: the replies, the log, what stages see (RFC 2033)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import Kind, Outcome, Session, Stage, Transaction
from gateway.frontend.lmtp import best, finals, worst
from gateway.observe import logs
from gateway.protocol.smtp import Reply
from gateway.relay.outgoing import Answer
from gateway.testing.gateway import running
from gateway.verdicts import Cause, Refuse

OK, FULL, LATER, BYE = (Reply.of(text) for text in ("250 ok", "552 full", "451 later", "421 bye"))
LOST = Refuse(Cause.UPSTREAM_LOST)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([OK], [OK] * 3),
        ([LOST], [LOST] * 3),
        ([OK, FULL, LATER], [OK, FULL, LATER]),
        ([OK, LOST, LOST], [OK, LOST, LOST]),
    ],
)
def test_one_answer_holds_for_all(answers: list[Answer], expected: list[Answer]) -> None:
    assert finals(answers, 3) == expected


def test_a_server_that_leaves_does_not_make_us_leave() -> None:
    first, *others = finals([BYE], 3)
    assert isinstance(first, Refuse) and first.cause is Cause.UPSTREAM_LOST and "421 bye" in first.log
    assert all(other is first for other in others)  # one refusal, one log record
    assert [type(answer) for answer in finals([OK, BYE, FULL], 3)] == [Reply, Refuse, Reply]


@pytest.mark.parametrize(
    ("replies", "taken", "told"),
    [
        ([OK], OK, OK),
        ([OK, FULL], OK, FULL),
        ([FULL, LATER], LATER, LATER),
        ([FULL, LATER, OK], OK, LATER),
    ],
)
def test_several_replies_as_one(replies: list[Reply], taken: Reply, told: Reply) -> None:
    assert (best(replies), worst(replies)) == (taken, told)


# -- the log and the stages


class Sees(Stage):
    """Keeps what it is told at the end of each message."""

    kind = Kind.PLUMBING
    seen: list[object]

    def rcpt(self, session: Session, recipient: object) -> None:
        """So that each message is read."""

    def settled(self, session: Session, outcome: Outcome) -> None:
        if outcome.phase == "message":
            self.seen.append((outcome.reply_class, outcome.cause))

    def reset(self, session: Session, transaction: Transaction) -> None:
        self.seen.append([recipient.final and recipient.final.code for recipient in transaction.recipients])
        self.seen.append(transaction.reply and transaction.reply.code)


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "log"
    logs.configure("json", "info", file=str(path))
    yield path
    logs.configure("json", "info")


async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An LMTP server: `full` has no room, and it is gone before it has answered for `gone`."""
    writer.write(b"220 upstream.test LMTP\r\n")
    recipients: list[bytes] = []
    content = False
    while line := await reader.readline():
        if content:
            content = line != b".\r\n"
            for recipient in () if content else recipients:
                if b"gone" in recipient:
                    writer.close()
                    return
                writer.write(b"552 5.2.2 full\r\n" if b"full" in recipient else b"250 2.0.0 stored\r\n")
        elif line == b"DATA\r\n":
            content = True
            writer.write(b"354 go\r\n")
        else:
            recipients += [line] if line.startswith(b"RCPT") else []
            writer.write(b"250 2.0.0 ok\r\n")
    writer.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("recipients", "codes", "reply", "told"),
    [
        (["one", "full", "two"], [250, 552, 250], 250, [(2, None)]),
        (["full", "full"], [552, 552], 552, [(5, None)]),
        (["full", "one", "gone", "two"], [552, 250, 451, 451], 250, [(4, Cause.UPSTREAM_LOST), (2, None)]),
        (["gone", "one"], [451, 451], 451, [(4, Cause.UPSTREAM_LOST)]),
    ],
)
async def test_each_recipient_is_in_the_log(
    log_file: Path, recipients: list[str], codes: list[int], reply: int, told: list[object]
) -> None:
    Sees.seen = []
    server = await asyncio.start_server(served, "127.0.0.1", 0)
    url = f"lmtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    pipeline: dict[str, object] = {
        "listen": ["lmtp://127.0.0.1:0"], "stages": ["sees", "splice"], "relay": "open",
        "upstreams": {"store": {"servers": [url], "capabilities": {"assume": []}}},
    }  # fmt: skip
    async with running(pipeline, stages={"sees": Sees}) as gateway, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        rcpts = "".join(f"RCPT TO:<{name}@example.org>\r\n" for name in recipients)
        writer.write(b"LHLO c\r\n")
        while not (await reader.readline()).startswith(b"250 "):
            pass
        writer.write(f"MAIL FROM:<a@example.org>\r\n{rcpts}DATA\r\n".encode())
        while not (await reader.readline()).startswith(b"354 "):
            pass
        writer.write(b"x\r\n.\r\nQUIT\r\n")
        said = [int((await reader.readline())[:3]) for _ in recipients]
        assert (await reader.readline()).startswith(b"221 ")
        writer.close()
        await gateway.idle()
    server.close()
    assert said == codes
    assert Sees.seen == [*told, codes, reply]
    records = [json.loads(line) for line in log_file.read_text().splitlines()]
    (transaction,) = (record for record in records if record["record"] == "transaction")
    assert [text.split()[:2] for text in transaction["replies"]] == [
        [f"{name}@example.org", str(code)] for name, code in zip(recipients, codes, strict=True)
    ]
    assert transaction["reply"].startswith(str(reply)) and len(transaction["recipients"]) == len(recipients)
    assert len([record for record in records if record["record"] == "refusal"]) == (451 in codes)
