"""Keys of clients and networks."""

from __future__ import annotations

import pytest

from gateway.state.keys import client_key, network_key


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
        ("unix:/run/x", ""),
        ("mail.example.org", ""),
        ("192.0.2.7\0", ""),
    ],
)
def test_client_key(address: str, key: str) -> None:
    assert client_key(address) == key


@pytest.mark.parametrize(
    ("address", "v4", "v6", "key"),
    [
        ("192.0.2.130", 24, 48, "192.0.2.0/24"),
        ("192.0.2.130", 25, 48, "192.0.2.128/25"),
        ("192.0.2.130", 0, 0, "0.0.0.0/0"),
        ("2001:db8:1:2::3", 24, 48, "2001:db8:1::/48"),
        ("2001:db8:1:2::3", 24, 128, "2001:db8:1:2::3"),
        ("2001:db8:1:2::3", 24, 0, "::/0"),
    ],
)
def test_network_key(address: str, v4: int, v6: int, key: str) -> None:
    assert network_key(address, v4, v6) == key
