"""The filter's side of one connection from an MTA: commands with their macros in, replies out, without any I/O.

`MilterFilter.feed` gives what the MTA says. The caller answers the options with `negotiate`, and each command whose
`reply_expected` is true, in its order, with `send`: modifications first where they are allowed, then one verdict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from gateway.protocol.errors import LocalError
from gateway.protocol.milter_commands import (
    Abort,
    EndOfMessage,
    Macros,
    MtaCommand,
    Quit,
    QuitNewConnection,
    decode_command,
)
from gateway.protocol.milter_macros import macro_key
from gateway.protocol.milter_replies import (
    NEEDED_ACTION,
    AddHeader,
    AddRecipient,
    ChangeHeader,
    ChangeSender,
    DeleteRecipient,
    Discard,
    FilterReply,
    InsertHeader,
    Progress,
    Quarantine,
    ReplaceBody,
    Skip,
    encode_reply,
)
from gateway.protocol.milter_wire import (
    MAX_PACKET,
    MIN_VERSION,
    NR_STEPS,
    STAGE_OF,
    VERSION,
    Action,
    Command,
    MilterError,
    Options,
    PacketReader,
    Response,
    Stage,
    Step,
)

_SILENT: Final = (Abort, Quit, QuitNewConnection)
_LIFE: Final = (Stage.CONNECT, Stage.HELO, Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.EOH, Stage.EOM)
"""Stages in the order in which a message passes them; their numbers have another."""

_RESPONSE: Final[Mapping[type[FilterReply], Response]] = {
    AddHeader: Response.ADDHEADER,
    InsertHeader: Response.INSHEADER,
    ChangeHeader: Response.CHGHEADER,
    ReplaceBody: Response.REPLBODY,
    DeleteRecipient: Response.DELRCPT,
    ChangeSender: Response.CHGFROM,
    Quarantine: Response.QUARANTINE,
}


class Received(NamedTuple):
    """A command, the macros known with it (names without braces, latest stage first), and whether to reply."""

    command: MtaCommand
    macros: Mapping[str, str]
    reply_expected: bool


class MilterFilter:
    """One connection of an MTA; `limit` is the most octets of a packet read."""

    def __init__(self, limit: int = MAX_PACKET) -> None:
        self.failure: MilterError | None = None
        self.closed = False
        self.offered: Options | None = None
        self.options: Options | None = None
        self._reader = PacketReader(limit)
        self._due: deque[int] = deque()
        self._silent: frozenset[int] = frozenset()
        self._leading_space = False
        self._stages: dict[Stage, Mapping[str, str]] = {}
        self._fresh: Stage | None = None  # the stage whose macros were said last, its command yet to come
        self._macros: Mapping[str, str] = MappingProxyType({})

    @property
    def replies_due(self) -> int:
        """How many commands wait for their verdict."""
        return len(self._due)

    def feed(self, data: bytes) -> list[Received]:
        """Take bytes of the MTA, give its commands; macros come with them, not by themselves.

        Raises `MilterError` for what the protocol does not allow. Commands in front of it in the same bytes are
        given first: then `failure` is set, and the next call raises it.
        """
        if self.failure is not None:
            raise self.failure
        received: list[Received] = []
        try:
            for code, payload in self._reader.feed(data):
                if self.closed:
                    raise MilterError("the MTA speaks after QUIT")
                command = decode_command(code, payload, self._leading_space)
                if isinstance(command, Macros):
                    self._set_macros(command)
                else:
                    received.append(self._command(code, command))
            if self._reader.failure is not None:
                raise self._reader.failure
        except MilterError as error:
            self.failure = error
            if not received:
                raise
        return received

    def _command(self, code: int, command: MtaCommand) -> Received:
        if isinstance(command, Options):
            self._offer(command)
        elif self.options is None:
            raise MilterError("the MTA goes on before options were negotiated")
        self._expire(code)
        reply = not isinstance(command, _SILENT) and code not in self._silent
        received = Received(command, self._macros, reply)
        if reply:
            self._due.append(code)
        if isinstance(command, Quit):
            self.closed = True
        if isinstance(command, (Abort, EndOfMessage)):
            self._forget(Stage.MAIL)
        if isinstance(command, QuitNewConnection):
            self._forget(Stage.CONNECT)
        return received

    def _offer(self, offer: Options) -> None:
        if self.offered is not None:
            raise MilterError("the MTA offers options a second time")
        if offer.version < MIN_VERSION:
            raise MilterError(f"the MTA offers version {offer.version}, which is too old")
        # As libmilter does: who offers nothing is taken for one that knows no better.
        actions, steps = offer.actions or 0x0F, offer.steps or 0x3F
        self.offered = Options(offer.version, actions, steps)

    # Macros.

    def _set_macros(self, macros: Macros) -> None:
        """Replace the values of a stage; those of unknown stages are passed over."""
        stage = STAGE_OF.get(macros.command)
        if stage is None:
            return
        self._forget(stage)
        self._stages[stage] = macros.values
        self._fresh = stage
        self._merge()

    def _expire(self, code: int) -> None:
        """CONNECT, HELO and MAIL end what was said of the one before, if no macros of their own came."""
        stage = STAGE_OF.get(code)
        if stage in (Stage.CONNECT, Stage.HELO, Stage.MAIL) and self._fresh is not stage:
            self._forget(stage)
        self._fresh = None

    def _forget(self, since: Stage) -> None:
        """Forget the values of a stage and of all that come later."""
        later = [stage for stage in _LIFE[_LIFE.index(since) :] if stage in self._stages]
        for stage in later:
            del self._stages[stage]
        if later:
            self._merge()

    def _merge(self) -> None:
        merged: dict[str, str] = {}
        for stage in _LIFE:
            merged.update(self._stages.get(stage, {}))
        self._macros = MappingProxyType(merged)

    def macro(self, name: str) -> str | None:
        """The value of a macro now, its name with or without braces."""
        return self._macros.get(macro_key(name))

    # Answers.

    def negotiate(
        self, actions: int = 0, steps: int = 0, macros: Mapping[Stage, tuple[str, ...]] = MappingProxyType({})
    ) -> bytes:
        """Answer the offer.

        `actions` are needed: `MilterError` if the MTA does not offer them all. `steps` are wishes, of which the
        answer has what was offered; lists of macros are left out where SETSYMLIST was not offered.
        """
        if self.offered is None or self.options is not None:
            raise LocalError("no options to answer")
        offered = self.offered
        missing = actions & ~offered.actions
        if missing:
            raise MilterError(f"the MTA does not allow {Action(missing & 0x1FF)!r}")
        steps &= offered.steps
        if offered.actions & Action.SETSYMLIST and macros:
            actions |= Action.SETSYMLIST
        else:
            macros = {}
        self.options = Options(min(VERSION, offered.version), actions, steps, macros)
        self._silent = frozenset(command for command, bit in NR_STEPS.items() if steps & bit)
        self._leading_space = bool(steps & Step.HDR_LEADSPC)
        self._due.popleft()
        return self.options.encode()

    def send(self, reply: FilterReply) -> bytes:
        """The packets of a reply to the oldest command that waits for one.

        Raises `LocalError` for a reply that is not allowed there or was not negotiated, or that has no form.
        """
        if self.options is None or not self._due:
            raise LocalError("no reply is due")
        due = self._due[0]
        data = encode_reply(reply, self._leading_space)
        if isinstance(reply, Progress):
            return data
        if isinstance(reply, AddRecipient):
            needed: Action | None = Action.ADDRCPT_PAR if reply.parameters else Action.ADDRCPT
        else:
            response = _RESPONSE.get(type(reply))
            needed = NEEDED_ACTION[response] if response is not None else None
        if needed is not None:
            if due != Command.BODYEOB or not self.options.actions & needed:
                raise LocalError(f"{type(reply).__name__} was not negotiated, or not at the end of the message")
            return data
        if isinstance(reply, Discard) and due in (Command.CONNECT, Command.HELO):
            raise LocalError("nothing to discard yet")
        if isinstance(reply, Skip) and (due != Command.BODY or not self.options.steps & Step.SKIP):
            raise LocalError("SKIP was not negotiated, or not about the body")
        self._due.popleft()
        return data
