"""Message content: its end, line ends and dots, against slow models that are plainly right."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.content import DataScanner, DotStuffer, DotUnstuffer, parse_bdat
from gateway.protocol.errors import LocalError, PeerError
from gateway.testing.splits import splits

POLICIES = ("reject", "normalize")

TOKENS = st.sampled_from([b"\r", b"\n", b".", b"a", b"\0", b"\r\n", b"..", b"\n.", b"\r\n.", b".\r\n", b"text"])
TANGLED = st.lists(TOKENS, max_size=40).map(b"".join)


@st.composite
def long_lines(draw: st.DrawFn) -> bytes:
    """Enough lines of equal length for the fast way, with something in front, behind, and maybe in between."""
    width = draw(st.integers(1, 100))
    count = draw(st.integers(2100 // (width + 2) + 1, 4000 // (width + 2) + 20))
    lines = bytearray((draw(st.sampled_from([b"x", b".", b"y."])) * width)[:width] + b"\r\n") * count
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(lines) - 1))
        lines[place : place + draw(st.integers(0, 2))] = draw(TOKENS)
    return draw(TANGLED) + draw(st.sampled_from([b"", b"\r\n"])) + bytes(lines) + draw(TANGLED)


WIRE = st.one_of(TANGLED, long_lines())


def model_end(wire: bytes) -> tuple[bytes, bytes] | None:
    """Content and rest, by the one rule: CRLF.CRLF, the first CRLF being DATA's own for an empty message."""
    content, end, rest = (b"\r\n" + wire).partition(b"\r\n.\r\n")
    return ((content + b"\r\n")[2:], rest) if end else None


def unstuffed(wire: bytes) -> bytes:
    return re.sub(rb"(?<=\r\n)\.", b"", b"\r\n" + wire)[2:]


def normalized(content: bytes) -> bytes:
    return re.sub(rb"(?<!\r)\n", b"\r\n", re.sub(rb"\r(?!\n)", b" ", content))


def stuffed(content: bytes) -> bytes:
    return re.sub(rb"(?<=\r\n)\.", b"..", b"\r\n" + content)[2:]


def first_bare(content: bytes) -> str | None:
    match = re.search(rb"\r(?!\n)|(?<!\r)\n", content)
    return None if match is None else "CR" if match[0] == b"\r" else "LF"


def scan(policy: str, pieces: list[bytes]) -> tuple[DataScanner, bytes, bool, bytes]:
    scanner, content = DataScanner(policy), b""
    for place, piece in enumerate(pieces):
        got = scanner.feed(piece)
        content += got.content
        if got.end:
            return scanner, content, True, got.rest + b"".join(pieces[place + 1 :])
    return scanner, content, False, b""


def ends_only_at_its_end(content: bytes) -> bool:
    """Whether even a reader that takes LF.LF, CR.CR, LF.CRLF and all other mixes finds no end in the content."""
    wire = b"\r\n" + content + b".\r\n"
    match = re.search(rb"(?:\r\n|\r|\n)\.(?:\r\n|\r|\n)", wire)
    return match is not None and match.end() == len(wire)


# What stands around the dot, whether DATA ends there, and what `normalize` makes of it.
AROUND_THE_DOT = [
    pytest.param(b"\n.\n", b"\r\n..\r\n", "LF", id="LF.LF"),
    pytest.param(b"\n.\r\n", b"\r\n..\r\n", "LF", id="LF.CRLF"),
    pytest.param(b"\r\n.\n", b"\r\n\r\n", "LF", id="CRLF.LF"),
    pytest.param(b"\r.\r", b" . ", "CR", id="CR.CR"),
    pytest.param(b"\r.\r\n", b" .\r\n", "CR", id="CR.CRLF"),
    pytest.param(b"\r\n.\rx", b"\r\n. x", "CR", id="CRLF.CR"),
    pytest.param(b"\r.\n", b" .\r\n", "CR", id="CR.LF"),
    pytest.param(b"\n.\r", b"\r\n.. ", "LF", id="LF.CR"),
    pytest.param(b"\r\n.\r\r\n", b"\r\n. \r\n", "CR", id="CRLF.CRCRLF"),
    pytest.param(b"\r\n.\n.\n", b"\r\n\r\n..\r\n", "LF", id="CRLF.LF.LF"),
    pytest.param(b"\r\n\0.\r\n", b"\r\n\0.\r\n", None, id="CRLF-NUL.CRLF"),
    pytest.param(b"\r\n.\0\r\n", b"\r\n.\0\r\n", None, id="CRLF.NUL-CRLF"),
    pytest.param(b"\r\n\0\r\n", b"\r\n\0\r\n", None, id="NUL-CRLF"),
    pytest.param(b"\r\n. \r\n", b"\r\n. \r\n", None, id="dot-blank"),
    pytest.param(b"\r\n.\t\r\n", b"\r\n.\t\r\n", None, id="dot-tab"),
    pytest.param(b"\r\n..\r\n", b"\r\n..\r\n", None, id="stuffed"),
    pytest.param(b"\x0b.\x0b", b"\x0b.\x0b", None, id="VT"),
    pytest.param(b"\x0c.\x0c", b"\x0c.\x0c", None, id="FF"),
    pytest.param(b"\x85.\x85", b"\x85.\x85", None, id="NEL"),
    pytest.param("\u2028.\u2028".encode(), "\u2028.\u2028".encode(), None, id="U+2028"),
]


@pytest.mark.parametrize(("middle", "normal", "bare"), AROUND_THE_DOT)
def test_what_does_not_end_data(middle: bytes, normal: bytes, bare: str | None) -> None:
    wire = b"a" + middle + b"MAIL FROM:<b@c>\r\n.\r\nQUIT\r\n"
    for policy, expected in (("reject", middle), ("normalize", normal)):
        for pieces in splits(wire):
            scanner, content, end, rest = scan(policy, pieces)
            assert (content, end, rest) == (b"a" + expected + b"MAIL FROM:<b@c>\r\n", True, b"QUIT\r\n")
            assert (scanner.bare, scanner.nul) == (bare, b"\0" in middle)
    assert ends_only_at_its_end(b"a" + normal + b"MAIL FROM:<b@c>\r\n")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("wire", "content", "rest"),
    [
        (b".\r\nRSET\r\n", b"", b"RSET\r\n"),
        (b"a\r\n.\r\n", b"a\r\n", b""),
        (b"\r\n.\r\n.\r\n", b"\r\n", b".\r\n"),
        (b"..\r\n...\r\n.\r\n", b"..\r\n...\r\n", b""),
        (b".a\r\n.\r\n", b".a\r\n", b""),
    ],
)
def test_end_of_data(policy: str, wire: bytes, content: bytes, rest: bytes) -> None:
    for pieces in splits(wire):
        scanner, *got = scan(policy, pieces)
        assert got == [content, True, rest]
        assert scanner.bare is None
        assert scanner.size == len(unstuffed(content))


@pytest.mark.parametrize(("policy", "content"), [("reject", b"a\r\r\n"), ("normalize", b"a \r\n")])
def test_crcrlf_dot_is_a_real_end_behind_a_stray_cr(policy: str, content: bytes) -> None:
    for pieces in splits(b"a\r\r\n.\r\nx"):
        scanner, *got = scan(policy, pieces)
        assert (got, scanner.bare) == ([content, True, b"x"], "CR")


def test_overlong_line_is_never_broken() -> None:
    wire = b"x" * 5000 + b".\r\n.\r\n"
    for policy in POLICIES:
        for size in (998, 1000, 2048, 4096, 4999, 5000, 5001):
            pieces = [wire[i : i + size] for i in range(0, len(wire), size)]
            assert scan(policy, pieces)[1:] == (wire[:-3], True, b"")


@pytest.mark.slow
@given(WIRE, st.sampled_from([b"", b"\r\n.\r\n", b"\r\n.\r\nQUIT\r\n"]), st.integers(0, 9))
def test_scanner_is_its_model_on_every_split(head: bytes, tail: bytes, seed: int) -> None:
    wire = head + tail
    model = model_end(wire)
    for policy in POLICIES:
        for pieces in splits(wire, seed):
            scanner, content, end, rest = scan(policy, pieces)
            assert end is (model is not None)
            if model is None:
                # What is not given yet is held back, and that is at most a dot and a CR.
                raw = wire[: len(wire) - len(scanner._held)]
                assert len(scanner._held) <= 2
            else:
                raw, model_rest = model
                assert rest == model_rest
            expected = raw if policy == "reject" else normalized(unstuffed(raw))
            assert (content if policy == "reject" else unstuffed(content)) == expected
            assert scanner.size == len(unstuffed(content))
            assert scanner.bare == first_bare(raw)
            assert scanner.nul is (b"\0" in raw)
            if policy == "normalize":
                assert first_bare(content) is None
                assert model is None or ends_only_at_its_end(content)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "block",
    [
        b"Subject: x\r\n\r\nbody\r\n",
        b"no line end at all",
        (b"A" * 76 + b"\r\n") * 100,
        b"half a line\r\n" + (b"A" * 76 + b"\r\n") * 100 + b"half a",
        b"text \xc3\xa9\xff\r\n..stuffed\r\n" * 200,
    ],
)
def test_clean_content_is_not_copied(policy: str, block: bytes) -> None:
    assert DataScanner(policy).feed(block).content is block
    if b".." not in block:
        assert DotStuffer(policy).feed(block) is block
        assert DotUnstuffer().feed(block) is block


@pytest.mark.parametrize("place", [0, 1, 76, 77, 78, 40 * 78 + 5, 40 * 78 + 76, 40 * 78 + 77, 79 * 78 + 77])
@pytest.mark.parametrize("octet", [b"\r", b"\n", b"."])
def test_one_wrong_octet_among_equal_lines_is_seen(place: int, octet: bytes) -> None:
    wire = bytearray((b"A" * 76 + b"\r\n") * 80)
    wire[place : place + 1] = octet
    raw = bytes(wire)
    for policy in POLICIES:
        scanner = DataScanner(policy)
        content = scanner.feed(raw + b"x\r\n.\r\n").content
        assert scanner.bare == first_bare(raw)
        assert content == (raw if policy == "reject" else normalized(raw)) + b"x\r\n"
        assert scanner.size == len(unstuffed(content))


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"a\r\n" + b".\r\n" * 900, id="equal lines that are the end"),
        pytest.param(b"a\n" + b".AAA\r\n" * 900, id="first of equal lines behind a bare LF"),
        pytest.param(b"a\r\n" + b"AAAA\r\n" * 900 + b".\r\n", id="end right behind equal lines"),
        pytest.param(b"a\r\n" + b"AAAA\r\n" * 900 + b"..a\r\n", id="dot right behind equal lines"),
        pytest.param(b".a\r\n" + b".AAA\r\n" * 900 + b"a\n.b", id="dots everywhere"),
    ],
)
def test_dots_around_equal_lines(wire: bytes) -> None:
    content, rest = model_end(wire) or (wire, b"")
    scanner, *got = scan("reject", [wire])
    assert got == [content, content != wire, rest]
    assert scanner.size == len(unstuffed(content))
    expected = stuffed(wire)
    assert stuff("reject", [wire])[1] == expected + b"\r\n" * (not expected.endswith(b"\r\n"))


def test_scanner_refuses_to_go_on_behind_the_end() -> None:
    scanner = DataScanner()
    assert scanner.feed(b".\r\n").end
    with pytest.raises(LocalError):
        scanner.feed(b"x")


@pytest.mark.parametrize("kind", [DataScanner, DotStuffer])
def test_unknown_policy(kind: type[DataScanner] | type[DotStuffer]) -> None:
    with pytest.raises(LocalError, match="postfix"):
        kind("postfix")


def stuff(policy: str, pieces: list[bytes]) -> tuple[DotStuffer, bytes]:
    stuffer = DotStuffer(policy)
    return stuffer, b"".join([*map(stuffer.feed, pieces), stuffer.finish()])


@pytest.mark.slow
@given(WIRE, st.integers(0, 9))
def test_stuffer_is_its_model_on_every_split(content: bytes, seed: int) -> None:
    for policy in POLICIES:
        expected = stuffed(normalized(content) if policy == "normalize" else content)
        if expected and not expected.endswith(b"\r\n"):
            expected += b"\r\n"
        for pieces in splits(content, seed):
            stuffer, wire = stuff(policy, pieces)
            assert wire == expected
            assert (stuffer.bare, stuffer.nul) == (first_bare(content), b"\0" in content)
            assert policy == "reject" or ends_only_at_its_end(wire)


@given(WIRE, st.integers(0, 9))
def test_unstuffer_takes_back_what_the_stuffer_did(content: bytes, seed: int) -> None:
    for pieces in splits(content, seed):
        unstuffer = DotUnstuffer()
        assert b"".join(map(unstuffer.feed, pieces)) == unstuffed(content)
    wire = stuff("normalize", [content])[1]
    assert DotUnstuffer().feed(wire) in (normalized(content), normalized(content) + b"\r\n")


@pytest.mark.parametrize(
    ("content", "wire"),
    [
        (b"", b""),
        (b"a", b"a\r\n"),
        (b"a\r\n", b"a\r\n"),
        (b".", b"..\r\n"),
        (b"a\r\n.\r\nb", b"a\r\n..\r\nb\r\n"),
        (b"a\n.\nb", b"a\r\n..\r\nb\r\n"),
        (b"a\r", b"a \r\n"),
        (b"a\r.\r", b"a . \r\n"),
    ],
)
def test_stuffing(content: bytes, wire: bytes) -> None:
    for pieces in splits(content):
        assert stuff("normalize", pieces)[1] == wire


def test_a_large_message_in_odd_blocks() -> None:
    random = Random(7)
    line = bytes(random.choice(b"ABCDEFGHIJ+/") for _ in range(76)) + b"\r\n"
    message = b"Subject: large\r\n.folded?\r\n\r\n" + line * 3000 + b"--end--\r\n"
    for policy in POLICIES:
        scanner, sizes, wire, out = DataScanner(policy), Random(3), message + b".\r\nNOOP\r\n", []
        while wire:
            size = sizes.randint(1, 70000)
            got = scanner.feed(wire[:size])
            out.append(got.content)
            wire = wire[size:]
            if got.end:
                assert got.rest + wire == b"NOOP\r\n"
                break
        assert b"".join(out) == message
        assert (scanner.size, scanner.bare) == (len(message) - 1, None)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (b"0 LAST", (0, True)),
        (b"5 last", (5, True)),
        (b"1000", (1000, False)),
        (b"9999999999  LAST", (9999999999, True)),
    ],
)
def test_bdat(argument: bytes, expected: tuple[int, bool]) -> None:
    assert parse_bdat(argument) == expected


@pytest.mark.parametrize(
    "argument",
    [b"", b"LAST", b"-1", b"+1", b"1_0", b"0x10", b"10000000000", b"5 LASTX", b"5 LAST 6", b"5LAST", "٣".encode()],
)
def test_bad_bdat(argument: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        parse_bdat(argument)
    assert caught.value.reply is not None
    assert caught.value.reply.startswith(b"501 5.5.4 ")
