"""Several prompts in one run of the model, each reply to its caller: `serve run batchbot:app`."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from fastapi import Depends, FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from serving.access import Access
from serving.arguments import BatchbotArguments, BatchSettings
from serving.encoding import begin, encode, reply_limit
from serving.loading import load_model
from serving.metrics import BotMetrics, Population
from serving.model_thread import DEFAULT_STALL_TIMEOUT_S, ModelThread
from serving.openapi import PROMPT_ROUTE
from serving.prompts import TextRequest, read_request
from serving.responses import HTTP, TextStream
from serving.streaming import TokenDecoder

logger = logging.getLogger("ray.serve")

fastapi_app = FastAPI(title="Batchbot", **HTTP)

# Of one row: text, "" if there is none yet, an error that concerns it alone, or its end.
Item = str | Exception | type[StopIteration]


@dataclass(eq=False)
class Row:
    """One prompt of a batch and the state of its reply."""

    input_ids: list[int]
    max_new_tokens: int
    decoder: TokenDecoder
    asked: float = field(default_factory=time.monotonic)
    token_times: list[float] = field(default_factory=list)
    finished: bool = False
    cancelled: bool = False  # its client has left

    def add(self, token: int, ends: list[int]) -> str | Exception:
        """The text that a token completes, "" if it completes none or the row has finished."""
        if self.finished:
            return ""
        self.token_times.append(time.monotonic())
        generated = len(self.token_times)
        self.finished = token in ends or generated == self.max_new_tokens or self.cancelled
        try:
            text = self.decoder.step(token)
            return text + self.decoder.flush() if self.finished else text
        except Exception as error:  # concerns this row alone
            self.finished = self.cancelled = True
            return error


class RawStreamer(BaseStreamer, StoppingCriteria):
    """The tokens of a whole batch, from the model's thread to the event loop.

    The streamers of transformers take one row. Pass this one to `generate` twice, as `streamer`
    and in `stopping_criteria`; read it with `async for`: a list of one token per row each step.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.prompt_length: int | None = None
        self.progress = 0.0  # when the last step was done, by time.monotonic
        self.loop = asyncio.get_running_loop()
        self.steps: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts, shape (rows, length), and then one token per row, shape (rows,)."""
        if self.prompt_length is None:
            self.prompt_length = value.shape[1]
        else:
            self.progress = time.monotonic()
            self._send(value.tolist())

    def end(self) -> None:
        self._send(None)

    def fail(self, error: Exception) -> None:
        """End the stream with an exception, raised where it is read."""
        self._send(error)

    def cancel(self) -> None:
        """Stop `generate` at its next step, or before its first."""
        for row in self.rows:
            row.cancelled = True

    @property
    def unread(self) -> bool:
        return all(row.cancelled for row in self.rows)

    def _send(self, item: list[int] | Exception | None) -> None:
        self.loop.call_soon_threadsafe(self.steps.put_nowait, item)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows stop, shape (rows,): those that nobody reads or that are long enough."""
        generated = input_ids.shape[1] - (self.prompt_length or 0)
        stop = [row.cancelled or generated >= row.max_new_tokens for row in self.rows]
        return torch.tensor(stop, device=input_ids.device)

    async def __aiter__(self) -> AsyncGenerator[list[int]]:
        while (step := await self.steps.get()) is not None:
            if isinstance(step, Exception):
                raise step
            yield step


# One batch generates at a time; the prompts of the next gather meanwhile. With batches of 8, a
# hundred requests wait for a dozen batches, some minutes; who would have to wait longer is better
# told so at once. Every request is queued in Serve's proxy for a moment, so that as many as a
# replica takes must fit there too.
@serve.deployment(
    max_ongoing_requests=100,
    max_queued_requests=100,
    backpressure_config=BackpressureConfig(retry_after_s=10),
    user_config=BatchSettings().model_dump(),
)
@serve.ingress(fastapi_app)
class Batchbot:
    """Streams the replies of one batch at a time; other requests wait for the next batches."""

    def __init__(
        self,
        model: str,
        max_new_tokens: int | None = None,
        dtype: str = "float32",
        system_prompt: str | None = None,
        access: Access | None = None,
        stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
        fallback: str | None = None,
    ) -> None:
        self.model_name, self.model, self.tokenizer, context = load_model(model, dtype, fallback)
        self.max_new_tokens = reply_limit(max_new_tokens, context)
        # A row that has finished is still computed until the longest row has, so every prompt
        # must leave room for the longest reply.
        self.room = context - self.max_new_tokens
        self.system_prompt = system_prompt
        self.access = access or Access()
        self.access.read_api_key()  # a key that cannot be read must not wait for the first request
        # Short prompts are padded, on the left: a reply continues the end of its row.
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token_id = self.model.generation_config.pad_token_id
        # Serve would make many small batches of what arrives while one runs, and run them one by
        # one. Held back until the model is free, they run together.
        self.model_is_free = asyncio.Event()
        self.model_is_free.set()
        self.metrics = BotMetrics()
        self.waiting = Population(self.metrics.waiting)
        self.batch = Population(self.metrics.batch_rows)
        self.model_thread = ModelThread(stall_timeout_s)
        logger.info(f"{self.model_name} is ready")

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        settings = BatchSettings.model_validate(user_config)
        self.run_model.set_max_batch_size(settings.max_batch_size)
        self.run_model.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)

    @fastapi_app.post("/", **PROMPT_ROUTE)
    async def handle_request(
        self, request: Annotated[TextRequest, Depends(read_request)]
    ) -> TextStream:
        """Let the prompt join a batch and return the stream of its own row."""
        conversation = [*begin(self.system_prompt), {"role": "user", "content": request.prompt}]
        input_ids = await asyncio.to_thread(encode, conversation, self.tokenizer, self.room)
        row = Row(input_ids, request.max_new_tokens, TokenDecoder(self.tokenizer))
        return await TextStream.start(self.stream_row(row))

    async def stream_row(self, row: Row) -> AsyncGenerator[str]:
        """Yield the reply's text as it comes; when the client leaves, stop its row."""
        self.waiting.add(row)
        try:
            await self.model_is_free.wait()
            async for item in self.run_model(row):
                if isinstance(item, Exception):
                    raise item
                if item:
                    yield item
        finally:
            row.cancelled = True
            self.waiting.discard(row)
            self.batch.discard(row)
            self.metrics.record_reply(row.asked, row.token_times)

    @serve.batch()  # sized by reconfigure
    async def run_model(self, rows: list[Row]) -> AsyncGenerator[list[Item]]:
        """Run a batch: Serve collects its rows and gives each caller the items of its own."""
        self.model_is_free.clear()
        self.waiting.discard(*rows)
        self.batch.add(*rows)
        try:
            streamer = RawStreamer(rows)
            self.model_thread.submit(streamer, self.generate_text, rows)
            async for items in self.consume_streamer(rows, streamer):
                yield items
        finally:
            self.model_is_free.set()

    def generate_text(self, rows: list[Row], streamer: RawStreamer) -> None:
        """Run the model, in its thread: each step's tokens go to the streamer."""
        # The mask that comes with the padding keeps the model from reading it as text.
        inputs = self.tokenizer.pad(
            {"input_ids": [row.input_ids for row in rows]}, padding=True, return_tensors="pt"
        )
        self.model.generate(
            **inputs.to(self.model.device),
            max_new_tokens=max(row.max_new_tokens for row in rows),
            streamer=streamer,
            stopping_criteria=[streamer],
        )

    async def consume_streamer(
        self, rows: list[Row], streamer: RawStreamer
    ) -> AsyncGenerator[list[Item]]:
        """Yield a list of one item per row at each step; a row ends with StopIteration."""
        ends = self.model.generation_config.eos_token_id or []
        async for tokens in streamer:
            running = [row for row in rows if not row.finished]
            yield [row.add(token, ends) for row, token in zip(rows, tokens, strict=True)]
            if any(row.finished for row in running):  # their responses close now
                yield [StopIteration if row.finished else "" for row in rows]

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        self.model_thread.check()


def build(args: BatchbotArguments) -> Application:
    """`serve run batchbot:build model=./my-model max_batch_size=16`."""
    return Batchbot.options(**args.deployment_options()).bind(**args.constructor_arguments())


app = Batchbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")
