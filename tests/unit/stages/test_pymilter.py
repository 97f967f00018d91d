"""pymilter's filter classes inside the gateway: what they are told, and what their answers do.

`Milter.testctx.TestCtx`, pymilter's own test harness, is the oracle for what a filter sees of a message.
"""

from __future__ import annotations

import io
import socket
from typing import Any

import pytest

from gateway import (
    AppendHeader,
    Cause,
    Discard,
    Edit,
    Refuse,
    Reply,
    Session,
)
from gateway.protocol.milter import Action, Step
from gateway.testing.messages import make_message
from gateway.testing.stages import TLS, make_recipient, make_session, make_transaction
from stages.pymilter_context import Code
from stages.pymilter_filter import OFFERED
from tests.unit.stages.pymilter_filters import (
    CONTENT,
    Bare,
    Chosen,
    LeadingSpace,
    Milter,
    Recorder,
    envelope,
    fresh,
    milter,
    names,
    started,
    testctx,
    whole,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fresh()


# What a filter is told


def test_numbers_are_those_of_libmilter() -> None:
    for code in Code:
        assert getattr(milter, code.name) == code
    for action in Action:
        assert getattr(milter, action.name or "") == action
    for step in Step:
        assert getattr(milter, f"P_{step.name}") == step
    assert not OFFERED & milter.P_RCPT_REJ


async def test_a_session_and_its_messages() -> None:
    stage = await started()
    session = make_session(address="192.0.2.7", port=5000, name="client.example")
    assert await stage.connect(session) is None
    for name in ("first.example", "client.example"):
        assert await stage.helo(session, name) is None
    for _ in range(2):
        assert await stage.message(session, await envelope(stage, session, block=20)) is None
        assert session.transaction is not None
        stage.reset(session, session.transaction)
    stage.close(session)
    stage.close(session)
    await stage.stop()
    message = [
        ("envfrom", "<a@example.org>", "SIZE=100", "SMTPUTF8"),
        ("envrcpt", "<b@example.net>", "NOTIFY=NEVER"),
        ("data",),
        ("header", "Subject", "one\n two"),
        ("header", "X-Tab", "\tvalue"),
        ("header", "X-None", ""),
        ("eoh",),
        ("body", b"first line\r\nsecond line\r\n"),
        ("eom",),
    ]
    assert Recorder.events == [
        ("connect", "client.example", 2, ("192.0.2.7", 5000)),
        ("hello", "first.example"),
        ("hello", "client.example"),
        *message,
        *message,
        ("close",),
    ]
    assert len(Recorder.made) == 1 and Recorder.made[0]._ctx is None


@pytest.mark.parametrize(
    ("session", "told"),
    [
        (make_session(address="2001:db8::1", port=9), ("[2001:db8::1]", socket.AF_INET6, ("2001:db8::1", 9, 0, 0))),
        (make_session(reverse_name="a.example", name_status="unavailable"), ("[192.0.2.1]", socket.AF_INET, ("192.0.2.1", 40000))),
        (make_session(address="", port=0), ("localhost", socket.AF_UNIX, "192.0.2.25")),
    ],
)
async def test_how_a_client_is_shown(session: Session, told: tuple[object, ...]) -> None:
    await (await started()).connect(session)
    assert Recorder.events == [("connect", *told)]
    assert type(Recorder.events[0][2]) is int


CONTENTS = [
    CONTENT,
    b"A: b\r\nFrom: x\r\n\r\n",
    b"Subject: =?utf-8?q?=C3=BC?= \xc3\xbc \xff\r\nA:\r\n \r\n\tfolded\r\n\r\n" + b"0123456789\r\n" * 2000,
]


@pytest.mark.parametrize("content", CONTENTS)
async def test_the_same_events_as_in_pymilters_own_harness(content: bytes) -> None:
    ctx = testctx.TestCtx()
    saved = list(testctx.TestCtx.default_opts)
    Milter.factory = type("Harnessed", (Recorder,), {})
    try:
        assert ctx._connect("client.example", "client.example", "192.0.2.7") == Milter.CONTINUE
        assert ctx._feedFile(io.BytesIO(content.replace(b"\r\n", b"\n")), "a@example.org", "b@example.net") == 0
    finally:
        testctx.TestCtx.default_opts[:] = saved
        Milter.factory = Milter.Milter
    theirs = _comparable(Recorder.events)
    Recorder.events.clear()
    session = make_session(address="192.0.2.7", name="client.example")
    stage = await started()
    await stage.connect(session)
    await stage.helo(session, "client.example")
    transaction = make_transaction(session, "a@example.org")
    await stage.mail(session, transaction)
    await stage.rcpt(session, make_recipient(session, "b@example.net"))
    await stage.data(session, transaction)
    await stage.message(session, make_message(session, content))
    assert _comparable(Recorder.events) == theirs


def _comparable(events: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Without the port, which the harness does not give, and with one body of LF lines, as it reads them.

    The email package that it reads with takes all blanks from the beginning of a field.
    """
    body = b"".join(event[1] for event in events if event[0] == "body").replace(b"\r\n", b"\n")
    shown: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case ("connect", str(name), *_):
                shown.append(("connect", name))
            case ("header", name, value):
                shown.append(("header", name, value.lstrip(" \t")))
            case (name, *_) if name != "body":
                shown.append(event)
    return [*shown, ("body", body)]


async def test_what_is_not_wanted_is_not_called() -> None:
    stage = await started(Bare)
    assert sorted(stage.phases()) == ["mail", "message", "rcpt"]
    assert await whole(stage) is None
    ((id, recipient, address),) = Bare.seen
    assert id.startswith("TEST-") and (recipient, address) == ("b@example.net", "192.0.2.1")

    stage = await started(Chosen)
    assert "helo" in stage.phases()  # only negotiate knows
    session = make_session(helo="client.example", user="Tim@example.org", tls=TLS)
    await stage.connect(session)
    Recorder.does["envfrom"] = lambda to: Recorder.events.append(("tls", to.getsymval("{tls_version}")))
    Recorder.does["eom"] = lambda to: Recorder.events.append(tuple(map(to.getsymval, ("i", "auth_authen", "j", "{x}"))))
    assert await whole(stage, session=session) is None
    assert "hello" not in names() and "data" in names()
    assert ("tls", "TLSv1.3") in Recorder.events
    assert session.transaction is not None
    assert Recorder.events[-1] == (session.transaction.id, "Tim@example.org", "gateway.example", None)


async def test_a_leading_space_is_kept_if_agreed() -> None:
    stage = await started(LeadingSpace)
    Recorder.does["eom"] = lambda to: to.addheader("X-A", " v")
    assert await whole(stage) == Edit([AppendHeader("X-A", " v", leading_space=False)])
    assert Recorder.events[5:8] == [
        ("header", "Subject", " one\n two"), ("header", "X-Tab", "\tvalue"), ("header", "X-None", "")
    ]  # fmt: skip


async def test_macros() -> None:
    stage = await started()
    session = make_session(address="192.0.2.7", port=5000, tls=TLS, name="client.example")
    found: list[dict[str, str | None]] = []
    asked = ["j", "{j}", "i", "{client_addr}", "{client_name}", "{cipher_bits}", "{mail_addr}", "{rcpt_addr}"]
    asked += ["{auth_authen}"]
    for name in ("connect", "hello", "envfrom", "envrcpt", "eom"):
        Recorder.does[name] = lambda to: found.append({one: to.getsymval(one) for one in asked if to.getsymval(one)})
    await stage.connect(session)
    await stage.helo(session, "x")
    await whole(stage, session=session)
    session.user = session.typed_user = "tim"
    await whole(stage, session=session)
    connected = {"j": "gateway.example", "{j}": "gateway.example", "i": found[0].get("i"), "{client_addr}": "192.0.2.7",
                 "{client_name}": "client.example"}  # fmt: skip
    greeted = {**connected, "{cipher_bits}": "256"}
    mail = {**greeted, "i": f"{session.id}.1", "{mail_addr}": "a@example.org"}
    rcpt = {**mail, "{rcpt_addr}": "b@example.net"}
    assert found[:5] == [{k: v for k, v in one.items() if v} for one in (connected, greeted, mail, rcpt, rcpt)]
    second = {"i": f"{session.id}.2", "{auth_authen}": "tim"}
    assert found[5:] == [{**mail, **second}, {**rcpt, **second}, {**rcpt, **second}]


# What it answers


@pytest.mark.parametrize("name", ["envfrom", "envrcpt", "data", "header", "eoh", "body", "eom"])
@pytest.mark.parametrize("code", ["ACCEPT", "REJECT", "TEMPFAIL", "DISCARD"])
async def test_answers(name: str, code: str) -> None:
    stage = await started()
    Recorder.does[name] = lambda to: getattr(Milter, code)
    session = make_session(helo="client.example")
    transaction = make_transaction(session)
    verdicts: list[object] = [await stage.mail(session, transaction)]
    for _ in range(2):
        verdicts.append(await stage.rcpt(session, make_recipient(session)))
    verdicts.append(await stage.data(session, transaction))
    edits = stage.edits(transaction)
    verdicts.append(await stage.message(session, make_message(session, CONTENT)))
    given = [verdict for verdict in verdicts if verdict is not None]
    stage.reset(session, transaction)
    stage.close(session)
    await stage.stop()
    later = names()[names().index(name) + 1 :]
    causes = {"envfrom": Cause.SENDER_REJECTED, "envrcpt": Cause.RECIPIENT_REJECTED}
    over = ["close"]
    if code == "DISCARD":
        if name == "envrcpt":  # for libmilter not the end of the message
            over = ["abort", "close"]
        assert given == [Discard(f"DISCARD in {name if name != 'eoh' else 'header'}")]
    elif code == "ACCEPT":
        assert given == []
    else:
        log = f"{code} in {name if name != 'eoh' else 'header'}"
        refuse = Refuse(causes.get(name, Cause.CONTENT), temporary=code == "TEMPFAIL", log=log)
        assert given == [refuse] * (2 if name == "envrcpt" else 1)
        if name == "envrcpt":
            over = ["envrcpt", "data", "header", "header", "header", "eoh", "body", "eom", "close"]
    assert later == over
    in_envelope = name in ("envfrom", "envrcpt", "data")
    assert edits == ("none" if in_envelope and "data" not in later else "any")


@pytest.mark.parametrize("name", ["connect", "hello"])
@pytest.mark.parametrize("code", ["ACCEPT", "REJECT", "TEMPFAIL"])
async def test_early_answers_are_for_the_session(name: str, code: str) -> None:
    stage = await started()
    Recorder.does[name] = lambda to: getattr(Milter, code)
    session = make_session()
    verdicts = [await stage.connect(session), await stage.helo(session, "client.example")]
    refuse = None
    if code != "ACCEPT":
        refuse = Refuse(Cause.ACCESS_DENIED, temporary=code == "TEMPFAIL", log=f"{code} in connect or hello")
    assert verdicts == ([refuse, None] if name == "connect" else [None, refuse])
    asked = len(Recorder.events)
    transaction = make_transaction(session)
    assert await stage.mail(session, transaction) == refuse
    if refuse is not None:
        session.postponed = (refuse, "pymilter")  # RCPT tells it
        assert await stage.mail(session, transaction) is None
        session.user = "tim@example.org"  # who is let through at RCPT
        assert await stage.mail(session, transaction) == refuse
    assert await stage.rcpt(session, make_recipient(session)) is None
    assert await stage.message(session, make_message(session, CONTENT)) is None
    assert len(Recorder.events) == asked
    stage.close(session)
    await stage.stop()
    assert names()[asked:] == ["close"]


async def test_skip_ends_the_body_and_nothing_else() -> None:
    stage = await started()
    Recorder.does["body"] = lambda to: Milter.SKIP
    session = make_session(helo="x")
    message = await envelope(stage, session, b"A: b\r\n\r\n" + b"x" * 100, block=10)
    assert await stage.message(session, message) is None
    assert names()[-3:] == ["eoh", "body", "eom"] and message.size == len(message.content)


@pytest.mark.parametrize("block", [1000, 65_535, 65_536, 262_144])
async def test_pieces_of_a_body_are_as_large_as_libmilters(block: int) -> None:
    stage = await started()
    session = make_session(helo="x")
    body = bytes(range(256)) * 512
    assert await stage.message(session, await envelope(stage, session, b"A: b\r\n\r\n" + body, block)) is None
    pieces = [event[1] for event in Recorder.events if event[0] == "body"]
    assert [len(piece) for piece in pieces] == [65535, 65535, 2] and b"".join(pieces) == body


@pytest.mark.parametrize(
    ("arguments", "code", "reply"),
    [
        (("550", "5.7.1", "no"), "REJECT", Reply(550, (b"5.7.1 no",))),
        (("550", None, "no"), "REJECT", Reply(550, (b"no",))),
        (("554", "5.6.0", "a", "b"), "REJECT", Reply(554, (b"5.6.0 a", b"5.6.0 b"))),
        (("554", None, "a", "b"), "REJECT", Reply(554, (b"5.0.0 a", b"5.0.0 b"))),
        (("451", "4.7.1", "100%% later"), "TEMPFAIL", Reply(451, (b"4.7.1 100% later",))),
        (("421", "4.7.0", "go"), "TEMPFAIL", Reply(421, (b"4.7.0 go",))),
        (("451", "4.7.1", "class differs"), "REJECT", None),
        (("550", "5.7.1", "class differs"), "TEMPFAIL", None),
        (("250", "2.0.0", "ok"), "REJECT", "cannot set reply"),
        (("55", "5.0.0", "x"), "REJECT", "cannot set reply"),
        (("550", "4.7.1", "x"), "REJECT", "cannot set reply"),
        (("550", "5.7", "x"), "REJECT", "cannot set reply"),
        (("550", "5.7.1", "a\r\n250 ok"), "REJECT", "cannot set reply"),
        (("550", "5.7.1", "a\nb"), "REJECT", "cannot set reply"),
        (("550", "5.7.1", "x" * 981), "REJECT", "cannot set reply"),
        (("550", "5.7.1", *("x",) * 33), "REJECT", "cannot set reply"),
        (("550", "5.7.1", "lone %"), "REJECT", "must be doubled"),
    ],
)
async def test_setreply(arguments: tuple[str, ...], code: str, reply: Reply | str | None) -> None:
    stage = await started()

    def reject(to: Recorder) -> int:
        to.setreply(*arguments)
        return int(getattr(Milter, code))

    Recorder.does["envrcpt"] = reject
    session = make_session(helo="x")
    await stage.mail(session, make_transaction(session))
    recipient = make_recipient(session)
    if isinstance(reply, str):
        with pytest.raises((milter.error, ValueError), match=reply):
            await stage.rcpt(session, recipient)
        return
    refuse = await stage.rcpt(session, recipient)
    assert refuse is not None
    assert (refuse.reply, refuse.disconnect) == (reply, reply is not None and reply.code == 421)
    Recorder.does["envrcpt"] = lambda to: getattr(Milter, code)
    refuse = await stage.rcpt(session, recipient)
    assert refuse is not None and refuse.reply is None, "the reply of the last callback is no more"


async def test_unknown_commands() -> None:
    stage = await started()
    session = make_session()
    assert await stage.unknown(session, "X") is None
    await stage.connect(session)
    for code, refused in (("REJECT", False), ("TEMPFAIL", True), ("CONTINUE", False)):
        Recorder.does["unknown"] = lambda to, code=code: getattr(Milter, code)  # type: ignore[misc]
        assert (await stage.unknown(session, "FOO bar") is not None) is refused
    assert Recorder.events[1:] == [("unknown", "FOO bar")] * 3
    assert await (await started(Bare)).unknown(session, "X") is None


@pytest.mark.parametrize(
    ("name", "answer", "error"),
    [
        ("connect", Milter.DISCARD, ValueError),
        ("hello", Milter.SKIP, ValueError),
        ("envfrom", "text", TypeError),
        ("envrcpt", 99, ValueError),
        ("eom", Milter.ALL_OPTS, ValueError),
        ("header", Milter.SKIP, ValueError),
    ],
)
async def test_answers_that_are_none(name: str, answer: object, error: type[Exception]) -> None:
    stage = await started()
    Recorder.does[name] = lambda to: answer
    with pytest.raises(error, match=name):
        await whole(stage)
