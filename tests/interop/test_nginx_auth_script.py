"""An auth server as people write it for nginx, asked by `auth_http`, in front of Dovecot and Postfix."""

from __future__ import annotations

import imaplib
import poplib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.testing.gateway import running
from tests.interop.auth_script import AuthScript
from tests.interop.conftest import StartPostfix
from tests.interop.mail_client import STRANGER
from tests.interop.postfix_upstream import AUTHORIZED, logged, stored
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
from tests.peers.clients import swaks
from tests.peers.dovecot_store import User
from tests.peers.mail_clients import Place, Protocol, body, curl_fetch, fetchmail, imap, pop3
from tests.peers.postfix import Postfix
from tests.peers.process import scratch
from tests.peers.sasl_client import client, pop3_auth

pytestmark = [pytest.mark.peers, pytest.mark.anyio]
each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)
METHODS = ["plain", "login", "cram-md5", "apop", "xoauth2", "oauthbearer"]
INVALID = "Invalid login or password"


@pytest.fixture(scope="module")
def site() -> Iterator[StoreSite]:
    """One store."""
    with store_site() as site:
        yield site


@pytest.fixture
def owner(site: StoreSite) -> User:
    """Somebody with a message."""
    return with_message(site.store)


@pytest.fixture
def script(site: StoreSite, owner: User) -> Iterator[AuthScript]:
    """Knows the owner, and sends everybody to the store."""
    servers = {"imap": site.store.imap.plain, "pop3": site.store.pop3.plain}
    with scratch() as folder, AuthScript(folder, [owner], servers) as script:
        yield script


def pipeline(site: StoreSite, script: AuthScript, protocol: Protocol, **settings: object) -> Pipeline:
    """No pool: the auth server names the server."""
    auth = {"auth_http": {"url": script.url, "methods": METHODS, **settings}}
    served = site.pipeline(protocol, [auth, "xclient", "splice"], dynamic_servers={"tls": "off"})
    del served["upstreams"]
    return served


def log_in(place: Place, mechanism: str, user: User) -> bytes:
    """Log in by whatever mechanism, and fetch the message."""
    if place.protocol == "imap":
        with imap(place, "starttls", STRANGER) as reader:
            if mechanism:
                reader.authenticate(mechanism, client(mechanism, user))
            else:
                reader.login(user.name, user.password)
            return fetch_imap(reader)
    with pop3(place, "starttls", STRANGER) as popper:
        if mechanism == "APOP":
            popper.apop(user.name, user.password)
        elif mechanism:
            pop3_auth(popper, mechanism, client(mechanism, user))
        else:
            popper.user(user.name)
            popper.pass_(user.password)
        return b"\r\n".join((*popper.retr(1)[1], b""))


BOTH = ("", "PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2", "OAUTHBEARER")


@each_protocol
async def test_every_method(site: StoreSite, script: AuthScript, owner: User, protocol: Protocol) -> None:
    """Passwords and tokens go on to the store; for a digest the script tells the password."""
    mechanisms = (*BOTH, "APOP") if protocol == "pop3" else BOTH
    async with running(pipeline(site, script, protocol)) as gateway:
        place = site.served(protocol, gateway)
        for mechanism in mechanisms:
            assert await blocking(log_in, place, mechanism, owner) == MESSAGE, mechanism
        await gateway.idle()
    methods = [request["auth-method"] for request in script.requests()]
    assert methods == [name.lower() if name not in ("", "LOGIN") else "plain" for name in mechanisms]
    for request in script.requests():
        assert request["auth-protocol"] == protocol
        assert request["client-ip"] == STRANGER
        assert request["auth-ssl"] == "on"
        assert request["auth-login-attempt"] == "1"
        assert ("auth-salt" in request) == (request["auth-method"] in ("cram-md5", "apop"))
    login = await blocking(site.store.wait_login, protocol, owner)
    assert login["rip"] == STRANGER


@each_protocol
async def test_programs(site: StoreSite, script: AuthScript, owner: User, tmp_path: Path, protocol: Protocol) -> None:
    async with running(pipeline(site, script, protocol)) as gateway:
        place = site.served(protocol, gateway)
        fetched = await blocking(curl_fetch, place, "tls", owner, tmp_path, "--oauth2-bearer", owner.token)
        assert (fetched.status, fetched.content) == (0, MESSAGE), fetched.said
        fetched = await blocking(fetchmail, place, "starttls", owner, tmp_path)
        assert fetched.status == 0, fetched.said
        assert body(fetched.content) == body(MESSAGE)


@each_protocol
@pytest.mark.parametrize("mechanism", ["", "CRAM-MD5", "OAUTHBEARER"])
async def test_refusal(site: StoreSite, script: AuthScript, owner: User, protocol: Protocol, mechanism: str) -> None:
    """The client reads the script's words, and may try again."""

    def try_twice(place: Place) -> list[str]:
        answers = []
        stranger = User(owner.name, "wrong", "wrong")
        if protocol == "imap":
            with imap(place, "starttls") as reader:
                for user in (stranger, owner):
                    try:
                        if mechanism:
                            reader.authenticate(mechanism, client(mechanism, user))
                        else:
                            reader.login(user.name, user.password)
                        answers.append("in")
                    except imaplib.IMAP4.error as error:
                        answers.append(str(error))
        else:
            with pop3(place, "starttls") as popper:
                for user in (stranger, owner):
                    try:
                        if mechanism:
                            pop3_auth(popper, mechanism, client(mechanism, user))
                        else:
                            popper.user(user.name)
                            popper.pass_(user.password)
                        answers.append("in")
                    except poplib.error_proto as error:
                        answers.append(str(error))
        return answers

    async with running(pipeline(site, script, protocol)) as gateway:
        first, second = await blocking(try_twice, site.served(protocol, gateway))
    assert INVALID in first
    assert second == "in"
    assert [request["auth-login-attempt"] for request in script.requests()] == ["1", "2"]


@each_protocol
async def test_closes_without_wait(site: StoreSite, script: AuthScript, owner: User, protocol: Protocol) -> None:
    """As nginx does where the script sends no Auth-Wait."""
    async with running(pipeline(site, script, protocol, close_without_wait=True)) as gateway:
        place = site.served(protocol, gateway)

        def fails() -> None:
            stranger = User(owner.name, "wrong")
            if protocol == "imap":
                with imap(place) as reader:
                    with pytest.raises(imaplib.IMAP4.error, match=INVALID):
                        reader.login(stranger.name, stranger.password)
                    with pytest.raises(imaplib.IMAP4.abort):
                        reader.noop()
            else:
                with pop3(place) as popper:
                    popper.user(stranger.name)
                    with pytest.raises(poplib.error_proto, match=INVALID):
                        popper.pass_(stranger.password)
                    with pytest.raises((poplib.error_proto, OSError)):
                        popper.user(stranger.name)

        await blocking(fails)


@each_protocol
async def test_script_is_down(site: StoreSite, script: AuthScript, owner: User, protocol: Protocol) -> None:
    """No word about the password."""
    async with running(pipeline(site, script, protocol)) as gateway:
        await blocking(script.stop)
        place = site.served(protocol, gateway)
        expected = r"\[UNAVAILABLE\]" if protocol == "imap" else r"-ERR \[SYS/TEMP\]"
        with pytest.raises((imaplib.IMAP4.error, poplib.error_proto), match=expected):
            await blocking(log_in, place, "", owner)


async def test_submission(site: StoreSite, owner: User, start_postfix: StartPostfix) -> None:
    """The same script sends SMTP to a Postfix, which hears who the client is and who logged in."""
    postfix: Postfix = start_postfix(main=AUTHORIZED)
    with scratch() as folder, AuthScript(folder, [owner], {"smtp": postfix.port}) as script:
        served = pipeline(site, script, "imap")
        served["listen"] = ["smtp://127.0.0.1:0"]
        login = ("--auth-user", owner.name, "--auth-password", owner.password)
        async with running(served) as gateway:
            run = await blocking(swaks, gateway.port, "--tls", "--auth", "CRAM-MD5", *login)
            assert run.status == 0, run.transcript
            await logged(postfix, f"sasl_method=XCLIENT, sasl_username={owner.name}")
            assert len(await stored(postfix, 1)) == 1
            run = await blocking(swaks, gateway.port, "--auth", "PLAIN", *login[:3], "wrong")
            assert run.status == 28, run.transcript
            assert any(INVALID in reply for reply in run.replies), run.transcript
        assert {request["auth-protocol"] for request in script.requests()} == {"smtp"}
