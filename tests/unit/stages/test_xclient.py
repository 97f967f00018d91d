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
    assert isinstance(refuse, Refuse) and refuse.reply is None
    assert refuse.cause is Cause.UPSTREAM_MISCONFIGURED and refuse.temporary
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
