"""The real bots with a gate before each step of the model, so that tests decide what happens when.

A test lets the model take some steps, does what it is about (reads, disconnects, asks again),
waits for the events that this causes in the replica, and lets the model go on.
"""

import asyncio
import math
import os
from collections import Counter
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import ray
from ray import serve

from batchbot import Batchbot, Row
from chatbot import Chatbot
from continuousbot import Continuousbot
from serving.decoding import TokenDecoder
from serving.prompts import ReplyOptions
from serving.streaming import ReplyStreamer
from textbot import Textbot

HANG_S = 60  # only bounds a hang
MAX_CHATS = 120
ENCODE_ERROR = "This prompt cannot be encoded."
DECODE_ERROR = "The reply cannot be decoded."


@ray.remote(num_cpus=0)
class GateActor:
    """Counts the events of one bot.

    "started" of its replica, "submitted" and "step" of the model, "tokens" that it read in its
    steps, "left" when a reply is not read any more, for the Batchbot "asked", and the outcomes
    "finished", "failed", "cancelled" and "refused".
    """

    def __init__(self) -> None:
        self.changed = asyncio.Condition()
        self.era = 0
        self.events: Counter[str] = Counter()
        self.allowed: float = math.inf
        self.fail_at: int | None = None
        self.error: BaseException | None = None

    async def set(
        self, steps: float, fail_at: int | None = None, error: BaseException | None = None
    ) -> None:
        """Begin anew; what an earlier test still holds goes on."""
        async with self.changed:
            self.era += 1
            self.events.clear()
            self.allowed, self.fail_at, self.error = steps, fail_at, error
            self.changed.notify_all()

    async def release(self, steps: float) -> None:
        async with self.changed:
            self.allowed += steps
            self.changed.notify_all()

    async def record(self, event: str) -> None:
        async with self.changed:
            self.events[event] += 1
            self.changed.notify_all()

    async def step(self, tokens: int) -> BaseException | None:
        """Wait for leave to take a step; return the error with which it is to fail."""
        await self.record("step")
        step, era = self.events["step"], self.era
        async with self.changed:
            self.events["tokens"] += tokens
            await self.changed.wait_for(lambda: self.allowed >= step or self.era != era)
        return self.error if step == self.fail_at and self.era == era else None

    async def wait(self, event: str, count: int, within_s: float = HANG_S) -> None:
        async with self.changed:
            await asyncio.wait_for(
                self.changed.wait_for(lambda: self.events[event] >= count), within_s
            )

    def count(self, event: str) -> int:
        return self.events[event]


class Gate:
    """A test's view of the gate of one bot."""

    def __init__(self) -> None:
        self.actor = GateActor.remote()

    def open(self) -> None:
        """Let the model run freely, and forget what happened."""
        ray.get(self.actor.set.remote(math.inf))

    def hold_after(self, steps: int) -> None:
        """Let the model take some steps and hold it before the next; forget what happened."""
        ray.get(self.actor.set.remote(steps))

    def fail_at(self, step: int, error: BaseException | None = None) -> None:
        """Let the model run, and fail at a step, from 1."""
        error = error or RuntimeError("this step was told to fail")
        ray.get(self.actor.set.remote(math.inf, step, error))

    def release(self, steps: float = math.inf) -> None:
        ray.get(self.actor.release.remote(steps))

    def wait(self, event: str, count: int) -> None:
        """Wait until something has happened so many times."""
        ray.get(self.actor.wait.remote(event, count))

    def happens(self, event: str, count: int, within_s: float) -> bool:
        try:
            ray.get(self.actor.wait.remote(event, count, within_s))
        except TimeoutError:
            return False
        return True

    def count(self, event: str) -> int:
        return ray.get(self.actor.count.remote(event))


class Reporter:
    """Tells the gate what happens, from a thread of its own.

    Ray cancels the calls that a cancelled request has made, and with them the news of its end.
    """

    def __init__(self, gate: Any) -> None:
        self.gate = gate
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.thread.submit(int).result()  # the thread begins here, outside of any request

    def __call__(self, event: str) -> None:
        self.thread.submit(lambda: ray.get(self.gate.record.remote(event)))

    def flush(self) -> None:
        self.thread.submit(int).result()


class Gated:
    """Reports what happens, waits before each step of the model, and fails when it is told to."""

    async def __init__(self, gate: Any, **arguments: Any) -> None:
        await super().__init__(**arguments)
        self.gate = gate
        self.report = Reporter(gate)
        self.watch_submit()
        self.count, self.metrics.count = self.metrics.count, self.count_and_report
        self.model.register_forward_pre_hook(self.before_step, with_kwargs=True)
        self.tokenizer.__class__ = failing_tokenizer(type(self.tokenizer))
        self.report("started")

    def watch_submit(self) -> None:
        self.submit, self.model_thread.submit = self.model_thread.submit, self.submit_and_report

    def submit_and_report(self, *arguments: Any, **options: Any) -> int:
        ahead = self.submit(*arguments, **options)
        self.report("submitted")
        return ahead

    def count_and_report(self, outcome: str) -> None:
        self.count(outcome)
        self.report(outcome)

    def before_step(self, model: Any, arguments: Any, options: dict[str, Any]) -> None:
        if error := ray.get(self.gate.step.remote(options["input_ids"].numel())):
            raise error

    def spoil(self, decoder: TokenDecoder, input_ids: list[int]) -> None:
        """Make the decoder of a certain prompt fail at the third token."""
        if DECODE_ERROR in self.tokenizer.decode(input_ids):
            step = decoder.step

            def failing_step(token: int) -> str:
                if len(decoder.ids) == 2:
                    raise ValueError("this token was told to fail")
                return step(token)

            decoder.step = failing_step

    def process(self) -> int:
        return os.getpid()

    def flush(self) -> None:
        """Have everything told to the gate, such as the end of what an earlier test asked."""
        self.report.flush()

    def stall_after(self, seconds: float) -> None:
        self.model_thread.stall_timeout_s = seconds
        self.model_thread.watched = False  # the next prompt is watched anew


def failing_tokenizer(original: type) -> type:
    class FailingTokenizer(original):
        def __call__(self, text: str, **options: Any) -> Any:
            if ENCODE_ERROR in text:
                raise ValueError("this prompt was told to fail")
            return super().__call__(text, **options)

    return FailingTokenizer


class GatedText(Gated):
    def generate_text(
        self, input_ids: list[int], options: ReplyOptions, streamer: ReplyStreamer
    ) -> None:
        self.spoil(streamer.decoder, input_ids)
        super().generate_text(input_ids, options, streamer)

    async def consume_streamer(self, streamer: ReplyStreamer) -> AsyncGenerator[str]:
        try:
            async with aclosing(super().consume_streamer(streamer)) as chunks:
                async for text in chunks:
                    yield text
        finally:
            self.report("left")


class GatedTextbot(GatedText, Textbot.func_or_class):
    pass


class GatedChatbot(GatedText, Chatbot.func_or_class):
    async def __init__(self, *arguments: Any, **options: Any) -> None:
        await super().__init__(*arguments, **options)
        self.free_places = MAX_CHATS


class GatedContinuousbot(GatedText, Continuousbot.func_or_class):
    def watch_submit(self) -> None:
        self.submit, self.batch.add = self.batch.add, self.submit_and_report

    def stall_after(self, seconds: float) -> None:
        self.batch.stall_timeout_s = seconds
        self.batch.watched = False  # the next prompt is watched anew


class GatedBatchbot(Gated, Batchbot.func_or_class):
    async def stream_row(self, row: Row) -> AsyncGenerator[str]:
        self.spoil(row.decoder, row.input_ids)
        self.report("asked")
        try:
            async with aclosing(super().stream_row(row)) as chunks:
                async for text in chunks:
                    yield text
        finally:
            self.report("left")


def gated(bot: type, original: serve.Deployment) -> serve.Deployment:
    """A deployment of a gated bot with the options of the original, and faster health checks."""
    return original.options(func_or_class=bot, health_check_period_s=1)
