"""A conversation over a WebSocket, kept while it is open. Run it with `serve run chatbot:app`."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import torch
from fastapi import WebSocket, WebSocketDisconnect
from ray import serve
from ray.serve import Application

from streaming_bots.bot import Bot, Reply
from streaming_bots.chat.connection import ChatConnection
from streaming_bots.chat.page import add_chat_page
from streaming_bots.generation.continuous_batch import ContinuousBatch
from streaming_bots.generation.model_thread import ModelThread
from streaming_bots.generation.sampling import ReplyOptions, SamplingLogitsProcessor
from streaming_bots.generation.streamer import ReplyStreamer
from streaming_bots.http.app import create_app
from streaming_bots.http.request import ConnectionOptions
from streaming_bots.settings import CHAT_OPTIONS, MAX_CHATS, ChatbotSettings

api = create_app("Chatbot")
add_chat_page(api)  # for browsers, at GET /


@serve.deployment(**CHAT_OPTIONS)
@serve.ingress(api)
class Chatbot(Bot):
    """Keeps one conversation per connection; replies to one prompt at a time, others wait.

    With `max_batch_size`, it replies to the prompts of up to that many connections at once.
    """

    settings: ChatbotSettings

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(ChatbotSettings(model=model, **settings))
        self.places = asyncio.Semaphore(MAX_CHATS)
        if self.settings.max_batch_size is None:
            self.engine = ModelThread(self.model, self.generate_text, self.settings, self.metrics)
        else:
            self.engine = ContinuousBatch(self.model, self.context, self.settings, self.metrics)
            self.limit_context(self.engine.context, self.engine.context_reason)

    @api.websocket("/")
    async def handle_request(self, ws: WebSocket, options: ConnectionOptions) -> None:
        """Accept a client, and reply to its prompts until it disconnects."""
        connection = ChatConnection(ws, self, options, self.settings.end_of_response)
        await ws.accept(subprotocol=connection.protocol.subprotocol)
        if self.places.locked():
            await connection.refuse("too many chats are open")
            return
        # On a disconnect, `receive` raises WebSocketDisconnect. The TaskGroup then cancels
        # `converse`, even in mid-reply. `open` takes the errors, and closes an open socket.
        async with self.places, connection.open(), asyncio.TaskGroup() as tasks:
            tasks.create_task(self.receive(ws, connection))
            await self.converse(connection)

    async def receive(self, ws: WebSocket, connection: ChatConnection) -> None:
        """Queue the client's prompts, and stop replies if it says so, until it disconnects."""
        while True:
            message = await ws.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            await connection.take(message)

    async def converse(self, connection: ChatConnection) -> None:
        """Reply to one prompt after another; the model sees the conversation before each."""
        async for prompt in connection:
            messages = [*connection.conversation, {"role": "user", "content": prompt.text}]
            async with connection.answer(prompt):  # closes the reply; sends its end, or the error
                reply = await self.start_reply(messages, prompt.options)
                await connection.wait_for_turn(prompt, reply)  # tells how many are ahead
                response = ""
                async for text in reply:
                    response += text
                    await connection.send_text(text)
                if response or not prompt.stopped:  # a reply that never began is not kept
                    connection.remember([*messages, {"role": "assistant", "content": response}])

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Queue a conversation for the model, and return its reply, to be read as it is written.

        If `messages` do not fit the model, `encode` drops the oldest from the list.
        """
        input_ids = await self.encode(messages, options)
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.engine.submit(streamer, input_ids, options)
        return Reply(streamer, self.consume_streamer(streamer))

    def generate_text(
        self, input_ids: list[int], options: ReplyOptions, streamer: ReplyStreamer
    ) -> None:
        """Run the model, in the engine's thread, which also hands the streamer every token."""
        self.model.generate(
            torch.tensor([input_ids], device=self.model.device),
            attention_mask=torch.ones(1, len(input_ids), device=self.model.device),
            max_new_tokens=options.max_new_tokens,
            logits_processor=[SamplingLogitsProcessor([options.sampler(self.model.device)])],
            streamer=streamer,  # takes tokens, wakes the event loop for every whole character
            stopping_criteria=[streamer],  # asked after each token: true after engine.cancel
        )

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives; if it is closed before its end, stop the model."""
        try:
            async for text in streamer:
                yield text
        finally:
            self.engine.cancel(streamer)  # does nothing after the end
            self.metrics.record_reply(streamer.asked, streamer.token_times)


def build(settings: ChatbotSettings) -> Application:
    """`serve run chatbot:build model=./my-model max_batch_size=32`."""
    return settings.bind(Chatbot)


app = Chatbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # bundled, for no hub
