"""Many changes to one header section, each about as cheap as the first, however many fields there are.

A sender may send a header of thousands of fields, and a filter then removes one after the other (each
Authentication-Results that claims to be ours): looking through all fields for each change would hold up every session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from gateway.protocol.headers import HeaderField


class _Place:
    """A field at its place; None once it is deleted. `above`: it stands above the fields of the gateway's own."""

    __slots__ = ("above", "field", "name")

    def __init__(self, field: HeaderField, above: bool) -> None:
        self.field: HeaderField | None = field
        self.name = field.name.lower()
        self.above = above


class HeaderChanges:
    """The fields of a header while they change. `above`: so many of the first stand above those of the gateway's own.

    Occurrences are counted from 1 among the fields of one name, which are counted anew after each change.
    """

    def __init__(self, fields: Iterable[HeaderField], above: int) -> None:
        self.above = above
        self._places = deque(_Place(field, index < above) for index, field in enumerate(fields))
        self._size = len(self._places)
        self._named: dict[str, deque[_Place]] = {}
        for place in self._places:
            self._named.setdefault(place.name, deque()).append(place)

    def fields(self) -> list[HeaderField]:
        """The fields as they are now."""
        return [place.field for place in self._places if place.field is not None]

    def insert(self, index: int, field: HeaderField, *, above: bool = False) -> None:
        """Put a field at `index`; beyond the end it is the last."""
        place = _Place(field, above)
        at, same = self._find(index, place.name)
        self._places.insert(at, place)
        self._named.setdefault(place.name, deque()).insert(same, place)
        self._size += 1
        self.above += above

    def append(self, field: HeaderField) -> None:
        """Put a field at the end."""
        self.insert(self._size, field)

    def change(self, name: str, occurrence: int, field: HeaderField) -> None:
        """Put a field in the place of that one; append it where there is none. 0 is the first."""
        named = self._named.get(name.lower(), ())
        number = max(occurrence, 1)
        if number > len(named):
            self.append(field)
        else:
            named[number - 1].field = field

    def delete(self, name: str, occurrence: int) -> None:
        """Remove that field; 0 removes all of the name; nothing where there is none."""
        named = self._named.get(name.lower())
        if not named or occurrence > len(named) or occurrence < 0:
            return
        gone = list(named) if occurrence == 0 else [named[occurrence - 1]]
        if occurrence == 0:
            named.clear()
        else:
            del named[occurrence - 1]
        for place in gone:
            place.field = None
            self.above -= place.above
        self._size -= len(gone)
        if len(self._places) > 2 * self._size + 16:
            self._places = deque(place for place in self._places if place.field is not None)

    def _find(self, index: int, name: str) -> tuple[int, int]:
        """Where the field at `index` stands, and how many of the name stand before it."""
        if index <= 0:
            return 0, 0
        if index >= self._size:
            return len(self._places), len(self._named.get(name, ()))
        left = index
        same = 0
        for at, place in enumerate(self._places):
            if place.field is None:
                continue
            if not left:
                return at, same
            left -= 1
            same += place.name == name
        raise AssertionError("the count of fields is wrong")
