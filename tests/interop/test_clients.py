"""Real clients in front of the gateway: swaks, curl and openssl, with a Postfix behind it."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.testing.gateway import Gateway, running
from tests.interop.conftest import Authority, StartPostfix
from tests.interop.postfix_upstream import AUTHORIZED, GRADES, Stages, both_grades, logged, pipeline, stored
from tests.peers.clients import Swaks, swaks, talk
from tests.peers.postfix import Postfix
from tests.peers.require import require

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

USER, PASSWORD = "joe@example.org", "correct horse"
LOGIN = ("--auth-user", USER, "--auth-password", PASSWORD)


@dataclass
class Submission:
    """A gateway that wants TLS and a login, on a STARTTLS and an implicit TLS port."""

    gateway: Gateway
    postfix: Postfix
    ca: Path

    @property
    def port(self) -> int:
        """STARTTLS."""
        return self.gateway.ports[0]

    @property
    def tls_port(self) -> int:
        """TLS from the start."""
        return self.gateway.ports[1]

    async def swaks(self, *options: str, tls: str = "--tls", to: str = "user@local.test") -> Swaks:
        """swaks, which checks the certificate where it gets to see one."""
        port = self.tls_port if tls == "--tlsc" else self.port
        trust = ("--tls-verify", "--tls-ca-path", str(self.ca)) if tls else ()
        return await asyncio.to_thread(swaks, port, *filter(None, (tls,)), *trust, *options, to=to)


@asynccontextmanager
async def submission(
    start_postfix: StartPostfix, tls: dict[str, object], authority: Authority, folder: Path, *, grade: str = "envelope"
) -> AsyncIterator[Submission]:
    users = folder / "users"
    users.write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
    postfix = start_postfix(main=AUTHORIZED)
    auth = {"auth_file": {"file": str(users), "cram_md5": True}}
    listen = ["smtp://127.0.0.1:0", "smtps://127.0.0.1:0"]
    async with running(pipeline(postfix, [auth, *GRADES[grade]], tls=tls, listen=listen), learn=True) as gateway:
        yield Submission(gateway, postfix, authority.ca)


Tls = dict[str, object]


# -- swaks ----------------------------------------------------------------------------------------------------


@both_grades
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
@pytest.mark.parametrize("mode", ["--tls", "--tlsc"])
async def test_swaks_logs_in(
    start_postfix: StartPostfix, tls: Tls, authority: Authority, tmp_path: Path, grade: str, mechanism: str, mode: str
) -> None:
    async with submission(start_postfix, tls, authority, tmp_path, grade=grade) as served:
        run = await served.swaks("--auth", mechanism, *LOGIN, tls=mode)
        assert run.status == 0, run.transcript
        assert "250 2.0.0 Ok: queued as" in run.transcript
        await logged(served.postfix, f"sasl_method=XCLIENT, sasl_username={USER}")
        assert len(await stored(served.postfix, 1)) == 1


async def test_swaks_is_refused(start_postfix: StartPostfix, tls: Tls, authority: Authority, tmp_path: Path) -> None:
    async with submission(start_postfix, tls, authority, tmp_path) as served:
        run = await served.swaks()
        assert run.last.startswith("530 5.7.0"), run.transcript
        run = await served.swaks(tls="")
        assert run.last.startswith("530 5.7.0"), run.transcript
        run = await served.swaks("--auth", "PLAIN", *LOGIN, tls="")
        assert run.status == 28, run.transcript  # not offered in clear text
        run = await served.swaks("--auth", "PLAIN", "--auth-user", USER, "--auth-password", "wrong")
        assert run.status == 28, run.transcript
        assert any(reply.startswith("535 5.7.8") for reply in run.replies), run.transcript
        run = await served.swaks("--protocol", "LMTP", tls="")
        assert run.status == 22, run.transcript
        assert not served.postfix.delivered()


async def test_swaks_pipelines(start_postfix: StartPostfix, tls: Tls, authority: Authority, tmp_path: Path) -> None:
    """Recipients of one group get each their own answer."""
    async with submission(start_postfix, tls, authority, tmp_path) as served:
        to = "user@local.test,nobody@local.test,other@local.test"
        run = await served.swaks("--pipeline", "--auth", "PLAIN", *LOGIN, to=to)
        assert run.status == 0, run.transcript
        assert len([reply for reply in run.replies if reply.startswith("550 5.1.1 <nobody@local.test>")]) == 1
        assert len(await stored(served.postfix, 1)) == len(await stored(served.postfix, 1, "other")) == 1


@pytest.mark.parametrize("moment", ["TLS", "EHLO", "AUTH", "MAIL", "RCPT", "DATA"])
async def test_swaks_vanishes(
    start_postfix: StartPostfix, tls: Tls, authority: Authority, tmp_path: Path, moment: str
) -> None:
    """Nothing is left of a client that disappears, and the next one is served."""
    async with submission(start_postfix, tls, authority, tmp_path) as served:
        for option in ("--drop-after", "--drop-after-send"):
            await served.swaks(option, moment, "--auth", "PLAIN", *LOGIN)
        async with asyncio.timeout(10):
            await served.gateway.idle()
        assert not served.postfix.delivered()
        run = await served.swaks("--auth", "PLAIN", *LOGIN)
        assert run.status == 0, run.transcript
        assert len(await stored(served.postfix, 1)) == 1


@both_grades
async def test_swaks_says_xclient(start_postfix: StartPostfix, grade: str) -> None:
    """From a trusted address; from another it is not offered and refused."""
    postfix = start_postfix(main=AUTHORIZED)
    options = ("--xclient-addr", "192.0.2.9", "--xclient-name", "spike.test", "--xclient-login", "ann")
    for trusted in (True, False):
        trust = {"xclient": ["127.0.0.1"] if trusted else ["192.0.2.1"]}
        async with running(pipeline(postfix, GRADES[grade], trust=trust), learn=True) as gateway:
            run = await asyncio.to_thread(swaks, gateway.port, *options)
            assert (run.status == 0) is trusted, run.transcript
    await logged(postfix, r"client=spike.test\[192.0.2.9\], sasl_method=XCLIENT, sasl_username=ann$")
    assert len(await stored(postfix, 1)) == 1


V1 = (
    "--proxy-version 1 --proxy-family TCP4 --proxy-source 192.0.2.9 --proxy-source-port 4321"
    " --proxy-dest 192.0.2.1 --proxy-dest-port 25"
)
V2 = V1.replace("version 1", "version 2").replace("TCP4", "AF_INET") + " --proxy-command PROXY --proxy-protocol STREAM"


@both_grades
@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
async def test_swaks_sends_a_proxy_header(start_postfix: StartPostfix, grade: str, header: str) -> None:
    """From a trusted address; from another there is no answer."""
    postfix = start_postfix(main=AUTHORIZED)
    listen: Stages = [{"url": "smtp://127.0.0.1:0", "proxy_protocol": "required"}]
    for trusted in (True, False):
        trust = {"proxy": ["127.0.0.1"] if trusted else ["192.0.2.1"]}
        async with running(pipeline(postfix, GRADES[grade], trust=trust, listen=listen), learn=True) as gateway:
            run = await asyncio.to_thread(swaks, gateway.port, *header.split())
            assert (run.status == 0) is trusted, run.transcript
            assert trusted or not run.replies
    await logged(postfix, r"client=unknown\[192.0.2.9\]$")
    assert len(await stored(postfix, 1)) == 1


async def test_no_login_no_mail(start_postfix: StartPostfix, tls: Tls, authority: Authority, tmp_path: Path) -> None:
    async with submission(start_postfix, tls, authority, tmp_path) as served:
        lines = ("EHLO c.test", "MAIL FROM:<a@x.test>", "RCPT TO:<user@local.test>", "DATA")
        replies = await asyncio.to_thread(talk, served.port, *lines)
        assert [reply[:3] for reply in replies] == ["220", "250", "530", "503", "503"]


# -- curl -----------------------------------------------------------------------------------------------------


async def curl(served: Submission, message: Path, *options: str, implicit: bool = False) -> tuple[int, str]:
    """Send a file; curl's exit status and what it said."""
    url = f"smtps://localhost:{served.tls_port}/c.test" if implicit else f"smtp://localhost:{served.port}/c.test"
    command = [
        require("curl"), "-sS", "-v", "-4", "--max-time", "20", "--ssl-reqd", "--cacert", str(served.ca),
        "--mail-from", "a@x.test", "--mail-rcpt", "user@local.test", "-T", str(message), *options, url,
    ]  # fmt: skip
    run = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False)
    return run.returncode, run.stderr.decode("utf-8", "replace")


@both_grades
@pytest.mark.parametrize("implicit", [False, True], ids=["smtp", "smtps"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
async def test_curl_sends(
    start_postfix: StartPostfix,
    tls: Tls,
    authority: Authority,
    tmp_path: Path,
    grade: str,
    implicit: bool,
    mechanism: str,
) -> None:
    message = tmp_path / "message"
    message.write_bytes(b"Subject: curl\r\n\r\n.\r\n..dots\r\n" + b"%070d\r\n" * 1000 % tuple(range(1000)) + b"end\r\n")
    async with submission(start_postfix, tls, authority, tmp_path, grade=grade) as served:
        options = ("--user", f"{USER}:{PASSWORD}", "--login-options", f"AUTH={mechanism}")
        status, said = await curl(served, message, *options, implicit=implicit)
        assert status == 0, said
        (mail,) = await stored(served.postfix, 1)
        body = message.read_bytes().partition(b"\r\n\r\n")[2]
        assert mail.partition(b"\n\n")[2] == body.replace(b"\r\n", b"\n")


async def test_curl_is_refused(start_postfix: StartPostfix, tls: Tls, authority: Authority, tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.write_bytes(b"Subject: curl\r\n\r\nhi\r\n")
    other = tmp_path / "other"
    other.mkdir()
    async with submission(start_postfix, tls, authority, tmp_path) as served:
        assert (await curl(served, message))[0] == 55  # 530 to MAIL
        assert (await curl(served, message, "--user", f"{USER}:wrong"))[0] == 67
        stranger = str(Authority(other).ca)
        assert (await curl(served, message, "--cacert", stranger, "--user", f"{USER}:{PASSWORD}"))[0] == 60
        assert not served.postfix.delivered()
        options = ("--user", f"{USER}:{PASSWORD}", "--mail-rcpt", "nobody@local.test", "--mail-rcpt-allowfails")
        status, said = await curl(served, message, *options)
        assert status == 0, said
        assert len(await stored(served.postfix, 1)) == 1


async def test_curl_shows_a_certificate(
    start_postfix: StartPostfix, tls: Tls, authority: Authority, tmp_path: Path
) -> None:
    """AUTH EXTERNAL: the login is the certificate's address; from another authority's it is not offered."""
    message = tmp_path / "message"
    message.write_bytes(b"Subject: curl\r\n\r\nhi\r\n")
    (tmp_path / "other").mkdir()
    verified = {**tls, "client_ca": str(authority.ca), "verify_client": "optional"}
    postfix = start_postfix(main=AUTHORIZED)
    listen = ["smtp://127.0.0.1:0", "smtps://127.0.0.1:0"]
    stages = ["auth_certificate", *GRADES["envelope"]]
    async with running(pipeline(postfix, stages, tls=verified, listen=listen), learn=True) as gateway:
        served = Submission(gateway, postfix, authority.ca)
        for implicit in (False, True):
            for issuer in (authority, Authority(tmp_path / "other")):
                chain, key = issuer.issue(USER)
                options = (
                    "--cert",
                    str(chain),
                    "--key",
                    str(key),
                    "--user",
                    f"{USER}:",
                    "--login-options",
                    "AUTH=EXTERNAL",
                )
                status, said = await curl(served, message, *options, implicit=implicit)
                assert (status == 0) is (issuer is authority), said
        assert len(await stored(postfix, 2)) == 2
    await logged(postfix, f"sasl_method=XCLIENT, sasl_username={USER}")


# -- openssl --------------------------------------------------------------------------------------------------


async def s_client(served: Submission, *options: str, implicit: bool = False) -> tuple[int, str]:
    """EHLO and QUIT over `openssl s_client`; its exit status and output."""
    port = served.tls_port if implicit else served.port
    start = () if implicit else ("-starttls", "smtp", "-name", "c.test")
    process = await asyncio.create_subprocess_exec(
        require("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", *start, "-CAfile", str(served.ca),
        "-verify_return_error", "-verify_hostname", "gateway.test", "-crlf", "-nocommands", *options,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(15):
            process.stdin.write(b"EHLO c.test\n")
            while b"\n250 " not in said.partition(b"\n250-gateway.test")[2]:
                block = await process.stdout.read(4096)
                said += block
                if not block:
                    break
            else:
                process.stdin.write(b"QUIT\n")
                said += await process.stdout.read()
            return await process.wait(), said.decode("utf-8", "replace")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "implicit"])
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl(
    start_postfix: StartPostfix, tls: Tls, authority: Authority, tmp_path: Path, implicit: bool, version: str
) -> None:
    """The chain verifies, AUTH is offered and STARTTLS no more."""
    async with submission(start_postfix, tls, authority, tmp_path) as served:
        status, said = await s_client(served, version, implicit=implicit)
        assert status == 0, said
        assert "Verify return code: 0 (ok)" in said
        ehlo = said[said.index("250-gateway.test") :]
        assert "AUTH PLAIN LOGIN CRAM-MD5" in ehlo
        assert "STARTTLS" not in ehlo
        assert "221 2.0.0" in ehlo
        status, said = await s_client(served, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0", implicit=implicit)
        assert status == 1, said
        async with asyncio.timeout(10):
            await served.gateway.idle()
