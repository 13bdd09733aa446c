-- The scripts of a spool in Redis. Each is this shared part, followed by the section `--- NAME [FLAG]` of its own; `redis.py` puts
-- them together. The server runs a script atomically, and checks before whether it may write, so that it never stops half-way when
-- memory is full. Scripts that move a request on its way out may always write (`allow-oom`), or a full server would stay full.
--
-- Every request that is neither done nor dead nor in a job has exactly one entry in the stream of its stage. When it is taken, that
-- entry is pending in the stream's consumer group; when it moves on, the same script deletes the entry and adds one to the next stage.
-- The consumers are not workers but states of an entry: `leased` holds those under a lease, `returned` those given back uncounted, which
-- thereby keep their place. The worker that holds a request is identified by the `lease` in the request's hash, so that an earlier
-- holder changes nothing, and workers that are gone leave no consumers behind.
--
-- Leases are stored as idle times: an entry is made to look idle for HORIZON at the moment when its lease expires. So XPENDING finds
-- expired leases of any duration, and the server keeps the time for all machines. Its clock may be set. If it was set back, leases seem
-- to end later than any lease can: they are cut to the longest ever given. If it was set forward, or the server was asleep, they expired
-- long ago though their holders may live: they are granted once more (`spared`), to be renewed by those that live.
--
-- A server that drops keys when it is full, or is told to delete some, may lose a request or its place in a stream. Such a request is
-- *lost*: it is still in `open`, but has no hash, or no entry where its hash says. It is never taken; putting it again, or requeueing it
-- if its hash is there, gives it a place again.
--
-- Keys, behind the prefix: `item:NAME` (hash), `stage:0..2` (streams), `names` (all, by their order), `open` (neither done nor dead, by
-- the time they were put), `done` (by the time they are dropped), `dead` (by their order), `jobs` (by the end of their lease),
-- `job:TOKEN` (hash), `tied:TOKEN` (requests tied to a job, by their order), `counter` (source of the order), `clock` (hash: the time of
-- the last check, the longest lease, the longest time that answers are kept; all in ms).

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

--- put
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

--- take allow-oom
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

--- renew allow-oom
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

--- finish allow-oom
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

--- give_back allow-oom
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

--- find no-writes
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

--- counts no-writes
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

--- pass_on_lost allow-oom
pass_on_lost()

--- requeue allow-oom
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

--- begin_job allow-oom
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

--- update_job allow-oom
-- token, content, whether it has a batch_id, batch_id
local key = prefix .. 'job:' .. ARGV[3]
if redis.call('EXISTS', key) == 1 then
  redis.call('HSET', key, 'content', ARGV[4])
  if ARGV[5] == '1' then redis.call('HSET', key, 'batch_id', ARGV[6]) else redis.call('HDEL', key, 'batch_id') end
end

--- take_jobs allow-oom
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

--- renew_jobs allow-oom
-- lease in ms; token, ...
note_longest('lease', ARGV[3])
for at = 4, #ARGV do
  redis.call('ZADD', prefix .. 'jobs', 'XX', now + ARGV[3], ARGV[at])
end

--- job_items no-writes
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

--- end_job allow-oom
-- token, error
local tied = prefix .. 'tied:' .. ARGV[3]
for _, name in ipairs(redis.call('ZRANGE', tied, 0, -1)) do
  local deliveries = tonumber(redis.call('HGET', item_key(name), 'deliveries') or '')
  if deliveries then fail(name, deliveries, ARGV[4]) end
end
redis.call('DEL', tied, prefix .. 'job:' .. ARGV[3])
redis.call('ZREM', prefix .. 'jobs', ARGV[3])
