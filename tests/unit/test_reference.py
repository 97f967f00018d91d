"""The reference in docs/reference is what the code says, and says something about everything."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from gateway.config import models, process
from gateway.limits import Limits
from gateway.pipeline.reference import settings_rows
from gateway.pipeline.registry import Registry
from scripts import metrics_reference, reference


@pytest.mark.parametrize("name", reference.PAGES)
def test_what_is_committed_is_current(name: str) -> None:
    written = (reference.FOLDER / name).read_text()
    assert written == reference.PAGES[name](), "run `make docs`"


def test_the_metrics_that_are_committed_are_current() -> None:
    assert metrics_reference.PAGE.read_text() == metrics_reference.metrics(), "run `make docs`"


def test_nothing_else_is_there() -> None:
    assert {path.name for path in reference.FOLDER.iterdir()} == set(reference.PAGES)


@pytest.mark.parametrize("name", reference.built_in())
def test_stages_describe_themselves(name: str) -> None:
    stage = Registry().get(name)
    for model in (stage.Settings, *reference.nested(stage.Settings)):
        assert model.__doc__
        for row in settings_rows(model):
            assert row.description.strip(), f"{model.__name__}.{row.name} has no description"
            assert "gateway." not in row.default and "(" not in row.default.replace("(required)", "")
    page = reference.stages()
    assert f"\n## {name}\n" in page


@pytest.mark.parametrize(
    "model", [*(model for _, _, model in reference.SECTIONS), models.Reserved, Limits], ids=lambda model: model.__name__
)
def test_keys_of_a_pipeline_are_described(model: type[BaseModel]) -> None:
    for row in settings_rows(model):
        assert row.description.strip(), f"{model.__name__}.{row.name} has no description"


def test_every_model_of_a_pipeline_has_a_section() -> None:
    found = {model.__name__ for top in (models.Pipeline, process.Process) for model in reference.nested(top)}
    assert found <= {model.__name__ for _, _, model in reference.SECTIONS}
