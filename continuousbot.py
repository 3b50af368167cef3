"""Prompts join a batch that is already running. Run it with `serve run continuousbot:app`."""

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

api = create_app("Continuousbot")


@serve.deployment(**QUEUE_OPTIONS)
@serve.ingress(api)
class Continuousbot(Bot):
    """Writes up to `max_batch_size` replies together; each begins and ends while others run."""

    settings: ContinuousbotSettings

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(ContinuousbotSettings(model=model, **settings))
        # The ContinuousBatchingManager of transformers runs the model in its own thread. Each step
        # computes all requests of the batch; between steps, requests leave, or join if room is left
        # in it and in the KV cache. A failed step fails all streamers; Serve replaces the replica.
        self.engine = ContinuousBatch(self.model, self.context, self.settings, self.metrics)
        self.limit_context(self.engine.context, self.engine.context_reason)  # to the cache's size

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply. A failure before its first text is a 500; a later one cuts the body."""
        messages = [*self.new_conversation(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)
        return await TextStream.start(reply)  # closes it in the end, or when the client leaves

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Add a conversation to the batch, and return its reply, to be read as it is written."""
        input_ids = await self.encode(messages, options)  # in a worker thread; a 413 if too long
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.generate_text(streamer)
        return Reply(streamer, self.consume_streamer(streamer))  # the streamer knows how it ended

    def generate_text(self, streamer: ReplyStreamer) -> None:
        """Queue a request with the manager; a logits processor gives each row its own sampler.

        The manager calls back on the event loop with each token, for the streamer to decode, until
        it has seen an end token or the request's limit.
        """
        self.engine.submit(streamer)

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives; if closed early, leave the batch."""
        try:
            async for text in streamer:
                yield text  # the streamer buffers the rest of the reply for a slow client
        finally:
            self.engine.cancel(streamer)  # also dequeues it; does nothing after the end
            self.metrics.record_reply(streamer)


def build(settings: ContinuousbotSettings) -> serve.Application:
    """`serve run continuousbot:build model=./my-model max_batch_size=64`."""
    return settings.bind(Continuousbot)


app = Continuousbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # if offline
