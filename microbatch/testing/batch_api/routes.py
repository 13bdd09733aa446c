"""The HTTP side of the simulated endpoint's files and batches."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aiohttp import BodyPartReader, web

from microbatch.testing.batch_api.files import MAX_FILE_BYTES, file_object
from microbatch.testing.reading import EndpointError
from microbatch.testing.wire import authorize, error_response, json_object, list_object

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from microbatch.testing.batch_api.batches import Batches
    from microbatch.testing.batch_api.files import Files

    Handler = Callable[[web.Request, str], Awaitable[web.Response]]

_CHUNK_BYTES: Final = 2**18
_MOST_FILES: Final = 10_000
_MOST_BATCHES: Final = 100
_USUAL_BATCHES: Final = 20


class BatchRoutes:
    """Serves files and batches to the keys that they belong to.

    Args:
        files: The files.
        batches: The batches.
        api_keys: Accepted keys; None accepts any.
    """

    def __init__(self, files: Files, batches: Batches, api_keys: Collection[str] | None) -> None:
        self._files = files
        self._batches = batches
        self._api_keys = api_keys

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Take the routes below /v1/files and /v1/batches."""
        for method, path, handler in (
            ("POST", "/v1/files", self._upload),
            ("GET", "/v1/files", self._list_files),
            ("GET", "/v1/files/{id}", self._get_file),
            ("GET", "/v1/files/{id}/content", self._get_content),
            ("DELETE", "/v1/files/{id}", self._delete_file),
            ("POST", "/v1/batches", self._create_batch),
            ("GET", "/v1/batches", self._list_batches),
            ("GET", "/v1/batches/{id}", self._get_batch),
            ("POST", "/v1/batches/{id}/cancel", self._cancel_batch),
        ):
            router.add_route(method, path, self._answering(handler))

    def _answering(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return what answers with *handler*, which is told the key, or with the error that it raises."""

        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request, authorize(request, self._api_keys))
            except EndpointError as error:
                return error_response(error, 0)

        return answer

    async def _upload(self, request: web.Request, key: str) -> web.Response:
        if request.content_type != "multipart/form-data":
            raise EndpointError(400, "The request must be multipart/form-data.")
        purpose, name, content = "", "", None
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                continue
            if part.name == "purpose":
                purpose = await part.text()
            elif part.name == "file":
                name = part.filename or "file"
                content = await _content(part)
        if content is None:
            raise EndpointError(400, "Missing required parameter: 'file'.", param="file")
        return web.json_response(file_object(self._files.add(key, name, purpose, content)))

    async def _list_files(self, request: web.Request, key: str) -> web.Response:
        found = [file_object(file) for file in self._files.of(key, request.query.get("purpose"))]
        return web.json_response(list_object(request, found, most=_MOST_FILES, usual=_MOST_FILES))

    async def _get_file(self, request: web.Request, key: str) -> web.Response:
        return web.json_response(file_object(self._files.get(key, request.match_info["id"])))

    async def _get_content(self, request: web.Request, key: str) -> web.Response:
        content = self._files.get(key, request.match_info["id"]).content
        return web.Response(body=content, content_type="application/octet-stream")

    async def _delete_file(self, request: web.Request, key: str) -> web.Response:
        name = request.match_info["id"]
        self._files.delete(key, name)
        return web.json_response({"id": name, "object": "file", "deleted": True})

    async def _create_batch(self, request: web.Request, key: str) -> web.Response:
        return web.json_response(self._batches.create(key, json_object(await request.read())).object())

    async def _list_batches(self, request: web.Request, key: str) -> web.Response:
        found = [batch.object() for batch in self._batches.of(key)]
        return web.json_response(list_object(request, found, most=_MOST_BATCHES, usual=_USUAL_BATCHES))

    async def _get_batch(self, request: web.Request, key: str) -> web.Response:
        return web.json_response(self._batches.get(key, request.match_info["id"]).object())

    async def _cancel_batch(self, request: web.Request, key: str) -> web.Response:
        return web.json_response(self._batches.cancel(key, request.match_info["id"]).object())


async def _content(part: BodyPartReader) -> bytes:
    """Return a file that is uploaded.

    Raises:
        EndpointError: It is too large; it has been read to its end, so that its sender hears of that.
    """
    content, size = bytearray(), 0
    while chunk := await part.read_chunk(_CHUNK_BYTES):
        size += len(chunk)
        if size <= MAX_FILE_BYTES:
            content += chunk
        # Reading from a socket that always has data never suspends, which would block other requests.
        await asyncio.sleep(0)
    if size > MAX_FILE_BYTES:
        message = f"Maximum content size limit ({MAX_FILE_BYTES}) exceeded ({size} bytes read)"
        raise EndpointError(413, message)
    return bytes(content)
