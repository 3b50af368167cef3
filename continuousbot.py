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
        # The ContinuousBatchingManager of transformers runs the model in its own thread. Between
        # steps of a token each, requests leave, and others join if max_batch_size and the KV cache
        # allow. A failed step fails all, and Bot.check_health makes Serve replace the replica.
        self.engine = ContinuousBatch(self.model, self.context, self.settings, self.metrics)
        self.limit_context(self.engine.context, self.engine.context_reason)  # by its KV cache

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply. If the model fails: a 500 before the first text, later a cut body."""
        messages = [*self.new_conversation(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)
        return await TextStream.start(reply)  # awaits its first text; a disconnect closes it

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Add a conversation to the batch, and return its reply, to be read as it is written."""
        input_ids = await self.encode(messages, options)  # a 413 if max_new_tokens would not fit
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.generate_text(streamer)
        return Reply(streamer, self.consume_streamer(streamer))  # the streamer knows why it ended

    def generate_text(self, streamer: ReplyStreamer) -> None:
        """Queue a request with the manager, and return at once.

        The manager ends it at an end token or the request's `max_new_tokens`. A logits processor
        draws each token, and masks all others. The streamer gets it on the event loop.
        """
        self.engine.submit(streamer)

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives; if closed early, take it off batch or queue."""
        try:
            async for text in streamer:
                yield text  # a slow client does not slow the model: the streamer buffers
        finally:
            self.engine.cancel(streamer)  # has no effect after its end
            self.metrics.record_reply(streamer)


def build(settings: ContinuousbotSettings) -> serve.Application:
    """With other settings: `serve run continuousbot:build model=./my-model max_batch_size=64`."""
    return settings.bind(Continuousbot)


app = Continuousbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # if the hub is down
