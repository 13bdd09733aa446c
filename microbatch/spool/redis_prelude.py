"""Shared part of the Lua scripts of a spool in Redis: the keys, the clock, and how a request moves.

Every request that is neither done nor dead nor in a job has exactly one entry in the stream of its stage. When it is taken, that
entry is pending in the stream's consumer group; when it moves on, the same script deletes the entry and adds one to the next stage.
The consumers are not workers but states of an entry: `leased` holds those under a lease, `returned` those given back uncounted, which
thereby keep their place. The worker that holds a request is identified by the `lease` in the request's hash, so that an earlier
holder changes nothing, and workers that are gone leave no consumers behind.

Leases are stored as idle times: an entry is made to look idle for HORIZON at the moment when its lease expires. So XPENDING finds
expired leases of any duration, and the server keeps the time for all machines. Its clock may be set. If it was set back, leases seem
to end later than any lease can: they are cut to the longest ever given. If it was set forward, or the server was asleep, they expired
long ago though their holders may live: they are granted once more (`spared`), to be renewed by those that live.

A server that drops keys when it is full, or is told to delete some, may lose a request or its place in a stream. Such a request is
*lost*: it is still in `open`, but has no hash, or no entry where its hash says. It is never taken; putting it again, or requeueing it
if its hash is there, gives it a place again.

Keys, behind the prefix: `item:NAME` (hash), `stage:0..2` (streams), `names` (all, by their order), `open` (neither done nor dead, by
the time they were put), `done` (by the time they are dropped), `dead` (by their order), `jobs` (by the end of their lease),
`job:TOKEN` (hash), `tied:TOKEN` (requests tied to a job, by their order), `counter` (source of the order), `clock` (hash: the time of
the last check, the longest lease, the longest time that answers are kept; all in ms).
"""

from __future__ import annotations

from typing import Final

from microbatch.spool.records import LOST, OVERDUE

# With `#!lua` the server checks before a script runs whether it may write, so a script never stops half-way when memory is full.
# Scripts that move a request on its way out may always write (`allow-oom`), or a full server would stay full.
_PRELUDE: Final = """
local prefix, max_alone = ARGV[1], tonumber(ARGV[2])
local GROUP, LEASED, RETURNED = 'workers', 'leased', 'returned'
local HORIZON = 30 * 86400000
local ALONE = 2
local MOST = 1000  -- entries per step of background work
local OVERDUE = $OVERDUE
local SET_BACK = 1000  -- ms by which the clock has to go back before leases are checked

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local now_ms = string.format('%.0f', now)
local now_s = string.format('%.3f', now / 1000)

local function item_key(name) return prefix .. 'item:' .. name end
local function stage_of(deliveries) return math.min(deliveries, ALONE) end
local function is_dead(deliveries) return deliveries >= ALONE + max_alone end
local function idle_for(lease) return math.max(0, HORIZON - lease) end

local streams = {}
local function stream_of(stage)
  if not streams[stage] then
    local key = prefix .. 'stage:' .. stage
    if redis.call('EXISTS', key) == 0 then
      redis.call('XGROUP', 'CREATE', key, GROUP, '0', 'MKSTREAM')
    end
    streams[stage] = key
  end
  return streams[stage]
end

local function discard(stream, entry)
  redis.call('XACK', stream, GROUP, entry)
  redis.call('XDEL', stream, entry)
end

-- Return the last of that many new order numbers; a dropped counter is restored.
local function next_orders(number)
  local counter = prefix .. 'counter'
  if redis.call('EXISTS', counter) == 0 then
    local top = 0
    for _, index in ipairs({'names', 'dead'}) do
      top = math.max(top, tonumber(redis.call('ZRANGE', prefix .. index, 0, 0, 'REV', 'WITHSCORES')[2] or 0))
    end
    redis.call('SET', counter, string.format('%.0f', top))
  end
  return redis.call('INCRBY', counter, number)
end

local function enqueue(name, deliveries)
  local entry = redis.call('XADD', stream_of(stage_of(deliveries)), '*', 'name', name)
  local key = item_key(name)
  redis.call('HSET', key, 'state', 'waiting', 'deliveries', deliveries, 'entry', entry)
  redis.call('HDEL', key, 'lease', 'job', 'error', 'died_at', 'spared')
end

local function bury(name, error)
  local key = item_key(name)
  redis.call('HSET', key, 'state', 'dead', 'error', error, 'died_at', now_s)
  redis.call('HDEL', key, 'entry', 'lease', 'job', 'spared')
  redis.call('ZADD', prefix .. 'dead', next_orders(1), name)
  redis.call('ZREM', prefix .. 'open', name)
end

local function fail(name, deliveries, error)
  if is_dead(deliveries) then bury(name, error) else enqueue(name, deliveries) end
end

-- Remove a request from its place. The same script has to give it another one.
local function withdraw(name, state, deliveries, entry, job)
  if state == 'waiting' then
    discard(stream_of(stage_of(deliveries)), entry)
  elseif state == 'leased' then
    discard(stream_of(stage_of(deliveries - 1)), entry)
  elseif state == 'in_job' then
    redis.call('ZREM', prefix .. 'tied:' .. job, name)
  elseif state == 'dead' then
    redis.call('ZREM', prefix .. 'dead', name)
  end
end

-- Return whether a request that is neither done nor dead is where its hash says.
local function has_place(name, state, deliveries, entry, job)
  if state == 'in_job' then return redis.call('ZSCORE', prefix .. 'tied:' .. job, name) end
  local stage = stage_of(state == 'leased' and deliveries - 1 or deliveries)
  return redis.call('XRANGE', prefix .. 'stage:' .. stage, entry, entry)[1]
end

-- Give a lost request whose hash is there a place again; return whether it was lost. A pending delivery is not counted.
local function put_back(name)
  local item = redis.call('HMGET', item_key(name), 'state', 'deliveries', 'entry', 'job')
  local state, deliveries = item[1], tonumber(item[2] or '')
  if not state or state == 'done' or state == 'dead' or has_place(name, state, deliveries, item[3], item[4]) then
    return false
  end
  enqueue(name, state == 'waiting' and deliveries or deliveries - 1)
  redis.call('ZADD', prefix .. 'open', 'NX', now, name)
  return true
end

-- Record the longest duration of its kind (lease, keep).
local function note_longest(kind, ms)
  local known = tonumber(redis.call('HGET', prefix .. 'clock', kind) or '')
  if not known or known < tonumber(ms) then redis.call('HSET', prefix .. 'clock', kind, ms) end
end

-- Cut leases and answers that seem to last longer than the longest ever given: the clock was set back.
local function cut(lease, keep)
  for stage = 0, ALONE do
    local stream, most = stream_of(stage), redis.call('XLEN', prefix .. 'stage:' .. stage)
    for _, pending in ipairs(most > 0 and redis.call('XPENDING', stream, GROUP, '-', '+', most, LEASED) or {}) do
      if pending[3] < idle_for(lease) then
        redis.call('XCLAIM', stream, GROUP, LEASED, 0, pending[1], 'IDLE', idle_for(lease), 'JUSTID')
      end
    end
  end
  for _, token in ipairs(redis.call('ZRANGE', prefix .. 'jobs', now + lease, '+inf', 'BYSCORE')) do
    redis.call('ZADD', prefix .. 'jobs', now + lease, token)
  end
  for _, name in ipairs(keep and redis.call('ZRANGE', prefix .. 'done', now + keep, '+inf', 'BYSCORE') or {}) do
    redis.call('ZADD', prefix .. 'done', now + keep, name)
    redis.call('PEXPIREAT', item_key(name), now + keep)
  end
end

-- Check the clock; return the longest lease, and the ms after its end from which an expired lease proves nothing.
local function check_clock()
  local known = redis.call('HMGET', prefix .. 'clock', 'seen', 'lease', 'keep')
  local seen, lease = tonumber(known[1] or ''), tonumber(known[2] or '')
  if seen and lease and now < seen - SET_BACK then cut(lease, tonumber(known[3] or '')) end
  if not seen or math.abs(now - seen) > SET_BACK then redis.call('HSET', prefix .. 'clock', 'seen', now_ms) end
  return lease, math.max(OVERDUE, lease or 0)
end

local function pass_on_lost()
  local longest, overdue = check_clock()
  for stage = 0, ALONE do
    local stream = stream_of(stage)
    for _, pending in ipairs(redis.call('XPENDING', stream, GROUP, 'IDLE', HORIZON, '-', '+', MOST, LEASED)) do
      local entry, late = pending[1], pending[3] - HORIZON
      local found = redis.call('XRANGE', stream, entry, entry)[1]
      local name = found and found[2][2]
      local key = name and item_key(name)
      local item = name and redis.call('HMGET', key, 'deliveries', 'entry', 'spared') or {}
      if item[2] ~= entry then  -- the request was deleted from outside
        discard(stream, entry)
      elseif longest and late > overdue and not item[3] then
        redis.call('XCLAIM', stream, GROUP, LEASED, 0, entry, 'IDLE', idle_for(longest), 'JUSTID')
        redis.call('HSET', key, 'spared', 1)
      else
        discard(stream, entry)
        fail(name, tonumber(item[1]), (string.gsub([[$LOST]], '{}', item[1])))
      end
    end
  end
end

local function drop_old_answers(most)
  for _, name in ipairs(redis.call('ZRANGE', prefix .. 'done', '-inf', '(' .. now_ms, 'BYSCORE', 'LIMIT', 0, most)) do
    redis.call('DEL', item_key(name))
    redis.call('ZREM', prefix .. 'done', name)
    redis.call('ZREM', prefix .. 'names', name)
  end
end
""".replace("$LOST", LOST).replace("$OVERDUE", f"{1000 * OVERDUE:.0f}")


def script(body: str, *, flags: str = "flags=allow-oom") -> str:
    """Return a complete script.

    Args:
        body: Its own part; its arguments follow the key prefix and `max_alone`.
        flags: Script flags for the server.
    """
    return f"#!lua {flags}".rstrip() + _PRELUDE + body
