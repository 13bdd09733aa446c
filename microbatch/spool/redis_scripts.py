"""The Lua scripts of a spool in Redis, one for each step. The server runs each atomically; see `redis_prelude` for the data."""

from __future__ import annotations

from typing import Final

from microbatch.spool.redis_prelude import script

PUT: Final = script(
    """
-- name, digest, payload, ...
local number = (#ARGV - 2) / 3
drop_old_answers(64 + number)
local order = next_orders(number) - number
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
  elseif known ~= digest then
    outcomes[#outcomes + 1] = 'conflict'
  elseif put_back(name) then
    order = order + 1
    redis.call('ZADD', prefix .. 'names', 'NX', order, name)
    outcomes[#outcomes + 1] = 'new'
  else
    outcomes[#outcomes + 1] = 'known'
  end
end
return outcomes
""",
    flags="",
)

TAKE: Final = script("""
-- stage, most, lease in ms, lease token
local stage, most, idle, lease = tonumber(ARGV[3]), tonumber(ARGV[4]), idle_for(ARGV[5]), ARGV[6]
note_longest('lease', ARGV[5])
pass_on_lost()
local stream = stream_of(stage)
local taken, number = {}, 0

local function hand_out(entry, name)
  local key = item_key(name)
  local item = redis.call('HMGET', key, 'entry', 'digest', 'payload', 'deliveries', 'queued_at')
  if item[1] ~= entry then
    discard(stream, entry)  -- the request was deleted from outside
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

-- Entries that were given back come before those never read.
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

RENEW: Final = script("""
-- lease in ms; name, lease, ...
local idle = idle_for(ARGV[3])
note_longest('lease', ARGV[3])
for at = 4, #ARGV, 2 do
  local item = redis.call('HMGET', item_key(ARGV[at]), 'lease', 'state', 'deliveries', 'entry')
  if item[1] == ARGV[at + 1] and item[2] == 'leased' then
    local stream = stream_of(stage_of(item[3] - 1))
    redis.call('XCLAIM', stream, GROUP, LEASED, 0, item[4], 'IDLE', idle, 'JUSTID')
    redis.call('HDEL', item_key(ARGV[at]), 'spared')
  end
end
""")

FINISH: Final = script("""
-- ms to keep; name, digest, result, ...
local till = now + ARGV[3]
note_longest('keep', ARGV[3])
drop_old_answers(64 + (#ARGV - 3) / 3)
for at = 4, #ARGV, 3 do
  local name, digest, result = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local key = item_key(name)
  local item = redis.call('HMGET', key, 'digest', 'state', 'deliveries', 'entry', 'job')
  -- The digest, because the answer to an earlier request of that name, dropped since, is no answer to this one.
  if item[1] == digest and item[2] ~= 'done' then
    withdraw(name, item[2], tonumber(item[3]), item[4], item[5])
    redis.call('HSET', key, 'state', 'done', 'result', result)
    redis.call('HDEL', key, 'payload', 'entry', 'lease', 'job', 'error', 'died_at', 'spared')
    redis.call('PEXPIREAT', key, till)
    redis.call('ZADD', prefix .. 'done', till, name)
    redis.call('ZREM', prefix .. 'open', name)
  end
end
""")

GIVE_BACK: Final = script("""
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
      redis.call('HDEL', key, 'lease', 'spared')
    end
  end
end
""")

FIND: Final = script(
    """
-- name, ...
local found = {}
for at = 3, #ARGV do
  local name = ARGV[at]
  local item = redis.call('HMGET', item_key(name), 'state', 'result', 'error', 'deliveries', 'entry', 'job')
  local state = item[1]
  if not state then
    local dropped = tonumber(redis.call('ZSCORE', prefix .. 'done', name) or 0) > now
    state = (dropped or redis.call('ZSCORE', prefix .. 'open', name)) and 'lost'
  elseif state ~= 'done' and state ~= 'dead' and not has_place(name, state, tonumber(item[4]), item[5], item[6]) then
    state = 'lost'
  end
  found[#found + 1] = {state, item[2], item[3]}
end
return found
""",
    flags="flags=no-writes",
)

COUNTS: Final = script(
    """
-- whether to look at every request
local waiting, leased, in_job = {0, 0, 0}, 0, 0
local dead, lost, placed = redis.call('ZCARD', prefix .. 'dead'), 0, 0
local done = redis.call('ZCOUNT', prefix .. 'done', now, '+inf')
local closed = redis.call('ZCARD', prefix .. 'done') + dead
local overdue = math.max(OVERDUE, tonumber(redis.call('HGET', prefix .. 'clock', 'lease') or 0))
for stage = 0, ALONE do
  local stream = prefix .. 'stage:' .. stage
  if redis.call('EXISTS', stream) == 1 then
    local held, length = 0, redis.call('XLEN', stream)
    for _, consumer in ipairs(redis.call('XPENDING', stream, GROUP)[4] or {}) do
      if consumer[1] == LEASED then held = tonumber(consumer[2]) end
    end
    placed = placed + length
    waiting[stage + 1] = waiting[stage + 1] + length - held
    leased = leased + held
    -- Count requests with expired leases where the next TAKE will put them.
    for _, pending in ipairs(redis.call('XPENDING', stream, GROUP, 'IDLE', HORIZON, '-', '+', 10 * MOST, LEASED)) do
      local found = redis.call('XRANGE', stream, pending[1], pending[1])[1]
      local item = found and redis.call('HMGET', item_key(found[2][2]), 'deliveries', 'spared') or {}
      local deliveries = tonumber(item[1] or '')
      if not deliveries or item[2] or pending[3] - HORIZON <= overdue then
        leased = leased - 1
        if deliveries and is_dead(deliveries) then
          dead = dead + 1
        elseif deliveries then
          waiting[stage_of(deliveries) + 1] = waiting[stage_of(deliveries) + 1] + 1
        end
      end
    end
    local from = ARGV[3] == '1' and '-'
    while from do
      local page = redis.call('XRANGE', stream, from, '+', 'COUNT', MOST)
      for _, found in ipairs(page) do
        if redis.call('EXISTS', item_key(found[2][2])) == 0 then
          lost, waiting[stage + 1] = lost + 1, waiting[stage + 1] - 1
        end
      end
      from = #page == MOST and '(' .. page[MOST][1]
    end
  end
end
for _, token in ipairs(redis.call('ZRANGE', prefix .. 'jobs', 0, -1)) do
  in_job = in_job + redis.call('ZCARD', prefix .. 'tied:' .. token)
end
if ARGV[3] == '1' then
  for _, name in ipairs(redis.call('ZRANGE', prefix .. 'done', now, '+inf', 'BYSCORE')) do
    if redis.call('EXISTS', item_key(name)) == 0 then lost, done = lost + 1, done - 1 end
  end
end
-- Some of the dropped ones may have been leased.
for stage = 1, ALONE + 1 do
  leased, waiting[stage] = leased + math.min(0, waiting[stage]), math.max(0, waiting[stage])
end
-- Every request that is neither done nor dead has a place, or has lost it.
local known = math.max(redis.call('ZCARD', prefix .. 'open'), redis.call('ZCARD', prefix .. 'names') - closed)
lost = lost + math.max(0, known - placed - in_job)
local first = redis.call('ZRANGE', prefix .. 'open', 0, 0, 'WITHSCORES')
local age = first[2] and now - first[2] or 0
return {waiting[1], waiting[2], waiting[3], math.max(0, leased), in_job, done, dead, age, lost}
""",
    flags="flags=no-writes",
)

PASS_ON_LOST: Final = script("""
pass_on_lost()
""")

REQUEUE: Final = script("""
-- whether all; name, ...
pass_on_lost()
local names = {}
if ARGV[3] == '1' then
  names = redis.call('ZRANGE', prefix .. 'dead', 0, -1)
  for _, name in ipairs(redis.call('ZRANGE', prefix .. 'open', 0, -1)) do names[#names + 1] = name end
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
  elseif put_back(name) then
    number = number + 1
  end
end
return number
""")

BEGIN_JOB: Final = script("""
-- lease in ms, token, content, whether it has a batch_id, batch_id; name, lease, ...
local token = ARGV[4]
note_longest('lease', ARGV[3])
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
    redis.call('HDEL', key, 'entry', 'spared')
    redis.call('ZADD', prefix .. 'tied:' .. token, redis.call('ZSCORE', prefix .. 'names', name) or next_orders(1), name)
  end
end
""")

UPDATE_JOB: Final = script("""
-- token, content, whether it has a batch_id, batch_id
local key = prefix .. 'job:' .. ARGV[3]
if redis.call('EXISTS', key) == 1 then
  redis.call('HSET', key, 'content', ARGV[4])
  if ARGV[5] == '1' then redis.call('HSET', key, 'batch_id', ARGV[6]) else redis.call('HDEL', key, 'batch_id') end
end
""")

TAKE_JOBS: Final = script("""
-- most, lease in ms
note_longest('lease', ARGV[4])
check_clock()
local jobs = {}
for _, token in ipairs(redis.call('ZRANGE', prefix .. 'jobs', '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[3])) do
  local job = redis.call('HMGET', prefix .. 'job:' .. token, 'content', 'batch_id')
  if job[1] then
    redis.call('ZADD', prefix .. 'jobs', now + ARGV[4], token)
    jobs[#jobs + 1] = {token, job[1], job[2]}
  else  -- the server has dropped it
    redis.call('ZREM', prefix .. 'jobs', token)
    local names = redis.call('ZRANGE', prefix .. 'tied:' .. token, 0, -1)
    redis.call('DEL', prefix .. 'tied:' .. token)
    for _, name in ipairs(names) do put_back(name) end
  end
end
return jobs
""")

RENEW_JOBS: Final = script("""
-- lease in ms; token, ...
note_longest('lease', ARGV[3])
for at = 4, #ARGV do
  redis.call('ZADD', prefix .. 'jobs', 'XX', now + ARGV[3], ARGV[at])
end
""")

JOB_ITEMS: Final = script(
    """
-- token
local items = {}
for _, name in ipairs(redis.call('ZRANGE', prefix .. 'tied:' .. ARGV[3], 0, -1)) do
  local item = redis.call('HMGET', item_key(name), 'digest', 'payload', 'deliveries', 'queued_at', 'lease')
  if item[1] then
    for _, value in ipairs({name, item[1], item[2], tonumber(item[3]), item[4], item[5]}) do
      items[#items + 1] = value
    end
  end
end
return items
""",
    flags="flags=no-writes",
)

END_JOB: Final = script("""
-- token, error
local tied = prefix .. 'tied:' .. ARGV[3]
for _, name in ipairs(redis.call('ZRANGE', tied, 0, -1)) do
  local deliveries = tonumber(redis.call('HGET', item_key(name), 'deliveries') or '')
  if deliveries then fail(name, deliveries, ARGV[4]) end
end
redis.call('DEL', tied, prefix .. 'job:' .. ARGV[3])
redis.call('ZREM', prefix .. 'jobs', ARGV[3])
""")
