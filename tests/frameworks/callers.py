"""One caller for each framework and mode: what a program that uses it would write."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from cities import EMBEDDER, MODEL, SYSTEM, TEXT, TYPED, VECTOR, City, messages, question

KEY = "sk-of-these-tests"

Ask = Callable[[int], Awaitable[Any]]


class Case(NamedTuple):
    """A framework's way of asking.

    Attributes:
        framework: Its package.
        mode: The way, in the framework's own words.
        answers: "text" or "typed".
        make: Takes a client, a base URL and whether the client is microbatch's own; returns an async function of a number.
        needs: Modules to import.
    """

    framework: str
    mode: str
    answers: str
    make: Callable[[Any, str, bool], Ask]
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.framework} {self.mode}"


TOOL = {
    "type": "function",
    "function": {"name": "City", "description": "A city of the list.", "parameters": City.model_json_schema()},
}
NAMED = {"type": "function", "function": {"name": "City"}}


def _of_call(completion: Any) -> City:
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == "City"
    assert call.id
    assert call.type == "function"
    return City.model_validate_json(call.function.arguments)


# --- openai


def openai_text(client: Any, _url: str, _direct: bool) -> Ask:
    async def ask(number: int) -> Any:
        completion = await client.chat.completions.create(model=MODEL, messages=messages(number))
        return completion.choices[0].message.content

    return ask


def openai_stream(client: Any, _url: str, _direct: bool) -> Ask:
    async def ask(number: int) -> Any:
        stream = await client.chat.completions.create(
            model=MODEL, messages=messages(number), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert any(chunk.usage for chunk in chunks)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    return ask


def openai_parse(client: Any, _url: str, _direct: bool) -> Ask:
    async def ask(number: int) -> Any:
        completion = await client.chat.completions.parse(model=MODEL, messages=messages(number), response_format=City)
        return completion.choices[0].message.parsed

    return ask


def openai_json_object(client: Any, _url: str, _direct: bool) -> Ask:
    shape = {"role": "system", "content": f"Answer in JSON of this schema: {City.model_json_schema()}"}

    async def ask(number: int) -> Any:
        completion = await client.chat.completions.create(
            model=MODEL, messages=[shape, *messages(number)], response_format={"type": "json_object"}
        )
        return City.model_validate_json(completion.choices[0].message.content)

    return ask


def openai_tools(choice: Any, **further: Any) -> Callable[[Any, str, bool], Ask]:
    def make(client: Any, _url: str, _direct: bool) -> Ask:
        async def ask(number: int) -> Any:
            completion = await client.chat.completions.create(
                model=MODEL, messages=messages(number), tools=[TOOL], tool_choice=choice, **further
            )
            return _of_call(completion)

        return ask

    return make


def openai_parse_tools(client: Any, _url: str, _direct: bool) -> Ask:
    import openai

    tool = openai.pydantic_function_tool(City)

    async def ask(number: int) -> Any:
        completion = await client.chat.completions.parse(
            model=MODEL, messages=messages(number), tools=[tool], tool_choice=NAMED, parallel_tool_calls=False
        )
        (call,) = completion.choices[0].message.tool_calls
        return call.function.parsed_arguments

    return ask


def openai_stream_tools(client: Any, _url: str, _direct: bool) -> Ask:
    async def ask(number: int) -> Any:
        stream = await client.chat.completions.create(
            model=MODEL, messages=messages(number), tools=[TOOL], tool_choice=NAMED, stream=True
        )
        arguments = ""
        names = []
        async for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments or ""
        assert names == ["City"]
        return City.model_validate_json(arguments)

    return ask


# --- instructor


def instructor_mode(mode: str) -> Callable[[Any, str, bool], Ask]:
    def make(client: Any, _url: str, direct: bool) -> Ask:
        import instructor

        chosen = instructor.Mode[mode]
        if direct:
            create = instructor.patch(create=client.chat.completions.create, mode=chosen)
        else:
            create = instructor.from_openai(client, mode=chosen).chat.completions.create

        async def ask(number: int) -> Any:
            return await create(model=MODEL, response_model=City, max_retries=0, messages=messages(number))

        return ask

    return make


def instructor_partial(client: Any, _url: str, direct: bool) -> Ask:
    import instructor

    if direct:
        create = instructor.patch(create=client.chat.completions.create, mode=instructor.Mode.TOOLS)
        options: dict[str, Any] = {"response_model": instructor.Partial[City], "stream": True}
    else:
        create = instructor.from_openai(client, mode=instructor.Mode.TOOLS).chat.completions.create_partial
        options = {"response_model": City}

    async def ask(number: int) -> Any:
        parts = create(model=MODEL, max_retries=0, messages=messages(number), **options)
        parts = await parts if inspect.isawaitable(parts) else parts
        last = [part async for part in parts][-1]
        return City.model_validate(last.model_dump())

    return ask


# --- pydantic-ai


def pydantic_ai_agent(output: str) -> Callable[[Any, str, bool], Ask]:
    def make(client: Any, _url: str, _direct: bool) -> Ask:
        import pydantic_ai
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        kind: Any = {"str": str, "default": City}.get(output) or getattr(pydantic_ai, output)(City)
        model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
        agent: Any = pydantic_ai.Agent(model, system_prompt=SYSTEM, output_type=kind)

        async def ask(number: int) -> Any:
            return (await agent.run(question(number))).output

        return ask

    return make


def pydantic_ai_stream(output: Any) -> Callable[[Any, str, bool], Ask]:
    def make(client: Any, _url: str, _direct: bool) -> Ask:
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
        agent: Any = Agent(model, system_prompt=SYSTEM, output_type=output)

        async def ask(number: int) -> Any:
            async with agent.run_stream(question(number)) as run:
                return await run.get_output()

        return ask

    return make


# --- langchain


def _chat_openai(client: Any, url: str, direct: bool, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    if direct:
        options |= {"async_client": client.chat.completions, "root_async_client": client}
    return ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, max_retries=0, **options)


def langchain_text(client: Any, url: str, direct: bool) -> Ask:
    model = _chat_openai(client, url, direct)

    async def ask(number: int) -> Any:
        return (await model.ainvoke([("system", SYSTEM), ("user", question(number))])).content

    return ask


def langchain_parts(client: Any, url: str, direct: bool) -> Ask:
    model = _chat_openai(client, url, direct)

    async def ask(number: int) -> Any:
        from langchain_core.messages import HumanMessage, SystemMessage

        parts = [{"type": "text", "text": question(number)}]
        return (await model.ainvoke([SystemMessage(SYSTEM), HumanMessage(parts)])).content

    return ask


def langchain_stream(client: Any, url: str, direct: bool) -> Ask:
    model = _chat_openai(client, url, direct, stream_usage=True)

    async def ask(number: int) -> Any:
        chunks = [chunk async for chunk in model.astream([("system", SYSTEM), ("user", question(number))])]
        assert any(chunk.usage_metadata for chunk in chunks)
        return "".join(chunk.content for chunk in chunks)

    return ask


def langchain_structured(method: str, **options: Any) -> Callable[[Any, str, bool], Ask]:
    def make(client: Any, url: str, direct: bool) -> Ask:
        model = _chat_openai(client, url, direct).with_structured_output(City, method=method, **options)
        system = SYSTEM if method != "json_mode" else f"{SYSTEM} Answer in JSON: {City.model_json_schema()}"

        async def ask(number: int) -> Any:
            return await model.ainvoke([("system", system), ("user", question(number))])

        return ask

    return make


def langchain_structured_stream(client: Any, url: str, direct: bool) -> Ask:
    model = _chat_openai(client, url, direct).with_structured_output(City, method="function_calling")

    async def ask(number: int) -> Any:
        asked = [("system", SYSTEM), ("user", question(number))]
        return [part async for part in model.astream(asked)][-1]

    return ask


# --- litellm


def litellm_mode(**options: Any) -> Callable[[Any, str, bool], Ask]:
    def make(client: Any, url: str, direct: bool) -> Ask:
        import litellm

        litellm.suppress_debug_info = True

        async def ask(number: int) -> Any:
            given = {"client": client} if direct else {"api_base": url, "api_key": KEY}
            completion = await litellm.acompletion(
                model=f"openai/{MODEL}", messages=messages(number), num_retries=0, max_retries=0, **given, **options
            )
            if options.get("stream"):
                chunks = [chunk async for chunk in completion]
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            if "tools" in options:
                return _of_call(completion)
            content = completion.choices[0].message.content
            return City.model_validate_json(content) if "response_format" in options else content

        return ask

    return make


# --- llama-index


def _llama(client: Any, url: str, direct: bool, *, like: bool, **options: Any) -> Any:
    options |= {"model": MODEL, "api_base": url, "api_key": KEY, "max_retries": 0}
    if direct:
        options["async_openai_client"] = client
    if like:
        from llama_index.llms.openai_like import OpenAILike

        return OpenAILike(is_chat_model=True, context_window=100_000, **options)
    from llama_index.llms.openai import OpenAI

    return OpenAI(**options)


def llama_text(client: Any, url: str, direct: bool) -> Ask:
    model = _llama(client, url, direct, like=False)

    async def ask(number: int) -> Any:
        from llama_index.core.llms import ChatMessage

        asked = [ChatMessage(role="system", content=SYSTEM), ChatMessage(role="user", content=question(number))]
        return (await model.achat(asked)).message.content

    return ask


def llama_structured_llm(**options: Any) -> Callable[[Any, str, bool], Ask]:
    def make(client: Any, url: str, direct: bool) -> Ask:
        model = _llama(client, url, direct, **options).as_structured_llm(City)

        async def ask(number: int) -> Any:
            from llama_index.core.llms import ChatMessage

            asked = [ChatMessage(role="system", content=SYSTEM), ChatMessage(role="user", content=question(number))]
            return (await model.achat(asked)).raw

        return ask

    return make


def llama_predict(**options: Any) -> Callable[[Any, str, bool], Ask]:
    def make(client: Any, url: str, direct: bool) -> Ask:
        model = _llama(client, url, direct, **options)

        async def ask(number: int) -> Any:
            from llama_index.core.prompts import PromptTemplate

            return await model.astructured_predict(City, PromptTemplate("{question}"), question=question(number))

        return ask

    return make


# --- embeddings


def openai_embeddings(**options: Any) -> Callable[[Any, str, bool], Ask]:
    def make(client: Any, _url: str, _direct: bool) -> Ask:
        async def ask(number: int) -> Any:
            return (await client.embeddings.create(model=EMBEDDER, input=question(number), **options)).data[0].embedding

        return ask

    return make


def langchain_embeddings(client: Any, url: str, direct: bool) -> Ask:
    from langchain_openai import OpenAIEmbeddings

    given = {"async_client": client.embeddings} if direct else {}
    # By default it sends arrays of tokens, which are not combined.
    model = OpenAIEmbeddings(
        model=EMBEDDER, base_url=url, api_key=KEY, max_retries=0, check_embedding_ctx_length=False, **given
    )

    async def ask(number: int) -> Any:
        return (await model.aembed_documents([question(number)]))[0]

    return ask


def litellm_embeddings(client: Any, url: str, direct: bool) -> Ask:
    import litellm

    litellm.suppress_debug_info = True

    async def ask(number: int) -> Any:
        given = {"client": client} if direct else {"api_base": url, "api_key": KEY}
        answer = await litellm.aembedding(model=f"openai/{EMBEDDER}", input=[question(number)], max_retries=0, **given)
        return answer.data[0]["embedding"]

    return ask


def llama_embeddings(client: Any, url: str, direct: bool) -> Ask:
    from llama_index.embeddings.openai import OpenAIEmbedding

    model = OpenAIEmbedding(model=EMBEDDER, api_base=url, api_key=KEY, max_retries=0)
    if direct:
        model._aclient = client  # it takes none

    async def ask(number: int) -> Any:
        return await model.aget_text_embedding(question(number))

    return ask


def pydantic_ai_embeddings(client: Any, _url: str, _direct: bool) -> Ask:
    from pydantic_ai import Embedder
    from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
    from pydantic_ai.providers.openai import OpenAIProvider

    embedder = Embedder(OpenAIEmbeddingModel(EMBEDDER, provider=OpenAIProvider(openai_client=client)))

    async def ask(number: int) -> Any:
        return list((await embedder.embed_query(question(number))).embeddings[0])

    return ask


OPENAI = ("openai",)
INSTRUCTOR = ("openai", "instructor")
PYDANTIC_AI = ("openai", "pydantic_ai.models.openai")
LANGCHAIN = ("openai", "langchain_openai")
LITELLM = ("openai", "litellm")
LLAMA = ("openai", "llama_index.llms.openai")
LLAMA_LIKE = ("openai", "llama_index.llms.openai_like")
LLAMA_EMBEDDINGS = ("openai", "llama_index.embeddings.openai")

CASES = (
    Case("openai", "create", TEXT, openai_text, OPENAI),
    Case("openai", "create(stream)", TEXT, openai_stream, OPENAI),
    Case("openai", "parse", TYPED, openai_parse, OPENAI),
    Case("openai", "json_object", TYPED, openai_json_object, OPENAI),
    Case("openai", "tools, named", TYPED, openai_tools(NAMED), OPENAI),
    Case("openai", "tools, required", TYPED, openai_tools("required", parallel_tool_calls=False), OPENAI),
    Case("openai", "tools, named, stream", TYPED, openai_stream_tools, OPENAI),
    Case("openai", "parse, strict tool", TYPED, openai_parse_tools, OPENAI),
    Case("instructor", "TOOLS", TYPED, instructor_mode("TOOLS"), INSTRUCTOR),
    Case("instructor", "JSON_SCHEMA", TYPED, instructor_mode("JSON_SCHEMA"), INSTRUCTOR),
    Case("instructor", "JSON", TYPED, instructor_mode("JSON"), INSTRUCTOR),
    Case("instructor", "create_partial, TOOLS", TYPED, instructor_partial, INSTRUCTOR),
    Case("pydantic-ai", "str", TEXT, pydantic_ai_agent("str"), PYDANTIC_AI),
    Case("pydantic-ai", "output_type", TYPED, pydantic_ai_agent("default"), PYDANTIC_AI),
    Case("pydantic-ai", "NativeOutput", TYPED, pydantic_ai_agent("NativeOutput"), PYDANTIC_AI),
    Case("pydantic-ai", "PromptedOutput", TYPED, pydantic_ai_agent("PromptedOutput"), PYDANTIC_AI),
    Case("pydantic-ai", "run_stream", TEXT, pydantic_ai_stream(str), PYDANTIC_AI),
    Case("pydantic-ai", "run_stream, output_type", TYPED, pydantic_ai_stream(City), PYDANTIC_AI),
    Case("langchain-openai", "ainvoke", TEXT, langchain_text, LANGCHAIN),
    Case("langchain-openai", "text parts", TEXT, langchain_parts, LANGCHAIN),
    Case("langchain-openai", "astream", TEXT, langchain_stream, LANGCHAIN),
    Case("langchain-openai", "json_schema", TYPED, langchain_structured("json_schema"), LANGCHAIN),
    Case("langchain-openai", "function_calling", TYPED, langchain_structured("function_calling"), LANGCHAIN),
    Case("langchain-openai", "function_calling, astream", TYPED, langchain_structured_stream, LANGCHAIN),
    Case("langchain-openai", "json_mode", TYPED, langchain_structured("json_mode"), LANGCHAIN),
    Case("litellm", "acompletion", TEXT, litellm_mode(), LITELLM),
    Case("litellm", "stream", TEXT, litellm_mode(stream=True), LITELLM),
    Case("litellm", "response_format", TYPED, litellm_mode(response_format=City), LITELLM),
    Case("litellm", "tools", TYPED, litellm_mode(tools=[TOOL], tool_choice=NAMED), LITELLM),
    Case("llama-index", "achat", TEXT, llama_text, LLAMA),
    Case("llama-index", "as_structured_llm", TYPED, llama_structured_llm(like=False), LLAMA),
    Case("llama-index", "astructured_predict", TYPED, llama_predict(like=False), LLAMA),
    Case(
        "llama-index",
        "OpenAILike, tools",
        TYPED,
        llama_structured_llm(like=True, is_function_calling_model=True),
        LLAMA_LIKE,
    ),
    Case("llama-index", "OpenAILike, text", TYPED, llama_structured_llm(like=True), LLAMA_LIKE),
    Case("openai", "embeddings", VECTOR, openai_embeddings(), OPENAI),
    Case("openai", "embeddings, float", VECTOR, openai_embeddings(encoding_format="float"), OPENAI),
    Case("langchain-openai", "OpenAIEmbeddings", VECTOR, langchain_embeddings, LANGCHAIN),
    Case("litellm", "aembedding", VECTOR, litellm_embeddings, LITELLM),
    Case("llama-index-embeddings", "OpenAIEmbedding", VECTOR, llama_embeddings, LLAMA_EMBEDDINGS),
    Case("pydantic-ai", "Embedder", VECTOR, pydantic_ai_embeddings, PYDANTIC_AI),
)
