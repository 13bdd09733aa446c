"""What a spool does, in SQL: the tables, and each step as a function that runs within one transaction.

A request has a row in `items`, small because it is rewritten with every step; its content is in `payloads` until it is done, its
answer in `results` from then on. Ids follow the order in which requests were put. Whoever is in the hands of a worker has a `lease`,
which names the delivery, so that an earlier holder moves nothing.

Leases run by the wall clock, which may be set. If it was set back, they end later than any lease can: they are cut to the longest
that was ever given (`longest`). If it was set forward, or all processes were asleep, they ran out long ago though their holders may
live: they are given once more, to be renewed by whoever lives.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.spool.records import (
    LOST,
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
    Stage,
    is_dead,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

PAGE: Final = 100
"""Most rows with texts that are read at once."""

_MOST_DROPPED: Final = 64  # answers, beyond as many as are written, so that no transaction takes long

# Each index holds only the rows of one state: so a step touches two of them, and nothing is searched for among the done. The state
# is in it as well, without which SQLite would look at the row for it.
# `stage` is that of the next delivery, and right while a request waits (as a generated column it would make no index a covering
# one); `until`: when the lease runs out, or when the answer may be dropped; `died_at`: of a lease, when it was given once more.
SCHEMA: Final = """
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

Held = list[tuple[str, str]]  # the keys of names, and the leases they are held by


def put(db: sqlite3.Connection, now: float, items: Sequence[Item]) -> list[PutOutcome]:
    """Queue what is new."""
    _drop_old_answers(db, now, _MOST_DROPPED + len(items))
    return [_put(db, now, item) for item in items]


def _put(db: sqlite3.Connection, now: float, item: Item) -> PutOutcome:
    key = item.name.key
    row = db.execute(
        "SELECT id, digest, state = 'done' AND until <= ? FROM items WHERE name = ?", (now, key)
    ).fetchone()
    if row is not None:
        number, digest, forgotten = row
        if not forgotten:
            return "known" if digest == item.digest else "conflict"
        _drop(db, [(number,)])
    number = db.execute(
        "INSERT INTO items (name, digest, queued_at) VALUES (?, ?, ?)", (key, item.digest, now)
    ).lastrowid
    db.execute("INSERT INTO payloads VALUES (?, ?)", (number, item.payload))
    return "new"


def _drop_old_answers(db: sqlite3.Connection, now: float, most: int) -> None:
    end = now + _longest(db, "keep")
    db.execute(
        "UPDATE items SET until = ? "
        "WHERE id IN (SELECT id FROM items WHERE state = 'done' AND until > ? ORDER BY until DESC LIMIT ?)",
        (end, end, most),
    )
    _drop(
        db,
        db.execute(
            "SELECT id FROM items WHERE state = 'done' AND until <= ? ORDER BY until LIMIT ?", (now, most)
        ).fetchall(),
    )


def _drop(db: sqlite3.Connection, done: list[tuple[int]]) -> None:
    if done:
        db.executemany("DELETE FROM results WHERE id = ?", done)
        db.executemany("DELETE FROM items WHERE id = ?", done)


# --- times


def _end(db: sqlite3.Connection, now: float, name: str, seconds: float) -> float:
    """Return when what begins *now* and lasts *seconds* ends, and note if none of its kind (lease, keep) has lasted so long."""
    db.execute(
        "INSERT INTO longest VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET seconds = excluded.seconds "
        "WHERE seconds < excluded.seconds",
        (name, seconds),
    )
    return now + seconds


def _longest(db: sqlite3.Connection, name: str) -> float:
    """Return how many seconds the longest of a kind lasts; endless if none was noted, as by earlier versions."""
    row = db.execute("SELECT seconds FROM longest WHERE name = ?", (name,)).fetchone()
    return float("inf") if row is None else row[0]


def _mend_leases(db: sqlite3.Connection, now: float) -> None:
    """Cut leases that end later than any can, and give those once more that ran out too long ago to be judged by."""
    longest = _longest(db, "lease")
    end = now + longest
    db.execute("UPDATE items SET until = ? WHERE state = 'leased' AND until > ?", (end, end))
    db.execute(
        "UPDATE items SET until = ?, died_at = ? WHERE state = 'leased' AND until <= ? AND died_at IS NULL",
        (end, now, now - max(longest, OVERDUE)),
    )
    db.execute("UPDATE jobs SET until = ? WHERE until > ?", (end, end))


# --- deliveries


def take(
    db: sqlite3.Connection, now: float, stage: Stage, most: int, *, lease: float, max_alone: int
) -> list[Delivery]:
    """Hand out up to *most* requests of *stage*, after those that were lost have gone on to their next."""
    pass_on_lost(db, now, max_alone)
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
    return [
        _delivery(key, digest, payload, deliveries, queued_at, token)
        for _, key, digest, payload, deliveries, queued_at in rows
    ]


def _delivery(key: str, digest: bytes, payload: bytes, deliveries: int, queued_at: float, lease: str) -> Delivery:
    return Delivery(Item(Name.of(key), digest, payload), deliveries, lease, queued_at)


def pass_on_lost(db: sqlite3.Connection, now: float, max_alone: int) -> None:
    """Put requests whose leases have run out on their next stage, or among the dead."""
    _mend_leases(db, now)
    lost = db.execute("SELECT id, deliveries FROM items WHERE state = 'leased' AND until <= ?", (now,)).fetchall()
    _fail(db, now, [(number, deliveries, LOST.format(deliveries)) for number, deliveries in lost], max_alone)


def _fail(db: sqlite3.Connection, now: float, failed: Iterable[tuple[int, int, str]], max_alone: int) -> None:
    """Put requests on their next stage, or among the dead: each row, how often it was delivered, and what it failed with."""
    alive: list[tuple[Stage, int]] = []
    dead: list[tuple[str, float, int]] = []
    for number, deliveries, error in failed:
        if is_dead(deliveries, max_alone):
            dead.append((error, now, number))
        else:
            alive.append((Stage.after(deliveries), number))
    db.executemany(
        "UPDATE items SET state = 'waiting', stage = ?, lease = NULL, until = NULL, job = NULL, died_at = NULL WHERE id = ?",
        alive,
    )
    db.executemany(
        "UPDATE items SET state = 'dead', lease = NULL, until = NULL, job = NULL, error = ?, died_at = ? WHERE id = ?",
        dead,
    )


def renew(db: sqlite3.Connection, now: float, held: Held, *, lease: float) -> None:
    """Extend the leases that are still in force."""
    end = _end(db, now, "lease", lease)
    db.executemany(
        "UPDATE items SET until = ?, died_at = NULL WHERE name = ? AND lease = ? AND state = 'leased'",
        [(end, key, token) for key, token in held],
    )


def finish(db: sqlite3.Connection, now: float, results: Sequence[tuple[str, bytes, bytes]], *, keep: float) -> None:
    """Store results: key, digest and result each."""
    end = _end(db, now, "keep", keep)
    _drop_old_answers(db, now, _MOST_DROPPED + len(results))
    for key, digest, result in results:
        # The digest, because the answer to an earlier request of that name, dropped since, is none to this one.
        row = db.execute(
            "SELECT id FROM items WHERE name = ? AND digest = ? AND state != 'done'", (key, digest)
        ).fetchone()
        if row is not None:
            db.execute(
                "UPDATE items SET state = 'done', until = ?, lease = NULL, job = NULL, error = NULL, died_at = NULL "
                "WHERE id = ?",
                (end, *row),
            )
            db.execute("DELETE FROM payloads WHERE id = ?", row)
            db.execute("INSERT INTO results VALUES (?, ?)", (*row, result))


def give_back(db: sqlite3.Connection, now: float, held: Held, *, error: str, counted: bool, max_alone: int) -> None:
    """Put back what is still held by whoever gives it back."""
    rows: dict[int, int] = {}  # so that nobody is given back twice at once
    for holding in held:
        rows.update(db.execute("SELECT id, deliveries FROM items WHERE name = ? AND lease = ?", holding).fetchall())
    if counted:
        _fail(db, now, [(number, deliveries, error) for number, deliveries in rows.items()], max_alone)
    else:
        db.executemany(
            "UPDATE items SET state = 'waiting', stage = ?, deliveries = deliveries - 1, "
            "lease = NULL, until = NULL, job = NULL, died_at = NULL WHERE id = ?",
            [(Stage.after(deliveries - 1), number) for number, deliveries in rows.items()],
        )


# --- looking


def find(db: sqlite3.Connection, now: float, keys: Sequence[str]) -> list[Found]:
    """Return what is known of each name."""
    rows = db.execute(
        "SELECT name, state, result, error FROM items LEFT JOIN results USING (id) "
        "WHERE name IN (SELECT value FROM json_each(?)) AND (state != 'done' OR until > ?)",
        (msgspec.json.encode(keys).decode(), now),
    )
    found = {key: Found(*rest) for key, *rest in rows}
    return [found.get(key, Found("unknown")) for key in keys]


def counts(db: sqlite3.Connection, now: float, *, max_alone: int) -> Counts:
    """Count what is where. Those whose leases have run out are where the next taking will put them."""
    waiting = [0] * len(Stage)
    for stage, number in db.execute("SELECT stage, count(*) FROM items WHERE state = 'waiting' GROUP BY stage"):
        waiting[stage] = number
    leased = _one(db, "SELECT count(*) FROM items WHERE state = 'leased' AND until > ?", now)
    in_job = _one(db, "SELECT count(*) FROM items WHERE state = 'in_job'")
    done = _one(db, "SELECT count(*) FROM items WHERE state = 'done' AND until > ?", now)
    dead = _one(db, "SELECT count(*) FROM items WHERE state = 'dead'")
    overdue = now - max(_longest(db, "lease"), OVERDUE)
    for until, deliveries, extended in db.execute(
        "SELECT until, deliveries, died_at FROM items WHERE state = 'leased' AND until <= ?", (now,)
    ):
        if until <= overdue and extended is None:
            leased += 1
        elif is_dead(deliveries, max_alone):
            dead += 1
        else:
            waiting[Stage.after(deliveries)] += 1
    full, half, alone = waiting
    found = Counts((full, half, alone), leased, in_job, done, dead)
    return msgspec.structs.replace(found, oldest=max(0.0, now - _first_queued(db))) if found.depth else found


def _first_queued(db: sqlite3.Connection) -> float:
    """Return when the one put longest ago was put, of those that are neither done nor dead; there has to be one."""
    first = " UNION ALL ".join(
        [f"SELECT min(id) AS id FROM items WHERE state = 'waiting' AND stage = {int(stage)}" for stage in Stage]  # noqa: S608
        + [f"SELECT min(id) FROM items WHERE state = '{state}'" for state in ("leased", "in_job")]  # noqa: S608
    )
    found: float = _one(db, f"SELECT queued_at FROM items WHERE id = (SELECT min(id) FROM ({first}))")  # noqa: S608
    return found


def _one(db: sqlite3.Connection, query: str, *values: Any) -> Any:
    return db.execute(query, values).fetchone()[0]


def export(db: sqlite3.Connection, now: float, after: int) -> list[tuple[int, Kept]]:
    """Return a page of all that is kept: rows whose numbers follow *after*."""
    rows = db.execute(
        "SELECT id, name, state, result, error, deliveries, payload FROM items "
        "LEFT JOIN payloads USING (id) LEFT JOIN results USING (id) "
        "WHERE id > ? AND (state != 'done' OR until > ?) ORDER BY id LIMIT ?",
        (after, now, PAGE),
    )
    return [
        (number, Kept(Name.of(key), Found(state, result, error), deliveries, payload))
        for number, key, state, result, error, deliveries, payload in rows
    ]


# --- dead letters


def dead_letters(db: sqlite3.Connection, _now: float, after: tuple[float, int]) -> list[tuple[int, DeadLetter]]:
    """Return a page of the dead letters: those that died later than *after*, a time and the number of a row."""
    rows = db.execute(
        "SELECT id, name, digest, payload, deliveries, error, died_at FROM items JOIN payloads USING (id) "
        "WHERE state = 'dead' AND (died_at, id) > (?, ?) ORDER BY died_at, id LIMIT ?",
        (*after, PAGE),
    )
    return [
        (number, DeadLetter(Item(Name.of(key), digest, payload), deliveries, error, died_at))
        for number, key, digest, payload, deliveries, error, died_at in rows
    ]


def requeue(db: sqlite3.Connection, now: float, keys: Sequence[str] | None, *, max_alone: int) -> int:
    """Queue dead letters anew, all if *keys* is None; return how many."""
    pass_on_lost(db, now, max_alone)
    change = "UPDATE items SET state = 'waiting', stage = 0, deliveries = 0, error = NULL, died_at = NULL WHERE state = 'dead'"
    if keys is None:
        return db.execute(change).rowcount
    return sum(db.execute(f"{change} AND name = ?", (key,)).rowcount for key in keys)


# --- batch jobs at the provider


def begin_job(db: sqlite3.Connection, now: float, job: Job, held: Held, *, lease: float) -> None:
    """Record a job, and tie what is held to it."""
    end = _end(db, now, "lease", lease)
    db.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?)", (job.token, job.content, job.batch_id, end))
    db.executemany(
        "UPDATE items SET state = 'in_job', job = ?, until = NULL, died_at = NULL WHERE name = ? AND lease = ? AND state = 'leased'",
        [(job.token, *holding) for holding in held],
    )


def update_job(db: sqlite3.Connection, _now: float, job: Job) -> None:
    """Record what is known of a job by now."""
    db.execute("UPDATE jobs SET content = ?, batch_id = ? WHERE token = ?", (job.content, job.batch_id, job.token))


def take_jobs(db: sqlite3.Connection, now: float, most: int, *, lease: float) -> list[Job]:
    """Hand out jobs that nobody holds, those left alone for longest first."""
    _mend_leases(db, now)
    rows = db.execute(
        "SELECT token, content, batch_id FROM jobs WHERE until <= ? ORDER BY until LIMIT ?", (now, most)
    ).fetchall()
    renew_jobs(db, now, [token for token, *_ in rows], lease=lease)
    return [Job(*row) for row in rows]


def renew_jobs(db: sqlite3.Connection, now: float, tokens: Sequence[str], *, lease: float) -> None:
    """Hold jobs for longer."""
    end = _end(db, now, "lease", lease)
    db.executemany("UPDATE jobs SET until = ? WHERE token = ?", [(end, token) for token in tokens])


def job_items(db: sqlite3.Connection, _now: float, token: str) -> list[Delivery]:
    """Return what is tied to a job."""
    rows = db.execute(
        "SELECT name, digest, payload, deliveries, queued_at, lease FROM items JOIN payloads USING (id) "
        "WHERE state = 'in_job' AND job = ? ORDER BY id",
        (token,),
    )
    return [_delivery(*row) for row in rows]


def end_job(db: sqlite3.Connection, now: float, token: str, *, error: str, max_alone: int) -> None:
    """Forget a job; what is tied to it has failed."""
    rows = db.execute("SELECT id, deliveries FROM items WHERE state = 'in_job' AND job = ?", (token,)).fetchall()
    _fail(db, now, [(*row, error) for row in rows], max_alone)
    db.execute("DELETE FROM jobs WHERE token = ?", (token,))
