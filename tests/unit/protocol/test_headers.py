"""The header section: any octets come back unchanged, changes hit the right field, nothing is injected."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.protocol.content import DotStuffer
from gateway.protocol.errors import LocalError
from gateway.protocol.headers import Header, HeaderField, HeaderReader, parse_header
from gateway.testing.splits import splits

TOKENS = st.sampled_from(
    [
        b"\r",
        b"\n",
        b".",
        b":",
        b" ",
        b"\t",
        b"\0",
        b"\xe9",
        b"a",
        b"\r\n",
        b"\r\n\r\n",
        b"A: b\r\n",
        b"..c:d\r\n",
        b"From x\r\n",
        b">",
        b"From ",
    ]
)
TANGLED = st.lists(TOKENS, max_size=30).map(b"".join)
NAMES = st.sampled_from(["A", "a", "B", "Subject"])


def stuffed(data: bytes) -> bytes:
    return re.sub(rb"(?<=\r\n)\.", b"..", b"\r\n" + data)[2:]


def unstuffed(wire: bytes) -> bytes:
    return re.sub(rb"(?<=\r\n)\.", b"", b"\r\n" + wire)[2:]


def model(data: bytes) -> tuple[list[bytes], bytes, int]:
    """Fields, end and body offset, a line at a time."""
    fields: list[bytes] = []
    offset = 0
    mailbox = True
    for line in re.findall(rb".*?\r\n|.+\Z", data, re.DOTALL):
        text = line.removesuffix(b"\r\n")
        mailbox = mailbox and text.lstrip(b">").startswith(b"From ")
        if line == b"\r\n":
            return fields, line, offset + 2
        if mailbox:
            fields.append(b"X-Mailbox-Line: " + text)
        elif any(not field.startswith(b"X-Mailbox-Line: ") for field in fields) and text[:1] in (b" ", b"\t"):
            fields[-1] += b"\r\n" + text
        elif re.match(rb"[\x21-\x39\x3b-\x7e]+[ \t]*:", text):
            fields.append(text)
        else:
            return fields, b"", offset
        offset += len(line)
    return fields, b"", offset


@given(TANGLED)
@example(b"A: b\r\n\r")
@example(b"A: b\r\n ")
@example(b".\r\n")
@example(b">>From \r\nFrom x\r\nFrom: b\r\nFrom c\r\n")
@example(b"From x\r\n a")
def test_any_octets_come_back(data: bytes) -> None:
    header, offset = parse_header(data)
    assert ([field.raw for field in header.fields], header.end, offset) == model(data)
    assert header.changed == data.lstrip(b">").startswith(b"From ")
    body = data[offset:]
    encoded = header.encode(body_follows=bool(body))
    if not header.changed and (header.end or not body):
        assert encoded + body == data
    again, start = parse_header(encoded + body)
    assert not again.changed and (encoded + body)[start:] == body
    assert [field.raw for field in again.fields] == [field.raw for field in header.fields]
    assert all("\r" not in field.text and "\n" not in field.text for field in header.fields)


def read(pieces: list[bytes], limit: int, max_fields: int = 1000) -> HeaderReader:
    reader = HeaderReader(limit, max_fields)
    for piece in pieces:
        if reader.feed(piece):
            break
    else:
        reader.finish()
    return reader


@given(TANGLED)
@example(b".From x\r\n")
@example(b".>From x\r\n")
def test_reader_at_every_split(data: bytes) -> None:
    wire = stuffed(data)
    header, offset = parse_header(data)
    for pieces in splits(wire):
        reader = read(pieces, 10_000)
        assert reader.header is not None and not reader.too_big
        assert reader.header.fields == header.fields
        assert reader.header.end == header.end
        assert unstuffed(wire[reader.body_offset :]) == data[offset:]
        assert reader.header.encode(body_follows=False) == header.encode(body_follows=False)


@given(TANGLED, st.integers(0, 60))
@example(b"A: b\r\n\r\n", 8)
@example(b"A: b\r\n\r\n", 7)
@example(b"Hello world", 0)
@example(b">>From x\r\nA: b\r\n\r\n", 0)
@example(b"From x\r\n>>From x\r\n\r\n", 8)
def test_limit_does_not_depend_on_cuts(data: bytes, limit: int) -> None:
    wire = stuffed(data)
    outcomes = {
        (reader.too_big, reader.header is None, reader.body_offset)
        for reader in (read(pieces, limit) for pieces in splits(wire))
    }
    assert len(outcomes) == 1
    whole = read([wire], 10_000).body_offset
    too_big, _, offset = outcomes.pop()
    if whole > limit:
        assert too_big
    if not too_big:
        assert offset == whole


@given(TANGLED)
def test_reader_takes_what_the_stuffer_gives(data: bytes) -> None:
    stuffer = DotStuffer()
    wire = stuffer.feed(data) + stuffer.finish()
    reader = read([wire], 10_000)
    assert reader.header is not None
    assert [f.raw for f in reader.header.fields] == [f.raw for f in parse_header(unstuffed(wire))[0].fields]


def test_reader_keeps_a_long_line_of_a_body_without_header_out() -> None:
    reader = read([b"Hello world " + b"x" * 100_000], 1000)
    assert reader.header is not None and reader.header.fields == []
    assert (reader.body_offset, reader.header.end) == (0, b"")


@pytest.mark.parametrize("endless", [b"A" * 5000, b"A: " + b"x" * 5000, b"A: b\r\n" + b" c\r\n" * 2000])
def test_reader_gives_up_beyond_the_limit(endless: bytes) -> None:
    reader = HeaderReader(1000, 1000)
    assert reader.feed(endless)
    assert reader.too_big and reader.header is None
    with pytest.raises(LocalError):
        reader.feed(b"x")


@pytest.mark.parametrize(
    ("data", "names", "end", "body"),
    [
        (b"", [], b"", b""),
        (b"\r\n", [], b"\r\n", b""),
        (b"A: b", ["A"], b"", b""),
        (b"A: b\r\n", ["A"], b"", b""),
        (b"A : b\r\n\r\nx", ["A"], b"\r\n", b"x"),
        (b"A: b\r\n c\r\n\td\r\nB:\r\n\r\n", ["A", "B"], b"\r\n", b""),
        (b" A: b\r\n\r\nx", [], b"", b" A: b\r\n\r\nx"),
        (b"From a@b Mon Jan 1 10:00:00\r\nA: b\r\n\r\n", ["X-Mailbox-Line", "A"], b"\r\n", b""),
        (b">From a\r\nFrom b\r\n\r\nx", ["X-Mailbox-Line", "X-Mailbox-Line"], b"\r\n", b"x"),
        (b"From a\r\n folded\r\nA: b\r\n", ["X-Mailbox-Line"], b"", b" folded\r\nA: b\r\n"),
        (b"A: b\r\nFrom a\r\n", ["A"], b"", b"From a\r\n"),
        (b"A: b\r\nno field\r\nB: c\r\n", ["A"], b"", b"no field\r\nB: c\r\n"),
        (b"A: b\r\n: c\r\n", ["A"], b"", b": c\r\n"),
        (b"A: b\nB: c\r\n\n\r\n", ["A"], b"", b"\n\r\n"),
        (b"A: b\r\n\xc3\xa9: c\r\n\r\n", ["A"], b"", b"\xc3\xa9: c\r\n\r\n"),
    ],
)
def test_sections(data: bytes, names: list[str], end: bytes, body: bytes) -> None:
    header, offset = parse_header(data)
    assert ([field.name for field in header.fields], header.end, data[offset:]) == (names, end, body)


def test_a_mailbox_line_becomes_a_field() -> None:
    header, _ = parse_header(b"From a\r\n>From b\r\nA: b\r\n\r\nx")
    expected = b"X-Mailbox-Line: From a\r\nX-Mailbox-Line: >From b\r\nA: b\r\n\r\n"
    assert header.changed and header.copy().changed
    assert header.encode(body_follows=True) == expected


def test_value_and_text() -> None:
    field = parse_header(b"Subject :\t Gr\xc3\xbc\xc3\x9fe\r\n an\x80\xff\nalle \r\n\r\n")[0].fields[0]
    assert field.name == "Subject"
    assert field.value == b"\t Gr\xc3\xbc\xc3\x9fe\r\n an\x80\xff\nalle "
    assert field.text == "Grüße an\udc80\udcff alle"


@pytest.mark.parametrize(
    ("value", "leading_space", "raw"),
    [
        ("b", True, b"X: b"),
        (" b", False, b"X: b"),
        ("", True, b"X: "),
        ("b\n\tc", True, b"X: b\r\n\tc"),
        ("b\r c\r\n d", True, b"X: b\r\n c\r\n d"),
        ("ü\udcff", True, b"X: \xc3\xbc\xff"),
        (b"\xff", False, b"X:\xff"),
    ],
)
def test_of(value: str | bytes, leading_space: bool, raw: bytes) -> None:
    field = HeaderField.of("X", value, leading_space=leading_space)
    assert (field.name, field.raw) == ("X", raw)
    assert parse_header(raw + b"\r\n\r\n")[0].fields == [field]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "b"),
        ("A B", "b"),
        ("A:", "b"),
        ("A\r\nB", "b"),
        ("A\n", "b"),
        ("É", "b"),
        ("A", "b\0"),
        ("A", "b\r\nBcc: x"),
        ("A", "b\nBcc: x"),
        ("A", "b\rBcc: x"),
        ("A", "b\r\n\r\n body"),
        ("A", "b\r\r\n c"),
        ("A", "b\r\n"),
        ("A", "\ud800"),
    ],
)
def test_injection_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError):
        HeaderField.of(name, value)


@given(NAMES, st.lists(st.sampled_from(["\r", "\n", " ", "\t", "x", "B: y", "\r\n"])).map("".join))
def test_what_is_made_is_one_field(name: str, value: str) -> None:
    try:
        field = HeaderField.of(name, value)
    except ValueError:
        return
    header, offset = parse_header(field.raw + b"\r\n\r\nbody")
    assert header.fields == [field]
    assert offset == len(field.raw) + 4


def made(*names: str) -> Header:
    return parse_header(b"".join(b"%s: %d\r\n" % (n.encode(), i) for i, n in enumerate(names)) + b"\r\n")[0]


def shown(header: Header) -> str:
    return " ".join(field.name + field.text for field in header.fields)


def test_lookups_disregard_case() -> None:
    header = made("A", "B", "a")
    assert [field.text for field in header.all("a")] == ["0", "2"]
    first = header.first("b")
    assert first is not None and first.text == "1"
    assert header.first("C") is None
    assert (header.count("A"), header.count("C")) == (2, 0)


@pytest.mark.parametrize(
    ("index", "result"), [(0, "Xx A0 B1"), (1, "A0 Xx B1"), (2, "A0 B1 Xx"), (99, "A0 B1 Xx"), (-1, "Xx A0 B1")]
)
def test_insert(index: int, result: str) -> None:
    header = made("A", "B")
    header.insert(index, HeaderField.of("X", "x"))
    assert shown(header) == result
    assert header.changed


@pytest.mark.parametrize(
    ("occurrence", "changed", "deleted"),
    [(0, "Xx B1 a2", "B1 a2"), (1, "Xx B1 a2", "B1 a2"), (2, "A0 B1 Xx", "A0 B1"), (3, "A0 B1 a2 Xx", "A0 B1 a2")],
)
def test_change_and_delete(occurrence: int, changed: str, deleted: str) -> None:
    header, other = made("A", "B", "a"), made("A", "B", "a")
    header.change("A", occurrence, HeaderField.of("X", "x"))
    assert shown(header) == changed
    assert other.delete("a", occurrence) is (occurrence < 3)
    assert shown(other) == deleted


def test_deletion_renumbers_at_once() -> None:
    header = made("A", "A", "A")
    assert header.delete("A", 1) and header.delete("A", 1)
    assert shown(header) == "A2"


def test_copy_changes_on_its_own() -> None:
    header = made("A")
    copied = header.copy()
    copied.append(HeaderField.of("B", "b"))
    assert (shown(header), shown(copied)) == ("A0", "A0 Bb")
    assert (header.changed, copied.changed, copied.copy().changed) == (False, True, True)


@pytest.mark.parametrize(
    ("data", "unchanged", "changed", "changed_no_body"),
    [
        (b"A: b\r\n\r\nx", b"A: b\r\n\r\n", b"A: b\r\nX: y\r\n\r\n", b"A: b\r\nX: y\r\n\r\n"),
        (b"A: b\r\nno field", b"A: b\r\n\r\n", b"A: b\r\nX: y\r\n\r\n", b"A: b\r\nX: y\r\n"),
        (b"A: b", b"A: b", b"A: b\r\nX: y\r\n\r\n", b"A: b\r\nX: y\r\n"),
        (b" fold", b"\r\n", b"X: y\r\n\r\n", b"X: y\r\n"),
    ],
)
def test_encode(data: bytes, unchanged: bytes, changed: bytes, changed_no_body: bytes) -> None:
    header, offset = parse_header(data)
    assert header.copy().encode(body_follows=offset < len(data)) == unchanged
    header.append(HeaderField.of("X", "y"))
    assert header.encode(body_follows=True) == changed
    assert header.encode(body_follows=False) == changed_no_body
    assert header.delete("X", 1) and not header.changed
    assert header.encode(body_follows=True) == unchanged


def test_a_made_header_ends_with_an_empty_line() -> None:
    assert Header([HeaderField.of("A", "b")]).encode(body_follows=True) == b"A: b\r\n\r\n"


@pytest.mark.parametrize(
    ("content", "too_big"),
    [
        (b"A: 1\r\nB: 2\r\n fold\r\n\tfold\r\n\r\nC: body\r\n", False),
        (b"A: 1\r\nB: 2\r\nC: 3\r\n\r\n", True),
        (b"From x\r\nFrom y\r\nA: 1\r\n\r\n", True),
        (b"A: 1\r\nB: 2\r\nno field\r\nC: body\r\n", False),
    ],
)
def test_too_many_fields(content: bytes, too_big: bool) -> None:
    """However it is cut; folds are no fields, and what follows the header does not count."""
    for size in range(1, len(content) + 1):
        reader = read([content[at : at + size] for at in range(0, len(content), size)], 1000, 2)
        assert (reader.too_big, reader.header is None) == (too_big, too_big), size
