"""Secrets of the configuration, which no line of any log shows.

Passwords of users never come to a log in the first place: they are in no object that is logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

REDACTED: Final = "[redacted]"
MAX_SECRETS: Final = 1000
SHORT_SECRET: Final = 4
"""Secrets shorter than this are replaced only where they are the whole string: they occur in everything."""

_secrets: list[str] = []
encoded_secrets: Final[list[bytes]] = []
"""As they look inside a record in JSON: a quick look for these spares most records the slow one."""


def register_secret(secret: str) -> None:
    """Never write `secret` to the log. For values of the configuration; raises ValueError beyond MAX_SECRETS."""
    if not secret or secret in _secrets:
        return
    if len(_secrets) >= MAX_SECRETS:
        raise ValueError(f"more than {MAX_SECRETS} secrets in the configuration")
    _secrets.append(secret)
    _secrets.sort(key=len, reverse=True)  # one that contains another is replaced first
    encoded_secrets.append(msgspec.json.encode(secret)[1:-1])


def forget_secrets() -> None:
    """Forget all registered secrets: a new configuration registers its own."""
    _secrets.clear()
    encoded_secrets.clear()


def redact(value: str) -> str:
    """`value` with every registered secret in it replaced."""
    for secret in _secrets:
        if secret in value and (len(secret) >= SHORT_SECRET or value == secret):
            value = value.replace(secret, REDACTED)
    return value


def redacted(value: object) -> object:
    """`redact` for every string of a decoded JSON value."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return value
