"""One client's WebSocket. The bot reads prompts ahead, and answers each once, in order."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from starlette.types import Message as ASGIMessage
from starlette.websockets import WebSocketState

from streaming_bots.bot import Bot, Reply
from streaming_bots.chat.protocol import CHAT_V1, JsonProtocol, MessageKind, PlainProtocol
from streaming_bots.errors import Refusal, Restarting, TooManyWaiting, close_code, describe
from streaming_bots.generation.reply import ReplyState
from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.generation.streamer import ReplyStreamer
from streaming_bots.http.middleware import CLIENT_LEFT
from streaming_bots.models.prompt import Message

MAX_PROMPTS_AHEAD = 100  # that one client may send before it gets the replies
MAX_CHARACTERS_AHEAD = 1_000_000  # in all of these; the next prompt closes the chat
MAX_MESSAGES_PER_SECOND = 200  # from one client
BYTES_OF_MESSAGE, MAX_WEIGHT = 20_000, 90  # a longer one counts as several
MAX_REASON_BYTES = 123  # of a WebSocket close frame (RFC 6455, 5.5)

logger = logging.getLogger("ray.serve")


@dataclass(eq=False)
class Prompt:
    """A prompt from a client, or the error in its message."""

    text: str
    options: ReplyOptions
    error: Exception | None = None
    reply: Reply | None = None  # once it has started
    stopped: bool = False


class ChatConnection:
    """Pass it every message with `take`, iterate over it for prompts, and `answer` each of them."""

    def __init__(
        self, ws: WebSocket, bot: Bot, options: ReplyOptions, end_of_response: str
    ) -> None:
        kind = JsonProtocol if CHAT_V1 in ws.scope["subprotocols"] else PlainProtocol
        self.protocol = kind(bot, options, end_of_response)
        self.ws = ws
        self.bot = bot
        self.options = options
        self.prompts: asyncio.Queue[Prompt | None] = asyncio.Queue()  # None: answer no more
        self.unanswered: list[Prompt] = []
        self.conversation = bot.system_messages()  # the part that the model sees
        self.spoken = 0  # prompts and replies so far
        self.second, self.received = time.monotonic(), 0  # a second, and the messages in it

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Ignore a disconnect in the `with` block. On any other error, close the socket."""
        drain = asyncio.create_task(self._end_when_draining())
        try:
            yield
        except* (WebSocketDisconnect, *CLIENT_LEFT):
            pass
        except* Exception as errors:
            error = errors.exceptions[0]
            if isinstance(error, Refusal):
                self.bot.metrics.count("refused")
            else:
                logger.exception("A chat failed")
            await self.close(error)
        finally:
            drain.cancel()
            for _ in self.unanswered:
                self.bot.metrics.count("cancelled")

    async def refuse(self, reason: str) -> None:
        """Close with 1013 (try again later). Only an accepted WebSocket can get a close code."""
        self.bot.metrics.count("refused")
        await self.close(TooManyWaiting(reason))

    async def close(self, error: Exception) -> None:
        """If the socket is open, close it with the error's code and as much of its text as fits."""
        if self.ws.application_state is WebSocketState.CONNECTED:
            reason = describe(error).encode()[:MAX_REASON_BYTES].decode(errors="ignore")
            await self.ws.close(close_code(error), reason)

    async def take(self, message: ASGIMessage) -> None:
        """Queue a prompt, or obey any other message at once. Raises TooManyWaiting."""
        await asyncio.sleep(0)  # lets other clients run, even if this one keeps sending
        self._limit_rate(message)
        text, options, error = "", self.options, None
        try:
            request = self.protocol.read(message)
        except Refusal as refusal:
            error = refusal.with_traceback(None)  # its frames, and its context's, hold the message
            error.__context__ = None
        else:
            if request == "ping":
                await self.send("pong")
                return
            if request == "stop":
                for earlier in self.unanswered:
                    earlier.stopped = True
                    if earlier.reply is not None:
                        self._cancel(earlier.reply)
                return
            text, options = request.prompt, request
        if len(self.unanswered) > MAX_PROMPTS_AHEAD:
            raise TooManyWaiting(f"more than {MAX_PROMPTS_AHEAD} prompts wait for a reply")
        ahead = sum(len(earlier.text) for earlier in self.unanswered)
        if ahead > MAX_CHARACTERS_AHEAD:
            raise TooManyWaiting(f"{ahead} characters wait for a reply")
        prompt = Prompt(text, options, error)
        self.unanswered.append(prompt)
        self.prompts.put_nowait(prompt)

    async def __aiter__(self) -> AsyncIterator[Prompt]:
        """Yield the client's prompts in order. Prompts that need no model are answered here."""
        while (prompt := await self.prompts.get()) is not None:
            if prompt.error is not None:
                await self._end(prompt, prompt.error)
            elif prompt.stopped or not prompt.text.strip():
                state = ReplyState(self.bot.tokenizer, (), prompt.options, self.bot.end_tokens)
                state.cancelled = prompt.stopped
                await self._end(prompt, state)
            else:
                yield prompt
        while self.unanswered:
            self.unanswered.pop()
            self.bot.metrics.count("refused")
        await self.close(Restarting("this replica ends; connect again for another"))
        raise WebSocketDisconnect(Restarting.close_code)

    @asynccontextmanager
    async def answer(self, prompt: Prompt) -> AsyncIterator[None]:
        """After the `with` block, send the end of its reply, or the error that it raised."""
        try:
            try:
                yield
            finally:
                if prompt.reply is not None:
                    self._cancel(prompt.reply)  # even if nobody has begun to read it
                    await prompt.reply.aclose()
        except WebSocketDisconnect:
            raise
        except Exception as error:
            await self._end(prompt, error)
        else:
            assert prompt.reply is not None
            await self._end(prompt, prompt.reply.state)

    async def wait_for_turn(self, prompt: Prompt) -> None:
        """Tell the client how many replies are ahead of `prompt.reply`, until it begins."""
        assert prompt.reply is not None
        if prompt.stopped:  # before there was a reply to cancel
            self._cancel(prompt.reply)
        async with aclosing(self.bot.engine.line(streamer_of(prompt.reply))) as line:
            async for ahead in line:
                await self.send("waiting", ahead=ahead)

    def remember(self, conversation: list[Message]) -> None:
        """Store the conversation, which ends with one new exchange."""
        self.conversation = conversation
        self.spoken += 2

    async def send_text(self, text: str) -> None:
        await self.send("text", text=text)

    async def send(self, kind: MessageKind, **fields: Any) -> None:
        """Tell the client something. `ChatProtocol.write` lists the kinds and their fields."""
        for message in self.protocol.write(kind, **fields):
            if self.ws.application_state is WebSocketState.CONNECTED:  # it may be closing
                await self.ws.send_text(message)

    def _limit_rate(self, message: ASGIMessage) -> None:
        """Raise TooManyWaiting for a flood, since Serve would buffer its messages and answers."""
        size = len(message.get("text") or message.get("bytes") or "")
        if (now := time.monotonic()) > self.second + 1:
            self.second, self.received = now, 0
        self.received += 1 + min(size // BYTES_OF_MESSAGE, MAX_WEIGHT)
        if self.received > MAX_MESSAGES_PER_SECOND:
            raise TooManyWaiting("too many messages in a second")

    def _cancel(self, reply: Reply) -> None:
        self.bot.engine.cancel(streamer_of(reply))

    async def _end(self, prompt: Prompt, end: ReplyState | Exception) -> None:
        """Send a reply's end or its error. In the plain protocol, an error closes the socket."""
        self.unanswered.remove(prompt)
        if isinstance(end, ReplyState):
            self.bot.metrics.count("cancelled" if end.cancelled else "finished")
            messages = len(self.conversation) - len(self.bot.system_messages())
            await self.send(
                "done",
                finish_reason=end.finish_reason,
                tokens=end.reply_tokens,
                seconds=round(time.monotonic() - end.options.asked, 3),
                messages=messages,
                dropped=self.spoken - messages,
            )
            return
        if isinstance(end, Refusal):
            self.bot.metrics.count("refused")
        else:
            self.bot.metrics.count("failed")
            logger.error("A reply failed", exc_info=end)
        if isinstance(self.protocol, PlainProtocol):
            await self.close(end)
            raise WebSocketDisconnect(close_code(end))
        await self.send("error", detail=describe(end))

    async def _end_when_draining(self) -> None:
        """When draining begins, end the connection once the prompts in the queue are answered."""
        await self.bot.drain.begun.wait()
        self.prompts.put_nowait(None)


def streamer_of(reply: Reply) -> ReplyStreamer:
    """Return a reply's streamer, in a bot where each reply has its own."""
    assert isinstance(reply.state, ReplyStreamer)
    return reply.state
