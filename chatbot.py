"""A chat over a WebSocket, remembered while it is open. Run it with `serve run chatbot:app`."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import torch
from fastapi import WebSocket, WebSocketDisconnect
from ray import serve

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
add_chat_page(api)  # at GET /


@serve.deployment(**CHAT_OPTIONS)  # max_ongoing_requests is twice MAX_CHATS
@serve.ingress(api)
class Chatbot(Bot):
    """Keeps a conversation per connection, after any system prompt. All share the model.

    A text message is a prompt. Its reply arrives as text messages; a separate `<>` then ends it.
    With the subprotocol chat.v1, clients speak JSON: they set options, stop, and see their turn.
    """

    settings: ChatbotSettings

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(ChatbotSettings(model=model, **settings))  # loads the model and tokenizer
        self.free_places = asyncio.Semaphore(MAX_CHATS)  # Serve admits more, to be refused below
        # Either engine has one thread. If a reply or its batch fails, reading that reply raises.
        if self.settings.max_batch_size is None:  # the default: one reply at a time, in order
            self.engine = ModelThread(self.model, self.generate_text, self.settings, self.metrics)
        else:  # replies join and leave a batch between tokens; generate_text is not called
            self.engine = ContinuousBatch(self.model, self.context, self.settings, self.metrics)
            self.limit_context(self.engine.context, self.engine.context_reason)  # to its KV cache

    @api.websocket("/")
    async def handle_request(self, ws: WebSocket, options: ConnectionOptions) -> None:
        """Reply to prompts until the client leaves. `options`, of the URL's query, are defaults."""
        connection = ChatConnection(ws, self, options, self.settings.end_of_response)
        await ws.accept(subprotocol=connection.protocol.subprotocol)
        if self.free_places.locked():
            return await connection.refuse("too many chats are open")  # 1013, try again later
        # On a disconnect, `receive` raises WebSocketDisconnect, and the TaskGroup then cancels
        # `converse`, even in mid-reply. `open` ignores that. On an error, it closes the socket.
        async with self.free_places, connection.open(), asyncio.TaskGroup() as tasks:
            tasks.create_task(self.receive(ws, connection))
            await self.converse(connection)

    async def receive(self, ws: WebSocket, connection: ChatConnection) -> None:
        """Queue what the client sends, even during a reply, until it disconnects."""
        while True:
            message = await ws.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            await connection.take(message)  # queues a prompt; raises if 100 wait; stop cancels all

    async def converse(self, connection: ChatConnection) -> None:
        """Reply to one prompt after another; the model sees the conversation so far."""
        async for prompt in connection:  # in order; it answers bad and stopped ones itself
            messages = [*connection.conversation, {"role": "user", "content": prompt.text}]
            # On exit, `answer` calls engine.cancel, even for a reply that was never read. It sends
            # the end or the error, or closes a plain client's socket with the error's close code.
            async with connection.answer(prompt):
                prompt.reply = reply = await self.start_reply(messages, prompt.options)
                await connection.wait_for_turn(prompt)  # tells a chat.v1 client its place
                response = ""
                async for text in reply:  # a stop cancels prompt.reply: this ends or never begins
                    response += text
                    await connection.send_text(text)
                if response or not prompt.stopped:  # forget a prompt stopped before any text
                    connection.remember([*messages, {"role": "assistant", "content": response}])

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Apply the chat template, queue the prompt, and return the reply, to be read meanwhile."""
        input_ids = await self.encode(messages, options)  # deletes the oldest `messages`, or raises
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.engine.submit(streamer)  # TooManyWaiting if 100 wait in this replica
        return Reply(state=streamer, chunks=self.consume_streamer(streamer))  # state: how it ended

    def generate_text(self, streamer: ReplyStreamer) -> None:
        """Run the model. The logits processor samples by the reply's seed: the drawn token wins."""
        prompt = torch.tensor([streamer.input_ids], device=self.model.device)
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=streamer.past_key_values,  # KV cache of the prompt's known beginning
            max_new_tokens=streamer.options.max_new_tokens,  # fewer if an end token comes first
            logits_processor=[SamplingLogitsProcessor([streamer.options.sampler(prompt.device)])],
            streamer=streamer,  # passes whole characters and the end by loop.call_soon_threadsafe
            stopping_criteria=[streamer],  # ends it when cancelled, or at a stop string (not sent)
        )

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives, until it ends or is cancelled."""
        try:
            async for text in streamer:
                yield text  # a slow client does not slow the model: the streamer buffers
        finally:
            self.engine.cancel(streamer)  # stops or dequeues a reply that has not ended
            self.metrics.record_reply(streamer)  # counts its tokens, and how long each took


def build(settings: ChatbotSettings) -> serve.Application:
    """With other settings: `serve run chatbot:build model=./my-model max_batch_size=32`."""
    return settings.bind(Chatbot)  # Chatbot.bind, with those that are set


app = Chatbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # bundled, if offline
