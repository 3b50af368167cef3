"""Several prompts in one run of the model, each reply to its caller: `serve run batchbot:app`."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from fastapi import Depends, FastAPI
from ray import serve
from ray.serve import Application
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from serving.arguments import BatchbotArguments, BatchSettings
from serving.encoding import begin, encode, reply_limit
from serving.loading import load_model
from serving.prompts import TextRequest, read_request
from serving.responses import EXCEPTION_HANDLERS, MIDDLEWARE, TextStream
from serving.streaming import TokenDecoder, errors_to

logger = logging.getLogger("ray.serve")

fastapi_app = FastAPI(
    title="Batchbot", middleware=MIDDLEWARE, exception_handlers=EXCEPTION_HANDLERS
)

Item = str | type[StopIteration]  # of one row: text, "" if there is none yet, or its end


@dataclass(eq=False)
class Row:
    """One prompt of a batch and the state of its reply."""

    input_ids: list[int]
    max_new_tokens: int
    decoder: TokenDecoder
    generated: int = 0  # tokens
    finished: bool = False
    cancelled: bool = False  # its client has left

    def add(self, token: int, ends: list[int]) -> str:
        """The text that a token completes, "" if it completes none or the row has finished."""
        if self.finished:
            return ""
        self.generated += 1
        text = self.decoder.step(token)
        self.finished = token in ends or self.generated == self.max_new_tokens or self.cancelled
        return text + self.decoder.flush() if self.finished else text


class RawStreamer(BaseStreamer, StoppingCriteria):
    """The tokens of a whole batch, from the model's thread to the event loop.

    The streamers of transformers take one row. Pass this one to `generate` twice, as `streamer`
    and in `stopping_criteria`; read it with `async for`: a list of one token per row each step.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.prompt_length: int | None = None
        self.loop = asyncio.get_running_loop()
        self.steps: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts, shape (rows, length), and then one token per row, shape (rows,)."""
        if self.prompt_length is None:
            self.prompt_length = value.shape[1]
        else:
            self.loop.call_soon_threadsafe(self.steps.put_nowait, value.tolist())

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.steps.put_nowait, None)

    def fail(self, error: Exception) -> None:
        """End the stream with an exception, raised where it is read."""
        self.loop.call_soon_threadsafe(self.steps.put_nowait, error)

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


# One batch generates at a time; the prompts of the next gather meanwhile.
@serve.deployment(max_ongoing_requests=100, user_config=BatchSettings().model_dump())
@serve.ingress(fastapi_app)
class Batchbot:
    """Streams the replies of one batch at a time; other requests wait for the next batches."""

    def __init__(
        self,
        model: str,
        max_new_tokens: int | None = None,
        dtype: str = "float32",
        system_prompt: str | None = None,
        fallback: str | None = None,
    ) -> None:
        self.model_name, self.model, self.tokenizer, context = load_model(model, dtype, fallback)
        self.max_new_tokens = reply_limit(max_new_tokens, context)
        # A row that has finished is still computed until the longest row has, so every prompt
        # must leave room for the longest reply.
        self.room = context - self.max_new_tokens
        self.system_prompt = system_prompt
        # Short prompts are padded, on the left: a reply continues the end of its row.
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token_id = self.model.generation_config.pad_token_id
        # Serve would make many small batches of what arrives while one runs, and run them one by
        # one. Held back until the model is free, they run together.
        self.model_is_free = asyncio.Event()
        self.model_is_free.set()
        # One thread: a second one would bring its own OpenMP team and fight for the same cores.
        self.model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        logger.info(f"{self.model_name} is ready")

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        settings = BatchSettings.model_validate(user_config)
        self.run_model.set_max_batch_size(settings.max_batch_size)
        self.run_model.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)

    @fastapi_app.post("/")
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
        try:
            await self.model_is_free.wait()
            async for text in self.run_model(row):
                if text:
                    yield text
        finally:
            row.cancelled = True

    @serve.batch()  # sized by reconfigure
    async def run_model(self, rows: list[Row]) -> AsyncGenerator[list[Item]]:
        """Run a batch: Serve collects its rows and gives each caller the items of its own."""
        self.model_is_free.clear()
        try:
            streamer = RawStreamer(rows)
            self.model_thread.submit(self.generate_text, rows, streamer)
            async for items in self.consume_streamer(rows, streamer):
                yield items
        finally:
            self.model_is_free.set()

    def generate_text(self, rows: list[Row], streamer: RawStreamer) -> None:
        """Run the model, in its thread: each step's tokens go to the streamer."""
        with errors_to(streamer):
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


def build(args: BatchbotArguments) -> Application:
    """`serve run batchbot:build model=./my-model max_batch_size=16`."""
    return Batchbot.options(**args.deployment_options()).bind(**args.constructor_arguments())


app = Batchbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")
