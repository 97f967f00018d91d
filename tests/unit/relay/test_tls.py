"""TLS: sessions back to back without sockets, contexts that do not load, and TLS on real wires."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from OpenSSL import SSL

from gateway.relay.tls import (
    Certificate,
    ClientSession,
    ServerContext,
    ServerSettings,
    TlsConfigError,
    TlsError,
    TlsInfo,
    TlsSession,
    client_context,
)
from gateway.relay.wire import EndOfStream, Wire, WireTimeout, connect


@dataclass
class Store:
    """Certificates on disk, issued by one authority."""

    path: Path
    ca: trustme.CA

    @property
    def ca_file(self) -> str:
        return str(self.path / "ca.pem")

    def issue(
        self,
        *names: str,
        kind: trustme.KeyType = trustme.KeyType.ECDSA,
        ca: trustme.CA | None = None,
        not_after: datetime | None = None,
        not_before: datetime | None = None,
    ) -> Certificate:
        issued = (ca or self.ca).issue_cert(*names, key_type=kind, not_after=not_after, not_before=not_before)
        base = f"{len(os.listdir(self.path))}-{names[0].replace('*', '_')}"
        chain, key = self.path / f"{base}.crt", self.path / f"{base}.key"
        chain.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return Certificate(str(chain), str(key))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("certs")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(path / "ca.pem"))
    return Store(path, ca)


@pytest.fixture(scope="module")
def mx(store: Store) -> Certificate:
    return store.issue("mx.example.org")


def shake(server: TlsSession, client: TlsSession) -> tuple[TlsInfo, TlsInfo]:
    """Carry flights between two sessions until both are done."""
    flight = client.start()
    for _ in range(10):
        if flight:
            server.feed(flight)
        answer = server.outgoing()
        if answer:
            client.feed(answer)
        flight = client.outgoing()
        if server.info and client.info and not flight:
            return server.info, client.info
    raise AssertionError("the handshake does not end")


def common_name(certificate: bytes | None) -> str:
    """The first DNS name of a certificate."""
    assert certificate is not None
    names = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return names.value.get_values_for_type(x509.DNSName)[0]


# -- contexts


def test_certificates_are_chosen_by_name(store: Store, mx: Certificate) -> None:
    context = ServerContext([mx, store.issue("imap.example.org", "*.Example.NET"), store.issue("mx.example.org")])
    client = client_context(store.ca_file, False)
    for asked, got in [
        ("mx.example.org", "mx.example.org"),
        ("imap.example.org", "imap.example.org"),
        ("IMAP.example.org", "imap.example.org"),
        ("a.example.net", "imap.example.org"),
        ("a.b.example.net", "mx.example.org"),
        ("example.net", "mx.example.org"),
        ("unknown.example", "mx.example.org"),
        (None, "mx.example.org"),
    ]:
        server, seen = shake(context.session(), ClientSession(client, asked))
        assert common_name(seen.certificate) == got, asked
        assert server.sni == (asked.lower() if asked else None)
        assert not seen.verified


def test_two_key_types_stand_side_by_side(store: Store, mx: Certificate) -> None:
    context = ServerContext([mx, store.issue("mx.example.org", kind=trustme.KeyType.RSA)])
    for cipher in ("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256"):
        client = client_context(store.ca_file, True)
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        client.set_ciphers(cipher)
        server, seen = shake(context.session(), ClientSession(client, "mx.example.org"))
        assert server.cipher == cipher
        assert (server.version, server.bits) == ("TLSv1.2", 128)
        assert seen.verified


def test_versions_and_ciphers(store: Store, mx: Certificate) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(store.ca_file)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    modern = ServerContext([mx], ServerSettings(minimum="TLSv1.3", ciphers="TLS_AES_128_GCM_SHA256"))
    session = modern.session()
    with pytest.raises(TlsError, match="unsupported protocol"):
        shake(session, ClientSession(old, "mx.example.org"))
    assert session.outgoing()[0] == 21  # an alert
    info, _ = shake(modern.session(), ClientSession(client_context(store.ca_file, True), "mx.example.org"))
    assert (info.version, info.cipher, info.bits) == ("TLSv1.3", "TLS_AES_128_GCM_SHA256", 128)
    both = ServerContext(
        [mx], ServerSettings(ciphers="ECDHE-ECDSA-CHACHA20-POLY1305:TLS_CHACHA20_POLY1305_SHA256")
    )
    assert shake(both.session(), ClientSession(old, "mx.example.org"))[0].cipher == "ECDHE-ECDSA-CHACHA20-POLY1305"


def test_alpn(store: Store, mx: Certificate) -> None:
    context = ServerContext([mx, store.issue("imap.example.org")], alpn=("smtp",))
    for offered, chosen in [(None, None), (["imap", "smtp"], "smtp"), (["h2"], TlsError)]:
        for name in ("mx.example.org", "imap.example.org"):  # the rule holds whatever certificate SNI chose
            client = client_context(store.ca_file, True)
            if offered:
                client.set_alpn_protocols(offered)
            session, other = context.session(), ClientSession(client, name)
            if chosen is TlsError:
                with pytest.raises(TlsError, match="application protocol"):
                    shake(session, other)
                assert session.outgoing()[-2:] == b"\x02\x78"  # fatal, no_application_protocol (120)
                continue
            info, seen = shake(session, other)
            assert info.alpn == seen.alpn == chosen


def test_what_cannot_be_loaded_is_said_clearly(store: Store, mx: Certificate) -> None:
    path = store.path
    other = store.issue("other.example.org")
    now = datetime.now(UTC)
    old = store.issue("old.example.org", not_before=now - timedelta(9), not_after=now - timedelta(2))
    new = store.issue("new.example.org", not_before=now + timedelta(2), not_after=now + timedelta(9))
    garbage = path / "garbage.pem"
    garbage.write_bytes(b"no PEM at all")
    turned = path / "turned.pem"
    turned.write_bytes((path / "ca.pem").read_bytes() + Path(mx.chain).read_bytes())
    locked = path / "locked.key"
    key = load_pem_private_key(Path(mx.key).read_bytes(), None)
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pw")))
    missing = str(path / "missing.pem")
    (path / "empty").write_bytes(b"\n\r\n")
    wrong = path / "wrong"
    wrong.write_bytes(b"not this\nnor this\n")
    half = Certificate(mx.chain, str(locked))

    def with_settings(**settings: object) -> Callable[[], object]:
        return lambda: ServerContext([mx], ServerSettings(**settings))  # type: ignore[arg-type]

    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: ServerContext([]), "no certificate"),
        (lambda: ServerContext([Certificate(missing, mx.key)]), "missing.pem: no such file"),
        (lambda: ServerContext([Certificate(mx.chain, missing)]), "missing.pem: no such file"),
        (lambda: ServerContext([Certificate(str(garbage), mx.key)]), "garbage.pem: not a chain"),
        (lambda: ServerContext([Certificate(mx.chain, str(garbage))]), "garbage.pem: not a PEM private key"),
        (lambda: ServerContext([Certificate(mx.chain, str(locked))]), "locked.key: the key is encrypted"),
        (
            lambda: ServerContext([mx, Certificate(mx.chain, other.key)]),
            f"not the key of the certificate in {mx.chain}",
        ),
        (lambda: ServerContext([Certificate(str(turned), mx.key)]), "turned.pem: the server's own certificate must"),
        (lambda: ServerContext([old]), f"{old.chain}: expired on {now - timedelta(2):%Y-%m-%d}"),
        (lambda: ServerContext([new]), f"{new.chain}: not valid before {now + timedelta(2):%Y-%m-%d}"),
        (with_settings(ciphers="NONSENSE"), "'NONSENSE'"),
        (with_settings(ciphers="TLS_NONSENSE"), "'TLS_NONSENSE'"),
        (with_settings(ciphersuites="NONSENSE"), "'NONSENSE'"),
        (with_settings(curves="X25519:nonsense"), "curves 'X25519:nonsense'"),
        (with_settings(dhparam=str(garbage)), "garbage.pem: not PEM Diffie-Hellman parameters"),
        (with_settings(dhparam=missing), "missing.pem: no such file"),
        (with_settings(options=("-MiddleboxCompat",)), "option MiddleboxCompat cannot be off"),
        (with_settings(options=("Nonsense",)), "no option 'Nonsense'"),
        (with_settings(verify="required"), "no client_ca"),
        (with_settings(verify="optional", client_ca=str(garbage)), "garbage.pem: not a chain"),
        (with_settings(verify="optional", trusted_ca=missing), "missing.pem: no such file"),
        (with_settings(verify="optional", client_ca=store.ca_file, crl=store.ca_file), "ca.pem: not a file of PEM rev"),
        (with_settings(password_file=str(path / "empty")), "empty: no passphrase"),
        (lambda: ServerContext([half], ServerSettings(password_file=str(wrong))), "no line of the password_file"),
        (lambda: client_context(missing, True), "missing.pem"),
        (lambda: client_context(str(garbage), True), "garbage.pem"),
        (lambda: client_context(None, True, Certificate(mx.chain, other.key)), "not the key"),
    ]
    for make, text in cases:
        with pytest.raises(TlsConfigError) as error:
            make()
        assert text in str(error.value)


# -- sessions


@pytest.mark.parametrize("seed", range(3))
def test_bytes_survive_any_cut(store: Store, mx: Certificate, seed: int) -> None:
    chance = random.Random(seed)
    server, client = ServerContext([mx]).session(), ClientSession(client_context(store.ca_file, True), "mx.example.org")
    shake(server, client)
    for sender, receiver in ((client, server), (server, client)):
        clear = chance.randbytes(chance.choice([1, 16384, 16385, 700_000]))
        cipher = sender.seal(clear) + sender.seal(b"end\r\n")
        got, at = [], 0
        while at < len(cipher):
            step = chance.choice([1, 5, 1000, 262_144])
            got.append(receiver.feed(cipher[at : at + step]))
            assert len(got[-1]) <= step + 16384 + 256  # a record's beginning may have been fed before
            at += step
        assert b"".join(got) == clear + b"end\r\n"


def test_close_notify_ends_one_direction_only(store: Store, mx: Certificate) -> None:
    server, client = ServerContext([mx]).session(), ClientSession(client_context(store.ca_file, True), "mx.example.org")
    shake(server, client)
    assert server.feed(client.seal(b"QUIT\r\n") + client.close_notify()) == b"QUIT\r\n"
    assert server.closed and not client.closed
    assert client.feed(server.seal(b"221\r\n") + server.close_notify()) in (b"221\r\n", b"")
    assert client.closed


@pytest.mark.parametrize("garbage", [b"EHLO c.example.org\r\n", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff"])
def test_what_is_no_tls_is_an_error(mx: Certificate, garbage: bytes) -> None:
    session = ServerContext([mx]).session()
    with pytest.raises(TlsError):
        session.feed(garbage)
        session.feed(garbage * 10_000)


def test_a_broken_record_is_an_error_with_an_alert(store: Store, mx: Certificate) -> None:
    server, client = ServerContext([mx]).session(), ClientSession(client_context(store.ca_file, True), "mx.example.org")
    shake(server, client)
    record = bytearray(client.seal(b"data"))
    record[-1] ^= 1
    with pytest.raises(TlsError):
        server.feed(bytes(record))
    with pytest.raises(TlsError):
        client.feed(server.outgoing())
    assert server.close_notify() == b""


def test_renegotiation_is_refused(mx: Certificate) -> None:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    peer = SSL.Connection(context, None)
    peer.set_connect_state()
    server = ServerContext([mx]).session()

    def exchange() -> bytes:
        clear = b""
        for _ in range(4):
            try:
                peer.do_handshake()
            except SSL.WantReadError:
                pass
            try:
                clear += server.feed(peer.bio_read(100_000))
            except SSL.WantReadError:
                pass
            answer = server.outgoing()
            if answer:
                peer.bio_write(answer)
        return clear

    exchange()
    assert server.info is not None
    peer.renegotiate()
    before = server.overhead
    with pytest.raises(SSL.Error, match="no renegotiation"):
        exchange()
    assert server.overhead > before


# -- wires


@asynccontextmanager
async def wires() -> AsyncIterator[tuple[Wire, Wire]]:
    """An accepted Wire and the one that connected to it."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[Wire] = loop.create_future()
    server = await loop.create_server(lambda: Wire(loop, accepted.set_result), "127.0.0.1", 0)
    client = await connect(server.sockets[0].getsockname(), timeout=5)
    wire = await accepted
    server.close()
    await server.wait_closed()
    try:
        yield wire, client
    finally:
        for end in (wire, client):
            end.abort()
            await end.aclose()


@pytest.mark.anyio
async def test_proxy_header_and_hello_in_one_segment(store: Store, mx: Certificate) -> None:
    async with wires() as (wire, client):
        session = ClientSession(client_context(store.ca_file, True), "mx.example.org")
        client.write(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + session.start())
        assert (await wire.line(107)).startswith(b"PROXY")
        await wire.wait_readable()
        assert wire.buffered
        shaking = asyncio.ensure_future(wire.start_tls_server(ServerContext([mx])))
        while session.info is None:
            session.feed(await client.read())
            # The first command rides with the last flight.
            client.write(session.outgoing() + (session.seal(b"EHLO a\r\n") if session.info else b""))
        await shaking
        assert wire.tls is not None and wire.tls.sni == "mx.example.org"
        assert await wire.line(100) == b"EHLO a"
        wire.write(b"250 ok\r\n")
        clear = b""
        while not clear:
            clear = session.feed(await client.read())
        assert clear == b"250 ok\r\n"


@pytest.mark.anyio
async def test_starttls(store: Store, mx: Certificate) -> None:
    async with wires() as (wire, client):
        client.write(b"STARTTLS\r\n")
        assert await wire.line(100) == b"STARTTLS"
        assert wire.buffered == 0
        wire.write(b"220 go\r\n")
        assert await client.line(100) == b"220 go"
        early: list[int] = []
        wire.on_data = lambda: early.append(wire.buffered)
        context = client_context(store.ca_file, True)
        await asyncio.gather(
            wire.start_tls_server(ServerContext([mx])), client.start_tls_client(context, "mx.example.org")
        )
        assert early == []
        assert wire.tls is not None and client.tls is not None
        assert (wire.tls.version, client.tls.verified) == ("TLSv1.3", True)
        for number in range(100):
            client.writelines([b"NOOP %d\r\n" % number, b"QUIT\r\n"])
            assert await wire.line(100) == b"NOOP %d" % number
            assert await wire.line(100) == b"QUIT"
            wire.write(b"250 %d\r\n" % number)
            assert await client.line(100) == b"250 %d" % number
        client.write_eof()
        assert await wire.read() == b""
        wire.write(b"late but allowed\r\n")
        assert await client.line(100) == b"late but allowed"
        await asyncio.gather(wire.aclose(), client.aclose())


@pytest.mark.anyio
async def test_large_transfers_are_exact_and_bounded(store: Store, mx: Certificate) -> None:
    block = random.Random(1).randbytes(1 << 20)

    async def send(wire: Wire) -> None:
        for _ in range(8):
            wire.write(block)
            await wire.drain()
        wire.write_eof()

    async def receive(wire: Wire) -> None:
        data = bytearray()
        while piece := await wire.read():
            assert wire.buffered == 0 and len(piece) <= wire.high + (1 << 18)
            data += piece
            await asyncio.sleep(0)
        assert bytes(data) == block * 8

    async with wires() as (wire, client):
        context = client_context(store.ca_file, True)
        await asyncio.gather(
            wire.start_tls_server(ServerContext([mx])), client.start_tls_client(context, "mx.example.org")
        )
        await asyncio.gather(send(wire), receive(client), send(client), receive(wire))
        assert wire.bytes_in == client.bytes_out > 8 << 20


@pytest.mark.anyio
async def test_handshakes_that_fail(store: Store, mx: Certificate) -> None:
    context = ServerContext([mx])
    for name, text in (("wrong.example.org", "Hostname mismatch"), ("mx.example.org", "unable to get local issuer")):
        ca = store.ca_file if "wrong" in name else None
        async with wires() as (wire, client):
            results = await asyncio.gather(
                wire.start_tls_server(context),
                client.start_tls_client(client_context(ca, True), name),
                return_exceptions=True,
            )
            assert isinstance(results[1], TlsError) and text in str(results[1])
            assert client.closed or await client.read() == b""
            client.write(b"never in clear")
            # TLS 1.3 lets the server finish before it hears of it; then reading fails.
            if results[0] is None:
                with pytest.raises(EndOfStream):
                    await wire.line(100)
            assert wire.bytes_in < 2000
            assert isinstance(wire.error or results[0], (TlsError, EndOfStream))
    async with wires() as (wire, client):
        client.write(b"EHLO in.clear\r\n")
        with pytest.raises(TlsError):
            await wire.start_tls_server(context)
        assert (await client.read())[:1] in (b"", b"\x15")  # an alert, or nothing for what was no record
        await wire.aclose()
    async with wires() as (wire, client):
        client.write_eof()
        with pytest.raises(EndOfStream):
            await wire.start_tls_server(context)
    async with wires() as (wire, client):
        wire.set_deadline(0.01)
        with pytest.raises(WireTimeout):
            await wire.start_tls_server(context)
