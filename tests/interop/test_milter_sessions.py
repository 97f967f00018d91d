"""Sessions with a scripted filter: what it is told and what the client hears, from Postfix and from the gateway.

Each Case is played to a Postfix with `smtpd_milters` and to a gateway with a `milter` stage, `connect: early` unless
it says otherwise. Both must tell the filter the same, macros too, and answer the client with the same codes. Where
they do not, the case says why, and docs/milter.md too.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme
import yaml

from gateway.testing.gateway import Gateway, running
from tests.interop.conftest import Authority, StartPostfix
from tests.interop.mail_client import LIMIT, STRANGER, MailClient, connected
from tests.interop.milter_legs import MAIN, OWN_MACROS
from tests.peers.postfix import Postfix
from tests.peers.scripted import Expect, Scripted, Send, Until
from tests.peers.scripted_milter import (
    ACCEPT,
    CONNECTION_FAILED,
    CONTINUE,
    DISCARD,
    EVENTS,
    OMIT,
    RCPT_REJ,
    REJECT,
    SHUTDOWN,
    SKIP,
    SKIP_BIT,
    TEMPFAIL,
    Answer,
    Script,
    ScriptedMilter,
    Wait,
    add_header,
    add_recipient,
    change_header,
    change_sender,
    delete_recipient,
    insert_header,
    options,
    replace_body,
    reply,
)

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

MESSAGE = b"Subject: a\r\nTo: b\r\n\r\nhello\r\n"
MAIL, RCPT = "MAIL FROM:<a@x.test>", "RCPT TO:<u1@local.test>"
ONE = (MAIL, RCPT, "DATA", "QUIT")
UPSTREAM = f"{MAIN}mynetworks = 127.0.0.9/32\n"  # the gateway's address is a stranger's, too
XCLIENT = "smtpd_authorized_xclient_hosts = 127.0.0.0/8\n"
TLS = """\
smtpd_tls_security_level = may
smtpd_tls_cert_file = {0}
smtpd_tls_key_file = {1}
smtpd_tls_CAfile = {2}
smtpd_tls_ask_ccert = yes
"""


@dataclass(frozen=True)
class Case:
    """What the client says after EHLO, the filter's script and greeting, settings of the stage.

    `differs`: why these `aspects` (replies, events) are not the same; they must differ then.
    """

    name: str
    lines: Sequence[str]
    script: Script = field(default_factory=dict)
    greeting: bytes = options()
    settings: dict[str, object] = field(default_factory=dict)
    differs: str = ""
    aspects: tuple[str, ...] = ("replies",)


ABORTS = "Postfix says ABORT also where no message is open: at RSET, at EHLO, and before QUIT; the gateway once a message."
NO_QUIT = "Where it is done with a filter early (accepted or refused at connect, HELO), Postfix closes without QUIT."

MACROS_OF_CONNECT = b"{client_addr} {client_name} {client_ptr} {client_resolve} {client_port} j _ {daemon_port}"
MACROS_OF_HELO = b"{tls_version},{cipher},{cipher_bits},{cert_subject},{cert_issuer},{verify}"
MACROS_OF_MAIL = b"i {mail_host} {client_addr} {auth_type} {auth_authen} {nothing}"

CASES = (
    Case("a message", ONE),
    Case("two transactions and RSET", (MAIL, "RSET", MAIL, RCPT, "RSET", "NOOP", *ONE)),
    Case("HELO again", ("EHLO again.test", MAIL, RCPT, "RSET", "HELO more.test", *ONE)),
    Case("unknown commands", ("FOO bar baz", MAIL, "FOO", RCPT, "BAR", "DATA", "QUIT")),
    Case("unknown command put off", ("FOO", *ONE), {"unknown": Answer(TEMPFAIL)}),
    Case(
        "unknown command refused",
        ("FOO", *ONE),
        {"unknown": Answer(REJECT)},
        differs="A filter's permanent refusal of an unknown command does not replace the 500.",
    ),
    Case(
        "commands that the gateway answers itself",
        ("HELP", "EXPN x", *ONE),
        differs="HELP, EXPN and other commands of SMTP that are not offered have an answer of the gateway's own (214, 502, "
        "252), and filters do not hear of them; Postfix calls those that it does not know unknown. Nor do they hear of any "
        "between two BDAT chunks: they are at the message then.",
        aspects=("replies", "events"),
    ),
    Case(
        "refused at connect",
        ONE,
        {"connect": Answer(reply(b"554 5.7.9 go away"))},
        differs="A refusal at connect: Postfix says 554 instead of its greeting; the gateway greets and refuses "
        "MAIL, or refuses at once in the filter's words with `refuse_at: now`.",
    ),
    Case(
        "refused at connect and now",
        ONE,
        {"connect": Answer(reply(b"554 5.7.9 go away"))},
        settings={"refuse_at": "now"},
    ),
    Case("put off at connect", (*ONE[:2], "EHLO again.test", *ONE), {"connect": Answer(TEMPFAIL)}),
    Case("accepted at connect", (*ONE[:3], "EHLO again.test", *ONE), {"connect": Answer(ACCEPT)}),
    Case("refused at HELO", (*ONE[:2], "EHLO again.test", *ONE), {"helo:1": Answer(REJECT)}),
    Case("refused at HELO in words", ONE, {"helo:1": Answer(reply(b"450 4.7.1 who?"))}),
    Case("accepted at HELO", (*ONE[:3], "EHLO again.test", *ONE), {"helo:1": Answer(ACCEPT)}),
    Case("421 at MAIL", ONE, {"mail": Answer(reply(b"421 4.7.1 bye"))}),
    Case("421 at the end", ONE, {"eom": Answer(reply(b"421 4.7.1 bye"))}),
    Case("a sender refused", (*ONE[:2], *ONE), {"mail:1": Answer(REJECT)}),
    Case("a recipient refused, one accepted", (MAIL, RCPT, *ONE[1:]), {"rcpt:1": Answer(REJECT), "rcpt:2": Answer(ACCEPT)}),
    Case("accepted early leaves one message", (*ONE[:3], *ONE), {"mail:1": Answer(ACCEPT)}),
    Case(
        "refused at DATA",
        (*ONE[:3], *ONE),
        {"data:1": Answer(REJECT)},
        differs="After a refusal of DATA the transaction has ended; Postfix keeps it until RSET.",
        aspects=("replies", "events"),
    ),
    Case("skip", ONE, {"header": Answer(SKIP), "body": Answer(SKIP)}, options(protocol=SKIP_BIT)),
    Case("skip a recipient", (MAIL, RCPT, *ONE[1:]), {"rcpt": Answer(SKIP)}, options(protocol=SKIP_BIT)),
    Case(
        "recipients refused by others",
        (MAIL, "RCPT TO:<u@foreign.test>", *ONE[1:]),
        differs="Filters hear of recipients that the server behind the gateway refuses: they are asked before "
        "it. Of those that Postfix or a stage before the filter refuses, they hear only with RCPT_REJ.",
        aspects=("events",),
    ),
    Case("told nothing", ONE, greeting=options(protocol=sum(OMIT.values()))),
    Case(
        "refused at HELO and now",
        ONE,
        {"helo": Answer(REJECT)},
        settings={"refuse_at": "now"},
        differs="With `refuse_at: now` the HELO command itself is refused; Postfix accepts it and refuses MAIL.",
    ),
    Case("STARTTLS", (MAIL, "RSET", "STARTTLS", "EHLO client.test", *ONE)),
    Case(
        "macros that the filter asks for",
        ("STARTTLS", "EHLO client.test", *ONE),
        greeting=options(macros={0: MACROS_OF_CONNECT, 1: MACROS_OF_HELO, 2: MACROS_OF_MAIL}),
    ),
    Case(
        "client certificate",
        ("STARTTLS with a certificate", "EHLO client.test", *ONE),
        greeting=options(macros={1: MACROS_OF_HELO}),
    ),
    Case(
        "XCLIENT",
        (MAIL, "RSET", "XCLIENT NAME=c.example ADDR=192.0.2.7 PORT=77 HELO=h.example", "EHLO z.test", *ONE),
    ),
    Case(
        "discarded",
        ONE,
        {"mail": Answer(DISCARD)},
        differs="The gateway answers 250 to mail that it throws away only with `discard: accept`.",
    ),
    Case(
        "shutdown at the end",
        ONE,
        {"eom": Answer(SHUTDOWN)},
        differs="SHUTDOWN in answer to the end of the message: the gateway says 421 as at other events; "
        "Postfix delivers the message.",
    ),
    Case(
        "shutdown at MAIL",
        ONE,
        {"mail": Answer(SHUTDOWN)},
        differs="After SHUTDOWN, Postfix just closes; the gateway says ABORT and QUIT.",
        aspects=("events",),
    ),
    Case(
        "the filter says that it failed",
        (MAIL, *ONE),
        {"mail": Answer(CONNECTION_FAILED)},
        differs="A filter that was lost is connected again for the next message; Postfix does without it, or "
        "fails, until the client has gone.",
        aspects=("events",),
    ),
    *(
        Case(f"version {version}", ("FOO", *ONE), greeting=options(version=version, actions=actions))
        for version, actions in ((2, 0x3F), (3, 0x3F), (4, 0x3F), (6, 0x1FF))
    ),
)


# -- both legs ------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What the client heard, and each filter connection's events: (event, payload, macros)."""

    replies: list[str]
    events: list[list[tuple[str, bytes, dict[bytes, bytes]]]]


def told(milter: ScriptedMilter) -> list[list[tuple[str, bytes, dict[bytes, bytes]]]]:
    """ABORTs without a message (ABORTS), QUITs (NO_QUIT), the client's port and OWN_MACROS left out."""
    found = []
    for connection in range(1, milter.connections + 1):
        events: list[tuple[str, bytes, dict[bytes, bytes]]] = []
        macros: dict[bytes, dict[bytes, bytes]] = {}
        begun = False
        for number, event, payload in milter.seen:
            if number != connection or event == "quit" or (event == "abort" and not begun):
                continue
            if event == "macro":
                parts = payload[1:].split(b"\0")[:-1]
                pairs = zip(parts[::2], parts[1::2], strict=True)
                macros[payload[:1]] = {name: value for name, value in pairs if name.decode() not in OWN_MACROS and value}
                continue
            begun = event == "mail" or (begun and event != "abort")
            if event == "connect":
                name, _, rest = payload.partition(b"\0")
                payload = name + rest[:1] + rest[3:]
            code = next(code for code, known in EVENTS.items() if known == event)
            # Postfix sends macros before each field and piece of the body, too; no filter looks for those.
            known = macros.pop(code, {}) if event not in ("header", "body", "abort", "unknown") else {}
            events.append((event, payload, known))
        found.append(events)
    return found


@dataclass(frozen=True)
class Certificates:
    """The servers' certificate and who issued it; a client's (with its key), and who issued that."""

    ca: Path
    chain: Path
    key: Path
    client_ca: Path
    client: Path


@pytest.fixture(scope="session")
def certificates(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("client")
    clients = trustme.CA(organization_name="Clients")
    leaf = clients.issue_cert("client.test", common_name="a client")
    clients.cert_pem.write_to_path(str(folder / "ca.pem"))
    leaf.private_key_and_cert_chain_pem.write_to_path(str(folder / "client.pem"))
    return Certificates(authority.ca, *authority.issue("localhost"), folder / "ca.pem", folder / "client.pem")


async def start_tls(
    client: MailClient, writer: asyncio.StreamWriter, certificates: Certificates, *, with_certificate: bool
) -> None:
    """STARTTLS without EHLO, which the lines have."""
    assert (await client.say("STARTTLS")).startswith("220")
    context = ssl.create_default_context(cafile=str(certificates.ca))
    if with_certificate:
        context.load_cert_chain(certificates.client)
    async with asyncio.timeout(LIMIT):
        await writer.start_tls(context, server_hostname="localhost")


async def talk(port: int, lines: Sequence[str], certificates: Certificates) -> list[str]:
    """Greeting, EHLO, the lines, DATA with MESSAGE: codes of the replies, until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(STRANGER, 0))
    client = MailClient(reader, writer)
    replies = [await client.reply()]
    try:
        for line in ("EHLO client.test", *lines) if replies[0].startswith("220") else ():
            if line.startswith("STARTTLS"):
                await start_tls(client, writer, certificates, with_certificate=line != "STARTTLS")
                continue
            replies.append(await (client.content(MESSAGE) if line == "DATA" else client.say(line)))
            if replies[-1][:3] in ("", "421"):
                break
    except ConnectionError:
        pass  # the server has closed without reading everything
    writer.transport.abort()
    return [text[:3] for text in replies]


@asynccontextmanager
async def gateway_before(
    postfix: Postfix, *milters: dict[str, object], **extra: object
) -> AsyncIterator[Gateway]:
    """A gateway with these `milter` stages."""
    pool = {"servers": [f"smtp://127.0.0.1:{postfix.port}"]}
    document = {
        "hostname": "mx.test",
        "relay": "open",
        "reply_id": "off",
        "stages": [*({"milter": settings} for settings in milters), "splice"],
        "upstreams": {"postfix": pool},
        **extra,
    }
    async with running(yaml.safe_load(yaml.safe_dump(document)), learn=True) as gateway:
        yield gateway


async def ended(milter: ScriptedMilter) -> None:
    """Wait until all its connections have."""
    async with asyncio.timeout(LIMIT):
        for connection in range(1, milter.connections + 1):
            await milter.gone(connection)


async def by_postfix(start_postfix: StartPostfix, case: Case, certificates: Certificates) -> Told:
    async with ScriptedMilter(case.script, greeting=case.greeting) as milter:
        main = UPSTREAM + XCLIENT + TLS.format(certificates.chain, certificates.key, certificates.client_ca) + f"smtpd_milters = {milter.address}\n"
        postfix = await asyncio.to_thread(lambda: start_postfix(main=main))
        replies = await talk(postfix.port, case.lines, certificates)
        await ended(milter)
        return Told(replies, told(milter))


async def by_gateway(start_postfix: StartPostfix, case: Case, certificates: Certificates) -> Told:
    postfix = await asyncio.to_thread(lambda: start_postfix(main=UPSTREAM))
    own = {"chain": str(certificates.chain), "key": str(certificates.key)}
    extra = {
        "tls": {"certificates": [own], "client_ca": str(certificates.client_ca), "verify_client": "optional"},
        "trust": {"xclient": ["127.0.0.0/8"]},
    }
    async with ScriptedMilter(case.script, greeting=case.greeting) as milter:
        stage = {"socket": milter.address, "connect": "early", **case.settings}
        async with gateway_before(postfix, stage, **extra) as gateway:
            replies = await talk(gateway.port, case.lines, certificates)
            await gateway.idle()
        await ended(milter)
        return Told(replies, told(milter))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_sessions(start_postfix: StartPostfix, certificates: Certificates, case: Case) -> None:
    one = await by_postfix(start_postfix, case, certificates)
    other = await by_gateway(start_postfix, case, certificates)
    for aspect in ("replies", "events"):
        if case.differs and aspect in case.aspects:
            assert getattr(one, aspect) != getattr(other, aspect), "a difference is listed that there is not"
        else:
            assert getattr(one, aspect) == getattr(other, aspect)


# -- recipients that others refused ---------------------------------------------------------------------------

FOREIGN = ("EHLO c.test", MAIL, "RCPT TO:<u@foreign.test>", RCPT, "RCPT TO:<v@foreign.test>", "DATA")


async def test_recipients_that_a_stage_before_refused_are_told(start_postfix: StartPostfix, certificates: Certificates) -> None:
    """RCPT_REJ: in their order, and with macros that say why; Postfix puts code and text into the same ones."""
    async with ScriptedMilter(greeting=options(protocol=RCPT_REJ)) as milter:
        main = f"{UPSTREAM}smtpd_milters = {milter.address}\n"
        postfix = await asyncio.to_thread(lambda: start_postfix(main=main))
        assert await talk(postfix.port, FOREIGN[1:], certificates) == ["220", "250", "250", "454", "250", "454", "250"]
        await ended(milter)
        expected = told(milter)
        assert milter.macros("rcpt")[b"{rcpt_mailer}"] == b"error"
    postfix = await asyncio.to_thread(lambda: start_postfix(main=UPSTREAM))
    async with ScriptedMilter({"rcpt:1": Answer(REJECT)}, greeting=options(protocol=RCPT_REJ)) as milter:
        stages = [{"recipient_domains": ["local.test"]}, {"milter": {"socket": milter.address}}, "splice"]
        async with gateway_before(postfix, stages=stages) as gateway:
            assert await talk(gateway.port, FOREIGN[1:], certificates) == ["220", "250", "250", "550", "250", "550", "250"]
            await gateway.idle()
        await ended(milter)
        (events,) = told(milter)
        assert milter.macros("rcpt")[b"{rcpt_mailer}"] == b"error"
    assert [event[:2] for event in events] == [event[:2] for event in expected[0]]
    macros, like = ([event[2] for event in connection if event[0] == "rcpt"] for connection in (events, expected[0]))
    assert [list(one) for one in macros] == [list(one) for one in like]
    assert (like[0][b"{rcpt_host}"], like[0][b"{rcpt_addr}"]) == (b"4.7.1", b"Relay access denied")
    assert (macros[0][b"{rcpt_host}"], macros[0][b"{rcpt_addr}"]) == (b"5.7.1", b"relaying denied")
    assert macros[1] == like[1]


# -- several filters ------------------------------------------------------------------------------------------

EDITS: Script = {
    "eom": Answer(
        insert_header(0, b"X-Top", b"1"),
        insert_header(1, b"X-Next", b"1"),
        add_header(b"X-Last", b"1"),
        change_header(1, b"Subject", b"changed"),
        change_header(1, b"To", b""),
        replace_body(b"new\r\n"),
        delete_recipient(b"<u2@local.test>"),
        ACCEPT,
    )
}
ENVELOPE: Script = {
    "eom": Answer(
        change_sender(b"<second@x.test>", b"SIZE=7 FOO=bar"),
        add_recipient(b"u3@local.test"),
        add_recipient(b"<u4@local.test>", b"NOTIFY=NEVER FOO=bar"),
        delete_recipient(b"U1@LOCAL.TEST"),
        CONTINUE,
    )
}
MORE: Script = {
    "eom": Answer(insert_header(1, b"X-Top", b"2"), change_header(1, b"X-Top", b"first"), replace_body(b"newer\r\n"), CONTINUE)
}


async def chained(start_postfix: StartPostfix, scripts: Sequence[Script], lines: Sequence[str], certificates: Certificates) -> None:
    """The same filters behind both: each hears the same, and the same is stored."""
    stored, heard, replies = [], [], []
    for through in ("Postfix", "gateway"):
        async with ScriptedMilter(scripts[0]) as first, ScriptedMilter(scripts[1]) as second:
            milters = [first, second]
            names = ", ".join(milter.address for milter in milters)
            own = f"smtpd_milters = {names}\n" if through == "Postfix" else ""
            postfix = await asyncio.to_thread(lambda own=own: start_postfix(main=UPSTREAM + own))  # type: ignore[misc]
            if through == "Postfix":
                replies.append(await talk(postfix.port, lines, certificates))
            else:
                early: list[dict[str, object]] = [{"socket": one.address, "connect": "early"} for one in milters]
                async with gateway_before(postfix, *early) as gateway:
                    replies.append(await talk(gateway.port, lines, certificates))
                    await gateway.idle()
            for milter in milters:
                await ended(milter)
            heard.append([told(milter) for milter in milters])
        count = sum(reply == "250" for line, reply in zip(lines, replies[-1][2:], strict=False) if line == "DATA")
        await asyncio.to_thread(postfix.wait_log, f"(?s)(: removed.*){{{count}}}" if count else "")
        envelopes = [b"\n".join(one.split(b"\n")[:3]) for one in postfix.delivered()]
        stored.append(sorted(zip(envelopes, map(fields, postfix.delivered()), strict=True)))
    assert replies[0] == replies[1]
    assert heard[0] == heard[1]
    assert stored[0] == stored[1]


def fields(message: bytes) -> list[bytes]:
    """Header fields and body without the storing Postfix's own Received and envelope."""
    lines = message.replace(b"\n\t", b" ").split(b"\n")
    return [line for line in lines if not line.startswith((b"Received: from", b"Return-Path", b"X-Orig", b"Deliv"))]


@pytest.mark.parametrize(
    ("scripts", "lines"),
    [
        ((EDITS, MORE), (MAIL, RCPT, "RCPT TO:<u2@local.test>", *ONE[2:])),
        (({"eom": Answer(change_sender(b"n@x.test", b"RET=HDRS ENVID=a"), CONTINUE)}, ENVELOPE), ONE),
        (({"mail:1": Answer(ACCEPT)}, EDITS), (*ONE[:3], *ONE)),
        (({"header:1": Answer(ACCEPT)}, {"eom:1": Answer(REJECT)}), (*ONE[:3], *ONE)),
        (({"rcpt:1": Answer(REJECT)}, {"rcpt:1": Answer(TEMPFAIL)}), (MAIL, RCPT, RCPT, *ONE[1:])),
        (({"eoh": Answer(REJECT)}, {}), ONE),
        (({}, {"data:1": Answer(REJECT)}), (*ONE[:3], "RSET", *ONE)),
        (({"helo": Answer(ACCEPT)}, {"helo": Answer(TEMPFAIL)}), ONE),
    ],
    ids=["edits", "envelope", "accept at MAIL", "accept at header", "recipients", "refused by the first", "DATA", "HELO"],
)
async def test_several_filters(
    start_postfix: StartPostfix, certificates: Certificates, scripts: Sequence[Script], lines: Sequence[str]
) -> None:
    await chained(start_postfix, scripts, lines, certificates)


# -- what the gateway does besides ----------------------------------------------------------------------------


async def test_a_filter_that_only_reads_does_not_hold_content_up() -> None:
    """The upstream has the first lines of the content before the client's end of data, and before any verdict."""
    go_on, reading = asyncio.Event(), options(actions=0)
    dialogue: list[Send | Expect | Until] = [
        Send(b"220 up\r\n"), Expect(b"EHLO"), Send(b"250 up\r\n"), Expect(b"MAIL"), Send(b"250 ok\r\n"),
        Expect(b"RCPT"), Send(b"250 ok\r\n"), Expect(b"DATA"), Send(b"354 go\r\n"), Until(b"first lines\r\n"),
        Until(b"\r\n.\r\n"), Send(b"250 2.0.0 stored\r\n"),
    ]  # fmt: skip
    script: Script = {"header": [Wait(go_on), Answer(CONTINUE)]}
    async with Scripted(dialogue) as upstream, ScriptedMilter(script, greeting=reading) as milter:
        document = {
            "relay": "open",
            "stages": [{"milter": {"socket": milter.address}}, "splice"],
            "upstreams": {
                "up": {"servers": [f"smtp://127.0.0.1:{upstream.port}"], "capabilities": {"assume": []}},
            },
        }
        async with running(document) as gateway, connected(gateway.port) as client:
            assert (await client.envelope("b@x.test")).startswith("250")
            assert (await client.say("DATA")).startswith("354")
            await client.send(b"Subject: a\r\n\r\nfirst lines\r\n" + b"x" * 70_000 + b"\r\n")
            async with asyncio.timeout(LIMIT):
                await milter.reached("header")
                await upstream.reached(connection=1, step=10)
            await client.send(b"last\r\n.\r\n")
            go_on.set()
            assert await client.reply() == "250 2.0.0 stored"
        await ended(milter)
        assert milter.events()[-4:] == ["body", "eom", "abort", "quit"]


@pytest.mark.parametrize(("version", "expected"), [(2, 0x7F), (3, 0x17F), (4, 0x37F), (6, 0x1FFFFF)])
async def test_the_version_of_the_settings_is_offered(start_postfix: StartPostfix, version: int, expected: int) -> None:
    postfix = await asyncio.to_thread(lambda: start_postfix(main=UPSTREAM))
    answered = options(version=version, actions=0x3F)
    async with ScriptedMilter(greeting=answered) as milter:
        stage: dict[str, object] = {"socket": milter.address, "version": version}
        async with gateway_before(postfix, stage) as gateway, connected(gateway.port) as client:
            assert (await client.envelope("u1@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
        assert milter.offers == [(version, 0x1FF if version == 6 else 0x3F, expected)]
        assert ("data" in milter.events()) == (version >= 4)


async def test_connected_at_the_first_mail_the_filter_hears_of_the_last_helo(start_postfix: StartPostfix) -> None:
    postfix = await asyncio.to_thread(lambda: start_postfix(main=UPSTREAM))
    async with ScriptedMilter() as milter, gateway_before(postfix, {"socket": milter.address}) as gateway:
        async with connected(gateway.port) as client:
            await client.say("EHLO again.test")
            assert milter.connections == 0
            await client.say(MAIL)
            await client.say("RSET")
            await client.say("EHLO more.test")
            await client.say(MAIL)
            await client.say("QUIT")
        await gateway.idle()
        await ended(milter)
        assert milter.payloads("helo") == [b"again.test\0", b"more.test\0"]
        assert milter.events() == ["optneg", "connect", "helo", "mail", "abort", "helo", "mail", "abort", "quit"]


async def test_xclient_and_login_begin_a_new_filter_connection(start_postfix: StartPostfix) -> None:
    postfix = await asyncio.to_thread(lambda: start_postfix(main=UPSTREAM))
    trust = {"trust": {"xclient": ["127.0.0.0/8"]}}
    async with ScriptedMilter() as milter, gateway_before(postfix, {"socket": milter.address}, **trust) as gateway:
        async with connected(gateway.port) as client:
            await client.say(MAIL)
            await client.say("RSET")
            assert (await client.say("XCLIENT ADDR=IPV6:2001:db8::7 NAME=[UNAVAILABLE] LOGIN=joe")).startswith("220")
            await client.say("EHLO z.test")
            await client.say(MAIL)
            await client.say("QUIT")
        await gateway.idle()
        await ended(milter)
        assert milter.events(1) == ["optneg", "connect", "helo", "mail", "abort", "quit"]
        (connect,) = milter.payloads("connect", 2)
        name, _, rest = connect.partition(b"\0")
        assert (name, rest[:1], rest[3:]) == (b"[2001:db8::7]", b"6", b"2001:db8::7\0")
        sender = milter.macros("mail", 2)
        assert (sender[b"{auth_authen}"], sender[b"{auth_type}"]) == (b"joe", b"XCLIENT")
        assert struct.unpack("!H", rest[1:3])[0] > 0


async def test_a_filter_that_is_only_observed_changes_and_refuses_nothing(start_postfix: StartPostfix) -> None:
    postfix = await asyncio.to_thread(lambda: start_postfix(main=UPSTREAM))
    async with ScriptedMilter(EDITS, {"rcpt": Answer(REJECT)}) as milter:
        stage: dict[str, object] = {"socket": milter.address, "mode": "observe"}
        async with gateway_before(postfix, stage) as gateway:
            for _ in range(2):
                async with connected(gateway.port) as client:
                    assert (await client.envelope("u1@local.test")).startswith("250")
                    assert (await client.content(MESSAGE)).startswith("250")
    await asyncio.to_thread(postfix.wait_log, "(?s)(: removed.*){2}")
    assert [fields(one) for one in postfix.delivered()] == [MESSAGE.decode().replace("\r", "").encode().split(b"\n")] * 2
