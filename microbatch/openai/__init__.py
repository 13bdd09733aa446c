"""A client with the interface of OpenAI's SDK, for code written against it; the SDK is not imported.

```python
async with AsyncOpenAI(mb.Microbatcher(mb.OpenAIChat("gpt-4.1-mini"))) as client:  # was: openai.AsyncOpenAI()
    completion = await client.chat.completions.create(model="gpt-4.1-mini", messages=messages)
    completion.choices[0].message.content, completion.usage.total_tokens, completion.microbatch.route
    embedded = await client.embeddings.create(model="text-embedding-3-small", input=["a text", "another"])
    embedded.data[1].embedding, embedded.usage.prompt_tokens, embedded.microbatch.batch_size
```
Objects have the SDK's attributes and `model_dump`. Errors are this library's (`microbatch.RequestFailed` and its subclasses): a
refusal, a filtered and a truncated answer are errors unless the request was sent alone. `usage` is the caller's share of a combined
call, an estimate until `await completion.settled()`.

To keep the SDK itself (its error classes, its other endpoints, another language), point its `base_url` at the gateway,
`microbatch serve`, which combines the requests of all processes that use it. `max_retries=0` loses nothing there: the batcher retries
by itself, with one budget for all requests.
"""

from microbatch.openai.client import AsyncOpenAI, Chat, Completions
from microbatch.openai.embeddings import Embeddings
from microbatch.openai.objects import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    Choice,
    ChoiceDelta,
    ChunkChoice,
    CompletionUsage,
    CreateEmbeddingResponse,
    EmbeddingObject,
    EmbeddingUsage,
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
    "CreateEmbeddingResponse",
    "EmbeddingObject",
    "EmbeddingUsage",
    "Embeddings",
    "FunctionCall",
    "Object",
    "ToolCall",
]
