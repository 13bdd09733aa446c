"""A run of several parts of the library at once, drawn from a `random.Random`; see `simulation.scenario` for the times in it.

The scenarios of `simulation.scenario` have one batcher whose callers all ask different things, and are checked to the instant. Those
here have what those lack, each part in some of them: equal texts, embeddings, a semantic cache, relayed requests, audits, budgets,
token limits, two batchers on one transport, and a spool with workers that die. They are checked for what must be true in any case.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simulation.scenario import ERRORS, REFUSALS, REPLY_TROUBLE, TICK, TROUBLE, Fault, brief

if TYPE_CHECKING:
    from random import Random

PARTS = {
    "equal": 0.35,
    "vectors": 0.35,
    "similar": 0.25,
    "forward": 0.3,
    "audit": 0.25,
    "budget": 0.2,
    "quota": 0.3,
    "pair": 0.3,
    "spool": 0.25,
}
"""Parts, and how many scenarios in a hundred have them."""

TROUBLES = {
    "alike": 0.6,
    "trouble": 0.6,
    "poison": 0.15,
    "cancel": 0.4,
    "deadline": 0.35,
    "close": 0.2,
    "crowd": 0.2,
    "unreported": 0.2,
}

"""What happens in some of them; with "alike" all are of one tenant, priority and account, so that more goes together."""

TOPICS = ("apples", "pears", "plums", "cherries", "figs", "grapes", "melons", "berries")
FILLERS: dict[str | None, tuple[str, ...]] = {
    None: ("", " please", " just"),
    "red": (" kindly", " thanks"),
    "blue": (" also", " well"),
}
"""Words of no meaning, by tenant: texts of one topic are similar, and show whose they are."""

VECTOR_TROUBLE = (
    "shuffled", "wrong_index", "duplicate_index", "missing_index", "no_indices", "one_based", "dropped", "renumbered", "extra",
    "empty", "wrong_dimensions", "nan", "null",
)  # fmt: skip
LOOK_UP_TROUBLE = ("raises", "hangs", "short", "nan", "longer", "slow")
"""What `SemanticCache(embed=)` may do."""

FORWARD_TROUBLE = ("refused", "server_error", "no_connection", "broken_off", "silent")


@dataclass
class Call:
    """What one caller does.

    Attributes:
        at: Seconds from the start.
        what: "submit", "embed", "embed_many", "forward" or "enqueue".
        batcher: Number of its batcher.
        kind: Output type of a submit or what is spooled: "text", "fact" or "number".
        texts: What is asked: one text, of `embed_many` several.
        cancel: None, ("after", seconds from its start), or ("answer", "before" or "after") as in `simulation.scenario`.
        pause: Seconds that it takes for each piece of what is relayed; and before it fetches what was spooled.
        charged: Whether what is relayed names a model and costs tokens.
        again: Whether what was spooled is put a second time.
        deadly: Whether a worker dies of it.
        poison: Whether the endpoint refuses every call that carries it.
    """

    at: float = 0.0
    what: str = "submit"
    batcher: int = 0
    kind: str = "text"
    texts: tuple[str, ...] = ()
    system: str = "Shout."
    tenant: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    priority: str = "normal"
    timeout: float | None = None
    cancel: tuple[str, float | str] | None = None
    pause: float = 0.0
    charged: bool = False
    again: bool = False
    deadly: bool = False
    poison: bool = False


@dataclass
class Worker:
    """A worker of the spool, which begins anew some time after it has died or ended.

    Attributes:
        at: Seconds from the start.
        dies: Seconds after which its first life ends, or None.
        rest: Seconds between two lives.
    """

    at: float
    dies: float | None
    rest: float


@dataclass
class Mixed:
    """One run; what is not described is as in `simulation.scenario.Scenario`.

    Attributes:
        parts: The names of what takes part.
        batchers: Number of batchers on the one transport.
        together: Whether they share one `RateLimit` and one `Budget`.
        audit: Settings of `AuditPolicy`; none for no audits.
        look_ups: Faults of `SemanticCache(embed=)`, in order; None to look up by the endpoint.
        embeds: One fault for each embeddings call; later ones get a sound reply. `forwards` likewise.
        lease: Seconds of a lease of the spool.
        outages: Operations of the spool that fail, by number: "before" or "after" their effect.
        close: When the first batcher is closed, and with what grace.
    """

    parts: frozenset[str] = frozenset()
    policy: dict[str, object] = field(default_factory=dict)
    fallback: dict[str, object] = field(default_factory=dict)
    retry: dict[str, object] = field(default_factory=dict)
    rate_limit: dict[str, object] = field(default_factory=dict)
    budget: dict[str, object] = field(default_factory=dict)
    audit: dict[str, object] = field(default_factory=dict)
    batchers: int = 1
    together: bool = True
    calls: list[Call] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    embeds: list[Fault] = field(default_factory=list)
    forwards: list[Fault] = field(default_factory=list)
    look_ups: list[Fault] | None = None
    poison: str = "bad_request"
    workers: list[Worker] = field(default_factory=list)
    lease: float = 4.0
    outages: dict[int, str] = field(default_factory=dict)
    spool_latency: float = 0.0
    close: tuple[float, float | None] | None = None
    order: int | None = 0
    shuffled: float = 1.0

    def __str__(self) -> str:
        return brief(self)


def draw(random: Random) -> Mixed:
    """Draw a run."""
    parts = {name for name, share in PARTS.items() if random.random() < share} or {random.choice(list(PARTS))}
    troubles = {name for name, share in TROUBLES.items() if random.random() < share}
    scenario = Mixed(
        parts=frozenset(parts),
        policy=_draw_policy(random, parts, troubles),
        fallback={"resolve": random.choice((None, "stream", "verified")), "max_concurrent": random.randint(1, 4)},
        retry={
            "max_attempts": random.randint(1, 4),
            "base": random.choice((TICK, 0.5)),
            "cap": random.choice((1.0, 20.0)),
            "budget": random.choice((0.2, 1.0)),
            "reserve": random.choice((0, 10)),
        },
        poison=random.choice(REFUSALS),
        batchers=2 if "pair" in parts else 1,
        together=random.random() < 0.8,
        order=random.getrandbits(32) if random.random() < 0.85 else None,
        shuffled=random.choice((0.2, 1.0, 1.0)),
    )
    if "quota" in parts:
        quotas = (
            {"tpm": 1_000},
            {"tpm": 2_000},
            {"tpm": 8_000},
            {"rpm": 6, "tpm": 4_000},
            {"rpm": 6},
            {"adaptive": True},
        )
        scenario.rate_limit = {**random.choice(quotas), "charge": random.choice(("reserved", "used"))}
    if "budget" in parts:
        limits = (
            {"tokens": 1_500},
            {"tokens": 5_000},
            {"tokens": 20_000},
            {"usd": 0.004},
            {"usd": 0.01, "tokens": 9_000},
        )
        scenario.budget = {**random.choice(limits), "per": random.choice(("batcher", "batcher", "tenant"))}
    if "audit" in parts:
        scenario.audit = {"rate": random.choice((1.0, "auto")), "adapt": random.random() < 0.8}
    _draw_faults(random, scenario, parts, troubles)
    bursts = [random.randint(0, 128) * TICK for _ in range(random.randint(1, 4))]
    count = random.randint(2, 20)
    scenario.calls = [_draw_call(random, parts, troubles, bursts, number) for number in range(count)]
    if "quota" in parts and random.random() < 0.3:
        for call in scenario.calls:  # over some minutes, as limits are
            call.at = random.randint(0, 12) * 16.0
    if "spool" in parts:
        scenario.workers = [
            Worker(random.choice(bursts), random.choice((None, TICK, 0.5, 2.0)), random.choice((0.5, 3.0)))
            for _ in range(random.randint(0, 2))
        ]
        scenario.lease = random.choice((0.5, 2.0, 6.0))
        scenario.spool_latency = random.choice((0.0, 0.0, TICK, 8 * TICK))
        if "trouble" in troubles:
            scenario.outages = {random.randint(0, 60): random.choice(("before", "after")) for _ in range(4)}
    if "close" in troubles:
        scenario.close = (
            random.choice(bursts) + random.choice((0, 1, 8, 64)) * TICK,
            random.choice((0.0, 0.5, 30.0, None)),
        )
    return scenario


def _draw_policy(random: Random, parts: set[str], troubles: set[str]) -> dict[str, object]:
    policy: dict[str, object] = {
        "max_batch_size": random.choice((1, 2, 3, 4, 8)),
        "max_wait": random.choice((0.0, TICK, 16 * TICK)),
        "low_max_wait": random.choice((32 * TICK, 2.0)),
        "idle": random.choice(("flush", "wait")),
        "max_concurrent_batches": random.choice((1, 1, 2, 4, 64)),
    }
    if "equal" in parts:
        policy["share"] = True
    if "crowd" in troubles:
        policy["max_queued"] = random.randint(1, 6)
        policy["when_full"] = random.choice(("wait", "wait", "reject", "bypass"))
    return policy


def _draw_faults(random: Random, scenario: Mixed, parts: set[str], troubles: set[str]) -> None:
    reported = 0.5 if "unreported" in troubles else 1.0
    rate = 0.5 if "trouble" in troubles else 0.0
    kinds = random.sample(TROUBLE + REPLY_TROUBLE, random.randint(1, 4))

    def some(kinds: tuple[str, ...] | list[str], most: int) -> list[Fault]:
        return [
            Fault(
                kind=random.choice(kinds) if random.random() < rate else "ok",
                latency=random.choice((0.0, TICK, TICK, 4 * TICK, 16 * TICK, 64 * TICK)),
                pieces=random.choice((1, 2, 5)),
                gap=random.choice((0.0, 0.0, TICK, 8 * TICK)),
                usage=random.random() < reported,
                retry_after=random.choice((None, None, 0.0, 1.0)),
                stubborn=random.choice((0.0, 0.0, 0.0, 0.5)),
                dice=random.getrandbits(32),
            )
            for _ in range(random.randint(1, most))
        ]

    scenario.faults = some(kinds, 10)
    lists = random.choices(
        (*VECTOR_TROUBLE, "shuffled", "renumbered", random.choice(ERRORS), "bad_request", "too_large"), k=3
    )
    scenario.embeds = some(lists, 8)
    scenario.forwards = some(FORWARD_TROUBLE, 4)
    if "similar" in parts and random.random() < 0.6:
        scenario.look_ups = some(LOOK_UP_TROUBLE, 6)


def _draw_call(random: Random, parts: set[str], troubles: set[str], bursts: list[float], number: int) -> Call:
    kinds = ["submit", "submit"]
    kinds += ["embed", "embed", "embed_many"] if "vectors" in parts else []
    kinds += ["forward"] if "forward" in parts else []
    kinds += ["enqueue", "enqueue"] if "spool" in parts else []
    alike = "alike" in troubles
    call = Call(
        at=random.choice(bursts) if random.random() < 0.6 else random.randint(0, 192) * TICK,
        what=random.choice(kinds),
        batcher=random.randint(0, 1) if "pair" in parts else 0,
        kind=random.choice(("text", "text", "fact", "number") if not alike else ("text", "fact")),
        system=random.choice(("Shout.", "Shout.", "Whisper.")) if not alike else "Shout.",
        tenant=random.choice((None, None, "red", "blue")) if not alike or "similar" in parts else None,
        headers=random.choice(((), (), (), (("authorization", "Bearer one"),))) if not alike else (),
        priority=random.choice(("normal", "normal", "high", "low")) if not alike else "normal",
        pause=random.choice((0.0, TICK, 0.5)),
        charged=random.random() < 0.7,
    )
    most = 2 if "equal" in parts or "similar" in parts else len(TOPICS)
    own = "" if "equal" in parts or "similar" in parts else f" of number {number}"
    kind = call.kind if call.what in ("submit", "enqueue") else "vector"
    where = "spooled" if call.what == "enqueue" else ("here", "there")[call.batcher]
    own = f" of number {number}" if call.what == "enqueue" else own
    count = random.randint(0, 4) if call.what == "embed_many" else 1
    call.texts = tuple(
        f"{kind} {where} cook {random.choice(TOPICS[:most])}{own}{random.choice(FILLERS[call.tenant])}"
        for _ in range(count)
    )
    if "deadline" in troubles and random.random() < 0.4:
        call.timeout = random.choice((0.0, TICK, 8 * TICK, 32 * TICK, 1.0, 8.0))
    if "cancel" in troubles and random.random() < 0.4:
        call.cancel = random.choice(
            (
                ("after", random.choice((0.0, TICK, 8 * TICK, 17 * TICK, 1.0))),
                ("after", call.timeout if call.timeout is not None else 0.0),
                ("answer", random.choice(("before", "after"))),
            )
        )
    call.poison = "poison" in troubles and random.random() < 0.2
    if call.what == "enqueue":
        call.again = random.random() < 0.3
        call.deadly = "poison" in troubles and random.random() < 0.15
    return call
