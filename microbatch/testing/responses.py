"""Helpers of all routes of the simulated endpoint: request bodies, authorization, errors, pages of lists."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from microbatch.testing.reading import EndpointError
from microbatch.testing.wire import error_object, limit_headers, request_id, wait_headers

if TYPE_CHECKING:
    from collections.abc import Collection


def json_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object that a request's body holds.

    Raises:
        EndpointError: It holds none.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise EndpointError(400, "We could not parse the JSON body of your request. The API expects a JSON payload.")
    return cast("dict[str, Any]", body)


def error_response(error: EndpointError, number: int) -> web.Response:
    """Return *error* as the answer to the request *number*."""
    headers = {"x-request-id": request_id(number), **limit_headers(error.limits), **wait_headers(error)}
    return web.json_response(error_object(error), status=error.status, headers=headers)


def authorize(request: web.Request, api_keys: Collection[str] | None) -> str:
    """Return who asks: the Authorization header, or "".

    Raises:
        EndpointError: The key is missing, or not among *api_keys*.
    """
    given = request.headers.get("Authorization", "")
    if api_keys is None:
        return given
    scheme, _, key = given.partition(" ")
    if scheme.lower() != "bearer" or not key:
        message = "You didn't provide an API key. You need to provide your API key in an Authorization header."
        raise EndpointError(401, message)
    if key not in api_keys:
        # As OpenAI does, echo the key with its middle blotted out.
        message = f"Incorrect API key provided: {key[:4]}{'*' * 8}{key[-4:]}."
        raise EndpointError(401, message, code="invalid_api_key")
    return given


def list_object(request: web.Request, objects: list[dict[str, Any]], *, most: int, usual: int) -> dict[str, Any]:
    """Return the page of *objects*, newest first, that the query of *request* asks for.

    Args:
        request: Its query may have `after`, the id that the page follows, and `limit`.
        objects: All there are.
        most: The highest limit.
        usual: The limit where none is asked for.

    Raises:
        EndpointError: The limit is out of range, or `after` is none of the ids.
    """
    asked = request.query.get("limit", str(usual))
    if not asked.isdecimal() or not 1 <= int(asked) <= most:
        message = f"Invalid 'limit': expected an integer from 1 to {most}, but got {asked!r}."
        raise EndpointError(400, message, param="limit", code="invalid_value")
    after, start = request.query.get("after"), 0
    if after is not None:
        ids = [one["id"] for one in objects]
        if after not in ids:
            raise EndpointError(400, f"Invalid 'after': no such object: {after}", param="after", code="invalid_value")
        start = ids.index(after) + 1
    page = objects[start : start + int(asked)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + len(page) < len(objects),
    }
