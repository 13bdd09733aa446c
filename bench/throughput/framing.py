"""What combining adds to items and what it saves of them, in tokens, as a formula; and what goes into it, counted on real calls.

Of N items a call, an item saves

    S (1 - 1/N) - P/N - f_in - r (f_out + R/N)

where S is all that a single call has beside the item's text (instructions, roles, schema), P the wrapper that a combined call has
besides, f_in what surrounds an item in the prompt, f_out what an answer has more in a combined reply than in a single one, R what
surrounds the answers of a combined reply, and r the price of a generated token in prompt tokens.

Counted are the parts of the prompts and replies of some calls, as text; no total that the formula is to foretell goes into it.
"""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import microbatch as mb
from bench.questions import Label
from bench.throughput.scene import MODEL, NEVER_BINDS, messages
from microbatch.testing import SimulatedModel, SimulatedTransport
from microbatch.testing.counting import compact, prompt_tokens, text_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Framing(NamedTuple):
    """The formula's constants, in tokens.

    Attributes:
        around: What a single call has beside the instructions and the text: S without the instructions.
        wrapper: P.
        line: f_in.
        element: f_out.
        reply: R.
        answer: A single reply.
    """

    around: float
    wrapper: float
    line: float
    element: float
    reply: float
    answer: float


class Foretold(NamedTuple):
    """What the formula says of an item: its tokens in a combined call, and what share of a single call's price is saved."""

    prompt: float
    completion: float
    tokens_saved: float
    dollars_saved: float


async def answered(
    texts: Iterable[str], labels: Mapping[str, str], size: int, tokens: int, *, record: bool = False
) -> tuple[SimulatedModel, mb.Stats]:
    """Have *texts* answered in calls of *size* items; return the endpoint's model and the stats."""
    asked = list(texts)
    model = SimulatedModel(answer=lambda text, _: labels[text], record=record)
    policy = mb.FlushPolicy(max_batch_size=size, max_output_tokens=NEVER_BINDS)
    async with mb.Microbatcher(SimulatedTransport(model), policy=policy) as batcher:
        requests = (mb.Request(messages(text, tokens), model=MODEL, output_type=Label) for text in asked)
        async for result in batcher.map(requests):
            assert result.unwrap().output == labels[asked[result.index]], "a wrong answer"
        return model, batcher.stats()


async def count_framing(texts: list[str], labels: Mapping[str, str], size: int, tokens: int) -> Framing:
    """Count the parts of the calls that *texts* make, one by one and in batches of *size*."""
    alone, _ = await answered(texts, labels, 1, tokens, record=True)
    together, _ = await answered(texts, labels, size, tokens, record=True)
    blank = [message | {"content": ""} for message in alone.requests[0]["messages"]]
    schema = schema_tokens(alone.requests[0])
    prompts = [_parts(body["messages"][-1]["content"]) for body in together.requests]
    replies = [_elements(text) for text in together.replies]
    answer = statistics.mean(map(text_tokens, alone.replies))
    return Framing(
        around=prompt_tokens(blank) + schema,
        wrapper=statistics.mean(before for before, _ in prompts) + schema_tokens(together.requests[0]) - schema,
        line=(sum(lines for _, lines in prompts) - sum(map(text_tokens, texts))) / len(texts),
        element=sum(elements for _, elements in replies) / len(texts) - answer,
        reply=statistics.mean(around for around, _ in replies),
        answer=answer,
    )


def schema_tokens(body: dict[str, Any]) -> int:
    return text_tokens(compact(body["response_format"]["json_schema"]["schema"]))


def _parts(content: str) -> tuple[int, int]:
    """Return the tokens of a combined prompt's instruction and of its lines."""
    before, end, lines = content.partition("\n")
    return text_tokens(before + end), text_tokens(lines)


def _elements(text: str) -> tuple[float, float]:
    """Return the tokens around the elements of a combined reply, and those of the elements.

    Tokens reach over the ends of elements, so an element is what it adds: the second half of them to a reply with the first half.
    """
    elements = json.loads(text)["results"]
    half = len(elements) // 2
    tokens = text_tokens(text)
    inside = (tokens - text_tokens(compact({"results": elements[:half]}))) / (len(elements) - half) * len(elements)
    return tokens - inside, inside


def foretell(framing: Framing, tokens: int, size: int, text: float, ratio: float) -> Foretold:
    """Say what an item takes whose text has *text* tokens, with instructions of *tokens*, *size* to a call."""
    shared = tokens + framing.around
    return Foretold(
        prompt=(shared + framing.wrapper) / size + text + framing.line,
        completion=framing.answer + framing.element + framing.reply / size,
        tokens_saved=saved(framing, shared, size, 1.0) / (shared + text + framing.answer),
        dollars_saved=saved(framing, shared, size, ratio) / (shared + text + ratio * framing.answer),
    )


def saved(framing: Framing, shared: float, size: int, ratio: float) -> float:
    """Return what an item saves, in prompt tokens: the formula."""
    return (
        shared * (1 - 1 / size)
        - framing.wrapper / size
        - framing.line
        - ratio * (framing.element + framing.reply / size)
    )


def break_even(framing: Framing, size: int, ratio: float) -> float:
    """Return the tokens of instructions from which on combining pays; 0 if it always does."""
    each = framing.line + ratio * framing.element
    once = framing.wrapper + ratio * framing.reply
    return max(0.0, (size * each + once) / (size - 1) - framing.around)
