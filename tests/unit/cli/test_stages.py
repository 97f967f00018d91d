"""`gateway stages`: what is installed, and what one reads of a stage."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from click.testing import Result

from gateway.pipeline.registry import Registry

Command = Callable[..., Result]


def test_every_installed_stage_with_its_kind_and_one_line(gateway: Command) -> None:
    result = gateway("stages")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [line.split(None, 2) for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == Registry().names()
    assert {row[1] for row in rows} == {"guard", "check", "plumbing"}
    assert all(row[2].endswith(".") for row in rows)


def test_one_stage(gateway: Command) -> None:
    result = gateway("stages", "rate_limit")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "rate_limit: guard; asked in connect helo auth mail rcpt"
    settings = [line for line in lines if re.match(r"  (count|per|limit|exempt) ", line)]
    assert len(settings) == 4
    assert "connections | messages | recipients | auth_failures | bytes, required: " in settings[0]
    assert "default client.address: " in settings[1] and "default none: " in settings[3]


@pytest.mark.parametrize("name", Registry().names())
def test_each_setting_has_type_default_and_description(gateway: Command, name: str) -> None:
    result = gateway("stages", name)
    assert result.exit_code == 0
    settings = Registry().get(name).Settings
    for field in settings.model_fields.values():
        assert field.description
    shown = [line for line in result.stdout.splitlines() if re.match(r"  \w+ +\S.*, (required|default .+): \S", line)]
    assert len(shown) == len(settings.model_fields)
    short = settings.short_form
    assert (f"`{name}: value` is short for `{name}: {{{short}: value}}`" in result.stdout) == bool(short)


def test_an_unknown_stage(gateway: Command) -> None:
    result = gateway("stages", "ratelimit")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "gateway: unknown stage 'ratelimit'; did you mean 'rate_limit'?\n"


def test_facts(gateway: Command) -> None:
    result = gateway("stages", "--facts")
    assert result.exit_code == 0
    assert re.search(r"^client\.address +string +from connect +\S", result.stdout, re.MULTILINE)
    assert re.search(r"^rcpt\.domain +string +from rcpt +\S", result.stdout, re.MULTILINE)
