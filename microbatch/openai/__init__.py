"""A client in the shape of OpenAI's SDK, for code that is written against it; the SDK is not imported.

```python
client = AsyncOpenAI(batcher)  # was: openai.AsyncOpenAI()
completion = await client.chat.completions.create(model="gpt-4.1-mini", messages=messages)
completion.choices[0].message.content, completion.usage.total_tokens, completion.microbatch.route
```
Objects have the SDK's attributes and `model_dump`; errors are this library's (`microbatch.RequestFailed` and its subclasses: a
refusal, a filtered or a truncated answer is an error wherever there is no whole answer to return). `usage` is the caller's share of
a combined call, an estimate until `await completion.settled()`.

Where the SDK itself must stay (its error classes, its other endpoints, another language), point its `base_url` at the gateway,
`microbatch serve`: the SDK speaks HTTP to it as it would to OpenAI, and it coalesces the requests of all processes that use it.
There is no transport for the SDK's http client here on purpose. It would have to turn answers back into HTTP, which the gateway
does already, and it would break with the SDK's own http library, which has changed between major versions. Of the SDK's retries
nothing is lost by `max_retries=0`: the batcher makes its own, with one budget for all.
"""

from microbatch.openai.client import AsyncOpenAI, Chat
from microbatch.openai.completions import Completions
from microbatch.openai.objects import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    Choice,
    ChoiceDelta,
    ChunkChoice,
    CompletionUsage,
    FunctionCall,
    Object,
    ToolCall,
)
from microbatch.openai.stream import AsyncStream

__all__ = [
    "AsyncOpenAI",
    "AsyncStream",
    "Chat",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionMessage",
    "Choice",
    "ChoiceDelta",
    "ChunkChoice",
    "CompletionUsage",
    "Completions",
    "FunctionCall",
    "Object",
    "ToolCall",
]
