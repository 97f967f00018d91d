"""docs/milter.md lists the differences from Postfix that the tests know, all of them and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.milter import MilterSettings
from tests.interop.milter_legs import OWN_MACROS
from tests.interop.test_milter_differential import KNOWN_DIFFERENCES, KNOWN_OF_BDAT
from tests.interop.test_milter_sessions import ABORTS, CASES, NO_QUIT

PAGE = (Path(__file__).parents[2] / "docs/milter.md").read_text()


def differences() -> str:
    """Each with its reason, once."""
    known = [(each.name, each.why) for each in (*KNOWN_DIFFERENCES, *KNOWN_OF_BDAT)]
    known += [(case.name, case.differs) for case in CASES if case.differs]
    known += [("ABORT", ABORTS), ("QUIT", NO_QUIT)]
    reasons = dict.fromkeys(why for _, why in known)
    names = {why: next(name for name, other in known if other == why) for why in reasons}
    return "| where | how |\n|---|---|\n" + "".join(f"| {names[why]} | {why} |\n" for why in reasons)


def macros() -> str:
    """Those whose values cannot be the same."""
    return "| macro | here |\n|---|---|\n" + "".join(f"| `{name}` | {why} |\n" for name, why in OWN_MACROS.items())


@pytest.mark.parametrize(("mark", "table"), [("differences", differences()), ("macros", macros())])
def test_differences_are_those_that_tests_know(mark: str, table: str) -> None:
    _, _, rest = PAGE.partition(f"<!-- {mark} -->\n")
    assert rest.partition("<!-- end -->")[0] == table, f"docs/milter.md should say:\n{table}"


def test_settings_named_are_settings() -> None:
    for keys in re.findall(r"- milter: \{(.*)\}", PAGE):
        for key in re.findall(r"(?:^|, )(\w+): ", keys):
            assert key in MilterSettings.model_fields or key in {"id", "when", "on_error", "discard"}, key


def test_defaults_are_those_of_the_page() -> None:
    defaults = {name: field.default for name, field in MilterSettings.model_fields.items()}
    assert (defaults["connect_timeout"], defaults["command_timeout"], defaults["content_timeout"]) == (30, 30, 300)
    assert defaults["quarantine"].action == "refuse" and defaults["connect"] == "mail"
