from __future__ import annotations

import pytest
import structlog

from gateway import Cause, Listener, Refuse, Reply, Session, Transaction
from gateway.testing.peer import ScriptedPeer
from stages.xforward import Xforward, XforwardSettings

ALL = {"XFORWARD": "NAME ADDR PROTO HELO SOURCE PORT IDENT"}


def make_session(address: str = "192.0.2.7") -> Session:
    session = Session("ID", "p", Listener("smtp://198.51.100.25:25"), (address, 52001), ("198.51.100.25", 25), 0.0)
    session.helo, session.esmtp = "client.example", True
    session.transaction = Transaction("ID.1", "a@example.org", ())
    return session


def make_stage(**settings: object) -> Xforward:
    stage = Xforward(XforwardSettings.model_validate(settings))
    stage.id = "xforward"
    stage._log = structlog.get_logger()
    return stage


def test_goes_in_front_of_mail() -> None:
    session, peer = make_session(), ScriptedPeer(ALL)
    session.client.name_status, session.client.name = "ok", "a.example"
    make_stage().upstream_mail(session, peer)
    assert [line for line, _ in peer.before] == [
        b"XFORWARD NAME=a.example ADDR=192.0.2.7 SOURCE=REMOTE PORT=52001 PROTO=ESMTP HELO=client.example IDENT=ID.1"
    ]


@pytest.mark.parametrize(
    ("offered", "address", "line"),
    [
        ("ADDR", "192.0.2.7", b"XFORWARD ADDR=192.0.2.7"),
        ("name addr", "2001:db8::7", b"XFORWARD NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8::7"),
        ("ADDR SOURCE", "unix:", b"XFORWARD ADDR=[UNAVAILABLE] SOURCE=LOCAL"),
    ],
)
def test_says_what_is_offered(offered: str, address: str, line: bytes) -> None:
    peer = ScriptedPeer({"XFORWARD": offered})
    make_stage().upstream_mail(make_session(address), peer)
    assert [sent for sent, _ in peer.before] == [line]


@pytest.mark.anyio
async def test_where_it_is_not_offered() -> None:
    peer = ScriptedPeer({"SIZE": ""})
    make_stage().upstream_mail(make_session(), peer)
    assert peer.before == []
    assert await make_stage().upstream_ready(make_session(), peer) is None
    strict = make_stage(if_missing="tempfail")
    refuse = await strict.upstream_ready(make_session(), peer)
    assert isinstance(refuse, Refuse) and refuse.cause is Cause.UPSTREAM_MISCONFIGURED and refuse.temporary
    assert await strict.upstream_ready(make_session(), ScriptedPeer(ALL)) is None


def test_a_refusal_is_logged() -> None:
    peer = ScriptedPeer(ALL)
    with structlog.testing.capture_logs() as logs:
        make_stage().upstream_mail(make_session(), peer)
        callback = peer.before[0][1]
        assert callback is not None
        callback(Reply.of("250 ok"))
        assert logs == []
        callback(Reply.of("550 5.7.0 insufficient authorization"))
    assert logs[0]["event"] == "xforward_refused" and "550" in logs[0]["reply"]


def test_does_not_count_for_the_relay_guard() -> None:
    assert not Xforward.identifies_client
