"""`gateway schema`: the shipped pipelines are valid by it, and what is wrong is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from gateway.cli import main

ROOT = Path(__file__).parents[3]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "integer": (int,),
    "number": (int, float), "null": (type(None),),
}  # fmt: skip
KNOWN = {
    "$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "deprecated", "description",
    "enum", "exclusiveMaximum", "exclusiveMinimum", "items", "maxItems", "maxLength", "maxProperties", "maximum",
    "minItems", "minLength", "minProperties", "minimum", "not", "oneOf", "pattern", "properties", "propertyNames", "required",
    "title", "type", "uniqueItems", "examples", "format",
}  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> dict[str, object]:
    result = CliRunner().invoke(main, ["schema"])
    assert result.exit_code == 0 and result.stderr == ""
    loaded = json.loads(result.stdout)
    assert isinstance(loaded, dict)
    return loaded


def wrong(value: object, rule: object, root: Mapping[str, object], place: str = "") -> Iterator[str]:
    """What is wrong by a schema: as much of JSON Schema 2020-12 as ours uses."""
    if not isinstance(rule, dict):
        if rule is False:
            yield f"{place}: not allowed"
        return
    assert rule.keys() <= KNOWN, f"{place}: this validator does not know {rule.keys() - KNOWN}"
    if "$ref" in rule:
        definitions = root["$defs"]
        assert isinstance(definitions, dict)
        yield from wrong(value, definitions[rule["$ref"].removeprefix("#/$defs/")], root, place)
    if "type" in rule:
        names = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
        if not any(isinstance(value, TYPES[name]) and (name == "boolean") >= isinstance(value, bool) for name in names):
            yield f"{place}: {value!r} is not {names}"
            return
    if "enum" in rule and value not in rule["enum"]:
        yield f"{place}: {value!r} is none of {rule['enum']}"
    if "const" in rule and value != rule["const"]:
        yield f"{place}: {value!r} is not {rule['const']!r}"
    if isinstance(value, str) and "pattern" in rule and not re.search(rule["pattern"], value):
        yield f"{place}: {value!r} does not match"
    for name in ("anyOf", "oneOf"):
        if name in rule and all(any(wrong(value, one, root, place)) for one in rule[name]):
            yield f"{place}: {value!r} fits nothing of {name}"
    if "not" in rule and not any(wrong(value, rule["not"], root, place)):
        yield f"{place}: {value!r} is excluded"
    if isinstance(value, list):
        if len(value) < rule.get("minItems", 0):
            yield f"{place}: too few"
        for index, item in enumerate(value):
            yield from wrong(item, rule.get("items"), root, f"{place}[{index}]")
    if isinstance(value, dict):
        yield from (f"{place}: {key} is missing" for key in rule.get("required", ()) if key not in value)
        for key, item in value.items():
            own = rule.get("properties", {}).get(key, rule.get("additionalProperties"))
            yield from wrong(item, own, root, f"{place}.{key}")


@pytest.mark.parametrize("path", sorted(ROOT.glob("pipelines/*.yaml")), ids=lambda path: path.name)
def test_the_shipped_pipelines_are_valid(schema: dict[str, object], path: Path) -> None:
    assert list(wrong(yaml.safe_load(path.read_text()), schema, schema)) == []


GOOD = {"listen": ["smtp://127.0.0.1:25"], "stages": ["splice"]}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"listen": [{"url": "smtp://127.0.0.1:25", "proxy_protocol": "required"}]},
        {"stages": [{"greeting_delay": "1s"}, {"connection_limit": {"per_client": 20}}, {"splice": {"pool": "mta"}}]},
        {"stages": [{"rate_limit": {"count": "messages", "limit": "100/hour", "mode": "10%", "id": "slow"}}, "splice"]},
        {"stages": [{"access": {"for": "session", "deny": ["192.0.2.0/24"]}}, "splice"]},
        {"stages": [{"require_tls": ["auth", "mail"]}, "splice"]},
        {"upstreams": {"mta": {"servers": ["10.0.0.5:25", {"url": "smtp://10.0.0.6", "weight": 2}], "reuse": "on"}}},
        {"limits": {"message_size": "10MiB", "command_timeout": "5m", "recipients": 10}},
        {"tables": {"one": ["a", "b"], "two": {"file": "list"}}},
        {"process": {"drain": "10s", "log": {"format": "text"}}},
        {"log": {"debug_clients": ["192.0.2.7"]}, "soft_bounce": True, "line_endings": "normalize"},
    ],
)
def test_what_the_gateway_takes_is_valid(schema: dict[str, object], change: dict[str, object]) -> None:
    assert list(wrong({**GOOD, **change}, schema, schema)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"listne": []},
        {"listen": []},
        {"listen": [{"name": "no url"}]},
        {"stages": ["splise"]},
        {"stages": [{"splice": {"pol": "mta"}}]},
        {"stages": [{"splice": {"mode": "sometimes"}}]},
        {"stages": [{"greeting_delay": "1s", "splice": None}]},
        {"upstreams": {"mta": {"servers": []}}},
        {"upstreams": {"mta": {"servers": ["10.0.0.5"], "tls": "maybe"}}},
        {"limits": {"recipients": "many"}},
        {"soft_bounce": "perhaps"},
    ],
)
def test_what_is_wrong_is_not(schema: dict[str, object], change: dict[str, object]) -> None:
    assert list(wrong({**GOOD, **change}, schema, schema))


def test_every_reference_leads_somewhere(schema: dict[str, object]) -> None:
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    assert set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema))) <= definitions.keys()
