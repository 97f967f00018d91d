"""A stage in the shape of a milter, over real connections: does the contract carry a whole filter protocol?

A milter hears of connect, HELO, MAIL, RCPT and the end of each message in order, keeps a memory of the connection and
one of the message, must be told of every abort and of the end. Here it starts late, because its condition needs what
is known at AUTH or MAIL only: it must then hear what it missed, once, in order, before what is asked now.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import structlog

from gateway import (
    AddHeader,
    Allow,
    Attempt,
    Authenticated,
    Cause,
    Edit,
    Fact,
    Kind,
    Outcome,
    Password,
    Peer,
    Phase,
    Recipient,
    Refuse,
    Reply,
    Rewrite,
    Scope,
    Session,
    Settings,
    Stage,
    Transaction,
    Worker,
)
from gateway.testing.gateway import Gateway, running

pytestmark = pytest.mark.anyio


# -- the stage ------------------------------------------------------------------------------------------------


@dataclass
class Connected:
    """What the filter remembers of a connection."""

    heard: list[str] = field(default_factory=list)
    messages: int = 0


@dataclass
class Message:
    """What the filter remembers of a message."""

    number: int
    recipients: list[str] = field(default_factory=list)


class FilterSettings(Settings):
    """Addresses that the filter refuses, as a milter's REJECT, TEMPFAIL and SETREPLY."""

    short_form: ClassVar[str | None] = "reject"

    reject: tuple[str, ...] = ()
    tempfail: tuple[str, ...] = ()
    set_reply: Mapping[str, str] = {}
    alias: Mapping[str, str] = {}
    fail: tuple[str, ...] = ()


class Filter(Stage):
    """Hears everything in order, answers like a milter, and ends each message and session once."""

    Settings = FilterSettings
    kind = Kind.CHECK
    facts = (Fact("messages", "int", 0, Phase.MAIL, Scope.SESSION, "Messages that the filter saw."),)
    settings: FilterSettings
    ended: ClassVar[list[list[str]]] = []  # one list a session, as its memory was in the end
    worker: ClassVar[list[str]] = []

    async def start(self, worker: Worker) -> None:
        self.worker.append(f"start {worker.hostname}")

    async def stop(self) -> None:
        self.worker.append("stop")

    async def connect(self, session: Session) -> Refuse | None:
        return await self._hear(session, "connect", session.client.address)

    def secure(self, session: Session) -> None:
        self._memory(session).heard.append("secure")

    async def helo(self, session: Session, name: str) -> Refuse | None:
        return await self._hear(session, "helo", name)

    async def mail(self, session: Session, transaction: Transaction) -> Refuse | Rewrite | None:
        memory = self._memory(session)
        memory.messages += 1
        session.set_fact(self, "messages", memory.messages)
        number = transaction.state(self, lambda: Message(memory.messages)).number
        return await self._hear(session, f"mail {number}", transaction.sender)

    async def rcpt(self, session: Session, recipient: Recipient) -> Refuse | Rewrite | None:
        assert session.transaction is not None
        message = session.transaction.state(self, lambda: Message(0))
        answer = await self._hear(session, f"rcpt {message.number}", recipient.address)
        if answer is None:
            message.recipients.append(recipient.address)
            if recipient.address in self.settings.alias:
                return Rewrite(self.settings.alias[recipient.address])
        return answer

    def data(self, session: Session, transaction: Transaction) -> Edit:
        message = transaction.state(self, lambda: Message(0))
        self._memory(session).heard.append(f"data {message.number} {'+'.join(message.recipients)}")
        return Edit([AddHeader("X-Filter", f"message {message.number}")])

    def settled(self, session: Session, outcome: Outcome) -> None:
        if session.has_state(self):
            self._memory(session).heard.append(f"settled {outcome.phase} {outcome.reply_class}")

    def reset(self, session: Session, transaction: Transaction) -> None:
        if transaction.has_state(self):
            self._memory(session).heard.append(f"abort-or-end {transaction.state(self, lambda: Message(0)).number}")

    async def close(self, session: Session) -> None:
        if session.has_state(self):
            self.ended.append([*self._memory(session).heard, "close"])

    def _memory(self, session: Session) -> Connected:
        return session.state(self, Connected)

    async def _hear(self, session: Session, what: str, about: str) -> Refuse | None:
        self._memory(session).heard.append(f"{what} {about}")
        await asyncio.sleep(0)  # as if the filter were another program
        settings = self.settings
        if about in settings.fail:
            raise ConnectionResetError("the filter is gone")
        if about in settings.set_reply:
            return Refuse(Cause.POLICY, reply=Reply.of(settings.set_reply[about]))
        if about in settings.tempfail:
            return Refuse(Cause.POLICY, "try again", temporary=True)
        return Refuse(Cause.POLICY, "the filter says no") if about in settings.reject else None


# -- what stands around it ------------------------------------------------------------------------------------


class Knows(Stage):
    """Lets `tim` in with any password."""

    kind = Kind.GUARD
    decides_identity = True

    def mechanisms(self, session: Session) -> tuple[str, ...]:
        return ("PLAIN",)

    def auth(self, session: Session, attempt: Attempt) -> Authenticated | None:
        given = attempt.credentials
        return Authenticated(given.user) if isinstance(given, Password) and given.user == "tim" else None


class FriendsSettings(Settings):
    """Who is let through, and how far."""

    helo: str = ""
    sender: str = ""
    recipient: str = ""


class Friends(Stage):
    """An access list: what it allows, later checks do not see."""

    Settings = FriendsSettings
    settings: FriendsSettings

    def helo(self, session: Session, name: str) -> Allow | None:
        return Allow() if name == self.settings.helo else None

    def mail(self, session: Session, transaction: Transaction) -> Allow | None:
        return Allow() if transaction.sender == self.settings.sender else None

    def rcpt(self, session: Session, recipient: Recipient) -> Allow | None:
        return Allow() if recipient.address == self.settings.recipient else None


STAGES: dict[str, type[Stage]] = {"filter": Filter, "knows": Knows, "friends": Friends}


class Upstream:
    """A server that takes everything and keeps what came."""

    def __init__(self) -> None:
        self.envelopes: list[tuple[str, list[str], str]] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._serve(reader, writer)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sender, recipients = "", list[str]()
        writer.write(b"220 upstream.test ESMTP\r\n")
        while line := (await reader.readline()).decode().rstrip("\r\n"):
            verb, _, rest = line.partition(":")
            match verb.upper():
                case "MAIL FROM":
                    sender, recipients = rest.partition(" ")[0].strip("<>"), []
                    writer.write(b"250 2.1.0 Ok\r\n")
                case "RCPT TO":
                    recipients.append(rest.strip("<>"))
                    writer.write(b"250 2.1.5 Ok\r\n")
                case "DATA":
                    writer.write(b"354 go on\r\n")
                    content = await reader.readuntil(b"\r\n.\r\n")
                    self.envelopes.append((sender, recipients, content.decode()))
                    writer.write(b"250 2.0.0 queued as 1\r\n")
                case _ if line.startswith("EHLO"):
                    writer.write(b"250-upstream.test\r\n250-PIPELINING\r\n250 SIZE 100000\r\n")
                case _:
                    writer.write(b"250 2.0.0 Ok\r\n")


@asynccontextmanager
async def gateway_with(*stages: object, folder: Path, **pipeline: object) -> AsyncIterator[tuple[Gateway, Upstream]]:
    upstream = Upstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    Filter.ended.clear()
    Filter.worker.clear()
    mta = {
        "servers": [f"127.0.0.1:{server.sockets[0].getsockname()[1]}"],
        "capabilities": {"assume": ["PIPELINING", "SIZE 100000"]},
    }
    written = {
        "relay": "open", "allow_plaintext_auth": True, "reply_id": False, "stages": [*stages, "splice"],
        "upstreams": {"mta": mta}, **pipeline,
    }  # fmt: skip
    try:
        async with running(written, stages={**STAGES, "breaks": Breaks}, folder=folder) as gateway:
            yield gateway, upstream
    finally:
        server.close()
    assert Filter.worker == sorted(Filter.worker) and Filter.worker.count("stop") * 2 == len(Filter.worker)


@asynccontextmanager
async def client_of(gateway: Gateway) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    client = Client(reader, writer)
    assert await client.reply() == "220"
    yield client
    writer.close()
    await gateway.idle()


class Client:
    """Says one thing after the other and gives the code of each reply."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.last = ""

    async def reply(self) -> str:
        while True:
            line = (await asyncio.wait_for(self.reader.readline(), 10)).decode()
            if line[3:4] != "-":
                self.last = line.rstrip("\r\n")
                return line[:3]

    async def say(self, *lines: str) -> str:
        """The codes of the replies to these lines, sent one by one."""
        codes = []
        for line in lines:
            self.writer.write(line.encode() + b"\r\n")
            codes.append(await self.reply())
        return " ".join(codes)

    async def send(self, sender: str, *recipients: str) -> str:
        """The codes of a whole message."""
        codes = await self.say(f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{one}>" for one in recipients), "DATA")
        return codes + (" " + await self.say("Subject: x\r\n\r\nHello.\r\n.") if codes.endswith("354") else "")

    async def start_tls(self) -> None:
        assert await self.say("STARTTLS") == "220"
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        await self.writer.start_tls(context)


PLAIN_TIM = "AUTH PLAIN " + base64.b64encode(b"\0tim\0secret").decode()


# -- the contract ---------------------------------------------------------------------------------------------


async def test_hears_everything_in_order(tmp_path: Path) -> None:
    async with gateway_with({"filter": {"alias": {"b@x.test": "c@x.test"}}}, folder=tmp_path) as (gateway, upstream):
        async with client_of(gateway) as client:
            assert await client.say("HELO one", "EHLO two") == "250 250"
            assert await client.send("a@x.test", "b@x.test", "d@x.test") == "250 250 250 354 250"
            assert await client.say("MAIL FROM:<e@x.test>", "RSET", "MAIL FROM:<>", "EHLO three") == "250 250 250 250"
            assert await client.say("MAIL FROM:<f@x.test>", "QUIT") == "250 221"
        assert [(sender, to) for sender, to, _ in upstream.envelopes] == [("a@x.test", ["c@x.test", "d@x.test"])]
        assert upstream.envelopes[0][2].startswith("X-Filter: message 1\r\nSubject: x\r\n")
    assert Filter.ended == [[
        "connect 127.0.0.1", "helo one", "helo two",
        "mail 1 a@x.test", "settled mail 2", "rcpt 1 b@x.test", "settled rcpt 2", "rcpt 1 d@x.test", "settled rcpt 2",
        "data 1 b@x.test+d@x.test", "settled message 2", "abort-or-end 1",
        "mail 2 e@x.test", "settled mail 2", "abort-or-end 2",
        "mail 3 ", "settled mail 2", "abort-or-end 3", "helo three",
        "mail 4 f@x.test", "settled mail 2", "abort-or-end 4",
        "close",
    ]]  # fmt: skip


async def test_starts_late_and_catches_up(tmp_path: Path, tls_files: tuple[Path, Path]) -> None:
    """Known only at MAIL whether it is wanted: then connect, secure and HELO are made up for, once."""
    late = {"filter": {"when": '!auth.trusted && mail.domain == "x.test"'}}
    tls = {"certificates": [{"chain": str(tls_files[0]), "key": str(tls_files[1])}]}
    async with gateway_with("knows", late, folder=tmp_path, tls=tls) as (gateway, _):
        async with client_of(gateway) as client:
            assert await client.say("EHLO first") == "250"
            await client.start_tls()
            assert await client.say("EHLO second") == "250"
            assert await client.send("a@other.test", "b@x.test") == "250 250 354 250"
            assert await client.send("a@x.test", "b@x.test") == "250 250 354 250"
            assert await client.say("EHLO third") == "250"
            assert await client.send("c@x.test", "d@x.test") == "250 250 354 250"
        async with client_of(gateway) as client:
            assert await client.say("EHLO tims", PLAIN_TIM) == "250 235"
            assert await client.send("a@x.test", "b@x.test") == "250 250 354 250"
    rest = ["settled mail 2", "rcpt {} {}", "settled rcpt 2", "data {} {}", "settled message 2", "abort-or-end {}"]
    assert Filter.ended == [[
        "connect 127.0.0.1", "secure", "helo second",
        "mail 1 a@x.test", *(text.format(1, "b@x.test") for text in rest),
        "helo third", "mail 2 c@x.test", *(text.format(2, "d@x.test") for text in rest),
        "close",
    ]]  # fmt: skip


async def test_starts_at_the_recipient(tmp_path: Path) -> None:
    late = {"filter": {"when": 'rcpt.domain == "filtered.test"'}}
    async with gateway_with(late, folder=tmp_path) as (gateway, _), client_of(gateway) as client:
        assert await client.say("EHLO me") == "250"
        assert (
            await client.send("a@x.test", "b@x.test", "c@filtered.test", "d@filtered.test") == "250 250 250 250 354 250"
        )
    (heard,) = Filter.ended
    assert [text for text in heard if not text.startswith("settled")] == [
        "connect 127.0.0.1", "helo me", "mail 1 a@x.test", "rcpt 1 c@filtered.test", "rcpt 1 d@filtered.test",
        "data 1 c@filtered.test+d@filtered.test", "abort-or-end 1", "close",
    ]  # fmt: skip


async def test_answers_like_a_milter(tmp_path: Path) -> None:
    settings = {
        "reject": ["bad@x.test"], "tempfail": ["slow@x.test"], "fail": ["broken@x.test"],
        "set_reply": {"own@x.test": "571 5.7.9 own words\nin two lines"},
    }  # fmt: skip
    async with gateway_with({"filter": settings}, folder=tmp_path) as (gateway, upstream), client_of(gateway) as client:
        assert await client.say("EHLO me") == "250"
        for sender, code in [("bad", "550"), ("slow", "450"), ("broken", "451"), ("own", "571"), ("good", "250")]:
            assert await client.say(f"MAIL FROM:<{sender}@x.test>") == code
        assert await client.say("RCPT TO:<own@x.test>") == "571"
        assert client.last == "571 in two lines"
        assert await client.say("RCPT TO:<bad@x.test>", "RCPT TO:<ok@x.test>", "DATA") == "550 250 354"
        assert await client.say("Hello.\r\n.") == "250"
        assert [to for _, to, _ in upstream.envelopes] == [["ok@x.test"]]
    heard = Filter.ended[0]
    ends = [text for text in heard if text.startswith("abort-or-end")]
    assert ends == [f"abort-or-end {number}" for number in range(1, 6)], "a refused MAIL ends its message too"


@pytest.mark.parametrize(("refuse_at", "codes"), [("rcpt", "250 250 550 250"), ("now", "550 503 503 503")])
async def test_refuses_the_client_when_it_is_told_to(
    tmp_path: Path, refuse_at: Literal["rcpt", "now"], codes: str
) -> None:
    """A check's refusal of a HELO name waits for RCPT, where sender and recipient are known; not so for postmaster."""
    settings = {"reject": ["evil"], "refuse_at": refuse_at}
    async with gateway_with({"filter": settings}, folder=tmp_path) as (gateway, _), client_of(gateway) as client:
        said = await client.say(
            "EHLO evil", "MAIL FROM:<a@x.test>", "RCPT TO:<b@x.test>", "RCPT TO:<postmaster@x.test>"
        )
        assert said == codes


async def test_a_login_clears_what_was_postponed(tmp_path: Path) -> None:
    async with gateway_with("knows", {"filter": ["evil"]}, folder=tmp_path) as (gateway, upstream):
        for login, codes in [((), "250 550 554"), ((PLAIN_TIM,), "250 250 354 250")]:
            async with client_of(gateway) as client:
                await client.say("EHLO evil", *login)
                assert await client.send("a@x.test", "b@x.test") == codes
        assert len(upstream.envelopes) == 1


async def test_a_late_refusal_holds_for_the_whole_session(tmp_path: Path) -> None:
    late = {"filter": {"reject": ["evil"], "when": 'rcpt.domain == "filtered.test"'}}
    async with gateway_with(late, folder=tmp_path) as (gateway, _), client_of(gateway) as client:
        await client.say("EHLO evil")
        said = await client.say(
            "MAIL FROM:<a@x.test>", "RCPT TO:<a@filtered.test>", "RCPT TO:<b@filtered.test>", "RCPT TO:<c@x.test>"
        )
        assert said == "250 550 550 550"


async def test_what_is_allowed_is_not_heard(tmp_path: Path) -> None:
    friends = {"friends": {"helo": "friend", "sender": "friend@x.test", "recipient": "abuse@x.test"}}
    bad = {"filter": {"reject": ["b@x.test", "abuse@x.test"]}}
    async with gateway_with(friends, bad, folder=tmp_path) as (gateway, _):
        async with client_of(gateway) as client:
            await client.say("EHLO friend")
            assert await client.send("a@x.test", "b@x.test") == "250 250 354 250"
        async with client_of(gateway) as client:
            await client.say("EHLO other")
            assert await client.send("friend@x.test", "b@x.test") == "250 250 354 250"
            assert (
                await client.say("MAIL FROM:<a@x.test>", "RCPT TO:<b@x.test>", "RCPT TO:<abuse@x.test>")
                == "250 550 250"
            )
    of_friend, of_other = ([text for text in heard if not text.startswith("settled")] for heard in Filter.ended)
    assert of_friend == ["connect 127.0.0.1", "close"]
    assert of_other == [
        "connect 127.0.0.1",
        "helo other",
        "mail 1 a@x.test",
        "rcpt 1 b@x.test",
        "abort-or-end 1",
        "close",
    ]


async def test_observe_refuses_nothing_and_says_so(tmp_path: Path) -> None:
    settings = {"reject": ["a@x.test", "b@x.test", "evil"], "alias": {"c@x.test": "d@x.test"}, "mode": "observe"}
    with structlog.testing.capture_logs() as logs:
        async with gateway_with({"filter": settings}, folder=tmp_path) as (gateway, upstream):
            async with client_of(gateway) as client:
                await client.say("EHLO evil")
                assert await client.send("a@x.test", "b@x.test", "c@x.test") == "250 250 250 354 250"
            (sender, recipients, content) = upstream.envelopes[0]
    assert (sender, recipients) == ("a@x.test", ["b@x.test", "c@x.test"]) and content.startswith("Subject: x")
    observed = [entry for entry in logs if entry["event"] == "observed"]
    assert [(entry["phase"], entry["cause"], entry["stage"]) for entry in observed] == [
        ("helo", "policy", "filter"), ("mail", "policy", "filter"), ("rcpt", "policy", "filter"),
    ]  # fmt: skip


async def test_each_session_and_message_has_its_own_memory(tmp_path: Path) -> None:
    """Two clients at once; one vanishes between commands, the other in the middle of its content."""
    async with (
        gateway_with("filter", folder=tmp_path) as (gateway, upstream),
        client_of(gateway) as one,
        client_of(gateway) as two,
    ):
        await one.say("EHLO one", "MAIL FROM:<a@x.test>")
        await two.say("EHLO two", "MAIL FROM:<b@x.test>", "RSET", "MAIL FROM:<c@x.test>")
        assert await one.say("RCPT TO:<d@x.test>", "DATA") == "250 354"
        two.writer.transport.abort()
        one.writer.close()
        await gateway.idle()
        assert upstream.envelopes == []
    ended = {heard[1]: [text for text in heard if not text.startswith("settled")] for heard in Filter.ended}
    assert ended == {
        "helo one": [
            "connect 127.0.0.1", "helo one", "mail 1 a@x.test", "rcpt 1 d@x.test", "data 1 d@x.test",
            "abort-or-end 1", "close",
        ],
        "helo two": [
            "connect 127.0.0.1", "helo two", "mail 1 b@x.test", "abort-or-end 1", "mail 2 c@x.test",
            "abort-or-end 2", "close",
        ],
    }  # fmt: skip


async def test_its_fact_is_known_to_stages_behind_it(tmp_path: Path) -> None:
    second = {"filter": {"id": "second", "reject": ["a@x.test"], "when": "filter.messages > 1"}}
    async with gateway_with("filter", second, folder=tmp_path) as (gateway, _), client_of(gateway) as client:
        await client.say("EHLO me")
        assert await client.say("MAIL FROM:<a@x.test>", "RSET", "MAIL FROM:<a@x.test>") == "250 250 550"


class BreaksSettings(Settings):
    """The hook that raises."""

    at: str


class Breaks(Stage):
    """Raises in one hook."""

    Settings = BreaksSettings
    kind = Kind.GUARD
    settings: BreaksSettings

    def _break(self, hook: str) -> None:
        if hook == self.settings.at:
            raise LookupError(f"broken in {hook}")

    def mechanisms(self, session: Session) -> tuple[str, ...]:
        self._break("mechanisms")
        return ()

    def capabilities(self, session: Session, offer: dict[str, str]) -> None:
        self._break("capabilities")

    def upstream_connect(self, session: Session, peer: Peer) -> None:
        self._break("upstream_connect")

    async def upstream_ready(self, session: Session, peer: Peer) -> None:
        self._break("upstream_ready")

    async def upstream_login(self, session: Session, peer: Peer) -> None:
        self._break("upstream_login")

    def upstream_mail(self, session: Session, peer: Peer) -> None:
        self._break("upstream_mail")

    def reset(self) -> None:
        self._break("reset")

    def settled(self) -> None:
        self._break("settled")

    def close(self) -> None:
        self._break("close")


@pytest.mark.parametrize(
    ("hook", "codes"),
    [
        *((hook, "250 250 354 250") for hook in ("mechanisms", "capabilities", "reset", "settled", "close")),
        *((hook, "451 503 503") for hook in ("upstream_connect", "upstream_ready", "upstream_login", "upstream_mail")),
    ],
)
async def test_a_hook_that_raises_is_never_the_end_of_a_session(tmp_path: Path, hook: str, codes: str) -> None:
    """Promise 4: what only looks or narrows does no harm, what prepares the upstream is a temporary failure."""
    with structlog.testing.capture_logs() as logs:
        async with gateway_with({"breaks": {"at": hook}}, folder=tmp_path) as (gateway, upstream):
            async with client_of(gateway) as client:
                assert await client.say("EHLO me") == "250"
                assert await client.send("a@x.test", "b@x.test") == codes
                assert await client.say("NOOP", "QUIT") == "250 221"
            await gateway.idle()
            assert len(upstream.envelopes) == codes.endswith("354 250")
    assert {entry["phase"] for entry in logs if entry["event"] == "stage_failure"} == {hook}
    assert not [entry for entry in logs if entry["event"] == "internal_error"]
