"""What a client says between its BDAT chunks, while filters are at the message, is none of the filters' business."""

from __future__ import annotations

import pytest

from tests.fault.baseline import unchanged
from tests.fault.client import connected
from tests.fault.test_milter import CONTENT, QUEUED, READS_ONLY, asks, delivered, send, serving
from tests.fault.upstream import Upstream
from tests.interop.conftest import Records
from tests.peers.scripted_milter import ACCEPT, REJECT, Answer, ScriptedMilter, options

pytestmark = pytest.mark.anyio

BETWEEN = {"FOO bar": "500", "NOOP": "250", "RCPT TO:<c@example.org>": "503", "MAIL FROM:<c@example.org>": "503"}


@pytest.mark.parametrize("greeting", [options(), READS_ONLY], ids=["edits", "reads"])
@pytest.mark.parametrize(("command", "code"), BETWEEN.items())
async def test_a_command_between_chunks_does_not_come_between_filter_and_message(
    command: str, code: str, greeting: bytes, records: Records
) -> None:
    """A filter whose failures let mail pass would let this pass, too."""
    body = (b"x" * 70 + b"\r\n") * 2000
    chunks = [b"Subject: spam\r\n", b"\r\n" + body, body]
    async with (
        Upstream() as upstream,
        ScriptedMilter({"eom": Answer(REJECT)}, greeting=greeting) as milter,
        serving(upstream, asks(milter, on_error="pass"), limits={"errors": 1000}) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.envelope()
        client.send(b"".join(b"BDAT %d\r\n%s%s\r\n" % (len(chunk), chunk, command.encode()) for chunk in chunks))
        for _ in chunks:
            assert (await client.reply())[:3] == "250"
            assert (await client.reply())[:3] == code
        assert (await client.say("BDAT 0 LAST")).startswith("550 5.7.1 ")
        assert "unknown" not in milter.events()
    assert upstream.messages == [] and records.all("stage_failure") == []


@pytest.mark.parametrize("step", ["DATA", "content"])
@pytest.mark.parametrize("command", ["RSET", "EHLO client.test"])
async def test_the_client_gives_up_while_the_upstream_hears_of_the_message(
    command: str, step: str, records: Records
) -> None:
    """The filter accepted early: a command of ours, or the content, is under way when the message ends."""
    async with (
        Upstream() as upstream,
        ScriptedMilter({"header": Answer(ACCEPT)}, {}) as milter,
        serving(upstream, asks(milter), {"headers": [{"add": "X-A", "value": "1"}]}) as gateway,
        unchanged(gateway),
        connected(gateway) as client,
    ):
        await client.envelope()
        upstream.wait = step
        upstream.arm()
        client.send(b"BDAT 9\r\nA: b\r\n\r\nx")
        assert (await client.reply())[:3] == "250"
        await upstream.reached.wait()
        assert (await client.say(command))[:3] == "250"
        upstream.release()
        assert await send(client) == ("end", QUEUED)
    assert delivered(upstream) == [CONTENT.replace(b"From", b"X-A: 1\r\nFrom", 1)]
    assert records.all("internal_error") == []
