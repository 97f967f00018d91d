"""What both kinds of filters say: the setting `quarantine`, and changes with what is honored of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from gateway import AddHeader, AddRecipient, AppendHeader, Cause, ChangeSender, Edit, Refuse, Upstream
from gateway.config.problems import ConfigError
from gateway.testing.gateway import compiled
from gateway.testing.stages import make_session, make_transaction
from stages.filter_words import Held, Parameters, Quarantine, add_recipient, change_sender, quarantined

SETTING: TypeAdapter[Held | str] = TypeAdapter(Quarantine)
QUARANTINES: dict[str, Held | str | None] = {
    "refuse": Held.REFUSE,
    "header": Held.HEADER,
    "route:held": "held",
    "route: held": "held",
    "route:refuse": "refuse",
    "route": None,
    "route:": None,
    "route: ": None,
    "refuse:held": None,
    "header:X-Held": None,
    "hold": None,
    "": None,
    "Refuse": None,
}


@pytest.mark.parametrize("text", QUARANTINES)
def test_quarantine(text: str) -> None:
    expected = QUARANTINES[text]
    if expected is None:
        with pytest.raises(ValidationError, match=rf"'{text}' is not .*; write refuse, header or route:<pool>"):
            SETTING.validate_python(text)
        return
    found = SETTING.validate_python(text)
    assert found == expected and isinstance(found, Held) is isinstance(expected, Held)


@pytest.mark.parametrize("value", [None, 5, {"action": "refuse"}])
def test_quarantine_that_is_no_text(value: object) -> None:
    with pytest.raises(ValidationError, match="write refuse, header or route:<pool>"):
        SETTING.validate_python(value)


@pytest.mark.parametrize(
    "stage",
    [{"milter": {"socket": "unix:/run/filter.sock"}}, {"pymilter": {"class": "milter_filter:Filter"}}],
    ids=["milter", "pymilter"],
)
@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("hold", "'hold' is not what can become of a message; write refuse, header or route:<pool>"),
        ("route:hell", "no pool named 'hell' in upstreams"),
    ],
)
def test_both_stages_say_it_of_the_setting(
    tmp_path: Path, stage: dict[str, dict[str, Any]], written: str, said: str
) -> None:
    ((name, settings),) = stage.items()
    settings = {**settings, "quarantine": written}
    if name == "pymilter":
        pytest.importorskip("Milter")
        settings["path"] = str(Path(__file__).parents[3] / "examples")
    pipeline = {
        "listen": ["smtp://127.0.0.1:2525"],
        "relay": "open",
        "stages": [{name: settings}, {"splice": "mta"}],
        "upstreams": {"mta": {"servers": ["smtp://127.0.0.1:9"]}},
    }
    with pytest.raises(ConfigError) as caught:
        compiled(pipeline, tmp_path)
    (problem,) = caught.value.problems
    assert f"stages[0].{name}.quarantine: {said}" in str(problem)


CHANGES = [AppendHeader("X-A", "v")]


@pytest.mark.parametrize(
    ("setting", "verdict"),
    [
        (Held.REFUSE, Refuse(Cause.CONTENT, log="quarantine: why")),
        (Held.HEADER, Edit([*CHANGES, AddHeader("X-Quarantine", "why")])),
        ("refuse", Edit(CHANGES, Upstream("refuse"))),  # a pool's name
    ],
)
def test_what_becomes_of_a_held_message(setting: Held | str, verdict: object) -> None:
    assert quarantined(CHANGES, setting, " why ") == verdict


@pytest.mark.parametrize(
    ("reason", "shown"),
    [("", "yes"), ("  ", "yes"), ("für\udcfc", "f?r?"), ("a\r\nBcc: b", "a??Bcc: b"), ("x" * 2000, "x" * 400)],
)
def test_a_reason_is_one_line_of_text(reason: str, shown: str) -> None:
    edit = quarantined([], Held.HEADER, reason)
    assert edit == Edit([AddHeader("X-Quarantine", shown)])


@pytest.mark.parametrize(
    ("given", "sender", "recipient"),
    [
        ((), None, ()),
        ((("RET", "HDRS"),), {"SIZE": "9", "RET": "HDRS", "ENVID": "old"}, ()),
        ((("ret", "HDRS"), ("ENVID", "new")), {"SIZE": "9", "RET": "HDRS", "ENVID": "new"}, ()),
        ((("SIZE", "1"), ("BODY", "7BIT"), ("SMTPUTF8", None)), None, ()),
        ((("NOTIFY", "NEVER"), ("orcpt", "rfc822;x@y.test")), None, (("NOTIFY", "NEVER"), ("ORCPT", "rfc822;x@y.test"))),
        ((("X-PRIORITY", "1"), ("NOTIFY", "NEVER"), ("NOTIFY", "DELAY")), None, (("NOTIFY", "DELAY"),)),
    ],
)
def test_parameters_of_dsn_and_no_others(
    given: Parameters, sender: dict[str, str] | None, recipient: Parameters
) -> None:
    transaction = make_transaction(make_session(), parameters=(("SIZE", "9"), ("RET", "FULL"), ("ENVID", "old")))
    expected = None if sender is None else tuple(sender.items())
    assert change_sender("n@x.test", given, transaction) == ChangeSender("n@x.test", expected)
    assert add_recipient("c@x.test", given) == AddRecipient("c@x.test", recipient)
