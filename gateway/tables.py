"""Lists that administrators keep: of networks, of names and addresses; inline or in files that change while we run.

A file has one entry a line; `#` at the start of a line or behind a blank begins a comment. It is looked at once a
second at most, when somebody asks, and read again when its time, size or inode changed. A change that cannot be read
leaves the old content in force and is logged once: a list half written must not let everybody in or keep everybody out.
Reading blocks the loop for about 1 ms a thousand lines, so that files are bounded.

`NetworkTable` and `NameTable` find the most specific entry for an address; both cost a few dictionary look-ups
however long the list is.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Generic, overload

import structlog
from typing_extensions import TypeVar

from gateway.protocol.smtp import domain_of, local_of

MAX_FILE: Final = 16 << 20
"""Octets of a list file."""

CHECK_INTERVAL: Final = 1.0
"""Seconds between two looks at a file."""

T = TypeVar("T", default=frozenset[str])
V = TypeVar("V", default=bool)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Parse = Callable[[Iterable[str]], T]

_COMMENT = re.compile(r"(^|\s)#.*")

log = structlog.get_logger("gateway.tables")


class ListFile(Generic[T]):
    """What `parse` makes of a list of entries, inline or from a file that is re-read when it changes.

    `parse` gets the entries without comments and blank lines and raises ValueError for one that is none; without it
    the content is the set of all entries in lower case. `clock` gives seconds that never run backwards.

    Raises OSError if the file cannot be read at first, and ValueError ("<file>:<line>: ...") for what it holds.
    """

    __slots__ = ("_clock", "_content", "_failure", "_next_check", "_parse", "_path", "_seen")

    @overload
    def __init__(
        self: ListFile[frozenset[str]], source: Path | Iterable[str], *, clock: Callable[[], float] = ...
    ) -> None: ...
    @overload
    def __init__(
        self, source: Path | Iterable[str], parse: Callable[[Iterable[str]], T], *, clock: Callable[[], float] = ...
    ) -> None: ...
    def __init__(
        self,
        source: Path | Iterable[str],
        parse: Callable[[Iterable[str]], T] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parse: Callable[[Iterable[str]], T] = parse if parse is not None else _lower_case  # type: ignore[assignment]
        self._clock = clock
        self._failure = ""
        self._next_check = clock() + CHECK_INTERVAL
        self._path = source if isinstance(source, Path) else None
        self._seen: tuple[int, int, int] | None = None
        if isinstance(source, Path):
            self._content = self._read(source)
        else:
            self._content = self._parse(source)

    def current(self) -> T:
        """The content now."""
        if self._path is not None:
            now = self._clock()
            if now >= self._next_check:
                self._next_check = now + CHECK_INTERVAL
                self._refresh(self._path)
        return self._content

    def __contains__(self: ListFile[frozenset[str]], entry: str) -> bool:
        """Whether the (lower-case) entry stands in a list without a parser."""
        return entry in self.current()

    def _refresh(self, path: Path) -> None:
        try:
            if _signature(os.stat(path)) != self._seen:
                self._content = self._read(path)
                log.info("list_read", file=str(path))
            self._failure = ""
        except (OSError, ValueError) as error:
            failure = str(error)
            if failure != self._failure:
                self._failure = failure
                log.warning("list_unreadable", file=str(path), error=failure, action="the old content stays")

    def _read(self, path: Path) -> T:
        with path.open("rb") as file:
            # Remembered before the content is: a file that changes meanwhile is read again at the next look.
            seen = _signature(os.fstat(file.fileno()))
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ValueError(f"{path}: larger than {MAX_FILE >> 20} MiB")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise ValueError(f"{path}:{line}: not UTF-8") from None
        entries = _Entries(text)
        try:
            content = self._parse(entries)
        except ValueError as error:
            raise ValueError(f"{path}:{entries.line}: {error}") from None
        self._seen = seen
        return content


class _Entries:
    """The entries of a file; `line` is where the last one stands."""

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self.line = 0

    def __iter__(self) -> Iterator[str]:
        for line, text in enumerate(self._lines, 1):
            self.line = line
            entry = (_COMMENT.sub("", text) if "#" in text else text).strip()
            if entry:
                yield entry


def _signature(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _lower_case(entries: Iterable[str]) -> frozenset[str]:
    return frozenset(entry.lower() for entry in entries)


class NetworkTable(Generic[V]):
    """Networks, each with a value. The longest prefix that holds an address wins."""

    __slots__ = ("_four", "_six")

    def __init__(self) -> None:
        self._four: dict[int, dict[int, V]] = {}
        self._six: dict[int, dict[int, V]] = {}

    @classmethod
    def of(cls, networks: Iterable[Network]) -> NetworkTable[bool]:
        """A set of networks, for `in`."""
        table: NetworkTable[bool] = NetworkTable()
        for network in networks:
            table.add(network, True)
        return table

    def add(self, network: Network | str, value: V) -> None:
        """One more network; a later value replaces an earlier one. Raises ValueError for what is no network."""
        if isinstance(network, str):
            network = _network(network)
        tables = self._four if network.version == 4 else self._six
        shift = network.max_prefixlen - network.prefixlen
        if shift not in tables:
            tables[shift] = {}
            for kept in sorted(tables):  # smallest shift, that is longest prefix, first
                tables[kept] = tables.pop(kept)
        tables[shift][int(network.network_address) >> shift] = value

    def find(self, address: str) -> tuple[int, V] | None:
        """Prefix length and value of the most specific network that holds the address; None for what is no address."""
        if not self._four and not self._six:
            return None
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return None
        if isinstance(parsed, ipaddress.IPv6Address):
            parsed = parsed.ipv4_mapped or parsed
        number, bits = int(parsed), parsed.max_prefixlen
        for shift, networks in (self._four if bits == 32 else self._six).items():
            value = networks.get(number >> shift)
            if value is not None:
                return bits - shift, value
        return None

    def __contains__(self, address: str) -> bool:
        return self.find(address) is not None


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text.strip("[]"), strict=False)
    except ValueError:
        raise ValueError(f"{text[:60]!r} is not a network; write 10.0.0.0/8, 2001:db8::/32 or an address") from None
    if ipaddress.ip_address(text.strip("[]").partition("/")[0]) != network.network_address:
        raise ValueError(f"{text[:60]!r} has bits set behind its prefix; write {network}")
    return network


class NameTable(Generic[V]):
    """Addresses and domains, each with a value. Case does not matter. The first kind that matches wins, in this order:

    - `user@example.org`: the one address (a bare word without a dot, such as a user's name, is one too);
    - `example.org` (or `@example.org`): all addresses of the domain, and the name itself;
    - `.example.org`: the same for all domains below it, the longest first;
    - `user@`: this local part in every domain.
    """

    __slots__ = ("_values",)

    EXACT: Final = 1000

    def __init__(self) -> None:
        self._values: dict[str, V] = {}

    def add(self, pattern: str, value: V) -> None:
        """One more pattern; a later value replaces an earlier one. Raises ValueError for what can match nothing."""
        name = pattern.lower()
        bare = name.removeprefix("@").removeprefix(".")
        if not bare or bare[0] == "." or ".." in bare or " " in bare or (bare.endswith(".") and "@" not in bare):
            forms = "user@example.org, example.org, .example.org or user@"
            raise ValueError(f"{pattern[:60]!r} is not a name; write {forms}")
        self._values[name.removeprefix("@")] = value

    def find(self, name: str) -> tuple[int, V] | None:
        """How specific the best match is (more is better) and its value, for an address, a domain or a user's name."""
        values = self._values
        name = name.lower()
        value = values.get(name) if name else None
        if value is not None:
            return self.EXACT + 1, value
        domain = domain_of(name) if "@" in name else name
        value = values.get(domain) if domain else None
        if value is not None:
            return self.EXACT, value
        dot = domain.find(".")
        while dot >= 0:
            value = values.get(domain[dot:])
            if value is not None:
                return len(domain) - dot + 1, value
            dot = domain.find(".", dot + 1)
        if "@" in name:
            value = values.get(local_of(name) + "@")
            if value is not None:
                return 1, value
        return None

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None
