"""Streams replies that the model writes in batches. Run it with `serve run batchbot:app`."""

import asyncio
from collections.abc import AsyncGenerator
from itertools import chain
from typing import Any

import torch
from ray import serve
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from streaming_bots.bot import Bot, Reply
from streaming_bots.generation import padding
from streaming_bots.generation.model_thread import ModelThread
from streaming_bots.generation.row import Row, split_rows
from streaming_bots.generation.sampling import ReplyOptions, SamplingLogitsProcessor
from streaming_bots.generation.streamer import TokenQueue, min_interval
from streaming_bots.http.app import create_app
from streaming_bots.http.prompt_route import PROMPT_ROUTE, PromptRequest
from streaming_bots.http.response import TextStream
from streaming_bots.settings import QUEUE_OPTIONS, BatchbotSettings, BatchSettings

# What run_model yields for a caller: text, "" if there is none yet, an error, or Serve's end mark.
Item = str | Exception | type[StopIteration]

api = create_app("Batchbot")  # also adds OpenAI's routes, which call the replica's start_reply


class RawStreamer(BaseStreamer, StoppingCriteria):
    """Carries the text of a whole batch from the model's thread to the event loop.

    The streamers of transformers take no more than one row. Pass this one to `generate` both as
    `streamer` and in `stopping_criteria`: it stops `generate` as soon as one row has ended. The
    bot then calls `generate` for the others alone, since an ended row costs as much as any.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows  # those that `generate` is running now
        # One list for each step, with all rows: the row, the text that the step completed, and the
        # row's end or None. The model's thread puts the lists, and the event loop reads them.
        self.steps: TokenQueue[list[tuple[Row, str, Item | None]]] = TokenQueue()
        self.stopped = False  # the last answer; on Apple's GPUs, one more step follows it
        self.kept: list[int] = []  # indices of the rows with which `generate` is called again
        self.cancelled = False

    # `generate` calls these in the model's thread: in each step `__call__`, and then `put` (this
    # is the order of transformers 5.23), which takes the text decoded in `__call__`; last, `end`.

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Give each row its new token to decode, and say whether to stop: shape (rows,)."""
        if not self.stopped:
            for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
                row.add(token)  # sets row.end: StopIteration at its last token, or a decoding error
            running = [] if self.cancelled else self.rows  # if cancelled, keep none
            self.kept = [index for index, row in enumerate(running) if not row.end]
            self.stopped = len(self.kept) < len(self.rows)
        return torch.full((len(self.rows),), self.stopped, device=input_ids.device)

    def put(self, value: torch.Tensor) -> None:
        """When given a step's tokens, of shape (rows,), hand over each row's new text and end."""
        if value.dim() == 1:  # not on the prompts, which come first
            self.steps.min_interval = min_interval(len(self.rows))  # more rows cost more per list
            self.steps.put([(row, row.take_text(), row.end) for row in self.rows])

    def end(self) -> None:
        """End the stream, unless the bot continues with some rows."""
        if not self.kept:
            self.steps.end()

    # ModelThread calls `end`, and not generate_text, for a streamer that is `done` before its turn.
    # If generate_text raises, it calls `fail`. If that hangs, it calls `fail` and `cancel`.

    @property
    def done(self) -> bool:
        """Whether it is cancelled, or has no row with a reader."""
        return self.cancelled or all(row.cancelled for row in self.rows)

    def fail(self, error: Exception) -> None:
        self.steps.end(error)

    def cancel(self) -> None:
        """Stop `generate` at its next step."""
        self.cancelled = True


@serve.deployment(**QUEUE_OPTIONS, user_config=BatchSettings().model_dump())
@serve.ingress(api)
class Batchbot(Bot):
    """Streams the replies of one batch at a time; requests that arrive meanwhile form the next."""

    settings: BatchbotSettings

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(BatchbotSettings(model=model, **settings))  # loads the model and tokenizer
        # Shorter prompts are padded on the left, since replies are appended on the right. At some
        # length, a longrope model changes the positions of all rows: batch_context is below it.
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token_id = self.model.generation_config.pad_token_id  # set by Bot
        self.limit_context(padding.batch_context(self.model, self.context))
        padding.check_padding(self.model)  # raises if padding would change replies
        self.cuts_cache = padding.can_cut_cache(self.model)  # else, a cut one is computed again
        self.engine = ModelThread(self.model, self.generate_text, self.settings)  # one thread
        # While a batch runs, Serve would form small ones, one after each batch_wait_timeout_s. So
        # requests wait for this event, set when a batch ends, and then join Serve's queue together.
        self.model_is_free = asyncio.Event()
        self.model_is_free.set()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve when the replica starts, and for each new `user_config`."""
        settings = self.settings.reconfigure(user_config)
        self.run_model.set_max_batch_size(settings.max_batch_size)
        self.run_model.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)

    @api.post("/", **PROMPT_ROUTE)  # PROMPT_ROUTE: how OpenAPI describes the route
    async def handle_request(self, request: PromptRequest) -> TextStream:
        """Stream the reply. If the model fails: a 500, or later a body without its last chunk."""
        messages = [*self.system_messages(), {"role": "user", "content": request.prompt}]
        reply = await self.start_reply(messages, request)  # a PromptRequest is a ReplyOptions
        return await TextStream.start(reply)  # reads up to the first text before it sends a status

    async def start_reply(self, messages: list[dict[str, str]], options: ReplyOptions) -> Reply:
        """Apply the chat template, and return a reply, which queues for a batch when first read."""
        input_ids = await self.encode(messages, options)  # in a thread; 413 if it does not fit
        row = Row(self.tokenizer, input_ids, options, self.end_tokens, self.model.device)
        return Reply(state=row, chunks=self.stream_row(row))  # state: how it ended

    async def stream_row(self, row: Row) -> AsyncGenerator[str]:
        """Yield the reply's text as it arrives; if it is closed before its end, stop its row."""
        self.metrics.waiting.add(row)
        try:
            await self.model_is_free.wait()
            async for item in self.run_model(row):
                if isinstance(item, Exception):
                    raise item
                if item:
                    yield item
        finally:
            row.cancelled = row.end is None  # left out of its batch, or ended at its next token
            self.metrics.waiting.discard(row)
            self.metrics.running.discard(row)
            self.metrics.record_reply(row)  # counts its tokens, and how long each took

    @serve.batch()  # one batch at a time; reconfigure sets its size and timeout
    async def run_model(self, rows: list[Row]) -> AsyncGenerator[list[Item]]:
        """Run a batch. Serve gives callers the items at their index, until they end or leave."""
        self.model_is_free.clear()
        try:
            for part in split_rows(rows, self.context):  # usually one; more if too large
                streamer = RawStreamer([row for row in part if not row.cancelled])
                self.metrics.waiting.discard(*streamer.rows)
                self.metrics.running.add(*streamer.rows)
                try:
                    self.engine.submit(streamer)  # raises after a hang, as check_health does
                    async for items in self.consume_streamer(rows, streamer):
                        yield items
                except Exception as error:  # fails only this part
                    yield [error if row in part else "" for row in rows]
        finally:
            self.model_is_free.set()

    def generate_text(self, streamer: RawStreamer) -> None:
        """Run the model. The logits processor samples by each row's seed: the drawn token wins."""
        ids = {"input_ids": [row.input_ids for row in streamer.rows]}
        inputs = self.tokenizer.pad(ids, return_attention_mask=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)  # with a mask by which the model ignores the padding
        while True:
            output = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,  # row.add ends each row at its own limit
                logits_processor=[SamplingLogitsProcessor([row.sampler for row in streamer.rows])],
                streamer=streamer,
                stopping_criteria=[streamer],
                return_dict_in_generate=True,
            )
            if not streamer.kept:
                return
            # Continue with the other rows: their tokens, mask and, if rows can be cut, KV cache.
            inputs = padding.keep_rows(inputs, output, streamer.kept, self.cuts_cache)
            streamer.rows = [streamer.rows[index] for index in streamer.kept]
            streamer.stopped = False

    async def consume_streamer(
        self, rows: list[Row], streamer: RawStreamer
    ) -> AsyncGenerator[list[Item]]:
        """Yield a list of texts, one for each row, and then, if rows have ended, one of ends."""
        async for steps in streamer.steps:  # all steps put since the last read
            texts, ends = dict.fromkeys(rows, ""), dict[Row, Item]()
            for row, text, end in chain.from_iterable(steps):
                texts[row] += text
                ends[row] = end or ""
            yield list(texts.values())
            if any(ends.values()):  # in a second list: a row's text and end are two items
                yield [ends.get(row, "") for row in rows]


def build(settings: BatchbotSettings) -> serve.Application:
    """With other settings: `serve run batchbot:build model=./my-model max_batch_size=16`."""
    return settings.bind(Batchbot)  # BatchSettings become user_config, which may change later


app = Batchbot.bind("microsoft/DialoGPT-small", fallback="tiny-dialog")  # bundled, if offline
