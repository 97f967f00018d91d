"""A class written for pymilter: how it is found, and one instance of it with what it agreed to.

pymilter keeps what it was told in the C module `milter`, for the whole process. Several filters in one gateway must
not see one another: `set_flags` is caught while a module is imported and kept by module, and every stage runs
a subclass of its own, in which `Milter.Base` remembers what it found out of the class.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import ipaddress
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AF_INET6, AF_UNIX
from types import ModuleType
from typing import Any, Final, Protocol, cast

from gateway import Header, Message, Session
from gateway.protocol.milter import Action, Step
from gateway.protocol.milter_wire import value_to_wire
from stages.filter_words import Parameters
from stages.pymilter_context import Code, Context, Threads, Turns

OFFERED: Final = Step(0x1FFFFF) & ~Step.RCPT_REJ
"""All steps of version 6 but one: a stage is not told of recipients that others refused."""

_ALL_ACTIONS: Final = Action(0x1FF)
MAX_BLOCK: Final = 65_535
"""Octets of the largest piece of a body (libmilter)."""

HostAddress = tuple[str, int] | tuple[str, int, int, int] | str

_flags: dict[str, Action] = {}  # what modules said to set_flags while they were imported


class Callbacks(Protocol):
    """What is called of a `Milter.Base`; each gives one of `Code` as a number."""

    def _setctx(self, ctx: Context | None) -> None: ...
    def negotiate(self, opts: list[int]) -> object: ...
    def connect(self, hostname: str, family: int, hostaddr: HostAddress) -> object: ...
    def hello(self, hostname: str) -> object: ...
    def envfrom_bytes(self, *arguments: bytes) -> object: ...
    def envrcpt_bytes(self, *arguments: bytes) -> object: ...
    def data(self) -> object: ...
    def header_bytes(self, field: str, value: bytes) -> object: ...
    def eoh(self) -> object: ...
    def body(self, block: bytes) -> object: ...
    def eom(self) -> object: ...
    def unknown(self, command: str) -> object: ...
    def abort(self) -> object: ...
    def close(self) -> object: ...


@dataclass(frozen=True)
class FilterClass:
    """A class ready to run: `make` gives an instance, `error` is pymilter's exception.

    `actions` are those that its module asked for, `steps` what it does without in every session; none if only its own
    `negotiate` knows.
    """

    make: Callable[[], Callbacks]
    actions: Action
    steps: Step
    error: type[Exception]


def find_class(name: str, path: Path | None) -> FilterClass:
    """Import `package.module:Class`, with `path` behind the folders where Python looks.

    Raises ValueError that says what is wrong, and what to do.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise ValueError(f"{name[:60]!r} names no class; write package.module:Class")
    try:
        milter, low = importlib.import_module("Milter"), importlib.import_module("milter")
    except ImportError as error:
        advice = "pip install 'mail-gateway[milter]', on Debian after apt-get install libmilter-dev"
        raise ValueError(f"pymilter is not installed ({error}); {advice}") from None
    module = _import(module_name, path, milter, low)
    found = getattr(module, class_name, None)
    if found is None:
        near = difflib.get_close_matches(class_name, vars(module), 1)
        advice = f"did you mean {near[0]!r}?" if near else "write the name of its class"
        raise ValueError(f"{module_name} has no {class_name}; {advice}")
    if not (isinstance(found, type) and issubclass(found, milter.Base)):
        raise ValueError(f"{name} is no filter class; write one that inherits from Milter.Base")
    own: Any = type(found.__name__, (found,), {"__module__": found.__module__, "__doc__": found.__doc__})
    steps = OFFERED & ~Step(own.protocol_mask()) if own.negotiate is milter.Base.negotiate else Step(0)
    make = cast("Callable[[], Callbacks]", own)
    return FilterClass(make, _flags.get(module_name, _ALL_ACTIONS), steps, low.error)


def _import(name: str, path: Path | None, milter: ModuleType, low: ModuleType) -> ModuleType:
    if path is not None:
        if not path.is_dir():
            raise ValueError(f"path {str(path)!r} is no folder; write the folder with {name}")
        if str(path) not in sys.path:
            sys.path.append(str(path))
            importlib.invalidate_caches()
    if name not in sys.modules:
        try:
            with _caught(name, milter, low):
                importlib.import_module(name)
        except ModuleNotFoundError as error:
            advice = "install it, or write its folder as path"
            raise ValueError(f"{name} cannot be imported: {error}; {advice}") from error
        except (Exception, SystemExit) as error:
            raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
    module = sys.modules[name]
    origin = getattr(module, "__file__", None)
    if path is not None and (origin is None or path.resolve() not in Path(origin).resolve().parents):
        raise ValueError(f"{name} is {origin or 'a module of Python'}, not a file in path; give it another name")
    return module


@contextmanager
def _caught(name: str, milter: ModuleType, low: ModuleType) -> Iterator[None]:
    """While the module is imported: keep the flags it sets, and let it run no daemon."""

    def set_flags(flags: int) -> None:
        caller = sys._getframe(1).f_globals.get("__name__", name)  # one that it imports may be a filter, too
        _flags[name] = _flags[caller] = Action(flags & _ALL_ACTIONS)

    def run(*arguments: object, **named: object) -> None:
        raise RuntimeError("it runs its daemon; put that below if __name__ == '__main__'")

    replaced = [(milter, "set_flags", set_flags), (low, "set_flags", set_flags), (milter, "runmilter", run)]
    replaced += [(milter, "main", run), (low, "main", run)]
    before = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in replaced]
    for module, attribute, value in replaced:
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, attribute, value in before:
            setattr(module, attribute, value)


class MilterFilter:
    """One instance of a filter class, for one session. Its methods are called in turns.

    `introduced`: it was told of the client. `lost`: nobody knows what state it is in, or it hears of nothing more.
    """

    def __init__(self, filter_class: FilterClass, offered: Action, threads: Threads) -> None:
        self.context = Context(offered, filter_class.error)
        self.turns = Turns(threads)
        self.steps = filter_class.steps
        self.introduced = False
        self.lost = False
        self._class = filter_class
        self._made: Callbacks | None = None

    def begin(self) -> bool:
        """Make the instance and agree on options; False if it wants to hear nothing of this session."""
        context = self.context
        instance = self._made = self._class.make()
        instance._setctx(context)
        options = [int(context.actions), int(OFFERED), 0, 0]
        context.negotiating = True
        try:
            code = code_of(instance.negotiate(options), "negotiate")
        finally:
            context.negotiating = False
        if code is Code.ALL_OPTS:
            self.steps = Step.SKIP
        elif code is Code.CONTINUE:
            context.actions &= Action(options[0] & _ALL_ACTIONS)
            self.steps = OFFERED & Step(options[1] & OFFERED)
        else:
            return False
        context.leading_space = bool(self.steps & Step.HDR_LEADSPC)
        return True

    def connect(self, name: str, family: int, address: HostAddress) -> Code:
        """`connect`."""
        return self._call("connect", Step.NOCONNECT, lambda to: to.connect(name, family, address))

    def hello(self, name: str) -> Code:
        """`hello`."""
        return self._call("hello", Step.NOHELO, lambda to: to.hello(name))

    def envfrom(self, arguments: Sequence[bytes]) -> Code:
        """`envfrom`: the address in angle brackets, and parameters."""
        return self._call("envfrom", Step.NOMAIL, lambda to: to.envfrom_bytes(*arguments))

    def envrcpt(self, arguments: Sequence[bytes]) -> Code:
        """`envrcpt`, as `envfrom`."""
        return self._call("envrcpt", Step.NORCPT, lambda to: to.envrcpt_bytes(*arguments))

    def data(self) -> Code:
        """`data`."""
        return self._call("data", Step.NODATA, lambda to: to.data())

    def header(self, header: Header) -> Code:
        """`header` for each field, then `eoh`; what the first answered that did not say CONTINUE."""
        if not self.steps & Step.NOHDRS:
            for field in header.fields:
                value = value_to_wire(field.value, self.context.leading_space)
                code = self._call("header", Step.NOHDRS, lambda to: to.header_bytes(field.name, value))  # noqa: B023
                if code is not Code.CONTINUE:
                    return code
        return self._call("eoh", Step.NOEOH, lambda to: to.eoh())

    def body(self, block: bytes) -> Code:
        """`body`, in pieces as large as libmilter's."""
        for start in range(0, len(block), MAX_BLOCK):
            piece = block[start : start + MAX_BLOCK]
            code = self._call("body", Step.NOBODY, lambda to: to.body(piece))  # noqa: B023
            if code is not Code.CONTINUE:
                return code
        return Code.CONTINUE

    def eom(self, message: Message, loop: asyncio.AbstractEventLoop) -> Code:
        """`eom`; its changes are in the context. Raises OSError if there is no room for a new body."""
        context = self.context
        context.begin_end(message, loop)
        try:
            return self._call("eom", Step(0), lambda to: to.eom())
        finally:
            context.finish_end()

    def unknown(self, command: str) -> Code:
        """`unknown`."""
        return self._call("unknown", Step.NOUNKNOWN, lambda to: to.unknown(command))

    def abort(self) -> None:
        """`abort`; its answer means nothing."""
        if self._made is not None:
            self._made.abort()

    def close(self) -> None:
        """`close`, and let go of the context, as pymilter does."""
        made, self._made = self._made, None
        if made is not None:
            try:
                made.close()
            finally:
                made._setctx(None)

    def _call(self, name: str, unwanted: Step, callback: Callable[[Callbacks], object]) -> Code:
        if self._made is None or self.steps & unwanted:
            return Code.CONTINUE
        self.context.reply = None
        return code_of(callback(self._made), name)


def client_of(session: Session) -> tuple[str, int, HostAddress]:
    """What `connect` is given: the verified name, or the address in brackets as with Postfix; family; address."""
    client = session.client
    try:
        address = ipaddress.ip_address(client.address)
    except ValueError:  # over a unix socket
        return "localhost", int(AF_UNIX), session.local[0] or "unix:"
    name = client.name if client.name_status == "ok" and client.name else f"[{client.address}]"
    if isinstance(address, ipaddress.IPv4Address):
        return name, int(AF_INET), (client.address, client.port)
    return name, int(AF_INET6), (client.address, client.port, 0, 0)


def arguments_of(address: str, parameters: Parameters) -> list[bytes]:
    """The arguments of MAIL or RCPT as the filter gets them."""
    words = [f"<{address}>", *(name if value is None else f"{name}={value}" for name, value in parameters)]
    return [word.encode("utf-8", "surrogateescape") for word in words]


def code_of(answer: object, name: str) -> Code:
    """What a callback answered. Raises TypeError and ValueError for what is none of its answers."""
    if not isinstance(answer, int):
        raise TypeError(f"{name} must return a number such as Milter.CONTINUE, not {type(answer).__name__}")
    try:
        code = Code(answer)
    except ValueError:
        raise ValueError(f"{name} returned {answer}") from None
    if code is Code.NOREPLY:
        return Code.CONTINUE
    early, body = name in ("connect", "hello"), name == "body"
    if (code is Code.DISCARD and early) or (code is Code.SKIP and not body):
        raise ValueError(f"{name} returned {code.name}")
    if code is Code.ALL_OPTS and name != "negotiate":
        raise ValueError(f"{name} returned {code.name}")
    return code
