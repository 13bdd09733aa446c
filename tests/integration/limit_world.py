"""Processes that share a limit, in virtual time: real buckets, the real script on a real server, and a count of every request."""

from __future__ import annotations

import random
from collections import deque
from itertools import count

from microbatch.transports import limit_store, shared_bucket
from microbatch.transports.permits import MINUTE
from microbatch.transports.shared_bucket import SharedBucket

STEP = 0.05
TIMEOUT = 1.0
CLOCK = "{clock}"  # a key that holds what TIME returns


def script():
    """Return the script, with its clock in a key that the test sets."""
    text = limit_store._script()
    assert text.count("redis.call('TIME')") == 1
    return text.replace("redis.call('TIME')", f"redis.call('LRANGE', '{CLOCK}', 0, -1)")


class Judge:
    """Counts as the strictest endpoint does: so much in any 60 seconds.

    Attributes:
        limit: Requests and tokens.
        excess: The most by which either was exceeded.
        peak: The most of each in any 60 seconds.
        sent: All that was ever sent: time, requests, tokens.
    """

    def __init__(self, limit):
        self.limit = limit
        self.peak = [0, 0]
        self.sent = []
        self._recent = deque()
        self._sums = [0, 0]

    def count(self, now, amounts):
        self.sent.append((now, *amounts))
        self._recent.append((now, amounts))
        while self._recent[0][0] <= now - MINUTE + 1e-6:
            for which, amount in enumerate(self._recent.popleft()[1]):
                self._sums[which] -= amount
        for which, amount in enumerate(amounts):
            self._sums[which] += amount
            self.peak[which] = max(self.peak[which], self._sums[which])

    @property
    def excess(self):
        return max(peak - limit for peak, limit in zip(self.peak, self.limit, strict=True) if limit is not None)

    def used(self, begin, end):
        """Return requests and tokens per minute between two times."""
        sent = [amounts for at, *amounts in self.sent if begin <= at < end]
        return [sum(column) * MINUTE / (end - begin) for column in zip(*sent, strict=True)] or [0, 0]


class Process:
    """One process: a bucket with a clock of its own, and requests that wait in line."""

    def __init__(self, world, name):
        self.world = world
        self.name = name
        self.bucket = SharedBucket(world.limit, "reserved", 1.0)
        self.bucket.wake = self._wake
        self.waiting = deque()
        self.alive = True
        self.woken = True
        self.flight = None  # [order, its arrival, the return of the answer, its timeout, the answer]
        self.due = 0.0
        self.offset = world.draw.uniform(0, 1e6)
        self.rate = 1 + world.draw.uniform(-1e-4, 1e-4)
        self.latest = world.draw.uniform(0, 1) * TIMEOUT * 0.9  # how late its requests arrive at most

    def clock(self):
        return self.world.now * self.rate + self.offset

    def _wake(self):
        self.woken = True

    def step(self):
        world, now = self.world, self.clock()
        self.send()
        if self.flight is None:
            if self.woken or now >= self.due:
                self.contact()
        else:
            order, arrives, returns, ends, answer = self.flight
            if answer is None and arrives is not None and world.now >= arrives and not world.is_down:
                answer = self.flight[4] = world.run(self.name, order)
            if answer is not None and returns is not None and world.now >= returns:
                self.flight = None
                self.bucket.answered(order, answer, now)
                self._done(now)
            elif world.now >= ends:
                if answer is None:
                    world.late.append((self.name, order))  # it is in some buffer
                self.flight = None
                self.bucket.failed(order, "no answer", now)
                self._done(now)

    def _done(self, now):
        self.due = now + self.bucket.pause(now)
        self.send()

    def contact(self):
        world = self.world
        self.woken = False
        order = self.bucket.order(self.clock())
        if world.is_refusing:
            self.bucket.failed(order, "refused", self.clock())
            self._done(self.clock())
            return
        slow = world.slowness
        arrives = None if world.draw.random() < world.loss else world.now + world.draw.uniform(0, slow)
        returns = None if world.draw.random() < world.loss else (arrives or 0) + world.draw.uniform(0, slow)
        self.flight = [order, arrives, returns, world.now + TIMEOUT, None]

    def send(self):
        now = self.clock()
        while self.waiting and self.bucket.wait(self.waiting[0], now) <= 0:
            tokens = self.waiting.popleft()
            grant = self.bucket.grant(tokens, now)
            if self.world.draw.random() < self.world.cancels:
                self.bucket.cancel(grant)
                continue
            self.world.judge.count(self.world.now, (1, tokens))

    def leave(self):
        """End in good order, if the server can be told."""
        self.alive = False
        if self.flight is not None:
            self.bucket.failed(self.flight[0], "closed", self.clock())
        order = self.bucket.order(self.clock(), leaving=True)
        if not self.world.is_down and not self.world.is_refusing:
            self.world.run(self.name, order)

    def kill(self):
        self.alive = False


class World:
    """Processes, the server and its clock, and the judge.

    Attributes:
        is_down: Whether the server hangs: what is sent to it waits.
        is_refusing: Whether nothing reaches it.
        loss: How often a command, or its answer, is lost.
        slowness: How long either takes at most.
        cancels: How often what was granted is not sent.
    """

    def __init__(self, client, limit, seed):
        self.client = client
        self.limit = limit
        self.draw = random.Random(seed)
        self.judge = Judge(limit)
        self.now = 0.0
        self.clock_offset = 1.7e9
        self.is_down = self.is_refusing = False
        self.loss = self.cancels = 0.0
        self.slowness = 0.02
        self.late = []
        self.processes = []
        self._names = count()
        self._script = client.register_script(script())
        self._keys = [f"test:{{limit}}:{key}" for key in limit_store._KEYS]
        self.tokens = lambda: self.draw.randint(1, 400)
        self.load = 1.0  # requests a second and process

    def start(self, number=1):
        for _ in range(number):
            self.processes.append(Process(self, f"p{next(self._names)}"))

    def run(self, name, order):
        at = self.now + self.clock_offset
        self.client.delete(CLOCK)
        self.client.rpush(CLOCK, int(at), int(at % 1 * 1e6))
        return self._script(self._keys, [*limit_store._TIMES, name, *order.arguments])

    def empty(self):
        """Lose all data."""
        self.client.delete(*self._keys)

    def advance(self, seconds):
        end = self.now + seconds
        while self.now < end:
            self.now += STEP * self.draw.uniform(0.5, 1.5)
            if self.late and not self.is_down and not self.is_refusing and self.draw.random() < 0.3:
                self.run(*self.late.pop(self.draw.randrange(len(self.late))))
            self.processes = [process for process in self.processes if process.alive]
            self.draw.shuffle(self.processes)
            for process in self.processes:
                while len(process.waiting) < 50 and self.draw.random() < self.load * STEP:
                    process.waiting.append(self.tokens())
                process.step()


assert shared_bucket.LOST > shared_bucket.GAP + shared_bucket.HEARTBEAT
