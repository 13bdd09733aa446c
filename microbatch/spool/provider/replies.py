"""Reads the replies to the lines of a provider batch: the answers of their requests, and the reasons why some have none.

A combined reply is taken apart as a live one is, but at its end: damage costs only the damaged answer, and answers before the token
limit are valid.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from microbatch.accounting.stats import divided
from microbatch.batching.overhead import estimate
from microbatch.errors import ConfigError, RequestFailed, StatusError, StorageError
from microbatch.messages import Usage
from microbatch.prompt.codec import ChatCodec
from microbatch.prompt.outcome import complaint, ending
from microbatch.spool.endpoint import ENOUGH, Cause, cause_of, may_refuse_all
from microbatch.spool.payload import Answer
from microbatch.spool.provider.input_file import read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from microbatch.protocols import Completion
    from microbatch.spool.provider.input_file import Asked, Line
    from microbatch.spool.records import Delivery

    Pricing = Callable[[str | None], Callable[[Usage], float] | None]

DISCOUNT: Final = 0.5
"""The price of a batch, as a part of the usual price."""

_BYTES_A_TOKEN: Final = 4


class Reads(Protocol):
    """Reads the reply to a line: see `BatchWire.read`."""

    def read(
        self, status: int, raw: bytes, *, request_id: str | None, sent: Callable[[], Mapping[str, Any]]
    ) -> tuple[str, Completion]:
        """Return the text of a reply, and how it ended."""
        ...


class Why(msgspec.Struct, frozen=True):
    """Why a request was not answered.

    Attributes:
        counted: Whether the request is the cause.
        again: Whether the next attempt will differ, because something was learned.
        doubtful: Whether the endpoint may be the cause as well; then `counted` is True.
    """

    error: str
    counted: bool = True
    again: bool = False
    doubtful: bool = False


class Results:
    """The results of a batch.

    Attributes:
        answers: The answers, encoded as they are stored.
        open: The unanswered requests, by the reason.
        usage: The tokens that the provider reported.
        cost_usd: What they cost, in US dollars; None if a price is unknown.
    """

    def __init__(self) -> None:
        self.answers: list[tuple[Delivery, bytes]] = []
        self.open: dict[Why, list[Delivery]] = {}
        self.usage = Usage()
        self.cost_usd: float | None = 0.0
        self._doubtful = 0  # lines

    def leave(self, deliveries: Iterable[Delivery], why: Why) -> None:
        """Note that *deliveries* were not answered."""
        self.open.setdefault(why, []).extend(deliveries)
        self._doubtful += why.doubtful

    @property
    def trouble(self) -> str | None:
        """The first reason that no request has caused, so that trying again at once is of no use; None if there is none."""
        return next((why.error for why in self.open if not self.blames(why) and not why.again), None)

    def blames(self, why: Why) -> bool:
        """Return whether the requests left open for *why* are the cause; not if in doubt, several lines failed and none succeeded."""
        return why.counted and not (why.doubtful and not self.answers and self._doubtful >= ENOUGH)

    @property
    def learned(self) -> bool:
        """True if lines will be written differently from now on."""
        return any(why.again for why in self.open)


class Response(msgspec.Struct):
    """The reply to a line, as the provider's output file has it."""

    status_code: int = 200
    request_id: str | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Share(msgspec.Struct):
    """An answer, before it is known what it cost."""

    asked: Asked
    position: int
    text: str


class Replies:
    """Reads the replies to lines.

    Args:
        wire: Reads a reply's text and how it ended.
        price: Returns what prices a model's usage, at the usual price.
        count: Counts a text's tokens, so that answers longer than their caller's limit are found; None accepts them.
    """

    def __init__(self, wire: Reads, price: Pricing, count: Callable[[str], int] | None) -> None:
        self._wire = wire
        self._price = price
        self._count = count
        self._codec = ChatCodec()

    def take(
        self,
        response: Response,
        line: Line,
        deliveries: Sequence[Delivery | None],
        sent: Callable[[], Mapping[str, Any]],
        results: Results,
    ) -> None:
        """Take the reply to a line, and add to *results* its answers and the requests without one.

        Args:
            response: The reply.
            line: The line.
            deliveries: Its requests; None for those that no longer wait.
            sent: Returns the body that was sent; called for refusals only.
            results: Takes the result.
        """
        asked: list[Asked | None] = []
        for delivery in deliveries:
            try:
                asked.append(None if delivery is None else read(delivery))
            except (ConfigError, StorageError) as error:  # it was sound when it was sent
                asked.append(None)
                results.leave([delivery] if delivery is not None else [], Why(str(error)))
        waiting = [each for each in asked if each is not None]
        if not waiting:
            return
        try:
            text, completion = self._wire.read(
                response.status_code, bytes(response.body), request_id=response.request_id, sent=sent
            )
        except RequestFailed as error:
            results.leave([each.delivery for each in waiting], _why(error))
            return
        if line.ids:
            shares = list(self._combined(line, asked, text, completion, results))
        else:
            shares = list(self._single(waiting[0], text, completion, results))
        self._store(line, shares, completion, waiting[0].options.model, results)

    def _combined(
        self, line: Line, asked: Sequence[Asked | None], text: str, completion: Completion, results: Results
    ) -> Iterator[_Share]:
        """Yield the answers of a combined reply; note the requests that it leaves unanswered."""
        # The requests of a line are alike, so that all answers are decoded in the same way.
        alike = next(each for each in asked if each is not None).options
        reply = self._codec.demultiplex(line.ids, [alike.answer.decode] * len(asked), line.canary, early=False)
        found = reply.feed(text)
        how = ending(completion, None, heard=True)
        for position, (_, said) in found + reply.close(how):
            one = asked[position]
            if one is not None and alike.max_tokens is not None and self._longer_than(said, alike.max_tokens):
                results.leave([one.delivery], Why("the answer is longer than max_tokens allows"))
            elif one is not None:
                yield _Share(one, position, said)
        whole = complaint(completion)
        for position, error in reply.unanswered(how):
            one = asked[position]
            if one is not None:
                results.leave([one.delivery], Why(_told(whole or error)))

    def _longer_than(self, text: str, limit: int) -> bool:
        return self._count is not None and len(text) > limit and estimate(text, self._count) > limit

    def _single(self, one: Asked, text: str, completion: Completion, results: Results) -> Iterator[_Share]:
        """Yield the answer of a single reply, or note why there is none."""
        reply = self._codec.read_alone(one.options.answer, completion, text, combinable=bool(one.line))
        if reply.error is None:
            yield _Share(one, 0, reply.text)
        else:
            cause = reply.error.__cause__  # without a word of the answer
            detail = f": {cause}" if isinstance(cause, ValueError) else ""
            results.leave([one.delivery], Why(_told(reply.error) + detail))

    def _store(
        self, line: Line, shares: Sequence[_Share], completion: Completion, model: str | None, results: Results
    ) -> None:
        """Encode the answers, each with its share of the call's cost."""
        price = self._price(completion.model) or self._price(model)
        if completion.usage is not None:
            results.usage += completion.usage
            whole = None if price is None else price(completion.usage) * DISCOUNT
            results.cost_usd = None if whole is None or results.cost_usd is None else results.cost_usd + whole
        usages = _usages(completion.usage, line, shares)
        now = time.time()  # noqa: TID251 answers outlive processes
        for share, usage in zip(shares, usages, strict=True):
            answer = Answer(
                text=share.text,
                answered_at=now,
                is_json=not share.asked.options.answer.is_text,
                route="batch" if line.ids else "single",
                batch_size=len(line.names),
                model=completion.model or model,
                finish_reason=completion.finish_reason,
                request_id=completion.request_id,
                usage=usage,
                cost_usd=None if price is None else price(usage) * DISCOUNT,
                body=None if line.ids else completion.body,
            )
            results.answers.append((share.asked.delivery, answer.encode()))


def _usages(usage: Usage | None, line: Line, shares: Sequence[_Share]) -> list[Usage]:
    """Divide *usage* as for a live call: the prompt by the bytes of the requests' texts, the rest by those of the answers."""
    lengths = [0] * len(line.names)
    for share in shares:
        lengths[share.position] = len(share.text.encode("utf-8", "replace"))
    if usage is None:
        sizes = line.sizes or [0]
        return [
            Usage(sizes[share.position] // _BYTES_A_TOKEN, lengths[share.position] // _BYTES_A_TOKEN + 1, 0, True)
            for share in shares
        ]
    if not line.ids:
        return [usage] * len(shares)
    parts = divided(usage, line.sizes, lengths)
    return [parts[share.position] for share in shares]


def _why(error: RequestFailed) -> Why:
    if isinstance(error, StatusError) and error.again:
        return Why(_told(error), counted=False, again=True)
    cause = cause_of(error)
    counted = cause is not Cause.ENDPOINT and not may_refuse_all(error)
    return Why(_told(error), counted=counted, doubtful=counted and cause is Cause.EITHER)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
