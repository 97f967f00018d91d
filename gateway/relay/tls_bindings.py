"""Calls of OpenSSL that pyOpenSSL has no methods for, through the bindings that it is made of.

Its methods refuse to change a context that has had connections; OpenSSL itself lets certificates, authorities and the
like be replaced at any time: connections that exist have copies, or references, of what they began with.
"""

from __future__ import annotations

from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from OpenSSL import SSL, crypto

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


def use_pair(context: SSL.Context, chain: str, key: PrivateKeyTypes) -> None:
    """Certificates of this file and their key, in place of any with a key of this type. Raises SSL.Error.

    `chain` is a path of PEM certificates; the key is known to fit the first.
    """
    _done(_lib.SSL_CTX_use_certificate_chain_file(context._context, chain.encode()))
    wrapped = crypto.PKey.from_cryptography_key(key)  # type: ignore[arg-type]  # one that OpenSSL can sign with
    _done(_lib.SSL_CTX_use_PrivateKey(context._context, wrapped._pkey))


def set_authorities(context: SSL.Context, store: crypto.X509Store) -> None:
    """Verify clients with this store, in place of the one before."""
    _done(_lib.X509_STORE_up_ref(store._store))
    _lib.SSL_CTX_set_cert_store(context._context, store._store)


def announce_authorities(context: SSL.Context, path: str) -> None:
    """Tell clients the names of the certificates in this PEM file. Raises SSL.Error."""
    names = _lib.SSL_load_client_CA_file(path.encode())
    _done(names != _ffi.NULL)
    _lib.SSL_CTX_set_client_CA_list(context._context, names)


def set_session_context(context: SSL.Context, name: bytes) -> None:
    """Sessions are resumed only in contexts of the same name, 32 octets at most."""
    _done(_lib.SSL_CTX_set_session_id_context(context._context, name, len(name)))


def address(context: SSL.Context) -> int:
    """Where OpenSSL's SSL_CTX is in memory."""
    return int(_ffi.cast("uintptr_t", context._context))


def _done(good: int) -> None:
    """Raises SSL.Error with what OpenSSL has to say unless `good`."""
    if not good:
        errors = []
        while (code := _lib.ERR_get_error()) != 0:
            texts = (_lib.ERR_lib_error_string, _lib.ERR_func_error_string, _lib.ERR_reason_error_string)
            errors.append(tuple(_text(of(code)) for of in texts))
        raise SSL.Error(errors)


def _text(chars: object) -> str:
    return "" if chars == _ffi.NULL else str(_ffi.string(chars).decode())


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
