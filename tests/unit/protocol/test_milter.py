"""The milter codec: bytes of known packets, both directions, REPLYCODE, framing, and another implementation's view."""

from __future__ import annotations

import ipaddress
from contextlib import suppress

import kilter.protocol as kilter
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kilter.protocol.buffer import SimpleBuffer

from gateway.protocol import milter
from gateway.protocol.errors import LocalError
from gateway.protocol.milter import (
    Action,
    Command,
    Family,
    MilterError,
    Options,
    PacketReader,
    PacketTooLong,
    Response,
    Stage,
    decode_command,
    decode_reply,
    encode_reply,
    parse_replycode,
)
from gateway.protocol.smtp import Reply
from gateway.testing.splits import splits


def unpack(data: bytes) -> tuple[int, bytes]:
    (found,) = PacketReader().feed(data)
    return found


# wire, what it says; the encoder gives the wire
COMMANDS: list[tuple[str, milter.MtaCommand, bytes]] = [
    ("0000000d4f00000006000001ff001fffff", Options(6, 0x1FF, 0x1FFFFF), Options(6, 0x1FF, 0x1FFFFF).encode()),
    (
        "0000001f4f000000060000010100000000000000026920 7b617574685f747970657d00",
        Options(6, 0x101, 0, {Stage.MAIL: ("i", "{auth_type}")}),
        Options(6, 0x101, 0, {Stage.MAIL: ("i", "{auth_type}")}).encode(),
    ),
    (
        "0000001d43 636c69656e742e6578616d706c6500 34cb213139322e302e322e3700",
        milter.Connect("client.example", Family.INET, "192.0.2.7", 52001),
        milter.encode_connect("client.example", "192.0.2.7", 52001),
    ),
    (
        "0000000a43756e6b6e6f776e0055",
        milter.Connect("unknown", Family.UNKNOWN, "", 0),
        milter.encode_connect("unknown", "", 25),
    ),
    (
        "0000001a436c6f63616c686f7374004c00002f72756e2f782e736f636b00",
        milter.Connect("localhost", Family.UNIX, "/run/x.sock", 0),
        milter.encode_connect("localhost", "/run/x.sock", 25),
    ),
    ("0000001048636c69656e742e6578616d706c6500", milter.Helo("client.example"), milter.encode_helo("client.example")),
    (
        "000000184d3c6140622e6578616d706c653e0053495a453d31303000",
        milter.Mail("<a@b.example>", (("SIZE", "100"),)),
        milter.encode_envelope(Command.MAIL, "<a@b.example>", (("SIZE", "100"),)),
    ),
    (
        "0000000c4c5375626a65637400686900",
        milter.Header(b"Subject", b" hi"),
        milter.encode_header(b"Subject", b" hi", leading_space=False),
    ),
    ("0000000442780d0a", milter.Body(b"x\r\n"), milter.packet(Command.BODY, b"x\r\n")),
    ("0000000145", milter.EndOfMessage(), milter.packet(Command.BODYEOB)),
]  # fmt: skip


@pytest.mark.parametrize(("wire", "command", "encoded"), COMMANDS, ids=lambda value: repr(value)[:40])
def test_command_bytes(wire: str, command: milter.MtaCommand, encoded: bytes) -> None:
    assert encoded == bytes.fromhex(wire)
    assert decode_command(*unpack(encoded)) == command


# wire, what it says, with leading spaces
REPLIES: list[tuple[str, milter.FilterReply, bool]] = [
    ("0000000868582d4100207600", milter.AddHeader(b"X-A", b" v"), True),
    ("0000000768582d41007600", milter.AddHeader(b"X-A", b" v"), False),
    ("0000000b6900000001582d41007600", milter.InsertHeader(1, b"X-A", b" v"), False),
    ("0000000a6d00000001582d410000", milter.ChangeHeader(1, b"X-A", b""), False),
    ("0000000a6d00000001582d410000", milter.ChangeHeader(1, b"X-A", b""), True),
    (
        "0000001c323c7840792e6578616d706c653e004e4f544946593d4e4556455200",
        milter.AddRecipient("x@y.example", (("NOTIFY", "NEVER"),)),
        False,
    ),
    ("000000052b3c783e00", milter.AddRecipient("x"), False),
    ("000000052d3c783e00", milter.DeleteRecipient("x"), False),
    ("00000004653c3e00", milter.ChangeSender(""), False),
    ("000000056200010d0a", milter.ReplaceBody(b"\0\1\r\n"), False),
    ("000000057177687900", milter.Quarantine("why"), False),
    ("0000000e793535342035 2e372e31206e6f00", milter.ReplyCode(Reply(554, (b"5.7.1 no",))), False),
    (
        "0000001a793535302d352e372e3020610d0a35353020352e372e30206200",
        milter.ReplyCode(Reply(550, (b"5.7.0 a", b"5.7.0 b"))),
        False,
    ),
    ("0000000163", milter.Continue(), False), ("0000000161", milter.Accept(), False),
    ("0000000172", milter.Reject(), False), ("0000000174", milter.Tempfail(), False),
    ("0000000164", milter.Discard(), False), ("0000000173", milter.Skip(), False),
    ("0000000134", milter.Shutdown(), False), ("0000000166", milter.ConnFail(), False),
    ("0000000170", milter.Progress(), False),
]  # fmt: skip


@pytest.mark.parametrize(("wire", "reply", "leading_space"), REPLIES, ids=lambda value: repr(value)[:40])
def test_reply_bytes(wire: str, reply: milter.FilterReply, leading_space: bool) -> None:
    data = bytes.fromhex(wire)
    assert decode_reply(*unpack(data), leading_space) == reply
    assert encode_reply(reply, leading_space) == data


def test_macro_bytes() -> None:
    wire = bytes.fromhex("0000002044436a006d782e6578616d706c65007b6461656d6f6e5f6e616d657d00677700")
    scopes = milter.MacroScopes({Stage.CONNECT: ("j", "daemon_name", "v")})
    scopes.set(Stage.CONNECT, {"{j}": "mx.example", "daemon_name": "gw"})
    assert scopes.packet(Command.CONNECT, Stage.CONNECT) == wire
    macros = milter.Macros(Command.CONNECT, {"j": "mx.example", "daemon_name": "gw"})
    assert decode_command(*unpack(wire)) == macros


@pytest.mark.parametrize(
    ("address", "family", "text"),
    [
        ("2001:DB8:0::7", Family.INET6, "2001:db8::7"), ("IPv6:2001:db8::7", Family.INET6, "2001:db8::7"),
        ("::ffff:192.0.2.7", Family.INET, "192.0.2.7"), ("fe80::1%eth0", Family.INET6, "fe80::1"),
    ],
)  # fmt: skip
def test_addresses_are_normalized(address: str, family: Family, text: str) -> None:
    wire = milter.encode_connect("[x]", address, 25)
    assert decode_command(*unpack(wire)) == milter.Connect("[x]", family, text, 25)


def test_ipv6_prefix_is_taken_off() -> None:
    command = decode_command(Command.CONNECT, b"x\x006\0\x19IPV6:2001:db8::7\0")
    assert command == milter.Connect("x", Family.INET6, "2001:db8::7", 25)


@pytest.mark.parametrize(
    ("value", "leading_space", "wire", "back"),
    [
        (b" v", False, b"v", b" v"), (b" v", True, b" v", b" v"), (b"v", True, b"v", b"v"),
        (b"  v", False, b" v", b"  v"), (b"\tv", False, b"\tv", b" \tv"), (b"v", False, b"v", b" v"),
        (b" a\r\n\tb\r\n c", False, b"a\n\tb\n c", b" a\r\n\tb\r\n c"), (b"", True, b"", b""), (b" ", False, b"", b" "),
    ],
)  # fmt: skip
def test_header_values(value: bytes, leading_space: bool, wire: bytes, back: bytes) -> None:
    packet = milter.encode_header(b"X", value, leading_space)
    assert packet[5:] == b"X\0" + wire + b"\0"
    assert decode_command(*unpack(packet), leading_space) == milter.Header(b"X", back)


def test_foreign_folds_become_crlf() -> None:
    assert decode_reply(Response.ADDHEADER, b"X\0a\n b\r\tc\r\n d\0") == milter.AddHeader(b"X", b" a\r\n b\r\n\tc\r\n d")


MALFORMED_REPLIES = [
    (Response.CONTINUE, b"x"), (Response.ACCEPT, b"\0"), (Response.PROGRESS, b"x"), (ord("l"), b""), (0, b""),
    (Response.ADDHEADER, b""), (Response.ADDHEADER, b"X\0"), (Response.ADDHEADER, b"X\0v"),
    (Response.ADDHEADER, b"X\0v\0w\0"), (Response.ADDHEADER, b"\0v\0"), (Response.ADDHEADER, b"X:\0v\0"),
    (Response.ADDHEADER, b"X \0v\0"), (Response.ADDHEADER, b"X\nY\0v\0"), (Response.ADDHEADER, b"\xff\0v\0"),
    (Response.ADDHEADER, b"X\0v\nBcc: x\0"), (Response.ADDHEADER, b"X\0v\r\nBcc: x\0"),
    (Response.ADDHEADER, b"X\0v\rBcc: x\0"), (Response.ADDHEADER, b"X\0v\n\n body\0"),
    (Response.ADDHEADER, b"X\0v\n\0"), (Response.ADDHEADER, b"X\0v\r\n\0"), (Response.ADDHEADER, b"X\0\nv\0"),
    (Response.INSHEADER, b"\0\0\0"), (Response.INSHEADER, b"\0\0\0\1"), (Response.INSHEADER, b"\0\0\0\1X\0a\nb\0"),
    (Response.CHGHEADER, b"\0\0\0\1\0v\0"), (Response.ADDRCPT, b""), (Response.ADDRCPT, b"a"),
    (Response.ADDRCPT, b"\0"), (Response.ADDRCPT, b"<>\0"), (Response.ADDRCPT, b"a\0b\0"),
    (Response.ADDRCPT, b"a\r\nRCPT TO:<b>\0"), (Response.ADDRCPT, b"\xff\0"), (Response.ADDRCPT_PAR, b"a\0b\0c\0"),
    (Response.ADDRCPT_PAR, b"a\0NOTIFY=NEVER\r\nX\0"), (Response.DELRCPT, b"<>\0"), (Response.DELRCPT, b"a\0b\0"),
    (Response.CHGFROM, b""), (Response.CHGFROM, b"a\nb\0"), (Response.CHGFROM, b"a\0b\0c\0"),
    (Response.QUARANTINE, b""), (Response.QUARANTINE, b"a\0b\0"), (Response.REPLYCODE, b""),
]  # fmt: skip


@pytest.mark.parametrize(("code", "payload"), MALFORMED_REPLIES)
def test_malformed_replies(code: int, payload: bytes) -> None:
    with pytest.raises(MilterError):
        decode_reply(code, payload)


@pytest.mark.parametrize(
    ("code", "payload"),
    [
        (Command.CONNECT, b"x\0"), (Command.CONNECT, b"x\0X"), (Command.CONNECT, b"x\x004"),
        (Command.CONNECT, b"x\x004\0"), (Command.CONNECT, b"x\x004\0\x19"), (Command.CONNECT, b"x\x004\0\x19a"),
        (Command.HELO, b"x"), (Command.HELO, b""), (Command.MAIL, b""), (Command.RCPT, b"x"),
        (Command.HEADER, b"x\0"), (Command.HEADER, b"x\0y"), (Command.HEADER, b"x\0y\0z\0"), (Command.DATA, b"x"),
        (Command.ABORT, b"\0"), (Command.MACRO, b""), (Command.MACRO, b"Ca\0"), (Command.MACRO, b"Ca\0b"),
        (Command.OPTNEG, b"\0" * 11), (Command.OPTNEG, b"\0" * 13), (Command.OPTNEG, b"\0" * 16),
        (Command.OPTNEG, b"\0" * 16 + b"i"), (ord("Z"), b""),
    ],
)  # fmt: skip
def test_malformed_commands(code: int, payload: bytes) -> None:
    with pytest.raises(MilterError):
        decode_command(code, payload)


def test_unknown_stages_and_separators_in_lists() -> None:
    head = b"\0\0\0\6" + b"\0" * 8
    lists = b"\0\0\0\7i\0" + b"\0\0\0\3i,{rcpt_addr} j\0" + b"\0\0\0\1\0"
    macros = {Stage.RCPT: ("i", "{rcpt_addr}", "j"), Stage.HELO: ()}
    assert Options.decode(head + lists) == Options(6, 0, 0, macros)


@pytest.mark.parametrize("wire", ["a@b", "<a@b>", " <a@b>"])
def test_addresses_with_and_without_brackets(wire: str) -> None:
    payload = wire.encode() + b"\0"
    assert decode_reply(Response.ADDRCPT, payload) == milter.AddRecipient("a@b")
    assert decode_reply(Response.DELRCPT, payload) == milter.DeleteRecipient("a@b")
    assert decode_reply(Response.ADDRCPT_PAR, payload) == milter.AddRecipient("a@b")
    sender = milter.ChangeSender("a@b", (("RET", "HDRS"), ("X", None)))
    assert decode_reply(Response.CHGFROM, payload + b"ret=HDRS  x\0") == sender


def test_change_header_index_0_is_the_first() -> None:
    assert decode_reply(Response.CHGHEADER, b"\0\0\0\0X\0v\0") == milter.ChangeHeader(1, b"X", b" v")


def test_quarantine_reason_is_safe_for_a_log() -> None:
    assert decode_reply(Response.QUARANTINE, b"a\r\n\x1bb\0") == milter.Quarantine("a???b")


# payload, the reply or None
REPLYCODES = [
    (b"554 5.7.1 no\0", Reply(554, (b"5.7.1 no",))),
    (b"554 5.7.1 no", Reply(554, (b"5.7.1 no",))),
    (b"451 later", Reply(451, (b"later",))),
    (b"421 ", Reply(421, (b"",))),
    (b"550-a\r\n550-\r\n550 c", Reply(550, (b"a", b"", b"c"))),
    (b"550-5.7.0 a\r\n550 5.1.1 b", Reply(550, (b"5.7.0 a", b"5.1.1 b"))),
    (b"550 100%% %x %%%", Reply(550, (b"100% x %",))),
    (b"550 9.1.1 a", Reply(550, (b"9.1.1 a",))),
    (b"550 \xc3\xa9\ta", Reply(550, (b"\xc3\xa9\ta",))),
    (b"550 " + b"x" * 2042, Reply(550, (b"x" * 2042,))),
    (b"", None), (b"\0", None), (b"550", None), (b"250 a", None), (b"354 a", None), (b"650 a", None), (b"55 a", None),
    (b"5500 a", None), (b"550_a", None), (b" 550 a", None), (b"550 a\0\0", None), (b"550 a\0b", None),
    (b"550-a", None), (b"550 a\r\n550 b", None), (b"550-a\r\n550-b", None), (b"550-a\r\n551 b", None),
    (b"550-a\r\n450 b", None), (b"550-a\n550 b", None), (b"550-a\r550 b", None), (b"550 a\r\n", None),
    (b"550 a\n", None), (b"550-a\r\n\r\n550 b", None), (b"550-a\r\nb", None), (b"550 4.7.1 a", None),
    (b"451 5.7.1 a", None), (b"550 2.0.0 a", None), (b"550-5.7.1 a\r\n550 4.7.1 b", None), (b"550 a\x1bb", None),
    (b"550 " + b"x" * 2043, None), (b"550-a\r\n" * 200 + b"550 a", None), ("\u0665\u0665\u0660 a".encode(), None),
]  # fmt: skip


@pytest.mark.parametrize(("payload", "reply"), REPLYCODES, ids=lambda value: repr(value)[:40])
def test_replycode(payload: bytes, reply: Reply | None) -> None:
    if reply is None:
        with pytest.raises(MilterError):
            parse_replycode(payload)
        return
    assert parse_replycode(payload) == reply
    assert decode_reply(*unpack(milter.encode_replycode(reply))) == milter.ReplyCode(reply)


@pytest.mark.parametrize(
    "reply",
    [
        milter.ReplyCode(Reply(250, (b"ok",))), milter.ReplyCode(Reply(550, (b"4.7.1 x",))),
        milter.ReplyCode(Reply(550, (b"a\r\nb",))), milter.ReplyCode(Reply(550, (b"a\nb",))),
        milter.AddHeader(b"", b""), milter.AddHeader(b"X", b" a\r\nBcc: b"), milter.AddHeader(b"X\0Y", b""),
        milter.InsertHeader(-1, b"X", b""), milter.ChangeHeader(1 << 32, b"X", b""), milter.AddRecipient(""),
        milter.AddRecipient("a\0b"), milter.DeleteRecipient("a\nb"), milter.ChangeSender("\ud800"),
    ],
)  # fmt: skip
def test_what_has_no_form_is_not_sent(reply: milter.FilterReply) -> None:
    with pytest.raises(LocalError):
        encode_reply(reply)


@pytest.mark.parametrize("address", ["mx.example", "192.0.2", "1::2::3"])
def test_client_without_address(address: str) -> None:
    with pytest.raises(LocalError):
        milter.encode_connect("x", address, 25)


def test_long_headers() -> None:
    milter.encode_header(b"X", b"v" * (65_535 - 3), leading_space=False)
    with pytest.raises(PacketTooLong):
        milter.encode_header(b"X", b"v" * (65_535 - 2), leading_space=False)
    milter.encode_header(b"X", b"v" * 100_000, leading_space=False, limit=131_072)
    with pytest.raises(LocalError):
        milter.encode_header(b"X", b"a\0b", leading_space=False)


def test_long_bodies_are_cut() -> None:
    data = bytes(range(256)) * 600
    packets = PacketReader().feed(encode_reply(milter.ReplaceBody(data)))
    assert [len(payload) for _, payload in packets] == [65_535, 65_535, 22_530]
    assert b"".join(payload for _, payload in packets) == data
    assert encode_reply(milter.ReplaceBody(b"")) == b"\0\0\0\1b"


STREAM = b"".join([milter.packet(ord("a") + n, bytes(n)) for n in range(20)])


@pytest.mark.parametrize("pieces", list(splits(STREAM)))
def test_reader_minds_no_cuts(pieces: list[bytes]) -> None:
    reader = PacketReader()
    assert [found for piece in pieces for found in reader.feed(piece)] == [(ord("a") + n, bytes(n)) for n in range(20)]
    assert not reader.pending


@pytest.mark.parametrize(
    "head", [b"\0\0\0\0", b"\0\x10\0\1", b"\xff\xff\xff\xff", b"HTTP/1.1 400", b"220 mx ESMTP", b"\x15\x03\x01\0\x02"]
)
def test_reader_refuses(head: bytes) -> None:
    with pytest.raises(MilterError):
        PacketReader().feed(head)
    reader = PacketReader()
    with pytest.raises(MilterError):
        for at in range(len(head)):
            reader.feed(head[at : at + 1])
    with pytest.raises(MilterError):
        reader.feed(b"\0\0\0\1c")
    after = PacketReader()
    assert after.feed(b"\0\0\0\1c" + head) == [(ord("c"), b"")]
    assert after.failure is not None
    with pytest.raises(MilterError):
        after.feed(b"")


def test_reader_takes_the_largest() -> None:
    payload = bytes((1 << 20) - 1)
    assert PacketReader().feed(milter.packet(1, payload)) == [(1, payload)]
    assert PacketReader(limit=3).feed(b"\0\0\0\3abc") == [(ord("a"), b"bc")]
    with pytest.raises(MilterError):
        PacketReader(limit=3).feed(b"\0\0\0\4")


# The same packets through kilter.protocol, another implementation.

WORD = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789"), min_size=1, max_size=20)
HOST = st.builds("{}.{}".format, WORD, WORD)
PATH = st.builds("<{}@{}>".format, WORD, HOST)
ADDRESS = st.builds("{}@{}".format, WORD, HOST)
PARAMETERS = st.lists(st.tuples(WORD.map(str.upper), st.none() | WORD), max_size=3).map(tuple)
NAME = st.text(st.sampled_from("ABCxyz-"), min_size=1, max_size=12).map(str.encode)
LINE = st.binary(max_size=20).map(lambda data: data.translate(None, b"\0\r\n"))
VALUE = st.lists(LINE, min_size=1, max_size=3).map(lambda lines: b" " + b"\r\n\t".join(lines))
IP = st.ip_addresses(v=4) | st.integers(1 << 64, (1 << 128) - 1).map(ipaddress.IPv6Address)
INDEX = st.integers(1, (1 << 32) - 1)


def pack(message: kilter.Message) -> bytes:
    buffer = SimpleBuffer(1 << 17)
    message.pack(buffer)
    return buffer[:].tobytes()


def words(parameters: tuple[tuple[str, str | None], ...]) -> list[str]:
    return [keyword if value is None else f"{keyword}={value}" for keyword, value in parameters]


@given(HOST, IP, st.integers(0, 65535))
def test_connect_as_kilter(host: str, ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    wire = pack(kilter.Connect(host, ip, port))
    assert milter.encode_connect(host, str(ip), port) == wire
    family = Family.INET if ip.version == 4 else Family.INET6
    assert decode_command(*unpack(wire)) == milter.Connect(host, family, str(ip), port)


@given(PATH, PARAMETERS)
def test_envelope_as_kilter(path: str, parameters: tuple[tuple[str, str | None], ...]) -> None:
    arguments: list[bytes | memoryview] = [word.encode() for word in words(parameters)]
    mail, rcpt = pack(kilter.EnvelopeFrom(path.encode(), arguments)), pack(kilter.EnvelopeRecipient(path.encode(), arguments))
    assert milter.encode_envelope(Command.MAIL, path, parameters) == mail
    assert milter.encode_envelope(Command.RCPT, path, parameters) == rcpt
    assert decode_command(*unpack(mail)) == milter.Mail(path, parameters)
    assert decode_command(*unpack(rcpt)) == milter.Rcpt(path, parameters)


@given(HOST, NAME, VALUE, st.binary(max_size=99))
def test_other_commands_as_kilter(host: str, name: bytes, value: bytes, body: bytes) -> None:
    verbatim = kilter.Header(name.decode(), value.replace(b"\r\n", b"\n"))
    stripped = kilter.Header(name.decode(), value.replace(b"\r\n", b"\n")[1:])
    for message, wire, command, leading_space in [
        (kilter.Helo(host), milter.encode_helo(host), milter.Helo(host), False),
        (verbatim, milter.encode_header(name, value, True), milter.Header(name, value), True),
        (stripped, milter.encode_header(name, value, False), milter.Header(name, value), False),
        (kilter.Body(body), milter.packet(Command.BODY, body), milter.Body(body), False),
        (kilter.Data(), milter.packet(Command.DATA), milter.Data(), False),
        (kilter.EndOfHeaders(), milter.packet(Command.EOH), milter.EndOfHeader(), False),
        (kilter.EndOfMessage(b""), milter.packet(Command.BODYEOB), milter.EndOfMessage(), False),
        (kilter.Abort(), milter.packet(Command.ABORT), milter.Abort(), False),
        (kilter.Close(), milter.packet(Command.QUIT), milter.Quit(), False),
    ]:
        assert pack(message) == wire
        assert decode_command(*unpack(wire), leading_space) == command


@given(
    st.integers(0, 6), st.integers(0, 0x1FF), st.integers(0, 0x1FFFFF),
    st.dictionaries(st.sampled_from(Stage), st.lists(WORD, max_size=4).map(tuple)),
)  # fmt: skip
def test_options_as_kilter(version: int, actions: int, steps: int, macros: dict[Stage, tuple[str, ...]]) -> None:
    macros = dict(sorted(macros.items()))
    theirs = kilter.Negotiate(
        version, kilter.ActionFlags(actions), kilter.ProtocolFlags(steps),
        {kilter.Stage(stage): names for stage, names in macros.items()},
    )  # fmt: skip
    ours = Options(version, actions, steps, macros)
    assert ours.encode() == pack(theirs)
    assert decode_command(*unpack(ours.encode())) == ours


@given(st.dictionaries(WORD, WORD, max_size=6))
def test_macros_as_kilter(values: dict[str, str]) -> None:
    scopes = milter.MacroScopes({Stage.MAIL: [*values, "unknown!"]})
    scopes.set(Stage.MAIL, values)
    names = {name if len(name) == 1 else f"{{{name}}}": value for name, value in values.items()}
    assert scopes.packet(Command.MAIL, Stage.MAIL) == pack(kilter.Macro(Command.MAIL, names))


@given(ADDRESS, PARAMETERS, NAME, VALUE, INDEX, st.binary(max_size=99))
def test_replies_as_kilter(
    address: str, parameters: tuple[tuple[str, str | None], ...], name: bytes, value: bytes, index: int, body: bytes
) -> None:
    path, field, folded = f"<{address}>", name.decode(), value.replace(b"\r\n", b"\n")
    joined = " ".join(words(parameters)) or None
    pairs: list[tuple[kilter.Message, milter.FilterReply, bool]] = [
        (kilter.AddHeader(field, folded), milter.AddHeader(name, value), True),
        (kilter.AddHeader(field, folded[1:]), milter.AddHeader(name, value), False),
        (kilter.InsertHeader(index, field, folded), milter.InsertHeader(index, name, value), True),
        (kilter.ChangeHeader(index, field, folded), milter.ChangeHeader(index, name, value), True),
        (kilter.ReplaceBody(body), milter.ReplaceBody(body), False),
        (kilter.AddRecipient(path), milter.AddRecipient(address), False),
        (kilter.RemoveRecipient(path), milter.DeleteRecipient(address), False),
        (kilter.ChangeSender(path, joined), milter.ChangeSender(address, parameters), False),
        (kilter.Quarantine(address), milter.Quarantine(address), False),
        (kilter.ReplyCode(b"550 5.7.1 no\0"), milter.ReplyCode(Reply(550, (b"5.7.1 no",))), False),
    ]
    for message, reply, leading_space in pairs:
        assert encode_reply(reply, leading_space) == pack(message)
        assert decode_reply(*unpack(pack(message)), leading_space) == reply
    if parameters:
        reply = milter.AddRecipient(address, parameters)
        assert encode_reply(reply) == pack(kilter.AddRecipientPar(path, joined))


def test_bits_are_kilters() -> None:
    assert {action.value for action in Action} == {flag.value for flag in kilter.ActionFlags if flag.value.bit_count() == 1}
    assert {step.value for step in milter.Step} == {
        flag.value for flag in kilter.ProtocolFlags if flag.value.bit_count() == 1 and flag.value <= 0x100000
    }


@given(st.integers(0, 255), st.binary(max_size=60), st.booleans())
def test_any_payload_decodes_or_is_an_error(code: int, payload: bytes, leading_space: bool) -> None:
    for decode in (decode_reply, decode_command):
        with suppress(MilterError):
            decode(code, payload, leading_space)


@given(st.sampled_from(Response), st.lists(st.sampled_from([b"X-A", b"\r\n", b" ", b"\n", b"\0", b"550", b"%", b":", b"<", b"a@b"])))
def test_nothing_decoded_injects(code: Response, parts: list[bytes]) -> None:
    try:
        reply = decode_reply(code, b"".join(parts))
    except MilterError:
        return
    if isinstance(reply, (milter.AddHeader, milter.InsertHeader, milter.ChangeHeader)):
        *lines, last = (reply.name + b":" + reply.value + b"\r\n").split(b"\n")
        assert last == b"" and all(line[-1:] == b"\r" for line in lines)
        assert all(line[:1] in (b" ", b"\t") for line in lines[1:])
    if isinstance(reply, milter.ReplyCode):
        assert all(not set(line) & {0, 10, 13} for line in reply.reply.lines)
