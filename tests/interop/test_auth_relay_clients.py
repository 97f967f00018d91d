"""`auth_relay`: Postfix and Dovecot do AUTH themselves, with the gateway between them and real clients."""

from __future__ import annotations

import imaplib
import poplib
import smtplib
import subprocess
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.testing.gateway import Gateway, running
from tests.interop.conftest import Records, StartPostfix
from tests.interop.mail_client import STRANGER
from tests.interop.postfix_upstream import AUTHORIZED, DISCARD_FOREIGN, FOREIGN, LOGIN_RELAYS, logged, stored
from tests.interop.store_site import (
    MESSAGE,
    PROTOCOLS,
    Pipeline,
    StoreSite,
    blocking,
    fetch_imap,
    store_site,
    with_message,
)
from tests.peers.clients import swaks, talk
from tests.peers.dovecot_store import User
from tests.peers.mail_clients import (
    MODES,
    Mode,
    Place,
    Protocol,
    body,
    curl,
    curl_fetch,
    fetchmail,
    imap,
    mbsync,
    pop3,
)
from tests.peers.postfix import Postfix
from tests.peers.process import free_port
from tests.peers.require import require
from tests.peers.sasl_client import MECHANISMS, client, pop3_auth

pytestmark = [pytest.mark.peers, pytest.mark.anyio]
each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)
each_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)
IN_CLEAR = {"PLAIN", "LOGIN", "XOAUTH2", "OAUTHBEARER"}


@pytest.fixture(scope="module")
def site() -> Iterator[StoreSite]:
    """One store, whose auth service is Postfix's too."""
    with store_site() as site:
        yield site


# -- Postfix -----------------------------------------------------------------------------------------------------


@pytest.fixture
def postfix(site: StoreSite, start_postfix: StartPostfix) -> Postfix:
    """Relays for whoever is logged in."""
    main = site.store.main + LOGIN_RELAYS.replace("permit_mynetworks, ", "") + DISCARD_FOREIGN
    return start_postfix(main=AUTHORIZED + main)


@asynccontextmanager
async def submission(site: StoreSite, postfix: Postfix, **more: object) -> AsyncIterator[Gateway]:
    """A gateway with a STARTTLS and an implicit TLS port."""
    served = relay(site, "imap", **more)
    served["listen"] = ["smtp://127.0.0.1:0", "smtps://127.0.0.1:0"]
    served["upstreams"] = {"postfix": {"servers": [f"smtp://127.0.0.1:{postfix.port}"], "tls": "off"}}
    async with running(served, learn=True) as gateway:
        yield gateway


@pytest.mark.parametrize("mode", ["--tls", "--tlsc"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
async def test_swaks(site: StoreSite, postfix: Postfix, records: Records, mechanism: str, mode: str) -> None:
    user = site.store.user()
    async with submission(site, postfix) as gateway:
        port = gateway.ports[mode == "--tlsc"]
        login = ("--auth", mechanism, "--auth-user", user.name, "--auth-password", user.password)
        run = await blocking(swaks, port, mode, *login, to=FOREIGN)
        assert run.status == 0, run.transcript
        await gateway.idle()
        run = await blocking(swaks, port, mode, *login[:-1], "wrong", to=FOREIGN)
        assert run.status == 28, run.transcript
        assert any("535 5.7.8 Error: authentication failed" in reply for reply in run.replies), run.transcript
        await gateway.idle()
    await logged(postfix, f"sasl_method={mechanism}, sasl_username={user.name}$")
    login_record = records.one("auth")
    assert (login_record["user"], login_record["mechanism"]) == (user.name, mechanism)
    assert records.one("auth_failure")["user"] == user.name


def send(site: StoreSite, port: int, mechanism: str, user: User, *, initial: bool) -> None:
    """Python's smtplib, with or without an initial response. Raises SMTPAuthenticationError."""
    with smtplib.SMTP("127.0.0.1", port, timeout=20, source_address=(STRANGER, 0)) as connection:
        connection.starttls(context=site.place("imap").context())
        connection.ehlo("client.test")
        assert mechanism in connection.esmtp_features["auth"].split()
        say = client(mechanism, user)
        # smtplib hands over no challenge where it asks for the initial response.
        connection.auth(mechanism, lambda challenge=None: say(challenge or b"").decode(), initial_response_ok=initial)
        connection.sendmail("a@x.test", [FOREIGN], MESSAGE)


@each_mechanism
async def test_smtplib(site: StoreSite, postfix: Postfix, records: Records, mechanism: str) -> None:
    user = site.store.user()
    server_first = mechanism in ("LOGIN", "CRAM-MD5")
    async with submission(site, postfix) as gateway:
        for initial in (False,) if server_first else (False, True):
            await blocking(send, site, gateway.port, mechanism, user, initial=initial)
        with pytest.raises(smtplib.SMTPAuthenticationError) as raised:
            await blocking(send, site, gateway.port, mechanism, User(user.name, "wrong", "wrong"), initial=False)
        assert raised.value.smtp_code == 535
        await gateway.idle()
    await logged(postfix, rf"client=unknown\[{STRANGER}\], sasl_method={mechanism}, sasl_username={user.name}$")
    assert {record["user"] for record in records.all("auth")} == {user.name}


@pytest.mark.parametrize("implicit", [False, True], ids=["smtp", "smtps"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5", "OAUTHBEARER"])
async def test_curl_sends(site: StoreSite, postfix: Postfix, tmp_path: Path, mechanism: str, implicit: bool) -> None:
    user = site.store.user()
    (tmp_path / "message").write_bytes(MESSAGE)
    async with submission(site, postfix) as gateway:
        url = f"smtps://localhost:{gateway.ports[1]}/c.test" if implicit else f"smtp://localhost:{gateway.port}/c.test"
        token = ["--oauth2-bearer", user.token] if mechanism == "OAUTHBEARER" else []
        command = [
            require("curl"), "-sSv4", "--max-time", "20", "--ssl-reqd", "--cacert", str(site.ca), "--mail-from", "a@x.test",
            "--mail-rcpt", "user@local.test", "-T", str(tmp_path / "message"), "--user", f"{user.name}:{user.password}",
            "--login-options", f"AUTH={mechanism}", *token, url,
        ]  # fmt: skip
        run = await blocking(subprocess.run, command, capture_output=True, check=False)
        assert run.returncode == 0, run.stderr
    await logged(postfix, f"sasl_method={mechanism}, sasl_username={user.name}$")
    assert len(await stored(postfix, 1)) == 1


async def test_in_clear_text(site: StoreSite, postfix: Postfix) -> None:
    """Before TLS only what shows no secret is announced, and nothing else is relayed."""
    user = site.store.user()
    async with submission(site, postfix) as gateway:
        greeting, ehlo, refusal = await blocking(talk, gateway.port, "EHLO c.test", "AUTH PLAIN AGEAYg==")
        (announced,) = [line for line in ehlo.splitlines() if "AUTH " in line]
        assert set(announced.split()[1:]) == {"CRAM-MD5", "SCRAM-SHA-256"}
        assert greeting.startswith("220")
        assert refusal[0] in "45", refusal
        login = ("--auth", "CRAM-MD5", "--auth-user", user.name, "--auth-password", user.password)
        assert (await blocking(swaks, gateway.port, *login, to=FOREIGN)).status == 0


async def test_cancel(site: StoreSite, postfix: Postfix) -> None:
    """The client gives up, with `*` (RFC 4954 4); the session goes on."""
    user = site.store.user()
    plain = b64encode(f"\0{user.name}\0{user.password}".encode()).decode()
    async with submission(site, postfix, allow_plaintext_auth=True) as gateway:
        lines = (
            "EHLO c.test",
            "AUTH CRAM-MD5",
            "*",
            f"AUTH PLAIN {plain}",
            "MAIL FROM:<a@x.test>",
            f"RCPT TO:<{FOREIGN}>",
        )
        replies = await blocking(talk, gateway.port, *lines)
    assert [reply[:3] for reply in replies] == ["220", "250", "334", "501", "235", "250", "250"]


async def test_postfix_is_down(site: StoreSite, postfix: Postfix) -> None:
    user = site.store.user()
    async with submission(site, postfix, allow_plaintext_auth=True) as gateway:
        await blocking(postfix.stop)
        plain = b64encode(f"\0{user.name}\0{user.password}".encode()).decode()
        *_, reply = await blocking(talk, gateway.port, "EHLO c.test", f"AUTH PLAIN {plain}")
        assert reply.startswith("454 4."), reply


async def test_rate_of_failures(site: StoreSite, postfix: Postfix, records: Records) -> None:
    """What the upstream refused is counted by the user whom the exchange showed."""
    user = site.store.user()
    limit = {"rate_limit": {"count": "auth_failures", "limit": "2/hour"}}
    login = ("--auth", "CRAM-MD5", "--auth-user", user.name, "--auth-password")
    async with submission(site, postfix, stages=[limit, "auth_relay", "xclient", "splice"]) as gateway:
        for _ in range(2):
            assert (await blocking(swaks, gateway.port, *login, "wrong")).status == 28
        run = await blocking(swaks, gateway.port, *login, user.password)
        assert run.status == 28, run.transcript
        assert any(reply.startswith("454 4.7.0") for reply in run.replies), run.transcript
        await gateway.idle()
    assert [failure["stage"] for failure in records.all("auth_failure")] == ["auth_relay", "auth_relay", "rate_limit"]


# -- Dovecot -----------------------------------------------------------------------------------------------------


def relay(site: StoreSite, protocol: Protocol, **more: object) -> Pipeline:
    """A store that does the logins itself."""
    served = site.pipeline(protocol, ["auth_relay", "xclient", "splice"], allow_plaintext_auth=False)
    return served | more


def log_in(place: Place, mechanism: str, user: User, mode: Mode) -> bytes:
    """Log in with this mechanism, or with LOGIN or USER and PASS where it is empty, and fetch the message."""
    if place.protocol == "imap":
        with imap(place, mode, STRANGER) as reader:
            if mechanism:
                reader.authenticate(mechanism, client(mechanism, user))
            else:
                reader.login(user.name, user.password)
            return fetch_imap(reader)
    with pop3(place, mode, STRANGER) as popper:
        if mechanism:
            pop3_auth(popper, mechanism, client(mechanism, user))
        else:
            popper.user(user.name)
            popper.pass_(user.password)
        return b"\r\n".join((*popper.retr(1)[1], b""))


@each_protocol
@pytest.mark.parametrize("mechanism", ["", *MECHANISMS])
async def test_store(site: StoreSite, records: Records, protocol: Protocol, mechanism: str) -> None:
    user = with_message(site.store)
    modes: tuple[Mode, ...] = ("starttls", "tls") if not mechanism or mechanism in IN_CLEAR else MODES
    async with running(relay(site, protocol), learn=True) as gateway:
        place = site.served(protocol, gateway)
        for mode in modes:
            assert await blocking(log_in, place, mechanism, user, mode) == MESSAGE
        with pytest.raises((imaplib.IMAP4.error, poplib.error_proto), match=r"Authentication failed\."):
            await blocking(log_in, place, mechanism, User(user.name, "wrong", "wrong"), "starttls")
        if len(modes) < 3:
            with pytest.raises((imaplib.IMAP4.error, poplib.error_proto)):
                await blocking(log_in, place, mechanism, user, "plain")
        await gateway.idle()
    login = await blocking(site.store.wait_login, protocol, user)
    assert login["rip"] == STRANGER
    assert login["method"] == (mechanism or "PLAIN")
    assert {record["user"] for record in records.all("auth")} == {user.name}


@each_protocol
async def test_programs(site: StoreSite, tmp_path: Path, protocol: Protocol) -> None:
    user = with_message(site.store)
    async with running(relay(site, protocol), learn=True) as gateway:
        place = site.served(protocol, gateway)
        for options in (["--login-options", "AUTH=CRAM-MD5"], ["--oauth2-bearer", user.token], ["--sasl-ir"]):
            fetched = await blocking(curl_fetch, place, "starttls", user, tmp_path, *options)
            assert (fetched.status, fetched.content) == (0, MESSAGE), fetched.said
        auth = "cram-md5" if protocol == "imap" else "password"
        fetched = await blocking(fetchmail, place, "tls", user, tmp_path, auth=auth)
        assert fetched.status == 0, fetched.said
        assert body(fetched.content) == body(MESSAGE)
        if protocol == "imap":
            fetched = await blocking(mbsync, place, "starttls", user, tmp_path)
            assert fetched.status == 0, fetched.said
            assert body(fetched.content) == body(MESSAGE)
        stranger = User(user.name, "wrong")
        assert (await blocking(curl, place, "tls", stranger, tmp_path)).status == 67


@each_protocol
async def test_store_is_down(site: StoreSite, protocol: Protocol) -> None:
    upstreams = {"store": {"servers": [f"{protocol}://127.0.0.1:{free_port()}"], "tls": "off"}}
    expected = r"\[UNAVAILABLE\]" if protocol == "imap" else r"-ERR \[SYS/TEMP\]"
    async with running(relay(site, protocol, upstreams=upstreams)) as gateway:
        place = site.served(protocol, gateway)
        with pytest.raises((imaplib.IMAP4.error, poplib.error_proto), match=expected):
            await blocking(log_in, place, "", site.store.user(), "starttls")
