"""docs/milter.md lists the differences from Postfix that the tests know, all of them and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.milter import MilterSettings
from tests.interop.milter_legs import OWN_MACROS
from tests.interop.test_milter_differential import KNOWN_DIFFERENCES, KNOWN_OF_BDAT
from tests.interop.test_milter_sessions import ABORTS, CASES, NO_QUIT
from tests.interop.test_pymilter import EXCEPTION
from tests.interop.test_pymilter import KNOWN_DIFFERENCES as KNOWN_OF_PYMILTER

PAGE = (Path(__file__).parents[2] / "docs/milter.md").read_text()


def differences() -> str:
    """Each with its reason, once."""
    known = [(each.name, each.why) for each in (*KNOWN_DIFFERENCES, *KNOWN_OF_BDAT)]
    known += [(case.name, case.differs) for case in CASES if case.differs]
    known += [("ABORT", ABORTS), ("QUIT", NO_QUIT)]
    return table(known)


def pymilter_differences() -> str:
    """Those of a class inside the gateway from the same class as a daemon."""
    return table([(each.name, each.why) for each in (*KNOWN_OF_PYMILTER, EXCEPTION)])


def table(known: list[tuple[str, str]]) -> str:
    """What has one reason is told once."""
    reasons = dict.fromkeys(why for _, why in known)
    names = {why: next(name for name, other in known if other == why) for why in reasons}
    return "| where | how |\n|---|---|\n" + "".join(f"| {names[why]} | {why} |\n" for why in reasons)


def macros() -> str:
    """Those whose values cannot be the same."""
    return "| macro | here |\n|---|---|\n" + "".join(f"| `{name}` | {why} |\n" for name, why in OWN_MACROS.items())


@pytest.mark.parametrize(
    ("mark", "expected"),
    [("differences", differences()), ("macros", macros()), ("pymilter", pymilter_differences())],
    ids=["differences", "macros", "pymilter"],
)
def test_differences_are_those_that_tests_know(mark: str, expected: str) -> None:
    _, _, rest = PAGE.partition(f"<!-- {mark} -->\n")
    assert rest.partition("<!-- end -->")[0] == expected, f"docs/milter.md should say:\n{expected}"


def test_settings_named_are_settings() -> None:
    for keys in re.findall(r"- milter: \{(.*)\}", PAGE):
        for key in re.findall(r"(?:^|, )(\w+): ", keys):
            assert key in MilterSettings.model_fields or key in {"id", "when", "on_error", "discard"}, key


def test_defaults_are_those_of_the_page() -> None:
    defaults = {name: field.default for name, field in MilterSettings.model_fields.items()}
    assert (defaults["connect_timeout"], defaults["command_timeout"], defaults["content_timeout"]) == (30, 30, 300)
    assert defaults["quarantine"] == "refuse" and defaults["connect"] == "mail"
