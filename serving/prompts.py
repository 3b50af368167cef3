"""What a caller asks for: a prompt and its options, from the query or a JSON body, checked."""

import asyncio
import json
import re
from typing import Annotated, Any, TypeVar

import torch
from fastapi import Request
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from ray import serve
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from serving.encoding import PromptTooLong, bytes_allowed
from serving.sampling import Sampler

# Whatever a client sends is parsed on the event loop, while all others wait. Text takes next to no
# time, but each value of its own takes Python half a microsecond.
MAX_BYTES_OUTSIDE_STRINGS = 4096
STRING = re.compile(r'"[^"\\]*+(?:\\.?[^"\\]*+)*+"?', re.DOTALL)
ESCAPED = 3  # times as long is text of which each character is written as \uXXXX
BODY_TIMEOUT_S = 30.0  # a client that sends half a body would keep its place among the requests
MAX_PROBLEMS = 5  # that an answer tells
MAX_NAME = 100  # characters of a parameter's name in it

Model = TypeVar("Model", bound="ReplyOptions")
StopString = Annotated[str, Field(min_length=1, max_length=100)]


class ReplyOptions(BaseModel):
    """How a reply is written: with the most likely tokens, unless one of these asks for sampling.

    Validated with the context `{"limit": <the bot's max_new_tokens>}`.
    """

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int
    temperature: float | None = Field(default=None, ge=0, le=2)  # 0 is the most likely tokens
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)  # 0 is all of them
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: list[StopString] = Field(default=[], max_length=4)

    @field_validator("max_new_tokens", "temperature", "top_p", "top_k", "seed", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("a number is needed")
        return value

    @field_validator("max_new_tokens")
    @classmethod
    def _check_max_new_tokens(cls, value: int, info: ValidationInfo) -> int:
        limit = (info.context or {})["limit"]
        if not 0 < value <= limit:
            raise ValueError(f"from 1 to {limit} tokens are possible")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _take_one_string(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    def sampler(self, device: torch.device) -> Sampler | None:
        """What draws the tokens of one reply; None for the most likely ones."""
        temperature, asked = self.temperature, (self.top_p, self.top_k, self.seed)
        if temperature is None:
            temperature = 0.0 if asked == (None, None, None) else 1.0
        if temperature == 0:
            return None
        return Sampler(temperature, self.top_k or 0, self.top_p or 1.0, self.seed, device)


class TextRequest(ReplyOptions):
    """What a caller asks for, once it is known to be possible."""

    prompt: str

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("a blank prompt has no reply")
        return prompt


def query_fields(query: QueryParams) -> dict[str, Any]:
    """The fields of a query; of those that may be repeated, a list."""
    fields: dict[str, Any] = dict(query)
    if "stop" in fields:
        fields["stop"] = query.getlist("stop")
    return fields


def check_structure(text: str) -> None:
    """Raise ValueError for JSON with more values than a request can need, before it is parsed."""
    outside, end = 0, 0
    for string in STRING.finditer(text):
        outside += 1 + string.start() - end
        end = string.end()
        if outside > MAX_BYTES_OUTSIDE_STRINGS:
            break
    if outside + len(text) - end > MAX_BYTES_OUTSIDE_STRINGS:
        raise ValueError(f"has more than {MAX_BYTES_OUTSIDE_STRINGS} bytes outside of strings")


def parse_object(data: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError with what is wrong, as "is not a JSON object"."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not a JSON object, which is UTF-8") from None
    check_structure(text)
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


def json_allowed(tokens: int) -> int:
    """The most bytes that JSON with a prompt of so many tokens can need."""
    return ESCAPED * bytes_allowed(tokens) + MAX_BYTES_OUTSIDE_STRINGS


class BodyTimeout(Exception):
    """A body that does not come."""


async def read_body(request: Request) -> bytes:
    """The request's body. Raises PromptTooLong if no prompt that fits can need so much, and
    BodyTimeout if it is not there in time.
    """
    longest = serve.get_replica_context().servable_object.max_prompt_tokens
    allowed = json_allowed(longest)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > allowed:
                    raise PromptTooLong(f"the body has more than the {allowed} bytes allowed")
    except TimeoutError:
        raise BodyTimeout(f"the body was not there after {BODY_TIMEOUT_S:.0f} s") from None
    return bytes(body)


async def read_request(request: Request) -> TextRequest:
    """The request's parameters: from the query, or from a JSON body with the same names.

    A request that does not limit the reply gets the deployment's `max_new_tokens`, and none may
    ask for more. Raises RequestValidationError (422), which names the field.
    """
    given, place = query_fields(request.query_params), "query"
    if body := await read_body(request):
        place = "body"
        try:
            given |= parse_object(body)
        except ValueError as error:
            problem = {"type": "json_invalid", "msg": f"the body {error}", "loc": ("body",)}
            raise RequestValidationError([problem]) from None
    try:
        return _validate(TextRequest, given)
    except ValidationError as error:
        raise RequestValidationError(describe_problems(error, place)) from None


async def read_options(connection: HTTPConnection) -> ReplyOptions:
    """The options of a connection's replies, from the query of its handshake, or of its page.

    Raises WebSocketRequestValidationError, with which the handshake is refused, or for the page
    RequestValidationError (422).
    """
    try:
        return _validate(ReplyOptions, query_fields(connection.query_params))
    except ValidationError as error:
        problems = describe_problems(error, "query")
        if connection.scope["type"] == "websocket":
            raise WebSocketRequestValidationError(problems) from None
        raise RequestValidationError(problems) from None


def _validate(kind: type[Model], given: dict[str, Any]) -> Model:
    limit = serve.get_replica_context().servable_object.max_new_tokens
    return kind.model_validate({"max_new_tokens": limit, **given}, context={"limit": limit})


def describe_problems(error: ValidationError, place: str) -> list[dict[str, Any]]:
    """What FastAPI says in the `detail` of a 422: the first of the problems, with short names."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    return [
        {**problem, "loc": (place, *(shorten(name) for name in problem["loc"]))}
        for problem in problems[:MAX_PROBLEMS]
    ]


def shorten(name: int | str) -> int | str:
    return name[:MAX_NAME] if isinstance(name, str) else name
