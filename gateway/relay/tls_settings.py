"""What a listener's TLS can be told, and OpenSSL's options by the names that SSL_CONF_cmd(3) gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gateway.relay.tls_session import TlsConfigError

Verify = Literal["off", "optional", "optional_no_ca", "required"]
Version = Literal["TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """All of a server's TLS but its certificates; files are PEM, given by their paths.

    - `ciphers` is an OpenSSL list for TLS 1.2 and older in which names starting with TLS_ stand for TLS 1.3;
      `ciphersuites` lists those of TLS 1.3. `curves` is OpenSSL's list of groups, "X25519:prime256v1".
    - `client_ca` are authorities that client certificates may come from and that clients are told, `trusted_ca`
      those that they are not told. With `crl` a certificate needs a revocation list of each authority above it.
      `verify_depth` counts the intermediate certificates between a client's and an authority's.
    - `session_cache`: "off" resumes nothing, "none" only from tickets, "cache" also from up to `sessions` sessions
      that OpenSSL keeps (it has room for 20480). `session_timeout` is in seconds.
    - `options` are names that `option_flags` knows.
    """

    minimum: Version = "TLSv1.2"
    maximum: Version | None = None
    ciphers: str | None = None
    ciphersuites: str | None = None
    prefer_server_ciphers: bool = False
    curves: str | None = None
    dhparam: str | None = None
    verify: Verify = "off"
    verify_depth: int = 1
    client_ca: str | None = None
    trusted_ca: str | None = None
    crl: str | None = None
    password_file: str | None = None
    session_cache: Literal["off", "none", "cache"] = "none"
    sessions: int = 20480
    session_tickets: bool = True
    session_timeout: int = 300
    options: tuple[str, ...] = ()


# Bits of openssl/ssl.h; the bindings name only some of them.
NO_TICKET = 1 << 14
NO_COMPRESSION = 1 << 17
SERVER_PREFERENCE = 1 << 22
NO_RENEGOTIATION = 1 << 30
_BUGS = 1 << 4 | 1 << 6 | 1 << 11 | 1 << 31  # SSL_OP_ALL

_ALWAYS = "it is always so"
_CLIENT = "it is for clients"
_NO_SOCKET = "it is for programs where OpenSSL itself reads and writes the socket"
_RENEGOTIATION = "renegotiation is always off"


@dataclass(frozen=True, slots=True)
class _Option:
    """`bits` are set when the option is on, or, if `inverse`, when it is off.

    `never_on`, `never_off`: why that cannot be asked for.
    """

    bits: int
    inverse: bool = False
    never_on: str = ""
    never_off: str = ""


OPTIONS = {
    "SessionTicket": _Option(NO_TICKET, inverse=True),
    "EmptyFragments": _Option(1 << 11, inverse=True),
    "Bugs": _Option(_BUGS),
    "Compression": _Option(NO_COMPRESSION, inverse=True, never_on="compression is always off"),
    "ServerPreference": _Option(SERVER_PREFERENCE),
    "NoResumptionOnRenegotiation": _Option(1 << 16),
    "DHSingle": _Option(0, never_off=_ALWAYS),
    "ECDHSingle": _Option(0, never_off=_ALWAYS),
    "UnsafeLegacyRenegotiation": _Option(0, never_on=_RENEGOTIATION),
    "UnsafeLegacyServerConnect": _Option(0, never_on=_CLIENT),
    "ClientRenegotiation": _Option(0, never_on=_RENEGOTIATION),
    "EncryptThenMac": _Option(1 << 19, inverse=True),
    "NoRenegotiation": _Option(NO_RENEGOTIATION, never_off=_RENEGOTIATION),
    "AllowNoDHEKEX": _Option(1 << 10),
    "PreferNoDHEKEX": _Option(1 << 35),
    "PrioritizeChaCha": _Option(1 << 21),
    "MiddleboxCompat": _Option(1 << 20, never_off="OpenSSL turns it on, and its Python binding cannot turn it off"),
    "AntiReplay": _Option(1 << 24, inverse=True),
    "ExtendedMasterSecret": _Option(1 << 0, inverse=True),
    "CANames": _Option(1 << 9, inverse=True),
    "KTLS": _Option(0, never_on=_NO_SOCKET),
    "KTLSTxZerocopySendfile": _Option(0, never_on=_NO_SOCKET),
    "IgnoreUnexpectedEOF": _Option(0, never_on=_NO_SOCKET),
    "StrictCertCheck": _Option(0, never_on="OpenSSL's Python binding cannot turn it on"),
    "TxCertificateCompression": _Option(1 << 32, inverse=True),
    "RxCertificateCompression": _Option(1 << 33, inverse=True),
}
"""Names of SSL_CONF_cmd(3), command Options."""

_BY_LOWER = {name.lower(): name for name in OPTIONS}


class UnknownOption(TlsConfigError):
    """`name` is none of `OPTIONS`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"OpenSSL has no option {name!r}")
        self.name = name


def option_flags(options: Iterable[str], flags: int = 0) -> int:
    """`flags` (bits of SSL_CTX_set_options) changed by options: `Name` or `+Name` is on, `-Name` is off.

    Case does not matter, as in SSL_CONF_cmd(3). Raises UnknownOption, TlsConfigError where it cannot be had.
    """
    for written in options:
        on, plain = not written.startswith("-"), written[1:] if written[:1] in ("+", "-") else written
        name = _BY_LOWER.get(plain.lower())
        if name is None:
            raise UnknownOption(plain)
        option = OPTIONS[name]
        never = option.never_on if on else option.never_off
        if never:
            raise TlsConfigError(f"option {name} cannot be {'on' if on else 'off'}: {never}")
        flags = flags | option.bits if on is not option.inverse else flags & ~option.bits
    return flags
