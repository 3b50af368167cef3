"""Real bots that sometimes fail, and that report the outcomes of requests and what is left."""

import asyncio
import gc
import random
import re
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import count
from typing import Any, NamedTuple

import psutil
from ray.serve.context import _get_serve_request_context
from starlette.types import Receive, Scope, Send

from batchbot import Batchbot, RawStreamer, Row
from chatbot import Chatbot
from continuousbot import Continuousbot
from streaming_bots.generation.streamer import ReplyStreamer
from textbot import Textbot

FAIL_EVERY = 20  # generations, so 5 % of them fail
FAIL_WITHIN = 6  # steps, fewer than any reply takes
SETTLE_S = 10  # anything that still exists after this time is left over
THREAD_OF_POOL = re.compile(r"_\d+$")
OURS = {"streaming_bots", "textbot", "chatbot", "batchbot", "continuousbot"}
PREFILL_S = 0.02  # at least this long, or no client could leave during it


class Report(NamedTuple):
    """An idle replica: what happened since the last report, and what still exists."""

    pid: int
    arrived: dict[str, int]  # by request id; a WebSocket has one id
    outcomes: dict[str, list[str]]  # by request id, in the order in which they were counted
    generations: int
    failures: int
    failing: int  # requests that fail with them; nobody waits for some of these
    left_in: dict[str, int]  # abandoned requests by phase: queue, prefill, tokens, end
    threads: list[str]  # started in Python; a pool counts as one
    native_threads: int
    tasks: list[str]
    objects: dict[str, int]  # of our own types, and queues, by type
    sockets: int


class SoakBot:
    async def __init__(self, begun_port: int, **arguments: Any) -> None:
        await super().__init__(**arguments)
        self.names: dict[Any, str] = {}  # of requests, by their streamers or rows
        self.begun: set[str] = set()
        self.begun_port = begun_port  # where the bot reports which requests its model reads
        self.udp = socket.socket(type=socket.SOCK_DGRAM)
        self.watch_cancelling()
        self.count_outcome = self.metrics.count
        self.metrics.count = self.count_and_note
        self.model.register_forward_pre_hook(self.before_step)
        self.random = random.Random(0)
        self.numbers = count(1)
        self.at_rest: set[asyncio.Task] = set()
        self.forget()

    def forget(self) -> None:
        self.arrived: Counter[str] = Counter()
        self.outcomes: defaultdict[str, list[str]] = defaultdict(list)
        self.generations = self.failures = self.failing = 0
        self.left_in: Counter[str] = Counter()

    def watch_cancelling(self) -> None:
        """Note the name of each request, and its phase when its client leaves."""
        submit, cancel = self.engine.submit, self.engine.cancel

        def submit_and_note(streamer: ReplyStreamer) -> None:
            self.note(streamer)
            submit(streamer)

        def note_and_cancel(streamer: ReplyStreamer) -> None:
            if streamer in self.names and not streamer.done:
                ended = streamer.text.ended.is_set()
                self.note_phase(streamer, len(streamer.token_times), ended)
            self.names.pop(streamer, None)
            cancel(streamer)

        self.engine.submit, self.engine.cancel = submit_and_note, note_and_cancel

    def note(self, streamer: Any) -> None:
        self.names[streamer] = _get_serve_request_context().request_id

    def note_phase(self, streamer: Any, tokens: int, ended: bool) -> None:
        begun = self.names[streamer] in self.begun
        phase = "end" if ended else "tokens" if tokens else "prefill" if begun else "queue"
        self.left_in[phase] += 1

    def tell_begun(self, streamers: list[Any]) -> None:
        """Report what begins. The model's thread calls this before it reads the prompts."""
        for streamer in streamers:
            if (name := self.names.get(streamer)) is not None:
                self.begun.add(name)
                self.udp.sendto(name.encode(), ("127.0.0.1", self.begun_port))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.arrived[_get_serve_request_context().request_id] += 1
        await super().__call__(scope, receive, send)

    def count_and_note(self, outcome: str) -> None:
        self.count_outcome(outcome)
        self.outcomes[_get_serve_request_context().request_id].append(outcome)

    def before_step(self, *_: Any) -> None:
        """Called in the model's thread."""
        raise NotImplementedError

    def begin_generation(self) -> int:
        """Count a generation. Return in which step it fails, or 0 if it shall not."""
        self.generations += 1
        fails = next(self.numbers) % FAIL_EVERY == 0
        return self.random.randint(1, FAIL_WITHIN) if fails else 0

    async def report(self) -> Report:
        """Wait until all requests have ended and the model is idle; report, and start over."""
        own = asyncio.current_task()
        if self.at_rest and (working := asyncio.all_tasks() - self.at_rest - {own}):
            await asyncio.wait(working, timeout=SETTLE_S)
        await self.rest()
        self.begun.clear()
        self.at_rest = asyncio.all_tasks() - {own}
        process = psutil.Process()
        report = Report(
            process.pid,
            dict(self.arrived),
            dict(self.outcomes),
            self.generations,
            self.failures,
            self.failing,
            dict(self.left_in),
            threads=sorted({THREAD_OF_POOL.sub("", name) for name in names_of_threads()}),
            native_threads=process.num_threads(),
            tasks=sorted(task.get_coro().__qualname__ for task in self.at_rest),
            objects=count_objects(),
            sockets=len(process.net_connections("all")),
        )
        self.forget()
        return report

    async def rest(self) -> None:
        """Wait until the model has nothing to do."""
        while self.engine.submitted:
            await self.engine.moved.wait()


def names_of_threads() -> list[str]:
    """Omit the threads of Ray's core, which get a name when they first run a callback."""
    return [
        thread.name
        for thread in threading.enumerate()
        if not isinstance(thread, threading._DummyThread)
    ]


def count_objects() -> dict[str, int]:
    """Count all objects of our own types, and all queues."""
    gc.collect()
    types = Counter(
        type(thing)
        for thing in gc.get_objects()
        if type(thing).__module__.split(".")[0] in OURS or isinstance(thing, asyncio.Queue)
    )
    return {kind.__name__: number for kind, number in types.items()}


class SoakModelThread(SoakBot):
    """Make a step fail, and with it what the model's thread generates."""

    steps_to_failure = 0

    def generate_text(self, streamer: ReplyStreamer) -> None:
        self.steps_to_failure = self.begin_generation()
        self.tell_begun([streamer])
        time.sleep(PREFILL_S)
        super().generate_text(streamer)

    def before_step(self, *_: Any) -> None:
        self.steps_to_failure -= 1
        if self.steps_to_failure == 0:
            self.failures += 1
            self.failing += self.requests_in_generation()
            raise RuntimeError("this step was told to fail")

    def requests_in_generation(self) -> int:
        return 1


class SoakTextbot(SoakModelThread, Textbot.func_or_class):
    pass


class SoakChatbot(SoakModelThread, Chatbot.func_or_class):
    pass


class SoakBatchbot(SoakModelThread, Batchbot.func_or_class):
    def watch_cancelling(self) -> None:
        """Do nothing: `stream_row` knows the rows."""

    def generate_text(self, streamer: RawStreamer) -> None:
        self.rows = streamer.rows
        self.tell_begun(streamer.rows)
        try:
            super().generate_text(streamer)
        finally:
            del self.rows

    def requests_in_generation(self) -> int:
        return sum(not row.end for row in self.rows)

    async def stream_row(self, row: Row) -> AsyncGenerator[str]:
        self.names[row] = _get_serve_request_context().request_id
        try:
            async with aclosing(super().stream_row(row)) as texts:
                async for text in texts:
                    yield text
        except (GeneratorExit, asyncio.CancelledError):
            self.note_phase(row, len(row.token_times), row.end is not None)
            raise
        finally:
            del self.names[row]


class SoakContinuousBatch(SoakBot):
    def note(self, streamer: Any) -> None:
        """Make one reply fail. A failed step would fail all replies and the replica."""
        super().note(streamer)
        if tokens := self.begin_generation():
            self.fail_after(tokens, streamer)

    def fail_after(self, tokens: int, streamer: ReplyStreamer) -> None:
        add = streamer.add

        def add_or_fail(token: int) -> None:
            if len(streamer.token_times) == tokens:
                self.failures += 1
                self.failing += 1
                raise RuntimeError("this token was told to fail")
            add(token)

        streamer.add = add_or_fail

    def before_step(self, *_: Any) -> None:
        active = self.engine.manager.batch_processor.scheduler.active_requests
        begins = [
            streamer
            for streamer, request in list(self.engine.requests.items())
            if request in active and self.names.get(streamer, "") not in self.begun
        ]
        if begins:
            self.tell_begun(begins)
            time.sleep(PREFILL_S)


class SoakContinuousbot(SoakContinuousBatch, Continuousbot.func_or_class):
    pass


class SoakBatchedChatbot(SoakContinuousBatch, Chatbot.func_or_class):
    pass


LITTLE = {"prefix_cache_mb": 1}  # so that the cache soon stops growing
FEW_PLACES = {"max_batch_size": 2}  # so that some requests wait
SOAKED = {
    "textbot": (SoakTextbot, Textbot, LITTLE),
    "chatbot": (SoakChatbot, Chatbot, LITTLE),
    "batched_chatbot": (SoakBatchedChatbot, Chatbot, FEW_PLACES),
    "batchbot": (SoakBatchbot, Batchbot, {}),
    "continuousbot": (SoakContinuousbot, Continuousbot, FEW_PLACES),
}
