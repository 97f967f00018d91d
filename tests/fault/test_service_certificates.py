"""Certificates and TLS sessions of a running service: renewals on disk, warnings and gauges, resumption wherever the
next connection lands."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

from tests.fault.service import Service, only, service

UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])
pytestmark = [pytest.mark.anyio, UVLOOP]

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
EXPIRY = "gateway_certificate_expiry_timestamp_seconds"


class Pair(NamedTuple):
    """A certificate and its key as PEM; `shown` is what clients see."""

    chain: bytes
    key: bytes
    shown: bytes


def issue(**left: float) -> Pair:
    """One that expires after that time, by days and the like."""
    issued = trustme.CA().issue_cert("gw.example.org", not_after=datetime.now(UTC) + timedelta(**left))
    chain = issued.cert_chain_pems[0].bytes()
    return Pair(chain, issued.private_key_pem.bytes(), ssl.PEM_cert_to_DER_cert(chain.decode()))


def put(path: Path, data: bytes) -> None:
    """In one step, as renewals do it."""
    draft = path.with_suffix(".new")
    draft.write_bytes(data)
    draft.rename(path)


def pipeline(folder: Path) -> dict[str, object]:
    """STARTTLS in front of an embedded server."""
    pair = {"chain": str(folder / "gw.crt"), "key": str(folder / "gw.key")}
    return {
        "stages": ["splice"],
        "upstreams": {"sink": {"servers": ["embedded://mail"]}},
        "tls": {"certificates": [pair]},
    }


def believer(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A client that believes any certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


class Shaken(NamedTuple):
    """What a client has after STARTTLS: a session to resume, whether this was one, the certificate shown."""

    session: ssl.SSLSession
    resumed: bool
    certificate: bytes


def _shake(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None) -> Shaken:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        for line in (b"", b"EHLO client.test\r\n", b"STARTTLS\r\n"):
            sock.sendall(line)
            assert sock.recv(4096).startswith(b"2")
        with context.wrap_socket(sock, session=session) as tls:
            for line in (b"EHLO client.test\r\n", b"QUIT\r\n"):  # tickets of TLS 1.3 come with the first answer
                tls.sendall(line)
                assert tls.recv(4096).startswith(b"2")
            shown = tls.getpeercert(True)
            assert tls.session is not None and shown is not None
            return Shaken(tls.session, bool(tls.session_reused), shown)


async def shake(
    running: Service, pid: int, workers: Sequence[int], context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> Shaken:
    """A TLS session with this worker, to its end."""
    with only(pid, workers):
        return await asyncio.to_thread(_shake, running.port, context, session)


async def shown(running: Service) -> set[bytes]:
    """The certificates that new clients of all workers see."""
    workers = await running.whole()
    return {(await shake(running, pid, workers, believer())).certificate for pid in workers}


async def expiry(running: Service) -> dict[str, float]:
    """The gauges of /metrics."""
    return {sample: value for sample, value in (await running.metrics()).items() if sample.startswith(EXPIRY)}


async def test_certificates_are_renewed_in_every_worker(tmp_path: Path) -> None:
    """Warned of, half renewed, renewed; a session goes on all the while, and is resumed by tickets of before."""
    chain, key = tmp_path / "gw.crt", tmp_path / "gw.key"
    gauge = f'{EXPIRY}{{certificate="{chain}"}}'
    old, new = issue(days=2, hours=1), issue(days=80)
    put(chain, old.chain)
    put(key, old.key)
    until = ssl.cert_time_to_seconds
    async with service(tmp_path, pipeline(tmp_path), workers=2, drain="60s") as running:
        warning = await running.record("certificate_expires")
        assert (warning["certificate"], warning["days"], warning["level"]) == (str(chain), 2, "warning")
        assert len(running.all("certificate_expires")) == 1  # said by one process
        assert await expiry(running) == {gauge: until(_not_after(old))}
        workers = await running.whole()
        contexts = [believer(version) for version in VERSIONS]
        tickets = [(await shake(running, workers[0], workers, context)).session for context in contexts]
        with only(workers[0], workers):  # the other one will be killed
            client = await running.client()
        assert (await client.say("STARTTLS")).startswith("220")
        await client.start_tls(believer())
        assert (await client.say("EHLO client.test")).startswith("250")
        assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")

        put(key, new.key)
        refused = await running.record("certificate_not_renewed")
        assert refused["level"] == "error" and str(key) in str(refused["error"])
        assert await shown(running) == {old.shown}
        os.kill(workers[1], signal.SIGKILL)
        await running.record("worker_died")
        assert await shown(running) == {old.shown}, "a worker that is forked now has the pair that fits"
        assert await expiry(running) == {gauge: until(_not_after(old))}

        put(chain, new.chain)
        renewed = await running.record("certificate_renewed")
        assert (renewed["certificate"], renewed["names"]) == (str(chain), ["gw.example.org"])
        assert len(running.all("certificate_not_renewed")) == len(running.all("certificate_renewed")) == 1
        assert await shown(running) == {new.shown}
        assert await expiry(running) == {gauge: until(_not_after(new))}
        workers = await running.whole()
        for context, ticket in zip(contexts, tickets, strict=True):
            assert [(await shake(running, pid, workers, context, ticket)).resumed for pid in workers] == [True, True]

        await running.reload()
        assert len(running.generations()) == 2  # the old one has a client
        assert await expiry(running) == {gauge: until(_not_after(new))}
        assert await shown(running) == {new.shown}
        assert (await client.say("RCPT TO:<b@example.org>")).startswith("250")
        assert (await client.say("DATA")).startswith("354")
        assert (await client.say("x\r\n.")).startswith("250")
        client.writer.close()
        await running.record("generation_ended")
        assert await expiry(running) == {gauge: until(_not_after(new))}


def _not_after(pair: Pair) -> str:
    from cryptography import x509

    return x509.load_der_x509_certificate(pair.shown).not_valid_after_utc.strftime("%b %d %H:%M:%S %Y GMT")


async def test_sessions_are_resumed_wherever_they_land(tmp_path: Path) -> None:
    """By the other worker, by one that replaced it, by the next generation."""
    pair = issue(days=80)
    put(tmp_path / "gw.crt", pair.chain)
    put(tmp_path / "gw.key", pair.key)
    async with service(tmp_path, pipeline(tmp_path), workers=2) as running:
        contexts = [believer(version) for version in VERSIONS]
        workers = await running.whole()
        first = [await shake(running, workers[0], workers, context) for context in contexts]
        assert [one.resumed for one in first] == [False, False]

        async def resumed() -> list[bool]:
            """In every worker, with every version."""
            found = await running.whole()
            return [
                (await shake(running, pid, found, context, one.session)).resumed
                for pid in found
                for context, one in zip(contexts, first, strict=True)
            ]

        assert await resumed() == [True] * 4
        for number, pid in enumerate(workers):
            os.kill(pid, signal.SIGKILL)
            await running.record("worker_died", number + 1)
        assert await resumed() == [True] * 4
        await running.reload()
        await running.record("generation_ended")
        assert await resumed() == [True] * 4
        await running.reload()
        assert await resumed() == [True] * 4
        counted = await running.metrics()
        name = 'gateway_tls_handshakes_total{{side="client",version="{}",resumed="{}"}}'
        for version in ("TLSv1.2", "TLSv1.3"):
            assert (counted[name.format(version, "no")], counted[name.format(version, "yes")]) == (1, 8)
