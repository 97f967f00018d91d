"""The files that TLS needs, read with messages that name the file and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from gateway.relay.tls_session import TlsConfigError

_CRL = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of a PEM chain (the server's own certificate first) and of its PEM key."""

    chain: str
    key: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate that fits its key: the DNS names it covers (lower case), and the key."""

    names: frozenset[str]
    key: PrivateKeyTypes


def check_pair(certificate: Certificate, passphrases: Sequence[bytes] = ()) -> Pair:
    """Read chain and key and check that they fit and that it is the time for them. Raises TlsConfigError.

    An encrypted key is tried with each of `passphrases`.
    """
    chain, key = read_chain(certificate.chain), _read_key(certificate.key, passphrases)
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
        return Pair(frozenset(), key)
    return Pair(frozenset(name.lower() for name in extension.value.get_values_for_type(x509.DNSName)), key)


def read_chain(path: str) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one. Raises TlsConfigError."""
    text = _read(path)
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError:
        raise TlsConfigError(f"{path}: not a chain of PEM certificates") from None


def read_crls(path: str) -> list[x509.CertificateRevocationList]:
    """The revocation lists of a PEM file, at least one. Raises TlsConfigError."""
    blocks = _CRL.findall(_read(path))
    try:
        lists = [x509.load_pem_x509_crl(block) for block in blocks]
    except ValueError:
        lists = []
    if not lists:
        raise TlsConfigError(f"{path}: not a file of PEM revocation lists")
    return lists


def read_passphrases(path: str) -> tuple[bytes, ...]:
    """The passphrases of a file, one a line; empty lines count for nothing. Raises TlsConfigError."""
    passphrases = tuple(line for line in re.split(rb"\r?\n", _read(path)) if line)
    if not passphrases:
        raise TlsConfigError(f"{path}: no passphrase in it; write one a line")
    return passphrases


def check_dh_parameters(path: str) -> None:
    """Raises TlsConfigError unless the file holds PEM parameters for Diffie-Hellman; OpenSSL reads them itself."""
    if re.search(rb"-----BEGIN (X9\.42 )?DH PARAMETERS-----", _read(path)) is None:
        raise TlsConfigError(f"{path}: not PEM Diffie-Hellman parameters")


def _read_key(path: str, passphrases: Sequence[bytes]) -> PrivateKeyTypes:
    text = _read(path)
    encrypted = False
    for passphrase in (None, *passphrases):
        try:
            return load_pem_private_key(text, passphrase)
        except TypeError:  # it needs a passphrase
            encrypted = True
        except (ValueError, UnsupportedAlgorithm):
            if not encrypted:
                raise TlsConfigError(f"{path}: not a PEM private key") from None
    if passphrases:
        raise TlsConfigError(f"{path}: the key is encrypted, and no line of the password_file opens it")
    advice = "store it without a passphrase, or name a password_file"
    raise TlsConfigError(f"{path}: the key is encrypted; {advice}")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TlsConfigError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
