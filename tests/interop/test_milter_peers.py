"""The filters themselves, behind Postfix's own milter client: each does what tests of the gateway rely on."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import dkim
import pytest

from tests.interop.conftest import StartPostfix
from tests.peers.clients import LIMIT, read_reply
from tests.peers.milter_program import RecordingMilter
from tests.peers.miltertest import miltertest
from tests.peers.opendkim import OpenDkim, dkim_key
from tests.peers.postfix import Postfix
from tests.peers.process import group_members, scratch
from tests.peers.rspamd import GTUBE, Rspamd
from tests.peers.scripted_milter import (
    ACCEPT,
    CONTINUE,
    LEADING_SPACE,
    PROGRESS,
    PROMISES,
    SKIP,
    SKIP_BIT,
    TEMPFAIL,
    Answer,
    Close,
    Drip,
    Garbage,
    Reset,
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
    quarantine,
    replace_body,
    reply,
)

pytestmark = pytest.mark.peers

PLAIN = b"From: a@x.test\r\nSubject: %b\r\n\r\nhello\r\n"
BODY = b"\r\nhello\r\n"
MAIN = "default_transport = discard:\nlocal_header_rewrite_clients =\nsmtpd_error_sleep_time = 0\n"
"""Discards what is not for local.test, adds no Date or Message-Id, refuses without delay."""


def send(
    port: int,
    content: bytes,
    *,
    sender: str = "a@x.test",
    to: tuple[str, ...] = ("user@local.test",),
    helo: str = "c.test",
) -> list[str]:
    """A session with one message: the replies to MAIL, the RCPTs, DATA and the content, up to the first refusal."""
    recipients = [f"RCPT TO:<{recipient}>" for recipient in to]
    lines = [f"EHLO {helo}", f"MAIL FROM:<{sender}>", *recipients, "DATA"]
    replies: list[str] = []
    with socket.create_connection(("127.0.0.1", port), LIMIT) as connection:
        read_reply(connection)
        for line in [*(line.encode() + b"\r\n" for line in lines), content + b".\r\n"]:
            connection.sendall(line)
            replies.append(read_reply(connection).decode())
            if replies[-1][0] in "45" and not line.startswith(b"RCPT"):
                break
        connection.sendall(b"QUIT\r\n")
        read_reply(connection)
    return replies[1:]


def ordered(*orders: str) -> bytes:
    """A message that asks for this."""
    return "".join(f"X-Do: {order}\r\n" for order in orders).encode() + PLAIN % b"orders"


@pytest.fixture
def recorder() -> Iterator[RecordingMilter]:
    with scratch() as folder, RecordingMilter(folder) as milter:
        yield milter


@pytest.fixture
def postfix(start_postfix: StartPostfix, recorder: RecordingMilter) -> Postfix:
    """One that asks the recording filter."""
    return start_postfix(main=f"smtpd_milters = {recorder.address}\n{MAIN}")


def delivered(postfix: Postfix, mailbox: str = "user") -> bytes:
    """The only message in the mailbox, with its line ends as sent."""
    postfix.wait_log(r": removed")
    (message,) = postfix.delivered(mailbox)
    return message.replace(b"\n", b"\r\n")


# -- filters people run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["unix", "inet"])
def test_rspamd(start_postfix: StartPostfix, place: str) -> None:
    with scratch() as folder, Rspamd(folder) as rspamd:
        pid = rspamd.pid
        postfix = start_postfix(main=f"smtpd_milters = {rspamd.address if place == 'unix' else rspamd.inet}\n{MAIN}")
        assert send(postfix.port, PLAIN % b"a" + GTUBE + b"\r\n")[-1].startswith("554 5.7.1 Gtube pattern")
        assert send(postfix.port, PLAIN % b"tempfail")[-1].startswith("451 4.7.1 try later")
        assert send(postfix.port, PLAIN % b"markme")[-1].startswith("250")
        message = delivered(postfix)
        assert b"\r\nX-Spam: Yes\r\n" in message and b"\r\nX-Spam-Status: Yes, score=7.00\r\n" in message
        postfix.stop()
    assert not group_members(pid)


@pytest.mark.parametrize("inet", [False, True])
def test_opendkim_signs_and_verifies(start_postfix: StartPostfix, inet: bool) -> None:
    with scratch() as folder:
        key = dkim_key(folder, "x.test")

        def look_up(name: bytes, timeout: float = 5.0) -> bytes | None:
            return key.record.encode() if name == f"{key.name}.".encode() else None

        with OpenDkim(folder, key, inet=inet) as signer, OpenDkim(folder, key, verify=True, inet=inet) as verifier:
            signing = start_postfix(main=f"smtpd_milters = {signer.address}\n{MAIN}")
            assert send(signing.port, PLAIN % b"signed")[-1].startswith("250")
            signed = delivered(signing)
            assert signed.index(b"DKIM-Signature:") < signed.index(b"Received:")
            assert dkim.verify(signed, dnsfunc=look_up)
            assert not dkim.verify(signed.replace(b"hello", b"jello"), dnsfunc=look_up)

            verifying = start_postfix(main=f"smtpd_milters = {verifier.address}\n{MAIN}")
            content = signed[signed.index(b"DKIM-Signature:") :]
            altered = send(verifying.port, content.replace(b"hello", b"jello"))
            assert altered[-1].startswith("550 5.7.0 bad DKIM signature")
            assert send(verifying.port, content)[-1].startswith("250")
            assert b"Authentication-Results: verify.test;\r\n\tdkim=pass (2048-bit key" in delivered(verifying)
            for each in (signing, verifying):
                each.stop()
            assert signer.stop() == 0


# -- the recording filter -------------------------------------------------------------------------------------

# What a message asks for, what is stored then. A deletion leaves the orders alone, which come before the rest.
EDITS: dict[str, tuple[list[str], bytes]] = {
    "add": (["add X-Added: one", "add X-Added: two"], b"Subject: orders\r\nX-Added: one\r\nX-Added: two\r\n" + BODY),
    "folded": (["add X-Added: one,\\n\ttwo"], b"X-Added: one,\r\n\ttwo\r\n" + BODY),
    "insert": (["insert 1 X-First: top"], b"\r\nX-First: top\r\nX-Do: insert"),
    "insert below": (["insert 2 X-Second: below"], b"below\r\nX-Second: below\r\nFrom:"),
    "insert at the end": (["insert 99 X-Last: end"], b"Subject: orders\r\nX-Last: end\r\n" + BODY),
    "change": (["change 1 Subject: changed"], b"\r\nSubject: changed\r\n" + BODY),
    "change the second": (
        ["add X-Same: 1", "add X-Same: 2", "change 2 X-Same: changed"], b"X-Same: 1\r\nX-Same: changed\r\n" + BODY
    ),
    "change what is not there": (["change 1 X-New: new"], b"Subject: orders\r\nX-New: new\r\n" + BODY),
    "delete": (["delete 1 Subject"], b"From: a@x.test\r\n" + BODY),
    "delete many": (["nothing", "delete_all X-Do From"], b"Subject: orders\r\n" + BODY),
    "body": (["body one\\n.two"], b"Subject: orders\r\n\r\none\r\n.two\r\n"),
    "large body": (["body_size 131072"], b"\r\n%062d\r\n%062d\r\n" % (2046, 2047)),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_recording_milter_edits_the_content(postfix: Postfix, edit: str) -> None:
    orders, expected = EDITS[edit]
    assert send(postfix.port, ordered(*orders))[-1].startswith("250")
    message = delivered(postfix)
    assert expected in message, message[:1000]
    if edit == "large body":
        assert len(message.partition(b"\r\n\r\n")[2]) == 131072


def test_recording_milter_inserts_above_received(postfix: Postfix) -> None:
    assert send(postfix.port, ordered("insert 0 X-First: top"))[-1].startswith("250")
    assert b"X-First: top\r\nReceived: from c.test" in delivered(postfix)


def test_recording_milter_edits_the_envelope(postfix: Postfix) -> None:
    parameters = ["sender new@x.test RET=HDRS ENVID=abc", "recipient other@local.test NOTIFY=NEVER"]
    assert send(postfix.port, ordered(*parameters, "remove user@local.test"))[-1].startswith("250")
    assert b"Return-Path: <new@x.test>" in delivered(postfix, "other")
    assert not postfix.delivered("user")


@pytest.mark.parametrize(
    ("order", "code"),
    [
        ("reject", "550 5.7.1 refused as asked"),
        ("lines", "554-5.6.0 three\r\n554-5.6.0 lines, 100%\r\n554 5.6.0 of refusal"),
        ("tempfail", "450 4.7.1 not now"),
        ("raise", "451 4."),
        ("crash", "451 4."),
        ("discard", "250 2."),
        ("quarantine held", "250 2."),
    ],
)
def test_recording_milter_ends(postfix: Postfix, recorder: RecordingMilter, order: str, code: str) -> None:
    assert send(postfix.port, ordered("progress", order))[-1].startswith(code)
    if order == "crash":
        assert recorder.stop() == 3
    if order == "discard":
        postfix.wait_log("milter-discard")
    if order.startswith("quarantine"):
        postfix.wait_log("milter-hold: .*triggers HOLD action")
    assert not postfix.delivered()


@pytest.mark.parametrize("verdict", ["accept", "reject", "tempfail", "discard", "lines"])
def test_recording_milter_decides_early(postfix: Postfix, recorder: RecordingMilter, verdict: str) -> None:
    first = {"accept": "2", "discard": "2", "tempfail": "4", "reject": "5", "lines": "5"}[verdict]
    places: dict[str, dict[str, object]] = {
        "helo": {"helo": f"{verdict}.test"},
        "mail": {"sender": f"{verdict}@x.test"},
        "rcpt": {"to": (f"{verdict}@foreign.test",)},
        **{event: {"sender": f"{verdict}-{event}@x.test"} for event in ("data", "header", "eoh", "body", "eom")},
        **{f"at {event}": {"content": ordered(f"at {event} {verdict}")} for event in ("eoh", "body", "eom")},
    }
    for place, how in places.items():
        if (place, verdict) == ("helo", "discard"):
            continue  # has no meaning there
        replies = send(postfix.port, **{"content": PLAIN % b"early", **how})  # type: ignore[arg-type]
        classes = [answer[0] for answer in replies if not answer.startswith("354")]
        if place == "rcpt" and first in "45":  # then DATA has no recipient
            assert classes == ["2", first, "5"], replies
        else:
            assert classes[-1] == first and set(classes[:-1]) <= {"2"}, (place, replies)
        event = place.split()[-1]
        last = [str(seen["event"]) for seen in recorder.sessions()[-1] if seen["event"] not in ("abort", "close")][-1]
        assert last == event, (place, last)


def test_recording_milter_agrees_on_options(start_postfix: StartPostfix) -> None:
    every = ["connect", "helo", "mail", "rcpt", "data", "header", "eoh", "body"]
    cases: dict[str, tuple[list[str], list[str]]] = {
        "noreply": ([f"noreply:{event}" for event in every], [*every, "body", "body", "body", "body", "eom"]),
        "nocallback": ([f"nocallback:{event}" for event in every], ["eom"]),
        "skip": (["skip", "sizes"], [*every, "eom"]),
        "answer": (["answer:eoh=reject"], every[:-1]),
    }
    for name, (flags, expected) in cases.items():
        with scratch() as folder, RecordingMilter(folder, *flags) as milter:
            postfix = start_postfix(main=f"smtpd_milters = {milter.address}\n{MAIN}")
            answer = send(postfix.port, b"From: a@x.test\r\n\r\n" + b"line of text\r\n" * 20000)[-1]
            assert answer.startswith("550" if name == "answer" else "250"), (name, answer)
            (session,) = milter.sessions(*every, "eom")
            assert [event["event"] for event in session] == expected, name
            postfix.stop()
            assert milter.stop() == 0
            assert milter.events()[-1]["event"] == "stopped"


def test_recording_milter_sees_refused_recipients_and_blanks(start_postfix: StartPostfix) -> None:
    flags = ["rcpt_rej", "leading_space", "macros:mail=i,{mail_addr}"]
    with scratch() as folder, RecordingMilter(folder, *flags) as milter:
        postfix = start_postfix(main=f"smtpd_milters = {milter.address}\n{MAIN}")
        send(postfix.port, b"A: b\r\nC:d\r\nE:\tf\r\n g\r\n\r\n", to=("nobody@local.test", "user@local.test"))
        recipients = milter.wait_events("rcpt", 2)
        assert [event["address"] for event in recipients] == ["<nobody@local.test>", "<user@local.test>"]
        refused = recipients[0]["macros"]
        assert isinstance(refused, dict) and refused["{rcpt_mailer}"] == "error"
        assert [event["value"] for event in milter.events("header")] == [" b", "d", "\tf\n g"]
        (sender,) = milter.events("mail")
        assert isinstance(sender["macros"], dict) and sender["macros"]["{mail_addr}"] == "a@x.test"
        postfix.stop()


def test_recording_milter_that_only_reads(start_postfix: StartPostfix) -> None:
    with scratch() as folder, RecordingMilter(folder, "read_only", inet=True) as milter:
        postfix = start_postfix(main=f"smtpd_milters = {milter.address}\n{MAIN}")
        assert send(postfix.port, PLAIN % b"read")[-1].startswith("250")
        assert b"\r\nSubject: read\r\n" in delivered(postfix)
        postfix.stop()


def test_recording_milter_waits_for_the_test(postfix: Postfix, tmp_path: Path, recorder: RecordingMilter) -> None:
    tmp_path.chmod(0o755)
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    async def session() -> None:
        sent = asyncio.create_task(asyncio.to_thread(send, postfix.port, ordered(f"wait {gate}")))
        await asyncio.to_thread(recorder.wait_events, "eom")
        assert not sent.done()
        await asyncio.to_thread(gate.write_bytes, b"")
        assert (await sent)[-1].startswith("250")

    asyncio.run(session())


def test_miltertest_drives_the_recording_milter(recorder: RecordingMilter) -> None:
    script = """
        assert(mt.conninfo(conn, "h.test", "192.0.2.9") == nil)
        assert(mt.getreply(conn) == SMFIR_CONTINUE)
        mt.macro(conn, SMFIC_HELO, "{tls_version}", "TLSv1.3")
        mt.helo(conn, "helo.test")
        assert(mt.getreply(conn) == SMFIR_CONTINUE)
        mt.macro(conn, SMFIC_MAIL, "i", "Q1", "{auth_authen}", "joe")
        mt.mailfrom(conn, "<a@x.test>", "BODY=8BITMIME")
        assert(mt.getreply(conn) == SMFIR_CONTINUE)
        mt.rcptto(conn, "<reject@x.test>")
        assert(mt.getreply(conn) == SMFIR_REPLYCODE)
        mt.rcptto(conn, "<ok@x.test>")
        assert(mt.getreply(conn) == SMFIR_CONTINUE)
        mt.data(conn); mt.getreply(conn)
        mt.header(conn, "X-Do", "change 1 X-Do: done"); mt.getreply(conn)
        mt.eoh(conn); mt.getreply(conn)
        mt.bodystring(conn, "hello\\r\\n"); mt.getreply(conn)
        mt.eom(conn)
        assert(mt.getreply(conn) == SMFIR_CONTINUE)
        assert(mt.eom_check(conn, MT_HDRCHANGE, "X-Do", "done"))
        assert(not mt.eom_check(conn, MT_HDRADD, "X-Nope"))
        mt.disconnect(conn)
    """
    run = miltertest(recorder.place, script)
    assert run.returncode == 0, run.stdout + run.stderr
    (helo,) = recorder.events("helo")
    assert helo["macros"] == {"{tls_version}": "TLSv1.3"}
    assert miltertest(recorder.place, 'error("as asked")').returncode == 1


# -- the scripted filter --------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("inet", [False, True])
async def test_scripted_milter_edits(start_postfix: StartPostfix, inet: bool) -> None:
    edits = [
        add_header(b"X-Added", b"one"), insert_header(0, b"X-First", b"top"), change_header(1, b"Subject", b"changed"),
        replace_body(b"new\r\n"), replace_body(b"body\r\n"), change_sender(b"<new@x.test>"),
        add_recipient(b"<other@local.test>"), add_recipient(b"<more@foreign.test>", b"NOTIFY=NEVER"),
        delete_recipient(b"<user@local.test>"), PROGRESS, ACCEPT,
    ]  # fmt: skip
    async with ScriptedMilter({"eom": Answer(*edits)}, inet=inet) as milter:
        postfix = start_postfix(main=f"smtpd_milters = {milter.address}\n{MAIN}")
        answers = await asyncio.to_thread(send, postfix.port, PLAIN % b"edit")
        assert answers[-1].startswith("250")
        message = await asyncio.to_thread(delivered, postfix, "other")
        assert message.startswith(b"Return-Path: <new@x.test>") and message.endswith(b"\r\n\r\nnew\r\nbody\r\n")
        assert b"\r\nX-First: top\r\nReceived:" in message
        assert b"\r\nSubject: changed\r\nX-Added: one\r\n" in message
        await milter.gone()
        assert milter.events() == [
            "optneg", "connect", "helo", "mail", "rcpt", "data", "header", "header", "eoh", "body", "eom",
            "abort", "abort", "quit",
        ]  # fmt: skip
        assert milter.payloads("mail") == [b"<a@x.test>\0"] and milter.payloads("body") == [b"hello\r\n"]
        assert milter.macros("rcpt")[b"{rcpt_addr}"] == b"user@local.test"
        version, _, protocol = milter.offers[0]
        assert version == 6 and protocol & PROMISES["header"] and protocol & SKIP_BIT
        await asyncio.to_thread(postfix.stop)


FAULTS: dict[str, tuple[Script, str]] = {
    "reply": ({"mail": Answer(reply(b"550 5.7.1 no"))}, "550 5.7.1 no"),
    "lines": ({"eom": Answer(reply(b"554-5.6.0 a\r\n554 5.6.0 b"))}, "554-5.6.0 a\r\n554 5.6.0 b"),
    "tempfail": ({"eoh": Answer(TEMPFAIL)}, "451"),
    "quarantine": ({"eom": Answer(quarantine(b"why"), CONTINUE)}, "250"),
    "skip": ({"body": Answer(SKIP)}, "250"),
    "drip": ({"eom": Drip(PROGRESS + CONTINUE)}, "250"),
    "close": ({"rcpt": Close()}, "451"),
    "reset": ({"body": Reset()}, "451"),
    "garbage": ({"header:2": [Garbage(400), Close()]}, "451"),
    "wrong reply": ({"helo": Answer(add_header(b"X-A", b"b"), CONTINUE)}, "451"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("fault", FAULTS)
async def test_scripted_milter_fails_as_told(start_postfix: StartPostfix, fault: str) -> None:
    script, expected = FAULTS[fault]
    greeting = options(protocol=SKIP_BIT | LEADING_SPACE | PROMISES["data"], macros={2: b"i {mail_addr}"})
    async with ScriptedMilter(script, {}, greeting=greeting, inet=True) as milter:
        postfix = start_postfix(main=f"smtpd_milters = {milter.address}\n{MAIN}")
        answers = await asyncio.to_thread(send, postfix.port, PLAIN % b"fault")
        assert any(answer.startswith(expected) for answer in answers), answers
        await milter.gone()
        assert (await asyncio.to_thread(send, postfix.port, PLAIN % b"good"))[-1].startswith("250")
        await milter.reached("eom", connection=2)
        assert milter.payloads("header", 2)[1] == b"Subject\0 good\0"
        await asyncio.to_thread(postfix.stop)


@pytest.mark.anyio
async def test_scripted_milter_waits_and_is_lost(start_postfix: StartPostfix) -> None:
    go = asyncio.Event()
    async with ScriptedMilter({"eom": [Wait(go), Answer(ACCEPT)]}) as milter:
        postfix = start_postfix(main=f"smtpd_milters = {milter.address}\n{MAIN}")
        first = asyncio.create_task(asyncio.to_thread(send, postfix.port, PLAIN % b"first"))
        await milter.reached("eom")
        go.set()
        assert (await first)[-1].startswith("250")
        go.clear()
        second = asyncio.create_task(asyncio.to_thread(send, postfix.port, PLAIN % b"second"))
        await milter.reached("eom", connection=2)
        milter.drop()
        assert (await second)[-1].startswith("451")
        await asyncio.to_thread(postfix.stop)


def test_a_killed_filter_is_gone() -> None:
    with scratch() as folder, RecordingMilter(folder) as milter:
        pid = milter.pid
        assert milter.stop(signal.SIGKILL) == -signal.SIGKILL
        assert not group_members(pid)
        assert milter.start().stop() == 0
