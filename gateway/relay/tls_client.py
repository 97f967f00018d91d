"""TLS towards upstreams: the standard library's `ssl.MemoryBIO`, whose checks of the peer's name we want there."""

from __future__ import annotations

import ssl

from gateway.relay.tls_files import Certificate, check_pair
from gateway.relay.tls_session import RECORD, TlsConfigError, TlsError, TlsInfo, TlsSession, pieces


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
        check_pair(certificate)
        context.load_cert_chain(certificate.chain, certificate.key)
    return context


def _words(reason: str | None) -> str:
    """A reason in ssl's WRONG_VERSION_NUMBER form as words."""
    return (reason or "broken record").replace("_", " ").lower()
