"""OpenDKIM through the gateway: what it signed verifies wherever it arrives, and what it verified says so.

Signatures tell of any octet that changed on the way: the blank behind a colon, a tab in a fold, an empty last line.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import dkim
import pytest

from gateway.testing.gateway import Gateway, running
from tests.interop.conftest import StartPostfix
from tests.interop.mail_client import MailClient, by_sender, connected, without_trace
from tests.interop.postfix_upstream import AUTHORIZED, Stages, stored
from tests.peers.opendkim import DkimKey, OpenDkim, dkim_key
from tests.peers.postfix import Postfix
from tests.peers.process import Process, scratch
from tests.peers.rspamd import Rspamd

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

USER, LOGIN, PASSWORD = "user@local.test", "joe@example.org", "secret"
MAIN = f"{AUTHORIZED}local_header_rewrite_clients =\n"
CANONICAL = ["relaxed/relaxed", "simple/simple", "relaxed/simple"]

HEADER = b"From: a@x.test\r\nTo: user@local.test\r\nSubject: signed\r\n"
LONG = b"x" * 990
MESSAGES = {
    "plain": HEADER + b"\r\nhello\r\n",
    "eight-bit": HEADER + b"\r\nGr\xc3\xbc\xc3\x9fe \xff\xfe\r\n",
    "raw-header": HEADER.replace(b"signed", b"Gr\xc3\xbc\xc3\x9fe") + b"\r\nhello\r\n",
    "mime": HEADER + b'MIME-Version: 1.0\r\nContent-Type: multipart/mixed;\r\n\tboundary="b"\r\n\r\npreamble\r\n--b\r\n'
    b"Content-Transfer-Encoding: 8bit\r\n\r\n" + LONG + b"\r\n" + LONG + b"\r\n--b\r\n\r\n\xa0\r\n--b--\r\n",
    "dots": HEADER + b"\r\n.\r\n..\r\n.stuffed\r\n...\r\n\r\n.\r\n",
    "empty-lines": HEADER + b"\r\nhello\r\n\r\n\r\n\r\n",
    "only-empty-lines": HEADER + b"\r\n\r\n\r\n",
    "blanks": HEADER + b"\r\n \t two  blanks \t\r\n\thello\t\r\n \r\n",
    "no-body": HEADER + b"\r\n",
    "no-empty-line": HEADER,
    "body-at-once": HEADER + b"no field\r\n",
    "folds": b"From: a@x.test\r\nTo:\r\n\tuser@local.test,\r\n\t\tother@local.test\r\nSubject: a\r\n\tb\r\n \t c\r\n\r\nhi\r\n",
    "odd-colons": b"from:a@x.test\r\nTO:\tuser@local.test\r\nSubject:   three, and two  \r\nCc:\r\n\r\nhello\r\n",
    "large": HEADER + b"\r\n" + b"".join(b"%07d line\r\n" % line for line in range(40_000)),
}
"""What is signed, under a name that can stand in an address."""

WAYS = [("DATA", "DATA"), ("BDAT", "BDAT"), ("DATA", "BDAT"), ("BDAT", "DATA")]
"""How it comes and how it goes on."""


@pytest.fixture(scope="module")
def key() -> Iterator[DkimKey]:
    """The key of x.test."""
    with scratch() as folder:
        yield dkim_key(folder, "x.test")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the filters have their sockets."""
    with scratch() as folder:
        yield folder


def verifies(message: bytes, key: DkimKey) -> bool:
    """What dkimpy says of the message as a mailbox has it."""

    def look_up(name: bytes, timeout: float = 5.0) -> bytes | None:
        return key.record.encode() if name == f"{key.name}.".encode() else None

    return bool(dkim.verify(message.replace(b"\n", b"\r\n"), dnsfunc=look_up))


def names(message: bytes) -> list[str]:
    """The names of its header fields, in order."""
    header = message.partition(b"\n\n")[0]
    return [line.partition(b":")[0].decode() for line in header.split(b"\n") if line[:1] not in (b" ", b"\t")]


def without(message: bytes, *fields: str) -> bytes:
    """The message without the topmost fields, which have these names."""
    lines = message.split(b"\n")
    for field in fields:
        assert lines[0].startswith(f"{field}:".encode()), lines[:8]
        lines.pop(0)
        while lines and lines[0][:1] in (b" ", b"\t"):
            lines.pop(0)
    return b"\n".join(lines)


async def started(stack: AsyncExitStack, process: Process) -> None:
    """Start it in a thread, and have it stopped with the stack."""
    await asyncio.to_thread(process.start)
    stack.push_async_callback(asyncio.to_thread, process.stop)


def hop(port: int, *stages: object, bdat: bool = False, **more: object) -> dict[str, object]:
    """A pipeline that ends at a loopback port."""
    pool = {"servers": [f"smtp://127.0.0.1:{port}"], "bdat": bdat}
    return {"stages": [*stages, "splice"], "upstreams": {"next": pool}, **more}


async def send(client: MailClient, content: bytes, name: str, how: str = "DATA") -> str:
    """One message from name@x.test: the last reply."""
    reply = await client.envelope(USER, sender=f"{name}@x.test", parameters=" BODY=8BITMIME")
    assert reply.startswith("250"), reply
    if how == "DATA":
        return await client.content(content)
    third = len(content) // 3  # no chunk ends where a line does
    return await client.chunks(content[:third], content[third : 2 * third], content[2 * third :])


# -- signing and verifying --------------------------------------------------------------------------------------


@dataclass
class Hops:
    """A gateway that signs the mail of users who log in, one behind it that verifies, and a Postfix."""

    signing: Gateway
    verifying: Gateway
    postfix: Postfix


@asynccontextmanager
async def hops(
    signer: OpenDkim, verifier: OpenDkim, postfix: Postfix, users: dict[str, object], *, bdat: bool = False
) -> AsyncIterator[Hops]:
    """The second gateway is told the client's address and not its login: OpenDKIM verifies what strangers send."""
    auth = {"auth_file": {**users["auth_file"], "required": False}}  # type: ignore[dict-item]
    filters = {"milter": verifier.address}
    second = hop(postfix.port, filters, "xclient", bdat=bdat, trust={"xclient": ["127.0.0.1"]})
    async with running(second, learn=True) as verifying:
        signs = {"milter": {"socket": signer.address, "when": "auth.trusted"}}
        first = hop(
            verifying.port, auth, signs, {"xclient": {"login": False}}, bdat=bdat,
            allow_plaintext_auth=True, trust={"xclient": ["127.0.0.6"]},
        )  # fmt: skip
        async with running(first, learn=True) as signing:
            yield Hops(signing, verifying, postfix)
            await signing.idle()


@pytest.mark.parametrize("canonicalization", CANONICAL)
async def test_signatures_verify(
    start_postfix: StartPostfix, folder: Path, key: DkimKey, users: dict[str, object], canonicalization: str
) -> None:
    """Each message in each way: dkimpy and OpenDKIM behind the next hop say pass, and nothing else was changed."""
    async with AsyncExitStack() as stack:
        signer = OpenDkim(folder, key, canonicalization=canonicalization)
        verifier = OpenDkim(folder, key, verify=True)
        await started(stack, signer)
        await started(stack, verifier)
        postfix = await asyncio.to_thread(lambda: start_postfix(main=MAIN))
        for way, (how, onwards) in enumerate(WAYS):
            async with (
                hops(signer, verifier, postfix, users, bdat=onwards == "BDAT") as served,
                connected(served.signing.port) as client,
            ):
                assert (await client.login(LOGIN, PASSWORD)).startswith("235")
                for name, content in MESSAGES.items():
                    reply = await send(client, content, f"{name}.{way}", how)
                    assert reply.startswith("250 2.0.0 Ok: "), (name, how, reply)
                    assert ("bytes queued as" in reply) == (onwards == "BDAT"), reply  # what Postfix says to BDAT
        arrived = by_sender(await stored(postfix, len(WAYS) * len(MESSAGES)))
    for name, content in MESSAGES.items():
        for way in range(len(WAYS)):
            message = without_trace(arrived[f"{name}.{way}@x.test"])
            assert f" c={canonicalization};".encode() in message and verifies(message, key), (name, WAYS[way])
            assert b"\tdkim=pass (2048-bit key" in message.partition(b"DKIM-Signature:")[0], (name, WAYS[way])
            received = without(message, "Authentication-Results", "DKIM-Signature")
            expected = content if name != "body-at-once" else content.replace(b"no field", b"\r\nno field")
            assert received == expected.replace(b"\r\n", b"\n"), (name, WAYS[way])


async def test_who_is_signed_for(
    start_postfix: StartPostfix, folder: Path, key: DkimKey, users: dict[str, object]
) -> None:
    """Users who log in, here or at a gateway in front that is trusted; not strangers."""
    async with AsyncExitStack() as stack:
        signer, verifier = OpenDkim(folder, key), OpenDkim(folder, key, verify=True)
        await started(stack, signer)
        await started(stack, verifier)
        postfix = await asyncio.to_thread(lambda: start_postfix(main=MAIN))
        served = await stack.enter_async_context(hops(signer, verifier, postfix, users))
        for name, xclient in (("login", ""), ("trusted", " LOGIN=joe"), ("told", ""), ("stranger", "")):
            source = "127.0.0.6" if name in ("trusted", "told") else "127.0.0.5"
            async with connected(served.signing.port, source=source) as client:
                if name == "login":
                    assert (await client.login(LOGIN, PASSWORD)).startswith("235")
                if source == "127.0.0.6":
                    assert (await client.say(f"XCLIENT ADDR=192.0.2.9{xclient}")).startswith("220")
                    await client.say("EHLO client.test")
                assert (await send(client, MESSAGES["plain"], name)).startswith("250")
        arrived = by_sender(await stored(postfix, 4))
        for name in ("login", "trusted"):
            assert verifies(arrived[f"{name}@x.test"], key) and b"dkim=pass" in arrived[f"{name}@x.test"], name
        for name in ("told", "stranger"):
            message = arrived[f"{name}@x.test"]
            assert b"DKIM-Signature" not in message and b"dkim=none" in message, name


async def test_bad_signatures_are_refused(
    start_postfix: StartPostfix, folder: Path, key: DkimKey, users: dict[str, object]
) -> None:
    """In OpenDKIM's words, in the session, which goes on."""
    async with AsyncExitStack() as stack:
        signer, verifier = OpenDkim(folder, key), OpenDkim(folder, key, verify=True)
        await started(stack, signer)
        await started(stack, verifier)
        postfix = await asyncio.to_thread(lambda: start_postfix(main=MAIN))
        served = await stack.enter_async_context(hops(signer, verifier, postfix, users))
        async with connected(served.signing.port) as client:
            assert (await client.login(LOGIN, PASSWORD)).startswith("235")
            assert (await send(client, MESSAGES["dots"], "first")).startswith("250")
        (message,) = await stored(postfix, 1)
        signed = without(without_trace(message), "Authentication-Results").replace(b"\n", b"\r\n")
        altered = {
            "body": (b"stuffed", b"stuffen"),
            "field": (b"Subject: signed", b"Subject: sighed"),
            "second From": (b"From: a@x.test", b"From: a@x.test\r\nFrom: b@x.test"),
        }
        async with connected(served.verifying.port) as client:
            for how in ("DATA", "BDAT"):
                for what, (old, new) in altered.items():
                    assert signed.count(old) == 1, what
                    reply = await send(client, signed.replace(old, new), "altered", how)
                    assert reply.startswith("550 5.7.0 bad DKIM signature data"), (what, how, reply)
                assert (await send(client, signed, f"again.{how}", how)).startswith("250")
        arrived = by_sender(await stored(postfix, 3))
        assert sorted(arrived) == ["again.BDAT@x.test", "again.DATA@x.test", "first@x.test"]
        assert all(message.count(b"dkim=pass") == 1 for message in arrived.values())


# -- among other stages -----------------------------------------------------------------------------------------

ORDERS: dict[str, tuple[list[str], list[str]]] = {
    "received before": (["received", "milter"], ["DKIM-Signature", "Received", "From"]),
    "received behind": (["milter", "received"], ["DKIM-Signature", "Received", "From"]),
    "none": (["milter"], ["DKIM-Signature", "From"]),
}


@pytest.mark.parametrize("order", ORDERS)
async def test_the_order_of_fields(start_postfix: StartPostfix, folder: Path, key: DkimKey, order: str) -> None:
    """A signature stands above the gateway's own Received, as it does above Postfix's where that asks the filter."""
    stages, expected = ORDERS[order]
    async with AsyncExitStack() as stack:
        signer = OpenDkim(folder, key)
        await started(stack, signer)
        postfix = await asyncio.to_thread(lambda: start_postfix(main=MAIN))
        chain: Stages = [{"milter": signer.address} if stage == "milter" else stage for stage in stages]
        served = await stack.enter_async_context(running(hop(postfix.port, *chain, "xclient"), learn=True))
        async with connected(served.port) as client:
            assert (await send(client, MESSAGES["folds"], "a")).startswith("250")
        (message,) = await stored(postfix, 1)
        assert names(without_trace(message)) == [*expected, "To", "Subject"]
        assert verifies(message, key)


async def test_a_signature_over_what_the_filter_before_made(
    start_postfix: StartPostfix, folder: Path, key: DkimKey
) -> None:
    """rspamd adds fields, a `headers` stage changes one, then OpenDKIM signs them."""
    async with AsyncExitStack() as stack:
        rspamd_folder = stack.enter_context(scratch())
        rspamd = Rspamd(rspamd_folder)
        signer = OpenDkim(
            folder, key, canonicalization="simple/simple", options="SignHeaders From,Subject,X-Spam,X-Spamd-Result\n"
        )
        await started(stack, rspamd)
        await started(stack, signer)
        postfix = await asyncio.to_thread(lambda: start_postfix(main=MAIN))
        tag = {"headers": [{"change": "Subject", "matches": "^", "with": "[EXT] "}]}
        filters: Stages = [
            {"milter": {"id": "rspamd", "socket": rspamd.address}},
            tag,
            {"milter": {"id": "opendkim", "socket": signer.address}},
        ]
        served = await stack.enter_async_context(running(hop(postfix.port, *filters, "xclient"), learn=True))
        async with connected(served.port) as client:
            for how in ("DATA", "BDAT"):
                content = HEADER.replace(b"signed", b"markme") + b"\r\n.hello\r\n"
                assert (await send(client, content, how, how)).startswith("250")
        for message in await stored(postfix, 2):
            signed = re.search(rb"[;\s]h=([^;]+);", message)
            assert signed is not None and {b"X-Spam", b"X-Spamd-Result", b"Subject"} <= set(signed[1].split(b":"))
            assert b"\nSubject: [EXT] markme\n" in message and b"\nX-Spam: Yes\n" in message
            assert verifies(message, key)
            for old, new in (
                (b"X-Spam: Yes", b"X-Spam: No"),
                (b"[EXT] ", b""),
                (b"T_SUBJECT(7.00)", b"T_SUBJECT(0.00)"),
            ):
                assert old in message and not verifies(message.replace(old, new), key), old
