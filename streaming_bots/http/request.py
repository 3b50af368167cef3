"""Reads a client's prompt and its options from the query or a JSON body, and validates them."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from pydantic import Field, ValidationError, field_validator
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from streaming_bots.bot import current_bot
from streaming_bots.errors import BodyTimeout, BodyTooLong
from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.models.prompt import bytes_allowed

# Requests are parsed on the event loop, while all other clients wait. Long strings take next to no
# time, but each separate value takes Python half a microsecond.
MAX_BYTES_OUTSIDE_STRINGS = 4096
STRING = re.compile(r'"[^"\\]*+(?:\\.?[^"\\]*+)*+"?', re.DOTALL)
ESCAPED = 3  # \uXXXX for a non-ASCII character takes at most this many times its UTF-8 bytes
BODY_TIMEOUT_S = 10.0  # an incomplete body would hold a place among the requests
MAX_PROBLEMS = 5  # that a response lists
MAX_NAME = 100  # characters of a parameter's name in it

Model = TypeVar("Model", bound=ReplyOptions)


class TextRequest(ReplyOptions):
    """A prompt and the options of its reply."""

    prompt: str = Field(
        description="The text to reply to, not blank; required in the query or the body.",
        json_schema_extra={"pattern": r"\S"},
    )

    @field_validator("prompt")
    @classmethod
    def _refuse_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("a blank prompt has no reply")
        return prompt


def query_fields(query: QueryParams) -> dict[str, Any]:
    """Return the fields of a query. A field that may be repeated is a list."""
    fields: dict[str, Any] = dict(query)
    if "stop" in fields:
        fields["stop"] = query.getlist("stop")
    return fields


def check_structure(text: str, allowed: int) -> None:
    """Raise ValueError for JSON with more values than a request can need, before it is parsed."""
    outside, end = 0, 0
    for string in STRING.finditer(text):
        outside += 1 + string.start() - end
        end = string.end()
        if outside > allowed:
            break
    if outside + len(text) - end > allowed:
        raise ValueError(f"has more than {allowed} bytes outside of strings")


def parse_object(
    data: str | bytes, outside_strings: int = MAX_BYTES_OUTSIDE_STRINGS
) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError with the problem, such as "is not a JSON object"."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not a JSON object, which is UTF-8") from None
    check_structure(text, outside_strings)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not a JSON object") from None
    if not isinstance(fields, dict):
        raise ValueError("is not a JSON object")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which is no character") from None
    return fields


def json_allowed(tokens: int, outside_strings: int = MAX_BYTES_OUTSIDE_STRINGS) -> int:
    """Return the maximum size in bytes of JSON with a prompt of `tokens` tokens."""
    return ESCAPED * bytes_allowed(tokens) + outside_strings


async def read_body(request: Request, outside_strings: int = MAX_BYTES_OUTSIDE_STRINGS) -> bytes:
    """Read a body. Raises BodyTimeout, or BodyTooLong if no prompt that fits needs as much."""
    allowed = json_allowed(current_bot().max_prompt_tokens, outside_strings)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > allowed:
                    raise BodyTooLong(f"the body has more than the {allowed} bytes allowed")
    except TimeoutError:
        raise BodyTimeout(f"the body was not there after {BODY_TIMEOUT_S:.0f} s") from None
    return bytes(body)


def reader(kind: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """Return a FastAPI dependency that reads a request of this kind.

    It reads the query, and a JSON body with the same parameters, which take precedence. It raises
    RequestValidationError (422), which names the parameter.
    """

    async def read_request(request: Request) -> Model:
        given, place = query_fields(request.query_params), "query"
        if body := await read_body(request):
            place = "body"
            try:
                given |= parse_object(body)
            except ValueError as error:
                raise not_json(error) from None
        return validate(kind, given, place)

    return read_request


def not_json(error: ValueError) -> RequestValidationError:
    """Return the validation error for a body that parse_object has refused."""
    return RequestValidationError(
        [{"type": "json_invalid", "msg": f"the body {error}", "loc": ("body",)}]
    )


async def read_options(connection: HTTPConnection) -> ReplyOptions:
    """Read reply options from the query of a WebSocket handshake, or of the chat page.

    Raises WebSocketRequestValidationError for a handshake, RequestValidationError for the page.
    """
    try:
        return validate(ReplyOptions, query_fields(connection.query_params), "query")
    except RequestValidationError as error:
        if connection.scope["type"] == "websocket":
            raise WebSocketRequestValidationError(error.errors()) from None
        raise


def validate(kind: type[Model], given: dict[str, Any], place: str) -> Model:
    """Validate parameters. The bot's `max_new_tokens` is the default and the maximum.

    Raises RequestValidationError, which names the place ("query" or "body") and the parameter.
    """
    limit = current_bot().max_new_tokens
    try:
        return kind.model_validate({"max_new_tokens": limit, **given}, context={"limit": limit})
    except ValidationError as error:
        raise RequestValidationError(describe_problems(error, place)) from None


def describe_problems(error: ValidationError, place: str) -> list[dict[str, Any]]:
    """Return the `detail` of FastAPI's 422: the first problems, with shortened names."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    return [
        {**problem, "loc": (place, *(shorten(name) for name in problem["loc"]))}
        for problem in problems[:MAX_PROBLEMS]
    ]


def shorten(name: int | str) -> int | str:
    return name[:MAX_NAME] if isinstance(name, str) else name


ConnectionOptions = Annotated[ReplyOptions, Depends(read_options)]
