"""The two protocols that a Chatbot and its clients speak over a WebSocket: docs/protocol.md.

The plain protocol is the tutorial's. A text message from the client is a prompt. The reply arrives
in text messages, and a marker in a separate message ends it. An error closes the connection.

If a client offers the subprotocol `chat.v1`, both sides send JSON objects in text messages, told
apart by their `type`. An error answers the prompt that it concerns, and the conversation continues.
"""

import json
from abc import ABC, abstractmethod
from typing import Any, Literal

from pydantic import ValidationError
from starlette.types import Message

from streaming_bots.bot import Bot
from streaming_bots.errors import BadMessage, PromptTooLong
from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.http.request import (
    TextRequest,
    describe_problems,
    json_allowed,
    parse_object,
)
from streaming_bots.models.prompt import check_size

CHAT_V1 = "chat.v1"
MessageKind = Literal["waiting", "text", "done", "error", "pong"]


class ChatProtocol(ABC):
    """Reads a client's messages, and writes the text messages to send it."""

    subprotocol: str | None = None

    def __init__(self, bot: Bot, options: ReplyOptions, end_of_response: str) -> None:
        self.end_of_response = end_of_response  # the marker of the plain protocol
        self.max_new_tokens = bot.max_new_tokens
        self.prompt_budget = bot.prompt_budget(options.max_new_tokens)
        self.max_prompt_tokens = bot.max_prompt_tokens  # beside the shortest reply
        self.options = options.model_dump()  # the connection's; a prompt may have its own

    @abstractmethod
    def read(self, message: Message) -> TextRequest | Literal["stop", "ping"]:
        """Return the message's prompt, or "stop" or "ping". Raises a Refusal."""

    @abstractmethod
    def write(self, kind: MessageKind, **fields: Any) -> list[str]:
        """Return the text messages that tell the client something. Its kind decides the fields.

        - waiting: `ahead`, the number of replies that must end before this one begins
        - text: `text`, a piece of the reply
        - done, at the reply's end: `finish_reason`, `tokens`, `seconds`, `messages`, `dropped`
        - error: `detail`
        - pong: none
        """


class PlainProtocol(ChatProtocol):
    def read(self, message: Message) -> TextRequest:
        if (text := message.get("text")) is None:
            raise BadMessage("a prompt is a text message, not a binary one")
        check_size(text, self.prompt_budget)
        return TextRequest.model_construct(prompt=text, **self.options)

    def write(self, kind: MessageKind, **fields: Any) -> list[str]:
        """Write the pieces of the reply and its end. Split a piece that equals the marker."""
        if kind == "text":
            text = fields["text"]
            return [text[:1], text[1:]] if text == self.end_of_response else [text]
        return [self.end_of_response] if kind == "done" else []


class JsonProtocol(ChatProtocol):
    subprotocol = CHAT_V1

    def read(self, message: Message) -> TextRequest | Literal["stop", "ping"]:
        if (text := message.get("text")) is None:
            raise BadMessage("a message is JSON in a text message, not a binary one")
        if (size := len(text.encode())) > (allowed := json_allowed(self.max_prompt_tokens)):
            raise PromptTooLong(f"the message has {size} bytes, {allowed} are allowed")
        try:
            fields = parse_object(text)
        except ValueError as error:
            raise BadMessage(f"the message {error}") from None
        kind = fields.pop("type", None)
        if kind in ("stop", "ping") and not fields:
            return kind
        if kind != "prompt":
            raise BadMessage('a message is {"type": "prompt", "prompt": ...}, a "stop" or a "ping"')
        try:
            return TextRequest.model_validate(
                {**self.options, **fields}, context={"limit": self.max_new_tokens}
            )
        except ValidationError as error:
            problem = describe_problems(error, "message")[0]
            name = ".".join(str(part) for part in problem["loc"][1:])
            raise BadMessage(f"{name}: {problem['msg']}") from None

    def write(self, kind: MessageKind, **fields: Any) -> list[str]:
        return [json.dumps({"type": kind, **fields}, ensure_ascii=False)]
