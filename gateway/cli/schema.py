"""`gateway schema`: the JSON schema of a pipeline file, with the settings of every installed stage."""

from __future__ import annotations

import json

import click

from gateway.config.models import Pipeline, Reserved
from gateway.config.process import Process
from gateway.pipeline.reference import settings_schema
from gateway.pipeline.registry import Registry, StageError

SHORT_FORMS: dict[str, dict[str, object]] = {
    "Listener": {"type": "string"},
    "Server": {"type": "string"},
    "Table": {"type": "array", "items": {"type": "string"}},
    "Reuse": {"enum": ["on", "off", True, False]},
}
"""What may stand for a whole mapping: `- smtp://10.0.0.5` for `- {url: smtp://10.0.0.5}`, and the like."""


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
    for name, short in SHORT_FORMS.items():
        definitions[name] = {"anyOf": [definitions[name], short]}
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **result, "$defs": definitions}
    return {key: _for_editors(value) for key, value in whole.items()}


def _for_editors(schema: object) -> object:
    """The same without the notes that are for our own reference pages (`x-...`)."""
    match schema:
        case dict():
            return {key: _for_editors(value) for key, value in schema.items() if not key.startswith("x-")}
        case list():
            return [_for_editors(item) for item in schema]
    return schema
