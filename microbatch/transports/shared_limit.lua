-- One contact of a process with a limit that processes share. It reports what the process has spent, renews its membership, and
-- draws permits: all in one step, on the server's clock.
--
-- What counts against the limit:
--   * the *log*: what was spent in the last window, in slots, each with the time of its latest request;
--   * what members *hold*: permits drawn and not reported as spent. If a member's lease ends, they count as spent at that time;
--   * *shares*: the part of what was unused that each other member was last shown. It may spend that if it loses the server. Shares
--     shrink with each contact, once others have a use for it.
-- Reports are absolute (slot 7 is so much, so much is held), and numbered: a lost answer, a repetition or a late arrival spoils nothing.
--
-- Small requests are also spread over the window by a bucket, as in `rate_limit.py`. A member that was refused has a claim: the others
-- leave room for the oldest claim.
--
-- After an outage members may have spent what the server does not know of. Until all that were known are back, it is *unsettled*:
-- nothing is granted, and each contact gives a licence to go on for a moment as without the server. One that is not back when its lease
-- has ended is taken to have spent its part. If no member is back after a moment (`grace`), all of them ended before the outage. A new
-- or emptied server does not know whom to wait for: it waits a moment for members of old; if there are any, until all that it was not
-- told is a window ago.
--
-- Keys: state, members, log (slots by time), amounts (of the slots). Times are in ms. A limit of -1 is none.

local WINDOW, LEASE, GRACE, GAP, LICENCE = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local me_id, seq, epoch, leaving = ARGV[6], tonumber(ARGV[7]), ARGV[8], ARGV[9] == '1'
local limit = {tonumber(ARGV[10]), tonumber(ARGV[12])}
local burst = {tonumber(ARGV[11]), tonumber(ARGV[13])}
local held = {tonumber(ARGV[14]), tonumber(ARGV[15])}
local need, front = {tonumber(ARGV[16]), tonumber(ARGV[17])}, ARGV[18] == '1'
local units, unit = tonumber(ARGV[19]), {1, tonumber(ARGV[20])}
local told_part, told_share = tonumber(ARGV[21]), {tonumber(ARGV[22]), tonumber(ARGV[23])}
local counted = {tonumber(ARGV[24]), tonumber(ARGV[27])} -- by the endpoint, -1 if it said nothing
local known, counts_for = {tonumber(ARGV[25]), tonumber(ARGV[28])}, {tonumber(ARGV[26]), tonumber(ARGV[29])}
local counted_age = tonumber(ARGV[30])
local FIRST_SLOT = 31
local LOOK = 64 -- slots looked at to find out when there is room
local AGAIN = 250 -- ms until asking again, if it is not known when there is room
local KEEP = 86400000 -- ms for which an unused limit is remembered
local UNKNOWN = 0.05 -- part of the limit by which the endpoint may have counted more than is known here, if nothing else uses it
local CLAIM = 2500 -- ms after which a claim that was not renewed has lapsed

local state_key, members_key, log_key, amounts_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function read(text)
  local list = {}
  for word in string.gmatch(text, '%S+') do list[#list + 1] = tonumber(word) end
  return {
    seen = list[1], seq = list[2], held = {list[3], list[4]}, part = list[5], share = {list[6], list[7]},
    want = {list[8], list[9]}, since = list[10], free = list[11], round = list[12],
  }
end

local function written(m)
  return string.format(
    '%.0f %.0f %.0f %.0f %.17g %.0f %.0f %.0f %.0f %.0f %.0f %.0f', m.seen, m.seq, m.held[1], m.held[2], m.part, m.share[1],
    m.share[2], m.want[1], m.want[2], m.since, m.free, m.round)
end

local state = {}
local flat = redis.call('HGETALL', state_key)
for i = 1, #flat, 2 do state[flat[i]] = tonumber(flat[i + 1]) or flat[i + 1] end

local slots = redis.call('ZCARD', log_key)
if state.slots ~= slots or slots ~= redis.call('HLEN', amounts_key) or state.members ~= redis.call('HLEN', members_key)
    or now < state.last - WINDOW then
  -- A part was evicted or deleted, or the clock was set back by far: nothing of it can be used.
  redis.call('DEL', state_key, members_key, log_key, amounts_key)
  state = {}
end
if not state.epoch then
  state = {epoch = string.format('%.0f-%s', now, me_id), created = now, last = now, mode = 'new', round = now, back = 0,
    slots = 0, members = 0, total1 = 0, total2 = 0, level1 = burst[1], level2 = burst[2], others1 = 0, others2 = 0, until1 = 0,
    until2 = 0, others_at = 0}
end
now = math.max(now, state.last) -- it may have been set back a little
local passed = now - state.last
local total = {state.total1, state.total2}
local level = {state.level1, state.level2}

local members = {}
flat = redis.call('HGETALL', members_key)
for i = 1, #flat, 2 do members[flat[i]] = read(flat[i + 1]) end

local me = members[me_id]
if me and seq <= me.seq then return {'late'} end

-- The log

local function add(slot, at, requests, tokens)
  local had = redis.call('HGET', amounts_key, slot)
  if had then
    local r, t = string.match(had, '(%S+) (%S+)')
    total[1], total[2] = total[1] - r, total[2] - t
  end
  if requests == 0 and tokens == 0 then
    redis.call('ZREM', log_key, slot)
    redis.call('HDEL', amounts_key, slot)
  else
    redis.call('HSET', amounts_key, slot, string.format('%.0f %.0f', requests, tokens))
    redis.call('ZADD', log_key, 'GT', at, slot)
    total[1], total[2] = total[1] + requests, total[2] + tokens
  end
end

for _, slot in ipairs(redis.call('ZRANGEBYSCORE', log_key, '-inf', now - WINDOW)) do
  add(slot, 0, 0, 0)
end
for i = FIRST_SLOT, #ARGV, 4 do
  local at = now - tonumber(ARGV[i + 1])
  if at > now - WINDOW then add(me_id .. ':' .. ARGV[i], at, tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])) end
end

-- The members

if passed > GAP and next(members) then
  -- An outage, or the clock was set forward.
  if state.mode == 'settled' or state.mode == 'gap' then
    state.mode, state.round, state.back = 'gap', now, 0
  else
    state.round, state.created = state.round + passed, state.created + passed
  end
  for id, m in pairs(members) do
    m.seen = now
    redis.call('HSET', members_key, id, written(m))
  end
end
if state.mode == 'settled' then
  for id, m in pairs(members) do
    if id ~= me_id and m.seen + LEASE < now then
      if m.seen + LEASE > now - WINDOW then add(string.format('%s:held:%.0f', id, m.seen), m.seen + LEASE, m.held[1], m.held[2]) end
      redis.call('HDEL', members_key, id)
      members[id] = nil
    end
  end
end
if epoch ~= '' then
  state.back = 1
  if epoch ~= state.epoch and now < state.created + WINDOW then state.mode, state.round = 'lost', state.created end
end

local function finish(answer)
  local count = 0
  for _ in pairs(members) do count = count + 1 end
  redis.call('HSET', state_key, 'epoch', state.epoch, 'created', state.created, 'last', now, 'mode', state.mode, 'round', state.round,
    'back', state.back, 'slots', redis.call('ZCARD', log_key), 'members', count, 'total1', total[1], 'total2', total[2],
    'level1', level[1], 'level2', level[2], 'others1', state.others1, 'others2', state.others2, 'until1', state.until1,
    'until2', state.until2, 'others_at', state.others_at)
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, KEEP) end
  return answer
end

if leaving then
  redis.call('HDEL', members_key, me_id)
  members[me_id] = nil
  return finish({'left'})
end
if not me then
  me = {want = {0, 0}, since = 0, free = 0, round = 0}
  members[me_id] = me
end
me.seen, me.seq, me.held, me.part, me.share = now, seq, held, told_part, told_share
-- It is back when it has been told of the outage before, and so has reported all of the last window again.
if me.free >= state.round or state.mode == 'settled' then me.round = state.round end
if not front then me.want, me.since = {0, 0}, 0 end

if state.mode == 'gap' and state.back == 1 then
  -- Those whose lease has ended since the outage have died, and may have spent their part before.
  for id, m in pairs(members) do
    if id ~= me_id and m.seen + LEASE <= now then
      add(string.format('%s:gone:%.0f', id, state.round), now, math.floor(m.part * math.max(0, limit[1])),
        math.floor(m.part * math.max(0, limit[2])))
      redis.call('HDEL', members_key, id)
      members[id] = nil
    end
  end
end

local count, part_of_others, shared_of_others, held_by_all = 0, 0, {0, 0}, {0, 0}
local all_back, free = true, 0
for id, m in pairs(members) do
  count = count + 1
  all_back = all_back and m.round == state.round
  for d = 1, 2 do held_by_all[d] = held_by_all[d] + m.held[d] end
  if id ~= me_id then
    part_of_others = part_of_others + m.part
    for d = 1, 2 do shared_of_others[d] = shared_of_others[d] + m.share[d] end
    free = math.max(free, m.free)
  end
end

-- Is it settled?

local function answer(word, granted, wait)
  redis.call('HSET', members_key, me_id, written(me))
  return finish({word, granted[1], granted[2], math.ceil(wait), count, string.format('%.17g', me.part), me.share[1], me.share[2],
    state.epoch, state.round})
end

if state.mode ~= 'settled' then
  local quiet = now >= state.round + GRACE and state.back == 0
  local ready = quiet or now >= state.round + WINDOW
  if state.mode == 'gap' then ready = ready or all_back end
  if not ready then
    me.free = now + LICENCE
    return answer('unsettled', {0, 0}, (state.back == 0 and state.round + GRACE or state.round + WINDOW) - now)
  end
  if now < free then return answer('settling', {0, 0}, free - now) end
  state.mode = 'settled'
end
me.free = 0

-- Granting

-- What the endpoint has counted beyond what was known when the request was granted, and beyond what is known now, is used by others.
for d = 1, 2 do
  if counted[d] >= 0 and now - counted_age >= state.others_at then
    local foreign = counted[d] - math.max(known[d], total[d] + held_by_all[d])
    state['others' .. d] = foreign > UNKNOWN * limit[d] and math.min(foreign, limit[d]) or 0
    state['until' .. d] = now - counted_age + counts_for[d]
  end
  if now >= state['until' .. d] then state['others' .. d] = 0 end
end
if counted_age >= 0 and now - counted_age > state.others_at then state.others_at = now - counted_age end

local function used(d) return total[d] + held_by_all[d] + state['others' .. d] end

local oldest
for id, m in pairs(members) do
  if m.since > 0 and now - m.seen < CLAIM and (not oldest or m.since < members[oldest].since
      or (m.since == members[oldest].since and id < oldest)) then oldest = id end
end
local kept = {0, 0}
if oldest and oldest ~= me_id then kept = members[oldest].want end

local function until_free(over)
  local found = redis.call('ZRANGE', log_key, 0, LOOK - 1, 'WITHSCORES')
  local wait = AGAIN
  for i = 1, #found, 2 do
    local r, t = string.match(redis.call('HGET', amounts_key, found[i]), '(%S+) (%S+)')
    over[1], over[2] = over[1] - r, over[2] - t
    wait = tonumber(found[i + 1]) + WINDOW - now
    if over[1] <= 0 and over[2] <= 0 then return wait end
  end
  return math.min(wait, AGAIN)
end

local function rate(d) return (limit[d] - burst[d]) / WINDOW end

local wait, over = 0, {0, 0}
for d = 1, 2 do
  if limit[d] >= 0 then
    level[d] = math.min(burst[d], math.max(level[d] + rate(d) * passed, burst[d] - used(d)))
    local amount = math.min(need[d], limit[d])
    if front and amount > 0 then
      if amount <= burst[d] then
        local least = kept[d] <= burst[d] and math.min(amount + kept[d], burst[d]) or amount
        if least - level[d] > 1e-6 then wait = math.max(wait, (least - level[d]) / rate(d)) end
      end
      over[d] = used(d) + shared_of_others[d] + math.min(amount + kept[d], limit[d]) - limit[d]
    end
  end
end
if over[1] > 0 or over[2] > 0 then wait = math.max(wait, until_free(over)) end

local granted = {0, 0}
if front and wait > 0 then
  if me.since == 0 then me.since = now end
  me.want = {need[1], need[2]}
  units = 0
elseif front then
  granted, me.want, me.since = {need[1], need[2]}, {0, 0}, 0
elseif oldest then
  units = 0
end
for d = 1, 2 do
  if limit[d] >= 0 and unit[d] > 0 then
    local room = math.min(
      limit[d] - used(d) - shared_of_others[d] - granted[d] - kept[d],
      level[d] - granted[d] - kept[d],
      math.floor(limit[d] / (4 * count)) - held[d] - granted[d])
    units = math.max(0, math.min(units, math.floor(room / unit[d])))
  end
end
for d = 1, 2 do
  if limit[d] >= 0 then
    granted[d] = granted[d] + units * unit[d]
    level[d] = level[d] - granted[d]
  else
    granted[d] = 0
  end
  me.held[d] = held[d] + granted[d]
  held_by_all[d] = held_by_all[d] + granted[d]
end

-- Shares of what is unused, and of the limit. Until the process has reported the new ones it may go by the old.

local claimed = {0, 0}
for _, m in pairs(members) do
  if now - m.seen < CLAIM then for d = 1, 2 do claimed[d] = claimed[d] + m.want[d] end end
end
local shown, part = {0, 0}, math.max(0, math.min(1 / count, 1 - part_of_others))
for d = 1, 2 do
  if limit[d] >= 0 then
    local unused = limit[d] - used(d)
    shown[d] = math.max(0, math.floor(math.min((unused - claimed[d]) / count, unused - shared_of_others[d])))
  end
end
local reply = {'settled', granted[1], granted[2], math.ceil(wait), count, string.format('%.17g', part), shown[1], shown[2], state.epoch,
  total[1] + held_by_all[1], total[2] + held_by_all[2]}
me.part = math.max(me.part, part)
for d = 1, 2 do me.share[d] = math.max(me.share[d], shown[d]) end
redis.call('HSET', members_key, me_id, written(me))
return finish(reply)
