"""The request that a client sends to `/v1/chat/completions`."""

import logging
from typing import Annotated, ClassVar, Literal

from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from streaming_bots.generation.sampling import NotBoolean, ReplyOptions
from streaming_bots.http.request import (
    MAX_NAME,
    MAX_PROBLEMS,
    parse_body,
    read_body,
    validate,
)
from streaming_bots.models.prompt import Message

logger = logging.getLogger("ray.serve")

MAX_BYTES_OUTSIDE_STRINGS = 65_536  # of a body: a thousand messages, or tools' schemas

# These take values that other servers allow: a `top_p` of 0 keeps only the most likely token, a
# `top_k` of -1 keeps all tokens, and a seed of -1 is none.
TopP = Annotated[float, Field(ge=0, le=1), NotBoolean, AfterValidator(lambda p: max(p, 1e-6))]
TopK = Annotated[int, Field(ge=-1), NotBoolean, AfterValidator(lambda k: max(k, 0))]
Seed = Annotated[int, NotBoolean, AfterValidator(lambda seed: None if seed == -1 else seed % 2**63)]
AtLeastOne = Annotated[int, Field(ge=1), NotBoolean]


Role = Annotated[
    Literal["system", "developer", "user", "assistant"],
    AfterValidator(lambda role: "system" if role == "developer" else role),
]


class ChatMessage(BaseModel):
    role: Role
    content: str = Field(default="", description="Text, or a list of parts of type text.")

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: object) -> object:
        if not isinstance(content, list):
            return "" if content is None else content  # null beside a tool call
        texts = [part["text"] for part in content if _is_text(part)]
        if len(texts) < len(content):
            raise ValueError("only parts of type text are possible")
        return "\n".join(texts)


def _is_text(part: object) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class TextFormat(BaseModel):
    type: Literal["text"]


class CompletionRequest(ReplyOptions):
    """A conversation, and the options of its reply.

    Parameters that are not here are ignored. A parameter whose effect a client would miss is here,
    with only the values that a bot supports.
    """

    model_config = ConfigDict(extra="ignore")
    whole: ClassVar[bool] = True

    model: str | None = Field(default=None, description="The id in /v1/models, or its last part.")
    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Field(ge=1, le=1), NotBoolean] = 1
    logprobs: Literal[False] = False
    modalities: Annotated[list[Literal["text"]], Field(max_length=2, fail_fast=True)] | None = None
    response_format: TextFormat | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    function_call: Literal["none", "auto"] = "auto"

    @model_validator(mode="after")
    def _limit_reply(self) -> "CompletionRequest":
        asked = (self.max_new_tokens, self.max_tokens, self.max_completion_tokens)
        self.max_new_tokens = min(limit for limit in asked if limit is not None)
        return self

    def conversation(self, beginning: list[Message]) -> list[Message]:
        """Return the messages, after `beginning` unless they include a system prompt.

        A blank system prompt is none.
        """
        messages = [
            message.model_dump()
            for message in self.messages
            if message.role != "system" or message.content.strip()
        ]
        if any(message["role"] == "system" for message in messages):
            return messages
        return [*beginning, *messages]


async def read_completion_request(request: Request) -> CompletionRequest:
    """Read the body of a request. Raises RequestValidationError, which names the parameter."""
    body = await read_body(request, MAX_BYTES_OUTSIDE_STRINGS)
    fields = parse_body(body, MAX_BYTES_OUTSIDE_STRINGS)
    fields.pop("max_new_tokens", None)  # the bots' own name for the limit
    if ignored := sorted(fields.keys() - CompletionRequest.model_fields.keys()):
        logger.debug(f"ignored: {[name[:MAX_NAME] for name in ignored[:MAX_PROBLEMS]]}")
    return validate(CompletionRequest, fields, "body")
