"""Streams from a batch that prompts join at any time. Run it with `serve run continuousbot:app`."""

from collections.abc import AsyncGenerator
from typing import Any

from ray import serve

from streaming_bots.bot import Bot, Reply
from streaming_bots.generation.continuous_batch import ContinuousBatch
from streaming_bots.generation.sampling import ReplyOptions
from streaming_bots.generation.streamer import ReplyStreamer
from streaming_bots.http.app import create_app
from streaming_bots.http.prompt_route import PROMPT_ROUTE, PromptRequest
from streaming_bots.http.response import TextStream
from streaming_bots.settings import QUEUE_OPTIONS, ContinuousbotSettings

api = create_app("Continuousbot")  # also adds OpenAI's routes, which call the replica's start_reply


@serve.deployment(**QUEUE_OPTIONS)  # 100 requests in a replica, 100 in Serve's queue, then 503s
@serve.ingress(api)
class Continuousbot(Bot):
    """Writes up to `max_batch_size` replies together; each begins and ends while others run."""

    settings: ContinuousbotSettings

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(ContinuousbotSettings(model=model, **settings))
        # The thread of transformers' ContinuousBatchingManager writes a token per reply and step,
        # drawn by the reply's own sampler, up to an end token or max_new_tokens. Between steps,
        # ended replies leave, and queued ones join up to max_batch_size. If the KV cache is full,
        # even begun ones may wait. Each token goes to the event loop (call_soon_threadsafe). There,
        # the reply's streamer decodes it. The last token or a stop string ends its `async for`; at
        # a stop string, the engine also cancels the reply at the manager. If a step fails, each
        # `async for` raises, and so do `submit` and Bot.check_health, until Serve has replaced the
        # replica.
        self.engine = ContinuousBatch(self.model, self.context, self.settings, self.metrics)
        self.limit_context(self.engine.context, self.engine.context_reason)  # to its KV cache

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply. If the model fails: a 500, or after some text an incomplete body."""
        messages = [*self.system_messages(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)
        return await TextStream.start(reply)  # awaits text or the end at once; closes it at any end

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Add a conversation to the batch, and return its reply, to be read as it is written."""
        input_ids = await self.encode(messages, options)  # 413 if too long with max_new_tokens
        # It carries the ids and options to the engine; its end tokens only tell a finish_reason.
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.engine.submit(streamer)  # queues it with the manager, and returns at once
        return Reply(streamer, self.consume_streamer(streamer))  # /v1 reads streamer.finish_reason

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives. If reading ends first, free the reply's place."""
        try:
            async for text in streamer:
                yield text  # a slow client does not slow the model: the streamer buffers
        finally:  # at any end. On a disconnect, the wait is cancelled, or TextStream closes this
            self.engine.cancel(streamer)  # the manager drops it, if it has not ended there
            self.metrics.record_reply(streamer)


def build(settings: ContinuousbotSettings) -> serve.Application:
    """With other settings: `serve run continuousbot:build model=./my-model max_batch_size=64`."""
    return settings.bind(Continuousbot)


app = Continuousbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # fallback if offline
