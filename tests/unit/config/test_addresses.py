"""Addresses of listeners, servers and name servers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.addresses import (
    ListenUrl,
    Resolver,
    ServerUrl,
    parse_hostname,
    parse_listen_url,
    parse_resolver,
    parse_server_url,
)
from gateway.values import NotA


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("smtp://127.0.0.1:2587", ListenUrl("smtp", "127.0.0.1", 2587)),
        ("smtps://[::1]:465/", ListenUrl("smtps", "::1", 465)),
        ("smtp://*:25", ListenUrl("smtp", "", 25)),
        ("smtp://:25", ListenUrl("smtp", "", 25)),
        ("smtp://127.0.0.1:0", ListenUrl("smtp", "127.0.0.1", 0)),
        ("smtp://localhost:25", ListenUrl("smtp", "localhost", 25)),
        ("unix:/run/x", ListenUrl("smtp", path="/run/x")),
        ("smtps+unix:///run/x", ListenUrl("smtps", path="/run/x")),
        ("lmtp://127.0.0.1:24", ListenUrl("lmtp", "127.0.0.1", 24)),
        ("lmtp+unix:/run/x", ListenUrl("lmtp", path="/run/x")),
        ("imap://*:143", ListenUrl("imap", "", 143)),
        ("pop3s+unix:/run/x", ListenUrl("pop3s", path="/run/x")),
        ("imap://127.0.0.1:2000-2003", ListenUrl("imap", "127.0.0.1", 2000, last_port=2003)),
        ("pop3://[::1]:110-110/", ListenUrl("pop3", "::1", 110, last_port=110)),
        ("smtp+unix:/run/x:1-2", ListenUrl("smtp", path="/run/x:1-2")),
    ],
)
def test_listen(written: str, url: ListenUrl) -> None:
    assert parse_listen_url(written) == url
    assert parse_listen_url(str(url)) == url


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("smtp://mx.example.org", ServerUrl("smtp", "mx.example.org", 25)),
        ("smtps://mx.example.org", ServerUrl("smtps", "mx.example.org", 465)),
        ("mx:2525", ServerUrl("smtp", "mx", 2525)),
        ("10.0.0.1", ServerUrl("smtp", "10.0.0.1", 25)),
        ("[::1]:25", ServerUrl("smtp", "::1", 25)),
        ("smtp+unix:/run/x", ServerUrl("smtp", path="/run/x")),
        ("unix:/run/x", ServerUrl("smtp", path="/run/x")),
        ("lmtp://store", ServerUrl("lmtp", "store", 24)),
        ("lmtp+unix:/run/x", ServerUrl("lmtp", path="/run/x")),
        ("imap://store", ServerUrl("imap", "store", 143)),
        ("imaps://store", ServerUrl("imaps", "store", 993)),
        ("pop3://store", ServerUrl("pop3", "store", 110)),
        ("pop3s://[::1]", ServerUrl("pop3s", "::1", 995)),
        ("imap+unix:/run/x", ServerUrl("imap", path="/run/x")),
        ("embedded://var/mail", ServerUrl("embedded", path="var/mail")),
        ("embedded:///var/mail", ServerUrl("embedded", path="/var/mail")),
    ],
)
def test_server(written: str, url: ServerUrl) -> None:
    assert parse_server_url(written) == url
    assert parse_server_url(str(url)) == url


@pytest.mark.parametrize(
    ("scheme", "protocol", "implicit_tls"),
    [("smtp", "smtp", False), ("smtps", "smtp", True), ("lmtp", "lmtp", False), ("imap", "imap", False),
     ("imaps", "imap", True), ("pop3", "pop3", False), ("pop3s", "pop3", True)],
)  # fmt: skip
def test_protocols(scheme: str, protocol: str, implicit_tls: bool) -> None:
    for written in (f"{scheme}://x:1", f"{scheme}+unix:/x"):
        for url in (parse_listen_url(written), parse_server_url(written)):
            assert (url.protocol, url.implicit_tls) == (protocol, implicit_tls)
    assert parse_listen_url("unix:/x").protocol == parse_server_url("embedded://x").protocol == "smtp"


def test_ranges() -> None:
    url = parse_listen_url("imap://127.0.0.1:2000-2003")
    assert url.address == "127.0.0.1:2000-2003"
    assert [str(one) for one in url.urls()] == [f"imap://127.0.0.1:{port}" for port in (2000, 2001, 2002, 2003)]
    assert parse_listen_url("smtp://x:25").urls() == [ListenUrl("smtp", "x", 25)]
    assert parse_listen_url("smtp://x:25-25").urls() == [ListenUrl("smtp", "x", 25)]
    with pytest.raises(NotA):
        parse_server_url("imap://127.0.0.1:2000-2003")


def test_local_servers() -> None:
    for local in ("127.0.0.2", "[::1]", "localhost", "unix:/x", "embedded://x"):
        assert parse_server_url(local).local
    for remote in ("10.0.0.1", "mx.example.org", "[2001:db8::1]"):
        assert not parse_server_url(remote).local


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("milter://x:993", "scheme 'milter' is not available in this version; "
                           "write smtp, smtps, lmtp, imap, imaps, pop3 or pop3s"),
        ("lmtps://x:24", "LMTP has no TLS from the start; write lmtp"),
        ("lmtp:unix:/x", "'lmtp:unix:/x' is not how a listen address is written; write lmtp+unix:/x"),
        ("imap://unix:/x", "'imap://unix:/x' is not how a listen address is written; write imap+unix:/x"),
        ("lmtp:inet:x:24", "'lmtp:inet:x:24' is not how a listen address is written; write lmtp://x:24"),
        ("imap:x:143", "'imap:x:143' is not how a listen address is written; write imap://x:143"),
        ("x:993", "'x:993' has no scheme; write imaps://x:993"),
        ("smtp://x:30-20", "'smtp://x:30-20' is not a range of ports; "
                           "write the first and the last: smtp://x:2000-2003"),
        ("smtp://x:0-20", "'smtp://x:0-20' is not a range of ports; "
                          "write the first and the last: smtp://x:2000-2003"),
        ("lmtp://x:20-30", "'lmtp://x:20-30' is SMTP's port, where LMTP must not be spoken (RFC 2033 5); "
                           "write port 24"),
        ("x:25", "'x:25' has no scheme; write smtp://x:25"),
        ("smtps://x", "'smtps://x' has no port; write smtps://x:465"),
        ("lmtp://x", "'lmtp://x' has no port; write lmtp://x:24"),
        ("lmtp://x:25", "'lmtp://x:25' is SMTP's port, where LMTP must not be spoken (RFC 2033 5); write port 24"),
        ("smtp://x:", "'smtp://x:' is not a listen address; "
                      "write smtp://127.0.0.1:25, smtps://[::1]:465 or smtp+unix:/path"),
        ("smtp://x y:25", "'smtp://x y:25' has no valid host name; "
                          "write smtp://127.0.0.1:25, smtps://[::1]:465 or smtp+unix:/path"),
        ("unix:" + "/x" * 60, f"{'unix:' + '/x' * 60!r:.58}...' is longer than the 107 octets of a unix socket's path; "
                              "write a shorter path"),
        ("embedded://x", "'embedded://x' has the unknown scheme 'embedded'; "
                         "write smtp, smtps, lmtp, imap, imaps, pop3 or pop3s"),
        ("lmtp+unix:run/x", "'lmtp+unix:run/x' has no absolute path; write lmtp+unix:/path"),
        (25, "25 is not a listen address; write smtp://127.0.0.1:25, smtps://[::1]:465 or smtp+unix:/path"),
    ],
)  # fmt: skip
def test_listen_refusals(written: object, said: str) -> None:
    with pytest.raises(NotA) as caught:
        parse_listen_url(written)
    assert str(caught.value) == said


def test_passwords_in_addresses_are_not_quoted() -> None:
    with pytest.raises(NotA) as caught:
        parse_server_url("smtp://user:hunter2@mx")
    assert "hunter2" not in str(caught.value)
    for written in ("smtp://user:hunter2@x:9-1", "smtp:user:hunter2@x:1", "lmtp:unix:/hunter2@x"):
        with pytest.raises(NotA) as caught:
            parse_listen_url(written)
        assert "hunter2" not in str(caught.value), written


def test_resolvers_and_hostnames() -> None:
    assert parse_resolver("127.0.0.1") == Resolver("127.0.0.1", 53)
    assert parse_resolver("::1") == Resolver("::1", 53)
    assert str(parse_resolver("[::1]:5353")) == "[::1]:5353"
    for wrong in ("dns.example.org", "1.2.3.4:0", "", None, "1.2.3.4:99999"):
        with pytest.raises(NotA):
            parse_resolver(wrong)
    for name in ("mail.example.org", "localhost", "[192.0.2.1]", "[IPv6:2001:db8::1]"):
        assert parse_hostname(name) == name
    for wrong in ("a b", "-a.example", "a..b", "x" * 64, "[x]", "a\r\nb", "a\n", None):
        with pytest.raises(NotA):
            parse_hostname(wrong)


@given(st.text(alphabet="smtp:/[]@.*0129ab-_+uniexd \n\0é") | st.text())
def test_any_text_is_an_address_or_not_a(text: str) -> None:
    for parse in (parse_listen_url, parse_server_url, parse_resolver, parse_hostname):
        try:
            parse(text)
        except NotA as error:
            assert error.suggestion
