"""What a settings model says of itself, for `gateway stages` and the reference pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from pydantic_core import PydanticUndefined

from gateway.values import DEFAULT, KIND, format_duration


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One setting: its name, its type in words, its default as one writes it, what it does."""

    name: str
    type: str
    default: str
    description: str


def settings_rows(model: type[BaseModel]) -> list[SettingRow]:
    """The settings of a model in the order of its fields."""
    schema = _schema(model)
    properties, definitions = schema.get("properties", {}), schema.get("$defs", {})
    assert isinstance(properties, Mapping) and isinstance(definitions, Mapping)
    rows = []
    for attribute, field in model.model_fields.items():
        name = field.alias or attribute
        if name not in properties:
            continue  # of a later version
        schema = properties[name]
        default = field.default
        if default is PydanticUndefined and DEFAULT not in schema:
            default = field.default_factory() if field.default_factory is not None else PydanticUndefined  # type: ignore[call-arg]
        kind = _type_words(schema, definitions)
        written = str(schema[DEFAULT]) if DEFAULT in schema else _shown(default, kind)
        rows.append(SettingRow(name, kind, written, field.description or schema.get("description", "")))
    return rows


class _Lenient(GenerateJsonSchema):
    """Types of our own without a schema are described, not refused."""

    ignored_warning_kinds = {"non-serializable-default", "skipped-choice"}  # noqa: RUF012

    def handle_invalid_for_json_schema(self, schema: object, error_info: str) -> dict[str, object]:
        return {"description": "text"}


def _schema(model: type[BaseModel], mode: JsonSchemaMode = "validation") -> dict[str, object]:
    return model.model_json_schema(mode=mode, schema_generator=_Lenient)


_PLAIN = {"object": "mapping", "string": "text", "integer": "number", "boolean": "true or false"}


def _type_words(schema: Mapping[str, object], definitions: Mapping[str, object] = {}) -> str:
    if KIND in schema:
        return str(schema[KIND])
    options = schema.get("anyOf")
    if isinstance(options, list):
        words = [_type_words(option, definitions) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        target = definitions.get(name)
        return _type_words(target, definitions) if isinstance(target, Mapping) and "enum" in target else "mapping"
    if "enum" in schema:
        return " | ".join(str(item) for item in schema["enum"])  # type: ignore[attr-defined]
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items")
        return _plural(_type_words(items, definitions)) if isinstance(items, Mapping) and items else "list"
    below = schema.get("additionalProperties")
    if kind == "object" and isinstance(below, Mapping):
        return f"mapping of name to {_type_words(below, definitions)}"
    return _PLAIN.get(str(kind), str(kind or "text"))


def _plural(kind: str) -> str:
    return f"list of {kind}" if " " in kind else f"list of {kind}s"


def _shown(default: object, kind: str = "") -> str:
    """The default as one would write it."""
    if default is PydanticUndefined:
        return "(required)"
    if default is None or default == () or default == "" or default == {}:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (list, tuple, frozenset, set)):
        items = [_shown(item) for item in default]
        return "[" + ", ".join(items if isinstance(default, (list, tuple)) else sorted(items)) + "]"
    if isinstance(default, BaseModel):
        return "see below"
    if isinstance(default, float) and kind == "duration":
        return format_duration(default)
    if isinstance(default, int) and kind == "size":
        return _size(default)
    text = getattr(default, "text", default)
    return f"{text:g}" if isinstance(text, float) else str(text)


def _size(octets: int) -> str:
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if octets and octets % (1 << bits) == 0:
            return f"{octets >> bits}{unit}"
    return str(octets)


def settings_schema(model: type[BaseModel], definitions: dict[str, object] | None = None) -> dict[str, object]:
    """The JSON schema of a model; its `$defs` go into `definitions` where given."""
    schema = _schema(model)
    defs = schema.pop("$defs", {})
    if definitions is not None and isinstance(defs, dict):
        definitions.update(defs)
    return schema
