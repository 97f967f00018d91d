"""The MTA's side of one connection to a milter filter: what is said and what is meant, without any I/O.

The caller tells `MilterMta` what happens in the SMTP session, in its order. Each method returns the bytes to write at
once; `b""` means that the filter did not ask for the event or promised no reply to it, so that its packet waits for
the next one. Then, if `expects_reply`, bytes read go into `feed` until that is false. One event at a time: libmilter
does not answer a command that its state does not allow, so nothing is sent on top of an open question.

Verdicts are the caller's to act upon. The machine only knows their effect on the conversation: after `Accept` and,
except for one recipient, after a refusal, the filter hears no more of the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from gateway.protocol.errors import LocalError
from gateway.protocol.milter_commands import (
    encode_connect,
    encode_envelope,
    encode_header,
    encode_helo,
    encode_unknown,
)
from gateway.protocol.milter_macros import DEFAULT_MACROS, MacroScopes
from gateway.protocol.milter_replies import (
    CONTINUE,
    NEEDED_ACTION,
    Accept,
    Continue,
    Discard,
    FilterReply,
    Modification,
    Progress,
    Reject,
    ReplyCode,
    Skip,
    Tempfail,
    Verdict,
    decode_reply,
)
from gateway.protocol.milter_wire import (
    ACTIONS,
    MAX_PACKET,
    MAX_PAYLOAD,
    MIN_VERSION,
    NO_STEPS,
    NR_STEPS,
    STAGE_OF,
    STEPS,
    VERSION,
    Action,
    Command,
    MilterError,
    Options,
    PacketReader,
    Response,
    Stage,
    Step,
    packet,
)
from gateway.protocol.smtp_envelope import Parameters

BATCH: Final = 65_536
"""Octets of packets without reply that are kept back at most."""

_UNSOLICITED: Final = "the filter speaks when no reply is due"
_CONTINUE_PACKET: Final = packet(Response.CONTINUE)
_EOH_PACKET: Final = packet(Command.EOH)
_DATA_PACKET: Final = packet(Command.DATA)
_EOM_PACKET: Final = packet(Command.BODYEOB)

# Plain integers: every look at a member of an enum costs more than the comparison it is for.
_OPTNEG, _CONNECT, _HELO, _MAIL, _RCPT, _DATA, _HEADER, _EOH, _BODY, _EOM, _UNKNOWN = (
    int(command)
    for command in (
        Command.OPTNEG, Command.CONNECT, Command.HELO, Command.MAIL, Command.RCPT, Command.DATA, Command.HEADER,
        Command.EOH, Command.BODY, Command.BODYEOB, Command.UNKNOWN,
    )
)  # fmt: skip
_IN_MESSAGE: Final = frozenset((_RCPT, _DATA, _HEADER, _EOH, _BODY, _EOM))
_ENDED_BY_REFUSAL: Final = frozenset((_MAIL, _DATA, _HEADER, _EOH, _BODY))
_SINCE: Final[Mapping[int, int]] = {_UNKNOWN: 3, _DATA: 4}
_MACRO_STAGE: Final[Mapping[int, Stage]] = {int(code): stage for code, stage in STAGE_OF.items()}


@dataclass(frozen=True, slots=True)
class Unasked:
    """A modification was dropped, since its action was not agreed upon."""

    action: Action


Event = Options | Verdict | Progress | Modification | Unasked
"""What `feed` gives. `Options` is what was agreed upon, surplus bits taken out."""


class MilterMta:
    """One connection to one filter.

    `macro_lists` are the macros for a filter that asks for none at a stage. `limit` is the most octets of a packet
    read, `max_payload` of a header field written.
    """

    def __init__(
        self,
        *,
        macro_lists: Mapping[Stage, tuple[str, ...]] = DEFAULT_MACROS,
        limit: int = MAX_PACKET,
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        self.failure: MilterError | None = None
        self.max_payload = max_payload
        self.options: Options | None = None
        self._offered = Options(0, 0, 0)
        self._reader = PacketReader(limit)
        self._due = 0  # the command whose reply is due
        self._queue: list[bytes] = []
        self._queued = 0
        self._declined: frozenset[int] = frozenset()
        self._silent: frozenset[int] = frozenset()
        self._leading_space = False
        self._macros = MacroScopes(macro_lists)
        self._session_over = False  # accepted at CONNECT or HELO
        self._in_message = False
        self._message_over = False  # the verdict on the message is known
        self._skipped = 0  # the command of which the filter wants no more in this message
        self._body = b""  # what was not sent yet
        self._replacing: bool | None = None  # None: no new body yet; then whether it may go on

    # What was agreed upon, and where the conversation stands.

    @property
    def expects_reply(self) -> bool:
        """Whether a reply is due: write what there is, then read."""
        return self._due != 0

    @property
    def awaiting(self) -> Command | None:
        """The command whose reply is due."""
        return Command(self._due) if self._due else None

    @property
    def actions(self) -> Action:
        """What the filter may do; none, except perhaps `SETSYMLIST`, if it only reads."""
        return Action(self._agreed.actions)

    @property
    def wants_rejected_recipients(self) -> bool:
        """Whether refused recipients are to be told too (RCPT_REJ); the reply to them means nothing."""
        return bool(self._agreed.steps & Step.RCPT_REJ)

    @property
    def leading_space(self) -> bool:
        """Whether header values go over the wire with their leading space (HDR_LEADSPC)."""
        return self._leading_space

    def wants(self, command: Command) -> bool:
        """Whether the filter is to get such events; when it declined header and body, nobody need read them."""
        since = _SINCE.get(command, MIN_VERSION)
        return self._agreed.version >= since and command not in self._declined

    @property
    def _agreed(self) -> Options:
        if self.options is None:
            raise LocalError("options were not negotiated")
        return self.options

    # Negotiation.

    def offer(self, version: int = VERSION) -> bytes:
        """The first packet: everything that `version` (2, 3, 4 or 6) has."""
        if version not in ACTIONS or self._offered.version:
            raise LocalError("no such milter version, or offered before")
        self._offered = Options(version, ACTIONS[version], STEPS[version])
        self._due = _OPTNEG
        return self._offered.encode()

    def _negotiated(self, payload: bytes) -> Options:
        """Take the answer to the offer.

        Bits of NR are honored where they were not offered, since who claims them does not reply; surplus bits of
        actions are taken out (rspamd claims both).
        """
        answer = Options.decode(payload)
        version, offered = answer.version, self._offered
        if version > offered.version:
            raise MilterError(f"the filter answers version {version}, over the {offered.version} that was offered")
        if version < MIN_VERSION:
            raise MilterError(f"the filter answers version {version}, which is too old")
        steps = answer.steps & STEPS[max(known for known in STEPS if known <= version)]
        agreed = Options(version, answer.actions & offered.actions, steps, MappingProxyType(dict(answer.macros)))
        self._declined = frozenset(command for command, bit in NO_STEPS.items() if steps & bit)
        if version >= 6:
            self._silent = frozenset(command for command, bit in NR_STEPS.items() if steps & bit)
            self._leading_space = bool(steps & Step.HDR_LEADSPC)
        self._macros.want(answer.macros)
        self.options = agreed
        self._due = 0
        return agreed

    # Events of the SMTP session.

    def macros(self, stage: Stage, values: Mapping[str, str]) -> None:
        """Set what is known at a stage, before its event; names with or without braces.

        They hold for the later stages of the same message too (those of RCPT for that recipient only). What was set
        at this and later stages before is forgotten. An empty value is the same as none.
        """
        self._macros.set(stage, values)

    def connect(self, hostname: str, address: str = "", port: int = 0) -> bytes:
        """The client: verified name or `[address]`, IP address (or path, or "" if unknown) and port."""
        return self._event(_CONNECT, encode_connect(hostname, address, port))

    def helo(self, name: str) -> bytes:
        """HELO or EHLO; again after STARTTLS."""
        return self._event(_HELO, encode_helo(name))

    def mail(self, address: str, parameters: Parameters = ()) -> bytes:
        """MAIL; `address` with its angle brackets. A message before it must have ended, by `abort` if need be."""
        frame = encode_envelope(_MAIL, address, parameters)
        self._ready()
        if self._in_message and not self._message_over:
            raise LocalError("MAIL inside a message")
        self._in_message, self._message_over, self._skipped, self._body = True, False, 0, b""
        return self._event(_MAIL, frame)

    def rcpt(self, address: str, parameters: Parameters = ()) -> bytes:
        """RCPT; a refused one only if `wants_rejected_recipients`."""
        return self._event(_RCPT, encode_envelope(_RCPT, address, parameters))

    def data(self) -> bytes:
        """DATA, or the first BDAT; filters below version 4 are not told, nor of its macros."""
        if self._agreed.version < _SINCE[_DATA]:
            return b""
        return self._event(_DATA, _DATA_PACKET)

    def header(self, name: bytes, value: bytes) -> bytes:
        """A header field; `value` is what stands behind the colon, folds and all, without the CRLF at its end.

        Raises `PacketTooLong` for a field that libmilter would not take, `LocalError` for a NUL inside.
        """
        if _HEADER in self._declined or self._skipped == _HEADER:
            return self._event(_HEADER, b"")
        return self._event(_HEADER, encode_header(name, value, self._leading_space, self.max_payload))

    def eoh(self) -> bytes:
        """The end of the header, to be told of every message before its body."""
        return self._event(_EOH, _EOH_PACKET)

    def body(self, data: bytes = b"") -> bytes:
        r"""A piece of the body, of any size: CRLF lines without dot-stuffing, cut anywhere.

        It is sent in packets of at most 65,535 octets. If each has a reply, what did not go into the first one is
        kept: call again without `data` after the reply, until that returns `b""`.
        """
        self._ready(beside=_BODY)
        if data:
            self._body = self._body + data if self._body else data
        if self._due or not self._body:
            return b""
        if self._over(_BODY) or _BODY in self._declined or self._skipped == _BODY:
            self._body = b""
            return b""
        if _BODY in self._silent:
            body, self._body = self._body, b""
            for at in range(0, len(body), MAX_PAYLOAD):
                self._enqueue(packet(_BODY, body[at : at + MAX_PAYLOAD]))
            return self._overflow()
        piece, self._body = self._body[:MAX_PAYLOAD], self._body[MAX_PAYLOAD:]
        return self._event(_BODY, packet(_BODY, piece))

    def end_of_message(self) -> bytes:
        """The end of the message; modifications and the verdict on it are what `feed` gives then."""
        if self._body:
            raise LocalError("the body was not sent to its end")
        self._replacing = None
        return self._event(_EOM, _EOM_PACKET)

    def unknown(self, line: bytes) -> bytes:
        """A command refused as unknown, with or without its arguments; filters below version 3 are not told."""
        if self._agreed.version < _SINCE[_UNKNOWN]:
            return b""
        return self._event(_UNKNOWN, encode_unknown(line))

    def abort(self) -> bytes:
        """Forget the message, complete or not; nothing replies. Postfix says so after every transaction."""
        self._ready()
        self._in_message, self._message_over, self._skipped, self._body = False, False, 0, b""
        self._macros.forget(Stage.MAIL)
        if self._session_over:
            return b""
        return self.flush() + packet(Command.ABORT)

    def quit(self) -> bytes:
        """The last packet, at any time; the caller closes the connection then."""
        if self.failure is not None or self.options is None:
            return b""
        return self.flush() + packet(Command.QUIT)

    def flush(self) -> bytes:
        """The packets that wait for the next one."""
        data = b"".join(self._queue)
        self._queue.clear()
        self._queued = 0
        return data

    # How a packet goes out.

    def _ready(self, beside: int = 0) -> None:
        """Check that something may be said; `beside` is a command whose reply may be due yet."""
        if self.failure is not None:
            raise self.failure
        if self.options is None:
            raise LocalError("options were not negotiated")
        if self._due and self._due != beside:
            raise LocalError("a reply is due")

    def _over(self, command: int) -> bool:
        """Whether the filter made its decision before; raises `LocalError` for an event in the wrong place."""
        if command in _IN_MESSAGE:
            if not self._in_message:
                raise LocalError("outside a message")
            if self._message_over:
                return True
        return self._session_over

    def _event(self, command: int, frame: bytes) -> bytes:
        """Send an event with the macros of its stage, or keep it back. Macros of a declined one are sent."""
        self._ready()
        if self._over(command):
            return b""
        stage = _MACRO_STAGE.get(command)
        if stage is not None:
            macros = self._macros.packet(command, stage)
            if macros:
                self._enqueue(macros)
        if command in self._declined or command == self._skipped:
            return self._overflow()
        if command in self._silent:
            self._enqueue(frame)
            return self._overflow()
        self._due = command
        if not self._queue:
            return frame
        self._queue.append(frame)
        return self.flush()

    def _enqueue(self, frame: bytes) -> None:
        self._queue.append(frame)
        self._queued += len(frame)

    def _overflow(self) -> bytes:
        return self.flush() if self._queued >= BATCH else b""

    # What comes back.

    def feed(self, data: bytes) -> list[Event]:
        """Take bytes of the filter, give what they say.

        Raises `MilterError` for what the protocol does not allow; the connection is of no use then. Events in front
        of it in the same bytes are given first: then `failure` is set, and every next call raises it. Modifications
        are to be carried out only if `Continue` or `Accept` follows them.
        """
        if self.failure is not None:
            raise self.failure
        if data == _CONTINUE_PACKET and self._due not in (0, _OPTNEG, _EOM) and not self._reader.pending:
            self._due = 0
            return [CONTINUE]
        events: list[Event] = []
        try:
            packets = self._reader.feed(data) if self._due else []
            for code, payload in packets:
                if not self._due:
                    raise MilterError(_UNSOLICITED)
                events.append(self._reply(code, payload))
            if not self._due and (self._reader.pending or self._reader.failure or (data and not events)):
                raise MilterError(_UNSOLICITED)
            if self._reader.failure is not None:
                raise self._reader.failure
        except MilterError as error:
            self.failure = error
            if not events:
                raise
        return events

    def _reply(self, code: int, payload: bytes) -> Event:
        due = self._due
        if due == _OPTNEG:
            if code != _OPTNEG:
                raise MilterError(f"reply 0x{code:02x} instead of options")
            return self._negotiated(payload)
        action = NEEDED_ACTION.get(code)
        if action is not None:
            return self._modification(code, payload, action)
        reply = decode_reply(code, payload, self._leading_space)
        if isinstance(reply, Progress):
            return reply
        if isinstance(reply, Discard) and due in (_CONNECT, _HELO):
            raise MilterError(f"DISCARD in reply to {Command(due).name}")
        if isinstance(reply, Skip):
            if self._agreed.version < 6 or due == _EOM:
                raise MilterError("SKIP where it means nothing")
            if due in (_RCPT, _HEADER, _BODY):
                self._skipped = due
        self._due = 0
        self._settle(due, reply)
        return reply

    def _modification(self, code: int, payload: bytes, action: Action) -> FilterReply | Unasked:
        name = Response(code).name
        if self._due != _EOM:
            raise MilterError(f"{name} in reply to {Command(self._due).name}, not to the end of the message")
        body = action is Action.CHGBODY
        if body and self._replacing is False:
            raise MilterError("REPLBODY after another modification had ended the new body")
        if body:
            self._replacing = True
        elif self._replacing:
            self._replacing = False
        if not self._agreed.actions & action:
            if body:
                raise MilterError("REPLBODY without having asked for CHGBODY")
            return Unasked(action)
        return decode_reply(code, payload, self._leading_space)

    def _settle(self, command: int, reply: FilterReply) -> None:
        """What a verdict means for the rest of the conversation."""
        if isinstance(reply, Accept) and command in (_CONNECT, _HELO):
            self._session_over = True
        elif command == _EOM:
            self._in_message = self._message_over = False
        elif isinstance(reply, (Reject, Tempfail, ReplyCode)):
            # One recipient may be refused, and CONNECT, HELO and unknown commands are no part of a message.
            self._message_over = self._message_over or (command in _ENDED_BY_REFUSAL)
        elif not isinstance(reply, (Continue, Skip)) and (command == _MAIL or command in _IN_MESSAGE):
            self._message_over = True
