from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from gateway import (
    Authenticated,
    Cause,
    Certificate,
    Digest,
    HttpError,
    Listener,
    Password,
    Recipient,
    Refuse,
    Session,
    Token,
    Transaction,
    Upstream,
)
from gateway.protocol.errors import PeerError
from gateway.protocol.http1 import Response
from gateway.protocol.proxy_header import ProxyHeader
from gateway.relay.tls import TlsInfo
from gateway.replies import Replies
from stages.auth_http import AuthHttp, AuthHttpSettings, AuthServerError

TIM = Password("", "tim", "tanstaaf", "PLAIN")
GO = {"Auth-Status": "OK", "Auth-Server": "127.0.0.1", "Auth-Port": "2525"}


class Asked:
    """Stands in for the HttpClient: the n-th question gets the n-th answer, the last again and again."""

    def __init__(self, *answers: dict[str, str] | list[tuple[str, str]]) -> None:
        self.answers = list(answers)
        self.questions: list[list[tuple[str, bytes]]] = []

    async def get(self, headers: Sequence[tuple[str, bytes]]) -> Response:
        self.questions.append(list(headers))
        if not self.answers:
            raise HttpError("http://192.0.2.1/: cannot connect")
        answer = self.answers[min(len(self.questions), len(self.answers)) - 1]
        pairs = answer.items() if isinstance(answer, dict) else answer
        return Response(500, tuple((name.lower(), value.encode()) for name, value in pairs), False)

    async def aclose(self) -> None:
        pass


def make_stage(asked: Asked, **settings: object) -> AuthHttp:
    stage = AuthHttp(AuthHttpSettings.model_validate({"url": "http://127.0.0.1:1/auth", **settings}))
    stage.id = "auth_http"
    stage._client = asked  # type: ignore[assignment]
    stage._clock = lambda: 0.0
    return stage


def make_session() -> Session:
    session = Session("ID", "p", Listener("smtp://198.51.100.25:25"), ("192.0.2.7", 50001), ("198.51.100.25", 25), 0.0)
    session.helo = "client.example"
    return session


def attempt(credentials: object, number: int = 1) -> SimpleNamespace:
    return SimpleNamespace(credentials=credentials, number=number)


async def login(answer: dict[str, str] | list[tuple[str, str]]) -> object:
    return await make_stage(Asked(answer)).auth(make_session(), attempt(TIM))


def envelope(session: Session, to: str = "b@example.org", sender: str = "a@example.org") -> Recipient:
    session.transaction = Transaction("ID.1", sender, (("SIZE", "1"),))
    return Recipient(to, (("NOTIFY", "NEVER"),), 0)


# -- the request


@pytest.mark.anyio
async def test_the_request_has_nginx_s_fields_in_nginx_s_order() -> None:
    asked = Asked(GO)
    stage = make_stage(asked, headers={"X-Auth-Key": "shared"})
    session = make_session()
    session.proxy_header = ProxyHeader(("192.0.2.7", 50001), ("203.0.113.1", 25), 2, False, ())
    session.tls = TlsInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256, None, None, False, "", None, False)
    await stage.auth(session, attempt(Password("", "t m%\x7f", "pä\r\n", "PLAIN"), 3))
    assert asked.questions == [
        [
            ("Auth-Method", b"plain"),
            ("Auth-User", b"t%20m%25%7F"),
            ("Auth-Pass", b"p\xc3\xa4%0D%0A"),
            ("Auth-Protocol", b"smtp"),
            ("Auth-Login-Attempt", b"3"),
            ("Client-IP", b"192.0.2.7"),
            ("Client-Host", b"[UNAVAILABLE]"),
            ("Proxy-Protocol-Addr", b"192.0.2.7"),
            ("Proxy-Protocol-Port", b"50001"),
            ("Proxy-Protocol-Server-Addr", b"203.0.113.1"),
            ("Proxy-Protocol-Server-Port", b"25"),
            ("Auth-SSL", b"on"),
            ("Auth-SSL-Protocol", b"TLSv1.3"),
            ("Auth-SSL-Cipher", b"TLS_AES_256_GCM_SHA384"),
            ("X-Auth-Key", b"shared"),
        ]
    ]


@pytest.mark.parametrize(
    ("credentials", "method", "user", "password", "salt"),
    [
        (Password("", "tim", "pw", "LOGIN"), b"plain", b"tim", b"pw", None),
        (Digest("tim", b"<1.2@mx>", "0" * 32), b"cram-md5", b"tim", b"0" * 32, b"<1.2@mx>"),
        (Certificate(""), b"external", b"", b"", None),
        (Token("tim", "abc.def", "XOAUTH2"), b"xoauth2", b"tim", b"abc.def", None),
        (Token("", "abc.def", "OAUTHBEARER"), b"oauthbearer", b"", b"abc.def", None),
    ],
)
@pytest.mark.anyio
async def test_methods(credentials: object, method: bytes, user: bytes, password: bytes, salt: bytes | None) -> None:
    asked = Asked({**GO, "Auth-User": "inner"})
    stage = make_stage(asked, methods=["PLAIN", "login", "cram-md5", "external", "xoauth2", "oauthbearer"])
    session = make_session()
    session.tls = TlsInfo("TLSv1.3", "x", 256, None, None, True, "", trustme_certificate(), False)
    verdict = await stage.auth(session, attempt(credentials))
    assert isinstance(verdict, Authenticated) and verdict.user == (user.decode() or "inner")
    fields = dict(asked.questions[0])
    assert (fields["Auth-Method"], fields["Auth-User"], fields["Auth-Pass"]) == (method, user, password)
    assert fields.get("Auth-Salt") == salt


@pytest.mark.parametrize(
    ("status", "name", "sent"),
    [
        ("ok", "a.example", b"a.example"),
        ("ok", "a\r\nX: y", b"a??X: y"),
        ("unavailable", "", b"[UNAVAILABLE]"),
        ("tempunavail", "", b"[TEMPUNAVAIL]"),
        ("", "", b"[UNAVAILABLE]"),
    ],
)
@pytest.mark.anyio
async def test_client_host(status: str, name: str, sent: bytes) -> None:
    asked, session = Asked(GO), make_session()
    session.client.name_status, session.client.name = status, name
    await make_stage(asked).auth(session, attempt(TIM))
    assert dict(asked.questions[0])["Client-Host"] == sent


def trustme_certificate() -> bytes:
    leaf = trustme.CA().issue_cert("tim@example.org", common_name="Tïm, Jr", organization_name="Example")
    return x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes()).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    ("certificate", "verified", "error", "verify"),
    [
        (True, True, "", b"SUCCESS"),
        (True, False, "self-signed certificate", b"FAILED:self-signed certificate"),
        (False, False, "no certificate shown", b"NONE"),
        (False, False, "", None),
    ],
)
@pytest.mark.anyio
async def test_client_certificates(certificate: bool, verified: bool, error: str, verify: bytes | None) -> None:
    asked, session = Asked(GO), make_session()
    der = trustme_certificate() if certificate else None
    session.tls = TlsInfo("TLSv1.3", "x", 256, None, None, verified, error, der, False)
    stage = make_stage(asked, pass_client_certificate=True)
    await stage.auth(session, attempt(TIM))
    await stage.auth(session, attempt(TIM))
    fields = dict(asked.questions[1])
    assert fields.get("Auth-SSL-Verify") == verify
    assert ("Auth-SSL-Subject" in fields) is certificate
    if certificate:
        assert b"CN=T\\C3\\AFm\\, Jr" in fields["Auth-SSL-Subject"] and b"O=" in fields["Auth-SSL-Issuer"]
        assert len(fields["Auth-SSL-Fingerprint"]) == 40 and len(fields["Auth-SSL-Serial"]) % 2 == 0
        assert fields["Auth-SSL-Cert"].startswith(b"-----BEGIN%20CERTIFICATE-----%0A")
        assert "Auth-SSL-Cert" not in dict(await question_without_certificate(session))


async def question_without_certificate(session: Session) -> list[tuple[str, bytes]]:
    asked = Asked(GO)
    await make_stage(asked).auth(session, attempt(TIM))
    return asked.questions[0]


# -- the answer


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (GO, Authenticated("tim", password="tanstaaf", upstream=Upstream(server="127.0.0.1:2525"))),
        ({"Auth-Status": "OK"}, Authenticated("tim", password="tanstaaf")),
        ({"Auth-Server": "10.0.0.1", "Auth-Port": "25"},
         Authenticated("tim", password="tanstaaf", upstream=Upstream(server="10.0.0.1:25"))),
        ({**GO, "Auth-Server": "2001:db8::1"},
         Authenticated("tim", password="tanstaaf", upstream=Upstream(server="[2001:db8::1]:2525"))),
        ({**GO, "Auth-Server": "[::1]"},
         Authenticated("tim", password="tanstaaf", upstream=Upstream(server="[::1]:2525"))),
        ({**GO, "Auth-Server": "mail.internal"},
         Authenticated("tim", password="tanstaaf", upstream=Upstream(server="mail.internal:2525"))),
        ({"Auth-Status": "OK", "Auth-Server": "unix:/run/mta.sock"},
         Authenticated("tim", password="tanstaaf", upstream=Upstream(server="unix:/run/mta.sock"))),
        ({**GO, "Auth-Upstream": "vip"}, Authenticated("tim", password="tanstaaf", upstream=Upstream(pool="vip"))),
        ({"Auth-Status": "OK", "Auth-User": "inner", "Auth-Pass": "master"},
         Authenticated("tim", identity="inner", password="master")),
        ({"Auth-Status": "OK", "Auth-Pass": ""}, Authenticated("tim", password="")),
        ([("Auth-Status", "OK"), ("Auth-User", "first"), ("Auth-User", "last"), ("X_Odd", "1")],
         Authenticated("tim", identity="last", password="tanstaaf")),
    ],
)  # fmt: skip
@pytest.mark.anyio
async def test_accepted(answer: dict[str, str] | list[tuple[str, str]], verdict: Authenticated) -> None:
    assert await login(answer) == verdict


@pytest.mark.parametrize(
    ("answer", "reply", "hold"),
    [
        ({"Auth-Status": "Invalid login or password"}, "535 5.7.0 Invalid login or password", 0),
        ({"Auth-Status": "ok"}, "535 5.7.0 ok", 0),
        ({"Auth-Status": "no", "Auth-Wait": "3"}, "535 5.7.0 no", 3),
        ({"Auth-Status": "no", "Auth-Wait": "9999"}, "535 5.7.0 no", 120),
        ({"Auth-Status": "no", "Auth-Wait": "soon"}, "535 5.7.0 no", 0),
        ({"Auth-Status": "later", "Auth-Error-Code": "454 4.7.0"}, "454 4.7.0 later", 0),
        ({"Auth-Status": "no", "Auth-Error-Code": "534"}, "534 no", 0),
        ({"Auth-Status": "no", "Auth-Error-Code": "250 2.0.0"}, "535 5.7.0 no", 0),
        ({"Auth-Status": "no", "Auth-Error-Code": "550 4.7.1"}, "535 5.7.0 no", 0),
        ({"Auth-Status": "no", "Auth-Error-Code": "535 5.7.8 extra"}, "535 5.7.0 no", 0),
        ({"Auth-Status": "nö\x01 tab\t"}, "535 5.7.0 n?? tab?", 0),
        ({"Auth-Status": "x" * 600}, "535 5.7.0 " + "x" * 400, 0),
        ([("Auth-Status", "no"), ("Auth-Status", "OK"), ("Auth-Server", "bad host")], "535 5.7.0 no", 0),
    ],
)
@pytest.mark.anyio
async def test_refused(answer: dict[str, str] | list[tuple[str, str]], reply: str, hold: float) -> None:
    verdict = await login(answer)
    assert isinstance(verdict, Refuse) and verdict.reply is not None
    shown = f"{verdict.reply.code} {verdict.reply.text}"
    assert shown == reply
    assert verdict.hold == hold and not verdict.disconnect
    assert verdict.cause is (Cause.AUTH_FAILED if verdict.reply.code >= 500 else Cause.AUTH_UNAVAILABLE)


@pytest.mark.parametrize("protocol", ["imap", "pop3"])
@pytest.mark.parametrize(
    "answer", [{**GO, "Auth-Status": ""}, [*GO.items(), ("Auth-Status", "")], [("Auth-Status", ""), *GO.items()]]
)
@pytest.mark.anyio
async def test_an_empty_status_is_an_error_to_stores(
    protocol: str, answer: dict[str, str] | list[tuple[str, str]]
) -> None:
    session = Session("ID", "p", Listener("x", protocol=protocol), ("192.0.2.7", 50001), ("198.51.100.25", 25), 0.0)
    refuse = await make_stage(Asked(answer)).auth(session, attempt(TIM))
    assert isinstance(refuse, Refuse)
    said = {"imap": "NO ", "pop3": "-ERR "}[protocol]
    assert Replies(protocol).store(refuse, "ID") == said  # type: ignore[arg-type]
    assert isinstance(await make_stage(Asked(answer)).auth(make_session(), attempt(TIM)), Authenticated)


@pytest.mark.parametrize(
    ("answer", "at_auth", "at_rcpt"),
    [({}, "534 5.7.9 no", "534 5.7.9 no"), ({"Auth-Error-Code": "454"}, "454 no", "454 no")],
)
@pytest.mark.anyio
async def test_the_code_of_an_error_without_one(answer: dict[str, str], at_auth: str, at_rcpt: str) -> None:
    stage, session = make_stage(Asked({"Auth-Status": "no", **answer}), none=True, error_code="534 5.7.9"), make_session()
    login, recipient = await stage.auth(session, attempt(TIM)), await stage.route(session, envelope(session))
    for refuse, expected in ((login, at_auth), (recipient, at_rcpt)):
        assert isinstance(refuse, Refuse) and refuse.reply is not None
        assert f"{refuse.reply.code} {refuse.reply.text}" == expected


@pytest.mark.parametrize("code", ["535 5.7.0 x", "250 2.0.0", "535 4.7.0", "", "no"])
def test_what_is_no_error_code(code: str) -> None:
    with pytest.raises(ValidationError, match="not the code of an error"):
        make_stage(Asked(), error_code=code)


@pytest.mark.anyio
async def test_421_closes() -> None:
    verdict = await login({"Auth-Status": "go away", "Auth-Error-Code": "421 4.7.0"})
    assert isinstance(verdict, Refuse) and verdict.disconnect


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"Content-Type": "text/html"},
        {"Auth-Status": ""},
        {"Auth-Status": "OK", "Auth-Server": "127.0.0.1"},
        {"Auth-Status": "OK", "Auth-Port": "25"},
        {**GO, "Auth-Port": "0"},
        {**GO, "Auth-Port": "70000"},
        {**GO, "Auth-Port": "2५"},
        {**GO, "Auth-Server": "a b"},
        {**GO, "Auth-Server": "127.0.0.1:25"},
        {**GO, "Auth-Server": "host/path"},
        {**GO, "Auth-Server": "-x"},
        {**GO, "Auth-Server": "[::1"},
        {**GO, "Auth-Server": "fe80::1%eth0"},
    ],
)
@pytest.mark.anyio
async def test_what_is_no_answer_is_no_login(answer: dict[str, str]) -> None:
    with pytest.raises(PeerError) as error:
        await login(answer)
    assert "tanstaaf" not in str(error.value)


@pytest.mark.anyio
async def test_a_server_that_is_down_is_an_error() -> None:
    with pytest.raises(HttpError):
        await make_stage(Asked()).auth(make_session(), attempt(TIM))


@pytest.mark.anyio
async def test_a_certificate_needs_a_name() -> None:
    session = make_session()
    session.tls = TlsInfo("TLSv1.3", "x", 256, None, None, True, "", trustme_certificate(), False)
    with pytest.raises(AuthServerError):
        await make_stage(Asked(GO), methods=["external"]).auth(session, attempt(Certificate("")))


@pytest.mark.anyio
async def test_nobody_acts_for_another() -> None:
    asked = Asked(GO)
    verdict = await make_stage(asked).auth(make_session(), attempt(Password("root", "tim", "tanstaaf", "PLAIN")))
    assert isinstance(verdict, Refuse) and asked.questions == []


def test_nothing_secret_in_repr() -> None:
    stage = make_stage(Asked(), headers={"X-Key": "shared-key"})
    assert "shared-key" not in repr(stage.settings)
    assert "master" not in repr(Authenticated("tim", identity="master", password="master"))


# -- WAIT


@pytest.mark.parametrize(
    ("answers", "pauses"),
    [
        ([{"Auth-Status": "WAIT", "Auth-Wait": "3"}, GO], [3.0]),
        ([{"Auth-Status": "WAIT"}, {"Auth-Status": "WAIT", "Auth-Wait": "0"}, GO], [1.0, 1.0]),
        ([{"Auth-Status": "WAIT"}], None),
        ([{"Auth-Status": "WAIT", "Auth-Wait": "25"}], None),
        ([{"Auth-Status": "WAIT", "Auth-Wait": "9999"}], None),
    ],
)
@pytest.mark.anyio
async def test_wait(answers: list[dict[str, str]], pauses: list[float] | None) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    asked = Asked(*answers)
    stage = make_stage(asked)
    stage._sleep = sleep  # type: ignore[assignment]
    if pauses is None:
        with pytest.raises(AuthServerError, match="too long"):
            await stage.auth(make_session(), attempt(TIM))
        assert len(asked.questions) <= 11 and sum(slept) <= 60 and min(slept, default=1.0) >= 1.0
    else:
        assert isinstance(await stage.auth(make_session(), attempt(TIM)), Authenticated)
        assert slept == pauses
        assert all(question == asked.questions[0] for question in asked.questions)


# -- method none


@pytest.mark.anyio
async def test_none_tells_of_the_envelope() -> None:
    asked, session = Asked(GO), make_session()
    stage = make_stage(asked, none=True, headers={"X-Auth-Key": "shared"})
    recipient = envelope(session)
    assert await stage.route(session, recipient) == Upstream(server="127.0.0.1:2525")
    assert asked.questions == [
        [
            ("Auth-Method", b"none"),
            ("Auth-User", b""),
            ("Auth-Pass", b""),
            ("Auth-Protocol", b"smtp"),
            ("Auth-Login-Attempt", b"1"),
            ("Client-IP", b"192.0.2.7"),
            ("Client-Host", b"[UNAVAILABLE]"),
            ("Auth-SMTP-Helo", b"client.example"),
            ("Auth-SMTP-From", b"MAIL FROM:<a@example.org> SIZE=1"),
            ("Auth-SMTP-To", b"RCPT TO:<b@example.org> NOTIFY=NEVER"),
            ("X-Auth-Key", b"shared"),
        ]
    ]


@pytest.mark.anyio
async def test_none_tells_what_the_client_said_not_what_became_of_it() -> None:
    asked, session = Asked(GO), make_session()
    recipient = envelope(session, '"x y"@example.org', "")
    recipient.rewrite("other@example.org", None)
    session.helo = "h\r\nAuth-Status: OK\0"
    await make_stage(asked, none=True).route(session, recipient)
    fields = dict(asked.questions[0])
    assert fields["Auth-SMTP-From"] == b"MAIL FROM:<> SIZE=1"
    assert fields["Auth-SMTP-To"] == b'RCPT TO:<"x y"@example.org> NOTIFY=NEVER'
    assert fields["Auth-SMTP-Helo"] == b"h??Auth-Status: OK?"


@pytest.mark.anyio
async def test_a_user_of_the_server_s_goes_with_its_upstream() -> None:
    session = make_session()
    answers: list[dict[str, str]] = [{**GO, "Auth-User": "inner"}, {"Auth-Upstream": "vip", "Auth-User": "inner"}]
    for answer in answers:
        upstream = await make_stage(Asked(answer), none=True).route(session, envelope(session))
        assert isinstance(upstream, Upstream) and upstream.identity == "inner" and "inner" not in repr(upstream)


@pytest.mark.anyio
async def test_a_field_with_several_values_is_sent_for_each() -> None:
    asked = Asked(GO)
    await make_stage(asked, headers={"X-A": ["1", "2"], "X-B": "3"}).auth(make_session(), attempt(TIM))
    assert asked.questions[0][-3:] == [("X-A", b"1"), ("X-A", b"2"), ("X-B", b"3")]


@pytest.mark.parametrize("values", [[], ["a\n"], ["a", 3], 3])
def test_what_is_no_field(values: object) -> None:
    with pytest.raises(ValidationError) as raised:
        make_stage(Asked(), headers={"X-A": values})
    assert len(raised.value.errors()) == 1


@pytest.mark.parametrize(("per", "questions"), [("session", 1), ("transaction", 2), ("recipient", 4)])
@pytest.mark.anyio
async def test_how_often_is_asked(per: str, questions: int) -> None:
    asked, session = Asked({"Auth-Status": "OK", "Auth-Upstream": "a"}), make_session()
    stage = make_stage(asked, none=True, per=per)
    assert ("rcpt" in stage.phases()) is (per != "session")
    for _ in range(2):
        for recipient in (envelope(session), None):
            recipient = recipient or Recipient("c@example.org", (), 1)
            if per != "session":
                assert await stage.rcpt(session, recipient) is None
            assert await stage.route(session, recipient) == Upstream(pool="a")
            assert await stage.route(session, recipient) == Upstream(pool="a")
    assert len(asked.questions) == questions
    assert [dict(question)["Auth-Login-Attempt"] for question in asked.questions] == [
        b"%d" % (number + 1) for number in range(questions)
    ]


@pytest.mark.anyio
async def test_a_refused_recipient_does_not_stand_for_the_next() -> None:
    asked, session = Asked({"Auth-Status": "no such user"}, GO), make_session()
    stage = make_stage(asked, none=True, per="transaction")
    recipient = envelope(session)
    refuse = await stage.rcpt(session, recipient)
    assert isinstance(refuse, Refuse) and refuse.reply is not None
    assert f"{refuse.reply.code} {refuse.reply.text}" == "550 5.7.1 no such user" and not refuse.disconnect
    assert await stage.route(session, recipient) is refuse
    assert await stage.rcpt(session, Recipient("c@example.org", (), 1)) is None
    assert len(asked.questions) == 2


@pytest.mark.anyio
async def test_after_auth_nobody_is_asked() -> None:
    asked, session = Asked(GO), make_session()
    recipient = envelope(session)
    session.user, session.upstream = "tim", Upstream(pool="his")
    assert await make_stage(asked, none=True).route(session, recipient) == Upstream(pool="his")
    assert asked.questions == []


# -- settings, cache, the example


def test_phases_and_mechanisms() -> None:
    session = make_session()
    stage = make_stage(Asked(), methods=["plain", "external"])
    assert stage.phases() == ("auth",) and stage.mechanisms(session) == ("PLAIN",) and stage.required
    session.tls = TlsInfo("TLSv1.3", "x", 256, None, None, True, "", b"der", False)
    assert stage.mechanisms(session) == ("PLAIN", "EXTERNAL")
    stage = make_stage(Asked(), none=True)
    assert stage.phases() == ("auth", "route") and not stage.required and stage.route_phase.name == "RCPT"
    assert make_stage(Asked(), none=True, required=True).required
    stage = make_stage(Asked(), none=True, methods=[])
    assert stage.phases() == ("route",) and stage.mechanisms(session) == ()


@pytest.mark.anyio
async def test_a_mechanism_that_was_not_offered_is_not_asked_about() -> None:
    asked = Asked(GO)
    stage = make_stage(asked, methods=["plain", "external"])
    assert await stage.auth(make_session(), attempt(Certificate("root"))) is None
    assert await stage.auth(make_session(), attempt(Token("tim", "abc", "XOAUTH2"))) is None
    assert asked.questions == []


@pytest.mark.parametrize(
    "settings",
    [
        {"url": None},
        {"urls": ["http://a/"]},
        {"url": "ftp://x/"},
        {"headers": {"Bad Name": "x"}},
        {"headers": {"X": "a\r\nY: b"}},
        {"methods": []},
        {"methods": [], "none": True, "required": True},
        {"methods": ["scram"]},
        {"cache": "2m"},
        {"per": "day"},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AuthHttpSettings.model_validate({"url": "http://127.0.0.1:1/", **settings})


@pytest.mark.anyio
async def test_the_cache_needs_the_same_request() -> None:
    now = 0.0
    asked = Asked({"Auth-Status": "OK"})
    stage = make_stage(asked, cache="30s")
    stage._clock = lambda: now
    other = make_session()
    other.client.address = "192.0.2.8"
    wrong = Password("", "tim", "wrong", "PLAIN")
    for session, credentials, questions in (
        (make_session(), TIM, 1),
        (make_session(), TIM, 1),
        (other, TIM, 2),
        (make_session(), wrong, 3),
    ):
        await stage.auth(session, attempt(credentials))
        assert len(asked.questions) == questions
    now = 31.0
    await stage.auth(make_session(), attempt(TIM))
    assert len(asked.questions) == 4
    assert "tanstaaf" not in repr(stage._cache)


@pytest.mark.anyio
async def test_refusals_and_by_default_everything_are_asked_again() -> None:
    for answer, settings in (({"Auth-Status": "no"}, {"cache": "30s"}), (GO, {})):
        asked = Asked(answer)
        stage = make_stage(asked, **settings)
        for _ in range(2):
            await stage.auth(make_session(), attempt(TIM))
        assert len(asked.questions) == 2


@asynccontextmanager
async def example_server(*arguments: object) -> AsyncIterator[str]:
    path = Path(__file__).parents[3] / "examples" / "auth_server.py"
    spec = importlib.util.spec_from_file_location("auth_server", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = web.Application()
    app.router.add_get("/{path:.*}", module.AuthServer(module.read_users(None, []), *arguments).answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/auth"
    finally:
        await runner.cleanup()


@pytest.mark.anyio
async def test_the_example_server() -> None:
    async with example_server("pool:mailbox", "demo") as url:
        settings = {"url": url, "headers": {"X-Auth-Key": "demo"}, "none": True, "methods": ["plain", "cram-md5"]}
        stage = AuthHttp(AuthHttpSettings.model_validate(settings))
        stage.id = "auth_http"
        await stage.start(SimpleNamespace(clock=asyncio.get_running_loop().time))
        demo = Password("", "demo@example.org", "demo", "PLAIN")
        verdict = await stage.auth(make_session(), attempt(demo))
        assert verdict == Authenticated("demo@example.org", password="demo", upstream=Upstream(pool="mailbox"))
        cram = Digest("demo@example.org", b"<1.2@mx>", "4df0cd7e4d4a8ec4f9f7d4e3a1ff0d8b")
        assert isinstance(await stage.auth(make_session(), attempt(cram)), Refuse)
        wrong = await stage.auth(make_session(), attempt(Password("", "demo@example.org", "x", "PLAIN")))
        assert isinstance(wrong, Refuse) and wrong.hold == 3
        session = make_session()
        assert await stage.route(session, envelope(session)) == Upstream(pool="mailbox")
        session = make_session()
        assert isinstance(await stage.route(session, envelope(session, "b@elsewhere.example")), Refuse)
        await stage.stop()
