"""Keys for counting by client: one machine is a /32 or a /64, since a /64 is what one IPv6 customer has to himself."""

from __future__ import annotations

import socket
from functools import lru_cache

_V4_MAPPED = bytes(10) + b"\xff\xff"


@lru_cache(maxsize=4096)
def network_key(address: str, v4_prefix: int, v6_prefix: int) -> str:
    """The network of an address as `192.0.2.0/24` or `2001:db8::/48`; a bare address where the prefix is its length.

    An IPv4 address in IPv6 clothes counts as IPv4, and a zone (`%eth0`) is no part of it. What is no address
    (a local socket, an unknown client) gives "", which a store does not count. Prefixes are 0 to 32 and 0 to 128.
    """
    try:
        if ":" not in address:
            packed = socket.inet_pton(socket.AF_INET, address)
        else:
            packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except (OSError, ValueError):
        return ""
    if packed.startswith(_V4_MAPPED) and len(packed) == 16:
        packed = packed[12:]
    family, prefix = (socket.AF_INET, v4_prefix) if len(packed) == 4 else (socket.AF_INET6, v6_prefix)
    bits = 8 * len(packed)
    if prefix >= bits:
        return socket.inet_ntop(family, packed)
    host_bits = bits - max(prefix, 0)
    network = int.from_bytes(packed, "big") >> host_bits << host_bits
    return f"{socket.inet_ntop(family, network.to_bytes(len(packed), 'big'))}/{max(prefix, 0)}"


def client_key(address: str) -> str:
    """The key of one client: its IPv4 address, or its IPv6 /64 (architecture, "Shared state")."""
    return network_key(address, 32, 64)
