"""What a pymilter class talks to instead of libmilter: its context, and threads in which its methods run.

`Milter.Base` keeps a `milterContext` in `_ctx` and hands it what its own methods are asked for. `Context` has the
same methods with the same arguments and refuses what libmilter refuses (the documentation of each smfi_ function), with
pymilter's own exception. What a filter wants changed is collected as operations; nothing happens before its verdict.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from enum import IntEnum
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from gateway import AppendHeader, Message, NewBody, Operation, RemoveRecipient, ReplaceBody, Reply
from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.milter import Action, Stage, macro_key, parse_replycode
from gateway.protocol.milter_commands import split_parameters
from gateway.protocol.milter_wire import value_from_wire
from gateway.protocol.smtp import format_mail, format_rcpt
from stages import filter_words
from stages.filter_words import Parameters

T = TypeVar("T")

MAX_REPLY_LINES: Final = 32
MAX_REPLY_LINE: Final = 980
"""Lines of a reply and octets of each (smfi_setmlreply)."""

PIECE: Final = 262_144
"""Octets of a new body that are collected in the thread before the loop is asked to keep them."""

_ORDER: Final = (Stage.CONNECT, Stage.HELO, Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.EOH, Stage.EOM)


class Code(IntEnum):
    """What a callback returns (libmilter/mfapi.h, SMFIS)."""

    CONTINUE = 0
    REJECT = 1
    DISCARD = 2
    ACCEPT = 3
    TEMPFAIL = 4
    NOREPLY = 7
    SKIP = 8
    ALL_OPTS = 10


class Context:
    """The context of one session. `error` is pymilter's exception; `actions` are those agreed upon.

    `reply` is what the running callback set, `operations` and `quarantined` what it wants done to the message.
    """

    def __init__(self, actions: Action, error: type[Exception]) -> None:
        self.actions = actions
        self.leading_space = False
        self.negotiating = False
        self.reply: Reply | None = None
        self.operations: list[Operation] = []
        self.quarantined = ""
        self._error = error
        self._private: object = None
        self._wanted: dict[Stage, list[str]] = {}
        self._values: dict[Stage, Mapping[str, str]] = {}
        self._given: dict[Stage, Mapping[str, str]] = {}
        self._end: _End | None = None

    # -- what the stage calls -------------------------------------------------------------------------------

    def enter(self, stage: Stage, values: Mapping[str, str]) -> None:
        """An event of this stage begins; `values` are the macros that are known from it on; an empty one is none.

        CONNECT, HELO and MAIL forget what was known of them and of all that follows.
        """
        values = {name: value for name, value in values.items() if value}
        place = _ORDER.index(stage)
        if stage in (Stage.CONNECT, Stage.HELO, Stage.MAIL):
            for late in _ORDER[place:]:
                self._values.pop(late, None)
                self._given.pop(late, None)
        self._values[stage] = values
        wanted = self._wanted.get(stage)
        if wanted is not None:
            known = {name: value for early in _ORDER for name, value in self._values.get(early, {}).items()}
            values = {name: known[name] for name in wanted if name in known}
        self._given[stage] = values

    def begin_end(self, message: Message, loop: asyncio.AbstractEventLoop) -> None:
        """The end of the message begins: edits are allowed until `finish_end`."""
        self.operations, self.quarantined = [], ""
        self._end = _End(message, loop)

    def finish_end(self) -> None:
        """The end of the message is over. Raises OSError if there was no room for the new body."""
        end, self._end = self._end, None
        if end is not None:
            end.flush()

    # -- what pymilter calls: at any time -------------------------------------------------------------------

    def getpriv(self) -> object:
        """The object that `setpriv` got: the filter."""
        return self._private

    def setpriv(self, private: object) -> object:
        """Keep an object; gives the one before."""
        before, self._private = self._private, private
        return before

    def getsymval(self, name: str) -> str | None:
        """The newest value of a macro; `i` and `{i}` are the same."""
        key = macro_key(name)
        for stage in reversed(_ORDER):
            value = self._given.get(stage, {}).get(key)
            if value is not None:
                return value
        return None

    def setreply(self, rcode: str, xcode: str | None = None, *lines: str | None) -> None:
        """The reply for a REJECT (5xx) or TEMPFAIL (4xx) of the running callback."""
        texts = [line for line in lines if line is not None] or [""]
        if not (isinstance(rcode, str) and len(rcode) == 3 and rcode.isdigit() and rcode[0] in "45"):
            raise self._error("cannot set reply: the code is not 4xx or 5xx")
        if xcode is None and len(texts) > 1:
            xcode = f"{rcode[0]}.0.0"  # smfi_setmlreply
        octets = [line.encode("utf-8", "surrogateescape") for line in texts]
        if len(octets) > MAX_REPLY_LINES or max(map(len, octets)) > MAX_REPLY_LINE:
            raise self._error("cannot set reply: too many lines, or one too long")
        if any(b"\r" in line or b"\n" in line for line in octets):
            raise self._error("cannot set reply: a line end inside a line")
        head = f"{rcode}%s{xcode} " if xcode else f"{rcode}%s"
        marks = ["-"] * (len(octets) - 1) + [" "]
        payload = b"\r\n".join((head % mark).encode() + line for mark, line in zip(marks, octets, strict=True))
        try:
            reply = parse_replycode(payload)
        except PeerError as error:
            raise self._error(f"cannot set reply: {error}") from None
        if xcode and reply.enhanced != xcode:
            raise self._error(f"cannot set reply: {xcode!r} is no enhanced status code")
        self.reply = reply

    def setsymlist(self, stage: int, names: str | bytes) -> None:
        """The macros wanted at a stage instead of all; in negotiate only, and once a stage."""
        text = names.decode() if isinstance(names, bytes) else names
        wanted = [macro_key(name) for name in text.replace(",", " ").split()]
        if not self.negotiating or not wanted or stage not in _ORDER or Stage(stage) in self._wanted:
            raise self._error("cannot set macro list")
        self._wanted[Stage(stage)] = wanted

    # -- what pymilter calls: at the end of the message only ------------------------------------------------

    def addheader(self, field: str, value: str, idx: int = -1) -> None:
        """Append a field, or insert it as Postfix counts: 0 above the MTA's own Received, 1 below it, and so on."""
        self._editing(Action.ADDHDRS, "add header")
        name, text, space = self._name(field, "add header"), self._value(value), not self.leading_space
        if idx < 0:
            self.operations.append(AppendHeader(name, text, space))
        else:
            self.operations.append(filter_words.insert_field(idx, name, text, leading_space=space))

    def chgheader(self, field: str, idx: int, value: str | None) -> None:
        """Change the `idx`th field of that name (0 is read as 1); no value deletes it."""
        self._editing(Action.CHGHDRS, "change header")
        name = self._name(field, "change header")
        if idx < 0:
            raise self._error("cannot change header: the index is negative")
        text, space = self._value(value or ""), not self.leading_space
        self.operations.append(filter_words.change_field(idx, name, text, leading_space=space))

    def addrcpt(self, rcpt: str, params: str | Sequence[str] | None = None) -> None:
        """One more recipient, with ESMTP parameters if given; those of DSN count."""
        self._editing(Action.ADDRCPT_PAR if params else Action.ADDRCPT, "add recipient")
        address, parameters = _bare(rcpt), _parameters(params)
        try:
            format_rcpt(address, parameters)
        except LocalError as error:
            raise self._error(f"cannot add recipient: {error}") from None
        self.operations.append(filter_words.add_recipient(address, parameters))

    def delrcpt(self, rcpt: str) -> None:
        """Take a recipient out."""
        self._editing(Action.DELRCPT, "delete recipient")
        address = _bare(rcpt)
        if not address:
            raise self._error("cannot delete recipient: it is empty")
        self.operations.append(RemoveRecipient(address))

    def chgfrom(self, sender: str, params: str | Sequence[str] | None = None) -> None:
        """Another envelope sender, with ESMTP parameters if given; those of DSN count."""
        end = self._editing(Action.CHGFROM, "change sender")
        address, parameters = _bare(sender), _parameters(params)
        try:
            format_mail(address, parameters)
        except LocalError as error:
            raise self._error(f"cannot change sender: {error}") from None
        self.operations.append(filter_words.change_sender(address, parameters, end.message.transaction))

    def replacebody(self, body: bytes | str) -> None:
        """The new body, or the next piece of it."""
        end = self._editing(Action.CHGBODY, "replace message body")
        if end.body is None:
            self.operations.append(ReplaceBody(end.new_body()))
        end.write(body.encode("utf-8", "surrogateescape") if isinstance(body, str) else bytes(body))

    def quarantine(self, reason: str) -> None:
        """Hold the message, if it is accepted."""
        self._editing(Action.QUARANTINE, "quarantine message")
        if not reason:
            raise self._error("cannot quarantine message: no reason given")
        self.quarantined = reason

    def progress(self) -> None:
        """Still at work. Nobody waits for a sign of life here, but it is as misplaced elsewhere as with libmilter."""
        self._editing(Action(0), "notify progress")

    def _editing(self, action: Action, what: str) -> _End:
        if self._end is None:
            raise self._error(f"cannot {what}: not in eom")
        if self.actions & action != action:
            raise self._error(f"cannot {what}: the flag {action.name} is not set")
        return self._end

    def _name(self, field: str, what: str) -> str:
        if not isinstance(field, str) or not field:
            raise self._error(f"cannot {what}: no name given")
        return field

    def _value(self, value: str) -> str:
        """Folds come as LF or CRLF, and many filters end the value with one."""
        if not isinstance(value, str):
            raise TypeError(f"the value of a header field is a str, not {type(value).__name__}")
        octets = value.rstrip("\r\n").encode("utf-8", "surrogateescape")
        return value_from_wire(octets, True).decode("utf-8", "surrogateescape")


class _End:
    """The end of one message: where its new body goes. The body is the loop's, so each piece is handed to it."""

    def __init__(self, message: Message, loop: asyncio.AbstractEventLoop) -> None:
        self.message = message
        self.body: NewBody | None = None
        self._loop = loop
        self._pieces = bytearray()
        self._failure: OSError | None = None

    def new_body(self) -> NewBody:
        self.body = self._ask(self.message.new_body)
        return self.body

    def write(self, data: bytes) -> None:
        self._pieces += data
        if len(self._pieces) >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Raises OSError if there was no room, even if the filter did not care when it was told before."""
        if self._failure is not None:
            raise self._failure
        if self.body is None or not self._pieces:
            return
        data, self._pieces, body = bytes(self._pieces), bytearray(), self.body
        try:
            self._ask(lambda: body.write(data))
        except OSError as error:
            self._failure = error
            raise

    def _ask(self, function: Callable[[], T]) -> T:
        """Call the function in the loop, and wait."""
        future: Future[T] = Future()
        self._loop.call_soon_threadsafe(_settle, future, function)
        return future.result()


class Threads:
    """Up to `size` threads, begun when they are needed. They do not keep the process alive."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._idle = threading.Semaphore(0)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def run(self, job: Callable[[], None]) -> None:
        """Have the job run by the next free thread. Called by one thread alone, the loop's."""
        self._jobs.put(job)
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._size:
            name = f"{self._name}-{len(self._threads) + 1}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def end(self, seconds: float) -> None:
        """Let the threads finish what they have; waits for them, but not longer than that."""
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            self._idle.release()


class Turns:
    """Calls of one filter, one after the other and never two at once, in whichever thread is free."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._waiting: dict[Future[Any], Callable[[], None]] = {}
        self._busy = False

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """Have the function called when its turn comes; cancelling the future takes it back until then."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting[future] = lambda: _settle(future, function)
            begin, self._busy = not self._busy, True
        future.add_done_callback(self._done)
        if begin:
            self._threads.run(self._work)
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                call = self._waiting.pop(next(iter(self._waiting)))
            call()

    def _done(self, future: Future[Any]) -> None:
        """Where no thread is free, what was taken back would keep its piece of a message for as long."""
        if future.cancelled():
            with self._lock:
                self._waiting.pop(future, None)


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    """Call the function for the future, whatever it raises: a filter may even call sys.exit."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except StopIteration as error:  # no future of asyncio can carry it
        future.set_exception(RuntimeError(f"StopIteration: {error}"))
    except Exception as error:
        future.set_exception(error)
    except BaseException as error:
        future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
    else:
        future.set_result(result)


def _bare(address: str) -> str:
    """An address without its angle brackets."""
    text = address.strip()
    return text[1:-1] if text[:1] == "<" and text[-1:] == ">" else text


def _parameters(given: str | Sequence[str] | None) -> Parameters:
    """pymilter's C module takes one text with blanks between, its Python module speaks of a list: both."""
    if not given:
        return ()
    return split_parameters(given.split() if isinstance(given, str) else list(given))
