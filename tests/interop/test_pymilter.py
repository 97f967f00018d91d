"""A pymilter class inside the gateway and the same class as a daemon: same mail, same results, but for what is listed.

Both legs are a gateway before a Postfix that stores what it accepted: one with the stage `milter`, one with `pymilter`.
Compared is what test_milter_differential.py compares: replies, what each recipient got, events and macros.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import re
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from gateway.testing.gateway import running
from tests.fault.upstream import Upstream
from tests.interop.conftest import Records, StartPostfix
from tests.interop.generated_messages import ORDERS, Message, messages
from tests.interop.mail_client import connected
from tests.interop.milter_differences import COUNT, Difference, compared, having
from tests.interop.milter_legs import MAIN, Outcome, outcomes, recording, send, settled, stored, through_gateway
from tests.interop.postfix_upstream import MESSAGE, pipeline
from tests.interop.postfix_upstream import stored as in_mailbox
from tests.peers.milter_program import MilterProgram, RecordingMilter
from tests.peers.postfix import Postfix
from tests.peers.process import scratch, wait_for
from tests.peers.require import missing

if TYPE_CHECKING:
    from tests.interop.pymilter_filters import Noting

pytestmark = [pytest.mark.peers, pytest.mark.anyio, pytest.mark.slow]

INSIDE = """\
hostname: mx.test
relay: open
reply_id: off
stages:
  - pymilter: "tests.peers.recording_milter:Recorder"
  - splice
upstreams:
  postfix: {{servers: ["smtp://127.0.0.1:{port}"]}}
"""

KNOWN_DIFFERENCES = (
    Difference(
        "macros by name",
        frozenset({"macros"}),
        lambda message: True,
        "Inside, a class that asks for no macros by name can read each that is known; a daemon is sent the lists of "
        "the stage's `macros`, which are Postfix's. A class that asks (setsymlist) gets the same in both places.",
    ),
    Difference(
        "EHLO again",
        frozenset({"events"}),
        lambda message: message.greets_again,
        "Inside, a class hears of the client and of each EHLO at once, as with Postfix; a daemon is connected at the "
        "first MAIL and told the last EHLO only.",
    ),
)
EXCEPTION = Difference(
    "an exception",
    frozenset({"replies"}),
    having(*ORDERS),
    "A callback that raises is a failure of the stage inside, and `on_error` says what that means; a daemon answers what "
    "it set as exception policy.",
)
MACROS = [
    "macros:connect=j,_,v,{daemon_name},{daemon_addr},{client_addr},{client_name},{client_ptr},{client_resolve}",
    "macros:helo={client_addr},{tls_version},{verify}",
    "macros:mail={mail_addr},{mail_host},{mail_mailer},{auth_authen},{client_name}",
    "macros:rcpt={rcpt_addr},{rcpt_host},{rcpt_mailer},{mail_addr}",
    "macros:data=i,{mail_host}",
    "macros:eom=i,{mail_addr},{rcpt_addr},{client_addr}",
]
OPTIONS = [
    MACROS,
    ["leading_space"],
    ["skip"],
    ["noreply:header", "noreply:eoh", "noreply:body"],
    ["nocallback:header", "nocallback:body", "nocallback:helo"],
    ["read_only"],
]


def before(postfix: Postfix, *stages: object, **more: object) -> dict[str, object]:
    """A pipeline of these stages before that Postfix."""
    return {**pipeline(postfix, [*stages, "splice"], relay="open"), **more}


@asynccontextmanager
async def recording_inside(*options: str) -> AsyncIterator[RecordingMilter]:
    """What the recording filter's class writes when the gateway runs it."""
    with scratch() as folder, contextlib.ExitStack() as stack:
        recorder = RecordingMilter(folder, *options)  # never started: the class itself is used
        from tests.peers.recording_milter import Journal, Options, Recorder

        Recorder.journal = Journal(stack.enter_context((folder / "recorder.jsonl").open("a")))
        Recorder.options = Options(list(options))
        yield recorder


async def through_pymilter(
    start_postfix: StartPostfix, mail: Sequence[Message], *options: str, pipeline: str = INSIDE, bdat: bool = False
) -> dict[int, Outcome]:
    """As `through_gateway`, with the filter inside of it."""
    async with recording_inside(*options) as recorder:
        postfix = await asyncio.to_thread(lambda: start_postfix(main=MAIN))
        document = yaml.safe_load(pipeline.format(port=postfix.port))
        async with running(document, learn=True) as gateway:
            replies = await send(gateway.port, mail, bdat=bdat)
            await gateway.idle()
            found = await outcomes(mail, replies, postfix, recorder)
        await asyncio.to_thread(postfix.stop)
        return found


@pytest.fixture(autouse=True)
def _pymilter() -> None:
    if importlib.util.find_spec("Milter") is None:
        missing("pymilter is not installed")


@pytest.fixture(scope="module")
def mail() -> list[Message]:
    return messages(COUNT)


async def test_the_class_inside_differs_from_the_daemon_as_listed(
    start_postfix: StartPostfix, mail: list[Message]
) -> None:
    one, other = await through_gateway(start_postfix, mail), await through_pymilter(start_postfix, mail)
    unexplained, seen = compared(mail, one, other, KNOWN_DIFFERENCES)
    assert not unexplained, f"{len(unexplained)} differences\n" + "\n".join(unexplained[:20])
    assert seen == {each.name for each in KNOWN_DIFFERENCES}, "a difference is listed that there is not"


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options[0].partition("=")[0])
async def test_the_class_inside_agrees_on_options_as_the_daemon(
    start_postfix: StartPostfix, mail: list[Message], options: list[str]
) -> None:
    some = [message for message in mail if not message.greets_again][OPTIONS.index(options) :: 5]
    known = {MACROS[0]: (), "read_only": (KNOWN_DIFFERENCES[0], EXCEPTION)}.get(options[0], KNOWN_DIFFERENCES[:1])
    one = await through_gateway(start_postfix, some, *options)
    other = await through_pymilter(start_postfix, some, *options)
    unexplained, _ = compared(some, one, other, known)
    assert not unexplained, f"{len(unexplained)} differences\n" + "\n".join(unexplained[:20])


PARAMETERS = {
    "": "",
    "sender new@x.test": " RET=FULL ENVID=old",
    "sender new@x.test RET=HDRS": " RET=HDRS ENVID=old",
    "sender new@x.test ret=HDRS ENVID=new SIZE=7 BODY=8BITMIME X-PRIORITY=3": " RET=HDRS ENVID=new",
    "sender new@x.test SMTPUTF8 SIZE=7": " RET=FULL ENVID=old",
    "recipient more@x.test": "",
    "recipient more@x.test NOTIFY=NEVER": " NOTIFY=NEVER",
    "recipient more@x.test notify=DELAY ORCPT=rfc822;old@x.test X-PRIORITY=3": " NOTIFY=DELAY ORCPT=rfc822;old@x.test",
    "recipient more@x.test X-PRIORITY=3": "",
}
"""What a filter does at the end, and the parameters that the server behind reads of it."""


async def commands_behind(stage: object) -> list[list[str]]:
    """MAIL and RCPT, as the server behind the gateway reads them, for each of PARAMETERS."""
    ehlo = ["PIPELINING", "SIZE 100000000", "8BITMIME", "SMTPUTF8", "DSN", "CHUNKING"]
    found = []
    async with Upstream(ehlo=ehlo) as upstream:
        served = {"relay": "open", "stages": [stage, {"splice": "mta"}], "upstreams": upstream.pool()}
        async with running(served) as gateway:
            for order in PARAMETERS:
                async with connected(gateway.port) as client:
                    assert (await client.envelope("b@x.test", parameters=" RET=FULL ENVID=old")).startswith("250")
                    upstream.commands.clear()
                    assert (await client.content(f"X-Do: {order}\r\n".encode() * bool(order) + MESSAGE)).startswith("250")
                    said = [line.decode() for line in upstream.commands]
                    found.append([line for line in said if line.startswith(("MAIL", "RCPT"))])
    return found


async def test_parameters_of_dsn_are_honored_in_either_place() -> None:
    async with recording() as recorder:
        one = await commands_behind({"milter": recorder.address})
    async with recording_inside():
        other = await commands_behind({"pymilter": "tests.peers.recording_milter:Recorder"})
    assert one == other
    for (order, parameters), commands in zip(PARAMETERS.items(), one, strict=True):
        address = order.split()[1] if order else ""
        assert [line.split(">", 1)[1] for line in commands if f"<{address}>" in line] == ([parameters] if order else [])


# -- the shipped example ----------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[2] / "examples/milter_filter.py"
FOOTER = b"-- \r\nSent by the old mail system.\r\n"
EXAMPLE_MAIL = {
    "plain": b"Subject: hello\r\n\r\ntext\r\n",
    "footer": b"Subject: hello\r\n\r\ntext\r\n" + FOOTER,
    "refused": b"Subject: Casino\r\n\r\ntext\r\n",
    "encoded": b"Subject: =?utf-8?b?TG90dGVyeQ==?=\r\n\r\ntext\r\n" + FOOTER,
    "nonsense": b"Subject: =?nonsense?q?casin=?=\r\n o\r\n\r\ntext\r\n",
    "large": b"Subject: large\r\n\r\n" + b"%070d\r\n" % 1 * 30_000 + FOOTER,
    "empty": b"",
    "again": b"From: a@x.test\r\n\r\n\r\n" + FOOTER,
}


class ExampleDaemon(MilterProgram):
    """The example as it runs by itself, on a Unix socket."""

    def start(self) -> ExampleDaemon:
        """Start it; after this it accepts connections."""
        self.run([sys.executable, str(EXAMPLE), self.place])
        return self


async def example_results(start_postfix: StartPostfix, stage: object) -> tuple[dict[str, str], dict[str, bytes]]:
    """Replies to EXAMPLE_MAIL, and what was stored."""
    postfix = await asyncio.to_thread(lambda: start_postfix(main=MAIN))
    replies = {}
    served = before(postfix, stage, hostname="mx.test", reply_id="off")
    async with running(served, learn=True) as gateway:
        for number, names in enumerate((list(EXAMPLE_MAIL), list(EXAMPLE_MAIL)[::-1])):  # two sessions
            async with connected(gateway.port) as client:
                for name in names:
                    assert (await client.envelope(f"{name}{number}@local.test")).startswith("250")
                    replies[f"{name}{number}"] = await client.content(EXAMPLE_MAIL[name])
        await gateway.idle()
    await asyncio.to_thread(wait_for, lambda: settled(postfix), "delivery of everything", 60.0)
    found = {to: content for to, [(_, content)] in stored(postfix).items()}
    await asyncio.to_thread(postfix.stop)
    return {name: reply if reply[0] != "2" else reply[:3] for name, reply in replies.items()}, found


async def test_the_example_does_the_same_in_either_place(start_postfix: StartPostfix) -> None:
    with scratch() as folder, ExampleDaemon(folder) as daemon:
        one = await example_results(start_postfix, {"milter": daemon.address})
    settings = {"class": "milter_filter:Filter", "path": str(EXAMPLE.parent)}
    assert await example_results(start_postfix, {"pymilter": settings}) == one
    replies, found = one
    assert {name for name, reply in replies.items() if reply != "250"} == {"refused0", "refused1", "encoded0", "encoded1"}
    assert replies["encoded1"] == "550 5.7.1 we take no mail about lottery"
    assert found["footer0@local.test"] == (
        b"Subject: hello\nX-Filtered-By: mx.test\n\ntext\n-- \nExample Ltd, 1 Example Street, Exampleton\n"
    )
    assert found["large1@local.test"].endswith(FOOTER.replace(b"\r\n", b"\n"))


# -- where it is asked, and what happens if it fails ------------------------------------------------------------

NOTING = "tests.interop.pymilter_filters:Noting"


@pytest.fixture
def noting() -> Iterator[type[Noting]]:
    """The class, which has noted nothing; what hangs in it at the end goes on."""
    from tests.interop.pymilter_filters import Noting

    Noting.forget()
    yield Noting
    Noting.gate.set()


async def test_it_is_told_only_of_what_its_condition_is_for(
    start_postfix: StartPostfix, users: dict[str, object], noting: type[Noting]
) -> None:
    """Of strangers' mail to one user; what it missed of the session is told when the condition first holds."""
    postfix = await asyncio.to_thread(start_postfix)
    when = '!auth.trusted && rcpt.to == "user@local.test"'
    users["auth_file"]["required"] = False  # type: ignore[index]
    served = before(postfix, users, {"pymilter": {"class": NOTING, "when": when}}, allow_plaintext_auth=True)
    async with running(served, learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.login("joe@example.org", "secret")).startswith("235")
            assert (await client.envelope("user@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
        async with connected(gateway.port) as client:
            assert (await client.envelope("other@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
            assert not noting.made
            assert (await client.envelope("other@local.test", "user@local.test", sender="b@x.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
            assert (await client.envelope("other@local.test", sender="c@x.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
            assert (await client.envelope("user@local.test", sender="d@x.test")).startswith("250")
            assert (await client.say("RSET")).startswith("250")
        await gateway.idle()
    (filter,) = noting.made
    assert filter.events == [
        "connect", "hello client.test", "envfrom <b@x.test>", "envrcpt <user@local.test>", "eom",
        "envfrom <d@x.test>", "envrcpt <user@local.test>", "abort", "close",
    ]  # fmt: skip
    marked = [b"X-Noted: <user@local.test>\n" in message for message in await in_mailbox(postfix, 3, "other")]
    assert sorted(marked) == [False, False, True]  # deliveries overtake one another
    assert sorted(b"X-Noted" in message for message in await in_mailbox(postfix, 2)) == [False, True]


ON_ERROR = {"tempfail": "451 4.3.0", "reject": "554 5.3.0", "disconnect": "421 4.3.0", "pass": "250"}


@pytest.mark.parametrize("on_error", ON_ERROR)
@pytest.mark.parametrize("how", ["raise", "hang"])
@pytest.mark.parametrize("where", ["envrcpt", "eom"])
async def test_it_fails_and_the_next_message_is_as_any(
    start_postfix: StartPostfix, records: Records, noting: type[Noting], where: str, how: str, on_error: str
) -> None:
    postfix = await asyncio.to_thread(lambda: start_postfix(main="virtual_mailbox_maps = static:user/\n"))
    stage = {"class": NOTING, "on_error": on_error, "timeout": "300ms"}
    said = ON_ERROR[on_error]
    async with running(before(postfix, {"pymilter": stage}), learn=True) as gateway:
        async with connected(gateway.port) as client:
            if where == "envrcpt":
                assert (await client.envelope(f"{how}@local.test", sender="b@x.test")).startswith(said)
                if on_error == "pass":
                    assert (await client.content(MESSAGE)).startswith("250")
            else:
                assert (await client.envelope("user@local.test", sender="b@x.test")).startswith("250")
                assert (await client.content(f"X-Fail: {how}\r\n".encode() + MESSAGE)).startswith(said)
            if on_error == "disconnect":
                assert await client.reply() == ""
            else:
                await client.say("RSET")
                assert (await client.envelope("user@local.test")).startswith("250")
                assert (await client.content(MESSAGE)).startswith("250")
        noting.gate.set()
        await gateway.idle()
    assert len(noting.made) == (2 if how == "hang" and on_error != "disconnect" else 1)
    assert [filter.events[-1] for filter in noting.made] == ["close"] * len(noting.made)
    assert records.all("stage_failure")[0]["action"] == on_error
    stored = await in_mailbox(postfix, {"tempfail": 1, "reject": 1, "disconnect": 0, "pass": 2}[on_error])
    noted = sorted(b"X-Noted" in message for message in stored)
    unsure = on_error == "pass" and (where, how) == ("envrcpt", "raise")  # a recipient alone failed: it is still asked
    assert noted == ([True] * len(stored) if unsure else [False, True][-len(stored):] if stored else [])


async def test_recipients_from_before_it_was_lost_do_not_pass_it_by(
    start_postfix: StartPostfix, noting: type[Noting]
) -> None:
    """It hung at the second recipient: nobody can say any more what it thinks of the message to the first."""
    postfix = await asyncio.to_thread(lambda: start_postfix(main="virtual_mailbox_maps = static:user/\n"))
    stage = {"class": NOTING, "timeout": "300ms"}
    async with running(before(postfix, {"pymilter": stage}), learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.envelope("user@local.test", sender="b@x.test")).startswith("250")
            assert (await client.say("RCPT TO:<hang@local.test>")).startswith("451 4.3.0")
            assert (await client.say("RCPT TO:<other@local.test>")).startswith("451 4.3.0")
            assert (await client.content(MESSAGE)).startswith("451 4.3.0")
            assert (await client.envelope("user@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
        noting.gate.set()
        await gateway.idle()
    assert [b"X-Noted" in message for message in await in_mailbox(postfix, 1)] == [True]


async def test_two_classes_in_a_chain_hold_to_flags_of_their_own(start_postfix: StartPostfix, records: Records) -> None:
    """The example may add fields, the other delete them; each sees what the one before it made of the message."""
    from tests.interop.pymilter_filters import Deleting

    Deleting.fields.clear()
    postfix = await asyncio.to_thread(start_postfix)
    example = {"pymilter": {"id": "example", "class": "milter_filter:Filter", "path": str(EXAMPLE.parent)}}
    deleting = {"pymilter": {"id": "deleting", "class": "tests.interop.pymilter_filters:Deleting"}}
    for stages in ([example, deleting], [deleting, example]):
        async with running(before(postfix, *stages), learn=True) as gateway:
            async with connected(gateway.port) as client:
                assert (await client.envelope("user@local.test")).startswith("250")
                assert (await client.content(MESSAGE)).startswith("250")
                assert (await client.envelope("user@local.test")).startswith("250")
                reply = await client.content(b"X-Filtered-By: somebody\r\nX-Fail: yes\r\n\r\n")
                assert reply.startswith("250" if stages[0] is example else "451 4.3.0")
            await gateway.idle()
    first = await in_mailbox(postfix, 3)
    marked = [re.search(rb"^X-Filtered-By: (.*)$", message, re.MULTILINE) for message in first]
    assert sorted(match[1] if match else b"" for match in marked) == [b"", b"gateway.test", b"gateway.test"]
    assert not any(b"\nSubject:" in message or b"X-More" in message for message in first)
    assert Deleting.fields == ["Subject", "X-Filtered-By", "X-Filtered-By", "X-Fail", "X-Filtered-By", "Subject", "X-Filtered-By", "X-Fail"]
    (failure,) = records.all("stage_failure")
    assert failure["stage"] == "deleting" and "the flag ADDHDRS is not set" in str(failure["error"])


async def test_many_sessions_share_few_threads(start_postfix: StartPostfix, noting: type[Noting]) -> None:
    postfix = await asyncio.to_thread(start_postfix)
    served = before(postfix, {"pymilter": {"class": NOTING, "threads": 2}})

    async def session(number: int) -> None:
        async with connected(gateway.port) as client:
            for turn in range(3):
                assert (await client.envelope("user@local.test", sender=f"s{number}.{turn}@x.test")).startswith("250")
                assert (await client.content(MESSAGE)).startswith("250")
            assert (await client.say("QUIT")).startswith("221")

    async with running(served, learn=True) as gateway:
        await asyncio.gather(*(session(number) for number in range(20)))
        threads = [one.name for one in threading.enumerate() if one.name.startswith(f"pymilter-{NOTING}")]
        assert sorted(threads) == [f"pymilter-{NOTING}-1", f"pymilter-{NOTING}-2"]
        await gateway.idle()
    assert len(noting.made) == 20
    seen = set()
    for filter in noting.made:
        number = filter.events[2].partition(".")[0]
        turns = [[f"{number}.{turn}@x.test>", "envrcpt <user@local.test>", "eom"] for turn in range(3)]
        assert filter.events == ["connect", "hello client.test", *(event for turn in turns for event in turn), "close"]
        seen.add(number)
    assert len(seen) == 20
    assert all(b"X-Noted: <user@local.test>\n" in message for message in await in_mailbox(postfix, 60))


@pytest.mark.parametrize("ends", [True, False], ids=["in time", "too late"])
async def test_the_gateway_stops_while_a_callback_runs(
    start_postfix: StartPostfix, noting: type[Noting], ends: bool
) -> None:
    postfix = await asyncio.to_thread(start_postfix)
    served = before(postfix, {"pymilter": NOTING})
    async with running(served, learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.envelope("user@local.test")).startswith("250")
            answer = asyncio.create_task(client.content(b"X-Fail: hang\r\n" + MESSAGE))
            await asyncio.to_thread(noting.entered.wait, 20)
            stop = asyncio.create_task(gateway.pipeline.stop(20.0 if ends else 0.0))
            if ends:
                noting.gate.set()
                assert (await answer).startswith("250")
                assert (await client.reply()).startswith("421")
            else:
                assert (await answer)[:3] in ("421", "451", "")
                noting.gate.set()
        await stop
    (filter,) = noting.made
    message = ["envfrom <a@x.test>", "envrcpt <user@local.test>", "eom"]
    assert filter.events == ["connect", "hello client.test", *message, *([] if ends else ["abort"]), "close"]
    assert len(await in_mailbox(postfix, int(ends))) == int(ends)
