"""What both directions of the milter protocol share: numbers, packets, option negotiation, header values.

The names are libmilter's without their prefixes (SMFIC_MAIL is `Command.MAIL`). A packet is a 32-bit big-endian
length that counts the code, the code, and a payload; a string inside is its bytes and a NUL. The protocol knows
no character set, so text is UTF-8 here with whatever else kept as surrogate escapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag
from struct import Struct
from types import MappingProxyType
from typing import Final

from gateway.protocol.errors import LocalError, PeerError

VERSION: Final = 6
MIN_VERSION: Final = 2

MAX_PACKET: Final = 1 << 20
"""Octets of a packet that are read, its code included; libmilter sends 64 KiB, rspamd a whole new body."""

MAX_PAYLOAD: Final = 65_535
"""Octets of a payload that are written: libmilter closes the connection on a larger one."""


class MilterError(PeerError):
    """The peer broke the milter protocol; the text says how, for the administrator, and quotes none of its bytes."""


class PacketTooLong(LocalError):
    """What was to be said does not fit `MAX_PAYLOAD`: a header field, as a rule. The caller has a policy for it."""


class Command(IntEnum):
    """Codes of what an MTA says (SMFIC)."""

    OPTNEG = ord("O")
    MACRO = ord("D")
    CONNECT = ord("C")
    HELO = ord("H")
    MAIL = ord("M")
    RCPT = ord("R")
    DATA = ord("T")
    HEADER = ord("L")
    EOH = ord("N")
    BODY = ord("B")
    BODYEOB = ord("E")
    ABORT = ord("A")
    UNKNOWN = ord("U")
    QUIT = ord("Q")
    QUIT_NC = ord("K")


class Response(IntEnum):
    """Codes of what a filter says (SMFIR); its answer to OPTNEG has the code of `Command.OPTNEG`."""

    CONTINUE = ord("c")
    ACCEPT = ord("a")
    REJECT = ord("r")
    TEMPFAIL = ord("t")
    DISCARD = ord("d")
    REPLYCODE = ord("y")
    SKIP = ord("s")
    SHUTDOWN = ord("4")
    CONN_FAIL = ord("f")
    PROGRESS = ord("p")
    ADDHEADER = ord("h")
    INSHEADER = ord("i")
    CHGHEADER = ord("m")
    REPLBODY = ord("b")
    ADDRCPT = ord("+")
    ADDRCPT_PAR = ord("2")
    DELRCPT = ord("-")
    CHGFROM = ord("e")
    QUARANTINE = ord("q")


class Action(IntFlag):
    """What a filter may do to a message (SMFIF)."""

    ADDHDRS = 0x01
    CHGBODY = 0x02
    ADDRCPT = 0x04
    DELRCPT = 0x08
    CHGHDRS = 0x10
    QUARANTINE = 0x20
    CHGFROM = 0x40
    ADDRCPT_PAR = 0x80
    SETSYMLIST = 0x100


class Step(IntFlag):
    """What a filter does not want (NO), does not answer (NR), and what else it can do (SMFIP)."""

    NOCONNECT = 0x1
    NOHELO = 0x2
    NOMAIL = 0x4
    NORCPT = 0x8
    NOBODY = 0x10
    NOHDRS = 0x20
    NOEOH = 0x40
    NR_HDR = 0x80
    NOUNKNOWN = 0x100
    NODATA = 0x200
    SKIP = 0x400
    RCPT_REJ = 0x800
    NR_CONN = 0x1000
    NR_HELO = 0x2000
    NR_MAIL = 0x4000
    NR_RCPT = 0x8000
    NR_DATA = 0x10000
    NR_UNKN = 0x20000
    NR_EOH = 0x40000
    NR_BODY = 0x80000
    HDR_LEADSPC = 0x100000


class Stage(IntEnum):
    """Stages that have macros, as SETSYMLIST numbers them: the end of message before the end of header."""

    CONNECT = 0
    HELO = 1
    MAIL = 2
    RCPT = 3
    DATA = 4
    EOM = 5
    EOH = 6


class Family(Enum):
    """Families of a client's address."""

    UNKNOWN = b"U"
    UNIX = b"L"
    INET = b"4"
    INET6 = b"6"


ACTIONS: Final[Mapping[int, int]] = MappingProxyType({2: 0x3F, 3: 0x3F, 4: 0x3F, 6: 0x1FF})
STEPS: Final[Mapping[int, int]] = MappingProxyType({2: 0x7F, 3: 0x17F, 4: 0x37F, 6: 0x1FFFFF})
"""All bits of each version; 5 was never used."""

NO_STEPS: Final[Mapping[int, int]] = MappingProxyType(
    {
        Command.CONNECT: Step.NOCONNECT,
        Command.HELO: Step.NOHELO,
        Command.MAIL: Step.NOMAIL,
        Command.RCPT: Step.NORCPT,
        Command.DATA: Step.NODATA,
        Command.UNKNOWN: Step.NOUNKNOWN,
        Command.HEADER: Step.NOHDRS,
        Command.EOH: Step.NOEOH,
        Command.BODY: Step.NOBODY,
    }
)
NR_STEPS: Final[Mapping[int, int]] = MappingProxyType(
    {
        Command.CONNECT: Step.NR_CONN,
        Command.HELO: Step.NR_HELO,
        Command.MAIL: Step.NR_MAIL,
        Command.RCPT: Step.NR_RCPT,
        Command.DATA: Step.NR_DATA,
        Command.UNKNOWN: Step.NR_UNKN,
        Command.HEADER: Step.NR_HDR,
        Command.EOH: Step.NR_EOH,
        Command.BODY: Step.NR_BODY,
    }
)
STAGE_OF: Final[Mapping[int, Stage]] = MappingProxyType(
    {
        Command.CONNECT: Stage.CONNECT,
        Command.HELO: Stage.HELO,
        Command.MAIL: Stage.MAIL,
        Command.RCPT: Stage.RCPT,
        Command.DATA: Stage.DATA,
        Command.EOH: Stage.EOH,
        Command.BODYEOB: Stage.EOM,
    }
)

_HEAD: Final = Struct("!IB")
_OPTIONS: Final = Struct("!III")


def packet(code: int, payload: bytes = b"") -> bytes:
    """One packet."""
    return _HEAD.pack(len(payload) + 1, code) + payload


class PacketReader:
    """Cuts a byte stream into packets, however the network cut it; holds at most `limit` + 3 octets between calls."""

    __slots__ = ("_buffer", "_need", "failure", "limit")

    def __init__(self, limit: int = MAX_PACKET) -> None:
        self.limit = limit
        self.failure: MilterError | None = None
        self._buffer = bytearray()
        self._need = 4

    @property
    def pending(self) -> bool:
        """Whether a packet has begun that is not complete."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes, give the packets they complete, as code and payload.

        Raises `MilterError` for a length of 0 or above `limit`. Packets in front of it in the same bytes are given
        first: then `failure` is set, and the next call raises it.
        """
        if self.failure is not None:
            raise self.failure
        buffer = self._buffer
        if buffer:
            buffer += data
            if len(buffer) < self._need:
                return []
            data = bytes(buffer)
            buffer.clear()
        packets: list[tuple[int, bytes]] = []
        at, end, self._need = 0, len(data), 4
        while end - at >= 4:
            size = int.from_bytes(data[at : at + 4], "big")
            if not 0 < size <= self.limit:
                return self._fail(size, packets)
            stop = at + 4 + size
            if stop > end:
                self._need = 4 + size
                break
            packets.append((data[at + 4], data[at + 5 : stop]))
            at = stop
        if at < end:
            buffer += data[at:] if at else data
        return packets

    def _fail(self, size: int, packets: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        what = f"packet of {size} octets, over the limit of {self.limit}" if size else "packet of length 0"
        self.failure = MilterError(f"{what}: this does not look like the milter protocol")
        if not packets:
            raise self.failure
        return packets


def encode_text(text: str) -> bytes:
    """Text to bytes; raises `LocalError` for what has no bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise LocalError("text has no form in UTF-8") from None


def decode_text(data: bytes) -> str:
    """Bytes to text; bytes that are not UTF-8 become surrogate escapes."""
    return data.decode("utf-8", "surrogateescape")


def join_strings(strings: Sequence[bytes]) -> bytes:
    """Strings as a payload has them; raises `LocalError` if one has a NUL inside."""
    payload = b"\0".join(strings) + b"\0"
    if payload.count(0) != len(strings):
        raise LocalError("NUL inside a string of the milter protocol")
    return payload


def split_strings(payload: bytes, what: str) -> list[bytes]:
    """Take a payload of strings apart; raises `MilterError`, naming `what`, if the last one lacks its NUL."""
    strings = payload.split(b"\0")
    if strings.pop():
        raise MilterError(f"{what}: string without a NUL at its end")
    return strings


@dataclass(frozen=True, slots=True)
class Options:
    """What OPTNEG carries, in either direction; `macros` are the lists a filter asks for (SETSYMLIST).

    `actions` and `steps` are bits of `Action` and `Step`, and of what else the peer wrote.
    """

    version: int
    actions: int
    steps: int
    macros: Mapping[Stage, tuple[str, ...]] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The packet."""
        parts = [_OPTIONS.pack(self.version, self.actions, self.steps)]
        for stage, names in self.macros.items():
            parts.append(stage.to_bytes(4, "big") + join_strings([encode_text(" ".join(names))]))
        return packet(Command.OPTNEG, b"".join(parts))

    @classmethod
    def decode(cls, payload: bytes) -> Options:
        """Read a payload. Lists of unknown stages are passed over, as Postfix does; `MilterError` if malformed."""
        if len(payload) < _OPTIONS.size:
            raise MilterError("option negotiation: packet too short")
        version, actions, steps = _OPTIONS.unpack_from(payload)
        macros = {}
        at = _OPTIONS.size
        while at < len(payload):
            end = payload.find(b"\0", at + 4)
            if end < 0:
                raise MilterError("option negotiation: malformed list of macros")
            stage = int.from_bytes(payload[at : at + 4], "big")
            if stage <= Stage.EOH:
                macros[Stage(stage)] = tuple(decode_text(payload[at + 4 : end]).replace(",", " ").split())
            at = end + 1
        return cls(version, actions, steps, macros)


def value_to_wire(value: bytes, leading_space: bool) -> bytes:
    """What stands behind a field's colon, as a packet has it: folds by LF alone.

    One leading space is left out (never a tab), unless `leading_space` was agreed (HDR_LEADSPC).
    """
    if not leading_space and value[:1] == b" ":
        value = value[1:]
    return value.replace(b"\r\n", b"\n") if b"\r" in value else value


def value_from_wire(value: bytes, leading_space: bool) -> bytes:
    """The inverse of `value_to_wire`: what stands behind the colon, every line end a CRLF."""
    if b"\r" in value:
        value = value.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\n" in value:
        value = value.replace(b"\n", b"\r\n")
    return value if leading_space else b" " + value
