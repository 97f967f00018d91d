"""Files to plans, for the commands; problems go to stderr, one a line, exit status 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from gateway.config.load import Loaded, load
from gateway.config.problems import ConfigError, Problem
from gateway.pipeline.compile import compile_pipeline
from gateway.pipeline.plan import Plan
from gateway.pipeline.registry import Registry


def fail(text: str) -> NoReturn:
    """Say what is wrong and end with status 2."""
    click.echo(text, err=True)
    raise SystemExit(2)


def plans(paths: Sequence[str]) -> tuple[list[Plan], Loaded]:
    """Load and compile; every problem of every file before giving up."""
    try:
        loaded = load([Path(path) for path in paths])
    except ConfigError as error:
        fail(str(error))
    registry = Registry()
    compiled: list[Plan] = []
    problems: list[Problem] = []
    for pipeline, document in loaded.pipelines:
        try:
            compiled.append(compile_pipeline(pipeline, document, registry))
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        fail(str(ConfigError(problems)))
    return compiled, loaded
