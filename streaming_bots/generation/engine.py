"""The base class of both engines: their queue, their watchdog, and how replies end."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from itertools import takewhile
from typing import Protocol

import torch
from transformers import PreTrainedModel

from streaming_bots.errors import ModelStalled, TooManyWaiting
from streaming_bots.operations.metrics import BotMetrics
from streaming_bots.settings import BotSettings

logger = logging.getLogger("ray.serve")


class Streamer(Protocol):
    """Receives the model's output: the text of one reply, or the tokens of a batch."""

    @property
    def done(self) -> bool:
        """Whether its reader has left, or has read to its end."""

    def end(self) -> None: ...
    def fail(self, error: Exception) -> None: ...
    def cancel(self) -> None: ...


class Engine(ABC):
    """Runs the model for each submitted streamer.

    A streamer ends with its reply, with the exception that its run raised, or with ModelStalled
    after `stall_timeout_s` seconds without progress. Create and use it on the event loop.
    """

    def __init__(
        self,
        places: int,  # how many streamers run at once
        settings: BotSettings,
        metrics: BotMetrics | None,  # None: the bot itself counts waiting and running replies
    ) -> None:
        self.places = places
        self.metrics = metrics
        self.max_waiting = settings.max_waiting
        self.submitted: dict[Streamer, None] = {}  # all that have not ended, in order
        self.running: set[Streamer] = set()  # those of them that have begun
        self.moved = asyncio.Event()  # set and replaced when either changes
        self.error: Exception | None = None
        self.stall_timeout_s = settings.stall_timeout_s
        self.progress = 0.0  # when the model last made some, by time.monotonic
        self.watching: asyncio.TimerHandle | None = None

    def submit(self, streamer: Streamer) -> None:
        """Queue a streamer. If a place is free, its reply begins at once.

        Raises TooManyWaiting, or the error that ended the engine.
        """
        self.check()
        without_place = len(self.submitted) - self.places
        if self.max_waiting is not None and without_place >= self.max_waiting:
            raise TooManyWaiting(f"{self.max_waiting} prompts already wait for the model")
        if self.watching is None or not self.has_work():
            self.note_progress()  # the time without work does not count
        self.submitted[streamer] = None
        if self.watching is None:
            self._look()
        self._start(streamer)
        self._changed()

    async def line(self, streamer: Streamer) -> AsyncGenerator[int]:
        """Yield how many replies must end before this one begins, each time that number changes.

        Stops when the reply begins. If a place is free for it, yields nothing.
        """
        told = 0
        while streamer in self.submitted and streamer not in self.running and not streamer.done:
            earlier = takewhile(lambda other: other is not streamer, self.submitted)
            ahead = max(0, sum(not other.done for other in earlier) - self.places + 1)
            if ahead != told:
                told = ahead
                yield ahead
            else:
                await self.moved.wait()
        if told and not streamer.done:
            yield 0

    def has_work(self) -> bool:
        """Whether the model must make progress."""
        return bool(self.submitted)

    def in_progress(self) -> int:
        """Return how many replies wait or run, and still have a reader."""
        return sum(not streamer.done for streamer in self.submitted)

    @abstractmethod
    def cancel(self, streamer: Streamer) -> None:
        """Stop a streamer's run, or remove it from the queue. Does nothing after its end."""

    def check(self) -> None:
        """Raise the error that ended the engine, such as ModelStalled."""
        if self.error is not None:
            raise type(self.error)(*self.error.args)

    def give_up(self, error: Exception) -> None:
        """Fail all replies with the same exception, so that it is logged only once."""
        if self.error is None:
            self.error = error
            logger.error(f"{error}; Serve will replace this replica")
            for streamer in list(self.submitted):
                streamer.fail(error)
                self.cancel(streamer)

    def note_progress(self) -> None:
        """Note that the model computes. Any thread may call this."""
        self.progress = time.monotonic()

    def _look(self, stood_at: float | None = None) -> None:
        """The watchdog: give up after `stall_timeout_s` seconds of work without progress.

        `stood_at` is the last progress if the model seemed to hang before.
        """
        self.watching = None
        if not self.has_work():
            return  # `submit` calls it again
        look_in = asyncio.get_running_loop().call_later
        progress = self.progress
        if (left := progress + self.stall_timeout_s - time.monotonic()) > 0:
            self.watching = look_in(left, self._look)
        elif progress != stood_at:
            # If the whole process was suspended, the model continues only now. So look once more.
            self.watching = look_in(self.stall_timeout_s / 10, self._look, progress)
        else:
            self.give_up(ModelStalled(f"the model made no progress for {self.stall_timeout_s} s"))

    @abstractmethod
    def _start(self, streamer: Streamer) -> None:
        """Run the model for a streamer, now or later."""

    def _changed(self) -> None:
        if self.metrics is not None:
            self.metrics.waiting.set(len(self.submitted) - len(self.running))
            self.metrics.running.set(len(self.running))
        self.moved.set()
        self.moved = asyncio.Event()


def watch_layers(model: PreTrainedModel, note_progress: Callable[[], None]) -> None:
    """Call `note_progress` before each layer computes, even in a prefill that takes minutes."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.register_forward_pre_hook(lambda *_: note_progress())
