"""The guide to writing a stage works: its code runs, its tests pass, its files load, its excerpts are excerpts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import Stage
from gateway.testing.gateway import compiled

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "stage-package"
GUIDE = (ROOT / "docs" / "writing-a-stage.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


def ran() -> dict[str, Any]:
    """What all Python blocks define, run in their order as one module."""
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks("python"):
        exec(compile(block, "writing-a-stage.md", "exec", dont_inherit=True), names)
    return names


NAMES = ran()
STAGES = {
    re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): value
    for name, value in NAMES.items()
    if isinstance(value, type) and issubclass(value, Stage) and value is not Stage
}
TESTS = {name: value for name, value in NAMES.items() if name.startswith("test_")}


def cases() -> list[Any]:
    """Each test of the guide with each of its parameters."""
    found = []
    for name, test in TESTS.items():
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        for values in marks[0].args[1] if marks else [()]:
            found.append(pytest.param(test, values, id=f"{name}-{'-'.join(map(str, values))}"))
    return found


def test_it_has_stages_and_tests_for_them() -> None:
    assert set(STAGES) == {"small_messages", "slow_guessers", "greylist", "forbidden_words", "footer"}
    assert len(TESTS) >= len(STAGES)


@pytest.mark.anyio
@pytest.mark.parametrize(("test", "values"), cases())
async def test_its_tests_pass(test: Callable[..., Any], values: tuple[object, ...]) -> None:
    result = test(*values)
    if inspect.isawaitable(result):
        await result


def test_its_pipeline_files_load(tmp_path: Path) -> None:
    whole, *parts = [yaml.safe_load(block) for block in blocks("yaml")]
    assert compiled(whole, tmp_path, STAGES).rows[0].stage == "small_messages"
    packaged = [block for block in blocks("yaml") if "quiet_hours" in block]
    assert len(packaged) == len(parts) == 1
    readme = re.findall(r"```yaml\n(.*?)```", (PACKAGE / "README.md").read_text(), re.DOTALL)
    assert packaged == readme


def test_its_excerpts_are_of_the_example_package() -> None:
    for block in blocks("toml"):
        assert block in (PACKAGE / "pyproject.toml").read_text()
