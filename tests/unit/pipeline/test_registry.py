"""Which stage types are found, and what is said of those that break the contract."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from gateway import Recipient, Session, Settings, Stage, Transaction, Worker
from gateway.pipeline.registry import GROUP, Registry, StageError, new_manager, register


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, GROUP)


def registered(stage_type: type[Stage]) -> str:
    """What is wrong with the type; empty if nothing is."""
    stage = stage_type(Settings())
    stage.id = "own"
    try:
        register(new_manager(), stage)
    except StageError as error:
        return str(error)
    return ""


class Good(Stage):
    """Uses every liberty of the contract."""

    public = "an attribute is no method"

    async def start(self, worker: Worker) -> None: ...

    def connect(self, session: Session) -> None: ...

    def mail(self, transaction: Transaction) -> None: ...

    def rcpt(self, recipient: Recipient, session: Session) -> None: ...

    def data(self) -> None: ...

    def close(self, session: Session) -> None: ...

    def _helper(self) -> None: ...


class Misspelled(Stage):
    """A hook that nobody would ever call."""

    def conect(self, session: Session) -> None: ...


class Helping(Stage):
    """A helper that looks like a hook."""

    def verify_everything(self) -> None: ...


class HelpingStatically(Stage):
    """A helper too."""

    @staticmethod
    def lookup_of_names() -> None: ...


class Wrong(Stage):
    """An argument that no hook has."""

    def mail(self, session: Session, message: object) -> None: ...


class NamesNoPhase(Stage):
    """Would never be asked."""

    def phases(self) -> tuple[str, ...]:
        return ("conect",)

    def connect(self, session: Session) -> None: ...


class NamesTooMuch(Stage):
    """Needs a phase that it does nothing in."""

    def phases(self) -> tuple[str, ...]:
        return ("mail",)

    def connect(self, session: Session) -> None: ...


@pytest.mark.parametrize(
    ("stage_type", "said"),
    [
        (Misspelled, "Misspelled.conect is no phase or hook; did you mean 'connect'?"),
        (Helping, "Helping.verify_everything is no phase or hook; helper methods begin with an underscore"),
        (
            HelpingStatically,
            "HelpingStatically.lookup_of_names is no phase or hook; helper methods begin with an underscore",
        ),
        (NamesNoPhase, "NamesNoPhase.phases names 'conect', which is no phase; did you mean 'connect'?"),
        (NamesTooMuch, "NamesTooMuch.phases names 'mail', which it does not implement"),
    ],
)
def test_misspelled_methods(stage_type: type[Stage], said: str) -> None:
    assert registered(stage_type) == said


def test_a_wrong_argument_is_named() -> None:
    said = registered(Wrong)
    assert said.startswith("Wrong: ") and "mail" in said and "message" in said


def test_fewer_arguments_in_any_order_are_fine() -> None:
    assert registered(Good) == ""


def test_built_in_types_are_installed_like_any_other() -> None:
    registry = Registry()
    assert {"splice", "greeting_delay", "auth_http", "route"} <= set(registry.names())
    for name in registry.names():
        assert issubclass(registry.get(name), Stage)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("greeting_dely", "unknown stage 'greeting_dely'; did you mean 'greeting_delay'?"),
        ("milter", "unknown stage 'milter'; `gateway stages` lists what is installed"),
        ("gone", "stage 'gone' (no.such.module:Stage) does not load: ModuleNotFoundError: No module named 'no'"),
        ("lost", "stage 'lost' (gateway:NoSuch) does not load: AttributeError: "),
        ("value", "stage 'value' (gateway:domain_of) is not a subclass of gateway.Stage"),
        ("settings", "stage 'settings' (gateway:Settings) is not a subclass of gateway.Stage"),
    ],
)
def test_types_that_cannot_be_used(name: str, said: str) -> None:
    registry = Registry(
        [
            point("greeting_delay", "stages.greeting_delay:GreetingDelay"),
            point("gone", "no.such.module:Stage"),
            point("lost", "gateway:NoSuch"),
            point("value", "gateway:domain_of"),
            point("settings", "gateway:Settings"),
        ]
    )
    with pytest.raises(StageError) as caught:
        registry.get(name)
    assert str(caught.value).startswith(said)


def test_a_type_is_imported_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry([point("good", "a_module_of_this_test:Good")])
    assert registry.names() == ["good"]
    module = ModuleType("a_module_of_this_test")
    module.Good = Good  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    assert registry.get("good") is Good


def test_added_types_need_no_installation() -> None:
    registry = Registry([])
    registry.add("good", Good)
    assert registry.names() == ["good"] and registry.get("good") is Good
