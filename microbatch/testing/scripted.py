"""A transport whose answers and delays are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.checking import checks_arguments
from microbatch.messages import Usage
from microbatch.protocols import ChatCall, Completion, Embedded, EmbeddingCall
from microbatch.testing.counting import content_text
from microbatch.testing.embeddings import embedded
from microbatch.testing.reading import read_combined

if TYPE_CHECKING:
    from collections.abc import Iterable


class ScriptedCall:
    """One call that a `ScriptedTransport` received.

    Attributes:
        call: The call itself.
        items: Ids and texts of a combined prompt; for a single call, one item with the id "".
        combined: Whether it was a combined prompt.
        started: Loop time of its arrival, in seconds.
        cancelled: Whether it was cancelled before it had been answered.
    """

    def __init__(self, call: ChatCall, started: float) -> None:
        self.call = call
        self.started = started
        self.cancelled = False
        text = content_text(call.messages[-1]["content"]) if call.messages else ""
        _, items = read_combined(text)
        self.combined: bool = bool(items)
        self.items: list[tuple[str, str]] = items or [("", text)]

    def reply(self, answers: Iterable[tuple[str, Any]]) -> str:
        """Return the combined reply that holds *answers*, pairs of id and answer, in this order."""
        elements = [{"id": name, "answer": answer} for name, answer in answers]
        return msgspec.json.encode({"results": elements}).decode()


Step = str | BaseException | Completion | tuple[str, Completion] | Callable[[ScriptedCall], Any]
"""The outcome of one call: the text of its reply; an exception to raise; a `Completion` without text; a pair of text and
`Completion`; or a function of the call that returns one of these."""


EmbeddingStep = BaseException | Embedded | Callable[[EmbeddingCall], Any]
"""The outcome of one embeddings call: an exception to raise; an `Embedded`; or a function of the call, async or not, that
returns one of these."""


class ScriptedTransport:
    """Answers calls from a script, then by a function; a double for tests.

    Embeddings calls are answered from a script of their own, then with the vectors of `embedded`.

    Args:
        *script: A `Step` for each of the first calls, in order of arrival.
        answer: What the model says to one item's text; a value other than a string is sent as JSON.
        delay: Seconds before a reply.
        piece: Characters a piece when streaming; None sends all at once.
        interval: Seconds between pieces.
        usage: Whether calls report usage, of a quarter token a character.
        embeddings: An `EmbeddingStep` for each of the first embeddings calls, in order of arrival.
        embedding_model: Model of embeddings calls that name none.

    Attributes:
        calls: The calls received, in order.
        embedding_calls: The embeddings calls received, in order.
        closed: How often it was closed.
    """

    @checks_arguments
    def __init__(
        self,
        *script: Step,
        answer: Callable[[str], Any] = str.upper,
        delay: float = 0.0,
        piece: int | None = None,
        interval: float = 0.0,
        usage: bool = True,
        embeddings: Sequence[EmbeddingStep] = (),
        embedding_model: str | None = "scripted",
    ) -> None:
        self.embedding_calls: list[EmbeddingCall] = []
        self.embedding_model = embedding_model
        self._embeddings = list(embeddings)
        self.calls: list[ScriptedCall] = []
        self.closed: int = 0
        self.model: str | None = None
        self._script = list(script)
        self._answer = answer
        self._delay = delay
        self._piece = piece
        self._interval = interval
        self._usage = usage

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Answer *call* by the next step of the script, or by the answer function."""
        received = ScriptedCall(call, asyncio.get_running_loop().time())
        self.calls.append(received)
        try:
            step = await self._next(self._script, received, self._usual)
            text, completion = (
                step if isinstance(step, tuple) else ("", step) if isinstance(step, Completion) else (step, None)
            )
            await self._say(text, on_text, stream=call.stream)
        except asyncio.CancelledError:
            received.cancelled = True
            raise
        if isinstance(completion, BaseException):
            raise completion
        if isinstance(completion, Completion):
            return completion
        prompt = sum(len(str(message.get("content"))) for message in call.messages)
        return Completion("stop", usage=Usage(prompt // 4, len(text) // 4) if self._usage else None)

    async def embed(self, call: EmbeddingCall) -> Embedded:
        """Answer *call* by the next step of the script, or with the vectors of `embedded`."""
        self.embedding_calls.append(call)
        step: Embedded = await self._next(self._embeddings, call, self._embedded)
        return step

    async def _next(self, script: list[Any], received: Any, usual: Callable[..., Any]) -> Any:
        """Return the outcome of a call by the next step of *script*, or by the function *usual*; raise it if it is an exception."""
        step: Any = script.pop(0) if script else usual
        if self._delay:
            await asyncio.sleep(self._delay)
        if callable(step):
            step = step(received)
            if asyncio.iscoroutine(step):
                step = await step
        if isinstance(step, BaseException):
            raise step
        return step

    def _embedded(self, call: EmbeddingCall) -> Embedded:
        model = call.model or self.embedding_model or ""
        usage = Usage(sum(map(len, call.inputs)) // 4) if self._usage else None
        vectors = [(place, embedded(text, model, call.dimensions)) for place, text in enumerate(call.inputs)]
        return Embedded(vectors=vectors, finish_reason="stop", usage=usage, model=model)

    async def _say(self, text: str, on_text: Callable[[str], None], *, stream: bool) -> None:
        piece = self._piece if stream and self._piece is not None else len(text)
        for start in range(0, len(text), piece or 1):
            if start and self._interval:
                await asyncio.sleep(self._interval)
            on_text(text[start : start + piece])

    def _usual(self, received: ScriptedCall) -> str:
        answers = [(name, self._answer(text)) for name, text in received.items]
        if received.combined:
            return received.reply(answers)
        answer = answers[0][1]
        if received.call.schema is None:
            return answer if isinstance(answer, str) else msgspec.json.encode(answer).decode()
        wrapped = list(received.call.schema.get("properties", {})) == ["answer"]
        return msgspec.json.encode({"answer": answer} if wrapped else answer).decode()

    async def aclose(self) -> None:
        """Count the closing."""
        self.closed += 1
