"""What surrounds the requests of a combined call, and so what they would have cost one by one.

Nothing is tokenized per item: the surroundings are counted once, on a lane's first batch, and the rest is what the endpoint
reports for each call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.batching.batch_limits import MAX_COUNTED_CHARS, estimate
from microbatch.messages import Usage
from microbatch.prompt.canary import USUAL_TOKENS
from microbatch.prompt.compose import draw_endings, instruction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from microbatch.batching.ticket import Ticket
    from microbatch.protocols import ChatCall

# What a chat template adds, in tokens, per message and per call: the rule of OpenAI's cookbook, with one token for the role.
_MESSAGE_TOKENS = 4
_PRIMING_TOKENS = 3

# Items of a first batch that are counted to learn what surrounds an item.
_SAMPLE = 4

# Random ids that are counted, because those of one batch may be longer or shorter than most: a label is not much longer.
_IDS = 1_024

# A report this close to our count plus the schema shows that the endpoint charges the schema as prompt.
_SCHEMA_CHARGED = 0.7


class PromptOverhead(msgspec.Struct, gc=False):
    """What surrounds the requests of a lane, in tokens.

    Attributes:
        alone_prompt: Prompt tokens of a single call without its own text.
        batch_prompt: Prompt tokens of a combined call without its lines.
        line: What an item's line adds to its text, on average.
        reply: Tokens of a combined reply without its elements.
        element: What an element adds to the answer as a single call would give it, on average.
        carried: What rounding has left out so far, for the next call: half a token a call is a hundredth of sixteen labels.
    """

    alone_prompt: float
    batch_prompt: float
    line: float
    reply: float
    element: float
    carried: float = 0.0

    def alone(self, usage: Usage, *, asked: int, answered: int, answered_share: float) -> Usage:
        """Return what the *answered* of *asked* requests would have used one by one.

        Args:
            usage: What the endpoint reported for the combined call.
            asked: Requests in the call.
            answered: Those that got their answer from it.
            answered_share: Their part of the items' text, 0 to 1.
        """
        texts = max(0.0, usage.prompt_tokens - self.batch_prompt - asked * self.line)
        # What got no answer is mostly not in the reply either.
        answers = max(0.0, usage.completion_tokens - self.reply - answered * self.element + self.carried)
        completion = round(answers)
        self.carried = answers - completion
        prompt = round(texts * answered_share + answered * self.alone_prompt)
        return Usage(
            prompt,
            completion,
            # What a provider caches of a combined prompt is its beginning, which the single calls would begin with too.
            min(prompt, answered * usage.cached_tokens),
        )


def measure(
    call: ChatCall,
    ids: Sequence[str],
    tickets: Sequence[Ticket],
    usage: Usage,
    count: Callable[[str], int],
    *,
    exact: bool,
    canary: bool = False,
) -> PromptOverhead:
    """Count what surrounds the requests of a combined *call* that has ended, at least one of them answered.

    Args:
        call: The call.
        ids: The ids its items had.
        tickets: Its requests.
        usage: What the endpoint reported for it.
        count: Counts a text's tokens.
        exact: Whether *count* is the model's own encoding.
        canary: Whether there was one more item, which was nobody's.
    """
    answer = tickets[0].answer
    content = count(call.messages[-1]["content"])
    reply, element = _elements(ids, tickets, count)
    canary_prompt, canary_reply = USUAL_TOKENS if canary else (0.0, 0.0)
    sample = tickets[:_SAMPLE]
    line = sum(count(f"[{name}]") for name in ids) / len(ids)
    line += sum(ticket.count(count) - count(ticket.text) for ticket in sample) / len(sample)
    counted = content + shared_tokens(call.messages[:-1], count)
    scale = 1.0 if exact else usage.prompt_tokens / max(1, counted)
    # What the endpoint reports beyond the items and our instruction is what every call pays, combined or not...
    shared = usage.prompt_tokens - content * scale
    schemas = [
        count(msgspec.json.encode(schema).decode()) if schema else 0 for schema in (call.schema, answer.single_schema)
    ]
    # ... but for the schema, which is another one for a single call, and which only some endpoints charge.
    charged = exact and usage.prompt_tokens - counted >= schemas[0] * _SCHEMA_CHARGED
    return PromptOverhead(
        alone_prompt=shared + (schemas[1] - schemas[0] if charged else 0),
        batch_prompt=shared + (count(instruction(answer.words)) + canary_prompt) * scale,
        line=line * scale,
        reply=(reply + canary_reply) * scale,
        element=element * scale,
    )


def message_tokens(messages: Iterable[Mapping[str, Any]], count: Callable[[str], int]) -> int:
    """Return the tokens of the texts of *messages* and of the chat template around them; of long texts, an estimate."""
    total = _PRIMING_TOKENS
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        total += _MESSAGE_TOKENS + sum(estimate(text, count) for text in texts if isinstance(text, str))
    return total


def shared_tokens(shared: Iterable[Mapping[str, Any]], count: Callable[[str], int]) -> int:
    """Return the tokens of a prompt that begins with *shared*, without the text of its last message."""
    return message_tokens(shared, count) + _MESSAGE_TOKENS


def _elements(ids: Sequence[str], tickets: Sequence[Ticket], count: Callable[[str], int]) -> tuple[float, float]:
    """Return the tokens of a combined reply without its elements, and what each has more than a single reply, on average."""
    names: list[str] = []
    elements: list[str] = []
    alone = length = 0
    for name, ticket in zip(ids, tickets, strict=True):
        if ticket.reply is not None and length < MAX_COUNTED_CHARS:
            text = ticket.reply.text
            answer = msgspec.json.encode(text).decode() if ticket.answer.is_text else text
            names.append(name)
            elements.append(f'{{"id":"{name}","answer":{answer}}}')
            alone += count(f'{{"answer":{text}}}' if ticket.answer.wrapped else text)
            length += len(text)
    # The end of an element and the start of the next share a token, so it matters that they stand in a row.
    once, twice = (count('{"results":[' + ",".join(elements * times) + "]}") for times in (1, 2))
    longer_ids = _id_tokens(names, count) - _usual_id_tokens(count)
    return once - (twice - once), (twice - once - alone) / len(elements) - longer_ids


@lru_cache(maxsize=4)
def _usual_id_tokens(count: Callable[[str], int]) -> float:
    return _id_tokens([f"{1 + number % 99}{ending}" for number, ending in enumerate(draw_endings(_IDS))], count)


def _id_tokens(names: Sequence[str], count: Callable[[str], int]) -> float:
    # In one text, of lines that add up: one long text costs a tokenizer less than many short ones.
    return count("".join(f'{{"id":"{name}"\n' for name in names)) / len(names)
