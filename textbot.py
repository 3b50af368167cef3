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

api = create_app("Textbot")  # also adds OpenAI's routes, which call the replica's start_reply


@serve.deployment(**QUEUE_OPTIONS)  # 100 requests in a replica, 100 in Serve's queue, then 503s
@serve.ingress(api)
class Textbot(Bot):
    """Writes one reply at a time, streamed as plain text; other prompts wait in a queue."""

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(BotSettings(model=model, **settings))  # loads the model and tokenizer
        # One thread calls generate_text for one streamer after another. If that raises, only this
        # streamer's `async for` raises. If the model makes no progress for stall_timeout_s, all
        # streamers raise, and so do `submit` and Bot.check_health: Serve replaces the replica.
        self.engine = ModelThread(self.model, self.generate_text, self.settings, self.metrics)

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply. If the model fails: a 500, or later a body without its last chunk."""
        messages = [*self.system_messages(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)  # a PromptRequest is a ReplyOptions
        return await TextStream.start(reply)  # reads up to the first text before it sends a status

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Apply the chat template, queue the prompt, and return the reply, to be read meanwhile."""
        input_ids = await self.encode(messages, options)  # in a thread; 413 if it does not fit
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.engine.submit(streamer)  # returns at once; the thread runs it in its turn
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
        """Yield the reply's text as it arrives. If that ends early, end the model's run, too."""
        try:
            async for text in streamer:
                yield text  # a slow client does not slow the model: the streamer buffers
        finally:  # always: on a disconnect, the wait is cancelled, or TextStream closes this
            self.engine.cancel(streamer)  # stops or dequeues a run that has not ended
            self.metrics.record_reply(streamer)  # counts its tokens, and how long each took


def build(settings: BotSettings) -> serve.Application:
    """With other settings: `serve run textbot:build model=./my-model max_new_tokens=64`."""
    return settings.bind(Textbot)  # Textbot.bind, with those that are set


app = Textbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # bundled, if offline
