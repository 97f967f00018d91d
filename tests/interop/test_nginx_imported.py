"""nginx configurations as tutorials have them: imported, served, and a mail goes through each of their listeners."""

from __future__ import annotations

import imaplib
import poplib
import re
import smtplib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.interop.auth_script import AuthScript
from tests.interop.conftest import StartPostfix
from tests.interop.mail_client import STRANGER
from tests.interop.nginx_imported import (
    SUBJECT,
    ImportedGateway,
    Sender,
    at,
    configuration,
    fetch,
    greeting,
    run_gateway,
)
from tests.interop.postfix_upstream import AUTHORIZED, DISCARD_FOREIGN, FOREIGN, LOGIN_RELAYS, logged, stored
from tests.interop.store_site import MESSAGE, StoreSite, blocking, store_site, with_message
from tests.peers.clients import burst
from tests.peers.dns import DnsServer
from tests.peers.dovecot_store import User
from tests.peers.mail_clients import MODES
from tests.peers.nginx import MODULE, NginxFile
from tests.peers.postfix import Postfix
from tests.peers.process import free_port, scratch, wait_for
from tests.peers.recording_auth_server import Answer, Client, RecordingAuthServer

pytestmark = pytest.mark.peers
BY_XCLIENT = rf"client=unknown\[{STRANGER}\], sasl_method=XCLIENT, sasl_username="


@pytest.fixture(scope="module")
def site() -> Iterator[StoreSite]:
    """One store."""
    with store_site() as site:
        yield site


@pytest.fixture
def sender(site: StoreSite) -> Sender:
    """A client that is not this machine."""
    return Sender(site.ca, STRANGER)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the configuration is, readable for everybody."""
    with scratch() as folder:
        yield folder


@contextmanager
def auth_script(site: StoreSite, user: User, postfix: Postfix) -> Iterator[AuthScript]:
    """The auth server on another host."""
    servers = {"smtp": postfix.port, "imap": site.store.imap.plain, "pop3": site.store.pop3.plain}
    with scratch() as folder, AuthScript(folder, [user], servers) as script:
        yield script


def delivered(postfix: Postfix, count: int) -> None:
    """Wait until Postfix has this many messages in the mailbox, each of them from the client itself."""
    wait_for(lambda: len(postfix.delivered()) >= count, f"{count} messages")
    messages = postfix.delivered()
    assert len(messages) == count
    for message in messages:
        assert f"Subject: {SUBJECT}".encode() in message
        assert f"[{STRANGER}]".encode() in message.partition(b"Subject:")[0]


def log_in_wrongly(connection: smtplib.SMTP, user: User) -> None:
    """Once, where `login` tries all mechanisms. Raises SMTPAuthenticationError."""
    connection.user, connection.password = user.name, "wrong"
    connection.auth("PLAIN", connection.auth_plain)


def test_auth_http_and_xclient(site: StoreSite, folder: Path, sender: Sender, start_postfix: StartPostfix) -> None:
    postfix, user, port = start_postfix(main=AUTHORIZED), site.store.user(), free_port()
    with auth_script(site, user, postfix) as script:
        conf = configuration("auth_http_xclient", folder, site, {
            "listen 25;": f"listen 127.0.0.1:{port};",
            "auth.example.com:8080/mail/auth": script.url.removeprefix("http://"),
            "/var/log/nginx/error.log": folder / "error.log",
        })  # fmt: skip
        with ImportedGateway(conf) as gateway:
            assert gateway.warnings == []
            with sender.connected(port) as connection:
                assert set(connection.esmtp_features) == {"size", "enhancedstatuscodes", "8bitmime", "dsn", "auth"}
                with pytest.raises(smtplib.SMTPSenderRefused, match="Authentication required"):
                    connection.sendmail("a@x.test", "user@local.test", "")
                with pytest.raises(smtplib.SMTPAuthenticationError, match="Invalid login or password"):
                    log_in_wrongly(connection, user)
            sender.send(port, user=user)
            delivered(postfix, 1)
            postfix.wait_log(BY_XCLIENT + user.name)
            pid_file = gateway.pid_file
        assert not pid_file.exists()
        good = script.requests()[-1]
        assert (good["x-auth-key"], good["client-ip"]) == ("secret_string", STRANGER)


def test_shared_tls(site: StoreSite, folder: Path, sender: Sender, start_postfix: StartPostfix) -> None:
    """Twice SMTP, twice IMAP, twice POP3 (one of these on two addresses), one certificate."""
    postfix, user = start_postfix(main=AUTHORIZED), with_message(site.store)
    ports = {number: free_port() for number in (25, 465, 143, 993, 110, 995)}
    changes: dict[str, object] = {
        "listen 25;": f"listen 127.0.0.1:{ports[25]}; protocol smtp;",
        "listen 465 ssl;": f"listen 127.0.0.1:{ports[465]} ssl; protocol smtp;",
        "listen 143;": f"listen 127.0.0.1:{ports[143]}; protocol imap;",
        "listen 993 ssl;": f"listen 127.0.0.1:{ports[993]} ssl;",
        "listen 110;": f"listen 127.0.0.1:{ports[110]}; protocol pop3;",
        "listen [::]:995 ssl": f"listen [::1]:{ports[995]} ssl",
        "listen 995 ssl;": f"listen 127.0.0.1:{ports[995]} ssl; protocol pop3;",
    }
    with auth_script(site, user, postfix) as script:
        changes["http://10.0.0.5:9000/cgi-bin/auth"] = script.url
        conf = configuration("shared_tls", folder, site, changes)
        with ImportedGateway(conf) as gateway:
            assert [line.partition(": ")[2] for line in gateway.warnings] == [
                "warning: proxy: does nothing in nginx, and is left out"
            ]
            sender.send(ports[25], "plain", user)
            sender.send(ports[25], "starttls", user)
            sender.send(ports[465], "tls", user)
            delivered(postfix, 3)
            postfix.wait_log(BY_XCLIENT + user.name)
            read, popped = at(site, "imap", ports[143], ports[993]), at(site, "pop3", ports[110], ports[995])
            for mode in MODES:
                assert fetch(read, mode, user, STRANGER) == MESSAGE
                if mode != "plain":
                    assert fetch(popped, mode, user, STRANGER) == MESSAGE
            assert greeting(site, "::1", ports[995]).startswith(b"+OK")
            with pytest.raises(poplib.error_proto):
                fetch(popped, "plain", user, STRANGER)
            with pytest.raises(imaplib.IMAP4.error, match="Invalid login or password"):
                fetch(read, "tls", User(user.name, "wrong"), STRANGER)
        told = {(request["auth-protocol"], request.get("auth-ssl", "off")) for request in script.requests()}
        assert told == {(protocol, tls) for protocol in ("smtp", "imap", "pop3") for tls in ("on", "off")} - {
            ("pop3", "off")
        }


def test_submission_with_proxy_pass(site: StoreSite, folder: Path, sender: Sender, start_postfix: StartPostfix) -> None:
    """The Postfix knows the passwords; who logged in there may send anywhere."""
    postfix = start_postfix(main=AUTHORIZED + site.store.main + LOGIN_RELAYS + DISCARD_FOREIGN + "mynetworks =\n")
    user, port, implicit = site.store.user(), free_port(), free_port()
    conf = configuration("submission_proxy_pass", folder, site, {
        "listen 587;": f"listen 127.0.0.1:{port};",
        "listen 465 ssl;": f"listen 127.0.0.1:{implicit} ssl;",
        "smtp_auth login plain; proxy_pass 127.0.0.1:10587; }": f"smtp_auth login plain; proxy_pass 127.0.0.1:{postfix.port}; }}",
        "proxy_pass 127.0.0.1:10587; xclient off;": f"proxy_pass 127.0.0.1:{postfix.port}; xclient off;",
    })  # fmt: skip
    with ImportedGateway(conf) as gateway:
        assert [line.partition(": warning: ")[2].partition(":")[0] for line in gateway.warnings] == ["proxy_pass"] * 2
        sender.send(port, "starttls", user, FOREIGN)
        sender.send(port, "plain", user, FOREIGN)
        sender.send(implicit, "tls", user, FOREIGN)
        wait_for(lambda: postfix.log().count("status=sent") == 3, "three deliveries")
        logins = re.findall(r"client=unknown\[(.*)\], sasl_method=(.*), sasl_username=(.*)$", postfix.log(), re.M)
        assert [(client, name) for client, _, name in logins] == [
            (STRANGER, user.name), (STRANGER, user.name), ("127.0.0.1", user.name)  # `xclient off`
        ]  # fmt: skip
        assert {method for _, method, _ in logins[:2]} <= {"PLAIN", "LOGIN"}, "as `smtp_auth login plain` says"
        with sender.connected(port, "starttls") as connection:
            with pytest.raises(smtplib.SMTPAuthenticationError):
                log_in_wrongly(connection, user)
            with pytest.raises(smtplib.SMTPSenderRefused, match="Authentication required"):
                connection.sendmail("a@x.test", "user@local.test", "")


NGINX = """\
load_module {module};
daemon off;
user root;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
"""
PATHS = "access_log off; " + "".join(
    f"{name}_temp_path {{folder}}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
)


@pytest.mark.parametrize("served_by", ["gateway", "nginx"])
def test_static_auth(
    site: StoreSite, folder: Path, sender: Sender, start_postfix: StartPostfix, served_by: str
) -> None:
    """The same file does the same in both; the gateway needs an nginx for `http {}`, as the import says."""
    postfix, user = start_postfix(main=AUTHORIZED), with_message(site.store)
    http, imap, smtp, submission = (free_port() for _ in range(4))
    conf = configuration("static_auth", folder, site, {
        "events {}": NGINX.format(module=MODULE, folder=folder) + "events {}",
        "include mime.types;": PATHS.format(folder=folder),
        "listen 127.0.0.1:8080;": f"listen 127.0.0.1:{http};",
        "localhost:8080/auth;": f"localhost:{http}/auth;",
        "protocol smtp; smtp_auth none; auth_http localhost:8080/smtp;":
            f"protocol smtp; smtp_auth none; auth_http localhost:{http}/smtp;",
        "protocol smtp; auth_http localhost:8080/smtp;": f"protocol smtp; auth_http localhost:{http}/smtp;",
        "Auth-Port 10143;": f"Auth-Port {site.store.imap.plain};",
        "Auth-Port 10025;": f"Auth-Port {postfix.port};",
        "listen 143;": f"listen 127.0.0.1:{imap};",
        "listen 25;": f"listen 127.0.0.1:{smtp};",
        "listen 587;": f"listen 127.0.0.1:{submission};",
    })  # fmt: skip
    with ExitStack() as stack:
        if served_by == "nginx":
            stack.enter_context(NginxFile(folder, conf, imap))
        else:
            remaining = folder / "http.conf"
            remaining.write_text(conf.read_text().partition("mail {")[0])
            stack.enter_context(NginxFile(folder, remaining, http))
            gateway = stack.enter_context(ImportedGateway(conf))
            assert ["IT MUST KEEP RUNNING" in line for line in gateway.warnings] == [False, False, True]
        assert fetch(at(site, "imap", imap), "plain", user, STRANGER) == MESSAGE
        refused = burst(imap, f"a LOGIN {user.name} wrong\r\n".encode())
        assert refused == b"* OK IMAP4 ready\r\n* BAD internal server error\r\n"
        sender.send(smtp)
        delivered(postfix, 1)
        with sender.connected(smtp) as connection, pytest.raises(smtplib.SMTPNotSupportedError):
            connection.login(user.name, user.password)
        sender.send(submission, user=User(user.name, "whatever"))
        delivered(postfix, 2)
        postfix.wait_log(BY_XCLIENT + user.name)


@pytest.mark.anyio
async def test_none_in_front_of_postfix(
    site: StoreSite, folder: Path, sender: Sender, start_postfix: StartPostfix
) -> None:
    postfix: Postfix = start_postfix(main=AUTHORIZED)
    port = free_port()
    answer = f"HTTP/1.0 200 OK\r\nAuth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: {postfix.port}\r\n\r\n"
    names = {"5.0.0.127.in-addr.arpa": {"PTR": ["spike.test."]}, "spike.test": {"A": [STRANGER]}}
    async with RecordingAuthServer() as auth, DnsServer(names) as resolver:
        asked = auth.default = Client([Answer(answer.encode())])
        conf = configuration("none_postfix", folder, site, {
            "127.0.0.1:8088/smtp": f"127.0.0.1:{auth.port}/smtp",
            "resolver 127.0.0.53 ": f"resolver 127.0.0.1:{resolver.address[1]} ",
            "listen 0.0.0.0:25;": f"listen 127.0.0.1:{port};",
            "smtp_greeting_delay 1500ms;": "smtp_greeting_delay 100ms;",
        })  # fmt: skip
        gateway = ImportedGateway(conf)
        try:
            await blocking(gateway.start)
            assert gateway.warnings == []
            await blocking(sender.send, port)
            (message,) = await stored(postfix, 1)
            await logged(postfix, rf"client=spike\.test\[{STRANGER}\]$")
            with pytest.raises(smtplib.SMTPRecipientsRefused, match="Relay access denied"):
                await blocking(sender.send, port, recipient=FOREIGN)
        finally:
            await blocking(gateway.stop)
    assert SUBJECT.encode() in message
    (question, _) = asked.requests
    assert {b"Auth-Method: none", b"Client-IP: 127.0.0.5", b"Client-Host: spike.test"} <= set(question)
    assert b"Auth-SMTP-To: RCPT TO:<user@local.test>" in question


def test_without_mail(folder: Path) -> None:
    """As for a file in which somebody left only http{}: said, and no empty pipeline is written."""
    (folder / "nginx.conf").write_text("events {}\nhttp { server { listen 80; } }\n")
    imported = run_gateway(folder, "import-nginx", "nginx.conf")
    assert (imported.returncode, imported.stdout) == (1, "")
    assert "mail {}" in imported.stderr
