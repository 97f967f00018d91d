"""The filter's side of the protocol (gateway.protocol.milter_filter) with MTAs that others wrote: miltertest, Postfix.

A small server, a thread a connection, carries octets between the MTA's socket and a MilterFilter; `answer` decides.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType

import pytest

from gateway.protocol import milter
from gateway.protocol.milter import Action, FilterReply, Stage, Step
from gateway.protocol.milter_filter import MilterFilter, Received
from gateway.protocol.smtp import Reply
from tests.interop.conftest import StartPostfix
from tests.interop.mail_client import connected
from tests.interop.milter_legs import MAIN, settled, stored
from tests.peers.miltertest import miltertest
from tests.peers.postfix import Postfix
from tests.peers.process import LIMIT, wait_for

pytestmark = pytest.mark.peers

ALL_ACTIONS = int(Action(0x1FF) & ~Action.SETSYMLIST)
Answer = Callable[[Received], Sequence[FilterReply]]


class FilterServer:
    """A filter on a loopback port. `heard` are the commands of each connection, `errors` what went wrong."""

    def __init__(
        self,
        answer: Answer,
        actions: int = ALL_ACTIONS,
        steps: int = 0,
        macros: Mapping[Stage, tuple[str, ...]] = MappingProxyType({}),
    ) -> None:
        self.heard: list[list[Received]] = []
        self.errors: list[Exception] = []
        self._answer, self._agreed = answer, (actions, steps, macros)
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]

    def serve(self) -> None:
        """Take connections until the socket is shut down."""
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.heard.append([])
            thread = threading.Thread(target=self._talk, args=(connection, self.heard[-1]))
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """No more connections; wait for the end of those there are."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive()

    def _talk(self, connection: socket.socket, heard: list[Received]) -> None:
        connection.settimeout(LIMIT)
        with connection:
            filter = MilterFilter()
            try:
                while not filter.closed and (data := connection.recv(65536)):
                    for received in filter.feed(data):
                        heard.append(received)
                        if isinstance(received.command, milter.Options):
                            connection.sendall(filter.negotiate(*self._agreed))
                        elif received.reply_expected:
                            connection.sendall(b"".join(filter.send(reply) for reply in self._answer(received)))
                if filter.failure is not None:
                    raise filter.failure
            except Exception as error:
                self.errors.append(error)


@contextmanager
def serving(
    answer: Answer,
    actions: int = ALL_ACTIONS,
    steps: int = 0,
    macros: Mapping[Stage, tuple[str, ...]] = MappingProxyType({}),
) -> Iterator[FilterServer]:
    """The filter, until the test ends; then nothing may have gone wrong in it."""
    server = FilterServer(answer, actions, steps, macros)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(LIMIT)
    assert server.errors == []


def names(heard: Sequence[Received]) -> list[str]:
    """The commands of a connection by name."""
    return [type(received.command).__name__ for received in heard]


def said(heard: Sequence[Received], kind: type) -> list[Received]:
    """Those of one kind."""
    return [received for received in heard if isinstance(received.command, kind)]


EDITS: list[FilterReply] = [
    milter.Progress(),
    milter.AddHeader(b"X-Added", b" one,\r\n\ttwo"),
    milter.InsertHeader(1, b"X-First", b" top"),
    milter.ChangeHeader(1, b"Subject", b" changed"),
    milter.ChangeHeader(1, b"X-Old", b""),
    milter.ReplaceBody(b"new\r\n"),
    milter.ReplaceBody(b".body\r\n"),
    milter.AddRecipient("other@local.test"),
    milter.AddRecipient("more@local.test", (("NOTIFY", "NEVER"),)),
    milter.DeleteRecipient("user@local.test"),
    milter.ChangeSender("new@x.test", (("RET", "HDRS"), ("ENVID", "abc"))),
]
VERDICTS: dict[str, FilterReply] = {
    "reject": milter.Reject(),
    "tempfail": milter.Tempfail(),
    "words": milter.ReplyCode(Reply(554, (b"5.6.0 three", b"5.6.0 lines, 100%", b"5.6.0 of refusal"))),
    "discard": milter.Discard(),
    "accept": milter.Accept(),
    "shutdown": milter.Shutdown(),
}


def obey(received: Received) -> Sequence[FilterReply]:
    """A verdict asked for by the name of HELO, sender or recipient, or by a field; senders `edit` and `hold`."""
    match received.command:
        case milter.Helo(name):
            return [VERDICTS.get(name.partition(".")[0], milter.Continue())]
        case milter.Mail(address, _) | milter.Rcpt(address, _):
            return [VERDICTS.get(address.strip("<>").partition("@")[0], milter.Continue())]
        case milter.Header(b"X-Do", value):
            return [VERDICTS.get(value.decode().strip(), milter.Continue())]
        case milter.Body(data) if b"no more" in data:
            return [milter.Skip()]
        case milter.EndOfMessage():
            sender = received.macros.get("mail_addr", "").partition("@")[0]
            changes: dict[str, list[FilterReply]] = {"edit": EDITS, "hold": [milter.Quarantine("to be looked at")]}
            return [*changes.get(sender, ()), milter.Continue()]
    return [milter.Continue()]


# -- miltertest --------------------------------------------------------------------------------------------------

EVENTS = """
    mt.conninfo(conn, "h.test", "192.0.2.9"); assert(mt.getreply(conn) == SMFIR_CONTINUE)
    mt.macro(conn, SMFIC_HELO, "{tls_version}", "TLSv1.3")
    mt.helo(conn, "client.test"); assert(mt.getreply(conn) == SMFIR_CONTINUE)
    mt.macro(conn, SMFIC_MAIL, "i", "Q1", "{mail_addr}", "edit@x.test")
    mt.mailfrom(conn, "<a@x.test>", "BODY=8BITMIME"); assert(mt.getreply(conn) == SMFIR_CONTINUE)
    mt.rcptto(conn, "<reject@x.test>"); assert(mt.getreply(conn) == SMFIR_REJECT)
    mt.rcptto(conn, "<tempfail@x.test>"); assert(mt.getreply(conn) == SMFIR_TEMPFAIL)
    mt.rcptto(conn, "<words@x.test>"); assert(mt.getreply(conn) == SMFIR_REPLYCODE)
    mt.macro(conn, SMFIC_RCPT, "{rcpt_addr}", "user@local.test")
    mt.rcptto(conn, "<user@local.test>"); assert(mt.getreply(conn) == SMFIR_CONTINUE)
    mt.data(conn); assert(mt.getreply(conn) == SMFIR_CONTINUE)
    mt.header(conn, "Subject", "as it was"); assert(mt.getreply(conn) == SMFIR_CONTINUE)
    mt.header(conn, "X-Old", "one\\n\\ttwo"); assert(mt.getreply(conn) == SMFIR_CONTINUE)
    mt.eoh(conn); assert(mt.getreply(conn) == SMFIR_CONTINUE)
    mt.bodystring(conn, "hello\\r\\n"); assert(mt.getreply(conn) == SMFIR_CONTINUE)
    mt.bodystring(conn, "no more"); assert(mt.getreply(conn) == SMFIR_SKIP)
    mt.eom(conn); assert(mt.getreply(conn) == SMFIR_CONTINUE)
"""
CHECKS = """
    assert(mt.eom_check(conn, MT_HDRADD, "X-Added", "one,\\n\\ttwo"))
    assert(mt.eom_check(conn, MT_HDRINSERT, "X-First", "top", 1))
    assert(mt.eom_check(conn, MT_HDRCHANGE, "Subject", "changed"))
    assert(mt.eom_check(conn, MT_HDRDELETE, "X-Old"))
    assert(mt.eom_check(conn, MT_BODYCHANGE, "new\\r\\n"))
    assert(mt.eom_check(conn, MT_BODYCHANGE, ".body\\r\\n"))
    assert(mt.eom_check(conn, MT_RCPTADD, "<other@local.test>"))
    assert(mt.eom_check(conn, MT_RCPTDELETE, "<user@local.test>"))
    assert(not mt.eom_check(conn, MT_HDRADD, "X-Nope"))
    assert(not mt.eom_check(conn, MT_QUARANTINE))
    mt.disconnect(conn)
"""


def test_miltertest_sees_replies_and_edits() -> None:
    with serving(obey, steps=Step.SKIP) as server:
        run = miltertest(f"inet:{server.port}@127.0.0.1", EVENTS + CHECKS)
    assert run.returncode == 0, run.stdout + run.stderr
    (heard,) = server.heard
    assert names(heard) == [
        "Options", "Connect", "Helo", "Mail", "Rcpt", "Rcpt", "Rcpt", "Rcpt", "Data", "Header", "Header", "EndOfHeader",
        "Body", "Body", "EndOfMessage", "Quit",
    ]  # fmt: skip
    assert [one.command for one in said(heard, milter.Header)] == [
        milter.Header(b"Subject", b" as it was"), milter.Header(b"X-Old", b" one\r\n\ttwo")
    ]  # fmt: skip
    assert said(heard, milter.Connect)[0].command == milter.Connect("h.test", milter.Family.INET, "192.0.2.9", 12345)


def test_miltertest_fails_where_the_filter_does() -> None:
    with serving(obey, steps=Step.SKIP) as server:
        place = f"inet:{server.port}@127.0.0.1"
        assert miltertest(place, EVENTS + 'assert(mt.eom_check(conn, MT_HDRADD, "X-Nope"))').returncode == 1
        assert miltertest(place, EVENTS.replace("SMFIR_TEMPFAIL", "SMFIR_REJECT")).returncode == 1


@pytest.mark.parametrize(("decline", "call"), [(Step.NOCONNECT, 'mt.conninfo(conn, "h.test", "192.0.2.9")'),
                                               (Step.NOHELO, 'mt.helo(conn, "client.test")')])  # fmt: skip
def test_miltertest_ends_at_what_the_filter_declined(decline: Step, call: str) -> None:
    """Before it says anything of it, and without a word if the script does not ask."""
    with serving(obey, steps=decline) as server:
        run = miltertest(f"inet:{server.port}@127.0.0.1", call)
        assert run.returncode == 1 and f"negotiated SMFIP_{decline.name}" in run.stdout
        asked = f"mt.negotiate(conn, nil, nil, nil); assert(mt.test_option(conn, SMFIP_{decline.name}))"
        rest = 'mt.mailfrom(conn, "<reject@x.test>"); assert(mt.getreply(conn) == SMFIR_REJECT); mt.disconnect(conn)'
        run = miltertest(f"inet:{server.port}@127.0.0.1", asked + rest)
        assert run.returncode == 0, run.stdout
    declined = "Connect" if decline is Step.NOCONNECT else "Helo"
    assert [declined in names(heard) for heard in server.heard] == [False, False]


# -- Postfix -----------------------------------------------------------------------------------------------------

CONTENT = b"Subject: as it was\r\nX-Old: one\r\n\ttwo\r\n\r\nhello\r\n"


async def through(
    postfix: Postfix,
    content: bytes = CONTENT,
    *,
    helo: str = "",
    sender: str = "a@x.test",
    to: str = "user@local.test",
) -> str:
    """One message: the first refusal, or the last reply."""
    async with connected(postfix.port) as client:
        if helo and (reply := await client.say(f"EHLO {helo}")).startswith("421"):
            return reply
        reply = await client.envelope(to, sender=sender)
        if reply.startswith("250"):
            reply = await client.content(content)
        if not reply.startswith("421"):
            await client.say("QUIT")
        return reply


@asynccontextmanager
async def behind(
    start_postfix: StartPostfix,
    actions: int = ALL_ACTIONS,
    steps: int = 0,
    macros: Mapping[Stage, tuple[str, ...]] = MappingProxyType({}),
) -> AsyncIterator[tuple[Postfix, FilterServer]]:
    """A Postfix that asks the filter."""
    with serving(obey, actions, steps, macros) as server:
        main = f"{MAIN}smtpd_milters = inet:127.0.0.1:{server.port}\n"
        postfix = await asyncio.to_thread(lambda: start_postfix(main=main))
        yield postfix, server
        await asyncio.to_thread(wait_for, lambda: settled(postfix), "delivery of everything")
        await asyncio.to_thread(postfix.stop)


@pytest.mark.anyio
async def test_postfix_makes_the_edits(start_postfix: StartPostfix) -> None:
    async with behind(start_postfix) as (postfix, server):
        assert (await through(postfix, sender="edit@x.test")).startswith("250")
        await asyncio.to_thread(wait_for, lambda: settled(postfix), "delivery of everything")
        found = stored(postfix)
    assert set(found) == {"other@local.test", "more@local.test"}
    for [(sender, content)] in found.values():
        assert sender == "new@x.test"
        assert content == b"X-First: top\nSubject: changed\nX-Added: one,\n\ttwo\n\nnew\n.body\n"
    (heard,) = server.heard
    assert names(heard)[:4] == ["Options", "Connect", "Helo", "Mail"] and names(heard)[-1] == "Quit"
    (mail,), (rcpt,), (end,) = (said(heard, kind) for kind in (milter.Mail, milter.Rcpt, milter.EndOfMessage))
    assert mail.command == milter.Mail("<edit@x.test>", ())
    assert rcpt.command == milter.Rcpt("<user@local.test>", ())
    assert rcpt.macros["rcpt_addr"] == "user@local.test" and end.macros["mail_addr"] == "edit@x.test"
    assert {"i", "j", "v", "daemon_name", "mail_host"} <= set(end.macros)


ANSWERS = {
    "reject": "550 5.7.1",
    "tempfail": "451 4.7.1",
    "words": "554-5.6.0 three\n554-5.6.0 lines, 100%\n554 5.6.0 of refusal",
    "discard": "250 ",
    "accept": "250 ",
    "shutdown": "421 ",
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", ANSWERS)
async def test_postfix_takes_every_verdict_at_every_event(start_postfix: StartPostfix, name: str) -> None:
    async with behind(start_postfix) as (postfix, server):
        places: dict[str, dict[str, str]] = {
            "Helo": {"helo": f"{name}.test"}, "Mail": {"sender": f"{name}@x.test"}, "Rcpt": {"to": f"{name}@local.test"},
        }  # fmt: skip
        if name == "discard":
            del places["Helo"]  # there is nothing to discard yet
        for event, how in places.items():
            assert (await through(postfix, CONTENT, **how)).startswith(ANSWERS[name]), event
        last = "250 " if name == "shutdown" else ANSWERS[name]  # within the content Postfix discards the message
        assert (await through(postfix, b"X-Do: " + name.encode() + b"\r\n" + CONTENT)).startswith(last)
        await asyncio.to_thread(wait_for, lambda: settled(postfix), "delivery of everything")
        assert sum(map(len, stored(postfix).values())) == (4 if name == "accept" else 0)
    for event, heard in zip([*places, "Header"], server.heard, strict=True):
        assert [word for word in names(heard) if word not in ("Abort", "Quit")][-1] == event


@pytest.mark.anyio
async def test_postfix_holds_what_is_to_be_held(start_postfix: StartPostfix) -> None:
    async with behind(start_postfix) as (postfix, _):
        assert (await through(postfix, sender="hold@x.test")).startswith("250")
        await asyncio.to_thread(postfix.wait_log, "milter-hold: END-OF-MESSAGE .* HOLD action")
        assert not stored(postfix)


NO_REPLIES = [step for step in Step if step.name and step.name.startswith("NR_")]
DECLINED = [Step.NOCONNECT, Step.NOHELO, Step.NOMAIL, Step.NORCPT, Step.NODATA, Step.NOHDRS, Step.NOEOH, Step.NOBODY]
WHOLE = ["Options", "Connect", "Helo", "Mail", "Rcpt", "Data", "Header", "Header", "EndOfHeader", "Body", "EndOfMessage"]
OPTIONS: dict[str, tuple[int, list[str]]] = {
    "none": (0, WHOLE),
    "no replies": (sum(NO_REPLIES), WHOLE),
    "nothing but the end": (sum(DECLINED), ["Options", "EndOfMessage"]),
    "leading blanks": (Step.HDR_LEADSPC, WHOLE),
    "no more of the body": (Step.SKIP, WHOLE),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", OPTIONS)
async def test_postfix_agrees_on_options(start_postfix: StartPostfix, name: str) -> None:
    steps, expected = OPTIONS[name]
    content = CONTENT + b"no more\r\n" * 20_000 if name == "no more of the body" else CONTENT
    macros = {Stage.MAIL: ("{mail_addr}", "i"), Stage.EOM: ("{rcpt_addr}",)}
    async with behind(start_postfix, ALL_ACTIONS, steps, macros) as (postfix, server):
        assert (await through(postfix, content.replace(b"X-Old: ", b"X-Old:"))).startswith("250")
        await asyncio.to_thread(wait_for, lambda: settled(postfix), "delivery of everything")
        assert set(stored(postfix)) == {"user@local.test"}
    (heard,) = server.heard
    told = [word for word in names(heard) if word not in ("Abort", "Quit")]
    assert told == expected
    if "Header" in expected:
        assert [one.command for one in said(heard, milter.Header)] == [
            milter.Header(b"Subject", b" as it was"),
            milter.Header(b"X-Old", (b"" if name == "leading blanks" else b" ") + b"one\r\n\ttwo"),
        ]
    if "Mail" in expected:
        (mail,) = said(heard, milter.Mail)
        assert "mail_addr" in mail.macros and "mail_host" not in mail.macros
    assert said(heard, milter.EndOfMessage)[0].macros["rcpt_addr"] == "user@local.test"


@pytest.mark.anyio
async def test_postfix_tells_of_refused_recipients(start_postfix: StartPostfix) -> None:
    async with behind(start_postfix, steps=Step.RCPT_REJ) as (postfix, server):
        assert (await through(postfix, to="user@foreign.test")).startswith("454 4.7.1")
    (heard,) = server.heard
    (rcpt,) = said(heard, milter.Rcpt)
    assert rcpt.command == milter.Rcpt("<user@foreign.test>", ()) and rcpt.macros["rcpt_mailer"] == "error"
