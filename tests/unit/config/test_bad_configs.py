"""Each folder of tests/bad_configs is a pipeline file and exactly what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.load import load
from gateway.config.problems import ConfigError, Problem
from gateway.pipeline.compile import compile_pipeline
from gateway.pipeline.registry import Registry

CASES = Path(__file__).parents[2] / "bad_configs"
SECRET = "s3cret-value"


def check_file(path: Path) -> list[Problem]:
    """What is wrong with the file; as for `gateway check`, stages are looked at where the rest is right."""
    problems: list[Problem] = []
    try:
        loaded = load([path], {"AUTH_KEY": SECRET})
        for pipeline, document in loaded.pipelines:
            compile_pipeline(pipeline, document, Registry())
    except ConfigError as error:
        problems += error.problems
    return problems


@pytest.mark.parametrize("case", sorted(CASES.iterdir()), ids=lambda case: case.name)
def test_says_what_is_wrong(case: Path) -> None:
    said = [str(problem).replace(f"{case}/", "") for problem in check_file(case / "pipeline.yaml")]
    assert said == (case / "expected.txt").read_text().splitlines()
    assert SECRET not in "\n".join(said)
