"""The milter stage: its settings, what each verdict becomes, what a filter is told, and when the message waits for it.

Real filters are in tests/interop, filters that fail in tests/fault.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway import (
    AddHeader,
    AddRecipient,
    AppendHeader,
    Cause,
    ChangeHeader,
    ChangeSender,
    DeleteHeader,
    Discard,
    Edit,
    InsertHeader,
    Outcome,
    Refuse,
    RemoveRecipient,
    ReplaceBody,
    Reply,
    Session,
    Transaction,
    Upstream,
)
from gateway.config.problems import ConfigError
from gateway.pipeline.conditions import ConditionError
from gateway.protocol.milter import MAX_PAYLOAD, Action
from gateway.testing.conformance import check_stage
from gateway.testing.gateway import compiled, running
from gateway.testing.messages import edited, make_message
from gateway.testing.stages import TLS, FakeWorker, build, make_recipient, make_session, make_transaction
from stages.milter import Milter
from tests.fault.client import Client, connected
from tests.fault.upstream import Upstream as Server
from tests.peers.scripted_milter import (
    ACCEPT,
    ALL_ACTIONS,
    CONTINUE,
    DISCARD,
    LEADING_SPACE,
    OMIT,
    PROMISES,
    RCPT_REJ,
    REJECT,
    SHUTDOWN,
    SKIP,
    TEMPFAIL,
    Answer,
    Script,
    ScriptedMilter,
    add_header,
    add_recipient,
    change_header,
    change_sender,
    delete_recipient,
    insert_header,
    options,
    quarantine,
    replace_body,
    reply,
)

SOCKET = "unix:/run/filter.sock"
CONTENT = b"From: a@example.org\r\nSubject: x\r\n\r\nhello\r\n"

# -- settings -------------------------------------------------------------------------------------------------


def test_settings() -> None:
    settings = build(Milter, SOCKET).settings
    assert (settings.connect, settings.version, settings.long_fields) == ("mail", 6, "refuse")
    assert (settings.connect_timeout, settings.command_timeout, settings.content_timeout) == (30.0, 30.0, 300.0)
    assert build(Milter, SOCKET).phases() == ("mail", "rcpt", "data", "message")
    early = build(Milter, {"socket": SOCKET, "connect": "early"})
    assert early.phases() == ("connect", "helo", "mail", "rcpt", "data", "message")


@pytest.mark.parametrize(
    "wrong",
    [
        {"socket": "tcp:127.0.0.1:1"},
        {"socket": SOCKET, "version": 5},
        {"socket": SOCKET, "connect": "late"},
        {"socket": SOCKET, "command_timeout": 0},
        {"socket": SOCKET, "macros": {"body": ["i"]}},
        {"socket": SOCKET, "long_fields": "fold"},
        {"socket": SOCKET, "protocol": 6},
    ],
)
def test_wrong_settings(wrong: Mapping[str, object]) -> None:
    with pytest.raises(ValidationError):
        build(Milter, wrong)


def test_wrong_definitions() -> None:
    with pytest.raises(ConditionError):
        build(Milter, {"socket": SOCKET, "define": {"mine": "no.such.fact"}})


def test_a_pool_that_does_not_exist(tmp_path: Path) -> None:
    pipeline = {
        "listen": ["smtp://127.0.0.1:2525"],
        "relay": "open",
        "stages": [{"milter": {"socket": SOCKET, "quarantine": "route:hell"}}, "splice"],
        "upstreams": {"held": {"servers": ["smtp://127.0.0.1:9"]}},
    }
    with pytest.raises(ConfigError) as caught:
        compiled(pipeline, tmp_path)
    (problem,) = caught.value.problems
    assert "stages[0].milter.quarantine: " in str(problem) and "no pool named 'hell' in upstreams" in str(problem)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
@pytest.mark.parametrize("connect", ["mail", "early"])
@pytest.mark.parametrize(
    ("script", "greeting"),
    [
        ({}, options()),
        ({}, options(actions=0)),
        ({}, options(protocol=sum(PROMISES.values()))),
        ({}, options(protocol=sum(OMIT.values()))),
        ({"connect": Answer(REJECT)}, options()),
        ({"rcpt": Answer(DISCARD)}, options()),
        ({"eom": Answer(add_header(b"X", b" y"), ACCEPT)}, options(actions=1, protocol=LEADING_SPACE)),
        ({"eom": Answer(add_header(b"X", b"y"), replace_body(b"new"), quarantine(b"why"), ACCEPT)}, options()),
    ],
)  # fmt: skip
async def test_keeps_the_contract(script: Script, greeting: bytes, connect: str) -> None:
    async with ScriptedMilter(script, greeting=greeting) as milter:
        settings = {"socket": milter.address, "connect": connect, "quarantine": "header"}
        await check_stage(Milter, settings, away=())
    await check_stage(Milter, settings)  # and when nobody listens


# -- one session ----------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """A stage, its filter, a session."""

    stage: Milter
    milter: ScriptedMilter
    session: Session

    async def begun(self, sender: str = "a@example.org", *recipients: str) -> Transaction:
        """A transaction that the filter has heard of up to DATA. No refusal is expected."""
        transaction = make_transaction(self.session, sender)
        assert await self.stage.mail(self.session, transaction) is None
        for address in recipients or ("b@example.net",):
            assert await self.stage.rcpt(self.session, make_recipient(self.session, address)) is None
        assert await self.stage.data(self.session, transaction) is None
        return transaction

    async def message(self, content: bytes = CONTENT, block: int = 65536) -> Refuse | Edit | Discard | None:
        """What becomes of the message."""
        return await self.stage.message(self.session, make_message(self.session, content, block=block))


@asynccontextmanager
async def asked(
    script: Script | None = None, *, greeting: bytes = options(), session: Session | None = None, **settings: Any
) -> AsyncIterator[Asked]:
    """A stage with these settings in a session behind HELO, and its filter."""
    async with ScriptedMilter(script or {}, greeting=greeting) as milter:
        stage = build(Milter, {"socket": milter.address, **settings})
        await stage.start(FakeWorker())
        one = Asked(stage, milter, session or make_session(helo="client.example", name="client.example"))
        yield one
        stage.close(one.session)
        if milter.connections:
            await milter.gone(milter.connections)


VERDICTS: dict[str, tuple[bytes, Refuse | None]] = {
    "continue": (CONTINUE, None),
    "accept": (ACCEPT, None),
    "reject": (REJECT, Refuse(Cause.POLICY, text="refused by a filter", temporary=False)),
    "tempfail": (TEMPFAIL, Refuse(Cause.CONTENT, text="try again later", temporary=True)),
    "its own words": (
        reply(b"550-5.7.1 100%% spam\r\n550 5.7.1 go away"),
        Refuse(Cause.CONTENT, reply=Reply(550, (b"5.7.1 100% spam", b"5.7.1 go away"))),
    ),
    "shutdown": (SHUTDOWN, Refuse(Cause.SHUTDOWN, disconnect=True, log="filter says shutdown")),
}


@pytest.mark.anyio
@pytest.mark.parametrize("event", ["connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body", "eom"])
@pytest.mark.parametrize("name", VERDICTS)
async def test_verdicts(name: str, event: str) -> None:
    packet, refuse = VERDICTS[name]
    async with asked({event: Answer(packet)}) as one:
        stage, session = one.stage, one.session
        transaction = make_transaction(session, "a@example.org")
        said = {"mail": await stage.mail(session, transaction)}
        if said["mail"] is None:
            said["rcpt"] = await stage.rcpt(session, make_recipient(session))
            said["data"] = await stage.data(session, transaction)
            verdict = await one.message()
            assert verdict is None or isinstance(verdict, Refuse)
            said["content"] = verdict
        where = {"connect": "mail", "helo": "mail"}.get(event, event if event in said else "content")
        assert {phase: verdict for phase, verdict in said.items() if verdict} == ({where: refuse} if refuse else {})
        one_recipient_only = event == "rcpt" and name in ("reject", "tempfail", "its own words")
        goes_on = name == "continue" or one_recipient_only
        assert one.milter.events()[-1] == ("eom" if goes_on else event)


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "again"), [("reject", True), ("accept", False), ("tempfail", True)])
@pytest.mark.parametrize("event", ["connect", "helo"])
async def test_a_verdict_on_the_client_is_for_all_of_its_messages(event: str, name: str, again: bool) -> None:
    packet, refuse = VERDICTS[name]
    async with asked({event: Answer(packet)}) as one:
        for _ in range(3):
            transaction = make_transaction(one.session)
            assert await one.stage.mail(one.session, transaction) == refuse
            assert one.stage.edits(transaction) == "none"
            one.stage.reset(one.session, transaction)
        assert one.milter.connections == 1 and one.milter.events()[-1] == event


CHANGES: list[tuple[bytes, object]] = [
    (add_header(b"X", b"y\n\tz"), AppendHeader("X", " y\r\n\tz", leading_space=False)),
    (add_header(b"X", b"\xfc"), AppendHeader("X", " \udcfc", leading_space=False)),
    (insert_header(0, b"X", b"y"), InsertHeader(0, "X", " y", leading_space=False, below_trace=True)),
    (insert_header(9, b"X", b"y"), InsertHeader(9, "X", " y", leading_space=False, below_trace=True)),
    (change_header(1, b"Subject", b"y"), ChangeHeader("Subject", " y", 1, leading_space=False)),
    (change_header(0, b"Subject", b"y"), ChangeHeader("Subject", " y", 1, leading_space=False)),
    (change_header(2, b"Subject", b""), DeleteHeader("Subject", 2)),
    (add_recipient(b"<c@example.org>"), AddRecipient("c@example.org", ())),
    (
        add_recipient(b"c@example.org", b"NOTIFY=NEVER"),
        AddRecipient("c@example.org", (("NOTIFY", "NEVER"),)),
    ),
    (delete_recipient(b"<b@example.net>"), RemoveRecipient("b@example.net")),
    (change_sender(b"<>"), ChangeSender("", None)),
    (change_sender(b"<d@example.org>", b"RET=HDRS"), ChangeSender("d@example.org", (("RET", "HDRS"),))),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("packet", "operation"), CHANGES)
async def test_changes(packet: bytes, operation: object) -> None:
    async with asked({"eom": Answer(packet, CONTINUE)}) as one:
        await one.begun()
        assert await one.message() == Edit([operation])  # type: ignore[list-item]  # any operation


@pytest.mark.anyio
@pytest.mark.parametrize("packet", [REJECT, TEMPFAIL, reply(b"451 4.7.1 later")])
async def test_changes_of_what_is_refused_mean_nothing(packet: bytes) -> None:
    async with asked({"eom": Answer(add_header(b"X", b"y"), replace_body(b"new"), packet)}) as one:
        await one.begun()
        assert isinstance(await one.message(), Refuse)


@pytest.mark.anyio
async def test_a_new_body() -> None:
    script = {"eom": Answer(add_header(b"X", b"y"), replace_body(b"new\r\n"), replace_body(b".\r\n"), ACCEPT)}
    async with asked(script) as one:
        await one.begun()
        verdict = await one.message()
        assert isinstance(verdict, Edit) and isinstance(verdict.operations[-1], ReplaceBody)
        assert edited(CONTENT, verdict) == b"From: a@example.org\r\nSubject: x\r\nX: y\r\n\r\nnew\r\n.\r\n"


ACTIONS: list[tuple[int, str]] = [
    (0, "none"),
    (Action.SETSYMLIST, "none"),
    (Action.ADDHDRS, "head"),
    (Action.CHGHDRS, "head"),
    (Action.ADDHDRS | Action.CHGHDRS | Action.SETSYMLIST, "head"),
    (Action.CHGBODY, "any"),
    (Action.ADDRCPT, "any"),
    (Action.ADDRCPT_PAR, "any"),
    (Action.DELRCPT, "any"),
    (Action.CHGFROM, "any"),
    (Action.QUARANTINE, "any"),
    (ALL_ACTIONS, "any"),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("actions", "edits"), ACTIONS)
async def test_what_it_may_change_is_what_it_agreed_to(actions: int, edits: str) -> None:
    async with asked(greeting=options(actions=int(actions))) as one:
        assert one.stage.edits(make_transaction(one.session)) == "any"  # not known yet
        assert one.stage.edits(await one.begun()) == edits


@pytest.mark.anyio
@pytest.mark.parametrize("event", ["connect", "helo", "mail", "rcpt", "data"])
async def test_who_has_heard_enough_holds_nobody_up(event: str) -> None:
    async with asked({event: Answer(ACCEPT)}) as one:
        assert one.stage.edits(await one.begun()) == "none"
        assert await one.message() is None
        assert one.milter.events()[-1] == event


# -- quarantine and discard -----------------------------------------------------------------------------------

HELD: dict[str, object] = {
    "refuse": Refuse(Cause.CONTENT, log="quarantine: why?"),
    "header": Edit([AddHeader("X-Quarantine", "why?")]),
    "route:held": Edit([], Upstream(pool="held")),
}


@pytest.mark.anyio
@pytest.mark.parametrize("verdict", [ACCEPT, CONTINUE, REJECT], ids=["accept", "continue", "reject"])
@pytest.mark.parametrize("setting", HELD)
async def test_a_message_to_be_held(setting: str, verdict: bytes) -> None:
    async with asked({"eom": Answer(quarantine(b"why\n"), verdict)}, quarantine=setting) as one:
        await one.begun()
        assert await one.message() == (VERDICTS["reject"][1] if verdict == REJECT else HELD[setting])


@pytest.mark.anyio
@pytest.mark.parametrize(("reason", "shown"), [(b"", "yes"), (b"  ", "yes"), ("für".encode(), "f?r")])
async def test_the_reason_for_holding_a_message_is_a_field(reason: bytes, shown: str) -> None:
    async with asked({"eom": Answer(quarantine(reason), ACCEPT)}, quarantine="header") as one:
        await one.begun()
        assert await one.message() == Edit([AddHeader("X-Quarantine", shown)])


@pytest.mark.anyio
async def test_a_message_that_was_accepted_is_held_elsewhere() -> None:
    async with Server() as usual, Server() as held, ScriptedMilter({"eom": Answer(quarantine(b"x"), ACCEPT)}) as milter:
        pipeline = {
            "relay": "open",
            "stages": [{"milter": {"socket": milter.address, "quarantine": "route:held"}}, {"splice": "mta"}],
            "upstreams": {"mta": usual.pool()["mta"], "held": held.pool()["mta"]},
        }
        async with running(pipeline) as gateway, connected(gateway) as client:
            assert await sent(client) == "250 2.0.0 queued\r\n"
        assert (usual.messages, held.messages) == ([], [CONTENT])


async def sent(client: Client) -> str:
    """The last word on a message."""
    await client.hello()
    for line in ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.net>", "DATA"):
        said = await client.say(line)
        if said[0] not in "23":
            return said
    client.send(CONTENT + b".\r\n")
    return await client.reply()


@pytest.mark.anyio
@pytest.mark.parametrize(("discard", "answer"), [("accept", "250 2.0.0 Ok: discarded"), ("refuse", "5"), (None, "5")])
@pytest.mark.parametrize("event", ["mail", "rcpt", "data", "header", "eoh", "body", "eom"])
async def test_a_message_is_thrown_away_only_where_the_pipeline_says_so(
    event: str, discard: str | None, answer: str
) -> None:
    async with Server() as upstream, ScriptedMilter({event: Answer(DISCARD)}, {}) as milter:
        stage = {"socket": milter.address, **({"discard": discard} if discard else {})}
        pipeline = {"relay": "open", "stages": [{"milter": stage}, "splice"], "upstreams": upstream.pool()}
        async with running(pipeline) as gateway:
            async with connected(gateway) as client:
                assert (await sent(client)).startswith(answer)
            assert upstream.messages == []
            await milter.gone()
            assert milter.events().count(event) == 1 and milter.events()[-2:] == ["abort", "quit"]


# -- what it is told ------------------------------------------------------------------------------------------

LONG = b"y" * 70_000
LONG_FIELDS: dict[str, list[bytes]] = {
    "skip": [],
    "truncate": [b"X\0" + b"y" * (MAX_PAYLOAD - len(b"X\0\0") - 1) + b"\0"],
}


@pytest.mark.anyio
@pytest.mark.parametrize("setting", ["refuse", *LONG_FIELDS])
async def test_long_fields(setting: str) -> None:
    async with asked(long_fields=setting) as one:
        await one.begun()
        verdict = await one.message(b"A: 1\r\nX: " + LONG + b"\r\nB: 2\r\n\r\nhello\r\n")
        shown = one.milter.payloads("header")
        if setting == "refuse":
            assert verdict == Refuse(Cause.MESSAGE_TOO_BIG, text="header field X too long")
        else:
            assert verdict is None
            assert shown == [b"A\x001\0", *LONG_FIELDS[setting], b"B\x002\0"]


@pytest.mark.anyio
async def test_a_field_whose_name_is_too_long_to_be_cut() -> None:
    async with asked(long_fields="truncate") as one:
        await one.begun()
        assert await one.message(b"A: 1\r\n" + LONG + b": x\r\n\r\nhello\r\n") is None
        assert one.milter.payloads("header") == [b"A\x001\0"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("field", "shown"),
    [
        (b"X: y\r\n\tz", b"X\0y\n\tz\0"),
        (b"X:y", b"X\0y\0"),
        (b"X:\ty", b"X\0\ty\0"),
        (b"X:  y ", b"X\0 y \0"),
        (b"X:", b"X\0\0"),
        (b"X: \xfc", b"X\0\xfc\0"),
        (b"X: before\0after", b"X\0before?after\0"),
    ],
)
async def test_fields(field: bytes, shown: bytes) -> None:
    async with asked() as one:
        await one.begun()
        await one.message(field + b"\r\n\r\nhello\r\n")
        assert one.milter.payloads("header") == [shown]


@pytest.mark.anyio
@pytest.mark.parametrize("block", [1, 7, 65_535, 65_536, 1 << 20])
@pytest.mark.parametrize("greeting", [options(), options(protocol=PROMISES["body"])], ids=["replies", "no replies"])
async def test_the_body_in_pieces_that_every_filter_takes(block: int, greeting: bytes) -> None:
    body = b"0123456789abcdef\r\n" * (10_000 if block > 7 else 10)
    async with asked(greeting=greeting) as one:
        await one.begun()
        assert await one.message(b"X: y\r\n\r\n" + body, block=block) is None
        pieces = one.milter.payloads("body")
        assert b"".join(pieces) == body and all(0 < len(piece) <= MAX_PAYLOAD for piece in pieces)
        assert all(len(piece) == MAX_PAYLOAD for piece in pieces[:-1])


@pytest.mark.anyio
async def test_no_body_and_no_more_body() -> None:
    async with asked({"body": Answer(SKIP)}) as one:
        await one.begun()
        assert await one.message(b"X: y\r\n\r\n" + b"x" * 200_000) is None
        assert one.milter.events()[-2:] == ["body", "eom"]
        one.stage.reset(one.session, one.session.transaction or make_transaction(one.session))
        await one.begun()
        assert await one.message(b"X: y\r\n") is None
        assert one.milter.events()[-2:] == ["eoh", "eom"]


@pytest.mark.anyio
async def test_macros_of_its_own() -> None:
    lists, define = {"mail": ["i", "{mine}", "{who}"]}, {"mine": "client.address", "{who}": "auth.user"}
    session = make_session(helo="x", user="Tim@Example.org")
    async with asked(session=session, macros=lists, define=define) as one:
        transaction = await one.begun()
        assert one.milter.macros("mail") == {
            b"i": transaction.id.encode(), b"{mine}": b"192.0.2.1", b"{who}": b"tim@example.org",
        }  # fmt: skip


@pytest.mark.anyio
async def test_macros_that_the_filter_asks_for() -> None:
    greeting = options(macros={2: b"j {auth_authen}", 5: b"{mine} i"})
    async with asked(greeting=greeting, define={"mine": "mail.from"}, session=make_session(helo="x")) as one:
        transaction = await one.begun()
        await one.message()
        assert one.milter.macros("mail") == {b"j": b"gateway.example"}
        assert one.milter.macros("eom") == {b"{mine}": b"a@example.org", b"i": transaction.id.encode()}


@pytest.mark.anyio
async def test_early_it_hears_of_the_client_at_once_and_of_helo_again() -> None:
    async with asked(connect="early", session=make_session(name="client.example")) as one:
        stage, session = one.stage, one.session
        assert await stage.connect(session) is None
        assert one.milter.events() == ["optneg", "connect"]
        assert one.milter.payloads("connect") == [b"client.example\x004\x9c\x40192.0.2.1\0"]
        for name, tls in (("a.example", None), ("a.example", TLS), ("b.example", TLS), ("b.example", TLS)):
            session.helo, session.tls = name, tls
            assert await stage.helo(session, name) is None
        assert one.milter.payloads("helo") == [b"a.example\0", b"a.example\0", b"b.example\0", b"b.example\0"]
        assert one.milter.macros("helo")[b"{tls_version}"] == b"TLSv1.3"
        await one.begun()
        assert one.milter.events().count("helo") == 4 and one.milter.connections == 1


@pytest.mark.anyio
async def test_late_it_hears_only_of_the_last_helo() -> None:
    async with asked() as one:
        assert await one.begun()
        one.session.helo = "other.example"
        one.stage.reset(one.session, one.session.transaction or make_transaction(one.session))
        await one.begun()
        assert one.milter.payloads("helo") == [b"client.example\0", b"other.example\0"]


@pytest.mark.anyio
@pytest.mark.parametrize("wanted", [True, False])
async def test_recipients_that_were_refused_before_it(wanted: bool) -> None:
    """Only a filter that asked for them hears of them; what it says means nothing."""
    greeting = options(protocol=RCPT_REJ if wanted else 0)
    async with asked({"rcpt:1": Answer(REJECT)} if wanted else {}, greeting=greeting) as one:
        stage, session = one.stage, one.session
        transaction = make_transaction(session)
        assert await stage.mail(session, transaction) is None
        no = Reply.of("550 5.1.1 unknown")
        stage.settled(session, Outcome("rcpt", 5, Cause.POLICY, "", no, "nobody@example.net"))
        assert await stage.rcpt(session, make_recipient(session)) is None
        told = [b"<nobody@example.net>\0"] * wanted
        assert one.milter.payloads("rcpt") == [*told, b"<recipient@example.net>\0"]
        stage.settled(session, Outcome("rcpt", 5, Cause.POLICY, "", no, "recipient@example.net"))  # it knows this one
        assert await stage.data(session, transaction) is None
        assert len(one.milter.payloads("rcpt")) == 1 + wanted


@pytest.mark.anyio
async def test_a_client_without_name_or_address() -> None:
    for session, payload in (
        (make_session(helo="x"), b"[192.0.2.1]\x004\x9c\x40192.0.2.1\0"),
        (make_session(helo="x", address="2001:db8::1"), b"[2001:db8::1]\x006\x9c\x402001:db8::1\0"),
        (make_session(helo="x", address="", port=0), b"localhost\0U"),
    ):
        async with asked(session=session) as one:
            await one.begun()
            assert one.milter.payloads("connect") == [payload]
