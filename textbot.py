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


@serve.deployment(**QUEUE_OPTIONS)  # Serve queues 100, and answers more with a 503
@serve.ingress(api)
class Textbot(Bot):
    """Streams one reply at a time as plain text; other requests wait their turn in a queue."""

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(BotSettings(model=model, **settings))
        # A single thread calls generate_text for one streamer after another, in the order of
        # `submit`. What generate_text raises is raised where its streamer is read, and the thread
        # takes the next one. If it hangs or dies, Bot.check_health makes Serve replace the replica.
        self.engine = ModelThread(self.model, self.generate_text, self.settings, self.metrics)

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply. If the model fails: a 500 before the first text, else a cut body."""
        messages = [*self.new_conversation(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)
        return await TextStream.start(reply)  # reads it at once; a disconnect closes it

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Queue a conversation for the model, and return its reply, to be read as it is written."""
        input_ids = await self.encode(messages, options)  # a 413 if it leaves no room for the reply
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.engine.submit(streamer)
        return Reply(streamer, self.consume_streamer(streamer))  # the streamer knows its end

    def generate_text(self, streamer: ReplyStreamer) -> None:
        """Run the model in the engine's thread. A sampler draws each token, masking the others."""
        prompt = torch.tensor([streamer.input_ids], device=self.model.device)
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=streamer.past_key_values,  # ModelThread keeps earlier prompts' keys
            max_new_tokens=streamer.options.max_new_tokens,  # an end token ends it sooner
            logits_processor=[SamplingLogitsProcessor([streamer.options.sampler(prompt.device)])],
            streamer=streamer,  # hands whole characters to the event loop: call_soon_threadsafe
            stopping_criteria=[streamer],  # true at a stop string, or after engine.cancel
        )

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives; if closed early, stop the model."""
        try:
            async for text in streamer:
                yield text  # a slow client does not slow the model: the streamer buffers
        finally:
            self.engine.cancel(streamer)  # stops or dequeues it; no effect after its end
            self.metrics.record_reply(streamer)


def build(settings: BotSettings) -> serve.Application:
    """With other settings: `serve run textbot:build model=./my-model max_new_tokens=64`."""
    return settings.bind(Textbot)


app = Textbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # if it is unreachable
