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
        super().__init__(ContinuousbotSettings(model=model, **settings))  # loads the model
        # This starts the thread of transformers' ContinuousBatchingManager. In each step, it writes
        # one token of each running reply, drawn with the reply's own seed. Between steps, replies
        # leave at an end token, at max_new_tokens or if cancelled, and its scheduler adds others,
        # up to max_batch_size. If the KV cache is full, a begun reply may leave it. Later, what it
        # had is computed again: its client sees a pause. The thread hands tokens to this event loop
        # (call_soon_threadsafe), which decodes them. A stop string ends the reply there, and the
        # engine cancels it at once. If a step fails or hangs, each `async for` raises, and so do
        # `submit` and Bot.check_health, until Serve has replaced the replica.
        self.engine = ContinuousBatch(self.model, self.context, self.settings, self.metrics)
        self.limit_context(self.engine.context, self.engine.context_reason)  # to its KV cache

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply. If the model fails: a 500, or later a body without its last chunk."""
        messages = [*self.system_messages(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)  # a PromptRequest is a ReplyOptions
        return await TextStream.start(reply)  # reads up to the first text before it sends a status

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Apply the chat template, add the prompt to the batch, and return its reply to be read."""
        input_ids = await self.encode(messages, options)  # in a thread; 413 if it does not fit
        # The manager ends a reply at the model's end tokens, and the streamer tells why it ended.
        streamer = ReplyStreamer(self.tokenizer, input_ids, options, self.end_tokens)
        self.engine.submit(streamer)  # queues it with the manager, and returns at once
        return Reply(state=streamer, chunks=self.consume_streamer(streamer))  # state: how it ended

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives. If reading ends first, free the reply's place."""
        try:
            async for text in streamer:
                yield text  # a slow client does not slow the model: the streamer buffers
        finally:  # always: on a disconnect, the wait is cancelled, or TextStream closes this
            self.engine.cancel(streamer)  # if it has not ended, it leaves before the next step
            self.metrics.record_reply(streamer)  # counts its tokens, and how long each took


def build(settings: ContinuousbotSettings) -> serve.Application:
    """With other settings: `serve run continuousbot:build model=./my-model max_batch_size=64`."""
    return settings.bind(Continuousbot)  # Continuousbot.bind, with those that are set


app = Continuousbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # bundled, if offline
