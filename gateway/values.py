"""The value types of pipeline files: durations, sizes, rates, networks, paths, expressions, secrets.

Each is an annotated type for pydantic models (the pipeline's own and the stages' settings) that parses what an
administrator writes, says exactly what is wrong with it and what to write instead, and describes itself in the
JSON schema for editors. A parser raises `NotA`, a ValueError that `problems.py` prints with its place.
"""

from __future__ import annotations

import ipaddress
import math
import os
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import (
    BeforeValidator,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from gateway.facts import Expression, FactType, PoolName

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class NotA(ValueError):
    """A value that does not fit its type.

    `kind` ("a rate") and `example` ("100/hour") are fixed for a type and show nothing of the value; `text` and
    `suggestion` may quote it. Where the value was expanded from a secret, only the former are printed.
    """

    def __init__(self, kind: str, example: str, text: str, suggestion: str | None = None) -> None:
        self.kind = kind
        self.example = example
        self.text = text
        self.suggestion = suggestion or f"write {example}"
        super().__init__(f"{text}; {self.suggestion}")


def shown(value: object) -> str:
    """A value as problems quote it: short, and without the content of lists and mappings."""
    match value:
        case None:
            return "an empty value"
        case bool():
            return str(value).lower()
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
        case int() | float():
            return str(value)[:60]
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {type(value).__name__}"


def _refused(value: object, kind: str, example: str, suggestion: str | None = None) -> NotA:
    return NotA(kind, example, f"{shown(value)} is not {kind}", suggestion)


KIND: Final = "x-kind"
"""The key of a JSON schema under which a value type says what documentation calls it."""

DEFAULT: Final = "x-default"
"""The key under which a setting says what documentation shows as its default."""


def json_schema(pattern: str, description: str, number: str | None = None, *, kind: str = "") -> dict[str, object]:
    """What editors are told of a type: the pattern of its texts, and "integer" or "number" if it may be one.

    `kind` is what documentation calls it; without it, what the description begins with ("A duration: ...").
    """
    # what ${...} will stand for is not known to an editor
    options: list[dict[str, object]] = [
        {"type": "string", "pattern": f"^(?:{pattern})$"},
        {"type": "string", "pattern": r"\$\{"},
    ]
    if number is not None:
        options.append({"type": number, "minimum": 0})
    kind = kind or description.partition(":")[0].removeprefix("A ")
    return {"anyOf": options, "description": description, KIND: kind}


def plain_schema(parse: Callable[[object], object]) -> CoreSchema:
    """The pydantic schema of a class with a parser of its own, written as text in JSON."""
    as_text = core_schema.to_string_ser_schema(when_used="json")
    return core_schema.no_info_plain_validator_function(parse, serialization=as_text)


# Durations, sizes, rates, shares

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PERIODS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h|d)?")
_LOOSE_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|milli|s|m|h|d)[a-z]*", re.IGNORECASE)
_BYTES = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
_SIZE = re.compile(r"(\d+)([kmg]?)(?:i?b)?", re.IGNORECASE)
_RATE = re.compile(r"(\d+)/(?:(second|minute|hour|day)|(\d+(?:ms|s|m|h|d)))")
_LOOSE_RATE = re.compile(r"(\d+)\s*(?:/|per|an?|every|in)\s*(\d*)\s*(s|m|h|d)[a-z]*", re.IGNORECASE)


def parse_duration(value: object) -> float:
    """Seconds of '250ms', '1s', '5m', '1h', '1d' or a bare number of seconds. Raises NotA."""
    kind, example = "a duration", "1s, 250ms, 5m, 1h or 1d"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and value >= 0:
            return float(value)
        raise _refused(value, kind, example)
    if not isinstance(value, str):
        raise _refused(value, kind, example)
    match = _DURATION.fullmatch(value)
    if match is not None:
        return float(match[1]) * _SECONDS[match[2] or "s"]
    loose = _LOOSE_DURATION.fullmatch(value.strip())
    if loose is not None:
        unit = "ms" if loose[2].lower() in ("ms", "milli") else loose[2].lower()
        raise _refused(value, kind, example, f"write {loose[1]}{unit}")
    raise _refused(value, kind, example)


def parse_size(value: object) -> int:
    """Octets of '64k', '10MiB', '1G' (k = 1024) or a whole number. Raises NotA."""
    kind, example = "a size", "64k, 10MiB or a number of octets"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        squeezed = value.replace(" ", "") if isinstance(value, str) else ""
        near = f"write {squeezed}" if squeezed != value and _SIZE.fullmatch(squeezed) else None
        raise _refused(value, kind, example, near)
    return int(match[1]) * _BYTES[match[2].lower()]


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `limit` events in `period` seconds."""

    limit: int
    period: float

    def __str__(self) -> str:
        for name, seconds in _PERIODS.items():
            if seconds == self.period:
                return f"{self.limit}/{name}"
        return f"{self.limit}/{format_duration(self.period)}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return plain_schema(parse_rate)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return json_schema(_RATE.pattern, "A rate: 100/hour, 30/minute, 5/10s.")


def format_duration(seconds: float) -> str:
    """The shortest spelling that `parse_duration` reads back."""
    for unit in ("d", "h", "m", "s"):
        if seconds >= _SECONDS[unit] and seconds % _SECONDS[unit] == 0:
            return f"{int(seconds / _SECONDS[unit])}{unit}"
    return f"{seconds * 1000:g}ms" if 0 < seconds < 1 else f"{seconds:g}s"


def parse_rate(value: object) -> Rate:
    """'30/minute', '100/hour', '5/10s'. Raises NotA."""
    kind, example = "a rate", "100/hour, 30/minute or 5/10s"
    if isinstance(value, Rate):
        return value
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        period = _PERIODS[match[2]] if match[2] else parse_duration(match[3])
        if int(match[1]) > 0 and period > 0:
            return Rate(int(match[1]), period)
        raise NotA(kind, example, f"{shown(value)} allows nothing", "write a limit and a period above 0")
    loose = _LOOSE_RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    if loose is None:
        raise _refused(value, kind, example)
    letter = loose[3].lower()
    unit = f"{loose[2]}{letter}" if loose[2] else next(name for name in _PERIODS if name.startswith(letter))
    raise _refused(value, kind, example, f"write {loose[1]}/{unit}")


def parse_percent(value: object) -> float:
    """'25%' is 25.0. Raises NotA."""
    kind, example = "a share", "25%"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", value) if isinstance(value, str) else None
    if match is None:
        bare = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 100
        raise _refused(value, kind, example, f"write {value}%" if bare else None)
    if float(match[1]) > 100:
        raise NotA(kind, example, f"{shown(value)} is more than all", "write 100% or less")
    return float(match[1])


# Before, not plain, validators: what a setting adds (`Field(gt=0)`) is checked behind them.
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        json_schema(_DURATION.pattern, "A duration: 1s, 250ms, 5m, 1h, 1d; a bare number is seconds.", "number")
    ),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        json_schema(r"\d+[kKmMgG]?([iI]?[bB])?", "A size: 64k, 10MiB, 1G (k = 1024); a number is octets.", "integer")
    ),
]
Percent = Annotated[
    float, BeforeValidator(parse_percent), WithJsonSchema(json_schema(r"\d+(\.\d+)?%", "A share: 25%."))
]


# Networks and addresses

_V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def parse_cidr(value: object) -> Network:
    """A network such as 10.0.0.0/8 or 2001:db8::/32; a bare address is itself (/32, /128). Raises NotA.

    IPv4 networks written as ::ffff:a.b.c.d come back as IPv4, as client addresses do.
    """
    kind, example = "a network", "10.0.0.0/8, 2001:db8::/32 or an address"
    if isinstance(value, (ipaddress.IPv4Network, ipaddress.IPv6Network)):
        return value
    if not isinstance(value, str):
        raise _refused(value, kind, example)
    try:
        network = ipaddress.ip_network(value.strip("[]"), strict=False)
    except ValueError:
        raise _refused(value, kind, example) from None
    address = value.strip("[]").partition("/")[0]
    if ipaddress.ip_address(address) != network.network_address:
        text = f"{shown(value)} has bits set behind its prefix"
        raise NotA(kind, example, text, f"write {network}, or {address} for the one address")
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_V4_MAPPED):
        packed = int(network.network_address) & 0xFFFFFFFF
        return ipaddress.IPv4Network((packed, network.prefixlen - 96))
    return network


def _split(value: object) -> object:
    """'a, b' is a list of two, for lists that come from one variable."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


Cidr = Annotated[
    Network,
    PlainValidator(parse_cidr),
    PlainSerializer(str, when_used="json"),
    WithJsonSchema(json_schema(r"[0-9A-Fa-f:.]+(/\d{1,3})?", "A network: 10.0.0.0/8, 2001:db8::/32, or one address.")),
]
CidrList = Annotated[tuple[Cidr, ...], BeforeValidator(_split)]


# Paths, expressions, secrets, names


def parse_path(value: object, info: ValidationInfo) -> Path:
    """An absolute path; relative ones begin at the configuration file's folder (context `folder`). Raises NotA."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise _refused(value, "a path", "a path, relative to this file")
    context = info.context if isinstance(info.context, dict) else {}
    return Path(os.path.abspath(Path(context.get("folder", ".")) / Path(value).expanduser()))


def _own_account() -> str:
    """Who this process is: root gives its rights up before it reads what stages name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user id {os.geteuid()}"


def parse_file(value: object, info: ValidationInfo) -> Path:
    """The absolute path of a file that exists and can be read. Raises NotA."""
    path = parse_path(value, info)
    kind, example = "a file that can be read", "the path of a file, relative to this file"
    if not path.exists():
        advice = "write its path relative to this file" if not Path(str(value)).is_absolute() else "check the path"
        raise NotA(kind, example, f"there is no file {shown(str(value))}", advice)
    if not path.is_file():
        raise NotA(kind, example, f"{shown(str(value))} is not a file", "write the path of a file")
    if not os.access(path, os.R_OK):
        raise NotA(kind, example, f"{shown(str(value))} cannot be read by {_own_account()}", "check its permissions")
    return path


_PATH_SCHEMA = WithJsonSchema(
    {"type": "string", "description": "A path, relative to this file's folder.", KIND: "path"}
)
PathValue = Annotated[Path, PlainValidator(parse_path), PlainSerializer(str, when_used="json"), _PATH_SCHEMA]
ExistingFile = Annotated[Path, PlainValidator(parse_file), PlainSerializer(str, when_used="json"), _PATH_SCHEMA]


def _expression(value: object, result: FactType) -> Expression:
    if isinstance(value, Expression):
        return value
    if isinstance(value, bool):
        value = str(value).lower()
    if not isinstance(value, str) or not value.strip():
        raise _refused(value, "an expression", """an expression in quotes, such as '!auth.trusted'""")
    return Expression(value, result)


def _condition(value: object) -> Expression:
    return _expression(value, "bool")


def _text_expression(value: object) -> Expression:
    return _expression(value, "string")


_EXPRESSION_AS_TEXT = PlainSerializer(lambda expression: expression.text, return_type=str, when_used="json")
Condition = Annotated[
    Expression,
    PlainValidator(_condition),
    _EXPRESSION_AS_TEXT,
    WithJsonSchema(
        {"type": ["string", "boolean"], "description": "A CEL expression that is true or false.", KIND: "condition"}
    ),
]
TextExpression = Annotated[
    Expression,
    PlainValidator(_text_expression),
    _EXPRESSION_AS_TEXT,
    WithJsonSchema(
        {"type": "string", "description": "A CEL expression that gives a text, such as auth.user.", KIND: "expression"}
    ),
]


class Secret(str):
    """A text that its `repr` does not show: a password, a token. `reveal()` gives the plain text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'******'"

    def reveal(self) -> str:
        """The plain text."""
        return str.__str__(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        masked = core_schema.plain_serializer_function_ser_schema(lambda value: "******")
        return core_schema.no_info_plain_validator_function(_secret, serialization=masked)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "description": "A secret: write ${NAME} or ${file:path}.", KIND: "secret"}


def _secret(value: object) -> Secret:
    if isinstance(value, str):
        return Secret(value)
    # a number here is a password without quotes: it must not be printed
    raise NotA("a text", "it in quotes, or ${NAME}", "the secret is not a text")


_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"


def _identifier(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(_IDENTIFIER, value):
        return value
    raise _refused(value, "a name", "letters, digits and _, such as first_limit")


Identifier = Annotated[
    str, PlainValidator(_identifier), WithJsonSchema({"type": "string", "pattern": f"^{_IDENTIFIER}$", KIND: "name"})
]


def _pool(value: object) -> PoolName:
    if isinstance(value, str) and value:
        return PoolName(value)
    raise _refused(value, "the name of a pool", "a name below `upstreams`")


PoolReference = Annotated[
    PoolName,
    PlainValidator(_pool),
    WithJsonSchema({"type": "string", "description": "A pool: a name below `upstreams`.", KIND: "pool"}),
]
