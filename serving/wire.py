"""The two forms in which a Chatbot and its clients speak over a WebSocket.

Plain, the tutorial's: a text frame from the client is a prompt; the reply comes in text frames,
then a marker in a frame of its own says that it is complete. An error closes the socket.

`chat.v1`, for clients that offer this subprotocol: JSON objects in text frames, told apart by
their `type`. An error answers the prompt that it concerns, and the conversation goes on.

    client  {"type": "prompt", "prompt": "Hello!", "max_new_tokens": 20}   and other ReplyOptions
            {"type": "stop"}                       ends the replies to all prompts sent before it
            {"type": "ping"}                       is anybody there? Browsers let no page ask
    server  {"type": "waiting", "ahead": 3}        prompts that come first, if any, as they change
            {"type": "text", "text": "Hi"}         a piece of the reply
            {"type": "done", "finish_reason": "stop", "tokens": 7, "seconds": 0.21,
             "messages": 6, "dropped": 2}          of the conversation: still seen by the model, not
            {"type": "error", "detail": "a blank prompt has no reply"}
            {"type": "pong"}                       at once, also between the pieces of a reply
"""

import json
import time
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, Protocol

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError
from starlette.types import Message
from starlette.websockets import WebSocketState

from serving.encoding import NoToken, PromptTooLong, UnknownToken, check_size
from serving.model_thread import TooManyWaiting
from serving.prompts import (
    ReplyOptions,
    TextRequest,
    describe_problems,
    json_allowed,
    parse_object,
)
from serving.streaming import ReplyStreamer

CHAT_V1 = "chat.v1"
MAX_REASON_BYTES = 123  # of a WebSocket close frame (RFC 6455, 5.5)


class BadFrame(ValueError):
    """A frame that is no prompt."""


class Restarting(Exception):
    """The replica ends; what has not been answered may be asked another one."""


# What the client is to blame for, or the load, and its close code (RFC 6455, 7.4.1, and IANA's
# registry). Any other error is ours: 1011.
CLOSE_CODES: dict[type[Exception], int] = {
    BadFrame: 1003,
    PromptTooLong: 1009,
    NoToken: 1007,
    UnknownToken: 1007,
    Restarting: 1012,
    TooManyWaiting: 1013,
}
REFUSALS = tuple(CLOSE_CODES)


class Limits(NamedTuple):
    """What a prompt and its reply may have."""

    room: int  # tokens of a prompt
    max_new_tokens: int


class Wire(Protocol):
    """What both forms do with the messages of one socket."""

    ws: WebSocket

    async def accept(self) -> None: ...

    def read(self, frame: Message) -> TextRequest | Literal["stop", "ping"]:
        """The prompt in a frame, or what else it asks for. Raises one of REFUSALS."""

    async def send_waiting(self, ahead: int) -> None: ...
    async def send_text(self, text: str) -> None: ...
    async def send_done(self, streamer: ReplyStreamer, messages: int, spoken: int) -> None:
        """The end of a reply; of all messages spoken, the model still sees the last so many."""

    async def send_error(self, error: Exception) -> None: ...
    async def send_pong(self) -> None: ...


def choose_wire(
    ws: WebSocket,
    limits: Limits,
    options: ReplyOptions,  # of the connection
    end_of_response: str,
    ends: Collection[int],
) -> Wire:
    """chat.v1 for a client that offers it, else the plain form."""
    if CHAT_V1 in ws.scope["subprotocols"]:
        return JsonWire(ws, limits, options, ends)
    return PlainWire(ws, limits, options, end_of_response)


def describe(error: Exception) -> str:
    """What a client may know: all of a refusal, only the kind of a failure."""
    return (
        str(error) if isinstance(error, REFUSALS) else f"the reply failed: {type(error).__name__}"
    )


async def close(ws: WebSocket, error: Exception) -> None:
    """Close the socket, if it is open, with the error's code and what fits of its description."""
    if ws.application_state is not WebSocketState.CONNECTED:
        return
    reason = describe(error).encode()[:MAX_REASON_BYTES].decode(errors="ignore")
    await ws.close(CLOSE_CODES.get(type(error), 1011), reason)


class PlainWire:
    """Text frames, and a marker after each reply."""

    def __init__(
        self, ws: WebSocket, limits: Limits, options: ReplyOptions, end_of_response: str
    ) -> None:
        self.ws = ws
        self.limits = limits
        self.options = options.model_dump()
        self.end_of_response = end_of_response

    async def accept(self) -> None:
        await self.ws.accept()

    def read(self, frame: Message) -> TextRequest:
        if (text := frame.get("text")) is None:
            raise BadFrame("a prompt is a text frame, not a binary one")
        check_size(text, self.limits.room)
        return TextRequest.model_construct(prompt=text, **self.options)

    async def send_waiting(self, ahead: int) -> None:
        """Clients of this form just wait."""

    async def send_text(self, text: str) -> None:
        """Send a piece of the reply; one that looks like the marker goes in two frames."""
        if text == self.end_of_response:
            await self.ws.send_text(text[:1])
            text = text[1:]
        await self.ws.send_text(text)

    async def send_done(self, streamer: ReplyStreamer, messages: int, spoken: int) -> None:
        await self.ws.send_text(self.end_of_response)

    async def send_error(self, error: Exception) -> None:
        await close(self.ws, error)
        raise WebSocketDisconnect(CLOSE_CODES.get(type(error), 1011))

    async def send_pong(self) -> None:
        """Clients of this form cannot ask for one."""


class JsonWire:
    """The subprotocol chat.v1."""

    def __init__(
        self, ws: WebSocket, limits: Limits, options: ReplyOptions, ends: Collection[int]
    ) -> None:
        self.ws = ws
        self.limits = limits
        self.options = options.model_dump()  # a prompt may have others
        self.ends = ends  # token ids that end a reply

    async def accept(self) -> None:
        await self.ws.accept(subprotocol=CHAT_V1)

    def read(self, frame: Message) -> TextRequest | Literal["stop", "ping"]:
        if (text := frame.get("text")) is None:
            raise BadFrame("a message is JSON in a text frame, not a binary one")
        if (size := len(text.encode())) > (allowed := json_allowed(self.limits.room)):
            raise PromptTooLong(f"the message has {size} bytes, {allowed} are allowed")
        try:
            message = parse_object(text)
        except ValueError as error:
            raise BadFrame(f"the message {error}") from None
        kind = message.pop("type", None)
        if kind in ("stop", "ping") and not message:
            return kind
        if kind != "prompt":
            raise BadFrame('a message is {"type": "prompt", "prompt": ...} or {"type": "stop"}')
        try:
            return TextRequest.model_validate(
                {**self.options, **message}, context={"limit": self.limits.max_new_tokens}
            )
        except ValidationError as error:
            problem = describe_problems(error, "message")[0]
            field = ".".join(str(part) for part in problem["loc"][1:])
            raise BadFrame(f"{field}: {problem['msg']}") from None

    async def send_waiting(self, ahead: int) -> None:
        await self._send(type="waiting", ahead=ahead)

    async def send_text(self, text: str) -> None:
        await self._send(type="text", text=text)

    async def send_done(self, streamer: ReplyStreamer, messages: int, spoken: int) -> None:
        await self._send(
            type="done",
            finish_reason=streamer.finish_reason(self.ends),
            tokens=len(streamer.token_times),
            seconds=round(time.monotonic() - streamer.asked, 3),
            messages=messages,
            dropped=spoken - messages,
        )

    async def send_error(self, error: Exception) -> None:
        await self._send(type="error", detail=describe(error))

    async def send_pong(self) -> None:
        await self._send(type="pong")

    async def _send(self, **message: Any) -> None:
        await self.ws.send_text(json.dumps(message, ensure_ascii=False))
