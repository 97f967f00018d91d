"""What a stage is asked for: its hooks, the phases that its settings need, and what lies inside its settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from pydantic import BaseModel

from gateway.config.problems import Loc
from gateway.facts import Phase
from gateway.stage import Stage

FoundT = TypeVar("FoundT")

PHASE_NAMES = frozenset(phase.name.lower() for phase in Phase)
_HOOKS = (
    *[phase.name.lower() for phase in Phase],
    "capabilities",
    "mechanisms",
    "unknown",
    "upstream_connect",
    "upstream_ready",
    "upstream_login",
    "upstream_mail",
)


def hook_names(stage: Stage | type[Stage]) -> list[str]:
    return [name for name in _HOOKS if hasattr(stage, name)]


def at_upstream(stage: Stage) -> bool:
    return any(name.startswith("upstream_") for name in hook_names(stage))


def implemented(stage: Stage) -> list[Phase]:
    return [phase for phase in Phase if hasattr(stage, phase.name.lower())]


def needed_phases(stage: Stage) -> list[Phase]:
    """The phases the stage's settings need: its own word if it has one."""
    own = getattr(stage, "phases", None)
    if own is None:
        return implemented(stage)
    return [Phase[name.upper()] for name in own()]


def login_required(stage: Stage) -> bool:
    return hasattr(stage, "mechanisms") and stage.mode != "off" and bool(stage.required)


def found_in(value: object, wanted: type[FoundT], loc: Loc) -> Iterable[tuple[Loc, FoundT]]:
    """Every object of a type inside settings, with its place in the document."""
    if isinstance(value, wanted):
        yield loc, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from found_in(getattr(value, name), wanted, (*loc, name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from found_in(item, wanted, (*loc, index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from found_in(item, wanted, (*loc, str(key)))
