"""Reads a client's prompt and its options from the query or a JSON body, and validates them."""

import asyncio
import json
import re
from collections.abc import Collection
from typing import Annotated, Any, Self, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError, field_validator
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from streaming_bots.bot import current_bot
from streaming_bots.errors import BodyLost, BodyTimeout, PromptTooLong
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

    prompt: str = Field(json_schema_extra={"pattern": r"\S"})
    """The text to reply to, not blank; required in the query or the body."""

    @field_validator("prompt")
    @classmethod
    def _refuse_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("a blank prompt has no reply")
        return prompt

    @classmethod
    async def read(cls, request: Request) -> Self:
        """Read the query, and a JSON body with the same parameters, which take precedence.

        It is a FastAPI dependency. Raises RequestValidationError (422), which names the parameter.
        """
        query = query_fields(request.query_params)
        if not (body := await read_body(request)):
            return validate(cls, query, "query")
        fields = parse_body(body)
        return validate(cls, query | fields, "body", query.keys() - fields.keys())


def query_fields(query: QueryParams) -> dict[str, Any]:
    """Return the fields of a query. A field that may be repeated is a list."""
    fields: dict[str, Any] = dict(query)
    if "stop" in fields:
        fields["stop"] = query.getlist("stop")
    return fields


def parse_object(
    data: str | bytes, outside_strings: int = MAX_BYTES_OUTSIDE_STRINGS
) -> dict[str, Any]:
    """Parse a JSON object, and leave out its nulls.

    Raises ValueError with the problem, such as "is not a JSON object".
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not a JSON object, which is UTF-8") from None
    # Each string counts as one byte. Once there are too many, the others need not be counted.
    if len(STRING.sub('"', text, count=outside_strings + 1)) > outside_strings:
        raise ValueError(f"has more than {outside_strings} bytes outside of strings")
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
    return {name: value for name, value in fields.items() if value is not None}


def json_allowed(tokens: int, outside_strings: int = MAX_BYTES_OUTSIDE_STRINGS) -> int:
    """Return the maximum size in bytes of JSON with a prompt of `tokens` tokens."""
    return ESCAPED * bytes_allowed(tokens) + outside_strings


async def read_body(request: Request, outside_strings: int = MAX_BYTES_OUTSIDE_STRINGS) -> bytes:
    """Read a body. Raises BodyTimeout, BodyLost, or PromptTooLong if no prompt needs as much."""
    allowed = json_allowed(current_bot().max_prompt_tokens, outside_strings)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > allowed:
                    raise PromptTooLong(f"the body has more than the {allowed} bytes allowed")
    except TimeoutError:
        raise BodyTimeout(f"the body was not there after {BODY_TIMEOUT_S:.0f} s") from None
    if not body and request.headers.get("content-length", "0") != "0":
        raise BodyLost("the body was lost: use HTTP/1.1, without the header Upgrade")
    return bytes(body)


def parse_body(body: bytes, outside_strings: int = MAX_BYTES_OUTSIDE_STRINGS) -> dict[str, Any]:
    """Parse a body. Raises RequestValidationError if it is not a JSON object."""
    try:
        return parse_object(body, outside_strings)
    except ValueError as error:
        problem = {"type": "json_invalid", "msg": f"the body {error}", "loc": ("body",)}
        raise RequestValidationError([problem]) from None


async def read_options(connection: HTTPConnection) -> ReplyOptions:
    """Read reply options from the query of a WebSocket handshake, or of the chat page."""
    return validate(ReplyOptions, query_fields(connection.query_params), "query")


def validate(
    kind: type[Model], given: dict[str, Any], place: str, in_query: Collection[str] = ()
) -> Model:
    """Validate parameters. The bot's `max_new_tokens` is the default and the maximum.

    Raises RequestValidationError, which names the parameter and its place: "query" or "body".
    """
    limit = current_bot().max_new_tokens
    try:
        return kind.model_validate({"max_new_tokens": limit, **given}, context={"limit": limit})
    except ValidationError as error:
        problems = describe_problems(error, place)
        for problem in problems:
            if not set(problem["loc"][1:2]).isdisjoint(in_query):
                problem["loc"] = ("query", *problem["loc"][1:])
        raise RequestValidationError(problems) from None


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
