"""The values of nginx's directives: times, sizes, flags, addresses, as nginx reads them."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence

_TIME = re.compile(r"(?:\d+y)? ?(?:\d+M)? ?(?:\d+w)? ?(?:\d+d)? ?(?:\d+h)? ?(?:\d+m)? ?(?:\d+s)? ?(?:\d+ms)? ?(\d+)?")
_PART = re.compile(r"(\d+)(ms|[smhdwMy]|)")
_SECONDS = {
    "ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "M": 2592000.0,
    "y": 31536000.0,
}  # fmt: skip
_SIZE = re.compile(r"(\d+)([kKmM]?)")
_OCTETS = {"": 1, "k": 1024, "m": 1024 * 1024}

Lookup = Callable[[str], Sequence[str]]
"""From a host name to its addresses; raises OSError."""


class Invalid(ValueError):
    """A value that nginx refuses; the text begins with nginx's."""


def seconds(text: str) -> float:
    """Seconds of `1m30s`, `500ms`, `2w 3d`, `60`: units in falling order, each once. Raises Invalid."""
    if not text.strip() or not _TIME.fullmatch(text):
        raise Invalid(f'invalid value "{text}", times are written 500ms, 30s, 1m30s, 1h, 1d')
    return round(sum(int(number) * _SECONDS[unit] for number, unit in _PART.findall(text)), 3)


def size(text: str) -> int:
    """Octets of `4k`, `1m`, `4096`. Raises Invalid."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise Invalid(f'invalid value "{text}", sizes are written 4096, 4k, 1m')
    return int(match[1]) * _OCTETS[match[2].lower()]


def number(text: str) -> int:
    """A whole number. Raises Invalid."""
    if not re.fullmatch(r"\d{1,15}", text):
        raise Invalid(f'invalid number "{text}"')
    return int(text)


def flag(text: str) -> bool:
    """`on` or `off`. Raises Invalid."""
    if text.lower() not in ("on", "off"):
        raise Invalid(f'invalid value "{text}", it must be "on" or "off"')
    return text.lower() == "on"


def addresses(host: str) -> list[str]:
    """All addresses of a host name, by this machine's resolver. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_address(text: str) -> bool:
    """An IPv4 or IPv6 address without brackets."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def host_port(text: str) -> tuple[str, str]:
    """`host:port`, `[v6]:port`, `host`: host without brackets and port, "" where it is left out. Raises Invalid."""
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]/]*))(?::([^:]+))?", text)
    if match is None:
        raise Invalid(f'invalid address "{text}"')
    host = match[2] if match[1] is None else match[1]
    if match[1] is not None and not is_address(host):
        raise Invalid(f'invalid IPv6 address in "{text}"')
    return host, match[3] or ""


def port_number(text: str) -> int:
    """1 to 65535. Raises Invalid."""
    if not re.fullmatch(r"\d{1,5}", text) or not 1 <= int(text) <= 65535:
        raise Invalid("invalid port")
    return int(text)
