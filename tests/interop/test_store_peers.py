"""Dovecot and the clients of mail stores, without a gateway: what the tests with one build on."""

from __future__ import annotations

import imaplib
import poplib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.interop.idle_clients import all_wake
from tests.interop.store_site import MESSAGE, PROTOCOLS, StoreSite, big_message, fetch_imap, store_site, with_message
from tests.peers.dovecot_store import MASTER_PASSWORD, MASTER_USER, User
from tests.peers.mail_clients import MODES, Mode, Protocol, body, curl, curl_fetch, fetchmail, imap, mbsync, pop3
from tests.peers.sasl_client import MECHANISMS, client, pop3_auth

pytestmark = [pytest.mark.peers, pytest.mark.anyio]


@pytest.fixture(scope="module")
def site() -> Iterator[StoreSite]:
    """One store."""
    with store_site() as site:
        yield site


@pytest.fixture(scope="module")
def big(site: StoreSite) -> tuple[User, bytes]:
    """Somebody with a message of 25 MB."""
    message = big_message()
    return with_message(site.store, message), message


@pytest.mark.parametrize("mode", MODES)
def test_every_client_fetches(site: StoreSite, big: tuple[User, bytes], tmp_path: Path, mode: Mode) -> None:
    user, message = big
    for protocol in PROTOCOLS:
        fetched = curl_fetch(site.place(protocol), mode, user, tmp_path)
        assert fetched.status == 0, fetched.said
        assert fetched.content == message
    fetched = mbsync(site.place("imap"), mode, user, tmp_path)
    assert fetched.status == 0, fetched.said
    assert fetched.content.count(b"\nX-TUID: ") == 1
    assert body(fetched.content) == body(message)
    with imap(site.place("imap"), mode) as reader:
        reader.login(user.name, user.password)
        assert fetch_imap(reader) == message
    with pop3(site.place("pop3"), mode) as popper:
        popper.user(user.name)
        popper.pass_(user.password)
        assert b"\r\n".join((*popper.retr(1)[1], b"")) == message


@pytest.mark.parametrize(("protocol", "mode"), [("imap", "plain"), ("pop3", "starttls"), ("imap", "tls")])
def test_fetchmail_fetches(
    site: StoreSite, big: tuple[User, bytes], tmp_path: Path, protocol: Protocol, mode: Mode
) -> None:
    user, message = big
    fetched = fetchmail(site.place(protocol), mode, user, tmp_path)
    assert fetched.status == 0, fetched.said
    assert fetched.content.startswith(b"Received: from localhost")
    assert body(fetched.content) == body(message)


def test_appends(site: StoreSite, tmp_path: Path) -> None:
    message, user = tmp_path / "message", site.store.user()
    message.write_bytes(MESSAGE)
    ended = curl(site.place("imap"), "starttls", user, tmp_path, "INBOX", "-T", str(message))
    assert ended.status == 0, ended.said
    (tmp_path / "INBOX/cur").mkdir(parents=True)
    (tmp_path / "INBOX/cur/1.1.test:2,").write_bytes(MESSAGE.replace(b"\r\n", b"\n"))
    ended = mbsync(site.place("imap"), "tls", user, tmp_path, push=True)
    assert ended.status == 0, ended.said
    first, second = site.store.stored(user)
    assert first == MESSAGE
    assert body(second) == body(MESSAGE)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism(site: StoreSite, mechanism: str) -> None:
    user = with_message(site.store)
    with imap(site.place("imap"), "starttls") as reader:
        reader.authenticate(mechanism, client(mechanism, user))
        assert fetch_imap(reader) == MESSAGE
    with pop3(site.place("pop3")) as popper:
        assert pop3_auth(popper, mechanism, client(mechanism, user)).startswith(b"+OK")
        assert popper.stat()[0] == 1
    assert site.store.wait_login("imap", user)["method"] == mechanism
    assert site.store.wait_login("pop3", user)["method"] == mechanism


def test_every_mechanism_fails(site: StoreSite) -> None:
    """All at once, since Dovecot takes half a second for each."""
    stranger = User(site.store.user().name, "wrong", "wrong")

    def fail(mechanism: str) -> None:
        failed = r"\[AUTHENTICATIONFAILED\]"
        with imap(site.place("imap")) as reader, pytest.raises(imaplib.IMAP4.error, match=failed):
            reader.authenticate(mechanism, client(mechanism, stranger))
        with pop3(site.place("pop3")) as popper, pytest.raises(poplib.error_proto, match=r"-ERR \[AUTH\]"):
            pop3_auth(popper, mechanism, client(mechanism, stranger))

    with ThreadPoolExecutor() as pool:
        list(pool.map(fail, MECHANISMS))


def test_other_logins(site: StoreSite, tmp_path: Path) -> None:
    user = with_message(site.store)
    with pop3(site.place("pop3")) as popper:
        popper.apop(user.name, user.password)
        assert popper.stat()[0] == 1
    assert site.store.wait_login("pop3", user)["method"] == "APOP"
    fetched = fetchmail(site.place("pop3"), "plain", user, tmp_path, apop=True)
    assert fetched.status == 0, fetched.said
    assert body(fetched.content) == body(MESSAGE)
    for protocol in PROTOCOLS:
        assert curl(site.place(protocol), "plain", user, tmp_path, "", "--oauth2-bearer", user.token).status == 0
    with imap(site.place("imap")) as reader:
        reader.login(f"{user.name}*{MASTER_USER}", MASTER_PASSWORD)
        assert fetch_imap(reader) == MESSAGE
    with imap(site.place("imap")) as reader:
        master = User(MASTER_USER, MASTER_PASSWORD)
        reader.authenticate("PLAIN", client("PLAIN", master, authzid=user.name))
        assert fetch_imap(reader) == MESSAGE


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_clients_say_that_a_login_failed(site: StoreSite, tmp_path: Path, protocol: Protocol) -> None:
    stranger = User(site.store.user().name, "wrong")
    assert curl(site.place(protocol), "plain", stranger, tmp_path).status == 67
    assert fetchmail(site.place(protocol), "plain", stranger, tmp_path).status == 3
    if protocol == "imap":
        assert mbsync(site.place(protocol), "plain", stranger, tmp_path).status == 1


def test_believes_who_the_client_is(site: StoreSite) -> None:
    user = site.store.user()
    with imap(site.place("imap")) as reader:
        reader.xatom("ID", '("x-originating-ip" "192.0.2.7" "x-originating-port" "4711")')
        reader.login(user.name, user.password)
    login = site.store.wait_login("imap", user)
    assert (login["rip"], login["rport"]) == ("192.0.2.7", "4711")
    with pop3(site.place("pop3")) as popper:
        assert b"[XCLIENT]" in popper.getwelcome()
        popper._shortcmd("XCLIENT ADDR=192.0.2.8 PORT=4712")  # type: ignore[attr-defined]
        popper.user(user.name)
        popper.pass_(user.password)
    login = site.store.wait_login("pop3", user)
    assert (login["rip"], login["rport"]) == ("192.0.2.8", "4712")


async def test_clients_wake(site: StoreSite) -> None:
    user = with_message(site.store)
    await all_wake(site.store.imap.plain, user, 20, lambda: site.store.put(user, MESSAGE))
