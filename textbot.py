"""Streams a reply over HTTP while the model writes it. Run it with `serve run textbot:app`."""

from collections.abc import AsyncGenerator
from typing import Any

import torch
from ray import serve
from ray.serve import Application

from streaming_bots.bot import Bot, Reply
from streaming_bots.generation.model_thread import ModelThread
from streaming_bots.generation.sampling import ReplyOptions, SamplingLogitsProcessor
from streaming_bots.generation.streamer import ReplyStreamer
from streaming_bots.http.app import create_app
from streaming_bots.http.prompt_route import PROMPT_ROUTE, PromptRequest
from streaming_bots.http.response import TextStream
from streaming_bots.settings import QUEUE_OPTIONS, BotSettings

api = create_app("Textbot")


@serve.deployment(**QUEUE_OPTIONS)
@serve.ingress(api)
class Textbot(Bot):
    """Streams one reply at a time as plain text; other requests wait their turn in a queue."""

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(BotSettings(model=model, **settings))
        # A single thread calls generate_text for one request after another. What fails there, the
        # streamer raises where it is read. If the thread hangs or dies, Serve replaces the replica.
        self.engine = ModelThread(self.model, self.generate_text, self.settings, self.metrics)

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply once its first text is there: until then, a failure is a 500."""
        messages = [*self.new_conversation(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)
        return await TextStream.start(reply)  # waits for its first text; closes it in the end

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Queue a conversation for the model, and return its reply, to be read as it is written."""
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


def build(settings: BotSettings) -> Application:
    """`serve run textbot:build model=./my-model max_new_tokens=64`."""
    return settings.bind(Textbot)


app = Textbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # bundled, for no hub
