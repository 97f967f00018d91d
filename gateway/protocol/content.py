r"""Message content on the wire: where it ends, its line ends, its dots, and BDAT (RFC 5321 4.5.2, RFC 3030).

Only `\r\n.\r\n` ends DATA; every other mix of CR, LF and dot is content. Two peers that see different ends
read one message as two (SMTP smuggling), so no illegal line end leaves this file under the policy `normalize`,
and under `reject` it is named in `bare` and the caller refuses the message.

Large messages must cost little more than a copy. Hence whole blocks are looked at with C-speed searches, and
what is clean is handed on as the very object that came in.
"""

from __future__ import annotations

import io
import re
from typing import Final, NamedTuple

from gateway.protocol.errors import LocalError, PeerError

POLICIES: Final = ("reject", "normalize")

_BARE: Final = re.compile(rb"\r(?!\n)|(?<!\r)\n")
_BARE_CR: Final = re.compile(rb"\r(?!\n)")
_BDAT: Final = re.compile(rb"([0-9]{1,10})(?: +(LAST))?", re.IGNORECASE)

_SMALL: Final = 2048  # octets below which looking for lines of equal length does not pay
_FEW: Final = 16  # lines of equal length that make a run


class Scan(NamedTuple):
    """What a block gave: content to forward, whether DATA ended in it, and the octets behind the end."""

    content: bytes
    end: bool
    rest: bytes


class _Run(NamedTuple):
    """A stretch of a block, whole lines of equal length that all end in CRLF; `dotted` of them begin with a dot."""

    start: int
    stop: int
    dotted: int


_NO_RUN: Final = _Run(0, 0, 0)


def _find_run(data: bytes) -> _Run:
    r"""Find the run of equally long lines behind the first line end, as base64 has them; no `\r\n.\r\n` is in it.

    To prove that a run holds no other line end takes a copy, two strided writes and two `memchr`: a fifth of
    the general way's time, and most octets of large messages are base64.
    """
    if len(data) < _SMALL:
        return _NO_RUN
    start = data.find(b"\n") + 1
    width = data.find(b"\n", start) + 1 - start
    if width < 4 or data[start - 2 : start] != b"\r\n":
        return _NO_RUN
    ends = data[start + width - 1 :: width]
    lines = len(ends) - len(ends.lstrip(b"\n"))
    if lines < _FEW:
        return _NO_RUN
    stop = start + lines * width
    run = bytearray(memoryview(data)[start:stop])
    if run[width - 2 :: width] != b"\r" * lines:
        return _NO_RUN
    dotted = run[::width].count(b".")
    run[width - 2 :: width] = run[width - 1 :: width] = bytes(lines)
    if run.find(b"\r") >= 0 or run.find(b"\n") >= 0:
        return _NO_RUN
    return _Run(start, stop, dotted)


def _only_crlf(data: bytes) -> bool:
    """Whether CR and LF occur in `data` only as CRLF."""
    decoder = io.IncrementalNewlineDecoder(None, translate=False)
    decoder.decode(data.decode("latin-1"), final=True)
    return decoder.newlines in (None, "\r\n")


def _is_clean(data: bytes, run: _Run) -> bool:
    """`_only_crlf` for a block in which a run was found."""
    if not run.stop:
        return _only_crlf(data)
    return _only_crlf(data[: run.start]) and _only_crlf(data[run.stop :])


def _policy(policy: str) -> str:
    if policy not in POLICIES:
        raise LocalError(f"line end policy {policy!r} is none of {', '.join(POLICIES)}")
    return policy


class DataScanner:
    r"""Finds the end of DATA in blocks as they come and guards line ends.

    The content it gives is the wire form, still dot-stuffed, fit to forward; the caller writes the final dot.
    `policy` is `reject`: content passes as it came, up to the true end, and `bare` tells that it must be
    refused; or `normalize`: a lone LF becomes CRLF (its new line dot-stuffed), a lone CR a blank.

    `bare` is `"LF"` or `"CR"`, the first illegal line end seen, else None. `nul` tells whether there was a
    NUL. `size` counts the octets of the content given so far without stuffed dots. At most two octets are held
    back between blocks: a CR, or what may be the final dot.
    """

    __slots__ = ("_ended", "_held", "_line_start", "_out_line_start", "bare", "nul", "policy", "size")

    def __init__(self, policy: str = "reject") -> None:
        self.policy = _policy(policy)
        self.bare: str | None = None
        self.nul = False
        self.size = 0
        self._held = b""
        self._line_start = True  # the next octet follows CRLF, DATA's own at first
        self._out_line_start = True  # the same of what we gave, where a lone LF may have become CRLF
        self._ended = False

    def feed(self, block: bytes) -> Scan:
        """Take the next block. Raises `LocalError` behind the end."""
        if self._ended:
            raise LocalError("DATA has ended")
        data = self._held + block if self._held else block
        self._held = b""
        if self._line_start and data[:1] == b".":
            if data[1:3] == b"\r\n":
                self._ended = True
                return Scan(b"", True, data[3:])
            if data in (b".", b".\r"):
                self._held = data
                return Scan(b"", False, b"")
        run = _find_run(data)
        content, dotted, rest = data, run.dotted, b""
        tail = max(run.stop - 2, 0)  # from the CRLF that ends the run
        if data.rfind(b"\r\n.", tail) >= 0:
            end = data.find(b"\r\n.\r\n", tail)
            if end >= 0:
                self._ended = True
                content, rest = data[: end + 2], data[end + 5 :]
            else:
                content = self._hold(data)
            dotted += content.count(b"\r\n.", tail)
        elif data[-1:] == b"\r":
            content = self._hold(data)
        return Scan(self._pass(content, run, dotted), self._ended, rest)

    def _hold(self, data: bytes) -> bytes:
        """Keep back the octets at the end whose meaning the next block decides."""
        for ending, octets in ((b"\r\n.\r", 2), (b"\r\n.", 1), (b"\r", 1)):
            if data.endswith(ending):
                self._held = data[-octets:]
                return data[:-octets]
        return data

    def _pass(self, content: bytes, run: _Run, dotted: int) -> bytes:
        """Guard the line ends of content that begins with no half CRLF and ends with none; count it."""
        if not content:
            return content
        self.nul = self.nul or b"\0" in content
        line_start = content[-2:] == b"\r\n"
        if self.policy == "normalize":
            if not _is_clean(content, run):
                self.bare = self.bare or _first_bare(content)
                content = self._normalized(content)
                dotted = content.count(b"\r\n.")
            elif self._out_line_start and not self._line_start and content[:1] == b".":
                content = b"." + content
        elif self.bare is None and not _is_clean(content, run):
            self.bare = _first_bare(content)
        if self._out_line_start and content[:1] == b".":
            dotted += 1
        self.size += len(content) - dotted
        self._line_start = line_start
        self._out_line_start = content[-2:] == b"\r\n"
        return content

    def _normalized(self, content: bytes) -> bytes:
        """Wire form with illegal line ends to wire form without; what stands between CRLFs alone stays as it is."""
        content = _BARE_CR.sub(b" ", content)
        # A stuffed empty line that a bare LF ends: with CRLF in its place, the dot would be the end of data.
        content = content.replace(b"\r\n.\n", b"\r\n\n")
        if self._line_start and content[:2] == b".\n":
            content = content[1:]
        # For a moment CR stands for CRLF and LF for a bare LF, behind which dots are not stuffed yet.
        content = content.replace(b"\r\n", b"\r").replace(b"\n.", b"\n..")
        if self._out_line_start and not self._line_start and content[:1] == b".":
            content = b"." + content
        return content.replace(b"\n", b"\r").replace(b"\r", b"\r\n")


class DotStuffer:
    """From content as it is (BDAT, a spool) to the form that DATA wants; the caller writes the final dot.

    `policy`, `bare` and `nul` as in `DataScanner`. A CR at the end of a block is held back until the next.
    """

    __slots__ = ("_held", "_line_start", "bare", "nul", "policy")

    def __init__(self, policy: str = "reject") -> None:
        self.policy = _policy(policy)
        self.bare: str | None = None
        self.nul = False
        self._held = b""
        self._line_start = True

    def feed(self, block: bytes) -> bytes:
        """Give the wire form of the next block, the block itself where nothing had to change."""
        data = self._held + block if self._held else block
        self._held = b""
        if data[-1:] == b"\r":
            self._held, data = b"\r", data[:-1]
        return self._stuffed(data)

    def finish(self) -> bytes:
        """Give what is held back, and CRLF if the last line lacks it (the final dot stands on its own line)."""
        last = self._held
        self._held = b""
        tail = self._stuffed(last)
        return tail if self._line_start else tail + b"\r\n"

    def _stuffed(self, data: bytes) -> bytes:
        if not data:
            return data
        self.nul = self.nul or b"\0" in data
        run = _find_run(data)
        if (self.policy == "normalize" or self.bare is None) and not _is_clean(data, run):
            self.bare = self.bare or _first_bare(data)
            if self.policy == "normalize":
                data = _BARE_CR.sub(b" ", data).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
                run = _NO_RUN
        if run.dotted or data.rfind(b"\r\n.", max(run.stop - 2, 0)) >= 0:
            data = data.replace(b"\r\n.", b"\r\n..")
        if self._line_start and data[:1] == b".":
            data = b"." + data
        self._line_start = data[-2:] == b"\r\n"
        return data


class DotUnstuffer:
    """From the wire form that `DataScanner` gives to the content as it is (RFC 5321 4.5.2)."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = b"\r\n"  # the last two octets so far

    def feed(self, block: bytes) -> bytes:
        """Give the next block without the dot that each line may begin with."""
        last, self._last = self._last, (self._last + block[-2:])[-2:]
        if last == b"\r\n" and block[:1] == b".":
            block = block[1:]
        elif last[-1:] == b"\r" and block[:2] == b"\n.":
            block = b"\n" + block[2:]
        return block.replace(b"\r\n.", b"\r\n") if block.rfind(b"\r\n.") >= 0 else block


def parse_bdat(argument: bytes) -> tuple[int, bool]:
    """Read `size [LAST]` of BDAT: the octets that follow, and whether they are the last (RFC 3030 section 2).

    Raises `PeerError` 501 5.5.4. How many octets come behind a BDAT that cannot be read nobody knows: the
    session must end there.
    """
    match = _BDAT.fullmatch(argument)
    if match is None:
        raise PeerError("malformed BDAT", b"501 5.5.4 Syntax: BDAT size [LAST]")
    return int(match[1]), match[2] is not None


def _first_bare(data: bytes) -> str | None:
    """Which illegal line end comes first."""
    match = _BARE.search(data)
    return None if match is None else {b"\r": "CR", b"\n": "LF"}[match[0]]
