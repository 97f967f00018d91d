"""A disk that fails under a message: the message is refused for now, its session and all others go on."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from tests.fault.baseline import unchanged
from tests.fault.client import connected
from tests.fault.test_milter import CONTENT, QUEUED, asks, delivered, send, serving
from tests.fault.upstream import Upstream
from tests.interop.conftest import Records
from tests.peers.scripted_milter import CONTINUE, Answer, ScriptedMilter, Wait, add_header

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("edit", [add_header(b"X", b"y"), b""], ids=["edited", "as it came"])
async def test_a_file_that_cannot_be_read_again(edit: bytes, monkeypatch: pytest.MonkeyPatch, records: Records) -> None:
    def broken(descriptor: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    judged, text = asyncio.Event(), (b"x" * 70 + b"\r\n") * 20_000
    async with (
        Upstream() as upstream,
        ScriptedMilter({"eom:1": [Wait(judged), Answer(edit, CONTINUE)]}) as milter,
        serving(upstream, asks(milter), spool={"memory": 1}) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.envelope("DATA")
        client.send(b"Subject: x\r\n\r\n" + text + b".\r\n")
        await milter.reached("eom")
        with monkeypatch.context() as disk:
            disk.setattr(os, "pread", broken)
            judged.set()
            answer = await client.reply()
        assert answer.startswith("451 4.3.0 "), answer
        assert await send(client) == ("end", QUEUED)
    assert delivered(upstream) == [CONTENT] and records.all("internal_error") == []
