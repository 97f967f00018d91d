"""The keys of session tickets (RFC 5077, RFC 8446 section 4.6.1), set to what several processes share.

OpenSSL gives each context random ones. Its call that sets others (SSL_CTX_set_tlsext_ticket_keys, a macro around
SSL_CTX_ctrl) cannot be reached: Python's bindings have no equal, and the library inside of `cryptography` shows no
symbols. So the keys are written where OpenSSL keeps them. Where that is gets proven before anything is written: a
context of our own gives out a ticket, whose first octets are the keys' name; that name, 16 random octets, is searched
in the context's memory; behind it is a pointer to the keys; they are the keys if they authenticate and decrypt the
ticket; and once ours are written the next ticket must open with ours. Otherwise nothing is done, ever, and each
context keeps its own keys: then workers that were forked after the context was made still resume each other's
sessions, those of another generation do not.
"""

from __future__ import annotations

import ctypes
import functools
import hmac
import os
import sys

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from OpenSSL import SSL

from gateway.relay import tls_bindings

NAME, KEY = 16, 32
KEYS = NAME + 2 * KEY  # octets: the name, the key of HMAC-SHA256, the key of AES-256-CBC

_CONTEXT = 4096  # octets of a context that are searched, more than it has
_POINTER = ctypes.sizeof(ctypes.c_void_p)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ANONYMOUS = b"AECDH-AES256-SHA:@SECLEVEL=0"  # a handshake that needs no certificate; nothing but the probe uses it
_libc = ctypes.CDLL(None, use_errno=True)
_libc.write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_libc.write.restype = ctypes.c_ssize_t


def set_keys(context: SSL.Context, keys: bytes) -> bool:
    """Let the context give out, and take, tickets under these keys (`KEYS` octets). False where that cannot be had."""
    if len(keys) != KEYS:
        raise ValueError(f"{len(keys)} octets are not ticket keys, which are {KEYS}")
    offset = _offset()
    if offset is None:
        return False
    _write(context, offset, keys)
    return True


@functools.cache
def _offset() -> int | None:
    """Where in a context the name of its ticket keys is, followed by a pointer to them; None if it is not proven."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    try:
        context.set_cipher_list(_ANONYMOUS)
        ticket = _ticket(context)
        memory = _memory(tls_bindings.address(context), _CONTEXT)
        offset = memory.find(ticket[:NAME]) if len(ticket) > NAME else -1
        if offset < 0 or not _opens(ticket, ticket[:NAME] + _memory(_pointer(memory, offset), 2 * KEY)):
            return None
        keys = os.urandom(KEYS)
        _write(context, offset, keys)
        return offset if _opens(_ticket(context), keys) else None
    except SSL.Error:  # this library has no such handshake
        return None


def _write(context: SSL.Context, offset: int, keys: bytes) -> None:
    place = tls_bindings.address(context) + offset
    ctypes.memmove(_pointer(ctypes.string_at(place, NAME + _POINTER), 0), keys[NAME:], 2 * KEY)
    ctypes.memmove(place, keys[:NAME], NAME)


def _pointer(memory: bytes, offset: int) -> int:
    """The pointer behind the name that is at `offset`."""
    return int.from_bytes(memory[offset + NAME : offset + NAME + _POINTER], sys.byteorder)


def _opens(ticket: bytes, keys: bytes) -> bool:
    """Whether these keys made the ticket: name, initial vector, an encrypted session in DER, HMAC of all of it."""
    if len(keys) != KEYS or len(ticket) < NAME + 16 + 16 + 32 or ticket[:NAME] != keys[:NAME]:
        return False
    body, tag = ticket[:-32], ticket[-32:]
    if not hmac.compare_digest(hmac.digest(keys[NAME : NAME + KEY], body, "sha256"), tag):
        return False
    decryptor = Cipher(algorithms.AES(keys[NAME + KEY :]), modes.CBC(body[NAME : NAME + 16])).decryptor()
    return decryptor.update(body[NAME + 16 :])[:1] == b"\x30"  # SEQUENCE


def _ticket(context: SSL.Context) -> bytes:
    """The ticket of a handshake of TLS 1.2 with this context, empty if it gives none."""
    other = SSL.Context(SSL.TLS_CLIENT_METHOD)
    other.set_max_proto_version(SSL.TLS1_2_VERSION)
    other.set_cipher_list(_ANONYMOUS)
    server, client = SSL.Connection(context, None), SSL.Connection(other, None)
    server.set_accept_state()
    client.set_connect_state()
    flight = b""
    for _ in range(2):
        _step(client, server)
        flight = _step(server, client)
    # The server's second flight begins with a record (5 octets) of NewSessionTicket: type 4, length (3 octets),
    # lifetime (4), length of the ticket (2), ticket (RFC 5077 section 3.3).
    if len(flight) < 15 or flight[5] != 4:
        return b""
    return flight[15 : 15 + int.from_bytes(flight[13:15], "big")]


def _step(one: SSL.Connection, other: SSL.Connection) -> bytes:
    """What `one` has to say; `other` has it then."""
    try:
        one.do_handshake()
    except SSL.WantReadError:
        pass
    flight = one.bio_read(65536)
    other.bio_write(flight)
    return flight


def _memory(address: int, size: int) -> bytes:
    """Memory of this process, as much of it as is there.

    It goes through a pipe: where there is none, the kernel answers EFAULT, and nothing crashes.
    """
    taker, giver = os.pipe()
    found = bytearray()
    try:
        while len(found) < size:
            place = address + len(found)
            step = min(size - len(found), _PAGE - place % _PAGE)
            done = _libc.write(giver, place, step)
            if done <= 0:
                break
            found += os.read(taker, done)
    finally:
        os.close(taker)
        os.close(giver)
    return bytes(found)
