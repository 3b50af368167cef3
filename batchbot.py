"""Several prompts in one run of the model, each reply to its caller: `serve run batchbot:app`."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from fastapi import Depends, FastAPI
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from serving.access import Access
from serving.arguments import BatchbotArguments, BatchSettings
from serving.decoding import TokenDecoder
from serving.encoding import begin, encode, prompt_limit, reply_limit
from serving.loading import batch_context, load_model
from serving.metrics import BotMetrics, Population
from serving.model_thread import ModelThread, watch_layers
from serving.openapi import PROMPT_ROUTE
from serving.padding import can_cut_cache, check_padding
from serving.prompts import ReplyOptions, TextRequest, read_request
from serving.responses import HTTP, TextStream
from serving.sampling import Sampler, SampleRows
from serving.streaming import Handover, pace
from serving.watchdog import DEFAULT_STALL_TIMEOUT_S, ModelStalled

logger = logging.getLogger("ray.serve")

fastapi_app = FastAPI(title="Batchbot", **HTTP)

SOON = 4096  # tokens of padding that a batch may have whatever its prompts are

# Of one row: text, "" if there is none yet, an error that concerns it alone, or its end.
Item = str | Exception | type[StopIteration]

# Of the rows that `generate` runs with: when their tokens came, by time.monotonic, and the tokens.
Step = tuple[float, dict["Row", int]]


@dataclass(eq=False)
class Row:
    """One prompt of a batch and the state of its reply."""

    input_ids: list[int]
    options: ReplyOptions
    sampler: Sampler | None
    decoder: TokenDecoder
    asked: float = field(default_factory=time.monotonic)
    token_times: list[float] = field(default_factory=list)
    finished: bool = False
    error: Exception | None = None  # that finished it, and concerns it alone
    cancelled: bool = False  # its client has left

    def ends(self, token: int, generated: int, end_tokens: list[int]) -> bool:
        """Whether a token, the last of so many, is the reply's last."""
        long_enough = generated >= self.options.max_new_tokens
        return long_enough or token in end_tokens or self.decoder.stopped or self.cancelled

    def add(self, steps: list[Step], end_tokens: list[int]) -> str:
        """The text that the steps' tokens complete, which may be none."""
        text = ""
        for at, tokens in steps:
            if self.finished or (token := tokens.get(self)) is None:
                break
            self.token_times.append(at)
            try:
                text += self.decoder.step(token)
                self.finished = self.ends(token, len(self.token_times), end_tokens)
                text += self.decoder.flush() if self.finished else ""
            except Exception as error:
                self.fail(error)
        return text

    def fail(self, error: Exception) -> None:
        """End the reply, here and in the model."""
        self.error = error
        self.finished = self.cancelled = True


def ends_of(rows: list[Row]) -> list[Item]:
    """An item for each row: its end, if it has finished."""
    return [(row.error or StopIteration) if row.finished else "" for row in rows]


def suit(rows: list[Row], context: int) -> bool:
    """Whether rows may run together: padding makes their prompts as long as the longest.

    With it they must fit the context, together with their replies, and it must be a fifth of the
    whole at most, or soon computed.
    """
    prompts = [len(row.input_ids) for row in rows]
    reply = max(row.options.max_new_tokens for row in rows)
    padded = len(rows) * max(prompts)
    fits = max(prompts) + reply <= context
    return fits and padded - sum(prompts) <= max(SOON, padded // 5)


class RawStreamer(BaseStreamer, StoppingCriteria):
    """The tokens of a whole batch, from the model's thread to the event loop.

    The streamers of transformers take one row. Pass this one to `generate` twice, as `streamer`
    and in `stopping_criteria`: it stops `generate` for all rows as soon as one has ended, to be
    called again with the rows that are `going_on`. Its `steps` are read on the event loop.
    """

    def __init__(self, rows: list[Row], end_tokens: list[int]) -> None:
        self.rows = rows  # that `generate` runs with
        self.cancelled = False
        self.end_tokens = end_tokens
        self.prompt_length = 0
        self.stopped = False  # it has stopped `generate`, which may take one more step
        self.going_on: list[int] = []  # which of the rows
        self.steps: Handover[Step] = Handover(pace(len(rows)))

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts, shape (rows, length), and then one token per row, shape (rows,)."""
        if value.dim() == 1:
            tokens = dict(zip(self.rows, value.tolist(), strict=True))
            self.steps.put((time.monotonic(), tokens))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether to stop, shape (rows,): asked by `generate` after each step."""
        generated = input_ids.shape[1] - self.prompt_length
        tokens = zip(self.rows, input_ids[:, -1].tolist(), strict=True)
        ended = [
            self.cancelled or row.ends(token, generated, self.end_tokens) for row, token in tokens
        ]
        if not self.stopped:
            self.going_on = [index for index, it_ended in enumerate(ended) if not it_ended]
            self.stopped = any(ended)
        return torch.full((len(ended),), any(ended), device=input_ids.device)

    def drop_ended(self) -> None:
        """Take what follows as the tokens of the rows that are `going_on`."""
        self.rows = [self.rows[index] for index in self.going_on]
        self.stopped = False
        self.steps.pace = pace(len(self.rows))

    def end(self) -> None:
        """`generate` has stopped: the end of the stream, unless rows go on."""
        if not self.going_on:
            self.steps.end()

    def fail(self, error: Exception) -> None:
        """End the stream with an exception, raised where it is read."""
        self.steps.end(error)

    def cancel(self) -> None:
        """Stop `generate` at its next step, or before its first."""
        self.cancelled = True  # not the rows, whose last tokens may not have been read yet

    @property
    def unread(self) -> bool:
        return self.cancelled or all(row.cancelled for row in self.rows)


# One batch generates at a time; the prompts of the next gather meanwhile. With batches of 16, a
# hundred requests wait for half a dozen batches, some minutes; who would have to wait longer is
# better told so at once. Every request is queued in Serve's proxy for a moment, so that as many as
# a replica takes must fit there too.
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
        served_model_name: str | None = None,
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        dtype: str = "float32",
        system_prompt: str | None = None,
        access: Access | None = None,
        stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
        fallback: str | None = None,
        device: str = "cpu",
        batch_arguments: dict[str, Any] | None = None,
    ) -> None:
        name, self.model, self.tokenizer, context = load_model(model, dtype, fallback, device)
        self.context = batch_context(self.model, context)
        self.model_name = served_model_name or name
        self.max_new_tokens = reply_limit(max_new_tokens, self.context)
        self.max_prompt_tokens = prompt_limit(max_prompt_tokens, self.context)
        self.system_prompt = system_prompt
        self.access = access or Access()
        self.api_key = self.access.read_api_key()
        # Short prompts are padded, on the left: a reply continues the end of its row.
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token_id = self.model.generation_config.pad_token_id
        check_padding(self.model)
        self.cuts_cache = can_cut_cache(self.model)
        # Serve would make many small batches of what arrives while one runs, and run them one by
        # one. Held back until the model is free, they run together.
        self.model_is_free = asyncio.Event()
        self.model_is_free.set()
        self.metrics = BotMetrics()
        self.waiting = Population(self.metrics.waiting)
        self.batch = Population(self.metrics.batch_rows)
        self.model_thread = ModelThread(stall_timeout_s)
        watch_layers(self.model, self.model_thread.watchdog.note_progress)
        self.batch_arguments = batch_arguments or {}
        self.configured = False
        logger.info(f"{self.model_name} is ready")

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve when the replica starts, and for each new `user_config`."""
        try:
            settings = BatchSettings.model_validate(user_config)
        except ValidationError as error:
            if not self.configured:
                raise
            # Serve would stop the replica, and those that it starts instead would fail likewise.
            logger.error(f"the batches stay as they are: {error}")
            return
        for name, value in self.batch_arguments.items():
            if value != (counts := getattr(settings, name)):
                logger.warning(f"{name} is {counts}, from user_config, and not {value}, from args")
        self.configured = True
        self.run_model.set_max_batch_size(settings.max_batch_size)
        self.run_model.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)

    @fastapi_app.post("/", **PROMPT_ROUTE)
    async def handle_request(
        self, request: Annotated[TextRequest, Depends(read_request)]
    ) -> TextStream:
        """Let the prompt join a batch and return the stream of its own row."""
        conversation = [*begin(self.system_prompt), {"role": "user", "content": request.prompt}]
        room = min(self.context - request.max_new_tokens, self.max_prompt_tokens)
        input_ids = await asyncio.to_thread(encode, conversation, self.tokenizer, room)
        decoder = TokenDecoder(self.tokenizer, request.stop)
        row = Row(input_ids, request, request.sampler(self.model.device), decoder)
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
            for part in self.split(rows):
                streamer = RawStreamer(part, self.model.generation_config.eos_token_id or [])
                self.model_thread.submit(streamer, self.generate_text, part)
                try:
                    async for items in self.consume_streamer(rows, streamer):
                        yield items
                except ModelStalled:
                    raise
                except Exception as error:  # concerns this part alone
                    for row in part:
                        if not row.finished:
                            row.fail(error)
                    yield ends_of(rows)
        finally:
            self.model_is_free.set()

    def split(self, rows: list[Row]) -> list[list[Row]]:
        """Parts of a batch, mostly one, of rows that suit each other; short prompts first."""
        parts: list[list[Row]] = []
        for row in rows:
            part = next((part for part in parts if suit([*part, row], self.context)), None)
            if part is None:
                parts.append([row])
            else:
                part.append(row)
        return sorted(parts, key=lambda part: max(len(row.input_ids) for row in part))

    def generate_text(self, rows: list[Row], streamer: RawStreamer) -> None:
        """Run the model, in its thread; when a row ends, go on without it."""
        # The mask that comes with the padding keeps the model from reading it as text.
        inputs = self.tokenizer.pad(
            {"input_ids": [row.input_ids for row in rows]},
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
        reused: dict[str, Any] = {}
        streamer.prompt_length = input_ids.shape[1]
        while True:
            output = self.model.generate(
                input_ids,
                attention_mask=mask,
                **reused,
                max_new_tokens=self.max_new_tokens,
                logits_processor=[SampleRows([row.sampler for row in streamer.rows])],
                streamer=streamer,
                stopping_criteria=[streamer],
                return_dict_in_generate=True,
            )
            if not streamer.going_on:
                return
            left = torch.tensor(streamer.going_on, device=self.model.device)
            input_ids, cache = output.sequences[left], output.past_key_values
            mask = torch.nn.functional.pad(
                mask[left], (0, input_ids.shape[1] - mask.shape[1]), value=1
            )
            if self.cuts_cache:  # else all is computed anew
                cache.reorder_cache(left)
                reused = {"past_key_values": cache}
            streamer.drop_ended()

    async def consume_streamer(
        self, rows: list[Row], streamer: RawStreamer
    ) -> AsyncGenerator[list[Item]]:
        """Yield lists of one item per row; the last of a row is StopIteration, or its error."""
        async for steps in streamer.steps:
            running = [row for row in rows if not row.finished]
            yield [row.add(steps, streamer.end_tokens) for row in rows]
            if any(row.finished for row in running):  # their responses close now
                yield ends_of(rows)

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        self.model_thread.check()


def build(args: BatchbotArguments) -> Application:
    """`serve run batchbot:build model=./my-model max_batch_size=16`."""
    return Batchbot.options(**args.deployment_options()).bind(**args.constructor_arguments())


app = Batchbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")
