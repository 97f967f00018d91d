"""LMTP with real programs: Dovecot as the store behind the gateway, Postfix's lmtp(8) as its client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager

import pytest

from gateway.testing.gateway import running
from tests.interop.conftest import Records, StartPostfix
from tests.interop.mail_client import STRANGER, MailClient, connected
from tests.interop.postfix_upstream import MESSAGE, handed_off, logged
from tests.peers.dovecot import DovecotStore
from tests.peers.milter_program import RecordingMilter
from tests.peers.process import free_port, scratch, wait_for
from tests.peers.smtp_sink import SmtpSink

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

GRADES: dict[str, list[object]] = {"opaque": ["splice"], "envelope": [{"splice": {"handoff": "never"}}]}
both_grades = pytest.mark.parametrize("grade", GRADES)
USERS = ("joe@local.test", "ann@local.test")
FULL = "full@local.test"


@pytest.fixture
def sink() -> Iterator[SmtpSink]:
    """An SMTP server that takes everything."""
    with scratch() as folder, SmtpSink(folder) as sink:
        yield sink


@pytest.fixture
def store() -> Iterator[DovecotStore]:
    """Two users with room, one without."""
    with scratch() as folder, DovecotStore(folder, USERS, [FULL]) as store:
        yield store


def lhlo(port: int) -> AbstractAsyncContextManager[MailClient]:
    """An LMTP client."""
    return connected(port, hello="LHLO")


def url(store: DovecotStore, way: str = "inet") -> str:
    return f"lmtp://127.0.0.1:{store.port}" if way == "inet" else f"lmtp+unix:{store.socket}"


def pipeline(server: str, stages: list[object], listen: str = "lmtp://127.0.0.1:0", **pool: object) -> dict[str, object]:
    """One server behind one listener."""
    upstreams = {"store": {"servers": [server], **pool}}
    return {"listen": [listen], "relay": "open", "stages": stages, "upstreams": upstreams}


async def delivered(store: DovecotStore, user: str, count: int) -> None:
    """Wait until the user has this many messages."""
    await asyncio.to_thread(wait_for, lambda: len(store.delivered(user)) >= count, f"{count} messages")
    assert len(store.delivered(user)) == count


async def replies(client: MailClient, first: str, count: int) -> list[str]:
    """The codes of the reply that was read and of those that follow it."""
    return [reply.partition(" <")[0] for reply in [first, *[await client.reply() for _ in range(count - 1)]]]


@both_grades
@pytest.mark.parametrize("way", ["inet", "unix"])
async def test_dovecot_answers_each_recipient(store: DovecotStore, records: Records, grade: str, way: str) -> None:
    async with running(pipeline(url(store, way), GRADES[grade]), learn=True) as gateway:
        async with lhlo(gateway.port) as client:
            assert (await client.envelope(USERS[0])).startswith("250")
            assert (await client.say("RCPT TO:<nobody@local.test>")).startswith("550 5.1.1")
            assert (await client.say(f"RCPT TO:<{FULL}>")).startswith("250")
            assert (await client.say(f"RCPT TO:<{USERS[1]}>")).startswith("250")
            first = await client.content(MESSAGE)
            assert await replies(client, first, 3) == ["250 2.0.0", "552 5.2.2", "250 2.0.0"]
            assert (await client.envelope(FULL)).startswith("250")
            assert (await client.content(MESSAGE)).startswith("552 5.2.2")
            assert (await client.say("QUIT")).startswith("221")
        await gateway.idle()
    for user in USERS:
        await delivered(store, user, 1)
        assert store.delivered(user)[0].endswith(MESSAGE.replace(b"\r\n", b"\n"))
    assert handed_off(records) == (grade == "opaque")
    if grade == "envelope":
        first_record = records.all("transaction")[0]
        assert [str(text).partition(" <")[0] for text in first_record["replies"]] == [  # type: ignore[attr-defined]
            f"{USERS[0]} 250 2.0.0", f"{FULL} 552 5.2.2", f"{USERS[1]} 250 2.0.0",
        ]  # fmt: skip
        assert str(first_record["reply"]).startswith("250 ") and len(first_record["refused"]) == 1  # type: ignore[arg-type]


async def test_dovecot_behind_an_smtp_listener(store: DovecotStore) -> None:
    """Nobody's copy is lost: each recipient has a transaction of its own."""
    served = pipeline(url(store), GRADES["opaque"], "smtp://127.0.0.1:0")
    async with running(served, learn=True) as gateway, connected(gateway.port) as client:
        assert "LIMITS RCPTMAX=1" in await client.say("EHLO client.test")
        assert (await client.envelope(*USERS)).startswith("452 4.5.3")
        assert (await client.content(MESSAGE)).startswith("250 2.0.0 <joe@")
        assert (await client.envelope(USERS[1])).startswith("250")
        assert (await client.chunks(MESSAGE[:9], MESSAGE[9:])).startswith("250 2.0.0 <ann@")
        assert (await client.envelope(FULL)).startswith("250")
        assert (await client.content(MESSAGE)).startswith("552 5.2.2")
    for user in USERS:
        await delivered(store, user, 1)


async def test_dovecot_is_told_of_the_client(records: Records) -> None:
    """XCLIENT in LMTP: a new greeting, and LHLO again; no hand-off to who trusts the gateway."""
    with scratch() as folder, DovecotStore(folder, USERS, xclient=True) as store:
        for stages in (["splice"], ["xclient", "splice"]):
            async with running(pipeline(url(store), [*stages]), learn=True) as gateway:
                async with lhlo(gateway.port) as client:
                    assert (await client.envelope(*USERS)).startswith("250")
                    assert await replies(client, await client.content(MESSAGE), 2) == ["250 2.0.0"] * 2
                await gateway.idle()
            assert not handed_off(records)
            seen = STRANGER if "xclient" in stages else "127.0.0.1"
            await asyncio.to_thread(store.wait_log, f"Disconnect from {seen}:")


@both_grades
async def test_a_large_message_for_many(store: DovecotStore, grade: str) -> None:
    """The same recipient may be named often: still a reply for each (RFC 2033 4.2)."""
    message = b"Subject: big\r\n\r\n" + b"".join(b".%071d\r\n" % number for number in range(30_000))
    async with running(pipeline(url(store), GRADES[grade]), learn=True) as gateway, lhlo(gateway.port) as client:
        assert (await client.envelope(*USERS * 3)).startswith("250")
        assert await replies(client, await client.content(message), 6) == ["250 2.0.0"] * 6
    for user in USERS:
        await delivered(store, user, 1)  # Dovecot stores one for each user
    assert store.delivered(USERS[0])[0].endswith(message.replace(b"\r\n", b"\n"))


CONTENT_STAGES: list[object] = [
    {"size_limit": {"max": "1m", "rules": [{"when": f'rcpt.to == "{USERS[1]}"', "max": "10k"}]}},
    {"mime_guard": {"action": "header"}},
    "splice",
]
ATTACHED = (
    b"Subject: test\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n\r\nhello\r\n"
    b"--x\r\nContent-Disposition: attachment; filename=a.exe\r\n\r\n%b\r\n--x--\r\n"
)


async def test_stages_that_read_and_mark_before_dovecot(store: DovecotStore, records: Records) -> None:
    """Each recipient has a limit of his own, and what all get is marked."""
    async with running(pipeline(url(store), CONTENT_STAGES), learn=True) as gateway:
        async with lhlo(gateway.port) as client:
            assert (await client.envelope(USERS[0], FULL, USERS[1])).startswith("250")
            first = await client.content(ATTACHED % ((b"y" * 70 + b"\r\n") * 300))
            assert await replies(client, first, 3) == ["250 2.0.0", "552 5.2.2", "552 5.3.4 message size exceeds limit"]
            assert (await client.envelope(*USERS)).startswith("250")
            assert await replies(client, await client.chunks(MESSAGE[:9], MESSAGE[9:]), 2) == ["250 2.0.0"] * 2
        await gateway.idle()
    await delivered(store, USERS[0], 2)
    await delivered(store, USERS[1], 1)
    assert sum(b"\nX-Mime-Guard: " in message for message in store.delivered(USERS[0])) == 1
    assert [record.get("edited") for record in records.all("transaction")] == [["mime_guard"], None]


async def test_a_milter_filter_before_dovecot(store: DovecotStore) -> None:
    """What it changes of header, body and recipients; what it refuses has a reply for each."""
    with scratch() as folder, RecordingMilter(folder) as recorder:
        stages: list[object] = [{"milter": recorder.address}, "splice"]
        async with running(pipeline(url(store), stages), learn=True) as gateway:
            async with lhlo(gateway.port) as client:
                orders = [b"add X-Seen: yes", b"remove %b" % USERS[1].encode(), b"body new"]
                assert (await client.envelope(*USERS)).startswith("250")
                first = await client.content(b"".join(b"X-Do: %b\r\n" % order for order in orders) + MESSAGE)
                assert await replies(client, first, 2) == ["250 2.0.0"] * 2
                assert (await client.envelope(*USERS)).startswith("250")
                first = await client.content(b"X-Do: reject\r\n" + MESSAGE)
                assert await replies(client, first, 2) == ["550 5.7.1 refused as asked"] * 2
                assert (await client.envelope(USERS[1])).startswith("250")
                assert (await client.content(MESSAGE)).startswith("250 2.0.0")
            await gateway.idle()
        assert [event["address"] for event in recorder.events("rcpt")] == [f"<{USERS[i]}>" for i in (0, 1, 0, 1, 1)]
    await delivered(store, USERS[0], 1)
    await delivered(store, USERS[1], 1)
    assert store.delivered(USERS[0])[0].endswith(b"\nX-Seen: yes\n\nnew\n")
    assert store.delivered(USERS[1])[0].endswith(MESSAGE.replace(b"\r\n", b"\n"))


# Postfix's lmtp(8) says LHLO and reads a reply a recipient.
BY_LMTP = "virtual_mailbox_domains =\nrelay_domains = local.test\nrelay_transport = lmtp:{}\n"


@pytest.mark.parametrize("way", ["inet", "unix"])
@pytest.mark.parametrize("upstream", ["lmtp", "smtp"])
async def test_postfix_delivers_through_the_gateway(
    start_postfix: StartPostfix, store: DovecotStore, sink: SmtpSink, way: str, upstream: str
) -> None:
    """Two recipients of one message: Postfix logs what became of each."""
    port, path = free_port(), store.folder / "gateway.sock"
    listen = f"lmtp://127.0.0.1:{port}" if way == "inet" else f"lmtp+unix:{path}"
    nexthop = f"inet:[127.0.0.1]:{port}" if way == "inet" else f"unix:{path}"
    server = url(store) if upstream == "lmtp" else f"smtp://127.0.0.1:{sink.port}"
    stages: list[object] = [{"splice": {"handoff": "never"}}]
    postfix = await asyncio.to_thread(start_postfix, main=BY_LMTP.format(nexthop))
    async with running(pipeline(server, stages, listen), learn=True) as gateway:
        if way == "unix":
            path.chmod(0o666)
        async with connected(postfix.port) as client:
            assert (await client.envelope(USERS[0], FULL)).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
        await logged(postfix, rf"to=<{USERS[0]}>, .*dsn=2.0.0, status=sent \(250 ")
        if upstream == "lmtp":
            await logged(postfix, rf"to=<{FULL}>, .*dsn=5.2.2, status=bounced \(.* said: 552 5.2.2")
        else:
            await logged(postfix, rf"to=<{FULL}>, .*dsn=2.0.0, status=sent \(250 ")
        await gateway.idle()
    if upstream == "lmtp":
        await delivered(store, USERS[0], 1)
