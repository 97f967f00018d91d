"""What a session leaves in the log: every refusal, ours or the server's, can be found with sender and recipient."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.observe import logs
from gateway.testing.gateway import running

pytestmark = pytest.mark.anyio
REFUSED = {b"no@example.org": b"550 5.1.1 no such user", b"bad@example.org": b"553 5.1.8 bad sender"}


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "log"
    logs.configure("json", "info", file=str(path))
    yield path
    logs.configure("json", "info")


@asynccontextmanager
async def upstream() -> AsyncIterator[int]:
    """A server that knows nobody called `no`, and closes at the end of data."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 upstream.test\r\n")
        while line := await reader.readline():
            verb = line[:4].upper()
            said = next((reply for address, reply in REFUSED.items() if address in line), b"250 2.0.0 Ok")
            if verb == b"DATA":
                said = b"354 go"
            elif line == b".\r\n" or verb == b"QUIT":
                break
            if line not in (b"x\r\n", b"\r\n"):
                writer.write(said + b"\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def records_of(log_file: Path, *said: str) -> list[dict[str, object]]:
    """The records of a session in which the client says this, line by line."""
    async with upstream() as port:
        pool = {"servers": [f"smtp://127.0.0.1:{port}"], "capabilities": {"assume": []}}
        pipeline: dict[str, object] = {
            "stages": [{"splice": {"handoff": "never"}}], "relay": "open", "upstreams": {"mta": pool},
        }  # fmt: skip
        async with running(pipeline) as gateway, asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            await reader.readline()
            for line in ("HELO client.test", *said):
                writer.write(line.encode() + b"\r\n")
                if line != "x":
                    await reader.readline()
            writer.close()
            await gateway.idle()
            url = f"smtp://127.0.0.1:{port}"
    return written(log_file, url)


def written(log_file: Path, url: str) -> list[dict[str, object]]:
    """All records, with <U> for the server's URL; the file is empty afterwards."""
    text = log_file.read_text()
    log_file.write_text("")
    return [json.loads(line) for line in text.replace(url, "<U>").splitlines()]


def one(records: list[dict[str, object]], name: str) -> dict[str, object]:
    (found,) = [record for record in records if record["record"] == name]
    return found


async def test_recipients_that_the_server_refused_are_logged_though_no_message_followed(log_file: Path) -> None:
    records = await records_of(log_file, "MAIL FROM:<a@example.org>", "RCPT TO:<no@example.org>", "QUIT")
    transaction = one(records, "transaction")
    assert transaction["refused"] == ["no@example.org 550 5.1.1 no such user"]
    assert (transaction["sender"], transaction["upstream"], transaction["reply"]) == ("a@example.org", "<U>", "")


async def test_a_sender_that_the_server_refused_is_logged(log_file: Path) -> None:
    records = await records_of(log_file, "MAIL FROM:<bad@example.org>", "QUIT")
    transaction = one(records, "transaction")
    assert (transaction["sender"], transaction["reply"]) == ("bad@example.org", "553 5.1.8 bad sender")


async def test_a_message_that_was_begun_and_left_is_logged_once(log_file: Path) -> None:
    said = ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA", "x")
    transaction = one(await records_of(log_file, *said), "transaction")
    assert transaction["recipients"] == ["b@example.org 250 2.0.0 Ok"] and transaction["reply"] == ""


async def test_the_server_that_was_lost_is_named(log_file: Path) -> None:
    said = ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA", "x", ".", "QUIT")
    transaction = one(await records_of(log_file, *said), "transaction")
    assert str(transaction["reply"]).startswith("451 4.4.2") and transaction["upstream"] == "<U>"


async def test_a_refused_recipient_is_named_in_the_refusal(log_file: Path) -> None:
    records = await records_of(log_file, "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org> RET=FULL", "QUIT")
    assert not [record for record in records if record["record"] == "refusal"]  # RET belongs to MAIL: a syntax error
    records = await records_of(log_file, "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org> NOTIFY=NEVER", "QUIT")
    refusal = one(records, "refusal")
    assert (refusal["sender"], refusal["recipient"], refusal["cause"]) == (
        "a@example.org", "b@example.org", "not carried by the upstream",
    )  # fmt: skip


async def test_a_session_without_a_message_has_no_transaction(log_file: Path) -> None:
    records = await records_of(log_file, "MAIL FROM:<a@example.org>", "RSET", "QUIT")
    assert [record["record"] for record in records] == ["session"]
