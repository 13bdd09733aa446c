"""The vectors of texts, from a function or from the batcher's own endpoint."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec

from microbatch.batching.call_state import CallState
from microbatch.batching.overhead import estimate
from microbatch.batching.ticket import HIGH
from microbatch.caching.question import asked_headers
from microbatch.embedding import codec
from microbatch.embedding.calls import MAX_INPUTS, MAX_TOKENS
from microbatch.errors import BadRequest, MalformedAnswer, ShutDown
from microbatch.messages import Usage
from microbatch.semantic.vectors import read_vectors
from microbatch.transports.expenses import Expense

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from microbatch.batching.attribution import UsageAttribution
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.sending import Sending
    from microbatch.batching.ticket import Ticket
    from microbatch.embedding.request import EmbeddingOptions
    from microbatch.protocols import Completion
    from microbatch.semantic.checks import Lease
    from microbatch.semantic.vectors import Floats

    Embed = Callable[[Sequence[Ticket], Sequence[str], float], Awaitable[list[Floats | None]]]
    """Returns the vectors of texts, those of tickets, within a number of seconds; None for one that cannot be used."""

    ReadOptions = Callable[..., EmbeddingOptions]  # `Embedder.read_options`

_GROW_AFTER: Final = 200
"""Calls that were answered after which longer lists are tried again: what was refused may have been a text."""


def by_function(embed: Callable[[list[str]], Awaitable[Sequence[Any]]]) -> Embed:
    """Return a function that embeds texts with *embed*, given by the user: equal texts once."""

    async def run(_tickets: Sequence[Ticket], texts: Sequence[str], seconds: float) -> list[Floats | None]:
        distinct = list(dict.fromkeys(texts))
        async with asyncio.timeout(seconds):
            vectors = read_vectors(await embed(list(distinct)), len(distinct))
        found = dict(zip(distinct, vectors, strict=True))
        return [found[text] for text in texts]

    return run


class _List(msgspec.Struct, eq=False):
    """Texts of one call, each once, with the first ticket of each."""

    options: EmbeddingOptions
    tickets: list[Ticket] = []
    texts: list[str] = []
    size: int = 0  # in bytes


class EndpointEmbedder:
    """Embeds texts with the batcher's own endpoint: one call for all texts of a step with the same tenant and headers.

    The calls have the route "look_up", the highest priority, and no place in the admission queue.

    Args:
        given: What the parts of the batcher share.
        sending: Sends calls.
        attribution: Attributes their cost.
        read_options: Checks the options of a call.
        lease: Holds a slot.
        model: The embedding model; None for the transport's.
    """

    def __init__(
        self,
        given: Dependencies,
        sending: Sending,
        attribution: UsageAttribution,
        *,
        read_options: ReadOptions,
        lease: Lease,
        model: str | None,
    ) -> None:
        self._given = given
        self._sending = sending
        self._attribution = attribution
        self._read_options = read_options
        self._lease = lease
        self._model = model
        self._most = MAX_INPUTS  # texts of one call; fewer after a refusal of the length
        self._taken = 0  # the longest list taken since a list was refused
        self._sound = 0  # calls answered since lists became shorter

    async def __call__(self, tickets: Sequence[Ticket], texts: Sequence[str], seconds: float) -> list[Floats | None]:
        """Return the vectors of *texts*, those of *tickets*; None for one that cannot be used. Raise what ended all calls."""
        found: dict[tuple[object, str], Floats | None] = {}
        errors: list[Exception] = []
        lists = list(self._lists(tickets, texts))
        async with asyncio.timeout(seconds), anyio.create_task_group() as tasks:
            for each in lists:
                tasks.start_soon(self._ask, each, seconds, found, errors)
        if len(errors) == len(lists):
            raise errors[0]
        return [found.get((_sharing(ticket), text)) for ticket, text in zip(tickets, texts, strict=True)]

    def _lists(self, tickets: Sequence[Ticket], texts: Sequence[str]) -> Iterator[_List]:
        """Yield *texts* in lists that may share a call."""
        open_lists: dict[object, _List] = {}
        seen: set[tuple[object, str]] = set()
        for ticket, text in zip(tickets, texts, strict=True):
            sharing = _sharing(ticket)
            if (sharing, text) in seen:
                continue
            seen.add((sharing, text))
            each, size = open_lists.get(sharing), len(text.encode("utf-8", "replace"))
            if each is not None and (len(each.texts) >= self._most or each.size + size > MAX_TOKENS):
                yield open_lists.pop(sharing)
                each = None
            if each is None:
                tenant, headers = sharing
                options = self._read_options(self._model, headers=dict(headers), tenant=tenant, priority="high")
                each = open_lists[sharing] = _List(options)
            each.tickets.append(ticket)
            each.texts.append(text)
            each.size += size
        yield from open_lists.values()

    async def _ask(
        self, each: _List, seconds: float, found: dict[tuple[object, str], Floats | None], errors: list[Exception]
    ) -> None:
        try:
            vectors = await self._vectors(each, seconds)
        except BadRequest as error:
            self._note_refused(len(each.texts))
            errors.append(error)
        except Exception as error:  # noqa: BLE001 raised once all calls have ended
            errors.append(error)
        else:
            self._taken = max(self._taken, len(each.texts))
            self._sound += 1
            if self._sound % _GROW_AFTER == 0:
                self._most = min(MAX_INPUTS, 2 * self._most)
            for ticket, text, vector in zip(each.tickets, each.texts, vectors, strict=True):
                found[_sharing(ticket), text] = vector

    def _note_refused(self, size: int) -> None:
        """Make lists shorter after one of *size* texts was refused, unless that was for one of its texts.

        A list of one is refused for its text, and so, for all that is known, is one no longer than a list that was taken since the
        refusal before.
        """
        if size == 1:
            return
        if size > self._taken:
            self._most, self._sound = min(self._most, size // 2), 0
        self._taken = 0

    async def _vectors(self, each: _List, seconds: float) -> list[Floats | None]:
        options, given = each.options, self._given
        call = codec.compose(options.spec(), each.texts)
        call.timeout = seconds
        tokens = sum(estimate(text, given.count) for text in each.texts)
        completion: Completion | None = None
        async with self._lease(options.model, options.headers, tokens, HIGH) as lease:
            permit = lease.granted.result()
            permit.expense = partial(Expense, Usage(tokens), options.model, options.tenant)
            state = CallState(1, "look_up", given.now(), given.price(options.model), permit, options.model)

            def on_cut(completion: Completion | None) -> bool:
                self._attribution.attribute_beside("look_up", self._attribution.cost(state, completion))
                return True

            error: Exception | None = None
            try:
                completion, error = await self._sending.exchange(state, call, _ignore, on_cut, None)
                if completion is None:
                    raise error or ShutDown("a look-up was given up")
                self._attribution.attribute_beside("look_up", self._attribution.cost(state, completion))
            finally:
                state.end()
                self._sending.note_called(state, call, each.tickets, completion, error)
        vectors = codec.read(completion, len(each.texts), options.dimensions)
        if not vectors.sound:
            raise MalformedAnswer(vectors.fault or "the reply holds no vectors")
        return read_vectors(vectors.found, len(each.texts))


def _sharing(ticket: Ticket) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """Return the tenant and the headers of *ticket* that its call has to have."""
    spec = ticket.spec
    return spec.tenant, asked_headers(tuple(sorted(spec.headers.items())))


def _ignore(_text: str) -> None:
    pass
