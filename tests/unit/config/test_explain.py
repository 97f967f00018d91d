"""pydantic's errors in house wording, at the right place, without secrets."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ErrorType

from gateway.config import explain
from gateway.config.documents import parse
from gateway.config.explain import problems_from
from gateway.values import CidrList, Duration, Rate


def _short(value: str) -> str:
    if len(value) > 20:
        raise ValueError(f"{value!r} is too long a tale; tell less")
    return value


class Rule(BaseModel):
    model_config = ConfigDict(extra="forbid")
    match: str
    to: str = Field("", alias="for")


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    limit: Rate | list[Rate] = Rate(1, 1.0)
    mixed: int | list[int] | Rule = 1
    either: Rate | Duration = 1.0
    keep: Duration = Field(1.0, le=60)
    rules: list[Rule] | None = None
    named: dict[str, Rule] = Field(default_factory=dict)
    networks: CidrList = ()
    count: Literal["messages", "recipients"] = "messages"
    tale: Annotated[str, AfterValidator(_short)] = ""
    code: Annotated[int, Field(ge=400, le=599, multiple_of=1)] = 450
    pattern: str = Field("", pattern="^[a-z]*$", min_length=0, max_length=30)
    custom: str = ""
    both: bool = False

    @field_validator("custom")
    @classmethod
    def _custom(cls, value: str) -> str:
        if value == "assert":
            raise AssertionError("is asserted")
        raise PydanticCustomError("mine", "has {n} faults; mend {n}", {"n": 2})

    @model_validator(mode="after")
    def _whole(self) -> Settings:
        if self.both:
            raise ValueError("these do not go together")
        return self


def said(settings: str, environment: dict[str, str] | None = None) -> list[str]:
    """Problems of settings that stand in the second stage of a file."""
    text = "stages:\n  - first\n  - test: " + settings + "\n"
    documents, wrong = parse(text, "x.yaml", Path("."), environment or {})
    loc = ("stages", 1, "test")
    try:
        Settings.model_validate(documents[0].value(loc))
    except ValidationError as error:
        wrong = [*wrong, *problems_from(error, documents[0], loc, Settings)]
    return [str(problem).removeprefix("x.yaml:3:") for problem in wrong]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("{limit: 100 per hour}", "19: stages[1].test.limit: '100 per hour' is not a rate; write 100/hour"),
        ("{limit: [1/hour, 2/hr]}", "28: stages[1].test.limit[1]: '2/hr' is not a rate; write 2/hour"),
        ("{limit: {a: 1}}", "19: stages[1].test.limit: a mapping is not a rate or a list; "
                            "write 100/hour, 30/minute or 5/10s"),
        ("{mixed: x}", "19: stages[1].test.mixed: 'x' is not a whole number; write digits only"),
        ("{mixed: [1, x]}", "23: stages[1].test.mixed[1]: 'x' is not a whole number; write digits only"),
        ("{mixed: {mtch: a, match: b}}", "20: stages[1].test.mixed: unknown setting 'mtch'; did you mean 'match'?"),
        ("{either: often}", "20: stages[1].test.either: 'often' is not a rate or a duration; "
                            "write 100/hour, 30/minute or 5/10s"),
        ("{rules: [{match: a}, {for: b}]}", "32: stages[1].test.rules[1].match: is missing; add `match: ...`"),
        ("{rules: [{match: a, fro: b}]}", "31: stages[1].test.rules[0]: unknown setting 'fro'; did you mean 'for'?"),
        ("{named: {x: {match: a, zzz: b}}}", "34: stages[1].test.named.x: unknown setting 'zzz'; known: for, match"),
        ("{networks: [10.0.0.0/8, 1]}", "35: stages[1].test.networks[1]: 1 is not a network; "
                                        "write 10.0.0.0/8, 2001:db8::/32 or an address"),
        ("{networks: 'x, y'}", "22: stages[1].test.networks: 'x' is not a network; "
                               "write 10.0.0.0/8, 2001:db8::/32 or an address"),
        ("{count: message}", "19: stages[1].test.count: 'message' is not one of the choices; did you mean 'messages'?"),
        ("{count: 5}", "19: stages[1].test.count: 5 is not one of the choices; write messages or recipients"),
        ("{tale: a very long tale without an end}",
         "18: stages[1].test.tale: 'a very long tale without an end' is too long a tale; tell less"),
        ("{code: 200}", "18: stages[1].test.code: 200 is too small; write 400 or more"),
        ("{keep: 1h}", "18: stages[1].test.keep: '1h' is too large; write 60s or less"),
        ("{keep: 61}", "18: stages[1].test.keep: 61 is too large; write 60 or less"),
        ("{code: yes}", "18: stages[1].test.code: 'yes' is not a whole number; write digits only"),
        ("{pattern: A}", "21: stages[1].test.pattern: 'A' does not have the right form; it has to match ^[a-z]*$"),
        ("{pattern: 5}", "21: stages[1].test.pattern: 5 is not a text; put it in quotes: '5'"),
        ("{custom: x}", "20: stages[1].test.custom: has 2 faults; mend 2"),
        ("{custom: assert}", "20: stages[1].test.custom: is asserted"),
        ("{both: true}", "11: stages[1].test: these do not go together"),
        ("{limmit: 1}", "12: stages[1].test: unknown setting 'limmit'; did you mean 'limit'?"),
    ],
)  # fmt: skip
def test_wording_and_place(settings: str, line: str) -> None:
    assert line in said(settings)


@pytest.mark.parametrize(
    "settings",
    ["{code: '${S}'}", "{count: '${S}'}", "{limit: 'x${S}'}", "{tale: 'a long tale with ${S} in it'}",
     "{either: '${S}'}", "{networks: '${S},x'}", "{pattern: '${S}'}", "{mixed: ['${S}']}",
     "{pattern: 'more than thirty characters ${S}'}"],
)  # fmt: skip
@pytest.mark.parametrize("secret", ["HUNTER2-hunter2", "1234567", "smtp", "x'y\"z", "7"])
def test_secrets_are_quoted_as_written(settings: str, secret: str) -> None:
    lines = said(settings, {"S": secret})
    for line in lines:
        assert "${S}" in line
        words = line.replace("stages[1].test", "").partition(": ")[2]
        if len(secret) > 4:
            assert secret.casefold() not in words.casefold()
            assert repr(secret)[1:-1] not in words


def test_a_stages_own_words_do_not_repeat_a_secret() -> None:
    def tell(value: str) -> str:
        raise ValueError(f"the part {value.upper()[3:9]} is wrong")

    class Loud(BaseModel):
        key: Annotated[str, AfterValidator(tell)]

    documents, _ = parse("key: ${S}", "x.yaml", Path("."), {"S": "hunter2hunter2"})
    with pytest.raises(ValidationError) as caught:
        Loud.model_validate(documents[0].data)
    (problem,) = problems_from(caught.value, documents[0])
    assert str(problem) == "x.yaml:1:6: key: '${S}' does not fit; write another value"


def test_a_value_that_was_not_expanded_has_one_problem() -> None:
    assert said("{code: '${UNSET}', count: x}") == [
        "18: stages[1].test.code: the variable UNSET is not set; set it, or write ${UNSET:-default}",
        "37: stages[1].test.count: 'x' is not one of the choices; write messages or recipients",
    ]


def test_all_problems_sorted_by_place() -> None:
    columns = [int(line.partition(":")[0]) for line in said("{zzz: 1, code: 1, count: x, limit: y}")]
    assert columns == sorted(columns)
    assert len(columns) == 4


def test_every_error_type_of_pydantic_has_words() -> None:
    """What has no words of its own is what a YAML document cannot cause."""
    known = {*explain._KIND_OF, *explain._TEXTS, "value_error", "assertion_error"}
    known |= {"literal_error", "enum", "extra_forbidden"}
    rest = {name for name in typing.get_args(ErrorType) if name not in known and not name.startswith("missing")}
    assert rest <= {
        "no_such_attribute", "needs_python_object", "recursion_loop", "recursion_depth_exceeded", "frozen_field",
        "frozen_instance", "invalid_key", "get_attribute_error", "default_factory_not_called", "ellipsis_error",
        "is_instance_of", "is_subclass_of", "callable_type", "unexpected_keyword_argument",
        "unexpected_positional_argument", "multiple_argument_values",
    }  # fmt: skip
