"""Dovecot behind the gateway, with real IMAP and POP3 clients in front of it."""

from __future__ import annotations

import asyncio
import imaplib
import poplib
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from gateway.testing.gateway import running
from tests.interop.conftest import Records
from tests.interop.gateway_process import GatewayProcess
from tests.interop.idle_clients import IdleClient, all_wake
from tests.interop.mail_client import STRANGER
from tests.interop.store_site import (
    MESSAGE,
    PROTOCOLS,
    VERIFIED_BY_STORE,
    StoreSite,
    T,
    big_message,
    blocking,
    fetch_imap,
    store_site,
    with_message,
)
from tests.peers.clients import burst
from tests.peers.dovecot_store import DOMAINS, MASTER_PASSWORD, MASTER_USER, MailStore, User
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
from tests.peers.process import free_port, scratch

pytestmark = [pytest.mark.peers, pytest.mark.anyio]
each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)

# -- the clients, on every way through -------------------------------------------------------------------------

Served = dict[tuple[Protocol, Mode], Place]


@pytest.fixture(scope="module")
def site() -> Iterator[StoreSite]:
    """Two stores that know the same people."""
    with store_site("one", "two") as site:
        yield site


@pytest.fixture(scope="module")
def served(site: StoreSite) -> Iterator[Served]:
    """`gateway run` with a pipeline for each protocol and each way to reach the store."""
    places: Served = {}
    documents = []
    for protocol in PROTOCOLS:
        for upstream in MODES:
            ports = free_port(), free_port()
            places[protocol, upstream] = site.place(protocol, *ports)
            name = {"name": f"{protocol}-{upstream}", "hostname": "gateway.test"}
            documents.append(name | site.pipeline(protocol, upstream=upstream, ports=ports))
    with scratch() as folder:
        (folder / "mail.yaml").write_text(yaml.safe_dump_all(documents, sort_keys=False))
        with GatewayProcess(folder, "mail.yaml"):
            yield places


@pytest.fixture(scope="module")
def big(site: StoreSite) -> tuple[User, bytes]:
    """Somebody with a message of 25 MB."""
    message = big_message()
    return with_message(site.store, message), message


@pytest.mark.parametrize("upstream", MODES)
@pytest.mark.parametrize("mode", MODES)
def test_every_way_through(site: StoreSite, served: Served, mode: Mode, upstream: Mode) -> None:
    user = with_message(site.store)
    with imap(served["imap", upstream], mode) as reader:
        reader.login(user.name, user.password)
        assert fetch_imap(reader) == MESSAGE
        assert reader.logout()[0] == "BYE"
    with pop3(served["pop3", upstream], mode) as popper:
        popper.user(user.name)
        popper.pass_(user.password)
        assert retrieved(popper) == MESSAGE
        assert popper.quit().startswith(b"+OK")
    for protocol in PROTOCOLS:
        secured = site.store.wait_login(protocol, user)
        assert ("TLS" in secured) == (upstream != "plain")


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("mode", MODES)
def test_fetches_25_megabytes(served: Served, big: tuple[User, bytes], tmp_path: Path, mode: Mode, turn: int) -> None:
    """Each client comes in each of the three ways, and meets the store in each of them once."""
    user, message = big
    upstream = MODES[(MODES.index(mode) + turn) % 3]
    popped, read = served["pop3", upstream], served["imap", upstream]
    if turn == 0:
        for place in (popped, read):
            fetched = curl_fetch(place, mode, user, tmp_path)
            assert fetched.status == 0, fetched.said
            assert fetched.content == message
        fetched = mbsync(read, mode, user, tmp_path)
        assert fetched.status == 0, fetched.said
        assert body(fetched.content) == body(message)
    elif turn == 1:
        for place in (popped, read):
            fetched = fetchmail(place, mode, user, tmp_path)
            assert fetched.status == 0, fetched.said
            assert body(fetched.content) == body(message)
    else:
        with imap(read, mode) as reader:
            reader.login(user.name, user.password)
            assert fetch_imap(reader) == message
        with pop3(popped, mode) as popper:
            popper.user(user.name)
            popper.pass_(user.password)
            assert retrieved(popper) == message


def retrieved(popper: poplib.POP3) -> bytes:
    """The first message."""
    return b"\r\n".join((*popper.retr(1)[1], b""))


@pytest.mark.parametrize("mode", MODES)
def test_appends_25_megabytes(site: StoreSite, served: Served, tmp_path: Path, mode: Mode) -> None:
    message, user = big_message(), site.store.user()
    (tmp_path / "message").write_bytes(message)
    place = served["imap", MODES[(MODES.index(mode) + 1) % 3]]
    ended = curl(place, mode, user, tmp_path, "INBOX", "-T", str(tmp_path / "message"))
    assert ended.status == 0, ended.said
    assert site.store.stored(user) == [message]


def test_mbsync_pushes(site: StoreSite, served: Served, tmp_path: Path) -> None:
    user = site.store.user()
    (tmp_path / "INBOX/cur").mkdir(parents=True)
    (tmp_path / "INBOX/cur/1.1.test:2,").write_bytes(MESSAGE.replace(b"\r\n", b"\n"))
    ended = mbsync(served["imap", "tls"], "starttls", user, tmp_path, push=True)
    assert ended.status == 0, ended.said
    (stored,) = site.store.stored(user)
    assert body(stored) == body(MESSAGE)


# -- who the client is -----------------------------------------------------------------------------------------


def log_in(protocol: Protocol, place: Place, user: User, mode: Mode = "plain", source: str = STRANGER) -> bytes:
    """Log in with a password as most clients do, and fetch the first message."""
    if protocol == "imap":
        with imap(place, mode, source) as reader:
            reader.login(user.name, user.password)
            return fetch_imap(reader)
    with pop3(place, mode, source) as popper:
        popper.user(user.name)
        popper.pass_(user.password)
        return retrieved(popper)


def refused(protocol: Protocol, place: Place, user: User, mode: Mode = "plain", source: str = STRANGER) -> str:
    """What a client reads that does not get in; "" if the connection is just closed."""
    try:
        log_in(protocol, place, user, mode, source)
    except (imaplib.IMAP4.error, poplib.error_proto) as error:
        return error.args[0].decode() if isinstance(error.args[0], bytes) else str(error.args[0])
    except OSError:
        return ""
    raise AssertionError("was let in")


@each_protocol
@pytest.mark.parametrize("way", ["xclient", "proxy_header: 1", "proxy_header: 2"])
async def test_store_logs_the_client(site: StoreSite, protocol: Protocol, way: str) -> None:
    user = with_message(site.store)
    name, _, version = way.partition(": ")
    pipeline = site.pipeline(protocol, [VERIFIED_BY_STORE, {name: int(version)} if version else name, "splice"])
    if version:
        port = getattr(site.store, protocol).proxied
        pipeline["upstreams"] = {"store": {"servers": [f"{protocol}://127.0.0.1:{port}"], "tls": "off"}}
    async with running(pipeline, learn=not version) as gateway:
        assert await blocking(log_in, protocol, site.served(protocol, gateway), user) == MESSAGE
        await gateway.idle()
    login = await blocking(site.store.wait_login, protocol, user)
    assert login["rip"] == STRANGER
    assert login["rport"] not in ("", "0")
    if version or protocol == "imap":
        assert login["lport"] == str(gateway.port)


@each_protocol
async def test_store_logs_the_client_behind_a_proxy(site: StoreSite, protocol: Protocol) -> None:
    """What a trusted load balancer says of the client is what the store hears."""
    user = with_message(site.store)
    pipeline = site.pipeline(
        protocol,
        [VERIFIED_BY_STORE, "xclient", "splice"],
        trust={"proxy": ["127.0.0.1"]},
        listen=[{"url": f"{protocol}://127.0.0.1:0", "proxy_protocol": "required"}],
    )
    login = {
        "imap": f'a LOGIN {user.name} "{quoted(user.password)}"\r\nb LOGOUT\r\n',
        "pop3": f"USER {user.name}\r\nPASS {user.password}\r\nQUIT\r\n",
    }[protocol]
    async with running(pipeline, learn=True) as gateway:
        said = f"PROXY TCP4 192.0.2.9 192.0.2.1 4711 143\r\n{login}".encode()
        answer = await blocking(burst, gateway.port, said)
        assert (b"\r\na OK" if protocol == "imap" else b"Logged in.") in answer, answer
        await gateway.idle()
    logged = await blocking(site.store.wait_login, protocol, user)
    assert (logged["rip"], logged["rport"]) == ("192.0.2.9", "4711")


def quoted(text: str) -> str:
    """What stands in a quoted string of IMAP."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


# -- where to --------------------------------------------------------------------------------------------------


def in_both(site: StoreSite, domain: str = DOMAINS[0]) -> User:
    """Somebody whose message says which store it is in."""
    user = site.store.user(domain)
    for store in site.stores:
        store.put(user, MESSAGE + store.name.encode() + b"\r\n")
    return user


def store_of(site: StoreSite, message: bytes) -> MailStore:
    """The store that this message came from."""
    return next(store for store in site.stores if message.endswith(store.name.encode() + b"\r\n"))


@each_protocol
async def test_same_user_same_store(site: StoreSite, protocol: Protocol) -> None:
    servers = [f"{protocol}://127.0.0.1:{getattr(store, protocol).plain}" for store in site.stores]
    pool = {"servers": servers, "tls": "off", "balance": "hash_user"}
    users = [in_both(site) for _ in range(8)]
    async with running(site.pipeline(protocol, upstreams={"stores": pool}), learn=True) as gateway:
        place = site.served(protocol, gateway)
        chosen = set()
        for user in users:
            first = store_of(site, await blocking(log_in, protocol, place, user))
            chosen.add(first.name)
            for source in (STRANGER, "127.0.0.6"):
                assert store_of(site, await blocking(log_in, protocol, place, user, source=source)) is first
        assert chosen == {"one", "two"}


@each_protocol
async def test_routes_by_domain(site: StoreSite, protocol: Protocol) -> None:
    upstreams = {store.name: site.pool(protocol, "plain", store) for store in site.stores}
    rules = [{"when": f'auth.domain == "{DOMAINS[1]}"', "to": "two"}]
    stages = [VERIFIED_BY_STORE, {"route": {"rules": rules, "default": "one"}}, "splice"]
    async with running(site.pipeline(protocol, stages, upstreams=upstreams), learn=True) as gateway:
        for domain, store in zip(DOMAINS, site.stores, strict=True):
            message = await blocking(log_in, protocol, site.served(protocol, gateway), in_both(site, domain))
            assert store_of(site, message) is store


# -- how to log in ---------------------------------------------------------------------------------------------


def users_file(folder: Path, *users: User) -> str:
    """A file for `auth_file`."""
    path = folder / "users"
    path.write_text("".join(f"{user.name}:{{PLAIN}}{user.password}\n" for user in users))
    return str(path)


async def test_digests_of_a_file(site: StoreSite, tmp_path: Path) -> None:
    """CRAM-MD5 and APOP, verified here; the store gets the password that the file has."""
    user = with_message(site.store)
    auth = {"auth_file": {"file": users_file(tmp_path, user), "cram_md5": True, "apop": True}}

    def cram_md5(place: Place, password: str) -> bytes:
        with imap(place, "starttls") as reader:
            reader.login_cram_md5(user.name, password)
            return fetch_imap(reader)

    def apop(place: Place, password: str) -> bytes:
        with pop3(place) as popper:
            popper.apop(user.name, password)
            return retrieved(popper)

    async with running(site.pipeline("imap", [auth, "splice"]), learn=True) as gateway:
        place = site.served("imap", gateway)
        assert await blocking(cram_md5, place, user.password) == MESSAGE
        with pytest.raises(imaplib.IMAP4.error, match=r"\[AUTHENTICATIONFAILED\]"):
            await blocking(cram_md5, place, "wrong")
        fetched = await blocking(curl_fetch, place, "tls", user, tmp_path, "--login-options", "AUTH=CRAM-MD5")
        assert (fetched.status, fetched.content) == (0, MESSAGE), fetched.said
    async with running(site.pipeline("pop3", [auth, "splice"]), learn=True) as gateway:
        place = site.served("pop3", gateway)
        assert await blocking(apop, place, user.password) == MESSAGE
        with pytest.raises(poplib.error_proto, match=r"\[AUTH\]"):
            await blocking(apop, place, "wrong")
        fetched = await blocking(fetchmail, place, "plain", user, tmp_path, apop=True)
        assert fetched.status == 0, fetched.said
        assert body(fetched.content) == body(MESSAGE)
        fetched = await blocking(curl_fetch, place, "tls", user, tmp_path, "--login-options", "AUTH=+APOP")
        assert (fetched.status, fetched.content) == (0, MESSAGE), fetched.said


@each_protocol
@pytest.mark.parametrize("separator", ["", "*"], ids=["authzid", "separator"])
async def test_master_user(site: StoreSite, tmp_path: Path, protocol: Protocol, separator: str) -> None:
    """The gateway verifies other passwords than the store's, and opens the mailbox as its master user."""
    owner = with_message(site.store)
    user = User(owner.name, "known here only")
    master = {"user": MASTER_USER, "password": MASTER_PASSWORD} | ({"separator": separator} if separator else {})
    stages = [{"auth_file": users_file(tmp_path, user)}, {"upstream_auth": {"master": master}}, "splice"]
    async with running(site.pipeline(protocol, stages), learn=True) as gateway:
        place = site.served(protocol, gateway)
        assert await blocking(log_in, protocol, place, user) == MESSAGE
        assert await blocking(refused, protocol, place, owner)
    assert await blocking(site.store.wait_login, protocol, owner)


@each_protocol
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
async def test_umlauts(site: StoreSite, tmp_path: Path, protocol: Protocol, mechanism: str) -> None:
    """What fits into no quoted string of IMAP goes on as a literal."""
    user = site.store.umlaut
    site.store.put(user, MESSAGE)
    async with running(site.pipeline(protocol), learn=True) as gateway:
        place = site.served(protocol, gateway)
        options = ("--login-options", f"AUTH={mechanism}")
        fetched = await blocking(curl_fetch, place, "plain", user, tmp_path, *options)
        assert (fetched.status, fetched.content) == (0, MESSAGE), fetched.said
    assert await blocking(site.store.wait_login, protocol, user)


# -- refusals --------------------------------------------------------------------------------------------------

FAILED = {"imap": "[AUTHENTICATIONFAILED]", "pop3": "-ERR [AUTH]"}
UNAVAILABLE = {"imap": "[UNAVAILABLE]", "pop3": "-ERR [SYS/TEMP]"}


@each_protocol
async def test_wrong_password(site: StoreSite, tmp_path: Path, protocol: Protocol) -> None:
    user = site.store.user()
    stranger = User(user.name, "wrong")
    for stages in ([VERIFIED_BY_STORE, "splice"], [{"auth_file": users_file(tmp_path, user)}, "splice"]):
        async with running(site.pipeline(protocol, stages), learn=True) as gateway:
            place = site.served(protocol, gateway)
            assert FAILED[protocol] in await blocking(refused, protocol, place, stranger)
            assert (await blocking(curl, place, "starttls", stranger, tmp_path)).status == 67
            assert (await blocking(fetchmail, place, "tls", stranger, tmp_path)).status == 3
            if protocol == "imap":
                assert (await blocking(mbsync, place, "plain", stranger, tmp_path)).status == 1


@each_protocol
async def test_store_s_own_words(site: StoreSite, protocol: Protocol) -> None:
    stranger = User(site.store.user().name, "wrong")
    stages = [VERIFIED_BY_STORE, {"splice": {"pass_error_message": True}}]
    async with running(site.pipeline(protocol, stages), learn=True) as gateway:
        answer = await blocking(refused, protocol, site.served(protocol, gateway), stranger)
    assert answer.endswith(" Authentication failed."), answer


@each_protocol
async def test_store_is_down(site: StoreSite, tmp_path: Path, protocol: Protocol) -> None:
    """No word about the password: the client is to try again."""
    user = site.store.user()
    pool = {"servers": [f"{protocol}://127.0.0.1:{free_port()}"], "tls": "off"}
    for stages in ([VERIFIED_BY_STORE, "splice"], [{"auth_file": users_file(tmp_path, user)}, "splice"]):
        async with running(site.pipeline(protocol, stages, upstreams={"store": pool})) as gateway:
            place = site.served(protocol, gateway)
            assert UNAVAILABLE[protocol] in await blocking(refused, protocol, place, user)


@each_protocol
async def test_store_dies(site: StoreSite, protocol: Protocol) -> None:
    """A session whose mail process is killed is closed, and the next one is served."""
    user = with_message(site.store)
    async with running(site.pipeline(protocol), learn=True) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        await reader.readline()
        writer.write(password_login(protocol, user))
        login = await blocking(site.store.wait_login, protocol, user)
        await blocking(site.store.kill_session, login["mpid"])
        async with asyncio.timeout(10):
            await reader.read()
            writer.close()
            await gateway.idle()
        assert await blocking(log_in, protocol, site.served(protocol, gateway), user) == MESSAGE


def password_login(protocol: Protocol, user: User) -> bytes:
    """The commands of a login."""
    if protocol == "imap":
        return f'a LOGIN {user.name} "{quoted(user.password)}"\r\n'.encode()
    return f"USER {user.name}\r\nPASS {user.password}\r\n".encode()


# -- stages that know nothing of protocols ---------------------------------------------------------------------


@each_protocol
async def test_greeting_delay(site: StoreSite, records: Records, protocol: Protocol) -> None:
    user = with_message(site.store)
    stages = [{"greeting_delay": {"seconds": "100ms", "early": "refuse"}}, VERIFIED_BY_STORE, "splice"]
    async with running(site.pipeline(protocol, stages), learn=True) as gateway:
        place = site.served(protocol, gateway)
        assert await blocking(log_in, protocol, place, user) == MESSAGE
        answer = await blocking(burst, gateway.port, password_login(protocol, user))
        assert answer.startswith(b"* BYE " if protocol == "imap" else b"-ERR "), answer
        assert answer.count(b"\r\n") == 1
        await gateway.idle()
    assert records.one("refusal")["cause"] == "spoke before its turn"


@each_protocol
async def test_connection_limit(site: StoreSite, protocol: Protocol) -> None:
    user = with_message(site.store)
    stages = [{"connection_limit": {"per_client": 1}}, VERIFIED_BY_STORE, "splice"]
    async with running(site.pipeline(protocol, stages), learn=True) as gateway:
        place = site.served(protocol, gateway)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, local_addr=(STRANGER, 0))
        assert b"ready" in await reader.readline()
        assert "too many connections" in await blocking(refused, protocol, place, user)
        assert await blocking(log_in, protocol, place, user, source="127.0.0.6") == MESSAGE
        writer.close()
        await gateway.idle()
        assert await blocking(log_in, protocol, place, user) == MESSAGE


@each_protocol
async def test_access(site: StoreSite, records: Records, protocol: Protocol) -> None:
    user = with_message(site.store)
    stages = [{"access": {"deny": [STRANGER], "refuse_at": "now"}}, VERIFIED_BY_STORE, "splice"]
    async with running(site.pipeline(protocol, stages), learn=True) as gateway:
        place = site.served(protocol, gateway)
        assert "access denied" in await blocking(refused, protocol, place, user)
        assert await blocking(log_in, protocol, place, user, source="127.0.0.6") == MESSAGE
        await gateway.idle()
    assert records.one("refusal")["cause"] == "access denied"


@each_protocol
async def test_require_tls(site: StoreSite, protocol: Protocol) -> None:
    user = with_message(site.store)
    stages = [{"require_tls": {"for": ["auth"]}}, VERIFIED_BY_STORE, "splice"]
    async with running(site.pipeline(protocol, stages), learn=True) as gateway:
        place = site.served(protocol, gateway)
        answer = await blocking(refused, protocol, place, user)
        assert ("[PRIVACYREQUIRED]" if protocol == "imap" else "-ERR ") in answer
        for mode in ("starttls", "tls"):
            assert await blocking(log_in, protocol, place, user, mode) == MESSAGE
    assert await blocking(site.store.wait_login, protocol, user)


async def test_require_tls_is_announced(site: StoreSite) -> None:
    def announced(place: Place, mode: Mode) -> tuple[str, ...]:
        with imap(place, mode) as reader:
            return reader.capabilities

    async with running(
        site.pipeline("imap", [{"require_tls": {"for": ["auth"]}}, VERIFIED_BY_STORE, "splice"])
    ) as gateway:
        place = site.served("imap", gateway)
        plain, secured = await blocking(announced, place, "plain"), await blocking(announced, place, "starttls")
    assert {"STARTTLS", "LOGINDISABLED"} <= set(plain)
    assert "AUTH=PLAIN" not in plain
    assert "AUTH=PLAIN" in secured
    assert not {"STARTTLS", "LOGINDISABLED"} & set(secured)


@each_protocol
async def test_rate_of_failures(site: StoreSite, records: Records, protocol: Protocol) -> None:
    """Once there were too many, not even the right password is asked about."""
    user = with_message(site.store)
    limit = {"rate_limit": {"count": "auth_failures", "limit": "2/hour"}}
    async with running(site.pipeline(protocol, [limit, VERIFIED_BY_STORE, "splice"]), learn=True) as gateway:
        place = site.served(protocol, gateway)
        for _ in range(2):
            assert FAILED[protocol] in await blocking(refused, protocol, place, User(user.name, "wrong"))
        answer = await blocking(refused, protocol, place, user)
        assert FAILED[protocol] not in answer
        assert await blocking(log_in, protocol, place, user, source="127.0.0.6") == MESSAGE
        await gateway.idle()
    assert [failure["stage"] for failure in records.all("auth_failure")] == ["upstream", "upstream", "rate_limit"]


# -- after the login -------------------------------------------------------------------------------------------


async def test_fifty_clients_wake(site: StoreSite) -> None:
    user = with_message(site.store)
    async with running(site.pipeline("imap"), learn=True) as gateway:
        await all_wake(gateway.port, user, 50, lambda: site.store.put(user, MESSAGE))
        await gateway.idle()


@each_protocol
@pytest.mark.parametrize("mode", ["plain", "tls"])
async def test_half_close(site: StoreSite, big: tuple[User, bytes], protocol: Protocol, mode: Mode) -> None:
    """A client that has said everything and closes its side still gets all of the answer.

    The store is met in clear text: Dovecot itself ends a TLS session at once.
    """
    user, message = big
    commands = {
        "imap": b"b SELECT INBOX\r\nc FETCH 1 BODY.PEEK[]\r\nd LOGOUT\r\n",
        "pop3": b"RETR 1\r\nQUIT\r\n",
    }[protocol]
    async with running(site.pipeline(protocol), learn=True) as gateway:
        place = site.served(protocol, gateway)
        answer = await blocking(half_closed, place, mode, password_login(protocol, user) + commands)
        assert message[-100:] in answer
        assert len(answer) > len(message)
        assert answer.splitlines()[-1].startswith(b"d OK" if protocol == "imap" else b"+OK")
        await gateway.idle()


def half_closed(place: Place, mode: Mode, data: bytes) -> bytes:
    """Say everything, close that direction, read to the end."""
    with socket.create_connection(("127.0.0.1", place.port(mode)), 20) as connection:
        if mode == "tls":
            return half_closed_tls(place, connection, data)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def half_closed_tls(place: Place, connection: socket.socket, data: bytes) -> bytes:
    """The same with close_notify, after which Python's SSLSocket could not read on."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = place.context().wrap_bio(incoming, outgoing, server_hostname="localhost")

    def until_done(step: Callable[[], T]) -> T:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                if outgoing.pending:
                    connection.sendall(outgoing.read())
                if block := connection.recv(65536):
                    incoming.write(block)
                else:
                    incoming.write_eof()

    until_done(session.do_handshake)
    until_done(lambda: session.read(65536))  # the greeting
    session.write(data)
    with suppress(ssl.SSLWantReadError):
        session.unwrap()
    connection.sendall(outgoing.read())
    connection.shutdown(socket.SHUT_WR)
    received = []
    with suppress(ssl.SSLZeroReturnError):
        while block := until_done(lambda: session.read(65536)):
            received.append(block)
    return b"".join(received)


async def test_quiet_session_ends(site: StoreSite) -> None:
    """`idle_timeout` counts both directions: a client in IDLE that hears and says nothing is closed in the end."""
    user = with_message(site.store)
    pipeline = site.pipeline("imap", limits={"auth_delay": 0, "idle_timeout": "200ms"})
    async with running(pipeline, learn=True) as gateway, asyncio.timeout(20):
        async with IdleClient(gateway.port, user) as client:
            await client.idle()
            with pytest.raises(AssertionError, match="closed"):
                while True:
                    await client.line()
        await gateway.idle()
