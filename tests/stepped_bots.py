"""Real bots whose model waits at a gate before each step, so that tests decide the order.

A test lets the model take some steps, and then reads, disconnects or asks again. It waits for the
events that this causes in the bot, and lets the model continue.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from gates import Gate
from ray import serve
from ray.serve import Application

from batchbot import Batchbot
from chatbot import Chatbot
from continuousbot import Continuousbot
from docs.smallest_bot import SmallestBot
from streaming_bots.generation.engine import Streamer
from streaming_bots.generation.row import Row
from streaming_bots.generation.streamer import ReplyStreamer
from streaming_bots.generation.text_decoder import TextDecoder
from streaming_bots.operations import drain
from textbot import Textbot

HEALTH_CHECK_PERIOD_S = 1.0
MAX_CHATS = 120
ENCODE_ERROR = "This prompt cannot be encoded."
DECODE_ERROR = "The reply cannot be decoded."


class Reporter:
    """Reports events to the gate from its own thread.

    When Ray cancels a request, it also cancels the request's calls. Without this thread, the report
    of its end would be lost.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.flush()  # the thread begins here, outside of any request

    def __call__(self, event: str) -> None:
        self.thread.submit(self.gate.record, event)

    def flush(self) -> None:
        self.thread.submit(int).result()


class SteppedBot:
    """Reports what happens, waits before each step of the model, and fails when it is told to."""

    async def __init__(self, gate: Gate, **arguments: Any) -> None:
        await super().__init__(**arguments)
        self.gate = gate
        self.report = Reporter(gate)
        self.watch_submit()
        self.count, self.metrics.count = self.metrics.count, self.count_and_report
        self.model.register_forward_pre_hook(self.before_step, with_kwargs=True)
        self.tokenizer.__class__ = failing_tokenizer(type(self.tokenizer))
        self.report("started")

    def watch_submit(self) -> None:
        self.submit, self.engine.submit = self.engine.submit, self.submit_and_report

    def submit_and_report(self, streamer: Streamer) -> None:
        self.submit(streamer)
        self.report("submitted")

    def count_and_report(self, outcome: str) -> None:
        self.count(outcome)
        self.report(outcome)

    def before_step(self, model: Any, arguments: Any, options: dict[str, Any]) -> None:
        if error := self.gate.step(options["input_ids"].numel()):
            raise error

    def spoil(self, decoder: TextDecoder, input_ids: list[int]) -> None:
        """Make the decoder of a prompt with DECODE_ERROR fail at the third token."""
        if DECODE_ERROR in self.tokenizer.decode(input_ids):
            step = decoder.step

            def failing_step(token):
                if len(decoder.ids) == 2:
                    raise ValueError("this token was told to fail")
                return step(token)

            decoder.step = failing_step

    def process(self) -> int:
        return os.getpid()

    def flush(self) -> None:
        """Send pending reports, such as the end of an earlier test's request."""
        self.report.flush()

    def stall_after(self, seconds: float) -> None:
        self.engine.stall_timeout_s = seconds
        self.engine.watching = None  # with the next prompt, watching starts over

    def slow_down(self, seconds: float) -> None:
        """Let each layer of the model take this many seconds."""
        for layer in self.model.transformer.h:
            layer.register_forward_hook(lambda *_: time.sleep(seconds))


def failing_tokenizer(original: type) -> type:
    class FailingTokenizer(original):
        def __call__(self, text, **options):
            if ENCODE_ERROR in text:
                raise ValueError("this prompt was told to fail")
            return super().__call__(text, **options)

    return FailingTokenizer


class SteppedSingleReplyBot(SteppedBot):
    def submit_and_report(self, streamer: ReplyStreamer) -> None:
        self.spoil(streamer.decoder, streamer.input_ids)
        super().submit_and_report(streamer)

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        try:
            async with aclosing(super().consume_streamer(streamer)) as chunks:
                async for text in chunks:
                    yield text
        finally:
            self.report("left")


class SteppedTextbot(SteppedSingleReplyBot, Textbot.func_or_class):
    pass


class SteppedChatbot(SteppedSingleReplyBot, Chatbot.func_or_class):
    """A Chatbot with fewer places, which notices sooner that Serve stops its replica."""

    async def __init__(self, *arguments: Any, **options: Any) -> None:
        drain.LOOK_EVERY_S, drain.SILENCE_S = 0.5, 3 * HEALTH_CHECK_PERIOD_S
        await super().__init__(*arguments, **options)
        self.free_places = asyncio.Semaphore(MAX_CHATS)


class SteppedContinuousbot(SteppedSingleReplyBot, Continuousbot.func_or_class):
    pass


class SteppedBatchbot(SteppedBot, Batchbot.func_or_class):
    async def stream_row(self, row: Row) -> AsyncGenerator[str]:
        self.spoil(row.decoder, row.input_ids)
        self.report("asked")
        try:
            async with aclosing(super().stream_row(row)) as chunks:
                async for text in chunks:
                    yield text
        finally:
            self.report("left")


class SteppedSmallestBot(SmallestBot.func_or_class):
    """The tutorial's first bot, which reports only its model's steps."""

    async def __init__(self, gate: Gate, model: str) -> None:
        await super().__init__(model)
        self.gate = gate
        self.model.register_forward_pre_hook(self.before_step, with_kwargs=True)

    before_step = SteppedBot.before_step


# By name: the stepped bot, the original, and arguments for the constructor.
STEPPED: dict[str, tuple[type, serve.Deployment, dict[str, Any]]] = {
    "textbot": (SteppedTextbot, Textbot, {}),
    "chatbot": (SteppedChatbot, Chatbot, {}),
    "batched_chatbot": (SteppedChatbot, Chatbot, {"max_batch_size": 32}),
    "batchbot": (SteppedBatchbot, Batchbot, {}),
    "continuousbot": (SteppedContinuousbot, Continuousbot, {}),
}


def stepped(name: str, gate: Gate, options: dict[str, Any], **arguments: Any) -> Application:
    """Return a stepped bot with the original's options, faster health checks, and `options`."""
    bot, original, own = STEPPED[name]
    options = {
        "func_or_class": bot,
        **options,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
    }
    return original.options(**options).bind(gate, **own | arguments)
