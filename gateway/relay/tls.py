"""TLS without sockets: bytes from the network in, clear bytes out, and back.

`Wire` moves the bytes; what is here only turns them. Two classes share the interface `TlsSession`: `ServerSession`
(pyOpenSSL memory connections, because certificates chosen by name, refused ALPN and optional client certificates need
OpenSSL's callbacks) and `ClientSession` (the standard library's `ssl.MemoryBIO`, whose checks of the peer's name we
want towards upstreams). Rules kept here:

- whatever was fed is decrypted at once and completely: clear bytes given back are never more than cipher bytes fed,
  and nothing waits inside, so pausing the wire pauses everything;
- OpenSSL's memory buffers keep the size of the largest piece they ever held, so they are fed 64 KiB at a time;
- renegotiation and compression are off; where client certificates are asked for, sessions are not resumed, because
  a resumed session skips the verification whose outcome `TlsInfo.verified` reports.
"""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from OpenSSL import SSL, crypto

__all__ = [
    "Certificate",
    "ClientSession",
    "ServerContext",
    "ServerSession",
    "TlsConfigError",
    "TlsError",
    "TlsInfo",
    "TlsSession",
    "client_context",
]

RECORD = 16384  # the most clear bytes one TLS record carries (RFC 8446 section 5.1)
STEP = 4 * RECORD
VERSIONS = {"TLSv1.2": SSL.TLS1_2_VERSION, "TLSv1.3": SSL.TLS1_3_VERSION}


class TlsError(ConnectionError):
    """A handshake or a record failed; the text is OpenSSL's reason and holds no peer data."""


class TlsConfigError(ValueError):
    """Certificates, keys or options cannot be used; the text names the file and what to mend."""


@dataclass(frozen=True, slots=True)
class TlsInfo:
    """What a finished handshake settled.

    `verified` is true only if the peer showed a certificate and it was checked against our authorities;
    otherwise `verify_error` says why not (empty if no check was asked for).
    """

    version: str
    cipher: str
    bits: int
    sni: str | None
    alpn: str | None
    verified: bool
    verify_error: str
    certificate: bytes | None
    resumed: bool


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of a PEM chain (the server's own certificate first) and of its unencrypted PEM key."""

    chain: str
    key: str


class TlsSession(ABC):
    """One TLS connection's state.

    `info` is set once the handshake is done, `closed` by the peer's close_notify. `overhead` counts fed bytes that
    carried nothing, for whoever bounds what control records may make us keep in `outgoing`.
    """

    __slots__ = ("closed", "info", "overhead")

    def __init__(self) -> None:
        self.info: TlsInfo | None = None
        self.closed = False
        self.overhead = 0

    def start(self) -> bytes:
        """The first flight that we send: the client's hello, nothing on a server."""
        return b""

    @abstractmethod
    def feed(self, cipher: bytes) -> bytes:
        """Take bytes from the network and return the clear bytes they hold. Raises TlsError.

        While the handshake runs, and after an error (an alert), `outgoing` has bytes to send afterwards.
        """

    @abstractmethod
    def seal(self, clear: bytes) -> bytes:
        """The records that carry `clear`. Raises TlsError."""

    @abstractmethod
    def outgoing(self) -> bytes:
        """Handshake bytes and alerts that wait to be sent."""

    @abstractmethod
    def close_notify(self) -> bytes:
        """The records that end our direction (RFC 8446 section 6.1); the peer may go on."""


def pieces(data: bytes) -> Iterable[bytes | memoryview]:
    """`data` in steps that OpenSSL's buffers may keep the size of."""
    if len(data) <= STEP:
        return (data,)
    view = memoryview(data)
    return (view[at : at + STEP] for at in range(0, len(data), STEP))


class ServerSession(TlsSession):
    """The server's side of one connection; made by `ServerContext.session`."""

    __slots__ = ("_asked", "_connection", "_faults")

    def __init__(self, context: SSL.Context, asked: bool) -> None:
        super().__init__()
        self._asked = asked
        self._faults: list[str] = []  # not `self`, which would tie connection and session into a cycle
        self._connection = SSL.Connection(context, None)
        self._connection.set_app_data(self._faults)
        self._connection.set_accept_state()

    def feed(self, cipher: bytes) -> bytes:
        connection = self._connection
        clear: list[bytes] = []
        for piece in pieces(cipher):
            connection.bio_write(piece)
            try:
                if self.info is None:
                    connection.do_handshake()
                    self.info = self._settled()
                while True:
                    clear.append(connection.recv(RECORD))
            except SSL.WantReadError:
                continue
            except SSL.ZeroReturnError:
                self.closed = True
                break
            except SSL.Error as error:
                raise TlsError(_reason(error)) from None
        data = clear[0] if len(clear) == 1 else b"".join(clear)
        self.overhead += len(cipher) - len(data)
        return data

    def seal(self, clear: bytes) -> bytes:
        connection = self._connection
        sealed: list[bytes] = []
        try:
            for piece in pieces(clear):
                sent = connection.send(piece)
                while sent < len(piece):  # one record a call: pyOpenSSL allows partial writes
                    sent += connection.send(piece[sent:])
                sealed.append(connection.bio_read(sent + 4096))
        except SSL.Error as error:
            raise TlsError(_reason(error)) from None
        return sealed[0] if len(sealed) == 1 else b"".join(sealed)

    def outgoing(self) -> bytes:
        waiting: list[bytes] = []
        try:
            while True:
                waiting.append(self._connection.bio_read(RECORD))
        except SSL.WantReadError:
            return b"".join(waiting)

    def close_notify(self) -> bytes:
        try:
            self._connection.shutdown()
        except SSL.Error:
            return b""  # broken or unfinished: there is nothing that could be ended in good order
        return self.outgoing()

    def _settled(self) -> TlsInfo:
        connection = self._connection
        peer = connection.get_peer_certificate(as_cryptography=True)
        fault = self._faults[0] if self._faults else "no certificate shown" if self._asked and peer is None else ""
        name = connection.get_servername()
        return TlsInfo(
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            bits=connection.get_cipher_bits() or 0,
            sni=name.decode("ascii", "replace").lower() if name else None,
            alpn=connection.get_alpn_proto_negotiated().decode("ascii", "replace") or None,
            verified=self._asked and peer is not None and not fault,
            verify_error=fault,
            certificate=peer.public_bytes(Encoding.DER) if peer is not None else None,
            # pyOpenSSL has no public call for this.
            resumed=bool(Binding.lib.SSL_session_reused(connection._ssl)),
        )


class ClientSession(TlsSession):
    """The client's side of one connection, towards an upstream."""

    __slots__ = ("_incoming", "_name", "_object", "_outgoing", "_verify")

    def __init__(self, context: ssl.SSLContext, server_name: str | None) -> None:
        super().__init__()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._name = server_name
        self._verify = context.verify_mode == ssl.CERT_REQUIRED

    def start(self) -> bytes:
        self.feed(b"")
        return self._outgoing.read()

    def feed(self, cipher: bytes) -> bytes:
        clear: list[bytes] = []
        for piece in pieces(cipher):
            self._incoming.write(piece)
            try:
                if self.info is None:
                    self._object.do_handshake()
                    self.info = self._settled()
                while block := self._object.read(RECORD):
                    clear.append(block)
                self.closed = True  # end of file: ssl's way to say that close_notify came
                break
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLZeroReturnError:
                self.closed = True
                break
            except ssl.SSLCertVerificationError as error:
                raise TlsError(f"certificate not accepted: {error.verify_message}") from None
            except ssl.SSLError as error:
                raise TlsError(_words(error.reason)) from None
        data = clear[0] if len(clear) == 1 else b"".join(clear)
        self.overhead += len(cipher) - len(data)
        return data

    def seal(self, clear: bytes) -> bytes:
        try:
            for piece in pieces(clear):
                sent = self._object.write(piece)
                while sent < len(piece):
                    sent += self._object.write(piece[sent:])
        except ssl.SSLError as error:
            raise TlsError(_words(error.reason)) from None
        return self._outgoing.read()

    def outgoing(self) -> bytes:
        return self._outgoing.read()

    def close_notify(self) -> bytes:
        try:
            self._object.unwrap()
        except ssl.SSLError:
            pass  # "want read": our alert is written, the peer's may come or not
        return self._outgoing.read()

    def _settled(self) -> TlsInfo:
        cipher = self._object.cipher() or ("", "", 0)
        return TlsInfo(
            version=self._object.version() or "",
            cipher=cipher[0],
            bits=cipher[2],
            sni=self._name,
            alpn=self._object.selected_alpn_protocol(),
            verified=self._verify,
            verify_error="",
            certificate=self._object.getpeercert(True),
            resumed=bool(self._object.session_reused),
        )


class ServerContext:
    """Certificates and options of a listener; gives each connection its `ServerSession`.

    The certificate is chosen by the name that the client asks for (SNI, RFC 6066 section 3): the first in the list
    whose subject alternative names cover it, else the first of all. Certificates for the same names with keys of
    different types (RSA and ECDSA) stand beside each other and OpenSSL picks one. `verify` other than "off" asks
    the client for a certificate and records in `TlsInfo` whether `client_ca` (PEM file) vouches for it; a client
    without a good one still finishes its handshake, so that whoever judges can answer in words. `ciphers` is an
    OpenSSL list in which names starting with TLS_ stand for TLS 1.3. If `alpn` is given, a client that offers
    protocols of which none is ours is refused (RFC 7301 section 3.2).

    Raises TlsConfigError.
    """

    def __init__(
        self,
        certificates: Sequence[Certificate],
        *,
        minimum: Literal["TLSv1.2", "TLSv1.3"] = "TLSv1.2",
        client_ca: str | None = None,
        verify: Literal["off", "optional", "required"] = "off",
        ciphers: str | None = None,
        tickets: bool = True,
        alpn: tuple[str, ...] = (),
    ) -> None:
        if not certificates:
            raise TlsConfigError("no certificate given")
        if verify != "off" and client_ca is None:
            raise TlsConfigError(f"client certificates are {verify}, but no client_ca file says whose to accept")
        self.verify = verify
        self._minimum = VERSIONS[minimum]
        self._client_ca = client_ca if verify != "off" else None
        self._ciphers = ciphers
        self._tickets = tickets and verify == "off"
        self._alpn = [name.encode("ascii") for name in alpn]
        self._exact: dict[str, SSL.Context] = {}
        self._wildcard: dict[str, SSL.Context] = {}
        groups: dict[frozenset[str], list[tuple[type, SSL.Context]]] = {}
        self._contexts = [self._join(certificate, groups) for certificate in certificates]
        self._contexts[0].set_tlsext_servername_callback(self._choose)

    def session(self) -> ServerSession:
        """A fresh session that waits for the client's hello."""
        return ServerSession(self._contexts[0], self._client_ca is not None)

    def _join(
        self, certificate: Certificate, groups: dict[frozenset[str], list[tuple[type, SSL.Context]]]
    ) -> SSL.Context:
        """Load one certificate into the context of its names, made if there is none."""
        names, kind = _checked(certificate)
        group = groups.setdefault(names, [])
        if group and all(kind is not other for other, _ in group):
            context = group[0][1]
        else:
            context = self._context()
        group.append((kind, context))
        try:
            context.use_certificate_chain_file(certificate.chain)
            context.use_privatekey_file(certificate.key)
        except SSL.Error as error:
            raise TlsConfigError(f"{certificate.chain}: OpenSSL refuses it: {_reason(error)}") from None
        for name in names:
            if name.startswith("*."):
                self._wildcard.setdefault(name[2:], context)
            else:
                self._exact.setdefault(name, context)
        return context

    def _context(self) -> SSL.Context:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(self._minimum)
        context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # saves an idle connection 32 KiB
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)  # tickets need none
        context.set_session_id(b"gateway")
        if not self._tickets:
            context.set_options(SSL.OP_NO_TICKET)
        if self._ciphers is not None:
            self._set_ciphers(context, self._ciphers)
        if self._client_ca is not None:
            _chain(self._client_ca)
            try:
                context.load_verify_locations(self._client_ca)
                context.load_client_ca(self._client_ca.encode())  # the names that the client is told
            except SSL.Error as error:
                raise TlsConfigError(f"{self._client_ca}: OpenSSL refuses it: {_reason(error)}") from None
            context.set_verify(SSL.VERIFY_PEER, _note_fault)
        if self._alpn:
            context.set_alpn_select_callback(self._select)
        return context

    def _set_ciphers(self, context: SSL.Context, ciphers: str) -> None:
        names = ciphers.split(":")
        modern = ":".join(name for name in names if name.startswith("TLS_"))
        classic = ":".join(name for name in names if not name.startswith("TLS_"))
        try:
            if classic:
                context.set_cipher_list(classic.encode())
            if modern:
                context.set_tls13_ciphersuites(modern.encode())
        except SSL.Error:
            raise TlsConfigError(f"ciphers {ciphers!r}: OpenSSL knows none of them, or not this form") from None

    def _choose(self, connection: SSL.Connection) -> None:
        """OpenSSL's callback: the client's hello has been read."""
        asked = connection.get_servername()
        if not asked:
            return
        name = asked.decode("ascii", "replace").lower().rstrip(".")
        context = self._exact.get(name) or self._wildcard.get(name.partition(".")[2])
        if context is not None and context is not self._contexts[0]:
            connection.set_context(context)

    def _select(self, connection: SSL.Connection, offered: list[bytes]) -> bytes:
        """OpenSSL's callback: the client offered protocols; raising sends the alert no_application_protocol."""
        for name in self._alpn:
            if name in offered:
                return name
        raise TlsError("none of the offered application protocols is ours")


def client_context(ca_file: str | None, verify: bool, certificate: Certificate | None = None) -> ssl.SSLContext:
    """The context for connections to upstreams: TLS 1.2 or newer, the system's authorities or `ca_file` (PEM).

    With `verify` the certificate must be good for the server name given to the handshake. `certificate` is shown
    to servers that ask for one. Raises TlsConfigError.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError):
        raise TlsConfigError(f"{ca_file}: cannot be read as PEM certificates") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate is not None:
        _checked(certificate)
        context.load_cert_chain(certificate.chain, certificate.key)
    return context


def _checked(certificate: Certificate) -> tuple[frozenset[str], type]:
    """The DNS names of a certificate and the type of its key, after all checks that give a clear message."""
    chain, text = _chain(certificate.chain), _read(certificate.key)
    try:
        key = load_pem_private_key(text, None)
    except TypeError:
        raise TlsConfigError(f"{certificate.key}: the key is encrypted; store it without a passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise TlsConfigError(f"{certificate.key}: not a PEM private key") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ours = key.public_key().public_bytes(*form)
    if chain[0].public_key().public_bytes(*form) != ours:
        if any(other.public_key().public_bytes(*form) == ours for other in chain[1:]):
            raise TlsConfigError(f"{certificate.chain}: the server's own certificate must come first")
        raise TlsConfigError(f"{certificate.key}: not the key of the certificate in {certificate.chain}")
    now = datetime.now(UTC)
    if chain[0].not_valid_after_utc < now:
        raise TlsConfigError(f"{certificate.chain}: expired on {chain[0].not_valid_after_utc:%Y-%m-%d}")
    if chain[0].not_valid_before_utc > now:
        raise TlsConfigError(f"{certificate.chain}: not valid before {chain[0].not_valid_before_utc:%Y-%m-%d}")
    try:
        extension = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return frozenset(), type(key)
    return frozenset(name.lower() for name in extension.value.get_values_for_type(x509.DNSName)), type(key)


def _chain(path: str) -> list[x509.Certificate]:
    text = _read(path)
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError:
        raise TlsConfigError(f"{path}: not a chain of PEM certificates") from None


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TlsConfigError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None


def _note_fault(connection: SSL.Connection, certificate: crypto.X509, error: int, depth: int, good: int) -> bool:
    """OpenSSL's callback for each certificate of the client's chain: notes what is wrong and goes on."""
    if not good:
        text = Binding.ffi.string(Binding.lib.X509_verify_cert_error_string(error)).decode()
        connection.get_app_data().append(text)
    return True


def _reason(error: SSL.Error) -> str:
    """OpenSSL's reason from pyOpenSSL's [(library, function, reason), ...]."""
    first = error.args[0] if error.args else None
    return str(first[0][2]) if isinstance(first, list) and first else "broken record"


def _words(reason: str | None) -> str:
    """The same from ssl's WRONG_VERSION_NUMBER form."""
    return (reason or "broken record").replace("_", " ").lower()
