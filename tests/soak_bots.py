"""The real bots, failing now and then, which tell what came of each request and what is left."""

import asyncio
import gc
import random
import re
import threading
from collections import Counter, defaultdict
from itertools import count
from typing import Any, NamedTuple

import psutil
from ray.serve.context import _get_serve_request_context
from starlette.types import Receive, Scope, Send

from batchbot import Batchbot, RawStreamer, Row
from chatbot import Chatbot
from serving.streaming import ReplyStreamer
from textbot import Textbot

FAIL_EVERY = 20  # generations: 5 % of them fail
FAIL_WITHIN = 6  # steps, fewer than any reply takes
SETTLE_S = 10  # what is still there after that is left over
THREAD_OF_POOL = re.compile(r"_\d+$")
OURS = {"serving", "textbot", "chatbot", "batchbot"}


class Report(NamedTuple):
    """One replica at rest: what was since the last report, and what is still there."""

    pid: int
    arrived: dict[str, int]  # by request id, of which a WebSocket has one
    outcomes: dict[str, list[str]]  # by request id, in the order in which they were counted
    generations: int
    failures: int
    failing: int  # requests that the failures concern, some of which nobody waits for
    threads: list[str]  # started in Python; a pool counts as one
    native_threads: int
    tasks: list[str]
    objects: dict[str, int]  # our own and queues, by type
    sockets: int


class Soaked:
    async def __init__(self, **arguments: Any) -> None:
        await super().__init__(**arguments)
        self.count_outcome = self.metrics.count
        self.metrics.count = self.count_and_note
        self.model.register_forward_pre_hook(self.before_step)
        self.random = random.Random(0)
        self.numbers = count(1)
        self.steps_to_failure = 0
        self.at_rest: set[asyncio.Task] = set()
        self.forget()

    def forget(self) -> None:
        self.arrived: Counter[str] = Counter()
        self.outcomes: defaultdict[str, list[str]] = defaultdict(list)
        self.generations = self.failures = self.failing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.arrived[_get_serve_request_context().request_id] += 1
        await super().__call__(scope, receive, send)

    def count_and_note(self, outcome: str) -> None:
        self.count_outcome(outcome)
        self.outcomes[_get_serve_request_context().request_id].append(outcome)

    def generate_text(self, *arguments: Any) -> None:
        self.generations += 1
        fails = next(self.numbers) % FAIL_EVERY == 0
        self.steps_to_failure = self.random.randint(1, FAIL_WITHIN) if fails else 0
        super().generate_text(*arguments)

    def before_step(self, *_: Any) -> None:
        self.steps_to_failure -= 1
        if self.steps_to_failure == 0:
            self.failures += 1
            self.failing += self.requests_in_generation()
            raise RuntimeError("this step was told to fail")

    def requests_in_generation(self) -> int:
        return 1

    async def report(self) -> Report:
        """Wait until all requests are over and the model rests; begin anew."""
        own = asyncio.current_task()
        if self.at_rest and (working := asyncio.all_tasks() - self.at_rest - {own}):
            await asyncio.wait(working, timeout=SETTLE_S)
        streamer = ReplyStreamer(self.tokenizer)
        self.model_thread.submit(streamer, ReplyStreamer.end)
        async for _ in streamer:
            pass
        self.at_rest = asyncio.all_tasks() - {own}
        process = psutil.Process()
        report = Report(
            process.pid,
            dict(self.arrived),
            dict(self.outcomes),
            self.generations,
            self.failures,
            self.failing,
            threads=sorted({THREAD_OF_POOL.sub("", name) for name in names_of_threads()}),
            native_threads=process.num_threads(),
            tasks=sorted(task.get_coro().__qualname__ for task in self.at_rest),
            objects=count_objects(),
            sockets=len(process.net_connections("all")),
        )
        self.forget()
        return report


def names_of_threads() -> list[str]:
    """Without the threads of Ray's core, which get a name when they first run a callback."""
    return [
        thread.name
        for thread in threading.enumerate()
        if not isinstance(thread, threading._DummyThread)
    ]


def count_objects() -> dict[str, int]:
    """All objects of our own types, and all queues."""
    gc.collect()
    types = Counter(
        type(thing)
        for thing in gc.get_objects()
        if type(thing).__module__.split(".")[0] in OURS or isinstance(thing, asyncio.Queue)
    )
    return {kind.__name__: number for kind, number in types.items()}


class SoakedTextbot(Soaked, Textbot.func_or_class):
    pass


class SoakedChatbot(Soaked, Chatbot.func_or_class):
    pass


class SoakedBatchbot(Soaked, Batchbot.func_or_class):
    def generate_text(self, rows: list[Row], streamer: RawStreamer) -> None:
        self.rows = rows
        try:
            super().generate_text(rows, streamer)
        finally:
            del self.rows

    def requests_in_generation(self) -> int:
        return sum(not row.finished for row in self.rows)


SOAKED = {SoakedTextbot: Textbot, SoakedChatbot: Chatbot, SoakedBatchbot: Batchbot}
