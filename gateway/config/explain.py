"""pydantic's errors as problems in house wording, each at its place in the file.

Unknown keys point at the key, everything else at the value. What pydantic says itself is never printed. A value
that was expanded from a variable or a file is quoted as the file writes it, never as what it holds.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ErrorType

from gateway.config.documents import Document
from gateway.config.problems import Loc, Problem, did_you_mean, written_loc
from gateway.values import NotA, shown

# What a value should have been, by pydantic's type of error. `{x}` is from the error's context.
_KINDS = {
    "a text": "string_type string_unicode string_sub_type",
    "true or false": "bool_type bool_parsing",
    "a whole number": "int_type int_parsing int_parsing_size int_from_float",
    "a number": "float_type float_parsing finite_number decimal_type decimal_parsing fraction_type fraction_parsing "
    "complex_type complex_str_parsing",
    "a list": "list_type tuple_type set_type frozen_set_type iterable_type iteration_error deque_type "
    "named_tuple_type arguments_type",
    "a mapping": "dict_type mapping_type model_type model_attributes_type dataclass_type dataclass_exact_type "
    "frozen_dict_type ordered_dict_type counter_type json_type",
    "bytes": "bytes_type bytes_invalid_encoding",
    "a date": "date_type date_parsing date_from_datetime_parsing date_from_datetime_inexact",
    "a time": "time_type time_parsing",
    "a date and time": "datetime_type datetime_parsing datetime_object_invalid datetime_from_date_parsing",
    "a period of time": "time_delta_type time_delta_parsing",
    "a URL": "url_type url_parsing url_syntax_violation",
    "a UUID": "uuid_type uuid_parsing uuid_version",
    "JSON": "json_invalid",
    "empty": "none_required",
}
_PYDANTIC = frozenset(typing.get_args(ErrorType)) - {"value_error", "assertion_error"}
_KIND_OF = {error: kind for kind, errors in _KINDS.items() for error in errors.split()}
_ADVICE = {
    "a text": "write a text",
    "true or false": "write true or false",
    "a whole number": "write digits only",
    "a number": "write a number such as 0.5",
    "a list": "write [one, two]",
    "a mapping": "write `key: value` pairs",
    "empty": "remove the value",
}

_TEXTS = {
    "greater_than": ("{v} is too small", "write more than {gt}"),
    "greater_than_equal": ("{v} is too small", "write {ge} or more"),
    "less_than": ("{v} is too large", "write less than {lt}"),
    "less_than_equal": ("{v} is too large", "write {le} or less"),
    "multiple_of": ("{v} does not fit", "write a multiple of {multiple_of}"),
    "too_short": ("has too few entries", "write at least {min_length}"),
    "too_long": ("has too many entries", "write at most {max_length}"),
    "string_too_short": ("{v} is too short", "write at least {min_length} characters"),
    "string_too_long": ("{v} is too long", "write at most {max_length} characters"),
    "bytes_too_short": ("{v} is too short", "write at least {min_length} octets"),
    "bytes_too_long": ("{v} is too long", "write at most {max_length} octets"),
    "string_pattern_mismatch": ("{v} does not have the right form", "it has to match {pattern}"),
    "string_not_ascii": ("{v} is not ASCII", "write ASCII characters only"),
    "url_too_long": ("{v} is too long", "write at most {max_length} characters"),
    "url_scheme": ("{v} has a scheme that does not fit", "write {expected_schemes}"),
    "date_past": ("{v} is not in the past", "write an earlier date"),
    "date_future": ("{v} is not in the future", "write a later date"),
    "datetime_past": ("{v} is not in the past", "write an earlier time"),
    "datetime_future": ("{v} is not in the future", "write a later time"),
    "timezone_naive": ("{v} has a time zone", "write it without"),
    "timezone_aware": ("{v} has no time zone", "write it with one"),
    "timezone_offset": ("{v} has the wrong time zone", "write another one"),
    "decimal_max_digits": ("{v} has too many digits", "write at most {max_digits}"),
    "decimal_max_places": ("{v} has too many decimal places", "write at most {decimal_places}"),
    "decimal_whole_digits": ("{v} has too many digits", "write at most {whole_digits} before the point"),
    "set_item_not_hashable": ("{v} cannot stand in a set", "write a plain value"),
    "union_tag_invalid": ("{tag!r} is not known", "write {expected_tags}"),
    "union_tag_not_found": ("the setting {discriminator} is missing", "add it"),
}


@dataclass(frozen=True, slots=True)
class _Fault:
    """One of pydantic's errors, placed: `at` is the part of its loc in the document, `branch` the union member."""

    error: ErrorDetails
    at: Loc
    tail: Loc
    fork: Loc | None
    branch: str


def problems_from(
    error: ValidationError, document: Document, prefix: Loc = (), model: type[BaseModel] | None = None
) -> list[Problem]:
    """The problems behind a failed validation, sorted by place.

    `prefix` is where in the document the validated data stands, `model` what it was validated against (for
    "did you mean"). Values that could not be expanded already have their problem and get no second one.
    """
    errors = (details for details in error.errors(include_url=False) if not _is_echo(details))
    faults = [_placed(details, document, prefix) for details in errors]
    problems: list[Problem] = []
    for group in _by_fork(fault for fault in faults if not _already_told(fault.at, document)):
        chosen = _right_branch(group)
        if len({fault.branch for fault in chosen}) > 1:
            problems.append(_neither(chosen, document, prefix))
        else:
            problems += [_problem(fault, document, prefix, model) for fault in chosen]
    return sorted(dict.fromkeys(problems))


def _is_echo(error: ErrorDetails) -> bool:
    """pydantic counts only the valid entries of a list: one that is long enough has problems of its own already."""
    value = error["input"]
    return error["type"] == "too_short" and isinstance(value, list) and len(value) >= error["ctx"]["min_length"]


def _already_told(at: Loc, document: Document) -> bool:
    return any(at[: len(faulty)] == faulty for faulty in document.faulty if faulty)


def _placed(error: ErrorDetails, document: Document, prefix: Loc) -> _Fault:
    """Sort an error's steps into those of the document, a missing name at the end, and names of union members."""
    base = document.walk(prefix)
    at, fork, branch = base, None, ""
    steps = error["loc"]
    missing = error["type"] == "missing"
    for step in steps[:-1] if missing else steps:
        further = document.walk((*at, step))
        if further != at:
            at = further
        elif fork is None and isinstance(step, str) and step != "[key]":
            fork, branch = at, step
    tail = at[len(base) :]
    return _Fault(error, at, (*tail, steps[-1]) if missing and steps else tail, fork, branch)


def _by_fork(faults: Iterable[_Fault]) -> list[list[_Fault]]:
    """Errors of the members of one union together, every other error alone."""
    groups: dict[object, list[_Fault]] = {}
    for index, fault in enumerate(faults):
        groups.setdefault(index if fault.fork is None else fault.fork, []).append(fault)
    return list(groups.values())


def _right_branch(group: list[_Fault]) -> list[_Fault]:
    """Of a union's members the one that was meant: it takes a value of this shape and failed further inside."""
    fork = group[0].fork
    if fork is None or len({fault.branch for fault in group}) == 1:
        return group
    wrong_shape = {fault.branch for fault in group if fault.at == fork and _is_shape_error(fault.error)}
    right = [fault for fault in group if fault.branch not in wrong_shape]
    if right:
        return right
    value = group[0].error["input"]
    containers = {fault.branch for fault in group if _KIND_OF.get(fault.error["type"]) in ("a list", "a mapping")}
    if not isinstance(value, (list, dict)):
        group = [fault for fault in group if fault.branch not in containers] or group
    return group


def _is_shape_error(error: ErrorDetails) -> bool:
    """The value is of the wrong kind altogether: a text for a list, a list for a rate."""
    if error["type"] in _KIND_OF:
        return True
    cause = error.get("ctx", {}).get("error")
    return isinstance(cause, NotA) and isinstance(error["input"], (list, dict))


def _neither(faults: list[_Fault], document: Document, prefix: Loc) -> Problem:
    """Several kinds of value would do, and this is none of them."""
    kinds: list[str] = []
    advice = ""
    for fault in faults:
        kind, suggestion = _kind(fault.error)
        kinds.append(kind)
        advice = advice or suggestion
    named = " or ".join(dict.fromkeys(kind for kind in kinds if kind)) or "a value that fits"
    fault = faults[0]
    return Problem(
        document.place(fault.at),
        written_loc((*prefix, *fault.tail)),
        f"{_quoted(fault, document)} is not {named}",
        advice,
    )


def _kind(error: ErrorDetails) -> tuple[str, str]:
    """What the value should have been, and how that is written."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, NotA):
        return cause.kind, f"write {cause.example}"
    if error["type"] in ("literal_error", "enum"):
        return f"one of {_choices(error)}", ""
    kind = _KIND_OF.get(error["type"], "")
    return kind, _ADVICE.get(kind, "")


def _choices(error: ErrorDetails) -> str:
    """`'a', 'b' or 'c'` as a, b or c."""
    return str(error.get("ctx", {}).get("expected", "")).replace("'", "")


def _problem(fault: _Fault, document: Document, prefix: Loc, model: type[BaseModel] | None) -> Problem:
    error, where = fault.error, (*prefix, *fault.tail)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument") and error["loc"]:
        name = str(error["loc"][-1])
        known = sorted(_settings_at(model, error["loc"][:-1])) if model is not None else []
        advice = did_you_mean(name, known) or (f"known: {', '.join(known)}" if known else "remove it")
        parent = where[:-1] if where[-1:] == (name,) else where
        return Problem(document.place(fault.at, key=True), written_loc(parent), f"unknown setting {name!r}", advice)
    if error["type"].startswith("missing"):
        name = str(error["loc"][-1]) if error["loc"] else "it"
        return Problem(document.place(fault.at), written_loc(where), "is missing", f"add `{name}: ...`")
    in_key = error["loc"][-1:] == ("[key]",)
    text, suggestion = _worded(fault, document)
    return Problem(document.place(fault.at, key=in_key), written_loc(where), text, suggestion)


def _quoted(fault: _Fault, document: Document) -> str:
    """The value as it may be printed."""
    given, written = fault.error["input"], document.value(fault.at)
    if isinstance(given, (list, dict)) or isinstance(written, (list, dict)):
        return shown(given)
    expanded = document.expanded(fault.at)
    return shown(expanded[0][1] if expanded else written)


def _worded(fault: _Fault, document: Document) -> tuple[str, str]:
    """What is wrong and what to write."""
    error = fault.error
    context: Mapping[str, object] = error.get("ctx", {})
    cause = context.get("error")
    secret = document.expanded(fault.at)
    value = _quoted(fault, document)
    if isinstance(cause, NotA):
        if secret:
            return f"{value} is not {cause.kind}", f"write {cause.example}"
        return cause.text, cause.suggestion
    if error["type"] in _TEXTS:
        text, suggestion = _TEXTS[error["type"]]
        unit = "s" if _with_unit(document.value(fault.at)) else ""  # a bound of durations is in seconds
        words = {name: f"{word:g}{unit}" if isinstance(word, float) else word for name, word in context.items()}
        text, suggestion = text.format(v=value, **words), suggestion.format(v=value, **words)
        return _vague(value) if _repeats(text + suggestion, secret) else (text, suggestion)
    if error["type"] in ("literal_error", "enum"):
        choices = _choices(error)
        near = did_you_mean(str(error["input"]), choices.replace(" or ", ", ").split(", ")) if not secret else ""
        return f"{value} is not one of the choices", near or f"write {choices}"
    if error["type"] in _KIND_OF:
        kind = _KIND_OF[error["type"]]
        if kind == "a text" and isinstance(error["input"], (int, float)):
            return f"{value} is not a text", f"put it in quotes: '{value}'"
        return f"{value} is not {kind}", _ADVICE.get(kind, "write another one")
    if error["type"] in _PYDANTIC:
        return _vague(value)
    # a stage's own words
    own = str(cause) if cause is not None else error["msg"]
    if _repeats(own, secret):
        return _vague(value)
    text, _, suggestion = own.partition("; ")
    return text or f"{value} does not fit", suggestion


def _with_unit(written: object) -> bool:
    """Whether it is a duration such as 1h, not a bare number."""
    return isinstance(written, str) and re.fullmatch(r"[\d.]+(ms|s|m|h|d)", written) is not None


def _vague(value: str) -> tuple[str, str]:
    """What can be said where more could give a secret away, or nothing more is known."""
    return f"{value} does not fit", "write another value"


def _repeats(words: str, expanded: list[tuple[str, str]]) -> bool:
    """Whether four characters in a row of an expanded value stand in the words (or all of a shorter one)."""
    words = words.casefold()
    for value, _ in expanded:
        value = value.casefold()
        size = min(4, len(value))
        if size and any(value[i : i + size] in words for i in range(len(value) - size + 1)):
            return True
    return False


def _settings_at(kind: object, loc: tuple[int | str, ...]) -> set[str]:
    """The names of the settings that the model behind `loc` knows."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        names = {field.alias or name: field for name, field in kind.model_fields.items()}
        if not loc:
            return set(names)
        field = names.get(str(loc[0]))
        # a union member's name is a step as well
        return _settings_at(field.annotation, loc[1:]) if field is not None else _settings_at(kind, loc[1:])
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _settings_at(arguments[0], loc)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_settings_at(argument, loc) for argument in arguments))
    if arguments and loc:
        # the items of a list, the values of a mapping; a step over them, or over a union member's name
        return _settings_at(_item(arguments), loc[1:])
    return set()


def _item(arguments: tuple[object, ...]) -> object:
    return next(argument for argument in reversed(arguments) if argument is not Ellipsis)
