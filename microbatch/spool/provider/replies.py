"""From the reply to one line of a batch to the answers of its requests, and to the reasons why some have none.

A combined reply is taken apart by the same demultiplexer as a live one, at its end: what is damaged costs only itself, and what is
there before the token limit stands.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from microbatch.accounting.stats import divided
from microbatch.batching.batch_limits import estimate
from microbatch.errors import ConfigError, RequestFailed, StatusError, StorageError
from microbatch.messages import Usage
from microbatch.prompt.canary import check_canary
from microbatch.prompt.demultiplexer import Demultiplexer
from microbatch.prompt.outcome import complaint, ending
from microbatch.spool.endpoint import ENOUGH, Cause, cause_of, may_refuse_all
from microbatch.spool.payload import Answer
from microbatch.spool.provider.input_file import read
from microbatch.thoughts import after_leading_thought

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from microbatch.protocols import Completion
    from microbatch.spool.provider.input_file import Asked, Line
    from microbatch.spool.records import Delivery

    Pricing = Callable[[str | None], Callable[[Usage], float] | None]

DISCOUNT: Final = 0.5
"""What a provider charges for batches, of its usual price."""

_BYTES_A_TOKEN: Final = 4

_TRUNCATED: Final = "TruncatedReply: the combined reply hit the token limit before this answer"
_DISTRUSTED: Final = "MalformedAnswer: the combined reply got its canary wrong, so none of its answers is trusted"
_UNANSWERED: Final = object()
_FAULTS: Final = {
    "missing": "MissingAnswer: the combined reply held no answer to this request",
    "repeated": "MalformedAnswer: the combined reply held several answers to this request",
    "malformed": "MalformedAnswer: the answer in the combined reply does not fit its schema",
}


class Reads(Protocol):
    """What reads the replies: see `BatchWire.read`."""

    def read(
        self, status: int, raw: bytes, *, request_id: str | None, sent: Callable[[], Mapping[str, Any]]
    ) -> tuple[str, Completion]:
        """Return the text of a reply, and how it ended."""
        ...


class Why(msgspec.Struct, frozen=True):
    """Why a request was not answered.

    Attributes:
        error: In words.
        counted: Whether the request is to blame.
        doubtful: Whether the endpoint may be to blame as well; then `counted` is True.
        again: Whether the next try will be another one, because something was learned.
    """

    error: str
    counted: bool = True
    again: bool = False
    doubtful: bool = False


class Results:
    """What a batch has come to.

    Attributes:
        answers: The answers, encoded as they are stored.
        open: The requests that were not answered, by the reason.
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
        """The first reason that is nobody's fault, so that trying again at once is no use; None if there is none."""
        return next((why.error for why in self.open if not self.blames(why) and not why.again), None)

    def blames(self, why: Why) -> bool:
        """Return whether the requests left open for the reason *why* are to blame: not if several lines failed, and none did not."""
        return why.counted and not (why.doubtful and not self.answers and self._doubtful >= ENOUGH)

    @property
    def history(self) -> bool:
        """Whether lines will be written differently from now on."""
        return any(why.again for why in self.open)


class Response(msgspec.Struct):
    """The reply to a line.

    Attributes:
        status_code: Its HTTP status.
        request_id: The provider's id of the call, or None.
        body: Its JSON.
    """

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
        wire: Tells what a reply says.
        price: What prices a model's usage, at the usual price.
        count: Counts a text's tokens, so that answers longer than their caller's limit are found; None lets them pass.
    """

    def __init__(self, wire: Reads, price: Pricing, count: Callable[[str], int] | None) -> None:
        self._wire = wire
        self._price = price
        self._count = count

    def take(
        self,
        response: Response,
        line: Line,
        deliveries: Sequence[Delivery | None],
        sent: Callable[[], Mapping[str, Any]],
        results: Results,
    ) -> None:
        """Take the reply to a line.

        Args:
            response: The reply.
            line: The line.
            deliveries: Its requests; None for those that no longer wait.
            sent: Returns the body that was sent; called for refusals only.
            results: Takes what comes of it.
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
        """Yield the answers of a combined reply; note what it leaves open."""
        # The requests of a line are alike, so each of them knows how all answers are to be read.
        alike = next(each for each in asked if each is not None).options
        decoders: list[Callable[[str], Any]] = [alike.answer.decode] * len(asked)
        if line.canary is not None:
            decoders.append(partial(check_canary, line.canary))
        demultiplexer = Demultiplexer(line.ids, decoders, early=False)
        demultiplexer.feed(text)
        how = ending(completion, None, heard=True)
        ended = how in ("complete", "length", "refused")
        answered = dict(demultiplexer.close(ended=ended, complete=how == "complete"))
        whole = complaint(completion)
        if line.canary is not None and answered.pop(len(asked), _UNANSWERED) is _UNANSWERED:
            results.leave(
                [one.delivery for one in asked if one is not None], Why(_DISTRUSTED if whole is None else _told(whole))
            )
            return
        for position, (_, said) in answered.items():
            one = asked[position]
            if one is not None and alike.max_tokens is not None and self._longer_than(said, alike.max_tokens):
                results.leave([one.delivery], Why("the answer is longer than max_tokens allows"))
            elif one is not None:
                yield _Share(one, position, said)
        for position, fault, _ in demultiplexer.faults():
            one = asked[position]
            if one is not None:
                words = _TRUNCATED if fault == "missing" and how == "length" else _FAULTS[fault]
                results.leave([one.delivery], Why(words if whole is None else _told(whole)))

    def _longer_than(self, text: str, limit: int) -> bool:
        return self._count is not None and len(text) > limit and estimate(text, self._count) > limit

    @staticmethod
    def _single(one: Asked, text: str, completion: Completion, results: Results) -> Iterator[_Share]:
        """Yield the answer of a single reply; note why there is none."""
        answer, error = one.options.answer, complaint(completion)
        if answer.is_text:
            text = after_leading_thought(text)
        if not one.line and answer.is_text and completion.finish_reason is not None:
            yield _Share(one, 0, text)  # tool calls and the like: what matters is in the body
            return
        why = None if error is None else _told(error)
        if why is None and completion.finish_reason == "length" and not answer.is_text:
            why = "TruncatedReply: the answer was cut off by the token limit"
        if why is None:
            try:
                _, said = answer.decode_single(text)
            except ValueError as reason:
                why = f"MalformedAnswer: {reason}"
            else:
                yield _Share(one, 0, said)
        if why is not None:
            results.leave([one.delivery], Why(why))

    def _store(
        self, line: Line, shares: Sequence[_Share], completion: Completion, model: str | None, results: Results
    ) -> None:
        """Encode the answers, each with its share of what the call cost."""
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
    """Divide *usage* as that of a live call is: the prompt by the bytes of the requests' texts, the rest by those of the answers."""
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
