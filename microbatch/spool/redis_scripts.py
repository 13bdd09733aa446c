"""What a spool does, in Redis' Lua: each step is one script, which the server runs as a whole, with nobody in between.

Every request that is neither done nor dead nor in a job has exactly one entry in the stream of its stage. Whoever takes it, that
entry is pending in the stream's consumer group; whoever passes it on deletes the entry and, in the same script, adds one to the next
stage. The consumers are no workers but what is being done with an entry: `leased` has those in the hands of workers, `returned` those
that were given back as if they had never been taken, which so keep their place. Which worker holds a request is told by its `lease`,
in the request's hash, so that an earlier holder moves nothing, and workers that are gone leave no consumers behind.

Leases are kept as idle times: an entry counts as taken so long ago that it is idle for HORIZON just when its lease runs out. So
XAUTOCLAIM finds those whose time is up whatever the lease of each, and the server keeps the time for all machines.

Keys, behind the prefix: `item:NAME` (hash), `stage:0..2` (streams), `names` (all, by their order), `open` (neither done nor dead, by
the time they were put), `done` (by the time they are dropped), `dead` (by their order), `jobs` (by the end of their lease),
`job:TOKEN` (hash), `tied:TOKEN` (what is tied to a job, by its order), `counter` (gives the order).
"""

from __future__ import annotations

from typing import Final

from microbatch.spool.records import LOST

# With `#!lua` the server checks before a script runs whether it may write: it never stops half-way for want of memory.
_PRELUDE: Final = """
local prefix, max_alone = ARGV[1], tonumber(ARGV[2])
local GROUP, LEASED, RETURNED = 'workers', 'leased', 'returned'
local HORIZON = 30 * 86400000
local ALONE = 2
local MOST = 1000  -- in one go, of what waits for nobody

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

local function enqueue(name, deliveries)
  local entry = redis.call('XADD', stream_of(stage_of(deliveries)), '*', 'name', name)
  local key = item_key(name)
  redis.call('HSET', key, 'state', 'waiting', 'deliveries', deliveries, 'entry', entry)
  redis.call('HDEL', key, 'lease', 'job', 'error', 'died_at')
end

local function bury(name, error)
  local key = item_key(name)
  redis.call('HSET', key, 'state', 'dead', 'error', error, 'died_at', now_s)
  redis.call('HDEL', key, 'entry', 'lease', 'job')
  redis.call('ZADD', prefix .. 'dead', redis.call('INCR', prefix .. 'counter'), name)
  redis.call('ZREM', prefix .. 'open', name)
end

local function fail(name, deliveries, error)
  if is_dead(deliveries) then bury(name, error) else enqueue(name, deliveries) end
end

-- Take a request from where it is. It has to be put somewhere else in the same script.
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

local function pass_on_lost()
  for stage = 0, ALONE do
    local stream, left = stream_of(stage), MOST
    -- XAUTOCLAIM looks up each entry before it looks at its time, so it is only sent where there is something for it.
    local first = redis.call('XPENDING', stream, GROUP, 'IDLE', HORIZON, '-', '+', 1, LEASED)[1]
    local cursor = first and first[1]
    while cursor and cursor ~= '0-0' and left > 0 do
      local page = redis.call('XAUTOCLAIM', stream, GROUP, LEASED, HORIZON, cursor, 'COUNT', MOST)
      cursor = page[1]
      left = left - #page[2]
      for _, found in ipairs(page[2]) do
        local entry, name = found[1], found[2][2]
        local item = redis.call('HMGET', item_key(name), 'deliveries', 'entry')
        discard(stream, entry)
        if item[2] == entry then  -- else somebody has deleted the request
          fail(name, tonumber(item[1]), (string.gsub([[$LOST]], '{}', item[1])))
        end
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
""".replace("$LOST", LOST)


def _script(body: str, *, flags: str = "") -> str:
    return f"#!lua {flags}".rstrip() + _PRELUDE + body


PUT: Final = _script("""
-- name, digest, payload, ...
local number = (#ARGV - 2) / 3
drop_old_answers(64 + number)
local order = redis.call('INCRBY', prefix .. 'counter', number) - number
local outcomes = {}
for at = 3, #ARGV, 3 do
  local name, digest, payload = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local key = item_key(name)
  local known = redis.call('HGET', key, 'digest')
  if not known then
    order = order + 1
    redis.call('HSET', key, 'digest', digest, 'payload', payload, 'queued_at', now_s)
    enqueue(name, 0)
    redis.call('ZADD', prefix .. 'names', order, name)
    redis.call('ZADD', prefix .. 'open', now, name)
    redis.call('ZREM', prefix .. 'done', name)
    outcomes[#outcomes + 1] = 'new'
  else
    outcomes[#outcomes + 1] = known == digest and 'known' or 'conflict'
  end
end
return outcomes
""")

TAKE: Final = _script("""
-- stage, most, lease in ms, what tells this delivery from others
local stage, most, idle, lease = tonumber(ARGV[3]), tonumber(ARGV[4]), idle_for(ARGV[5]), ARGV[6]
pass_on_lost()
local stream = stream_of(stage)
local taken, number = {}, 0

local function hand_out(entry, name)
  local key = item_key(name)
  local item = redis.call('HMGET', key, 'entry', 'digest', 'payload', 'deliveries', 'queued_at')
  if item[1] ~= entry then
    discard(stream, entry)  -- somebody has deleted the request
    return
  end
  local deliveries = item[4] + 1
  redis.call('XCLAIM', stream, GROUP, LEASED, 0, entry, 'IDLE', idle, 'JUSTID')
  redis.call('HSET', key, 'state', 'leased', 'deliveries', deliveries, 'lease', lease)
  number = number + 1
  for _, value in ipairs({name, item[2], item[3], deliveries, item[5], lease}) do
    taken[#taken + 1] = value
  end
end

-- Those that were given back come before all that was never read.
if most > 0 then
  for _, pending in ipairs(redis.call('XPENDING', stream, GROUP, '-', '+', most, RETURNED)) do
    local found = redis.call('XRANGE', stream, pending[1], pending[1])[1]
    if found then hand_out(found[1], found[2][2]) else discard(stream, pending[1]) end
  end
end
while number < most do
  local new = redis.call('XREADGROUP', 'GROUP', GROUP, LEASED, 'COUNT', most - number, 'STREAMS', stream, '>')
  if not new then break end
  for _, found in ipairs(new[1][2]) do hand_out(found[1], found[2][2]) end
end
return taken
""")

RENEW: Final = _script("""
-- lease in ms; name, lease, ...
local idle = idle_for(ARGV[3])
for at = 4, #ARGV, 2 do
  local item = redis.call('HMGET', item_key(ARGV[at]), 'lease', 'state', 'deliveries', 'entry')
  if item[1] == ARGV[at + 1] and item[2] == 'leased' then
    local stream = stream_of(stage_of(item[3] - 1))
    redis.call('XCLAIM', stream, GROUP, LEASED, 0, item[4], 'IDLE', idle, 'JUSTID')
  end
end
""")

FINISH: Final = _script("""
-- ms to keep; name, digest, result, ...
local till = now + ARGV[3]
drop_old_answers(64 + (#ARGV - 3) / 3)
for at = 4, #ARGV, 3 do
  local name, digest, result = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local key = item_key(name)
  local item = redis.call('HMGET', key, 'digest', 'state', 'deliveries', 'entry', 'job')
  -- The digest, because the answer to an earlier request of that name, dropped since, is none to this one.
  if item[1] == digest and item[2] ~= 'done' then
    withdraw(name, item[2], tonumber(item[3]), item[4], item[5])
    redis.call('HSET', key, 'state', 'done', 'result', result)
    redis.call('HDEL', key, 'payload', 'entry', 'lease', 'job', 'error', 'died_at')
    redis.call('PEXPIREAT', key, till)
    redis.call('ZADD', prefix .. 'done', till, name)
    redis.call('ZREM', prefix .. 'open', name)
  end
end
""")

GIVE_BACK: Final = _script("""
-- error, whether it counts; name, lease, ...
local error, counted = ARGV[3], ARGV[4] == '1'
for at = 5, #ARGV, 2 do
  local name = ARGV[at]
  local key = item_key(name)
  local item = redis.call('HMGET', key, 'lease', 'state', 'deliveries', 'entry', 'job')
  if item[1] == ARGV[at + 1] then
    local state, deliveries, entry = item[2], tonumber(item[3]), item[4]
    if counted or state ~= 'leased' then
      withdraw(name, state, deliveries, entry, item[5])
      if counted then fail(name, deliveries, error) else enqueue(name, deliveries - 1) end
    else
      redis.call('XCLAIM', stream_of(stage_of(deliveries - 1)), GROUP, RETURNED, 0, entry, 'JUSTID')
      redis.call('HSET', key, 'state', 'waiting', 'deliveries', deliveries - 1)
      redis.call('HDEL', key, 'lease')
    end
  end
end
""")

COUNTS: Final = _script(
    """
local waiting, leased, in_job = {0, 0, 0}, 0, 0
local dead = redis.call('ZCARD', prefix .. 'dead')
for stage = 0, ALONE do
  local stream = prefix .. 'stage:' .. stage
  if redis.call('EXISTS', stream) == 1 then
    local held = 0
    for _, consumer in ipairs(redis.call('XPENDING', stream, GROUP)[4] or {}) do
      if consumer[1] == LEASED then held = tonumber(consumer[2]) end
    end
    waiting[stage + 1] = waiting[stage + 1] + redis.call('XLEN', stream) - held
    leased = leased + held
    -- Those whose leases have run out are where the next taking will put them.
    for _, pending in ipairs(redis.call('XPENDING', stream, GROUP, 'IDLE', HORIZON, '-', '+', 10 * MOST, LEASED)) do
      local found = redis.call('XRANGE', stream, pending[1], pending[1])[1]
      local deliveries = found and tonumber(redis.call('HGET', item_key(found[2][2]), 'deliveries'))
      leased = leased - 1
      if deliveries and is_dead(deliveries) then
        dead = dead + 1
      elseif deliveries then
        waiting[stage_of(deliveries) + 1] = waiting[stage_of(deliveries) + 1] + 1
      end
    end
  end
end
for _, token in ipairs(redis.call('ZRANGE', prefix .. 'jobs', 0, -1)) do
  in_job = in_job + redis.call('ZCARD', prefix .. 'tied:' .. token)
end
local done = redis.call('ZCOUNT', prefix .. 'done', now, '+inf')
local first = redis.call('ZRANGE', prefix .. 'open', 0, 0, 'WITHSCORES')
local age = first[2] and now - first[2] or 0
return {waiting[1], waiting[2], waiting[3], leased, in_job, done, dead, age}
""",
    flags="flags=no-writes",
)

PASS_ON_LOST: Final = _script("""
pass_on_lost()
""")

REQUEUE: Final = _script("""
-- whether all; name, ...
pass_on_lost()
local names = {}
if ARGV[3] == '1' then
  names = redis.call('ZRANGE', prefix .. 'dead', 0, -1)
else
  for at = 4, #ARGV do names[#names + 1] = ARGV[at] end
end
local number = 0
for _, name in ipairs(names) do
  local item = redis.call('HMGET', item_key(name), 'state', 'queued_at')
  if item[1] == 'dead' then
    withdraw(name, 'dead')
    enqueue(name, 0)
    redis.call('ZADD', prefix .. 'open', item[2] * 1000, name)
    number = number + 1
  end
end
return number
""")

BEGIN_JOB: Final = _script("""
-- lease in ms, token, content, whether it has a batch_id, batch_id; name, lease, ...
local token = ARGV[4]
redis.call('ZADD', prefix .. 'jobs', now + ARGV[3], token)
redis.call('DEL', prefix .. 'job:' .. token)
redis.call('HSET', prefix .. 'job:' .. token, 'content', ARGV[5])
if ARGV[6] == '1' then redis.call('HSET', prefix .. 'job:' .. token, 'batch_id', ARGV[7]) end
for at = 8, #ARGV, 2 do
  local name = ARGV[at]
  local key = item_key(name)
  local item = redis.call('HMGET', key, 'lease', 'state', 'deliveries', 'entry')
  if item[1] == ARGV[at + 1] and item[2] == 'leased' then
    withdraw(name, 'leased', tonumber(item[3]), item[4])
    redis.call('HSET', key, 'state', 'in_job', 'job', token)
    redis.call('HDEL', key, 'entry')
    redis.call('ZADD', prefix .. 'tied:' .. token, redis.call('ZSCORE', prefix .. 'names', name), name)
  end
end
""")

UPDATE_JOB: Final = _script("""
-- token, content, whether it has a batch_id, batch_id
local key = prefix .. 'job:' .. ARGV[3]
if redis.call('EXISTS', key) == 1 then
  redis.call('HSET', key, 'content', ARGV[4])
  if ARGV[5] == '1' then redis.call('HSET', key, 'batch_id', ARGV[6]) else redis.call('HDEL', key, 'batch_id') end
end
""")

TAKE_JOBS: Final = _script("""
-- most, lease in ms
local jobs = {}
for _, token in ipairs(redis.call('ZRANGE', prefix .. 'jobs', '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[3])) do
  redis.call('ZADD', prefix .. 'jobs', now + ARGV[4], token)
  local job = redis.call('HMGET', prefix .. 'job:' .. token, 'content', 'batch_id')
  jobs[#jobs + 1] = {token, job[1], job[2]}
end
return jobs
""")

RENEW_JOBS: Final = _script("""
-- lease in ms; token, ...
for at = 4, #ARGV do
  redis.call('ZADD', prefix .. 'jobs', 'XX', now + ARGV[3], ARGV[at])
end
""")

JOB_ITEMS: Final = _script(
    """
-- token
local items = {}
for _, name in ipairs(redis.call('ZRANGE', prefix .. 'tied:' .. ARGV[3], 0, -1)) do
  local item = redis.call('HMGET', item_key(name), 'digest', 'payload', 'deliveries', 'queued_at', 'lease')
  for _, value in ipairs({name, item[1], item[2], tonumber(item[3]), item[4], item[5]}) do
    items[#items + 1] = value
  end
end
return items
""",
    flags="flags=no-writes",
)

END_JOB: Final = _script("""
-- token, error
local tied = prefix .. 'tied:' .. ARGV[3]
for _, name in ipairs(redis.call('ZRANGE', tied, 0, -1)) do
  fail(name, tonumber(redis.call('HGET', item_key(name), 'deliveries')), ARGV[4])
end
redis.call('DEL', tied, prefix .. 'job:' .. ARGV[3])
redis.call('ZREM', prefix .. 'jobs', ARGV[3])
""")
