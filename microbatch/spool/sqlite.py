"""A spool in an SQLite file: it outlives every process, and several may use it at once.

A request has a row in `items`, small because it is rewritten with every step; its content is in `payloads` until it is done, its
answer in `results` from then on. Row ids follow the order in which requests were put. A leased request has a `lease`, the token of the
delivery, so that an earlier holder changes nothing.

Leases run by the wall clock, which may be set. If it was set back, they seem to end later than any lease can: they are cut to the
longest ever given (`longest`). If it was set forward, or all processes were asleep, they expired long ago though their holders may
live: they are granted once more, to be renewed by those that live.
"""

from __future__ import annotations

import os
import secrets
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from microbatch.checking import Count, Seconds, checks_arguments
from microbatch.spool.records import (
    KEEP,
    LOST,
    MAX_ALONE,
    OVERDUE,
    Counts,
    DeadLetter,
    Delivery,
    Found,
    Item,
    Job,
    Kept,
    Name,
    PutOutcome,
    Spool,
    Stage,
    as_kept,
    is_dead,
)
from microbatch.storage.sqlite import Database, json_array

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

T = TypeVar("T")

PAGE: Final = 100  # most rows with texts that are read at once
_BUSY: Final = 30.0  # seconds; a request is not lost because many processes write
_MOST_DROPPED: Final = 64  # answers, beyond as many as are written, to keep transactions short

# Each index holds the rows of one state only, so a step touches two of them and never scans the done ones. The state is an indexed
# column as well, without which SQLite would look it up in the row.
# `stage` is that of the next delivery, and valid while a request waits (a generated column would make no index a covering one);
# `until`: when the lease expires, or when the answer may be dropped; `died_at`: of a lease, when it was granted once more.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, digest BLOB NOT NULL, queued_at REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting',
    deliveries INTEGER NOT NULL DEFAULT 0, stage INTEGER NOT NULL DEFAULT 0,
    lease TEXT, until REAL, job TEXT, error TEXT, died_at REAL);
CREATE INDEX IF NOT EXISTS items_waiting ON items (state, stage) WHERE state = 'waiting';
CREATE INDEX IF NOT EXISTS items_leased ON items (state, until, deliveries) WHERE state = 'leased';
CREATE INDEX IF NOT EXISTS items_in_job ON items (state, job) WHERE state = 'in_job';
CREATE INDEX IF NOT EXISTS items_done ON items (state, until) WHERE state = 'done';
CREATE INDEX IF NOT EXISTS items_dead ON items (state, died_at) WHERE state = 'dead';
CREATE TABLE IF NOT EXISTS payloads (id INTEGER PRIMARY KEY, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS results (id INTEGER PRIMARY KEY, result BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (token TEXT PRIMARY KEY, content BLOB NOT NULL, batch_id TEXT, until REAL NOT NULL);
CREATE INDEX IF NOT EXISTS jobs_by_lease ON jobs (until);
CREATE TABLE IF NOT EXISTS longest (name TEXT PRIMARY KEY, seconds REAL NOT NULL) WITHOUT ROWID;
"""


class SQLiteSpool(Spool):
    """A durable queue in a file. Each call is one transaction, on the disk when the call returns.

    Requests of a stage are always taken in the order in which they were put. Leases run by the wall clock, so processes on several
    machines would need clocks that agree; several machines should use `RedisSpool`, as SQLite's locks are unreliable on network file
    systems.

    Args:
        path: The file; created if missing, and readable by its owner only.
        keep: Seconds for which answers are kept; later writes drop them in small portions.
        max_alone: Number of single deliveries after which a request is dead.

    Raises:
        ConfigError: A limit is below its minimum.
    """

    @checks_arguments
    def __init__(self, path: str | os.PathLike[str], *, keep: Seconds = KEEP, max_alone: Count = MAX_ALONE) -> None:
        self._keep = keep
        self._max_alone = max_alone
        self._database = Database(path, _SCHEMA, kind="spool", version=1, durable=True, busy=_BUSY)
        self._now = time.time  # noqa: TID251 requests outlive the process

    async def open(self) -> None:
        await self._database.open()

    async def aclose(self) -> None:
        await self._database.aclose()

    # The time is that of the transaction: a lease does not run while its transaction waits for others.

    async def _write(self, step: Callable[[sqlite3.Connection, float], T]) -> T:
        return await self._database.run(lambda db: step(db, self._now()))

    async def _read(self, step: Callable[[sqlite3.Connection, float], T]) -> T:
        return await self._database.read(lambda db: step(db, self._now()))

    # --- requests

    async def put(self, items: Sequence[Item]) -> list[PutOutcome]:
        def put(db: sqlite3.Connection, now: float) -> list[PutOutcome]:
            _drop_old_answers(db, now, _MOST_DROPPED + len(items))
            return [_put(db, now, item) for item in items]

        return await self._write(put)

    async def take(self, stage: Stage, most: int, *, lease: float) -> list[Delivery]:
        def take(db: sqlite3.Connection, now: float) -> list[Delivery]:
            self._pass_on_lost(db, now)
            rows = db.execute(
                "SELECT id, name, digest, payload, deliveries + 1, queued_at FROM items JOIN payloads USING (id) "
                "WHERE state = 'waiting' AND stage = ? ORDER BY id LIMIT ?",
                (stage, most),
            ).fetchall()
            token, end = secrets.token_hex(8), _end(db, now, "lease", lease)
            db.executemany(
                "UPDATE items SET state = 'leased', deliveries = deliveries + 1, lease = ?, until = ? WHERE id = ?",
                [(token, end, number) for number, *_ in rows],
            )
            return [_delivery(token, *row) for _, *row in rows]

        return await self._write(take)

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float) -> None:
        def renew(db: sqlite3.Connection, now: float) -> None:
            end = _end(db, now, "lease", lease)
            db.executemany(
                "UPDATE items SET until = ?, died_at = NULL WHERE name = ? AND lease = ? AND state = 'leased'",
                [(end, each.item.name.key, each.lease) for each in deliveries],
            )

        await self._write(renew)

    async def finish(self, results: Sequence[tuple[Delivery, bytes]]) -> None:
        def finish(db: sqlite3.Connection, now: float) -> None:
            end = _end(db, now, "keep", self._keep)
            _drop_old_answers(db, now, _MOST_DROPPED + len(results))
            for delivery, result in results:
                _finish(db, delivery.item, result, end)

        await self._write(finish)

    async def give_back(self, deliveries: Sequence[Delivery], *, error: str, counted: bool) -> None:
        def give_back(db: sqlite3.Connection, now: float) -> None:
            query = "SELECT id, deliveries FROM items WHERE name = ? AND lease = ?"
            rows: dict[int, int] = {}  # number of deliveries by row; each row once
            for each in deliveries:
                rows.update(db.execute(query, (each.item.name.key, each.lease)).fetchall())
            if counted:
                self._fail(db, now, [(number, times, as_kept(error)) for number, times in rows.items()])
                return
            db.executemany(
                "UPDATE items SET state = 'waiting', stage = ?, deliveries = deliveries - 1, "
                "lease = NULL, until = NULL, job = NULL, died_at = NULL WHERE id = ?",
                [(Stage.after(times - 1), number) for number, times in rows.items()],
            )

        await self._write(give_back)

    def _pass_on_lost(self, db: sqlite3.Connection, now: float) -> None:
        """Move requests whose leases have expired to their next stage, or to the dead letters."""
        _mend_leases(db, now)
        lost = db.execute("SELECT id, deliveries FROM items WHERE state = 'leased' AND until <= ?", (now,)).fetchall()
        self._fail(db, now, [(number, deliveries, LOST.format(deliveries)) for number, deliveries in lost])

    def _fail(self, db: sqlite3.Connection, now: float, failed: Iterable[tuple[int, int, str]]) -> None:
        """Move requests (row id, number of deliveries, error) to their next stage, or to the dead letters."""
        alive: list[tuple[Stage, int]] = []
        dead: list[tuple[str, float, int]] = []
        for number, deliveries, error in failed:
            if is_dead(deliveries, self._max_alone):
                dead.append((error, now, number))
            else:
                alive.append((Stage.after(deliveries), number))
        freed = "lease = NULL, until = NULL, job = NULL"
        db.executemany(f"UPDATE items SET state = 'waiting', stage = ?, {freed}, died_at = NULL WHERE id = ?", alive)  # noqa: S608
        db.executemany(f"UPDATE items SET state = 'dead', {freed}, error = ?, died_at = ? WHERE id = ?", dead)  # noqa: S608

    # --- reading

    async def find(self, names: Sequence[Name]) -> list[Found]:
        keys = [name.key for name in names]

        def find(db: sqlite3.Connection, now: float) -> list[Found]:
            rows = db.execute(
                "SELECT name, state, result, error FROM items LEFT JOIN results USING (id) "
                "WHERE name IN (SELECT value FROM json_each(?)) AND (state != 'done' OR until > ?)",
                (json_array(keys), now),
            )
            found = {key: Found(*rest) for key, *rest in rows}
            return [found.get(key, Found("unknown")) for key in keys]

        return await self._read(find)

    async def counts(self) -> Counts:
        return await self._read(self._counts)

    def _counts(self, db: sqlite3.Connection, now: float) -> Counts:
        waiting = [0] * len(Stage)
        for stage, number in db.execute("SELECT stage, count(*) FROM items WHERE state = 'waiting' GROUP BY stage"):
            waiting[stage] = number
        leased = _one(db, "SELECT count(*) FROM items WHERE state = 'leased' AND until > ?", now)
        in_job = _one(db, "SELECT count(*) FROM items WHERE state = 'in_job'")
        done = _one(db, "SELECT count(*) FROM items WHERE state = 'done' AND until > ?", now)
        dead = _one(db, "SELECT count(*) FROM items WHERE state = 'dead'")
        # Requests with expired leases are counted where the next `take` will put them.
        overdue = now - max(_longest(db, "lease"), OVERDUE)
        for until, deliveries, extended in db.execute(
            "SELECT until, deliveries, died_at FROM items WHERE state = 'leased' AND until <= ?", (now,)
        ):
            if until <= overdue and extended is None:
                leased += 1
            elif is_dead(deliveries, self._max_alone):
                dead += 1
            else:
                waiting[Stage.after(deliveries)] += 1
        full, half, alone = waiting
        found = Counts((full, half, alone), leased, in_job, done, dead)
        return msgspec.structs.replace(found, oldest=max(0.0, now - _first_queued(db))) if found.depth else found

    async def export(self) -> AsyncIterator[Kept]:
        """Yield everything stored, in the order in which it was put."""
        last = 0

        def page(db: sqlite3.Connection, now: float) -> list[Any]:
            return db.execute(
                "SELECT id, name, state, result, error, deliveries, payload FROM items "
                "LEFT JOIN payloads USING (id) LEFT JOIN results USING (id) "
                "WHERE id > ? AND (state != 'done' OR until > ?) ORDER BY id LIMIT ?",
                (last, now, PAGE),
            ).fetchall()

        while rows := await self._read(page):
            for last, key, state, result, error, deliveries, payload in rows:  # noqa: B007 the next page begins there
                yield Kept(Name.of(key), Found(state, result, error), deliveries, payload)

    async def dead_letters(self) -> AsyncIterator[DeadLetter]:
        await self._write(self._pass_on_lost)
        after = 0.0, 0

        def page(db: sqlite3.Connection, _now: float) -> list[Any]:
            return db.execute(
                "SELECT id, name, digest, payload, deliveries, error, died_at FROM items JOIN payloads USING (id) "
                "WHERE state = 'dead' AND (died_at, id) > (?, ?) ORDER BY died_at, id LIMIT ?",
                (*after, PAGE),
            ).fetchall()

        while rows := await self._read(page):
            for number, key, digest, payload, deliveries, error, died_at in rows:
                after = died_at, number
                yield DeadLetter(Item(Name.of(key), digest, payload), deliveries, error, died_at)

    async def requeue(self, names: Sequence[Name] | None = None) -> int:
        def requeue(db: sqlite3.Connection, now: float) -> int:
            self._pass_on_lost(db, now)
            change = (
                "UPDATE items SET state = 'waiting', stage = 0, deliveries = 0, error = NULL, died_at = NULL "
                "WHERE state = 'dead'"
            )
            if names is None:
                return db.execute(change).rowcount
            return sum(db.execute(f"{change} AND name = ?", (name.key,)).rowcount for name in names)

        return await self._write(requeue)

    # --- batch jobs at the provider

    async def begin_job(self, job: Job, deliveries: Sequence[Delivery], *, lease: float) -> None:
        def begin(db: sqlite3.Connection, now: float) -> None:
            end = _end(db, now, "lease", lease)
            db.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?)", (job.token, job.content, job.batch_id, end))
            db.executemany(
                "UPDATE items SET state = 'in_job', job = ?, until = NULL, died_at = NULL "
                "WHERE name = ? AND lease = ? AND state = 'leased'",
                [(job.token, each.item.name.key, each.lease) for each in deliveries],
            )

        await self._write(begin)

    async def update_job(self, job: Job) -> None:
        values = job.content, job.batch_id, job.token
        await self._write(lambda db, _: db.execute("UPDATE jobs SET content = ?, batch_id = ? WHERE token = ?", values))

    async def take_jobs(self, most: int, *, lease: float) -> list[Job]:
        def take(db: sqlite3.Connection, now: float) -> list[Job]:
            _mend_leases(db, now)
            query = "SELECT token, content, batch_id FROM jobs WHERE until <= ? ORDER BY until LIMIT ?"
            jobs = [Job(*row) for row in db.execute(query, (now, most)).fetchall()]
            _renew_jobs(db, now, [job.token for job in jobs], lease)
            return jobs

        return await self._write(take)

    async def renew_jobs(self, tokens: Sequence[str], *, lease: float) -> None:
        await self._write(lambda db, now: _renew_jobs(db, now, tokens, lease))

    async def job_items(self, token: str) -> list[Delivery]:
        query = (
            "SELECT lease, name, digest, payload, deliveries, queued_at FROM items JOIN payloads USING (id) "
            "WHERE state = 'in_job' AND job = ? ORDER BY id"
        )
        return await self._read(lambda db, _: [_delivery(*row) for row in db.execute(query, (token,))])

    async def end_job(self, token: str, *, error: str) -> None:
        def end(db: sqlite3.Connection, now: float) -> None:
            query = "SELECT id, deliveries FROM items WHERE state = 'in_job' AND job = ?"
            self._fail(db, now, [(*row, as_kept(error)) for row in db.execute(query, (token,)).fetchall()])
            db.execute("DELETE FROM jobs WHERE token = ?", (token,))

        await self._write(end)


def _put(db: sqlite3.Connection, now: float, item: Item) -> PutOutcome:
    key = item.name.key
    row = db.execute(
        "SELECT id, digest, state = 'done' AND until <= ? FROM items WHERE name = ?", (now, key)
    ).fetchone()
    if row is not None:
        number, digest, expired = row
        if not expired:
            return "known" if digest == item.digest else "conflict"
        _drop(db, [(number,)])
    number = db.execute(
        "INSERT INTO items (name, digest, queued_at) VALUES (?, ?, ?)", (key, item.digest, now)
    ).lastrowid
    db.execute("INSERT INTO payloads VALUES (?, ?)", (number, item.payload))
    return "new"


def _finish(db: sqlite3.Connection, item: Item, result: bytes, end: float) -> None:
    # The digest, because the answer to an earlier request of that name, dropped since, is no answer to this one.
    row = db.execute(
        "SELECT id FROM items WHERE name = ? AND digest = ? AND state != 'done'", (item.name.key, item.digest)
    ).fetchone()
    if row is not None:
        db.execute(
            "UPDATE items SET state = 'done', until = ?, lease = NULL, job = NULL, error = NULL, died_at = NULL WHERE id = ?",
            (end, *row),
        )
        db.execute("DELETE FROM payloads WHERE id = ?", row)
        db.execute("INSERT INTO results VALUES (?, ?)", (*row, result))


def _drop_old_answers(db: sqlite3.Connection, now: float, most: int) -> None:
    end = now + _longest(db, "keep")
    db.execute(
        "UPDATE items SET until = ? "
        "WHERE id IN (SELECT id FROM items WHERE state = 'done' AND until > ? ORDER BY until DESC LIMIT ?)",
        (end, end, most),
    )
    old = db.execute("SELECT id FROM items WHERE state = 'done' AND until <= ? ORDER BY until LIMIT ?", (now, most))
    _drop(db, old.fetchall())


def _drop(db: sqlite3.Connection, done: list[tuple[int]]) -> None:
    db.executemany("DELETE FROM results WHERE id = ?", done)
    db.executemany("DELETE FROM items WHERE id = ?", done)


def _renew_jobs(db: sqlite3.Connection, now: float, tokens: Sequence[str], lease: float) -> None:
    end = _end(db, now, "lease", lease)
    db.executemany("UPDATE jobs SET until = ? WHERE token = ?", [(end, token) for token in tokens])


def _end(db: sqlite3.Connection, now: float, name: str, seconds: float) -> float:
    """Return when *seconds* from *now* are over, and record the longest duration of its kind (lease, keep)."""
    db.execute(
        "INSERT INTO longest VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET seconds = excluded.seconds "
        "WHERE seconds < excluded.seconds",
        (name, seconds),
    )
    return now + seconds


def _longest(db: sqlite3.Connection, name: str) -> float:
    row = db.execute("SELECT seconds FROM longest WHERE name = ?", (name,)).fetchone()
    return float("inf") if row is None else row[0]  # earlier versions recorded none


def _mend_leases(db: sqlite3.Connection, now: float) -> None:
    """Cut leases that seem to end later than any can, and grant those once more that expired too long ago to prove anything."""
    longest = _longest(db, "lease")
    end = now + longest
    db.execute("UPDATE items SET until = ? WHERE state = 'leased' AND until > ?", (end, end))
    db.execute(
        "UPDATE items SET until = ?, died_at = ? WHERE state = 'leased' AND until <= ? AND died_at IS NULL",
        (end, now, now - max(longest, OVERDUE)),
    )
    db.execute("UPDATE jobs SET until = ? WHERE until > ?", (end, end))


def _delivery(lease: str, key: str, digest: bytes, payload: bytes, deliveries: int, queued_at: float) -> Delivery:
    return Delivery(Item(Name.of(key), digest, payload), deliveries, lease, queued_at)


def _first_queued(db: sqlite3.Connection) -> float:
    """Return when the oldest request that is neither done nor dead was put; there has to be one."""
    first = " UNION ALL ".join(
        [f"SELECT min(id) AS id FROM items WHERE state = 'waiting' AND stage = {int(stage)}" for stage in Stage]  # noqa: S608
        + [f"SELECT min(id) FROM items WHERE state = '{state}'" for state in ("leased", "in_job")]  # noqa: S608
    )
    found: float = _one(db, f"SELECT queued_at FROM items WHERE id = (SELECT min(id) FROM ({first}))")  # noqa: S608
    return found


def _one(db: sqlite3.Connection, query: str, *values: Any) -> Any:
    return db.execute(query, values).fetchone()[0]
