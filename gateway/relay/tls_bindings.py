"""Calls of OpenSSL that pyOpenSSL has no methods for, through the bindings that it is made of."""

from __future__ import annotations

from cryptography.hazmat.bindings.openssl.binding import Binding
from OpenSSL import SSL

from gateway.relay.tls_session import TlsConfigError

_lib, _ffi = Binding.lib, Binding.ffi

# What optional_no_ca lets pass: nobody known vouches for the certificate. OpenSSL's numbers (openssl/x509_vfy.h).
UNKNOWN_ISSUER = frozenset(
    {
        _lib.X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT,
        _lib.X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN,
        _lib.X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY,
        _lib.X509_V_ERR_CERT_UNTRUSTED,
        _lib.X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE,
    }
)
_NO_VERSION = 0x0300  # SSL 3.0, which nobody speaks


def set_curves(context: SSL.Context, curves: str) -> None:
    if _lib.SSL_CTX_set1_curves_list(context._context, curves.encode("ascii", "replace")) != 1:
        _lib.ERR_clear_error()
        raise TlsConfigError(f"curves {curves!r}: OpenSSL does not know them all")


def set_cache_mode(context: SSL.Context, mode: int) -> None:
    """Context.set_session_cache_mode is for contexts that have no connections yet; OpenSSL takes it at any time."""
    _lib.SSL_CTX_set_session_cache_mode(context._context, mode)


def resumed(connection: SSL.Connection) -> bool:
    return bool(_lib.SSL_session_reused(connection._ssl))


def verify_result(connection: SSL.Connection) -> int:
    """The last fault that verification found, 0 for none; OpenSSL keeps it with the session."""
    return int(_lib.SSL_get_verify_result(connection._ssl))


def fault_text(error: int) -> str:
    return str(_ffi.string(_lib.X509_verify_cert_error_string(error)).decode())


def _note_fault(good: int, store: object) -> int:
    """OpenSSL's callback for each certificate of the client's chain: notes what is wrong and goes on.

    The session is then given a version that no client can come back with: OpenSSL resumes a session, from its cache
    or from a ticket, only in the version that it says. An exception here fails the handshake.
    """
    if not good:
        tls = _lib.X509_STORE_CTX_get_ex_data(store, _lib.SSL_get_ex_data_X509_STORE_CTX_idx())
        SSL.Connection._reverse_mapping[tls].get_app_data().append(_lib.X509_STORE_CTX_get_error(store))
        _lib.SSL_SESSION_set_protocol_version(_lib.SSL_get_session(tls), _NO_VERSION)
    return 1


_NOTE_FAULT = _ffi.callback("int(int, X509_STORE_CTX *)", _note_fault, error=0)


def set_verify(context: SSL.Context) -> None:
    """Ask for a certificate. Context.set_verify would forget each fault that the callback lets pass."""
    _lib.SSL_CTX_set_verify(context._context, SSL.VERIFY_PEER, _NOTE_FAULT)
