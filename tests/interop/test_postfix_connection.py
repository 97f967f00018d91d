"""How the gateway speaks to a real Postfix besides XCLIENT: XFORWARD, PROXY headers, TLS, AUTH."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from gateway.testing.gateway import running
from tests.interop.conftest import Authority, Records, StartPostfix
from tests.interop.mail_client import STRANGER, connected
from tests.interop.postfix_upstream import (
    AUTHORIZED,
    DISCARD_FOREIGN,
    FOREIGN,
    GRADES,
    LOGIN_RELAYS,
    MESSAGE,
    Stages,
    both_grades,
    certificate,
    handed_off,
    logged,
    pipeline,
    stored,
)
from tests.peers.clients import talk
from tests.peers.dovecot import Dovecot
from tests.peers.require import require

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

# -- XFORWARD and PROXY headers -------------------------------------------------------------------------------


async def test_xforward(start_postfix: StartPostfix, records: Records) -> None:
    postfix = start_postfix(main="smtpd_authorized_xforward_hosts = 127.0.0.1\n")
    served = pipeline(postfix, ["xforward", "splice"], relay="open")
    async with running(served, learn=True) as gateway, connected(gateway.port) as client:
        for _ in range(2):
            assert (await client.envelope("user@local.test")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
    ids = [record["id"] for record in records.all("transaction")]
    assert len(ids) == 2
    for ident in ids:
        await logged(postfix, rf"orig_queue_id={ident}, orig_client=unknown\[{STRANGER}\]")
    assert len(await stored(postfix, 2)) == 2


async def test_xforward_not_authorized(start_postfix: StartPostfix, records: Records) -> None:
    """It is for logs only: mail goes on where it is not offered, unless told otherwise."""
    postfix = start_postfix()
    for setting, code in (("continue", "250"), ("tempfail", "451 4.3.5")):
        served = pipeline(postfix, [{"xforward": setting}, "splice"], relay="open")
        async with running(served, learn=True) as gateway, connected(gateway.port) as client:
            assert (await client.say("MAIL FROM:<a@x.test>")).startswith(code)
    (refusal,) = records.all("refusal")
    assert "smtpd_authorized_xforward_hosts" in str(refusal["detail"])


@pytest.mark.parametrize("version", [1, 2])
@both_grades
async def test_proxy_header(start_postfix: StartPostfix, records: Records, grade: str, version: int) -> None:
    postfix = start_postfix(main="smtpd_upstream_proxy_protocol = haproxy\nsmtpd_upstream_proxy_timeout = 2s\n")
    stages: Stages = [{"proxy_header": version}, *GRADES[grade][1:]]
    async with running(pipeline(postfix, stages), learn=True) as gateway:
        async with connected(gateway.port) as client:
            assert (await client.envelope(FOREIGN)).startswith("454 4.7.1")
            assert (await client.say("RCPT TO:<user@local.test>")).startswith("250")
            assert (await client.content(MESSAGE)).startswith("250")
        await gateway.idle()
    await logged(postfix, rf"connect from unknown\[{STRANGER}\]")
    await logged(postfix, rf"client=unknown\[{STRANGER}\]")
    await stored(postfix, 1)
    assert handed_off(records) == (grade == "opaque")


async def test_proxy_header_not_expected(start_postfix: StartPostfix) -> None:
    """Postfix takes the header for garbage: nothing is relayed, the refusal is temporary."""
    postfix = start_postfix()
    async with running(pipeline(postfix, [{"proxy_header": 1}, "splice"]), learn=True) as gateway:
        replies = await asyncio.to_thread(
            talk, gateway.port, "EHLO c.test", "MAIL FROM:<a@x.test>", f"RCPT TO:<{FOREIGN}>"
        )
    assert not [reply for reply in replies[2:] if reply.startswith("2")], replies
    assert next(reply for reply in replies if reply[0] in "45")[0] == "4"
    assert "client=" not in postfix.log()


# -- TLS to the upstream --------------------------------------------------------------------------------------


def tls_pool(authority: Authority, **more: object) -> dict[str, object]:
    """TLS is required; the pool knows its authority and what Postfix is called."""
    return {"tls": "required", "ca_file": str(authority.ca), "server_name": "mx.test", **more}


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for the right name that nobody vouches for."""
    chain, key = folder / "self.crt", folder / "self.key"
    subprocess.run(
        [require("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=mx.test", "-addext", "subjectAltName=DNS:mx.test", "-keyout", str(key), "-out", str(chain)],
        check=True, capture_output=True,
    )  # fmt: skip
    return chain, key


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
@both_grades
async def test_upstream_tls_verified(
    start_postfix: StartPostfix, authority: Authority, grade: str, scheme: str
) -> None:
    options = "-o smtpd_tls_wrappermode=yes" if scheme == "smtps" else ""
    postfix = start_postfix(
        main=AUTHORIZED + certificate(*authority.issue("mx.test"), "encrypt"), smtpd_options=options
    )
    url = f"{scheme}://127.0.0.1:{postfix.port}"
    served = pipeline(postfix, GRADES[grade], url=url, pool=tls_pool(authority))
    async with running(served, learn=True) as gateway, connected(gateway.port) as client:
        assert (await client.envelope("user@local.test")).startswith("250")
        assert (await client.content(MESSAGE)).startswith("250")
    await logged(postfix, "TLS connection established from")
    (message,) = await stored(postfix, 1)
    assert b"(using TLSv1.3 with cipher" in message
    assert b"Received: from client.test (unknown [127.0.0.5])" in message


@pytest.mark.parametrize("fault", ["name", "authority", "self_signed", "no_tls"])
@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
@both_grades
async def test_upstream_tls_refused(
    start_postfix: StartPostfix,
    records: Records,
    authority: Authority,
    tmp_path: Path,
    grade: str,
    fault: str,
    scheme: str,
) -> None:
    """Not the server that was meant, or nobody can tell: nothing is sent, and clients are told to come again."""
    files = self_signed(tmp_path) if fault == "self_signed" else authority.issue("mx.test")
    wrapped = scheme == "smtps" and fault != "no_tls"
    postfix = start_postfix(
        main=AUTHORIZED + (certificate(*files) if fault != "no_tls" else ""),
        smtpd_options="-o smtpd_tls_wrappermode=yes" if wrapped else "",
    )
    pool = tls_pool(authority, capabilities={"assume": ["PIPELINING"]})  # so that the client gets as far as MAIL
    if fault == "name":
        pool["server_name"] = "other.test"
    if fault == "authority":
        pool["ca_file"] = str(Authority(tmp_path).ca)
    served = pipeline(postfix, GRADES[grade], url=f"{scheme}://127.0.0.1:{postfix.port}", pool=pool)
    async with running(served) as gateway, connected(gateway.port) as client:
        reply = await client.say("MAIL FROM:<a@x.test>")
        assert reply.startswith("451 4.4"), reply
    assert {record["kind"] for record in records.all("upstream_failure")} == {"tls"}
    assert "client=" not in postfix.log()
    assert "mail=" not in postfix.log()


async def test_upstream_tls_opportunistic(start_postfix: StartPostfix, authority: Authority) -> None:
    """Without `required` any certificate will do, but never for credentials."""
    postfix = start_postfix(main=AUTHORIZED + certificate(*authority.issue("whatever.test")))
    served = pipeline(postfix, GRADES["envelope"])
    async with running(served, learn=True) as gateway, connected(gateway.port) as client:
        assert (await client.envelope("user@local.test")).startswith("250")
        assert (await client.content(MESSAGE)).startswith("250")
    (message,) = await stored(postfix, 1)
    assert b"(using TLSv1.3 with cipher" in message


async def test_proxy_header_before_tls(start_postfix: StartPostfix, authority: Authority) -> None:
    """The header comes first, then STARTTLS."""
    postfix = start_postfix(
        main="smtpd_upstream_proxy_protocol = haproxy\n" + certificate(*authority.issue("mx.test"), "encrypt")
    )
    served = pipeline(postfix, [{"proxy_header": 2}, "splice"], pool=tls_pool(authority))
    async with running(served, learn=True) as gateway, connected(gateway.port) as client:
        assert (await client.envelope("user@local.test")).startswith("250")
        assert (await client.content(MESSAGE)).startswith("250")
    await logged(postfix, rf"TLS connection established from unknown\[{STRANGER}\]")
    await logged(postfix, rf"client=unknown\[{STRANGER}\]")


# -- logging in at the upstream -------------------------------------------------------------------------------


@pytest.mark.parametrize("grade", ["auto", "never"])
async def test_upstream_verifies_the_login(
    start_postfix: StartPostfix, records: Records, dovecot: Dovecot, grade: str
) -> None:
    postfix = start_postfix(main=dovecot.main + LOGIN_RELAYS + DISCARD_FOREIGN)
    auth = {"upstream_auth": {"credentials": "client", "verify": "upstream"}}
    served = pipeline(postfix, [auth, {"splice": {"handoff": grade}}], allow_plaintext_auth=True)
    async with running(served, learn=True) as gateway, connected(gateway.port) as client:
        assert (await client.say("MAIL FROM:<a@x.test>")).startswith("530")
        assert (await client.login("joe@example.org", "wrong")).startswith("535")
        assert (await client.login("joe@example.org", "secret")).startswith("235")
        assert (await client.envelope(FOREIGN)).startswith("250")
        assert (await client.content(MESSAGE)).startswith("250")
    await logged(postfix, "sasl_method=PLAIN, sasl_username=joe@example.org")
    assert "secret" not in records.path.read_text()
    assert "wrong" not in records.path.read_text()


async def test_upstream_login_as_a_fixed_user(start_postfix: StartPostfix, records: Records, dovecot: Dovecot) -> None:
    """The gateway's own account; refused, that is no word about the client."""
    postfix = start_postfix(main=dovecot.main + LOGIN_RELAYS + DISCARD_FOREIGN)
    for password, code in (("secret", "250"), ("wrong-one", "451 4.3.5")):
        stages: Stages = [{"upstream_auth": {"user": "joe@example.org", "password": password}}, "splice"]
        async with (
            running(pipeline(postfix, stages, relay="open"), learn=True) as gateway,
            connected(gateway.port) as client,
        ):
            assert (await client.say("MAIL FROM:<a@x.test>")).startswith(code)
    (refusal,) = records.all("refusal")
    assert "upstream_auth" in str(refusal["detail"])
    assert "wrong-one" not in records.path.read_text()
