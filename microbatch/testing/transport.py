"""The simulated model in the same process, without sockets, so that it runs on a virtual clock."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from microbatch.checking import checks_arguments
from microbatch.errors import (
    AuthFailed,
    BadRequest,
    ConnectFailed,
    RateLimited,
    ServerError,
    StatusError,
    TransportTimeout,
)
from microbatch.protocols import ChatCall, Completion, Embedded, EmbeddingCall
from microbatch.testing.counting import compact
from microbatch.testing.model import SimulatedModel
from microbatch.testing.pace import paced, sleep_until
from microbatch.testing.reading import EndpointError
from microbatch.testing.wire import completion_object, request_id
from microbatch.transports.bound_refusals import lower, read_refusal
from microbatch.transports.embedding_reply import EmbeddingReader
from microbatch.transports.error_parsing import classify, read_failure
from microbatch.transports.reply_fields import read_tier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from microbatch.testing.reply import SimulatedReply

MODEL = "simulated"


class SimulatedTransport:
    """A transport straight to a simulated model, with its latency and its faults.

    Where the model refuses json_schema the call's hint goes into the prompt, as behind a transport that has learned so.
    The key whose quota is charged is the call's own Authorization header, or none.

    Args:
        simulated: The model. Several transports may share one.
    """

    @checks_arguments
    def __init__(self, simulated: SimulatedModel) -> None:
        self.simulated = simulated

    async def send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        """Make one attempt at *call*; see `Transport.send`.

        Raises:
            StatusError: The model refuses the call, or a fault is an error response.
            ConnectFailed: A fault broke the connection.
            TransportTimeout: The call's timeout passed.
        """
        timeout = asyncio.timeout(call.timeout)
        try:
            async with timeout:
                return await self._send(call, on_text)
        except TimeoutError as error:
            if not timeout.expired():  # an answer function's own
                raise
            raise TransportTimeout(f"no answer within {call.timeout} s") from error

    @property
    def embedding_model(self) -> str:
        """The model of embeddings calls that name none."""
        return MODEL

    async def embed(self, call: EmbeddingCall) -> Embedded:
        """Make one attempt at *call*; see `Transport`.

        Raises:
            StatusError: The model refuses the call, or a fault is an error response or leaves no vector.
            ConnectFailed: A fault broke the connection.
            TransportTimeout: The call's timeout passed.
        """
        timeout = asyncio.timeout(call.timeout)
        try:
            async with timeout:
                return await self._embed(call)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise TransportTimeout(f"no answer within {call.timeout} s") from error

    async def aclose(self) -> None:
        """No-op: there are no connections."""

    async def _send(self, call: ChatCall, on_text: Callable[[str], None]) -> Completion:
        start = asyncio.get_running_loop().time()
        # Over a network nothing is answered in the same step either.
        await asyncio.sleep(0)
        body = self.body_of(call)
        number = self.simulated.admit(body)
        try:
            reply = await self.simulated.respond(body, _key(call.headers))
        except EndpointError as error:
            raise _status_error(error, number, call) from error
        try:
            if call.stream and not reply.refusal:
                async for first, end in paced(reply.times, start):
                    for text in reply.pieces.texts[first:end]:
                        on_text(text)
            await sleep_until(start + reply.duration)
            # Half a body that is not streamed is no JSON, so nothing of it can be read.
            if not call.stream and reply.ending in ("done", "cut") and not reply.refusal and reply.pieces.texts:
                on_text(reply.pieces.text)
            if reply.ending in ("stall", "hang"):
                await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.simulated.disconnects += 1
            raise
        if reply.ending == "reset":
            raise ConnectFailed("the connection was reset in the middle of the reply")
        return self._completion(call, reply, number, body["model"])

    async def _embed(self, call: EmbeddingCall) -> Embedded:
        start, model = asyncio.get_running_loop().time(), self.simulated
        await asyncio.sleep(0)
        body: dict[str, Any] = {"model": call.model or MODEL, "input": [*call.inputs], **call.params}
        if call.dimensions is not None:
            body["dimensions"] = call.dimensions
        number = model.admit(body)
        try:
            reply = await model.embed(body, _key(call.headers))
        except EndpointError as error:
            raise _refusal(error, number) from error
        try:
            if reply.ending == "hang":
                await asyncio.get_running_loop().create_future()
            await sleep_until(start + (model.latency.first_token or 0.0))
        except asyncio.CancelledError:
            model.disconnects += 1
            raise
        if reply.ending == "cut":
            raise ConnectFailed("the connection was reset in the middle of the reply")
        model.report(reply.usage)
        reader = EmbeddingReader(bytearray(reply.body))
        for _ in reader.read():
            pass
        if not reader.vectors:
            raise ServerError("the answer has no vectors", status=200, request_id=request_id(number))
        return Embedded(
            vectors=reader.vectors,
            finish_reason="stop",
            usage=reader.usage,
            model=reader.model,
            request_id=request_id(number),
            limits=reply.limits,
        )

    def _completion(self, call: ChatCall, reply: SimulatedReply, number: int, model: str) -> Completion:
        unreported = call.stream and (reply.ending == "cut" or self.simulated.stream_options != "ok")
        usage = None if unreported else reply.usage
        if usage is not None:
            self.simulated.report(usage)
        return Completion(
            reply.finish_reason,
            usage=usage,
            model=model,
            refusal=reply.pieces.text if reply.refusal else None,
            request_id=request_id(number),
            body=None if call.stream else completion_object(reply, number, model),
            limits=reply.limits,
            bound=call.bound if call.max_tokens is None else None,
            service_tier=read_tier(reply.service_tier, None),
        )

    def body_of(self, call: ChatCall) -> dict[str, Any]:
        """Return the request that an HTTP transport would send."""
        body: dict[str, Any] = {
            "model": call.model or MODEL,
            "messages": [dict(each) for each in call.messages],
            **call.params,
        }
        if call.schema is not None:
            if self.simulated.json_schema == "ok":
                schema = {"name": "reply", "schema": dict(call.schema), "strict": False}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
            elif call.hint is not None:
                body["messages"].insert(-1, {"role": "system", "content": call.hint})
        most = call.bound if call.max_tokens is None else call.max_tokens
        if most is not None:
            body[self.simulated.max_tokens_name or "max_tokens"] = most
        if call.stream:
            body["stream"] = True
        return body


def _key(headers: Mapping[str, str]) -> str:
    return next((value for name, value in headers.items() if name.lower() == "authorization"), "")


_BY_STATUS: Final[dict[int, type[StatusError]]] = {401: AuthFailed, 429: RateLimited, 500: ServerError}


def _status_error(error: EndpointError, number: int, call: ChatCall) -> StatusError:
    """Return what an HTTP transport would raise for an error response to *call*, whose bound is lowered if that is why."""
    said = None
    if call.bound is not None and call.max_tokens is None:
        said = read_refusal(str(error), error.status, call.bound)
    lowered = False if said is None else lower(call, said)
    if lowered is None:
        call.bound = None
    again = said is not None and lowered is not False
    refusal = _refusal(error, number, BadRequest if again else None)
    refusal.again, refusal.token_limits = again, said
    return refusal


def _refusal(error: EndpointError, number: int, kind: type[StatusError] | None = None) -> StatusError:
    """Return what an HTTP transport would raise for an error response; *kind* is its class, None for the usual one."""
    body = compact(error.body)
    kind = kind or _BY_STATUS.get(error.status) or classify(read_failure(body.encode(), error.status))
    return kind(
        str(error),
        status=error.status,
        code=error.error["code"] or error.error["type"],
        param=error.error["param"],
        request_id=request_id(number),
        retry_after=error.retry_after,
        body=body,
        limits=error.limits,
    )
