"""What is wrong with a configuration, where, and what to write instead.

A problem prints as one line: `submission.yaml:12:7: stages[5].rate_limit.limit: '100 per hour' is not a rate;
write 100/hour`. `explain.py` makes problems of pydantic's errors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

Loc = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A place in a file; lines and columns count from 1, line 0 is the file as a whole."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong: its place, the setting (`where`, may be empty), what is wrong, what to do."""

    place: Place
    where: str
    text: str
    suggestion: str = ""

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        suggestion = f"; {self.suggestion}" if self.suggestion else ""
        return f"{self.place}: {where}{self.text}{suggestion}"


class ConfigError(Exception):
    """The configuration cannot be used. `problems` are sorted by place, each once; `str` is one a line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(dict.fromkeys(problems)))
        super().__init__("\n".join(map(str, self.problems)))


def written_loc(loc: Loc) -> str:
    """('stages', 5, 'rate_limit') as `stages[5].rate_limit`."""
    text = ""
    for step in loc:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[\w-]+", step):
            text += f".{step}" if text else step
        else:
            text += f"[{step!r}]"
    return text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """"did you mean 'x'?" for the nearest of the known names, or an empty string."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]!r}?" if near else ""
