"""MIME structure: the parts Python's email package finds, the evasions it does not, and no care for how blocks are cut."""

from __future__ import annotations

import email
import email.message
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.protocol.headers import parse_header
from gateway.protocol.mime import Found, MimeLimits, MimeScanner, Part
from gateway.protocol.mime_fields import Defect, parse_content_field
from gateway.testing.splits import splits


def scan(pieces: list[bytes], header: bytes, limits: MimeLimits | None = None) -> tuple[list[Part], list[Found]]:
    scanner = MimeScanner(limits)
    parts = scanner.start(parse_header(header)[0])
    for piece in pieces:
        parts += scanner.feed(piece)
    parts += scanner.finish()
    return parts, scanner.defects


def scan_whole(data: bytes, limits: MimeLimits | None = None) -> tuple[list[Part], list[Found]]:
    offset = parse_header(data)[1]
    return scan([data[offset:]], data[:offset], limits)


def defects_of(data: bytes, limits: MimeLimits | None = None) -> dict[int, set[Defect]]:
    result: dict[int, set[Defect]] = {}
    for part, defect in scan_whole(data, limits)[1]:
        result.setdefault(part, set()).add(defect)
    return result


# The oracle: the same structure as Python's parser sees.


@dataclass
class Seen:
    content_type: str
    name: str | None
    depth: int


def oracle(message: email.message.Message, depth: int = 0) -> list[Seen]:
    seen = [Seen(message.get_content_type(), message.get_filename(), depth)]
    payload = message.get_payload()
    if isinstance(payload, list):
        for child in payload:
            assert isinstance(child, email.message.Message)
            seen += oracle(child, depth + 1)
    return seen


@dataclass
class Node:
    content_type: str
    name: str | None = None
    style: str = "quoted"
    children: list[Node] = field(default_factory=list)
    body: bytes = b""
    preamble: bytes = b""
    padding: bytes = b""


def parameter(attribute: str, name: str, style: str) -> bytes:
    if style == "quoted":
        return b'%s="%s"' % (
            attribute.encode(),
            name.encode("ascii", "replace").replace(b"\\", b"_").replace(b'"', b'\\"'),
        )
    percent = quote(name, safe="")
    if style == "extended":
        return b"%s*=utf-8''%s" % (attribute.encode(), percent.encode())
    assert style == "continued"
    cut = 3 if percent[:1] == "%" else 1
    last = percent[cut:] or '""'
    return f"{attribute}*1*={last};\r\n {attribute}*0*=UTF-8'en'{percent[:cut]}".encode()


def rendered(node: Node, depth: int = 0) -> bytes:
    boundary = b"b" + b"x" * depth  # each is the beginning of those within
    header = b"Content-Type: " + node.content_type.encode()
    if node.content_type.lower().startswith("multipart/"):
        header += b";\r\n\tboundary=" + boundary
        parts = [
            b"--" + boundary + node.padding + b"\r\n" + rendered(child, depth + 1) + b"\r\n" for child in node.children
        ]
        body = node.preamble + b"".join(parts) + b"--" + boundary + b"--" + node.padding + b"\r\n" + node.body
    elif node.children:
        body = rendered(node.children[0], depth + 1)
    else:
        body = node.body
    if node.name is not None and node.style == "content-type":
        header += b"; " + parameter("name", node.name, "quoted")
    elif node.name is not None:
        header += b"\r\nContent-Disposition: attachment; " + parameter("filename", node.name, node.style)
    return header + b"\r\nSubject: x\r\n\r\n" + body


BODY_LINES = st.sampled_from([b"", b"text", b"--", b"-- ", b"-b", b"--q", b"--\r--", b".", b"A: b", b" --b", b"x--b"])
BODIES = st.lists(BODY_LINES, max_size=4).map(b"\r\n".join)
FILE_NAMES = st.none() | st.text("abc.;= ()é日%'", min_size=1, max_size=8).filter(lambda name: name.strip() == name)
STYLES = st.sampled_from(["quoted", "extended", "continued", "content-type"])
LEAVES = st.builds(
    Node, st.sampled_from(["text/plain", "Text/HTML", "application/octet-stream"]), FILE_NAMES, STYLES, body=BODIES
)
NODES = st.recursive(
    LEAVES,
    lambda children: (
        st.builds(
            Node,
            st.sampled_from(["multipart/mixed", "multipart/alternative", "Multipart/Digest"]),
            FILE_NAMES,
            STYLES,
            st.lists(children, min_size=1, max_size=3),
            BODIES,
            BODIES.map(lambda body: body + b"\r\n"),
            st.sampled_from([b"", b" ", b"\t "]),
        )
        | st.builds(Node, st.just("message/rfc822"), FILE_NAMES, STYLES, st.lists(children, min_size=1, max_size=1))
    ),
    max_leaves=8,
)


@given(NODES)
def test_the_parts_that_python_finds(node: Node) -> None:
    data = rendered(node)
    seen = oracle(email.message_from_bytes(data))
    parts, defects = scan_whole(data)
    assert [(part.content_type, part.depth) for part in parts] == [(each.content_type, each.depth) for each in seen]
    assert [part.index for part in parts] == list(range(len(parts)))
    for part, each in zip(parts, seen, strict=True):
        assert each.name in part.names if each.name else not part.names
    assert defects == []


LINES = st.sampled_from(
    [
        b"--b", b"--b--", b"--bx", b"--bx--", b"--b ", b"--b junk", b"--", b"", b"", b"text", b" fold", b"From x",
        b"Content-Type: multipart/mixed; boundary=bx",
        b"Content-Type: multipart/mixed; boundary=b",
        b"Content-Type: message/rfc822",
        b"Content-Type: text/html; name=a.exe",
    ]
)  # fmt: skip
TANGLED = st.lists(LINES, max_size=16).map(b"\r\n".join)
ROOTS = st.sampled_from(
    [
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n",
        b"Content-Type: multipart/digest; boundary=bx\r\n\r\n",
        b"Content-Type: message/rfc822\r\n\r\n",
        b"Content-Type: multipart/mixed; boundary=b; boundary=bx\r\n\r\n",
    ]
)


@given(ROOTS, TANGLED)
def test_no_part_that_python_finds_is_missed(root: bytes, body: bytes) -> None:
    parts, defects = scan_whole(root + body)
    seen = oracle(email.message_from_bytes(root + body))
    missed = Counter(each.content_type.split()[0] for each in seen) - Counter(part.content_type for part in parts)
    missed += Counter(each.name.replace("\r\n", "") for each in seen if each.name) - Counter(
        n for p in parts for n in p.names
    )
    # Python skips any delimiter that follows a delimiter, even a closing one, and gives a boundary that is used
    # twice to the outer multipart.
    odd = {Defect.NO_SEPARATOR, Defect.REUSED_BOUNDARY} & {found.defect for found in defects}
    assert odd or not missed


@given(ROOTS, TANGLED, st.sampled_from([MimeLimits(), MimeLimits(2, 4, 30), MimeLimits(1, 100, 0)]))
@example(b"Content-Type: message/rfc822\r\n\r\n", b"", MimeLimits())
def test_cuts_make_no_difference(root: bytes, body: bytes, limits: MimeLimits) -> None:
    whole = scan([body], root, limits)
    for pieces in splits(body):
        parts, defects = scan(pieces, root, limits)
        assert parts == whole[0]
        assert sorted(defects, key=str) == sorted(whole[1], key=str)


MULTIPART = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"


@pytest.mark.parametrize(
    ("text", "names", "defective"),
    [
        ("attachment; filename=a.exe", ["a.exe"], False),
        ("attachment;filename = a.exe", ["a.exe"], False),
        ('attachment; FileName="a b;c.exe"; size=1', ["a b;c.exe"], False),
        ('attachment; filename="a\\"b.exe"', ['a"b.exe'], False),
        ('attachment; filename="C:\\x\\a.exe"', ["C:xa.exe", "C:\\x\\a.exe"], False),
        ("attachment; filename*=utf-8''%E6%97%A5.exe", ["日.exe"], False),
        ("attachment; filename*=ISO-8859-1'de'%FC.exe", ["ü.exe"], False),
        ("attachment; filename*0=a; filename*1=.exe", ["a.exe"], False),
        ("attachment; filename*1=.exe; filename*0*=utf-8''%61", ["a.exe"], False),
        ("attachment; filename=\"a.txt\"; filename*=utf-8''b.exe", ["a.txt", "b.exe"], False),
        ('attachment; filename="=?utf-8?B?YS5leGU=?="', ["=?utf-8?B?YS5leGU=?=", "a.exe"], False),
        ('attachment; filename="=?utf-8?Q?a=2E?= =?utf-8?q?e_xe?="', ["a.e xe"], False),
        ("attachment (x(y)\\)); filename=a.exe (b.txt)", ["a.exe"], False),
        ("attachment; filename=a(1).exe", ["a(1).exe", "a.exe"], False),
        ("attachment; filename=a.txt; filename=b.exe", ["a.txt", "b.exe"], True),
        ("attachment; filename=my file.exe", ["my file.exe"], True),
        ("attachment filename=a.exe", ["a.exe"], True),
        ('attachment; filename="a.exe', ["a.exe"], True),
        ('attachment; filename="a.txt; filename=b.exe', ["a.txt; filename=b.exe", "a.txt", "b.exe"], True),
        ('attachment; filename="a.txt""; filename=b.exe', ["b.exe"], True),
        ('attachment; x="\\"; filename=b.exe; y="', ["b.exe"], False),
        ('attachment; filename="a.txt".exe', ["a.txt.exe", "a.txt"], True),
        ('attachment; x="(";filename=b.exe;y=")"', ["b.exe"], False),
        ("attachment; filename*0=a; filename*0=b; filename*1=.exe", ["a.exe", "ab.exe"], True),
        ("attachment; filename*0=a.exe; filename*2=.txt", ["a.exe", "a.exe.txt"], True),
        ("attachment; filename*=a%2Eexe", ["a.exe"], True),
        ("attachment; filename*=no-such'en'a%2Eexe", ["a.exe"], True),
        ("attachment; filename*=base64''a%2Eexe", ["a.exe"], True),
        ("attachment; filename*=utf-8''a%2Eexe%zz", ["a.exe%zz"], True),
        ("attachment; filename", [], True),
        ("attachment; =a.exe", [], True),
        ('attachment; filename="=?utf-8?B?YQ?="', ["a"], False),
        ('attachment; filename="=?utf-8?B?YWJjZ?="', [], True),
    ],
)
def test_file_names(text: str, names: list[str], defective: bool) -> None:
    parts, defects = scan_whole(f"Content-Disposition: {text}\r\n\r\n".encode())
    assert set(names) <= set(parts[0].names)
    assert parts[0].disposition == "attachment"
    assert bool(defects) is defective


def test_file_name_of_content_type_comes_second() -> None:
    data = b'Content-Type: image/png; name="a.exe"\r\nContent-Disposition: inline; filename=b.png\r\n\r\n'
    assert scan_whole(data)[0][0].names == ("b.png", "a.exe")


def test_raw_octets_in_file_names() -> None:
    names = scan_whole(b'Content-Type: a/b; name="\xc3\xa9\xff.exe"\r\n\r\n')[0][0].names
    assert names == ("é\udcff.exe",)


@pytest.mark.parametrize(
    ("field", "content_types", "defect"),
    [
        (b"Content-Type: Text/HTML", ("text/html",), None),
        (b"Content-Type: text/html (x)", ("text/html",), None),
        (b"Content-Type: (x) text/html; a=b", ("text/html",), Defect.MALFORMED_FIELD),
        (b"Content-Type: text / html", ("text/html",), Defect.MALFORMED_FIELD),
        (b"Content-Type: text/html a=b", ("text/html",), Defect.MALFORMED_FIELD),
        (b"Content-Type : text/html", ("text/html",), Defect.MALFORMED_FIELD),
        (b"Content-Type: text/html;\r\n \r\n a=b", ("text/html",), Defect.MALFORMED_FIELD),
        (b"Content-Type: html", ("text/plain",), Defect.MALFORMED_FIELD),
        (b"Content-Type:", ("text/plain",), Defect.MALFORMED_FIELD),
        (b"Content-Type: ; name=x", ("text/plain",), Defect.MALFORMED_FIELD),
        (b"content-type: a/b\r\nContent-Type: c/d", ("a/b", "c/d"), Defect.DUPLICATE_FIELD),
        (b"Content-Disposition: inline\r\nContent-Disposition: x", ("text/plain",), Defect.DUPLICATE_FIELD),
        (b"Content-Type: a/b; c=d; c=e", ("a/b",), Defect.DUPLICATE_PARAMETER),
        (b"Subject: \0", ("text/plain",), Defect.NUL),
        (b"Subject: a\rb", ("text/plain",), Defect.BARE_CR),
        (b"Subject: a\nb", ("text/plain",), Defect.BARE_LF),
    ],
)
def test_fields(field: bytes, content_types: tuple[str, ...], defect: Defect | None) -> None:
    parts, defects = scan_whole(field + b"\r\n\r\n")
    assert set(content_types) <= set(parts[0].content_types)
    assert (defect in parts[0].defects) if defect else not defects


@pytest.mark.parametrize("encoding", ["7bit", "8BIT", "binary", None, "base64", "quoted-printable"])
def test_composites_with_an_encoding(encoding: str | None) -> None:
    field = f"Content-Transfer-Encoding: {encoding}\r\n".encode() if encoding else b""
    part, *_ = scan_whole(field + MULTIPART + b"--b\r\n\r\n--b--")[0]
    assert part.encoding == (encoding or "7bit").lower()
    assert (Defect.ENCODED_COMPOSITE in part.defects) is (encoding in ("base64", "quoted-printable"))


LONG = b"y" * 71
CHILD = b"Content-Type: a/b\r\n\r\nx\r\n"


@pytest.mark.parametrize(
    ("data", "types", "defects"),
    [
        (b"Content-Type: multipart/mixed\r\n\r\n--b\r\n" + CHILD + b"--b--", "multipart/mixed", {Defect.NO_BOUNDARY}),
        (b"Content-Type: multipart/mixed; boundary=\"\"\r\n\r\n--\r\n" + CHILD, "multipart/mixed", {Defect.NO_BOUNDARY}),
        (MULTIPART + b"--b\r\n" + CHILD, "multipart/mixed a/b", {Defect.UNCLOSED}),
        (MULTIPART, "multipart/mixed", {Defect.UNCLOSED}),
        (MULTIPART + b"--b\r\n" + CHILD + b"--b-- \t", "multipart/mixed a/b", set()),
        (MULTIPART + b"--b \r\n" + CHILD + b"--bx\r\n" + CHILD + b"--b--", "multipart/mixed a/b a/b", {Defect.JUNK_BEHIND_BOUNDARY}),
        (MULTIPART + b"--b\r\n" + CHILD + b"--b--\r\n--b\r\n" + CHILD, "multipart/mixed a/b a/b", {Defect.PART_BEHIND_END}),
        (MULTIPART + b"--b\r\nno field\r\n--b--", "multipart/mixed text/plain", set()),
        (
            b"Content-Type: multipart/mixed; boundary=" + LONG + b"\r\n\r\n--" + LONG + b"\r\n" + CHILD + b"--" + LONG + b"--",
            "multipart/mixed a/b",
            {Defect.LONG_BOUNDARY},
        ),
        (
            b"Content-Type: multipart/mixed; boundary=q; boundary=b\r\n\r\n--b\r\n" + CHILD + b"--q\r\n" + CHILD + b"--b--",
            "multipart/mixed a/b a/b",
            {Defect.DUPLICATE_PARAMETER},
        ),
        (
            b"Content-Type: text/plain\r\n" + MULTIPART + b"--b\r\n" + CHILD + b"--b--",
            "text/plain a/b",
            {Defect.DUPLICATE_FIELD},
        ),
        (b"Content-Type: multipart/mixed; boundary=b\r\n--b\r\n" + CHILD + b"--b--", "multipart/mixed a/b", {Defect.NO_SEPARATOR}),
        (b"Content-Type: multipart/mixed; boundary*0=b; boundary*1=c\r\n\r\n--bc\r\n" + CHILD + b"--bc--", "multipart/mixed a/b", set()),
        (b"Content-Type: multipart/mixed; boundary*=''%62\r\n\r\n--b\r\n" + CHILD + b"--b--", "multipart/mixed a/b", set()),
        (b"Content-Type: multipart/mixed; boundary=\"b:c\"\r\n\r\n--b:c\r\n--b:c--", "multipart/mixed text/plain", set()),
        (b"Content-Type: message/rfc822\r\n\r\nFrom x\r\n" + CHILD, "message/rfc822 a/b", set()),
        (b"Content-Type: message/rfc822\r\n\r\n", "message/rfc822 text/plain", set()),
    ],
)  # fmt: skip
def test_evasions(data: bytes, types: str, defects: set[Defect]) -> None:
    parts, _ = scan_whole(data)
    assert " ".join(part.content_type for part in parts) == types
    assert defects_of(data).get(0, set()) == defects


def test_a_closed_inner_boundary_does_not_hide_the_outer() -> None:
    inner = b"--b\r\n" + MULTIPART + b"--b\r\n" + CHILD + b"--b--\r\n"
    parts, defects = scan_whole(MULTIPART + inner + b"--b\r\n" + CHILD + b"--b--\r\n")
    assert [(part.content_type, part.depth) for part in parts] == [
        ("multipart/mixed", 0), ("multipart/mixed", 1), ("a/b", 2), ("a/b", 1),
    ]  # fmt: skip
    assert defects == [Found(1, Defect.REUSED_BOUNDARY)]


def test_an_outer_delimiter_ends_inner_parts() -> None:
    inner = b"Content-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n" + CHILD
    parts, defects = scan_whole(MULTIPART + b"--b\r\n" + inner + b"--b\r\n" + CHILD + b"--b--")
    assert [part.depth for part in parts] == [0, 1, 2, 1]
    assert defects == [Found(1, Defect.UNCLOSED)]


def nested(levels: int) -> bytes:
    return b"".join(
        b"Content-Type: multipart/mixed; boundary=n%d.\r\n\r\n--n%d.\r\n" % (level, level) for level in range(levels)
    )


@pytest.mark.parametrize(
    ("data", "limits", "count", "found"),
    [
        (nested(5), MimeLimits(depth=3), 4, Found(3, Defect.OVER_DEPTH)),
        (b"Content-Type: message/rfc822\r\n\r\n" * 5, MimeLimits(depth=3), 4, Found(3, Defect.OVER_DEPTH)),
        (b"Content-Type: message/rfc822\r\n\r\n" * 5, MimeLimits(parts=3), 3, Found(2, Defect.OVER_PARTS)),
        (MULTIPART + b"--b\r\n\r\n" * 5, MimeLimits(parts=3), 3, Found(0, Defect.OVER_PARTS)),
        (MULTIPART + b"--b--\r\n" * 50, MimeLimits(parts=3), 1, Found(0, Defect.OVER_PARTS)),
        (MULTIPART + b"--b\r\nA: b\r\n\r\n", MimeLimits(part_header=6), 2, None),
        (MULTIPART + b"--b\r\nA: bc\r\n\r\n", MimeLimits(part_header=6), 2, Found(1, Defect.OVER_HEADER)),
        (MULTIPART + b"--b\r\nA: b\r\n c\r\n\r\n", MimeLimits(part_header=6), 2, Found(1, Defect.OVER_HEADER)),
        (MULTIPART + b"--b\r\n" + b"x" * 1000, MimeLimits(part_header=6), 2, Found(1, Defect.OVER_HEADER)),
        (MULTIPART + b"--b\r\nHi you" + b"x" * 1000, MimeLimits(part_header=6), 2, Found(1, Defect.NO_SEPARATOR)),
    ],
)
def test_limits(data: bytes, limits: MimeLimits, count: int, found: Found | None) -> None:
    parts, defects = scan_whole(data, limits)
    assert len(parts) == count
    assert [each for each in defects if each.defect is not Defect.UNCLOSED] == ([found] if found else [])


def test_a_part_comes_as_soon_as_its_header_is_complete() -> None:
    scanner = MimeScanner()
    assert len(scanner.start(parse_header(MULTIPART)[0])) == 1
    assert scanner.feed(b"preamble\r\n--b\r\nContent-Type: a/b\r\n") == []
    assert [part.content_type for part in scanner.feed(b"\r\n")] == ["a/b"]
    assert scanner.feed(b"body\r\n--b--\r\n") == scanner.finish() == []
    assert scanner.defects == []


def test_what_is_held_is_bounded() -> None:
    scanner = MimeScanner(MimeLimits(part_header=1000))
    scanner.start(parse_header(MULTIPART)[0])
    scanner.feed(b"--b\r\nA: ")
    for block in [b"x" * 400] * 20 + [b"\r\n--b", *[b" " * 400] * 20, b"\r\n\r\n", *[b"\r\n--"] * 50]:
        scanner.feed(block)
        assert len(scanner._held) + len(scanner._collected or b"") < 1000 + 400


@pytest.mark.parametrize(
    "octets", [b'\\"' * 15_000, b"(" * 30_000, b" " * 30_000 + b"b", b"=?a?q?" * 5_000, b'a="\\' * 7_000]
)
def test_hostile_fields_are_read(octets: bytes) -> None:
    assert parse_content_field("a/b; name=x" + octets.decode()).values == ["a/b"]
