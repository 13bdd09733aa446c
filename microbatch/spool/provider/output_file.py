"""Reads the files of a finished batch: the answers of its requests, and the reasons why some have none.

A combined reply is taken apart as a live one is, but at its end: damage costs only the damaged answer, and answers before the token
limit are valid.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.accounting.stats import divided
from microbatch.errors import ConfigError, RequestFailed, StatusError, StorageError
from microbatch.messages import Usage
from microbatch.prompt.codec import ChatCodec
from microbatch.prompt.outcome import complaint, ending
from microbatch.spool.endpoint import ENOUGH, Cause, cause_of, may_refuse_all
from microbatch.spool.payload import Answer
from microbatch.spool.provider.input_file import read
from microbatch.transports.chat_wire import completion_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from microbatch.accounting.prices import Price
    from microbatch.protocols import Completion
    from microbatch.spool.provider.api import RemoteBatch
    from microbatch.spool.provider.input_file import Asked, Content, Line
    from microbatch.spool.records import Delivery
    from microbatch.transports.chat_wire import BatchWire

    Pricing = Callable[[str | None, str | None], Price | None]

_BYTES_A_TOKEN: Final = 4
_SLICE: Final = 16  # lines between two turns of the event loop


class Why(msgspec.Struct, frozen=True):
    """Why a request was not answered.

    Attributes:
        cause: `EITHER` is decided by the other lines of the batch, see `Results.blames`.
        again: Whether the next attempt will differ, because something was learned.
    """

    error: str
    cause: Cause = Cause.REQUEST
    again: bool = False


class _Response(msgspec.Struct):
    status_code: int = 200
    request_id: str | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Error(msgspec.Struct):
    code: str | None = None


class _Row(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: _Error | None = None


class Results:
    """The results of a batch whose status is final; empty before `read`.

    Args:
        batch: The batch.
        content: The recorded content of its job.
        tied: The requests that still wait for it, by the keys of their names.
        wire: Reads a reply's text and how it ended.
        price: Returns the price of a model, by the name in the reply and the one it was asked for; see `PriceBook.for_model`.

    Attributes:
        answers: The answers, encoded as they are stored.
        open: The unanswered requests, by the reason.
        usage: The tokens that the provider reported.
        cost_usd: What they cost as a batch, in US dollars, without the replies of unpriced models; None if none was priced.
        unpriced: Replies that reported tokens and whose model has no known price.
    """

    def __init__(
        self, batch: RemoteBatch, content: Content, tied: Mapping[str, Delivery], wire: BatchWire, price: Pricing
    ) -> None:
        self.batch = batch
        self.tied = tied
        self.answers: list[tuple[Delivery, bytes]] = []
        self.open: dict[Why, list[Delivery]] = {}
        self.usage: Usage = Usage()
        self.cost_usd: float | None = None
        self.unpriced: int = 0
        self._content = content
        self._wire = wire
        self._price = price
        self._codec = ChatCodec()
        self._doubtful = 0  # lines

    def blames(self, why: Why) -> bool:
        """Return whether the requests left open for *why* are the cause; not if in doubt, several lines failed and none succeeded."""
        if why.cause is Cause.EITHER:
            return bool(self.answers) or self._doubtful < ENOUGH
        return why.cause is Cause.REQUEST

    @property
    def trouble(self) -> str | None:
        """The first reason that no request has caused, so that trying again at once is of no use; None if there is none."""
        return next((why.error for why in self.open if not self.blames(why) and not why.again), None)

    @property
    def learned(self) -> bool:
        """True if lines will be written differently from now on."""
        return any(why.again for why in self.open)

    async def read(self, files: Iterable[bytes]) -> None:
        """Read the output file and the error file of the batch."""
        rows = await _rows(files)
        sent = (await self._content.file()).split(b"\n") if rows else []
        absence = _absence(self.batch, self._content)
        for number, line in enumerate(self._content.lines):
            waiting = {at: self.tied[name.key] for at, name in enumerate(line.names) if name.key in self.tied}
            row = rows.get(line.custom_id)
            if not waiting:
                continue
            if row is None or row.response is None:
                self._leave(waiting.values(), absence(line, row))
            else:
                self._take(line, row.response, waiting, partial(_body_at, sent, number))
            if number % _SLICE == 0:
                await asyncio.sleep(0)

    def _leave(self, deliveries: Iterable[Delivery], why: Why) -> None:
        self.open.setdefault(why, []).extend(deliveries)
        self._doubtful += why.cause is Cause.EITHER

    def _take(
        self, line: Line, response: _Response, waiting: Mapping[int, Delivery], sent: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Take the answers in the reply to *line*; *waiting* are its requests by position."""
        asked: dict[int, Asked] = {}
        for at, delivery in waiting.items():
            try:
                asked[at] = read(delivery)
            except (ConfigError, StorageError) as error:  # it was sound when it was sent
                self._leave([delivery], Why(str(error)))
        if not asked:
            return
        try:
            text, completion = self._wire.read(
                response.status_code, bytes(response.body), request_id=response.request_id, sent=sent
            )
        except RequestFailed as error:
            self._leave([each.delivery for each in asked.values()], _why(error))
            return
        found = self._combined(line, asked, text, completion) if line.ids else self._single(asked[0], text, completion)
        self._store(line, asked, dict(found), completion)

    def _combined(
        self, line: Line, asked: Mapping[int, Asked], text: str, completion: Completion
    ) -> Iterator[tuple[int, str]]:
        """Yield the answers of a combined reply by their positions; note the requests that it leaves unanswered."""
        # The requests of a line are alike, so that all answers are decoded in the same way.
        decode = next(iter(asked.values())).options.answer.decode
        reply = self._codec.demultiplex(line.ids, [decode] * len(line.names), line.canary, early=False)
        found = reply.feed(text)
        how = ending(completion, None, heard=True)
        for at, (_, said) in found + reply.close(how):
            if at in asked:
                yield at, said
        whole = complaint(completion)
        for at, error in reply.unanswered(how):
            if at in asked:
                self._leave([asked[at].delivery], Why(_told(whole or error)))

    def _single(self, asked: Asked, text: str, completion: Completion) -> Iterator[tuple[int, str]]:
        """Yield the answer of a single reply, or note why there is none."""
        reply = self._codec.read_alone(asked.options.answer, completion, text, combinable=bool(asked.line))
        if reply.error is None:
            yield 0, reply.text
        else:
            cause = reply.error.__cause__  # without a word of the answer
            detail = f": {cause}" if isinstance(cause, ValueError) else ""
            self._leave([asked.delivery], Why(_told(reply.error) + detail))

    def _store(self, line: Line, asked: Mapping[int, Asked], texts: Mapping[int, str], completion: Completion) -> None:
        """Encode the answers, each with its share of the call's cost."""
        model = next(iter(asked.values())).options.model
        price = self._price(completion.model, model)
        if price is not None:
            price = price.of_batches()
        if completion.usage is not None:
            self.usage += completion.usage
            if price is None:
                self.unpriced += 1
            else:
                price = price.for_prompt(completion.usage.prompt_tokens)
                self.cost_usd = (self.cost_usd or 0.0) + price.cost(completion.usage)
        usages = _usages(completion.usage, line, texts)
        now = time.time()  # noqa: TID251 answers outlive processes
        for at, text in texts.items():
            shape, body = asked[at].options.answer, completion.body
            if line.ids:
                body = None
                if shape.tool is not None:
                    reason, members = shape.tool.finish_reason, shape.tool.call(text)
                    body = completion_object(None, model=completion.model, finish_reason=reason, members=members)
            answer = Answer(
                text=text,
                answered_at=now,
                is_json=not shape.is_text and shape.form is None,
                route="batch" if line.ids else "single",
                batch_size=len(line.names),
                model=completion.model or model,
                finish_reason=completion.finish_reason,
                request_id=completion.request_id,
                usage=usages[at],
                cost_usd=None if price is None else price.cost(usages[at]),
                body=body,
            )
            self.answers.append((asked[at].delivery, answer.encode()))


async def _rows(files: Iterable[bytes]) -> dict[str, _Row]:
    """Return the rows of *files* by the names of their lines; the first of several counts."""
    decode = msgspec.json.Decoder(_Row).decode
    rows: dict[str, _Row] = {}
    for file in files:
        for number, raw in enumerate(file.split(b"\n"), 1):
            try:
                row = decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue  # treated as missing
            rows.setdefault(row.custom_id, row)
            if number % _SLICE == 0:
                await asyncio.sleep(0)
    return rows


def _body_at(rows: Sequence[bytes], number: int) -> Mapping[str, Any]:
    body: dict[str, Any] = msgspec.json.decode(rows[number])["body"]
    return body


def _absence(batch: RemoteBatch, content: Content) -> Callable[[Line, _Row | None], Why]:
    """Return a function that returns why a line of *batch* has no reply.

    If the batch was refused, the cause is the lines that its errors name, if any. A line of an expired or cancelled batch did not
    cause that.
    """
    blamed: dict[str, Why] = {}
    for error in batch.complaints:
        # An unavailable model is reported for one line, but was not caused by it.
        if error.line is not None and 0 < error.line <= len(content.lines) and error.param != "body.model":
            blamed[content.lines[error.line - 1].custom_id] = Why(f"the provider refused the line ({error.code})")
    codes = ", ".join(dict.fromkeys(str(error.code) for error in batch.complaints)) or "no reason was given"
    refused = Why(f"the provider refused the batch ({codes})", Cause.ENDPOINT)

    def absence(line: Line, row: _Row | None) -> Why:
        if batch.status == "failed":
            return blamed.get(line.custom_id, refused)
        code = row.error.code if row is not None and row.error is not None else None
        message = f"the batch {batch.status} without a reply" + (f" ({code})" if code else "")
        return Why(message, Cause.REQUEST if batch.status == "completed" else Cause.ENDPOINT)

    return absence


def _usages(usage: Usage | None, line: Line, texts: Mapping[int, str]) -> Mapping[int, Usage]:
    """Divide *usage* as for a live call: the prompt by the bytes of the requests' texts, the rest by those of the answers."""
    lengths = {at: len(text.encode("utf-8", "replace")) for at, text in texts.items()}
    if usage is None:
        sizes = line.sizes or [0]
        return {
            at: Usage(sizes[at] // _BYTES_A_TOKEN, length // _BYTES_A_TOKEN + 1, 0, True)
            for at, length in lengths.items()
        }
    if not line.ids:
        return dict.fromkeys(texts, usage)
    return dict(enumerate(divided(usage, line.sizes, [lengths.get(at, 0) for at in range(len(line.names))])))


def _why(error: RequestFailed) -> Why:
    again = isinstance(error, StatusError) and error.again
    cause = Cause.ENDPOINT if again or may_refuse_all(error) else cause_of(error)
    return Why(_told(error), cause, again)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
