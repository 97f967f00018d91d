"""Command lines, envelope addresses and parameters, and lines that are no SMTP."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.smtp import (
    PARAMETER_EXTENSION,
    domain_of,
    format_mail,
    format_rcpt,
    local_of,
    looks_like,
    parse_command,
    parse_mail,
    parse_rcpt,
)

L64, L65 = "l" * 64, "l" * 65
LONG_DOMAIN = ".".join(["d" * 61] * 3)  # 185 octets


@pytest.mark.parametrize(
    ("line", "verb", "argument"),
    [
        (b"DATA", "DATA", b""),
        (b"data", "DATA", b""),
        (b"dAtA", "DATA", b""),
        (b"QUIT  ", "QUIT", b""),
        (b"RSET\t", "RSET", b""),
        (b"EHLO mx.example.org ", "EHLO", b"mx.example.org"),
        (b"MAIL FROM:<a@b> SIZE=1", "MAIL", b"FROM:<a@b> SIZE=1"),
        (b"AUTH  PLAIN  =", "AUTH", b"PLAIN  ="),
        (b"xyzzy plugh", "XYZZY", b"plugh"),
        (b"RCPT TO:<\xc3\xa9@b>", "RCPT", b"TO:<\xc3\xa9@b>"),
    ],
)
def test_parse_command(line: bytes, verb: str, argument: bytes) -> None:
    command = parse_command(line)
    assert (command.verb, command.argument, command.line) == (verb, argument, line)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" ",
        b" NOOP",
        b"\0",
        b"NOOP\0",
        b"NO\x01OP",
        b"EHLO a\tb",
        b"EHLO a\x7f",
        b"\xc3\xa9",
        b"DATA\r",
        b"RCPT \xff\0",
    ],
)
def test_bad_command(line: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        parse_command(line)
    assert caught.value.reply is not None
    assert caught.value.reply.startswith(b"500 5.5.2 ")


def test_repr_hides_the_argument() -> None:
    assert "AHQAcHc=" not in repr(parse_command(b"AUTH PLAIN AHQAcHc="))


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"GET / HTTP/1.1", "HTTP"),
        (b"POST /x HTTP/1.0", "HTTP"),
        (b"CONNECT a:25 HTTP/1.1", "HTTP"),
        (b"PRI * HTTP/2.0", "HTTP"),
        (b"Subject: x", "header"),
        (b"User-Agent: y", "header"),
        (b"X-A:", "header"),
        (b"\x16\x03\x01\x02\x00\x01", "TLS hello"),
        (b"\x16\x03\x09\x02", None),
        (b"GET", None),
        (b"MAIL FROM:<a@b>", None),
        (b"NOOP", None),
        (b": x", None),
        (b"", None),
    ],
)
def test_looks_like(line: bytes, kind: str | None) -> None:
    assert looks_like(line) == kind


GOOD = [
    ("<a@b>", "a@b"),
    ("<A.b+c=d@Example.ORG>", "A.b+c=d@Example.ORG"),
    (" <a@b>", "a@b"),
    ("a@b", "a@b"),
    ('<"a b"@c>', '"a b"@c'),
    ('<"a>\\" b@c"@d.e>', '"a>\\" b@c"@d.e'),
    ('<""@c>', '""@c'),
    ("<@a,@b:user@x>", "user@x"),
    ("<@a.b:user@x>", "user@x"),
    ("<a@[192.0.2.1]>", "a@[192.0.2.1]"),
    ("<a@[IPv6:2001:db8::1]>", "a@[IPv6:2001:db8::1]"),
    ("<a@[ipv6:::ffff:192.0.2.1]>", "a@[ipv6:::ffff:192.0.2.1]"),
    ("<a..b@c>", "a..b@c"),
    (f"<{L64}@b>", f"{L64}@b"),
    (f"<a@{LONG_DOMAIN}>", f"a@{LONG_DOMAIN}"),
    ("<a%b!c@d_e.f-g.h1>", "a%b!c@d_e.f-g.h1"),
]


@pytest.mark.parametrize(("path", "address"), GOOD)
def test_addresses(path: str, address: str) -> None:
    mail, rcpt = parse_mail(b"FROM:" + path.encode()), parse_rcpt(b"to:" + path.encode() + b" NOTIFY=NEVER")
    assert (mail.address, rcpt.address) == (address, address)
    assert parse_mail(format_mail(address)[5:]).address == address
    assert mail.line == b"FROM:" + path.encode()


BAD = [
    "",
    "<",
    "<a@b",
    "a@b>",
    "<a@b>x",
    "<a@b><c@d>",
    "<<a@b>>",
    "<a b@c>",
    "<a@b c>",
    "<a@>",
    "<@b>",
    "<@a:>",
    "<@a,b:c@d>",
    "<a@b@c>",
    "<a@.b>",
    "<a@b.>",
    "<a@b..c>",
    "<a@-b>",
    "<a@b->",
    '<"a"b@c>',
    '<"a@c>',
    "<a@[192.0.2.256]>",
    "<a@[192.0.2.1>",
    "<a@[IPv6:2001:db8::g]>",
    "<a@[IPv6:fe80::1%eth0]>",
    "<a@[x400:y]>",
    "<a@b(comment)>",
    "<a@b,c@d>",
    f"<{L65}@b>",
    f"<a@{'d' * 64}.e>",
    f"<{L64}@{LONG_DOMAIN}.{'d' * 10}>",
    "<nobody>",
]


@pytest.mark.parametrize("path", BAD)
def test_bad_addresses(path: str) -> None:
    for parse, start in ((parse_mail, b"501 5.1.7 "), (parse_rcpt, b"501 5.1.3 ")):
        with pytest.raises(PeerError) as caught:
            parse((b"FROM:" if parse is parse_mail else b"TO:") + path.encode())
        assert caught.value.reply is not None
        assert caught.value.reply.startswith(start)


@pytest.mark.parametrize("path", [" <a@b>", "a@b", "<a..b@c>", "<.a@c>", "<a.@c>"])
def test_strict_refuses_what_postfix_takes(path: str) -> None:
    parse_mail(b"FROM:" + path.encode())
    with pytest.raises(PeerError):
        parse_mail(b"FROM:" + path.encode(), strict=True)
    assert parse_rcpt(b"TO:<a.b@c>", strict=True).address == "a.b@c"


def test_null_sender_and_postmaster() -> None:
    assert parse_mail(b"FROM:<>").address == ""
    assert parse_mail(b"FROM:<> AUTH=<>").parameters == (("AUTH", "<>"),)
    assert parse_rcpt(b"TO:<Postmaster>").address == "Postmaster"
    for bad in (b"TO:<>", b"TO:<a>", b"FROM:<a@b>", b"TO <a@b>", b"TO:Name <a@b>"):
        with pytest.raises(PeerError):
            parse_rcpt(bad)
    with pytest.raises(PeerError):
        parse_mail(b"FROM:<postmaster>")


@pytest.mark.parametrize(
    ("argument", "parameters"),
    [
        (b"FROM:<a@b>  size=10  body=8bitmime ", (("SIZE", "10"), ("BODY", "8bitmime"))),
        (b"FROM:<a@b> SMTPUTF8 REQUIRETLS", (("SMTPUTF8", None), ("REQUIRETLS", None))),
        (b"FROM:<a@b> RET=HDRS ENVID=QQ+2B314", (("RET", "HDRS"), ("ENVID", "QQ+2B314"))),
        (b"FROM:<a@b> AUTH=e+3Dmc2@x", (("AUTH", "e+3Dmc2@x"),)),
        (b"FROM:<a@b> XVERP X-NEW=a+b", (("XVERP", None), ("X-NEW", "a+b"))),
        (b"FROM:<a@b> BY=120;R", (("BY", "120;R"),)),
    ],
)
def test_mail_parameters(argument: bytes, parameters: tuple[tuple[str, str | None], ...]) -> None:
    assert parse_mail(argument).parameters == parameters
    assert parse_mail(format_mail("a@b", parameters)[5:]).parameters == parameters


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        (b"SIZE=1 size=2", b"501 5.5.4"),
        (b"SIZE", b"501 5.5.4"),
        (b"SIZE=", b"501 5.5.4"),
        (b"SIZE=-1", b"501 5.5.4"),
        (b"SIZE=123456789012345678901", b"501 5.5.4"),
        ("SIZE=\u0663".encode(), b"501 5.5.4"),
        (b"BODY=9BIT", b"501 5.5.4"),
        (b"SMTPUTF8=yes", b"501 5.5.4"),
        (b"AUTH", b"501 5.5.4"),
        (b"AUTH=a+2", b"501 5.5.4"),
        (b"RET=NONE", b"501 5.5.4"),
        (b"ENVID=" + b"x" * 101, b"501 5.5.4"),
        (b"REQUIRETLS=1", b"501 5.5.4"),
        (b"X=a=b", b"501 5.5.4"),
        (b"=a", b"501 5.5.4"),
        (b"-a", b"501 5.5.4"),
        (b"NOTIFY=NEVER", b"555 5.5.4"),
    ],
)
def test_bad_mail_parameters(parameters: bytes, code: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        parse_mail(b"FROM:<a@b> " + parameters)
    assert caught.value.reply is not None
    assert caught.value.reply.startswith(code)


@pytest.mark.parametrize(
    ("parameters", "good"),
    [
        (b"NOTIFY=SUCCESS,delay", True),
        (b"NOTIFY=NEVER,DELAY", False),
        (b"NOTIFY=", False),
        (b"ORCPT=rfc822;a+2Bb@c", True),
        (b"ORCPT=a@c", False),
        (b"ORCPT=rfc822;" + b"a" * 500, False),
        (b"SIZE=1", False),
    ],
)
def test_rcpt_parameters(parameters: bytes, good: bool) -> None:
    if good:
        assert len(parse_rcpt(b"TO:<a@b> " + parameters).parameters) == 1
        return
    with pytest.raises(PeerError):
        parse_rcpt(b"TO:<a@b> " + parameters)


UTF8 = "<d\u00f6rte@\u0909\u0926\u093e\u0939\u0930\u0923.\u092a\u0930\u0940\u0915\u094d\u0937\u093e>".encode()


def test_smtputf8() -> None:
    assert parse_mail(b"FROM:" + UTF8 + b" SMTPUTF8").address == UTF8.decode()[1:-1]
    assert parse_rcpt(b"TO:" + UTF8, utf8=True).address == UTF8.decode()[1:-1]
    assert format_rcpt(UTF8.decode()[1:-1]) == b"RCPT TO:" + UTF8
    with pytest.raises(PeerError) as caught:
        parse_mail(b"FROM:" + UTF8)
    assert str(caught.value.reply).startswith("b'550 5.6.7")
    with pytest.raises(PeerError):
        parse_mail(b"FROM:" + UTF8 + b" SMTPUTF8", smtputf8_known=False)
    with pytest.raises(PeerError) as caught:
        parse_rcpt(b"TO:" + UTF8)
    assert str(caught.value.reply).startswith("b'553 5.6.7")


@pytest.mark.parametrize(
    "inside", [b"\xff", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b"\n", b"\xc2\x85", b"\xe2\x80\xa8"]
)
def test_no_invalid_utf8_and_no_control_character(inside: bytes) -> None:
    for at in (b"<a" + inside + b"@b>", b'<"a' + inside + b'"@b>', b"<a@b" + inside + b">", b"<a@b> X=" + inside):
        with pytest.raises(PeerError):
            parse_mail(b"FROM:" + at + b" SMTPUTF8")
        with pytest.raises(PeerError):
            parse_rcpt(b"TO:" + at, utf8=True)


@pytest.mark.parametrize(
    ("address", "parameters"),
    [
        ("a@b>\r\nDATA", ()),
        ("a b@c", ()),
        ("a@b> SIZE=1", ()),
        ("a\u2028@b", ()),
        ("a@b", (("SIZE", "1\r\nDATA"),)),
        ("a@b", (("SI ZE", "1"),)),
        ("a@b", (("X", ""),)),
    ],
)
def test_format_says_one_command(address: str, parameters: tuple[tuple[str, str | None], ...]) -> None:
    for format_line in (format_mail, format_rcpt):
        with pytest.raises(LocalError):
            format_line(address, parameters)


def test_format() -> None:
    assert format_mail("") == b"MAIL FROM:<>"
    assert format_mail("a@b", [("SIZE", "10"), ("SMTPUTF8", None)]) == b"MAIL FROM:<a@b> SIZE=10 SMTPUTF8"
    with pytest.raises(LocalError):
        format_rcpt("")


@pytest.mark.parametrize(
    ("address", "local", "domain"),
    [
        ("A@Example.ORG", "A", "example.org"),
        ("", "", ""),
        ("Postmaster", "Postmaster", ""),
        ('"a@b"@C', '"a@b"', "c"),
        ('"a@b"', '"a@b"', ""),
        ("a@[IPv6:2001:DB8::1]", "a", "[ipv6:2001:db8::1]"),
    ],
)
def test_parts_of_an_address(address: str, local: str, domain: str) -> None:
    assert (local_of(address), domain_of(address)) == (local, domain)


def test_each_extension_is_a_keyword() -> None:
    assert all(word == word.upper() for pair in PARAMETER_EXTENSION.items() for word in pair)
    assert (PARAMETER_EXTENSION["BODY"], PARAMETER_EXTENSION["ORCPT"]) == ("8BITMIME", "DSN")


SOUP = st.lists(
    st.sampled_from(
        [*'<>@"\\.,:;[]= \0\r\n\x85', "a", "b.c", "FROM:", "TO:", "SIZE=", "IPv6:", "\u00e9", " SMTPUTF8", "1"]
    ),
    max_size=24,
).map("".join)


@given(st.one_of(SOUP.map(str.encode), st.binary(max_size=30)))
def test_any_line_is_read_or_refused_and_reads_back(line: bytes) -> None:
    for prefix, parse, format_line in ((b"FROM:", parse_mail, format_mail), (b"TO:", parse_rcpt, format_rcpt)):
        for argument in (line, prefix + line, prefix + b"<a" + line + b"@b> SMTPUTF8"):
            try:
                parsed = parse(argument, True)
            except PeerError as error:
                assert error.reply is not None
                assert error.reply.isascii()
                continue
            wire = format_line(parsed.address, parsed.parameters)
            assert not set(wire) & set(b"\r\n\0")
            again = parse(wire[5:], True)
            assert (again.address, again.parameters) == (parsed.address, parsed.parameters)
    try:
        parse_command(line)
    except PeerError as error:
        assert error.reply is not None
