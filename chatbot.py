"""A conversation over a WebSocket, remembered while it is open: `serve run chatbot:app`."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated

import torch
from fastapi import Depends, FastAPI, WebSocket
from ray import serve
from ray.serve import Application

from serving.access import Access
from serving.arguments import ChatbotArguments
from serving.chat import Chat
from serving.encoding import begin, encode, prompt_limit, reply_limit
from serving.loading import load_model
from serving.metrics import BotMetrics
from serving.model_thread import ModelThread, watch_layers
from serving.page import ChatPage
from serving.prompts import ReplyOptions, read_options
from serving.responses import HTTP
from serving.sampling import SampleRows
from serving.scaling import HEALTH_CHECK_PERIOD_S, LONGEST_REPLY_S, Drain
from serving.streaming import ReplyStreamer
from serving.watchdog import DEFAULT_STALL_TIMEOUT_S
from serving.wire import Limits, choose_wire

MAX_CHATS = 500  # open at once; an idle one costs some memory
MAX_WAITING = 100  # prompts in line for the model; a hundred replies take minutes

logger = logging.getLogger("ray.serve")

fastapi_app = FastAPI(title="Chatbot", **HTTP)


# An open socket counts as one request, also while nobody speaks. Over Serve's limit a handshake
# would hang, and over a limit of its queue fail with a 500, so the Chatbot counts for itself and
# says 1013, try again later; Serve's limit leaves room for those that are being told. A replica
# that Serve stops needs time to finish what it was asked and to close its sockets.
@serve.deployment(
    max_ongoing_requests=2 * MAX_CHATS,
    health_check_period_s=HEALTH_CHECK_PERIOD_S,
    graceful_shutdown_timeout_s=LONGEST_REPLY_S,
)
@serve.ingress(fastapi_app)
class Chatbot:
    """Keeps one conversation per connection; replies to one prompt at a time, others wait."""

    def __init__(
        self,
        model: str,
        served_model_name: str | None = None,
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        dtype: str = "float32",
        system_prompt: str | None = None,
        end_of_response: str = "<>",
        access: Access | None = None,
        stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
        fallback: str | None = None,
        device: str = "cpu",
    ) -> None:
        name, self.model, self.tokenizer, context = load_model(model, dtype, fallback, device)
        self.model_name = served_model_name or name
        self.max_new_tokens = reply_limit(max_new_tokens, context)
        room = min(context - self.max_new_tokens, prompt_limit(max_prompt_tokens, context))
        self.limits = Limits(room, self.max_new_tokens)
        self.system_prompt = system_prompt
        self.end_of_response = end_of_response
        self.access = access or Access()
        self.api_key = self.access.read_api_key()
        self.free_places = MAX_CHATS
        self.drain = Drain()
        self.metrics = BotMetrics()
        self.model_thread = ModelThread(stall_timeout_s, MAX_WAITING, self.metrics.waiting.set)
        watch_layers(self.model, self.model_thread.watchdog.note_progress)
        logger.info(f"{self.model_name} is ready")

    @fastapi_app.api_route(
        "/",
        methods=["GET", "HEAD"],
        dependencies=[Depends(read_options)],
        include_in_schema=False,
    )
    async def show_page(self) -> ChatPage:
        """A page to chat on, for browsers; it speaks chat.v1 over the WebSocket below."""
        return ChatPage()

    @fastapi_app.websocket("/")
    async def handle_request(
        self, ws: WebSocket, options: Annotated[ReplyOptions, Depends(read_options)]
    ) -> None:
        """Receive prompts and stream replies, until the client leaves."""
        ends = self.model.generation_config.eos_token_id or []
        wire = choose_wire(ws, self.limits, options, self.end_of_response, ends)
        new_streamer = partial(ReplyStreamer, self.tokenizer)
        chat = Chat(wire, new_streamer, self.model_thread.cancel, self.metrics, self.drain.begun)
        if not self.free_places:
            await chat.refuse("too many chats are open")
            return
        self.free_places -= 1
        try:
            async with chat.open():
                await self.converse(chat)
        finally:
            self.free_places += 1

    async def converse(self, chat: Chat) -> None:
        """Answer one prompt after the other; each reply sees all turns before it."""
        conversation = begin(self.system_prompt)
        async for prompt in chat:
            async with chat.answer(prompt):
                turns = [*conversation, {"role": "user", "content": prompt.request.prompt}]
                input_ids = await asyncio.to_thread(encode, turns, self.tokenizer, self.limits.room)
                self.model_thread.submit(
                    prompt.streamer, self.generate_text, input_ids, prompt.request
                )
                async with aclosing(self.model_thread.line(prompt.streamer)) as line:
                    async for ahead in line:
                        await chat.wire.send_waiting(ahead)
                response = ""
                async with aclosing(self.consume_streamer(prompt.streamer)) as chunks:
                    async for text in chunks:
                        response += text
                        await chat.wire.send_text(text)
                if response or not prompt.streamer.cancelled:  # else it never began
                    conversation = [*turns, {"role": "assistant", "content": response}]
                    chat.remember(len(conversation) - len(begin(self.system_prompt)))

    def generate_text(
        self, input_ids: list[int], options: ReplyOptions, streamer: ReplyStreamer
    ) -> None:
        """Run the model, in its thread: each token goes to the streamer as it is generated."""
        self.model.generate(
            torch.tensor([input_ids], device=self.model.device),
            attention_mask=torch.ones(1, len(input_ids), device=self.model.device),
            max_new_tokens=options.max_new_tokens,
            logits_processor=[SampleRows([options.sampler(self.model.device)])],
            streamer=streamer,
            stopping_criteria=[streamer],
        )

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it comes; when the client leaves, stop the model."""
        try:
            async for text in streamer:
                yield text
        finally:
            self.model_thread.cancel(streamer)
            self.metrics.record_reply(streamer.asked, streamer.token_times)

    def record_autoscaling_stats(self) -> dict[str, int]:
        """Called by Serve: what an autoscaling policy may count."""
        return {"replies": self.model_thread.in_progress()}

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        self.drain.health_was_asked()
        self.model_thread.check()


def build(args: ChatbotArguments) -> Application:
    """`serve run chatbot:build model=./my-model end_of_response=END`."""
    return Chatbot.options(**args.deployment_options()).bind(**args.constructor_arguments())


app = Chatbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")
