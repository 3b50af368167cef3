"""A prompt in, its reply streamed out while the model writes it: `serve run textbot:app`."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Annotated

import torch
from fastapi import Depends, FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from serving.access import Access
from serving.arguments import BotArguments
from serving.encoding import begin, encode, prompt_limit, reply_limit
from serving.loading import load_model
from serving.metrics import BotMetrics
from serving.model_thread import ModelThread, watch_layers
from serving.openapi import PROMPT_ROUTE
from serving.prompts import ReplyOptions, TextRequest, read_request
from serving.responses import HTTP, TextStream
from serving.sampling import SampleRows
from serving.streaming import ReplyStreamer
from serving.watchdog import DEFAULT_STALL_TIMEOUT_S

logger = logging.getLogger("ray.serve")

fastapi_app = FastAPI(title="Textbot", **HTTP)


# One request generates at a time. The others wait, which costs next to nothing, but a hundred
# replies take minutes: who would have to wait longer is better told so at once. Every request is
# queued in Serve's proxy for a moment, so that as many as a replica takes must fit there too.
@serve.deployment(
    max_ongoing_requests=100,
    max_queued_requests=100,
    backpressure_config=BackpressureConfig(retry_after_s=10),
)
@serve.ingress(fastapi_app)
class Textbot:
    """Streams one reply at a time; other requests wait in order."""

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
    ) -> None:
        name, self.model, self.tokenizer, self.context = load_model(model, dtype, fallback, device)
        self.model_name = served_model_name or name
        self.max_new_tokens = reply_limit(max_new_tokens, self.context)
        self.max_prompt_tokens = prompt_limit(max_prompt_tokens, self.context)
        self.system_prompt = system_prompt
        self.access = access or Access()
        self.api_key = self.access.read_api_key()
        self.metrics = BotMetrics()
        self.model_thread = ModelThread(stall_timeout_s, report_waiting=self.metrics.waiting.set)
        watch_layers(self.model, self.model_thread.watchdog.note_progress)
        logger.info(f"{self.model_name} is ready")

    @fastapi_app.post("/", **PROMPT_ROUTE)
    async def handle_request(
        self, request: Annotated[TextRequest, Depends(read_request)]
    ) -> TextStream:
        """Start the reply in the model's thread; return its stream when the first text is there."""
        streamer = ReplyStreamer(self.tokenizer, request.stop)
        conversation = [*begin(self.system_prompt), {"role": "user", "content": request.prompt}]
        room = min(self.context - request.max_new_tokens, self.max_prompt_tokens)
        input_ids = await asyncio.to_thread(encode, conversation, self.tokenizer, room)
        self.model_thread.submit(streamer, self.generate_text, input_ids, request)
        return await TextStream.start(self.consume_streamer(streamer))

    def generate_text(
        self, input_ids: list[int], options: ReplyOptions, streamer: ReplyStreamer
    ) -> None:
        """Run the model, in its thread: each token goes to the streamer as it is generated."""
        self.model.generate(
            torch.tensor([input_ids], device=self.model.device),
            attention_mask=torch.ones(1, len(input_ids), device=self.model.device),
            max_new_tokens=options.max_new_tokens,
            logits_processor=[SampleRows([options.sampler(self.model.device)])],
            streamer=streamer,
            stopping_criteria=[streamer],
        )

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        """Yield the reply's text as it comes; when the client leaves, stop the model."""
        try:
            async for text in streamer:
                yield text
        finally:
            self.model_thread.cancel(streamer)
            self.metrics.record_reply(streamer.asked, streamer.token_times)

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        self.model_thread.check()


def build(args: BotArguments) -> Application:
    """`serve run textbot:build model=./my-model max_new_tokens=64`."""
    return Textbot.options(**args.deployment_options()).bind(**args.constructor_arguments())


app = Textbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")
