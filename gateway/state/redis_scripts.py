"""What Redis runs for the store: Lua scripts, so that a check is one round trip and no other client comes between.

Each script has one key and takes the time from the server, the same for all gateways. Only commands and rules of
Redis 6.2 are used. Answers are status lines of numbers with spaces between: the cheapest kind to read.

A rate is one hash for each key, with a field for each period: `bucket running before`, the number of the bucket
that was counted in last, its hits and those of the bucket before it (see `store.py`). Places held are one sorted
set for each key: a member for each lease, scored with the time at which it is gone unless renewed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

NOW: Final = "local time = redis.call('TIME') local now = time[1] + time[2] / 1e6"
"""The server's clock, in seconds. Tests put another one here."""

# The same arithmetic as sliding.py, in the same order, so that the last binary digit is the same too. What lies one
# bucket ahead was counted before the clock was set back, and stands; what lies further ahead is forgotten.
_COUNTERS: Final = """
local function counters(kept, period)
  local number = math.floor((now - math.fmod(now, period)) / period + 0.5)
  local running, before = 0, 0
  if kept then
    local b, r, p = string.match(kept, '^(%d+) (%d+) (%d+)$')
    b = tonumber(b)
    if b == number or b == number + 1 then number, running, before = b, tonumber(r), tonumber(p)
    elseif b == number - 1 then before = tonumber(r) end
  end
  local share = ((number + 1) * period - now) / period
  return number, running, before, math.max(0, math.min(1, share))
end
"""


class Script:
    """A script as calls of it are sent: `EVALSHA` by default, `EVAL` once the server turns out not to know it."""

    def __init__(self, body: str, clock: str = NOW) -> None:
        self.text = f"{clock}\n{body}".encode()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()

    def call(self, key: bytes, *arguments: bytes) -> tuple[bytes, ...]:
        """The words of a call on `key`."""
        return (b"EVALSHA", self.sha, b"1", key, *arguments)

    def call_each(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> tuple[bytes, ...]:
        """The words of a call on several keys, which in a cluster must be of one slot."""
        return (b"EVALSHA", self.sha, b"%d" % len(keys), *keys, *arguments)

    def in_full(self, words: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """The same call with the script itself."""
        return (b"EVAL", self.text, *words[2:])


HIT_BODY: Final = (
    _COUNTERS
    + """
local n = tonumber(ARGV[1])
local refused, wait, keep = false, 0, 0
local counts, write = {}, {}
for i = 2, #ARGV, 2 do
  local limit, field = tonumber(ARGV[i]), ARGV[i + 1]
  local period = tonumber(field)
  local number, running, before, share = counters(redis.call('HGET', KEYS[1], field), period)
  local estimate = running + before * share
  if estimate + n > limit + 1e-9 then
    refused = true
    local w
    if n > limit then w = math.huge
    elseif running + n <= limit then w = (share - (limit - running - n) / before) * period
    else w = (share + math.max(0, 1 - (limit - n) / running)) * period end
    wait = math.max(wait, w)
  end
  counts[#counts + 1] = estimate
  write[#write + 1] = field
  write[#write + 1] = string.format('%.0f %.0f %.0f', number, running + n, before)
  keep = math.max(keep, (number + 2) * period - now)
end
if refused then n = 0 end
for i = 1, #counts do counts[i] = string.format('%.17g', counts[i] + n) end
if n > 0 then
  redis.call('HSET', KEYS[1], unpack(write))
  keep = math.ceil(keep * 1000)
  if redis.call('PTTL', KEYS[1]) < keep then redis.call('PEXPIRE', KEYS[1], keep) end
end
return {ok = (refused and '0 ' or '1 ') .. string.format('%.17g ', wait) .. table.concat(counts, ' ')}
"""
)
HIT: Final = Script(HIT_BODY)
"""KEYS[1] the rate; ARGV the hits, then a limit and a period in seconds for each window. Gives allowed, the seconds to
wait, and the estimate of each window. The key lasts as long as its hits count, at most two of the longest period."""

# A lease that ends later than any could was given before the clock was set back, or by a master whose clock was ahead:
# its worker renews it soon if it lives, else nobody ever gives it back.
_TAKEN: Final = """
local function taken(key, lasts)
  return redis.call('ZCOUNT', key, string.format('(%.17g', now), now + 2 * lasts)
end
"""

HOLD: Final = Script(
    _TAKEN
    + """
if taken(KEYS[1], ARGV[3]) >= tonumber(ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZREMRANGEBYSCORE', KEYS[1], now + 2 * ARGV[3], '+inf')
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[3] * 1000))
return 1
"""
)
"""KEYS[1] the places; ARGV the limit, the lease's id, the seconds it lasts. Gives 1, or 0 if all places are taken."""

RENEW: Final = Script("""
for i, key in ipairs(KEYS) do
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  redis.call('ZADD', key, now + ARGV[1], ARGV[i + 1])
  redis.call('PEXPIRE', key, math.ceil(ARGV[1] * 1000))
end
return #KEYS
""")
"""KEYS places; ARGV the seconds that leases last, then the id of one lease in each. Leases that the server lost are
there again afterwards. A server that is full renews as well: it lets a script go on that began with what needs no
memory, which is why a new lease is added first (and refused then) and one that is renewed is not."""

RATES: Final = Script(
    _COUNTERS
    + """
local found, all = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local period = tonumber(all[i])
  local number, running, before, share = counters(all[i + 1], period)
  local rest = (number + 1) * period - now
  if running > 0 then rest = rest + period end
  if running + before > 0 then
    found[#found + 1] = string.format('%.17g %.17g', running + before * share, rest)
  end
end
return found
"""
)
"""KEYS[1] the rate. Gives for each period the estimate and the seconds until nothing of it counts."""

PLACES: Final = Script(_TAKEN + "return taken(KEYS[1], ARGV[1])")
"""KEYS[1] the places; ARGV the seconds that leases last. Gives how many are taken."""

BY_SHA: Final = {script.sha: script for script in (HIT, HOLD, RENEW, RATES, PLACES)}
