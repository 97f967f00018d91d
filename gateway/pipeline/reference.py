"""What a settings model says of itself, for `gateway stages` and the reference pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from pydantic_core import PydanticUndefined


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One setting: its name, its type in words, its default as one writes it, what it does."""

    name: str
    type: str
    default: str
    description: str


def settings_rows(model: type[BaseModel]) -> list[SettingRow]:
    """The settings of a model in the order of its fields."""
    properties = _schema(model).get("properties", {})
    rows = []
    for attribute, field in model.model_fields.items():
        name = field.alias or attribute
        schema = properties.get(name, {}) if isinstance(properties, Mapping) else {}
        default = field.default
        if default is PydanticUndefined:
            default = field.default_factory() if field.default_factory is not None else PydanticUndefined  # type: ignore[call-arg]
        rows.append(
            SettingRow(name, _type_words(schema), _shown(default), field.description or schema.get("description", ""))
        )
    return rows


class _Lenient(GenerateJsonSchema):
    """Types of our own without a schema are described, not refused."""

    ignored_warning_kinds = {"non-serializable-default", "skipped-choice"}  # noqa: RUF012

    def handle_invalid_for_json_schema(self, schema: object, error_info: str) -> dict[str, object]:
        return {"description": "text"}


def _schema(model: type[BaseModel], mode: JsonSchemaMode = "validation") -> dict[str, object]:
    return model.model_json_schema(mode=mode, schema_generator=_Lenient)


def _type_words(schema: Mapping[str, object]) -> str:
    options = schema.get("anyOf")
    if isinstance(options, list):
        return " or ".join(dict.fromkeys(_type_words(option) for option in options if option.get("type") != "null"))
    if "enum" in schema:
        return " | ".join(str(item) for item in schema["enum"])  # type: ignore[attr-defined]
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items")
        return f"list of {_type_words(items)}" if isinstance(items, Mapping) and items else "list"
    return {"object": "mapping", "string": "text", "integer": "number", "boolean": "true or false"}.get(
        str(kind), str(kind or "text")
    )


def _shown(default: object) -> str:
    if default is PydanticUndefined:
        return "(required)"
    if default is None or default == () or default == "":
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (list, tuple, frozenset, set)):
        return "[" + ", ".join(_shown(item) for item in default) + "]"
    if isinstance(default, BaseModel):
        return "see below"
    text = getattr(default, "text", default)
    return f"{text:g}" if isinstance(text, float) else str(text)


def settings_schema(model: type[BaseModel], definitions: dict[str, object] | None = None) -> dict[str, object]:
    """The JSON schema of a model; its `$defs` go into `definitions` where given."""
    schema = _schema(model)
    defs = schema.pop("$defs", {})
    if definitions is not None and isinstance(defs, dict):
        definitions.update(defs)
    return schema
