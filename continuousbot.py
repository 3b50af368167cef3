"""Prompts join a batch that already runs, beyond the tutorial: `serve run continuousbot:app`."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from serving.access import Access
from serving.arguments import DEFAULT_CONTINUOUS_BATCH_SIZE, ContinuousbotArguments
from serving.continuous import ContinuousBatch
from serving.encoding import PromptTooLong, begin, encode, prompt_limit, reply_limit
from serving.loading import batch_context, load_model
from serving.metrics import BotMetrics
from serving.openapi import PROMPT_ROUTE
from serving.prompts import ReplyOptions, TextRequest, read_request
from serving.responses import HTTP, TextStream
from serving.streaming import ReplyStreamer
from serving.watchdog import DEFAULT_STALL_TIMEOUT_S

logger = logging.getLogger("ray.serve")

fastapi_app = FastAPI(title="Continuousbot", **HTTP)


# Whoever waits for a place in the batch gets one as soon as a reply ends. Behind a hundred requests
# that is a minute or so; who would have to wait longer is better told so at once. Every request is
# queued in Serve's proxy for a moment, so that as many as a replica takes must fit there too.
@serve.deployment(
    max_ongoing_requests=100,
    max_queued_requests=100,
    backpressure_config=BackpressureConfig(retry_after_s=10),
)
@serve.ingress(fastapi_app)
class Continuousbot:
    """Writes many replies together; each begins and ends without waiting for the others."""

    def __init__(
        self,
        model: str,
        served_model_name: str | None = None,
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        dtype: str = "float32",
        system_prompt: str | None = None,
        access: Access | None = None,
        stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
        fallback: str | None = None,
        device: str = "cpu",
        max_batch_size: int = DEFAULT_CONTINUOUS_BATCH_SIZE,
        cache_tokens: int | None = None,
    ) -> None:
        name, self.model, self.tokenizer, context = load_model(model, dtype, fallback, device)
        self.model_name = served_model_name or name
        self.metrics = BotMetrics()
        self.batch = ContinuousBatch(
            self.model,
            batch_context(self.model, context),
            max_batch_size,
            cache_tokens,
            stall_timeout_s,
            self.metrics,
        )
        self.max_new_tokens = reply_limit(max_new_tokens, self.batch.context)
        self.max_prompt_tokens = prompt_limit(max_prompt_tokens, self.batch.context)
        self.system_prompt = system_prompt
        self.access = access or Access()
        self.api_key = self.access.read_api_key()
        logger.info(f"{self.model_name} is ready")

    @fastapi_app.post("/", **PROMPT_ROUTE)
    async def handle_request(
        self, request: Annotated[TextRequest, Depends(read_request)]
    ) -> TextStream:
        """Add the prompt to the batch; return its stream when the first text is there."""
        streamer = ReplyStreamer(self.tokenizer, request.stop)
        conversation = [*begin(self.system_prompt), {"role": "user", "content": request.prompt}]
        room = min(self.batch.context - request.max_new_tokens, self.max_prompt_tokens)
        try:
            input_ids = await asyncio.to_thread(encode, conversation, self.tokenizer, room)
        except PromptTooLong as error:
            if self.batch.context < self.batch.cache_tokens:
                raise
            raise PromptTooLong(f"{error}; the cache has {self.batch.cache_tokens}") from None
        self.generate_text(input_ids, request, streamer)
        return await TextStream.start(self.consume_streamer(streamer))

    def generate_text(
        self, input_ids: list[int], options: ReplyOptions, streamer: ReplyStreamer
    ) -> None:
        """Have the model write the reply together with those that it is writing."""
        self.batch.add(
            streamer,
            input_ids,
            max_new_tokens=options.max_new_tokens,
            sampler=options.sampler(self.model.device),
        )

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it comes; when the client leaves, free its place."""
        try:
            async for text in streamer:
                yield text
        finally:
            streamer.cancel()
            self.batch.remove(streamer)
            self.metrics.record_reply(streamer.asked, streamer.token_times)

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        self.batch.check()


def build(args: ContinuousbotArguments) -> Application:
    """`serve run continuousbot:build model=./my-model max_new_tokens=64`."""
    return Continuousbot.options(**args.deployment_options()).bind(**args.constructor_arguments())


app = Continuousbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")
