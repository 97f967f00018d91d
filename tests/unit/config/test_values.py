"""Value types: every accepted spelling, every refusal word for word."""

from __future__ import annotations

import ipaddress
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from gateway import values
from gateway.facts import Expression, PoolName
from gateway.values import (
    CidrList,
    Condition,
    Duration,
    ExistingFile,
    Identifier,
    NotA,
    PathValue,
    PoolReference,
    Rate,
    Secret,
    Size,
    TextExpression,
    parse_cidr,
    parse_duration,
    parse_percent,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("1s", 1), ("250ms", 0.25), ("5m", 300), ("1h", 3600), ("1d", 86400), (3, 3), (0.5, 0.5), ("1.5s", 1.5), ("7", 7),
     ("0s", 0)],
)  # fmt: skip
def test_duration(written: object, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    ("written", "octets"),
    [("64k", 65536), ("10MiB", 10 << 20), ("1G", 1 << 30), ("5", 5), (7, 7), ("2kB", 2048), ("3b", 3)],
)
def test_size(written: object, octets: int) -> None:
    assert parse_size(written) == octets


@pytest.mark.parametrize(
    ("written", "rate"),
    [("30/minute", Rate(30, 60)), ("100/hour", Rate(100, 3600)), ("5/10s", Rate(5, 10)), ("1/second", Rate(1, 1)),
     ("2/day", Rate(2, 86400)), ("4/2h", Rate(4, 7200))],
)  # fmt: skip
def test_rate(written: str, rate: Rate) -> None:
    assert parse_rate(written) == rate
    assert str(rate) == written


@given(st.floats(min_value=0.001, max_value=1e6).map(lambda seconds: round(seconds, 3)))
def test_durations_are_read_back(seconds: float) -> None:
    assert parse_duration(values.format_duration(seconds)) == pytest.approx(seconds, rel=1e-4)


@pytest.mark.parametrize(
    ("written", "network"),
    [("10.0.0.0/8", "10.0.0.0/8"), ("10.0.0.1", "10.0.0.1/32"), ("::1", "::1/128"), ("[2001:db8::]/32", None),
     ("2001:db8::/32", "2001:db8::/32"), ("::ffff:10.0.0.0/104", "10.0.0.0/8"), ("0.0.0.0/0", "0.0.0.0/0")],
)  # fmt: skip
def test_cidr(written: str, network: str | None) -> None:
    if network is None:
        with pytest.raises(NotA):
            parse_cidr(written)
    else:
        assert parse_cidr(written) == ipaddress.ip_network(network)


def test_cidr_lists() -> None:
    adapter: TypeAdapter[CidrList] = TypeAdapter(CidrList)
    two = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128"))
    assert adapter.validate_python(["10.0.0.0/8", "::1"]) == two
    assert adapter.validate_python("10.0.0.0/8, ::1") == two
    assert adapter.validate_python("") == ()
    assert adapter.dump_json(two) == b'["10.0.0.0/8","::1/128"]'


@pytest.mark.parametrize(
    ("parse", "written", "said"),
    [
        (parse_duration, "5 minutes", "'5 minutes' is not a duration; write 5m"),
        (parse_duration, "20 Milliseconds", "'20 Milliseconds' is not a duration; write 20ms"),
        (parse_duration, "1h30m", "'1h30m' is not a duration; write 1s, 250ms, 5m, 1h or 1d"),
        (parse_duration, True, "true is not a duration; write 1s, 250ms, 5m, 1h or 1d"),
        (parse_duration, float("nan"), "nan is not a duration; write 1s, 250ms, 5m, 1h or 1d"),
        (parse_duration, None, "an empty value is not a duration; write 1s, 250ms, 5m, 1h or 1d"),
        (parse_duration, [1], "a list is not a duration; write 1s, 250ms, 5m, 1h or 1d"),
        (parse_size, "10 MB", "'10 MB' is not a size; write 10MB"),
        (parse_size, -1, "-1 is not a size; write 64k, 10MiB or a number of octets"),
        (parse_size, 1.5, "1.5 is not a size; write 64k, 10MiB or a number of octets"),
        (parse_rate, "100 per hour", "'100 per hour' is not a rate; write 100/hour"),
        (parse_rate, "5/min", "'5/min' is not a rate; write 5/minute"),
        (parse_rate, "5 every 10 seconds", "'5 every 10 seconds' is not a rate; write 5/10s"),
        (parse_rate, "0/hour", "'0/hour' allows nothing; write a limit and a period above 0"),
        (parse_rate, "5/0s", "'5/0s' allows nothing; write a limit and a period above 0"),
        (parse_rate, 100, "100 is not a rate; write 100/hour, 30/minute or 5/10s"),
        (parse_percent, 25, "25 is not a share; write 25%"),
        (parse_percent, "101%", "'101%' is more than all; write 100% or less"),
        (parse_cidr, "10.0.0.1/8",
         "'10.0.0.1/8' has bits set behind its prefix; write 10.0.0.0/8, or 10.0.0.1 for the one address"),
        (parse_cidr, 10, "10 is not a network; write 10.0.0.0/8, 2001:db8::/32 or an address"),
    ],
)  # fmt: skip
def test_refusals(parse: object, written: object, said: str) -> None:
    assert callable(parse)
    with pytest.raises(NotA) as caught:
        parse(written)
    assert str(caught.value) == said


def test_long_values_are_cut() -> None:
    with pytest.raises(NotA) as caught:
        parse_rate("x" * 1000)
    assert len(str(caught.value)) < 120


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans())
def test_parsers_give_a_value_or_not_a(value: object) -> None:
    for parse in (parse_duration, parse_size, parse_rate, parse_percent, parse_cidr):
        try:
            parse(value)
        except NotA as error:
            assert error.kind and error.example


class Settings(BaseModel):
    """What a stage author writes."""

    delay: Duration = Field(1.0, gt=0, le=60)
    size: Size = Field(10, ge=1)
    rate: Rate = Rate(100, 3600.0)
    key: Secret = Secret("hidden")
    when: Condition | None = None
    per: TextExpression | None = None
    to: PoolReference | None = None


def test_constraints_hold_behind_the_parser() -> None:
    for wrong in ({"delay": "0s"}, {"delay": "2m"}, {"size": "0k"}):
        with pytest.raises(ValidationError):
            Settings.model_validate(wrong)
    assert Settings.model_validate({"delay": "1m"}).delay == 60


def test_expressions_and_pools() -> None:
    settings = Settings.model_validate({"when": True, "per": "auth.user", "to": "mta"})
    assert isinstance(settings.when, Expression) and (settings.when.text, settings.when.result) == ("true", "bool")
    assert isinstance(settings.per, Expression) and settings.per.result == "string"
    assert isinstance(settings.to, PoolName)
    for wrong in ({"when": ""}, {"when": 3}, {"per": ["a"]}, {"to": ""}):
        with pytest.raises(ValidationError):
            Settings.model_validate(wrong)


def test_secrets_stay_hidden() -> None:
    settings = Settings.model_validate({"key": "hunter2"})
    assert settings.key == "hunter2" and settings.key.reveal() == "hunter2"
    for shown in (repr(settings), repr({"a": settings.key}), settings.model_dump_json()):
        assert "hunter2" not in shown
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"key": 12345678})
    assert "12345678" not in str(caught.value.errors()[0]["msg"])


def test_json_schema_and_defaults() -> None:
    schema = Settings.model_json_schema()
    assert set(schema["properties"]) == {"delay", "size", "rate", "key", "when", "per", "to"}
    assert "pattern" in schema["properties"]["delay"]["anyOf"][0]
    assert Settings().model_dump(mode="json")["rate"] == "100/hour"


def test_paths(tmp_path: Path) -> None:
    path: TypeAdapter[PathValue] = TypeAdapter(PathValue)
    file: TypeAdapter[ExistingFile] = TypeAdapter(ExistingFile)
    (tmp_path / "there").write_text("x")
    context = {"folder": tmp_path / "sub"}
    assert path.validate_python("a/../b", context=context) == tmp_path / "sub" / "b"
    assert path.validate_python("/etc/x", context=context) == Path("/etc/x")
    assert file.validate_python("../there", context=context) == tmp_path / "there"
    for wrong in ("gone", "..", "", 5, "a\0b"):
        with pytest.raises(ValidationError):
            file.validate_python(wrong, context=context)


def test_a_file_that_cannot_be_read_says_by_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads it at the shell is root, and the service is not."""
    (tmp_path / "there").write_text("x")
    monkeypatch.setattr("gateway.values.os.access", lambda *_: False)
    for uid, name in ((pwd.getpwnam("nobody").pw_uid, "nobody"), (2**31 - 9, "user id 2147483639")):
        monkeypatch.setattr("gateway.values.os.geteuid", lambda uid=uid: uid)
        with pytest.raises(ValidationError, match=f"'there' cannot be read by {name};"):
            TypeAdapter(ExistingFile).validate_python("there", context={"folder": tmp_path})


def test_identifiers() -> None:
    adapter: TypeAdapter[Identifier] = TypeAdapter(Identifier)
    assert adapter.validate_python("first_limit2") == "first_limit2"
    for wrong in ("a-b", "2a", "", "a.b", 1):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
