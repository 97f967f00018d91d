"""`gateway schema`: the JSON schema of a pipeline file, with the settings of every installed stage."""

from __future__ import annotations

import json

import click

from gateway.config.models import Pipeline, Process, Reserved
from gateway.pipeline.reference import settings_schema
from gateway.pipeline.registry import Registry, StageError


@click.command()
def command() -> None:
    """Print the JSON schema of a pipeline file."""
    click.echo(json.dumps(schema(), indent=2))


def schema() -> dict[str, object]:
    """The schema: a pipeline's keys, and one object a stage."""
    registry = Registry()
    reserved = settings_schema(Reserved)
    entries: list[dict[str, object]] = [{"type": "string", "enum": registry.names()}]
    definitions: dict[str, object] = {}
    for name in registry.names():
        try:
            stage = registry.get(name)
        except StageError:
            continue
        settings = settings_schema(stage.Settings, definitions)
        properties = settings.get("properties")
        merged = {**(properties if isinstance(properties, dict) else {}), **reserved["properties"]}  # type: ignore[dict-item]
        settings["properties"] = merged
        allowed: list[dict[str, object]] = [settings]
        if stage.Settings.short_form:
            allowed.append({"not": {"type": "object"}})
        entries.append(
            {
                "type": "object",
                "properties": {name: {"anyOf": allowed}},
                "required": [name],
                "additionalProperties": False,
            }
        )
    result = settings_schema(Pipeline, definitions)
    pipeline_properties = result["properties"]
    assert isinstance(pipeline_properties, dict)
    pipeline_properties["stages"] = {"type": "array", "items": {"anyOf": entries}, "minItems": 1}
    pipeline_properties["process"] = settings_schema(Process, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result, "$defs": definitions}
