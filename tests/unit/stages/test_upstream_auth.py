from __future__ import annotations

from base64 import b64decode, b64encode
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from gateway import Authenticated, Cause, Listener, Password, Refuse, Session, Token
from gateway.testing.peer import ScriptedPeer
from stages.upstream_auth import UpstreamAuth, UpstreamAuthSettings

OK = "235 2.7.0 ok"
FIXED = {"user": "gw", "password": "fixed-secret"}
MASTER = {"user": "proxy", "password": "master-secret"}


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


@pytest.mark.parametrize(
    ("settings", "reply", "cause"),
    [
        ({}, "535 5.7.8 no", Cause.AUTH_FAILED),
        ({}, "454 4.7.0 later", Cause.AUTH_UNAVAILABLE),
        ({}, "534 5.7.9 weak", Cause.AUTH_UNAVAILABLE),
        ({}, "550 5.7.1 no", Cause.AUTH_UNAVAILABLE),
        ({"master": MASTER}, "535 5.7.8 no", Cause.AUTH_UNAVAILABLE),
        (FIXED, "535 5.7.8 no", Cause.UPSTREAM_MISCONFIGURED),
        (FIXED, "454 4.7.0 later", Cause.UPSTREAM_MISCONFIGURED),
    ],
)
@pytest.mark.anyio
async def test_refusals(settings: dict[str, object], reply: str, cause: Cause) -> None:
    peer = ScriptedPeer({"AUTH": "PLAIN"}, [reply], tls=True)
    refuse = await make_stage(**settings).upstream_login(make_session(), peer)
    assert isinstance(refuse, Refuse) and refuse.cause is cause
    assert (refuse.reply is None) is (cause is Cause.UPSTREAM_MISCONFIGURED), "the prelude passes it on or not"
    assert (refuse.temporary is True) is (cause is not Cause.AUTH_FAILED)
    assert reply[:3] in refuse.log and "tanstaaf" not in refuse.log and "fixed-secret" not in refuse.log


@pytest.mark.parametrize(
    ("peer", "session"),
    [
        (ScriptedPeer({"AUTH": "PLAIN"}), make_session()),  # clear text over the network
        (ScriptedPeer({"AUTH": "GSSAPI"}, tls=True), make_session()),
        (ScriptedPeer({"AUTH": "PLAIN"}, tls=True), make_session(password=None)),
        (ScriptedPeer({"AUTH": "PLAIN"}, tls=True), make_session("tim\0root")),
        (ScriptedPeer({"AUTH": "PLAIN"}, tls=True), make_session("tim", "x\r\nRCPT")),
        (ScriptedPeer({}, tls=True, protocol="imap"), make_session("tim\nx LOGOUT")),
        (ScriptedPeer({}, tls=True, protocol="pop3"), make_session("tim", "x\rDELE 1")),
        (ScriptedPeer({"AUTH": "IDLE"}, protocol="imap"), make_session()),
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
    [{"master": MASTER, **FIXED}, {"master": MASTER, "verify": "upstream"}, {"credentials": "client", "mechanisms": ["PLAIN"]},
     {}, {"user": "gw"}, {"credentials": "client", **FIXED}, {"verify": "upstream", **FIXED}, {"credentials": "other"}],
)  # fmt: skip
def test_settings_that_make_no_sense(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as error:
        UpstreamAuthSettings.model_validate(settings)
    assert "fixed-secret" not in repr(UpstreamAuthSettings.model_validate(FIXED))
    assert error.value.error_count() == 1


@pytest.mark.parametrize(
    ("protocol", "extensions", "lines"),
    [
        ("imap", {}, [b'LOGIN "tim" "tanstaaf"']),
        ("pop3", {"USER": ""}, [b"USER tim", b"PASS tanstaaf"]),
        ("lmtp", {"AUTH": "PLAIN"}, [plain("tim", "tanstaaf")]),
    ],
)
@pytest.mark.anyio
async def test_each_protocol(protocol: str, extensions: dict[str, str], lines: list[bytes]) -> None:
    peer = ScriptedPeer(extensions, protocol=protocol, takes_secrets=True)
    assert await make_stage().upstream_login(make_session(), peer) is None
    assert peer.lines == lines and peer.secrets == lines[-1:] and peer.logged_in and peer.speaks_for_client


@pytest.mark.parametrize(
    ("protocol", "reply", "cause"),
    [
        ("imap", "550 [AUTHENTICATIONFAILED] no", Cause.AUTH_FAILED),
        ("imap", "550 [PRIVACYREQUIRED] TLS first", Cause.AUTH_UNAVAILABLE),
        ("imap", "450 [UNAVAILABLE] later", Cause.AUTH_UNAVAILABLE),
        ("imap", "500 what", Cause.AUTH_UNAVAILABLE),
        ("imap", "421 bye", Cause.AUTH_UNAVAILABLE),
        ("pop3", "550 [AUTH] no", Cause.AUTH_FAILED),
        ("pop3", "550 [SYS/PERM] broken", Cause.AUTH_UNAVAILABLE),
        ("pop3", "450 [IN-USE] locked", Cause.AUTH_UNAVAILABLE),
    ],
)
@pytest.mark.anyio
async def test_what_a_store_says(protocol: str, reply: str, cause: Cause) -> None:
    replies = [reply] if protocol == "imap" else ["250 go on", reply]
    refuse = await make_stage().upstream_login(make_session(), ScriptedPeer({}, replies, protocol=protocol, tls=True))
    assert isinstance(refuse, Refuse) and refuse.cause is cause and refuse.reply is not None


@pytest.mark.parametrize(
    ("protocol", "extensions", "lines"),
    [
        ("smtp", {"AUTH": "PLAIN LOGIN"}, [b"AUTH PLAIN " + b64encode(b"tim\0proxy\0master-secret")]),
        ("imap", {"AUTH": "PLAIN"}, [b"AUTHENTICATE PLAIN " + b64encode(b"tim\0proxy\0master-secret")]),
        ("pop3", {"SASL": "PLAIN"}, [b"AUTH PLAIN " + b64encode(b"tim\0proxy\0master-secret")]),
        ("imap", {"IDLE": ""}, [b'LOGIN "tim*proxy" "master-secret"']),
        ("pop3", {"USER": ""}, [b"USER tim*proxy", b"PASS master-secret"]),
        ("smtp", {"AUTH": "LOGIN"}, [b"AUTH LOGIN", b64encode(b"tim*proxy"), b64encode(b"master-secret")]),
    ],
)
@pytest.mark.anyio
async def test_a_master_user(protocol: str, extensions: dict[str, str], lines: list[bytes]) -> None:
    replies = ["334 VXNlcm5hbWU6", "334 UGFzc3dvcmQ6"] if len(lines) == 3 else []
    peer = ScriptedPeer(extensions, replies, protocol=protocol, tls=True)
    assert await make_stage(master=MASTER).upstream_login(make_session(password=None), peer) is None
    assert peer.lines == lines


@pytest.mark.anyio
async def test_nobody_becomes_master_by_his_name() -> None:
    peer = ScriptedPeer({}, protocol="imap", tls=True)
    refuse = await make_stage(master=MASTER).upstream_login(make_session("boss*tim"), peer)
    assert isinstance(refuse, Refuse) and peer.lines == [] and "master-secret" not in refuse.log


@pytest.mark.parametrize("protocol", ["smtp", "imap", "pop3"])
@pytest.mark.parametrize("mechanism", ["XOAUTH2", "OAUTHBEARER"])
@pytest.mark.anyio
async def test_tokens_pass_by_the_clients_mechanism(protocol: str, mechanism: str) -> None:
    session = make_session(password=None)
    session.token, session.auth_mechanism = "ya29.token", mechanism
    name = "SASL" if protocol == "pop3" else "AUTH"
    peer = ScriptedPeer({name: f"PLAIN {mechanism}"}, protocol=protocol, tls=True)
    assert await make_stage().upstream_login(session, peer) is None
    ((verb, said, message),) = [line.split() for line in peer.lines]
    assert said == mechanism.encode() and verb == (b"AUTHENTICATE" if protocol == "imap" else b"AUTH")
    assert b"auth=Bearer ya29.token" in b64decode(message) and peer.secrets == peer.lines
    refusing = ScriptedPeer({name: mechanism}, ["334 e30=", "535 5.7.8 no"], protocol=protocol, tls=True)
    refuse = await make_stage().upstream_login(session, refusing)
    assert isinstance(refuse, Refuse) and refuse.cause is Cause.AUTH_FAILED and "ya29" not in repr(refuse)
    assert refusing.lines[1:] == [b64encode(b"\x01" if mechanism == "OAUTHBEARER" else b"")]


@pytest.mark.anyio
async def test_what_is_not_announced_is_sent_only_on_demand() -> None:
    token = make_session(password=None)
    token.token, token.auth_mechanism = "ya29.token", "XOAUTH2"
    for session, begin in ((make_session(), b"AUTH PLAIN "), (token, b"AUTH XOAUTH2 ")):
        peer = ScriptedPeer({}, tls=True)
        refuse = await make_stage().upstream_login(session, peer)
        assert isinstance(refuse, Refuse) and refuse.cause is Cause.AUTH_UNAVAILABLE and peer.lines == []
        assert await make_stage(credentials="client", if_missing="send").upstream_login(session, peer) is None
        assert len(peer.lines) == 1 and peer.lines[0].startswith(begin)


@pytest.mark.anyio
async def test_the_pool_may_let_clear_text_pass() -> None:
    peer = ScriptedPeer({"AUTH": "PLAIN"}, takes_secrets=True)
    assert await make_stage().upstream_login(make_session(), peer) is None and peer.lines


def test_oauth_mechanisms_are_those_of_the_upstream() -> None:
    stage = make_stage(credentials="client", verify="upstream")
    session = make_session("")
    session.upstream_offer = {"AUTH": "PLAIN xoauth2 SCRAM-SHA-1"}
    assert stage.mechanisms(session) == ("PLAIN", "LOGIN", "XOAUTH2")
    only = make_stage(credentials="client", verify="upstream", mechanisms=["OAUTHBEARER"])
    assert only.mechanisms(session) == ("OAUTHBEARER",)
    given = SimpleNamespace(credentials=Token("tim", "ya29.token", "XOAUTH2"), number=1)
    assert stage.auth(session, given) == Authenticated("tim", token="ya29.token")
    nameless = SimpleNamespace(credentials=Token("", "ya29.token", "OAUTHBEARER"), number=1)
    assert isinstance(stage.auth(session, nameless), Refuse)
