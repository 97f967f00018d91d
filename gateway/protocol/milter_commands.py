"""What an MTA says to a milter filter: a value and a decoder for each command, an encoder for each that has a payload.

Header values are what stands behind the colon, in the message's own form (folds are CRLF and a blank); the packet's
form is made and undone here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Final

from gateway.protocol.errors import LocalError
from gateway.protocol.milter_macros import macro_key
from gateway.protocol.milter_wire import (
    MAX_PAYLOAD,
    Command,
    Family,
    MilterError,
    Options,
    PacketTooLong,
    decode_text,
    encode_text,
    join_strings,
    packet,
    split_strings,
    value_from_wire,
    value_to_wire,
)
from gateway.protocol.smtp_envelope import Parameters

_PORT: Final = Struct("!H")
_IPV6_PREFIX: Final = re.compile("ipv6:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Macros:
    """Values by name without braces, for the command with the code `command`, which may be one nobody knows."""

    command: int
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Connect:
    """A client connected; `address` is "" for `Family.UNKNOWN`, an IPv6 address has no `IPv6:` in front."""

    hostname: str
    family: Family
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Helo:
    """HELO or EHLO, which the protocol does not tell apart."""

    name: str


@dataclass(frozen=True, slots=True)
class Mail:
    """MAIL; `address` as the client wrote it, with its angle brackets."""

    address: str
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Rcpt:
    """RCPT; as `Mail`."""

    address: str
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Data:
    """DATA, or the first BDAT."""


@dataclass(frozen=True, slots=True)
class Header:
    """A header field: its name, and what stands behind the colon."""

    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class EndOfHeader:
    """All header fields were said."""


@dataclass(frozen=True, slots=True)
class Body:
    """A piece of the body, cut anywhere."""

    data: bytes


@dataclass(frozen=True, slots=True)
class EndOfMessage:
    """The message is complete; `data` is a last piece of its body, which only some MTAs send here."""

    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget the message; the state is that after HELO."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """A command the MTA does not know, or its first word."""

    line: bytes


@dataclass(frozen=True, slots=True)
class Quit:
    """The connection ends."""


@dataclass(frozen=True, slots=True)
class QuitNewConnection:
    """The client is gone; the next command is CONNECT for another one, with the same options."""


MtaCommand = (
    Options | Macros | Connect | Helo | Mail | Rcpt | Data | Header | EndOfHeader | Body | EndOfMessage | Abort
    | Unknown | Quit | QuitNewConnection
)  # fmt: skip


def encode_connect(hostname: str, address: str, port: int) -> bytes:
    """CONNECT.

    `address` is an IP address, a path beginning with `/`, or "" if unknown. A mapped IPv4 address is sent as IPv4,
    an IPv6 one in its short form without zone. Raises `LocalError` for anything else and for a port beyond 65535.
    """
    name = join_strings([encode_text(hostname)])
    if not address:
        return packet(Command.CONNECT, name + Family.UNKNOWN.value)
    if not 0 <= port <= 65535:
        raise LocalError("port of a client out of range")
    if address[0] == "/":
        family, port, text = Family.UNIX, 0, address
    else:
        family, text = _ip(address)
    return packet(Command.CONNECT, name + family.value + _PORT.pack(port) + join_strings([encode_text(text)]))


def _ip(address: str) -> tuple[Family, str]:
    try:
        ip = ipaddress.ip_address(_IPV6_PREFIX.sub("", address, count=1).partition("%")[0])
    except ValueError:
        raise LocalError("address of a client is no IP address") from None
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return Family.INET6, str(ip)
        ip = ip.ipv4_mapped
    return Family.INET, str(ip)


def encode_helo(name: str) -> bytes:
    """HELO."""
    return packet(Command.HELO, join_strings([encode_text(name)]))


def encode_envelope(command: int, address: str, parameters: Parameters) -> bytes:
    """MAIL or RCPT; `address` with its angle brackets."""
    strings = [encode_text(address)]
    for keyword, value in parameters:
        strings.append(encode_text(keyword if value is None else f"{keyword}={value}"))
    return packet(command, join_strings(strings))


def encode_header(name: bytes, value: bytes, leading_space: bool, limit: int = MAX_PAYLOAD) -> bytes:
    """HEADER; raises `PacketTooLong` for a payload of more than `limit` octets, `LocalError` for a NUL inside."""
    payload = join_strings((name, value_to_wire(value, leading_space)))
    if len(payload) > limit:
        raise PacketTooLong(f"header field of {len(payload)} octets, over the filter's limit of {limit}")
    return packet(Command.HEADER, payload)


def encode_unknown(line: bytes) -> bytes:
    """UNKNOWN; a NUL in the client's line becomes `?`, and what is over `MAX_PAYLOAD` is left out."""
    return packet(Command.UNKNOWN, join_strings([line.replace(b"\0", b"?")[: MAX_PAYLOAD - 1]]))


def decode_command(code: int, payload: bytes, leading_space: bool = False) -> MtaCommand:
    """Read a packet of an MTA; raises `MilterError` for an unknown code and a malformed payload."""
    if code == Command.HEADER:
        strings = split_strings(payload, "HEADER")
        if len(strings) != 2:
            raise MilterError("HEADER: not a name and a value")
        return Header(strings[0], value_from_wire(strings[1], leading_space))
    empty = _EMPTY.get(code)
    if empty is not None:
        if payload:
            raise MilterError(f"{Command(code).name}: unexpected payload")
        return empty
    decoder = _DECODERS.get(code)
    if decoder is None:
        raise MilterError(f"unknown command 0x{code:02x}")
    return decoder(payload)


def _macros(payload: bytes) -> Macros:
    strings = split_strings(payload[1:], "MACRO")
    if not payload or len(strings) % 2:
        raise MilterError("MACRO: not a command code with names and values")
    pairs = zip(strings[::2], strings[1::2], strict=True)
    return Macros(payload[0], {macro_key(decode_text(name)): decode_text(value) for name, value in pairs})


def _connect(payload: bytes) -> Connect:
    hostname, nul, rest = payload.partition(b"\0")
    try:
        family = Family(rest[:1])
    except ValueError:
        raise MilterError("CONNECT: unknown address family") from None
    if family is Family.UNKNOWN:
        return Connect(decode_text(hostname), family, "", 0)
    strings = split_strings(rest[3:], "CONNECT")
    if not nul or len(strings) != 1:
        raise MilterError("CONNECT: not a name, a family, a port and an address")
    address = decode_text(strings[0])
    if family is Family.INET6:
        address = _IPV6_PREFIX.sub("", address, count=1)
    return Connect(decode_text(hostname), family, address, _PORT.unpack_from(rest, 1)[0])


def _one(payload: bytes, what: str) -> bytes:
    strings = split_strings(payload, what)
    if len(strings) != 1:
        raise MilterError(f"{what}: not one string")
    return strings[0]


def _envelope(payload: bytes, what: str) -> tuple[str, Parameters]:
    strings = [decode_text(string) for string in split_strings(payload, what)]
    if not strings:
        raise MilterError(f"{what}: no address")
    return strings[0], split_parameters(strings[1:])


def split_parameters(words: list[str]) -> Parameters:
    """ESMTP parameters from `KEYWORD=value` or `KEYWORD`; keywords become upper case."""
    pairs = []
    for word in words:
        keyword, equals, value = word.partition("=")
        pairs.append((keyword.upper(), value if equals else None))
    return tuple(pairs)


_EMPTY: Final[Mapping[int, MtaCommand]] = {
    Command.DATA: Data(),
    Command.EOH: EndOfHeader(),
    Command.ABORT: Abort(),
    Command.QUIT: Quit(),
    Command.QUIT_NC: QuitNewConnection(),
}
_DECODERS: Final[Mapping[int, Callable[[bytes], MtaCommand]]] = {
    Command.OPTNEG: Options.decode,
    Command.MACRO: _macros,
    Command.CONNECT: _connect,
    Command.HELO: lambda payload: Helo(decode_text(_one(payload, "HELO"))),
    Command.MAIL: lambda payload: Mail(*_envelope(payload, "MAIL")),
    Command.RCPT: lambda payload: Rcpt(*_envelope(payload, "RCPT")),
    Command.BODY: Body,
    Command.BODYEOB: EndOfMessage,
    Command.UNKNOWN: lambda payload: Unknown(_one(payload, "UNKNOWN")),
}
