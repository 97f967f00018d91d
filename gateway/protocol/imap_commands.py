"""Reads a client's IMAP commands, literals included, before login (RFC 3501 section 9, RFC 7888).

A command is one or more lines with literals between them. The reader is given each line and each literal, and says
how many octets it wants next; who reads the network is not its business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gateway.protocol.errors import LocalError, PeerError

MAX_COMMAND: Final = 8192
"""Octets of all lines and literals of one command."""

MAX_ARGUMENTS: Final = 3
"""Arguments of a command; no command before login has more than two."""

MAX_LITERAL_MINUS: Final = 4096
"""Octets of a `{n-}` literal; what LITERAL- allows without waiting (RFC 7888 section 5)."""

_TAG: Final = re.compile(rb"[!#$&',\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]{1,64}")
_NAME: Final = re.compile(rb"[A-Za-z]+")
_ANNOUNCEMENT: Final = re.compile(rb"\{([0-9]{1,10})([+-]?)\}")
_ANNOUNCEMENT_AT_END: Final = re.compile(rb"\{[0-9]*[+-]?\}\Z")
_IN_FLIGHT: Final = re.compile(rb"\{[0-9]*[+-]\}[ \r\0]*\Z")
_STRING: Final = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"(?= |\Z)', re.DOTALL)
_ATOM: Final = re.compile(rb'[^"{( ][^( ]*+(?= |\Z)')
_ESCAPE: Final = re.compile(rb"\\(.)", re.DOTALL)
_BALANCED: Final = re.compile(rb'(?:[^"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)


class BadCommand(PeerError):
    """A command that cannot be read: the answer is BAD.

    `tag` is the command's, b"" if that itself is bad. `close`: a literal for which the client does not wait is in
    flight, so that the session must end before its octets are taken for commands.
    """

    def __init__(self, text: str, tag: bytes = b"", *, close: bool = False) -> None:
        super().__init__(text)
        self.tag = tag
        self.close = close


@dataclass(frozen=True, slots=True)
class Literal:
    """What the reader wants next: `size` octets, then a line. The client waits for `+` if it is `synchronizing`."""

    size: int
    synchronizing: bool


@dataclass(frozen=True, slots=True)
class Command:
    """A whole command: `name` in upper case, `arguments` decoded from atoms, quoted strings and literals.

    ID's only argument is what stood behind its name, as it came with `{n}` CRLF and literals; `parse_id` reads it.
    """

    tag: bytes
    name: str
    arguments: tuple[bytes, ...]

    def __repr__(self) -> str:
        # LOGIN's arguments are a password.
        return f"Command({self.tag!r}, {self.name!r}, {len(self.arguments)} arguments)"


def is_tag(word: bytes) -> bool:
    """Return whether `word` is a tag (RFC 3501 section 9) of 1 to 64 octets."""
    return _TAG.fullmatch(word) is not None


class CommandReader:
    """Puts commands together. After a `BadCommand` the next line begins a new one.

    More liberal than the grammar, as servers are: several blanks between words, atoms of any octets but blank,
    `(`, CR and NUL, quoted strings with 8-bit octets. Not so with what an atom seems to announce: `x{3}` at the end of
    a line is refused, since not every server would agree that it is no literal.
    """

    __slots__ = ("_arguments", "_name", "_raw", "_size", "_tag", "_wanted", "max_arguments", "max_size")

    def __init__(self, max_size: int = MAX_COMMAND, max_arguments: int = MAX_ARGUMENTS) -> None:
        self.max_size = max_size
        self.max_arguments = max_arguments
        self.reset()

    def reset(self) -> None:
        """Forget a command that has begun, as after a line that was too long to be given here."""
        self._tag = b""
        self._name = ""
        self._arguments: list[bytes] = []
        self._raw = b""
        self._size = 0
        self._wanted: int | None = None

    @property
    def pending(self) -> bool:
        """Whether a command has begun that is not complete."""
        return bool(self._name)

    @property
    def begun(self) -> Command:
        """What there is of a command that is not complete: whoever refuses a literal calls `reset` then."""
        return Command(self._tag, self._name, tuple(self._arguments))

    def line(self, line: bytes) -> Command | Literal:
        """Take a line without its end: the command it completes, or the literal that it announces.

        Raises `BadCommand`, and `LocalError` where a literal is due.
        """
        if self._wanted is not None:
            raise LocalError("a literal is due, not a line")
        try:
            return self._line(line)
        except BadCommand as error:
            error.tag = self._tag
            error.close = _IN_FLIGHT.search(line) is not None
            self.reset()
            raise

    def literal(self, data: bytes) -> None:
        """Take the octets that were announced, exactly so many (else `LocalError`); any octets, CR, LF, NUL too."""
        if self._wanted != len(data):
            raise LocalError("not the announced literal")
        self._wanted = None
        self._size += len(data)
        if self._name == "ID":
            self._raw += data
        else:
            self._arguments.append(data)

    def _line(self, line: bytes) -> Command | Literal:
        if self._name:
            self._check(line)
            if line and line[:1] != b" " and self._name != "ID":
                raise BadCommand("no blank behind a literal")
            return self._rest(line)
        tag, blank, rest = line.partition(b" ")
        if not blank or not is_tag(tag):
            raise BadCommand("no tag")
        self._tag = tag
        self._check(line)
        name, blank, rest = rest.lstrip(b" ").partition(b" ")
        if not _NAME.fullmatch(name):
            raise BadCommand("no command name")
        self._name = name.decode("ascii").upper()
        return self._rest(blank + rest)

    def _check(self, line: bytes) -> None:
        self._size += len(line)
        if self._size > self.max_size:
            raise BadCommand("command too long")
        if b"\0" in line or b"\r" in line or b"\n" in line:
            raise BadCommand("CR, LF or NUL within a line")

    def _rest(self, line: bytes) -> Command | Literal:
        """Read what stands behind the command's name or behind a literal: b"" or a blank and the arguments."""
        if self._name == "ID":
            return self._raw_rest(line)
        position = 0
        while position < len(line):
            if line[position : position + 1] == b" ":
                position += 1
                continue
            if len(self._arguments) == self.max_arguments:
                raise BadCommand("too many arguments")
            announced = _ANNOUNCEMENT.fullmatch(line, position)
            if announced is not None:
                return self._announced(announced)
            position = self._argument(line, position)
        return self._complete(tuple(self._arguments))

    def _argument(self, line: bytes, position: int) -> int:
        """Take the quoted string or atom at `position`; give where it ends."""
        match = _STRING.match(line, position)
        if match is not None:
            text = match[1]
            self._arguments.append(_ESCAPE.sub(rb"\1", text) if b"\\" in text else text)
            return match.end()
        match = _ATOM.match(line, position)
        if match is None or (match.end() == len(line) and _ANNOUNCEMENT_AT_END.search(match[0])):
            raise BadCommand("malformed argument")
        self._arguments.append(match[0])
        return match.end()

    def _raw_rest(self, line: bytes) -> Command | Literal:
        if not self._raw:
            line = line[1:]
        self._raw += line
        announced = _ANNOUNCEMENT_AT_END.search(line)
        if announced is None:
            return self._complete((self._raw,))
        literal = _ANNOUNCEMENT.fullmatch(line, announced.start())
        before = line[: announced.start()]
        if literal is None or before[-1:] not in (b" ", b"(") or not _BALANCED.fullmatch(before):
            raise BadCommand("malformed argument")
        self._raw += b"\r\n"
        return self._announced(literal)

    def _announced(self, match: re.Match[bytes]) -> Literal:
        size, mark = int(match[1]), match[2]
        if self._size + size > self.max_size or (mark == b"-" and size > MAX_LITERAL_MINUS):
            raise BadCommand("literal too long")
        self._wanted = size
        return Literal(size, synchronizing=not mark)

    def _complete(self, arguments: tuple[bytes, ...]) -> Command:
        command = Command(self._tag, self._name, arguments)
        self.reset()
        return command
