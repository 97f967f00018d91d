"""Files to plans, for the commands; problems go to stderr, one a line, exit status 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from gateway.config.load import Loaded
    from gateway.pipeline.plan import Plan


def fail(text: str) -> NoReturn:
    """Say what is wrong and end with status 2."""
    click.echo(text, err=True)
    raise SystemExit(2)


def plans(paths: Sequence[str]) -> tuple[list[Plan], Loaded]:
    """Load and compile; every problem of every file before giving up."""
    from gateway.config.load import load
    from gateway.config.problems import ConfigError
    from gateway.pipeline.compile import compile_all  # a third of a second that a supervisor does not need

    try:
        loaded = load([Path(path) for path in paths])
    except ConfigError as error:
        fail(str(error))
    try:
        return compile_all(loaded), loaded
    except ConfigError as error:
        fail(str(error))
