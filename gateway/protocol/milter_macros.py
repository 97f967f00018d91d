"""Macros of the milter protocol: names, who is sent which, and how long a value holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from gateway.protocol.milter_wire import Command, Stage, encode_text, join_strings, packet

DEFAULT_MACROS: Final[Mapping[Stage, tuple[str, ...]]] = MappingProxyType(
    {
        Stage.CONNECT: ("j", "{daemon_name}", "{daemon_addr}", "v", "_"),
        Stage.HELO: ("{tls_version}", "{cipher}", "{cipher_bits}", "{cert_subject}", "{cert_issuer}"),
        Stage.MAIL: (
            "i", "{auth_type}", "{auth_authen}", "{auth_author}", "{mail_addr}", "{mail_host}", "{mail_mailer}",
        ),
        Stage.RCPT: ("i", "{rcpt_addr}", "{rcpt_host}", "{rcpt_mailer}"),
        Stage.DATA: ("i",),
        Stage.EOH: ("i",),
        Stage.EOM: ("i",),
    }
)  # fmt: skip
"""Macros sent to a filter that asks for none by name: Postfix's (postconf(5), milter_*_macros)."""

_INHERITS: Final[Mapping[Stage, Stage]] = {
    Stage.HELO: Stage.CONNECT,
    Stage.MAIL: Stage.HELO,
    Stage.RCPT: Stage.MAIL,
    Stage.DATA: Stage.MAIL,
    Stage.EOH: Stage.DATA,
    Stage.EOM: Stage.EOH,
}
"""Whose macros a stage has besides its own; what was said of one recipient holds for it alone."""


def macro_key(name: str) -> str:
    """The name of a macro without braces: `i` and `{i}` are the same."""
    return name[1:-1] if name[:1] == "{" and name[-1:] == "}" else name


def macro_names(names: Iterable[str]) -> tuple[tuple[str, bytes], ...]:
    """Keys of macros with their names on the wire, NUL included: braces around all but single characters."""
    keys = [macro_key(name) for name in names]
    return tuple((key, join_strings([encode_text(key if len(key) == 1 else f"{{{key}}}")])) for key in keys)


class MacroScopes:
    """The values an MTA knows, and the names that its filter wants at each stage."""

    __slots__ = ("_known", "_wanted")

    def __init__(self, lists: Mapping[Stage, Iterable[str]]) -> None:
        self._wanted: dict[Stage, tuple[tuple[str, bytes], ...]] = {}
        self._known: dict[Stage, Mapping[str, bytes]] = {}
        self.want(lists)

    def want(self, lists: Mapping[Stage, Iterable[str]]) -> None:
        """Replace the lists of the stages named."""
        for stage, names in lists.items():
            self._wanted[stage] = macro_names(names)

    def set(self, stage: Stage, values: Mapping[str, str]) -> None:
        """Set what is known at a stage; what was set at it and at stages that inherit from it is forgotten.

        An empty value is none: filters take `{auth_authen}`, empty or not, for a login. A NUL becomes `?`.
        """
        known = {macro_key(name): encode_text(value).replace(b"\0", b"?") for name, value in values.items() if value}
        parent = _INHERITS.get(stage)
        inherited = {} if parent is None else self._at(parent)
        self.forget(stage)
        self._known[stage] = {**inherited, **{key: value + b"\0" for key, value in known.items()}}

    def forget(self, since: Stage) -> None:
        """Forget the values of a stage and of those that inherit from it."""
        for stage in list(self._known):
            at: Stage | None = stage
            while at is not None and at is not since:
                at = _INHERITS.get(at)
            if at is since:
                del self._known[stage]

    def packet(self, command: int, stage: Stage) -> bytes:
        """MACRO in front of `command`: b"" if nothing is wanted.

        If nothing of it is known, the list is empty: the filter forgets what it knew of the recipient before.
        """
        wanted = self._wanted.get(stage)
        if not wanted:
            return b""
        known = self._known.get(stage) or self._at(stage)
        parts = [command.to_bytes(1, "big")]
        for key, name in wanted:
            value = known.get(key)
            if value is not None:
                parts += (name, value)
        return packet(Command.MACRO, b"".join(parts))

    def _at(self, stage: Stage) -> Mapping[str, bytes]:
        """What is known at a stage: its own values, or those of the nearest that it inherits from."""
        at: Stage | None = stage
        while at is not None:
            if at in self._known:
                return self._known[at]
            at = _INHERITS.get(at)
        return {}
