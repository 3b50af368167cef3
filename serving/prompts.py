"""What a caller asks for: a prompt and its options, from the query or a JSON body, checked."""

import json
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from ray import serve

from serving.encoding import MAX_BYTES, PromptTooLong

MAX_BODY_BYTES = MAX_BYTES + 1000  # read into memory before the prompt in it can be measured


class TextRequest(BaseModel):
    """What a caller asks for, once it is known to be possible."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    max_new_tokens: int

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("a blank prompt has no reply")
        return prompt

    @field_validator("max_new_tokens", mode="before")
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


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError with what is wrong, as "is not a JSON object"."""
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


async def read_body(request: Request) -> bytes:
    """The request's body. Raises PromptTooLong before too much of it is in memory."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise PromptTooLong(f"the body has more than the {MAX_BODY_BYTES} bytes allowed")
    return bytes(body)


async def read_request(request: Request) -> TextRequest:
    """The request's parameters: from the query, or from a JSON body with the same names.

    A request that does not limit the reply gets the deployment's `max_new_tokens`, and none may
    ask for more. Raises RequestValidationError (422), which names the field.
    """
    limit = serve.get_replica_context().servable_object.max_new_tokens
    given, place = {"max_new_tokens": limit, **request.query_params}, "query"
    if body := await read_body(request):
        place = "body"
        try:
            given |= parse_object(body)
        except ValueError as error:
            problem = {"type": "json_invalid", "msg": f"the body {error}", "loc": ("body",)}
            raise RequestValidationError([problem]) from None
    try:
        return TextRequest.model_validate(given, context={"limit": limit})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(
            [problem | {"loc": (place, *problem["loc"])} for problem in problems]
        ) from None
