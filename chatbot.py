"""A conversation over a WebSocket, remembered while it is open: `serve run chatbot:app`."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import torch
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from ray import serve
from ray.serve import Application

from serving.arguments import ChatbotArguments
from serving.encoding import PromptTooLong, begin, encode, reply_limit
from serving.loading import load_model
from serving.responses import EXCEPTION_HANDLERS, MIDDLEWARE
from serving.streaming import ReplyStreamer, errors_to

MAX_PROMPTS_AHEAD = 100  # that one client may send before it has the replies

logger = logging.getLogger("ray.serve")

fastapi_app = FastAPI(title="Chatbot", middleware=MIDDLEWARE, exception_handlers=EXCEPTION_HANDLERS)


class BinaryFrame(Exception):
    """A prompt is text."""


# An open socket counts as one request, also while nobody speaks.
@serve.deployment(max_ongoing_requests=200)
@serve.ingress(fastapi_app)
class Chatbot:
    """Keeps one conversation per connection; replies to one prompt at a time, others wait."""

    def __init__(
        self,
        model: str,
        max_new_tokens: int | None = None,
        dtype: str = "float32",
        system_prompt: str | None = None,
        end_of_response: str = "<>",
        fallback: str | None = None,
    ) -> None:
        self.model_name, self.model, self.tokenizer, context = load_model(model, dtype, fallback)
        self.max_new_tokens = reply_limit(max_new_tokens, context)
        self.room = context - self.max_new_tokens  # for a conversation
        self.system_prompt = system_prompt
        self.end_of_response = end_of_response
        # One thread: a second one would bring its own OpenMP team and fight for the same cores.
        self.model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        logger.info(f"{self.model_name} is ready")

    @fastapi_app.websocket("/")
    async def handle_request(self, ws: WebSocket) -> None:
        """Receive prompts and stream replies, a marker after each, until the client leaves."""
        await ws.accept()
        prompts: asyncio.Queue[str] = asyncio.Queue(maxsize=MAX_PROMPTS_AHEAD)
        conversation = begin(self.system_prompt)
        try:
            async with asyncio.TaskGroup() as tasks:
                # Reading on during a reply is how a client that leaves is noticed at once: the
                # WebSocketDisconnect that it raises cancels the reply.
                tasks.create_task(self.receive_prompts(ws, prompts))
                while True:
                    prompt = await prompts.get()
                    if prompt.strip():
                        conversation.append({"role": "user", "content": prompt})
                        input_ids = await asyncio.to_thread(
                            encode, conversation, self.tokenizer, self.room
                        )
                        streamer = ReplyStreamer(self.tokenizer)
                        self.model_thread.submit(self.generate_text, input_ids, streamer)
                        response = ""
                        async with aclosing(self.consume_streamer(streamer)) as chunks:
                            async for text in chunks:
                                response += text
                                await self.send_text(ws, text)
                        conversation.append({"role": "assistant", "content": response})
                    await ws.send_text(self.end_of_response)
        except* WebSocketDisconnect:
            pass
        except* asyncio.QueueFull:
            await ws.close(1013, f"more than {MAX_PROMPTS_AHEAD} prompts wait for a reply")
        except* BinaryFrame:
            await ws.close(1003, "a prompt is a text frame, not a binary one")
        except* PromptTooLong as errors:
            await ws.close(1009, str(errors.exceptions[0]))
        except* Exception as errors:
            logger.exception("A reply failed")
            await ws.close(1011, f"the reply failed: {type(errors.exceptions[0]).__name__}")

    async def receive_prompts(self, ws: WebSocket, prompts: asyncio.Queue[str]) -> None:
        """Queue the client's prompts, in order, until it leaves."""
        while True:
            message = await ws.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            if message.get("text") is None:
                raise BinaryFrame
            prompts.put_nowait(message["text"])

    async def send_text(self, ws: WebSocket, text: str) -> None:
        """Send a piece of the reply; one that looks like the marker goes in two frames."""
        if text == self.end_of_response:
            await ws.send_text(text[:1])
            text = text[1:]
        await ws.send_text(text)

    def generate_text(self, input_ids: list[int], streamer: ReplyStreamer) -> None:
        """Run the model, in its thread: each token goes to the streamer as it is generated."""
        if streamer.cancelled:  # the client left while it waited
            return
        with errors_to(streamer):
            self.model.generate(
                torch.tensor([input_ids], device=self.model.device),
                attention_mask=torch.ones(1, len(input_ids), device=self.model.device),
                max_new_tokens=self.max_new_tokens,
                streamer=streamer,
                stopping_criteria=[streamer],
            )

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it comes; when the client leaves, stop the model."""
        try:
            async for text in streamer:
                yield text
        finally:
            streamer.cancel()


def build(args: ChatbotArguments) -> Application:
    """`serve run chatbot:build model=./my-model end_of_response=END`."""
    return Chatbot.options(**args.deployment_options()).bind(**args.constructor_arguments())


app = Chatbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")
