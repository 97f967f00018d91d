"""Generated mail sent through Postfix with a filter, and through the gateway with the same filter: what became of it.

Both legs end in a Postfix that stores what it accepted. An Outcome has what a client, a recipient and the filter saw.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from random import Random

import yaml

from gateway.testing.gateway import running
from tests.interop.conftest import StartPostfix
from tests.interop.generated_messages import SEED, Message
from tests.interop.mail_client import STRANGER, MailClient, connected
from tests.peers.milter_program import Event, RecordingMilter
from tests.peers.postfix import Postfix
from tests.peers.process import scratch, wait_for

# Every address of local.test has a mailbox; nothing is rewritten, as for any client that is not local.
MAIN = """\
virtual_mailbox_maps = static:user/
local_header_rewrite_clients =
smtpd_error_sleep_time = 0
smtpd_soft_error_limit = 1000
smtpd_hard_error_limit = 1000
"""


@dataclass(slots=True)
class Outcome:
    """What became of a message: replies, from MAIL to the end; each (sender, content) by recipient; events; macros."""

    replies: list[str] = field(default_factory=list)
    stored: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)
    events: list[tuple[object, ...]] = field(default_factory=list)
    macros: list[tuple[object, ...]] = field(default_factory=list)


# -- the mail ---------------------------------------------------------------------------------------------------


def sessions(mail: Sequence[Message]) -> Iterator[list[Message]]:
    """One to five messages at a time, the same at each run."""
    rng = Random(f"{SEED} sessions")
    start = 0
    while start < len(mail):
        size = rng.randint(1, 5)
        yield list(mail[start : start + size])
        start += size


async def send(port: int, mail: Sequence[Message], *, bdat: bool = False) -> dict[int, list[str]]:
    """All of it, in one session after the other, with DATA or BDAT: the replies by message."""
    replies = {}
    for together in sessions(mail):
        async with connected(port, source=STRANGER) as client:
            for message in together:
                replies[message.number] = await transaction(client, message, bdat=bdat)
            assert (await client.say("QUIT")).startswith("221")
    return replies


async def transaction(client: MailClient, message: Message, *, bdat: bool = False) -> list[str]:
    """One message, as far as it is accepted: codes, and the whole text of refusals."""
    if message.greets_again:
        assert (await client.say("EHLO again.test")).startswith("250")
    replies = [await client.say(f"MAIL FROM:<{message.sender}>{message.parameters}")]
    if replies[-1].startswith("2"):
        replies += [await client.say(f"RCPT TO:<{recipient}>") for recipient in message.recipients]
        if not message.abandoned and any(reply.startswith("2") for reply in replies[1:]):
            replies += await chunks(client, message) if bdat else [await client.content(message.content)]
    if not replies[-1].startswith("2") or message.abandoned:
        assert (await client.say("RSET")).startswith("250")
    return [reply if reply[0] in "45" else reply[:3] for reply in replies]


async def chunks(client: MailClient, message: Message) -> list[str]:
    """One to three BDAT commands, as far as they are accepted; only the last may be empty."""
    rng, content = Random(f"{SEED} chunks {message.number}"), message.content
    cuts = sorted({0, *(rng.randint(0, len(content)) for _ in range(rng.randint(0, 2)))})
    cuts.append(len(content))
    replies: list[str] = []
    for start, end in pairwise(cuts):
        last = " LAST" if end == len(content) else ""
        await client.send(f"BDAT {end - start}{last}\r\n".encode() + content[start:end])
        replies.append(await client.reply())
        if last or not replies[-1].startswith("2"):
            break
    return replies


# -- what became of it ------------------------------------------------------------------------------------------

_TRACE = re.compile(rb"^Received: from [^\n]*\n(?:[ \t][^\n]*\n)*", re.MULTILINE)
_ENVELOPE = re.compile(rb"Return-Path: <(.*)>\nX-Original-To: (.*)\nDelivered-To: (.*)\n")


def settled(postfix: Postfix) -> bool:
    """Whether nothing waits for delivery; what is on hold does not."""
    spool = postfix.folder / "spool"
    return not any(path.is_file() for name in ("incoming", "active", "deferred") for path in (spool / name).rglob("*"))


def stored(postfix: Postfix) -> dict[str, list[tuple[str, bytes]]]:
    """Each (sender, content without trace fields) by recipient."""
    found: dict[str, list[tuple[str, bytes]]] = {}
    for message in postfix.delivered():
        envelope = _ENVELOPE.match(message)
        assert envelope is not None, message[:500]
        sender, _, recipient = (group.decode() for group in envelope.groups())
        found.setdefault(recipient, []).append((sender, without_received(message[envelope.end() :])))
    return found


def without_received(content: bytes) -> bytes:
    """Without the field that the storing Postfix put in; a filter may have put others above it."""
    header = content.partition(b"\n\n")[0] + b"\n"
    own = [match for match in _TRACE.finditer(header) if b" by mx.test (Postfix) " in match[0].replace(b"\n\t", b" ")]
    assert len(own) == 1, header[:1000]
    return content[: own[0].start()] + content[own[0].end() :]


def told(event: Event) -> tuple[object, ...]:
    """An event with what both legs must agree on; nothing of ports and times."""
    match event["event"]:
        case "connect":
            address = event["address"]
            assert isinstance(address, list)
            return ("connect", event["name"], event["family"], address[0])
        case "mail" | "rcpt" as name:
            return (name, event["address"], event["parameters"])
        case name:
            return (name, *(event[key] for key in ("name", "value", "data") if key in event))


OWN_MACROS = {
    "i": "the gateway's own id of session or message, known from CONNECT on; Postfix's queue id, known from DATA on",
    "v": "`mail-gateway` and its version",
    "{daemon_port}": "the port of the gateway's listener",
    "{client_port}": "the client's port, another for each connection",
    "{client_connections}": "not sent: the gateway knows it only where a `connection_limit` stage counts",
    "{if_addr}": "the address that the client connected to; Postfix 3.7 does not send it, sendmail does",
    "{if_name}": "the gateway's `hostname`; Postfix 3.7 does not send it, sendmail does",
    "{verify}": "`OK`, `FAIL` or `NO` (no certificate); Postfix 3.7 does not send it, sendmail does",
    "{rcpt_mailer}": "`smtp`, since all mail leaves by SMTP or LMTP; Postfix sends the name of its transport",
}
"""Macros whose values cannot be the same on both legs, with the reason."""


def macros(event: Event) -> tuple[object, ...]:
    """The macros that the filter knew at an event, but for OWN_MACROS."""
    known = event.get("macros", {})
    assert isinstance(known, dict)
    return (event["event"], *sorted(item for item in known.items() if item[0] not in OWN_MACROS))


def with_mail(recorder: RecordingMilter) -> list[list[Event]]:
    """The filter's sessions but for those without a transaction (a gateway that asks Postfix for its EHLO)."""
    return [session for session in recorder.sessions() if any(event["event"] == "mail" for event in session)]


def closed(recorder: RecordingMilter) -> int:
    """How many of these have ended."""
    return sum(session[-1]["event"] == "close" for session in with_mail(recorder))


def events_by_message(
    recorder: RecordingMilter, mail: Sequence[Message]
) -> dict[int, tuple[list[tuple[object, ...]], list[tuple[object, ...]]]]:
    """What the filter was told of each message, events and macros; connect and helo before it count as its own."""
    found = {}
    recorded = with_mail(recorder)
    expected = list(sessions(mail))
    assert len(recorded) == len(expected), "a connection to the filter for each session"
    for session, together in zip(recorded, expected, strict=True):
        events = [event for event in session if event["event"] != "negotiate"]
        starts = [place for place, event in enumerate(events) if event["event"] == "mail"]
        starts = [place - 1 if events[place - 1]["event"] == "helo" else place for place in starts[1:]]
        assert len(starts) == len(together) - 1, (together, events)
        for message, start, end in zip(together, [0, *starts], [*starts, len(events)], strict=True):
            own = events[start:end]
            found[message.number] = (
                [told(event) for event in own],
                [known for known, _ in groupby(macros(event) for event in own)],
            )
    return found


async def outcomes(
    mail: Sequence[Message], replies: dict[int, list[str]], postfix: Postfix, recorder: RecordingMilter
) -> dict[int, Outcome]:
    """Everything together, once all is delivered and the filter knows that the last session has ended."""
    await asyncio.to_thread(wait_for, lambda: settled(postfix), "delivery of everything", 60.0)
    await asyncio.to_thread(wait_for, lambda: closed(recorder) >= len(list(sessions(mail))), "the end of all sessions")
    events = events_by_message(recorder, mail)
    found = {message.number: Outcome(replies[message.number], {}, *events[message.number]) for message in mail}
    for recipient, what in stored(postfix).items():
        number = re.search(r"\bm(\d+)", recipient, re.IGNORECASE)
        assert number is not None, recipient
        found[int(number[1])].stored[recipient] = what
    return found


# -- the legs ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def recording(*options: str) -> AsyncIterator[RecordingMilter]:
    """The filter for a leg."""
    with scratch() as folder:
        recorder = RecordingMilter(folder, *options)
        await asyncio.to_thread(recorder.start)
        try:
            yield recorder
        finally:
            await asyncio.to_thread(recorder.stop)


async def through_postfix(
    start_postfix: StartPostfix, mail: Sequence[Message], *options: str, bdat: bool = False
) -> dict[int, Outcome]:
    """Postfix asks the filter itself; `options` are the filter's."""
    async with recording(*options) as recorder:
        postfix = await asyncio.to_thread(lambda: start_postfix(main=f"{MAIN}smtpd_milters = {recorder.address}\n"))
        found = await outcomes(mail, await send(postfix.port, mail, bdat=bdat), postfix, recorder)
        await asyncio.to_thread(postfix.stop)
        return found


PIPELINE = """\
hostname: mx.test
relay: open
reply_id: off
stages:
  - milter: {{socket: "{socket}"}}
  - splice
upstreams:
  postfix: {{servers: ["smtp://127.0.0.1:{port}"]}}
"""


async def through_gateway(
    start_postfix: StartPostfix,
    mail: Sequence[Message],
    *options: str,
    pipeline: str = PIPELINE,
    bdat: bool = False,
) -> dict[int, Outcome]:
    """The gateway asks the filter; `pipeline` has places for `socket`, the filter's address, and Postfix's `port`."""
    async with recording(*options) as recorder:
        postfix = await asyncio.to_thread(lambda: start_postfix(main=MAIN))
        document = yaml.safe_load(pipeline.format(socket=recorder.address, port=postfix.port))
        async with running(document, learn=True) as gateway:
            replies = await send(gateway.port, mail, bdat=bdat)
            await gateway.idle()
            found = await outcomes(mail, replies, postfix, recorder)
        await asyncio.to_thread(postfix.stop)
        return found
