"""The MTA's side of the milter protocol: what is sent when, what is batched, what replies mean, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import milter
from gateway.protocol.errors import LocalError
from gateway.protocol.milter import Action, Command, MilterError, Options, PacketReader, Response, Stage, Step, packet
from gateway.protocol.milter_mta import Event, MilterMta, Unasked
from gateway.protocol.smtp import Reply
from gateway.testing.splits import splits

ALL = 0x1FF
CONTINUE = packet(Response.CONTINUE)
ACCEPT = packet(Response.ACCEPT)


def agreed(steps: int = 0, actions: int = ALL, version: int = 6, offer: int = 6, **lists: str) -> MilterMta:
    mta = MilterMta()
    mta.offer(offer)
    macros = {Stage[name.upper()]: tuple(names.split()) for name, names in lists.items()}
    mta.feed(Options(version, actions, steps, macros).encode())
    return mta


def codes(data: bytes) -> str:
    """The codes of packets, macros with that of their command: `DM M`."""
    found = []
    for code, payload in PacketReader().feed(data):
        found.append(chr(code) + (chr(payload[0]) if code == Command.MACRO else ""))
    return " ".join(found)


def macros_in(data: bytes) -> list[tuple[str, dict[str, str]]]:
    decoded = [milter.decode_command(code, payload) for code, payload in PacketReader().feed(data)]
    return [(chr(found.command), dict(found.values)) for found in decoded if isinstance(found, milter.Macros)]


def at_end(steps: int = 0, actions: int = ALL) -> MilterMta:
    """A machine that waits for the replies to the end of a message."""
    mta = agreed(steps, actions)
    mta.mail("<a@b>")
    mta.feed(CONTINUE)
    mta.end_of_message()
    return mta


@pytest.mark.parametrize(
    ("version", "wire"),
    [
        (6, "0000000d4f00000006000001ff001fffff"), (4, "0000000d4f000000040000003f0000037f"),
        (3, "0000000d4f000000030000003f0000017f"), (2, "0000000d4f000000020000003f0000007f"),
    ],
)  # fmt: skip
def test_offers(version: int, wire: str) -> None:
    mta = MilterMta()
    assert mta.offer(version) == bytes.fromhex(wire)
    assert mta.awaiting is Command.OPTNEG
    with pytest.raises(LocalError):
        mta.offer(version)


@pytest.mark.parametrize("version", [0, 1, 5, 7])
def test_no_such_version(version: int) -> None:
    with pytest.raises(LocalError):
        MilterMta().offer(version)


# offered version; answer; what is agreed: actions, steps. The first ones were measured (OpenDKIM 2.11, rspamd 3.4).
NEGOTIATIONS = [
    (6, (6, 0x111, 0x100702), (0x111, 0x100702)),
    (4, (4, 0x11, 0x302), (0x11, 0x302)),
    (2, (2, 0x11, 0x2), (0x11, 0x2)),
    (6, (6, 0x1FF, 0xFF080), (0x1FF, 0xFF080)),
    (6, (6, 0x3F, 0xFF080), (0x3F, 0xFF080)),
    (6, (6, 0xFFFFFFFF, 0xFFFFFFFF), (0x1FF, 0x1FFFFF)),
    (4, (4, 0x1FF, 0xFFFFFFFF), (0x3F, 0x37F)),
    (6, (2, 0x3F, 0xFFFFFFFF), (0x3F, 0x7F)),
    (6, (5, 0x3F, 0xFFFFFFFF), (0x3F, 0x37F)),
    (6, (3, 0, 0), (0, 0)),
]


@pytest.mark.parametrize(("offer", "answer", "expected"), NEGOTIATIONS)
def test_negotiation(offer: int, answer: tuple[int, int, int], expected: tuple[int, int]) -> None:
    mta = MilterMta()
    mta.offer(offer)
    assert mta.feed(Options(*answer).encode()) == [Options(answer[0], *expected)]
    assert mta.actions == expected[0]
    assert mta.wants_rejected_recipients is bool(expected[1] & Step.RCPT_REJ)
    assert mta.leading_space is bool(expected[1] & Step.HDR_LEADSPC)
    assert not mta.expects_reply


@pytest.mark.parametrize(
    ("offer", "answer"),
    [
        (6, Options(7, 0, 0).encode()), (4, Options(6, 0, 0).encode()), (2, Options(3, 0, 0).encode()),
        (6, Options(1, 0, 0).encode()), (6, Options(0, 0, 0).encode()), (6, CONTINUE), (6, packet(Response.PROGRESS)),
        (6, packet(Command.OPTNEG, b"\0\0\0\6")), (6, Options(6, 0, 0).encode() + CONTINUE[:1]),
    ],
)  # fmt: skip
def test_negotiation_fails(offer: int, answer: bytes) -> None:
    mta = MilterMta()
    mta.offer(offer)
    with pytest.raises(MilterError):
        mta.feed(answer)
        mta.connect("x")
    assert mta.failure is not None
    with pytest.raises(MilterError):
        mta.feed(b"")
    with pytest.raises(MilterError):
        mta.helo("x")
    assert mta.quit() == b""


def test_whole_conversation() -> None:
    """The order of packets that Postfix has, once around."""
    mta = agreed()
    said = []
    steps: list[Callable[[], bytes]] = [
        lambda: mta.connect("client.example", "192.0.2.7", 52001), lambda: mta.helo("client.example"),
        lambda: mta.mail("<a@b>", (("SIZE", "100"),)), lambda: mta.rcpt("<c@d>"), mta.data,
        lambda: mta.header(b"Subject", b" hi"), mta.eoh, lambda: mta.body(b"x\r\n"), mta.end_of_message,
    ]  # fmt: skip
    for step in steps:
        said.append(codes(step()))
        assert mta.expects_reply
        assert mta.feed(CONTINUE) == [milter.Continue()]
        assert not mta.expects_reply
    assert said == ["DC C", "DH H", "DM M", "DR R", "DT T", "L", "DN N", "B", "DE E"]
    assert codes(mta.abort()) == "A"
    assert codes(mta.quit()) == "Q"


@pytest.mark.parametrize(
    ("offer", "version", "unknown", "data"), [(6, 6, True, True), (6, 4, True, True), (6, 3, True, False), (2, 2, False, False)]
)
def test_events_of_versions(offer: int, version: int, unknown: bool, data: bool) -> None:
    mta = agreed(offer=offer, version=version)
    assert bool(mta.unknown(b"FOO bar")) is unknown is mta.expects_reply is mta.wants(Command.UNKNOWN)
    mta.feed(CONTINUE if unknown else b"")
    mta.mail("<a@b>")
    mta.feed(CONTINUE)
    assert bool(mta.data()) is data is mta.expects_reply is mta.wants(Command.DATA)
    mta.feed(CONTINUE if data else b"")
    assert codes(mta.end_of_message()) == "DE E"


def test_no_reply_means_nothing_before_version_6() -> None:
    mta = agreed(version=4, steps=0xFFFFFFFF & ~0x37F)
    assert mta.connect("x") and mta.expects_reply
    mta.feed(CONTINUE)
    mta.mail("<a@b>")
    mta.feed(CONTINUE)
    assert mta.header(b"A", b" b")[5:] == b"A\0b\0"
    mta.feed(CONTINUE)
    mta.body(b"x")
    with pytest.raises(MilterError):
        mta.feed(packet(Response.SKIP))


def talk(mta: MilterMta) -> list[str]:
    """Tell a message, every reply a continue; the codes of each write."""
    said = []
    steps: list[Callable[[], bytes]] = [
        lambda: mta.connect("x"), lambda: mta.helo("x"), lambda: mta.mail("<a@b>"), lambda: mta.rcpt("<c@d>"),
        lambda: mta.unknown(b"X"), mta.data, lambda: mta.header(b"A", b" b"), mta.eoh, lambda: mta.body(b"x"),
        mta.end_of_message,
    ]  # fmt: skip
    for step in steps:
        data = step()
        if data:
            said.append(codes(data))
        assert bool(data) is mta.expects_reply
        if mta.expects_reply:
            mta.feed(CONTINUE)
    return said


def test_declined_events_send_macros_only() -> None:
    declined = 0x37F & ~Step.NR_HDR
    assert talk(agreed(declined)) == ["DC DH DM DR DT DN DE E"]
    assert talk(agreed(declined, connect="", helo="", mail="", rcpt="", data="", eoh="", eom="")) == ["E"]
    some = Step.NOHELO | Step.NOUNKNOWN | Step.NODATA | Step.NOHDRS
    assert talk(agreed(some)) == ["DC C", "DH DM M", "DR R", "DT DN N", "B", "DE E"]


def test_events_without_reply_are_batched() -> None:
    # The first are the steps that rspamd claims.
    assert talk(agreed(0xFF080)) == ["DC C DH H DM M DR R U DT T L DN N B DE E"]
    assert talk(agreed(Step.NR_HDR | Step.NR_EOH | Step.NR_RCPT)) == [
        "DC C", "DH H", "DM M", "DR R U", "DT T", "L DN N B", "DE E",
    ]  # fmt: skip


def test_batches_are_bounded() -> None:
    mta = agreed(0xFF080)
    mta.mail("<a@b>")
    sent = 0
    for _ in range(1000):
        data = mta.header(b"A", b" " + b"x" * 1000)
        assert len(data) < 65_536 + 1100 and not mta.expects_reply
        sent += len(data)
    assert sent > 900_000
    sent += len(mta.flush())
    assert sent > 1000 * 1008 and mta.flush() == b""
    assert len(mta.body(bytes(200_000))) > 200_000


def test_abort_and_quit_send_what_waits() -> None:
    mta = agreed(0xFF080)
    assert mta.mail("<a@b>") == b""
    assert codes(mta.abort()) == "DM M A"
    assert mta.mail("<a@b>") == b""
    assert codes(mta.quit()) == "DM M Q"


def test_body_is_cut() -> None:
    data = bytes(range(256)) * 600
    mta = agreed()
    mta.mail("<a@b>")
    mta.feed(CONTINUE)
    pieces, out = [], mta.body(data)
    while out:
        ((code, payload),) = PacketReader().feed(out)
        assert code == Command.BODY and len(payload) <= 65_535 and mta.expects_reply
        pieces.append(payload)
        assert mta.body() == b""  # not on top of an open question
        if len(pieces) < 3:
            with pytest.raises(LocalError):
                mta.end_of_message()
        mta.feed(CONTINUE)
        out = mta.body()
    assert len(pieces) == 3 and b"".join(pieces) == data
    assert codes(mta.end_of_message()) == "DE E"
    batched = agreed(Step.NR_BODY)
    batched.mail("<a@b>")
    batched.feed(CONTINUE)
    assert codes(batched.body(data)) == "B B B"


def test_skip() -> None:
    mta = agreed(Step.SKIP)
    for _ in range(2):  # each message anew
        mta.mail("<a@b>")
        mta.feed(CONTINUE)
        mta.header(b"A", b" b")
        assert mta.feed(packet(Response.SKIP)) == [milter.Skip()]
        assert mta.header(b"A", b" b") == b"" and not mta.expects_reply
        assert codes(mta.eoh()) == "DN N"
        mta.feed(CONTINUE)
        mta.body(bytes(100_000))
        assert mta.feed(packet(Response.SKIP)) == [milter.Skip()]
        assert mta.body() == b"" and mta.body(b"more") == b"" and not mta.expects_reply
        assert codes(mta.end_of_message()) == "DE E"
        mta.feed(CONTINUE)
        mta.abort()


REFUSALS = [packet(Response.REJECT), packet(Response.TEMPFAIL), packet(Response.REPLYCODE, b"550 no\0")]


@pytest.mark.parametrize("reply", [ACCEPT, packet(Response.DISCARD), *REFUSALS], ids=lambda reply: chr(reply[4]))
@pytest.mark.parametrize("event", ["mail", "rcpt", "data", "header", "eoh", "body"])
def test_after_a_verdict_the_message_is_over(event: str, reply: bytes) -> None:
    mta = agreed()
    steps = {
        "mail": lambda: mta.mail("<a@b>"), "rcpt": lambda: mta.rcpt("<c@d>"), "data": mta.data,
        "header": lambda: mta.header(b"A", b" b"), "eoh": mta.eoh, "body": lambda: mta.body(b"x"),
        "end": mta.end_of_message,
    }  # fmt: skip
    decided = False
    for name, step in steps.items():
        assert bool(step()) is not decided
        if not decided:
            mta.feed(reply if name == event else CONTINUE)
            decided = name == event and not (event == "rcpt" and reply in REFUSALS)
        assert not mta.expects_reply
    assert codes(mta.abort()) == "A"
    assert codes(mta.mail("<a@b>")) == "DM M"


@pytest.mark.parametrize("event", ["connect", "helo"])
def test_accepted_connection_is_over(event: str) -> None:
    mta = agreed()
    mta.connect("x") if event == "connect" else mta.helo("x")
    assert mta.feed(ACCEPT) == [milter.Accept()]
    assert talk(mta) == [] and mta.abort() == b""
    assert codes(mta.quit()) == "Q"


def test_refused_connection_goes_on_if_the_caller_does() -> None:
    mta = agreed()
    mta.connect("x")
    assert mta.feed(REFUSALS[2]) == [milter.ReplyCode(Reply(550, (b"no",)))]
    assert codes(mta.mail("<a@b>")) == "DM M"


def test_macros() -> None:
    mta = agreed(rcpt="i {rcpt_addr} auth_authen", eom="{i} {msg_id} {rcpt_addr} j")
    mta.macros(Stage.CONNECT, {"{j}": "mx", "daemon_name": "gw", "v": "", "{_}": "x [192.0.2.7]", "other": "x"})
    found = macros_in(mta.connect("x"))
    assert found == [("C", {"j": "mx", "daemon_name": "gw", "_": "x [192.0.2.7]"})]
    mta.feed(CONTINUE)
    assert macros_in(mta.helo("x")) == [("H", {})]
    mta.feed(CONTINUE)
    mta.macros(Stage.MAIL, {"i": "id1", "{auth_authen}": "me", "{mail_addr}": "a@b"})
    assert macros_in(mta.mail("<a@b>")) == [("M", {"i": "id1", "auth_authen": "me", "mail_addr": "a@b"})]
    mta.feed(CONTINUE)
    mta.macros(Stage.RCPT, {"{rcpt_addr}": "c@d"})
    assert macros_in(mta.rcpt("<c@d>")) == [("R", {"i": "id1", "rcpt_addr": "c@d", "auth_authen": "me"})]
    mta.feed(CONTINUE)
    mta.macros(Stage.RCPT, {})
    assert macros_in(mta.rcpt("<e@f>")) == [("R", {"i": "id1", "auth_authen": "me"})]
    mta.feed(CONTINUE)
    mta.macros(Stage.RCPT, {"{rcpt_addr}": "c@d"})
    mta.macros(Stage.DATA, {"{msg_id}": "m\0n"})
    assert macros_in(mta.data()) == [("T", {"i": "id1"})]
    mta.feed(CONTINUE)
    assert macros_in(mta.end_of_message()) == [("E", {"i": "id1", "msg_id": "m?n", "j": "mx"})]
    mta.feed(CONTINUE)
    mta.abort()
    mta.macros(Stage.MAIL, {"auth_authen": ""})
    assert macros_in(mta.mail("<a@b>")) == [("M", {})]
    mta.feed(CONTINUE)
    assert macros_in(mta.rcpt("<c@d>")) == [("R", {})]


def test_macros_on_the_wire_have_braces_by_length() -> None:
    mta = agreed(connect="{j} daemon_name")
    mta.macros(Stage.CONNECT, {"j": "mx.example", "{daemon_name}": "gw"})
    wire = "0000002044436a006d782e6578616d706c65007b6461656d6f6e5f6e616d657d00677700"
    assert mta.connect("x").startswith(bytes.fromhex(wire))


EDITS: list[milter.FilterReply] = [
    milter.AddHeader(b"X-A", b" v"), milter.InsertHeader(1, b"X-A", b" v\r\n\tw"),
    milter.ChangeHeader(2, b"X-A", b""), milter.ReplaceBody(b"a"), milter.ReplaceBody(b"b"),
    milter.AddRecipient("x@y"), milter.AddRecipient("x@y", (("NOTIFY", "NEVER"),)), milter.DeleteRecipient("x@y"),
    milter.ChangeSender("", (("RET", "HDRS"),)), milter.Quarantine("why"), milter.Progress(), milter.Accept(),
]  # fmt: skip
NEEDS: dict[type[milter.FilterReply], Action] = {
    milter.AddHeader: Action.ADDHDRS, milter.InsertHeader: Action.ADDHDRS, milter.ChangeHeader: Action.CHGHDRS,
    milter.DeleteRecipient: Action.DELRCPT, milter.ChangeSender: Action.CHGFROM,
    milter.Quarantine: Action.QUARANTINE,
}  # fmt: skip


@pytest.mark.parametrize("leading_space", [False, True])
def test_modifications_however_cut(leading_space: bool) -> None:
    stream = b"".join(milter.encode_reply(edit, leading_space) for edit in EDITS)
    for pieces in splits(stream):
        mta = at_end(Step.HDR_LEADSPC if leading_space else 0)
        assert [event for piece in pieces for event in mta.feed(piece)] == EDITS
        assert not mta.expects_reply and mta.failure is None


def test_unasked_actions_are_dropped() -> None:
    mta = at_end(actions=0)
    events: list[Event] = []
    for edit in EDITS:
        if not isinstance(edit, milter.ReplaceBody):
            events += mta.feed(milter.encode_reply(edit))
    recipients = [Unasked(Action.ADDRCPT), Unasked(Action.ADDRCPT_PAR)]
    expected = [Unasked(NEEDS[type(edit)]) for edit in EDITS if type(edit) in NEEDS]
    assert events == [*expected[:3], *recipients, *expected[3:], milter.Progress(), milter.Accept()]


# what was said before, the step that asks, replies: the last is the error
BODY = packet(Response.REPLBODY, b"x")
ADD = milter.encode_reply(milter.AddHeader(b"A", b" b"))
ERRORS = [
    ("connect", [packet(Response.DISCARD)]), ("helo", [packet(Response.DISCARD)]), ("connect", [ADD]), ("mail", [BODY]),
    ("mail", [packet(ord("x"))]), ("mail", [packet(ord("l"), b"i\0")]), ("mail", [packet(Command.OPTNEG, bytes(12))]),
    ("mail", [packet(Response.CONTINUE, b"x")]), ("mail", [packet(Response.REPLYCODE, b"250 ok\0")]),
    ("end", [packet(Response.SKIP)]), ("end", [packet(Response.ADDHEADER, b"\0v\0")]),
    ("end", [packet(Response.ADDHEADER, b"X\0v\nBcc: x\0")]), ("end", [BODY, ADD, BODY]),
    ("end", [ADD, BODY, packet(Response.PROGRESS), BODY, ADD, ADD, BODY]),
    ("mail", [CONTINUE, CONTINUE]), ("mail", [CONTINUE, b"\0"]), ("end", [ACCEPT, ADD]),
    ("mail", [CONTINUE, packet(Response.PROGRESS)]), ("mail", [packet(Response.SHUTDOWN), CONTINUE]),
    ("mail", [b"\0\0\0\0"]), ("mail", [b"HTTP"]), ("mail", [CONTINUE, b"HTTP"]),
]  # fmt: skip


@pytest.mark.parametrize(("event", "replies"), ERRORS)
@pytest.mark.parametrize("at_once", [False, True])
def test_errors(event: str, replies: list[bytes], at_once: bool) -> None:
    mta = agreed() if event != "end" else at_end()
    if event != "end":
        {"connect": lambda: mta.connect("x"), "helo": lambda: mta.helo("x"), "mail": lambda: mta.mail("<a@b>")}[event]()
    if at_once and len(replies) > 1:
        assert len(mta.feed(b"".join(replies))) == len(replies) - 1
    else:
        for reply in replies[:-1]:
            mta.feed(reply)
            assert mta.failure is None
        with pytest.raises(MilterError):
            mta.feed(replies[-1])
    assert mta.failure is not None
    with pytest.raises(MilterError):
        mta.feed(CONTINUE)
    with pytest.raises(MilterError):
        mta.abort()


def test_new_body_without_asking_is_an_error() -> None:
    with pytest.raises(MilterError):
        at_end(actions=ALL & ~Action.CHGBODY).feed(BODY)


def test_each_message_may_replace_its_body() -> None:
    mta = at_end()
    mta.feed(BODY + ADD + ACCEPT)
    mta.mail("<a@b>")
    mta.feed(CONTINUE)
    mta.end_of_message()
    assert mta.feed(BODY + ACCEPT) == [milter.ReplaceBody(b"x"), milter.Accept()]


@pytest.mark.parametrize("code", [Response.SHUTDOWN, Response.CONN_FAIL])
def test_farewells(code: Response) -> None:
    mta = agreed()
    mta.mail("<a@b>")
    events = mta.feed(packet(Response.PROGRESS) + packet(code))
    assert events == [milter.Progress(), milter.Shutdown() if code == Response.SHUTDOWN else milter.ConnFail()]
    assert not mta.expects_reply and mta.rcpt("<c@d>") == b""


def test_order_is_the_callers_duty() -> None:
    mta = MilterMta()
    for early in (mta.data, mta.abort, mta.eoh, lambda: mta.connect("x"), lambda: mta.wants(Command.BODY)):
        with pytest.raises(LocalError):
            early()
    mta = agreed()
    for outside in (mta.data, mta.eoh, mta.end_of_message, lambda: mta.rcpt("<a@b>"), lambda: mta.header(b"A", b"b"),
                    lambda: mta.body(b"x")):  # fmt: skip
        with pytest.raises(LocalError):
            outside()
    mta.mail("<a@b>")
    for unanswered in (mta.data, mta.abort, lambda: mta.helo("x"), lambda: mta.body(b"x"), lambda: mta.mail("<>")):
        with pytest.raises(LocalError):
            unanswered()
    mta.feed(CONTINUE)
    with pytest.raises(LocalError):
        mta.mail("<a@b>")
    with pytest.raises(milter.PacketTooLong):
        mta.header(b"A", b"x" * 70_000)
    assert codes(mta.header(b"A", b" b")) == "L"


FRAGMENTS = st.sampled_from(
    [CONTINUE, ACCEPT, ADD, BODY, *REFUSALS, packet(Response.PROGRESS), b"\0", b"\0\0\0\5", b"h", b"\xff" * 4]
)
BYTES = st.lists(FRAGMENTS | st.binary(max_size=12), max_size=8)


@given(st.sampled_from(["negotiation", "mail", "end", "idle"]), BYTES)
def test_any_bytes_are_events_or_an_error(state: str, pieces: list[bytes]) -> None:
    if state == "negotiation":
        mta = MilterMta(limit=100)
        mta.offer()
    else:
        mta = at_end() if state == "end" else agreed()
        mta._reader.limit = 100
        if state == "mail":
            mta.mail("<a@b>")
    for piece in pieces:
        try:
            mta.feed(piece)
        except MilterError:
            assert mta.failure is not None
            break
        assert len(mta._reader._buffer) <= 103


@given(BYTES, st.integers(0, 1 << 30))
def test_cuts_do_not_matter(pieces: list[bytes], seed: int) -> None:
    outcomes = []
    for cut in splits(b"".join(pieces), seed):
        mta = at_end()
        events: list[Event] = []
        try:
            for piece in cut:
                events += mta.feed(piece)
        except MilterError:
            pass
        outcomes.append((events, str(mta.failure)))
    assert all(outcome == outcomes[0] for outcome in outcomes)
