"""Streams a reply over HTTP while the model writes it. Run it with `serve run textbot:app`."""

from collections.abc import AsyncGenerator
from typing import Any

import torch
from ray import serve

from streaming_bots.bot import Bot, Reply
from streaming_bots.generation.model_thread import ModelThread
from streaming_bots.generation.sampling import ReplyOptions, SamplingLogitsProcessor
from streaming_bots.generation.streamer import ReplyStreamer
from streaming_bots.http.app import create_app
from streaming_bots.http.prompt_route import PROMPT_ROUTE, PromptRequest
from streaming_bots.http.response import TextStream
from streaming_bots.settings import QUEUE_OPTIONS, BotSettings

api = create_app("Textbot")


@serve.deployment(**QUEUE_OPTIONS)  # 100 requests in a replica, 100 in Serve's queue, then 503s
@serve.ingress(api)
class Textbot(Bot):
    """Streams one reply at a time as plain text; other requests wait in the engine's queue."""

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(BotSettings(model=model, **settings))
        # A single thread calls generate_text for one streamer after another, in the order of
        # `submit`. Who reads a streamer gets what its run raises. If the thread hangs or dies, all
        # readers get that as an error, and Bot.check_health makes Serve replace the replica.
        self.engine = ModelThread(self.model, self.generate_text, self.settings, self.metrics)

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply. If the model fails: a 500 before the first text, later a cut body."""
        messages = [*self.new_conversation(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)
        return await TextStream.start(reply)  # awaits its first text; a disconnect closes it

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Queue a conversation for the model, and return its reply, to be read as it is written."""
        input_ids = await self.encode(messages, options)  # a 413 if max_new_tokens would not fit
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.engine.submit(streamer)
        return Reply(streamer, self.consume_streamer(streamer))  # the streamer knows why it ended

    def generate_text(self, streamer: ReplyStreamer) -> None:
        """Run the model in the engine's thread. A sampler draws a token, and masks all others."""
        prompt = torch.tensor([streamer.input_ids], device=self.model.device)
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=streamer.past_key_values,  # from ModelThread: what it has read before
            max_new_tokens=streamer.options.max_new_tokens,  # or an end token of the model's config
            logits_processor=[SamplingLogitsProcessor([streamer.options.sampler(prompt.device)])],
            streamer=streamer,  # hands whole characters to the event loop: call_soon_threadsafe
            stopping_criteria=[streamer],  # true at a stop string (not sent) or engine.cancel
        )

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives; if closed early, stop or dequeue its run."""
        try:
            async for text in streamer:
                yield text  # a slow client does not slow the model: the streamer buffers
        finally:
            self.engine.cancel(streamer)  # has no effect after its end
            self.metrics.record_reply(streamer)


def build(settings: BotSettings) -> serve.Application:
    """With other settings: `serve run textbot:build model=./my-model max_new_tokens=64`."""
    return settings.bind(Textbot)


app = Textbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # if the hub is down
