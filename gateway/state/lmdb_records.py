"""What the LMDB store keeps, and its operations as steps of one transaction.

One database, ordered by octets. The first octet of a key says what it is, the rest is the caller's key:

    r KEY             rates: when it is indexed, then for each period its period, bucket, running and earlier count
    v KEY             a value: when it is indexed, when it expires, its first octets
    w KEY i           piece `i` of a longer value: runs of pages would be hard to find in a full database
    h KEY             places held: owner and number of places, again and again
    x EXPIRES r KEY   index of rates and values by expiry (milliseconds), the soonest first

The index entry of a rate is not moved when that lives longer; this happens when its time comes, so that a hit on a
known key changes one record only. Nothing here waits, locks or commits. Times are seconds of the store's clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from struct import Struct
from typing import Final, TypeAlias

import lmdb

from gateway.state.sliding import ROUNDING, bucket, share_inside, wait
from gateway.state.store import Entry, Hit, Window

Transaction: TypeAlias = "lmdb.Transaction[bytes]"

MAX_KEY: Final = 400
"""Octets of a key that is kept as it is; LMDB takes 511, and the index adds its own. Longer ones are hashed."""

_RATE: Final = b"r"
_VALUE: Final = b"v"
_PIECE: Final = b"w"
_HELD: Final = b"h"
_INDEX: Final = b"x"

_STAMP: Final = Struct(">Q")  # big-endian: its octets sort like the number
_COUNTER: Final = Struct("<dqQQ")
_VALUE_HEAD: Final = Struct("<d")
_PLACES: Final = Struct("<8sQ")
_PIECE_SIZE: Final = 1024
_PURGED_WITH_NEW: Final = 2  # more than one, so that expired records go faster than new ones come

_Counter = tuple[float, int, int, int]


def key_octets(key: str) -> bytes:
    """A caller's key as the database has it: UTF-8, the end of a very long one replaced by a hash."""
    octets = key.encode("utf-8", "surrogateescape")
    if len(octets) <= MAX_KEY:
        return octets
    return octets[: MAX_KEY - 33] + b"#" + hashlib.blake2b(octets, digest_size=16).hexdigest().encode()


# -- rates -------------------------------------------------------------------------------------------------------


def _turned(counter: _Counter | None, period: float, number: int) -> _Counter:
    """The counter when bucket `number` runs. A clock that was put back a little stays in the later bucket."""
    if counter is not None:
        age = number - counter[1]
        if age == 0 or age == -1:
            return counter
        if age == 1:
            return (period, number, 0, counter[2])
    return (period, number, 0, 0)


def _counters(record: bytes | None) -> dict[float, _Counter]:
    if record is None:
        return {}
    return {counter[0]: counter for counter in _COUNTER.iter_unpack(memoryview(record)[8:])}


def hit(txn: Transaction, now: float, key: bytes, windows: Sequence[Window], n: int) -> Hit:
    """Count `n` events on `key` if every window has room for them. Raises ValueError if a period is not positive."""
    name = _RATE + key
    record = txn.get(name)
    counters = _counters(record)
    refused, longest = False, 0.0
    estimates: list[float] = []
    for limit, period in windows:
        counter = counters[period] = _turned(counters.get(period), period, bucket(now, period))
        _, number, running, before = counter
        share = share_inside(number, period, now)
        estimate = running + before * share
        estimates.append(estimate)
        if estimate + n > limit + ROUNDING:
            refused = True
            longest = max(longest, wait(limit, n, running, before, share, period))
    if refused:
        return Hit(False, longest, tuple(estimates))
    if n == 0:
        return Hit(True, 0.0, tuple(estimates))
    for period in {window.period for window in windows}:
        _, number, running, before = counters[period]
        counters[period] = (period, number, running + n, before)
    kept = [counter for counter in counters.values() if _gone(counter) > now]
    octets = b"".join([_COUNTER.pack(*counter) for counter in kept])
    if record is None:
        _create(txn, now, name, max(_gone(counter) for counter in kept), octets)
    else:
        txn.put(name, record[:8] + octets)
    return Hit(True, 0.0, tuple([estimate + n for estimate in estimates]))


def _gone(counter: _Counter) -> float:
    """When a counter counts in no window any more."""
    return (counter[1] + 2) * counter[0]


# -- values ------------------------------------------------------------------------------------------------------


def get(txn: Transaction, now: float, key: bytes) -> bytes | None:
    """The value of `key`."""
    record = txn.get(_VALUE + key)
    if record is None or _expires(_VALUE, record) <= now:
        return None
    return _whole(txn, key, record)


def _whole(txn: Transaction, key: bytes, record: bytes) -> bytes:
    """All octets of a value whose first record this is."""
    first = record[16:]
    if len(first) < _PIECE_SIZE:
        return first
    pieces = [first]
    while piece := txn.get(_piece(key, len(pieces))):
        pieces.append(piece)
    return b"".join(pieces)


def put(txn: Transaction, now: float, key: bytes, value: bytes, ttl: float) -> None:
    """Keep a value, or forget it."""
    name = _VALUE + key
    _forget(txn, name)
    if ttl <= 0:
        return
    _create(txn, now, name, now + ttl, _VALUE_HEAD.pack(now + ttl) + value[:_PIECE_SIZE])
    for at in range(_PIECE_SIZE, len(value), _PIECE_SIZE):
        txn.put(_piece(key, at // _PIECE_SIZE), value[at : at + _PIECE_SIZE])


def _piece(key: bytes, number: int) -> bytes:
    return _PIECE + key + bytes((0, number))


def _forget_pieces(txn: Transaction, key: bytes, record: bytes) -> None:
    if len(record) >= 16 + _PIECE_SIZE:
        number = 1
        while txn.delete(_piece(key, number)):
            number += 1


# -- expiry ------------------------------------------------------------------------------------------------------


def _stamp(expires: float) -> bytes:
    return _STAMP.pack(min(max(int(expires * 1000) + 1, 0), 2**63))


def _create(txn: Transaction, now: float, name: bytes, expires: float, octets: bytes) -> None:
    purge(txn, now, _PURGED_WITH_NEW)
    stamp = _stamp(expires)
    txn.put(name, stamp + octets)
    txn.put(_INDEX + stamp + name, b"")


def _expires(kind: bytes, record: bytes) -> float:
    """When a rate or value is gone."""
    if kind == _VALUE:
        expires: float = _VALUE_HEAD.unpack_from(record, 8)[0]
        return expires
    return max((_gone(counter) for counter in _counters(record).values()), default=0.0)


def _forget(txn: Transaction, name: bytes) -> bool:
    """Remove a rate or value and its index entry; whether there was one."""
    record = _remove(txn, name)
    if record is not None:
        txn.delete(_INDEX + record[:8] + name)
    return record is not None


def _remove(txn: Transaction, name: bytes) -> bytes | None:
    """Remove a rate or value; its record."""
    record = txn.pop(name)
    if record is not None and name[:1] == _VALUE:
        _forget_pieces(txn, name[1:], record)
    return record


def _index(txn: Transaction, most: int) -> list[bytes]:
    """The first entries of the index."""
    cursor = txn.cursor()
    if not cursor.set_range(_INDEX):
        return []
    return [key for key in islice(cursor.iternext(values=False), most) if key[:1] == _INDEX]


def purge(txn: Transaction, now: float, most: int) -> int:
    """Remove what expired, looking at `most` index entries whose time has come; how many there were."""
    due = [entry for entry in _index(txn, most) if entry[1:9] <= _stamp(now)]
    for entry in due:
        if not _moved(txn, entry):
            txn.delete(entry)
            _remove(txn, entry[9:])
    return len(due)


def _moved(txn: Transaction, entry: bytes) -> bool:
    """Whether a record lives longer than its index entry says; then the entry is moved."""
    name = entry[9:]
    record = txn.get(name)
    stamp = b"" if record is None else _stamp(_expires(name[:1], record))
    if record is None or stamp <= entry[1:9]:
        return False
    txn.delete(entry)
    txn.put(name, stamp + record[8:])
    txn.put(_INDEX + stamp + name, b"")
    return True


def forget_oldest(txn: Transaction, most: int) -> None:
    """Make room: remove those of the first `most` records of the index that have not been renewed since."""
    for entry in _index(txn, most):
        if not _moved(txn, entry):
            txn.delete(entry)
            _remove(txn, entry[9:])


# -- places held -------------------------------------------------------------------------------------------------


def _owners(record: bytes | None) -> dict[bytes, int]:
    return {} if record is None else dict(_PLACES.iter_unpack(record))


def _keep(txn: Transaction, name: bytes, owners: dict[bytes, int]) -> None:
    octets = b"".join([_PLACES.pack(owner, places) for owner, places in owners.items() if places > 0])
    if octets:
        txn.put(name, octets)
    else:
        txn.delete(name)


def hold(txn: Transaction, owner: bytes, key: bytes, limit: int, alive: Callable[[bytes], bool]) -> bool:
    """Take a place, if need be after clearing those of dead owners; whether there was one. `owner` is 8 octets."""
    name = _HELD + key
    owners = _owners(txn.get(name))
    if sum(owners.values()) >= limit:
        living = {other: places for other, places in owners.items() if other == owner or alive(other)}
        if sum(living.values()) >= limit:
            if len(living) != len(owners):
                _keep(txn, name, living)
            return False
        owners = living
    owners[owner] = owners.get(owner, 0) + 1
    _keep(txn, name, owners)
    return True


def release(txn: Transaction, owner: bytes, key: bytes) -> None:
    """Give a place back."""
    name = _HELD + key
    owners = _owners(txn.get(name))
    if owner in owners:
        owners[owner] -= 1
        _keep(txn, name, owners)


def clear_dead(txn: Transaction, after: bytes, most: int, alive: Callable[[bytes], bool]) -> bytes | None:
    """Clear dead owners' places of `most` keys that come after `after`; the last key looked at, None at the end."""
    records = list(islice(_records(txn, _HELD, after + b"\0" if after else b""), most))
    for key, record in records:
        owners = _owners(record)
        living = {owner: places for owner, places in owners.items() if alive(owner)}
        if len(living) != len(owners):
            _keep(txn, _HELD + key, living)
    return records[-1][0] if len(records) == most else None


def hold_again(txn: Transaction, owner: bytes, held: dict[bytes, int]) -> None:
    """Make the places of `owner` what `held` says, in a database that may not know of all of them."""
    for key, record in list(_records(txn, _HELD, b"")):
        if owner in _owners(record) and key not in held:
            _keep(txn, _HELD + key, {other: places for other, places in _owners(record).items() if other != owner})
    for key, places in held.items():
        _keep(txn, _HELD + key, {**_owners(txn.get(_HELD + key)), owner: places})


# -- for the operator --------------------------------------------------------------------------------------------


def _records(txn: Transaction, kind: bytes, start: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and records of one kind, from the first key that is not less than `start`."""
    cursor = txn.cursor()
    if cursor.set_range(kind + start):
        for name, record in cursor:
            if name[:1] != kind:
                return
            yield name[1:], record


def entries(txn: Transaction, now: float, prefix: bytes, limit: int) -> list[Entry]:
    """What there is under keys that begin with `prefix`, ordered by key."""
    found: list[Entry] = []
    for kind in (_RATE, _HELD, _VALUE):
        of_kind: list[Entry] = []
        for key, record in _records(txn, kind, prefix):
            if not key.startswith(prefix) or len(of_kind) >= limit:
                break
            if kind == _VALUE:
                record = record[:16] + _whole(txn, key, record)
            of_kind += _shown(kind, key.decode("utf-8", "surrogateescape"), record, now)
        found += of_kind
    return sorted(found, key=attrgetter("key"))[:limit]


def _shown(kind: bytes, key: str, record: bytes, now: float) -> Iterator[Entry]:
    if kind == _HELD:
        yield Entry(key, "held", sum(_owners(record).values()), None, None)
    elif kind == _VALUE:
        expires = _expires(kind, record)
        if expires > now:
            yield Entry(key, "value", 0, record[16:], expires - now)
    else:
        for period, counter in _counters(record).items():
            _, number, running, before = _turned(counter, period, bucket(now, period))
            estimate = running + before * share_inside(number, period, now)
            if estimate > 0:
                rest = (number + (2 if running else 1)) * period - now
                yield Entry(key, "rate", estimate, None, rest)


def clear(txn: Transaction, now: float, key: bytes) -> bool:
    """Forget rates and value of `key`; whether there were any that had not expired."""
    found = False
    for kind in (_RATE, _VALUE):
        record = txn.get(kind + key)
        if record is not None:
            found = found or _expires(kind, record) > now
            _forget(txn, kind + key)
    return found
