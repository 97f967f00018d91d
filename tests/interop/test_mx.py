"""pipelines/mx.yaml as it stands, between a stranger, a real rspamd and a real Postfix; and what its comments offer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interop.conftest import Authority, StartPostfix
from tests.interop.gateway_process import GatewayProcess, installation
from tests.interop.mail_client import STRANGER, MailClient, connected
from tests.interop.postfix_upstream import AUTHORIZED, FOREIGN, logged, stored
from tests.peers.clients import talk
from tests.peers.dns import DnsServer, Entry
from tests.peers.opendkim import OpenDkim, dkim_key
from tests.peers.postfix import Postfix
from tests.peers.process import Process, free_port, scratch
from tests.peers.rspamd import GTUBE, Rspamd

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

FILE = "pipelines/mx.yaml"
NAME_SERVER = "127.5.3.2"
NAMED: Mapping[str, Entry] = {
    "5.0.0.127.in-addr.arpa": {"PTR": ["spike.test."]},
    "spike.test": {"A": [STRANGER]},
}
OWN, EDGE = "127.0.0.7", "127.0.0.6"
USER = "user@local.test"
SPAM = b"From: a@x.test\r\nSubject: spam\r\n\r\n" + GTUBE + b"\r\n"


def letter(subject: str, fields: str = "") -> bytes:
    """A message; `fields` are more header lines, ended by LF."""
    return f"{fields}From: a@x.test\nSubject: {subject}\n\nhello\n".replace("\n", "\r\n").encode()


@dataclass
class Site:
    """The gateway and all that is around it."""

    gateway: GatewayProcess
    postfix: Postfix
    rspamd: Rspamd
    names: DnsServer
    port: int

    def queued(self) -> int:
        """How many messages Postfix took into its queue."""
        return self.postfix.log().count("(queue active)")

    async def last(self, count: int = 1) -> str:
        """Wait until this many messages are in the mailbox: the header and body of the newest."""
        return (await stored(self.postfix, count))[-1].decode()


async def started(stack: AsyncExitStack, process: Process) -> None:
    """Start it in a thread, and have it stopped with the stack."""
    await asyncio.to_thread(process.start)
    stack.push_async_callback(asyncio.to_thread, process.stop)


@pytest.fixture
def folder(authority: Authority) -> Iterator[Path]:
    """The shipped pipelines in a folder of their own."""
    with scratch("gateway-") as path:
        yield installation(path, authority.issue("gateway.example.org", "localhost", "127.0.0.1"))


def change(folder: Path, *changes: tuple[str, str]) -> None:
    """Edit the copy as its reader would: each text stands in it exactly once."""
    file = folder / FILE
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text)


@asynccontextmanager
async def serving(
    folder: Path,
    start_postfix: StartPostfix,
    *,
    place: str = "inet",
    main: str = AUTHORIZED,
    zone: Mapping[str, Entry] | None = None,
    **variables: str,
) -> AsyncIterator[Site]:
    """`gateway run pipelines/mx.yaml` and its peers; the address of each by the file's own variables."""
    async with AsyncExitStack() as stack:
        names = await stack.enter_async_context(DnsServer(NAMED if zone is None else zone, (NAME_SERVER, 53)))
        rspamd = Rspamd(stack.enter_context(scratch()), name_server=names.address)
        await started(stack, rspamd)
        postfix = await asyncio.to_thread(lambda: start_postfix(main=main))
        port = free_port()
        addresses = {
            "MX_LISTEN": f"127.0.0.1:{port}",
            "POSTFIX": f"127.0.0.1:{postfix.port}",
            "RSPAMD": rspamd.address if place == "unix" else rspamd.inet,
            "OWN_NETWORK": OWN,
        }
        gateway = GatewayProcess(folder, FILE, variables={**addresses, **variables}, name_server=NAME_SERVER)
        await started(stack, gateway)
        yield Site(gateway, postfix, rspamd, names, port)


async def send(client: MailClient, content: bytes, to: str = USER) -> str:
    """One message: the first reply that refuses it, else the last."""
    reply = await client.envelope(to)
    return await client.content(content) if reply.startswith("250") else reply


# -- as it stands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["inet", "unix"])
async def test_spam_is_refused_in_the_session(folder: Path, start_postfix: StartPostfix, place: str) -> None:
    """rspamd's own words reach the sender, Postfix queues nothing of it, and the session goes on."""
    async with serving(folder, start_postfix, place=place) as site, connected(site.port) as client:
        assert (await send(client, SPAM)).startswith("554 5.7.1 Gtube pattern")
        assert (await send(client, letter("tempfail"))).startswith("451 4.7.1 try later")
        assert site.queued() == 0
        assert (await send(client, letter("markme"))).startswith("250 2.0.0 Ok: queued as ")
        marked = await site.last()
        assert "\nX-Spam: Yes\n" in marked and "\nX-Spam-Status: Yes, score=7.00\n" in marked
        assert "T_SUBJECT(7.00)" in marked and marked.endswith("\n\nhello\n")
        assert (await send(client, letter("plain"))).startswith("250")
        plain = await site.last(2)
        assert "\nX-Rspamd-Action: no action\n" in plain and "X-Spam: Yes" not in plain
        assert (await send(client, SPAM)).startswith("554 5.7.1 Gtube pattern")
        assert (await client.say("QUIT")).startswith("221")
        assert site.queued() == 2
        assert [str(record["reply"])[:3] for record in site.gateway.wait_record("transaction", 5)] == [
            "554", "451", "250", "250", "554",
        ]  # fmt: skip


async def test_everybody_knows_the_client(folder: Path, start_postfix: StartPostfix) -> None:
    """rspamd asks about the stranger's address and judges the sender's SPF by it; Postfix logs it with its name."""
    zone = {
        **NAMED,
        "5.0.0.127.bl.test": {"A": ["127.0.0.2"]},
        "x.test": {"TXT": [f'"v=spf1 ip4:{STRANGER} -all"']},
    }
    async with serving(folder, start_postfix, zone=zone) as site:
        for source in (STRANGER, "127.0.0.8"):
            async with connected(site.port, source=source) as client:
                assert (await send(client, letter("who"))).startswith("250")
        listed, other = (message.decode() for message in await stored(site.postfix, 2))
        assert f"LISTED(7.00)[{STRANGER}:from]" in listed and "\nX-Spam: Yes\n" in listed
        assert f"R_SPF_ALLOW(0.10)[+ip4:{STRANGER}]" in listed
        assert "LISTED" not in other and "R_SPF_FAIL(7.00)" in other
        assert {("5.0.0.127.bl.test", "A", "udp"), ("8.0.0.127.bl.test", "A", "udp")} <= set(site.names.asked)
        assert f"ip: {STRANGER}," in site.rspamd.log() and "ip: 127.0.0.1," not in site.rspamd.log()
        await logged(site.postfix, rf"client=spike.test\[{STRANGER}\]$")
        await logged(site.postfix, r"client=unknown\[127.0.0.8\]$")
        assert f"Received: from client.test (spike.test [{STRANGER}])" in listed


@pytest.mark.parametrize("name_server", ["answers", "silent"])
async def test_other_refusals(folder: Path, start_postfix: StartPostfix, name_server: str) -> None:
    """Mail for others and from the unwanted; a name server that is down costs the name only."""
    zone = NAMED if name_server == "answers" else {"5.0.0.127.in-addr.arpa": {"do": "silent"}}
    async with serving(folder, start_postfix, zone=zone) as site, connected(site.port) as client:
        assert (await client.envelope(FOREIGN)).startswith("550 5.7.1")
        assert (await client.say("RCPT TO:<nobody@local.test>")).startswith("550 5.1.1")
        assert (await client.say("RSET")).startswith("250")
        refused = await client.envelope(USER, sender="x@spam.example")
        assert refused.startswith("554 5.7.1"), refused
        assert (await client.say("RSET")).startswith("250")
        hops = "".join(f"Received: from h{hop}.test by h.test; Sat, 1 Jan 2022 00:00:00 +0000\n" for hop in range(50))
        assert (await send(client, letter("circle", hops))).startswith("554 5.4.6")
        assert (await send(client, letter("good"))).startswith("250")
        await site.last()
        await logged(site.postfix, rf"client={'spike.test' if name_server == 'answers' else 'unknown'}\[{STRANGER}\]$")
        assert site.queued() == 1
        assert ("5.0.0.127.in-addr.arpa", "PTR", "udp") in site.names.asked


FORGED = """\
X-Spam: No
x-spam-status: No, score=-99
X-Spam-Flag: NO
X-Spamd-Result: default: False [-99.00 / 15.00];
\tWELCOME(-99.00)
X-Rspamd-Action: no action
Authentication-Results: mx.example.org; spf=pass smtp.mailfrom=x.test
Authentication-Results: relay.example.net; spf=pass smtp.mailfrom=x.test
X-Spammer: no
"""


async def test_strangers_do_not_speak_for_the_filter(folder: Path, start_postfix: StartPostfix) -> None:
    async with serving(folder, start_postfix) as site, connected(site.port) as client:
        assert (await send(client, letter("markme", FORGED))).startswith("250")
        message = await site.last()
        for gone in ("-99", "X-Spam-Flag", "X-Spam: No", "mx.example.org", "no action"):
            assert gone not in message, gone
        assert message.count("X-Spam:") == message.count("X-Spamd-Result:") == message.count("X-Rspamd-Action:") == 1
        assert "\nAuthentication-Results: relay.example.net; spf=pass smtp.mailfrom=x.test\n" in message


async def test_an_allowed_network_is_not_filtered(folder: Path, start_postfix: StartPostfix) -> None:
    """Nor may it relay."""
    async with serving(folder, start_postfix) as site, connected(site.port, source=OWN) as client:
        assert (await send(client, SPAM)).startswith("250")
        assert "X-Rspamd" not in await site.last()
        assert (await client.envelope(FOREIGN)).startswith("550 5.7.1")
        assert OWN not in site.rspamd.log()


# -- rspamd away ------------------------------------------------------------------------------------------------

AWAY = {"reject": "554 5.3.0", "disconnect": "421 4.", "pass": "250 2."}


@pytest.mark.parametrize(("when", "place"), [("before MAIL", "inet"), ("in a message", "unix")])
async def test_rspamd_goes_and_comes_back(folder: Path, start_postfix: StartPostfix, when: str, place: str) -> None:
    """The sender tries again; the same session is filtered again once rspamd is there."""
    async with serving(folder, start_postfix, place=place) as site, connected(site.port) as client:
        assert (await send(client, letter("first"))).startswith("250")
        if when == "in a message":
            assert (await client.envelope(USER)).startswith("250")
        await asyncio.to_thread(site.rspamd.stop)
        reply = await (client.content(letter("lost")) if when == "in a message" else send(client, letter("lost")))
        assert reply.startswith("451 4."), reply
        await client.say("RSET")
        assert (await send(client, letter("again"))).startswith("451 4.")
        await client.say("RSET")
        await asyncio.to_thread(site.rspamd.start)
        assert (await send(client, SPAM)).startswith("554 5.7.1 Gtube pattern")
        assert (await send(client, letter("markme"))).startswith("250")
        assert "\nX-Spam: Yes\n" in await site.last(2)
        assert site.queued() == 2


@pytest.mark.parametrize("on_error", AWAY)
async def test_rspamd_away(folder: Path, start_postfix: StartPostfix, on_error: str) -> None:
    change(folder, ("      # on_error: pass ", f"      on_error: {on_error} "))
    async with serving(folder, start_postfix) as site, connected(site.port) as client:
        await asyncio.to_thread(site.rspamd.stop)
        reply = await send(client, letter("markme"))
        assert reply.startswith(AWAY[on_error]), reply
        if on_error == "pass":
            assert "X-Spam" not in await site.last()
        (record, *_) = await asyncio.to_thread(site.gateway.wait_record, "stage_failure")
        assert record["stage"] == "rspamd" and "cannot connect" in str(record["error"]), record


# -- what its comments offer ------------------------------------------------------------------------------------


async def test_users_of_a_gateway_in_front_are_not_filtered(folder: Path, start_postfix: StartPostfix) -> None:
    """`trust: {xclient: ...}`: with a login neither filtered nor cleaned, without one as any stranger."""
    change(folder, ("# trust: {xclient: [192.0.2.25]}", f"trust: {{xclient: [{EDGE}]}}"))
    forged = letter("markme", "X-Spam-Status: No, by my own filter\n")
    async with serving(folder, start_postfix) as site:
        async with connected(site.port, source=EDGE) as client:
            assert (await client.say("XCLIENT ADDR=127.0.0.9 LOGIN=joe")).startswith("220")
            await client.say("EHLO client.test")
            assert (await send(client, SPAM)).startswith("250")
            await site.last(1)  # or the next one may overtake it
            assert (await send(client, forged)).startswith("250")
            kept = await site.last(2)
            assert "\nX-Spam-Status: No, by my own filter\n" in kept and "X-Rspamd" not in kept
        async with connected(site.port, source=EDGE) as client:
            reply = await client.say("XCLIENT ADDR=127.0.0.10")
            assert reply.startswith("220"), reply
            await client.say("EHLO client.test")
            assert (await send(client, SPAM)).startswith("554 5.7.1 Gtube pattern")
            assert (await send(client, forged)).startswith("250")
            assert "by my own filter" not in await site.last(3)
        assert "ip: 127.0.0.10," in site.rspamd.log() and "ip: 127.0.0.9," not in site.rspamd.log()


async def test_opendkim_behind_rspamd(folder: Path, start_postfix: StartPostfix) -> None:
    """The second milter: what it says of signatures stands above what rspamd made of the message."""
    lines = (folder / FILE).read_text().splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if line.startswith("  # - milter:"))
    block = "".join(lines[start : start + 4])
    change(folder, (block, re.sub("(?m)^  # ", "  ", block)))
    with scratch() as keys:
        verifier = OpenDkim(keys, dkim_key(keys, "x.test"), verify=True, inet=True)
        async with AsyncExitStack() as stack:
            await started(stack, verifier)
            site = await stack.enter_async_context(serving(folder, start_postfix, OPENDKIM=verifier.address))
            client = await stack.enter_async_context(connected(site.port))
            assert (await send(client, letter("markme"))).startswith("250")
            message = await site.last()
            assert "\nX-Spam: Yes\n" in message
            assert "\nAuthentication-Results: verify.test; dkim=none" in message.partition("\nFrom:")[0], message
            await asyncio.to_thread(verifier.stop)
            reply = await send(client, letter("away"))
            assert reply.startswith("451 4."), reply


async def test_proxy_header_in_place_of_xclient(folder: Path, start_postfix: StartPostfix) -> None:
    change(folder, ("  - xclient ", "  - proxy_header: 2 "))
    main = "smtpd_upstream_proxy_protocol = haproxy\n"
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(folder, start_postfix, main=main))
        client = await stack.enter_async_context(connected(site.port))
        assert (await send(client, letter("markme"))).startswith("250")
        assert "\nX-Spam: Yes\n" in await site.last()
        await logged(site.postfix, rf"client=unknown\[{STRANGER}\]$")


def test_without_a_word_in_the_environment(folder: Path) -> None:
    """It listens where the file says; its Postfix is down, so clients wait."""
    with GatewayProcess(folder, FILE, ports=(2525,), variables={"POSTFIX": f"127.0.0.1:{free_port()}"}):
        (greeting,) = talk(2525)
        assert greeting.startswith("421 4."), greeting
