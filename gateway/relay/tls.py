"""TLS without sockets: bytes from the network in, clear bytes out, and back.

`Wire` moves the bytes; what is here only turns them. Two classes share the interface `TlsSession`: `ServerSession`
(pyOpenSSL memory connections, because certificates chosen by name, refused ALPN and optional client certificates need
OpenSSL's callbacks) and `ClientSession` (the standard library, for its checks of the peer's name). This module only
gathers their names.
"""

from gateway.relay.tls_client import ClientSession, client_context
from gateway.relay.tls_files import Certificate, CertificateFacts
from gateway.relay.tls_server import ServerContext, ServerSession
from gateway.relay.tls_session import TlsConfigError, TlsError, TlsInfo, TlsSession
from gateway.relay.tls_settings import ServerSettings

__all__ = [
    "Certificate",
    "CertificateFacts",
    "ClientSession",
    "ServerContext",
    "ServerSession",
    "ServerSettings",
    "TlsConfigError",
    "TlsError",
    "TlsInfo",
    "TlsSession",
    "client_context",
]
