"""`gateway stages [NAME]`: what is installed, from the models and docstrings."""

from __future__ import annotations

import inspect

import click

from gateway.cli.loading import fail
from gateway.facts import BUILT_IN
from gateway.pipeline.asked import hook_names
from gateway.pipeline.reference import SettingRow, settings_rows
from gateway.pipeline.registry import Registry, StageError
from gateway.stage import Stage


@click.command()
@click.argument("name", required=False)
@click.option("--facts", is_flag=True, help="List the facts that conditions and expressions can use.")
def command(name: str | None, facts: bool) -> None:
    """List the installed stages, or one with its settings."""
    registry = Registry()
    if facts:
        for fact in BUILT_IN:
            click.echo(f"{fact.name:<22} {fact.type:<7} from {fact.phase.name.lower():<9} {fact.help}")
        return
    if name is not None:
        click.echo(_described(name, _get(registry, name)))
        return
    for known in registry.names():
        stage = _get(registry, known)
        click.echo(f"{known:<20} {stage.kind.value:<9} {_first_line(stage)}")


def _get(registry: Registry, name: str) -> type[Stage]:
    try:
        return registry.get(name)
    except StageError as error:
        fail(f"gateway: {error}")


def _default(row: SettingRow) -> str:
    return "required" if row.default == "(required)" else f"default {row.default}"


def _first_line(stage: type[Stage]) -> str:
    return (inspect.getdoc(stage) or "").partition("\n")[0]


def _described(name: str, stage: type[Stage]) -> str:
    module = inspect.getmodule(stage)
    lines = [f"{name}: {stage.kind.value}; asked in {' '.join(hook_names(stage))}", ""]
    lines += [(inspect.getdoc(module) if module is not None else "") or _first_line(stage), ""]
    short = stage.Settings.short_form
    if short:
        lines += [f"`{name}: value` is short for `{name}: {{{short}: value}}`.", ""]
    rows = settings_rows(stage.Settings)
    if rows:
        width = max(len(row.name) for row in rows)
        lines += [f"  {row.name:<{width}}  {row.type}, {_default(row)}: {row.description}" for row in rows]
    return "\n".join(lines)
