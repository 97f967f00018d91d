"""Real programs: skip the test where one is missing, or fail it where all must be there (CI)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/lib/postfix/sbin"))


def require(program: str) -> str:
    """The path of `program`, by name or by absolute path; skips the test if there is none.

    With GATEWAY_REQUIRE_PEERS=1 in the environment the test fails instead.
    """
    path = program if program.startswith("/") and Path(program).exists() else shutil.which(program, path=_PATH)
    if path is None:
        missing(f"{program} is not installed")
    return path


def require_root() -> None:
    """For programs that change their user."""
    if os.geteuid() != 0:
        missing("this peer runs as root only")


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail it with GATEWAY_REQUIRE_PEERS=1."""
    if os.environ.get("GATEWAY_REQUIRE_PEERS") == "1":
        pytest.fail(f"{reason} (and GATEWAY_REQUIRE_PEERS=1)", pytrace=False)
    pytest.skip(reason)
