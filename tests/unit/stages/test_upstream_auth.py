from __future__ import annotations

from base64 import b64encode
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from gateway import Authenticated, Cause, Listener, Password, Refuse, Session
from gateway.testing.peer import ScriptedPeer
from stages.upstream_auth import UpstreamAuth, UpstreamAuthSettings

OK = "235 2.7.0 ok"
FIXED = {"user": "gw", "password": "fixed-secret"}


def make_session(user: str = "tim", password: str | None = "tanstaaf", identity: str = "") -> Session:
    session = Session("ID", "p", Listener("smtp://198.51.100.25:25"), ("192.0.2.7", 1), ("198.51.100.25", 25), 0.0)
    session.typed_user = session.user = user
    session.password, session.identity = password, identity
    return session


def make_stage(**settings: object) -> UpstreamAuth:
    stage = UpstreamAuth(UpstreamAuthSettings.model_validate(settings or {"credentials": "client"}))
    stage.id = "upstream_auth"
    return stage


def plain(user: str, password: str) -> bytes:
    return b"AUTH PLAIN " + b64encode(f"\0{user}\0{password}".encode())


@pytest.mark.anyio
async def test_plain_as_the_client() -> None:
    peer = ScriptedPeer({"AUTH": "LOGIN PLAIN"}, [OK], tls=True)
    assert await make_stage().upstream_login(make_session(), peer) is None
    assert peer.lines == [b"AUTH PLAIN AHRpbQB0YW5zdGFhZg=="] == peer.secrets
    assert peer.speaks_for_client


@pytest.mark.anyio
async def test_the_override_counts() -> None:
    peer = ScriptedPeer({"AUTH": "PLAIN"}, [OK], local=True)
    await make_stage().upstream_login(make_session(identity="inner"), peer)
    assert peer.lines == [plain("inner", "tanstaaf")]


@pytest.mark.anyio
async def test_login_where_there_is_no_plain() -> None:
    peer = ScriptedPeer({"AUTH": "login"}, ["334 VXNlcm5hbWU6", "334 UGFzc3dvcmQ6", OK], tls=True)
    assert await make_stage(**FIXED).upstream_login(make_session(""), peer) is None
    assert peer.lines == [b"AUTH LOGIN", b64encode(b"gw"), b64encode(b"fixed-secret")]
    assert peer.secrets == peer.lines[1:]


@pytest.mark.anyio
async def test_a_long_response_waits_for_the_challenge() -> None:
    peer = ScriptedPeer({"AUTH": "PLAIN"}, ["334 ", OK], tls=True)
    assert await make_stage().upstream_login(make_session(password="p" * 500), peer) is None
    assert peer.lines[0] == b"AUTH PLAIN" and peer.secrets == [b64encode(b"\0tim\0" + b"p" * 500)]


@pytest.mark.parametrize(
    ("settings", "reply", "cause"),
    [
        ({}, "535 5.7.8 no", Cause.AUTH_FAILED),
        ({}, "454 4.7.0 later", Cause.AUTH_UNAVAILABLE),
        ({}, "534 5.7.9 weak", Cause.AUTH_UNAVAILABLE),
        (FIXED, "535 5.7.8 no", Cause.UPSTREAM_MISCONFIGURED),
        (FIXED, "454 4.7.0 later", Cause.UPSTREAM_MISCONFIGURED),
    ],
)
@pytest.mark.anyio
async def test_refusals(settings: dict[str, object], reply: str, cause: Cause) -> None:
    peer = ScriptedPeer({"AUTH": "PLAIN"}, [reply], tls=True)
    refuse = await make_stage(**settings).upstream_login(make_session(), peer)
    assert isinstance(refuse, Refuse) and refuse.cause is cause and refuse.reply is None
    assert (refuse.temporary is True) is (cause is not Cause.AUTH_FAILED)
    assert reply[:3] in refuse.log and "tanstaaf" not in refuse.log and "fixed-secret" not in refuse.log


@pytest.mark.parametrize(
    ("peer", "session"),
    [
        (ScriptedPeer({"AUTH": "PLAIN"}), make_session()),  # clear text over the network
        (ScriptedPeer({"AUTH": "GSSAPI"}, tls=True), make_session()),
        (ScriptedPeer({"AUTH": "PLAIN"}, tls=True), make_session(password=None)),
        (ScriptedPeer({"AUTH": "PLAIN"}, tls=True), make_session("tim\0root")),
    ],
)
@pytest.mark.anyio
async def test_nothing_secret_leaves(peer: ScriptedPeer, session: Session) -> None:
    assert isinstance(await make_stage().upstream_login(session, peer), Refuse)
    assert peer.lines == []


@pytest.mark.anyio
async def test_a_session_without_login_stays_without() -> None:
    peer = ScriptedPeer({"AUTH": "PLAIN"}, tls=True)
    assert await make_stage().upstream_login(make_session("", None), peer) is None
    assert peer.lines == []


def test_who_verifies() -> None:
    session = make_session("")
    stage = make_stage()
    assert stage.mechanisms(session) == () and stage.phases() == () and not stage.required and stage.login_decides
    assert not make_stage(**FIXED).login_decides
    stage = make_stage(credentials="client", verify="upstream")
    assert stage.mechanisms(session) == ("PLAIN", "LOGIN") and stage.phases() == ("auth",) and stage.required
    given = SimpleNamespace(credentials=Password("", "tim", "tanstaaf", "PLAIN"), number=1)
    assert stage.auth(session, given) == Authenticated("tim", password="tanstaaf")
    other = SimpleNamespace(credentials=Password("root", "tim", "tanstaaf", "PLAIN"), number=1)
    assert isinstance(stage.auth(session, other), Refuse)


@pytest.mark.parametrize(
    "settings",
    [{}, {"user": "gw"}, {"credentials": "client", **FIXED}, {"verify": "upstream", **FIXED}, {"credentials": "other"}],
)
def test_settings_that_make_no_sense(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as error:
        UpstreamAuthSettings.model_validate(settings)
    assert "fixed-secret" not in repr(UpstreamAuthSettings.model_validate(FIXED))
    assert error.value.error_count() == 1
