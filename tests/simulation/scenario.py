"""What happens in one simulated run, drawn from a `random.Random`: a pure function of the seed, so a number replays it.

Every time is a multiple of `TICK`, a binary fraction: sums are exact, and instants coincide often (an answer with a deadline, a
cancel with a flush), which is where the bugs are. Each scenario draws first which kinds of trouble there are at all, because a run
with all of them at once lets none of them act alone.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

TICK = 1 / 64

LATENCIES = (0.0, TICK, TICK, 4 * TICK, 16 * TICK, 64 * TICK, 128 * TICK)
GAPS = (0.0, 0.0, TICK, 8 * TICK)

REPLY_TROUBLE = (
    "short",  # items are missing
    "reordered",
    "duplicate",  # an id is answered twice, once wrongly
    "foreign",  # elements with another batch's ids, or with ids that differ in a letter
    "broken",  # an element is no JSON
    "hijacked",  # one item gives orders to all: every answer is wrong, the canary's too; without one, as it should be
    "wrong_type",
    "prose",  # fences and words around the reply
    "nonsense",  # no JSON at all
    "empty",
    "truncated",  # finish_reason "length"
    "cut",  # the stream ends without a finish_reason
)
REFUSALS = ("bad_request", "too_large", "unprocessable", "too_long", "filtered", "filtered_answer", "refusal")
"""What one item can be to blame for."""
ERRORS = (
    "auth",
    "forbidden",
    "not_found",
    "rate_limited",
    "server_error",
    "overloaded",
    "quota",
    "no_connection",
    "reset",
    "stream_error",
    "timeout",
    "hang",
    "alien",  # the transport raises something that is no error of the library's
)
TROUBLE = REPLY_TROUBLE + REFUSALS + ERRORS


@dataclass
class Fault:
    """What one attempt gets from the endpoint.

    Attributes:
        kind: "ok", or one of `TROUBLE`.
        latency: Seconds before the first piece.
        pieces: Pieces in which a streamed reply comes.
        gap: Seconds between pieces.
        usage: Whether the reply reports usage.
        retry_after: What an error asks to wait, in seconds, or None.
        stubborn: Seconds that it takes to end when it is cancelled.
        dice: Seed of what is left to chance, such as which items are missing.
    """

    kind: str = "ok"
    latency: float = TICK
    pieces: int = 3
    gap: float = 0.0
    usage: bool = True
    retry_after: float | None = None
    stubborn: float = 0.0
    dice: int = 0


@dataclass
class Ask:
    """One request, by `submit` or by `map`.

    Attributes:
        at: Seconds from the start.
        kind: Output type: "text", "fact" (a struct) or "number".
        cancel: None, ("after", seconds from its start), ("sent", seconds from the attempt that first carries it), or ("answer",
            "before" or "after"): in the very step in which its answer comes.
        poison: Whether the endpoint refuses every call that carries it.
        misuse: None, "refused" for messages that are a ConfigError, or "raising" for messages that raise when they are read.
    """

    at: float = 0.0
    kind: str = "text"
    system: str = "Shout."
    size: int = 4
    max_tokens: int | None = None
    temperature: float | None = None
    tenant: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    priority: str = "normal"
    timeout: float | None = None
    alone: bool = False
    cancel: tuple[str, float | str] | None = None
    poison: bool = False
    misuse: str | None = None


@dataclass
class Bulk:
    """One `map`.

    Attributes:
        gaps: Seconds before each item of an async source; None for a plain iterator.
        leave: Results after which the consumer leaves, or None.
        how: "break", or "cancel": its task is cancelled while it waits for the next result.
        pause: Seconds that the consumer takes for each result.
    """

    at: float
    asks: list[Ask]
    gaps: list[float] | None = None
    max_pending: int | None = None
    ordered: bool = False
    leave: int | None = None
    how: str = "break"
    pause: float = 0.0


@dataclass
class Scenario:
    """One run: the settings, what callers do and when, and what the endpoint does to each attempt, in order of arrival.

    Attributes:
        policy: Settings of `FlushPolicy`.
        fallback: Settings of `FallbackPolicy`.
        retry: Settings of `RetryPolicy`.
        rate_limit: Settings of `RateLimit`; none for no limit.
        budget: Settings of `Budget`; none for no budget.
        priced: Whether the price of the model is known.
        faults: One for each attempt; later ones get a reply that is as it should be.
        poison: The refusal that calls with poison get.
        flushes: When `flush` is called.
        closes: When `aclose` is called, with what grace, and after how many seconds that call is cancelled, or None.
        order: Seed of the order in which things of one turn happen, or None for asyncio's own.
        shuffled: Share of the turns that are shuffled.
    """

    policy: dict[str, object] = field(default_factory=dict)
    fallback: dict[str, object] = field(default_factory=dict)
    retry: dict[str, object] = field(default_factory=dict)
    rate_limit: dict[str, object] = field(default_factory=dict)
    budget: dict[str, object] = field(default_factory=dict)
    priced: bool = False
    asks: list[Ask] = field(default_factory=list)
    bulks: list[Bulk] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    poison: str = "bad_request"
    flushes: list[float] = field(default_factory=list)
    closes: list[tuple[float, float | None, float | None]] = field(default_factory=list)
    order: int | None = 0
    shuffled: float = 1.0

    def __str__(self) -> str:
        return brief(self)


def brief(scenario: object) -> str:
    """Return everything in *scenario* that is not as usual, a line each."""
    lines = []
    for part in fields(scenario):
        value = getattr(scenario, part.name)
        if isinstance(value, list):
            lines += [f"{part.name}[{index}]: {_brief(member)}" for index, member in enumerate(value)]
        else:
            lines.append(f"{part.name}: {value}")
    return "\n".join(lines)


def _brief(member: object) -> str:
    if not is_dataclass(member):
        return str(member)
    usual = {
        part.name: part.default if part.default_factory is MISSING else part.default_factory()
        for part in fields(member)
    }
    told = (
        f"{name}={[_brief(part) for part in value] if name == 'asks' else value}"
        for name, value in vars(member).items()
        if value != usual[name]
    )
    return ", ".join(told) or "as usual"


def draw(random: Random) -> Scenario:
    """Draw a scenario."""
    busy = random.random()
    # Some runs are nearly undisturbed: only there can it be told when exactly everything has to happen.
    calm = random.random() < 0.3
    features = {name for name in _FEATURES if random.random() < _FEATURES[name] * (0.2 if calm else 1.0)}
    if calm:
        features |= {"trickle", "slow"}
    if "misuse" in features and random.random() < 0.7:  # it does harm where others wait for room
        features.add("crowd")
    trouble = random.sample(TROUBLE + REPLY_TROUBLE, random.randint(1, 4)) if "trouble" in features else []
    if random.random() < 0.2 and trouble:
        trouble = list(TROUBLE)
    scenario = Scenario(
        policy=_draw_policy(random, features),
        fallback={
            "resolve": random.choice((None, "stream", "verified", "verified")),
            "max_concurrent": random.randint(1, 4),
        },
        retry={
            "max_attempts": random.randint(1, 4),
            "base": random.choice((TICK, 0.5)),
            "cap": random.choice((1.0, 20.0)),
            "budget": random.choice((0.0, 0.2, 1.0)),
            "reserve": random.choice((0, 2, 10)),
        },
        poison=random.choice(REFUSALS),
        order=random.getrandbits(32) if random.random() < 0.85 else None,
        shuffled=random.choice((0.2, 1.0, 1.0)),
    )
    if "quota" in features:
        quotas = (
            {"rpm": 4},
            {"rpm": 12},
            {"rpm": 120},
            {"tpm": 20_000},
            {"rpm": 60, "tpm": 50_000},
            {"adaptive": True},
        )
        scenario.rate_limit = {**random.choice(quotas), "charge": random.choice(("reserved", "used"))}
    if "canary" in features:
        scenario.fallback.update(resolve=None, canary=True)
        trouble += ["hijacked"] * random.randint(0, len(trouble))
    bursts = [random.randint(0, 128) * TICK for _ in range(random.randint(1, 4))]
    systems = ["Shout.", "Whisper.", "Rhyme."][: random.choice((1, 1, 2, 3)) if not calm else 1]
    kinds = random.choice((["text"], ["fact"], ["text", "fact", "number"] if not calm else ["number"]))
    scenario.asks = [
        _draw_ask(random, features, bursts, systems, kinds)
        for _ in range(random.randint(0 if "bulk" in features else 1, int(4 + 20 * busy)))
    ]
    if "bulk" in features:
        scenario.bulks = [_draw_bulk(random, features, bursts, systems, kinds) for _ in range(random.randint(1, 2))]
    scenario.faults = [_draw_fault(random, features, trouble) for _ in range(random.randint(1, 12))]
    if "flush" in features:
        scenario.flushes = [_draw_instant(random, bursts) for _ in range(random.randint(1, 3))]
    if "close" in features:
        graces = (0.0, TICK, 0.5, 2.0, 30.0, None)
        scenario.closes = [
            (
                _draw_instant(random, bursts),
                random.choice(graces),
                random.choice((0.0, TICK, 0.5)) if "impatient" in features else None,
            )
            for _ in range(random.choice((1, 1, 2)))
        ]
    _draw_money(random, scenario)
    return scenario


def _draw_money(random: Random, scenario: Scenario) -> None:
    """Draw a budget, and `merge="auto"`."""
    if random.random() < 0.15:
        limits = (
            {"tokens": 1_500},
            {"tokens": 5_000},
            {"tokens": 30_000},
            {"usd": 0.002},
            {"usd": 0.01, "tokens": 6_000},
        )
        scenario.budget = {**random.choice(limits), "per": random.choice(("batcher", "batcher", "tenant"))}
        scenario.priced = "usd" in scenario.budget
    if random.random() < 0.08:
        scenario.policy["merge"] = "auto"
        scenario.priced = scenario.priced or random.random() < 0.8


_FEATURES = {
    "trouble": 0.75,
    "poison": 0.15,
    "cancel": 0.5,
    "deadline": 0.4,
    "tenant": 0.3,
    "headers": 0.2,
    "priority": 0.3,
    "alone": 0.15,
    "max_tokens": 0.2,
    "bulk": 0.25,
    "flush": 0.2,
    "close": 0.35,
    "crowd": 0.3,
    "slow": 0.4,
    "unreported": 0.3,
    "tight": 0.1,
    "trickle": 0.3,
    "stubborn": 0.15,
    "impatient": 0.1,
    "canary": 0.15,
    "merge": 0.08,
    "quota": 0.12,
    "misuse": 0.15,
}
"""Kinds of trouble, and how many scenarios in a hundred have them."""


def _draw_policy(random: Random, features: set[str]) -> dict[str, object]:
    policy: dict[str, object] = {
        "max_batch_size": random.choice((1, 2, 3, 3, 4, 6, 16)),
        "max_wait": random.choice((0.0, TICK, 8 * TICK, 16 * TICK, 1.0)),
        "low_max_wait": random.choice((32 * TICK, 2.0)),
        "idle": random.choice(("flush", "wait")),
        "max_concurrent_batches": random.choice((1, 1, 2, 3, 4, 64)),
    }
    if "crowd" in features:
        policy["max_queued"] = random.randint(1, 8)
        policy["when_full"] = random.choice(("wait", "wait", "reject", "bypass"))
    if "merge" in features:
        policy["merge"] = "when-cheaper"
    if "tight" in features:
        policy["max_batch_tokens"] = random.choice((700, 800))
        policy["max_output_tokens"] = random.choice((100, 2_000))
    return policy


def _draw_instant(random: Random, bursts: list[float]) -> float:
    """Draw an instant at which something else may well happen too."""
    return random.choice(bursts) + random.choice((0, 0, 1, 2, 8, 17, 33, 64)) * TICK


def _draw_ask(random: Random, features: set[str], bursts: list[float], systems: list[str], kinds: list[str]) -> Ask:
    def some(feature: str, share: float) -> bool:
        return feature in features and random.random() < share

    ask = Ask(
        at=random.choice(bursts) if "trickle" not in features else random.randint(0, 192) * TICK,
        kind=random.choice(kinds),
        system=random.choice(systems),
        size=random.choice((0, 4, 40)),
    )
    if some("tenant", 0.7):
        ask.tenant = random.choice(("red", "blue"))
    if some("headers", 0.5):
        ask.headers = (("authorization", random.choice(("Bearer one", "Bearer two"))),)
    if some("priority", 0.6):
        ask.priority = random.choice(("high", "low", "low"))
    if some("max_tokens", 0.6):
        ask.max_tokens = random.choice((8, 64))
    if some("alone", 0.4):
        ask.alone = True
    if some("deadline", 0.6):
        ask.timeout = random.choice((0.0, TICK, 8 * TICK, 17 * TICK, 32 * TICK, 1.0, 2.0, 8.0))
    if some("cancel", 0.5):
        ask.cancel = random.choice(
            (
                ("after", random.choice((0.0, TICK, 8 * TICK, 16 * TICK, 17 * TICK, 32 * TICK, 1.0))),
                ("after", ask.timeout if ask.timeout is not None else 0.0),
                ("sent", random.choice((0.0, 0.0, TICK, 4 * TICK, 16 * TICK))),
                ("answer", random.choice(("before", "after"))),
            )
        )
    if some("poison", 0.25):
        ask.poison = True
    if some("misuse", 0.5):
        ask.misuse = random.choice(("refused", "raising"))
    return ask


def _draw_bulk(random: Random, features: set[str], bursts: list[float], systems: list[str], kinds: list[str]) -> Bulk:
    asks = [_draw_ask(random, features - {"cancel"}, bursts, systems, kinds) for _ in range(random.randint(0, 14))]
    bulk = Bulk(at=random.choice(bursts), asks=asks)
    if random.random() < 0.5:
        bulk.gaps = [random.choice((0.0, 0.0, TICK, 16 * TICK, 1.0, 3.0)) for _ in range(len(asks) + 1)]
    bulk.max_pending = random.choice((None, 1, 3, 8))
    bulk.ordered = random.random() < 0.5
    bulk.pause = random.choice((0.0, 0.0, TICK, 8 * TICK))
    if "cancel" in features and random.random() < 0.5:
        bulk.leave, bulk.how = random.randint(0, len(asks)), random.choice(("break", "cancel"))
    return bulk


def _draw_fault(random: Random, features: set[str], trouble: list[str]) -> Fault:
    latencies = LATENCIES if "slow" in features else LATENCIES[:4]
    return Fault(
        kind=random.choice(trouble) if trouble and random.random() < 0.6 else "ok",
        latency=random.choice(latencies),
        pieces=random.choice((1, 2, 5, 12)),
        gap=random.choice(GAPS),
        usage="unreported" not in features or random.random() < 0.5,
        retry_after=random.choice((None, None, 0.0, TICK, 1.0, 5.0)),
        stubborn=random.choice((0.0, TICK, 0.5)) if "stubborn" in features else 0.0,
        dice=random.getrandbits(32),
    )
