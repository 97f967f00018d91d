"""What a milter filter says to an MTA: a value, a decoder and an encoder for each reply and each modification.

What a filter writes goes into messages, envelopes and SMTP replies. So a header field that would inject another one,
an address with control characters and a reply that is no SMTP reply are errors here, before anybody uses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Final

from gateway.protocol.errors import LocalError
from gateway.protocol.milter_commands import split_parameters
from gateway.protocol.milter_wire import (
    MAX_PAYLOAD,
    Action,
    MilterError,
    Response,
    encode_text,
    join_strings,
    packet,
    split_strings,
    value_from_wire,
    value_to_wire,
)
from gateway.protocol.smtp_envelope import Parameters
from gateway.protocol.smtp_replies import MAX_LINE, MAX_LINES, Reply

_INDEX: Final = Struct("!I")
_FIELD_NAME: Final = re.compile(rb"[!-9;-~]+")  # RFC 5322 2.2
_NEW_LINE: Final = re.compile(rb"\n(?![ \t])")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_REPLY_LINE: Final = re.compile(rb"([45]\d\d)([ -])([^\x00-\x08\x0a-\x1f\x7f]*)")
_ENHANCED: Final = re.compile(rb"([245])\.\d{1,3}\.\d{1,3}(?![^ ])")


@dataclass(frozen=True, slots=True)
class Continue:
    """Go on; at the end of a message: this filter takes it."""


@dataclass(frozen=True, slots=True)
class Accept:
    """This filter takes the rest of the message unseen; at CONNECT and HELO: all of the connection."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse with 5xx."""


@dataclass(frozen=True, slots=True)
class Tempfail:
    """Refuse with 4xx."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Say yes to the client and deliver nothing."""


@dataclass(frozen=True, slots=True)
class Skip:
    """No more of the events that this one is of: body pieces, usually."""


@dataclass(frozen=True, slots=True)
class ReplyCode:
    """Refuse with this reply, 4xx or 5xx; with 421 the client is to be disconnected."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Refuse with 421 and disconnect the client."""


@dataclass(frozen=True, slots=True)
class ConnFail:
    """Treat the filter as one that cannot be reached."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Still at work: the reader's time starts anew."""


@dataclass(frozen=True, slots=True)
class AddHeader:
    """Append a field; `value` is what stands behind the colon, folds are CRLF and a blank."""

    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class InsertHeader:
    """Insert a field: 0 is above everything, 1 below the MTA's own Received, beyond the last field: append."""

    index: int
    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class ChangeHeader:
    """Replace the `index`-th field of that name (from 1; 0 is read as 1); an empty `value` deletes it."""

    index: int
    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class ReplaceBody:
    """A piece of the new body; the first one discards the old body."""

    data: bytes


@dataclass(frozen=True, slots=True)
class AddRecipient:
    """Add a recipient; the address has no angle brackets."""

    address: str
    parameters: Parameters = ()


@dataclass(frozen=True, slots=True)
class DeleteRecipient:
    """Remove a recipient; the address has no angle brackets."""

    address: str


@dataclass(frozen=True, slots=True)
class ChangeSender:
    """Another sender; the address has no angle brackets and is "" for the null sender."""

    address: str
    parameters: Parameters = ()


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Hold the message if it is accepted; control characters in `reason` are `?`."""

    reason: str


Verdict = Continue | Accept | Reject | Tempfail | Discard | Skip | ReplyCode | Shutdown | ConnFail
Modification = (
    AddHeader | InsertHeader | ChangeHeader | ReplaceBody | AddRecipient | DeleteRecipient | ChangeSender | Quarantine
)
FilterReply = Verdict | Progress | Modification

CONTINUE: Final = Continue()

NEEDED_ACTION: Final[Mapping[int, Action]] = {
    Response.ADDHEADER: Action.ADDHDRS,
    Response.INSHEADER: Action.ADDHDRS,
    Response.CHGHEADER: Action.CHGHDRS,
    Response.REPLBODY: Action.CHGBODY,
    Response.ADDRCPT: Action.ADDRCPT,
    Response.ADDRCPT_PAR: Action.ADDRCPT_PAR,
    Response.DELRCPT: Action.DELRCPT,
    Response.CHGFROM: Action.CHGFROM,
    Response.QUARANTINE: Action.QUARANTINE,
}
"""The modifications, with the action that must have been agreed for each."""


def parse_replycode(payload: bytes) -> Reply:
    """Read the text of REPLYCODE as an SMTP reply (RFC 5321 4.2.1, RFC 3463 section 2).

    Lines are parted by CRLF, the last one has none; each begins with the same 4xx or 5xx code and a hyphen, the last
    one with a blank; an enhanced code is of the code's class. `%%` stands for a percent sign, a lone one is dropped.
    One NUL at the end may be missing. Raises `MilterError` for anything else, control characters included.
    """
    text = payload[:-1] if payload[-1:] == b"\0" else payload
    lines = text.split(b"\r\n")
    if len(lines) > MAX_LINES or max(map(len, lines)) > MAX_LINE - 2:
        raise MilterError("REPLYCODE: too many lines, or one too long")
    code, texts = lines[0][:3], []
    for number, line in enumerate(lines, 1):
        match = _REPLY_LINE.fullmatch(line)
        if match is None:
            raise MilterError(f"REPLYCODE: line {number} is no line of a 4xx or 5xx reply")
        if match[1] != code:
            raise MilterError("REPLYCODE: the code differs between lines")
        if (match[2] == b"-") == (number == len(lines)):
            raise MilterError(f"REPLYCODE: wrong separator behind the code of line {number}")
        enhanced = _ENHANCED.match(match[3])
        if enhanced is not None and enhanced[1] != code[:1]:
            raise MilterError("REPLYCODE: the enhanced code is of another class than the code")
        texts.append(match[3].replace(b"%%", b"\0").replace(b"%", b"").replace(b"\0", b"%"))
    return Reply(int(code), tuple(texts))


def encode_replycode(reply: Reply) -> bytes:
    """REPLYCODE; raises `LocalError` for a reply that `parse_replycode` would refuse."""
    payload = reply.encode()[:-2].replace(b"%", b"%%") + b"\0"
    try:
        parse_replycode(payload)
    except MilterError as error:
        raise LocalError(str(error)) from None
    return packet(Response.REPLYCODE, payload)


def decode_reply(code: int, payload: bytes, leading_space: bool = False) -> FilterReply:
    """Read a packet of a filter, OPTNEG apart.

    Raises `MilterError` for an unknown code, a malformed payload, a field name that is none or a value with a line
    that would begin a new field, an address with control characters, and what `parse_replycode` refuses.
    """
    plain = _PLAIN.get(code)
    if plain is not None:
        if payload:
            raise MilterError(f"{Response(code).name}: unexpected payload")
        return plain
    decoder = _DECODERS.get(code)
    if decoder is None:
        raise MilterError(f"unknown reply 0x{code:02x}")
    return decoder(payload, leading_space)


def _field(payload: bytes, leading_space: bool, what: str) -> tuple[bytes, bytes]:
    strings = split_strings(payload, what)
    if len(strings) != 2:
        raise MilterError(f"{what}: not a name and a value")
    name, value = strings
    if not name:
        raise MilterError(f"{what}: empty header name")
    if not _FIELD_NAME.fullmatch(name):
        raise MilterError(f"{what}: illegal header name")
    value = value_from_wire(value, leading_space)
    if b"\n" in value and _NEW_LINE.search(value):
        raise MilterError(f"{what}: a line of the value would begin another header field")
    return name, value


def _indexed_field(payload: bytes, leading_space: bool, what: str) -> tuple[int, bytes, bytes]:
    if len(payload) < _INDEX.size:
        raise MilterError(f"{what}: packet too short")
    return (_INDEX.unpack_from(payload)[0], *_field(payload[_INDEX.size :], leading_space, what))


def _add_header(payload: bytes, leading_space: bool) -> AddHeader:
    return AddHeader(*_field(payload, leading_space, "ADDHEADER"))


def _insert_header(payload: bytes, leading_space: bool) -> InsertHeader:
    return InsertHeader(*_indexed_field(payload, leading_space, "INSHEADER"))


def _change_header(payload: bytes, leading_space: bool) -> ChangeHeader:
    index, name, value = _indexed_field(payload, leading_space, "CHGHEADER")
    # Nothing at all deletes, so the blank that goes in front of a value must not hide that nothing was sent.
    return ChangeHeader(max(index, 1), name, b"" if payload[-2:] == b"\0\0" else value)


def _clean(string: bytes, what: str) -> str:
    """Text that goes into an envelope."""
    try:
        text = string.decode("utf-8").strip(" ")
    except UnicodeDecodeError:
        raise MilterError(f"{what}: address or parameters are not UTF-8") from None
    if _CONTROL.search(text):
        raise MilterError(f"{what}: control character in an address or its parameters")
    return text


def _addressed(payload: bytes, what: str, with_parameters: bool, empty: bool = False) -> tuple[str, Parameters]:
    """An address, its angle brackets taken off, and parameters in one string with blanks between."""
    strings = split_strings(payload, what)
    if not 1 <= len(strings) <= 1 + with_parameters:
        raise MilterError(f"{what}: wrong number of strings")
    address = _clean(strings[0], what)
    if address[:1] == "<" and address[-1:] == ">":
        address = address[1:-1]
    if not address and not empty:
        raise MilterError(f"{what}: empty address")
    words = _clean(strings[1], what).split() if len(strings) == 2 else []
    return address, split_parameters(words)


def _quarantine(payload: bytes, _leading_space: bool) -> Quarantine:
    strings = split_strings(payload, "QUARANTINE")
    if len(strings) != 1:
        raise MilterError("QUARANTINE: not one string")
    return Quarantine(_CONTROL.sub("?", strings[0].decode("utf-8", "replace")))


_PLAIN: Final[Mapping[int, FilterReply]] = {
    Response.CONTINUE: CONTINUE,
    Response.ACCEPT: Accept(),
    Response.REJECT: Reject(),
    Response.TEMPFAIL: Tempfail(),
    Response.DISCARD: Discard(),
    Response.SKIP: Skip(),
    Response.SHUTDOWN: Shutdown(),
    Response.CONN_FAIL: ConnFail(),
    Response.PROGRESS: Progress(),
}
_DECODERS: Final[Mapping[int, Callable[[bytes, bool], FilterReply]]] = {
    Response.REPLYCODE: lambda payload, _: ReplyCode(parse_replycode(payload)),
    Response.ADDHEADER: _add_header,
    Response.INSHEADER: _insert_header,
    Response.CHGHEADER: _change_header,
    Response.REPLBODY: lambda payload, _: ReplaceBody(payload),
    Response.ADDRCPT: lambda payload, _: AddRecipient(*_addressed(payload, "ADDRCPT", False)),
    Response.ADDRCPT_PAR: lambda payload, _: AddRecipient(*_addressed(payload, "ADDRCPT_PAR", True)),
    Response.DELRCPT: lambda payload, _: DeleteRecipient(_addressed(payload, "DELRCPT", False)[0]),
    Response.CHGFROM: lambda payload, _: ChangeSender(*_addressed(payload, "CHGFROM", True, empty=True)),
    Response.QUARANTINE: _quarantine,
}
_PLAIN_CODES: Final[Mapping[type[FilterReply], int]] = {type(reply): code for code, reply in _PLAIN.items()}


def encode_reply(reply: FilterReply, leading_space: bool = False) -> bytes:
    """The packet of a reply, or the packets: a body is cut at `MAX_PAYLOAD`, an empty one is one empty packet.

    Raises `LocalError` for what its decoder would refuse.
    """
    code = _PLAIN_CODES.get(type(reply))
    if code is not None:
        return packet(code)
    if isinstance(reply, ReplyCode):
        return encode_replycode(reply.reply)
    if isinstance(reply, ReplaceBody):
        data = reply.data
        pieces = range(0, len(data), MAX_PAYLOAD) or (0,)
        return b"".join([packet(Response.REPLBODY, data[at : at + MAX_PAYLOAD]) for at in pieces])
    code, payload = _modification(reply, leading_space)
    try:
        decode_reply(code, payload, leading_space)
    except MilterError as error:
        raise LocalError(str(error)) from None
    return packet(code, payload)


def _modification(reply: FilterReply, leading_space: bool) -> tuple[int, bytes]:
    """Code and payload of a modification other than `ReplaceBody`."""
    match reply:
        case AddHeader(name, value):
            return Response.ADDHEADER, join_strings((name, value_to_wire(value, leading_space)))
        case InsertHeader(index, name, value):
            field = join_strings((name, value_to_wire(value, leading_space)))
            return Response.INSHEADER, _index(index) + field
        case ChangeHeader(index, name, value):
            field = join_strings((name, value_to_wire(value, leading_space)))
            return Response.CHGHEADER, _index(index) + field
        case AddRecipient(address, ()):
            return Response.ADDRCPT, join_strings((encode_text(f"<{address}>"),))
        case AddRecipient(address, parameters):
            return Response.ADDRCPT_PAR, _with_parameters(address, parameters)
        case DeleteRecipient(address):
            return Response.DELRCPT, join_strings((encode_text(f"<{address}>"),))
        case ChangeSender(address, parameters):
            return Response.CHGFROM, _with_parameters(address, parameters)
        case Quarantine(reason):
            return Response.QUARANTINE, join_strings((encode_text(reason),))
    raise LocalError(f"{type(reply).__name__} is no modification")


def _index(index: int) -> bytes:
    if not 0 <= index < 1 << 32:
        raise LocalError("index of a header field out of range")
    return _INDEX.pack(index)


def _with_parameters(address: str, parameters: Parameters) -> bytes:
    strings = [f"<{address}>"]
    if parameters:
        strings.append(" ".join(keyword if value is None else f"{keyword}={value}" for keyword, value in parameters))
    return join_strings([encode_text(string) for string in strings])
