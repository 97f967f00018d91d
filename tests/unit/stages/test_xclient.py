from __future__ import annotations

import pytest

from gateway import Cause, Listener, Refuse, Session
from gateway.testing.peer import ScriptedPeer
from stages.xclient import Xclient, XclientSettings

ALL = {"XCLIENT": "NAME ADDR PORT PROTO HELO LOGIN REVERSE_NAME DESTADDR DESTPORT"}
HEAD = b"XCLIENT ADDR=192.0.2.7 "


def make_session(address: str = "192.0.2.7", status: str = "", name: str = "", reverse: str = "") -> Session:
    session = Session("ID", "p", Listener("smtp://198.51.100.25:25"), (address, 52001), ("198.51.100.25", 25), 0.0)
    session.helo, session.esmtp = "client.example", True
    session.client.name_status, session.client.name, session.client.reverse_name = status, name, reverse
    return session


def make_stage(**settings: object) -> Xclient:
    stage = Xclient(XclientSettings.model_validate(settings))
    stage.id = "xclient"
    return stage


@pytest.mark.parametrize(
    ("status", "name", "reverse", "sent"),
    [
        ("ok", "a.example", "a.example", b"NAME=a.example REVERSE_NAME=a.example"),
        ("unavailable", "", "ptr.example", b"NAME=[UNAVAILABLE] REVERSE_NAME=ptr.example"),
        ("unavailable", "", "", b"NAME=[UNAVAILABLE] REVERSE_NAME=[UNAVAILABLE]"),
        ("tempunavail", "", "", b"NAME=[TEMPUNAVAIL] REVERSE_NAME=[TEMPUNAVAIL]"),
        ("", "", "", b"NAME=[UNAVAILABLE] REVERSE_NAME=[UNAVAILABLE]"),
        ("unavailable", "", "bad name\r\nX", b"NAME=[UNAVAILABLE] REVERSE_NAME=[UNAVAILABLE]"),
    ],
)
@pytest.mark.anyio
async def test_says_everything_in_one_command(status: str, name: str, reverse: str, sent: bytes) -> None:
    peer = ScriptedPeer(ALL, ["220 mx.example ESMTP", "250 mx.example"])
    session = make_session("192.0.2.7", status, name, reverse)
    session.typed_user = "tim+x=y@b.example"
    assert await make_stage().upstream_ready(session, peer) is None
    assert peer.lines == [
        HEAD + sent + b" PORT=52001 PROTO=ESMTP HELO=client.example LOGIN=tim+2Bx+3Dy@b.example"
        b" DESTADDR=198.51.100.25 DESTPORT=25",
        b"EHLO client.example",
    ]
    assert peer.speaks_for_client


@pytest.mark.anyio
async def test_sends_only_what_is_offered() -> None:
    peer = ScriptedPeer({"XCLIENT": "name addr"}, ["250 ok"])
    session = make_session("2001:db8::7")
    session.typed_user = "tim"
    assert await make_stage().upstream_ready(session, peer) is None
    assert peer.lines[0] == b"XCLIENT ADDR=IPV6:2001:db8::7 NAME=[UNAVAILABLE]"


@pytest.mark.anyio
async def test_login_can_be_kept_back_and_identity_overrides() -> None:
    session = make_session()
    session.typed_user, session.identity = "typed", "inner"
    for login, sent in ((True, True), (False, False)):
        peer = ScriptedPeer(ALL)
        await make_stage(login=login).upstream_ready(session, peer)
        assert (b"LOGIN=inner" in peer.lines[0]) is sent
        assert b"typed" not in peer.lines[0]


@pytest.mark.anyio
async def test_a_unix_client_has_no_address() -> None:
    peer = ScriptedPeer(ALL)
    session = make_session("unix:")
    session.client.port, session.local = 0, ("unix:", 0)
    await make_stage().upstream_ready(session, peer)
    assert b"ADDR=[UNAVAILABLE] NAME=[UNAVAILABLE]" in peer.lines[0]
    assert b"PORT" not in peer.lines[0]


@pytest.mark.anyio
async def test_before_helo_nothing_is_said_of_it() -> None:
    peer = ScriptedPeer(ALL)
    session = make_session()
    session.helo = ""
    await make_stage().upstream_ready(session, peer)
    assert b"HELO" not in peer.lines[0] and b"PROTO" not in peer.lines[0]
    assert peer.lines[1] == b"EHLO gateway.example"


@pytest.mark.parametrize("reply", ["554 5.7.1 rejected", "521 5.7.1 no", "421 4.3.0 busy", "450 4.7.25 name?"])
@pytest.mark.anyio
async def test_a_refusal_for_a_greeting_is_the_clients(reply: str) -> None:
    refuse = await make_stage().upstream_ready(make_session(), ScriptedPeer(ALL, [reply]))
    assert isinstance(refuse, Refuse) and refuse.reply is not None
    assert f"{refuse.reply.code} {refuse.reply.text}" == reply
    assert refuse.disconnect is reply.startswith("421")


@pytest.mark.parametrize("reply", ["550 5.7.0 insufficient authorization", "501 x", "503 x", "500 x", "502 x"])
@pytest.mark.anyio
async def test_a_refused_command_is_ours(reply: str) -> None:
    refuse = await make_stage().upstream_ready(make_session(), ScriptedPeer(ALL, [reply]))
    assert isinstance(refuse, Refuse) and refuse.cause is Cause.UPSTREAM_MISCONFIGURED and refuse.temporary
    assert refuse.reply is not None, "for splice's pass_error_message: always; else the client reads ours"
    assert "smtpd_authorized_xclient_hosts" in refuse.log and reply[:3] in refuse.log


@pytest.mark.anyio
async def test_ehlo_in_the_clients_name_judges_the_client() -> None:
    peer = ScriptedPeer(ALL, ["220 again", "504 5.5.2 Helo command rejected"])
    refuse = await make_stage().upstream_ready(make_session(), peer)
    assert isinstance(refuse, Refuse) and refuse.reply is not None and refuse.reply.code == 504


@pytest.mark.anyio
async def test_where_it_is_not_offered() -> None:
    refuse = await make_stage().upstream_ready(make_session(), ScriptedPeer({"SIZE": ""}))
    assert isinstance(refuse, Refuse) and refuse.cause is Cause.UPSTREAM_MISCONFIGURED and refuse.temporary
    stage = make_stage(if_missing="continue")
    peer = ScriptedPeer({"SIZE": ""})
    assert await stage.upstream_ready(make_session(), peer) is None
    assert peer.lines == [] and not peer.speaks_for_client


def test_only_the_strict_form_counts_for_the_relay_guard() -> None:
    assert make_stage().identifies_client
    assert not make_stage(if_missing="continue").identifies_client
    assert Xclient.identifies_client and Xclient.never_pass


@pytest.mark.anyio
async def test_a_login_that_cannot_be_said_is_not_left_out() -> None:
    session = make_session()
    session.typed_user = "u" * 300
    peer = ScriptedPeer(ALL)
    refuse = await make_stage().upstream_ready(session, peer)
    assert isinstance(refuse, Refuse) and refuse.temporary and peer.lines == []


@pytest.mark.parametrize(
    ("settings", "offered", "sent"),
    [
        ({"if_missing": "send"}, {}, b"XCLIENT ADDR=192.0.2.7 LOGIN=tim NAME=[UNAVAILABLE]"),
        ({"if_missing": "send", "login": False}, {}, b"XCLIENT ADDR=192.0.2.7 NAME=[UNAVAILABLE]"),
        (
            {"if_missing": "send", "attributes": ["ADDR", "NAME", "PORT"]},
            {"XCLIENT": "ADDR HELO"},
            b"XCLIENT ADDR=192.0.2.7 NAME=[UNAVAILABLE] PORT=52001",
        ),
        (
            {"attributes": ["NAME", "PORT", "ADDR"]},
            {"XCLIENT": "ADDR NAME HELO"},
            b"XCLIENT NAME=[UNAVAILABLE] ADDR=192.0.2.7",
        ),
    ],
)
@pytest.mark.anyio
async def test_attributes_and_sending_without_an_offer(
    settings: dict[str, object], offered: dict[str, str], sent: bytes
) -> None:
    session = make_session()
    session.typed_user, session.esmtp = "tim", False
    peer = ScriptedPeer(offered)
    assert await make_stage(**settings).upstream_ready(session, peer) is None
    assert peer.lines == [sent, b"HELO client.example" if "if_missing" in settings else b"EHLO client.example"]
    session.helo = ""
    peer = ScriptedPeer(offered)
    assert await make_stage(**settings).upstream_ready(session, peer) is None
    assert peer.lines[1:] == ([] if settings.get("if_missing") == "send" else [b"EHLO gateway.example"])


@pytest.mark.parametrize("attributes", [["ADDR"], ["NAME", "LOGIN"], ["ADDR", "NAME", "ADDR"], ["ADDR", "IDENT"], []])
def test_address_and_name_go_together(attributes: list[str]) -> None:
    with pytest.raises(ValueError):
        make_stage(attributes=attributes)


ID = b'ID ("x-originating-ip" "192.0.2.7" "x-originating-port" "52001" "x-connected-ip" "198.51.100.25" \
"x-connected-port" "25" "x-session-id" "ID" "x-client-transport" "insecure"'


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        (None, ID + b")"),
        ({"name": "mutt", "support-url": None}, ID + b' "name" "mutt" "support-url" NIL)'),
        ({"x-originating-ip": "127.0.0.1", "X-Proxy-TTL": "9", "os": "\u00fc"}, ID + b")"),
        ({"vendor": 'a"b\\'}, ID + rb' "vendor" "a\"b\\")'),
    ],
)
@pytest.mark.anyio
async def test_imap_says_it_with_id(said: dict[str, str | None] | None, sent: bytes) -> None:
    peer = ScriptedPeer({"ID": ""}, ["250 Trusted ID completed."], protocol="imap")
    session = make_session()
    session.client_id = said
    assert await make_stage().upstream_ready(session, peer) is None
    assert peer.lines == [sent] and peer.speaks_for_client


@pytest.mark.anyio
async def test_id_never_has_more_pairs_than_allowed() -> None:
    peer = ScriptedPeer({"ID": ""}, ["250 Trusted ID completed."], protocol="imap")
    session = make_session("2001:db8::7")
    session.client_id = {f"n{number}": "v" for number in range(30)}
    assert await make_stage().upstream_ready(session, peer) is None
    assert peer.lines[0].count(b'"') == 4 * 30 and b'"x-originating-ip" "2001:db8::7"' in peer.lines[0]


POP3 = b"XCLIENT ADDR=192.0.2.7 PORT=52001 DESTADDR=198.51.100.25 DESTPORT=25 SESSION=ID CLIENT-TRANSPORT=insecure"


@pytest.mark.anyio
async def test_pop3_has_an_xclient_of_its_own() -> None:
    peer = ScriptedPeer({}, ["250 Updated"], protocol="pop3", greeting="220 [XCLIENT] Dovecot ready.")
    assert await make_stage().upstream_ready(make_session(), peer) is None
    assert peer.lines == [POP3] and peer.speaks_for_client


MARKED = "220 [XCLIENT] ready"


@pytest.mark.parametrize(
    ("protocol", "greeting", "extensions", "reply", "refused_by"),
    [
        ("imap", "220 x", {}, "250 OK", ("tempfail",)),
        ("imap", "220 x", {"ID": ""}, "250 ID completed.", ()),  # Dovecot 2.3, which may well believe it
        ("imap", "220 x", {"ID": ""}, "550 no", ("tempfail", "continue", "send")),
        ("imap", "220 x", {"ID": ""}, "500 bad", ("tempfail", "continue", "send")),
        ("pop3", "220 x", {}, "250 OK", ("tempfail",)),
        ("pop3", MARKED, {}, "250 You are not from trusted IP - ignoring", ("tempfail",)),
        ("pop3", MARKED, {}, "550 Unknown command.", ("tempfail", "continue", "send")),
    ],
)
@pytest.mark.parametrize("if_missing", ["tempfail", "continue", "send"])
@pytest.mark.anyio
async def test_stores_that_do_not_take_it(
    protocol: str, greeting: str, extensions: dict[str, str], reply: str, refused_by: tuple[str, ...], if_missing: str
) -> None:
    peer = ScriptedPeer(extensions, [reply], protocol=protocol, greeting=greeting)
    refuse = await make_stage(if_missing=if_missing).upstream_ready(make_session(), peer)
    assert (refuse is not None) is (if_missing in refused_by)
    if refuse is not None:
        assert refuse.cause is Cause.UPSTREAM_MISCONFIGURED and "login_trusted_networks" in refuse.log


@pytest.mark.parametrize("protocol", ["imap", "pop3"])
@pytest.mark.anyio
async def test_a_store_that_leaves_and_a_client_without_address(protocol: str) -> None:
    def peer() -> ScriptedPeer:
        return ScriptedPeer({"ID": ""}, ["421 bye"], protocol=protocol, greeting=MARKED)

    refuse = await make_stage().upstream_ready(make_session(), peer())
    assert refuse is not None and refuse.disconnect and refuse.temporary
    local = make_session("unix:")
    asked = peer()
    refuse = await make_stage().upstream_ready(local, asked)
    assert refuse is not None and refuse.cause is Cause.UPSTREAM_MISCONFIGURED and asked.lines == []
