"""The filter's side of the milter protocol, and both machines in conversation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import kilter.protocol as kilter
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kilter.protocol.buffer import SimpleBuffer

from gateway.protocol import milter
from gateway.protocol.errors import LocalError
from gateway.protocol.milter import Action, Command, Family, MilterError, Options, Stage, Step, packet
from gateway.protocol.milter_filter import MilterFilter, Received
from gateway.protocol.milter_mta import Event, MilterMta
from gateway.protocol.smtp import Reply
from gateway.testing.splits import splits

ALL = 0x1FF


def offered(version: int = 6, actions: int = ALL, steps: int = 0x1FFFFF) -> MilterFilter:
    filter = MilterFilter()
    filter.feed(Options(version, actions, steps).encode())
    return filter


def ready(actions: int = ALL, steps: int = 0, version: int = 6) -> MilterFilter:
    filter = offered(version, steps=milter.STEPS[version])
    filter.negotiate(actions & milter.ACTIONS[version], steps)
    return filter


def macros(command: Command, **values: str) -> bytes:
    pairs = [f"{{{name}}}\0{value}\0" if len(name) > 1 else f"{name}\0{value}\0" for name, value in values.items()]
    return packet(Command.MACRO, bytes([command]) + "".join(pairs).encode())


MAIL = milter.encode_envelope(Command.MAIL, "<a@b>", ())
RCPT = milter.encode_envelope(Command.RCPT, "<c@d>", ())

# offer; wanted actions and steps; the answer, None if the MTA offers too little
NEGOTIATIONS = [
    ((6, 0x1FF, 0x1FFFFF), (0x11, 0x100702), (6, 0x11, 0x100702)),
    ((7, 0x1FF, 0x1FFFFF), (0x11, 0x100702), (6, 0x11, 0x100702)),
    ((6, 0x3F, 0x7F), (0x11, 0x100702), (6, 0x11, 0x2)),
    ((4, 0x3F, 0x3FF), (0x11, 0x100702), (4, 0x11, 0x302)),
    ((2, 0x3F, 0x7F), (0x11, 0x100702), (2, 0x11, 0x2)),
    ((6, 0x1FF, 0), (0x11, 0x100702), (6, 0x11, 0x2)),
    ((2, 0, 0), (0x0F, 0x2), (2, 0x0F, 0x2)),
    ((6, 0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (6, 0, 0)),
    ((6, 0x0F, 0x1FFFFF), (0x11, 0), None),
    ((2, 0, 0), (0x11, 0x2), None),
]


@pytest.mark.parametrize(("offer", "wanted", "answer"), NEGOTIATIONS)
def test_negotiation(
    offer: tuple[int, int, int], wanted: tuple[int, int], answer: tuple[int, int, int] | None
) -> None:
    filter = offered(*offer)
    if answer is None:
        with pytest.raises(MilterError):
            filter.negotiate(*wanted)
    else:
        assert filter.negotiate(*wanted) == Options(*answer).encode()
        with pytest.raises(LocalError):
            filter.negotiate(*wanted)


def test_lists_of_macros_only_if_offered() -> None:
    lists = {Stage.MAIL: ("i", "{auth_type}")}
    answer = Options(6, 0x101, 0, lists).encode()
    assert answer == bytes.fromhex("0000001f4f00000006000001010000000000000002") + b"i {auth_type}\0"
    assert offered().negotiate(1, 0, lists) == answer
    assert offered(actions=0x3F).negotiate(1, 0, lists) == Options(6, 1, 0).encode()


@pytest.mark.parametrize(
    "data",
    [
        Options(1, 0x0F, 0).encode(), MAIL, packet(Command.QUIT), packet(Command.OPTNEG, bytes(11)), b"\0\0\0\0",
        packet(ord("z")), b"GET /ping HTTP/1.1\r\n", packet(Command.MACRO),
    ],
)  # fmt: skip
def test_bad_beginnings(data: bytes) -> None:
    filter = MilterFilter()
    with pytest.raises(MilterError):
        filter.feed(data)
    with pytest.raises(MilterError):
        filter.feed(b"")


def test_nothing_before_the_answer_nor_after_quit() -> None:
    filter = offered()
    with pytest.raises(MilterError):
        filter.feed(MAIL)
    filter = ready()
    with pytest.raises(MilterError):
        filter.feed(Options(6, 0, 0).encode())
    filter = ready()
    assert [received.command for received in filter.feed(packet(Command.QUIT) + MAIL)] == [milter.Quit()]
    assert filter.closed and filter.failure is not None


def test_silent_commands_anywhere() -> None:
    filter = ready()
    stream = packet(Command.ABORT) * 3 + MAIL + packet(Command.ABORT) + packet(Command.QUIT_NC) + packet(Command.QUIT)
    assert [received.reply_expected for received in filter.feed(stream)] == [False] * 3 + [True] + [False] * 3
    assert filter.replies_due == 1


def test_macros_of_stages() -> None:
    filter = ready()

    def heard(data: bytes) -> dict[str, str]:
        (received,) = filter.feed(data)
        return dict(received.macros)

    connect = milter.encode_connect("x", "", 0)
    assert heard(macros(Command.CONNECT, j="mx", v="1") + connect) == {"j": "mx", "v": "1"}
    assert heard(macros(Command.HELO) + milter.encode_helo("x")) == {"j": "mx", "v": "1"}
    assert heard(macros(Command.MAIL, i="1", auth_type="PLAIN", v="2") + MAIL) == {
        "j": "mx", "v": "2", "i": "1", "auth_type": "PLAIN",
    }  # fmt: skip
    assert filter.macro("{auth_type}") == filter.macro("auth_type") == "PLAIN" and filter.macro("{i}") == "1"
    assert heard(macros(Command.RCPT, rcpt_addr="c@d") + RCPT)["rcpt_addr"] == "c@d"
    assert "rcpt_addr" not in heard(macros(Command.RCPT) + RCPT)
    assert heard(macros(Command.HEADER, x="1") + milter.encode_header(b"A", b" b", False))["i"] == "1"
    assert heard(macros(Command.BODYEOB, i="2") + packet(Command.BODYEOB))["i"] == "2"
    assert heard(MAIL) == {"j": "mx", "v": "1"}
    assert heard(milter.encode_helo("x")) == {"j": "mx", "v": "1"}
    assert heard(connect) == {}
    heard(macros(Command.CONNECT, j="mx") + connect)
    assert heard(packet(Command.QUIT_NC)) == {"j": "mx"}
    assert heard(MAIL) == {}


def test_what_may_be_sent() -> None:
    filter = ready(Action.ADDHDRS | Action.ADDRCPT, Step.SKIP)
    with pytest.raises(LocalError):
        filter.send(milter.Continue())
    filter.feed(milter.encode_helo("x"))
    for illegal in (milter.Discard(), milter.AddHeader(b"X", b" y"), milter.Skip()):
        with pytest.raises(LocalError):
            filter.send(illegal)
    assert filter.send(milter.Progress()) == packet(ord("p"))
    assert filter.send(milter.Continue()) == packet(ord("c"))
    filter.feed(MAIL + packet(Command.BODY, b"x") + packet(Command.BODYEOB))
    assert filter.replies_due == 3
    assert filter.send(milter.Discard()) == packet(ord("d"))
    assert filter.send(milter.Skip()) == packet(ord("s"))
    assert filter.send(milter.AddHeader(b"X", b" y")) == packet(ord("h"), b"X\0y\0")
    assert filter.send(milter.AddRecipient("a@b")) == packet(ord("+"), b"<a@b>\0")
    for unasked in (milter.AddRecipient("a@b", (("NOTIFY", "NEVER"),)), milter.ReplaceBody(b"x"), milter.Quarantine("x")):
        with pytest.raises(LocalError):
            filter.send(unasked)
    reply = Reply(550, (b"5.7.1 100%", b"5.7.1 no"))
    assert filter.send(milter.ReplyCode(reply)) == packet(ord("y"), b"550-5.7.1 100%%\r\n550 5.7.1 no\0")
    assert filter.replies_due == 0


Step_ = tuple[str, Callable[[MilterMta], bytes], milter.MtaCommand]
CONVERSATION: list[Step_] = [
    ("connect", lambda mta: mta.connect("[192.0.2.7]", "192.0.2.7", 25),
     milter.Connect("[192.0.2.7]", Family.INET, "192.0.2.7", 25)),
    ("helo", lambda mta: mta.helo("cl\u00ffent"), milter.Helo("cl\u00ffent")),
    ("mail", lambda mta: mta.mail("<>", (("SIZE", "1"), ("SMTPUTF8", None))),
     milter.Mail("<>", (("SIZE", "1"), ("SMTPUTF8", None)))),
    ("rcpt", lambda mta: mta.rcpt("<c@d>", (("NOTIFY", "NEVER"),)), milter.Rcpt("<c@d>", (("NOTIFY", "NEVER"),))),
    ("unknown", lambda mta: mta.unknown(b"FOO \xff"), milter.Unknown(b"FOO \xff")),
    ("data", lambda mta: mta.data(), milter.Data()),
    ("header", lambda mta: mta.header(b"Subject", b" a\r\n\tb"), milter.Header(b"Subject", b" a\r\n\tb")),
    ("header", lambda mta: mta.header(b"To", b" x"), milter.Header(b"To", b" x")),
    ("eoh", lambda mta: mta.eoh(), milter.EndOfHeader()),
    ("body", lambda mta: mta.body(b"x\0\xff\r\n"), milter.Body(b"x\0\xff\r\n")),
    ("end", lambda mta: mta.end_of_message(), milter.EndOfMessage()),
]  # fmt: skip
EDITS: list[milter.FilterReply] = [
    milter.Progress(), milter.AddHeader(b"X-A", b" v"), milter.InsertHeader(0, b"X-B", b" v\r\n w"),
    milter.ChangeHeader(3, b"X-C", b""), milter.ReplaceBody(b"new\r\n"), milter.AddRecipient("x@y"),
    milter.AddRecipient("x@y", (("NOTIFY", "NEVER"),)), milter.DeleteRecipient("c@d"), milter.ChangeSender("\u00e9@b"),
    milter.Quarantine("why"), milter.ReplyCode(Reply(451, (b"4.7.1 50%", b"4.7.1 later"))),
]  # fmt: skip


def converse(steps: int, seed: int, version: int = 6, actions: int = ALL) -> list[milter.MtaCommand]:
    """Let both machines hold the conversation, each write cut in some way; what the filter heard, once negotiated."""
    mta, filter = MilterMta(), MilterFilter()
    heard: list[Received] = []
    cuts = [*splits(b"x" * 20, seed)][seed % 10]

    def cut(data: bytes) -> list[bytes]:
        if not data:
            return []
        size = max(1, len(data) // len(cuts))
        return [data[at : at + size] for at in range(0, len(data), size)]

    def carry(data: bytes) -> list[Event]:
        """Bring bytes to the filter, its replies back."""
        for piece in cut(data):
            received = filter.feed(piece)
            heard.extend(received)
        if not mta.expects_reply:
            return []
        last = heard[-1].command
        assert heard[-1].reply_expected and filter.replies_due == 1
        if isinstance(last, Options):
            answer = filter.negotiate(actions & last.actions, steps)
        elif isinstance(last, milter.EndOfMessage):
            answer = b"".join([filter.send(edit) for edit in edits])
        else:
            answer = filter.send(milter.Continue())
        return [event for piece in cut(answer) for event in mta.feed(piece)]

    edits = [edit for edit in EDITS if version == 6 or not isinstance(edit, milter.ChangeSender)]
    edits = [edit for edit in edits if version == 6 or not (isinstance(edit, milter.AddRecipient) and edit.parameters)]
    carry(mta.offer(version))
    for _ in range(2):
        for name, step, _command in CONVERSATION:
            events = carry(step(mta))
            if name == "end":
                assert events == edits
        carry(mta.abort())
    carry(mta.quit())
    assert filter.closed and filter.failure is None and mta.failure is None
    return [received.command for received in heard[1:]]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("steps", [0, 0xFF080, Step.HDR_LEADSPC, 0x1FFFFF & ~0x37F, Step.NR_HDR | Step.NR_BODY])
def test_conversation_without_declined_events(steps: int, seed: int) -> None:
    whole = [command for _, _, command in CONVERSATION] + [milter.Abort()]
    assert converse(steps, seed) == [*whole, *whole, milter.Quit()]


@pytest.mark.parametrize("version", [2, 3, 4])
def test_conversation_in_older_versions(version: int) -> None:
    since = {"unknown": 3, "data": 4}
    whole = [command for name, _, command in CONVERSATION if version >= since.get(name, 2)] + [milter.Abort()]
    assert converse(0, 0, version) == [*whole, *whole, milter.Quit()]


BITS = st.lists(st.sampled_from(Step)).map(lambda steps: sum(set(steps)))


@given(BITS, st.integers(0, 9))
def test_conversation_with_any_steps(steps: int, seed: int) -> None:
    declined = {
        "connect": Step.NOCONNECT, "helo": Step.NOHELO, "mail": Step.NOMAIL, "rcpt": Step.NORCPT,
        "unknown": Step.NOUNKNOWN, "data": Step.NODATA, "header": Step.NOHDRS, "eoh": Step.NOEOH, "body": Step.NOBODY,
    }  # fmt: skip
    whole = [command for name, _, command in CONVERSATION if not steps & declined.get(name, 0)] + [milter.Abort()]
    assert converse(steps, seed) == [*whole, *whole, milter.Quit()]


@given(BITS)
def test_kilter_follows_the_conversation(steps: int) -> None:
    """Its state machine of a filter takes our MTA's packets and has its own say."""
    steps &= ~(Step.NOCONNECT | Step.NR_CONN)
    theirs, mta, buffer = kilter.FilterProtocol(), MilterMta(), SimpleBuffer(1 << 16)

    def carry(data: bytes) -> list[Event]:
        events: list[Event] = []
        buffer[:] = data
        for message in theirs.read_from(buffer):
            if theirs.needs_response(message):
                answer: kilter.Continue | kilter.Negotiate = kilter.Continue()
                if isinstance(message, kilter.Negotiate):
                    answer = kilter.Negotiate(6, kilter.ActionFlags(ALL), kilter.ProtocolFlags(steps))
                reply = SimpleBuffer(1 << 10)
                if isinstance(message, kilter.EndOfMessage):
                    theirs.write_to(reply, kilter.AddHeader("X-A", b" v" if mta.leading_space else b"v"))
                theirs.write_to(reply, answer)
                events += mta.feed(reply[:].tobytes())
        assert buffer.filled == 0 and not mta.expects_reply
        return events

    carry(mta.offer())
    mta.macros(Stage.CONNECT, {"j": "mx.example", "daemon_name": "gw"})
    carry(mta.connect("mx.example", "2001:db8::7", 25))
    mta.macros(Stage.MAIL, {"i": "1", "auth_authen": "me"})
    for name, step, _ in CONVERSATION:
        if name not in ("connect", "helo", "end"):
            carry(step(mta))
    assert carry(mta.end_of_message()) == [milter.AddHeader(b"X-A", b" v"), milter.Continue()]
    carry(mta.abort() + mta.quit())


@given(st.lists(st.sampled_from([MAIL, RCPT, macros(Command.MAIL, i="1"), b"\0", b"\0\0\0\3", b"D", b"A", b"\xff" * 4]) | st.binary(max_size=12), max_size=8))
def test_any_bytes_are_commands_or_an_error(pieces: list[bytes]) -> None:
    filter = MilterFilter(limit=100)
    filter.feed(Options(6, ALL, 0).encode())
    filter.negotiate()
    for piece in pieces:
        try:
            filter.feed(piece)
        except MilterError:
            assert filter.failure is not None
            break
        assert len(filter._reader._buffer) <= 103
    with suppress(LocalError):
        filter.send(milter.Continue())
