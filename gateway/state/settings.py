"""Which store the service uses, and how to reach it: what `process.store` says, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

StoreKind = Literal["memory", "lmdb", "redis"]

SMALLEST: Final = 1 << 20
"""Octets of the smallest LMDB store: less holds too few entries to be of use."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The store and what it needs. Raises ValueError if something it needs is missing or makes no sense.

    `path` is the folder of the LMDB store (made if it is missing), `size` the most octets it may hold. `url` is a
    Redis URL, which may hold a password and is therefore never shown; `password` is used if the URL has none,
    `ca_file` verifies a `rediss://` server in place of the system's certificates. `prefix` begins every key in
    Redis. No call takes longer than `timeout` seconds.
    """

    kind: StoreKind = "memory"
    path: Path | None = None
    size: int = 32 << 20
    url: str = field(default="", repr=False)
    prefix: str = "gateway:"
    timeout: float = 2.0
    ca_file: Path | None = None
    password: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.kind == "lmdb" and self.path is None:
            raise ValueError("an lmdb store needs a path")
        if self.kind == "lmdb" and self.size < SMALLEST:
            raise ValueError(f"an lmdb store of {self.size} octets; the smallest is {SMALLEST}")
        if self.kind == "redis" and not self.url:
            raise ValueError("a redis store needs a url")
        if not self.timeout > 0:
            raise ValueError(f"a store's timeout is {self.timeout!r}, not a positive number of seconds")
