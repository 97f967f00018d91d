"""Which stage types are installed, and whether their methods are hooks (pluggy).

Stage types are found by the entry-point group `gateway.stages`, the built-in ones too. Every public method of
a stage must be a hook of `hookspecs.py`: pluggy says so when the stage is registered. Nothing of this runs
once a pipeline is loaded.
"""

from __future__ import annotations

import difflib
import inspect
from importlib.metadata import EntryPoint, entry_points

import pluggy

from gateway import hookspecs
from gateway.stage import Stage

GROUP = "gateway.stages"


class StageError(Exception):
    """A stage type cannot be used: not installed, fails to import, or breaks the contract."""


class _Manager(pluggy.PluginManager):
    """Every public method of a stage is a hook implementation, marked or not."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        if name.startswith("_") or not inspect.isroutine(getattr(type(plugin), name, None)):
            return None
        return {
            "wrapper": False,
            "hookwrapper": False,
            "optionalhook": False,
            "tryfirst": False,
            "trylast": False,
            "specname": None,
        }


def new_manager() -> pluggy.PluginManager:
    """A manager that knows the hookspecs; one a pipeline."""
    manager = _Manager("gateway")
    manager.add_hookspecs(hookspecs)
    return manager


def register(manager: pluggy.PluginManager, stage: Stage) -> None:
    """Check the stage against the contract. Raises StageError naming the method and the nearest hook."""
    names = [
        name for name in dir(stage) if not name.startswith("_") and inspect.isroutine(getattr(type(stage), name, None))
    ]
    known = set(hookspecs.PHASES) | _hook_names()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; helper methods begin with an underscore"
            raise StageError(f"{type(stage).__name__}.{name} is no phase or hook{hint}")
    try:
        manager.register(stage, stage.id)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise StageError(f"{type(stage).__name__}: {' '.join(str(error).split())}") from None
    _check_phases(stage)


def _check_phases(stage: Stage) -> None:
    """What `phases` names are phases that the stage implements."""
    own = getattr(stage, "phases", None)
    if own is None:
        return
    try:
        names = tuple(own())
    except Exception as error:
        raise StageError(f"{type(stage).__name__}.phases: {type(error).__name__}: {error}") from error
    for name in names:
        if name not in hookspecs.PHASES:
            near = difflib.get_close_matches(str(name), hookspecs.PHASES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise StageError(f"{type(stage).__name__}.phases names {name!r}, which is no phase{hint}")
        if not hasattr(stage, name):
            raise StageError(f"{type(stage).__name__}.phases names {name!r}, which it does not implement")


def _hook_names() -> set[str]:
    return {name for name, value in vars(hookspecs).items() if inspect.isfunction(value)}


class Registry:
    """The stage types installed on this machine, by name; a type is imported when it is first asked for."""

    def __init__(self, points: list[EntryPoint] | None = None) -> None:
        found = list(entry_points(group=GROUP)) if points is None else points
        self._points = {point.name: point for point in found}
        self._types: dict[str, type[Stage]] = {}

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._points, *self._types})

    def add(self, name: str, type_: type[Stage]) -> None:
        """Make a type known without an installed entry point (tests)."""
        self._types[name] = type_

    def get(self, name: str) -> type[Stage]:
        """The stage type. Raises StageError for an unknown name or a type that does not load."""
        if name in self._types:
            return self._types[name]
        point = self._points.get(name)
        if point is None:
            near = difflib.get_close_matches(name, self.names(), 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; `gateway stages` lists what is installed"
            raise StageError(f"unknown stage {name!r}{hint}")
        try:
            loaded = point.load()
        except Exception as error:
            raise StageError(
                f"stage {name!r} ({point.value}) does not load: {type(error).__name__}: {error}"
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, Stage)):
            raise StageError(f"stage {name!r} ({point.value}) is not a subclass of gateway.Stage")
        self._types[name] = loaded
        return loaded
