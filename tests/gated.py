"""The real bots with a gate before each step of the model, so that tests decide what happens when.

A test lets the model take some steps, does what it is about (reads, disconnects, asks again),
waits for the events that this causes in the replica, and lets the model go on.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import ray
from ray import serve

from batchbot import Batchbot, Row
from chatbot import Chatbot
from serving.streaming import ReplyStreamer
from textbot import Textbot

HANG_S = 60  # only bounds a hang


@ray.remote(num_cpus=0)
class GateActor:
    """Counts the events of one bot: "submitted", "step", "left", for the Batchbot "asked"."""

    def __init__(self) -> None:
        self.changed = asyncio.Condition()
        self.era = 0
        self.events: Counter[str] = Counter()
        self.allowed: float = math.inf
        self.fail_at: int | None = None

    async def set(self, steps: float, fail_at: int | None) -> None:
        """Begin anew; what an earlier test still holds goes on."""
        async with self.changed:
            self.era += 1
            self.events.clear()
            self.allowed, self.fail_at = steps, fail_at
            self.changed.notify_all()

    async def release(self, steps: float) -> None:
        async with self.changed:
            self.allowed += steps
            self.changed.notify_all()

    async def record(self, event: str) -> None:
        async with self.changed:
            self.events[event] += 1
            self.changed.notify_all()

    async def step(self) -> bool:
        """Wait for leave to take a step; return whether it is to fail."""
        await self.record("step")
        step, era = self.events["step"], self.era
        async with self.changed:
            await self.changed.wait_for(lambda: self.allowed >= step or self.era != era)
        return step == self.fail_at and self.era == era

    async def wait(self, event: str, count: int) -> None:
        async with self.changed:
            await asyncio.wait_for(
                self.changed.wait_for(lambda: self.events[event] >= count), HANG_S
            )

    def count(self, event: str) -> int:
        return self.events[event]


class Gate:
    """A test's view of the gate of one bot."""

    def __init__(self) -> None:
        self.actor = GateActor.remote()

    def open(self) -> None:
        """Let the model run freely, and forget what happened."""
        ray.get(self.actor.set.remote(math.inf, None))

    def hold_after(self, steps: int) -> None:
        """Let the model take some steps and hold it before the next; forget what happened."""
        ray.get(self.actor.set.remote(steps, None))

    def fail_at(self, step: int) -> None:
        """Let the model run, and fail at a step, from 1."""
        ray.get(self.actor.set.remote(math.inf, step))

    def release(self, steps: float = math.inf) -> None:
        ray.get(self.actor.release.remote(steps))

    def wait(self, event: str, count: int) -> None:
        """Wait until something has happened so many times."""
        ray.get(self.actor.wait.remote(event, count))

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


class Gated:
    async def __init__(self, gate: Any, **arguments: Any) -> None:
        await super().__init__(**arguments)
        self.gate = gate
        self.report = Reporter(gate)
        self.submit = self.model_thread.submit
        self.model_thread.submit = self.submit_and_report
        self.model.register_forward_pre_hook(self.before_step)

    def submit_and_report(self, *arguments: Any) -> int:
        ahead = self.submit(*arguments)
        self.report("submitted")
        return ahead

    def before_step(self, *_: Any) -> None:
        if ray.get(self.gate.step.remote()):
            raise RuntimeError("this step was told to fail")


class GatedText(Gated):
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
    pass


class GatedBatchbot(Gated, Batchbot.func_or_class):
    async def stream_row(self, row: Row) -> AsyncGenerator[str]:
        self.report("asked")
        try:
            async with aclosing(super().stream_row(row)) as chunks:
                async for text in chunks:
                    yield text
        finally:
            self.report("left")


def gated(bot: type, original: serve.Deployment) -> serve.Deployment:
    """A deployment of a gated bot with the options of the original."""
    return original.options(func_or_class=bot)
