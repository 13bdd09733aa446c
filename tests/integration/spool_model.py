"""What a spool does, said a second time and as simply as possible: for comparison with the real ones.

Leases are either long or over at once, so that nothing depends on the time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from microbatch.spool.records import LOST, Counts, Found, Stage, is_dead

MAX_ALONE = 1


@dataclass
class Entry:
    item: object
    put: int
    place: int
    state: str = "waiting"
    deliveries: int = 0
    lease: str | None = None
    over: bool = False
    job: str | None = None
    result: bytes | None = None
    error: str | None = None
    death: tuple = ()


@dataclass
class ModelSpool:
    """A spool in memory.

    Args:
        keeps_places: Whether a request that goes on to the next stage keeps its place among all, or goes to the end.
    """

    keeps_places: bool
    entries: dict = field(default_factory=dict)
    jobs: dict = field(default_factory=dict)  # token: [job, held]
    clock: itertools.count = field(default_factory=itertools.count)

    def put(self, items):
        return [self._put(item) for item in items]

    def _put(self, item):
        known = self.entries.get(item.name)
        if known is not None:
            return "known" if known.item.digest == item.digest else "conflict"
        number = next(self.clock)
        self.entries[item.name] = Entry(item, number, number)
        return "new"

    def take(self, stage, most, lease, *, over):
        """Hand out under the lease *lease*; return name and number of deliveries of each, in order."""
        self.pass_on_lost()
        waiting = [e for e in self.entries.values() if e.state == "waiting" and Stage.after(e.deliveries) == stage]
        taken = sorted(waiting, key=lambda e: e.place)[:most]
        for entry in taken:
            entry.state, entry.lease, entry.over = "leased", lease, over
            entry.deliveries += 1
        return [(entry.item, entry.deliveries) for entry in taken]

    def pass_on_lost(self):
        lost = [e for e in self.entries.values() if e.state == "leased" and e.over]
        moment = next(self.clock)
        for entry in sorted(lost, key=lambda e: (Stage.after(e.deliveries - 1), e.place)):
            self._fail(entry, LOST.format(entry.deliveries), moment)

    def _fail(self, entry, error, moment):
        if is_dead(entry.deliveries, MAX_ALONE):
            death = (moment, entry.put) if self.keeps_places else (next(self.clock),)
            entry.state, entry.error, entry.lease, entry.job, entry.death = "dead", error, None, None, death
        else:
            self._enqueue(entry)

    def _enqueue(self, entry):
        entry.state, entry.lease, entry.job, entry.error = "waiting", None, None, None
        if not self.keeps_places:
            entry.place = next(self.clock)

    def held(self, delivery):
        entry = self.entries[delivery.item.name]
        return entry if entry.lease == delivery.lease else None

    def renew(self, deliveries, *, over):
        for delivery in deliveries:
            entry = self.held(delivery)
            if entry and entry.state == "leased":
                entry.over = over

    def finish(self, results):
        for delivery, result in results:
            entry = self.entries[delivery.item.name]
            if entry.state != "done":
                entry.state, entry.result, entry.error, entry.lease, entry.job = "done", result, None, None, None

    def give_back(self, deliveries, error, *, counted):
        moment = next(self.clock)
        for entry in filter(None, map(self.held, deliveries)):
            if counted:
                self._fail(entry, error, moment)
                continue
            entry.deliveries -= 1
            if entry.state == "in_job":
                self._enqueue(entry)
            else:
                entry.state, entry.lease = "waiting", None

    def find(self, names):
        return [
            Found(e.state, e.result, e.error) if (e := self.entries.get(name)) else Found("unknown") for name in names
        ]

    def counts(self):
        waiting, number = [0, 0, 0], dict.fromkeys(("leased", "in_job", "done", "dead"), 0)
        for entry in self.entries.values():
            state = entry.state
            if state == "leased" and entry.over:
                state = "dead" if is_dead(entry.deliveries, MAX_ALONE) else "waiting"
            if state == "waiting":
                waiting[Stage.after(entry.deliveries)] += 1
            else:
                number[state] += 1
        return Counts(tuple(waiting), **number)

    def _dead(self):
        return sorted((e for e in self.entries.values() if e.state == "dead"), key=lambda e: e.death)

    def dead_letters(self):
        self.pass_on_lost()
        return [(entry.item, entry.deliveries, entry.error) for entry in self._dead()]

    def requeue(self, names):
        self.pass_on_lost()
        dead = {entry.item.name: entry for entry in self._dead()}
        wanted = list(dead) if names is None else [name for name in dict.fromkeys(names) if name in dead]
        for name in wanted:
            dead[name].deliveries = 0
            self._enqueue(dead[name])
        return len(wanted)

    def export(self):
        rows = sorted(self.entries.values(), key=lambda e: e.put)
        return [
            (e.item.name, *self.find([e.item.name]), e.deliveries, None if e.state == "done" else e.item.payload)
            for e in rows
        ]

    def begin_job(self, job, deliveries, *, over):
        self.jobs[job.token] = [job, not over]
        for delivery in deliveries:
            entry = self.held(delivery)
            if entry and entry.state == "leased":
                entry.state, entry.job = "in_job", job.token

    def update_job(self, job):
        if job.token in self.jobs:
            self.jobs[job.token][0] = job

    def free_jobs(self):
        return [job for job, held in self.jobs.values() if not held]

    def hold_jobs(self, tokens, *, over):
        for token in tokens:
            if token in self.jobs:
                self.jobs[token][1] = not over

    def tied(self, token):
        tied = [e for e in self.entries.values() if e.state == "in_job" and e.job == token]
        return sorted(tied, key=lambda e: e.put)

    def end_job(self, token, error):
        moment = next(self.clock)
        for entry in self.tied(token):
            self._fail(entry, error, moment)
        self.jobs.pop(token, None)
