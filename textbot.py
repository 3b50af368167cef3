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
        super().__init__(BotSettings(model=model, **settings))
        # One thread calls generate_text for one streamer after another. If generate_text raises,
        # the streamer's `async for` does, and the thread goes on. If it hangs, a watchdog makes
        # every such loop, `submit` and Bot.check_health raise, and Serve replaces the replica.
        self.engine = ModelThread(self.model, self.generate_text, self.settings, self.metrics)

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply. If the model fails: a 500, or after some text an incomplete body."""
        messages = [*self.system_messages(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)
        return await TextStream.start(reply)  # awaits text or the end at once; closes it at any end

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Queue a conversation for the model, and return its reply, to be read as it is written."""
        input_ids = await self.encode(messages, options)  # 413 if too long with max_new_tokens
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.engine.submit(streamer)
        return Reply(streamer, self.consume_streamer(streamer))  # /v1 reads streamer.finish_reason

    def generate_text(self, streamer: ReplyStreamer) -> None:
        """Run the model in its thread. The logits processor draws a token, and masks all others."""
        prompt = torch.tensor([streamer.input_ids], device=self.model.device)
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=streamer.past_key_values,  # ModelThread's KV cache of a known beginning
            max_new_tokens=streamer.options.max_new_tokens,  # less if an end token comes earlier
            logits_processor=[SamplingLogitsProcessor([streamer.options.sampler(prompt.device)])],
            streamer=streamer,  # hands whole characters to the event loop: call_soon_threadsafe
            stopping_criteria=[streamer],  # ends the run at a stop string, or when cancelled
        )

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives. If that ends early, end the model's run, too."""
        try:
            async for text in streamer:
                yield text  # a slow client does not slow the model: the streamer buffers
        finally:  # at any end. On a disconnect, the wait is cancelled, or TextStream closes this
            self.engine.cancel(streamer)  # stops or dequeues a run that has not ended
            self.metrics.record_reply(streamer)


def build(settings: BotSettings) -> serve.Application:
    """With other settings: `serve run textbot:build model=./my-model max_new_tokens=64`."""
    return settings.bind(Textbot)


app = Textbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # fallback if offline
