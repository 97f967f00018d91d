"""Smuggling against real upstreams: Postfix that trusts the gateway's address, and aiosmtpd.

Each message that an upstream queued has a number; those that the client was told are those that were queued, no more
and no fewer, whatever stands between CRLF and dot.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gateway.testing.gateway import running
from tests.dialogue.smuggling import ALL, BARE, END, ENDING, EVIL, FEW, LONGER, alone, opened, send_chunks, send_data
from tests.interop.conftest import StartPostfix
from tests.interop.postfix_upstream import DISCARD_FOREIGN
from tests.peers.postfix import Postfix
from tests.peers.process import wait_for

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

# What Postfix knows against smuggling is on, and off for mynetworks, where the gateway is.
PROTECTED = "smtpd_forbid_bare_newline = yes\n"
GRADES: dict[str, list[object]] = {
    "envelope": [{"splice": {"handoff": "never"}}],
}
OPAQUE: list[object] = [{"splice": {"handoff": "always"}}]
SAMPLE = [*ALL[: 4 + 4**2 + 4**3], *ALL[84::3], *LONGER, *FEW]
policies = pytest.mark.parametrize("policy", ["reject", "normalize"])
both = pytest.mark.parametrize("peer", ["postfix", "aiosmtpd"])


class PostfixPeer:
    """Postfix, which discards what it queued."""

    def __init__(self, start: StartPostfix) -> None:
        self.postfix: Postfix = start(main=PROTECTED + DISCARD_FOREIGN)
        self.url = f"smtp://127.0.0.1:{self.postfix.port}"

    def queued(self) -> list[str]:
        """The queue ids of all messages it took, once all its work is done."""
        wait_for(self._idle, "Postfix to be done")
        return re.findall(r"qmgr\[\d+\]: (\w+): from=<", self.postfix.log())

    def _idle(self) -> bool:
        log = self.postfix.log()
        spool = self.postfix.folder / "spool"
        left = [path for name in ("incoming", "active", "deferred") for path in (spool / name).rglob("*")]
        return log.count("]: connect from ") == log.count("]: disconnect from ") and not any(map(Path.is_file, left))


class AiosmtpdPeer:
    """The embedded upstream."""

    def __init__(self, folder: Path) -> None:
        self.maildir = folder / "mail"
        self.url = f"embedded://{self.maildir}"

    def queued(self) -> list[str]:
        """The numbers of all messages stored; a 250 is sent when one is on disk."""
        found = [re.search(rb"^\tby .* id (\w+);", path.read_bytes(), re.MULTILINE) for path in self._files()]
        return [match[1].decode() for match in found if match is not None]

    def _files(self) -> Iterator[Path]:
        return (self.maildir / "new").iterdir()


@pytest.fixture
def upstream(peer: str, request: pytest.FixtureRequest, tmp_path: Path) -> PostfixPeer | AiosmtpdPeer:
    """The peer that the test names."""
    if peer == "aiosmtpd":
        return AiosmtpdPeer(tmp_path)
    return PostfixPeer(request.getfixturevalue("start_postfix"))


def served(upstream: PostfixPeer | AiosmtpdPeer, stages: list[object], **more: object) -> dict[str, object]:
    """A pipeline in front of it."""
    pool = {"servers": [upstream.url], "capabilities": {"assume": ["PIPELINING", "8BITMIME"]}}
    return {"relay": "open", "upstreams": {"mta": pool}, "stages": stages, **more}


def told(answers: Sequence[bytes]) -> list[str]:
    """The numbers in the client's 250s."""
    return [answer.split()[-1].decode() for answer in answers if answer.startswith(b"250")]


@both
@policies
@pytest.mark.parametrize("grade", GRADES)
async def test_as_many_messages_as_accepted(upstream: PostfixPeer | AiosmtpdPeer, policy: str, grade: str) -> None:
    wires = [before + sequence + EVIL + b"\r\n" for sequence in SAMPLE for before in (b"one", b"\0")]
    wires = [wire for wire in wires if END not in b"\r\n" + wire]
    contents = [b"one" + sequence + EVIL + b"\r\n" for sequence in [*FEW, *ENDING]]
    async with running(served(upstream, GRADES[grade], line_endings=policy)) as gateway:
        first, second = await opened(gateway.port), await opened(gateway.port)
        answers = [*await send_data(first, [[wire + b".\r\n"] for wire in wires]), *await send_chunks(second, contents)]
        first.leave()
        second.leave()
        await gateway.idle()
        queued = await asyncio.to_thread(upstream.queued)
    assert len(told(answers)) == sum(policy == "normalize" or not BARE.search(wire) for wire in [*wires, *contents])
    assert sorted(queued) == sorted(told(answers))


@both
async def test_opaque(upstream: PostfixPeer | AiosmtpdPeer) -> None:
    """Nothing is looked at behind the hand-off: the upstream judges, and the client hears of each message."""
    wires = [b"one" + sequence + EVIL + END for sequence in [*FEW, *ENDING]]
    async with running(served(upstream, OPAQUE)) as gateway:
        answers = [answer for wire in wires for answer in await alone(gateway.port, wire)]
        await gateway.idle()
        queued = await asyncio.to_thread(upstream.queued)
    assert len(queued) >= len(wires)
    assert sorted(queued) == sorted(told(answers))


async def test_postfix_alone_takes_two(start_postfix: StartPostfix) -> None:
    """What the others test is possible: without a gateway this Postfix reads LF.LF as the end of data."""
    peer = PostfixPeer(start_postfix)
    answers = await alone(peer.postfix.port, b"one\n.\n" + EVIL + END)
    assert len(await asyncio.to_thread(peer.queued)) == len(answers) == 2
